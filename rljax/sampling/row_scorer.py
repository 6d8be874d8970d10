"""Log-probs of samples under weights that did not sample them."""

import contextlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rljax.models.config import DecoderConfig
from rljax.parallel import to_host, use_mesh
from rljax.sampling.logits import SamplingParams
from rljax.sampling.score import score_tokens
from rljax.sampling.weights import take_params
from rljax.types import ArrayLike, Packed, Params


def score_rows(
    config: DecoderConfig,
    params: Params,
    tokens: Int[ArrayLike, "B S"],
    lengths: Int[ArrayLike, " B"],
    sampling: SamplingParams,
    first: Int[ArrayLike, ""] | int = 1,
) -> Float[Array, "B S"]:
    """Log-probs (nats) of the tokens of rows that share nothing, each under the distribution that is sampled from after
    the tokens before it; 0 for the first token of a row and behind its length. Those before place `first` are given,
    and have 0 too."""
    place = jnp.broadcast_to(jnp.arange(jnp.shape(tokens)[1]), jnp.shape(tokens))
    is_inside = place < jnp.asarray(lengths)[:, None]
    packed = Packed(
        tokens=jnp.asarray(tokens),
        positions=place,
        predecessor=place - 1,
        subtree_end=jnp.where(is_inside, jnp.asarray(lengths)[:, None], 0),
        score_index=jnp.where(is_inside & (place >= first), place, -1),
    )
    return score_tokens(config, params, packed, sampling)[0]


_score_rows = jax.jit(score_rows, static_argnums=0)


class RowScorer:
    """Scores samples of prompts, `rows` at a time and of at most `length` tokens with their prompt, in one program."""

    def __init__(self, config: DecoderConfig, mesh: jax.sharding.Mesh | None, *, rows: int, length: int):
        self.config = config
        self.mesh = mesh
        self._shape = (rows, length)
        self._params: Params | None = None

    def set_params(self, params: Params) -> None:
        """The weights to score with, as the model takes them. They are not copied, so they must not be donated before
        the last call; but for those that are spread over several processes, of which each takes a copy."""
        self._params = take_params(self.config, self.mesh, params)

    def __call__(
        self, prompt: Sequence[int], completions: Sequence[Sequence[int] | np.ndarray], sampling: SamplingParams
    ) -> list[Float[np.ndarray, " T"]]:
        """Log-probs of each completion's tokens behind the prompt. ValueError before weights are set."""
        if self._params is None:
            raise ValueError("the scorer has no weights; call set_params(params) first")
        whole = [np.concatenate([prompt, completion]).astype(np.int32) for completion in completions]

        scored: list[np.ndarray] = []
        for start in range(0, len(whole), self._shape[0]):
            part = whole[start : start + self._shape[0]]
            tokens = np.zeros(self._shape, np.int32)
            lengths = np.zeros(self._shape[0], np.int32)
            for row, ids in enumerate(part):
                tokens[row, : len(ids)] = ids
                lengths[row] = len(ids)

            with contextlib.nullcontext() if self.mesh is None else use_mesh(self.mesh):
                # What is penalised depends on which tokens were sampled.
                first = (np.int32(len(prompt)),) if sampling.penalises else ()
                values = to_host(_score_rows(self.config, self._params, tokens, lengths, sampling, *first))
            scored += [row[len(prompt) : len(ids)] for row, ids in zip(values, part, strict=False)]
        return scored
