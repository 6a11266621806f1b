"""`openai:` models: any OpenAI-compatible endpoint, over HTTP by aiohttp.

Not by the provider's SDK: one request and its raw answer are needed, and those took it six times as much CPU time.
All models of a process share its event loop, where lanes have their turns, and models of one endpoint share its
throttle; `complete` blocks its caller's lane or thread only. What each answer of an endpoint means stands in
`OpenAIModel._read`.

Always true here: `complete` sends one request, never a second; its time is bounded from the first byte to the last, and
so is what it reads; keys come from the environment alone, and no error holds one or is chained to an object that does.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import cache
from ssl import SSLContext, create_default_context
from typing import Any, NamedTuple
from unicodedata import normalize
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass
from weakref import WeakValueDictionary, finalize

import aiohttp
import certifi
from multidict import CIMultiDict

from bopo_ray.errors import AttemptError, ConfigError, RefusedError
from bopo_ray.lanes import finish
from bopo_ray.loop import event_loop
from bopo_ray.models.pool import ACCOUNT, OPENAI_URL, ModelSpec
from bopo_ray.models.pricing import Price, Usage
from bopo_ray.models.protocol import Message, Reply, Request
from bopo_ray.models.redact import Complaint, complaint, read_json, redact
from bopo_ray.models.throttle import Throttle, retry_after_s
from bopo_ray.models.tokens import count_tokens, prompt_tokens

__all__ = ["OpenAIModel"]

CHECK_S = 10.0
CONNECT_S = 10.0
MIN_KEY_CHARS = 16
MAX_ANSWER_BYTES = 8 * 2**20
"""Unpacked. No reply is so long: of a longer answer no more is read."""
MAX_TOKENS_REPORTED = 2**31
"""No prompt and no reply is so long: such a figure is none."""
OURS = ("model", "messages", "temperature", "max_tokens", "max_completion_tokens", "n", "stream", "stream_options")
"""Fields that budgets and replies rely on: `extra_body` must leave them alone."""
BEYOND = (408, 502, 504, 520, 524)
"""A gateway says that the server behind it gave no answer in time, or none that it could read: that one may have the
request, and charge for it."""
OF_THE_PROMPT = frozenset({"content_filter", "content_policy_violation", "invalid_prompt"})
"""Codes of a refusal of what this one prompt says: the reply is an empty one, as with a filter that cuts it."""
IDLE_S = 4.0
"""So long a connection is kept for the next request; common servers close theirs after five seconds or more."""
NEVER_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.ClientHttpProxyError)

logging.getLogger("aiohttp").setLevel(logging.WARNING)  # below it may log addresses


class Answer(NamedTuple):
    """What an endpoint sent."""

    status: int
    headers: Mapping[str, str]
    """Names in any case."""
    content: bytes
    """Whole, unless it is longer than `MAX_ANSWER_BYTES`."""

    @property
    def is_success(self) -> bool:
        """Whether it says so."""
        return 200 <= self.status < 300


class OpenAIModel:
    """A model behind an endpoint; see `LanguageModel`. Thread-safe."""

    needs_plan = False
    gives_way = True

    def __init__(self, spec: ModelSpec, processes: int = 1) -> None:
        """
        Args:
            spec: of an `openai:` model.
            processes: how many share the endpoint's limits; each takes its share, and one call at a time at least.
        """
        self.name, self.price, self.sampling = spec.label, spec.price, spec.sampling
        self.base_url = (spec.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL).rstrip("/")
        self._spec, self._extra = spec, json.loads(spec.extra_body)
        self.max_tokens_field = spec.max_tokens_field or _max_tokens_field(self.base_url, self.name)
        if taken := sorted(set(self._extra) & set(OURS)):
            raise ConfigError(
                f"model {self.name!r}: extra_body has {taken[0]!r}, which the model's other fields set; take it out"
            )
        fixed = (json.dumps(self._extra, sort_keys=True), json.dumps(dict(spec.query), sort_keys=True))
        self.identity = "|".join(("openai", self.base_url, spec.target, self.max_tokens_field, *fixed))
        per_minute = spec.requests_per_minute / processes
        self._throttle = _throttle(
            (self.base_url, spec.key_variable), max(1, spec.max_concurrency // processes), per_minute
        )
        self._session: aiohttp.ClientSession | None = None
        """The loop's: nobody else touches it."""
        self._secrets: tuple[str, ...] = ()

    def bound(self, messages: tuple[Message, ...]) -> int:
        """An upper bound for every byte-level tokenizer: no token is shorter than a byte of what it reads."""
        return 32 + sum(_most_bytes(m.content) + 16 for m in messages)

    def check(self) -> None:
        """Raises ConfigError when the key is missing or refused, or when nobody answers; spends nothing."""
        key = self._key()
        # Placeholders such as "ollama" are shorter, and may well stand in an address.
        if len(key) >= MIN_KEY_CHARS and any(key in text for text in (self.identity, repr(self._spec.headers))):
            raise ConfigError(
                f"model {self.name!r}: base_url, headers, query or extra_body hold the value of "
                f"{self._spec.key_variable}: they are saved with the results; name the variable only, in key_variable"
            )
        if error := finish(self._probe()):
            raise error

    def complete(self, request: Request) -> Reply:
        """One attempt of at most `timeout_s`, after its turn in the endpoint's throttle."""
        outcome = finish(self._attempt(request))
        # Raised here, where nothing of the client is in sight: its errors may hold the request, and that the key.
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def close(self) -> None:
        """Closes its connections."""
        finish(self._disconnect())

    async def _disconnect(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _key(self) -> str:
        variable = self._spec.key_variable
        if not variable:
            return "none"  # some servers want any key at all
        key = os.environ.get(variable, "").strip()
        if not key:
            raise RefusedError(
                f"model {self.name!r}: environment variable {variable} is not set; export {variable}=... with the key "
                f"of {self.base_url}, or set key_variable in the pool file ('' for an endpoint that asks for no key)"
            )
        if not (key.isascii() and key.isprintable()):
            raise RefusedError(
                f"model {self.name!r}: environment variable {variable} holds characters that no key can have; "
                f"export {variable}=... again with the key alone"
            )
        return key

    def _connect(self) -> aiohttp.ClientSession:
        """The session, opened with the first request; on the loop. Raises RefusedError without a usable key."""
        if self._session is None:
            key = self._key()
            self._secrets = (key,) if self._spec.key_variable else ()
            headers = CIMultiDict({"Authorization": f"Bearer {key}", "Accept": "application/json"})
            if _is_openai(self.base_url):
                headers.update({name: os.environ[v] for name, v in ACCOUNT.items() if os.environ.get(v)})
            headers.update(self._spec.headers)
            # Before the whole attempt's time is up: what was never sent is free.
            connect_s = min(CONNECT_S, 0.9 * self._spec.timeout_s)
            self._session = _open_session(headers, self.base_url, connect_s)
            finalize(self, _let_go, self._session)
        return self._session

    async def _ask(self, session: aiohttp.ClientSession, method: str, path: str, body: bytes | None = None) -> Answer:
        headers = {"Content-Type": "application/json"} if body is not None else None
        async with session.request(
            method, self.base_url + path, params=self._spec.query, data=body, headers=headers, allow_redirects=False
        ) as response:
            content = bytearray()
            while len(content) <= MAX_ANSWER_BYTES and (part := await response.content.readany()):
                content += part
            return Answer(response.status, response.headers, bytes(content))

    async def _probe(self) -> ConfigError | None:
        session = self._connect()
        try:
            async with asyncio.timeout(CHECK_S):
                answer = await self._ask(session, "GET", "/models")
        except Exception as error:
            why = type(error).__name__
            return ConfigError(
                f"model {self.name!r}: nobody answers at {self.base_url} within {CHECK_S:g} s ({why}); start the "
                "server there, or set base_url in the pool file or OPENAI_BASE_URL"
            )
        return self._refusal(answer) if answer.status in (401, 403) else None

    async def _attempt(self, request: Request) -> Reply | AttemptError | ConfigError:
        fields = self._extra | {
            "model": self._spec.target,
            "messages": [{"role": m.role, "content": m.content} for m in request.messages],
            "temperature": request.temperature,
            self.max_tokens_field: request.max_tokens,
        }
        body = json.dumps(fields, separators=(",", ":")).encode()
        asked_s = time.perf_counter()
        async with self._throttle.slot() as began_s:
            start_s = time.perf_counter()
            outcome = await self._in_turn(self._connect(), request, body, began_s)
        if isinstance(outcome, AttemptError):
            outcome.queued_s = start_s - asked_s
        return outcome

    async def _in_turn(
        self, session: aiohttp.ClientSession, request: Request, body: bytes, began_s: float
    ) -> Reply | AttemptError | ConfigError:
        """An attempt that has its turn, since `began_s` by the loop's time."""
        start_s = time.perf_counter()
        try:
            async with _within(self._spec.timeout_s):
                answer = await self._ask(session, "POST", "/chat/completions", body)
        except Exception as error:
            return self._lost(error)
        wait_s = retry_after_s(answer.headers)
        if answer.status == 429:
            self._throttle.refused(began_s)
        elif answer.is_success:
            self._throttle.succeeded()
        if wait_s and answer.status in (429, 503):
            self._throttle.pause(wait_s)
        return self._read(answer, request, time.perf_counter() - start_s, wait_s)

    def _lost(self, error: Exception) -> AttemptError:
        """No answer came. It is charged for unless the request never left."""
        if isinstance(error, NEVER_SENT):
            return self._failure("unreachable", f"can't be reached ({type(error).__name__})", billed=False)
        if isinstance(error, TimeoutError):
            return self._failure("timeout", f"gave no full answer within {self._spec.timeout_s:g} s", billed=True)
        return self._failure("cut", f"broke off ({type(error).__name__})", billed=True)

    def _read(
        self, answer: Answer, request: Request, latency_s: float, wait_s: float | None
    ) -> Reply | AttemptError | ConfigError:
        """What an answer means: a reply, a failure that may pass, or one that can't."""
        status = answer.status
        if answer.is_success:
            return self._reply(answer, request, latency_s)
        said = complaint(answer.content)
        if status in (400, 403, 422) and OF_THE_PROMPT & set(said.codes):
            return Reply("", _usage(read_json(answer.content)) or Usage(0, 0), latency_s)
        if status == 429 and "insufficient_quota" not in said.codes:
            return self._failure("429", f"answered 429: {self._shown(said)}", billed=False, retry_after_s=wait_s)
        if status in (408, 409) or status >= 500:
            kind, text = f"{status}:{_digest(answer.content)}", f"answered {status}: {self._shown(said)}"
            return self._failure(kind, text, billed=status in BEYOND, retry_after_s=wait_s)
        return self._refusal(answer)

    def _reply(self, answer: Answer, request: Request, latency_s: float) -> Reply | AttemptError | ConfigError:
        if len(answer.content) > MAX_ANSWER_BYTES:
            why = f"answered with more than {MAX_ANSWER_BYTES >> 20} MB; is base_url right, and extra_body?"
            return self._failure("too-long", why, billed=True)
        body = read_json(answer.content)
        match body:
            case {"choices": [{"message": dict() as message}, *_]} if (text := _text(message)) is not None:
                pass
            case {"error": error}:
                shown = redact(json.dumps(error), self._secrets)
                kind = f"no-choices:{_digest(shown.encode())}"
                return self._failure(kind, f"answered without a choice: {shown}", billed=True, usage=_usage(body))
            case dict():
                return self._failure("no-choices", "answered without a choice", billed=True, usage=_usage(body))
            case _:
                return self._failure("not-json", "answered with no valid JSON", billed=True)
        usage = _usage(body)
        if usage is None:
            if self.price != Price(0, 0, 0):
                return ConfigError(
                    f"model {self.name!r}: {self.base_url} reported no token usage, so that no bill can be made; use "
                    "an endpoint that reports it, or say `price: 0` in the pool file when it costs nothing per token"
                )
            usage = Usage(prompt_tokens(request.messages), count_tokens(text))
        return Reply(text, usage, latency_s)

    def _refusal(self, answer: Answer) -> RefusedError:
        """An answer that would be the same the next time."""
        status, said = answer.status, complaint(answer.content)
        key = self._spec.key_variable or "key_variable in the pool file (this model sends no key)"
        if "context_length_exceeded" in said.codes:
            mend = "lower max_prompt_tokens in the pool file"
        elif status in (402, 429):
            mend = f"top up the account behind {key}"
        elif status in (401, 403):
            mend = f"check {key}, and whether its key may use this model"
        elif status in (400, 422):
            mend = "check temperature, max_tokens_field, extra_body and max_prompt_tokens in the pool file"
        elif 300 <= status < 400:
            target = redact(answer.headers.get("location", "elsewhere"), self._secrets)
            mend = f"it points to {target}: set base_url to the address that answers itself"
        else:
            mend = "check the model's name and base_url"
        return RefusedError(
            f"model {self._spec.target!r}: {self.base_url} answered {status}: {self._shown(said)}; {mend}"
        )

    def _failure(
        self, kind: str, text: str, *, billed: bool, retry_after_s: float | None = None, usage: Usage | None = None
    ) -> AttemptError:
        text = f"model {self.name!r}: {self.base_url} {text}"
        cost = None if usage is None else self.price.cost(usage)
        return AttemptError(text, kind=kind, retry=True, billed=billed, retry_after_s=retry_after_s, cost=cost)

    def _shown(self, said: Complaint) -> str:
        return redact(said.message, self._secrets) or "(no message)"


@asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    """As `asyncio.timeout`, but what had come by then is in time, also where the loop was busy: timers that are due go
    before what waits for bytes that are there."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as bound:
        timer: asyncio.Handle | None = None

        def over(passes: int) -> None:
            nonlocal timer
            if passes:
                timer = loop.call_soon(over, passes - 1)
            else:
                bound.reschedule(loop.time())

        timer = loop.call_later(seconds, over, 3)
        try:
            yield
        finally:
            timer.cancel()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=4).hexdigest()


def _most_bytes(text: str) -> int:
    """Of the text, and of what a tokenizer that normalises makes of it: some characters grow to several."""
    if text.isascii():
        return len(text)
    forms = (text, normalize("NFC", text), normalize("NFKC", text))
    return max(len(form.encode("utf-8", "surrogatepass")) for form in forms)


def _text(message: dict[str, Any]) -> str | None:
    """What a message says, which some servers send in parts; None where it can't be read."""
    content, texts = message.get("content"), list[str]()
    parts = content if isinstance(content, list) else [{"type": "text", "text": "" if content is None else content}]
    for part in parts:
        match part:
            case {"type": "text", "text": str() as text}:
                texts.append(text)
            case {"type": "thinking" | "reasoning" | "refusal"}:
                pass
            case _:
                return None
    # A lone half of a surrogate pair could be neither stored nor sent back.
    return "".join(texts).encode("utf-8", "replace").decode()


def _usage(body: Any) -> Usage | None:
    """The reported usage; None where it is missing or nonsense."""
    match body:
        case {"usage": {"prompt_tokens": prompt, "completion_tokens": completion, **more}}:
            if not all(type(n) is int and 0 <= n < MAX_TOKENS_REPORTED for n in (prompt, completion)):
                return None
        case _:
            return None
    if type(total := more.get("total_tokens")) is int and total < MAX_TOKENS_REPORTED:
        completion = max(completion, total - prompt)  # some leave what was thought out of the one and not of the other
    details = more.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    return Usage(prompt, completion, min(max(cached, 0), prompt) if type(cached) is int else 0)


def _max_tokens_field(base_url: str, name: str) -> str:
    try:
        address = urlsplit(base_url)
        host = address.hostname or ""
        bad = not host or address.port == 0 or "@" in address.netloc
    except ValueError:
        bad = True
    if bad:
        raise ConfigError(
            f"model {name!r}: base_url is no plain http address: need http(s)://HOST[:PORT]/PATH, without a name or "
            "password; keys stand in the environment variable that key_variable names"
        )
    return "max_completion_tokens" if _is_openai(base_url) else "max_tokens"


def _is_openai(base_url: str) -> bool:
    return f".{urlsplit(base_url).hostname}".endswith(".api.openai.com")


def _open_session(headers: CIMultiDict[str], base_url: str, connect_s: float) -> aiohttp.ClientSession:
    """Without a bound on connections, which the throttle has; the proxy is the environment's."""
    address = urlsplit(base_url)
    proxies = {} if proxy_bypass(address.hostname or "") else getproxies()
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S, ssl=_trusted()),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None, connect=connect_s),
        proxy=proxies.get(address.scheme) or proxies.get("all"),
    )


@cache
def _trusted() -> SSLContext:
    """The system's certificates, and certifi's, since slim images have none; SSL_CERT_FILE names others."""
    context = create_default_context()
    if not os.environ.get("SSL_CERT_FILE"):
        context.load_verify_locations(certifi.where())
    return context


def _let_go(session: aiohttp.ClientSession) -> None:
    """Closes the connections of a model that nobody closed."""
    if not session.closed:
        asyncio.run_coroutine_threadsafe(session.close(), event_loop())


_LOCK = threading.Lock()
_THROTTLES: WeakValueDictionary[tuple[str, str], Throttle] = WeakValueDictionary()


def _throttle(endpoint: tuple[str, str], max_concurrency: int, per_minute: float) -> Throttle:
    with _LOCK:
        throttle = _THROTTLES.get(endpoint)
        if throttle is None:
            throttle = _THROTTLES[endpoint] = Throttle(max_concurrency, per_minute)
        throttle.tighten(max_concurrency, per_minute)
        return throttle
