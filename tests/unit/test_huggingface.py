"""A local model that the tests make themselves: what it writes, what it counts, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from bopo_ray.errors import AttemptError, ConfigError
from bopo_ray.models import hf_files, huggingface
from bopo_ray.models.hf_files import _digest
from bopo_ray.models.hf_template import ChatTemplate
from bopo_ray.models.huggingface import HFModel, _Host, shared_hf_model
from bopo_ray.models.pool import ModelSpec
from bopo_ray.models.pricing import Price
from bopo_ray.models.protocol import Message, Reply, Request
from tests.tiny_lm import TEMPLATE, make_untrained_lm

FREE = Price(0, 0, 0)
ROLES = ("user", "assistant")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make tiny sums slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_untrained_lm(tmp_path_factory.mktemp("lm") / "tiny", seed=1)


@pytest.fixture(scope="module")
def model(folder: Path) -> HFModel:
    return HFModel(spec(folder))


def spec(target: object, **fields: Any) -> ModelSpec:
    return ModelSpec(**{"model": f"hf:{target}", "price": FREE, "device": "cpu"} | fields)


def request(number: int, temperature: float = 0.9, sample: int = 0, max_tokens: int = 24) -> Request:
    """Prompts of many lengths, so that the rows of a batch are padded."""
    messages = (Message("system", "Act."), Message("user", f"Task {number}: " + "go on " * number))
    return Request(messages, sample, temperature, max_tokens, task="")


def chat(request: Request) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in request.messages]


def ask_together(
    model: HFModel, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Reply], list[int]]:
    """Asks from a thread each while the model is busy until all of them wait; also returns the rows of each batch."""
    writer, batches, busy = model._writer(), list[int](), threading.Event()
    generate = writer.generate

    def watched(rows: Any) -> list[list[int]]:
        busy.set()
        until = time.monotonic() + 60
        while not batches and len(writer.batcher._waiting) < len(requests) and time.monotonic() < until:
            time.sleep(0.001)
        batches.append(len(rows))
        return generate(rows)

    with monkeypatch.context() as patch, ThreadPoolExecutor(len(requests)) as threads:
        patch.setattr(writer, "generate", watched)
        plug = writer.batcher.submit(huggingface._Row([5], 1, 0.0, 0))
        assert busy.wait(60)  # else the first of them would join the plug
        replies = [threads.submit(model.complete, r) for r in requests]
        assert len(plug.result(60)) == 1
        return [r.result(60) for r in replies], batches[1:]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_reply_does_not_depend_on_who_else_is_in_the_batch(
    model: HFModel, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(i, temperature, sample=i) for i in range(8)]
    alone = [model.complete(r) for r in requests]
    together, batches = ask_together(model, requests, monkeypatch)
    assert batches == [8]
    assert [(r.text, r.usage) for r in together] == [(r.text, r.usage) for r in alone]
    assert len({r.text for r in alone}) > 4, "all of them say the same: this could not fail"


def test_twenty_threads_share_two_batches_of_at_most_sixteen(model: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request(i, max_tokens=4) for i in range(20)]
    replies, batches = ask_together(model, requests, monkeypatch)
    assert [r.usage.prompt_tokens for r in replies] == [len(model._prompts().ids(r.messages)) for r in requests]
    assert batches == [16, 4]


def test_samples_differ_by_index_and_repeat_by_index(model: HFModel, folder: Path) -> None:
    texts = [model.complete(request(1, 1.0, sample=i)).text for i in range(4)]
    again = HFModel(spec(folder, name="another"))
    assert [again.complete(request(1, 1.0, sample=i)).text for i in range(4)] == texts
    assert len(set(texts)) == 4
    assert len({model.complete(request(1, 0.0, sample=i)).text for i in range(4)}) == 1


def test_greedy_replies_and_usage_are_what_transformers_itself_says(model: HFModel, folder: Path) -> None:
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    r = request(3, 0.0)
    ids = tokenizer.apply_chat_template(chat(r), add_generation_prompt=True, return_tensors="pt")["input_ids"]
    new = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    reply = model.complete(r)
    assert reply.text == tokenizer.decode(new, skip_special_tokens=True)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (ids.shape[1], len(new))
    assert reply.usage.cached_tokens == 0
    assert reply.latency_s > 0


def test_sampling_follows_the_softmax(model: HFModel) -> None:
    """First tokens of 600 samples against the model's own distribution, on its most probable quarter."""
    r = request(2)
    tokenizer, writer = model._prompts().tokenizer, model._writer()
    ids = torch.tensor([tokenizer.apply_chat_template(chat(r), add_generation_prompt=True, return_dict=False)])
    with torch.no_grad():
        p = (writer.model(ids).logits[0, -1] / 0.05).softmax(-1)
    n = 600
    rows = [huggingface._Row(ids[0].tolist(), 1, 0.05, seed) for seed in range(n)]
    drawn = torch.bincount(torch.tensor([writer.generate(rows[i : i + 100]) for i in range(0, n, 100)]).flatten(),
                           minlength=len(p))  # fmt: skip
    likely = p.argsort(descending=True)[: len(p) // 4]
    expected, seen = n * p[likely].sum().item(), drawn[likely].sum().item()
    assert abs(seen - expected) < 4 * (expected * (1 - expected / n)) ** 0.5 + 1
    assert abs(drawn[likely[0]].item() - n * p[likely[0]].item()) < 4 * (n * p[likely[0]].item()) ** 0.5 + 1


def test_a_reply_ends_at_the_end_of_sequence_and_counts_it(model: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model.complete(request(4, 0.0))
    assert whole.usage.completion_tokens == 24, "cut by max_tokens"
    assert model.complete(request(4, 0.0, max_tokens=7)).usage.completion_tokens == 7
    writer = model._writer()
    (ids,) = writer.generate([huggingface._Row(model._prompts().ids(request(4).messages), 24, 0.0, 0)])
    end = ids[5]
    first = ids.index(end)
    monkeypatch.setattr(writer, "eos", [end])
    monkeypatch.setattr(writer.model.generation_config, "eos_token_id", end)
    other = model.complete(request(4, 0.0))
    assert other.usage.completion_tokens == first + 1
    assert (
        writer.generate([huggingface._Row(model._prompts().ids(request(4).messages), 24, 0.0, 0)])[0]
        == (ids[: first + 1])
    )


TEXTS = st.text(max_size=60) | st.sampled_from(["", " ", "\n", "a\n\n", " x ", "<|im_end|>", "\n\n\n", "éß☃"])
TALKS = st.tuples(TEXTS, TEXTS, st.lists(TEXTS, max_size=8)).map(
    lambda t: (
        Message("system", t[0]),
        Message("user", t[1]),
        *(Message(ROLES[1 - i % 2], c) for i, c in enumerate(t[2])),
    )
)


@settings(deadline=None)
@given(TALKS, st.integers(0, 10))
def test_the_bound_holds_and_is_additive(model: HFModel, talk: tuple[Message, ...], cut: int) -> None:
    prompt = model._prompts().ids(talk)
    assert len(prompt) <= model.bound(talk)
    assert model.bound(talk) <= model.bound(talk[:cut]) + model.bound(talk[cut:])
    if 2 <= cut < len(talk):  # what a budget does: what was billed for the beginning, and a bound for the rest
        assert len(prompt) <= len(model._prompts().ids(talk[:cut])) + model.bound(talk[cut:])


def test_the_bound_is_close(model: HFModel) -> None:
    talk = tuple(Message(role, "Some words of a message.") for role in ("system", "user", *("assistant", "user") * 8))
    assert len(model._prompts().ids(talk)) <= model.bound(talk) <= len(model._prompts().ids(talk)) + 2 * len(talk) + 8


INST = (
    "{{ '<<' }}{% for m in messages %}{% if m['role'] == 'system' %}[SYS]{{ m['content'] | trim }}[/SYS]"
    "{% elif m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]{% else %} {{ m['content'] }}<|im_end|>"
    "{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant of nothing.<|im_end|>\n"
    "{% endif %}" + TEMPLATE
)


@pytest.mark.parametrize("template", [INST, DEFAULT_SYSTEM], ids=["inst", "default system"])
@settings(deadline=None, max_examples=40)
@given(talk=TALKS)
def test_the_bound_holds_for_other_templates(folder: Path, template: str, talk: tuple[Message, ...]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    prompts = ChatTemplate(tokenizer, "hf:x")
    assert len(prompts.ids(talk)) <= prompts.bound(talk)
    assert len(prompts.ids(talk[1:])) <= prompts.bound(talk[1:])


def test_a_prompt_is_kept_within_the_context(folder: Path) -> None:
    model = HFModel(spec(folder, max_completion_tokens=100))
    assert model.sampling.max_prompt_tokens == 1948, "2048 - 100, not the default of 8192"
    assert HFModel(spec(folder, max_prompt_tokens=300)).sampling.max_prompt_tokens == 300
    with pytest.raises(ConfigError, match=r"context of 2048; set max_prompt_tokens") as caught:
        model.complete(request(2000))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="max_completion_tokens=2000"):
        HFModel(spec(folder, max_completion_tokens=2000)).check()


def test_an_episode_that_has_become_too_long_loses_its_oldest_turns(model: HFModel) -> None:
    head = (Message("system", "Act."), Message("user", "Task: find it"))
    turns = tuple(Message(ROLES[1 - i % 2], f"turn {i // 2}") for i in range(800))

    def asked(kept: int) -> Request:
        return Request((*head, *turns[len(turns) - 2 * kept :]), 0, 0.0, 4, task="")

    whole, read = asked(400), model._fitting(asked(400))
    kept = next(k for k in range(400, 0, -1) if len(model._prompts().ids(asked(k).messages)) + 4 <= 2048)
    assert 1 < kept < 400 and read == model._prompts().ids(asked(kept).messages) == model._fitting(asked(kept))
    assert model.complete(whole).usage.prompt_tokens == len(read) <= model.bound(whole.messages)


def test_memory_that_does_not_do_halves_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HFModel(spec(folder))
    writer = model._writer()
    generate, tried = writer.generate, []

    def scarce(rows: Any) -> list[list[int]]:
        tried.append(len(rows))
        if len(rows) > 2 or any(len(row.prompt) > 300 for row in rows):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(rows)

    rows = [huggingface._Row(model._prompts().ids(request(i).messages), 4, 0.0, i) for i in range(7)]
    expected = generate(rows)
    monkeypatch.setattr(writer, "generate", scarce)
    assert writer.answer(rows) == expected
    assert tried == [7, 4, 2, 2, 3, 2, 1]
    assert writer.batcher.batch_size == 2
    long = huggingface._Row([5] * 301, 4, 0.0, 0)
    refused, answered = writer.answer([long, rows[0]])
    assert isinstance(refused, AttemptError)
    assert answered == expected[0]
    with pytest.raises(AttemptError, match="out of memory") as caught:
        model.complete(request(400))
    assert not caught.value.retry


def test_a_failure_of_the_library_is_one_attempt(model: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(rows: object) -> list[list[int]]:
        raise RuntimeError("CUDA error: something\nand a page of advice")

    monkeypatch.setattr(model._writer(), "generate", broken)
    with pytest.raises(AttemptError, match=r"CUDA error: something$") as caught:
        model.complete(request(1))
    assert (caught.value.kind, caught.value.retry, caught.value.billed) == ("hf RuntimeError", True, False)


def test_closing_frees_the_weights_until_the_next_call(folder: Path) -> None:
    model = HFModel(spec(folder))
    text = model.complete(request(1)).text
    model.close()
    assert model._writing is None
    assert model.complete(request(1)).text == text
    model.close()


def test_the_identity_tells_models_apart_and_not_names(folder: Path, tmp_path: Path) -> None:
    other = make_untrained_lm(tmp_path / "tiny", seed=2)  # the same names and sizes of files
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    one = HFModel(spec(folder)).identity
    assert HFModel(spec(copy, name="copy", temperature=0.3)).identity == one
    assert HFModel(spec(other)).identity != one
    assert HFModel(spec(folder, dtype="bfloat16")).identity != one
    assert HFModel(spec(folder, name="n")).name == "n"
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert HFModel(spec(copy)).identity != one


def test_every_byte_of_large_weights_is_in_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOPO_RAY_CACHE", str(tmp_path / "cache"))
    (model := tmp_path / "model").mkdir()
    (model / "config.json").write_text("{}")
    weights = model / "model.safetensors"
    weights.write_bytes(bytes(range(256)) * 5000)
    assert _digest(model) == "83be258157f224e0", "stored replies of small models are found as before"
    with weights.open("r+b") as file:
        file.truncate(100 << 20)
        one = _digest(model)
        file.seek(3 << 20)  # a layer in the middle
        file.write(b"tuned")
        file.flush()
        os.utime(weights, ns=(1, 1))
        assert _digest(model) == _digest(model) != one
    monkeypatch.setattr(hf_files.hashlib, "file_digest", pytest.fail)
    assert _digest(model) != one, "the hash was kept"


def test_without_ray_one_model_serves_the_process(folder: Path) -> None:
    assert shared_hf_model(spec(folder)) is shared_hf_model(spec(folder))


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def shards(folder: Path) -> None:
    weights = {"weight_map": {"a": "model.safetensors", "b": "model-2-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without("config.json"), "no config.json"),
        (without("model.safetensors"), r"no weights \(\*.safetensors\)"),
        (without("tokenizer.json"), "no tokenizer"),
        (without("chat_template.jinja"), "no chat template: need an instruction-tuned model"),
        (shards, "no weights .model-2-of-2.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), "can't be loaded: "),
        (lambda f: (f / "config.json").write_text('{"model_type": "nonsense"}'), "can't be loaded: "),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "can't be loaded: "),
        (lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('no system here') }}"),
         "refuses a prompt of .*no system here"),
    ],
)  # fmt: skip
def test_a_spoilt_folder_is_told_in_one_line(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    spoil(copy)
    with pytest.raises(ConfigError, match=said) as caught:
        HFModel(spec(copy)).check()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"model 'hf:{copy}'")


def test_spoilt_weights_are_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="can't be loaded: ") as caught:
        HFModel(spec(copy)).complete(request(1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("/no/such/folder", "no folder '/no/such/folder'; need hf:FOLDER or hf:NAME"),
        ("no-such-org/no-such-model", "can't be loaded: .*; need a folder .*, or the name"),
    ],
)
def test_a_model_that_is_nowhere_is_told_in_one_line(target: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        HFModel(spec(target)).check()
    assert "\n" not in str(caught.value)


def test_an_actor_takes_the_hubs_key_where_its_node_has_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for key in ("", "lent", "another"):
        _Host(spec(folder), key)
    assert os.environ.pop("HF_TOKEN") == "lent"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="device='cuda': no GPU here; need cpu or auto"):
        HFModel(spec(folder, device="cuda")).check()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    HFModel(spec(folder, device="cuda")).check()  # a node with one comes when Ray is asked for it


@pytest.mark.parametrize(
    ("gpus", "models", "share"), [(0, 2, 0.5), (1, 1, 1.0), (1, 2, 0.5), (1, 3, 0.333), (2, 3, 0.5), (8, 2, 1.0)]
)
def test_every_model_finds_a_place_on_the_gpus(gpus: float, models: int, share: float) -> None:
    assert huggingface._gpu_share(gpus, models) == share
    if gpus:
        assert int(gpus) * int(1 / share) >= models


def test_with_ray_all_processes_share_one_actor_and_survive_its_death(folder: Path, ray_session: Any) -> None:
    import ray

    mine = spec(folder, dtype="float32")
    model = shared_hf_model(mine)
    model.check()
    home = HFModel(mine)
    assert (model.identity, model.sampling) == (home.identity, home.sampling)
    r = request(2)
    assert model.bound(r.messages) == home.bound(r.messages)
    expected = home.complete(r)
    reply = model.complete(r)
    assert (reply.text, reply.usage) == (expected.text, expected.usage)

    @ray.remote(num_cpus=0)
    def elsewhere() -> str:
        return shared_hf_model(mine).complete(r).text

    assert ray.get(elsewhere.remote(), timeout=120) == expected.text
    name = f"bopo_ray {model.identity}"
    assert [n for n in ray.util.list_named_actors() if n.startswith("bopo_ray hf|")].count(name) == 1
    with pytest.raises(ConfigError, match="context of 2048") as caught:
        model.complete(request(2000))
    assert "\n" not in str(caught.value)

    ray.kill(ray.get_actor(name))
    failures, text = list[AttemptError](), ""
    while not text and len(failures) < 20:
        try:
            text = model.complete(r).text
        except AttemptError as error:
            failures.append(error)
    assert failures, "the dead actor answered"
    for error in failures:
        assert (error.kind, error.retry, error.billed) == ("actor", True, False)
        assert "\n" not in str(error)
    assert text == expected.text
    ray.kill(ray.get_actor(name))
