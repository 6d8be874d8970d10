"""Solutions branched at summaries, with credit from the contrast."""

import dataclasses
from collections.abc import Callable

from rljax.advantages import (
    SUMMARIES,
    AdvantageFn,
    own_tokens,
    summary_bonus_released,
    summary_contrast,
    summary_own_group,
)
from rljax.algorithms.base import Algorithm, Vocabulary, encoded_phrases
from rljax.algorithms.forest import ForestRecipe
from rljax.losses import sequence_mean
from rljax.plans import Column
from rljax.plans.fork_rules import summary_points
from rljax.plans.phrases import SUMMARY_PHRASES, PhraseFinder


def paper(recipe: "ReSum") -> AdvantageFn:
    """Every row against rows with a summary and against rows without."""
    return summary_contrast(only_if_correct=recipe.reward_if_correct, epsilon=recipe.epsilon)


def own_group(recipe: "ReSum") -> AdvantageFn:
    """Every row against the rows of its own kind."""
    return summary_own_group(only_if_correct=recipe.reward_if_correct, epsilon=recipe.epsilon)


def released(recipe: "ReSum") -> AdvantageFn:
    """The released code: forks only shift the statistics."""
    return summary_bonus_released()


@dataclasses.dataclass
class ReSum(ForestRecipe):
    """ReSum, arXiv 2606.13316.

        R' = R + (0.2 natural + 0.05 injected) / (natural + injected)
        A = (R' - mean_with) / (std_with + epsilon) + (R' - mean_without) / (std_without + epsilon)

    In each round every chain forks once: before its next natural summary phrase, or, when it has none left, at a random
    place of its middle, where one of the phrases `inject` is given to the fork. What was cut off cannot come again at
    once: no token with which a phrase begins, and no blank one, may be the first of that fork. Neither that token nor
    given ones get a gradient. `credit` is `paper`, `own_group` or `released`.

    Deviations: where one of the two sets of rows has no spread, its rows get no credit. Credit of a fork falls on its
    own tokens (`inherited_credit` has it fall on those from its parent too): a fork that fails says nothing against
    the prefix that it was given. The release counts words of hesitation as well (`rljax.plans.phrases.HESITATION`). Its
    rollout (one fork point for all branches of a chain, at the middle) is not offered.
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
    """Phrases that are given to forks, in turn."""
    detect: tuple[str, ...] = SUMMARY_PHRASES
    """Phrases that count as a summary, found in the decoded text of what the policy sampled, whatever their case."""
    middle: float = 0.8
    """Share of a completion, its middle, in which phrases are given."""
    reward_if_correct: bool = False
    """Keep R' = R for wrong answers."""
    inherited_credit: bool = False
    """Give a fork's credit to the tokens that it has from its parent too."""
    credit: Callable[["ReSum"], AdvantageFn] = paper
    """How rows with a summary and rows without are set against each other."""

    def build(self) -> Algorithm:
        """The algorithm before it knows a tokenizer. Raises ValueError for hyperparameters that cannot work."""
        return self._build(PhraseFinder(self.detect), [[0]], ())._replace(bind=self._bind)

    def _bind(self, vocabulary: Vocabulary) -> Algorithm:
        finder = PhraseFinder(self.detect, vocabulary.decode)
        inject = encoded_phrases(vocabulary.encode, self.inject, "inject")
        return self._build(finder, inject, finder.openers(vocabulary.vocab_size))

    def _build(self, finder: PhraseFinder, inject: list[list[int]], suppressed: tuple[int, ...]) -> Algorithm:
        credit = self.credit(self)
        algorithm = self.compose(
            summary_points(finder, inject, self.chains, middle=self.middle),
            credit if self.inherited_credit else own_tokens(credit),
            aggregate_fn=sequence_mean,
            fork_plan={"fork_forks": False, "max_injected": max(map(len, inject)), "suppressed": suppressed},
        )
        summaries = Column(SUMMARIES, per="token", mark=finder)
        return algorithm._replace(plan=algorithm.plan._replace(columns=(summaries,)))
