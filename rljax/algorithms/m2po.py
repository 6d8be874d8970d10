"""Policy optimisation under a limit of the second moment of the staleness."""

import dataclasses

from rljax.advantages import group_normalized
from rljax.algorithms.base import Algorithm, Recipe, check_at_least
from rljax.losses import behavior_ratio, limit_second_moment, policy_loss, token_mean, unclipped


@dataclasses.dataclass
class M2PO(Recipe):
    """M2PO, arXiv 2510.01161, for rollouts that are many updates old.

        A = (R - mean) / (std + epsilon) of the group
        d = lp_old - lp_behavior; the tokens of largest d^2 in the minibatch are dropped until the rest has a mean
        d^2 below `max_second_moment`
        loss = mean over all tokens of the minibatch of -A exp(lp - lp_behavior), dropped tokens counting as 0

    There is no clipping. On fresh data nothing is dropped. The mask needs the old log-probs, so one update per rollout
    costs a forward pass more; do not anchor to the sampler's log-probs, which leaves d = 0. `loss/m2_kept_fraction` is
    the share of tokens kept.

    Deviations: d is that of the policy before the first update, as in AReaL's code; the paper's description has the
    current one, the same on the first update. The group size is free. KL penalty (k3) and entropy bonus can be switched
    on.
    """

    max_second_moment: float = 0.04
    epsilon: float = 1e-6

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_at_least(self, 0, "max_second_moment", "epsilon")
        loss = policy_loss(
            behavior_ratio,
            unclipped(),
            token_mean,
            penalties=self.penalties(),
            correct_fn=limit_second_moment(self.max_second_moment),
        )
        return self.compose(group_normalized(epsilon=self.epsilon), loss)
