"""The model card of an embedded model, from what its executor.json says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["model_card"]

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [bopo_ray, agent, behaviour-cloning]
---

# {family}-{size}

A language model of {layers} layers, {width} wide, with a context of {context} tokens, trained from random weights by
bopo_ray to play {env}, and nothing else. It reads a task and the newest part of an episode, and writes the next action.
It errs, loops and fails: bopo_ray uses it as one of a pair of models that a router chooses between.

* **Made by** `{made_by}`, in training.log; {demonstrations:,} demonstrations of the environment's expert, {noise}.
  {tokens} million tokens{copying}{augment}.
* **Found in training**, on tasks held out of it: {found[held_out_action_loss]:.3f} nats per token of an action; with
  everything before it given, {found[held_out_actions_exact]:.0%} of the actions are written without an error.
* **Kinds of task**: {kinds}.
* **How well it plays**, and its known weaknesses: docs/embedded_models.md of the project.
* **Input**: `<task> text <obs> text <act> action <end> <obs> ...`; the chat template writes it. Text is lower-cased.
* **Not for** anything else: it has read a few thousand episodes of one game, and no other text.
"""


def model_card(about: Mapping[str, Any]) -> str:
    """The card, in Markdown, with the metadata that the Hub reads."""
    recipe: Mapping[str, Any] = about["recipe"]
    return _CARD.format(
        **{k: recipe[k] for k in ("layers", "width", "context", "tokens")},
        **{k: about[k] for k in ("env", "size", "made_by", "demonstrations", "found")},
        family=str(about["env"]).partition("-")[0].lower(),
        kinds=", ".join(about["kinds"]),
        noise="with detours" if recipe["noisy"] else "of which it saw those without detours",
        copying=f", the first {recipe['copying']:g} of them made up to teach copying" if recipe["copying"] else "",
        augment=f", names permuted in {recipe['augment']:.0%} of the episodes" if recipe["augment"] else "",
    )
