"""The settings of a run: defaults by scale, then a YAML file, then the command line; saved beside the results."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from bopo_ray.errors import ConfigError, StoreError
from bopo_ray.method.advantage import AdvantageMode
from bopo_ray.method.reward import CostScale
from bopo_ray.models.pool import EMBEDDED, SIMULATED_PAIRS
from bopo_ray.pipeline.presets import BENCHMARKS, EMBEDDED_POOLS, SCALES, embedded_pool
from bopo_ray.records import Budget, CostMode
from bopo_ray.routers import parse_router

__all__ = ["Settings", "field_docs", "load_settings", "microusd", "resolve", "save"]


@dataclass(frozen=True, slots=True)
class Settings:
    """All that decides a run's results. Each field's line says what it is, with its unit."""

    env: str = "ScienceWorld-v0"
    """benchmark: ScienceWorld-v0, ALFWorld-v0, AppWorld-v0, all (in turn), or your own as package.module:Name-v0"""
    models: str = "simulated"
    """pool: embedded (self-trained), simulated, simulated-llama, or a YAML file of two models or more, small first"""
    small: str = ""
    """the small model, PROVIDER:MODEL, e.g. openai:gpt-4.1-mini or hf:FOLDER; with --large, instead of --models"""
    large: str = ""
    """the large model, PROVIDER:MODEL"""
    prices: str = ""
    """YAML list of prices; by default the shipped one"""
    max_spend: float = math.inf
    """dollars that the whole run and studies of it may spend on calls; it stops before it would exceed them"""
    calls: str = ""
    """file of stored calls to share with other runs; by default the run's own calls.db"""
    replay: str = ""
    """exported calls (Parquet) to answer from, and from nothing else: no network, no spend"""
    scale: str = "quick"
    """preset of sizes: tiny (minutes), quick (under 20 minutes on 2 cores), paper"""
    lambdas: tuple[float, ...] = (0.1, 0.3, 0.8)
    """prices of the normalised cost, in units of success; one point of the frontier each"""
    train_lambdas: tuple[float, ...] = ()
    """train at these alone, each router then made to suit each of `lambdas` by --shares; none: at all of those"""
    seeds: tuple[int, ...] = (0,)
    """training seeds"""
    advantage: tuple[str, ...] = ("hybrid", "vanilla")
    """how rewards become advantages: hybrid (BoPO), augmented, vanilla (GRPO)"""
    cost: str = "usd"
    """unit of the cost, in training and evaluation: usd (measured tokens) or calls (of any model but the smallest)"""
    cost_scale: str = "boundaries"
    """what normalises the cost: boundaries (the boundary policies' costs on a task) or absolute (one number for all)"""
    train_tasks: int = 90
    """training tasks, spread over the task kinds"""
    test_tasks: int = 90
    """held-out test tasks"""
    dev_tasks: int = 0
    """tasks to choose by (offsets, limits, schedules), of those that there are; 0: as many as test tasks"""
    without_tasks: tuple[str, ...] = ()
    """tasks to leave out, by name, such as one that its engine can't play; others of their kinds take their places"""
    max_steps: int = 40
    """agent steps per episode"""
    temperature: float = 0.7
    """sampling temperature of the models"""
    k: int = 5
    """rollouts of each boundary policy per training task"""
    strata: int = 10
    """stratified rollouts of a Hard task: P(large) = 0/N, 1/N .. N/N"""
    schedules: tuple[int, ...] = (0,)
    """more rollouts of a Hard task, large for the first K steps; 0 for none, as in the paper"""
    reliability: float = 0.0
    """BoSFT imitates routings that win this often, beside the best, and no cheaper one beats; 0: the paper's rule"""
    boundary_value: float = 0.0
    """the router reads how likely the small model alone wins from here, fitted with this C; 0: the text (the paper)"""
    sft_epochs: int = 8
    """passes of BoSFT over the expert steps, 0 for none; the one that does best on held-out training tasks is kept"""
    sft_patience: int = 3
    """passes of BoSFT in turn that may do no better on held-out tasks before it stops; 0 for any number"""
    sft_lr: float = 0.0
    """learning rate of BoSFT; 0: what suits the router, 3e-3 where it reads --boundary-value, else 5e-4"""
    sharpness: float = 1.0
    """BoSFT's logits are multiplied by this before BoPO, which so samples nearer to the greedy router; 1: the paper"""
    ignore_gate: bool = False
    """go on when BoSFT leaves too little probability on the large model"""
    beta: float = 0.5
    """bonus for success on Hard tasks, in units of success"""
    group_size: int = 8
    """policy episodes per task and update"""
    tasks_per_update: int = 8
    """tasks per update"""
    updates: int = 8
    """updates per trial"""
    async_share: float = 1.0
    """share of its groups that an update waits for; the next one learns from the others, off-policy; 1 for all"""
    lr: float = 3e-4
    """learning rate of BoPO"""
    decide: str = "greedy"
    """how trained routers decide in the evaluation: greedy (the most probable model) or sample (as in training)"""
    shares: tuple[float, ...] = ()
    """shares of large calls to choose from on dev tasks, per router and lambda; none: routers stay as trained"""
    call_limits: tuple[int, ...] = ()
    """limits of large calls per task to choose from beside the shares; none: as many as the router wants"""
    share_rule: str = "price"
    """which of them a lambda gets: price (the best u - lambda * C_norm) or front (the largest hypervolume together)"""
    eval_samples: int = 1
    """evaluation episodes per test task and policy"""
    budget_calls: int | None = None
    """hard cap on an episode of the evaluation, on test and dev tasks: calls of any model but the smallest"""
    budget_usd: float | None = None
    """hard cap on an episode of the evaluation, on test and dev tasks: dollars"""
    router: tuple[str, ...] = ()
    """more routers to evaluate, NAME or NAME:ARGUMENT, e.g. cascade:3,last-large:10; may be given several times"""
    width: int = 64
    """hidden size of the small router"""
    layers: int = 2
    """transformer layers of the small router"""
    context: int = 96
    """tokens of task, budget and history that the small router reads; the first two take at most 55 of them"""
    backbone: str = ""
    """Hugging Face model to be the router, FOLDER or NAME: a causal language model or an encoder; none: a small one"""
    backbone_context: int = 1024
    """tokens of task, budget and history that a backbone reads"""
    lora_rank: int = 16
    """rank of the adapter that a backbone is trained by; 0 trains all of its weights"""
    lora_targets: str = "all-linear"
    """layers that the adapter adapts: all-linear, or names such as q_proj,v_proj"""
    gradient_checkpointing: bool = False
    """compute a backbone's activations again in its backward pass: less memory, more time"""
    pass_tokens: int = 16384
    """most tokens of one forward and backward pass of the router's training; fewer take less memory"""
    warmup: float = 0.0
    """share of the router's training, BoSFT's and BoPO's, over which the learning rate rises"""
    lr_end: float = 1.0
    """share of the learning rate that is left at the end of the training; it falls evenly"""
    num_learners: int = 0
    """learner processes that share each update, as RLlib's; 0: the trial's own process learns"""
    num_gpus_per_learner: float = 0.0
    """GPUs of each learner, as RLlib's; the env runners stay on CPUs"""
    cpus: int = 0
    """CPUs to use, 0 for all of this machine or cluster"""
    lanes: int = 8
    """episodes in flight per env runner"""

    def __post_init__(self) -> None:
        rules: list[tuple[str, bool, str]] = [
            (n, getattr(self, n) >= 1, "need at least 1")
            for n in ("train_tasks", "test_tasks", "max_steps", "k", "strata", "tasks_per_update",
                      "updates", "eval_samples", "width", "layers", "lanes")
        ]  # fmt: skip
        rules += [
            ("dev_tasks", self.dev_tasks >= 0, "need 0 (as many as test tasks) or more"),
            ("sft_epochs", self.sft_epochs >= 0, "need 0 (no BoSFT) or more"),
            ("sft_patience", self.sft_patience >= 0, "need 0 (no early stop) or more"),
            ("schedules", _distinct(self.schedules), "need one or more different numbers of steps >= 0"),
            ("shares", not self.shares or (_distinct(self.shares) and all(0 < x < 1 for x in self.shares)),
             "need different numbers between 0 and 1"),
            ("call_limits", not self.call_limits or (_distinct(self.call_limits) and min(self.call_limits) > 0),
             "need different whole numbers >= 1"),
            ("call_limits", not self.call_limits or bool(self.shares),
             "they are tried with the offsets of --shares: need some, or --call-limits ''"),
            ("models", self.models != EMBEDDED or bool(self.small) or self.pool in EMBEDDED_POOLS,
             f"env={self.env!r} has no pair of that name; leave it out, or take {', '.join(SIMULATED_PAIRS)}, or your "
             "own (pool.yaml)"),
            ("boundary_value", 0 <= self.boundary_value < math.inf, "need a number >= 0"),
            ("reliability", 0 <= self.reliability <= 1, "need a share in [0, 1]"),
            ("lambdas", _distinct(self.lambdas), "need one or more different numbers >= 0"),
            ("train_lambdas", not self.train_lambdas or _distinct(self.train_lambdas), "need different numbers >= 0"),
            ("train_lambdas", not self.train_lambdas or bool(self.shares),
             "a router suits other lambdas by its share of large calls: need some --shares, or --train-lambdas ''"),
            ("seeds", _distinct(self.seeds), "need one or more different whole numbers >= 0"),
            ("advantage", len(set(self.advantage) & set(AdvantageMode)) == len(self.advantage) > 0,
             f"need some of {', '.join(AdvantageMode)}, each once"),
            ("cost", self.cost in set(CostMode), f"need one of {', '.join(CostMode)}"),
            ("cost_scale", self.cost_scale in set(CostScale), f"need one of {', '.join(CostScale)}"),
            ("decide", self.decide in DECIDE, f"need one of {', '.join(DECIDE)}"),
            ("share_rule", self.share_rule in SHARE_RULES, f"need one of {', '.join(SHARE_RULES)}"),
            ("scale", self.scale in SCALES, f"need one of {', '.join(SCALES)}"),
            ("temperature", 0 <= self.temperature < math.inf, "need a number >= 0"),
            ("beta", 0 <= self.beta < math.inf, "need a number >= 0"),
            ("width", self.width % 4 == 0, "need a multiple of the 4 attention heads"),
            ("group_size", self.group_size >= 2, "need at least 2 episodes to compare"),
            ("context", self.context >= 80, "need at least 80: the task and budget lines must fit"),
            ("backbone_context", self.backbone_context >= 128, "need at least 128: the task and budget lines must fit"),
            ("lora_rank", self.lora_rank >= 0, "need 0 (all weights) or more"),
            ("lora_targets", bool(self.lora_targets.strip(" ,")), "need all-linear, or names of layers"),
            ("cpus", self.cpus >= 0, "need 0 (all) or more"),
            ("pass_tokens", self.pass_tokens >= 1, "need at least 1; a longer reading has a pass of its own"),
            ("async_share", 0 < self.async_share <= 1, "need a share in (0, 1]"),
            ("warmup", 0 <= self.warmup < 1, "need a share in [0, 1)"),
            ("lr_end", 0 <= self.lr_end <= 1, "need a share in [0, 1]"),
            ("num_learners", self.num_learners >= 0, "need 0 (none beside the trial's own process) or more"),
            ("num_gpus_per_learner", 0 <= self.num_gpus_per_learner < math.inf, "need a number >= 0"),
            ("num_gpus_per_learner", self.num_learners <= 1 or float(self.num_gpus_per_learner).is_integer(),
             "need a whole number for several learners: no two that share an update may share a GPU"),
            ("lr", 0 < self.lr < math.inf, "need a number > 0"),
            ("sharpness", 0 < self.sharpness < math.inf, "need a number > 0"),
            ("sft_lr", 0 <= self.sft_lr < math.inf, "need a number >= 0"),
            ("max_spend", self.max_spend >= 0, "need dollars >= 0"),
            ("budget_calls", self.budget_calls is None or self.budget_calls >= 0, "need a number of calls >= 0"),
            ("budget_usd", self.budget_usd is None or 0 <= self.budget_usd < math.inf, "need dollars >= 0"),
            ("router", "grpo-vanilla" not in self.router or AdvantageMode.VANILLA in self.advantage,
             "grpo-vanilla is trained by --advantage hybrid,vanilla; give that too, or leave it out"),
            ("budget_usd", self.budget_usd is None or self.budget_calls is None,
             "a cap in dollars and one in calls at once; give one of them"),
        ]  # fmt: skip
        for name, ok, rule in rules:
            if not ok:
                raise ConfigError(f"{name}={getattr(self, name)!r}: {rule}; set it with --{name.replace('_', '-')}")
        for router in self.router:
            parse_router(router)

    @property
    def budget(self) -> Budget | None:
        """The hard cap on an episode of the evaluation, and on one by which it is chosen what is evaluated."""
        if self.budget_calls is not None:
            return Budget(CostMode.CALLS, self.budget_calls)
        return None if self.budget_usd is None else Budget(CostMode.USD, microusd(self.budget_usd))

    @property
    def pool(self) -> str:
        """`models`, with the embedded pair called by its environment."""
        return embedded_pool(self.env) if self.models == EMBEDDED else self.models

    @property
    def router_shape(self) -> dict[str, Any]:
        """The router's shape, as `RouterModule` takes it."""
        if self.backbone:
            folder = Path(self.backbone).expanduser()
            return {
                "backbone": str(folder.resolve()) if folder.is_dir() else self.backbone,
                "context": self.backbone_context, "lora_rank": self.lora_rank, "lora_targets": self.lora_targets,
                "gradient_checkpointing": self.gradient_checkpointing,
            }  # fmt: skip
        shape = {"width": self.width, "layers": self.layers, "context": self.context}
        return shape | ({"value": True} if self.boundary_value else {})

    @property
    def learning(self) -> dict[str, Any]:
        """Who learns, and how, as `RouterAlgorithmConfig.learning` takes it."""
        return {
            "num_learners": self.num_learners, "num_gpus_per_learner": self.num_gpus_per_learner,
            "tokens_per_pass": self.pass_tokens, "warmup": self.warmup, "lr_end": self.lr_end,
        }  # fmt: skip

    @property
    def bosft_lr(self) -> float:
        """Learning rate of BoSFT."""
        return self.sft_lr or (3e-3 if self.router_shape.get("value") else 5e-4)


SHARE_RULES = ("price", "front")
"""What `Settings.share_rule` may be."""
DECIDE = ("greedy", "sample")
"""What `Settings.decide` may be."""


def microusd(usd: float) -> int:
    """Finite dollars >= 0 as written, in micro-dollars, rounded down: no limit allows more than was said."""
    return int(Decimal(str(usd)) * 1_000_000)


def _distinct(values: tuple[float, ...]) -> bool:
    return len(set(values)) == len(values) > 0 and all(0 <= x < math.inf for x in values)


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
"""What a value of a kind is called."""
_LIST_WORDS = {
    int: "whole numbers >= 0 separated by commas, e.g. 1,2", float: "numbers >= 0 separated by commas, e.g. 0.1,0.3",
    str: "names separated by commas",
}  # fmt: skip
"""The same, of several."""
_UNITS = {
    "max_spend": "dollars >= 0, e.g. 20", "budget_usd": "dollars >= 0, e.g. 0.05",
    "budget_calls": "a whole number of calls >= 0, e.g. 10",
}  # fmt: skip
"""Fields whose value has a unit."""
_OPTIONAL = {"budget_calls": int, "budget_usd": float}
"""Fields that may be None."""
_EMPTY: dict[str, type] = {
    "router": str,
    "train_lambdas": float,
    "shares": float,
    "call_limits": int,
    "without_tasks": str,
}
"""Fields that hold nothing by default, and what of."""


def resolve(file: Path | None, given: dict[str, Any]) -> Settings:
    """The benchmark's and the scale's defaults, then the YAML file, then the command line. Raises ConfigError."""
    from_file: dict[str, Any] = {}
    if file is not None:
        try:
            from_file = yaml.safe_load(file.read_text()) or {}
        except OSError as error:
            raise ConfigError(
                f"settings file {file} can't be read: {error.strerror}; name another with --settings"
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"settings file {file} can't be read: {' '.join(str(error).split())}; mend it there"
            ) from error
        known = {f.name for f in fields(Settings)}
        if not isinstance(from_file, dict) or set(from_file) - known:
            wrong = min(map(str, set(from_file) - known)) if isinstance(from_file, dict) else type(from_file).__name__
            raise ConfigError(f"settings file {file}: unknown {wrong!r}; allowed: {', '.join(sorted(known))}")
    scale = given.get("scale") or from_file.get("scale") or Settings.__dataclass_fields__["scale"].default
    if not isinstance(scale, str) or scale not in SCALES:
        raise ConfigError(f"scale={scale!r}: need one of {', '.join(SCALES)}; set it with --scale")
    env = given.get("env") or from_file.get("env") or Settings.__dataclass_fields__["env"].default
    merged = BENCHMARKS.get(str(env), {}) | SCALES[scale] | from_file | given | {"scale": scale}
    found = _typed(merged)
    if "call_limits" not in merged and found.shares and env in BENCHMARKS:
        found = replace(found, call_limits=(max(1, found.max_steps // 2),))
    return replace(found, dev_tasks=found.dev_tasks or found.test_tasks)


def _typed(values: dict[str, Any]) -> Settings:
    out: dict[str, Any] = {}
    for name, value in values.items():
        default = Settings.__dataclass_fields__[name].default
        try:
            if name in _OPTIONAL:
                out[name] = None if value is None else _converted(value, _OPTIONAL[name])
            elif isinstance(default, tuple):
                parts = value if isinstance(value, list | tuple) else [str(value)]
                items = [x for part in parts for x in (part.split(",") if isinstance(part, str) else [part])]
                items = [] if items == [""] and name in _EMPTY else items
                out[name] = tuple(_converted(x, _kind(name, default)) for x in items)
            else:
                out[name] = _converted(value, type(default))
        except (TypeError, ValueError, OverflowError) as error:
            words = (_LIST_WORDS if isinstance(default, tuple) else _WORDS)[_OPTIONAL.get(name, _kind(name, default))]
            rule = _UNITS.get(name, words)
            raise ConfigError(f"{name}={value!r}: need {rule}; set it with --{name.replace('_', '-')}") from error
    return Settings(**out)


def _kind(name: str, default: Any) -> type:
    """Of a value, or of a tuple's items."""
    return (type(default[0]) if default else _EMPTY[name]) if isinstance(default, tuple) else type(default)


def _converted(value: Any, kind: type) -> Any:
    """`value` as `kind`, losing nothing; raises ValueError, TypeError or OverflowError."""
    if kind is bool or isinstance(value, bool) or value is None:
        if type(value) is not kind:
            raise ValueError(value)
    elif kind is int and isinstance(value, float) and value != int(value):
        raise ValueError(value)
    return kind(value)


def load_settings(path: Path) -> Settings:
    """Reads what `save` wrote; raises StoreError when it is another version's."""
    try:
        known = yaml.safe_load(path.read_text())
        before = {"dev_tasks": max(1, known["test_tasks"] // 3)} if "test_tasks" in known else {}  # had no such option
        return _typed(before | known)
    except KeyError as error:
        raise StoreError(
            f"{path} is of another version of bopo_ray, which had the option {error.args[0]!r}; continue the run with "
            "that version, or choose another --out"
        ) from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError, ConfigError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} can't be read ({error}); choose another --out") from error


def save(settings: Settings, path: Path) -> None:
    """Writes the resolved settings."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}
    path.write_text(yaml.safe_dump(values, sort_keys=False))


@cache
def field_docs() -> dict[str, str]:
    """The line under each field of `Settings`, for --help."""
    source = ast.parse(inspect.getsource(Settings)).body[0]
    assert isinstance(source, ast.ClassDef)
    docs = {}
    for field, doc in pairwise(source.body):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            docs[ast.unparse(field.target)] = str(doc.value.value)
    return docs
