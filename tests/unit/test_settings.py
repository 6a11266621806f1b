"""Settings: who wins over whom, and one line for every mistake."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bopo_ray.errors import ConfigError, StoreError
from bopo_ray.pipeline.presets import SCALES
from bopo_ray.pipeline.same import check_same, check_same_tasks, task_lists
from bopo_ray.pipeline.settings import Settings, field_docs, load_settings, microusd, resolve, save
from bopo_ray.records import Budget, CostMode
from bopo_ray.rllib.encode import BUDGET_TOKENS, TASK_TOKENS
from envs.base import Split, Task
from experiments.frontier import parser


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


def test_the_command_line_wins_over_the_file_and_the_file_over_the_scale(tmp_path: Path) -> None:
    file = write(tmp_path, "scale: tiny\ntrain_tasks: 7\nupdates: 9\nlambdas: [0.4]\n")
    settings = resolve(file, {"updates": "11", "seeds": "3,4"})
    assert settings.scale == "tiny"
    assert settings.k == SCALES["tiny"]["k"] == 2  # the scale
    assert settings.train_tasks == 7 and settings.lambdas == (0.4,)  # the file over the scale
    assert settings.updates == 11 and settings.seeds == (3, 4)  # the command line over the file
    assert settings.beta == Settings().beta == 0.5  # the default where nobody says anything


def test_the_command_lines_scale_wins_over_the_files(tmp_path: Path) -> None:
    assert resolve(write(tmp_path, "scale: tiny\n"), {"scale": "paper"}).train_tasks == 2120
    assert resolve(None, {}) == resolve(write(tmp_path, ""), {}) == resolve(None, {"env": Settings().env})


def test_the_embedded_pair_is_called_by_its_environment() -> None:
    assert resolve(None, {}).pool == "embedded:scienceworld" and Settings().pool == "simulated"
    assert resolve(None, {"env": "ALFWorld-v0"}).pool == "embedded:alfworld"
    for env in ("ScienceWorld-v0", "ALFWorld-v0"):
        assert resolve(None, {"env": env, "models": "simulated"}).pool == "simulated"
    for env in ("AppWorld-v0", "tests.toy:Toy-v0"):  # code is beyond models of that size
        assert resolve(None, {"env": env}).pool == "simulated"


def test_each_benchmark_has_the_papers_step_limit(tmp_path: Path) -> None:
    assert resolve(None, {"env": "ALFWorld-v0"}).max_steps == 30
    assert resolve(write(tmp_path, "env: ALFWorld-v0\n"), {}).max_steps == 30
    assert resolve(None, {"env": "ALFWorld-v0", "scale": "tiny"}).max_steps == SCALES["tiny"]["max_steps"]
    assert resolve(None, {"env": "ALFWorld-v0", "max_steps": 12}).max_steps == 12
    assert resolve(None, {"env": "ALFWorld-v0", "scale": "paper"}).updates == SCALES["paper"]["updates"]
    assert resolve(None, {"env": "ALFWorld-v0"}).context > resolve(None, {"env": "AppWorld-v0"}).context
    assert resolve(None, {}).max_steps == 40


def test_what_follows_from_other_settings_by_default(tmp_path: Path) -> None:
    """A limit of half of a task's steps; as many dev tasks as test tasks."""
    for env, given, limits in (
        ("ScienceWorld-v0", {}, (20,)), ("ALFWorld-v0", {}, (15,)), ("AppWorld-v0", {"scale": "tiny"}, (10,)),
        ("ScienceWorld-v0", {"max_steps": 7}, (3,)), ("ScienceWorld-v0", {"call_limits": "4,8"}, (4, 8)),
        ("ScienceWorld-v0", {"call_limits": ""}, ()), ("ScienceWorld-v0", {"shares": "", "train_lambdas": ""}, ()),
        ("mine:Env-v0", {"shares": "0.5"}, ()),
    ):  # fmt: skip
        assert resolve(None, {"env": env, **given}).call_limits == limits
    assert resolve(None, {}).dev_tasks == resolve(None, {}).test_tasks == 48
    assert resolve(None, {"test_tasks": 9}).dev_tasks == 9 and resolve(None, {"dev_tasks": 5}).dev_tasks == 5
    save(resolve(None, {}), path := tmp_path / "settings.yaml")
    path.write_text(path.read_text().replace("dev_tasks: 48\n", ""))
    assert load_settings(path).dev_tasks == 16, "a third of them, before it could be said"


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_is_valid_and_names_fields_only(scale: str) -> None:
    assert set(SCALES[scale]) <= {f.name for f in dataclasses.fields(Settings)}
    assert resolve(None, {"scale": scale}).scale == scale


def test_values_of_the_command_line_become_the_fields_types() -> None:
    given = vars(parser().parse_args(["--lambdas", "0.2,0.8", "--train-tasks", "5", "--lr", "1e-4", "--ignore-gate",
                                      "--advantage", "vanilla", "--cost", "calls"]))  # fmt: skip
    names = {f.name for f in dataclasses.fields(Settings)}
    settings = resolve(None, {k: v for k, v in given.items() if k in names and v is not None})
    assert (settings.lambdas, settings.train_tasks, settings.lr) == ((0.2, 0.8), 5, 1e-4)
    assert settings.ignore_gate is True and settings.advantage == ("vanilla",) and settings.cost == "calls"
    twice = parser().parse_args(
        ["--lambdas", "0.2", "--router", "random:0.5", "--lambdas", "0.8", "--router", "cascade:2"]
    )
    assert twice.lambdas == "0.8" and twice.router == ["random:0.5", "cascade:2"], "the last wins, but for --router"


BAD: list[tuple[str, Any, str]] = [
    ("lora_rank", -1, "need 0"), ("backbone_context", 127, "need at least 128"), ("pass_tokens", 0, "need at least 1"),
    ("async_share", 0.0, r"need a share in \(0, 1\]"), ("async_share", 1.5, r"need a share in \(0, 1\]"),
    ("warmup", 1.0, r"need a share in \[0, 1\)"), ("lr_end", 1.1, r"need a share in \[0, 1\]"),
    ("num_learners", -1, "need 0"), ("num_gpus_per_learner", -1.0, "need a number >= 0"),
    *[(name, 0, "need at least 1") for name in (
        "train_tasks", "test_tasks", "max_steps", "k", "strata", "tasks_per_update", "updates",
        "eval_samples", "width", "layers", "lanes",
    )],
    ("dev_tasks", -1, "need 0"),
    ("sft_epochs", -1, r"need 0 \(no BoSFT\) or more"), ("sft_patience", -1, r"need 0 \(no early stop\) or more"),
    ("schedules", (), "need one or more different numbers of steps >= 0"),
    ("schedules", (-1,), "need one or more different numbers of steps >= 0"),
    ("shares", (0.3, 0.3), "need different numbers between 0 and 1"),
    ("shares", (0.0,), "need different numbers between 0 and 1"),
    ("shares", (0.5, 1.0), "need different numbers between 0 and 1"),
    ("call_limits", (5, 5), "need different whole numbers >= 1"), ("call_limits", (0,), "need different whole"),
    ("call_limits", (5,), "need some"),
    ("boundary_value", -0.1, "need a number >= 0"),
    ("reliability", 1.1, r"need a share in \[0, 1\]"),
    ("reliability", float("nan"), r"need a share in \[0, 1\]"),
    ("lambdas", (-0.1,), "need one or more different numbers >= 0"),
    ("lambdas", (), "need one or more different numbers >= 0"),
    ("lambdas", (float("nan"),), "need one or more different numbers >= 0"),
    ("train_lambdas", (0.3, 0.3), "need different numbers >= 0"),
    ("train_lambdas", (0.3,), "need some --shares"),
    ("seeds", (), "need one or more different whole numbers >= 0"),
    ("seeds", (-1,), "need one or more different whole numbers >= 0"),
    ("advantage", (), "need some of vanilla, augmented, hybrid"),
    ("advantage", ("grpo",), "need some of vanilla, augmented, hybrid"),
    ("cost", "eur", "need one of calls, usd"),
    ("cost_scale", "log", "need one of boundaries, absolute"),
    ("decide", "softly", "need one of greedy, sample"),
    ("share_rule", "best", "need one of price, front"),
    ("scale", "huge", "need one of tiny, quick, paper"),
    ("temperature", -0.1, "need a number >= 0"),
    ("temperature", float("nan"), "need a number >= 0"),
    ("beta", -1.0, "need a number >= 0"),
    ("group_size", 1, "need at least 2 episodes to compare"),
    ("context", 79, "need at least 80: the task and budget lines must fit"),
    ("cpus", -1, r"need 0 \(all\) or more"),
    ("lr", 0.0, "need a number > 0"),
    ("sft_lr", -1e-4, "need a number >= 0"),
    ("sharpness", 0.0, "need a number > 0"),
    ("max_spend", -0.01, "need dollars >= 0"),
    ("max_spend", float("nan"), "need dollars >= 0"),
    ("budget_calls", -1, "need a number of calls >= 0"),
    ("budget_usd", -0.1, "need dollars >= 0"),
    ("budget_usd", float("inf"), "need dollars >= 0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "rule"), BAD, ids=lambda x: str(x)[:24])
def test_a_value_out_of_range_is_one_line_with_field_value_rule_and_flag(name: str, value: Any, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as error:
        Settings(**{name: value})
    text = str(error.value)
    assert text.startswith(f"{name}={value!r}: ") and text.endswith(f"; set it with --{name.replace('_', '-')}")
    assert "\n" not in text


def test_learners_that_share_an_update_share_no_gpu() -> None:
    """Their collective refuses two on one device, in the middle of the run."""
    with pytest.raises(ConfigError, match=r"^num_gpus_per_learner=0.5: need a whole number for several learners"):
        Settings(num_learners=2, num_gpus_per_learner=0.5)
    for learners, gpus in ((2, 1), (2, 0), (1, 0.5), (0, 0.5)):
        assert Settings(num_learners=learners, num_gpus_per_learner=gpus).num_gpus_per_learner == gpus


def test_every_number_has_a_lower_bound() -> None:
    numbers = {f.name for f in dataclasses.fields(Settings) if isinstance(f.default, int | float | tuple)}
    assert numbers - {name for name, _, _ in BAD} == {
        "gradient_checkpointing",
        "ignore_gate",
        "router",
        "without_tasks",
    }


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("train_tasks", "many", "a whole number"), ("train_tasks", "2.5", "a whole number"),
        ("k", None, "a whole number"), ("lr", "fast", "a number"), ("ignore_gate", "yes", "true or false"),
        *[("lambdas", value, "numbers >= 0 separated by commas, e.g. 0.1,0.3") for value in ("0.1,abc", {"a": 1})],
        ("train_lambdas", "x", "numbers >= 0 separated by commas, e.g. 0.1,0.3"),
        *[("seeds", value, "whole numbers >= 0 separated by commas, e.g. 1,2") for value in ("0.5", "1,,2")],
        ("router", [None], "names separated by commas"), ("models", None, "text"),
        ("max_spend", "abc", "dollars >= 0, e.g. 20"), ("budget_usd", "much", "dollars >= 0, e.g. 0.05"),
        ("budget_calls", "2.5", "a whole number of calls >= 0, e.g. 10"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_one_line(name: str, value: Any, rule: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(None, {name: value})
    assert str(error.value) == f"{name}={value!r}: need {rule}; set it with --{name.replace('_', '-')}"


@pytest.mark.parametrize("env", ["tests.toy:Toy-v0", "AppWorld-v0", "all"])
def test_a_benchmark_without_a_self_trained_pair(env: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(None, {"env": env, "models": "embedded"})
    assert str(error.value) == (
        f"models='embedded': env={env!r} has no pair of that name; leave it out, or take simulated, simulated-llama, "
        "or your own (pool.yaml); set it with --models"
    )
    pair = {"small": "simulated:small", "large": "simulated:large"}
    assert resolve(None, {"env": env, "models": "embedded", **pair}).small, "which wins over --models"


def test_a_scale_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scale='huge': need one of tiny, quick, paper; set it with --scale"):
        resolve(write(tmp_path, "scale: huge\n"), {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian_tasks: 5\n", "unknown 'trian_tasks'; allowed: advantage, async_share, backbone, "),
        ("- a\n- b\n", "unknown 'list'"),
        ("just words\n", "unknown 'str'"),
        ("lambdas: [0.1\n", "can't be read: while parsing"),
    ],
)
def test_a_settings_file_that_can_not_be_used(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        resolve(write(tmp_path, text), {})
    assert "settings.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_settings_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"none\.yaml can't be read: No such file .*; name another with --settings",
    ):
        resolve(tmp_path / "none.yaml", {})


def test_the_context_is_said_to_hold_task_and_budget_too() -> None:
    """With a step in front of them, and each with a separator behind it."""
    said = field_docs()["context"]
    assert said.startswith("tokens of task, budget and history")
    assert f"at most {1 + TASK_TOKENS + 1 + BUDGET_TOKENS + 1} of them" in said


def test_every_field_has_its_line_in_the_help() -> None:
    assert list(field_docs()) == [f.name for f in dataclasses.fields(Settings)]
    assert all(doc and "\n" not in doc for doc in field_docs().values())
    text = " ".join(parser().format_help().split())
    for name in field_docs():
        assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize("scale", SCALES)
def test_saved_settings_come_back_equal(tmp_path: Path, scale: str) -> None:
    settings = resolve(None, {"scale": scale, "lr": "1e-05", "ignore_gate": True, "advantage": "augmented"})
    save(settings, tmp_path / "settings.yaml")
    assert load_settings(tmp_path / "settings.yaml") == settings


def test_a_continuation_may_add_points_to_the_sweep(tmp_path: Path) -> None:
    old = Settings(lambdas=(0.2, 0.8), seeds=(0,), advantage=("hybrid",))
    more = dataclasses.replace(old, lambdas=(0.8, 0.5, 0.2), seeds=(0, 1), advantage=("hybrid", "vanilla"))
    check_same(old, more, tmp_path / "settings.yaml")
    with pytest.raises(StoreError, match="holds a run with lambdas="):
        check_same(more, old, tmp_path / "settings.yaml")


@pytest.mark.parametrize("text", ["", "gone: 1\n", "- 1\n", "k: [\n", "k: 0\n"])
def test_settings_of_another_version_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(StoreError, match="choose another --out"):
        load_settings(write(tmp_path, text))


def test_an_option_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"settings.yaml is of another version .* had the option 'offsets'; continue"):
        load_settings(write(tmp_path, "k: 3\noffsets: [0.0, 1.0]\n"))


def test_a_continuation_must_not_mix_settings(tmp_path: Path) -> None:
    path = tmp_path / "run" / "settings.yaml"
    old = Settings()
    check_same(old, dataclasses.replace(old, cpus=2, lanes=3), path)  # the machine may change
    for field in dataclasses.fields(Settings):
        if field.name in ("cpus", "lanes", "ignore_gate", "max_spend", "calls", "router", "num_learners",
                          "num_gpus_per_learner", "pass_tokens"):  # fmt: skip
            continue
        new = Settings()
        object.__setattr__(new, field.name, "other")
        with pytest.raises(StoreError) as error:
            check_same(old, new, path)
        text, meant = str(error.value), getattr(old, "bosft_lr" if field.name == "sft_lr" else field.name)
        assert f"{tmp_path / 'run'} holds a run with {field.name}={meant!r}, this one has 'other'" in text
        assert "choose another --out" in text


def test_a_continuation_must_not_mix_tasks(tmp_path: Path) -> None:
    path, env = tmp_path / "run" / "tasks.json", "ScienceWorld-v0"
    names = {"train": ("boil/1", "boil/2"), "test": ("boil/9",)}
    train, test = ([Task(env, n, split) for n in names[split]] for split in (Split.TRAIN, Split.TEST))
    own = task_lists(env, train, test)
    check_same_tasks(path, own)  # a folder of before the file
    path.parent.mkdir()
    path.write_text(json.dumps(own))
    check_same_tasks(path, own)
    for other, said in (
        (task_lists(env, train[:1], test), "'boil/2' is a task of one of them"),
        (task_lists(env, train[::-1], test), "these are of ScienceWorld-v0; set what names them"),
        (own | {"source": "others"}, "run on tasks of ScienceWorld-v0, these are of others; set"),
    ):
        with pytest.raises(StoreError) as error:
            check_same_tasks(path, other)
        assert said in str(error.value) and str(tmp_path / "run") in str(error.value)
        assert "ALFWORLD_DATA" in str(error.value) and "choose another --out" in str(error.value)
    for broken in ("", "{}", "[1]", '{"train": 1, "test": []}'):
        path.write_text(broken)
        with pytest.raises(StoreError, match=r"tasks\.json can't be read .* choose another --out"):
            check_same_tasks(path, own)


def test_routers_are_named_one_by_one_or_together() -> None:
    given = parser().parse_args(["--router", "cascade:3,last-large:10", "--router", "oracle"]).router
    assert resolve(None, {"router": given}).router == ("cascade:3", "last-large:10", "oracle")
    for nothing in ("", []):
        assert resolve(None, {"train_lambdas": nothing}).train_lambdas == ()
    later = vars(parser().parse_args(["--shares=0.2,0.6", "--train-lambdas=0.3", "--shares=", "--train-lambdas="]))
    assert (later["shares"], later["train_lambdas"]) == ("", ""), "the last one counts"
    assert resolve(None, {"router": "cascade"}).router == ("cascade",) and resolve(None, {}).router == ()
    with pytest.raises(ConfigError, match=r"unknown router 'cascades'; known: .*; set it with --router"):
        Settings(router=("cascades",))
    with pytest.raises(ConfigError, match=r"grpo-vanilla is trained by --advantage hybrid,vanilla"):
        Settings(router=("grpo-vanilla",), advantage=("hybrid",))
    assert Settings(router=("grpo-vanilla",)).advantage == ("hybrid", "vanilla")


def test_budgets_are_in_calls_or_in_micro_dollars() -> None:
    assert Settings().budget is None and Settings(budget_calls=None).budget is None
    assert resolve(None, {"budget_calls": "10"}).budget == Budget(CostMode.CALLS, 10)
    assert resolve(None, {"budget_usd": "0.05"}).budget == Budget(CostMode.USD, 50_000)
    with pytest.raises(ConfigError, match="a cap in dollars and one in calls at once"):
        Settings(budget_calls=1, budget_usd=1.0)


@pytest.mark.parametrize(
    ("usd", "expected"),
    [(0, 0), (1e-7, 0), (0.0000015, 1), (0.0000019, 1), (0.0123456789, 12_345), (0.29, 290_000), (4.35, 4_350_000),
     (123_456.789012, 123_456_789_012)],
)  # fmt: skip
def test_dollars_are_never_rounded_up(usd: float, expected: int) -> None:
    assert microusd(usd) == expected
    assert Settings(budget_usd=usd).budget == Budget(CostMode.USD, expected)


def test_alfworlds_router_reads_the_value_unless_it_is_another_one() -> None:
    alfworld = resolve(None, {"env": "ALFWorld-v0"})
    assert alfworld.router_shape["value"] is True and alfworld.bosft_lr == 3e-3
    text = resolve(None, {"env": "ALFWorld-v0", "boundary_value": "0"})
    assert text.router_shape == {"width": 64, "layers": 2, "context": 160} and text.bosft_lr == 5e-4
    own = dataclasses.replace(alfworld, backbone="me/my-model")
    assert "value" not in own.router_shape and own.bosft_lr == 5e-4
    assert dataclasses.replace(alfworld, sft_lr=1e-4).bosft_lr == 1e-4


def test_a_learning_rate_that_is_meant_and_one_that_is_written_are_the_same(tmp_path: Path) -> None:
    meant = Settings()
    check_same(dataclasses.replace(meant, sft_lr=5e-4), meant, tmp_path / "settings.yaml")
    with pytest.raises(StoreError, match=r"sft_lr=0\.001, this one has 0\.0005"):
        check_same(dataclasses.replace(meant, sft_lr=1e-3), meant, tmp_path / "settings.yaml")
