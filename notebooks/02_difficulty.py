# %% [markdown]
# # Easy, Hard and Intractable
#
# The training tasks after the boundary rollouts: always-small and always-large played each of them K times. *Easy*: the
# small model alone mostly succeeds. *Intractable*: neither has succeeded. *Hard*: the rest, where routing matters most.

# %%
# %matplotlib inline
import json
import os
from pathlib import Path

import pandas as pd

from bopo_ray.analysis import plots

RUN = Path(os.environ.get("BOPO_RAY_RUN", "../results/scienceworld-v0-embedded-quick"))
assert (RUN / "summary.json").exists(), f"no finished run in {RUN.resolve()}: set BOPO_RAY_RUN to the full path of one"
summary = json.loads((RUN / "summary.json").read_text())
tasks = pd.read_parquet(RUN / "boundaries.parquet")
tasks["kind"] = tasks["task"].str.rpartition("/")[0]
tasks["inverted"] = tasks["cost_small_usd"] > tasks["cost_large_usd"]
CLASSES = [c for c in ("easy", "hard", "intractable") if c in set(tasks["difficulty"])]
LABEL = summary["label"]
print(summary["note"])

# %% [markdown]
# ## How many of each, and what they cost
#
# Below the diagonal the small model is the dearer one: it repeats itself until the step limit.

# %%
plots.taxonomy_figure(tasks, label=LABEL)

# %%
by_class = tasks.groupby("difficulty").agg(
    tasks=("task", "size"),
    success_small=("successes_small", "sum"),
    success_large=("successes_large", "sum"),
    rollouts=("k", "sum"),
    cost_small_usd=("cost_small_usd", "mean"),
    cost_large_usd=("cost_large_usd", "mean"),
    small_is_dearer=("inverted", "sum"),
)
for model in ("small", "large"):
    by_class[f"success_{model}"] /= by_class["rollouts"]
by_class.loc[CLASSES].style.format(precision=4)

# %% [markdown]
# ## By kind of task
#
# Kinds that are all of one class teach a router little beyond their name.

# %%
kinds = pd.crosstab(tasks["kind"], tasks["difficulty"])[CLASSES]
kinds = kinds.loc[kinds.sum(axis=1).sort_values().index]
colours = {"easy": "#009E73", "hard": "#0072B2", "intractable": "#9ca3af"}
axes = kinds.plot.barh(stacked=True, figsize=(9, 0.32 * len(kinds) + 1.2), color=colours, width=0.8)
axes.set(xlabel="training tasks", ylabel="")
axes.legend(bbox_to_anchor=(1, 1), frameon=False)
_ = axes.set_title(f"Classes within each kind of task ({LABEL})", loc="left")

# %% [markdown]
# ## Where the small model costs more than the large one

# %%
inverted = tasks[tasks["inverted"]].assign(times=lambda t: t["cost_small_usd"] / t["cost_large_usd"])
columns = ["task", "difficulty", "cost_small_usd", "cost_large_usd", "times", "steps_small", "steps_large"]
inverted.sort_values("times", ascending=False)[columns].head(15).style.format(precision=4).hide(axis="index")
