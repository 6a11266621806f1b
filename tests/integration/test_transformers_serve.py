"""`transformers serve` with a tiny trained model, over real HTTP: an episode, its bill, and the same model at home."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from ray.thirdparty_files import psutil
from transformers import AutoTokenizer

from bopo_ray.agent import Turn, chat_messages, parse_action
from bopo_ray.models.huggingface import HFModel
from bopo_ray.models.openai_http import OpenAIModel
from bopo_ray.models.pool import ModelSpec
from bopo_ray.models.pricing import Price
from bopo_ray.models.protocol import LanguageModel, Message, Reply, Request
from tests.tiny_lm import make_tiny_lm, serve
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


def test_the_server_is_gone_at_the_end(small: Path) -> None:
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with serve(small) as address:
        port = urlsplit(address).port
        started = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
        assert any(str(port) in p.cmdline() for p in started)
    assert not [p for p in started if p.is_running()]
