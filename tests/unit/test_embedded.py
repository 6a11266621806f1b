"""Language models of our own: the decoder beside `transformers`, the windows, and what a broken folder is told."""

from __future__ import annotations

import json
import shutil
import string
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bopo_ray.benchmarks import fair_tasks, select_tasks
from bopo_ray.errors import AttemptError, ConfigError
from bopo_ray.models import build_pool, embedded_files, load_pool
from bopo_ray.models.embedded import EmbeddedModel, embedded_folder, embedded_names
from bopo_ray.models.embedded_prompt import CHAT_TEMPLATE, KEPT, MAX_ACTION_TOKENS, SPECIAL, EmbeddedPrompt
from bopo_ray.models.kv_decoder import DecoderThread, Job, KVDecoder
from bopo_ray.models.pool import ModelSpec, PoolSpec, resolve_pool
from bopo_ray.models.pricing import Price, price_table
from bopo_ray.models.protocol import Message, Request
from bopo_ray.records import Budget, CostMode
from envs.base import Split
from experiments import bench, bench_executors
from tests.toy import ID, PLANS, play, routing_env, toy_spec

PRICE = Price(400_000, 100_000, 1_600_000)
TABLE = price_table()
WORDS = ("go to kitchen", "pick up cup", "look around", "In it, you see: a table", "The door is open.", "focus on bowl")
CONTEXT = 320


def make_embedded(folder: Path, seed: int = 0, context: int = CONTEXT, layers: int = 2) -> Path:
    """A folder as training writes it, of a model that writes noise."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [*WORDS, *(action for plan in PLANS.values() for action in plan)]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=3, max_position_embeddings=context, tie_word_embeddings=True, initializer_range=0.15,
        rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 5_000.0}, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.data.normal_(1, 0.3)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    executor = {"format": 1, "env": "tests.toy:Toy-v0", "size": "small", "kinds": ["mix"], "made_by": "a test"}
    (folder / "executor.json").write_text(json.dumps(executor))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_embedded(tmp_path_factory.mktemp("embedded") / "toy-small")


@pytest.fixture(scope="module")
def reference(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(folder: Path) -> EmbeddedPrompt:
    return EmbeddedPrompt(folder, CONTEXT)


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "mine"))


def greedy(model: LlamaForCausalLM, prompt: Sequence[int], n: int = MAX_ACTION_TOKENS) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
    return out[0, len(prompt) :].tolist()


def draw(seed: int, length: int, vocabulary: int = 300) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), vocabulary, (length,), generator=generator).tolist()


def talk(steps: int, words: Sequence[str] = WORDS, task: str = "find the cup") -> tuple[Message, ...]:
    """An episode's messages, as `chat_messages` has them, after `steps` actions."""
    out = [Message("system", "Not read."), Message("user", f"Task: {task}\n\nObservation: {words[0]}")]
    for i in range(steps):
        out.append(Message("assistant", words[i % len(words)]))
        out.append(Message("user", f"Observation: {words[(i * 5 + 1) % len(words)]} {i}"))
    return tuple(out)


def spec_of(folder: Path, **fields: Any) -> ModelSpec:
    return ModelSpec(f"embedded:{folder}", PRICE, **fields)


def ask(
    messages: tuple[Message, ...], sample: int = 0, temperature: float = 0.0, n: int = MAX_ACTION_TOKENS
) -> Request:
    return Request(messages, sample, temperature, n, "any")


# -- the decoder ------------------------------------------------------------------------------------------------------


def test_logits_are_those_of_transformers(folder: Path, reference: LlamaForCausalLM, prompts: EmbeddedPrompt) -> None:
    decoder = KVDecoder(folder, prompts.end, slots=2)
    long = draw(1, 300)
    for prompt in (draw(0, 1), draw(0, 2), long[:40], long[:41], long, long[:120] + draw(2, 60), long[:299]):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(decoder.logits(prompt), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("slots", [1, 3, 48])
def test_greedy_texts_are_those_of_transformers(
    folder: Path, reference: LlamaForCausalLM, prompts: EmbeddedPrompt, slots: int
) -> None:
    """One at a time, all at once, and more texts than slots; prompts share beginnings, and come twice."""
    decoder = KVDecoder(folder, prompts.end, slots=slots)
    stem = draw(5, 60)
    asked = [draw(i, 3 + 23 * i) for i in range(6)] + [stem, stem[:30], stem + draw(9, 10), stem]
    expected = [greedy(reference, prompt) for prompt in asked]
    assert len({tuple(text) for text in expected}) > 5, "else the test shows nothing"
    assert decoder.generate([Job(prompt, MAX_ACTION_TOKENS) for prompt in asked]) == expected
    assert [decoder.generate([Job(prompt, MAX_ACTION_TOKENS)])[0] for prompt in asked] == expected


def test_a_text_ends_with_the_end_token_or_at_its_bound(folder: Path, prompts: EmbeddedPrompt) -> None:
    decoder = KVDecoder(folder, prompts.end)
    ends = decoder.generate([Job(draw(i, 9), 30, temperature=3.0, seed=i) for i in range(150)])
    ended = [text for text in ends if prompts.end in text]
    assert ended and all(text.index(prompts.end) == len(text) - 1 for text in ended)
    assert {len(text) for text in ends if prompts.end not in text} == {30}
    assert len(decoder.generate([Job(draw(0, 9), 1)])[0]) == 1


def test_a_cache_is_extended_over_an_episode_and_survives_dropped_steps(
    folder: Path, reference: LlamaForCausalLM, prompts: EmbeddedPrompt
) -> None:
    decoder = KVDecoder(folder, prompts.end, slots=4)
    read, dropped, before = list[int](), 0, list[int]()
    for t in range(40):
        ids = prompts.ids(talk(t))
        row = decoder.begin(Job(ids, MAX_ACTION_TOKENS))
        read.append(len(row.new))
        while not decoder.step([row]):
            pass
        assert row.written == greedy(reference, ids)
        dropped += ids[: len(before)] != before
        if ids[: len(before)] == before:
            assert len(row.new) <= 1 and read[-1] <= len(ids) - len(before) + 1, "all that was read before is kept"
        before = ids
    assert dropped >= 2 and sum(read) < 1200 < sum(len(prompts.ids(talk(t))) for t in range(40))


def test_two_models_that_take_turns_keep_their_caches(folder: Path, prompts: EmbeddedPrompt) -> None:
    """A model that is asked at every third step reads three steps."""
    decoder = KVDecoder(folder, prompts.end)
    first = len(decoder.begin(Job(prompts.ids(talk(0)), 1)).new)
    decoder.reset()
    decoder.generate([Job(prompts.ids(talk(0)), 20)])
    row = decoder.begin(Job(prompts.ids(talk(3)), 20))
    assert len(row.new) == len(prompts.ids(talk(3))) - first + (row.start < first)


def test_a_common_beginning_is_copied_from_a_text_in_flight(folder: Path, prompts: EmbeddedPrompt) -> None:
    decoder = KVDecoder(folder, prompts.end, slots=3)
    stem = draw(1, 80)
    first = decoder.begin(Job(stem, 20))
    decoder.step([first])
    second = decoder.begin(Job([*stem, 7, 8, 9], 20))
    assert second.slot != first.slot and second.start >= 80 and len(second.new) <= 3
    decoder.begin(Job(stem, 20))
    with pytest.raises(ValueError, match="all 3 slots are in use"):
        decoder.begin(Job(stem, 20))


def test_a_slot_of_another_episode_is_not_cut(folder: Path, prompts: EmbeddedPrompt) -> None:
    decoder = KVDecoder(folder, prompts.end, slots=3)
    stem, one, two = draw(1, 30), draw(2, 100), draw(3, 100)
    decoder.generate([Job(stem + one, 2)])
    decoder.generate([Job(stem + two, 2)])
    row = decoder.begin(Job(stem + one + [9], 2))
    assert row.start >= 130


@pytest.mark.parametrize(("prompt", "n"), [([], 5), ([9], 0), ([9] * CONTEXT, 1), ([9] * (CONTEXT - 3), 4)])
def test_a_job_that_does_not_fit_is_refused(folder: Path, prompts: EmbeddedPrompt, prompt: list[int], n: int) -> None:
    decoder = KVDecoder(folder, prompts.end)
    with pytest.raises(ValueError, match=f"{len(prompt)} tokens to read and {n} to write.*<= {CONTEXT}"):
        decoder.begin(Job(prompt, n))


def test_sampling_follows_the_softmax(folder: Path, prompts: EmbeddedPrompt) -> None:
    decoder = KVDecoder(folder, prompts.end)
    prompt, temperature, n = draw(4, 12), 0.5, 1500
    expected_V = torch.softmax(decoder.logits(prompt) / temperature, 0)
    drawn = torch.tensor(decoder.generate([Job(prompt, 1, temperature, seed) for seed in range(n)]))[:, 0]
    found_V = torch.bincount(drawn, minlength=len(expected_V)) / n
    assert 0.02 < expected_V.max() < 0.98
    assert (found_V - expected_V).abs().max() < 5 * (0.25 / n) ** 0.5


def test_an_error_reaches_the_jobs_in_flight_and_no_others(folder: Path, prompts: EmbeddedPrompt) -> None:
    decoder = KVDecoder(folder, prompts.end)
    expected = decoder.generate([Job(draw(1, 9), 5)])[0]
    thread = DecoderThread(decoder)
    with pytest.raises(ValueError, match="need both > 0"):
        thread.submit(Job([], 5)).result(30)
    with pytest.raises(IndexError):
        thread.submit(Job([9, 10**6], 5)).result(30)
    assert thread.submit(Job(draw(1, 9), 5)).result(30) == expected
    thread.close()
    with pytest.raises(AttemptError, match="closed"):
        thread.submit(Job([9], 5))


def test_a_new_job_joins_between_two_tokens(folder: Path, prompts: EmbeddedPrompt) -> None:
    class Slow(KVDecoder):
        def step(self, rows: Sequence[Any]) -> list[Any]:
            crowds.append(len(rows))
            second.set() if len(rows) > 1 else first.set()
            assert len(rows) > 1 or second.is_set() or joined.wait(30)
            return super().step(rows)

    crowds, first, second, joined = list[int](), threading.Event(), threading.Event(), threading.Event()
    thread = DecoderThread(Slow(folder, -1))
    long = thread.submit(Job(draw(1, 9), 20))
    assert first.wait(30)
    short = thread.submit(Job(draw(2, 9), 3))
    joined.set()
    assert len(short.result(30)) == 3 and len(long.result(30)) == 20
    assert crowds == [1, 2, 2, 2, *[1] * 16], "the short text was written while the long one was"
    thread.close()


# -- the model --------------------------------------------------------------------------------------------------------


def test_replies_are_the_same_alone_and_in_a_crowd(folder: Path) -> None:
    model = EmbeddedModel(spec_of(folder))
    requests = [ask(talk(t), sample, 0.7) for t in range(8) for sample in range(3)]
    alone = []
    for request in requests:
        fresh = EmbeddedModel(spec_of(folder))
        alone.append(fresh.complete(request))
        fresh.close()
    with ThreadPoolExecutor(12) as threads:
        crowd = list(threads.map(model.complete, requests[::-1]))[::-1]
    assert [(r.text, r.usage) for r in crowd] == [(r.text, r.usage) for r in alone]
    assert len({r.text for r in alone}) > 12, "samples differ"
    model.close()


def test_usage_is_what_was_read_and_written(folder: Path, prompts: EmbeddedPrompt) -> None:
    model = EmbeddedModel(spec_of(folder, max_completion_tokens=7))
    assert model.sampling.max_completion_tokens == 7 and model.sampling.max_prompt_tokens >= 100_000
    assert EmbeddedModel(spec_of(folder)).sampling.max_completion_tokens == MAX_ACTION_TOKENS
    for t in (0, 3, 60):
        reply = model.complete(ask(talk(t), n=7))
        assert reply.usage.prompt_tokens == len(prompts.ids(talk(t))) <= model.bound(talk(t))
        assert 1 <= reply.usage.completion_tokens <= 7 and reply.usage.cached_tokens == 0
        assert not any(token in reply.text for token in SPECIAL) and reply.latency_s > 0
    model.close()


def test_one_decoder_for_all_users_until_the_last_one_leaves(folder: Path) -> None:
    one, two = EmbeddedModel(spec_of(folder)), EmbeddedModel(spec_of(folder, name="other"))
    first = one.complete(ask(talk(1)))
    assert two._shared() is one._shared() and one.identity == two.identity
    one.close()
    assert two.complete(ask(talk(1))).text == first.text
    old = two._shared()
    two.close()
    two.close()
    assert one.complete(ask(talk(1))).text == first.text and one._shared() is not old
    one.close()


def test_identity_follows_what_replies_depend_on(folder: Path, broken: Path) -> None:
    same = EmbeddedModel(spec_of(broken)).identity
    assert same == EmbeddedModel(spec_of(folder)).identity and same.startswith("embedded|")
    (broken / "README.md").write_text("Another card.")
    assert EmbeddedModel(spec_of(broken)).identity == same
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, broken / "model.safetensors")
    assert EmbeddedModel(spec_of(broken)).identity != same


def test_an_episode_with_a_budget_never_exceeds_it(folder: Path, tmp_path: Path) -> None:
    large = make_embedded(tmp_path / "toy-large", seed=1, layers=3)
    pool = build_pool(PoolSpec((spec_of(folder), ModelSpec(f"embedded:{large}", Price(2_000_000, 0, 8_000_000)))))
    for cap in (2_000, 10_000):
        spec = toy_spec("fetch/0", budget=Budget(CostMode.USD, cap))
        episode, _ = play(spec, routing_env(pool, max_steps=12))
        assert 0 < sum(step.cost_microusd for step in episode.steps) <= cap
        again, _ = play(spec, routing_env(pool, max_steps=12))
        assert [s.reply for s in again.steps] == [s.reply for s in episode.steps]
    for model in pool.models:
        model.close()


# -- prompts and windows ----------------------------------------------------------------------------------------------


def test_the_chat_template_makes_the_same_tokens(folder: Path, prompts: EmbeddedPrompt) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for t in range(6):
        chat = [{"role": m.role, "content": m.content} for m in talk(t)]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert ids == prompts.ids(talk(t))


def test_special_tokens_in_a_text_are_text(prompts: EmbeddedPrompt) -> None:
    ids = prompts.ids((Message("user", "Task: <end> it\n\nObservation: <act>cheat<end>"),))
    assert ids[0] == prompts.task and ids[-1] == prompts.act
    assert prompts.end not in ids and ids.count(prompts.act) == ids.count(prompts.obs) == 1


texts = st.text(string.ascii_lowercase + " :.é", max_size=60)
episodes = st.tuples(texts, texts, st.lists(st.tuples(texts, texts), max_size=25))


def messages_of(episode: tuple[str, str, list[tuple[str, str]]]) -> list[tuple[Message, ...]]:
    """The messages before each action."""
    task, first, turns = episode
    out = [(Message("system", "s"), Message("user", f"Task: {task}\n\nObservation: {first}"))]
    for reply, observation in turns:
        out.append((*out[-1], Message("assistant", reply), Message("user", f"Observation: {observation}")))
    return out


@pytest.fixture(scope="module")
def narrow(folder: Path) -> EmbeddedPrompt:
    """A context that a few steps fill."""
    return EmbeddedPrompt(folder, 160)


@settings(max_examples=60, deadline=None)
@given(episodes)
def test_windows(narrow: EmbeddedPrompt, episode: tuple[str, str, list[tuple[str, str]]]) -> None:
    """Never above the room; the newest observation is read; a window grows, or drops steps down to `KEPT`."""
    before, start = list[int](), 0
    for messages in messages_of(episode):
        task, steps = narrow.parts(messages)
        window = narrow.window(len(task), [len(step) for step in steps])
        ids = narrow.ids(messages)
        assert len(ids) == window.length <= narrow.room and ids[-1] == narrow.act
        head = task[: narrow.room // 2]
        assert ids[: len(head)] == head
        room = narrow.room - len(head) - 1
        assert ids[len(head) : -1][-len(steps[-1]) :] == steps[-1] or ids[len(head) : -1] == steps[-1][:room]
        if window.start == start:
            cut = len(before) == narrow.room and before[:-1] != ids[: len(before) - 1]
            assert ids[: len(before)] == before or cut
        else:
            assert window.start > start
            assert len(ids) <= KEPT * narrow.room or window.start == len(steps) - 1
        before, start = ids, window.start


@settings(max_examples=60, deadline=None)
@given(episodes, st.integers(0, 50))
def test_the_bound_is_additive_and_holds(
    narrow: EmbeddedPrompt, prompts: EmbeddedPrompt, episode: tuple[str, str, list[tuple[str, str]]], cut: int
) -> None:
    messages = messages_of(episode)[-1]
    for prompt in (narrow, prompts):
        assert len(prompt.ids(messages)) <= prompt.bound(messages) <= prompt.room
        head, tail = messages[:cut], messages[cut:]
        assert prompt.bound(messages) <= prompt.bound(head) + prompt.bound(tail)
        previous = 0
        for start in messages_of(episode):  # what `RoutingEnv` reserves: what was billed, and the bound of the rest
            if previous:
                assert len(prompt.ids(start)) <= previous + prompt.bound(start[-2:])
            previous = len(prompt.ids(start))


# -- bad input --------------------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[ConfigError], *parts: str) -> None:
    said = str(error.value)
    assert "\n" not in said and all(part in said for part in parts), said


def edit(folder: Path, name: str, **fields: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_names_that_do_not_exist(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded_files, "SHIPPED", folder.parent)
    assert embedded_names() == ("toy-small",) and embedded_folder("toy-small") == folder
    monkeypatch.chdir(folder.parent)
    spec = ModelSpec("embedded:./toy-small", PRICE)
    monkeypatch.chdir(tmp_path)  # as a worker of Ray, which it was sent to
    assert EmbeddedModel(spec).files.folder == folder and embedded_folder("./toy-small", spec.base) == folder
    with pytest.raises(ConfigError) as error:
        EmbeddedModel(ModelSpec("embedded:toy-smal", PRICE))
    one_line(error, "'embedded:toy-smal'", "did you mean embedded:toy-small?", "need one of toy-small")
    with pytest.raises(ConfigError) as error:
        embedded_folder(str(tmp_path / "none"))
    one_line(error, "no such folder", "embedded:FOLDER")
    monkeypatch.setattr(embedded_files, "SHIPPED", tmp_path)
    with pytest.raises(ConfigError) as error:
        embedded_folder("toy-small")
    one_line(error, "none comes with this installation")


@pytest.mark.parametrize("name", ["config.json", "executor.json", "model.safetensors", "tokenizer.json"])
def test_files_that_lack_or_are_garbled(broken: Path, name: str) -> None:
    (broken / name).write_bytes(b"{ half a fi")
    with pytest.raises(ConfigError) as error:
        EmbeddedModel(spec_of(broken)).check()
    one_line(error, str(broken), name)
    (broken / name).unlink()
    with pytest.raises(ConfigError) as error:
        EmbeddedModel(spec_of(broken))
    one_line(error, str(broken), f"has no {name}")


@pytest.mark.parametrize(
    ("name", "fields", "parts"),
    [
        ("config.json", {"architectures": ["GPT2LMHeadModel"]}, ["architectures", "GPT2", "LlamaForCausalLM", "hf:"]),
        ("config.json", {"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
        ("config.json", {"num_key_value_heads": 1}, ["num_key_value_heads=1", "need 3"]),
        ("config.json", {"tie_word_embeddings": False}, ["tie_word_embeddings=False"]),
        ("config.json", {"attention_bias": True}, ["attention_bias=True"]),
        ("config.json", {"rope_parameters": {"rope_type": "yarn"}}, ["rope_type='yarn'", "'default'"]),
        ("config.json", {"max_position_embeddings": 40}, ["max_position_embeddings=40", "64"]),
        ("config.json", {"num_hidden_layers": "two"}, ["num_hidden_layers='two'"]),
        ("config.json", {"num_hidden_layers": 3}, ["model.layers.2.", "no such weight"]),
        ("config.json", {"intermediate_size": 65}, ["gate_proj", "(64, 48)", "(65, 48)"]),
        ("config.json", {"vocab_size": 300}, ["tokenizer.json has", "vocab_size=300"]),
        ("config.json", {"vocab_size": 500}, ["tokenizer.json has", "vocab_size=500"]),
        ("config.json", {"head_dim": 15}, ["even size"]),
        ("executor.json", {"format": 2}, ["format", "2", "need format 1"]),
        ("executor.json", {"env": None}, ["env"]),
    ],
)  # fmt: skip
def test_folders_of_another_kind(broken: Path, name: str, fields: dict[str, Any], parts: list[str]) -> None:
    edit(broken, name, **fields)
    with pytest.raises(ConfigError) as error:
        EmbeddedModel(spec_of(broken)).check()
    one_line(error, "mine", *parts)


@pytest.mark.parametrize("keep", [0, 5, 100, -1000, -1])
def test_weights_that_are_cut_off(broken: Path, keep: int) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    model = EmbeddedModel(spec_of(broken))
    for use in (model.check, lambda: model.complete(ask(talk(0)))):
        with pytest.raises(ConfigError) as error:
            use()
        one_line(error, "model.safetensors", "make it anew")


def test_weights_with_more_behind_them(broken: Path) -> None:
    with (broken / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ConfigError) as error:
        EmbeddedModel(spec_of(broken)).check()
    one_line(error, "bytes of weights, its header says")


def test_a_tokenizer_without_the_special_tokens(broken: Path) -> None:
    path = broken / "tokenizer.json"
    path.write_text(path.read_text().replace("<obs>", "<see>"))
    with pytest.raises(ConfigError) as error:
        EmbeddedModel(spec_of(broken))
    one_line(error, "has no <obs>")


def test_the_environment_is_told(folder: Path) -> None:
    model = EmbeddedModel(spec_of(folder))
    assert model.env == "tests.toy:Toy-v0" and model.files.size == "small" and not model.needs_plan


# -- the pool ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["scienceworld", "alfworld"])
def test_a_family_is_a_pair_at_list_prices(family: str) -> None:
    pool = resolve_pool(f"embedded:{family}", "", "", TABLE)
    assert [m.model for m in pool.models] == [f"embedded:{family}-small", f"embedded:{family}-large"]
    assert [m.label for m in pool.models] == [f"{family}-small", f"{family}-large"]
    assert [m.price for m in pool.models] == [TABLE.price("gpt-4.1-mini"), TABLE.price("gpt-4.1")]


@pytest.mark.parametrize(
    ("models", "parts"),
    [
        ("embedded:sciencewrld", ["did you mean embedded:scienceworld?", "embedded:alfworld", "--models"]),
        ("embedded:scienceworld-small", ["need embedded:alfworld or embedded:scienceworld", "--small"]),
        ("embedded:", ["unknown models 'embedded:'"]),
    ],
)
def test_families_that_do_not_exist(models: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_pool(models, "", "", TABLE)
    one_line(error, *parts)


def test_a_folder_of_ones_own_is_billed_by_its_name() -> None:
    pool = resolve_pool("", "embedded:out/scienceworld-small", "embedded:./out/scienceworld-large/", TABLE)
    assert [m.price for m in pool.models] == [TABLE.price("gpt-4.1-mini"), TABLE.price("gpt-4.1")]
    with pytest.raises(ConfigError) as error:
        resolve_pool("", "embedded:out/mine", "embedded:scienceworld-large", TABLE)
    one_line(error, "no price for model 'embedded:mine'")


def test_the_pool_says_what_it_is(folder: Path) -> None:
    pair = (spec_of(folder, name="scienceworld-small"), spec_of(folder, name="scienceworld-large"))
    pool = build_pool(PoolSpec(pair, prices_date="2026-02-01"))
    assert pool.label == "self-trained" and not pool.needs_plan
    assert pool.note == (
        "Language models of our own, trained from scratch by this project (embedded:scienceworld-small, "
        "embedded:scienceworld-large); tokens are measured; billed at the list prices of GPT-4.1-mini / GPT-4.1 of "
        "2026-02-01, which are nominal."
    )
    assert [m.name for m in pool.models] == ["scienceworld-small", "scienceworld-large"]
    assert build_pool(PoolSpec(pair, note="Mine.")).note == "Mine."


# -- the bench --------------------------------------------------------------------------------------------------------


def test_the_bench_measures_a_pair(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    pair = (spec_of(folder), spec_of(make_embedded(tmp_path / "toy-large", seed=1)))
    episodes, *writing = bench_executors.rows_of(ID, PoolSpec(pair), 0.01, max_steps=3)
    assert ID in episodes.name and episodes.unit == "episodes/min"
    assert [row.name for row in writing] == [
        f"toy-{size}, writing {crowd} after 288 tokens"
        for size in ("small", "large")
        for crowd in ("1 text", "8 texts")
    ]
    for row in (episodes, *writing):
        assert row.naive is not None and row.limit is not None and 0 < min(row.naive, row.ours) < row.limit


def test_the_bench_without_the_models_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded_files, "SHIPPED", tmp_path)
    with pytest.raises(SystemExit) as stop:
        bench.main(["executors", "--seconds", "1"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "embedded:scienceworld-small" in said


def test_the_naive_way_plays_the_same_episode(folder: Path) -> None:
    ours, naive = EmbeddedModel(spec_of(folder)), bench_executors._Naive(spec_of(folder))
    for t in (0, 5):
        assert naive.complete(ask(talk(t))).text == ours.complete(ask(talk(t))).text
    ours.close()


def test_the_models_are_asked_the_kinds_they_were_shown_in_their_environment_only(folder: Path) -> None:
    pool = build_pool(PoolSpec(tuple(ModelSpec(f"embedded:{folder}", PRICE, name=n) for n in ("one", "two"))))
    fair = fair_tasks(ID, pool)
    assert {t.kind for t in select_tasks(ID, Split.TRAIN, 6, 0)} > {"mix"}
    assert {t.kind for t in select_tasks(ID, Split.TRAIN, 6, 0, fair=fair)} == {"mix"}
    with pytest.raises(ConfigError, match=f"'one' was trained for {ID}, not for ScienceWorld-v0; .*--models"):
        fair_tasks("ScienceWorld-v0", pool)
    assert all(fair_tasks(ID, load_pool("simulated"))(t) for t in select_tasks(ID, Split.TRAIN, 6, 0))
