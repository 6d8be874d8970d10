"""Branches as evidence for the samples they left, and credit for what a token led to."""

import dataclasses
from operator import attrgetter

from rljax.advantages import AdvantageFn, dual_group, shared_branch_credit
from rljax.algorithms.base import Algorithm, check_at_least
from rljax.algorithms.forest import ForestRecipe
from rljax.losses import behavior_ratio, procedure_weights, sequence_mean, token_ratio
from rljax.plans.fork_rules import top_branching_score


@dataclasses.dataclass
class APPO(ForestRecipe):
    """APPO, arXiv 2606.12384.

        A_base = mean over G in {initial samples, branches} of (R - mean_G) / (std_G + epsilon)    for initial samples
        A = A_base (1 + influence clip(Omega, influence_low, influence_high)),   0 for branches
        Omega[t] = exp(sum_{k >= t} 2^(-(k - t) / half_life) (lp[k] - lp_behavior[k])), of the current policy
        loss = mean_rows mean_tokens of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),  r = exp(lp - lp_behavior)

    Forks take the tokens of a prompt's samples with the best branching score, Z(clip(Omega)) Z(H): where the policy
    hesitated, and since has come to like what followed. The initial samples are drawn with the weights before the last
    update (`lagged`), the branches with the newest, as in the paper, which branches before each minibatch with the
    policy of that moment; so Omega has moved when forks are chosen. In the first step of a run both are the same, and
    the score is Z(H). Without `lagged` it always is, and ratio and Omega are to the policy before the rollout's first
    update: take `update.minibatches` above 1 then. Branches count in the denominator, as in the paper's 1 / M.
    `released` takes the base advantage of the released code. `fork_within`, two texts such as `<think>` and `</think>`,
    has an agent fork in its thinking alone.
    """

    chains: int = 8
    points: int = 1
    influence: float = 0.5
    influence_low: float = 1.0
    influence_high: float = 1.2
    half_life: float = 32.0
    released: bool = False
    fork_within: tuple[str, ...] = ()
    lagged: bool = True
    """Draw initial samples with the weights before the last update. Decoders then hold a second copy of the weights,
    and so does the learner, for checkpoints."""

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

        # A half-life says the same at any scale; weight and score want the factor of one token.
        discount = 2 ** (-1 / self.half_life)
        weights = procedure_weights(
            discount=discount,
            scale=self.influence,
            low=self.influence_low,
            high=self.influence_high,
            anchor=attrgetter("behavior_logprobs" if self.lagged else "old_logprobs"),
        )
        credit: AdvantageFn = shared_branch_credit() if self.released else dual_group(epsilon=self.epsilon)

        # Fork points belong to the prompt as a whole: one chain may get them all.
        rule = top_branching_score(self.points * self.chains, discount=discount, span=self.fork_within)
        return self.compose(
            rule,
            credit,
            ratio_fn=behavior_ratio if self.lagged else token_ratio,
            aggregate_fn=sequence_mean,
            weight_fns=(weights,),
            fork_plan={"lagged_chains": self.lagged},
        )
