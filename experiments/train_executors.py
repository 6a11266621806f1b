"""Makes the embedded language models again, from nothing: demonstrations, training, evaluation.

    python -m experiments.train_executors --env ScienceWorld-v0 --size small
    python -m experiments.train_executors --env ScienceWorld-v0 --size large

Plays the environment's expert on the executors' own tasks (kept as Parquet, shared by both sizes), trains a small Llama
by behaviour cloning, and writes a folder that `transformers` loads, in `--work` unless `--out` names another; with that
of one of the package's own, in bopo_ray/models/data/embedded, it replaces it, at the end and whole. Expect 10 to 20
minutes of playing on 2 cores, then 6 (small), 20 (ALFWorld's large) or about 90 (ScienceWorld's) of training on one,
minutes on a GPU; both may train at once. TensorBoard reads `--work`. A run that was stopped goes on with the same
command.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bopo_ray.errors import ConfigError
from bopo_ray.executors.card import model_card
from bopo_ray.executors.demos import EXPERTS, Demo, collect
from bopo_ray.executors.recipes import RECIPES, Recipe
from bopo_ray.pipeline.command import exit_code, refused, script_parser

__all__ = ["main"]

EXECUTOR = "executor.json"

ENOUGH = 20
"""Tasks of a kind that must be shown, for the models to be asked for others: a rule of the data, not of results."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = script_parser("train_executors", __doc__)
    parser.add_argument("--env", required=True, choices=sorted(EXPERTS))
    parser.add_argument(
        "--size", choices=("small", "large"), help="which one; without it, only demonstrations are made"
    )
    parser.add_argument("--work", type=Path, default=Path("results/executors"), help="demonstrations and checkpoints")
    parser.add_argument("--out", type=Path, help="folder of the model (default: models/FAMILY-SIZE in --work)")
    parser.add_argument("--name", default="", help="of a variant: checkpoints and a folder of its own")
    parser.add_argument("--demos", type=int, default=0, help="tasks to show at most (default: all)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that play at once")
    parser.add_argument("--threads", type=int, default=1, help="of the training; results differ in the last bits")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="that trains")
    for field in dataclasses.fields(Recipe):
        flag, kind = f"--{field.name.replace('_', '-')}", {"int": int, "float": float, "bool": _flag}[str(field.type)]
        parser.add_argument(flag, type=kind, help=f"instead of the recipe's {field.name}")
    args = parser.parse_args(argv)
    if code := exit_code(lambda: make(args)):
        sys.exit(code)


def make(args: argparse.Namespace) -> int:
    """Demonstrations, training, and the model's folder; 0. Raises ConfigError in one line."""
    for option, least in (("processes", 1), ("threads", 1), ("demos", 0)):
        if (value := getattr(args, option)) < least:
            raise ConfigError(f"{option}={value}: need at least {least}; set it with --{option}")
    recipe, device = (_recipe(args), _device(args.device)) if args.size else (None, "")
    family = args.env.split("-")[0].lower()
    name = f"{family}-{args.size}" + (f"-{args.name}" if args.name else "")
    out = args.out or args.work / "models" / name
    demonstrations = args.work / family / "demos"
    with refused("work", args.work):
        demonstrations.mkdir(parents=True, exist_ok=True)
    made = out / "made"  # complete, it takes the place of what is in `out`
    with refused("out", out):
        if args.size:
            made.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    log: list[str] = []

    def report(line: str) -> None:
        log.append(f"{time.monotonic() - started:6.0f} s  {line}")
        print(log[-1], file=sys.stderr, flush=True)

    demos = collect(args.env, demonstrations, args.processes, args.demos, report)
    report(f"{len(demos)} demonstrations of {len({d.task for d in demos})} tasks")
    if recipe is None:
        return 0
    import torch

    from bopo_ray.executors.train import train, train_tokenizer

    torch.set_num_threads(args.threads)
    train_tokenizer(demos, made / "tokenizer.json")
    found = train(args.env, demos, recipe, args.work / family / name, made, report, device)
    about = {
        "format": 1, "env": args.env, "size": args.size, "recipe": dataclasses.asdict(recipe),
        "kinds": _kinds(demos), "demonstrations": len(demos), "found": found,
        "made_by": f"python -m experiments.train_executors --env {args.env} --size {args.size}",
    }  # fmt: skip
    (made / EXECUTOR).write_text(json.dumps(about, indent=1) + "\n")
    (made / "README.md").write_text(model_card(about))
    report(f"done: {found}")
    (made / "training.log").write_text("\n".join(log) + "\n")
    _replace(out, made)
    return 0


def _replace(out: Path, made: Path) -> None:
    """Moves the files of a finished model to their place. Without executor.json, which is taken away first and comes
    last, nobody reads a folder: an end in the middle leaves no model that is made of two."""
    (out / EXECUTOR).unlink(missing_ok=True)
    for path in sorted(made.iterdir(), key=lambda p: p.name == EXECUTOR):
        path.replace(out / path.name)
    made.rmdir()


def _kinds(demos: Sequence[Demo]) -> list[str]:
    """Kinds of which so many tasks were shown that a model can be asked for others."""
    tasks = Counter(kind for kind, _ in {(d.kind, d.task) for d in demos})
    return sorted(kind for kind, n in tasks.items() if n >= ENOUGH)


def _device(asked: str) -> str:
    """What trains. Raises ConfigError when it is not there."""
    import torch

    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise ConfigError("device='cuda': no GPU here; need cpu or auto; set it with --device")
    return asked if asked != "auto" else "cuda" if there else "cpu"


def _flag(text: str) -> bool:
    """For argparse, which says in one line what else it was given."""
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r}: need yes or no")
    return text == "yes"


def _recipe(args: argparse.Namespace) -> Recipe:
    given = {f.name: v for f in dataclasses.fields(Recipe) if (v := getattr(args, f.name)) is not None}
    return dataclasses.replace(RECIPES[args.env, args.size], **given)


if __name__ == "__main__":
    main()
