"""Experts against loops in float64 NumPy, and on meshes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from test_parallel_mesh import run_python

from rljax.models import DecoderConfig, Experts, cast_params, param_shardings
from rljax.models.experts import apply_experts, route
from rljax.parallel import MESH_AXES

CONFIG = Experts(count=4, per_token=2, mlp_dim=6)
WIDTH = 5

DENSE = DecoderConfig(
    vocab_size=8, num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8, tied_embeddings=True
)


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
    with pytest.raises(ValueError, match="kept_groups=3 must be at most their groups=2"):
        Experts(count=4, per_token=1, mlp_dim=6, groups=2, kept_groups=3)
    with pytest.raises(ValueError, match="count=6 must be a multiple, of 2 or more, of their 4 groups"):
        Experts(count=6, per_token=1, mlp_dim=6, groups=4)
    with pytest.raises(ValueError, match="per_token=3 must be at most the 2 that the kept_groups=1 hold"):
        Experts(count=4, per_token=3, mlp_dim=6, groups=2)
    with pytest.raises(ValueError, match="dense_layers=1 must be below num_layers=1"):
        dataclasses.replace(DENSE, experts=Experts(count=3, per_token=1, mlp_dim=4, dense_layers=1))


BIASED = Experts(count=4, per_token=2, mlp_dim=6, selection_bias=True, weight_scale=1.5)


def test_a_bias_chooses_experts_and_does_not_weigh_them():
    logits = np.array([0.0, 1.0, -1.0, 2.0], np.float32)
    sigmoids = 1 / (1 + np.exp(-logits.astype(np.float64)))
    plain = route(BIASED, jnp.asarray(logits), bias=jnp.zeros(4))
    assert plain.experts.tolist() == [3, 1]
    pushed = route(BIASED, jnp.asarray(logits), bias=jnp.array([0.0, -1.0, 1.0, 0.0]))
    assert pushed.experts.tolist() == [2, 3]
    for routing in (plain, pushed):
        own = sigmoids[np.asarray(routing.experts)]
        np.testing.assert_allclose(routing.weights, 1.5 * own / own.sum(), rtol=1e-6)

    # No sigmoid is left of scores that are far below 0, and no weight is NaN.
    assert route(BIASED, jnp.full(4, -1e4), bias=jnp.zeros(4)).weights.tolist() == [0, 0]


def test_groups_are_kept_by_what_their_two_best_experts_score():
    config = Experts(count=6, per_token=2, mlp_dim=6, selection_bias=True, groups=3, kept_groups=1)
    logits = jnp.array([3.0, -3.0, 1.0, 0.5, 0.9, 0.8])
    assert route(config, logits, bias=jnp.zeros(6)).experts.tolist() == [4, 5]
    # The best expert of all is in a group that is not kept; the bias counts in a group's score.
    assert route(config, logits, bias=jnp.array([0, 0, 0, 0.3, 0, 0])).experts.tolist() == [3, 2]


def test_the_bias_that_chooses_stays_float32_where_weights_are_cast():
    weights = {"layers": {"q": jnp.ones((2, 3, 3)), "selection_bias": jnp.full((2, 4), 0.3)}}
    cast = cast_params(weights, "bfloat16")
    assert cast["layers"]["q"].dtype == jnp.bfloat16
    assert cast["layers"]["selection_bias"].dtype == jnp.float32
    np.testing.assert_array_equal(cast["layers"]["selection_bias"], weights["layers"]["selection_bias"])


def test_loads_come_home_in_the_place_of_the_biases_gradient():
    """As many tokens as passed each expert, but for those that are not counted; the other gradients stay."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 4)), jnp.float32)
    bias = jnp.array([0.3, 0.0, -0.2, 0.1])
    counted = np.random.default_rng(1).random((3, 5)) < 0.6

    def value(logits, bias, counted):
        return jnp.sum(route(BIASED, logits, bias=bias, counted=counted).weights ** 2)

    d_logits, loads = jax.grad(value, (0, 1))(logits, bias, jnp.asarray(counted))
    chosen = np.asarray(route(BIASED, logits, bias=bias).experts)
    np.testing.assert_array_equal(loads, np.bincount(chosen[counted].reshape(-1), minlength=4))
    plain, nothing = jax.grad(value, (0, 1))(logits, bias, None)
    np.testing.assert_array_equal(d_logits, plain)
    np.testing.assert_array_equal(nothing, np.zeros(4))


@pytest.fixture(scope="module")
def sharded():
    return json.loads(run_python("experts_mesh_program.py", devices=8))


@pytest.mark.slow
def test_a_mesh_with_an_expert_axis_gives_the_numbers_of_one_device(sharded):
    assert sharded["loss"] < 2e-6
    assert sharded["gradient"] < 1e-6
    assert sharded["decoded"] < 2e-6
    assert sharded["one_row"] < 2e-6


def test_loads_are_summed_over_all_devices(sharded):
    """Of a mixture with first layers that have no experts, chosen by a bias, in groups, and with a shared one."""
    assert sharded["biased_loss"] < 2e-6
    assert sharded["biased_gradient"] < 1e-6
    assert sharded["loads"] == 0
    assert sharded["load_sum"] == 8 * 16 * 2


def test_decoding_with_experts_compiles_nothing_after_its_warm_up(sharded):
    assert sharded["compiles"] == 0


def test_a_device_holds_its_own_experts_alone(sharded):
    assert sharded["gate_shape"] == [2, 4, 16, 12]
    assert sharded["decoder_gate_shape"] == [4, 32, 12]
    assert sharded["loaded_gate_shape"] == [2, 4, 16, 12]


def test_experts_of_few_bits_are_split_as_their_matrices_are(sharded):
    """[layers, experts, in, out] in codes, and in blocks of 32; a decoder has them whole but for experts and width."""
    assert sharded["quantized_loss"] < 2e-6
    assert sharded["quantized_gradient"] < 1e-6
    assert sharded["quantized_decoded"] < 5e-6
    assert sharded["quantized_shapes"] == [[2, 4, 64, 32], [2, 4, 2, 32], [2, 4, 1, 64]]
    assert sharded["quantized_decoder_gate"] == [4, 128, 32]
    assert sharded["quantized_in_place"] == 0
    assert sharded["quantized_parts"] == {"gate": 1 / 8, "gate_scale": 1 / 8, "down": 1 / 8, "q": 1 / 8}


def test_shards_of_experts_are_written_and_read_as_one_model(sharded):
    assert sharded["loaded"] == 0


def test_meshes_of_decoders_split_experts_as_the_learner_does(sharded):
    assert sharded["beside"] == {"data": 1, "fsdp": 1, "sequence": 1, "expert": 2, "tensor": 2}
    assert sharded["spread"] == {"data": 2, "fsdp": 1, "sequence": 1, "expert": 2, "tensor": 2}


def test_an_expert_axis_for_a_model_without_experts_is_refused():
    mesh = AbstractMesh((1, 1, 1, 2, 1), MESH_AXES)
    with pytest.raises(ValueError, match=r"expert=2 splits experts, which this model does not have; set config.mesh"):
        param_shardings(DENSE, mesh)
    mixture = dataclasses.replace(DENSE, experts=Experts(count=3, per_token=1, mlp_dim=4))
    with pytest.raises(ValueError, match="'experts' of size 3 does not divide over expert=2"):
        param_shardings(mixture, mesh)
