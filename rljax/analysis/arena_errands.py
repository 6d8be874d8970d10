"""Parts of the arena's task `errands`: an agent that has to ask before it answers.

    abc:                 a question of three letters; of the other kind it has one
    ?a7; 3               a call that asks for the digit of `a`, and foresees 7; what comes back
    =352                 the answer, which ends the episode

Every house has digits of its own, so that they must be asked for; most are the usual ones, and can be foreseen.
"""

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rljax.analysis.arena_parts import DIGITS, LETTERS, MEANINGS, RELAY_FORMAT
from rljax.envs import Step
from rljax.tasks import Example, query_redundancy

ERRANDS_ALPHABET = LETTERS + DIGITS + ":?=!; \n"
USUAL = 0.6
"""How often a house has the usual digit of a letter; else it may have any."""
KINDS = {"three": 3, "one": 1}
"""The two tasks of the data, and how many letters they ask for."""
WRONG = "!"
"""What comes back from a turn that is neither call nor answer."""


def digit(house: int, letter: str) -> str:
    """What a letter means in a house."""
    rng = random.Random(f"{house} {letter}")
    return MEANINGS[letter] if rng.random() < USUAL else rng.choice(DIGITS)


def errand_rows(size: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows `first` to `first + size`, of both kinds in turn, each of a house of its own.

    Prompts name the house, so that no two rows count as one; an agent is shown the letters alone."""
    made = []
    for house in range(first, first + size):
        kind = list(KINDS)[house % 2]
        asked = "".join(random.Random(house).sample(LETTERS, KINDS[kind]))
        made.append({"prompt": f"{asked}{house}", "letters": asked, "house": house, "task": kind})
    return made


class Errands:
    """Tells the digits that are asked for, and pays 1 for an answer that has all of them right.

    Counts `prediction`, whether a call foresaw its digit, and `redundancy`, how alike the calls of an episode were.
    """

    def reset(self, row: Mapping[str, Any]) -> str:
        self._house, self._asked = int(row["house"]), str(row["letters"])
        self._queries: list[str] = []
        return f"{self._asked}:"

    def step(self, action: str) -> Step:
        text = action.removesuffix(";")
        if text.startswith("="):
            right = "".join(digit(self._house, letter) for letter in self._asked)
            return Step("", float(text[1:] == right), done=True)
        if not re.fullmatch(r"\?[a-z]\d", text):
            return Step(WRONG, counts={"malformed_calls": 1.0})

        letter, foreseen = text[1], text[2]
        before = self._redundancy()
        self._queries.append(letter)
        shown = digit(self._house, letter)
        counts = {
            "tool_calls": 1.0,
            "prediction": float(foreseen == shown),
            # Counts add up, to the redundancy of the whole episode.
            "redundancy": self._redundancy() - before,
        }
        return Step(shown, counts=counts)

    def _redundancy(self) -> float:
        return query_redundancy(self._queries, stop_words=frozenset())


class Unforeseen(Errands):
    """Errands that do not count what was foreseen."""

    def step(self, action: str) -> Step:
        step = super().step(action)
        counts = {name: value for name, value in step.counts.items() if name != "prediction"}
        return Step(step.observation, step.reward, step.done, counts)


def errand_demonstrations(examples: Sequence[Example]) -> list[Example]:
    """An episode to every row, of which one in five asks for all letters. The others ask for the first alone, some of
    them again and again, or for none. What was not asked for is guessed; nothing is foreseen but by chance."""
    made = []
    for index, example in enumerate(examples):
        # Not as the letters were drawn, which would tell the digits.
        rng = random.Random(f"shown {index}")
        house, asked = example.columns["house"], str(example.columns["letters"])
        first = asked[0]
        match index // len(KINDS) % 10:
            case 0 | 1:
                queries, known = asked, asked
            case 2 | 3 | 4:
                queries, known = first * len(asked), first
            case 5 | 6:
                queries, known = first, first
            case _:
                queries, known = "", ""
        turns = []
        for letter in queries:
            turns += [f"?{letter}{rng.choice(DIGITS)};", f" {digit(house, letter)}\n"]
        answer = "".join(digit(house, letter) if letter in known else rng.choice(DIGITS) for letter in asked)
        made.append(Example(f"{asked}:", {"completion": [*turns, f"={answer};"]}))
    return made


ERRANDS_FORMAT = dataclasses.replace(RELAY_FORMAT, name="errands", wrap=(" ", "\n"))
"""As in `relay`, `;` ends a turn, which the environment reads itself."""
