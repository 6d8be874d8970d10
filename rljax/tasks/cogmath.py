"""Word problems and nine follow-ups to each, made without a language model: does the answer rest on understanding?

The dimensions are those of CogMath (2506.04481), whose problems are written by GPT-4 and come without a licence. Here a
problem is a story with numbers and a program over them, so every reference answer is computed.
"""

import math
import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rljax.tasks.answers import last_number

ORIGINAL = 0
"""The problem itself, beside its dimensions."""
DIMENSIONS = {
    1: "told in other words",
    2: "words scrambled",
    3: "a condition taken out",
    4: "a condition too many",
    5: "another story",
    6: "other numbers",
    7: "a rule changed",
    8: "an intermediate step",
    9: "a number from the answer",
}
"""What is done to a problem. In 2 and 3 nothing can be answered, and a pass is to say so."""
NO_ANSWER = (2, 3)
UNANSWERABLE = "unanswerable"

ASK = "Give the answer as a number alone. If it cannot be answered, say unanswerable."

_SAYS_SO = re.compile(
    r"unanswerable|cannot be (answered|determined|solved)|can't be (answered|determined|solved)|not enough information"
    r"|insufficient|not possible to (answer|determine)|makes no sense",
    re.IGNORECASE,
)
_OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b if a % b == 0 else None,
}
_TRIES = 500

Step = tuple[str, str, str | int, str | int]
"""(name of the result, one of `+ - * /`, operands: names of numbers or earlier results, or numbers)."""
Program = Sequence[Step]
"""Its last result is the answer."""


def execute(program: Program, numbers: Mapping[str, int]) -> dict[str, int] | None:
    """All results by name; None where one is below 0 or no whole number, or needs a number that is not given."""
    known = dict(numbers)
    for name, operation, *operands in program:
        values = [operand if isinstance(operand, int) else known.get(operand) for operand in operands]
        if any(value is None for value in values):
            return None
        result = _OPERATIONS[operation](*values)
        if result is None or result < 0:
            return None
        known[name] = result
    return {name: known[name] for name, *_ in program}


@dataclass(frozen=True)
class Story:
    """A program that is told."""

    told: tuple[str, ...]
    """Sentences, each with at most one number, as `{name}`."""
    retold: tuple[str, ...]
    """The same in other words."""
    asked: str
    """For the answer."""
    why: tuple[str, str]
    """An intermediate result, and the question for it."""
    idle: str
    """A sentence with the number `{idle}`, which changes nothing."""
    rule: str
    """A sentence that changes the program, with at most the number `{extra}`; "" where `replaced` changes it."""
    replaced: tuple[str, str] = ("", "")
    """Words of a sentence, and those that change the program."""


@dataclass(frozen=True)
class Family:
    """Stories of one program."""

    program: Program
    changed: Program
    """The program under the changed rule."""
    ranges: Mapping[str, tuple[int, int, int]]
    """Of each number the lowest, the highest and the step."""
    stories: tuple[Story, ...]


FAMILIES = (
    Family(
        program=(("rest", "-", "all", "first"), ("left", "-", "rest", "second"), ("earned", "*", "left", "each")),
        changed=(
            ("rest", "-", "all", "first"),
            ("left", "-", "rest", "second"),
            ("earned", "*", "left", "each"),
            ("paid", "+", "earned", "extra"),
        ),
        ranges={"all": (12, 30, 1), "first": (2, 5, 1), "second": (2, 6, 1), "each": (2, 5, 1)},
        stories=(
            Story(
                told=(
                    "Nora's ducks lay {all} eggs a day.",
                    "She eats {first} for breakfast.",
                    "She bakes with {second} of them.",
                    "She sells the others for {each} dollars each.",
                ),
                retold=(
                    "Every day Nora collects {all} eggs from her ducks.",
                    "At breakfast {first} of these are eaten.",
                    "Baking takes {second} more.",
                    "Whatever remains goes to the market, at {each} dollars an egg.",
                ),
                asked="How many dollars does she earn a day?",
                why=("left", "How many eggs does she sell a day?"),
                idle="Her neighbour has {idle} geese.",
                rule="The market adds {extra} dollars on top for every day that she comes.",
            ),
            Story(
                told=(
                    "A library has {all} copies of a book.",
                    "{first} of them are lent out.",
                    "{second} of them are lost.",
                    "Each of the others weighs {each} pounds.",
                ),
                retold=(
                    "Of one book a library owns {all} copies.",
                    "Readers have {first} of these at home.",
                    "Another {second} cannot be found.",
                    "Every copy that is left weighs {each} pounds.",
                ),
                asked="How many pounds do the others weigh together?",
                why=("left", "How many copies are neither lent out nor lost?"),
                idle="The library is {idle} years old.",
                rule="They stand in a box that weighs {extra} pounds and counts too.",
            ),
        ),
    ),
    Family(
        program=(("part", "/", "all", 2), ("rest", "-", "all", "part"), ("total", "+", "rest", "more")),
        changed=(("part", "/", "all", 3), ("rest", "-", "all", "part"), ("total", "+", "rest", "more")),
        ranges={"all": (12, 48, 6), "more": (3, 9, 1)},
        stories=(
            Story(
                told=(
                    "A farmer picks {all} apples.",
                    "He gives half of them away.",
                    "Then he buys {more} apples.",
                ),
                retold=(
                    "{all} apples are picked by a farmer.",
                    "He keeps what is left when half of them are given away.",
                    "Later {more} apples that he buys are added.",
                ),
                asked="How many apples has he got now?",
                why=("rest", "How many apples has he got before he buys any?"),
                idle="He has {idle} cows.",
                rule="",
                replaced=("half", "a third"),
            ),
            Story(
                told=(
                    "A bus starts with {all} people.",
                    "At the first stop half of them get out.",
                    "At the second stop {more} people get in.",
                ),
                retold=(
                    "{all} people are on a bus when it starts.",
                    "The first stop is where half of them leave.",
                    "Where it stops next, {more} people join.",
                ),
                asked="How many people are on the bus then?",
                why=("rest", "How many people are on the bus after the first stop?"),
                idle="The driver has worked for {idle} years.",
                rule="",
                replaced=("half", "a third"),
            ),
        ),
    ),
)
"""Programs, each with two stories."""


def problem(family: Family, story: int, numbers: Mapping[str, int], rng: random.Random) -> dict[int, tuple[str, str]]:
    """(question, answer) of the problem and of each of its dimensions. `numbers` have values for all of
    `family.ranges`, and `extra`. ValueError for numbers that the program makes no answer of."""
    told = family.stories[story]
    results = execute(family.program, numbers)
    changed = execute(family.changed, numbers)
    if results is None or changed is None:
        raise ValueError(f"the numbers {dict(numbers)} give no whole answer of at least 0")

    answer = _answer(family, numbers)
    sentences = [sentence.format(**numbers) for sentence in told.told]
    retold = [sentence.format(**numbers) for sentence in told.retold]

    # A number that the program needs, so that nothing can be computed without it.
    hidden = rng.choice(_recoverable(family, numbers))
    gone = rng.choice([i for i, sentence in enumerate(told.told) if "{" in sentence])
    idle = told.idle.format(idle=rng.randint(2, 40))
    place = rng.randint(1, len(sentences))
    other = family.stories[(story + 1) % len(family.stories)]
    # Of the same part as the numbers, so that splits stay apart.
    fresh = _drawn(family, rng, [_part(family, numbers)], unlike=answer)

    old, new = told.replaced
    ruled = [sentence.replace(old, new) if old else sentence for sentence in sentences]
    ruled += [told.rule.format(**numbers)] if told.rule else []
    masked = [sentence.format(**{**{k: str(v) for k, v in numbers.items()}, hidden: "x"}) for sentence in told.told]
    step, why = told.why
    return {
        ORIGINAL: (_text(sentences, told.asked), answer),
        1: (_text(retold, told.asked), answer),
        2: (_text([_scrambled(sentence, rng) for sentence in sentences], _scrambled(told.asked, rng)), UNANSWERABLE),
        3: (_text(sentences[:gone] + sentences[gone + 1 :], told.asked), UNANSWERABLE),
        4: (_text([*sentences[:place], idle, *sentences[place:]], told.asked), answer),
        5: (_text([sentence.format(**numbers) for sentence in other.told], other.asked), answer),
        6: (_text([s.format(**fresh) for s in told.told], told.asked), _answer(family, fresh)),
        7: (_text(ruled, told.asked), str(changed[family.changed[-1][0]])),
        8: (_text(sentences, why), str(results[step])),
        9: (_text(masked, f"{told.asked} The answer to this is {answer}. What is x?"), str(numbers[hidden])),
    }


def rows(size: int, *, seed: int = 0, split: str = "all") -> list[dict[str, Any]]:
    """`size` problems, each with its nine dimensions: 10 rows a problem, one behind the other.

    Columns: `prompt`, `answer`, `completion` (the answer, for a warm-up), `problem` (a number) and `dimension` (0 is
    the problem itself). The splits "train" and "test" share no problem. ValueError for an argument out of range.
    """
    if size < 1 or split not in ("all", "train", "test"):
        raise ValueError(f"size {size} must be at least 1, and split {split!r} one of all, train, test")
    made = []
    for index in range(size):
        rng = random.Random(f"cogmath {split} {seed} {index}")
        family = FAMILIES[index % len(FAMILIES)]
        wanted = {"all": (0, 1, 2), "train": (0, 1), "test": (2,)}[split]
        numbers = _drawn(family, rng, wanted)
        found = problem(family, rng.randrange(len(family.stories)), numbers, rng)
        for dimension, (question, answer) in found.items():
            made.append(
                {
                    "prompt": f"{question}\n{ASK}\n",
                    "answer": answer,
                    "completion": answer,
                    "problem": index,
                    "dimension": dimension,
                }
            )
    return made


def says_unanswerable(text: str) -> bool:
    """Whether a text declares that there is no answer."""
    return _SAYS_SO.search(text) is not None


def passed(completion: str, answer: str, **columns: Any) -> float:
    """1 if the last number of a text is the answer, or, where there is none, if the text says so; else 0."""
    del columns
    if answer == UNANSWERABLE:
        return float(says_unanswerable(completion))
    number = last_number(completion)
    return float(number is not None and not says_unanswerable(completion) and number == int(answer))


def readable(completion: str, **columns: Any) -> float:
    """1 if a text has a number or says that there is no answer; else 0."""
    del columns
    return float(says_unanswerable(completion) or last_number(completion) is not None)


@dataclass(frozen=True)
class Summary:
    """What passes of N problems come to."""

    problems: int
    original: float
    """Share of problems that are solved as they are."""
    rates: Mapping[int, float]
    """Share of problems whose dimension is passed."""
    relative: Mapping[int, float]
    """RPR: the same among the problems that are solved as they are; NaN where none is."""
    mastered: float
    """PR: share of problems that pass all nine."""
    mastered_without_2: float
    """The same without the scrambled words, which a strong reader puts in order and answers."""
    product: float
    """The product of the nine rates: PR if passes were independent."""


def summary(passes: np.ndarray, original: np.ndarray) -> Summary:
    """Of passes [N, 9] and of solved problems [N], both 0 or 1. ValueError for other shapes, or no problem."""
    passes = np.asarray(passes, bool)
    original = np.asarray(original, bool)
    if passes.shape != (len(original), len(DIMENSIONS)) or not len(original):
        raise ValueError(f"passes {passes.shape} must be [N, 9] and original {original.shape} [N], with N above 0")

    rates = passes.mean(axis=0)
    relative = passes[original].mean(axis=0) if original.any() else np.full(len(DIMENSIONS), math.nan)
    others = [i for i, dimension in enumerate(DIMENSIONS) if dimension != 2]
    return Summary(
        problems=len(original),
        original=float(original.mean()),
        rates=dict(zip(DIMENSIONS, rates.tolist())),
        relative=dict(zip(DIMENSIONS, relative.tolist())),
        mastered=float(passes.all(axis=1).mean()),
        mastered_without_2=float(passes[:, others].all(axis=1).mean()),
        product=float(rates.prod()),
    )


def _text(sentences: Sequence[str], question: str) -> str:
    return " ".join([*sentences, question])


def _scrambled(sentence: str, rng: random.Random) -> str:
    """Its words in another order; the sign at its end stays."""
    words = sentence[:-1].split()
    mixed = words
    while mixed == words:
        mixed = rng.sample(words, len(words))
    return " ".join(mixed) + sentence[-1]


def _recoverable(family: Family, numbers: Mapping[str, int]) -> list[str]:
    """The numbers that the answer and the others leave one value for, of those in range."""
    results = execute(family.program, numbers)
    assert results is not None
    last = family.program[-1][0]
    names = []
    for name, (_, high, _) in family.ranges.items():
        found = [execute(family.program, {**numbers, name: value}) for value in range(2 * high + 1)]
        if sum(f is not None and f[last] == results[last] for f in found) == 1:
            names.append(name)
    return names


def _answer(family: Family, numbers: Mapping[str, int]) -> str:
    """Of numbers that the program makes an answer of."""
    results = execute(family.program, numbers)
    assert results is not None
    return str(results[family.program[-1][0]])


def _part(family: Family, numbers: Mapping[str, int]) -> int:
    """0, 1 or 2: by the sum of its numbers, a problem is of one part alone."""
    return sum(numbers[name] for name in family.ranges) % 3


def _drawn(family: Family, rng: random.Random, parts: Collection[int], unlike: str = "") -> dict[str, int]:
    """Numbers of one of these parts, of which the program and the changed one make answers above 0 and not `unlike`."""
    for _ in range(_TRIES):
        numbers = {name: rng.randrange(low, high + 1, step) for name, (low, high, step) in family.ranges.items()}
        numbers["extra"] = rng.randint(3, 9)
        results = execute(family.program, numbers)
        changed = execute(family.changed, numbers)
        if not results or not changed or not all(results.values()):
            continue
        if _part(family, numbers) in parts and _answer(family, numbers) != unlike:
            return numbers
    raise ValueError(f"no numbers in {dict(family.ranges)} give an answer")
