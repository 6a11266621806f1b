"""Trains the tokenizer that ships with the project, on ScienceWorld's train tasks only.

    python -m experiments.train_tokenizer

Plays the expert plan of two train variations of every task kind and trains a byte-level BPE of 2,048 tokens on the
texts that agents and routers read. Expect about two minutes, with a count of the kinds, and
`bopo_ray/models/data/tokenizer.json` of 150 kB.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import gymnasium as gym
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import envs  # noqa: F401 (registers the benchmarks)
from bopo_ray.agent import SYSTEM
from bopo_ray.models.tokens import CLS, PAD, SEP, TOKENIZER_PATH
from bopo_ray.pipeline.command import script_parser
from envs.base import Split
from envs.scienceworld import ScienceWorldEnv

VOCABULARY = 2048


def texts(variations_per_kind: int) -> Iterator[str]:
    """What is read in expert episodes of train tasks."""
    yield SYSTEM
    env = gym.make("ScienceWorld-v0", max_steps=200)
    by_kind: dict[str, list[str]] = {}
    for task in ScienceWorldEnv.tasks(Split.TRAIN):
        by_kind.setdefault(task.kind, []).append(task.name)
    for i, names in enumerate(by_kind.values(), 1):
        print(f"\r{i}/{len(by_kind)} kinds", end="" if i < len(by_kind) else "\n", file=sys.stderr, flush=True)
        for name in names[:: max(1, len(names) // variations_per_kind)][:variations_per_kind]:
            observation, info = env.reset(options={"task": name, "expert_plan": True})
            yield f"task: {info['task_text']}\nbudget: unlimited; steps left 40"
            yield observation
            for action in info["expert_plan"]:
                observation, _, terminated, truncated, _ = env.step(action)
                yield f"Thought: \nAction: {action}\n> {action} | {observation}"
                if terminated or truncated:
                    break
    env.close()


def main() -> None:
    """Entry point."""
    parser = script_parser("train_tokenizer", __doc__)
    parser.add_argument("--variations", type=int, default=2, help="train variations per task kind (default 2)")
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, CLS, SEP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(parser.parse_args().variations), trainer)
    tokenizer.save(str(TOKENIZER_PATH))
    print(f"{TOKENIZER_PATH}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
