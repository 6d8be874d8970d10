"""Samples of a model with a delta rule in some layers, beside the trainer's forward pass over whole sequences."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_parallel_mesh import run_python

from rljax.models import fresh_config, hidden_states, init_params, logits
from rljax.sampling import Request, Sampler, SamplerSpec, TurnDecoder, TurnDecoderSpec, sampling_params
from rljax.sampling.prompt_scores import score_prompts
from rljax.sampling.weights import decode_weights

CONFIG = fresh_config(
    "qwen3_5_text",
    vocab_size=29,
    num_layers=4,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    max_position=64,
)
PARAMS = jax.tree.map(lambda x: 5 * x if x.ndim == 3 else x, init_params(CONFIG, jax.random.key(0)))
SPEC = SamplerSpec(prompt_slots=2, sample_slots=2, prompt_buckets=(4, 8), max_new_tokens=12)
LENGTH = 20


@functools.partial(jax.jit, static_argnums=0)
def _logprobs(config, params, row, end):
    positions = jnp.arange(LENGTH)[None]
    hidden = hidden_states(config, params, row, positions, jnp.where(positions < end, end, 0))
    return jax.nn.log_softmax(logits(config, params, hidden)[0])


def logprobs(prompt, completion):
    """Of the completion, by the trainer's forward pass."""
    ids = [*prompt, *completion]
    table = _logprobs(CONFIG, PARAMS, jnp.asarray([ids + [0] * (LENGTH - len(ids))]), len(ids))
    return np.asarray([table[len(prompt) + i - 1, token] for i, token in enumerate(completion)])


def sampler(**change):
    made = Sampler(CONFIG, dataclasses.replace(SPEC, **change))
    made.set_params(PARAMS)
    return made


def test_samples_have_the_log_probs_of_the_trainer():
    """More of them than rows, so that rows and slots are used again, and prompts of all lengths, one token among
    them."""
    prompts = [[3], [1, 2, 3, 4, 5, 6, 7, 8], [9, 9, 9], [4, 20, 11, 2, 8]]
    requests = [
        Request(prompt=np.asarray(prompt), prompt_id=i, sample_ids=tuple(range(3)), max_new_tokens=5 + 2 * i)
        for i, prompt in enumerate(prompts)
    ]
    groups = sampler().generate(requests, sampling_params(), seed=1, step=2)
    for prompt, request, group in zip(prompts, requests, groups, strict=True):
        assert len(group) == 3 and len({tuple(sample.tokens) for sample in group}) > 1
        for sample in group:
            assert len(sample.tokens) == request.max_new_tokens
            np.testing.assert_allclose(sample.logprobs, logprobs(prompt, sample.tokens), atol=2e-5)


def test_a_sample_does_not_depend_on_what_else_is_sampled():
    alone = Request(prompt=np.asarray([5, 6, 7]), prompt_id=7, sample_ids=(1,), max_new_tokens=9)
    other = Request(prompt=np.asarray([1, 2]), prompt_id=3, sample_ids=(0, 1, 2, 3, 4), max_new_tokens=4)
    made = sampler()
    ((single,),) = made.generate([alone], sampling_params(), seed=0, step=0)
    _, (among,) = made.generate([other, alone], sampling_params(), seed=0, step=0)
    assert single.tokens.tolist() == among.tokens.tolist()


def test_prompts_are_scored_as_the_trainer_does():
    tokens = np.asarray([[1, 2, 3, 4, 5, 6], [9, 8, 7, 0, 0, 0]])
    scores = score_prompts(CONFIG, 2, decode_weights(CONFIG, PARAMS), tokens)
    for row, length in enumerate((6, 3)):
        wanted = logprobs(tokens[row, :1].tolist(), tokens[row, 1:length].tolist())
        np.testing.assert_allclose(scores.logprobs[row, : length - 1], wanted, atol=2e-5)


def test_what_starts_anywhere_is_refused():
    with pytest.raises(
        ValueError, match=r"from samples \(path_slots=1\) needs a model all of .* whose samples do not fork$"
    ):
        sampler(path_slots=1)
    spec = TurnDecoderSpec(conversations=2, rows=2, context_length=32, max_new_tokens=8)
    with pytest.raises(ValueError, match=r"of several turns needs .* 3 of 4 here have .* or tasks of single answers$"):
        TurnDecoder(CONFIG, spec)


def test_the_cache_counts_memories():
    made = sampler()
    cache = made._new_cache(8)
    held = sum(x.nbytes for x in jax.tree.leaves((cache.prompt_memory, cache.row_memory)))
    # Memories in float32, and the last three tokens before the convolution.
    delta = CONFIG.delta
    assert held == 3 * 2 * (1 + 2) * 4 * (4 * 8 * 8 + 3 * sum(delta.widths))
    keys = 2 * CONFIG.num_kv_heads * CONFIG.head_dim * 4 * 2 * (8 + 2 * 12)
    assert made.cache_bytes() == held + keys


@pytest.fixture(scope="module")
def on_meshes():
    return json.loads(run_python("hybrid_mesh_program.py", devices=8))


@pytest.mark.parametrize("mesh", ["1x8x1", "2x2x2"])
def test_devices_of_a_mesh_train_what_one_does(on_meshes, mesh):
    assert on_meshes["trained"][mesh]["gradient"] < 2e-5


@pytest.mark.parametrize("mesh", ["1x8x1", "2x2x2"])
def test_devices_gather_weights_alone(on_meshes, mesh):
    """And the tokens, whose embeddings they exchange; all else of a row has its 40 positions too."""
    gathered = on_meshes["trained"][mesh]["gathered"]
    assert {shape.split("[")[0] for shape in gathered if "40" in shape} == {"s32"}
    assert sum(shape.startswith("f32") for shape in gathered) > 10


def test_devices_of_a_mesh_sample_what_one_does(on_meshes):
    assert on_meshes["sampled"]
