"""Forks where the policy hesitates more than it did at first."""

import dataclasses
import math

from rljax.advantages import AdvantageFn, entropy_scaled, group_normalized, shared_mean
from rljax.algorithms.base import Algorithm, check_at_least
from rljax.algorithms.forest import ForestRecipe
from rljax.losses import clip_balanced, sequence_mean
from rljax.plans.fork_rules import entropy_jump, filled


@dataclasses.dataclass
class ARPO(ForestRecipe):
    """ARPO, arXiv 2507.19849.

        fork at the start of a later step with probability clip(base + weight dH, 0, 1)
        dH = sum of the first `window` entropies of the step, less those of the completion, / ln V
        A = (R - mean) / (std + epsilon) over all samples of the prompt

    That is the released rule; with the paper's threshold and constants it would only ask whether dH is above 0. Forks
    that no step earned are made as independent samples. `hard_credit` gives a token that several samples share the mean
    of their advantages, soft credit, the default, leaves it to the sum. Here all samples of a round are complete before
    it forks, so that requests can be ranked by dH; in the release they come as they are.
    """

    chains: int = 8
    points: int = 1
    window: int = 20
    base: float = 0.5
    weight: float = 0.2
    hard_credit: bool = False
    clip_high: float = 0.28

    def build(self) -> Algorithm:
        """The algorithm before it knows the vocabulary. Raises ValueError for hyperparameters that cannot work."""
        check_at_least(self, 1, "window")
        return self._build(2)._replace(bind=lambda vocabulary: self._build(vocabulary.vocab_size))

    def _build(self, vocab_size: int) -> Algorithm:
        return self.compose(self._rule(vocab_size, 0.0), self._credit(), aggregate_fn=sequence_mean)

    def _rule(self, vocab_size: int, penalty: float):
        count = self.points * self.chains
        rule = entropy_jump(
            count,
            scale=math.log(vocab_size),
            window=self.window,
            base=self.base,
            weight=self.weight,
            penalty=penalty,
        )
        return filled(rule, count)

    def _credit(self) -> AdvantageFn:
        credit = group_normalized(ddof=0, epsilon=self.epsilon)
        return shared_mean(credit) if self.hard_credit else credit


@dataclasses.dataclass
class AEPO(ARPO):
    """AEPO, arXiv 2510.14545: ARPO with

        the probability of a fork times max(1 - penalty l, 0), l forks in a row before it on the path
        A max(1 + entropy_scale z(H), 0), z over the tokens of the batch
        a clip that leaves tokens with A > 0 and r > 1 + clip_high the gradient of r = 1 + clip_high

    The paper's split of the budget between samples and forks by a first sample's entropies is left out, as in the
    scripts of the release: `chains` is fixed.
    """

    penalty: float = 0.05
    entropy_scale: float = 0.2
    dual_clip: float | None = 3.0

    def _build(self, vocab_size: int) -> Algorithm:
        check_at_least(self, 0, "penalty", "entropy_scale")
        surrogate = clip_balanced(clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip)
        return self.compose(
            self._rule(vocab_size, self.penalty),
            entropy_scaled(self._credit(), scale=self.entropy_scale),
            surrogate_fn=surrogate,
            aggregate_fn=sequence_mean,
        )
