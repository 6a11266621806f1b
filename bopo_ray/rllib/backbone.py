"""A Hugging Face model as the router's policy: a causal language model, or an encoder with a head.

Always true here: only what is trained is part of the state, of the copies (reference and average) and of checkpoints:
with LoRA the adapter and the head, never a second copy of the model; logits are float32; no code that comes with a
model is run; dropout is off, so that the old policy's probabilities can be computed again.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from bopo_ray.errors import ConfigError
from bopo_ray.models.hf_files import loading, model_path, one_line
from bopo_ray.rllib.prompt import Prompt, described, is_causal, prompt_of, spec_of
from bopo_ray.rllib.reading import NOTHING
from bopo_ray.rllib.saved import ROUTER_FILE

__all__ = ["Backbone", "BackboneCopy", "Footprint", "Trunk", "check_backbone", "footprint"]

ALL_LINEAR = "all-linear"
UNUSED = "pooler"
"""A layer that some encoders have for [CLS] alone: not used, not trained, and missing in many checkpoints."""


class Backbone(nn.Module):
    """pi(model | prompt): float32 logits [decisions, n_models] of readings, as `Prompt` makes them.

    Input: token ids [B, T] with `NOTHING` behind each reading, and, where a reading has several decisions, its `asks`
    [B, T] (see `Reading`). The pretrained model is no submodule; its trained parameters are, under their names with "/"
    for ".".
    """

    def __init__(self, cfg: dict[str, Any], n_models: int) -> None:
        """
        Args:
            cfg: `backbone`, `context` (tokens), `lora_rank` (0 = all weights), `lora_targets` (names of layers,
                comma separated, or all-linear), `gradient_checkpointing`, `bf16` (compute in bfloat16; None: on a GPU).
            n_models: size of the pool.

        Raises:
            ConfigError: see `Prompt`; a tokenizer without a letter for a model, or LoRA targets that match nothing.
        """
        super().__init__()
        self.cfg, self.n_models = cfg, n_models
        prompt = prompt_of(cfg["backbone"], cfg["context"])
        trunk = _trunk(cfg, prompt, n_models)
        self._trunk = [trunk]
        self.train()
        self.weights = _Weights({k: p for k, p in trunk.named_parameters() if p.requires_grad})
        self.head: nn.Module = _Bias(n_models) if prompt.causal else nn.Linear(2 * trunk.width, n_models)
        if not prompt.causal:
            nn.init.zeros_(self.head.weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    @property
    def trunk(self) -> Trunk:
        """The pretrained model, with its adapter."""
        return self._trunk[0]

    @property
    def remembers(self) -> bool:
        """Whether what was read can be kept, as keys and values of each token."""
        return bool(self.trunk.letters)

    def forward(self, ids_BT: Tensor, asks_BT: Tensor | None = None) -> Tensor:
        return self.logits(ids_BT, asks_BT, None, self.head)

    def logits(
        self, ids_BT: Tensor, asks_BT: Tensor | None, weights: dict[str, Tensor] | None, head: nn.Module
    ) -> Tensor:
        """The logits with other `weights`, by name, in place of the present ones."""
        length = max(1, int((ids_BT != NOTHING).sum(-1).max()))
        seen = (ids_BT[:, :length].long(), None if asks_BT is None else asks_BT[:, :length])
        features = self.trunk(*seen) if weights is None else torch.func.functional_call(self.trunk, weights, seen)
        logits: Tensor = head(features)
        return logits.float()

    def train(self, mode: bool = True) -> Backbone:
        """As torch's; the pretrained model is in training only where that makes it checkpoint activations."""
        super().train(mode)
        self.trunk.train(mode and bool(self.cfg["gradient_checkpointing"]))
        return self

    def copy(self) -> BackboneCopy:
        """What is trained, as it is now, frozen."""
        return BackboneCopy(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.trunk._apply(fn, recurse)
        super()._apply(fn, recurse)
        if self.cfg["lora_rank"] and next(self.parameters()).is_cuda:
            self.trunk.halve_frozen()
        return self

    def save_pretrained(self, folder: Path) -> None:
        """The model or the adapter as transformers and peft load it, its tokenizer, and `ROUTER_FILE`."""
        prompt = prompt_of(self.cfg["backbone"], self.cfg["context"])
        with loading(spec_of(self.cfg["backbone"])):
            self.trunk.model.save_pretrained(str(folder))
            prompt.tokenizer.save_pretrained(str(folder))
        about: dict[str, Any] = {
            "backbone": self.cfg["backbone"], "n_models": self.n_models, "causal": prompt.causal,
            **{k: self.cfg[k] for k in ("context", "lora_rank", "lora_targets")},
            "tokens": list(prompt.letters(self.n_models)) if prompt.causal else [],
            "head": {k: v.tolist() for k, v in self.head.state_dict().items()},
        }  # fmt: skip
        (folder / ROUTER_FILE).write_text(json.dumps(about))


class BackboneCopy(nn.Module):
    """Another set of the trained weights for the same model: the reference, or the average."""

    def __init__(self, policy: Backbone) -> None:
        super().__init__()
        self._policy = [policy]
        self.weights = _Weights({k: p.detach().clone() for k, p in policy.weights.by_name().items()})
        self.head = _Bias(policy.n_models) if isinstance(policy.head, _Bias) else _like(policy.head)
        self.head.load_state_dict(policy.head.state_dict())
        self.requires_grad_(False)

    def forward(self, ids_BT: Tensor, asks_BT: Tensor | None = None) -> Tensor:
        return self._policy[0].logits(ids_BT, asks_BT, dict(self.weights.by_name()), self.head)


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
    """Adds a number to each logit: a model's own preference for a letter is not a reason to route.

    They are multiplied by another one before, which is not learned, see `RouterModule.sharpen`.
    """

    scale: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(n))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, logits_BN: Tensor) -> Tensor:
        return logits_BN * self.scale + self.bias


class Trunk(nn.Module):
    """The pretrained model up to what the head takes, float32: [decisions, n_models] of letters, or [B, 2 * width]."""

    def __init__(self, model: Any, letters: tuple[int, ...], bf16: bool | None) -> None:
        super().__init__()
        self.model = model
        self.letters = letters
        self.bf16 = bf16
        self.width = int(model.config.get_text_config().hidden_size)

    @property
    def language_model(self) -> Any:
        """The pretrained model, its adapter in it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, ids_BT: Tensor, asks_BT: Tensor | None = None) -> Tensor:
        there_BT = ids_BT != NOTHING
        ids_BT = ids_BT.clamp_min(0)
        if asks_BT is not None:
            mask_B1TT, places_BT = _seen(there_BT, asks_BT)
            last_BT = (asks_BT > 0) & (asks_BT != F.pad(asks_BT[:, 1:], (0, 1)))
            return self.choose(self.read(ids_BT, mask_B1TT, position_ids=places_BT)[0][last_BT])
        hidden_BTD = self.read(ids_BT, there_BT.long())[0]
        if self.letters:
            last_B = there_BT.sum(-1) - 1
            return self.choose(hidden_BTD[torch.arange(len(ids_BT), device=ids_BT.device), last_B])
        keep_BT1 = there_BT.unsqueeze(-1).float()
        mean_BD = (hidden_BTD * keep_BT1).sum(1) / keep_BT1.sum(1).clamp(min=1)
        return torch.cat([hidden_BTD[:, 0], mean_BD], -1)

    def read(self, ids_BT: Tensor, mask: Tensor, cache: Any = None, **more: Any) -> tuple[Tensor, Any]:
        """Hidden states [B, T, width], float32, and the cache with the keys and values of what was read."""
        device = ids_BT.device.type
        half = device == "cuda" if self.bf16 is None else self.bf16
        if self.letters:
            more |= {"use_cache": cache is not None, "past_key_values": cache}
        with torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext():
            reader = self.language_model.base_model if self.letters else self.language_model
            out = reader(input_ids=ids_BT, attention_mask=mask, **more)
        return out.last_hidden_state.float(), cache

    def choose(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, n_models] of the letters."""
        last = self.language_model.get_output_embeddings()
        letters = torch.tensor(self.letters, device=hidden_ND.device)
        logits_NM = hidden_ND @ last.weight[letters].float().T
        bias = getattr(last, "bias", None)
        return logits_NM if bias is None else logits_NM + bias[letters].float()

    def halve_frozen(self) -> None:
        """What is not trained becomes bfloat16; what is trained stays float32 and is cast as it is used."""
        for p in self.model.parameters():
            if not p.requires_grad:
                p.data = p.data.to(torch.bfloat16)


def _seen(there_BT: Tensor, asks_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Who sees whom, as numbers to add to attention scores [B, 1, T, T], and each token's place in its prompt [B, T].

    A token sees those before it that belong to no question, or to its own.
    """
    T = asks_BT.shape[1]
    index_T = torch.arange(T, device=asks_BT.device)
    shared_BT = there_BT & (asks_BT == 0)
    seen_BTT = shared_BT.unsqueeze(1) | (asks_BT.unsqueeze(1) == asks_BT.unsqueeze(2)) & there_BT.unsqueeze(1)
    seen_BTT &= index_T <= index_T.unsqueeze(-1)
    mask_BTT = torch.zeros(seen_BTT.shape, device=asks_BT.device).masked_fill_(~seen_BTT, torch.finfo(torch.half).min)
    begins_BT = asks_BT != F.pad(asks_BT[:, :-1], (1, 0))
    begin_BT = torch.where(begins_BT, index_T, 0).cummax(1).values
    before_BT = shared_BT.cumsum(1)
    places_BT = torch.where(asks_BT > 0, before_BT + index_T - begin_BT, (before_BT - 1).clamp_min(0))
    return mask_BTT.unsqueeze(1), places_BT


def check_backbone(cfg: dict[str, Any], n_models: int) -> None:
    """Raises ConfigError where `Backbone` would, without loading weights: before anything is paid for."""
    prompt = prompt_of(cfg["backbone"], cfg["context"])
    if prompt.causal:
        prompt.letters(n_models)
    _unloaded(cfg)


class Footprint(NamedTuple):
    """Bytes of main memory that a backbone takes in a process, activations not counted."""

    runner: int
    """Where it decides: its weights, and what it has read of the episodes in flight."""
    learner: int
    """Where it learns: its weights, and for each that is trained a gradient, Adam's two moments, the reference, the
    average, and what is put aside while the average is saved; on a GPU its weights alone, which are loaded here."""


def footprint(cfg: dict[str, Any], lanes: int, gpu: bool) -> Footprint:
    """What a backbone of the shape `cfg` takes, known without loading it.

    Args:
        cfg: see `Backbone`.
        lanes: episodes in flight in a runner.
        gpu: whether it learns on one.
    """
    weights, trained, token = _sizes(cfg["backbone"], cfg["lora_rank"], cfg["lora_targets"])
    return Footprint(weights + lanes * cfg["context"] * token, weights + (0 if gpu else 6 * trained))


@functools.cache
def _sizes(backbone: str, lora_rank: int, lora_targets: str) -> tuple[int, int, int]:
    """Bytes of all weights, of those that are trained, and of the keys and values of a token; all float32."""
    model = _unloaded({"backbone": backbone, "lora_rank": lora_rank, "lora_targets": lora_targets})
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    token, config = 0, model.config.get_text_config()
    if is_causal(model.config):
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        token = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width
    return 4 * sum(n for n, _ in counts), 4 * sum(n for n, trained in counts if trained), 4 * token


def _unloaded(cfg: dict[str, Any]) -> Any:
    """The model with its adapter, without weights."""
    config = described(cfg["backbone"])[0]
    kind = transformers.AutoModelForCausalLM if is_causal(config) else transformers.AutoModel
    with loading(spec_of(cfg["backbone"])), torch.device("meta"):
        model = kind.from_config(config)
    return _prepared(model, cfg)


def _prepared(model: Any, cfg: dict[str, Any]) -> Any:
    """The model as it is trained: whole, or with an adapter."""
    _attends(model, cfg)
    for name, weight in model.named_parameters():
        weight.requires_grad_(UNUSED not in name)
    return _with_adapter(model, cfg, is_causal(model.config)) if cfg["lora_rank"] else model


def _trunk(cfg: dict[str, Any], prompt: Prompt, n_models: int) -> Trunk:
    config, revision = described(cfg["backbone"])
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
            setattr(config, name, 0.0)
    kind = transformers.AutoModelForCausalLM if is_causal(config) else transformers.AutoModel
    spec = spec_of(cfg["backbone"])
    letters = prompt.letters(n_models) if prompt.causal else ()
    with loading(spec), _quiet():
        model, found = kind.from_pretrained(
            model_path(spec), config=config, revision=revision or "main", trust_remote_code=False,
            dtype=torch.float32, output_loading_info=True,
        )  # fmt: skip
    if lacking := sorted(name for name in found["missing_keys"] if UNUSED not in name):
        raise ConfigError(
            f"backbone={cfg['backbone']!r}: its files lack {len(lacking)} of the model's weights, {lacking[0]} ...; "
            "need what save_pretrained of the whole model wrote; set it with --backbone"
        )
    model = _prepared(model, cfg)
    if cfg["gradient_checkpointing"]:
        lm = model.get_base_model() if cfg["lora_rank"] else model
        lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return Trunk(model, letters, cfg["bf16"])


def _attends(model: Any, cfg: dict[str, Any]) -> None:
    """Raises ConfigError for a causal model in which who sees whom can't be said."""
    takes_places = "position_ids" in inspect.signature(model.base_model.forward).parameters
    if is_causal(model.config) and (getattr(model, "_is_stateful", False) or not takes_places):
        raise ConfigError(
            f"backbone={cfg['backbone']!r} ({model.config.model_type}): need a causal model that attends to tokens by "
            "their positions, as Qwen and Llama do; choose another --backbone"
        )


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
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks by the old name
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
