"""`transformers serve` with tiny trained models, over real HTTP: an episode, its bill, and the same model at home; then
the main job on two of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from ray.thirdparty_files import psutil
from transformers import AutoTokenizer

from bopo_ray.agent import Turn, chat_messages, parse_action
from bopo_ray.models.huggingface import HFModel
from bopo_ray.models.openai_http import OpenAIModel
from bopo_ray.models.pool import ModelSpec
from bopo_ray.models.pricing import Price
from bopo_ray.models.protocol import LanguageModel, Message, Reply, Request
from tests.integration.conftest import PAIR, Frontier, audited, ledger, paid, price
from tests.tiny_lm import make_tiny_lm, make_untrained_lm, serve
from tests.toy import Toy

FREE = Price(0, 0, 0)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows how to fetch, and nothing else."""
    return make_tiny_lm(tmp_path_factory.mktemp("lm") / "small", ("fetch",))


@pytest.fixture(scope="module")
def url(small: Path) -> Iterator[str]:
    with serve(small) as address:
        yield address


def play(model: LanguageModel, task: str, most: int = 6) -> tuple[bool, list[tuple[tuple[Message, ...], Reply]]]:
    """A greedy episode of at most so many steps; whether it succeeded, and its calls."""
    toy = Toy()
    first, info = toy.reset(options={"task": task})
    turns, calls, over, success = list[Turn](), [], False, False
    while not over and len(turns) < most:
        messages = chat_messages(info["task_text"], first, turns, toy.action_guide, 4096, model.bound)
        calls.append((messages, model.complete(Request(messages, 0, 0.0, 40, task=""))))
        reply = calls[-1][1].text
        observation, _, over, _, status = toy.step(parse_action(reply))
        turns.append(Turn(reply, parse_action(reply), observation))
        success = bool(status["success"])
    return success, calls


@pytest.mark.parametrize(("task", "known"), [("fetch/203", True), ("measure/201", False)])
def test_an_episode_over_http_is_billed_exactly_and_equals_the_one_at_home(
    small: Path, url: str, task: str, known: bool
) -> None:
    remote = OpenAIModel(ModelSpec(f"openai:{small}", FREE, base_url=url, key_variable=""))
    home = HFModel(ModelSpec(f"hf:{small}", FREE, device="cpu"))
    remote.check()
    success, calls = play(remote, task)
    at_home, own = play(home, task)
    assert success == at_home == known
    assert [r.text for _, r in calls] == [r.text for _, r in own]
    assert [r.usage for _, r in calls] == [r.usage for _, r in own]
    tokenizer = AutoTokenizer.from_pretrained(small)
    for messages, reply in calls:
        chat = [{"role": m.role, "content": m.content} for m in messages]
        assert reply.usage.prompt_tokens == len(
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        )
        assert reply.usage.completion_tokens == len(tokenizer.encode(reply.text, add_special_tokens=False)) + 1
        assert reply.usage.prompt_tokens <= min(remote.bound(messages), home.bound(messages))
    remote.close()
    home.close()


@pytest.mark.timeout(600)
def test_the_main_job_on_served_models(small: Path, url: str, tmp_path: Path) -> None:
    """Beside a model that writes noise, the one that can only fetch is the large one."""
    noise = make_untrained_lm(tmp_path / "noise")
    prices = {"noise": price("toy-small"), "fetcher": price("toy-large")}
    with serve(noise) as other:
        models = [
            {"model": f"openai:{folder}", "name": name, "price": prices[name].to_dict(), "base_url": address,
             "key_variable": "", "max_completion_tokens": 32, "timeout_s": 300}
            for name, folder, address in (("noise", noise, other), ("fetcher", small, url))
        ]  # fmt: skip
        pool = tmp_path / "pool.yaml"
        pool.write_text(yaml.safe_dump({"models": models}))
        run = Frontier(
            tmp_path,
            (*PAIR, "--models", str(pool), "--temperature", "0", "--max-steps", "6", "--cpus", "1", "--ignore-gate"),
        )
        assert run.run() == 0, run.said()
    assert "0 differ" in audited(run)

    # Each step has the usage that the server reported.
    stores = {name: run.rows(name).values() for name in ("boundary", "stratified", "policy", "evaluation", "oracle")}
    steps = [s for episodes in stores.values() for e in episodes for s in e["steps"]]
    assert all(stores.values()) and {s["model"] for s in steps} == {0, 1}
    assert all(s["prompt_tokens"] > 20 and 0 < s["completion_tokens"] <= 32 for s in steps)
    solved = {(e["policy"], e["task"].partition("/")[0]) for e in stores["boundary"] if e["success"]}
    assert solved == {("always-large", "fetch")}

    # The report's bill is the ledger's, and the ledger's is that of its calls and of the steps.
    totals, spend = ledger(run).totals(), json.loads((run.out / "summary.json").read_text())["spend"]
    costs = Counter[str]()
    for (model, usage), calls in paid(run).items():
        costs[model] += calls * prices[model].cost(usage)
    assert {m.model: m.paid_microusd for m in totals.models} == costs and all(costs.values())
    bill = totals.overall
    for kind in ("paid", "saved", "lost"):
        assert spend[f"{kind}_calls"] == getattr(bill, f"{kind}_calls")
        assert spend[f"{kind}_usd"] == getattr(bill, f"{kind}_microusd") / 1e6
    assert (bill.lost_calls, bill.reserved_microusd) == (0, 0)
    assert bill.paid_calls + bill.saved_calls == spend["calls"] == len(steps)
    assert bill.paid_microusd + bill.saved_microusd == sum(s["cost_microusd"] for s in steps) > 0
    assert f">Paid</td><td>{bill.paid_calls:,}</td>" in (run.out / "report.html").read_text()


def test_the_server_is_gone_at_the_end(small: Path) -> None:
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with serve(small) as address:
        port = urlsplit(address).port
        started = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
        assert any(str(port) in p.cmdline() for p in started)
    assert not [p for p in started if p.is_running()]
