"""An agent that foresees what its actions lead to."""

import dataclasses

from rljax.advantages import predicted_reward_returns, predictive_returns, state_grouped
from rljax.algorithms.base import Algorithm, GroupRecipe, check_at_least
from rljax.losses import policy_loss, sequence_mean, token_ratio
from rljax.plans import Column

WIA_MODES = {"return": predictive_returns, "reward": predicted_reward_returns}


@dataclasses.dataclass
class RoleAgent(GroupRecipe):
    """Role-Agent's world-in-agent objective, arXiv 2606.10917.

        R[t] = (sum_{k >= t} gamma^(k - t) r[k]) (1 + sim[t])         t counts turns
        A    = (R[t] - mean) / (std + epsilon) of the turns that began in the same state
               + alpha (R_E - mean) / (std + epsilon) of the group
        loss = mean_rows mean_tokens [ max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) + kl_coef * k3 ]

    `sim[t]`, the count `prediction` of a step, is how well turn t foresaw the observation after it. Without it this is
    GiGPO (2505.10978), and without `state_ids` too, as for single answers, GRPO.

    Deviations: the prediction stands in the turn itself, looks one step ahead and is trained with it, as in the
    release (the paper: a call of its own, up to 5% of the steps ahead). `wia_mode` "reward" is the release, which
    raises rewards by `1 + 0.2 sim` before discounting; here R_E stays the environment's. What is not positive is not
    raised, and a state whose std is below `min_std` gives 0. States are shared within a group.
    """

    gamma: float = 0.95
    alpha: float = 1.0
    wia_mode: str = "return"
    clip_high: float = 0.28
    kl_coef: float = 1e-3
    min_std: float = 1e-4

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_at_least(self, 0, "gamma", "alpha", "min_std")
        if self.gamma > 1:
            raise ValueError(f"RoleAgent: gamma={self.gamma} must be at most 1; later rewards cannot count more")
        if self.wia_mode not in WIA_MODES:
            raise ValueError(f"RoleAgent: wia_mode={self.wia_mode!r} must be one of {', '.join(WIA_MODES)}")

        # The column is declared and read under one name, that of the count which the environment's steps have.
        prediction = Column("prediction", per="turn")
        credit = state_grouped(
            self.credit(),
            returns_fn=WIA_MODES[self.wia_mode],
            alpha=self.alpha,
            gamma=self.gamma,
            epsilon=self.epsilon,
            min_std=self.min_std,
            predictions=prediction.name,
        )

        loss = policy_loss(token_ratio, self.surrogate(), sequence_mean, penalties=self.penalties())
        return self.compose(credit, loss, self.plan()._replace(columns=(prediction,)))
