"""The rounds of forks of one prompt, as its request to the decoder."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rljax.plans import ForkPlan
from rljax.plans.fork_rules import PartialGroup, partial_batch
from rljax.sampling import Fork, Rounds, Sample


def rounds_of(
    plan: ForkPlan,
    decode: Callable[[Sequence[int]], str],
    steps_of: Callable[[Sample], np.ndarray],
    *,
    seed: int,
    step: int,
    prompt_id: int,
    first_id: int,
    limit: int,
) -> Rounds:
    """The rounds of one prompt under `plan`, for its `Request`; `steps_of` numbers the steps of a sample.

    Forks take the sample ids from `first_id` on; `limit` is the longest completion. Points without room for a token of
    their own are left out.
    """
    made = 0

    def rounds(samples: Sequence[Sample]) -> list[Fork]:
        nonlocal made
        if made == plan.rounds:
            return []
        parents = samples[: plan.parents]
        numbers = np.random.SeedSequence([seed, step, prompt_id, first_id, made]).generate_state(2)
        group = PartialGroup(
            batch=partial_batch(parents, plan.parents, limit, [steps_of(sample) for sample in parents]),
            chains=plan.chains,
            round=made,
            key=jax.random.wrap_key_data(jnp.asarray(numbers), impl="threefry2x32"),
            decode=decode,
        )
        made += 1
        points = [p for p in plan.rule(group) if p.fork_index + len(p.inject) < limit][: plan.points * plan.chains]
        named = enumerate((point for point in points for _ in range(plan.branches)), first_id + len(samples))
        return [Fork(p.parent, p.fork_index, i, p.inject, p.score, p.intervention) for i, p in named]

    return rounds
