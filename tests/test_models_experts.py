"""Experts against loops in float64 NumPy, and on meshes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from test_parallel_mesh import run_python

from rljax.models import DecoderConfig, Experts, param_shardings
from rljax.models.experts import apply_experts, route
from rljax.parallel import MESH_AXES

CONFIG = Experts(count=4, per_token=2, mlp_dim=6)
WIDTH = 5


def layer(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"gate": (4, WIDTH, 6), "up": (4, WIDTH, 6), "down": (4, 6, WIDTH)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    router = rng.normal(size=(WIDTH, 4)).astype(np.float32)
    x = rng.normal(size=(2, 7, WIDTH)).astype(np.float32)
    return weights, router, x


def ours(config, weights, router, x):
    x = jnp.asarray(x)
    return np.asarray(apply_experts(jax.tree.map(jnp.asarray, weights), x, route(config, x @ router)))


def by_hand(weights, router, x, *, normalized):
    """Token by token and expert by expert, in float64."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    out = np.zeros(x.shape)
    for at in np.ndindex(*x.shape[:-1]):
        token = x[at].astype(np.float64)
        chances = np.exp(token @ router.astype(np.float64))
        chances /= chances.sum()
        best = np.argsort(-chances)[:2]
        total = chances[best].sum() if normalized else 1.0
        for expert in best:
            gate = token @ w["gate"][expert]
            hidden = gate / (1 + np.exp(-gate)) * (token @ w["up"][expert])
            out[at] += chances[expert] / total * (hidden @ w["down"][expert])
    return out


@pytest.mark.parametrize("normalized", [True, False])
def test_a_token_gets_the_weighted_sum_of_its_best_experts(normalized):
    config = Experts(count=4, per_token=2, mlp_dim=6, normalized=normalized)
    weights, router, x = layer()
    got = ours(config, weights, router, x)
    assert np.abs(got - by_hand(weights, router, x, normalized=normalized)).max() < 1e-5


def test_gradients_are_those_of_finite_differences():
    """Of every weight, the router's and the input's too, along a random direction."""
    weights, router, x = layer(1)
    start = {**weights, "router": router, "x": x}
    direction = jax.tree.map(lambda a: np.random.default_rng(a.size).normal(size=a.shape), start)
    target = np.cos(np.arange(x.size)).reshape(x.shape)

    def value(at):
        own = {name: at[name] for name in weights}
        return jnp.sum(apply_experts(own, at["x"], route(CONFIG, at["x"] @ at["router"])) * target)

    gradient = jax.jit(jax.grad(value))(start)

    def moved(name, step):
        at = start | {name: (start[name] + step * direction[name])}
        own = {key: np.asarray(at[key]) for key in weights}
        return np.sum(by_hand(own, np.asarray(at["router"]), at["x"], normalized=True) * target)

    for name in start:
        slope = (moved(name, 1e-5) - moved(name, -1e-5)) / 2e-5
        assert abs(np.sum(gradient[name] * direction[name]) - slope) < 1e-3 * max(1.0, abs(slope)), name


def test_every_token_may_choose_the_same_experts():
    weights, router, x = layer(2)
    x = np.broadcast_to(x[:1, :1], x.shape)
    got = ours(CONFIG, weights, router, x)
    assert np.abs(got - by_hand(weights, router, x, normalized=True)).max() < 1e-5


def test_impossible_numbers_of_experts_are_refused():
    with pytest.raises(ValueError, match="per_token=5 must be at most their count=4"):
        Experts(count=4, per_token=5, mlp_dim=6)
    with pytest.raises(ValueError, match="count=0 must be a whole number of at least 1"):
        Experts(count=0, per_token=1, mlp_dim=6)


@pytest.fixture(scope="module")
def sharded():
    return json.loads(run_python("experts_mesh_program.py", devices=8))


def test_a_mesh_with_an_expert_axis_gives_the_numbers_of_one_device(sharded):
    assert sharded["loss"] < 2e-6
    assert sharded["gradient"] < 1e-6
    assert sharded["decoded"] < 2e-6
    assert sharded["one_row"] < 2e-6


def test_decoding_with_experts_compiles_nothing_after_its_warm_up(sharded):
    assert sharded["compiles"] == 0


def test_a_device_holds_its_own_experts_alone(sharded):
    assert sharded["gate_shape"] == [2, 4, 16, 12]
    assert sharded["decoder_gate_shape"] == [4, 32, 12]


def test_an_expert_axis_for_a_model_without_experts_is_refused():
    mesh = AbstractMesh((1, 1, 1, 2, 1), MESH_AXES)
    dense = DecoderConfig(
        vocab_size=8,
        num_layers=1,
        embed_dim=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        mlp_dim=8,
        tied_embeddings=True,
    )
    with pytest.raises(ValueError, match=r"expert=2 splits experts, which this model does not have; set config.mesh"):
        param_shardings(dense, mesh)
    mixture = dataclasses.replace(dense, experts=Experts(count=3, per_token=1, mlp_dim=4))
    with pytest.raises(ValueError, match="'experts' of size 3 does not divide over expert=2"):
        param_shardings(mixture, mesh)
