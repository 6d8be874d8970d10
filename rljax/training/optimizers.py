"""The optimizers of a run: one config each, which all share schedule, clipping and weight decay."""

import dataclasses
from typing import Any, Literal

import jax
import optax

from rljax.training.lightsam import scale_by_lightsam_adagrad, scale_by_lightsam_adam, scale_by_lightsam_norm
from rljax.types import Params


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW (1711.05101) behind a clip of the global gradient norm.

    The learning rate rises linearly over `warmup_steps`, then stays (`constant`) or falls to 0 at `total_steps`
    (`linear`, `cosine`). `max_grad_norm` 0 is no clipping. Weight decay leaves norms and biases out.
    """

    learning_rate: float = 1e-5
    """The highest rate of the schedule. Lower it if the reward is unstable."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate goes on after `warmup_steps`."""
    warmup_steps: int = 0
    """Optimizer steps over which the rate rises from 0."""
    total_steps: int = 0
    """Optimizer step at which `linear` and `cosine` reach 0, the number of updates of the run; they must have it."""
    weight_decay: float = 0.0
    """Share of a weight that is taken off per unit of learning rate."""
    b1: float = 0.9
    """Decay of the mean of gradients."""
    b2: float = 0.999
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of that mean, which divides."""
    max_grad_norm: float = 1.0
    """Global norm that longer gradients are scaled down to; 0 leaves them as they are."""

    def direction(self) -> optax.GradientTransformation:
        """From (clipped) gradients to what weight decay is added to and the learning rate multiplies."""
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)


@dataclasses.dataclass
class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al., 2024) for the matrices of the layers, AdamW for embeddings, head, norms and biases.

    The momentum (`beta`, Nesterov) of each layer's matrix [in, out] is made nearly orthogonal by `newton_schulz_steps`
    Newton-Schulz steps, and scaled by `consistent_rms * sqrt(max(in, out))` (2502.16982): with 0.2 a step is as large
    as one of AdamW, so that its learning rate and weight decay serve. `consistent_rms` 0 scales by
    `sqrt(max(1, out / in))`, which wants a rate about 0.2 sqrt(max(in, out)) times larger.
    """

    beta: float = 0.95
    """Decay of the momentum of matrices."""
    newton_schulz_steps: int = 5
    """Steps towards an orthogonal matrix; more cost more and come closer."""
    consistent_rms: float = 0.2
    """Size of a step, as a root mean square per weight; 0 scales by width alone."""

    def direction(self) -> optax.GradientTransformation:
        if self.newton_schulz_steps < 1:
            raise ValueError(f"newton_schulz_steps={self.newton_schulz_steps} must be at least 1")
        if not self.consistent_rms >= 0:
            raise ValueError(f"consistent_rms={self.consistent_rms} must be at least 0; 0 scales by width alone")
        muon = optax.contrib.scale_by_muon(
            ns_steps=self.newton_schulz_steps,
            beta=self.beta,
            weight_dimension_numbers=_layers_apart,
        )
        return optax.partition(
            {"muon": optax.chain(muon, _scale_by_shape(self.consistent_rms)), "adam": super().direction()},
            lambda params: jax.tree.map(lambda is_one: "muon" if is_one else "adam", layer_matrices(params)),
        )


@dataclasses.dataclass
class LightSAMConfig(OptimizerConfig):
    """LightSAM (2505.24399), `rljax.training.lightsam`: a second gradient at a point `rho` away, for twice the cost.

    `variant` is how both steps are normalised: `adam` (III), `adagrad` (II) or `norm` (I, one scalar). The two
    gradients of an update share minibatch, advantages, masks and old log-probs. `max_grad_norm` bounds each of them.
    Meant for supervised fine-tuning first; in RL, where clipping depends on the params, take it if the reward is
    unstable.
    """

    b2: float = 0.99
    """Decay of the mean of squared gradients."""
    rho: float = 0.05
    """Distance of the second gradient's point; 0 is no second point."""
    variant: Literal["adam", "adagrad", "norm"] = "adam"
    """How both steps are normalised."""

    def direction(self) -> optax.GradientTransformation:
        if not self.rho >= 0:
            raise ValueError(f"rho={self.rho} must be at least 0; 0 does not look elsewhere")
        both: dict[str, Any] = {"eps": self.eps, "max_grad_norm": self.max_grad_norm}
        match self.variant:
            case "adam":
                return scale_by_lightsam_adam(self.rho, b1=self.b1, b2=self.b2, **both)
            case "adagrad":
                return scale_by_lightsam_adagrad(self.rho, **both)
            case "norm":
                return scale_by_lightsam_norm(self.rho, **both)
        raise ValueError(f"variant={self.variant!r} must be one of adam, adagrad, norm")


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate by optimizer step. ValueError for values that cannot work."""
    c = config
    if not c.learning_rate >= 0:
        raise ValueError(f"learning_rate={c.learning_rate} must be at least 0")
    if c.schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f"schedule={c.schedule!r} must be one of constant, linear, cosine")
    if c.warmup_steps < 0:
        raise ValueError(f"warmup_steps={c.warmup_steps} must be at least 0")
    if c.schedule != "constant" and c.total_steps <= c.warmup_steps:
        raise ValueError(
            f"schedule={c.schedule!r} needs total_steps above warmup_steps={c.warmup_steps}, not {c.total_steps}; "
            "set total_steps to the number of updates of the run"
        )
    decay_steps = c.total_steps - c.warmup_steps
    after: optax.Schedule
    if c.schedule == "linear":
        after = optax.linear_schedule(c.learning_rate, 0.0, decay_steps)
    elif c.schedule == "cosine":
        after = optax.cosine_decay_schedule(c.learning_rate, decay_steps)
    else:
        after = optax.constant_schedule(c.learning_rate)
    if not c.warmup_steps:
        return after
    # The first update already moves: the rate of step s is (s + 1) / (warmup_steps + 1) of the full one.
    start = c.learning_rate / (c.warmup_steps + 1)
    return optax.join_schedules(
        [optax.linear_schedule(start, c.learning_rate, c.warmup_steps), after], [c.warmup_steps]
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip, direction, weight decay, learning rate. ValueError for values that cannot work."""
    if config.max_grad_norm < 0:
        raise ValueError(f"max_grad_norm={config.max_grad_norm} must be at least 0; 0 is no clipping")
    steps = optax.chain(
        config.direction(),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(make_schedule(config)),
    )
    clips_inside = isinstance(config, LightSAMConfig)
    if clips_inside or not config.max_grad_norm:
        return steps
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), steps)


def decay_mask(params: Params) -> Any:
    """True for weights that decay: all but norms and biases, which their names tell."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_matrix(path), dict(params))


def layer_matrices(params: Any) -> Any:
    """True for the stacked matrices [layers, in, out]."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "layers" and _is_matrix(path), params)


def _is_matrix(path: Any) -> bool:
    return not path[-1].key.endswith(("norm", "bias"))


def _layers_apart(updates: Any) -> Any:
    """The axes of [layers, in, out] that make a matrix."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2), updates)


def _scale_by_shape(consistent_rms: float) -> optax.GradientTransformation:
    def factor(x: jax.Array) -> float:
        _, fan_in, fan_out = x.shape
        return consistent_rms * max(fan_in, fan_out) ** 0.5 if consistent_rms else max(1.0, fan_out / fan_in) ** 0.5

    return optax.stateless(lambda updates, params: jax.tree.map(lambda x: factor(x) * x, updates))
