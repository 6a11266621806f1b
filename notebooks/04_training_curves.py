# %% [markdown]
# # Training curves
#
# From BoSFT's start to the last update of each point of the sweep; TensorBoard shows them while a run goes on.

# %%
# %matplotlib inline
import json
import os
from pathlib import Path

import pandas as pd

from bopo_ray.analysis import plots
from bopo_ray.pipeline.curves import training_curves

RUN = Path(os.environ.get("BOPO_RAY_RUN", "../results/scienceworld-v0-embedded-quick"))
assert (RUN / "summary.json").exists(), f"no finished run in {RUN.resolve()}: set BOPO_RAY_RUN to the full path of one"
summary = json.loads((RUN / "summary.json").read_text())
curves = training_curves(RUN)
LABEL = summary["label"]
print(summary["note"])

# %% [markdown]
# ## Where BoPO starts
#
# BoSFT's kept epoch, and the mean probability of LARGE that it leaves on Hard training states: below 0.10 the gate
# stops the run, because a router that never asks the large model can't learn when to.

# %%
pd.Series(json.loads((RUN / "bosft.json").read_text())).to_frame("BoSFT")

# %% [markdown]
# ## Does it learn, and what?
#
# Rewards of different lambdas can't be compared with each other: each line against its own start.

# %%
measures = ["reward", "success", "cost_usd", "large_calls", "share_large", "success_hard", "share_large_hard"]
measures = [name for name in measures if name in curves]
plots.training_curves_figure(curves, "What the episodes bring", LABEL, measures)

# %% [markdown]
# ## Is it healthy?
#
# KL to the frozen start stays small; an entropy of 0 is a router that has stopped to explore; skipped groups taught
# nothing, because all their episodes were alike.

# %%
health = ["kl", "entropy", "clip_fraction", "grad_norm", "skipped_groups"]
plots.training_curves_figure(curves, "How the router changes", LABEL, health)

# %% [markdown]
# ## Collapse
#
# A router that has collapsed asks the large model for hardly any step, or for nearly all, also on Hard tasks.

# %%
last = curves[curves["iteration"] == curves.groupby("trial")["iteration"].transform("max")]
last[["method", "lam", "seed", "iteration", *measures[1:], "kl", "entropy"]].style.format(precision=3).hide(
    axis="index"
)
