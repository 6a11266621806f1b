# %% [markdown]
# # An episode, step by step
#
# What the router saw, what it chose, what came of it and what it paid. Change `POLICY` and `NUMBER` and run again.

# %%
# %matplotlib inline
import json
import os
from pathlib import Path

import pandas as pd
import yaml

from bopo_ray.analysis.trajectory import step_records
from bopo_ray.models.pool import read_pool
from bopo_ray.models.pricing import PriceTable
from bopo_ray.store import EpisodeStore

RUN = Path(os.environ.get("BOPO_RAY_RUN", "../results/scienceworld-v0-embedded-quick"))
assert (RUN / "summary.json").exists(), f"no finished run in {RUN.resolve()}: set BOPO_RAY_RUN to the full path of one"
summary = json.loads((RUN / "summary.json").read_text())
settings = yaml.safe_load((RUN / "settings.yaml").read_text())
MODELS = [m.label for m in read_pool(RUN / "pool.yaml", PriceTable("", (), ())).models]
store = EpisodeStore(RUN / "episodes" / "evaluation", summary["price_hash"])
trained = [p["policy"] for p in summary["points"] if p["lam"] is not None]
print(summary["note"], "Trained policies:", *trained, sep="\n")

# %% [markdown]
# ## Choose one

# %%
own = [p["policy"] for p in summary["points"] if p["method"] == summary["headline"]] or trained
POLICY = own[len(own) // 2]
NUMBER = 0

episodes = sorted(store.read(policy=POLICY), key=lambda e: not 0 < e.large_calls < len(e.steps))  # mixed ones first
episode = episodes[NUMBER]
pd.DataFrame(
    {
        "task": e.spec.task.name, "success": e.success, "score": e.score, "stop": str(e.stop), "steps": len(e.steps),
        "large_calls": e.large_calls, "cost_usd": e.cost_microusd / 1e6,
    }
    for e in episodes
).head(20)  # fmt: skip

# %% [markdown]
# ## At a glance
#
# A bar per step, as high as p(LARGE), dark where a large model wrote it; the line is what was spent so far.

# %%
context = 0 if settings.get("backbone") else settings["context"]  # a backbone has tokens of its own: all of it
steps = pd.DataFrame(step_records(episode, MODELS, context), index=range(1, len(episode.steps) + 1))
colours = ["#0072B2" if large else "#aeb8c4" for large in steps["large"]]
axes = steps["p_large"].plot.bar(figsize=(11, 3.2), color=colours, width=0.85, ylim=(0, 1), rot=0)
axes.set(xlabel="step", ylabel="p(LARGE)")
axes.set_title(f"{episode.spec.task.name}, {POLICY}: {episode.stop}, ${episode.cost_microusd / 1e6:.4f}", loc="left")
spent = axes.twinx()
spent.plot(range(len(steps)), steps["spent_usd"], color="#D55E00", marker=".")
spent.set_ylim(0)
_ = spent.set_ylabel("spent so far (USD)", color="#D55E00")

# %% [markdown]
# ## Every step

# %%
print(episode.task_text)
for number, step in steps.iterrows():
    print(f"\n{'=' * 40} step {number} of {len(steps)}")
    print(step["view"], end="\n\n")
    forced = ", forced by the budget" if step["masked"] else ""
    print(f"p(LARGE) {step['p_large']:.2f} -> {step['model']}{forced}")
    print(f"paid ${step['cost_usd']:.5f}, ${step['spent_usd']:.5f} so far")
    print(step["reply"])
    print(f"=> {step['observation']}")

# %% [markdown]
# ## The same task with the other policies

# %%
same = [e for e in store.read() if e.spec.task == episode.spec.task]
pd.DataFrame(
    {
        "policy": e.spec.policy, "success": e.success, "score": e.score, "steps": len(e.steps),
        "large_calls": e.large_calls, "cost_usd": e.cost_microusd / 1e6,
    }
    for e in same
).sort_values("cost_usd").style.format(precision=4).hide(axis="index")  # fmt: skip
