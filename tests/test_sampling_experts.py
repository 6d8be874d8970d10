"""The experts of a rollout are recorded, and training computes with those of the record."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.batching import PackConfig, layout, loss_mask, stack
from rljax.models import DecoderConfig, Experts, apply_layer, embed, forest_attention, init_params, unstack_layers
from rljax.models.experts import best_experts, recorded_experts
from rljax.models.rope import rotary_tables
from rljax.sampling import Fork, Request, Sampler, SamplerSpec, compile_count, sampling_params
from rljax.sampling.score import score_tokens
from rljax.types import Trajectory

CONFIG = DecoderConfig(
    vocab_size=20,
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=8,
    tied_embeddings=True,
    experts=Experts(count=5, per_token=2, mlp_dim=12),
)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [7]]


def params_of(seed):
    return jax.tree.map(lambda x: 10 * x if x.ndim > 2 else x, init_params(CONFIG, jax.random.key(seed)))


def fork_once(samples):
    """From the middle of the first sample, with a token that is given."""
    return [Fork(0, len(samples[0].tokens) // 2, 7, inject=(2,))] if len(samples) == 2 else []


@pytest.fixture(scope="module")
def sampled():
    """(samples of each prompt, programs compiled after the warm-up) of a decoder with fewer rows than samples."""
    spec = SamplerSpec(
        prompt_buckets=(8,),
        max_new_tokens=6,
        prompt_slots=2,
        sample_slots=1,
        path_slots=2,
        max_injected=1,
        record_experts=True,
    )
    sampler = Sampler(CONFIG, spec)
    sampler.set_params(params_of(0))
    sampler.warmup()
    before = compile_count()
    requests = [Request(prompt, i, (0, 1), rounds=fork_once) for i, prompt in enumerate(PROMPTS)]
    groups = sampler.generate(requests, sampling_params(), seed=0, step=0)
    return groups, compile_count() - before


@functools.partial(jax.jit, static_argnums=2)
def forward(params, tokens, replays, record):
    """(log-probs of all ids [B, T, V], experts [B, T, L, k]) of rows side by side, layer by layer. Experts are the
    best, or with `replays` those of the record [B, T, L, k]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    ends = jnp.full_like(positions, tokens.shape[1])
    (rotary,) = rotary_tables(CONFIG, positions).values()
    x = embed(CONFIG, params, tokens)
    chosen = []

    def attend(q, k, v):
        return forest_attention(q, k, v, positions, ends, 2**30), None

    for layer, weights in enumerate(unstack_layers(CONFIG, params)["layers"]):
        choose = best_experts(CONFIG.experts)
        if replays:
            choose = recorded_experts(CONFIG.experts, record[:, :, layer])

        def noted(probabilities, choose=choose):
            chosen.append(choose(probabilities))
            return chosen[-1]

        x, _ = apply_layer(CONFIG, weights, x, rotary, attend, choose=noted)
    x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + CONFIG.norm_eps)
    return jax.nn.log_softmax(x @ params["embedding"].T), jnp.stack(chosen, axis=2)


def rows_of(groups):
    """(the tokens of a row, its sample) of all samples."""
    pairs = zip(PROMPTS, groups, strict=True)
    return [([*prompt, *one.tokens.tolist()], one) for prompt, group in pairs for one in group]


def padded(rows):
    longest = max(len(row) for row, _ in rows)
    return np.array([row + [0] * (longest - len(row)) for row, _ in rows], np.int32)


def test_what_is_recorded_is_what_the_trainer_chooses_for_every_token(sampled):
    """Of prompts, of what follows them and of forks with a given token."""
    groups, _ = sampled
    rows = rows_of(groups)
    assert len(rows) == 9 and all(group[2].forced for group in groups)
    _, want = forward(params_of(0), padded(rows), False, None)
    for index, (row, sample) in enumerate(rows):
        assert sample.experts.shape == (len(row) - 1, 2, 2)
        assert np.array_equal(sample.experts, want[index, : len(row) - 1])


def test_recording_compiles_nothing_after_the_warm_up(sampled):
    assert sampled[1] == 0


def test_training_computes_with_the_recorded_experts_whatever_the_weights_have_become(sampled):
    """Rows that share prefixes are packed as a forest; the reference is one row at a time."""
    rows = rows_of(sampled[0])
    trajectories = []
    for index, (row, sample) in enumerate(rows):
        prompt = len(row) - len(sample.tokens)
        zeros = np.zeros(len(row))
        trajectories.append(
            Trajectory(
                tokens=np.array(row, np.int32),
                action_mask=np.arange(len(row)) >= prompt,
                behavior_logprobs=zeros.astype(np.float32),
                entropies=zeros.astype(np.float32),
                turn_ids=zeros.astype(np.int32),
                policy_version=zeros.astype(np.int32),
                prompt_id=0,
                group_id=index // 3,
                episode_id=index,
                experts=np.concatenate([sample.experts, np.full((1, 2, 2), -1, np.int16)]),
            )
        )
    batch = stack(trajectories)
    mask = loss_mask(batch)
    packing = layout(batch, mask, PackConfig(pack_length=64, microbatch_size=1))
    assert packing.unique_tokens < packing.flat_tokens
    packed = jax.tree.map(lambda x: x[0], packing.packed)
    params = params_of(1)
    score = jax.jit(lambda packed: score_tokens(CONFIG, params, packed)[0])
    found = packing.batch_of(np.asarray(score(packed)).reshape(-1)[packing.row_index[0]][None], batch.tokens)
    own = packing.batch_of(
        np.asarray(score(dataclasses.replace(packed, experts=None))).reshape(-1)[packing.row_index[0]][None],
        batch.tokens,
    )

    tokens = padded(rows)
    logprobs, used = forward(params, tokens, True, batch.experts[: len(rows), : tokens.shape[1]])
    changed = 0
    for index, (row, sample) in enumerate(rows):
        assert np.array_equal(used[index, : len(row) - 1], sample.experts)
        actions = np.flatnonzero(mask[index])
        want = np.asarray(logprobs)[index, actions - 1, np.array(row)[actions]]
        assert np.abs(found[index, actions] - want).max() < 1e-5
        changed += np.abs(own[index, actions] - want).max() > 1e-3
    assert changed > 4  # other weights choose other experts


def test_a_record_of_a_model_without_experts_is_refused():
    plain = dataclasses.replace(CONFIG, experts=None)
    with pytest.raises(ValueError, match="record_experts=True needs a model with experts"):
        Sampler(
            plain,
            SamplerSpec(prompt_buckets=(4,), max_new_tokens=1, prompt_slots=1, sample_slots=1, record_experts=True),
        )
