"""Experts' loads, and the bias that moves against them after each update."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training_learner import CONFIG, FLAT, grpo, rollout, update_config

from rljax.models import Experts, Lora, apply_layer, embed, forest_attention, init_params, unstack_layers
from rljax.models.experts import best_experts
from rljax.models.rope import rotary_tables
from rljax.training import Learner, OptimizerConfig
from rljax.training.lora import trained_of
from rljax.training.trainable import EVERYTHING

MIXTURE = dataclasses.replace(
    CONFIG,
    num_layers=3,
    experts=Experts(count=6, per_token=2, mlp_dim=8, selection_bias=True, shared=1, dense_layers=1),
)
RATE = 0.01


def weights():
    return jax.tree.map(lambda x: x * 5 if x.ndim > 2 else x, init_params(MIXTURE, jax.random.key(0)))


@functools.cache
def updated(rate, rows):
    """(weights, metrics) after one update in microbatches of so many rows."""
    pack = dataclasses.replace(FLAT, microbatch_size=rows)
    learner = Learner(
        MIXTURE, grpo(), OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, balance_rate=rate), update_config(pack)
    )
    batch, advantages = rollout()
    state = learner.init_state(weights())
    minibatch = learner.prepare(state, batch, advantages)[0]
    loads = [loads_by_hand(packed) for packed in unmicrobatched(minibatch.packed)]
    state, metrics = learner.update(state, minibatch)
    return jax.device_get((state.trainable, metrics, np.sum(loads, axis=0)))


def unmicrobatched(packed):
    return [jax.tree.map(lambda x, m=m: np.asarray(x)[m], packed) for m in range(packed.tokens.shape[0])]


def loads_by_hand(packed):
    """How many real tokens pass each expert of each layer that has any, layer by layer."""
    params = weights()
    positions = jnp.asarray(packed.positions)
    ends = jnp.asarray(packed.subtree_end)
    (rotary,) = rotary_tables(MIXTURE, positions).values()
    x = embed(MIXTURE, params, jnp.asarray(packed.tokens))
    real = packed.subtree_end > 0
    loads = []

    def attend(q, k, v):
        return forest_attention(q, k, v, positions, ends, 2**30), None

    def noted(scores):
        chosen = best_experts(MIXTURE.experts)(scores)
        loads.append(np.bincount(np.asarray(chosen)[real].reshape(-1), minlength=6))
        return chosen

    for layer in unstack_layers(MIXTURE, params)["layers"]:
        x, _ = apply_layer(MIXTURE, layer, x, rotary, attend, choose=noted)
    return np.stack(loads)


@pytest.mark.parametrize("rows", [pytest.param(16, marks=pytest.mark.slow), 2])
def test_the_bias_moves_by_a_step_against_the_load_of_all_microbatches(rows):
    """Padding counts for nothing, and neither gradients nor weight decay reach the bias."""
    trainable, metrics, loads = updated(RATE, rows)
    assert loads.shape == (2, 6) and loads.sum(axis=1).tolist() == [loads[0].sum()] * 2
    want = RATE * np.sign(loads.mean(axis=1, keepdims=True) - loads)
    np.testing.assert_array_equal(trainable["layers"]["selection_bias"], want.astype(np.float32))
    worst = (loads.max(axis=1) / loads.mean(axis=1)).max()
    np.testing.assert_allclose(metrics["loss/expert_load_max"], worst, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/idle_experts"], (loads == 0).mean(), rtol=1e-6)


def test_without_a_rate_the_bias_stands_still_and_all_else_is_the_same():
    still, plain, _ = copy.deepcopy(updated(0.0, 16))
    moved, metrics, _ = copy.deepcopy(updated(RATE, 16))
    np.testing.assert_array_equal(still["layers"]["selection_bias"], weights()["layers"]["selection_bias"])
    assert np.any(moved["layers"]["selection_bias"])
    for tree in (still, moved):
        tree["layers"] = {name: x for name, x in tree["layers"].items() if name != "selection_bias"}
    jax.tree.map(np.testing.assert_array_equal, still, moved)
    assert plain == metrics


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (CONFIG, r"balance_rate=0.01 moves the bias .* this llama model has none; set it to 0, or take a family"),
        (dataclasses.replace(CONFIG, experts=Experts(4, 2, 8)), "this llama model has none"),
        (dataclasses.replace(MIXTURE, lora=Lora(2, 4.0)), "beneath adapters it is frozen; set it to 0"),
    ],
)
def test_a_rate_with_nothing_to_move_is_refused(config, says):
    subtree = EVERYTHING if config.lora is None else trained_of(config)
    with pytest.raises(ValueError, match=says):
        Learner(config, grpo(), OptimizerConfig(balance_rate=RATE), update_config(FLAT), subtree=subtree)
