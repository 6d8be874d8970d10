"""What a step costs where nothing has been compiled or measured: a model's sizes at the peaks of a device."""

import dataclasses
import math

from rljax.simulation.scenario import Scenario, replaced

_WEIGHT = 2
"""Bytes of a weight, a key or a value in bfloat16."""
_STATE = 16
"""Bytes of training state a parameter: weights, gradient and two moments of Adam in float32."""
_SENT = 2 * _WEIGHT + 4
"""Bytes a parameter that pass a device in a microbatch: weights gathered twice in bfloat16, a gradient in float32."""


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Sizes of a decoder, as its published config has them."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    """Of a dense layer, or of one expert."""
    vocabulary: int
    tied: bool = False
    """Whether embeddings and head are one table."""
    experts: int = 1
    """Experts of a layer; 1 is a dense model."""
    active_experts: int = 1
    """Experts that one token passes."""

    def _layer(self, experts: int | float) -> float:
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        router = self.width * self.experts if self.experts > 1 else 0
        return float(attention + router + experts * 3 * self.width * self.mlp_dim)

    @property
    def _table(self) -> int:
        return self.vocabulary * self.width

    @property
    def parameters(self) -> float:
        """All of them, norms left out."""
        return self.layers * self._layer(self.experts) + self._table * (1 if self.tied else 2)

    @property
    def multiplied(self) -> float:
        """Those that a token is multiplied with: its experts, and the head."""
        return self.layers * self._layer(self.active_experts) + self._table

    def read(self, rows: int | float) -> float:
        """Parameters that a decoding step of `rows` tokens reads on average, if a token takes experts at random."""
        missed = (1 - self.active_experts / self.experts) ** rows
        return self.layers * self._layer(self.experts * (1 - missed)) + self._table

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of a token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _WEIGHT

    def forward_flops(self, length: int | float) -> float:
        """FLOPs a token of a forward pass over sequences of `length` tokens: products with weights, and attention to
        the keys before it."""
        attention = 2 * 2 * self.layers * self.heads * self.head_dim * length / 2
        return 2 * self.multiplied + attention


@dataclasses.dataclass(frozen=True)
class Machine:
    """What one device can do, and how much of it programs reach."""

    flops: float
    """Floating-point operations a second of bfloat16 products."""
    bandwidth: float
    """Bytes a second of its memory."""
    memory: float
    """Bytes of its memory."""
    training_share: float
    """Share of `flops` that an update reaches."""
    decoding_share: float
    """Share of `bandwidth` that a decoding step reaches."""


def costs_of(
    model: ModelSize, scenario: Scenario, machine: Machine, *, prompt: int, microbatch_tokens: int
) -> Scenario:
    """The scenario with the costs of `model` on devices like `machine`: seconds, bytes, and the devices that memory
    asks for.

    Prompts have `prompt` tokens and are read once for their group; a device updates by microbatches of
    `microbatch_tokens`. Weights are split over all devices that train, and over no more decoding devices than their
    memory asks for; an update passes forward twice (full remat) and backward once.
    """
    samples = scenario.groups * scenario.group_size
    completion = scenario.turns * min(scenario.tokens, scenario.max_tokens)
    length = prompt + completion
    trained = samples * completion + scenario.groups * prompt

    # Half of a device's memory is left to activations, keys and values.
    room = machine.memory / 2
    least_rollout = 2 ** max(0, math.ceil(math.log2(model.parameters * _WEIGHT / room)))
    least_trainers = math.ceil(model.parameters * _STATE / room)
    copies = max(scenario.decoding_devices // least_rollout, 1)

    # A decoding step reads the weights that its rows need, and on average half of the keys and values to come.
    rows = scenario.rows / copies
    read_s = model.read(rows) * _WEIGHT / least_rollout / machine.bandwidth / machine.decoding_share
    row_s = model.kv_bytes * (prompt + completion / 2) / machine.bandwidth / machine.decoding_share

    microbatches = max(math.ceil(trained / scenario.training_devices / microbatch_tokens), 1)
    return replaced(
        scenario,
        update_s=trained * 4 * model.forward_flops(length) / machine.flops / machine.training_share,
        update_bytes=microbatches * model.parameters * _SENT,
        step_s=read_s,
        step_row_s=row_s,
        prefill_s=prompt * model.forward_flops(prompt) / machine.flops / machine.training_share,
        hand_over_bytes=model.parameters * _WEIGHT / least_rollout,
        checkpoint_bytes=model.parameters * 12,
        least_trainers=least_trainers,
        least_rollout=least_rollout,
    )
