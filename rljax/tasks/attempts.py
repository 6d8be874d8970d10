"""Stages around answers of a model: sample them, judge them, make rows of what was right, or wrong and then right.

    with_attempts     ask for answers: the column `attempts`
    judged            the reward of each, and whether it is right
    guided            of rows whose answers are all wrong: ask again, with a hint that the learner will not see
    best_attempts     rejection sampling: a row for each right answer
    criticised        a critique of each answer
    merged            wrong answers, their critiques, then a right one, in one completion (T1, 2501.11651)

An attempt is a JSON object: `text`, `is_whole`, `logprob` (mean of its tokens, or null), and once judged `reward` (null
where the reward failed) and `is_right`.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from rljax.tasks.asking import Complete
from rljax.tasks.examples import Prompt, with_paragraph
from rljax.tasks.judge import question_of
from rljax.tasks.rewards import RewardResult
from rljax.tasks.stages import Row, StageResult, filled

Score: TypeAlias = Callable[[Sequence[tuple[Row, str]]], Sequence[RewardResult]]
"""(row, text of an answer) -> what it is worth, for all of them in one call."""

CRITIC_WRONG = """The answer below is wrong. Say where it goes wrong, and why.

Question: {question}

Right result: {answer}

Answer: {attempt}"""
CRITIC_RIGHT = """The answer below is right. Verify it, step by step.

Question: {question}

Answer: {attempt}"""


def with_attempts(rows: Sequence[Row], *, complete: Complete, count: int) -> StageResult:
    """Rows with `count` answers each. Rows that have attempts are left as they are; a row's column `asked`, if it has
    one, is what is asked in place of its prompt."""
    prompts: list[Prompt] = [row["asked"] if "asked" in row else row["prompt"] for row in rows if "attempts" not in row]
    answers = iter(complete(prompts, count))
    made = [
        row if "attempts" in row else {**row, "attempts": [answer._asdict() for answer in next(answers)]}
        for row in rows
    ]
    new = [attempt for row, was in zip(made, rows, strict=True) if row is not was for attempt in row["attempts"]]
    cut_off = sum(not attempt["is_whole"] for attempt in new)
    return StageResult(made, figures={"answers": len(new), "cut off": cut_off})


def judged(rows: Sequence[Row], *, score: Score) -> StageResult:
    """Rows whose attempts say what they are worth; those that say so already are left alone. An answer that was cut off
    is never right: what would be learned from it is to end there."""
    pairs = [(row, attempt) for row in rows for attempt in row["attempts"] if "reward" not in attempt]
    results = iter(score([(row, attempt["text"]) for row, attempt in pairs]))

    def with_reward(attempt: dict[str, Any]) -> dict[str, Any]:
        if "reward" in attempt:
            return attempt
        result = next(results)
        reward = result.value if result.is_valid else None
        return {**attempt, "reward": reward, "is_right": result.is_solved and attempt["is_whole"]}

    made = [{**row, "attempts": [with_reward(attempt) for attempt in row["attempts"]]} for row in rows]
    shares = [share for row in made if (share := pass_rate(row)) is not None]
    figures = {
        "pass rate": sum(shares) / len(shares) if shares else 0.0,
        "solved": sum(share > 0 for share in shares) / len(shares) if shares else 0.0,
        "reward failed": sum(attempt["reward"] is None for row in made for attempt in row["attempts"]),
    }
    return StageResult(made, figures=figures)


def pass_rate(row: Row) -> float | None:
    """Share of a row's attempts that are right, of those whose reward did not fail; None without any."""
    rated = [attempt for attempt in row["attempts"] if attempt["reward"] is not None]
    return sum(attempt["is_right"] for attempt in rated) / len(rated) if rated else None


def guided(rows: Sequence[Row], *, column: str, note: str = "Hint: {}") -> StageResult:
    """Rows without a right attempt are to be asked again (`asked`) with what stands in `column` as a last paragraph of
    the prompt; their attempts are forgotten. The prompt itself stays: what is answered with the hint is learned without
    it, as in STaR's rationalisation (2203.14465). Other rows, and those without the column, stay as they are."""
    made = []
    for row in rows:
        is_hopeless = not any(attempt["is_right"] for attempt in row["attempts"])
        if is_hopeless and row.get(column):
            asked = with_paragraph(row["prompt"], note.format(row[column]))
            row = {**_without_attempts(row), "asked": asked}
        made.append(row)
    return StageResult(made, figures={"asked again": sum("attempts" not in row for row in made)})


def best_attempts(rows: Sequence[Row], *, at_most: int = 1) -> StageResult:
    """Rejection sampling: for each row the first `at_most` different right attempts, each a row of its own with the
    column `completion` in place of `attempts`, and with the `pass_rate` of them all.

    The first, and not the likeliest or shortest, so that right answers are kept as the model gives them.
    """
    made = []
    dropped = []
    for row in rows:
        rest = _without_attempts(row)
        texts = list(dict.fromkeys(attempt["text"] for attempt in row["attempts"] if attempt["is_right"]))
        if not texts:
            dropped.append((row, "no right answer"))
        for text in texts[:at_most]:
            made.append({**rest, "completion": text, "pass_rate": pass_rate(row)})
    return StageResult(made, dropped, {"prompts": len(rows) - len(dropped)})


def criticised(
    rows: Sequence[Row], *, complete: Complete, wrong: str = CRITIC_WRONG, right: str = CRITIC_RIGHT
) -> StageResult:
    """Rows whose attempts have a `critique` each: where a wrong one fails, a verification of a right one. The templates
    may name `{question}` and `{attempt}`, and columns of the row. ValueError for a column that a row lacks."""
    prompts = [
        filled(
            right if attempt["is_right"] else wrong,
            row,
            question=question_of(row["prompt"]),
            attempt=attempt["text"],
        )
        for row in rows
        for attempt in row["attempts"]
    ]
    answers = iter(complete(prompts, 1))
    made = []
    for row in rows:
        attempts = [{**attempt, "critique": next(answers)[0].text} for attempt in row["attempts"]]
        made.append({**row, "attempts": attempts})
    return StageResult(made)


def merged(rows: Sequence[Row], *, max_wrong: int = 2, joint: str = "\n\n", longest: int | None = None) -> StageResult:
    """T1's chain of trial and error, as the column `completion`: at most `max_wrong` wrong attempts, the one that the
    model was surest of first, then the surest right one, each followed by its critique:

        y1 c1 y2 c2 y* c*

    Wrong attempts are read and not learned: the completion is in pieces that say so (`rljax.experiment.sft`). A row
    without a wrong or a right attempt is dropped, and so is a chain of more than `longest` characters.
    """
    made = []
    dropped = []
    for row in rows:
        whole = [attempt for attempt in row["attempts"] if attempt["is_whole"] and attempt["reward"] is not None]
        # A stable sort: without log-probs attempts stay in their order.
        surest = sorted(whole, key=lambda attempt: -(attempt["logprob"] or 0.0))
        wrong = [attempt for attempt in surest if not attempt["is_right"]]
        right = [attempt for attempt in surest if attempt["is_right"]]
        if not wrong or not right:
            dropped.append((row, "no right attempt" if not right else "no wrong attempt"))
            continue

        chain = [*wrong[:max_wrong], right[0]]
        pieces = []
        for attempt in chain:
            is_last = attempt is chain[-1]
            pieces.append({"text": attempt["text"] + joint, "learned": is_last})
            pieces.append({"text": attempt["critique"] + ("" if is_last else joint), "learned": True})
        if longest is not None and sum(len(piece["text"]) for piece in pieces) > longest:
            dropped.append((row, f"longer than {longest} characters"))
            continue
        made.append({**_without_attempts(row), "completion": pieces})
    return StageResult(made, dropped)


def _without_attempts(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in ("attempts", "asked")}
