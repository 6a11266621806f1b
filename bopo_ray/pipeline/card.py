"""What stands beside each saved router: `router.json` for programs, and a model card, README.md, for people.

Both are there as soon as the router is, and get their figures when the run has evaluated it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bopo_ray.analysis.bootstrap import bootstrap_ci
from bopo_ray.benchmarks import env_label
from bopo_ray.code import code_version
from bopo_ray.files import write_json
from bopo_ray.pipeline.run import Run
from bopo_ray.rllib.saved import ROUTER_FILE, about

__all__ = ["CARD", "add_results", "describe", "describe_as", "refresh_cards"]

CARD = "README.md"
FIGURES = {"success": "success", "score": "mean score", "cost_usd": "dollars per task", "large_calls": "large calls"}
"""Of the results' points, each with its interval."""


def describe(run: Run, folder: Path, name: str, **how: Any) -> None:
    """Says in a router's folder what it chooses between and how it was trained: `how`, e.g. lam=0.1, updates=8."""
    s, pool = run.settings, run.pool
    classes = pq.read_table(run.out / "boundaries.parquet", columns=["difficulty"])["difficulty"]
    trained = {
        "name": name, "env": s.env, "label": pool.label, "price_hash": pool.price_hash, "cost": s.cost, "beta": s.beta,
        "models": [
            {"name": m.name, "input_usd": m.price.input / 1e6, "cached_input_usd": m.price.cached_input / 1e6,
             "output_usd": m.price.output / 1e6} for m in pool.models
        ],
        "tasks": len(run.train), "max_steps": s.max_steps, "value": bool(s.router_shape.get("value")),
        "taxonomy": {str(c["values"]): c["counts"].as_py() for c in pc.value_counts(classes)}, "how": how,
        "code": code_version(),
    }  # fmt: skip
    _write(folder, {**about(folder), "trained": trained})


def describe_as(source: Path, folder: Path, name: str, **how: Any) -> None:
    """Says in the folder of a router made from that in `source` what was said there, but for its name and `how`.

    A `lam` of `how` is the lambda that it is chosen for: what it was trained at stays.
    """
    trained = about(source)["trained"]
    lam = how.pop("lam", None)
    if lam != trained["how"].get("lam"):
        how["chosen_for_lam"] = lam
    _write(folder, {**about(folder), "trained": {**trained, "name": name, "how": trained["how"] | how}})


def add_results(folder: Path, episodes: pd.DataFrame, decide: str) -> None:
    """Says in a router's folder how it did in `episodes`: columns task and those of the results' points."""
    means = episodes.astype(dict.fromkeys(FIGURES, float)).groupby("task")[list(FIGURES)].mean()
    if len(means) < 2:  # one task has no interval
        return
    found = {name: bootstrap_ci(means[name]) for name in FIGURES}
    results = {name: [own.estimate, own.low, own.high] for name, own in found.items()}
    _write(folder, {**about(folder), "evaluation": {"tasks": len(means), "decide": decide} | results})


def refresh_cards(run: Run, summary: dict[str, Any], command: str) -> None:
    """Adds the command and the figures of the evaluation to all of a run's routers."""
    points = {p["policy"]: p for p in summary["points"]}
    for folder in (p for p in (run.out / "policies").iterdir() if (p / ROUTER_FILE).exists()):
        known, point = about(folder), points.get(folder.name)
        known["command"] = command
        if point:
            known["evaluation"] = {"tasks": point["n_tasks"], "decide": run.settings.decide} | {
                name: [point[name], point[f"{name}_low"], point[f"{name}_high"]] for name in FIGURES
            }
        _write(folder, known)


def _write(folder: Path, known: dict[str, Any]) -> None:
    write_json(folder / ROUTER_FILE, known)
    (folder / CARD).write_text(card(known))


def card(known: dict[str, Any]) -> str:
    """The model card of what `router.json` holds."""
    t, backbone = known["trained"], known.get("backbone")
    library = "bopo_ray" if not backbone else "peft" if known["lora_rank"] else "transformers"
    head = ["---", f"library_name: {library}"]
    if backbone:
        head += [f"base_model: {backbone}", "base_model_relation: " + ("adapter" if known["lora_rank"] else "finetune")]
    parts = [
        "\n".join([*head, "tags: [bopo_ray, routing]", "---"]),
        f"# {t['name']}: a router between {len(t['models'])} language models",
        "It reads a task, the remaining budget and an agent's history, and says which model writes the next action.",
        _usage(known),
        _kind(known, library),
        "## Models\n\n| | model | dollars per million tokens: input | cached input | output |\n|---|---|---|---|---|\n"
        + "\n".join(
            f"| {i} | `{m['name']}` | {m['input_usd']:g} | {m['cached_input_usd']:g} | {m['output_usd']:g} |"
            for i, m in enumerate(t["models"])
        )
        + f"\n\nPrice table {t['price_hash']}; the pair is {t['label']}.",
        "## Training\n\n"
        f"{t['tasks']} tasks of {env_label(t['env'])}, {t['max_steps']} steps each: "
        + ", ".join(f"{n} {c}" for c, n in sorted(t["taxonomy"].items()))
        + f". Cost in {t['cost']}, beta {t['beta']:g}; "
        + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in t["how"].items() if v is not None)
        + (f". By bopo_ray {t['code']}." if "code" in t else "."),
        _results(known),
    ]
    if known.get("command"):
        parts.append(f"## Command\n\n```bash\n{known['command']}\n```")
    return "\n\n".join(parts) + "\n"


def _usage(known: dict[str, Any]) -> str:
    trained, limit = known["trained"], known["trained"]["how"].get("call_limit")
    large = f", and of at most {limit} large calls" if limit is not None else ""
    seed = ", seed=1" if known.get("evaluation", {}).get("decide") == "sample" else ""
    return (
        "```python\nfrom bopo_ray import load_router\n\n"
        'router = load_router("THIS FOLDER")\n'
        f'episode = router.begin("the task", "the first observation"{seed})  '
        f"# of {trained['max_steps']} steps{large}\n"
        "print(router.models[episode.decide().model])  # it writes the next action\n"
        'episode.after("the action", "what the environment said")  # and then decide() again\n```'
    )


def _kind(known: dict[str, Any], library: str) -> str:
    if library == "bopo_ray" and known["trained"].get("value"):
        return (
            "A small network over two numbers: how likely the smallest model alone succeeds from here on, by a "
            "logistic regression on the view's tokens, and how many steps were taken."
        )
    if library == "bopo_ray":
        return "A small transformer encoder with a tokenizer of its own."
    how = f"LoRA of rank {known['lora_rank']} on {known['lora_targets']}" if library == "peft" else "full fine-tuning"
    decides = "the logits of one letter per model" if known["causal"] else "a linear head"
    return (
        f"`{known['backbone']}` with {how}; it reads up to {known['context']} tokens and decides by {decides}. "
        f"The weights are the average over the updates; `{library}` loads them, `{ROUTER_FILE}` has the rest."
    )


def _results(known: dict[str, Any]) -> str:
    e = known.get("evaluation")
    if not e:
        return "## Results\n\nNot evaluated by itself."
    rows = []
    for name, words in FIGURES.items():
        mean, low, high = e[name]
        rows.append(f"| {words} | {mean:.4g} | {'–' if low is None else f'{low:.4g} to {high:.4g}'} |")
    tasks, intervals = f"{e['tasks']} held-out tasks", "95% bootstrap intervals over tasks"
    if e["tasks"] == 1:
        tasks, intervals = "1 held-out task", "one task has no interval"
    said = f"On {tasks}, decided by {e['decide']}; {intervals}."
    return "\n".join(["## Results", "", said, "", "| | mean | interval |", "|---|---|---|", *rows])
