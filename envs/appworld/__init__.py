"""AppWorld: everyday tasks over nine apps, done by writing code against their APIs.

`AppWorld-v0`. An action is a line of Python code, the observation is what it printed. An episode ends when the code
calls `apis.supervisor.complete_task()`; the outcome is 1 if all of the task's tests pass then, else 0.

    env = gymnasium.make("AppWorld-v0")
    text, info = env.reset(options={"task": "pay-contact/1"})
    text, reward, terminated, truncated, info = env.step("print(apis.supervisor.show_profile())")

The real engine runs in a virtual environment and a process of its own (`make appworld`; `client`). AppWorld's tasks
are used where APPWORLD_ROOT names a folder that `appworld download data` has filled; without it, tasks of our own on
the same engine: 8 kinds over 5 apps, made once by `python -m envs.appworld generate`, and labelled so in reports. More
of our own are made by `python -m envs.appworld generate --out FOLDER --train 128`, for APPWORLD_ROOT=FOLDER.

What agents write is hostile: docs/appworld-confinement.md says what it can and can't reach.
"""

from envs.appworld.env import AppWorldEnv

__all__ = ["AppWorldEnv"]
