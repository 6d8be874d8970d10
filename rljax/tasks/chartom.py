"""What a character of a story believes, intends, wants and feels, which the scene at hand does not tell.

The dimensions are those of CharToM-QA (2501.01705), whose questions are about novels. Here stories are generated
(`rljax.tasks.chartom_stories`), each scene seen by who is there, and every answer is computed.

`score` needs no judge. `judged` asks one, a plain function from text to text, which points of the reference an answer
makes and what is wrong with it.
"""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rljax.tasks.chartom_stories import CLOSING, Question, Scene, make_story
from rljax.tasks.stories import FULL, check_rows, draw_cast, listed, shown

SUITE = "chartom"
KINDS = {
    "belief": "where somebody thinks that a thing is",
    "belief2": "where somebody thinks that another one would look",
    "intention": "what somebody is going to do",
    "desire": "what somebody likes best",
    "emotion": "what somebody feels",
}
CHOICE = "choice"
GENERATIVE = "generative"
MODES = (CHOICE, GENERATIVE)
LETTERS = "ABCD"
SHORTEST = 1500
"""Characters of a story."""
DEFECTS = (
    "it contradicts the reference",
    "it states something about the story that the reference does not support",
    "it does not answer the question",
)

COVERED_PROMPT = """Which of the numbered points does the answer make? Wording does not count.

Question: {question}
Answer: {answer}
Points:
{points}

Reply with their numbers and commas alone, such as: 1, 3. Reply None if it makes none of them."""
DEFECTS_PROMPT = """Which of the numbered faults does the answer have?

Question: {question}
Reference: {reference}
Answer: {answer}
Faults:
{points}

Reply with their numbers and commas alone, such as: 1, 3. Reply None if it has none of them."""

Judge = Callable[[str], str]
"""A reply to a prompt, such as `lambda text: endpoint.ask([{"role": "user", "content": text}])`."""

_FIRST_LETTER = re.compile(r"^\W*([A-D])(?:[).:,]|\W*$)")
_MARKED_LETTER = re.compile(r"\(([A-D])\)|\b(?i:answer|choice|option)\s*(?:is|:)?\s*([A-D])\b")


def rows(
    size: int,
    *,
    seed: int = 0,
    split: str = "all",
    length: int = 4000,
    windows: Sequence[int] = (FULL,),
    modes: Sequence[str] = (CHOICE,),
) -> list[dict[str, Any]]:
    """`size` stories of about `length` characters, each with a question of each kind, asked in each window and mode:
    `5 * len(windows) * len(modes)` rows a story.

    A window is the number of characters, in whole scenes, that are shown before the last four scenes; 0 shows these
    alone and `FULL` all. Columns: `prompt`, `answer` (a letter, or the reference), `completion` (the same, for a
    warm-up), `suite`, `item` (number of the story), `kind`, `mode`, `window`, `question`, `options`, `roles` (of the
    options), `reference`, `points`, `words` (that tell the points), and `visible`: whether the window shows all that
    the answer follows from. The splits "train" and "test" share no story. ValueError for an argument out of range.
    """
    check_rows(size, length, windows, shortest=SHORTEST)
    if not modes or not set(modes) <= set(MODES):
        raise ValueError(f"modes {list(modes)} must be some of {', '.join(MODES)}")
    made = []
    for index in range(size):
        rng = random.Random(f"{SUITE} {split} {seed} {index}")
        cast = draw_cast(rng, 4, split)
        scenes, questions = make_story(rng, cast, length)
        for question in questions:
            options = rng.sample(question.options, len(question.options))
            for window in windows:
                shared = _shared(index, cast, scenes, question, options, window)
                made += [{**shared, **_asked(shared, question, mode)} for mode in modes]
    return made


def read_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter that a text chooses: the one it begins with, else the last that is marked as the answer, else that of
    the only option whose words it has. None without one."""
    first = _FIRST_LETTER.search(text.strip())
    if first is not None:
        return first[1]
    marked = _MARKED_LETTER.findall(text)
    if marked:
        return "".join(marked[-1])
    named = [i for i, option in enumerate(options) if re.search(rf"\b{re.escape(option)}\b", text, re.IGNORECASE)]
    return LETTERS[named[0]] if len(named) == 1 else None


def cut(text: str, reference: str) -> str:
    """As many of the first words of a text as may be judged: half more than the reference has, and at least five
    more."""
    count = len(reference.split())
    return " ".join(text.split()[: max(count + 5, math.floor(1.5 * count))])


def told_points(text: str, words: Sequence[str]) -> frozenset[int]:
    """Numbers, from 1, of the points whose word stands in the text."""
    found = {word.lower() for word in re.findall(r"\w+", text)}
    return frozenset(i for i, word in enumerate(words, 1) if word.lower() in found)


def score(row: Mapping[str, Any], text: str) -> dict[str, float]:
    """Of an answer to a row, without a judge: `right` (the right letter, 0 or 1) or, without options, `covered` (share
    of the points that it tells, after `cut`); and `readable`: whether it has a letter, or any word."""
    if row["mode"] == CHOICE:
        letter = read_letter(text, row["options"])
        return {"right": float(letter == row["answer"]), "readable": float(letter is not None)}
    told = told_points(cut(text, row["reference"]), row["words"])
    return {"covered": len(told) / len(row["words"]), "readable": float(bool(text.split()))}


def right(completion: str, **columns: Any) -> float:
    """The right letter (0 or 1), or the share of points that are told."""
    found = score(columns, completion)
    return found["right"] if "right" in found else found["covered"]


def read_numbers(reply: str, count: int) -> frozenset[int] | None:
    """The numbers of a judge's reply from 1 to `count`: `1,3`, `1, 3` or `[1, 3]`, none for `None`. Others are left
    out, and a reply of another form is missing: None, which is neither a point nor a fault."""
    text = reply.strip().removesuffix(".").removeprefix("[").removesuffix("]").replace(" ", "")
    if text.lower() == "none":
        return frozenset()
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        return None
    return frozenset(number for number in map(int, text.split(",")) if 1 <= number <= count)


@dataclass(frozen=True)
class Verdict:
    """What a judge said of an answer."""

    points: int
    """Of the reference."""
    covered: frozenset[int] | None
    """Numbers of the points that the answer makes; None where the reply could not be read."""
    defects: frozenset[int] | None
    """Numbers of what is wrong with it; likewise."""


def judged(row: Mapping[str, Any], text: str, judge: Judge) -> Verdict:
    """Asks a judge twice about an answer to a row, after `cut`: for the points that it makes, and for its faults."""
    answer = cut(text, row["reference"])
    covered = COVERED_PROMPT.format(question=row["question"], answer=answer, points=_numbered(row["points"]))
    faults = DEFECTS_PROMPT.format(
        question=row["question"], reference=row["reference"], answer=answer, points=_numbered(DEFECTS)
    )
    return Verdict(
        points=len(row["points"]),
        covered=read_numbers(judge(covered), len(row["points"])),
        defects=read_numbers(judge(faults), len(DEFECTS)),
    )


@dataclass(frozen=True)
class Summary:
    """What verdicts come to; NaN where none could be read."""

    answers: int
    bpc: float
    """Bonus point coverage: points that are made of all points, over answers whose reply could be read."""
    penalty_rate: float
    """Share with any fault, likewise."""
    missing: float
    """Share of replies that could not be read."""


def summary(verdicts: Sequence[Verdict]) -> Summary:
    """Of verdicts on answers. ValueError for none."""
    if not verdicts:
        raise ValueError("0 verdicts; at least one is needed")
    read = [verdict for verdict in verdicts if verdict.covered is not None]
    total = sum(verdict.points for verdict in read)
    covered = sum(len(verdict.covered or ()) for verdict in read)
    faults = [bool(verdict.defects) for verdict in verdicts if verdict.defects is not None]
    return Summary(
        answers=len(verdicts),
        bpc=covered / total if total else math.nan,
        penalty_rate=sum(faults) / len(faults) if faults else math.nan,
        missing=1 - (len(read) + len(faults)) / (2 * len(verdicts)),
    )


def _numbered(texts: Sequence[str]) -> str:
    """A line for each, from 1."""
    return "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))


def _shared(
    index: int,
    cast: Sequence[str],
    scenes: Sequence[Scene],
    question: Question,
    options: Sequence[tuple[str, str]],
    window: int,
) -> dict[str, Any]:
    """What the rows of all modes have; the prompt is the story alone."""
    texts = [scene.told() for scene in scenes]
    start = len(texts) - CLOSING - shown(texts[:-CLOSING], window)
    return {
        "prompt": "\n".join([f"A story of {listed(cast)}.", *texts[start:]]),
        "suite": SUITE,
        "item": index,
        "kind": question.kind,
        "window": window,
        "question": question.text,
        "options": [text for _, text in options],
        "roles": [role for role, _ in options],
        "reference": question.reference,
        "points": [point for point, _ in question.points],
        "words": [word for _, word in question.points],
        "visible": set(question.scenes) <= set(scenes[start:]),
    }


def _asked(shared: Mapping[str, Any], question: Question, mode: str) -> dict[str, Any]:
    """The columns of a mode."""
    hints = [f" ({question.hints[option]})" if question.hints else "" for option in shared["options"]]
    if mode == CHOICE:
        options = zip(LETTERS, shared["options"], hints, strict=True)
        listing = "\n".join(f"({letter}) {option}{hint}" for letter, option, hint in options)
        asked = f"{question.text}\n{listing}\nAnswer with one letter."
        answer = LETTERS[shared["roles"].index("answer")]
    else:
        listing = "; ".join(f"{option}{hint}" for option, hint in zip(shared["options"], hints, strict=True))
        asked = question.text + (f" It is one of: {listing}." if question.hints else "") + "\nAnswer in one sentence."
        answer = question.reference
    prompt = f"{shared['prompt']}\n\nNobody knows what happened where they were not.\n{asked}\n"
    return {"prompt": prompt, "answer": answer, "completion": answer, "mode": mode}
