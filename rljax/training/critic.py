"""The critic: a learner of values."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from rljax.batching import loss_mask
from rljax.models import DecoderConfig, abstract_params, value_config, value_params
from rljax.sampling.score import score_values
from rljax.training.config import UpdateConfig
from rljax.training.learner import Learner
from rljax.training.objective import LossNeeds, Objective
from rljax.training.optimizers import OptimizerConfig
from rljax.training.trainable import EVERYTHING, Subtree
from rljax.training.update import add_metrics
from rljax.types import ArrayLike, Params, RolloutBatch, TrainState

_KEPT = ("grad_norm", "skipped", "learning_rate")


class Critic:
    """A value function V(s) with parameters of its own: the decoder, and a scalar head.

    The value of an action token is that of the state in which it was chosen; it is read off the token before, so that
    rows that share a prefix share its values. Packing, accumulation, meshes and the guard against non-finite updates
    are a `Learner`'s, set by the same arguments. `loss` sees values where a policy's sees log-probs,
    and what `returns_fn` makes of the batch and its values where that sees advantages. `config` is that of a language
    model, or a `value_config` of one, which says whether the head has a bias.
    """

    def __init__(
        self,
        config: DecoderConfig,
        loss: Objective,
        optimizer: OptimizerConfig | optax.GradientTransformation,
        returns_fn: Callable[[RolloutBatch], Any],
        update: UpdateConfig,
        *,
        mesh: Mesh | None = None,
        seed: int = 0,
        subtree: Subtree = EVERYTHING,
    ):
        self.config = config if config.value_head else value_config(config)
        self.returns_fn = returns_fn
        self.learner = Learner(
            self.config,
            loss,
            optimizer,
            # The values that the returns were made of are the old ones; they need not be scored again.
            dataclasses.replace(update, use_sampler_logprobs=True),
            needs=LossNeeds(score_fn=score_values),
            mesh=mesh,
            seed=seed,
            subtree=subtree,
        )

    def init_state(self, params: Params) -> TrainState:
        """A state at step 0 whose trunk is that of a language model's `params`, of which it copies what is trained, and
        whose values are 0."""
        subtree = self.learner.subtree
        layout = self.learner.param_shardings()

        def trained(params: Params) -> Any:
            return subtree.split(value_params(self.config, params))[0]

        # Under jit, so that what comes out is a copy: the policy keeps its own arrays, of which frozen ones are shared.
        copy = jax.jit(trained, out_shardings=None if layout is None else subtree.split(layout)[0])
        return self.learner.init_state(subtree.merge(copy(params), self.base_of(params)))

    def base_of(self, params: Params) -> Any:
        """The frozen part of its trunk, the arrays of a language model's `params` where they have their dtype and place
        already; None where all is trained."""
        heads = abstract_params(self.config)
        return self.learner.base_of({name: params.get(name, heads[name]) for name in heads})

    def abstract_state(self) -> TrainState:
        """What a checkpoint of the state is restored into."""
        return self.learner.abstract_state()

    def with_values(self, state: TrainState, batch: RolloutBatch) -> RolloutBatch:
        """The batch with `values`, 0 off its loss mask."""
        return dataclasses.replace(batch, values=self.learner.score_rows(self.learner.policy_params(state), batch))

    def update(self, state: TrainState, batch: RolloutBatch) -> tuple[TrainState, dict[str, float]]:
        """All updates on one rollout that has its values; `state` is donated.

        Metrics are means over the updates, and `critic/explained_variance`, that of the returns by the values before
        the first. FloatingPointError as in `Learner.update`.
        """
        # Returns and old values are those before the first update, and stay for all of them.
        returns, rows = self._targets(batch)
        updates = []
        for minibatch in self.learner.prepare(state, rows, returns):
            state, stats = self.learner.update(state, minibatch)
            updates.append(stats)
        metrics = critic_metrics(add_metrics(updates))
        metrics["critic/explained_variance"] = explained_variance(returns, rows.behavior_logprobs, loss_mask(batch))
        return state, metrics

    def warm_up(
        self, state: TrainState, batch: RolloutBatch, say: Callable[[int, int], None] = lambda done, total: None
    ) -> TrainState:
        """`Learner.warm_up` for updates on rollouts like `batch`, which has its values; `state` is donated, and comes
        back with the values that it had."""
        returns, rows = self._targets(batch)
        return self.learner.warm_up(state, self.learner.prepare(state, rows, returns)[0], say)

    def _targets(self, batch: RolloutBatch) -> tuple[np.ndarray, RolloutBatch]:
        """What the values of a rollout are to become, and its rows with the old values where a policy has old
        log-probs."""
        rows = dataclasses.replace(batch, behavior_logprobs=np.asarray(batch.values), ref_logprobs=None)
        return np.asarray(self.returns_fn(batch)), rows

    def check(self) -> None:
        """Raises for the last update too, as `Learner.check`."""
        self.learner.check()


def critic_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """A learner's metrics under the names of a critic; what only a policy has is left out."""
    named = {name: value for name, value in metrics.items() if name.startswith(("critic/", "pack/"))}
    return named | {f"critic/{name}": metrics[f"loss/{name}"] for name in _KEPT if f"loss/{name}" in metrics}


def explained_variance(
    returns: Float[ArrayLike, "B T"], values: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"]
) -> float:
    """`1 - var(returns - values) / var(returns)` over the mask: 1 for a perfect critic, 0 for one that knows the mean
    alone, below 0 for a worse one. 0 where the returns do not vary."""
    kept = np.asarray(mask)
    target = np.asarray(returns, np.float64)[kept]
    value = np.asarray(values, np.float64)[kept]
    spread = float(target.var()) if target.size else 0.0
    return 1.0 - float((target - value).var()) / spread if spread > 0 else 0.0
