"""Many answers to one question, and a rule that takes one of them: parallel test-time scaling (2601.05432, 2509.10446).

A rule is a function of `Candidates` that gives an index. It never sees a reward: `Candidates` has none.
`expected_score` says what a rule comes to, `at_k` for several numbers of samples.
"""

import itertools
import math
import random
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Candidates(NamedTuple):
    """The answers to one question, one entry of each list an answer. Lists that a rule does not read may be empty."""

    answers: Sequence[Hashable | None]
    """In canonical form, so that equal ones compare equal; None where none could be read."""
    texts: Sequence[str] = ()
    """What was said and found on the way to them."""
    confidences: Sequence[float] = ()
    """How sure the policy was, higher is surer; comparable within a question alone."""
    calls: Sequence[int] = ()
    """Calls of tools."""

    def taken(self, indices: Sequence[int]) -> "Candidates":
        """Those of these indices, in this order."""
        parts = ([values[i] for i in indices] if len(values) else [] for values in self)
        return Candidates._make(parts)


Select = Callable[[Candidates], int]
"""A rule: the index of the answer that it takes. Every rule here takes 0 where nothing could be read."""


def first(candidates: Candidates) -> int:
    """The first one: what a single sample comes to."""
    return 0


def majority(candidates: Candidates) -> int:
    """The first of the most frequent answer; of equally frequent ones that with the higher sum of confidences, then
    the one that came first."""
    votes = _votes(candidates, [1.0] * len(candidates.answers))
    sure = _votes(candidates, candidates.confidences or [0.0] * len(candidates.answers))
    return _first_of(candidates, lambda answer: (votes[answer], sure[answer]))


def weighted_majority(candidates: Candidates) -> int:
    """The first of the answer with the highest sum of confidences."""
    votes = _votes(candidates, candidates.confidences)
    return _first_of(candidates, lambda answer: votes[answer])


def borda(power: float) -> Select:
    """A vote in which the n-th surest of N answers counts `(N - n)^power`, n from 0: 0 is the majority, and a high
    power takes the surest answer (2502.18581)."""

    def select(candidates: Candidates) -> int:
        count = len(candidates.answers)
        order = sorted(range(count), key=lambda i: -candidates.confidences[i])
        weights = [0.0] * count
        for rank, i in enumerate(order):
            weights[i] = float((count - rank) ** power)
        votes = _votes(candidates, weights)
        return _first_of(candidates, lambda answer: votes[answer])

    return select


def surest(candidates: Candidates) -> int:
    """The answer with the highest confidence: best-of-N, where the confidences are scores of a reward model."""
    return max(_readable(candidates), key=lambda i: candidates.confidences[i], default=0)


def fewest_calls(candidates: Candidates) -> int:
    """The answer that took the fewest calls, since long searches are those that went wrong; then the surer one
    (2509.10446). One without an answer does not count."""
    sure = candidates.confidences or [0.0] * len(candidates.answers)
    return min(_readable(candidates), key=lambda i: (candidates.calls[i], -sure[i]), default=0)


def medoid(utility: Callable[[Hashable, Hashable], float]) -> Select:
    """The answer that is worth most on average if each of the others were the right one: minimum Bayes risk, for
    answers that are more or less right. `utility(answer, right)`."""

    def select(candidates: Candidates) -> int:
        readable = _readable(candidates)

        def worth(i: int) -> float:
            return math.fsum(utility(candidates.answers[i], candidates.answers[j]) for j in readable if j != i)

        return max(readable, key=worth, default=0)

    return select


PROMPT = """Several answers to a question are below, each with what was found on the way to it. Weigh what was found
against the question, and say which answer is right.

Question: {question}

{answers}

Reply with the number of the best answer alone."""


def verifier_prompt(
    question: str, candidates: Candidates, *, order: Sequence[int], max_chars: int = 2000, prompt: str = PROMPT
) -> str:
    """What a verifier reads: the `texts` in this `order`, numbered from 1, each cut to its last `max_chars` characters
    so that none has more room than another. Rewards are not among what it is made of."""
    shown = [f"Answer {n}:\n{candidates.texts[i][-max_chars:]}" for n, i in enumerate(order, start=1)]
    return prompt.format(question=question, answers="\n\n".join(shown))


def by_verifier(
    question: str, ask: Callable[[str], str], *, seed: int = 0, max_chars: int = 2000, prompt: str = PROMPT
) -> Select:
    """The answer that a verifier names: `ask` is a language model, or anything that takes `verifier_prompt` and replies
    with a number, such as `ChatEndpoint.ask` around one message (2601.05432).

    Answers are shuffled by `seed` and the question, since verifiers prefer places. A reply without a number of an
    answer leaves the choice to the majority, and nothing is asked where no answer could be read.
    """

    def select(candidates: Candidates) -> int:
        if not _readable(candidates):
            return 0
        order = list(range(len(candidates.answers)))
        random.Random(f"verifier {seed} {question}").shuffle(order)
        reply = ask(verifier_prompt(question, candidates, order=order, max_chars=max_chars, prompt=prompt))
        number = re.search(r"\d+", reply)
        chosen = int(number[0]) if number and len(number[0]) < 10 else 0
        return order[chosen - 1] if 1 <= chosen <= len(order) else majority(candidates)

    return select


def expected_score(
    select: Select, candidates: Candidates, scores: ArrayLike, k: int, *, draws: int = 64, seed: int = 0
) -> float:
    """The score of what `select` takes of `k` of the answers, on average over subsets of size k: all of them, or as
    many as `draws`, drawn with `seed`. `scores` [N] stay here; the rule does not see them. ValueError for k outside
    [1, N]."""
    scores = np.asarray(scores, np.float64)
    values = [scores[subset[select(candidates.taken(subset))]] for subset in _subsets(len(scores), k, draws, seed)]
    return float(np.mean(values))


def oracle_score(scores: ArrayLike, k: int, *, draws: int = 64, seed: int = 0) -> float:
    """The best score of the same subsets: what no rule exceeds, and none can see. ValueError as `expected_score`."""
    scores = np.asarray(scores, np.float64)
    return float(np.mean([scores[subset].max() for subset in _subsets(len(scores), k, draws, seed)]))


def efficiency(chosen: float, mean: float, best: float) -> float:
    """The share of what selection could gain that a rule gains, `(chosen - mean) / (best - mean)`; NaN where all
    answers of every question are worth the same."""
    return (chosen - mean) / (best - mean) if best > mean else math.nan


def at_k(
    rules: Mapping[str, Callable[[int], Select]],
    table: Sequence[Candidates],
    scores: Sequence[ArrayLike],
    ks: Sequence[int],
    *,
    draws: int = 64,
) -> dict[str, dict[int, float]]:
    """Means over questions: of each rule, of `mean` (a single sample) and of `oracle`, for each number of samples.

    A rule is made for each question, `make(index)`, so that one may read the question. ValueError as
    `expected_score`.
    """
    found: dict[str, dict[int, float]] = {"mean": {}, **{name: {} for name in rules}, "oracle": {}}
    for k in ks:
        found["mean"][k] = float(np.mean([np.mean(np.asarray(s, np.float64)) for s in scores]))
        for name, make in rules.items():
            chosen = [
                expected_score(make(i), candidates, own, k, draws=draws, seed=i)
                for i, (candidates, own) in enumerate(zip(table, scores, strict=True))
            ]
            found[name][k] = float(np.mean(chosen))
        found["oracle"][k] = float(np.mean([oracle_score(own, k, draws=draws, seed=i) for i, own in enumerate(scores)]))
    return found


def _readable(candidates: Candidates) -> list[int]:
    return [i for i, answer in enumerate(candidates.answers) if answer is not None]


def _votes(candidates: Candidates, weights: Sequence[float]) -> dict[Hashable, float]:
    votes: dict[Hashable, float] = {}
    for answer, weight in zip(candidates.answers, weights, strict=True):
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + weight
    return votes


def _first_of(candidates: Candidates, key: Callable[[Hashable], float | tuple[float, float]]) -> int:
    """The first index of the answer with the highest key; of equal keys, of the answer that came first."""
    readable = _readable(candidates)
    if not readable:
        return 0
    best = max(key(candidates.answers[i]) for i in readable)
    return next(i for i in readable if key(candidates.answers[i]) == best)


def _subsets(count: int, k: int, draws: int, seed: int) -> list[list[int]]:
    """Subsets of size k, in the order of the samples."""
    if not 1 <= k <= count:
        raise ValueError(f"k={k} must lie in [1, {count}], the number of answers; draw more")
    if math.comb(count, k) <= draws:
        return [list(subset) for subset in itertools.combinations(range(count), k)]
    rng = random.Random(f"subsets {seed} {count} {k}")
    return [sorted(rng.sample(range(count), k)) for _ in range(draws)]
