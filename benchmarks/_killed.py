"""What chaos.py's runs are about. The processes that it kills import this alone, so nothing heavy is here."""

import os
import time

from rljax.envs import Parsed, Step, ToolFormat

FORMAT = ToolFormat("plain", lambda text: Parsed(), stop_strings=tuple("abcdef"), wrap=(" ", "\n"))


class Tool:
    """Three turns, with a tool that takes 10 ms, and a point for each vowel of a turn."""

    def reset(self, row):
        self._turns = 0
        return row["prompt"]

    def step(self, action):
        time.sleep(0.01)
        self._turns += 1
        return Step(f"turn {self._turns}", score(action), self._turns == 3)


def score(text: str) -> float:
    """The share of vowels."""
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))


def judged(completion: str) -> float:
    """A judge that takes 10 ms and notes, with a byte in a file, that it was asked."""
    with open(os.environ["CHAOS_NOTES"], "a") as notes:
        notes.write(".")
    time.sleep(0.01)
    return score(completion)


def questions(size: int, first: int = 0) -> list[dict]:
    return [{"prompt": f"q{i:03d}"} for i in range(first, first + size)]
