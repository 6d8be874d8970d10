"""Stages that add what another model says of a row, and that choose and lay out what is learned of it.

annotated     fields of a row, each the answer to a question about it (TeacherLM, 2310.19019)
kept          rows that all rules hold of, in a fixed order; the others with the rule that they broke
laid_out      fields as one completion, some of them left out at random
with_modes    some prompts are answered at once, the others behind a thought (hybrid thinking)
longer_half   prompts with the longer answers (GLM-4.5, 2508.06471)
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rljax.tasks.answers import Extractor, whole_completion
from rljax.tasks.asking import Complete
from rljax.tasks.examples import digest, with_paragraph
from rljax.tasks.judge import question_of
from rljax.tasks.stages import Row, StageResult, filled
from rljax.tasks.text_rewards import most_frequent_window

Rule: TypeAlias = Callable[[Row], bool]
"""Whether a row stays."""

TEACHER_QUESTIONS: Mapping[str, str] = {
    "fundamentals": "Question: {question}\nAnswer: {answer}\n\nWhat does one have to know to answer this question?",
    "chain_of_thought": "Question: {question}\nAnswer: {answer}\n\nExplain, step by step, why this is the answer.",
    "common_mistakes": "Question: {question}\nAnswer: {answer}\n\nWhich mistakes are common with such questions? Do "
    "not repeat the answer.",
}
"""TeacherLM's three annotations, in words of ours: the paper's annotators are models of their own."""


def annotated(rows: Sequence[Row], *, complete: Complete, questions: Mapping[str, str]) -> StageResult:
    """Rows with a column for each of `questions`, a template that may name `{question}` (the prompt) and columns of the
    row. A row whose answer is empty or was cut off is dropped. ValueError for a column that a row lacks."""
    asked = [
        filled(template, row, question=question_of(row["prompt"])) for row in rows for template in questions.values()
    ]
    answers = iter(complete(asked, 1))

    made = []
    dropped = []
    for row in rows:
        given = {name: next(answers)[0] for name in questions}
        bad = [name for name, answer in given.items() if not answer.is_whole or not answer.text.strip()]
        if bad:
            dropped.append((row, f"no {bad[0]}"))
        else:
            made.append({**row, **{name: answer.text.strip() for name, answer in given.items()}})
    return StageResult(made, dropped)


def kept(rows: Sequence[Row], *, rules: Mapping[str, Rule]) -> StageResult:
    """Rows that every one of `rules` holds of. Others are dropped for the first that does not, in the order of
    `rules`."""
    made = []
    dropped = []
    for row in rows:
        broken = next((name for name, holds in rules.items() if not holds(row)), None)
        if broken is None:
            made.append(row)
        else:
            dropped.append((row, broken))
    return StageResult(made, dropped)


@dataclass(frozen=True)
class Within:
    """The number in `column` is at least `least` and at most `most`, of which None is no bound; a row without it
    stays."""

    column: str
    least: float | None = None
    most: float | None = None

    def __call__(self, row: Row) -> bool:
        value = row.get(self.column)
        if value is None:
            return True
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


@dataclass(frozen=True)
class Reaches:
    """What is extracted from the text in `column` equals the text in the column `answer`: of a checker that has seen a
    chain of thought and not the answer, that the chain leads there."""

    column: str
    answer: str = "answer"
    extract: Extractor = whole_completion

    def __call__(self, row: Row) -> bool:
        return self.extract(row[self.column]) == str(row[self.answer])


@dataclass(frozen=True)
class Withholds:
    """The text in `column` does not hold the text in the column `answer`: a mistake that does is none."""

    column: str
    answer: str = "answer"

    def __call__(self, row: Row) -> bool:
        return str(row[self.answer]) not in row[self.column]


@dataclass(frozen=True)
class NotRepetitive:
    """No stretch of `window` characters occurs `most` times or more in the text in `column` (T1's rule for degenerate
    text)."""

    column: str = "completion"
    window: int = 80
    most: int = 20

    def __call__(self, row: Row) -> bool:
        return most_frequent_window(row[self.column], window=self.window) < self.most


def laid_out(
    rows: Sequence[Row], *, fields: Mapping[str, str], end: str = "{answer}", dropout: float = 0.0, seed: int = 0
) -> StageResult:
    """Rows with a `completion`: the `fields` of a row in their order, each by its template, such as
    `"Common mistakes: {}\\n"`, then `end`, which may name columns.

    Each field is left out of a row with probability `dropout`, so that the student also works without; `end` never is.
    It depends on (seed, prompt, end, field) alone. ValueError for a `dropout` that is no probability, and for a column
    of `end` that a row lacks.
    """
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout={dropout} must be at least 0 and at most 1")
    made = []
    for row in rows:
        last = filled(end, row)
        told = [name for name in fields if _uniform(seed, row["prompt"], last, name) >= dropout]
        parts = [fields[name].format(row[name]) for name in told]
        made.append({**row, "completion": "".join(parts) + last, "fields": told})
    count = sum(len(row["fields"]) for row in made)
    return StageResult(made, figures={"fields a row": count / max(1, len(made))})


def with_modes(
    rows: Sequence[Row],
    *,
    direct_share: float,
    seed: int = 0,
    thought: str = "thought",
    answer: str = "answer",
    block: str = "<think>\n{}\n</think>\n\n",
    flags: tuple[str, str] = ("/think", "/no_think"),
) -> StageResult:
    """Hybrid thinking: with probability `direct_share` a prompt is answered at once, behind an empty block that is read
    and not learned; else behind the block with its `thought`, which is. The prompt carries one of `flags` as its last
    paragraph. A prompt has one mode in all of its rows, by (seed, prompt) alone."""
    if not 0 <= direct_share <= 1:
        raise ValueError(f"direct_share={direct_share} must be at least 0 and at most 1")
    made = []
    for row in rows:
        is_direct = _uniform(seed, row["prompt"]) < direct_share
        pieces = [
            {"text": block.format("" if is_direct else row[thought]), "learned": not is_direct},
            {"text": str(row[answer]), "learned": True},
        ]
        mode = {"mode": "direct" if is_direct else "thinking", "completion": pieces}
        made.append({**row, **mode, "prompt": with_paragraph(row["prompt"], flags[is_direct])})
    direct = sum(row["mode"] == "direct" for row in made)
    return StageResult(made, figures={"direct": direct / max(1, len(made))})


def longer_half(rows: Sequence[Row], *, column: str = "completion") -> StageResult:
    """Rows without the half, rounded down, that is shortest in `column`; of equal lengths the first are shorter."""
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i][column]))
    short = set(by_length[: len(rows) // 2])
    made = [row for i, row in enumerate(rows) if i not in short]
    return StageResult(made, [(rows[i], "of the shorter half") for i in sorted(short)])


def _uniform(*about: Any) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    return random.Random(digest(list(about))).random()
