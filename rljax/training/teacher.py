"""A model that scores what another one has sampled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from rljax.models import DecoderConfig, abstract_params
from rljax.sampling import SamplingParams
from rljax.sampling.divergence import top_tokens
from rljax.sampling.score import score_hidden, scored_states
from rljax.training.config import UpdateConfig
from rljax.training.learner import Learner
from rljax.training.objective import LossNeeds
from rljax.training.sft import sft_loss
from rljax.types import ArrayLike, Packed, Params, RaggedRows, RolloutBatch, TrainBatch


class TeacherModel:
    """The forward pass of a teacher with weights of its own: packing, forests, meshes and kernels are a learner's, set
    by the same arguments, and nothing is ever updated. `sampling` is the distribution that the student samples from;
    the teacher's is tempered alike, so that a teacher with the student's weights has its log-probs. `support` is that
    of a `TeacherSpec` with a divergence; None asks for the log-probs alone.
    """

    def __init__(
        self,
        config: DecoderConfig,
        update: UpdateConfig,
        *,
        sampling: SamplingParams,
        mesh: Mesh | None = None,
        support: int | None = None,
    ):
        self.config = config
        self._support = support
        self._chunk = update.head_chunk
        self._program = jax.jit(self._tell)
        self.learner = Learner(
            config, sft_loss(), optax.identity(), update, needs=LossNeeds(sampling=sampling), mesh=mesh
        )

    def param_shardings(self) -> Any:
        """Where its weights are to lie; None without a mesh."""
        return self.learner.param_shardings()

    def abstract_params(self) -> Any:
        """The shapes of its weights, with shardings where it has a mesh."""
        shapes = abstract_params(self.config)
        where = self.param_shardings()
        return shapes if where is None else jax.tree.map(lambda x, s: x.update(sharding=s), shapes, where)

    def lower(self, train_batch: TrainBatch) -> jax.stages.Lowered:
        """`score` lowered for a batch of `jax.ShapeDtypeStruct`s, to compile and inspect; nothing runs."""
        program = None if self._support is None else self._program
        return self.learner.lower_with(self.abstract_params(), train_batch, program)

    def score(
        self, params: Params, batch: RolloutBatch, mask: Bool[ArrayLike, "B T"]
    ) -> tuple[Float[np.ndarray, "B T"], dict[str, np.ndarray]]:
        """Log-probs (nats) of the tokens in `mask`, and what is asked of the distributions that they come from, as
        `RolloutBatch.teacher`; 0 elsewhere."""
        mask = np.asarray(mask)
        if self._support is None:
            return self.learner.score_rows(params, batch, mask), {}
        return self.learner.score_with(self._program, params, batch, mask)

    def _tell(self, params: Params, packed: Packed, rows: RaggedRows, sampling: SamplingParams | None) -> Any:
        """Log-probs `[M, Q, C]` of loss tokens, and arrays `[M, Q, C, W]` by name."""

        def one(microbatch: tuple[Packed, RaggedRows]) -> Any:
            packed, rows = microbatch
            index = jnp.asarray(rows.row_index)
            hidden, targets, wanted = scored_states(self.config, params, packed, forward=self.learner.program.forward)
            logprobs, _ = score_hidden(self.config, params, hidden, targets, wanted, sampling, chunk=self._chunk)

            def of_tokens(values: Array) -> Array:
                of_parts = values.reshape(index.shape[0], -1, *values.shape[2:])
                at = index.reshape(*index.shape, *(1,) * (values.ndim - 2))
                return jnp.take_along_axis(of_parts, at, axis=1)

            said: dict[str, Any] = {"hidden": hidden}
            if self._support:
                top = top_tokens(self.config, params, hidden, sampling, count=self._support, chunk=self._chunk)
                said = {"ids": top.ids, "logprobs": top.logprobs, "tail": jnp.expand_dims(top.tail, -1)}
            return jax.tree.map(of_tokens, (logprobs, said))

        return jax.lax.map(one, (packed, rows))


def abstract_said(support: int | None, config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """What a teacher with the decoder `config` says of one token beside its log-prob, [W] by name, where it is asked
    for `support` as `TeacherModel` is."""
    if support is None:
        return {}
    if support == 0:
        return {"hidden": jax.ShapeDtypeStruct((config.embed_dim,), config.dtype)}
    numbers = {"ids": (support, "int32"), "logprobs": (support, "float32"), "tail": (1, "float32")}
    return {name: jax.ShapeDtypeStruct((width,), dtype) for name, (width, dtype) in numbers.items()}
