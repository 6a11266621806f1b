"""The embedded pair for machines without a language model: SIMULATED executors, labelled so wherever they appear.

An executor follows the environment's expert plan and errs. Whether it errs depends on the model and on the kind of
step; what follows depends on the environment: a slip costs a step, a wrong room must be left again, a wrong focus
ends the episode. Two properties make routing a real problem. *Gaps*: a model does not know how to do a kind of step
in a kind of task, and fails at it nearly always; the small model's gaps include the large one's. *Fixation*: after
an error a model may repeat itself, the small one more and more, so that it can loop to the step limit and cost more
than the large model that finishes early. Every draw is a hash of (task, prompt, model, sample index): the same call
has the same reply on every machine. The reply's tokens are counted and billed at list prices.

The competences below were tuned once on train tasks for a third each of Easy, Hard and Intractable, and are frozen. In
ScienceWorld, with its 30 kinds of task, the gaps are drawn; for the few kinds of ALFWorld and AppWorld they are listed.

A second pair has another ratio of cost to capability: `weaker` makes both of its models from the first pair's, by two
figures each. It stands for no measured model; its names say whose list prices it is billed at.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from bopo_ray.errors import ConfigError
from bopo_ray.models.pool import ModelSpec
from bopo_ray.models.pricing import Usage
from bopo_ray.models.protocol import Message, Reply, Request
from bopo_ray.models.tokens import count_tokens, prompt_tokens
from bopo_ray.records import spawn_seed

__all__ = ["LARGE", "SMALL", "STANDS_FOR", "Competence", "SimulatedModel", "StepKind", "step_kind", "weaker"]


class StepKind(StrEnum):
    """What an expert step does; competence depends on it."""

    NAVIGATE = "navigate"
    """Go to another room."""
    LOOK = "look"
    """Look, read, examine, inventory."""
    OPEN = "open"
    """Open or close."""
    TAKE = "take"
    """Pick up, move, drop."""
    FOCUS = "focus"
    """Signal the object of the task: a wrong one ends the episode."""
    MEASURE = "measure"
    """Use an instrument."""
    MIX = "mix"
    """Pour, mix, dunk."""
    OPERATE = "operate"
    """Switch on or off, connect, heat, cool, clean."""
    WAIT = "wait"
    """Let time pass, or answer a question of the environment."""


_VERBS = {
    StepKind.NAVIGATE: ("go ", "teleport "),
    StepKind.LOOK: ("look", "read", "examine", "inventory"),
    StepKind.OPEN: ("open", "close"),
    StepKind.TAKE: ("pick", "move", "drop", "put", "take"),
    StepKind.FOCUS: ("focus",),
    StepKind.MEASURE: ("use",),
    StepKind.MIX: ("mix", "pour", "dunk"),
    StepKind.OPERATE: ("activate", "deactivate", "connect", "disconnect", "turn", "heat", "cool", "clean"),
}


_CODE = {
    StepKind.FOCUS: re.compile(r"apis\.supervisor\.complete_task\("),
    StepKind.LOOK: re.compile(r"apis\.supervisor\."),
    StepKind.OPEN: re.compile(r"apis\.\w+\.login\("),
    StepKind.MEASURE: re.compile(r"apis\.\w+\.(?:show|search)_"),
    StepKind.OPERATE: re.compile(r"apis\.\w+\.\w+\("),
    StepKind.MIX: re.compile(r"\w+ = "),
}
"""AppWorld's steps: finish, look around, log in, look up, change something, work something out."""


def step_kind(action: str) -> StepKind:
    """The kind of an action, by its verb or, of code, by the API that it calls; anything else is waiting."""
    code = next((kind for kind, pattern in _CODE.items() if pattern.search(action)), None)
    return code or next((kind for kind, verbs in _VERBS.items() if action.startswith(verbs)), StepKind.WAIT)


@dataclass(frozen=True, slots=True)
class Competence:
    """How a simulated model errs. All figures are probabilities."""

    slip: dict[StepKind, float]
    """Error per attempt at a step that it knows how to do."""
    gap: dict[StepKind, float]
    """Share of (task kind, step kind) pairs that it does not know how to do."""
    variation_gap: float
    """As `gap`, for single variations of a task: multiplies `gap`."""
    stuck: float
    """Error per attempt at a step that it does not know how to do."""
    fatal: float
    """Share of focus errors that focus on a wrong object, which ends the episode."""
    fixation: float
    """Probability of repeating an action that just failed ..."""
    fixation_growth: float
    """... and by how much it grows with each further failure."""
    recovery: float
    """Probability of noticing, per step, that it is in the wrong room."""
    doubt: float = 0.1
    """Probability of answering LARGE, where a router asks it who should act next ..."""
    doubt_failed: float = 0.55
    """... and the same after an action that failed."""
    listed: int = 0
    """Its column of _GAPS: 0 as the small model, 1 as the large one."""
    unsure: float = 0.0
    """Share of (task, step kind) pairs that it does not know how to do beyond those gaps, in each environment."""


K = StepKind
SMALL = Competence(
    slip={K.NAVIGATE: 0.06, K.LOOK: 0.02, K.OPEN: 0.04, K.TAKE: 0.06, K.FOCUS: 0.10, K.MEASURE: 0.10, K.MIX: 0.12,
          K.OPERATE: 0.08, K.WAIT: 0.04},
    gap={K.NAVIGATE: 0.04, K.LOOK: 0.0, K.OPEN: 0.02, K.TAKE: 0.12, K.FOCUS: 0.30, K.MEASURE: 0.40, K.MIX: 0.45,
         K.OPERATE: 0.30, K.WAIT: 0.06},
    variation_gap=0.35, stuck=0.92, fatal=0.45, fixation=0.45, fixation_growth=0.12, recovery=0.55,
)  # fmt: skip
LARGE = Competence(
    slip={K.NAVIGATE: 0.01, K.LOOK: 0.01, K.OPEN: 0.01, K.TAKE: 0.015, K.FOCUS: 0.02, K.MEASURE: 0.02, K.MIX: 0.03,
          K.OPERATE: 0.02, K.WAIT: 0.01},
    gap={K.NAVIGATE: 0.0, K.LOOK: 0.0, K.OPEN: 0.0, K.TAKE: 0.01, K.FOCUS: 0.03, K.MEASURE: 0.06, K.MIX: 0.08,
         K.OPERATE: 0.05, K.WAIT: 0.0},
    variation_gap=0.35, stuck=0.92, fatal=0.3, fixation=0.06, fixation_growth=0.02, recovery=0.95, listed=1,
)  # fmt: skip


def weaker(model: Competence, slips: float, unsure: float) -> Competence:
    """The same with so many times the slips, and further gaps."""
    return replace(model, slip={kind: min(1.0, slips * p) for kind, p in model.slip.items()}, unsure=unsure)


LLAMA_8B = weaker(SMALL, slips=2.0, unsure=0.25)
LLAMA_70B = weaker(LARGE, slips=2.0, unsure=0.03)

_GAPS: dict[str, dict[StepKind, tuple[float, float]]] = {
    "pick_and_place_simple": {},
    "look_at_obj_in_light": {K.TAKE: (0.92, 0.0), K.MEASURE: (0.92, 0.0)},
    "pick_clean_then_place_in_recep": {},
    "pick_heat_then_place_in_recep": {K.TAKE: (0.92, 0.0), K.OPERATE: (0.92, 0.0)},
    "pick_cool_then_place_in_recep": {K.OPERATE: (0.998, 0.998)},
    "pick_two_obj_and_place": {K.TAKE: (0.96, 0.96)},
    "text-contact": {},
    "move-alarm": {},
    "note-total": {},
    "pay-contact": {K.MEASURE: (0.92, 0.0), K.OPERATE: (0.92, 0.0)},
    "shopping-tasks": {K.MEASURE: (0.92, 0.0), K.MIX: (0.92, 0.0)},
    "finish-tasks": {K.MEASURE: (0.92, 0.0), K.MIX: (0.92, 0.0)},
    "approve-requests": {K.MIX: (0.998, 0.998)},
    "tidy-files": {K.MIX: (0.998, 0.998)},
}
"""What (small, large) do not know in ALFWorld and AppWorld: error per attempt, by kind of task and of step."""

_CHOICE = "Answer with one word, SMALL or LARGE"
"""What the question of a prompted router ends with."""
_FAILED = (
    "execution failed", "no known action", "ambiguous", "nothing happens", "your reply held no action", "i'm not sure",
    "can't",
)  # fmt: skip
_ROOMS = ("kitchen", "hallway", "workshop", "living room", "bedroom", "bathroom", "art studio", "greenhouse",
          "foundry", "outside")  # fmt: skip
_DISTRACTORS = ("air", "agent", "table", "door", "picture", "wall", "chair", "cup")
_THOUGHTS = {
    K.NAVIGATE: "What I need is not in this room, so I change rooms now and look there.",
    K.LOOK: "Before the next step I check what is in front of me and in which state it is.",
    K.OPEN: "This is closed and may hold something useful, so I deal with it first.",
    K.TAKE: "I need this object in the right place for the steps that follow.",
    K.FOCUS: "The task asks me to name its object explicitly, so I focus on it now.",
    K.MEASURE: "I need a reading to know how far the process is, so I use the instrument.",
    K.MIX: "The ingredients must come together in one container before anything can happen.",
    K.OPERATE: "The device must change its state now for the process to go on.",
    K.WAIT: "The process needs time, so I let it run and watch what changes.",
}


class _Progress(NamedTuple):
    """Where the episode stands, read off the prompt alone."""

    next_step: int
    """Index of the next expert step."""
    failures: int
    """Failed actions since the last progress."""
    last_action: str
    away_from: str
    """The room to return to after a wrong turn; empty when on course."""


class SimulatedModel:
    """A language model's stand-in: see the module's docstring. Stateless, thread-safe."""

    needs_plan = True

    def __init__(self, spec: ModelSpec) -> None:
        if spec.target not in _MODELS:
            raise ConfigError(f"unknown simulated model {spec.target!r}; known: {', '.join(_MODELS)}")
        self.name = spec.label
        self.identity = f"{spec.model}|{spec.label}"  # its draws depend on both
        self.competence = _MODELS[spec.target]
        self.price, self.sampling = spec.price, spec.sampling

    def bound(self, messages: tuple[Message, ...]) -> int:
        """Exact prompt tokens."""
        return prompt_tokens(messages)

    def check(self) -> None:
        """It is always there."""

    def close(self) -> None:
        """It holds nothing."""

    def complete(self, request: Request) -> Reply:
        """The simulated reply and its measured tokens; latency is 0 because no time is simulated."""
        text = self._reply(request)
        return Reply(text, Usage(self.bound(request.messages), min(count_tokens(text), request.max_tokens)), 0.0)

    def _reply(self, request: Request) -> str:
        draw = _Draws(request, self.name)
        if _CHOICE in request.messages[0].content:
            newest = request.messages[-1].content.rpartition("\n")[2].lower()
            c = self.competence
            doubt = c.doubt_failed if any(mark in newest for mark in _FAILED) else c.doubt
            return "LARGE" if draw("doubt") < doubt else "SMALL"
        progress = read_progress(request.messages, request.plan)
        c = self.competence
        if progress.failures and draw("fixation") < min(0.97, c.fixation + c.fixation_growth * (progress.failures - 1)):
            return _format("That should have worked, so I try the same again.", progress.last_action)
        if progress.away_from and draw("recovery") < c.recovery:
            return _format("This is the wrong place; I go back.", f"teleport to {progress.away_from}")
        if progress.next_step >= len(request.plan):
            return _format("All steps are done; I wait for the result.", "wait1")
        step = request.plan[progress.next_step]
        kind = step_kind(step)
        if draw("error") >= self.error_rate(request.task, kind):
            return _format(_THOUGHTS[kind], step)
        return self._error(step, kind, draw, _places(request.messages))

    def error_rate(self, task: str, kind: StepKind) -> float:
        """Error per attempt at a step of `kind` in `task` ("boil/3")."""
        c, listed = self.competence, _GAPS.get(task.rpartition("/")[0])
        if listed is None:
            rate = c.slip[kind] if self.knows(task, kind) else c.stuck
        else:
            rate = max(c.slip[kind], listed.get(kind, (0.0, 0.0))[c.listed])
        return max(rate, c.stuck) if c.unsure and _uniform("unsure", task, kind) < c.unsure else rate

    def knows(self, task: str, kind: StepKind) -> bool:
        """Whether it knows how to do steps of `kind` in `task` ("boil/3").

        One draw per pair, shared by all models: a better model's gaps are a subset of a worse one's.
        """
        task_kind = task.rpartition("/")[0]
        gap = self.competence.gap[kind]
        by_kind = _uniform("gap", task_kind, kind)
        by_variation = _uniform("gap", task, kind)
        return by_kind >= gap and by_variation >= gap * self.competence.variation_gap

    def _error(self, step: str, kind: StepKind, draw: _Draws, places: Sequence[str]) -> str:
        thought = _THOUGHTS[kind]
        if draw("unparseable") < 0.05:
            return f"I think that {thought[0].lower()}{thought[1:]}\nLet me think about it some more."
        if any(pattern.search(step) for pattern in _CODE.values()):
            return _format(thought, self._wrong_code(step, kind, draw))
        if kind is K.NAVIGATE:
            target = step.rpartition(" to ")[2]
            if places:
                return _format(thought, f"go to {draw.pick('room', [p for p in places if p != target])}")
            return _format(thought, f"teleport to {draw.pick('room', [r for r in _ROOMS if r != target])}")
        if kind is K.FOCUS and draw("fatal") < self.competence.fatal:
            return _format(thought, f"focus on {draw.pick('object', ('air', 'agent'))}")
        wrong = draw.pick("object", places or _DISTRACTORS)
        words, look = step.split(" "), "look" if places else "look around"
        return _format(thought, draw.pick("form", (f"{words[0]} {wrong}", f"examine {wrong}", look)))

    def _wrong_code(self, step: str, kind: StepKind, draw: _Draws) -> str:
        if kind is K.OPERATE and draw("fatal") < self.competence.fatal:
            return "apis.supervisor.complete_task()"  # before it is done: that ends the episode
        misspelt = re.sub(r"(apis\.\w+\.\w+)\(", r"\1_list(", step) if "apis." in step else "print(result)"
        return draw.pick("form", (misspelt, "print(apis.supervisor.show_profile())", "print(contents)"))


def read_progress(messages: Sequence[Message], plan: Sequence[str]) -> _Progress:
    """Follows the prompt's actions along the plan: no state outside the prompt is needed."""
    k, failures, last, away = 0, 0, "", ""
    home = _room(messages[1].content) if len(messages) > 1 else ""
    for said, seen in zip(messages[2::2], messages[3::2], strict=False):
        action = said.content.rpartition("Action: ")[2].strip() if "Action: " in said.content else ""
        failed = any(mark in seen.content.lower() for mark in _FAILED)
        if away and action == f"teleport to {away}" and not failed:
            away, failures = "", 0
        elif not away and k < len(plan) and action == plan[k] and not failed:
            k, failures = k + 1, 0
            if step_kind(action) is K.NAVIGATE:
                home = action.rpartition(" to ")[2]
        else:
            failures += 1
            if action.startswith("teleport to ") and not failed:
                away = home
        last = action or last
    return _Progress(k, failures if last else 0, last, away)


_MODELS = {"small": SMALL, "large": LARGE, "llama-8b": LLAMA_8B, "llama-70b": LLAMA_70B}
STANDS_FOR = {"small": "GPT-4.1-mini", "large": "GPT-4.1", "llama-8b": "Llama-3.1-8B", "llama-70b": "Llama-3.1-70B"}
"""Whose list prices a model is billed at, for readers."""


class _Draws:
    """Uniform draws that depend on (task, prompt, model, sample) and a label."""

    def __init__(self, request: Request, model: str) -> None:
        sample = request.sample if request.temperature > 0 else 0
        prompt = "\x1e".join(m.content for m in request.messages[1:])
        self.key = spawn_seed(request.task, prompt, model, sample)

    def __call__(self, label: str) -> float:
        return _uniform(self.key, label)

    def pick(self, label: str, options: Sequence[str]) -> str:
        return options[int(self(label) * len(options))]


def _uniform(*parts: object) -> float:
    return spawn_seed(*parts) / 2**63


def _format(thought: str, action: str) -> str:
    return f"Thought: {thought}\nAction: {action}"


def _places(messages: Sequence[Message]) -> list[str]:
    """Where one can go in ALFWorld, whose first observation names it all; none elsewhere."""
    listed = messages[1].content.partition("Looking quickly around you, you see ")[2]
    return re.findall(r"\ba ([a-z]+ \d+)", listed)


def _room(text: str) -> str:
    found = re.search(r"(?:room is called the|You are in the|outside location is called the) ([a-z ]+)", text)
    return found.group(1).strip() if found else "hallway"
