"""Training a part of the weights: the rest stays where it is, and costs neither gradient, moments nor checkpoint."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_training_learner import CONFIG, FLAT, assert_close, grpo, params, rollout, update_config

from rljax import losses as L
from rljax.models import abstract_params
from rljax.parallel import make_mesh
from rljax.training import (
    EVERYTHING,
    Checkpointer,
    Critic,
    Learner,
    LossNeeds,
    MuonConfig,
    OptimizerConfig,
    fingerprint,
    restore_params,
    subtree_of,
    with_base,
    with_critic,
)

ATTENTION = ("q", "k", "v", "o")
LAYOUTS = {"one device": None, "a mesh": (1, 1, 1)}


def is_attention(path):
    return path.startswith("layers/") and path.split("/")[1] in ATTENTION


ATTENTION_ONLY = subtree_of(is_attention)


def make(subtree=ATTENTION_ONLY, optimizer=None, *, mesh=None, **changes):
    optimizer = optimizer or OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    needs = LossNeeds(reference=True)
    return Learner(CONFIG, grpo(), optimizer, update_config(FLAT, **changes), needs=needs, mesh=mesh, subtree=subtree)


def started(learner, steps=2):
    """The state after some updates, which owns weights of its own."""
    state = learner.init_state(jax.tree.map(jnp.copy, params()))
    batch, advantages = rollout()
    for _ in range(steps):
        state, _ = learner.update(state, learner.prepare(state, batch, advantages)[0])
    learner.check()
    return state


def names(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_split_and_merge_are_inverse_and_copy_nothing():
    weights = params()
    trainable, base = ATTENTION_ONLY.split(weights)
    assert names(trainable) == {f"layers/{name}" for name in ATTENTION}
    assert names(base) == names(weights) - names(trainable)
    merged = ATTENTION_ONLY.merge(trainable, base)
    assert jax.tree.structure(merged) == jax.tree.structure(weights)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(weights), strict=True))


def test_everything_is_trained_where_nothing_is_left_out():
    weights = params()
    assert EVERYTHING.split(weights) == (weights, None) and EVERYTHING.merge(weights, None) is weights
    trainable, base = subtree_of(lambda path: True).split(weights)
    assert base is None and names(trainable) == names(weights)
    with pytest.raises(ValueError, match=r"no weight is chosen to be trained; the paths are .*layers/q"):
        subtree_of(lambda path: "adapter" in path).split(weights)


@pytest.mark.parametrize("shape", LAYOUTS.values(), ids=LAYOUTS)
def test_updates_leave_the_base_in_its_buffers_and_move_all_that_is_trained(shape):
    mesh = None if shape is None else make_mesh(*shape)
    learner = make(mesh=mesh)
    state = learner.init_state(jax.tree.map(jnp.copy, params()))
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.base)]
    batch, advantages = rollout()
    for _ in range(2):
        state, _ = learner.update(state, learner.prepare(state, batch, advantages)[0])
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.base)] == places
    before, base = ATTENTION_ONLY.split(params())
    jax.tree.map(np.testing.assert_array_equal, state.base, base)
    for moved, start in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(before), strict=True):
        assert (np.asarray(moved) != np.asarray(start)).mean() > 0.9
    target = learner.abstract_state()
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), target
    )


def test_gradient_and_moments_are_of_the_subtree_alone():
    """The gradient is the part of the whole one, and a step the part of a step on everything."""
    learner = make()
    batch, advantages = rollout()
    state = learner.init_state(params())
    minibatch = learner.prepare(state, batch, advantages)[0]
    got = jax.jit(learner.program.gradients)(state.trainable, minibatch, None, base=state.base).grads
    whole = make(EVERYTHING)
    want = jax.jit(whole.program.gradients)(params(), minibatch, None).grads
    assert jax.tree.structure(got) == jax.tree.structure(ATTENTION_ONLY.split(want)[0])
    assert_close(got, ATTENTION_ONLY.split(want)[0], relative=1e-6)
    trained = sum(x.size for x in jax.tree.leaves(state.trainable))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * trained + 2  # Adam's moments, two counters


def test_only_what_is_trained_decays_and_each_optimizer_takes_a_part():
    """Muon too, which asks for each weight what it is by its path."""
    state = started(make(optimizer=MuonConfig(learning_rate=1e-2, weight_decay=0.1)))
    assert names(state.trainable) == {f"layers/{name}" for name in ATTENTION}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.trainable))


def test_what_is_sampled_and_scored_is_trainable_over_base():
    learner = make()
    state = started(learner)
    merged = learner.policy_params(state)
    assert names(merged) == names(abstract_params(CONFIG))
    batch, _ = rollout()
    by_hand = dict(params(), layers={**params()["layers"], **jax.device_get(state.trainable)["layers"]})
    assert fingerprint(merged) == fingerprint(by_hand)
    np.testing.assert_array_equal(learner.score_rows(merged, batch), learner.score_rows(by_hand, batch))
    assert np.abs(learner.score_rows(merged, batch) - learner.score_rows(params(), batch)).max() > 1e-3


def test_the_reference_is_the_initial_policy_over_the_same_base():
    learner = make()
    state = started(learner)
    reference = learner.reference_params(state)
    jax.tree.map(np.testing.assert_array_equal, reference, params())
    assert names(state.ref_trainable) == names(state.trainable)
    assert reference["embedding"] is state.base["embedding"]
    moved = learner.refresh_reference(state)
    jax.tree.map(np.testing.assert_array_equal, moved.ref_trainable, state.trainable)
    assert moved.base is state.base


def test_a_skipped_update_keeps_the_subtree():
    learner = make()
    batch, advantages = rollout()
    state = learner.init_state(params())
    before = fingerprint(state.trainable)
    state, metrics = learner.update(state, learner.prepare(state, batch, advantages * np.nan)[0])
    assert metrics["loss/skipped"] == 1 and fingerprint(state.trainable) == before


def test_a_base_in_bfloat16_trains_a_float32_subtree():
    low = subtree_of(is_attention, base_dtype="bfloat16")
    state = started(make(low))
    assert {x.dtype for x in jax.tree.leaves(state.base)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves((state.trainable, state.ref_trainable))} == {jnp.dtype("float32")}
    full = started(make())
    for a, b, start in zip(*map(jax.tree.leaves, (state.trainable, full.trainable, ATTENTION_ONLY.split(params())[0]))):
        moved, wanted = np.asarray(a - start).ravel(), np.asarray(b - start).ravel()
        assert np.corrcoef(moved, wanted)[0, 1] > 0.9  # 8 bits of the base change no direction


def test_a_checkpoint_leaves_the_base_out_and_goes_on_bit_for_bit(tmp_path):
    learner = make()
    state = started(learner, 1)
    with_steps = Checkpointer(tmp_path)
    with_steps.save(1, state, {})
    with_steps.close()
    saved = json.loads((tmp_path / "1" / "state" / "_METADATA").read_text())["tree_metadata"]
    assert any("trainable" in name for name in saved) and not any("embedding" in name for name in saved)

    target = with_base(learner.abstract_state(), learner.base_of(params()))
    restored, _, step = Checkpointer(tmp_path).restore(target)
    assert step == 1 and fingerprint(restored) == fingerprint(state)
    batch, advantages = rollout(seed=1)
    after = [learner.update(s, learner.prepare(s, batch, advantages)[0])[0] for s in (state, restored)]
    assert fingerprint(after[0]) == fingerprint(after[1])

    found, step = restore_params(tmp_path, abstract_params(CONFIG), subtree=ATTENTION_ONLY, base=target.base)
    again, _, _ = Checkpointer(tmp_path).restore(target)
    assert step == 1 and fingerprint(found) == fingerprint(learner.policy_params(again))


def test_another_base_is_refused_in_one_line(tmp_path):
    learner = make()
    with_steps = Checkpointer(tmp_path)
    with_steps.save(1, started(learner, 1), {})
    with_steps.close()
    other = learner.base_of(params(seed=1))
    message = r"trained over other frozen weights than these \(base/embedding is the first of \d+ that differ\)"
    for read in (
        lambda: Checkpointer(tmp_path).restore(with_base(learner.abstract_state(), other)),
        lambda: restore_params(tmp_path, abstract_params(CONFIG), subtree=ATTENTION_ONLY, base=other),
        lambda: restore_params(tmp_path, abstract_params(CONFIG)),
    ):
        with pytest.raises(ValueError, match=message) as one:
            read()
        assert "\n" not in str(one.value)
    with pytest.raises(ValueError, match=r"shapes alone; load it: with_base"):
        Checkpointer(tmp_path).restore(learner.abstract_state())
    assert Checkpointer(tmp_path).steps == [1]


def test_a_critic_may_have_a_base_of_its_own(tmp_path):
    def targets(batch):
        return np.random.default_rng(9).normal(size=np.shape(batch.tokens)).astype(np.float32)

    heads = subtree_of(lambda path: path.startswith("value_"))
    critic = Critic(CONFIG, L.value_loss(), optax.sgd(0.1), targets, update_config(FLAT), subtree=heads)
    learner = make(EVERYTHING)
    batch, _ = rollout()
    own = critic.init_state(params())
    own, _ = critic.update(own, critic.with_values(own, batch))
    assert names(own.trainable) == {"value_head", "value_bias"}
    jax.tree.map(np.testing.assert_array_equal, own.base, {k: v for k, v in params().items() if k != "head"})

    state = with_critic(learner.init_state(params()), own)
    with_steps = Checkpointer(tmp_path)
    with_steps.save(1, state, {})
    with_steps.close()
    target = with_critic(learner.abstract_state(), with_base(critic.abstract_state(), own.base))
    restored, _, _ = Checkpointer(tmp_path).restore(target)
    assert fingerprint(restored) == fingerprint(state)
    assert dataclasses.is_dataclass(restored.critic)
