"""The optimizers of a run: one config each, which all share schedule, clipping and weight decay."""

import dataclasses
from typing import Any, Literal

import jax
import optax

from rljax.settings import check_fields, field
from rljax.training.lightsam import scale_by_lightsam_adagrad, scale_by_lightsam_adam, scale_by_lightsam_norm
from rljax.types import Params

ResetMoments = Literal["none", "first", "all"]
"""Which of an optimizer's averages begin anew: none, those of gradients, or those of squares as well."""


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW (1711.05101) behind a clip of the global gradient norm. Weight decay leaves norms and biases out."""

    learning_rate: float = field(default=1e-5, least=0)
    """Full rate, after the warm-up. Raise it for small models and fresh weights."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: the full rate (`constant`), or a fall to 0 at `total_steps` (`linear`, `cosine`)."""

    warmup_steps: int = field(default=0, least=0)
    """Optimizer steps over which the rate rises linearly to the full one."""

    total_steps: int = field(default=0, least=0)
    """Optimizer steps of the run, for `linear` and `cosine`: steps x minibatches x epochs."""

    weight_decay: float = field(default=0.0, least=0)
    """Share of a weight that is taken off per step, times the learning rate."""

    b1: float = field(default=0.9, least=0, below=1)
    """Decay of the average of gradients."""

    b2: float = field(default=0.999, least=0, below=1)
    """Decay of the average of squared gradients. Lower it (0.95 to 0.99) for short or unsteady runs."""

    eps: float = field(default=1e-8, above=0)
    """Added to the root of the average square. Raise it where tiny gradients are noise, as in bfloat16."""

    max_grad_norm: float = field(default=1.0, least=0)
    """Global norm that gradients are clipped to; 0 is no clipping."""

    balance_rate: float = field(default=0.0, least=0)
    """Step of the bias that experts are chosen by: after an update it goes down for an expert that computed for more
    tokens than the mean, and up for the others (2412.19437, section 2.1.2, which takes 0.001). For families with such a
    bias; 0 leaves it as it is."""

    def check(self) -> None:
        """ValueError of one line for values that cannot work."""
        check_fields(self, "")
        if self.schedule != "constant" and self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"schedule={self.schedule!r} needs total_steps above warmup_steps={self.warmup_steps}, not "
                f"{self.total_steps}; set total_steps to the number of updates of the run"
            )

    def direction(self) -> optax.GradientTransformation:
        """From (clipped) gradients to what weight decay is added to and the learning rate multiplies."""
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)


@dataclasses.dataclass
class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al., 2024) for the matrices of the layers, AdamW for embeddings, head, norms and biases.

    The momentum (Nesterov) of each layer's matrix [in, out] is made nearly orthogonal by Newton-Schulz steps, and
    scaled by its shape.
    """

    beta: float = field(default=0.95, least=0, below=1)
    """Decay of the momentum."""

    newton_schulz_steps: int = field(default=5, least=1)
    """Newton-Schulz steps; more of them come closer to orthogonal."""

    consistent_rms: float = field(default=0.2, least=0)
    """The update is scaled by this times `sqrt(max(in, out))` (2502.16982): with 0.2 a step is as large as one of
    AdamW, so that its learning rate and weight decay serve. 0 scales by `sqrt(max(1, out / in))` instead, which wants a
    rate about 0.2 sqrt(max(in, out)) times larger."""

    def direction(self) -> optax.GradientTransformation:
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

    The two gradients of an update share minibatch, advantages, masks and old log-probs; `max_grad_norm` bounds each of
    them. Meant for supervised fine-tuning: in RL, where a minibatch was drawn at the weights and clipping depends on
    them, runs were level with AdamW's at best and broke down the farther away they looked (docs/arena.md#rates).
    """

    b2: float = field(default=0.99, least=0, below=1)
    """Decay of the average of squared gradients, of the variant `adam`."""

    rho: float = field(default=0.05, least=0)
    """How far away the second gradient is taken: of each weight, with the variant `norm` of all of them together; 0
    does not look elsewhere. In RL take no more than a step of the optimizer, which is the learning rate."""

    variant: Literal["adam", "adagrad", "norm"] = "adam"
    """How both steps are normalised: `adam` (III), `adagrad` (II) or `norm` (I, one scalar). `b1` and `b2` take effect
    with the first."""

    def direction(self) -> optax.GradientTransformation:
        both: dict[str, Any] = {"eps": self.eps, "max_grad_norm": self.max_grad_norm}
        match self.variant:
            case "adam":
                return scale_by_lightsam_adam(self.rho, b1=self.b1, b2=self.b2, **both)
            case "adagrad":
                return scale_by_lightsam_adagrad(self.rho, **both)
            case "norm":
                return scale_by_lightsam_norm(self.rho, **both)


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate by optimizer step. ValueError for values that cannot work."""
    config.check()
    decay_steps = config.total_steps - config.warmup_steps
    after: optax.Schedule
    if config.schedule == "linear":
        after = optax.linear_schedule(config.learning_rate, 0.0, decay_steps)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, decay_steps)
    else:
        after = optax.constant_schedule(config.learning_rate)
    if not config.warmup_steps:
        return after

    # The first update already moves: the rate of step s is (s + 1) / (warmup_steps + 1) of the full one.
    start = config.learning_rate / (config.warmup_steps + 1)
    rising = optax.linear_schedule(start, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([rising, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip, direction, weight decay, learning rate. ValueError for values that cannot work."""
    config.check()

    # The order is important: decay is added after the direction (AdamW), and both are multiplied by the rate.
    steps = optax.chain(
        config.direction(),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(make_schedule(config)),
    )

    # LightSAM clips each of its two gradients itself; a clip in front would reach the first alone.
    clips_inside = isinstance(config, LightSAMConfig)
    if clips_inside or not config.max_grad_norm:
        return steps
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), steps)


def reset_moments(optimizer: optax.GradientTransformation, opt_state: Any, trainable: Any, which: ResetMoments) -> Any:
    """The optimizer's state with the averages of gradients (`first`), or all averages and the count that corrects their
    bias (`all`), as at the start. How far the schedule of the learning rate is stays."""
    if which == "none":
        return opt_state
    fresh = optimizer.init(trainable)
    if which == "first":
        return jax.tree_util.tree_map_with_path(
            lambda path, old, new: new if _FIRST_MOMENTS & {_name_of(key) for key in path} else old, opt_state, fresh
        )

    def is_schedule(part: Any) -> bool:
        return isinstance(part, optax.ScaleByScheduleState)

    return jax.tree.map(lambda old, new: old if is_schedule(old) else new, opt_state, fresh, is_leaf=is_schedule)


def has_first_moment(config: OptimizerConfig) -> bool:
    """Whether the optimizer averages gradients over updates."""
    if isinstance(config, LightSAMConfig) and config.variant != "adam":
        return False
    return config.b1 > 0 or isinstance(config, MuonConfig)


_FIRST_MOMENTS = {"mu", "momentum"}
"""What optimizers call their averages of gradients."""


def _name_of(key: Any) -> str:
    return str(getattr(key, "name", ""))


def decay_mask(params: Params) -> Any:
    """True for weights that decay: all but norms, biases and sinks, which their names tell."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_matrix(path), dict(params))


def layer_matrices(params: Any) -> Any:
    """True for the stacked matrices [layers, in, out], and those of experts [layers, experts, in, out]."""
    return jax.tree_util.tree_map_with_path(lambda path, _: len(path) > 1 and _is_matrix(path), params)


def _is_matrix(path: Any) -> bool:
    return not path[-1].key.endswith(("norm", "bias", "sinks"))


def _layers_apart(updates: Any) -> Any:
    """The axes of [layers, .., in, out] that make a matrix: each layer's, and each expert's, by itself."""

    def axes(x: jax.Array) -> optax.contrib.MuonDimensionNumbers:
        return optax.contrib.MuonDimensionNumbers(reduction_axis=x.ndim - 2, output_axis=x.ndim - 1)

    return jax.tree.map(axes, updates)


def _scale_by_shape(consistent_rms: float) -> optax.GradientTransformation:
    def factor(x: jax.Array) -> float:
        *_, fan_in, fan_out = x.shape
        if consistent_rms:
            return consistent_rms * max(fan_in, fan_out) ** 0.5
        return max(1.0, fan_out / fan_in) ** 0.5

    return optax.stateless(lambda updates, params: jax.tree.map(lambda x: factor(x) * x, updates))
