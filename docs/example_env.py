"""An environment of one's own, in one file: find the key, then open the door that it fits.

python -m pytest tests/integration/test_env_contract.py --env-id docs.example_env:Doors-v0
python -m experiments.frontier --env docs.example_env:Doors-v0 --models simulated-llama --scale tiny
"""

import gymnasium as gym

from envs.base import Split, Task, text_space
from envs.errors import UnknownTaskError

ID = "docs.example_env:Doors-v0"
PLACES = ("desk", "bed", "shelf", "chest", "stove", "rug", "sofa", "lamp")
COLOURS = ("red", "green", "blue", "black", "white", "grey", "brown", "pink", "orange", "yellow", "purple", "golden")
ACTIONS = (*(f"search the {place}" for place in PLACES), *(f"open the {colour} door" for colour in COLOURS))


class Doors(gym.Env[str, str]):
    """A task "door/<n>" is a place for the key and a colour; no two tasks have the same, also not of two splits."""

    action_guide = f"Actions: {', '.join(ACTIONS)}."
    instant = True  # it takes microseconds and waits for nothing: no thread of its own

    def __init__(self, max_steps: int = 10) -> None:
        self.max_steps = max_steps
        self.observation_space = self.action_space = text_space()
        self.over = True

    @classmethod
    def tasks(cls, split: Split) -> tuple[Task, ...]:
        start = {Split.TRAIN: 0, Split.DEV: 32, Split.TEST: 64}[split]
        return tuple(Task(ID, f"door/{n}", split) for n in range(start, start + 32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # makes self.np_random
        options = options or {}
        name = options.get("task") or f"door/{self.np_random.integers(32)}"
        if name not in {task.name for split in Split for task in self.tasks(split)}:
            raise UnknownTaskError(f"there is no task {name!r}: they are door/0 to door/95")
        row, place = divmod(int(name.rpartition("/")[2]), len(PLACES))
        self.plan = f"search the {PLACES[place]}", f"open the {COLOURS[(row + place) % len(COLOURS)]} door"
        self.key = self.won = self.over = False
        self.moves = 0
        info = {"task": name, "task_text": f"Leave by the {self.plan[1].split()[2]} door.", **self.state()}
        if options.get("expert_plan"):
            info["expert_plan"] = self.plan
        return f"You are in a room with a {', a '.join(PLACES)} and {len(COLOURS)} doors.", info

    def step(self, action):
        if self.over:
            raise gym.error.ResetNeeded("The episode is over: call reset() before step().")
        self.moves += 1
        text = "Nothing happens."
        if action == self.plan[0]:
            self.key, text = True, "You find a key."
        elif action == self.plan[1]:
            self.won, text = self.key, "The door opens." if self.key else "It is locked."
        truncated = not self.won and self.moves >= self.max_steps
        self.over = self.won or truncated
        return text, float(self.won), self.won, truncated, self.state()

    def state(self):
        return {"score": int(self.won), "success": self.won, "outcome": float(self.won), "moves": self.moves}

    def close(self):
        self.over = True


gym.register("Doors-v0", entry_point=Doors)
