"""What the learner does for token-level objectives: selection over whole minibatches, noise that belongs to tokens."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import xla_flags
from test_training_learner import CONFIG, FLAT, params, rollout, update_config

from rljax import losses as L
from rljax.batching import PackConfig, dense_rows, stack
from rljax.models import hidden_states, logits
from rljax.sampling import sampling_params
from rljax.training import Learner, LossNeeds
from rljax.types import Trajectory

TESTS = Path(__file__).parent
ACCUMULATED = PackConfig(pack_length=64, microbatch_size=1)


def make(pack, loss, *, needs=None, sampling=None, seed=0, **changes):
    """Plain gradient descent, so that the step is the gradient."""
    update = update_config(pack, **changes)
    needs = dataclasses.replace(needs or LossNeeds(), sampling=sampling)
    return Learner(CONFIG, loss, optax.sgd(1.0), update, needs=needs, seed=seed)


def dapo(ratio_fn=L.token_ratio, **parts):
    surrogate = L.clipped(clip_low=0.2, clip_high=0.28, dual_clip=10.0)
    return L.policy_loss(ratio_fn, surrogate, L.token_mean, **parts)


@functools.cache
def selecting(fraction, temperature=1.0, top_k=0):
    """A learner that accumulates, compiled once."""
    loss = dapo(select_fn=None if fraction is None else L.high_entropy(fraction))
    return make(ACCUMULATED, loss, sampling=sampling_params(temperature=temperature, top_k=top_k))


def step(learner, batch, advantages):
    state = learner.init_state(params())
    state, metrics = learner.update(state, learner.prepare(state, batch, advantages)[0])
    return jax.device_get((state.trainable, metrics))


def assert_same_params(got, want, relative=2e-5):
    """Both after one step from `params()`: equal up to `relative` of a tensor's largest change, and its rounding."""

    def same(a, b, start):
        np.testing.assert_allclose(a, b, rtol=2**-22, atol=relative * np.abs(b - start).max())

    jax.tree.map(same, got, want, jax.device_get(params()))


def entropies_of(batch, mask):
    """H of the policy at every token of `mask`, full softmax at temperature 1, from a dense pass over rows."""
    tokens = jnp.asarray(batch.tokens)
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    z = _logits(params(), tokens, at, jnp.full(tokens.shape, tokens.shape[1]))
    z = np.asarray(z, np.float64)
    logp = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    out = np.zeros(mask.shape)
    out[:, 1:] = -(np.exp(logp) * logp).sum(axis=-1)[:, :-1]
    return np.where(mask, out, 0)


@jax.jit
def _logits(weights, tokens, positions, end):
    return logits(CONFIG, weights, hidden_states(CONFIG, weights, tokens, positions, end))


@pytest.mark.parametrize(
    "sampling", [{}, pytest.param({"temperature": 0.5, "top_k": 5}, marks=pytest.mark.slow)], ids=["plain", "tempered"]
)
def test_selection_is_by_the_policy_s_entropies_over_the_whole_minibatch(sampling):
    """Equal to advantages masked by hand beforehand, the denominator that of all tokens."""
    batch, advantages = rollout()
    mask = batch.action_mask & batch.is_valid[:, None]
    entropies = entropies_of(batch, mask)
    chosen = mask & (entropies >= np.quantile(entropies[mask], 0.7))
    learner = selecting(0.3, **sampling)
    assert len(learner.prepare(learner.init_state(params()), batch, advantages)[0].packed.tokens) > 1
    got, metrics = step(learner, batch, advantages)
    want, _ = step(selecting(None, **sampling), batch, np.where(chosen, advantages, 0))
    assert_same_params(got, want)
    assert metrics["loss/selected_fraction"] == pytest.approx(chosen.sum() / mask.sum())
    everything, _ = step(selecting(None, **sampling), batch, advantages)
    with pytest.raises(AssertionError):
        assert_same_params(got, everything)


def test_selecting_everything_changes_nothing_at_all():
    batch, advantages = rollout()
    got, _ = step(selecting(1.0), batch, advantages)
    want, _ = step(selecting(None), batch, advantages)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def uniforms_by_row(train_batch):
    """{(old log-probs of the row's tokens): their uniforms}: rows are known by what they hold."""
    rows = dense_rows(train_batch.rows)
    found = {}
    for mask, behavior, uniforms in zip(
        *(np.asarray(x).reshape(-1, x.shape[-1]) for x in (rows.loss_mask, rows.behavior_logprobs, rows.uniforms))
    ):
        if mask.any():
            found[tuple(behavior[mask])] = tuple(uniforms[mask])
        assert not uniforms[~mask].any()
    return found


def test_noise_belongs_to_a_token_and_an_update_not_to_the_layout():
    batch, advantages = rollout()
    seen = {}
    for name, spec, minibatches in [
        ("flat", FLAT, 1),
        ("packed", PackConfig(pack_length=128), 1),
        ("accumulated", ACCUMULATED, 1),
        ("minibatches", ACCUMULATED, 2),
    ]:
        learner = make(spec, dapo(), minibatches=minibatches, epochs=2, needs=LossNeeds(uniforms=True), seed=3)
        state = learner.init_state(params())
        made = learner.prepare(state, batch, advantages)
        assert len(made) == 2 * minibatches
        epochs = [{}, {}]
        for index, train_batch in enumerate(made):
            epochs[index // minibatches] |= uniforms_by_row(train_batch)
        seen[name] = epochs
    assert all(epochs == seen["flat"] for epochs in seen.values())
    first, second = seen["flat"]
    assert first.keys() == second.keys() and all(first[row] != second[row] for row in first)
    values = np.concatenate([*map(np.array, first.values()), *map(np.array, second.values())])
    assert len(np.unique(values)) == len(values) and ((values >= 0) & (values < 1)).all()
    again = uniforms_by_row(learner.prepare(state, batch, advantages)[0])
    assert all(again[row] == first[row] for row in again)
    state, _ = learner.update(state, made[0])
    later = uniforms_by_row(learner.prepare(state, batch, advantages)[0])
    assert all(later[row] != first[row] for row in later)
    assert make(FLAT, dapo()).prepare(learner.init_state(params()), batch, advantages)[0].rows.uniforms is None


def test_noise_does_not_depend_on_padding():
    batch, advantages = rollout()
    wide = stack(_trajectories(batch), row_buckets=(40,), length_buckets=(50,))
    padded = np.pad(advantages, ((0, 40 - len(advantages)), (0, 50 - advantages.shape[1])))
    learner = make(FLAT, dapo(), needs=LossNeeds(uniforms=True))
    state = learner.init_state(params())
    got, want = (uniforms_by_row(learner.prepare(state, b, a)[0]) for b, a in [(wide, padded), (batch, advantages)])
    assert got == want


def _trajectories(batch):
    per_token = ("tokens", "action_mask", "behavior_logprobs", "entropies", "turn_ids", "policy_version")
    return [
        Trajectory(
            **{name: getattr(batch, name)[i, :length] for name in per_token},
            prompt_id=0,
            group_id=int(batch.group_id[i]),
            episode_id=i,
            is_valid=bool(batch.is_valid[i]),
        )
        for i, length in enumerate(batch.lengths)
        if length
    ]


def test_a_rescued_update_accumulates_exactly():
    """Off-policy, so that there are ratios off 1; microbatches equal the flat minibatch, noise included."""
    batch, advantages = rollout()
    parts = L.rescue(L.token_ratio, clip_low=0.2, clip_high=0.28, noise=L.two_sided(0.5))
    ends = []
    for spec in (FLAT, ACCUMULATED):
        learner = make(
            spec, dapo(parts.ratio_fn, report_fns=[parts.report_fn]), epochs=2, needs=LossNeeds(uniforms=True)
        )
        before = learner.init_state(jax.tree.map(lambda p, q: p + 0.03 * q, params(0), params(1)))
        minibatch = learner.prepare(before, batch, advantages)[0]
        state, metrics = learner.update(learner.init_state(params()), minibatch)
        ends.append(jax.device_get((state.trainable, metrics)))
    assert_same_params(ends[0][0], ends[1][0])
    shares = [[float(end[1][f"loss/{name}"]) for name in ("clip_active", "rescued", "clip_fraction")] for end in ends]
    assert shares[0] == pytest.approx(shares[1]) and shares[0][1] > 0


@pytest.mark.slow  # four devices on few cores
def test_selection_and_noise_on_a_mesh_equal_those_of_one_device():
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=xla_flags(4),
        PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}",
    )
    command = [sys.executable, str(TESTS / "token_objectives_mesh_program.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    one, *others = json.loads(done.stdout.splitlines()[-1])
    assert 0 < one["metrics"]["loss/selected_fraction"] < 0.5 and one["metrics"]["loss/rescued"] > 0
    for other in others:
        for name, value in one["metrics"].items():
            assert other["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        np.testing.assert_allclose(other["params"], one["params"], atol=2e-5)
