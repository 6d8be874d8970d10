"""The rounds of forks of one prompt, as its request to the decoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from rljax.plans import NEWEST_LOGPROBS, ForkPlan
from rljax.plans.fork_rules import PartialGroup, partial_batch
from rljax.sampling import Fork, Sample


@dataclass
class ForkRounds:
    """The rounds of one prompt under `plan`: called with all samples so far, gives the forks of the next round.

    Attributes:
        plan: how the samples branch.
        decode: token ids to text.
        steps_of: numbers the steps of a sample, int32 [T].
        seed, step, prompt_id: with the round, these name the random numbers of the rule.
        first_id: forks take the sample ids from here on.
        limit: tokens of the longest completion; a point without room for a token of its own is left out.
        score: log-probs of samples under the weights that forks are sampled with, float32 [T] each; None where the
            samples are theirs.
        made: rounds made so far.
    """

    plan: ForkPlan
    decode: Callable[[Sequence[int]], str]
    steps_of: Callable[[Sample], np.ndarray]
    seed: int
    step: int
    prompt_id: int
    first_id: int
    limit: int
    score: Callable[[Sequence[Sample]], Sequence[np.ndarray]] | None = None
    made: int = 0

    def __call__(self, samples: Sequence[Sample]) -> list[Fork]:
        """The next round; `[]` once all rounds are made."""
        plan = self.plan
        if self.made == plan.rounds:
            return []

        parents = samples[: plan.parents]
        columns = {} if self.score is None else {NEWEST_LOGPROBS: self.score(parents)}
        numbers = np.random.SeedSequence([self.seed, self.step, self.prompt_id, self.first_id, self.made])
        group = PartialGroup(
            batch=partial_batch(
                parents, plan.parents, self.limit, [self.steps_of(sample) for sample in parents], columns
            ),
            chains=plan.chains,
            round=self.made,
            key=jax.random.wrap_key_data(jnp.asarray(numbers.generate_state(2)), impl="threefry2x32"),
            decode=self.decode,
        )
        self.made += 1

        points = [point for point in plan.rule(group) if point.fork_index + len(point.inject) < self.limit]
        points = points[: plan.points * plan.chains]
        branches = (point for point in points for _ in range(plan.branches))
        return [
            Fork(point.parent, point.fork_index, sample_id, point.inject, point.score, point.intervention)
            for sample_id, point in enumerate(branches, self.first_id + len(samples))
        ]
