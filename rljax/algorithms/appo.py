"""Branches as evidence for the samples they left, and credit for what a token led to."""

import dataclasses

from rljax.advantages import AdvantageFn, dual_group, shared_branch_credit
from rljax.algorithms.base import Algorithm, check_at_least
from rljax.algorithms.forest import ForestRecipe
from rljax.losses import procedure_weights, sequence_mean
from rljax.plans.fork_rules import top_branching_score


@dataclasses.dataclass
class APPO(ForestRecipe):
    """APPO, arXiv 2606.12384.

        A_base = mean over G in {initial samples, branches} of (R - mean_G) / (std_G + epsilon)    for initial samples
        A = A_base (1 + influence clip(Omega, influence_low, influence_high)),   0 for branches
        Omega[t] = exp(sum_{k >= t} 2^(-(k - t) / half_life) (lp[k] - lp_old[k])), of the current policy

    Forks take the tokens of a prompt's samples with the best branching score. Since sampler and trainer are one policy
    here, Omega is 1 when they are chosen, and the score is the z-score of the entropy behind its sign gate; the paper
    branches anew before each minibatch with the policy of that moment. So too the first minibatch has the same factor
    for all tokens; take `update.minibatches` above 1. Branches count in the denominator, as in the paper's 1 / M.
    `released` takes the base advantage of the released code. `fork_within`, two texts such as `<think>` and
    `</think>`, has an agent fork in its thinking alone.
    """

    chains: int = 8
    points: int = 1
    influence: float = 0.5
    influence_low: float = 1.0
    influence_high: float = 1.2
    half_life: float = 32.0
    released: bool = False
    fork_within: tuple[str, ...] = ()

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_at_least(self, 1e-3, "half_life")
        check_at_least(self, 0, "influence", "influence_low")
        if not self.influence_low <= self.influence_high:
            raise ValueError(
                f"APPO: influence_low={self.influence_low} must be at most influence_high={self.influence_high}"
            )
        if len(self.fork_within) not in (0, 2) or "" in self.fork_within:
            raise ValueError(f"APPO: fork_within={self.fork_within} must be two texts, or empty")

        # A half-life says the same at any scale; the weight wants the factor of one token.
        weights = procedure_weights(
            discount=2 ** (-1 / self.half_life),
            scale=self.influence,
            low=self.influence_low,
            high=self.influence_high,
        )
        credit: AdvantageFn = shared_branch_credit() if self.released else dual_group(epsilon=self.epsilon)

        # Fork points belong to the prompt as a whole: one chain may get them all.
        rule = top_branching_score(self.points * self.chains, span=self.fork_within)
        return self.compose(rule, credit, aggregate_fn=sequence_mean, weight_fns=(weights,))
