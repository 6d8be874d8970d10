"""What the arena's tasks are made of: rows, demonstrations, an environment, and recipes that take a method apart.

Tables are fixed: a letter means the same digit in every run. Demonstrations are drawn by row, so that a warm start
depends on its seed alone.
"""

import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rljax.advantages import AdvantageFn, group_normalized
from rljax.algorithms import HighEntropy, RandomForks
from rljax.algorithms.base import Algorithm, Recipe
from rljax.algorithms.forest import ForestRecipe
from rljax.envs import Parsed, Step, ToolFormat
from rljax.plans import RolloutPlan
from rljax.plans.fork_rules import top_surprisal
from rljax.rollouts.guided.guidance import HEADING, guided_prompt, reference_actions
from rljax.tasks import Example

LETTERS = "abcdefghij"
DIGITS = "0123456789"
MEANINGS = dict(zip(LETTERS, "3815092647", strict=True))
"""The digit that a letter stands for."""
DECOYS = dict(zip(LETTERS, "9042718365", strict=True))
"""Another digit for it, which demonstrations have at some places."""


# Late: certain text, then digits that are to be known.

CERTAIN = "let me look it up"
"""17 characters that every answer begins with."""
LATE_ALPHABET = "abcdefghijklmopqrtuvwxyz0123456789 ="


def late_rows(size: int, seed: int, length: int = 6) -> list[dict[str, Any]]:
    """`size` distinct words of `length` letters, each asked for as `word=`, with the only right answer."""
    rng = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < size:
        words["".join(rng.choices(LETTERS, k=length))] = None
    return [{"prompt": f"{word}=", "answer": CERTAIN + _meaning(word)} for word in words]


def late_demonstrations(examples: Sequence[Example]) -> list[Example]:
    """An answer to every row. Of the digits those at even places are right with 0.8. Those at odd places are right
    with 0.45, and with 0.5 the decoy, which is thus more likely: it cannot be left behind by sharpening alone."""
    made = []
    for index, example in enumerate(examples):
        rng = random.Random(index)
        digits = [_late_digit(rng, letter, place) for place, letter in enumerate(_word(example))]
        made.append(Example(example.prompt, {"completion": CERTAIN + "".join(digits)}))
    return made


def _late_digit(rng: random.Random, letter: str, place: int) -> str:
    chance = rng.random()
    if chance < (0.45 if place % 2 else 0.8):
        return MEANINGS[letter]
    return DECOYS[letter] if place % 2 and chance < 0.95 else rng.choice(DIGITS)


def _word(example: Example) -> str:
    return str(example.prompt).removesuffix("=")


def _meaning(word: str) -> str:
    return "".join(MEANINGS[letter] for letter in word)


# Relay: a digit a turn, one outcome at the end.

TURNS = 8
RELAY_ALPHABET = LETTERS + DIGITS + ":;\n"


def relay_rows(size: int, seed: int) -> list[dict[str, Any]]:
    """`size` distinct episodes, as the letters of their turns."""
    rng = random.Random(seed)
    made: dict[str, None] = {}
    while len(made) < size:
        made["".join(rng.choices(LETTERS, k=TURNS))] = None
    return [{"prompt": episode} for episode in made]


class Relay:
    """Shows a letter a turn, and pays 1 at the end if every answer was the digit that the letter means."""

    def reset(self, row: Mapping[str, Any]) -> str:
        self._asked = str(row["prompt"])
        self._said: list[str] = []
        return f"{self._asked[0]}:"

    def step(self, action: str) -> Step:
        self._said.append(action.removesuffix(";"))
        if len(self._said) < len(self._asked):
            return Step(self._asked[len(self._said)])
        return Step("", float(self._said == list(_meaning(self._asked))), done=True)


def relay_demonstrations(examples: Sequence[Example]) -> list[Example]:
    """An episode to every row, each answer right with 0.7, else any digit."""
    made = []
    for index, example in enumerate(examples):
        rng = random.Random(index)
        asked = str(example.prompt)
        said = _doubtful(rng, _meaning(asked), 0.7)
        turns = [f"{said[0]};"]
        for letter, digit in zip(asked[1:], said[1:], strict=True):
            turns += [f"\n{letter}:", f"{digit};"]
        made.append(Example(f"{asked[0]}:", {"completion": turns}))
    return made


def _parse_relay(text: str) -> Parsed:
    return Parsed()


RELAY_FORMAT = ToolFormat("relay", _parse_relay, stop_strings=(";",), wrap=("\n", ":"))
"""`;` ends a turn. There are no calls."""


# Restart: an answer that may start over.

AGAIN = "="
"""Starts an answer over: what follows the last one counts."""
RESTART_ALPHABET = LETTERS + DIGITS + ":" + AGAIN


def restart_rows(size: int, seed: int) -> list[dict[str, Any]]:
    """`size` distinct words of six letters, each asked for as `word:`, with the right digits."""
    rng = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < size:
        words["".join(rng.choices(LETTERS, k=6))] = None
    return [{"prompt": f"{word}:", "answer": _meaning(word)} for word in words]


def after_restart(completion: str) -> str:
    """What is said behind the last `AGAIN`."""
    return completion.rpartition(AGAIN)[2]


def restarting(examples: Sequence[Example]) -> list[Example]:
    """An answer to every row, whose digits are right with 0.7, else any. Every second one breaks off after one to six
    of them and starts over, with digits that are right with 0.9."""
    return [_with_restart(example, index, begins=index % 2 == 1) for index, example in enumerate(examples)]


def never_restarting(examples: Sequence[Example]) -> list[Example]:
    """The same without starting over, which is thus never seen."""
    return [_with_restart(example, index, begins=False) for index, example in enumerate(examples)]


def _with_restart(example: Example, index: int, *, begins: bool) -> Example:
    rng = random.Random(index)
    right = example.columns["answer"]
    completion = _doubtful(rng, right, 0.7)
    if begins:
        completion = completion[: rng.randint(1, len(right))] + AGAIN + _doubtful(rng, right, 0.9)
    return Example(example.prompt, {"completion": completion})


def _doubtful(rng: random.Random, digits: str, chance: float) -> str:
    return "".join(digit if rng.random() < chance else rng.choice(DIGITS) for digit in digits)


# Sparse: digits that are hardly known, and a plan that tells them.

SPARSE_LENGTH = 5
OPEN = "."
"""What a plan does not tell. Where it told everything all guided answers would be right, and teach nothing."""


def sparse_rows(size: int, seed: int) -> list[dict[str, Any]]:
    """`size` distinct words of five letters, each asked for as `word=`, with the right digits, and with one action that
    names them (`rljax.rollouts.guided`), but for one, in whose place stands `OPEN`."""
    rng = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < size:
        words["".join(rng.choices(LETTERS, k=SPARSE_LENGTH))] = None
    rows = [{"prompt": f"{word}=", "answer": _meaning(word)} for word in words]
    return [{**row, "actions": [{"name": _but_one(rng, row["answer"]), "arguments": {}}]} for row in rows]


def _but_one(rng: random.Random, digits: str) -> str:
    place = rng.randrange(len(digits))
    return digits[:place] + OPEN + digits[place + 1 :]


def sparse_demonstrations(examples: Sequence[Example]) -> list[Example]:
    """An answer to every row, whose digits are right with 0.05, the letter's decoy with 0.7, else any: a policy that
    minds letters, and knows the wrong thing of them. Every second one has the plan in its prompt, and follows it as far
    as it goes."""
    made = []
    for index, example in enumerate(examples):
        rng = random.Random(index)
        completion = "".join(_habit(rng, letter) for letter in _word(example))
        prompt = example.prompt
        if index % 2:
            actions = example.columns["actions"]
            prompt = guided_prompt(prompt, reference_actions(actions), 1)
            told = zip(actions[0]["name"], completion, strict=True)
            completion = "".join(own if named == OPEN else named for named, own in told)
        made.append(Example(prompt, {"completion": completion}))
    return made


def _habit(rng: random.Random, letter: str) -> str:
    chance = rng.random()
    if chance < 0.05:
        return MEANINGS[letter]
    return DECOYS[letter] if chance < 0.75 else rng.choice(DIGITS)


SPARSE_ALPHABET = "".join(sorted(set(LETTERS + DIGITS + "=\n .:{}" + HEADING)))


# Sums: running totals.


def miscounted(examples: Sequence[Example]) -> list[Example]:
    """Running totals of a sum, `7;-1;0`; in every second answer the signs of the terms slip at one of them, and stay so
    for the rest."""
    made = []
    for index, example in enumerate(examples):
        rng = random.Random(index)
        terms = [int(sign + digits) for sign, digits in re.findall(r"([+-]?) ?(\d+)", str(example.prompt))]
        slip = rng.randrange(1, len(terms)) if index % 2 else len(terms)

        total = terms[0]
        totals = []
        for place, term in enumerate(terms[1:], 1):
            total += term if place < slip else -term
            totals.append(str(total))
        made.append(Example(example.prompt, {"completion": ";".join(totals)}))
    return made


# Recipes that take a method apart.


@dataclasses.dataclass
class RandomForksWith(RandomForks):
    """Forks at random tokens, with the credit of another method."""

    credit: Callable[[], AdvantageFn] = group_normalized

    def build(self) -> Algorithm:
        return super().build()._replace(advantage_fn=self.credit())


@dataclasses.dataclass
class SurprisalForks(ForestRecipe):
    """Forks at the tokens of the highest `-log pi` (EPTree, 2506.11902), with the credit of another method."""

    credit: Callable[[], AdvantageFn] = group_normalized

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        rule = top_surprisal(self.points, self.chains, tail=0.0, last_words=())
        return self.compose(rule, self.credit())


@dataclasses.dataclass
class EntropyMask(HighEntropy):
    """The mask of 2506.01939 alone: neither dynamic sampling nor a punishment of length, whose tokens would differ."""

    def plan(self) -> RolloutPlan:
        return Recipe.plan(self)
