"""What the config of task vectors asks: digits that letters mean, by one of several tables.

    a>3;f>1;k>7;c>0;q>      behind four demonstrations the table is known, and with it what q means
    q>                      alone, it may be any of the tables

Which table an example is of is its column `task`. Held-out rows ask for letters that no training row asks for; the
warm-up knows all of them.
"""

import random
import string
from collections.abc import Sequence
from typing import Any

from rljax.tasks import Example

LETTERS = string.ascii_lowercase[:20]
ASKED = {"train": LETTERS[:14], "test": LETTERS[14:]}
"""Letters that rows ask for."""
TABLES = 6
SHOTS = 4
"""Demonstrations of a row."""


def meaning(table: int, letter: str) -> str:
    """The digit of a letter."""
    return random.Random(f"{table} {letter}").choice(string.digits)


def demonstrated(rng: random.Random, table: int, query: str, shots: int) -> list[str]:
    """Demonstrations of letters other than the query, each `letter>`, digit and `;` in turn, and the query."""
    shown = rng.sample(LETTERS.replace(query, ""), shots)
    return [part for letter in shown for part in (f"{letter}>", meaning(table, letter), ";")] + [f"{query}>"]


def rows(size: int, seed: int = 0, part: str = "train") -> list[dict[str, Any]]:
    """`size` rows of the tables in turn: `prompt`, with demonstrations, `alone`, without, and the right `answer`."""
    rng = random.Random(seed)
    made = []
    for index in range(size):
        table = index % TABLES
        query = rng.choice(ASKED[part])
        prompt = "".join(demonstrated(rng, table, query, SHOTS))
        made.append({"prompt": prompt, "alone": f"{query}>", "answer": meaning(table, query), "task": table})
    return made


def of_all_letters(examples: Sequence[Example]) -> list[Example]:
    """To each row another one of its table, of any letters and of up to `SHOTS` demonstrations. Every digit of it is
    learned."""
    made = []
    for index, example in enumerate(examples):
        rng = random.Random(index)
        table = example.columns["task"]
        query = rng.choice(LETTERS)
        first, *parts = demonstrated(rng, table, query, rng.randint(0, SHOTS))
        # Digits are said, what stands between them is read.
        said = [*parts, meaning(table, query)]
        turns = [said[0]]
        for end, query_of_next, digit in zip(said[1::3], said[2::3], said[3::3], strict=True):
            turns += [end + query_of_next, digit]
        made.append(Example(first, {"completion": turns}))
    return made
