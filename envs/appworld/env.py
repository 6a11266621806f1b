"""The Gymnasium environment; see the package's docstring."""

from __future__ import annotations

from typing import Any

import gymnasium
from gymnasium.error import ResetNeeded

from envs.appworld import client, data
from envs.base import Split, Task, text_space
from envs.errors import ConfigError

__all__ = ["AppWorldEnv"]

MAX_OBSERVATION = 4000
"""Characters of an output that are shown; the rest is counted."""
FIRST_OBSERVATION = "A Python interpreter is ready; `apis` is defined."
_OPTIONS = ("task", "admissible", "expert_plan")


class AppWorldEnv(gymnasium.Env[str, str]):
    """One AppWorld episode at a time; see `envs.base` for the contract.

    The environments of a process share one server process, which forks a child for each episode; one environment is
    used by one thread at a time.

    Args:
        max_steps: steps until the episode is truncated.
        call_timeout_s: seconds that one action may run; then it is stopped and undone, and the episode goes on.
        render_mode: None or "ansi" (`render` returns the last observation).
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"]}  # noqa: RUF012 (gymnasium's own form)

    action_form = "code"
    footprint_mb = (320, 70)
    """See `envs.base`. Measured: the servers; 859 MB with 8 episodes in flight, 452 with 2."""
    action_guide = """An action is Python code, best a single line; names that you define stay for the next actions, and
you see only what you print. Apps are called as apis.APP.API(name=value): apis.api_docs.show_app_descriptions(),
apis.api_docs.show_api_descriptions(app_name=...) and apis.api_docs.show_api_doc(app_name=..., api_name=...) describe
them, apis.supervisor.show_profile() is who you act for, and apis.supervisor.show_account_passwords() has the passwords
for the apps' login, whose access_token the other calls want. When the task is done, call
apis.supervisor.complete_task(), with answer=... if it asks a question: that ends it."""
    """How an agent acts here, for its system prompt."""

    def __init__(self, max_steps: int = 40, *, call_timeout_s: float = 30.0, render_mode: str | None = None) -> None:
        if max_steps < 1:
            raise ConfigError(f"max_steps is {max_steps}: it must be at least 1")
        if not call_timeout_s > 0:
            raise ConfigError(f"call_timeout_s is {call_timeout_s}: it must be above 0 seconds")
        if render_mode not in (None, "ansi"):
            raise ConfigError(f"render_mode is {render_mode!r}: it may be None or 'ansi'")
        self.max_steps = max_steps
        self.call_timeout_s = call_timeout_s
        self.render_mode = render_mode
        self.observation_space = text_space()
        self.action_space = text_space()
        self._session: client.Session | None = None
        self._text = ""
        self._score = 0.0
        self._success = False
        self._moves = 0
        self._admissible = False

    @classmethod
    def tasks(cls, split: Split) -> tuple[Task, ...]:
        """All tasks of a split, in AppWorld's order or kind after kind."""
        return data.tasks(Split(split))

    @classmethod
    def ready(cls) -> None:
        """Raises ConfigError where AppWorld's virtual environment is missing."""
        client.find_python()

    @classmethod
    def label(cls) -> str:
        """Which tasks are played, for results."""
        return data.world()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start a task: `options["task"]`, or a training task that the seed picks.

        Raises:
            UnknownTaskError: no such task.
            ConfigError: AppWorld's virtual environment or its data are missing.
            EngineError: the server died or hung; call again for a fresh one.
        """
        super().reset(seed=seed)
        options = options or {}
        if wrong := [key for key in options if key not in _OPTIONS]:
            raise ConfigError(f"reset has no option {wrong[0]!r}: it knows {', '.join(_OPTIONS)}")
        name = options.get("task")
        if name is None:
            train = self.tasks(Split.TRAIN)
            name = train[int(self.np_random.integers(len(train)))].name
        task = data.task_id(name)
        plan = data.expert_plan(name) if options.get("expert_plan") else None
        self.close()
        self._session = client.acquire(data.data_folder(), task, self.call_timeout_s)
        self._admissible = bool(options.get("admissible"))
        self._text, self._score, self._success, self._moves = FIRST_OBSERVATION, 0.0, False, 0
        info = {"task": name, "task_text": self._session.instruction, **self._info()}
        if plan is not None:
            info["expert_plan"] = plan
        return self._text, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Run one action. The reward is 1 when it completes the task and all tests pass, else 0.

        The score, 100 times the share of tests passed, is taken when the episode ends, and 0 before.

        Raises:
            ResetNeeded: the episode is over, or none was started.
            EngineError: the server died; the episode is lost.
        """
        if self._session is None:
            raise ResetNeeded("The episode is over: call reset() before step().")
        session, self._session = self._session, None  # until the engine has answered
        try:
            text, terminated = session.execute(action.encode("utf-8", "replace").decode())
            self._moves += 1
            truncated = not terminated and self._moves >= self.max_steps
            if terminated or truncated:
                passes, passed, tests = session.evaluate()
                self._success, self._score = passes and terminated, 100 * passed / max(1, tests)
            else:
                self._session = session
        finally:
            if self._session is None:
                session.close()
        self._text = text if len(text) <= MAX_OBSERVATION else _shortened(text)
        return self._text, float(self._success), terminated, truncated, self._info()

    def render(self) -> str | None:  # type: ignore[override]  # gymnasium names no text type
        """The last observation."""
        return self._text if self.render_mode == "ansi" else None

    def close(self) -> None:
        """End the episode's process; the server stays for the next environment of this process."""
        if self._session is not None:
            self._session.close()
            self._session = None

    @property
    def confinement(self) -> dict[str, bool]:
        """Layer of confinement -> whether it is in force for the running episode (docs/appworld-confinement.md)."""
        return dict(self._session.layers) if self._session else {}

    def _info(self) -> dict[str, Any]:
        info: dict[str, Any] = {
            "score": self._score,
            "success": self._success,
            "outcome": float(self._success),
            "moves": self._moves,
        }
        if self._admissible:
            info["admissible"] = ()  # any code
        return info


def _shortened(text: str) -> str:
    head, tail = text[: MAX_OBSERVATION * 3 // 4], text[-MAX_OBSERVATION // 4 :]
    return f"{head}\n[... {len(text) - len(head) - len(tail)} characters left out ...]\n{tail}"
