"""The critic: values and gradients whatever the packing, what it learns, where it starts, and that it is saved."""

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
from objectives import MASK, NAN, float64, make_rows
from test_training_learner import CONFIG, FLAT, assert_close, params, rollout, update_config

from rljax import losses as L
from rljax.algorithms import GRPO, PPO
from rljax.batching import PackConfig, loss_mask
from rljax.experiment import CriticConfig
from rljax.experiment.build import build, critic_params
from rljax.experiment.memory import held_state
from rljax.models import abstract_params, hidden_states, init_params, save_hf, value_config, value_params, values
from rljax.sampling import compile_count
from rljax.testing import tiny_config
from rljax.training import Checkpointer, Critic, Learner, OptimizerConfig, explained_variance, fingerprint, with_critic

TESTS = Path(__file__).parent
VALUED = value_config(CONFIG)
PACKINGS = {
    "flat": FLAT,
    "forest": PackConfig(pack_length=128, microbatch_size=2),
    "accumulated": PackConfig(pack_length=64, microbatch_size=1),
    "accumulated rows": PackConfig(pack_length=32, microbatch_size=2, share_prefixes=False),
}


def make(packing=FLAT, *, returns_fn=None, clip=0.2, config=CONFIG, optimizer=None, mesh=None, **changes):
    optimizer = optimizer or OptimizerConfig(learning_rate=1e-2)
    returns_fn = returns_fn or (lambda batch: targets(batch))
    update = update_config(packing, **changes)
    return Critic(config, L.value_loss(clip=clip), optimizer, returns_fn, update, mesh=mesh)


def weights(seed=0):
    """A critic whose head says something."""
    rng = np.random.default_rng(seed)
    head = {
        "value_head": jnp.asarray(rng.normal(size=CONFIG.embed_dim) / 4, jnp.float32),
        "value_bias": jnp.float32(0.3),
    }
    return value_params(VALUED, params(seed)) | head


def targets(batch):
    """Some returns."""
    return np.random.default_rng(9).normal(size=np.shape(batch.tokens)).astype(np.float32)


@jax.jit
def dense_values(tree, tokens):
    """V before every token, from a padded forward pass over whole rows: nothing packed, nothing gathered."""
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = hidden_states(VALUED, tree, tokens, at, jnp.full(tokens.shape, tokens.shape[1]))
    found = jnp.einsum("btd,d->bt", hidden, tree["value_head"]) + tree["value_bias"]
    return jnp.pad(found[:, :-1], ((0, 0), (1, 0)))


def old_values(batch):
    """Values of a critic a little away, so that some tokens are clipped."""
    mask = loss_mask(batch)
    near = np.asarray(dense_values(weights(), jnp.asarray(batch.tokens)))
    away = np.random.default_rng(4).normal(size=near.shape).astype(np.float32)
    return np.where(mask, near + 0.3 * away, 0).astype(np.float32)


@functools.cache
def gradient(name):
    """(loss, metrics, gradient) of the second of two epochs, when the old values are constants."""
    critic, (batch, _) = make(PACKINGS[name], epochs=2).learner, rollout()
    rows = dataclasses.replace(batch, behavior_logprobs=old_values(batch))
    minibatch = critic.prepare(critic.init_state(weights()), rows, targets(batch))[0]
    return jax.jit(critic.program.gradients)(weights(), minibatch, None)


@pytest.mark.parametrize("name", PACKINGS)
def test_values_are_those_of_a_padded_forward_pass(name):
    batch, _ = rollout()
    mask = loss_mask(batch)
    want = np.where(mask, dense_values(weights(), jnp.asarray(batch.tokens)), 0)
    got = make(PACKINGS[name]).learner.score_rows(weights(), batch)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert np.ptp(got[mask]) > 0.1


def test_forests_share_what_they_pack():
    batch, _ = rollout()
    critic = make(PACKINGS["forest"])
    state = critic.init_state(params())
    _, metrics = critic.update(state, critic.with_values(state, batch))
    assert metrics["pack/token_ratio"] > 1.2 and metrics["pack/is_forest"] == 1


def test_a_warm_up_leaves_the_critic_as_it_was_and_nothing_to_compile():
    batch, _ = rollout()
    critic = make(PACKINGS["forest"], compile_ahead=2)
    state = critic.init_state(weights())
    batch = critic.with_values(state, batch)
    before = jax.tree.map(np.array, state)
    assert not critic.learner.is_warm
    done: list[tuple[int, int]] = []
    state = critic.warm_up(state, batch, lambda *numbers: done.append(numbers))
    assert critic.learner.is_warm and done == [(1, 2), (2, 2)]
    jax.tree.map(np.testing.assert_array_equal, before, state)

    count = compile_count()
    (minibatch,) = critic.learner.prepare(state, *reversed(critic._targets(batch)))
    critic.learner.update(state, minibatch)
    assert compile_count() == count


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("flat", "accumulated") else pytest.mark.slow) for n in PACKINGS]
)
def test_the_gradient_is_that_of_the_clipped_loss_on_padded_rows(name):
    batch, _ = rollout()
    mask, old, goal = loss_mask(batch), old_values(batch), targets(batch)

    def objective(tree):
        v = dense_values(tree, jnp.asarray(batch.tokens))
        bounded = old + jnp.clip(v - old, -0.2, 0.2)
        worse = jnp.maximum((v - goal) ** 2, (bounded - goal) ** 2) / 2
        return jnp.where(mask, worse, 0).sum() / mask.sum()

    # The yardstick is compiled as in production. The same sum compiled at another level, or for another CPU, is up to
    # 1.4e-5 of the largest entry away: of rounding, since each form of the gradient is 3e-6 from the other's at one
    # level.
    production = {"xla_backend_optimization_level": 3}
    want_loss, want = jax.jit(jax.value_and_grad(objective), compiler_options=production)(weights())
    scored = gradient(name)
    got = scored.grads
    np.testing.assert_allclose(scored.loss, want_loss, rtol=1e-5)
    assert_close(got, want, relative=3e-5)
    assert 0.05 < scored.metrics["critic/clip_fraction"] < 0.9
    assert jnp.abs(got["value_head"]).max() > 0 and jnp.abs(got["embedding"]).max() > 0


def test_the_value_loss_is_the_worked_example_and_its_gradient_that_of_finite_differences():
    old = np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.4, 0.3, NAN]])
    goal = np.array([[0.899675, 0.9365, 0.97, 1], [0.4855, 0.49, 0.5, NAN]])
    new = np.array([[0.5, 0.1, 0.3, 0.9], [0.2, 0.4, 0.35, NAN]])
    with float64():
        for clip, want in [(0.2, 0.127168043259), (None, None)]:
            loss = L.value_loss(clip=clip)
            rows = make_rows(MASK, aggregate=L.token_mean, old=old, advantages=goal)

            def of(v, loss=loss, rows=rows):
                return loss.loss(jnp.asarray(v), jnp.zeros(v.shape), rows)

            value, metrics = of(new)
            want = want or np.mean((new - goal)[MASK] ** 2) / 2
            np.testing.assert_allclose(value, want, rtol=1e-11)
            slope = jax.grad(lambda v, of=of: of(v)[0])(jnp.asarray(new))
            for place in np.ndindex(*MASK.shape):
                step = np.zeros(MASK.shape)
                step[place] = 1e-6
                numeric = (of(new + step)[0] - of(new - step)[0]) / 2e-6 if MASK[place] else 0.0
                np.testing.assert_allclose(slope[place], numeric, atol=1e-9)
            np.testing.assert_allclose(metrics["critic/value_mean"], new[MASK].mean())
            np.testing.assert_allclose(metrics["critic/return_mean"], goal[MASK].mean())
            # Where the clipped value is the farther one, it counts and does not move.
            beyond = np.abs(new - old) > 0.2
            farther = np.abs(np.clip(new, old - 0.2, old + 0.2) - goal) > np.abs(new - goal)
            share = (beyond & farther)[MASK].mean() if clip else 0.0
            np.testing.assert_allclose(metrics["critic/clip_fraction"], share)
            assert (np.asarray(slope)[MASK] == 0).mean() == share


def test_nothing_to_learn_from_is_a_loss_of_zero():
    rows = make_rows(
        np.zeros((2, 3), bool), aggregate=L.token_mean, old=np.full((2, 3), NAN), advantages=np.ones((2, 3))
    )
    value, metrics = L.value_loss().loss(jnp.full((2, 3), NAN), jnp.zeros((2, 3)), rows)
    assert value == 0 and not any(metrics.values())


@pytest.mark.slow
def test_a_known_value_function_is_learned():
    """A function of the last two tokens of the state, on rows that were never trained on."""

    def known(batch):
        small = np.pad(np.asarray(batch.tokens) < 2, ((0, 0), (2, 0))).astype(np.float32)
        return small[:, 1:-1] - 0.5 * small[:, :-2]

    spec = PackConfig(
        pack_length=128, length_buckets=(128,), score_buckets=(128,), row_buckets=(32,), microbatch_buckets=(4,)
    )
    critic = make(spec, returns_fn=known, clip=None)
    held_out, _ = rollout(seed=1000)
    state, spoken = critic.init_state(params()), []
    for seed in range(120):
        batch, _ = rollout(seed=seed)
        state, metrics = critic.update(state, critic.with_values(state, batch))
        spoken.append(metrics["critic/explained_variance"])
    critic.check()
    found = critic.with_values(state, held_out).values
    assert spoken[0] == 0  # every value is 0 at first
    assert explained_variance(known(held_out), found, loss_mask(held_out)) > 0.9, spoken[-5:]


def test_explained_variance():
    mask = np.array([[True, True, True, False]])
    returns = np.array([[1.0, 2.0, 3.0, NAN]])
    for guess, want in [((1, 2, 3), 1), ((5, 6, 7), 1), ((2, 2, 2), 0), ((3, 2, 1), -3), ((1, 2, 2), 2 / 3)]:
        assert explained_variance(returns, np.array([[*guess, NAN]]), mask) == pytest.approx(want)
    assert explained_variance(np.ones((1, 4)), returns, mask) == 0
    assert explained_variance(returns, returns, np.zeros((1, 4), bool)) == 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_critic_starts_from_a_copy_of_the_policy_and_says_0(tied):
    config = dataclasses.replace(CONFIG, tied_embeddings=tied)
    policy = init_params(config, jax.random.key(0))
    before = fingerprint(policy)
    critic, (batch, _) = make(config=config), rollout()
    state = critic.init_state(policy)
    assert set(state.trainable) == {*policy} - {"head"} | {"value_head", "value_bias"}
    for name in {*state.trainable} & {*policy}:
        jax.tree.map(np.testing.assert_array_equal, state.trainable[name], policy[name])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state.trainable) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract_params(critic.config)
    )
    batch = critic.with_values(state, batch)
    assert not batch.values.any()
    state, _ = critic.update(state, batch)  # which donates what it is given
    assert critic.with_values(state, batch).values.any()
    assert fingerprint(policy) == before


def test_several_updates_clip_around_the_values_before_the_first():
    """Two epochs in one go equal two steps by hand, the second with the same old values and returns."""
    batch, _ = rollout()
    critic = make(epochs=2, clip=0.01, optimizer=optax.sgd(0.05))
    start = critic.init_state(params()).replace(trainable=weights())
    batch = critic.with_values(start, batch)
    got, metrics = critic.update(start, batch)
    mask, old, goal = loss_mask(batch), batch.values, targets(batch)

    @jax.jit
    def slope(tree):
        def objective(tree):
            v = dense_values(tree, jnp.asarray(batch.tokens))
            bounded = old + jnp.clip(v - old, -0.01, 0.01)
            worse = jnp.maximum((v - goal) ** 2, (bounded - goal) ** 2) / 2
            return jnp.where(mask, worse, 0).sum() / mask.sum()

        return jax.grad(objective)(tree)

    want = weights()
    for _ in range(2):
        want = jax.tree.map(lambda p, g: p - 0.05 * g, want, slope(want))
    assert_close(got.trainable, want)
    assert int(got.step) == 2 and metrics["critic/clip_fraction"] > 0
    with pytest.raises(AssertionError):
        assert_close(jax.tree.map(lambda p, g: p - 0.05 * g, weights(), slope(weights())), want)


def test_metrics_are_the_critic_s_own():
    batch, _ = rollout()
    critic = make()
    state = critic.init_state(params())
    _, metrics = critic.update(state, critic.with_values(state, batch))
    names = ("loss", "clip_fraction", "value_mean", "return_mean", "explained_variance", "grad_norm", "skipped")
    assert {n for n in metrics if not n.startswith("pack/")} == {f"critic/{n}" for n in (*names, "learning_rate")}
    mask = loss_mask(batch)
    assert metrics["critic/loss"] == pytest.approx((targets(batch)[mask] ** 2).mean() / 2, rel=1e-5)
    assert metrics["critic/return_mean"] == pytest.approx(targets(batch)[mask].mean(), rel=1e-4)
    assert metrics["critic/learning_rate"] == pytest.approx(1e-2) and metrics["critic/grad_norm"] > 0


def test_an_update_that_is_not_finite_changes_nothing_and_is_reported():
    batch, _ = rollout()
    critic = make(returns_fn=lambda b: np.full(np.shape(b.tokens), np.nan, np.float32), max_skipped=2)
    state = critic.init_state(params())
    before = fingerprint(state.trainable)
    for _ in range(2):
        state, metrics = critic.update(state, critic.with_values(state, batch))
    assert metrics["critic/skipped"] == 2 and fingerprint(state.trainable) == before
    with pytest.raises(FloatingPointError, match="2 updates in a row"):
        critic.check()


def test_a_checkpoint_holds_weights_and_moments_of_the_critic_bit_for_bit(tmp_path):
    learner, critic = Learner(CONFIG, L.policy_loss(*OBJECTIVE), OptimizerConfig(), update_config(FLAT)), make()
    state = with_critic(learner.init_state(params()), critic.init_state(params()))
    batch, _ = rollout()
    moved, _ = critic.update(state.critic, critic.with_values(state.critic, batch))
    state = with_critic(state, moved)
    with_steps = Checkpointer(tmp_path)
    with_steps.save(1, state, {})
    with_steps.close()
    target = with_critic(learner.abstract_state(), critic.abstract_state())
    restored, _, step = Checkpointer(tmp_path).restore(target)
    assert step == 1 and fingerprint(restored) == fingerprint(state)
    assert any("critic" in name and "mu" in name for name in fingerprint(state))
    with pytest.raises(ValueError, match="start in a new folder"):
        Checkpointer(tmp_path).restore(learner.abstract_state())


OBJECTIVE = L.token_ratio, L.clipped(clip_low=0.2, clip_high=0.2), L.token_mean


def test_a_critic_may_start_from_another_model(tmp_path):
    run = build(tiny_config(algorithm=PPO(group_size=4)))
    assert run.critic.config == value_config(run.decoder)
    assert critic_params(run, {"its": "own"}) == {"its": "own"}
    larger = dataclasses.replace(run.decoder, num_layers=3, embed_dim=64)
    other = init_params(larger, jax.random.key(7))
    save_hf(tmp_path / "other", larger, other)
    run = build(tiny_config(algorithm=PPO(), critic=CriticConfig(model=str(tmp_path / "other"))))
    state = run.init_state(init_params(run.decoder, jax.random.key(0)))
    assert state.trainable["embedding"].shape[1] == 32 and state.critic.trainable["embedding"].shape[1] == 64
    jax.tree.map(np.testing.assert_array_equal, state.critic.trainable["layers"], other["layers"])
    assert jax.tree.map(lambda x: (x.shape, x.sharding), run.abstract_state()) == jax.tree.map(
        lambda x: (x.shape, x.sharding), state
    )
    save_hf(
        tmp_path / "small",
        dataclasses.replace(larger, vocab_size=5),
        init_params(dataclasses.replace(larger, vocab_size=5), jax.random.key(0)),
    )
    with pytest.raises(ValueError, match=r"embeddings for 5 tokens, but the policy samples \d+; take a model"):
        build(tiny_config(algorithm=PPO(), critic=CriticConfig(model=str(tmp_path / "small"))))
    with pytest.raises(ValueError, match="no model at"):
        build(tiny_config(algorithm=PPO(), critic=CriticConfig(model=str(tmp_path / "none"))))


def test_impossible_critics_are_refused():
    for critic, message in [
        (CriticConfig(epochs=0), "config.critic.epochs=0 must be at least 1"),
        (CriticConfig(warmup_steps=-1), "config.critic.warmup_steps=-1 must be at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(tiny_config(algorithm=PPO(), critic=critic))
    with pytest.raises(ValueError, match=r"clip=0.0 .*must be above 0"):
        L.value_loss(clip=0.0)
    with pytest.raises(ValueError, match="value_config and value_params"):
        values(CONFIG, params(), jnp.zeros((2, CONFIG.embed_dim)))


def test_a_dry_run_counts_the_critic_s_weights_and_moments():
    run, without = (
        build(tiny_config(algorithm=recipe)) for recipe in (PPO(group_size=4), GRPO(group_size=4, kl_coef=0.0))
    )
    found, plain = (held_state(r) for r in (run, without))
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract_params(run.critic.config)))
    assert found.pop("critic") == pytest.approx(3 * 4 * count, abs=16)  # weights and two moments, and a counter
    assert found.keys() == plain.keys() and all(found[name] >= plain[name] for name in plain)


@pytest.mark.slow  # four devices on few cores
def test_a_mesh_trains_the_critic_that_one_device_does():
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=xla_flags(4),
        PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}",
    )
    command = [sys.executable, str(TESTS / "critic_mesh_program.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    one, *others = json.loads(done.stdout.splitlines()[-1])
    for other in others:
        np.testing.assert_allclose(other["values"], one["values"], atol=2e-5)
        for name, value in one["metrics"].items():
            assert other["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        assert other["split"]
