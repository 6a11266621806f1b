"""What `bench_learner` and `bench_router` measure on: made-up episodes, and backbones with random weights."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from bopo_ray.models.tokens import CLS, PAD, SEP, TOKENIZER_PATH
from bopo_ray.records import Episode, EpisodeSpec, Phase, Step, StopReason
from bopo_ray.rllib.router_module import ROUTER_DEFAULTS, RouterModule
from envs.base import Split, Task

logging.getLogger("ray._common.deprecation").disabled = True  # every RLModule warns of a class that RLlib itself makes

__all__ = ["SIZES", "STEPS", "episodes", "make_backbone", "make_module"]

STEPS = 20
"""Of an episode, about as many as ScienceWorld's."""
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151_936},
}  # fmt: skip
"""Qwen2-type models; the second is as large as Qwen2.5-0.5B."""
_WORDS = [
    "the",
    "a",
    "open",
    "door",
    "kitchen",
    "cup",
    "table",
    "water",
    "metal",
    "pot",
    "stove",
    "move",
    "look",
    "pick",
    "up",
    "on",
    "off",
    "you",
    "see",
    "hallway",
    "red",
    "box",
]


def episodes(n: int) -> Sequence[Episode]:
    """Made-up ones of `STEPS` steps: actions of about 4 and observations of about 24 words."""
    return [_episode(i) for i in range(n)]


def _episode(i: int) -> Episode:
    rng = random.Random(i)

    def text(words: int) -> str:
        return " ".join(rng.choices(_WORDS, k=max(1, round(rng.gauss(words, words / 4)))))

    steps = tuple(
        Step(rng.randrange(2), (0.5, 0.5), (True, True), "", text(4), text(24), 0, 0, 0, 0, 0, 0.0, 0.0)
        for _ in range(STEPS)
    )
    spec = EpisodeSpec(Task("Bench-v0", f"bench/{i}", Split.TRAIN), Phase.POLICY, "bench", i, 0, 0)
    return Episode(spec, text(30), text(24), STEPS, steps, float(i % 2), bool(i % 2), 0.0, StopReason.SUCCESS)


def make_backbone(folder: Path, size: str) -> Path:
    """A causal language model of one of `SIZES` with random weights, as `save_pretrained` writes it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(TOKENIZER_PATH), pad_token=PAD, cls_token=CLS, sep_token=SEP, model_max_length=4096
    )
    config = Qwen2Config(**{
        "vocab_size": len(tokenizer), "max_position_embeddings": 4096, "tie_word_embeddings": True,
        "bos_token_id": None, "eos_token_id": tokenizer.sep_token_id, **SIZES[size],
    })  # fmt: skip
    disable_progress_bar()
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_module(shape: dict[str, Any], inference_only: bool = False) -> RouterModule:
    """A router between two models."""
    shape = ROUTER_DEFAULTS | shape
    ids = gym.spaces.Box(-1, np.iinfo(np.int32).max, (shape["context"],), np.int32)
    return RouterModule(
        observation_space=ids, action_space=gym.spaces.Discrete(2), model_config=shape, inference_only=inference_only
    )
