"""A server of OpenEnv, for tests: `python openenv_server_program.py KIND PORT`."""

import random
import sys

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Action, Observation, State


class Said(Action):
    message: str


class Answered(Observation):
    hint: str = ""


class Guessing(Environment):
    """Guess a number from 1 to 9: by its seed, or the task of its index."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **kwargs):
        if "index" in kwargs:
            self._number = self.list_tasks(kwargs["split"])[kwargs["index"]]["number"]
        else:
            self._number = random.Random(seed).randrange(1, 10)
        self._state = State(episode_id=episode_id, step_count=0)
        return Answered(hint="Guess a number from 1 to 9.", done=kwargs.get("over", False))

    def step(self, action):
        self._state.step_count += 1
        if action.message == "raise":
            raise KeyError("no such thing")
        guess = int(action.message) if action.message.isdigit() else 0
        right = guess == self._number
        hint = "" if right else "Too low." if guess < self._number else "Too high."
        return Answered(hint=hint, reward=float(right), done=right)

    @property
    def state(self):
        return self._state

    def list_splits(self):
        return ["train"]

    def list_tasks(self, split):
        return [{"number": number} for number in (3, 7, 5)]

    def num_tasks(self, split):
        return 3

    def get_task(self, split, index):
        return self.list_tasks(split)[index]

    def get_task_range(self, split, start=None, stop=None):
        return self.list_tasks(split)[start:stop]


class Moved(Action):
    row: int
    column: int


class Board(Observation):
    cells: list[list[int]]
    note: str = ""


class Moving(Environment):
    """Actions of two numbers, observations of two fields."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **kwargs):
        self._cells = [[0, 0], [0, 0]]
        self._state = State(episode_id=episode_id)
        return Board(cells=self._cells, note="Fill it.")

    def step(self, action):
        self._cells[action.row][action.column] = 1
        full = all(map(all, self._cells))
        return Board(cells=self._cells, reward=0.25, done=full)

    @property
    def state(self):
        return self._state


class Sums(MCPEnvironment):
    """Tools; `submit` ends the episode."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        server = FastMCP("sums")

        @server.tool
        def add(a: int, b: int) -> int:
            """Add two numbers."""
            return a + b

        @server.tool
        def submit(answer: int) -> str:
            """Give the answer."""
            return "submitted"

        super().__init__(server)
        self._state = State()

    def reset(self, seed=None, episode_id=None, **kwargs):
        return Observation(metadata={"prompt": "ignored"})

    def step(self, action, timeout_s=None, **kwargs):
        found = super().step(action, timeout_s=timeout_s, **kwargs)
        return self._scored(action, found)

    async def step_async(self, action, timeout_s=None, **kwargs):
        found = await super().step_async(action, timeout_s=timeout_s, **kwargs)
        return self._scored(action, found)

    def _scored(self, action, found):
        if isinstance(action, CallToolAction) and action.tool_name == "submit":
            found.done = True
            found.reward = float(action.arguments.get("answer") == 7)
        return found

    def _step_impl(self, action, timeout_s=None, **kwargs):
        return Observation(metadata={"error": "unknown"})

    @property
    def state(self):
        return self._state


KINDS = {
    "guessing": (Guessing, Said, Answered, 64),
    "one": (Guessing, Said, Answered, 1),
    "moving": (Moving, Moved, Board, 64),
    "sums": (Sums, CallToolAction, CallToolObservation, 64),
}

if __name__ == "__main__":
    made, action, observation, room = KINDS[sys.argv[1]]
    app = create_app(made, action, observation, env_name=sys.argv[1], max_concurrent_envs=room)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
