"""A reward model as a reward of a run."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax.batching import LENGTH_BUCKETS, bucket
from rljax.experiment.model import ComputeDtype, compute_dtype, model_path
from rljax.experiment.sft import demonstration_row
from rljax.models import DecoderConfig, hidden_states, load_config, load_model, values
from rljax.text import Dialogue, load_tokenizer
from rljax.types import Params


@dataclasses.dataclass
class RewardModel:
    """What a reward model says of a prompt and its completion: its number behind the last token, an end of the turn.

        rewards=(RewardConfig("rljax.experiment.reward_model:RewardModel", args={"path": "runs/rm/export"}),)

    Texts become tokens by the model's own tokenizer, so its vocabulary need not be the policy's; a completion that was
    cut off is scored as if it had ended. It runs in this process, on its first device, beside what else lies there.
    ValueError for a folder that holds no reward model, before weights load.
    """

    path: str
    """Hugging Face folder of a reward model, such as `rljax convert` writes of a run of `rljax prefer`."""
    chat: bool | None = None
    """As `config.data.chat` of the run that trained it: whether text becomes a user message of the chat template."""
    batch_size: int = 32
    """Completions that are scored at a time."""
    dtype: ComputeDtype = "auto"
    """Of activations and weights: float32 or bfloat16; `auto` is bfloat16 on a GPU or TPU."""

    is_cheap = True
    """It needs this process's devices, so no worker process runs it."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"RewardModel: batch_size={self.batch_size} must be at least 1")
        folder = model_path(self.path)
        if not load_config(folder).value_head:
            raise ValueError(
                f"RewardModel: path={self.path!r} is a language model, which gives no reward; name a folder whose "
                "config.json says ...ForSequenceClassification with one label"
            )
        self._dialogue = Dialogue(load_tokenizer(folder), chat=self.chat)
        # The mesh in use is a thread's own, and that of a run is not this model's.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="reward-model")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        """A number for each completion."""
        rows = [
            demonstration_row(self._dialogue, prompt, completion, 0, index).tokens
            for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        return self._thread.submit(self.score, rows).result()

    def score(self, rows: Sequence[np.ndarray]) -> list[float]:
        """The number behind the last of the tokens of each row."""
        config, params = self._model
        found: list[float] = []
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            length = bucket(max(map(len, part)), LENGTH_BUCKETS, "the longest completion with its prompt")
            # Always as many rows, so that lengths alone make programs.
            tokens = np.zeros((self.batch_size, length), np.int32)
            ends = np.ones(self.batch_size, np.int32)
            for i, row in enumerate(part):
                tokens[i, : len(row)] = row
                ends[i] = len(row)
            found += np.asarray(_scores(config, params, tokens, ends))[: len(part)].tolist()
        return found

    @functools.cached_property
    def _model(self) -> tuple[DecoderConfig, Params]:
        return load_model(model_path(self.path), dtype=compute_dtype(self.dtype))


@functools.partial(jax.jit, static_argnums=0)
def _scores(config: DecoderConfig, params: Params, tokens: jax.Array, ends: jax.Array) -> jax.Array:
    """Values [B] of the last of `ends` tokens of each row."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    subtree_end = jnp.where(positions < ends[:, None], ends[:, None], 0)
    hidden = hidden_states(config, params, tokens, positions, subtree_end)
    return jnp.take_along_axis(values(config, params, hidden), ends[:, None] - 1, axis=1)[:, 0]
