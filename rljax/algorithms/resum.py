"""Solutions branched at summaries, with credit from the contrast."""

import dataclasses
from collections.abc import Callable

from rljax.advantages import AdvantageFn, summary_bonus_released, summary_contrast, summary_own_group
from rljax.algorithms.base import Algorithm, Encode, encoded_phrases
from rljax.algorithms.forest import ForestRecipe
from rljax.losses import sequence_mean
from rljax.plans.fork_rules import summary_points


def paper(recipe: "ReSum", detect: list[list[int]]) -> AdvantageFn:
    """Every row against rows with a summary and against rows without."""
    return summary_contrast(detect, only_if_correct=recipe.reward_if_correct, epsilon=recipe.epsilon)


def own_group(recipe: "ReSum", detect: list[list[int]]) -> AdvantageFn:
    """Every row against the rows of its own kind."""
    return summary_own_group(detect, only_if_correct=recipe.reward_if_correct, epsilon=recipe.epsilon)


def released(recipe: "ReSum", detect: list[list[int]]) -> AdvantageFn:
    """The released code: forks only shift the statistics."""
    return summary_bonus_released(detect)


@dataclasses.dataclass
class ReSum(ForestRecipe):
    """ReSum, arXiv 2606.13316.

        R' = R + (0.2 natural + 0.05 injected) / (natural + injected)
        A = (R' - mean_with) / (std_with + epsilon) + (R' - mean_without) / (std_without + epsilon)

    In each round every chain forks once: before its next natural summary phrase, which the fork then lacks, or else at
    a random place, where one of the phrases `inject` is given to the fork. Given tokens get no gradient. `detect` are
    the phrases that count as a summary; all are matched as token ids. `credit` is `paper`, `own_group` or `released`.
    `reward_if_correct` keeps R' = R for wrong answers. The rollout of the release (one fork point for all branches of
    a chain, at its middle) is not offered.
    """

    chains: int = 4
    points: int = 1
    rounds: int = 3
    kl_coef: float = 0.0
    inject: tuple[str, ...] = (
        "\nIn summary,",
        "\nLet me recap what I have done so far.",
        "\nLet me step back and review.",
    )
    detect: tuple[str, ...] = ("In summary", "Let me recap", "To summarize", "Let me step back and review")
    middle: float = 0.8
    reward_if_correct: bool = False
    credit: Callable[["ReSum", list[list[int]]], AdvantageFn] = paper

    def build(self) -> Algorithm:
        """The algorithm before it knows a tokenizer. Raises ValueError for hyperparameters that cannot work."""
        return self._build([[0]], [[0]])._replace(bind=lambda encode, _: self._bind(encode))

    def _bind(self, encode: Encode) -> Algorithm:
        return self._build(
            encoded_phrases(encode, self.detect, "detect"), encoded_phrases(encode, self.inject, "inject")
        )

    def _build(self, detect: list[list[int]], inject: list[list[int]]) -> Algorithm:
        rule = summary_points(detect, inject, self.chains, middle=self.middle)
        plan = {"fork_forks": False, "max_injected": max(map(len, inject))}
        return self.compose(rule, self.credit(self, detect), aggregate_fn=sequence_mean, fork_plan=plan)
