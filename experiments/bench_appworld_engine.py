"""The appworld package's own ways to play, for `bench_appworld`; run in AppWorld's virtual environment.

`serve ROOT` prints the port of its HTTP server, bound to this machine alone. `direct ROOT TASK` reads "reset",
"evaluate" or a JSON list of actions from each line of its input, does it, and prints a line. The actions are ours.
"""

from __future__ import annotations

import json
import os
import socket
import sys


def _serve() -> None:
    import uvicorn
    from appworld.serve.environment import app

    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="critical")).run(sockets=[listening])


def _direct(task: str) -> None:
    from appworld import AppWorld
    from appworld.evaluator import evaluate_task

    def start() -> AppWorld:
        return AppWorld(
            task_id=task, experiment_name="direct", load_ground_truth=False, timeout_seconds=None,
            max_interactions=10**9,
        )  # fmt: skip

    said, sys.stdout = sys.stdout, sys.stderr
    world = start()
    print("ready", file=said, flush=True)
    for line in sys.stdin:
        if line == "reset\n":
            world.close()
            world = start()
        elif line == "evaluate\n":
            evaluate_task(task, "direct", suppress_errors=True, save_report=False)
        else:
            for action in json.loads(line):
                world.execute(action)
        print("done", file=said, flush=True)


if __name__ == "__main__":
    os.environ["APPWORLD_ROOT"] = os.environ["APPWORLD_CACHE"] = sys.argv[2]
    os.chdir(sys.argv[2])
    if sys.argv[1] == "serve":
        _serve()
    else:
        _direct(sys.argv[3])
