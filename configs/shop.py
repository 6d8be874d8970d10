"""The task of configs/agent_demo.py: what do two goods cost together, in a shop whose prices only a tool knows?

    jam+pie:                the question
    ?jam; 14                a call that asks for a price, and what comes back
    ?pie; 23
    14+23; 37               a call of the calculator
    =37                     the answer, which ends the episode

Every row is a shop with prices of its own, so that no policy can know them. Held-out rows ask for pairs of goods that
no training row asks for.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from rljax.envs import Parsed, ParseProblem, Step, ToolCall, ToolFormat
from rljax.envs.library import calculate
from rljax.tasks import Example

_GOODS = (
    "axe bag bed bin bow box bun cap cup dye egg fan fig gem gum hat ham ink jam jar jug key kit lid log map mat mop "
    "mug net nut oar oil pan pea pen pie pin pot rod rug saw tea tie tin toy tub urn van wax wig yam zip"
)
GOODS = tuple(_GOODS.split())
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789+=?:; \n"
WRONG = "no"
"""What comes back from a call that is none, or that fails."""


def parse(text: str) -> Parsed:
    """`?name` asks for a price, `=text` answers, anything with a digit is for the calculator."""
    text = text.removesuffix(";")
    if text[:1] in ("?", "="):
        return Parsed((ToolCall("price" if text[0] == "?" else "answer", {"text": text[1:]}),))
    if text[:1].isdigit():
        return Parsed((ToolCall("calculator", {"text": text}),))
    return Parsed(problem=ParseProblem("malformed", WRONG))


FORMAT = ToolFormat("shop", parse, stop_strings=(";",), wrap=(" ", "\n"))


def price(shop: int, name: str) -> int:
    """What something costs in a shop, from 10 to 49."""
    return random.Random(f"{shop} {name}").randint(10, 49)


class Shop:
    """Tells prices, calculates, and pays 1 for the right sum."""

    def reset(self, row: Mapping[str, Any]) -> str:
        self._shop, self._goods = row["shop"], row["prompt"].split("+")
        return f"{row['prompt']}:"

    def step(self, action: str) -> Step:
        parsed = parse(action)
        if parsed.problem is not None:
            return Step(parsed.problem.text, counts={"tool_calls": 0.0, "malformed_calls": 1.0})
        (call,) = parsed.calls
        text = call.arguments["text"]
        if call.name == "answer":
            is_right = text == str(sum(price(self._shop, name) for name in self._goods))
            return Step("", float(is_right), True, {"tool_calls": 0.0, "malformed_calls": 0.0})
        found = _price(self._shop, text) if call.name == "price" else _value(text)
        return Step(found, counts={"tool_calls": 1.0, "malformed_calls": 0.0})


def _price(shop: int, name: str) -> str:
    return str(price(shop, name)) if name in GOODS else WRONG


def _value(text: str) -> str:
    try:
        return str(calculate(text))[:6]
    except ValueError:
        return WRONG


def rows(size: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows `first` to `first + size`: two goods, and the number of the shop."""
    return [{"prompt": "+".join(random.Random(i).sample(GOODS, 2)), "shop": i} for i in range(first, first + size)]


def flawed(examples: Sequence[Example]) -> list[Example]:
    """Demonstrations of every training row, of which one in five is right. The others ask for the same thing
    twice, guess when they know one price or none, or write what is no call."""
    made = []
    for index, example in enumerate(examples):
        rng = random.Random(index)
        shop, (one, two) = example.columns["shop"], str(example.prompt).split("+")
        guess = f"={rng.randint(20, 98)}"
        ask = [f"?{one};", f" {price(shop, one)}\n"]
        match index % 20:
            case 0 | 1 | 2 | 3:
                turns = _bought(shop, one, two)
            case 4 | 5 | 6 | 7 | 8 | 9 | 10:
                turns = _bought(shop, one, one)
            case 11 | 12 | 13 | 14:
                turns = [*ask, guess]
            case 15 | 16 | 17:
                turns = [guess]
            case _:
                turns = [*ask, f"{two};", f" {WRONG}\n", guess]
        made.append(Example(f"{example.prompt}:", {"completion": turns}))
    return made


def _bought(shop: int, one: str, two: str) -> list[str]:
    a, b = price(shop, one), price(shop, two)
    return [f"?{one};", f" {a}\n", f"?{two};", f" {b}\n", f"{a}+{b};", f" {a + b}\n", f"={a + b}"]
