"""The `openai:` provider over real HTTP, against the scripted endpoint of tests/endpoint.py."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from bopo_ray.agent import parse_action
from bopo_ray.errors import AttemptError, ConfigError, ModelError, RefusedError
from bopo_ray.lanes import Lanes, finish
from bopo_ray.loop import event_loop
from bopo_ray.models import openai_http as module
from bopo_ray.models.desk import Desk, RetryPolicy
from bopo_ray.models.openai_http import OpenAIModel
from bopo_ray.models.pool import ModelSpec
from bopo_ray.models.pricing import Price, Usage
from bopo_ray.models.protocol import Message, Reply, Request
from bopo_ray.models.redact import HIDDEN, redact
from bopo_ray.models.spend import ModelTotals, SpendLedger
from bopo_ray.models.tokens import count_tokens, prompt_tokens
from tests.endpoint import Ask, Endpoint, Fault, Kind

KEY = "planted-Key_1234567890-do-not-show"
PRICE = Price(400_000, 100_000, 1_600_000)
FREE = Price(0, 0, 0)
MESSAGES = (Message("system", "You act."), Message("user", "Your task is to fetch number fetch/0."))


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PLANTED_KEY", KEY)
    return KEY


def build(url: str, processes: int = 1, **fields: Any) -> OpenAIModel:
    defaults = {"model": "openai:toy-large", "price": PRICE, "base_url": url, "key_variable": "PLANTED_KEY"}
    return OpenAIModel(ModelSpec(**defaults | fields), processes)


def ask(max_tokens: int = 32, messages: tuple[Message, ...] = MESSAGES) -> Request:
    return Request(messages, 0, 0.5, max_tokens, "fetch/0")


def attempt(fault: Fault, **fields: Any) -> tuple[Reply | BaseException, Endpoint]:
    """What one call against an endpoint with this fault comes to; the key is in no outcome."""
    with Endpoint(faults=[fault], key=KEY) as endpoint:
        model = build(endpoint.url, **fields)
        try:
            return model.complete(ask()), endpoint
        except (AttemptError, ConfigError) as error:
            assert_clean(error)
            return error, endpoint
        finally:
            model.close()


def assert_clean(error: BaseException) -> None:
    shown = str(error) + repr(error) + "".join(traceback.format_exception(error))
    assert KEY not in shown
    assert not any(KEY[i : i + 8] in str(error) for i in range(len(KEY) - 7))
    assert KEY.encode() not in pickle.dumps(error)
    assert error.__cause__ is None and error.__context__ is None
    assert "\n" not in str(error) and len(str(error)) < 600


def failed(fault: Fault, **fields: Any) -> AttemptError:
    outcome, endpoint = attempt(fault, **fields)
    assert isinstance(outcome, AttemptError), outcome
    assert outcome.retry
    undelivered = [line for line in endpoint.bill if not line.delivered]
    assert not undelivered or outcome.billed, "charged for, but taken for free"
    assert [line for line in endpoint.bill if line.delivered] == []
    return outcome


def refused(fault: Fault, **fields: Any) -> str:
    outcome, _ = attempt(fault, **fields)
    assert isinstance(outcome, ConfigError), outcome
    return str(outcome)


def replied(fault: Fault, **fields: Any) -> tuple[Reply, Endpoint]:
    outcome, endpoint = attempt(fault, **fields)
    assert isinstance(outcome, Reply), outcome
    return outcome, endpoint


def test_a_reply_and_what_was_asked() -> None:
    with Endpoint(key=KEY) as endpoint:
        model = build(
            endpoint.url + "/",
            headers=(("x-team", "blue"),),
            query=(("api-version", "7"),),
            extra_body='{"top_p": 0.5}',
        )
        reply = model.complete(ask())
        assert parse_action(reply.text) == "teleport to kitchen"
        assert reply.usage == Usage(17, 10) == endpoint.bill[0].usage
        assert reply.latency_s > 0
        (seen,) = endpoint.asks
    assert seen.body == {
        "model": "toy-large", "temperature": 0.5, "max_tokens": 32, "top_p": 0.5,
        "messages": [{"role": m.role, "content": m.content} for m in MESSAGES],
    }  # fmt: skip
    assert seen.headers["authorization"] == f"Bearer {KEY}"
    assert seen.headers["x-team"] == "blue"
    assert seen.query == {"api-version": ["7"]}


def test_without_a_key_variable_no_key_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Endpoint() as endpoint:
        model = build(endpoint.url, key_variable="")
        model.check()
        model.complete(ask())
        assert KEY not in str(endpoint.asks[0].headers)


@pytest.mark.parametrize(
    ("url", "field", "expected"),
    [
        ("https://api.openai.com/v1", "", "max_completion_tokens"),
        ("https://eu.api.openai.com/v1", "", "max_completion_tokens"),
        ("https://notapi.openai.com.example/v1", "", "max_tokens"),
        ("http://127.0.0.1:1/v1", "", "max_tokens"),
        ("http://127.0.0.1:1/v1", "max_completion_tokens", "max_completion_tokens"),
    ],
)
def test_the_field_that_bounds_a_reply(url: str, field: str, expected: str) -> None:
    assert build(url, max_tokens_field=field).max_tokens_field == expected


def test_max_completion_tokens_reaches_the_endpoint() -> None:
    with Endpoint() as endpoint:
        build(endpoint.url, max_tokens_field="max_completion_tokens").complete(ask(5))
        assert endpoint.asks[0].body["max_completion_tokens"] == 5
        assert "max_tokens" not in endpoint.asks[0].body


def test_identity_holds_what_a_reply_depends_on_and_no_key() -> None:
    url = "http://127.0.0.1:1/v1"
    model = build(url, extra_body='{"b": 1, "a": 2}', query=(("v", "1"),))
    assert model.identity == f'openai|{url}|toy-large|max_tokens|{{"a": 2, "b": 1}}|{{"v": "1"}}'
    others = [build(url), build(url + "x"), build(url, model="openai:b"), build(url, max_tokens_field="max_tokens")]
    assert len({m.identity for m in others}) == 3  # the last says what is the default anyway
    assert KEY not in repr(model) + str(model) + model.identity


TEXTS = st.lists(st.text(max_size=80), max_size=6)


@given(a=TEXTS, b=TEXTS)
def test_the_bound_holds_for_byte_level_tokens_and_is_additive(a: list[str], b: list[str]) -> None:
    model = build("http://127.0.0.1:1/v1")
    first, second = (tuple(Message("user", text) for text in texts) for texts in (a, b))
    assert model.bound(first + second) <= model.bound(first) + model.bound(second)
    assert model.bound(first) >= prompt_tokens(first)


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
@pytest.mark.parametrize("text", ["\u0958", "\U0001d160", "\ufdfa", "e\u0301"], ids=ascii)
def test_the_bound_holds_where_a_tokenizer_normalises_first(form: str, text: str) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    bytewise.normalizer = getattr(normalizers, form)()
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    messages = (Message("user", 100 * text),)
    assert build("http://127.0.0.1:1/v1").bound(messages) >= len(bytewise.encode(messages[0].content).ids)


# -- failures that may pass


@pytest.mark.parametrize(
    ("headers", "expected"),
    [({}, None), ({"Retry-After": "2"}, 2.0), ({"Retry-After": "9", "retry-after-ms": "1500"}, 1.5)],
)
def test_429(headers: dict[str, str], expected: float | None) -> None:
    error = failed(Fault(Kind.RATE, headers))
    assert (error.kind, error.billed, error.retry_after_s) == ("429", False, expected)
    assert "Rate limit reached" in str(error)


def test_429_until_a_date() -> None:
    when = format_datetime(datetime.now(UTC) + timedelta(minutes=5), usegmt=True)
    error = failed(Fault(Kind.RATE, {"Retry-After": when}))
    assert error.retry_after_s is not None and 200 < error.retry_after_s <= 300


@pytest.mark.parametrize(("kind", "status"), [(Kind.ERROR, "500"), (Kind.BUSY, "503")])
def test_server_errors(kind: Kind, status: str) -> None:
    error = failed(Fault(kind, {"Retry-After": "1"}))
    assert error.kind.startswith(status + ":") and not error.billed and error.retry_after_s == 1


def test_the_same_server_error_is_the_same_kind_and_another_is_another() -> None:
    kinds = [failed(Fault(Kind.STATUS, status=500, body=body)).kind for body in ("<p>oops</p>", "<p>oops</p>", "no")]
    assert kinds[0] == kinds[1] != kinds[2]


@pytest.mark.parametrize(
    ("status", "billed"), [(409, False), (500, False), (503, False), (408, True), (502, True), (504, True), (524, True)]
)
def test_other_statuses_that_may_pass(status: int, billed: bool) -> None:
    """A gateway that gave up waiting does not know what the server behind it goes on to charge."""
    error = failed(Fault(Kind.STATUS, status=status, body="wait"))
    assert error.kind.startswith(str(status)) and error.billed == billed


@pytest.mark.parametrize("fault", [Fault(Kind.HANG), Fault(Kind.DRIP, seconds=0.02)])
def test_a_timeout_bounds_the_whole_attempt(fault: Fault) -> None:
    error = failed(fault, timeout_s=0.3)
    assert (error.kind, error.billed) == ("timeout", True)
    assert "0.3 s" in str(error)


def test_a_slow_reply_within_the_timeout_is_a_reply() -> None:
    reply, endpoint = replied(Fault(Kind.SLOW, seconds=0.2), timeout_s=10)
    assert reply.latency_s >= 0.2
    assert endpoint.bill[0].usage == reply.usage


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(Kind.RESET, "cut"), (Kind.CUT, "cut"), (Kind.TRUNCATED, "not-json"), (Kind.NO_CHOICES, "no-choices")],
)
def test_what_breaks_off_after_sending_may_be_billed(kind: Kind, expected: str) -> None:
    error = failed(Fault(kind))
    assert (error.kind, error.billed) == (expected, True)


@pytest.mark.parametrize(
    "body",
    [
        "[]", "null", "7", '{"choices": 3}', '{"choices": [{}]}', '{"choices": [{"message": {"content": 5}}]}',
        '{"error": {"message": "upstream died"}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_answers_that_make_no_sense_may_be_billed(body: str) -> None:
    assert failed(Fault(Kind.STATUS, status=200, body=body)).billed


@pytest.mark.parametrize("packed", [False, True])
def test_of_an_answer_that_never_ends_little_is_read(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ANSWER_BYTES", 2**20)
    body = json.dumps({"choices": [{"message": {"content": "look"}}], "more": " " * 2**22}).encode()
    headers, data = {"Content-Length": str(2**40)}, body
    if packed:
        headers["Content-Encoding"], data = "gzip", gzip.compress(body)
    error = failed(Fault(Kind.STATUS, headers, status=200, body=data))
    assert (error.kind, error.billed) == ("too-long", True) and "more than 1 MB" in str(error)
    assert "check PLANTED_KEY" in refused(Fault(Kind.STATUS, headers, status=401, body=data)), "that it says at once"


def test_failures_of_the_same_kind_without_a_choice_are_the_same() -> None:
    bodies = (
        '{"id": 1, "choices": []}',
        '{"id": 2}',
        '{"id": 1, "error": "a"}',
        '{"id": 2, "error": "a"}',
        '{"error": 3}',
    )
    first, second, *errors = [failed(Fault(Kind.STATUS, status=200, body=body)).kind for body in bodies]
    assert first == second == "no-choices" and errors[0] == errors[1] != errors[2] and errors[0] != first


def test_a_request_that_never_left_is_not_billed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(AttemptError) as caught:
        build(f"http://127.0.0.1:{port}/v1").complete(ask())
    assert (caught.value.kind, caught.value.retry, caught.value.billed) == ("unreachable", True, False)
    assert_clean(caught.value)


def test_a_connection_that_is_never_taken_is_not_billed() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        waiting = [socket.socket() for _ in range(4)]  # more than its queue holds
        for s in waiting:
            s.setblocking(False)
            s.connect_ex(deaf.getsockname())
        try:
            with pytest.raises(AttemptError) as caught:
                build(f"http://127.0.0.1:{deaf.getsockname()[1]}/v1", timeout_s=1.0).complete(ask())
        finally:
            for s in waiting:
                s.close()
    assert (caught.value.kind, caught.value.billed) == ("unreachable", False)
    assert_clean(caught.value)


def test_a_name_that_does_not_resolve_is_not_billed() -> None:
    with pytest.raises(AttemptError) as caught:
        build("http://no-such-host.invalid/v1").complete(ask())
    assert caught.value.retry and not caught.value.billed


def test_an_endpoint_that_comes_back_is_used_again() -> None:
    with Endpoint() as endpoint:
        model = build(endpoint.url)
        model.complete(ask())
    with pytest.raises(AttemptError):
        model.complete(ask())
    with Endpoint(port=endpoint.port):
        assert model.complete(ask()).text


# -- replies that say nothing


def test_an_empty_reply() -> None:
    reply, endpoint = replied(Fault(Kind.EMPTY))
    assert (reply.text, reply.usage) == ("", endpoint.bill[0].usage)


def test_a_filtered_reply_is_empty_and_paid() -> None:
    reply, endpoint = replied(Fault(Kind.FILTER_200))
    assert (reply.text, reply.usage) == ("", endpoint.bill[0].usage)
    assert reply.usage.prompt_tokens > 0


@pytest.mark.parametrize(
    ("status", "code"), [(400, "invalid_prompt"), (400, "content_policy_violation"), (403, "content_policy_violation")]
)
def test_a_refusal_of_what_one_prompt_says_does_not_end_the_run(status: int, code: str) -> None:
    body = json.dumps({"error": {"message": "Your prompt was flagged.", "code": code}})
    reply, _ = replied(Fault(Kind.STATUS, status=status, body=body))
    assert (reply.text, reply.usage) == ("", Usage(0, 0))


def test_what_was_thought_is_billed_where_only_the_total_has_it() -> None:
    def body(total: object) -> str:
        usage = {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": total}
        return json.dumps({"choices": [{"message": {"content": "look"}}], "usage": usage})

    for total, completion in ((350, 318), (41, 9), (0, 9), ("350", 9), (2**40, 9)):
        reply, _ = replied(Fault(Kind.STATUS, status=200, body=body(total)))
        assert reply.usage == Usage(32, completion)


def test_a_filtered_prompt_is_an_empty_reply_for_nothing() -> None:
    reply, endpoint = replied(Fault(Kind.FILTER_400))
    assert (reply.text, reply.usage, endpoint.bill) == ("", Usage(0, 0), [])


def test_half_a_surrogate_pair_is_replaced() -> None:
    body = r'{"choices": [{"message": {"content": "a\ud800b"}}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}'
    reply, _ = replied(Fault(Kind.STATUS, status=200, body=body))
    assert reply.text == "a?b"


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([{"type": "text", "text": "Action: "}, {"type": "text", "text": "look"}], "Action: look"),
        (
            [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "look"}],
            "look",
        ),
        ([{"type": "refusal", "refusal": "No."}], ""),
        ([], ""),
    ],
)
def test_a_reply_in_parts(parts: list[Any], text: str) -> None:
    body = {"choices": [{"message": {"content": parts}}], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}
    reply, _ = replied(Fault(Kind.STATUS, status=200, body=json.dumps(body)))
    assert (reply.text, reply.usage) == (text, Usage(9, 4))


@pytest.mark.parametrize("content", [0, {}, ["look"], [{"type": "text"}], [{"type": "song", "text": "la"}]])
def test_what_can_not_be_read_is_no_empty_reply(content: Any) -> None:
    body = {"choices": [{"message": {"content": content}}], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}
    error = failed(Fault(Kind.STATUS, status=200, body=json.dumps(body)))
    assert (error.kind, error.cost) == ("no-choices", PRICE.cost(Usage(9, 4))), "and is paid for as reported"


# -- usage


def with_usage(usage: Any, **fields: Any) -> tuple[Reply | BaseException, Endpoint]:
    body = {"choices": [{"message": {"content": "Action: look"}}], "usage": usage}
    return attempt(Fault(Kind.STATUS, status=200, body=json.dumps(body)), **fields)


@pytest.mark.parametrize(
    ("details", "cached"),
    [(None, 0), ({}, 0), ({"cached_tokens": None}, 0), ({"cached_tokens": 7}, 7), ({"cached_tokens": 99}, 10),
     ({"cached_tokens": -2}, 0), ({"cached_tokens": "x"}, 0), ([], 0)],
)  # fmt: skip
def test_cached_tokens(details: Any, cached: int) -> None:
    outcome, _ = with_usage({"prompt_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": details})
    assert isinstance(outcome, Reply)
    assert outcome.usage == Usage(10, 3, cached)


NONSENSE = [
    None, {}, [], "many", {"prompt_tokens": 5}, {"prompt_tokens": -1, "completion_tokens": 2},
    {"prompt_tokens": 1.5, "completion_tokens": 2}, {"prompt_tokens": True, "completion_tokens": 2},
    {"prompt_tokens": "5", "completion_tokens": 2}, {"prompt_tokens": 10**30, "completion_tokens": 2},
]  # fmt: skip


@pytest.mark.parametrize("usage", NONSENSE)
def test_without_usage_no_bill_can_be_made(usage: Any) -> None:
    outcome, _ = with_usage(usage)
    assert isinstance(outcome, ConfigError)
    assert "price: 0" in str(outcome) and "usage" in str(outcome)


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": -1, "completion_tokens": 2}])
def test_without_usage_a_free_model_counts_for_itself(usage: Any) -> None:
    outcome, _ = with_usage(usage, price=FREE)
    assert isinstance(outcome, Reply)
    assert outcome.usage == Usage(prompt_tokens(MESSAGES), count_tokens("Action: look"))


@pytest.mark.parametrize("kind", [Kind.NO_USAGE, Kind.BAD_USAGE])
def test_an_endpoint_that_reports_no_usage(kind: Kind) -> None:
    assert "no token usage" in refused(Fault(kind))
    assert replied(Fault(kind), price=FREE)[0].text


# -- failures that can't pass


def test_an_unknown_model_says_what_to_do() -> None:
    with Endpoint() as endpoint, pytest.raises(ConfigError) as caught:
        build(endpoint.url, model="openai:gpt-nix").complete(ask())
    assert_clean(caught.value)
    for part in ("'gpt-nix'", endpoint.url, "404", "does not exist", "check the model's name"):
        assert part in str(caught.value)


def test_a_used_up_quota_stops_the_run() -> None:
    assert "top up" in refused(Fault(Kind.QUOTA))


DIALECTS = (
    '{"error": {"message": "Said why", "code": 7}}', '{"error": "Said why"}', '{"message": "Said why"}',
    '{"detail": "Said why"}', "<html>\n Said why\n</html>", '"Said why"',
)  # fmt: skip


def test_other_refusals_in_all_dialects() -> None:
    cases = [(s, d) for s in (400, 401, 402, 403, 404, 405, 413, 418, 422) for d in DIALECTS]
    with Endpoint(faults=[Fault(Kind.STATUS, status=s, body=d) for s, d in cases]) as endpoint:
        model = build(endpoint.url)
        for status, _ in cases:
            with pytest.raises(ConfigError, match=f"'toy-large'.*{status}.*Said why.*; (check|top up)") as caught:
                model.complete(ask())
            assert_clean(caught.value)


def test_a_prompt_that_is_too_long_says_which_setting_to_lower() -> None:
    body = '{"error": {"message": "too long", "code": "context_length_exceeded"}}'
    assert "lower max_prompt_tokens" in refused(Fault(Kind.STATUS, status=400, body=body))


def test_an_endpoint_that_repeats_the_key_is_not_believed() -> None:
    text = refused(Fault(Kind.ECHO_401))
    assert HIDDEN in text and "PLANTED_KEY" in text and "Invalid credentials" in text


@pytest.mark.parametrize("status", [200, 401, 429, 500])
def test_no_answer_brings_the_key_into_an_error(status: int) -> None:
    for body in (f'{{"error": {{"message": "Bearer {KEY}"}}}}', f"<p>{KEY}</p>", f'{{"error": "x{KEY[3:20]}***"}}'):
        outcome, _ = attempt(Fault(Kind.STATUS, status=status, body=body))
        assert isinstance(outcome, AttemptError | ConfigError)


def test_redaction_keeps_the_rest() -> None:
    said = f"line one\nkey={KEY}, part {KEY[:12]}**** and sk-proj-ab12CD34, Bearer abcdefgh; model gpt-4.1"
    text = redact(said, [KEY])
    assert text == f"line one key={HIDDEN}, part {HIDDEN} and {HIDDEN}, {HIDDEN}; model gpt-4.1"
    assert len(redact("word " * 10_000)) <= 300


def test_the_key_is_in_no_log_and_nothing_is_written(caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    caplog.set_level(logging.DEBUG)
    with Endpoint(faults=[None, Fault(Kind.ECHO_401)], key=KEY) as endpoint:
        model = build(endpoint.url)
        model.check()
        model.complete(ask())
        with pytest.raises(ConfigError):
            model.complete(ask())
    assert [r for r in caplog.records if r.name.startswith(("openai", "http"))] == []
    assert KEY not in caplog.text
    assert capfd.readouterr() == ("", "")


# -- check


def test_check_passes_and_spends_nothing() -> None:
    with Endpoint(key=KEY) as endpoint:
        build(endpoint.url, model="openai:not-listed").check()
        build(endpoint.url.removesuffix("/v1") + "/elsewhere").check()  # no list of models: somebody answers
        assert (endpoint.requests, endpoint.bill) == (0, [])


@pytest.mark.parametrize("value", [None, "", "  "])
def test_check_names_the_missing_variable(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("PLANTED_KEY") if value is None else monkeypatch.setenv("PLANTED_KEY", value)
    model = build("http://127.0.0.1:1/v1")
    for call in (model.check, lambda: model.complete(ask())):
        with pytest.raises(ConfigError, match=r"export PLANTED_KEY=\.\.\."):
            call()


@pytest.mark.parametrize("value", ["", "schl\u00fcssel"])
def test_a_call_without_a_usable_key_costs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str) -> None:
    monkeypatch.setenv("PLANTED_KEY", value)
    spend = SpendLedger(tmp_path / "spend.db", None)
    with pytest.raises(RefusedError, match=r"export PLANTED_KEY=\.\.\."):
        Desk(spend=spend).call(build("http://127.0.0.1:1/v1"), ask(), 100)
    assert spend.totals().overall == ModelTotals("all")
    spend.close()


def test_check_reports_a_refused_key() -> None:
    with Endpoint(key="another") as endpoint, pytest.raises(ConfigError, match=r"401.*check PLANTED_KEY") as caught:
        build(endpoint.url).check()
    assert_clean(caught.value)


@pytest.mark.parametrize("key", ["a\nb-planted", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("PLANTED_KEY", key)
    with pytest.raises(ConfigError, match="PLANTED_KEY holds characters") as caught:
        build("http://127.0.0.1:1/v1").check()
    assert key not in str(caught.value)


def test_a_key_with_a_line_end_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_KEY", KEY + "\n")
    with Endpoint(key=KEY) as endpoint:
        build(endpoint.url).check()


def test_check_says_when_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ConfigError, match=f"nobody answers at http://127.0.0.1:{port}/v1") as caught:
        build(f"http://127.0.0.1:{port}/v1").check()
    assert_clean(caught.value)


def test_a_key_in_the_pool_file_is_refused() -> None:
    model = build("http://127.0.0.1:1/v1", headers=(("x-key", KEY),))
    with pytest.raises(ConfigError, match="PLANTED_KEY") as caught:
        model.check()
    assert_clean(caught.value)


def test_a_placeholder_for_a_key_may_stand_in_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_KEY", "toy")
    with Endpoint() as endpoint:
        build(endpoint.url).check()


@pytest.mark.parametrize("url", ["http://me:secret@host/v1", "http://host:99999/v1", "http://[::1/v1"])
def test_addresses_with_passwords_or_without_sense(url: str) -> None:
    with pytest.raises(ConfigError, match="base_url") as caught:
        build(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("field", ["n", "stream", "max_tokens", "model"])
def test_extra_body_leaves_our_fields_alone(field: str) -> None:
    with pytest.raises(ConfigError, match=f"extra_body has '{field}'"):
        build("http://127.0.0.1:1/v1", extra_body=json.dumps({field: 1}))


# -- many at once


def test_64_threads_never_exceed_the_limit_and_the_bill_agrees() -> None:
    with Endpoint(delay_s=0.02, cached=True) as endpoint, ThreadPoolExecutor(64) as pool:
        models = [build(endpoint.url, model=f"openai:{name}", max_concurrency=8) for name in ("toy-small", "toy-large")]
        calls = [pool.submit(models[i % 2].complete, ask(32, (*MESSAGES, Message("user", str(i))))) for i in range(256)]
        usages = [call.result().usage for call in calls]
        assert 5 <= endpoint.max_in_flight <= 8  # of both models together
        key = lambda u: (u.prompt_tokens, u.completion_tokens, u.cached_tokens)  # noqa: E731
        assert sorted(usages, key=key) == sorted((line.usage for line in endpoint.bill), key=key)
        assert all(line.delivered for line in endpoint.bill)
        assert any(u.cached_tokens for u in usages)


def test_each_process_takes_its_share() -> None:
    with Endpoint(delay_s=0.02) as endpoint, ThreadPoolExecutor(32) as pool:
        model = build(endpoint.url, processes=3, max_concurrency=10)
        list(pool.map(model.complete, [ask()] * 40))
        assert endpoint.max_in_flight == 3
    many = build("http://127.0.0.1:1/v1", processes=100, max_concurrency=10, requests_per_minute=20)._throttle
    assert (many.limit, many._gap_s) == (1, 300), "a start in five minutes each is twenty a minute of all"


def test_an_attempt_tells_how_long_it_waited_for_its_turn() -> None:
    with Endpoint(faults=[Fault(Kind.SLOW, seconds=0.3), Fault(Kind.ERROR)], key=KEY) as endpoint:
        model = build(endpoint.url, max_concurrency=1)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(model.complete, ask())
            while not endpoint.asks:
                time.sleep(0.01)
            second = pool.submit(model.complete, ask())
            error = second.exception()
            assert first.result() and isinstance(error, AttemptError) and error.queued_s > 0.1
        model.close()


def test_a_storm_of_429_shrinks_the_concurrency() -> None:
    together = threading.Barrier(32)

    def fault(seen: Ask) -> Fault | None:
        if seen.n < 32:
            together.wait(30)
        return Fault(Kind.RATE) if seen.n < 64 else None

    with Endpoint(faults=fault, delay_s=0.02) as endpoint, ThreadPoolExecutor(64) as pool:
        model = build(endpoint.url, max_concurrency=32)
        outcomes = [pool.submit(model.complete, ask()) for _ in range(64)]
        assert all(isinstance(o.exception(), AttemptError) for o in outcomes)
        assert endpoint.max_in_flight == 32
        endpoint.max_in_flight = 0
        for outcome in [pool.submit(model.complete, ask()) for _ in range(48)]:
            outcome.result()
        assert 1 <= endpoint.max_in_flight <= 18  # cut to 16, and two steps back up


def test_retry_after_pauses_the_whole_endpoint() -> None:
    times = []

    def fault(seen: Ask) -> Fault | None:
        times.append(time.monotonic())
        return Fault(Kind.RATE, {"Retry-After": "0.5"}) if seen.n == 0 else None

    with Endpoint(faults=fault) as endpoint:
        model, other = build(endpoint.url), build(endpoint.url, model="openai:toy-small")
        with pytest.raises(AttemptError):
            model.complete(ask())
        other.complete(ask())
    assert times[1] - times[0] >= 0.45


@pytest.mark.parametrize("fresh", [False, True], ids=["connection kept", "connection made"])
def test_a_reply_that_came_in_time_is_one_also_where_the_loop_was_busy_at_its_deadline(fresh: bool) -> None:
    """A router's decision, or a wait for the store's file, may hold the loop's thread."""
    with Endpoint(delay_s=0.2) as endpoint, ThreadPoolExecutor(1) as pool:
        model = build(endpoint.url, timeout_s=0.9)
        if not fresh:
            model.complete(ask())
        asked = pool.submit(model.complete, ask(31))
        while len(endpoint.asks) < 2 - fresh:
            time.sleep(0.005)
        event_loop().call_soon_threadsafe(time.sleep, 1.2)
        assert asked.result(10).text
        model.close()
        assert all(line.delivered for line in endpoint.bill)


def test_the_wait_for_a_turn_is_not_part_of_the_timeout() -> None:
    with Endpoint(delay_s=0.3) as endpoint, ThreadPoolExecutor(5) as pool:
        model = build(endpoint.url, max_concurrency=1, timeout_s=1.0)
        replies = list(pool.map(model.complete, [ask()] * 5))
    assert max(r.latency_s for r in replies) < 1.0


def test_closing_twice_and_calling_again() -> None:
    with Endpoint() as endpoint:
        model = build(endpoint.url)
        model.close()
        model.complete(ask())
        model.close()
        model.close()
        assert model.complete(ask()).text


def test_lanes_wait_for_it_without_a_thread_each() -> None:
    with Endpoint(delay_s=0.2) as endpoint:
        desk = Desk(retry=RetryPolicy(attempts=3, first_wait_s=0.01))
        model, lanes = build(endpoint.url, max_concurrency=64), Lanes(64)
        requests = [replace(ask(), sample=i) for i in range(32)]
        waiting = [lanes.submit(lambda r=r: desk.call(model, r, 100, None)) for r in requests]  # the first all at once
        names = set[str]()
        while not all(w.done() for w in waiting):
            names |= {t.name for t in threading.enumerate()}
            time.sleep(0.01)
        assert {w.result(10).reply.usage for w in waiting} == {Usage(17, 10)}
        assert len(endpoint.bill) == 32 and not {n for n in names if n.startswith("aside")}
        failing = lanes.submit(lambda: desk.call(build("http://127.0.0.1:1/v1", timeout_s=1.0), ask(), 100, None))
        with pytest.raises(ModelError):
            failing.result(60)
        assert lanes.close(5.0)
        model.close()


# -- how it is reached


def test_a_redirect_is_not_followed_and_says_where_to() -> None:
    fault = Fault(Kind.STATUS, {"Location": f"https://elsewhere.example/v1?key={KEY}"}, status=308)
    outcome, endpoint = attempt(fault)
    assert isinstance(outcome, ConfigError) and len(endpoint.asks) == 1
    assert "answered 308" in str(outcome) and "https://elsewhere.example/v1" in str(outcome)
    assert "set base_url" in str(outcome)


def test_the_environments_proxy_is_used_but_for_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with Endpoint(key=KEY) as endpoint:
        monkeypatch.setenv("http_proxy", endpoint.url.removesuffix("/v1"))
        model = build("http://models.invalid/v1")
        assert model.complete(ask()).text, "nobody else knows that name"
        model.close()
        monkeypatch.setenv("no_proxy", "models.invalid")
        with pytest.raises(AttemptError) as caught:
            build("http://models.invalid/v1").complete(ask())
    assert (caught.value.kind, caught.value.billed) == ("unreachable", False)


def test_a_proxy_that_is_not_there_was_sent_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with pytest.raises(AttemptError) as caught:
        build("http://models.invalid/v1").complete(ask())
    assert (caught.value.kind, caught.value.billed) == ("unreachable", False)


@pytest.mark.parametrize(("url", "sent"), [("https://api.openai.com/v1", True), ("http://127.0.0.1:1/v1", False)])
def test_the_account_is_named_to_openai_alone(url: str, sent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    model = build(url, headers=(("authorization", "Bearer of-ones-own"),))

    async def sent_headers() -> Any:
        return model._connect().headers

    headers = finish(sent_headers())
    model.close()
    assert headers.getall("Authorization") == ["Bearer of-ones-own"], "the pool file has the last word"
    assert [headers.get(name) for name in ("OpenAI-Organization", "OpenAI-Project")] == (
        ["org-1", "proj-1"] if sent else [None, None]
    )


def test_what_nobody_closed_is_let_go_without_a_word() -> None:
    script = (
        "import gc, sys; from tests.unit.test_openai import ask, build\n"
        "for _ in range(2):\n"
        "    model = build(sys.argv[1], key_variable='')\n"
        "    print(model.complete(ask()).usage.prompt_tokens)\n"
        "    if _ == 0: del model; gc.collect()\n"
    )
    with Endpoint() as endpoint:
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning", "-c", script, endpoint.url],
            capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
        )  # fmt: skip
    assert done.stdout.split() == ["17", "17"], done.stderr
    assert "nclosed" not in done.stderr and "Error" not in done.stderr, done.stderr


# -- the scripted endpoint itself


def play(model: OpenAIModel, kind: str, name: str) -> bool:
    from tests.toy import Toy

    env = Toy()
    first, info = env.reset(options={"task": name})
    messages = [Message("system", "Act."), Message("user", f"Task: {info['task_text']}\n\nObservation: {first}")]
    over = cut = False
    while not (over or cut):
        reply = model.complete(Request(tuple(messages), 0, 0.0, 64, name))
        seen, _, over, cut, info = env.step(parse_action(reply.text))
        messages += [Message("assistant", reply.text), Message("user", f"Observation: {seen}")]
    return bool(info["success"])


def test_the_toy_rule_makes_easy_hard_and_intractable_tasks() -> None:
    with Endpoint() as endpoint:
        small, large = (build(endpoint.url, model=f"openai:toy-{size}") for size in ("small", "large"))
        won = {k: [(play(small, k, f"{k}/{i}"), play(large, k, f"{k}/{i}")) for i in range(n)]
               for k, n in (("fetch", 1), ("measure", 1), ("long", 1), ("mix", 8))}  # fmt: skip
    assert won["fetch"] == [(True, True)]
    assert won["measure"] == [(False, True)]
    assert won["long"] == [(False, False)]
    assert {s for s, _ in won["mix"]} == {True, False} and all(w for _, w in won["mix"])


def test_inflated_usage_stays_within_the_bound() -> None:
    with Endpoint(inflate=1.0) as endpoint:
        model = build(endpoint.url)
        assert model.complete(ask(32)).usage == Usage(model.bound(MESSAGES), 32)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[str]:
    """The endpoint as a process of its own; yields its address."""
    port_file = tmp_path / "port"
    command = [sys.executable, "-m", "tests.endpoint", "--port-file", str(port_file), "--fault-rate", "0.3"]
    child = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    try:
        while not port_file.exists():
            assert child.poll() is None
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port_file.read_text()}"
    finally:
        child.kill()
        child.wait()


def test_as_a_process_its_bill_agrees_through_random_faults(process: str) -> None:
    model = build(process + "/v1")
    usages, charged, failures = [], 0, 0
    for i in range(60):
        try:
            usages.append(model.complete(ask(32, (*MESSAGES, Message("user", f"{i}")))).usage)
        except AttemptError as error:
            failures += 1
            charged += error.billed
    with urllib.request.urlopen(process + "/bill") as page:
        report = json.load(page)
    lines = report["bill"]
    delivered = [Usage(b["prompt_tokens"], b["completion_tokens"], b["cached_tokens"]) for b in lines if b["delivered"]]
    assert usages == delivered
    assert charged == len(lines) - len(delivered) > 0
    assert report["requests"] == 60 and sum(report["faults"].values()) == failures > 5
