"""Updates: packing, sharing and accumulation change nothing but the cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import losses
from rljax.batching import PackConfig, stack, take_rows
from rljax.models import DecoderConfig, forest_attention, init_params, kernel_attention
from rljax.sampling import compile_count, sampling_params
from rljax.training import (
    Checkpointer,
    Learner,
    LightSAMConfig,
    LossNeeds,
    MuonConfig,
    OptimizerConfig,
    UpdateConfig,
    add_metrics,
    create_state,
    make_optimizer,
    sft_loss,
)
from rljax.types import Trajectory

CONFIG = DecoderConfig(
    vocab_size=40, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24, tied_embeddings=True
)
FLAT = PackConfig(pack_length=32, microbatch_size=8, share_prefixes=False)


def grpo(kl=0.01):
    return losses.policy_loss(
        losses.token_ratio,
        losses.clipped(clip_low=0.2, clip_high=0.2),
        losses.sequence_mean,
        penalties=[losses.entropy_bonus(kl)],
    )


def params(seed=0):
    return jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, init_params(CONFIG, jax.random.key(seed)))


def rollout(groups=4, samples=4, seed=0):
    """Groups share a prompt, all prompts share two tokens; some samples fail, some share their first tokens."""
    rng = np.random.default_rng(seed)
    rows, system = [], rng.integers(0, 37, 2)
    for group in range(groups):
        prompt = np.concatenate([system, rng.integers(0, 37, rng.integers(3, 9))])
        for sample in range(samples):
            completion = rng.integers(0, 3, rng.integers(1, 9))
            tokens = np.concatenate([prompt, completion]).astype(np.int32)
            mask = np.arange(len(tokens)) >= len(prompt)
            rows.append(
                Trajectory(
                    tokens=tokens,
                    action_mask=mask,
                    behavior_logprobs=np.where(mask, -rng.random(len(tokens)) * 4, 0).astype(np.float32),
                    entropies=np.zeros(len(tokens), np.float32),
                    turn_ids=np.zeros(len(tokens), np.int32),
                    policy_version=np.zeros(len(tokens), np.int32),
                    prompt_id=group,
                    group_id=group,
                    episode_id=len(rows),
                    reward=float(rng.normal()),
                    is_valid=bool(sample != 2 or group != 1),
                )
            )
    batch = stack(rows)
    advantages = np.where(batch.action_mask, rng.normal(size=batch.tokens.shape), 0).astype(np.float32)
    return batch, advantages


def update_config(pack, **changes):
    """An update of rows packed by `pack`."""
    return UpdateConfig(**{**dataclasses.asdict(pack), "head_chunk": 16, **changes})


def make(pack, loss=None, *, needs=None, sampling=None, **changes):
    update = update_config(pack, **changes)
    needs = dataclasses.replace(needs or LossNeeds(), sampling=sampling)
    return Learner(CONFIG, loss or grpo(), OptimizerConfig(learning_rate=1e-2), update, needs=needs)


PACKINGS = {
    "flat": FLAT,
    "one microbatch": PackConfig(pack_length=32, microbatch_size=16, share_prefixes=False),
    "shared": PackConfig(pack_length=64, microbatch_size=8),
    "wide": PackConfig(pack_length=128, microbatch_size=2),
    "whole": PackConfig(pack_length=128),
    "accumulated": PackConfig(pack_length=64, microbatch_size=1),
    "accumulated in pairs": PackConfig(pack_length=64, microbatch_size=2),
    "flat accumulated": PackConfig(pack_length=32, microbatch_size=2, share_prefixes=False),
    "padded": PackConfig(pack_length=256, score_buckets=(256,), row_buckets=(64,), microbatch_buckets=(8,)),
}


@functools.cache
def gradient(packing, *, off_policy=False, **changes):
    """Gradient (and loss and metrics) of one minibatch, packed as the entry of `PACKINGS` says."""
    learner = make(PACKINGS[packing], epochs=2 if off_policy else 1, **changes)
    batch, advantages = rollout()
    state = learner.init_state(jax.tree.map(lambda p, q: p + 0.03 * off_policy * q, params(0), params(1)))
    minibatch = learner.prepare(state, batch, advantages)[0]
    return jax.jit(learner.program.gradients)(params(0), minibatch, learner._sampling)


def assert_close(got, want, relative=1e-5):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=relative * scale)


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("packing", ["shared", "wide", "accumulated", "flat accumulated", "padded"])
def test_gradients_equal_those_of_flat_rows(packing, off_policy):
    want = gradient("one microbatch", off_policy=off_policy)
    got = gradient(packing, off_policy=off_policy)
    assert_close(got[2], want[2])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for name in want[1]:
        np.testing.assert_allclose(got[1][name], want[1][name], rtol=2e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        dict(remat="full"),
        dict(remat="attention_saved"),
        dict(remat="products_saved"),
        dict(head_chunk=1),
        dict(head_chunk=4096),
    ],
    ids=str,
)
def test_gradients_do_not_depend_on_how_they_are_computed(changes):
    assert_close(gradient("accumulated in pairs", **changes)[2], gradient("accumulated in pairs")[2])


def test_attention_kernels_are_chosen_by_the_devices(monkeypatch):
    """Those that have been compiled for them; others must be asked for."""

    def chosen(kind, **changes):
        monkeypatch.setattr("rljax.training.learner.device_kind", lambda mesh: kind)
        return make(FLAT, **changes).program.forward.attention

    assert [chosen(kind) for kind in ("cpu", "NVIDIA A100-SXM4-40GB")] == [forest_attention] * 2
    assert [chosen(kind) for kind in ("TPU v5 lite", "NVIDIA H100 80GB HBM3", "NVIDIA H200")] == [kernel_attention] * 3
    assert chosen("NVIDIA A100-SXM4-40GB", attention_kernel=True) == kernel_attention
    assert chosen("TPU v5", attention_kernel=False) == forest_attention


def test_flat_gradient_equals_a_plain_padded_forward_pass():
    """Independent of packing, row gathers and the chunked head: dense log-softmax over padded rows."""
    from rljax.models import hidden_states, logits

    batch, advantages = rollout()
    mask = batch.action_mask & batch.is_valid[:, None]
    length = batch.tokens.shape[1]

    def objective(p):
        positions = jnp.broadcast_to(jnp.arange(length), batch.tokens.shape)
        ends = jnp.broadcast_to(batch.lengths[:, None], batch.tokens.shape).astype(jnp.int32)
        z = logits(CONFIG, p, hidden_states(CONFIG, p, jnp.asarray(batch.tokens), positions, ends))
        log_p = jax.nn.log_softmax(z)[:, :-1]
        lp = jnp.take_along_axis(log_p, batch.tokens[:, 1:, None], -1)[..., 0]
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
        ratio = jnp.exp(lp - jax.lax.stop_gradient(lp))  # on-policy: the clip is inactive
        token = -(ratio * advantages[:, 1:] + 0.01 * entropy)
        m = mask[:, 1:]
        counts = m.sum(1)
        means = jnp.where(m, token, 0).sum(1) / np.maximum(counts, 1)
        return means.sum() / (counts > 0).sum()

    assert_close(gradient("flat")[2], jax.jit(jax.grad(objective))(params()))


def test_a_step_moves_the_loss_down_and_counts():
    learner = make(PackConfig(pack_length=128, microbatch_size=2))
    batch, advantages = rollout()
    state = learner.init_state(params())
    first = None
    for _ in range(5):
        (minibatch,) = learner.prepare(state, batch, advantages)
        state, metrics = learner.update(state, minibatch)
        if first is None:
            first = add_metrics([metrics])
    learner.check()
    assert int(state.step) == 5 and int(state.skipped) == 0
    logprobs = learner.score_rows(state.trainable, batch)
    before = learner.score_rows(params(), batch)
    assert ((logprobs - before) * advantages).sum() > 0
    assert first["loss/ratio_max"] == 1.0 and first["loss/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert first["pack/token_ratio"] > 1.2 and first["loss/learning_rate"] == pytest.approx(1e-2)


def test_score_rows_is_zero_off_the_mask_and_equals_the_gap():
    learner = make(PackConfig(pack_length=128))
    batch, _ = rollout()
    scored = learner.score_rows(params(), batch)
    mask = batch.action_mask & batch.is_valid[:, None]
    assert (scored[~mask] == 0).all() and (scored[mask] < 0).all()
    metrics = gradient("whole").metrics
    gap = np.abs(scored - batch.behavior_logprobs)[mask]
    np.testing.assert_allclose(metrics["rollout/logprob_gap_max"], gap.max(), rtol=1e-5)
    np.testing.assert_allclose(metrics["rollout/logprob_gap_mean"], gap.mean(), rtol=1e-5)


def test_the_only_update_of_a_rollout_takes_its_ratio_to_the_sampler_if_told_so():
    """Tokens of an older policy: without the option the ratio of a single update is 1, whatever sampled."""
    batch, _ = rollout()
    mask = batch.action_mask & batch.is_valid[:, None]
    scored = make(PackConfig(pack_length=128)).score_rows(params(), batch)
    want = np.exp(np.clip(np.float64(scored) - batch.behavior_logprobs, -20, 20))[mask]
    metrics = gradient("whole", use_sampler_logprobs=True).metrics
    np.testing.assert_allclose(metrics["loss/ratio_mean"], want.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/ratio_max"], want.max(), rtol=1e-5)
    assert want.max() > 1.5 and gradient("whole")[1]["loss/ratio_max"] == 1


def test_tokens_off_the_loss_mask_have_no_influence():
    """Advantages, behavior log-probs and tokens of invalid rows may be anything."""
    learner = make(PackConfig(pack_length=128))
    batch, advantages = rollout()
    spoilt = batch.replace(
        tokens=np.where(batch.is_valid[:, None], batch.tokens, 1),
        behavior_logprobs=np.where(batch.action_mask & batch.is_valid[:, None], batch.behavior_logprobs, np.nan),
    )
    noise = np.where(batch.action_mask & batch.is_valid[:, None], advantages, np.nan)
    results = []
    for one, a in ((batch, advantages), (spoilt, noise)):
        state = learner.init_state(params())
        state, metrics = learner.update(state, learner.prepare(state, one, a)[0])
        results.append((state.trainable, float(metrics["loss/total"])))
    assert int(state.skipped) == 0
    jax.tree.map(np.testing.assert_array_equal, results[0][0], results[1][0])


def test_the_sampled_distribution_is_the_one_scored():
    batch, _ = rollout()
    sampled = make(PackConfig(pack_length=128), sampling=sampling_params(0.5)).score_rows(params(), batch)
    plain = make(PackConfig(pack_length=128)).score_rows(params(), batch)
    colder = dict(params(), final_norm=params()["final_norm"] * 2)  # logits twice as large
    np.testing.assert_allclose(sampled, make(PackConfig(pack_length=128)).score_rows(colder, batch), atol=1e-5)
    assert np.abs(sampled - plain).max() > 0.1


def test_minibatches_hold_whole_groups_and_old_logprobs_are_scored_once():
    learner = make(PackConfig(pack_length=128), minibatches=2, epochs=2, shuffle=True)
    batch, advantages = rollout()
    state = learner.init_state(params())
    made = learner.prepare(state, batch, advantages)
    assert len(made) == 4 and made[0] is made[2] and made[1] is made[3]
    tokens = sum(int(m.rows.loss_mask.sum()) for m in made[:2])
    assert tokens == int((batch.action_mask & batch.is_valid[:, None]).sum())
    scored = learner.score_rows(state.trainable, batch)
    old = np.concatenate([np.asarray(m.rows.old_logprobs)[np.asarray(m.rows.loss_mask)] for m in made[:2]])
    np.testing.assert_allclose(np.sort(old), np.sort(scored[scored != 0]), atol=1e-5)
    again = learner.prepare(state, batch, advantages)
    jax.tree.map(np.testing.assert_array_equal, made, again)
    with pytest.raises(ValueError, match="4 groups do not divide into 3"):
        make(PackConfig(pack_length=128), minibatches=3).prepare(state, batch, advantages)


def test_reference_logprobs_follow_the_reference_and_its_refresh():
    learner = make(PackConfig(pack_length=128), needs=LossNeeds(reference=True))
    batch, advantages = rollout()
    state = learner.init_state(params())
    before = learner.score_rows(params(), batch)
    state, _ = learner.update(state, learner.prepare(state, batch, advantages)[0])
    np.testing.assert_array_equal(learner.score_rows(state.ref_trainable, batch), before)
    (minibatch,) = learner.prepare(state, batch, advantages)
    mask = np.asarray(minibatch.rows.loss_mask)
    np.testing.assert_allclose(
        np.sort(np.asarray(minibatch.rows.ref_logprobs)[mask]), np.sort(before[before != 0]), atol=1e-6
    )
    half = learner.refresh_reference(state, 0.5)
    middle = (state.trainable["embedding"] + state.ref_trainable["embedding"]) / 2
    np.testing.assert_allclose(half.ref_trainable["embedding"], middle, atol=1e-7)
    moved = learner.refresh_reference(state)
    np.testing.assert_array_equal(moved.ref_trainable["embedding"], moved.trainable["embedding"])
    moved, _ = learner.update(moved, minibatch)  # the copy is its own: donation leaves it alone
    assert np.isfinite(np.asarray(moved.ref_trainable["embedding"])).all()


@pytest.mark.parametrize("broken", ["advantages", "logprobs"])
def test_a_step_that_is_not_finite_is_skipped_and_the_run_stopped_after_k(broken):
    learner = make(PackConfig(pack_length=128), max_skipped=3)
    batch, advantages = rollout()
    state = learner.init_state(params())
    good = learner.prepare(state, batch, advantages)[0]
    if broken == "advantages":
        bad = learner.prepare(state, batch, np.where(batch.action_mask, np.nan, 0))[0]
    else:
        bad, weights = good, params()
        weights["final_norm"] = weights["final_norm"].at[0].set(np.nan)
        state = state.replace(trainable=weights)
    before = jax.device_get((state.trainable, state.opt_state))
    state, _ = learner.update(state, bad)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.trainable, state.opt_state)))
    assert int(state.skipped) == 1 and int(state.step) == 1
    if broken == "advantages":
        state, _ = learner.update(state, good)
        assert int(state.skipped) == 0
        state, _ = learner.update(state, bad)
    state, _ = learner.update(state, bad)
    state, _ = learner.update(state, bad)
    with pytest.raises(FloatingPointError, match=rf"3 updates in a row .* {broken}"):
        learner.check()


def test_supervised_loss_is_the_mean_negative_logprob():
    learner = make(PackConfig(pack_length=128), sft_loss())
    batch, _ = rollout()
    state = learner.init_state(params())
    scored = learner.score_rows(state.trainable, batch)
    _, metrics = learner.update(state, learner.prepare(state, batch, np.zeros(batch.tokens.shape, np.float32))[0])
    np.testing.assert_allclose(metrics["loss/nll"], -scored[scored != 0].mean(), rtol=1e-5)


def test_nothing_compiles_after_the_first_step_with_one_shape():
    spec = PackConfig(
        pack_length=64, length_buckets=(64,), score_buckets=(64,), row_buckets=(16,), microbatch_buckets=(16,)
    )
    learner = make(spec)
    state = learner.init_state(params())
    counts = []
    for seed in range(4):
        batch, advantages = rollout(seed=seed)
        minibatch = learner.prepare(state, batch, advantages)[0]
        before = compile_count()
        state, _ = learner.update(state, minibatch)
        counts.append(compile_count() - before)
    assert counts[0] > 0 and counts[1:] == [0, 0, 0]


def test_a_warm_up_changes_nothing_and_later_sizes_find_their_program():
    """Two microbatches at first, which fill their bucket: four are likely, and come."""
    learner = make(PackConfig(pack_length=32), compile_ahead=3, epochs=2)
    whole, advantages = rollout()
    state = learner.init_state(params())
    met = {}
    for groups in (2, 3, 4):
        rows = np.flatnonzero(whole.group_id < groups)
        minibatch = learner.prepare(state, take_rows(whole, rows), advantages[rows])[0]
        if groups == 2:
            before = jax.tree.map(np.array, state)
            done: list[tuple[int, int]] = []
            state = learner.warm_up(state, minibatch, lambda *numbers, into=done: into.append(numbers))
            assert done == [(1, 3), (2, 3), (3, 3)]
            jax.tree.map(np.testing.assert_array_equal, before, state)
        count = compile_count()
        state, _ = learner.update(state, minibatch)
        met[groups] = (len(minibatch.packed.tokens), compile_count() - count)
    assert met == {2: (2, 0), 3: (4, 0), 4: (4, 0)}


IN_BFLOAT16 = dataclasses.replace(CONFIG, param_dtype="bfloat16")


@pytest.mark.parametrize("microbatches", [16, 1])
@pytest.mark.parametrize("optimizer", [OptimizerConfig, MuonConfig, LightSAMConfig])
def test_an_update_keeps_the_dtypes_of_a_state_whatever_the_weights_came_in(optimizer, microbatches):
    """So that a checkpoint of any step is what `abstract_state` says, and no second program is compiled."""
    update = update_config(dataclasses.replace(FLAT, microbatch_size=16 // microbatches))
    learner = Learner(IN_BFLOAT16, grpo(), optimizer(), update)
    state = learner.abstract_state()
    (minibatch,) = learner.prepare(state, *rollout())
    weights, moments, *_ = jax.eval_shape(learner.program.step, *learner._arguments(state, minibatch))

    def dtypes(tree):
        return [x.dtype for x in jax.tree.leaves(tree)]

    assert dtypes((weights, moments)) == dtypes((state.trainable, state.opt_state))
    assert set(dtypes((weights, moments))) == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_a_hundred_small_updates_of_a_bfloat16_weight_add_up():
    """Adam on a constant gradient: each step is the learning rate, so 100 of 1e-6 are 1e-4."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6))
    state = create_state({"w": jnp.full((4,), 0.02, jnp.bfloat16)}, optimizer)
    start = float(jnp.bfloat16(0.02))
    weights, moments = state.trainable, state.opt_state
    update = jax.jit(optimizer.update)
    for _ in range(100):
        moved, moments = update({"w": jnp.full((4,), 0.1)}, moments, weights)
        weights = jax.tree.map(jnp.add, weights, moved)
    np.testing.assert_allclose(weights["w"], start - 1e-4, rtol=0, atol=2e-7)


def test_weights_that_came_in_bfloat16_resume_bit_for_bit(tmp_path):
    update = update_config(dataclasses.replace(FLAT, microbatch_size=2))
    learner = Learner(IN_BFLOAT16, grpo(), OptimizerConfig(learning_rate=1e-2), update)
    state = learner.init_state(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params()))
    state, _ = learner.update(state, learner.prepare(state, *rollout())[0])
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.close()
    restored, _, step = Checkpointer(tmp_path).restore(learner.abstract_state())
    assert step == 1
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_minibatch_without_a_valid_sample_moves_nothing():
    """Neither weights, by momentum, nor the count that the schedule goes by; and it is no failure."""
    learner = make(FLAT)
    batch, advantages = rollout()
    state = learner.init_state(params())
    state, _ = learner.update(state, learner.prepare(state, batch, advantages)[0])
    before = jax.device_get((state.trainable, state.opt_state))
    empty = batch.replace(is_valid=np.zeros_like(batch.is_valid))
    state, metrics = learner.update(state, learner.prepare(state, empty, advantages)[0])
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.trainable, state.opt_state)))
    assert int(state.skipped) == 0 == metrics["loss/skipped"]
