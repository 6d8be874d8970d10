"""LightSAM and Muon: worked examples, what they leave alone, and their state beside the weights."""

import dataclasses
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
from objectives import float64
from test_training_learner import CONFIG, FLAT, grpo, params, rollout, update_config

from rljax.batching import PackConfig
from rljax.losses import Correction
from rljax.models import Experts, init_params
from rljax.parallel import make_mesh
from rljax.training import (
    Checkpointer,
    Learner,
    LightSAMConfig,
    MuonConfig,
    OptimizerConfig,
    create_state,
    make_optimizer,
    scale_by_lightsam_adagrad,
    scale_by_lightsam_adam,
    scale_by_lightsam_norm,
    state_shardings,
)
from rljax.training.optimizers import decay_mask

TESTS = Path(__file__).parent
CONFIGS = {"muon": MuonConfig, "lightsam": LightSAMConfig}
every_config = pytest.mark.parametrize("kind", CONFIGS)


def square(x):
    return 2 * x


def run(transformation, steps, *, learning_rate, start=(1.0, -0.5), grad_fn=square):
    """(looks w, gradients g, params) of every step on f(x) = sum x^2."""
    optimizer = optax.chain(transformation, optax.scale_by_learning_rate(learning_rate))
    x, history = jnp.asarray(start), []
    state = optimizer.init(x)
    looked = []

    def watched(w):
        looked.append(w)
        return grad_fn(w)

    for _ in range(steps):
        updates, state = optimizer.update(grad_fn(x), state, x, grad_fn=watched)
        x = optax.apply_updates(x, updates)
        history.append((np.asarray(looked[-1]), np.asarray(grad_fn(looked[-1])), np.asarray(x)))
    return history, state[0]


def test_lightsam_norm_meets_the_worked_example():
    with float64():
        (first, second), state = run(scale_by_lightsam_norm(0.1), 2, learning_rate=0.1)
    np.testing.assert_allclose(first[0], [1.089443, -0.544721], atol=1e-6)
    np.testing.assert_allclose(first[1], [2.178885, -1.089443], atol=1e-6)
    np.testing.assert_allclose(first[2], [0.910557, -0.455279], atol=1e-6)
    np.testing.assert_allclose(second[0], [0.970776, -0.485388], atol=1e-6)
    np.testing.assert_allclose(second[2], [0.851053, -0.425527], atol=1e-6)
    np.testing.assert_allclose([state.ascent, state.descent], [9.145573, 10.646458], atol=1e-6)


def test_lightsam_adagrad_meets_the_worked_example():
    with float64():
        (first, second), state = run(scale_by_lightsam_adagrad(0.1), 2, learning_rate=0.1)
    np.testing.assert_allclose(first[0], [1.1, -0.6], atol=1e-6)
    np.testing.assert_allclose(first[2], [0.9, -0.4], atol=1e-6)
    np.testing.assert_allclose(second[0], [0.966896, -0.46247], atol=1e-6)
    np.testing.assert_allclose(second[1], [1.933793, -0.924939], atol=1e-6)
    np.testing.assert_allclose(second[2], [0.83398, -0.338952], atol=1e-6)
    np.testing.assert_allclose(state.ascent, [7.24, 1.64], atol=1e-6)
    np.testing.assert_allclose(state.descent, [8.579555, 2.295512], atol=1e-6)


def test_lightsam_adam_meets_the_worked_example():
    with float64():
        (first, second), _ = run(scale_by_lightsam_adam(0.1), 2, learning_rate=0.01)
        _, state = run(scale_by_lightsam_adam(0.1), 1, learning_rate=0.01)
    np.testing.assert_allclose(first[0], [1.1, -0.6], atol=1e-6)
    np.testing.assert_allclose(state.momentum, [0.22, -0.12], atol=1e-6)
    np.testing.assert_allclose(first[2], [0.99, -0.49], atol=1e-6)
    np.testing.assert_allclose(second[0], [1.089499, -0.58899], atol=1e-6)
    np.testing.assert_allclose(second[1], [2.178997, -1.17798], atol=1e-6)
    np.testing.assert_allclose(second[2], [0.980002, -0.480005], atol=1e-6)


@pytest.mark.parametrize("rho", [0.01, 0.1, 1.0, 10.0])
def test_lightsam_norm_converges_whatever_the_radius(rho):
    with float64():
        optimizer = optax.chain(scale_by_lightsam_norm(rho), optax.scale_by_learning_rate(0.5))

        def step(carry, _):
            x, state = carry
            updates, state = optimizer.update(square(x), state, x, grad_fn=square)
            return (optax.apply_updates(x, updates), state), None

        start = jnp.array([3.0, -2.0])
        (x, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=2000)
        assert jnp.sum(x**2) < 1e-60


@pytest.mark.parametrize("make", [scale_by_lightsam_norm, scale_by_lightsam_adagrad, scale_by_lightsam_adam])
def test_lightsam_at_a_stationary_point_stays_there(make):
    (only,), _ = run(make(0.1), 1, learning_rate=0.1, start=(0.0, 0.0))
    np.testing.assert_array_equal(only[0], 0)
    np.testing.assert_array_equal(only[2], 0)


def test_lightsam_without_radius_is_adam():
    (*_, last), _ = run(scale_by_lightsam_adam(0.0, b2=0.99), 3, learning_rate=0.01)
    x, adam = jnp.array([1.0, -0.5]), optax.adam(0.01, b2=0.99)
    state = adam.init(x)
    for _ in range(3):
        updates, state = adam.update(square(x), state)
        x = optax.apply_updates(x, updates)
    np.testing.assert_allclose(last[2], x, rtol=1e-6)


def test_lightsam_clips_both_gradients():
    _, state = run(scale_by_lightsam_norm(0.1, max_grad_norm=0.5), 1, learning_rate=0.1)
    np.testing.assert_allclose([state.ascent, state.descent], [0.25, 0.25], rtol=1e-6)


def test_lightsam_says_which_argument_was_forgotten():
    optimizer = make_optimizer(LightSAMConfig())
    weights = params()
    with pytest.raises(ValueError, match="grad_fn="):
        optimizer.update(weights, optimizer.init(weights), weights)


def orthogonal(matrix):
    u, _, v = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return u @ v


def test_muon_makes_each_layers_matrix_orthogonal_and_leaves_the_rest_to_adam():
    """One step from zero momentum: singular values of the update are about 1 (0.5 to 1.5 is what the steps promise),
    its singular vectors those of the gradient, one layer's whatever the other's."""
    weights = params()
    grads = jax.tree.map(lambda x, k: jax.random.normal(k, x.shape), weights, keys_like(weights))
    config = MuonConfig(learning_rate=1.0, max_grad_norm=0.0, consistent_rms=0.2)
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(grads, optimizer.init(weights), weights)
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        for layer in range(CONFIG.num_layers):
            got = -np.asarray(updates["layers"][name][layer], np.float64)
            got /= 0.2 * max(got.shape) ** 0.5
            values = np.linalg.svd(got, compute_uv=False)
            assert values.min() > 0.5 and values.max() < 1.5, (name, layer, values)
            want = orthogonal(grads["layers"][name][layer])
            assert np.sum(got * want) / np.linalg.norm(got) / np.linalg.norm(want) > 0.97, name
    adam = make_optimizer(OptimizerConfig(learning_rate=1.0, max_grad_norm=0.0))
    plain, _ = adam.update(grads, adam.init(weights), weights)
    for name in ("embedding", "final_norm"):
        np.testing.assert_allclose(updates[name], plain[name], rtol=1e-6)
    for name in ("attention_norm", "mlp_norm"):
        np.testing.assert_allclose(updates["layers"][name], plain["layers"][name], rtol=1e-6)

    alone = jax.tree.map(lambda x: x, grads)
    alone["layers"]["q"] = alone["layers"]["q"].at[1].multiply(100.0)
    scaled, _ = optimizer.update(alone, optimizer.init(weights), weights)
    np.testing.assert_allclose(scaled["layers"]["q"], updates["layers"]["q"], atol=2e-5)


def test_muon_makes_each_experts_matrix_orthogonal_and_leaves_sinks_and_biases_to_adam():
    experts = Experts(count=3, per_token=2, mlp_dim=12, biases=True)
    config = dataclasses.replace(CONFIG, attention_bias=True, sinks=True, experts=experts)
    weights = init_params(config, jax.random.key(0))
    grads = jax.tree.map(lambda x, k: jax.random.normal(k, x.shape), weights, keys_like(weights))
    found = {}
    for kind in (MuonConfig, OptimizerConfig):
        optimizer = make_optimizer(kind(learning_rate=1.0, max_grad_norm=0.0))
        found[kind], _ = optimizer.update(grads, optimizer.init(weights), weights)
    muon, adam = (found[kind]["layers"] for kind in (MuonConfig, OptimizerConfig))
    for name in ("gate", "up", "down"):
        for place in np.ndindex(CONFIG.num_layers, 3):
            got = -np.asarray(muon[name][place], np.float64)
            got /= 0.2 * max(got.shape) ** 0.5
            want = orthogonal(grads["layers"][name][place])
            assert np.sum(got * want) / np.linalg.norm(got) / np.linalg.norm(want) > 0.97, (name, place)
    for name in ("sinks", "q_bias", "router_bias", "gate_bias", "down_bias"):
        np.testing.assert_allclose(muon[name], adam[name], rtol=1e-6)
        assert not decay_mask(weights)["layers"][name]


def test_muon_scales_by_width_without_a_root_mean_square():
    weights = params()
    grads = jax.tree.map(lambda x, k: jax.random.normal(k, x.shape), weights, keys_like(weights))
    updates = {}
    for rms in (0.0, 0.2):
        optimizer = make_optimizer(MuonConfig(learning_rate=1.0, max_grad_norm=0.0, consistent_rms=rms))
        updates[rms], _ = optimizer.update(grads, optimizer.init(weights), weights)
    for name, x in weights["layers"].items():
        if x.ndim == 3:
            _, fan_in, fan_out = x.shape
            factor = max(1, fan_out / fan_in) ** 0.5 / (0.2 * max(fan_in, fan_out) ** 0.5)
            np.testing.assert_allclose(updates[0.0]["layers"][name], factor * updates[0.2]["layers"][name], rtol=1e-5)


def keys_like(tree):
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, list(jax.random.split(jax.random.key(1), len(leaves))))


@pytest.mark.parametrize("config", [MuonConfig, LightSAMConfig, OptimizerConfig])
def test_weight_decay_is_decoupled_and_leaves_norms_out(config):
    weights = params()
    zero = jax.tree.map(jnp.zeros_like, weights)
    optimizer = make_optimizer(config(learning_rate=0.1, weight_decay=0.5))
    updates, _ = optimizer.update(zero, optimizer.init(weights), weights, **gradient_of(config, zero))
    np.testing.assert_allclose(updates["layers"]["q"], -0.05 * weights["layers"]["q"], rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(updates["final_norm"], 0)


def gradient_of(config, value):
    return {"grad_fn": lambda _: value} if config is LightSAMConfig else {}


@every_config
def test_state_lies_as_the_weights_do(kind):
    mesh = make_mesh()
    optimizer = make_optimizer(CONFIGS[kind]())
    where = state_shardings(CONFIG, optimizer, mesh=mesh)
    by_name = {jax.tree_util.keystr(k): s.spec for k, s in jax.tree_util.tree_leaves_with_path(dict(where.trainable))}
    state = create_state(params(), optimizer, shardings=where)
    found = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        name = jax.tree_util.keystr(path)
        weight = [w for w in by_name if name.endswith(w)]
        if weight:
            found.add(weight[0])
            assert leaf.sharding.spec == by_name[weight[0]], name
            assert leaf.dtype == jnp.float32
        else:
            assert leaf.size <= 3, name  # counters and coefficients
    assert found == set(by_name)


def make_learner(kind, pack=FLAT, *, loss=None, **changes):
    return Learner(CONFIG, loss or grpo(), CONFIGS[kind](learning_rate=1e-2), update_config(pack, **changes))


def updated(learner, steps=2):
    batch, advantages = rollout()
    state = learner.init_state(jax.tree.map(jnp.copy, params()))
    for _ in range(steps):
        state, metrics = learner.update(state, learner.prepare(state, batch, advantages)[0])
    return state, metrics


@pytest.mark.slow  # compiles several updates
@every_config
def test_updates_do_not_depend_on_packing_or_accumulation(kind):
    state, metrics = updated(make_learner(kind))
    other, metrics_2 = updated(make_learner(kind, PackConfig(pack_length=64, microbatch_size=1)))
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(other.trainable), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_allclose(metrics["loss/total"], metrics_2["loss/total"], rtol=1e-3, atol=1e-5)
    assert metrics["loss/learning_rate"] == pytest.approx(1e-2)


@pytest.mark.slow  # compiles several updates
@every_config
def test_a_restored_state_goes_on_bit_for_bit(kind, tmp_path):
    learner = make_learner(kind)
    state, _ = updated(learner, 1)
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.save(1, state, {})
    checkpointer.wait()
    restored, _, _ = checkpointer.restore(learner.abstract_state())
    batch, advantages = rollout(seed=1)
    after = [learner.update(s, learner.prepare(s, batch, advantages)[0])[0] for s in (state, restored)]
    jax.tree.map(np.testing.assert_array_equal, after[0].trainable, after[1].trainable)
    jax.tree.map(np.testing.assert_array_equal, after[0].opt_state, after[1].opt_state)
    checkpointer.close()


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1, 2])
def test_lightsams_second_gradient_keeps_the_old_policy_of_the_first(epochs):
    """The update equals one made by hand from two gradients, whose old log-probs are those before the update."""
    batch, advantages = rollout()
    learner = make_learner("lightsam", epochs=epochs)
    state = learner.init_state(jax.tree.map(jnp.copy, params()))
    minibatch = learner.prepare(state, batch, advantages)[0]
    anchor = make_learner("lightsam", epochs=2)  # several updates: old log-probs are scored, and kept
    anchored = anchor.prepare(state, batch, advantages)[0]
    gradient = jax.jit(lambda p: anchor.program.gradients(p, anchored, None)[2])
    optimizer = make_optimizer(LightSAMConfig(learning_rate=1e-2))
    updates, _ = optimizer.update(gradient(params()), optimizer.init(params()), params(), grad_fn=lambda p: gradient(p))
    want = optax.apply_updates(params(), updates)
    got, metrics = learner.update(state, minibatch)
    for a, b, p in zip(*map(jax.tree.leaves, (got.trainable, want, params())), strict=True):
        np.testing.assert_allclose(np.asarray(a - p), np.asarray(b - p), atol=5e-4)
    assert np.isfinite(metrics["loss/grad_norm"])


def test_a_second_gradient_that_is_not_finite_skips_the_update():
    """The loss is finite at the weights; one look further it is not."""
    base = grpo()

    def loss(logprobs, entropies, rows):
        value, metrics = base.loss(logprobs, entropies, rows)
        moved = jnp.abs(jax.lax.stop_gradient(logprobs) - rows.old_logprobs) * rows.loss_mask
        return value + jnp.where(jnp.max(moved) > 1e-6, jnp.nan, 0.0) * jnp.sum(logprobs), metrics

    learner = make_learner("lightsam", loss=base._replace(loss=loss))
    state, metrics = updated(learner, 1)
    assert np.isfinite(metrics["loss/total"])
    assert metrics["loss/skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, state.trainable, params())


def test_a_correction_sees_all_microbatches_and_scales_the_step():
    """Its factor is one of the learning rate; what it does to the rows is seen by the loss."""
    seen = {}

    def correct(rows):
        seen["shape"] = rows.old_logprobs.shape
        gap = jnp.max(jnp.abs(jnp.where(rows.loss_mask, rows.old_logprobs - rows.behavior_logprobs, 0)))
        advantages = jnp.where(jnp.asarray(rows.loss_mask), rows.advantages, 0) * 2
        return Correction(dataclasses.replace(rows, advantages=advantages), {"loss/gap": gap}, jnp.float32(0.25))

    pack = PackConfig(pack_length=32, microbatch_size=2, share_prefixes=False)
    batch, advantages = rollout()
    optimizer = OptimizerConfig(learning_rate=1e-2, max_grad_norm=0.0)
    results = []
    for loss, factor in ((grpo()._replace(correct_fn=correct), 1), (grpo(), 2)):
        learner = Learner(CONFIG, loss, optimizer, update_config(pack))
        state = learner.init_state(jax.tree.map(jnp.copy, params()))
        state, metrics = learner.update(state, learner.prepare(state, batch, factor * advantages)[0])
        results.append((state.trainable, metrics))
    assert seen["shape"][0] > 1
    assert results[0][1]["loss/gap"] == pytest.approx(float(results[0][1]["rollout/logprob_gap_max"]), rel=1e-5)
    for a, b, p in zip(*map(jax.tree.leaves, (results[0][0], results[1][0], params())), strict=True):
        np.testing.assert_allclose(np.asarray(a - p), 0.25 * np.asarray(b - p), atol=2e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MuonConfig(newton_schulz_steps=0), "newton_schulz_steps=0 must be at least 1"),
        (MuonConfig(consistent_rms=-1.0), "consistent_rms=-1.0"),
        (LightSAMConfig(rho=-0.1), "rho=-0.1"),
        (MuonConfig(max_grad_norm=-1.0), "max_grad_norm=-1.0"),
    ],
)
def test_impossible_optimizers_are_one_clear_line(config, message):
    with pytest.raises(ValueError, match=message) as error:
        make_optimizer(config)
    assert "\n" not in str(error.value)


def test_a_variant_set_from_the_command_line_is_checked_too():
    config = LightSAMConfig()
    config.variant = "sgd"
    with pytest.raises(ValueError, match="variant='sgd' must be one of 'adam', 'adagrad', 'norm'"):
        make_optimizer(config)


@pytest.mark.slow  # four devices on few cores
def test_a_mesh_moves_weights_as_one_device_does():
    """Muon orthogonalises whole matrices and LightSAM takes two gradients, however the weights are split.

    Up to 2e-3 of the largest step, which is how far sums of another order move LightSAM on one device too.
    """
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=xla_flags(4),
        PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}",
    )
    command = [sys.executable, str(TESTS / "optimizers_mesh_program.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert {part["compiled"] for part in found.values()} == {1}, name
        for weight, want in found["one device"]["moved"].items():
            largest = np.abs(want).max()
            assert largest > 1e-4, (name, weight)
            got = found["mesh"]["moved"][weight]
            np.testing.assert_allclose(got, want, atol=2e-3 * largest, err_msg=f"{name}: {weight}")
