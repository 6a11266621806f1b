"""Calls of an OpenAI-compatible endpoint per second of CPU time of the process that makes them.

    python -m experiments.bench http

The endpoint is a process of its own, which answers each request after `DELAY_S` with the same reply; its CPU time does
not count. All ways have `CALLERS` calls in flight with prompts of `TURNS` messages, and take turns.

* ours: an `openai:` model, from lanes, as episodes call it;
* naive: a thread for each call in flight, and the standard library's client, with a connection for each call;
* limit: aiohttp by itself in one event loop, with a body that was encoded before, and an answer that nobody reads.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing as mp
import os
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection

import aiohttp
from aiohttp import web

from bopo_ray.lanes import Lanes
from bopo_ray.models.openai_http import OpenAIModel
from bopo_ray.models.pool import ModelSpec
from bopo_ray.models.pricing import Price
from bopo_ray.models.protocol import Message, Request
from experiments.bench import Row

__all__ = ["run"]

DELAY_S, CALLERS, CALLS, TURNS = 0.02, 32, 640, 20
MESSAGES = tuple(
    Message("user" if i % 2 == 0 else "assistant", "Observation: You see a door and a table here. " * 4)
    for i in range(TURNS)
)
FIELDS = {"model": "m", "messages": [{"role": m.role, "content": m.content} for m in MESSAGES]}
REPLY = json.dumps(
    {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Action: open door"}}],
        "usage": {"prompt_tokens": 900, "completion_tokens": 5, "total_tokens": 905},
    }
).encode()
JSON = {"Content-Type": "application/json"}


def _serve(pipe: Connection) -> None:
    """The endpoint; sends its port when it listens."""

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(DELAY_S)
        return web.Response(body=REPLY, content_type="application/json")

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        pipe.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(serve())


@contextmanager
def _endpoint() -> Iterator[str]:
    """The address of one in a process of its own."""
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}/v1"
    finally:
        process.terminate()
        process.join()


def _ours(model: OpenAIModel, requests: Sequence[Request]) -> None:
    lanes, left = Lanes(CALLERS), iter(requests)

    def caller() -> None:
        for request in left:
            model.complete(request)

    for done in [lanes.submit(caller) for _ in range(CALLERS)]:
        done.result()
    lanes.close(1.0)


def _naive(address: str, pool: ThreadPoolExecutor) -> None:
    def call(_: int) -> None:
        request = urllib.request.Request(f"{address}/chat/completions", json.dumps(FIELDS).encode(), JSON)
        with urllib.request.urlopen(request) as answer:  # http on loopback
            json.loads(answer.read())

    list(pool.map(call, range(CALLS)))


async def _bare(address: str) -> None:
    left, body = iter(range(CALLS)), json.dumps(FIELDS).encode()

    async def caller(session: aiohttp.ClientSession) -> None:
        for _ in left:
            async with session.post(f"{address}/chat/completions", data=body, headers=JSON) as answer:
                await answer.read()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(caller(session) for _ in range(CALLERS)))


def run(seconds: float) -> list[Row]:
    """The row of `experiments.bench`: the median round of each way."""
    os.environ["no_proxy"] = "127.0.0.1"
    rounds: dict[str, list[float]] = {"ours": [], "naive": [], "limit": []}
    with _endpoint() as address, ThreadPoolExecutor(CALLERS) as pool:
        model = OpenAIModel(
            ModelSpec("openai:m", Price(1, 1, 1), base_url=address, key_variable="", max_concurrency=64)
        )
        requests = [Request(MESSAGES, i, 0.7, 32, "task") for i in range(CALLS)]
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda: _ours(model, requests),
            "naive": lambda: _naive(address, pool),
            "limit": lambda: asyncio.run(_bare(address)),
        }
        ways["ours"]()  # connections, imports
        end = time.monotonic() + seconds
        while time.monotonic() < end or not rounds["limit"]:
            for name, play in ways.items():
                start_s = time.process_time()
                play()
                rounds[name].append(CALLS / (time.process_time() - start_s))
        model.close()
    ours, naive, limit = (sorted(own)[len(own) // 2] for own in rounds.values())
    return [Row(f"{CALLERS} calls in flight", "calls/s of CPU time", ours, naive, limit)]
