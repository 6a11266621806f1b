"""The scripted endpoint's wire: what can go wrong, and the server that makes it so. See tests/endpoint.py.

Always true here: a request counts as in flight from its last byte until just before its answer's first.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from bopo_ray.models.pricing import Usage
from bopo_ray.models.protocol import Message

if TYPE_CHECKING:
    from tests.endpoint import Endpoint

__all__ = ["PASSING", "Ask", "Fault", "Kind", "Server"]


class Kind(StrEnum):
    """What goes wrong."""

    RATE = "rate"
    """429; with `headers` for its Retry-After."""
    QUOTA = "quota"
    """429 that waiting does not mend."""
    ERROR = "error"
    """500."""
    BUSY = "busy"
    """503."""
    STATUS = "status"
    """`status` with `body`."""
    HANG = "hang"
    """Makes the answer and keeps it for `seconds`, or until the client goes."""
    RESET = "reset"
    """Makes the answer, then resets the connection."""
    CUT = "cut"
    """Half of the answer, then the end of the connection."""
    TRUNCATED = "truncated"
    """Half of the JSON, by the rules of HTTP."""
    DRIP = "drip"
    """One byte every `seconds`."""
    SLOW = "slow"
    """The right answer after `seconds`."""
    NO_CHOICES = "no-choices"
    EMPTY = "empty"
    """A reply without text."""
    NO_USAGE = "no-usage"
    BAD_USAGE = "bad-usage"
    """A negative number of tokens."""
    FILTER_400 = "filter-400"
    """The prompt was refused."""
    FILTER_200 = "filter-200"
    """The reply was kept back."""
    ECHO_401 = "echo-401"
    """401 whose message repeats the Authorization header."""


PASSING = (Kind.RATE, Kind.ERROR, Kind.BUSY, Kind.RESET, Kind.CUT, Kind.TRUNCATED, Kind.NO_CHOICES)
"""Quick, and mended by another attempt."""
UNDELIVERED = (Kind.HANG, Kind.RESET, Kind.CUT, Kind.TRUNCATED, Kind.NO_CHOICES, Kind.NO_USAGE, Kind.BAD_USAGE)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault."""

    kind: Kind
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 3600.0
    status: int = 418
    body: str | bytes = ""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for a chat completion."""

    n: int
    """Its number, from 0."""
    model: str
    messages: tuple[Message, ...]
    max_tokens: int
    body: dict[str, Any]
    headers: dict[str, str]
    """Names in lower case."""
    query: dict[str, list[str]]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024
    endpoint: Endpoint

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, Handler)
        self.connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        # Without the usual half-close first, so that a reset is one.
        self.connections.discard(request)
        self.close_request(request)

    def drop_connections(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):  # gone already
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients that go away are part of the tests
            # Not to sys.stderr: a test may be reading there what the program under test says.
            traceback.print_exc(file=sys.__stderr__)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server
    counted = False
    """Whether the present request counts as in flight."""

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        path, end = urlsplit(self.path).path, self.server.endpoint
        if path == "/bill":
            self._send(200, end.report())
        elif path != "/v1/models":
            self._send(404, _error("no such page", "not_found"))
        elif self._authorized():
            self._send(200, {"object": "list", "data": [{"id": m, "object": "model"} for m in end.models]})

    def do_POST(self) -> None:
        end, address = self.server.endpoint, urlsplit(self.path)
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if len(data) < int(self.headers["Content-Length"]):
            raise ConnectionResetError("the client went away in the middle of its request")
        body = json.loads(data)
        if address.path != "/v1/chat/completions":
            return self._send(404, _error("no such page", "not_found"))
        messages = tuple(Message(m["role"], m["content"]) for m in body["messages"])
        max_tokens = body.get("max_completion_tokens") or body.get("max_tokens") or 1 << 30
        headers = {k.lower(): v for k, v in self.headers.items()}
        with end.lock:
            ask = Ask(end.requests, body["model"], messages, max_tokens, body, headers, parse_qs(address.query))
            end.requests += 1
            end.asks.append(ask)
            end.in_flight += 1
            end.max_in_flight = max(end.max_in_flight, end.in_flight)
        self.counted = True
        try:
            if self._authorized():
                self._play(ask, end.fault(ask))
        finally:
            self._leave()
        return None

    def _play(self, ask: Ask, fault: Fault | None) -> None:
        end, kind = self.server.endpoint, fault.kind if fault else None
        end.stopping.wait(end.delay_s)
        if fault:
            with end.lock:
                end.refusals[fault.kind] += 1
            if self._refuse(fault):
                return
        if ask.model not in end.models:
            self._send(404, _error(f"The model `{ask.model}` does not exist", "model_not_found"))
            return
        text = "" if kind in (Kind.EMPTY, Kind.FILTER_200) else end.rule(ask)
        text = text if len(text.split()) <= ask.max_tokens else " ".join(text.split()[: ask.max_tokens])
        usage = end.usage(ask, text)
        answer = _answer(ask.model, text, usage, kind)
        gone = kind == Kind.SLOW and fault is not None and self._wait(fault.seconds)
        if kind == Kind.DRIP and fault:
            gone = self._drip(answer, fault.seconds)
        # On the bill before it is sent: whoever has the answer finds it there.
        end.charge(ask.model, usage, delivered=not gone and kind not in UNDELIVERED)
        if kind == Kind.HANG and fault:
            self._wait(fault.seconds)
        if gone:
            self.close_connection = True
        elif kind in (Kind.RESET, Kind.HANG):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        elif kind == Kind.CUT:
            data = json.dumps(answer).encode()
            self._send(200, data[: len(data) // 2], {"Content-Length": str(len(data))})
            self.close_connection = True
        elif kind == Kind.TRUNCATED:
            data = json.dumps(answer).encode()
            self._send(200, data[: len(data) // 2])
        elif kind != Kind.DRIP:
            self._send(200, answer)

    def _refuse(self, fault: Fault) -> bool:
        """Answers the faults that make no reply."""
        seen = self.headers.get("Authorization", "")
        answers: dict[Kind, tuple[int, Any]] = {
            Kind.RATE: (429, _error("Rate limit reached", "rate_limit_exceeded")),
            Kind.QUOTA: (429, _error("You exceeded your current quota", "insufficient_quota")),
            Kind.ERROR: (500, _error("The server had an error", "server_error")),
            Kind.BUSY: (503, _error("Overloaded", "overloaded")),
            Kind.STATUS: (fault.status, fault.body.encode() if isinstance(fault.body, str) else fault.body),
            Kind.FILTER_400: (400, _error("The prompt triggered the content management policy", "content_filter")),
            Kind.ECHO_401: (401, _error(f"Invalid credentials '{seen}' ({seen[7:15]}...)", "invalid_api_key")),
        }
        if fault.kind not in answers:
            return False
        self._send(*answers[fault.kind], fault.headers)
        return True

    def _authorized(self) -> bool:
        key, seen = self.server.endpoint.key, self.headers.get("Authorization", "")
        if key and seen != f"Bearer {key}":
            self._send(401, _error(f"Incorrect API key provided: {seen[7:]}", "invalid_api_key"))
            return False
        return True

    def _send(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        # Out of the count before the client can know it: its next request must not be counted beside this one.
        self._leave()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(data))} | dict(headers or {})
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _drip(self, answer: Any, seconds: float) -> bool:
        """Whether the client went away over it."""
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        for i in range(len(data)):
            if self._wait(seconds):
                return True
            try:
                self.wfile.write(data[i : i + 1])
            except ConnectionError:
                return True
        return False

    def _wait(self, seconds: float) -> bool:
        """Waits; True as soon as the client has gone or the server stops."""
        waited = 0.0
        while waited < seconds:
            step = min(0.02, seconds - waited)
            if self.server.endpoint.stopping.wait(step) or self._gone():
                return True
            waited += step
        return False

    def _gone(self) -> bool:
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _leave(self) -> None:
        if self.counted:
            self.counted = False
            with self.server.endpoint.lock:
                self.server.endpoint.in_flight -= 1


def _answer(model: str, text: str, usage: Usage, kind: Kind | None) -> dict[str, Any]:
    finish = "content_filter" if kind == Kind.FILTER_200 else "stop"
    content = None if kind == Kind.FILTER_200 else text
    tokens: dict[str, Any] = {
        "prompt_tokens": -1 if kind == Kind.BAD_USAGE else usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    if usage.cached_tokens:
        tokens["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    answer = {
        "id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": model, "usage": tokens,
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content}}],
    }  # fmt: skip
    if kind == Kind.NO_USAGE:
        del answer["usage"]
    if kind == Kind.NO_CHOICES:
        answer["choices"] = []
    return answer


def _error(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "scripted", "param": None, "code": code}}
