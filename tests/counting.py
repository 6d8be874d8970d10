"""Environments for tests. They count, and some misbehave; worker processes import this, so nothing heavy is here."""

import os
import signal
import time

from rljax.envs import Step


def ill_typed(**fields):
    """A step that no type checker saw."""
    step = Step("x")
    for name, value in fields.items():
        object.__setattr__(step, name, value)
    return step


class Counter:
    """Adds up numbers; done at the row's goal. Some actions misbehave."""

    def reset(self, row):
        self.total, self.goal = 0, row["goal"]
        if row.get("bad"):
            raise RuntimeError("no such row")
        return f"Count to {self.goal}."

    def step(self, action):
        match action:
            case "raise":
                raise RuntimeError("oops")
            case "exit":
                raise SystemExit(3)
            case "die":
                os._exit(7)
            case "hang":
                time.sleep(60)
            case "fork":
                if os.fork() == 0:
                    os.execv("/nonexistent", ["x"])
                os.wait()
                return Step("forked")
            case "nonsense":
                return "a text"
            case "nan":
                return Step("x", reward=float("nan"))
            case "none":
                return ill_typed(observation=None)
            case "flag":
                return ill_typed(done="no")
            case "long":
                return Step("x" * 1000)
            case "tool":
                return Step("called", counts={"tool_calls": 1.0})
        self.total += int(action)
        done = self.total >= self.goal
        return Step(f"{self.total} after {os.getpid() > 0}", reward=float(done), done=done)


class Copyable(Counter):
    resets = 0

    def reset(self, row):
        Copyable.resets += 1
        return super().reset(row)

    def snapshot(self):
        return {"total": self.total, "goal": self.goal}

    def restore(self, state):
        self.__dict__.update(state)


class Marks(Copyable):
    """Says where its worker process was started from; then some actions take their time, or end what started it."""

    row = {"file": os.devnull, "goal": 0}  # noqa: RUF012

    def reset(self, row):
        self.row = row
        return super().reset(row)

    def step(self, action):
        if action == "wait":
            with open(self.row["file"], "a") as file:
                file.write(f"{os.getppid()}\n")
            time.sleep(0.5)
        if action == "kill the actor":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(30)
        if action == "who":
            return Step(str(os.getpid()))
        return super().step("1" if action == "wait" else action)


class Killed(Counter):
    """Its process is killed `kills` times, which `path` counts: when it is made, or by the action "be killed"."""

    def __init__(self, path, kills, *, when_made):
        self._path = path
        self._kills = kills
        if when_made:
            self._be_killed()

    def step(self, action):
        if action == "be killed":
            self._be_killed()
        return super().step("1" if action == "be killed" else action)

    def _be_killed(self):
        with open(self._path, "a+") as file:
            file.write("x")
            file.seek(0)
            if len(file.read()) <= self._kills:
                os.kill(os.getpid(), signal.SIGKILL)


class Closes(Marks):
    """Notes in the row's file when it is closed."""

    def close(self):
        with open(self.row["file"], "a") as file:
            file.write(f"{self.row['goal']} ")


class Echo:
    """Counts the letters it has heard; over after four turns. Its state is more than its last observation."""

    delay = 0.0

    def reset(self, row):
        self.heard, self.row = 0, row
        return f"{row['prompt']}#"

    def step(self, action):
        time.sleep(self.delay)
        self.heard += len(action)
        self.turns = getattr(self, "turns", 0) + 1
        counts = {"tool_calls": 1.0, "foresight": 0.5}
        return Step(f"?{self.heard}!", float(self.turns), self.turns == 4, counts)


def needs_a_file():
    raise OSError("no such index")
