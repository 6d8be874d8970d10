"""The policy as curricula ask it between two rollouts."""

import dataclasses
from collections.abc import Callable, Sequence

from rljax.evaluation.evaluate import EVALUATION_STEP
from rljax.plans import RolloutPlan
from rljax.rollouts import Actor, number_groups, seen_group
from rljax.sampling import SamplingParams, sampling_params
from rljax.tasks import Example, SeenGroup

FIRST_ASKED_STEP = EVALUATION_STEP + 1
"""Step folded into the keys of what is asked before the first rollout; others follow, so that it coincides neither with
training samples nor with those of an evaluation."""


class PolicyPlayer:
    """A `rljax.tasks.Player`: `actor` with the weights that it has, samples drawn from `sampling`, at most `at_once`
    groups at a time.

    `tokens` counts what was sampled since `begin`.
    """

    def __init__(self, actor: Actor, sampling: SamplingParams, at_once: int, can_play: Callable[[Example], bool]):
        self._actor = actor
        self._sampling = sampling
        self._at_once = at_once
        self._can_play = can_play
        self.begin(0)

    def begin(self, step: int) -> None:
        """What is asked from now on is for the rollout of `step`, which names the random numbers."""
        self._step = FIRST_ASKED_STEP + step
        self._seen: dict[int, int] = {}
        self.tokens = 0

    def can_play(self, example: Example) -> bool:
        return self._can_play(example)

    def play(self, examples: Sequence[Example], samples: int, *, temperature: float | None = None) -> list[SeenGroup]:
        sampling = self._sampling
        if temperature is not None:
            sampling = dataclasses.replace(sampling, temperature=sampling_params(temperature).temperature)
        # Of its own, since what is under way for training must not be taken out of its order.
        actor = self._actor.for_evaluation(sampling)
        plan = RolloutPlan(group_size=samples)
        groups: list[SeenGroup] = []
        for start in range(0, len(examples), self._at_once):
            batch = examples[start : start + self._at_once]
            actor.submit(number_groups(batch, samples, self._seen), plan, self._step)
            groups += [seen_group(group) for group in actor.ready(len(batch))]
        self.tokens += sum(group.tokens for group in groups)
        return groups
