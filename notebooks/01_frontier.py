# %% [markdown]
# # The frontier of a run
#
# What `make frontier` left in its results folder, drawn; nothing is run here. `BOPO_RAY_RUN`, or `RUN` below, names
# another run.

# %%
# %matplotlib inline
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from bopo_ray.analysis import plots
from bopo_ray.analysis.cost_unit import cost_unit
from bopo_ray.analysis.story import tell

RUN = Path(os.environ.get("BOPO_RAY_RUN", "../results/scienceworld-v0-embedded-quick"))
assert (RUN / "summary.json").exists(), f"no finished run in {RUN.resolve()}: set BOPO_RAY_RUN to the full path of one"
summary = json.loads((RUN / "summary.json").read_text())
frontier = pd.read_csv(RUN / "frontier.csv")
LABEL = summary["label"]

story = tell(summary)
print(*filter(None, (story.sentence, *story.findings, story.caution, summary["note"])), sep="\n")

# %% [markdown]
# ## Success against cost
#
# Each mark is a policy on the held-out tasks, with 95% bootstrap intervals over tasks. Further left is cheaper, further
# up is better; the steps are what a user of one method can choose from.

# %%
plots.frontier_figure(frontier, summary, f"{summary['env']}, {summary['n_tasks']} held-out tasks", LABEL)

# %%
columns = ["method", "policy", "success", "success_low", "success_high", "score", "cost_usd", "large_calls", "on_front"]
frontier[columns].sort_values(cost_unit(summary).column).style.format(precision=4).hide(axis="index")

# %% [markdown]
# ## Methods compared
#
# Hypervolume of each method together with the two boundary policies, which anyone can deploy, and the paired difference
# to the headline method. An interval that holds 0 settles nothing.

# %%
volumes = pd.DataFrame(summary["hypervolumes"]).T
differences = pd.DataFrame(summary["differences"]).T.add_prefix("difference_")
compared = volumes.join(differences).sort_values("estimate", ascending=False)
compared.style.format(precision=4)

# %%
gaps = compared.dropna(subset=["difference_estimate"])[::-1]
reach = abs(gaps[["difference_low", "difference_high"]].sub(gaps["difference_estimate"], axis=0)).T.to_numpy()
figure, axes = plt.subplots(figsize=(9, 0.4 * len(gaps) + 1.2))
axes.errorbar(gaps["difference_estimate"], gaps.index, xerr=reach, fmt="o", color="#0072B2", capsize=3)
axes.axvline(0, color="grey", linewidth=1)
_ = axes.set_title(f"Hypervolume: {summary['headline']} less each method ({LABEL})", loc="left")

# %% [markdown]
# ## What is saved at equal success
#
# The share of always-large's cost that the cheapest policy saved which reached so much of its success on these tasks.
# It was picked on the tasks that it is measured on, so this is rather too good.

# %%
saved = pd.DataFrame(
    {
        "method": m,
        "of its success": f"{r['success_share']:.0%}",
        "saved": "–" if r["saved"]["estimate"] is None else f"{r['saved']['estimate']:.0%} ({r['policy']})",
    }
    for m, records in summary["cost_saved"].items()
    for r in records
)
saved.pivot(index="method", columns="of its success", values="saved")[saved["of its success"].unique()]
