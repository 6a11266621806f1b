"""A scripted OpenAI-compatible endpoint over real HTTP: answers by a rule, fails by a script, and keeps the bill.

In a test: `with Endpoint(faults=[Fault(Kind.RESET)]) as endpoint: ... endpoint.url ... endpoint.bill`. As a process of
its own: `python -m tests.endpoint --port-file F --fault-rate 0.1`; `GET /bill` then gives the bill as JSON.

Always true here: every answer that was made is on the bill once, marked as delivered only when its whole text and its
usage went out to a client that still listened; what was refused is not on the bill.
"""

from __future__ import annotations

import argparse
import os
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from bopo_ray.models.pricing import Usage
from bopo_ray.models.protocol import Message
from bopo_ray.models.simulated import read_progress
from bopo_ray.records import spawn_seed
from tests.endpoint_http import PASSING, Ask, Fault, Kind, Server
from tests.toy import PLANS

__all__ = ["MODELS", "Ask", "Billed", "Endpoint", "Fault", "Kind", "toy_rule"]

MODELS = ("toy-small", "toy-large")
MESSAGE_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Billed:
    """One line of the bill."""

    model: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    delivered: bool
    """False: the client may be charged for it without having seen its usage."""

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, self.completion_tokens, self.cached_tokens)


def toy_rule(ask: Ask) -> str:
    """Plays tests/toy.py. LARGE knows every step; SMALL never focuses in "measure", nor mixes in half of "mix".

    So "fetch" and half of "mix" come out Easy, "measure" and the other half Hard, "long" Intractable.
    """
    words = ask.messages[1].content.split() if len(ask.messages) > 1 else []
    kind = words[words.index("number") - 1] if "number" in words else ""
    name = words[words.index("number") + 1].rstrip(".") if kind else ""
    plan = PLANS.get(kind, ())
    done = read_progress(ask.messages, plan).next_step
    step = plan[done] if done < len(plan) else "look around"
    if "large" not in ask.model and (
        (kind == "measure" and step.startswith("focus"))
        or (kind == "mix" and step.startswith("mix") and spawn_seed("toy-small", name) % 2)
    ):
        step = "look around"
    return f"Thought: This is what comes next.\nAction: {step}"


class Endpoint:
    """The server, on loopback; a context manager."""

    def __init__(
        self,
        rule: Callable[[Ask], str] = toy_rule,
        faults: Sequence[Fault | None] | Callable[[Ask], Fault | None] = (),
        *,
        models: Sequence[str] = MODELS,
        key: str = "",
        delay_s: float = 0.0,
        cached: bool = False,
        inflate: float = 0.0,
        port: int = 0,
    ) -> None:
        """
        Args:
            rule: what to answer.
            faults: of the n-th request, the n-th; or by request.
            models: the others are answered with 404.
            key: what Authorization must hold; empty: not looked at.
            delay_s: before each answer.
            cached: report the messages that began an earlier prompt of the model as cached.
            inflate: how far the reported usage goes from the counted (0) to the most that can be (1): a token per byte
                and 16 per message of the prompt, all of max_tokens of the reply.
            port: 0 takes a free one.
        """
        self.rule, self.faults, self.models, self.key = rule, faults, tuple(models), key
        self.delay_s, self.cached, self.inflate = delay_s, cached, inflate
        self.bill: list[Billed] = []
        self.asks: deque[Ask] = deque(maxlen=256)
        """The newest."""
        self.requests = self.in_flight = self.max_in_flight = 0
        self.refusals = Counter[str]()
        """Faults played, by kind."""
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self._seen: set[tuple[str, tuple[Message, ...]]] = set()
        self._server = Server(("127.0.0.1", port))
        self._server.endpoint = self
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.drop_connections()

    def fault(self, ask: Ask) -> Fault | None:
        if callable(self.faults):
            return self.faults(ask)
        return self.faults[ask.n] if ask.n < len(self.faults) else None

    def usage(self, ask: Ask, text: str) -> Usage:
        """Words and 4 a message; `cached` and `inflate` on top."""
        prompt, completion = _words(ask.messages), len(text.split())
        worst = 32 + sum(len(m.content.encode()) + 16 for m in ask.messages)
        with self.lock:
            starts = [ask.messages[:i] for i in range(1, len(ask.messages) + 1)]
            cached = max((_words(s) for s in starts if (ask.model, s) in self._seen), default=0) if self.cached else 0
            self._seen.update((ask.model, s) for s in starts if self.cached)
        prompt += int(self.inflate * (worst - prompt))
        completion += int(self.inflate * max(0, ask.max_tokens - completion))
        return Usage(prompt, completion, cached)

    def charge(self, model: str, usage: Usage, delivered: bool) -> None:
        line = Billed(model, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, delivered)
        with self.lock:
            self.bill.append(line)

    def report(self) -> dict[str, Any]:
        """What `GET /bill` answers."""
        with self.lock:
            return {
                "requests": self.requests,
                "max_in_flight": self.max_in_flight,
                "faults": dict(self.refusals),
                "bill": [asdict(line) for line in self.bill],
            }


def _words(messages: Sequence[Message]) -> int:
    return sum(len(m.content.split()) + MESSAGE_TOKENS for m in messages)


def _at_random(rate: float, seed: int, kinds: Sequence[Kind]) -> Callable[[Ask], Fault | None]:
    def fault(ask: Ask) -> Fault | None:
        draw = random.Random(spawn_seed("fault", seed, ask.n))
        if draw.random() >= rate:
            return None
        headers = {"Retry-After": "0.05"} if draw.random() < 0.5 else {}
        return Fault(draw.choice(kinds), headers, seconds=0.5)

    return fault


def main() -> None:
    """The server as a process, until it is killed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port-file", type=Path, required=True, help="where to write the port, once it listens")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rule", choices=("toy",), default="toy")
    parser.add_argument("--fault-rate", type=float, default=0.0, help="share of requests that fail")
    parser.add_argument("--faults", default=",".join(PASSING), help="their kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delay-s", type=float, default=0.0)
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--inflate", type=float, default=0.0)
    parser.add_argument("--key", default="")
    args = parser.parse_args()
    faults = _at_random(args.fault_rate, args.seed, [Kind(k) for k in args.faults.split(",")])
    with Endpoint(
        toy_rule, faults, key=args.key, delay_s=args.delay_s, cached=args.cached, inflate=args.inflate, port=args.port
    ) as endpoint:
        whole = args.port_file.with_suffix(f".{os.getpid()}")
        whole.write_text(str(endpoint.port))
        whole.replace(args.port_file)
        threading.Event().wait()


if __name__ == "__main__":
    main()
