"""Prompts are scored by the weights that decode as the trainer scores them, whatever the family's layers have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_decoder import CONFIGS, weights

from rljax.models import hidden_states, logits
from rljax.sampling.prompt_scores import score_prompts
from rljax.sampling.weights import decode_weights


@pytest.mark.parametrize("name", ["biases_window", "sinks_clamped_biased_experts"])
def test_a_prompt_has_the_log_probs_ranks_and_best_tokens_of_the_models_logits(name):
    config = CONFIGS[name]
    params = weights(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 9)), jnp.int32)
    got = score_prompts(config, 3, decode_weights(config, params), tokens)

    @jax.jit
    def by_the_trainer(params):
        ends = jnp.full(tokens.shape, tokens.shape[1])
        hidden = hidden_states(config, params, tokens, jnp.broadcast_to(jnp.arange(9), tokens.shape), ends)
        return jax.nn.log_softmax(logits(config, params, hidden), axis=-1)[:, :-1]

    want = np.asarray(by_the_trainer(params))
    own = np.take_along_axis(want, np.asarray(tokens)[:, 1:, None], axis=-1)
    np.testing.assert_allclose(got.logprobs, own[..., 0], atol=2e-5)
    np.testing.assert_array_equal(got.ranks, 1 + np.sum(want > own, axis=-1))
    np.testing.assert_array_equal(got.ids, np.argsort(-want, axis=-1)[..., :3])
    np.testing.assert_allclose(got.top, -np.sort(-want, axis=-1)[..., :3], atol=2e-5)
