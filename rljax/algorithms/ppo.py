"""PPO with a learned critic."""

import dataclasses

from rljax.advantages import LambdaFn, gae_advantages, gae_returns, length_adaptive
from rljax.algorithms.base import Algorithm, Recipe, check_at_least, check_clip, kl_and_entropy
from rljax.losses import clipped, policy_loss, token_mean, token_ratio, value_loss
from rljax.plans import CriticSpec


@dataclasses.dataclass
class PPO(Recipe):
    """PPO, arXiv 1707.06347, with generalised advantage estimation, 1506.02438.

        reward[t] = R on the last token - kl_coef * (lp_behavior - lp_ref)
        delta[t] = reward[t] + gamma V[t+1] - V[t],  A[t] = delta[t] + gamma lam A[t+1], then whitened over the batch
        loss = mean over all tokens of the minibatch of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
        critic: mean of max((v - G)^2, (clip(v, V - value_clip, V + value_clip) - G)^2) / 2,  G = A + V, not whitened

    V is the critic before the rollout's updates. One sample per prompt suffices. `critic_lam` is lam in G; None is that
    of the advantages, 1 with a warm-up of the critic is VC-PPO (2503.01491). `length_alpha` makes lam of the advantages
    1 - 1 / (length_alpha * length) for each row (VAPO, 2504.05118, takes 0.05); `lam` then serves G alone.
    The run's `critic` part holds the critic's optimizer, first weights and warm-up.

    Deviations: actor and critic share nothing, as is usual for language models, where the paper has one network; the
    KL term takes the sampler's log-probs; a truncated completion counts as ended. `dual_clip` (off by default) gives
    the loss as verl has it.
    """

    needs_group = False

    group_size: int = 1
    gamma: float = 1.0
    lam: float = 0.95
    critic_lam: float | None = None
    length_alpha: float | None = None
    whiten: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_clip(self)
        check_at_least(self, 0, "gamma", "lam")
        critic_lam = self.lam if self.critic_lam is None else self.critic_lam
        for name, value in {"gamma": self.gamma, "lam": self.lam, "critic_lam": critic_lam}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"PPO: {name}={value} must be between 0 and 1")

        lam: float | LambdaFn = self.lam if self.length_alpha is None else length_adaptive(self.length_alpha)

        # Advantages and returns are of one reward, but each may have its own lambda.
        reward = {"gamma": self.gamma, "kl_coef": self.kl_coef}
        critic = CriticSpec(gae_returns(lam=critic_lam, **reward), value_loss(clip=self.value_clip))

        # The KL is in the reward, so the loss has none.
        loss = policy_loss(
            token_ratio,
            clipped(clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip),
            token_mean,
            penalties=kl_and_entropy(0.0, self.entropy_coef),
        )

        credit = gae_advantages(lam=lam, whiten=self.whiten, **reward)
        return self.compose(credit, loss, self.plan()._replace(critic=critic))
