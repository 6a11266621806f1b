"""A Hugging Face model as the router's policy: a causal language model, or an encoder with a head.

Always true here: only what is trained is part of the state, of the copies (reference and average) and of checkpoints:
with LoRA the adapter and the head, never a second copy of the model; logits are float32; no code that comes with a
model is run; dropout is off, so that the old policy's probabilities can be computed again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging

from bopo_ray.errors import ConfigError
from bopo_ray.models.hf_files import loading, model_path, one_line
from bopo_ray.rllib.prompt import NOTHING, Prompt, described, is_causal, prompt_of, spec_of

__all__ = ["ROUTER_FILE", "Backbone", "BackboneCopy", "check_backbone"]

ROUTER_FILE = "router.json"
"""Beside an exported model: what of the router is no part of it."""
CHUNK_TOKENS = 1 << 14
"""Tokens per forward pass where no gradient is needed."""
ALL_LINEAR = "all-linear"
UNUSED = "pooler"
"""A layer that some encoders have for [CLS] alone: not used, not trained, and missing in many checkpoints."""


class Backbone(nn.Module):
    """pi(model | prompt): logits float32 [B, n_models] of token ids [B, context] as `Prompt.ids` makes them.

    The pretrained model is no submodule; its trained parameters are, under their names with "/" for ".".
    """

    def __init__(self, cfg: dict[str, Any], n_models: int) -> None:
        """
        Args:
            cfg: `backbone`, `context` (tokens), `lora_rank` (0 = all weights), `lora_targets` (names of layers,
                comma separated, or all-linear), `gradient_checkpointing`.
            n_models: size of the pool.

        Raises:
            ConfigError: see `Prompt`; a tokenizer without a letter for a model, or LoRA targets that match nothing.
        """
        super().__init__()
        self.cfg, self.n_models = cfg, n_models
        prompt = prompt_of(cfg["backbone"], cfg["context"])
        trunk = _trunk(cfg, prompt, n_models)
        self._trunk = [trunk]
        self.weights = _Weights({k: p for k, p in trunk.named_parameters() if p.requires_grad})
        self.head: nn.Module = _Bias(n_models) if prompt.causal else nn.Linear(2 * trunk.width, n_models)
        if not prompt.causal:
            nn.init.zeros_(self.head.weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    @property
    def trunk(self) -> _Trunk:
        """The pretrained model, with its adapter."""
        return self._trunk[0]

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.logits(ids_BT, None, self.head)

    def logits(self, ids_BT: Tensor, weights: dict[str, Tensor] | None, head: nn.Module) -> Tensor:
        """The logits with other `weights`, by name, in place of the present ones."""
        ids_BT = ids_BT.long()
        length = max(1, int((ids_BT != NOTHING).sum(-1).max()))
        ids_BT = ids_BT[:, :length]
        rows = len(ids_BT) if torch.is_grad_enabled() else max(1, CHUNK_TOKENS // length)
        features = [self._features(chunk, weights) for chunk in ids_BT.split(rows)]
        logits: Tensor = head(torch.cat(features))
        return logits.float()

    def _features(self, ids_BT: Tensor, weights: dict[str, Tensor] | None) -> Tensor:
        self.trunk.settle(ids_BT.device, frozen_only=bool(self.cfg["lora_rank"]))
        if weights is None:
            return self.trunk(ids_BT)  # type: ignore[no-any-return]
        return torch.func.functional_call(self.trunk, weights, (ids_BT,))  # type: ignore[no-any-return]

    def copy(self) -> BackboneCopy:
        """What is trained, as it is now, frozen."""
        return BackboneCopy(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.trunk._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def save_pretrained(self, folder: Path) -> None:
        """The model or the adapter as transformers and peft load it, its tokenizer, and `ROUTER_FILE`."""
        prompt = prompt_of(self.cfg["backbone"], self.cfg["context"])
        with loading(spec_of(self.cfg["backbone"])):
            self.trunk.model.save_pretrained(str(folder))
            prompt.tokenizer.save_pretrained(str(folder))
        about = {"n_models": self.n_models, "context": self.cfg["context"], "causal": prompt.causal}
        if prompt.causal:
            about["tokens"] = list(prompt.letters(self.n_models))
        about["head"] = {k: v.tolist() for k, v in self.head.state_dict().items()}
        (folder / ROUTER_FILE).write_text(json.dumps(about))
        (folder / "README.md").write_text(_card(self.cfg, self.n_models, prompt))


class BackboneCopy(nn.Module):
    """Another set of the trained weights for the same model: the reference, or the average."""

    def __init__(self, policy: Backbone) -> None:
        super().__init__()
        self._policy = [policy]
        self.weights = _Weights({k: p.detach().clone() for k, p in policy.weights.by_name().items()})
        self.head = _Bias(policy.n_models) if isinstance(policy.head, _Bias) else _like(policy.head)
        self.head.load_state_dict(policy.head.state_dict())
        self.requires_grad_(False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self._policy[0].logits(ids_BT, dict(self.weights.by_name()), self.head)


class _Weights(nn.Module):
    """Parameters by their names elsewhere."""

    def __init__(self, named: dict[str, Any]) -> None:
        super().__init__()
        for name, value in named.items():
            parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
            self.register_parameter(name.replace(".", "/"), parameter)

    def by_name(self) -> dict[str, nn.Parameter]:
        return {name.replace("/", "."): p for name, p in self.named_parameters()}


class _Bias(nn.Module):
    """Adds a number to each logit: a model's own preference for a letter is not a reason to route."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(n))

    def forward(self, logits_BN: Tensor) -> Tensor:
        return logits_BN + self.bias


class _Trunk(nn.Module):
    """The pretrained model up to what the head takes, float32: [B, n_models] of letters, or [B, 2 * width]."""

    def __init__(self, model: Any, letters: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.letters = letters
        self.width = int(model.config.get_text_config().hidden_size)
        self._settled = False

    def settle(self, device: torch.device, frozen_only: bool) -> None:
        """On a GPU, what is not trained becomes bfloat16; what is trained stays float32 and is cast as it is used."""
        if not self._settled and device.type == "cuda" and frozen_only:
            for p in self.model.parameters():
                if not p.requires_grad:
                    p.data = p.data.to(torch.bfloat16)
        self._settled = True

    def forward(self, ids_BT: Tensor) -> Tensor:
        mask_BT = ids_BT != NOTHING
        lm = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        reader = lm.base_model if self.letters else lm
        half = torch.autocast("cuda", torch.bfloat16) if ids_BT.is_cuda else contextlib.nullcontext()
        with half:
            cached = {"use_cache": False} if self.letters else {}
            out = reader(input_ids=ids_BT.clamp_min(0), attention_mask=mask_BT.long(), **cached)
        hidden_BTD = out.last_hidden_state.float()
        length_B = mask_BT.sum(-1)
        if self.letters:
            last_BD = hidden_BTD[torch.arange(len(ids_BT), device=ids_BT.device), length_B - 1]
            last = lm.get_output_embeddings()
            letters = torch.tensor(self.letters, device=ids_BT.device)
            logits_BN = last_BD @ last.weight[letters].float().T
            bias = getattr(last, "bias", None)
            return logits_BN if bias is None else logits_BN + bias[letters].float()
        keep_BT1 = mask_BT.unsqueeze(-1).float()
        mean_BD = (hidden_BTD * keep_BT1).sum(1) / keep_BT1.sum(1).clamp(min=1)
        return torch.cat([hidden_BTD[:, 0], mean_BD], -1)


def check_backbone(cfg: dict[str, Any], n_models: int) -> None:
    """Raises ConfigError where `Backbone` would, without loading weights: before anything is paid for."""
    prompt = prompt_of(cfg["backbone"], cfg["context"])
    if prompt.causal:
        prompt.letters(n_models)
    if cfg["lora_rank"]:
        kind = AutoModelForCausalLM if prompt.causal else AutoModel
        with loading(spec_of(cfg["backbone"])), torch.device("meta"):
            model = kind.from_config(described(cfg["backbone"])[0])
        _with_adapter(model, cfg, prompt.causal)


def _trunk(cfg: dict[str, Any], prompt: Prompt, n_models: int) -> _Trunk:
    config, revision = described(cfg["backbone"])
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
            setattr(config, name, 0.0)
    kind = AutoModelForCausalLM if is_causal(config) else AutoModel
    spec = spec_of(cfg["backbone"])
    letters = prompt.letters(n_models) if prompt.causal else ()
    with loading(spec), _quiet():
        model, found = kind.from_pretrained(
            model_path(spec), config=config, revision=revision or "main", trust_remote_code=False,
            dtype=torch.float32, output_loading_info=True,
        )  # fmt: skip
    for name, weight in model.named_parameters():
        weight.requires_grad_(UNUSED not in name)
    if lacking := sorted(name for name in found["missing_keys"] if UNUSED not in name):
        raise ConfigError(
            f"backbone={cfg['backbone']!r}: its files lack {len(lacking)} of the model's weights, {lacking[0]} ...; "
            "need what save_pretrained of the whole model wrote; set it with --backbone"
        )
    if cfg["gradient_checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if cfg["lora_rank"]:
        model = _with_adapter(model, cfg, prompt.causal)
    model.train(bool(cfg["gradient_checkpointing"]))
    return _Trunk(model, letters)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of weights that an encoder does not need."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _with_adapter(model: Any, cfg: dict[str, Any], causal: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = cfg["lora_targets"]
    wanted = ALL_LINEAR if targets == ALL_LINEAR else [t.strip() for t in targets.split(",") if t.strip()]
    linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    head = model.get_output_embeddings() if causal else None
    linear -= {name.rpartition(".")[2] for name, m in model.named_modules() if m is head}
    lora = LoraConfig(
        r=cfg["lora_rank"], lora_alpha=2 * cfg["lora_rank"], lora_dropout=0.0, target_modules=wanted,
        task_type="CAUSAL_LM" if causal else "FEATURE_EXTRACTION",
    )  # fmt: skip
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            adapted = get_peft_model(model, lora)
    except ValueError as error:
        raise ConfigError(
            f"lora_targets={targets!r}: {cfg['backbone']!r} has no such layers ({one_line(error)}); need {ALL_LINEAR} "
            f"or some of {', '.join(sorted(linear))}; set it with --lora-targets"
        ) from error
    if causal and adapted.get_base_model().get_output_embeddings() is not head:
        raise ConfigError(
            f"lora_targets={targets!r}: the output layer can't be adapted, its letters' rows decide; need {ALL_LINEAR} "
            f"or some of {', '.join(sorted(linear))}; set it with --lora-targets"
        )
    return adapted


def _like(head: Any) -> nn.Module:
    return nn.Linear(head.in_features, head.out_features)


def _card(cfg: dict[str, Any], n_models: int, prompt: Prompt) -> str:
    rank = cfg["lora_rank"]
    how = f"LoRA of rank {rank} on {cfg['lora_targets']}" if rank else "full fine-tuning"
    decides = "the logits of one letter per model" if prompt.causal else "a linear head"
    library = "peft" if rank else "transformers"
    return (
        f"---\nlibrary_name: {library}\ntags: [bopo_ray, routing]\n---\n\n"
        f"# A router between {n_models} language models\n\n"
        f"It reads a task, the remaining budget and an agent's history, up to {cfg['context']} tokens, and says by "
        f"{decides} which model writes the next action; 0 is the cheapest. Trained by `bopo_ray` ({how}) from "
        f"`{Path(cfg['backbone']).name}`; these are the weights averaged over its updates.\n\n"
        "```python\nfrom bopo_ray import History, load_router\n\n"
        'router = load_router("THIS FOLDER")\n'
        'print(router.decide(History("the task", "the first observation", steps_left=30)))\n```\n\n'
        f"`{library}` loads the weights by themselves; `{ROUTER_FILE}` holds the rest. The run's own `settings.yaml` "
        "and `pool.yaml` name its models, prices and options.\n"
    )
