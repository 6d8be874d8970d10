"""The data types every room shares: frozen structs of arrays, a shape on every field.

Letters in shapes: `B` rows, `T` positions of a row, `R` packed rows, `S` positions of a packed row,
`K` scored tokens of a packed row, `Q` parts of a microbatch, `L` rows and `C` loss tokens of a part. Index `t` of every
field describes token `t` itself; the one function that shifts by one is `rljax.sampling.score.score_tokens`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import chex
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

NO_PARENT = -1
"""`parent_row` of a row that was not forked from another one."""

SOURCE_POLICY, SOURCE_GUIDED = 0, 1
"""`source` of a row: sampled by the policy under its own prompt, or under a prompt with guidance that the row no longer
shows; its `behavior_logprobs` are those of the prompt that was used."""

INTERVENTION_NONE, INTERVENTION_INJECT, INTERVENTION_SUPPRESS = 0, 1, 2

ROW_WEIGHT = "row_weight"
"""Column of a batch, float32 [B]: how much a row counts in the loss beside the other rows of its minibatch. Without it
all count alike."""

TEACHER_LOGPROBS = "teacher_logprobs"
"""Column of a batch, float32 [B, T]: log-probs (nats) of the sampled tokens under the row's teacher, tempered as the
policy was that sampled. 0 off the loss mask."""

TEACHER_DIVERGENCE = "teacher_divergence"
"""Column of `Rows`, float32 [B, T]: a divergence (nats) between the distributions of teacher and policy that each token
was sampled from. The one column that a loss differentiates, in the policy's weights."""

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def struct(cls: type[T]) -> type[T]:
    """A frozen dataclass that is a pytree. chex's kind is the one that also passes through `vmap`, `scan`, `eval_shape`
    and trees of `PartitionSpec`s while the shapes of its fields are checked."""
    return chex.dataclass(frozen=True, mappable_dataclass=False)(cls)


ArrayLike = Array | np.ndarray
Params = Mapping[str, Any]
"""Nested dict of arrays; the tree `rljax.models.init_params` returns."""


@struct
class Trajectory:
    """One sampled row on the host: numpy, ragged, prompt and completion in one sequence of length `T`.

    `action_mask` marks the tokens that the policy emitted; only these may receive gradient. `behavior_logprobs` and
    `entropies` (nats) belong to the distribution really sampled from, and are 0 where `action_mask` is False.
    `turn_rewards` and `state_ids` say something of a turn, on each of its action tokens. `columns` are the signals that
    the algorithm declares (`rljax.plans.Column`): a number, or an array `[T]` that is 0 off the action tokens.

    `token_keys` tell apart tokens of one id and different content, such as placeholders of images: a hash of the
    content for those, the id itself for text. Prefixes are shared where the keys are equal.
    """

    tokens: Int[np.ndarray, " T"]
    action_mask: Bool[np.ndarray, " T"]
    behavior_logprobs: Float[np.ndarray, " T"]
    entropies: Float[np.ndarray, " T"]
    turn_ids: Int[np.ndarray, " T"]
    policy_version: Int[np.ndarray, " T"]
    prompt_id: int
    group_id: int
    episode_id: int
    task_id: int = 0  # rows of one task, of a mixture, share it
    reward: float = 0.0
    is_valid: bool = True  # False: its reward or tool failed; it takes no part in statistics or gradient
    is_truncated: bool = False
    source: int = SOURCE_POLICY
    parent_row: int = NO_PARENT
    fork_index: int = 0
    fork_score: float = 0.0
    intervention: int = INTERVENTION_NONE
    turn_rewards: Float[np.ndarray, " T"] | None = None  # of the environment, for the turn
    state_ids: Int[np.ndarray, " T"] | None = None  # equal ids of a group: turns from one state; -1 off actions
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # signals by name: float, or float32 [T]
    token_keys: Int[np.ndarray, " T"] | None = None  # int64: what tokens are compared by; None: their ids
    experts: Int[np.ndarray, "T L K"] | None = None  # int16: of each layer, that computed for the token; -1: no record
    grammar: str = ""  # that its turns follow (`rljax.text.Grammars`), each from its beginning; empty for none
    grammar_turns: Int[np.ndarray, "N 2"] | None = None  # where these [start, stop); None without a grammar
    drawn: Bool[np.ndarray, " T"] | None = None  # tokens that count as sampled for penalties; None where there are none


@struct
class RolloutBatch:
    """The same, padded on the right to `[B, T]`. What advantages see; never logits.

    Padding rows have `is_valid` False and `lengths` 0. `group_id` counts groups from 0 and is below `B`.
    """

    tokens: Int[ArrayLike, "B T"]
    action_mask: Bool[ArrayLike, "B T"]
    behavior_logprobs: Float[ArrayLike, "B T"]
    entropies: Float[ArrayLike, "B T"]
    turn_ids: Int[ArrayLike, "B T"]
    policy_version: Int[ArrayLike, "B T"]
    lengths: Int[ArrayLike, " B"]
    reward: Float[ArrayLike, " B"]
    is_valid: Bool[ArrayLike, " B"]
    is_truncated: Bool[ArrayLike, " B"]
    group_id: Int[ArrayLike, " B"]
    episode_id: Int[ArrayLike, " B"]
    source: Int[ArrayLike, " B"]
    parent_row: Int[ArrayLike, " B"]
    fork_index: Int[ArrayLike, " B"]
    fork_score: Float[ArrayLike, " B"]
    intervention: Int[ArrayLike, " B"]
    ref_logprobs: Float[ArrayLike, "B T"] | None = None  # only when the algorithm needs them before the update
    task_id: Int[ArrayLike, " B"] | None = None  # counts tasks from 0, below B; None is a single task
    values: Float[ArrayLike, "B T"] | None = None  # of the state before each action token, when there is a critic
    turn_rewards: Float[ArrayLike, "B T"] | None = None  # these two: when all trajectories have them
    state_ids: Int[ArrayLike, "B T"] | None = None  # counts the states of all groups from 0, below B * T
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # float32 [B, T] or [B]: names that all have
    teacher: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # [B, T, W]: of whole distributions, by name
    token_keys: UInt32[ArrayLike, "B T 2"] | None = None  # high and low half of the trajectories' keys, if any has them
    experts: Int[ArrayLike, "B T L K"] | None = None  # int16, -1 for none: when all trajectories have them
    drawn: Bool[ArrayLike, "B T"] | None = None  # when all trajectories have it


class Allowed(NamedTuple):
    """Which tokens could be drawn where, in the rows of a batch. Host, numpy."""

    masks: UInt32[np.ndarray, "U W"]
    """A bit a token of the vocabulary, the first the lowest."""
    which: Int[np.ndarray, "B T"]
    """The mask that a token was drawn under; -1 where all could be."""


@struct
class Packed:
    """What the model sees: forests in depth-first order, any number of trees to a packed row.

    Key `k` is visible to query `q` iff `k <= q < subtree_end[k]`. `positions` is the depth on the path (RoPE),
    `predecessor` the packed index of the token before on that path (-1 for a root). Padding has `subtree_end` 0.
    `score_index` lists the packed indices of the tokens whose log-prob is wanted (-1 pads), so the vocabulary head
    runs on these alone. `experts` are those that each token passes in each of the `L` layers that have any, -1 where it
    passes the best; None where all do. Where tokens were drawn under masks, these come with them: no other tokens
    count. `drawn` says which tokens penalties count as sampled; None: those that are scored.
    """

    tokens: Int[ArrayLike, "*M R S"]
    positions: Int[ArrayLike, "*M R S"]
    predecessor: Int[ArrayLike, "*M R S"]
    subtree_end: Int[ArrayLike, "*M R S"]
    score_index: Int[ArrayLike, "*M R K"]
    experts: Int[ArrayLike, "*M R S L E"] | None = None  # int16
    allowed: UInt32[ArrayLike, "*M R U W"] | None = None  # masks: a bit a token of the vocabulary, lowest first
    allowed_index: Int[ArrayLike, "*M R K"] | None = None  # the mask that a scored token was drawn under; -1 for none
    drawn: Bool[ArrayLike, "*M R S"] | None = None


@struct
class Rows:
    """What losses see: one line per sampled row, whatever the packing was.

    `loss_weights` are the aggregation's weights over the *global* minibatch and `token_count` its number of loss
    tokens, both fixed before the backward pass; so losses and metrics of microbatches, and of devices, just add up.
    """

    loss_mask: Bool[ArrayLike, "*M B T"]
    loss_weights: Float[ArrayLike, "*M B T"]
    token_count: Float[ArrayLike, "*M"]
    advantages: Float[ArrayLike, "*M B T"]
    behavior_logprobs: Float[ArrayLike, "*M B T"]
    old_logprobs: Float[ArrayLike, "*M B T"]
    source: Int[ArrayLike, "*M B"]
    ref_logprobs: Float[ArrayLike, "*M B T"] | None = None
    uniforms: Float[ArrayLike, "*M B T"] | None = None  # in [0, 1), drawn anew for every update, if the plan asks
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # float32 [*M, B, T] or [*M, B], by name


@jax.tree_util.register_static
class Width(int):
    """A number that is part of a program's shape, not of its data: a pytree without leaves."""


@struct
class RaggedRows:
    """`Rows` as they are stored and moved: one entry per loss token, in `Q` parts that devices hold of their own.

    Part `q` carries the rows of its share of the microbatch's packed rows: `L` lines, and `C` entries in the order of
    line and position. Entry `c` is position `place % width` of line `place // width`; -1 pads. `row_index` points into
    the flattened scored tokens `[R / Q * K]` of the same part; 0 in padding. `rljax.batching.dense_rows` makes the
    `Rows` of them; what is said of a field there holds here.
    """

    place: Int[ArrayLike, "*M Q C"]
    row_index: Int[ArrayLike, "*M Q C"]
    loss_weights: Float[ArrayLike, "*M Q C"]
    token_count: Float[ArrayLike, "*M"]
    advantages: Float[ArrayLike, "*M Q C"]
    behavior_logprobs: Float[ArrayLike, "*M Q C"]
    source: Int[ArrayLike, "*M Q L"]
    width: Width  # positions of a line, `T`
    old_logprobs: Float[ArrayLike, "*M Q C"] | None = None  # None: those of the behavior
    ref_logprobs: Float[ArrayLike, "*M Q C"] | None = None
    uniforms: Float[ArrayLike, "*M Q C"] | None = None
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # float32 [*M, Q, C]: those of tokens
    row_columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # float32 [*M, Q, L]: those of rows
    teacher: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # [*M, Q, C, W]: of whole distributions

    @property
    def loss_mask(self) -> Bool[ArrayLike, "*M Q C"]:
        """Which entries are loss tokens; the others pad."""
        return self.place >= 0


@struct
class TrainBatch:
    """One minibatch, a leading axis `M` of microbatches on every field but the last. A microbatch holds whole packed
    rows, and all rows that they carry."""

    packed: Packed
    rows: RaggedRows
    teacher_head: Any = None  # the teacher's `head_params`, where `rows.teacher` holds its hidden states


@struct
class TrainState:
    """Everything on the device that a step changes, and the frozen weights that it stands on. `trainable`, `opt_state`,
    `base`, `ref_trainable`, `pushed` and `before` are pytrees of arrays; `rljax.training.policy_params` puts the
    model's params together.
    """

    trainable: Any
    opt_state: Any  # of `trainable` alone
    step: Int[ArrayLike, ""]
    skipped: Int[ArrayLike, ""]  # consecutive updates skipped for a non-finite loss or gradient
    base: Any = None  # weights that no update changes; None where all are trained
    ref_trainable: Any = None  # what stands for `trainable` in the reference; None without one
    critic: Any = None  # the `TrainState` of the value function, where there is one
    pushed: Any = None  # what stands for `trainable` in rollouts; None where they take every step's own
    before: Any = None  # what rollouts had before that; None where none asks for it
