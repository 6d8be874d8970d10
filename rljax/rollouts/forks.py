"""Where to fork: rules over the samples of a prompt so far, and the rounds that apply them. Host side.

A rule gets a `Grown` and returns fork points, best first. Rules that pick by chance draw from `Grown.rng`, whose
numbers depend on the run's seed, the step, the prompt and the round alone. Positions count completion tokens; to fork
*at* token `t` keeps the tokens before it, so that `t` itself is drawn anew.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float

from rljax.rollouts.plans import ForkPlan, ForkPoint, ForkRule
from rljax.sampling import Fork, Rounds, Sample
from rljax.text import StepSplitter, Tokenizer
from rljax.types import NO_PARENT

TokenScore = Callable[["Grown", int], np.ndarray]
"""(samples so far, which one) -> a score for each of its tokens, float [T]."""


@dataclasses.dataclass(frozen=True)
class Grown:
    """The samples of one prompt when a round of forks begins.

    `samples` are those that may be forked: the first `chains` are independent, the others forks of earlier ones.
    `steps` numbers the steps of each one's completion; `limit` is the longest completion.
    """

    samples: Sequence[Sample]
    chains: int
    round: int
    limit: int
    rng: np.random.Generator
    steps: Sequence[np.ndarray]
    tokenizer: Tokenizer

    def root(self, sample: int) -> int:
        """The chain that a sample descends from, which names its tree."""
        while self.samples[sample].parent != NO_PARENT:
            sample = self.samples[sample].parent
        return sample

    def trees(self) -> list[list[int]]:
        """Samples by tree."""
        trees: list[list[int]] = [[] for _ in range(self.chains)]
        for sample in range(len(self.samples)):
            trees[self.root(sample)].append(sample)
        return trees

    def own(self, sample: int) -> Bool[np.ndarray, " T"]:
        """Tokens that the sample itself sampled: neither inherited nor given."""
        mask = self.samples[sample].sampled
        mask[: self.samples[sample].fork_index] = False
        return mask

    def forked_at(self) -> set[tuple[int, int]]:
        """(sample, position) of the forks so far."""
        return {(sample.parent, sample.fork_index) for sample in self.samples if sample.parent != NO_PARENT}

    def step_starts(self, sample: int) -> list[int]:
        """Where the steps after the first begin that the sample itself sampled, and it goes on after."""
        steps = self.steps[sample]
        starts = 1 + np.flatnonzero(np.diff(steps))
        return [int(t) for t in starts if self.own(sample)[t - 1]]


def rounds_of(
    plan: ForkPlan,
    tokenizer: Tokenizer,
    splitter: StepSplitter,
    *,
    seed: int,
    step: int,
    prompt_id: int,
    first_id: int,
    limit: int,
) -> Rounds:
    """The rounds of one prompt under `plan`, for its `Request`. Forks take the sample ids from `first_id` on.

    Points without room for a token of their own are left out.
    """
    made = 0

    def rounds(samples: Sequence[Sample]) -> list[Fork]:
        nonlocal made
        if made == plan.rounds:
            return []
        parents = samples[: plan.parents]
        grown = Grown(
            samples=parents,
            chains=plan.chains,
            round=made,
            limit=limit,
            rng=np.random.default_rng([seed, step, prompt_id, first_id, made]),
            steps=[splitter(sample.tokens) for sample in parents],
            tokenizer=tokenizer,
        )
        made += 1
        points = [p for p in plan.rule(grown) if p.fork_index + len(p.inject) < limit][: plan.points * plan.chains]
        named = enumerate((point for point in points for _ in range(plan.branches)), first_id + len(samples))
        return [Fork(p.parent, p.fork_index, i, p.inject, p.score, p.intervention) for i, p in named]

    return rounds


def random_step(points: int, *, from_root: bool = True) -> ForkRule:
    """For each tree `points` draws, with replacement, among the ends of its steps but the last of a path, and its root
    when `from_root` (Tree-GRPO, 2509.21240)."""

    def rule(grown: Grown) -> list[ForkPoint]:
        chosen = []
        for root, tree in enumerate(grown.trees()):
            nodes = [(root, 0)] if from_root else []
            nodes += [(sample, t) for sample in tree for t in grown.step_starts(sample)]
            if nodes:
                chosen += [ForkPoint(*nodes[i]) for i in grown.rng.integers(len(nodes), size=points)]
        return chosen

    return rule


def random_token(points: int, *, tail: float = 0.1, last_words: Sequence[str] = ()) -> ForkRule:
    """For each tree `points` of its eligible tokens (see `eligible`) by chance: the control of every other rule."""
    return top_tokens(
        lambda grown, sample: grown.rng.random(len(grown.samples[sample].tokens)), points, tail, last_words
    )


def top_surprisal(points: int, *, tail: float = 0.1, last_words: Sequence[str] = ("answer", "conclusion")) -> ForkRule:
    """For each tree its eligible tokens of the highest `-log pi(token)` (EPTree of TreeRL, 2506.11902)."""
    return top_tokens(lambda grown, sample: -grown.samples[sample].logprobs, points, tail, last_words)


def top_entropy(points: int, *, tail: float = 0.1, last_words: Sequence[str] = ("answer", "conclusion")) -> ForkRule:
    """For each tree its eligible tokens drawn from the distributions of the highest entropy."""
    return top_tokens(lambda grown, sample: grown.samples[sample].entropies, points, tail, last_words)


def top_tokens(score: TokenScore, points: int, tail: float = 0.0, last_words: Sequence[str] = ()) -> ForkRule:
    """For each tree the `points` eligible tokens of the highest `score`; ties go to the earlier sample, then token."""

    def rule(grown: Grown) -> list[ForkPoint]:
        chosen = []
        for tree in grown.trees():
            candidates = []
            for sample in tree:
                scores, allowed = score(grown, sample), eligible(grown, sample, tail, last_words)
                candidates += [(-float(scores[t]), sample, int(t)) for t in np.flatnonzero(allowed)]
            chosen += [ForkPoint(sample, t, -negative) for negative, sample, t in sorted(candidates)[:points]]
        return chosen

    return rule


def eligible(grown: Grown, sample: int, tail: float = 0.0, last_words: Sequence[str] = ()) -> Bool[np.ndarray, " T"]:
    """Tokens of a sample that may be drawn anew, bool [T]: its own, but not its first (the same prefix as its own
    fork), not where it was forked before, not the last `tail` of the completion, and nothing after the first of
    `last_words` (compared in lower case), since a fork in the final answer only words it again."""
    tokens = grown.samples[sample].tokens
    allowed = grown.own(sample)
    allowed[grown.samples[sample].fork_index] = False
    allowed[len(tokens) - int(np.ceil(tail * len(tokens))) :] = False
    for parent, position in grown.forked_at():
        if parent == sample and position < len(tokens):
            allowed[position] = False
    if last_words:
        allowed[_first_with(grown.tokenizer, tokens, last_words) + 1 :] = False
    return allowed


def _first_with(tokenizer: Tokenizer, tokens: np.ndarray, words: Sequence[str]) -> int:
    """The first token up to which the text holds one of `words`; the number of tokens if none does."""
    ids = tokens.tolist()

    def holds(count: int) -> bool:
        text = tokenizer.decode(ids[:count]).lower()
        return any(word in text for word in words)

    if not holds(len(ids)):
        return len(ids)
    low, high = 0, len(ids)  # the text grows with the count, so the first place is found by halving
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high - 1


def entropy_jump(window: int = 20, weight: float = 0.2, base: float = 0.5, vocab_size: int = 2) -> ForkRule:
    """At the start of each step after the first, a fork with probability `clip(base + weight * D, 0, 1)`, where `D` is
    the entropy of the `window` tokens from there on less that of the completion's first `window`, each summed and
    divided by `ln vocab_size` (ARPO, 2507.19849, in its released form). Requests come in order of `D`."""

    def rule(grown: Grown) -> list[ForkPoint]:
        found = []
        for sample, grown_sample in enumerate(grown.samples):
            entropies = grown_sample.entropies / np.log(vocab_size)
            baseline = float(entropies[:window].sum())
            for t in grown.step_starts(sample):
                jump = float(entropies[t : t + window].sum()) - baseline
                if grown.rng.random() < np.clip(base + weight * jump, 0, 1):
                    found.append(ForkPoint(sample, t, jump))
        return sorted(found, key=lambda point: -point.score)

    return rule


def standardized(values: Float[np.ndarray, " T"], mask: Bool[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
    """z-scores over `mask` (population std, + 1e-6), 0 off it."""
    if not mask.any():
        return np.zeros(len(values))
    kept = values[mask].astype(np.float64)
    return np.where(mask, (values - kept.mean()) / (kept.std() + 1e-6), 0.0)
