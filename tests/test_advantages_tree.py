"""Credit on forests: the worked examples of the method sheets, and float64 loops over leaves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forests import WIDTH, forest_batch, leaves_below, owner, pad, permute, random_forests
from hypothesis import given, settings
from objectives import NAN, float64, map_fields

from rljax import advantages as A
from rljax import trees
from rljax.losses import clipped, policy_loss, sequence_mean, token_mean, token_ratio
from rljax.types import Rows

PREFIX, OWN = 4, 6
WIDE = {"prompt": 1, "width": 1 + PREFIX + OWN}


def two_trees(rewards, **more):
    """Two trees of three leaves, one fork each after 4 of 10 completion tokens; column 0 is the prompt."""
    columns = {"parent_row": [-1, 0, 0, -1, 3, 3], "fork_index": [0, 5, 5, 0, 5, 5], "lengths": [11] * 6}
    return forest_batch(**columns, rewards=rewards, dtype=np.float64, **WIDE, **more)


def chains(rewards):
    return forest_batch(
        parent_row=[-1] * len(rewards), fork_index=[0] * len(rewards), lengths=[11] * len(rewards), rewards=rewards,
        dtype=np.float64, **WIDE,
    )  # fmt: skip


def run(function, batch):
    with float64():
        return np.asarray(function(batch))


def check(function, batch, *, prefix=None, own=None, atol=1e-5):
    """The credit of the shared prefixes and of the rows' own tokens, one number per row."""
    got = run(function, batch)
    assert not got[:, 0].any()
    for want, tokens in ((prefix, got[:, 1 : 1 + PREFIX]), (own, got[:, 1 + PREFIX :])):
        if want is not None:
            np.testing.assert_allclose(tokens, np.broadcast_to(np.reshape(want, (-1, 1)), tokens.shape), atol=atol)


# Tree-GRPO


@pytest.mark.parametrize(
    ("rewards", "want"),
    [
        ([1, 0, 0, 1, 1, 0], [2.067568, -1.490219, -1.490219, 1.490219, 1.490219, -2.067568]),
        ([1, 0, 0, 1, 1, 1], [1.800195, -1.868341, -1.868341, 0.645496, 0.645496, 0.645496]),
        ([1, 0.2, 0, 0.8, 0.1, 0.2], [2.630992, -0.823048, -1.686558, 2.156138, -1.392216, -0.885308]),
        ([1, 1, 1, 0, 0, 0], [0.912869] * 3 + [-0.912869] * 3),  # flat trees that differ: GRPO
    ],
)
def test_tree_grpo_examples(rewards, want):
    check(A.intra_and_inter_tree(), two_trees(rewards), prefix=want, own=want)


def test_tree_grpo_with_population_std_is_another_number():
    want = [2.414209, -1.707103, -1.707103, 1.707103, 1.707103, -2.414209]
    check(A.intra_and_inter_tree(ddof=0), two_trees([1, 0, 0, 1, 1, 0]), own=want)


def test_tree_grpo_of_a_lone_leaf_adds_nothing_within_its_tree():
    ragged = forest_batch(
        parent_row=[-1, 0, 0, -1],
        fork_index=[0, 5, 5, 0],
        lengths=[11] * 4,
        rewards=[1, 0, 0, 1],
        dtype=np.float64,
        **WIDE,
    )
    want = [2.020722, -1.443373, -1.443373, 0.866024]
    check(A.intra_and_inter_tree(), ragged, prefix=want, own=want)
    want = [0.866024, -0.866024, -0.866024, 0.866024]
    check(A.intra_and_inter_tree(), chains([1, 0, 0, 1]), prefix=want, own=want)
    np.testing.assert_array_equal(
        run(A.intra_and_inter_tree(), chains([1, 0, 0.3, 1])), run(A.group_normalized(), chains([1, 0, 0.3, 1]))
    )


def test_tree_grpo_trains_a_trunk_by_the_inter_term_alone():
    got = run(A.intra_and_inter_tree(), two_trees([1, 0, 0, 1, 1, 0]))
    np.testing.assert_allclose([got[:3, 1].sum(), got[3:, 1].sum()], [-0.912870, 0.912870], atol=1e-5)


def test_tree_grpo_shifted_and_scaled_rewards_are_the_same():
    rewards = np.array([1, 0.2, 0, 0.8, 0.1, 0.2])
    a, b = (run(A.intra_and_inter_tree(), two_trees(r)) for r in (rewards, 50 * rewards - 3))
    np.testing.assert_allclose(a, b, atol=1e-4)


def objective(aggregate, advantages, mask, *, ratio=1.0, dual_clip=3.0):
    """The mean surrogate of the loss room, to be maximised."""
    mask = np.asarray(mask, bool)
    loss = policy_loss(token_ratio, clipped(clip_low=0.2, clip_high=0.2, dual_clip=dual_clip), aggregate)
    zeros = jnp.zeros(mask.shape)
    rows = Rows(
        loss_mask=mask,
        loss_weights=loss.token_weights(mask),
        token_count=jnp.asarray(mask.sum(), zeros.dtype),
        advantages=jnp.broadcast_to(jnp.asarray(advantages, zeros.dtype)[:, None], mask.shape),
        behavior_logprobs=zeros,
        old_logprobs=zeros,
        source=zeros[:, 0].astype(int),
    )
    return -float(loss.loss(zeros + jnp.log(ratio), zeros, rows)[0])


def test_tree_grpo_aggregation_and_clipping_examples():
    mask = [[1, 1, 0, 1, 0], [1, 0, 1, 1, 1]]
    with float64():
        assert objective(token_mean, [2.067568, -1.490219], mask) == pytest.approx(0.034547, abs=1e-6)
        assert objective(sequence_mean, [2.067568, -1.490219], mask) == pytest.approx(0.288674, abs=1e-6)
        for ratio, advantage, want in [(1.5, 2, 2.4), (1.5, -2, -3), (4, -2, -6), (0.5, 2, 1), (0.5, -2, -1.6)]:
            assert objective(token_mean, [advantage], [[1]], ratio=ratio) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("ratio", [0.2, 0.7, 1.0, 1.3, 4.0])
def test_shared_tokens_trained_once_with_two_weights_are_the_same_objective(ratio):
    """`S+ min(r, 1 + e) + S- min(max(r, 1 - e), c)` per unique token, S+ and S- summing the rows' credit by sign."""
    batch = two_trees([1, 0.2, 0, 0.8, 0.1, 0.2])
    credit = run(A.intra_and_inter_tree(), batch)
    mask = np.asarray(batch.action_mask)
    total = mask.sum()
    once = 0.0
    for b, t in np.argwhere(mask):
        if owner(batch, b, t) == b:
            sharers = [credit[j, t] for j in leaves_below(batch, b, t, 1)]
            plus, minus = sum(max(a, 0) for a in sharers), sum(min(a, 0) for a in sharers)
            once += (plus * min(ratio, 1.2) + minus * min(max(ratio, 0.8), 3.0)) / total
    with float64():
        copies = objective(token_mean, credit[:, 1], mask, ratio=ratio)
    np.testing.assert_allclose(copies, once, atol=1e-9)


# TreeRL


def test_treerl_example_of_one_fork_per_tree():
    batch = two_trees([1, 0, 0, 1, 1, 0])
    own = [1.166667, -0.833333, -0.833333, 0.833333, 0.833333, -1.166667]
    check(A.global_and_local(), batch, prefix=[-0.192450] * 3 + [0.192450] * 3, own=own)
    own = [1.31547, -1.08453, -1.08453, 1.08453, 1.08453, -1.31547]
    check(A.global_and_local_released(), batch, prefix=[-0.23094] * 3 + [0.23094] * 3, own=own)


def nested(rewards):
    """Two trees, each of a chain of 10 tokens with a branch after 4 and one after 7."""
    columns = {"parent_row": [-1, 0, 0, -1, 3, 3], "fork_index": [0, 5, 8, 0, 5, 8], "lengths": [11] * 6}
    return forest_batch(**columns, rewards=rewards, dtype=np.float64, **WIDE)


@pytest.mark.parametrize(
    ("function", "want"),
    [
        (
            A.global_and_local(),
            [
                [0.192450, 0.589256, 0.5],
                [0.192450, -1.166667, -1.166667],
                [0.192450, 0.589256, 0.5],
                [-0.192450, 0.117851, -1.0],
                [-0.192450, -0.833333, -0.833333],
                [-0.192450, 0.117851, 1.0],
            ],
        ),
        (
            A.global_and_local_released(),
            [
                [0.23094, 0.73306, 0.77574],
                [0.23094, -1.31547, -1.31547],
                [0.23094, 0.73306, 0.77574],
                [-0.23094, 0.11547, -1.2],
                [-0.23094, -1.08453, -1.08453],
                [-0.23094, 0.11547, 1.2],
            ],
        ),
    ],
)
def test_treerl_example_of_nested_forks(function, want):
    got = run(function, nested([1, 0, 1, 0, 0, 1]))
    np.testing.assert_allclose(got[:, 1:], np.repeat(want, [4, 3, 3], axis=1), atol=1e-5)


def test_treerl_without_forks_is_twice_the_centred_reward():
    check(A.global_and_local(), chains([1, 0, 0, 1]), prefix=[1, -1, -1, 1], own=[1, -1, -1, 1])


def test_treerl_released_lends_the_local_term_of_the_node_before():
    """The first leaf's damped value equals its parent's: 5/4 * 0.1 and 5/4 * 0.2 / sqrt(4)."""
    columns = {"parent_row": [-1, 0, 0, 0, -1], "fork_index": [0, 5, 5, 5, 0], "lengths": [11] * 5}
    batch = forest_batch(**columns, rewards=[0.1, 0.7, 0, 0, -0.8], dtype=np.float64, **WIDE)
    own = [0.125 + 0.125, 2 * 5 / 4 * 0.7 - 0.125, -0.125, -0.125, 2 * 5 / 4 * -0.8]
    check(A.global_and_local_released(), batch, prefix=[0.25] * 4 + [-2.0], own=own, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(random_forests(invalid=False))
def test_treerl_terms_balance_at_every_fork(forest):
    """Over the children of a node, counts times local gains cancel, unless a leaf ends in the node itself."""
    _, batch = forest
    tree = map_fields(trees.build_tree(pad(batch, 10 - len(batch.group_id), 0)), np.asarray)
    value = np.asarray(trees.leaf_mean(tree, np.pad(batch.reward, (0, 10 - len(batch.reward)))))
    gain = tree.leaf_counts * (value - np.asarray(trees.parent_values(tree, value)))
    for node in np.flatnonzero(tree.leaf_counts):
        children = np.flatnonzero(tree.parents == node)
        if len(children) and tree.leaf_counts[children].sum() == tree.leaf_counts[node]:
            assert abs(gain[children].sum()) < 1e-5


# Shared prefixes


ARPO = dict(parent_row=[-1, 0, 0, -1], fork_index=[0, 4, 2, 0], lengths=[6, 6, 5, 4], prompt=0, dtype=np.float64)


@pytest.mark.parametrize(
    ("rewards", "want"),
    [
        (
            [1, 0, 0, 0],
            [
                [0.192450, 0.192450, 0.577349, 0.577349, 1.732047, 1.732047],
                [0.192450, 0.192450, 0.577349, 0.577349, -0.577349, -0.577349],
                [0.192450, 0.192450, -0.577349, -0.577349, -0.577349, 0],
                [-0.577349, -0.577349, -0.577349, -0.577349, 0, 0],
            ],
        ),
        (
            [1, 0, 0, 1],
            [
                [-0.333333, -0.333333, 0, 0, 0.999998, 0.999998],
                [-0.333333, -0.333333, 0, 0, -0.999998, -0.999998],
                [-0.333333, -0.333333, -0.999998, -0.999998, -0.999998, 0],
                [0.999998, 0.999998, 0.999998, 0.999998, 0, 0],
            ],
        ),
    ],
)
def test_arpo_hard_credit_example(rewards, want):
    batch = forest_batch(rewards=rewards, **ARPO)
    np.testing.assert_allclose(run(A.shared_mean(A.group_normalized(ddof=0)), batch), want, atol=1e-5)
    soft = run(A.group_normalized(ddof=0), batch)
    np.testing.assert_allclose(soft[:3, :2].sum(axis=0), np.sum(want, axis=0)[:2] - want[3][0], atol=1e-5)


def test_soft_and_hard_credit_differ_under_sequence_means_and_clipping():
    """The first shared token of the example's rows 0 to 2."""
    batch = forest_batch(rewards=[1, 0, 0, 0], **ARPO)
    soft, hard = (run(f, batch)[:3, 0] for f in (A.group_normalized(ddof=0), A.shared_mean(A.group_normalized(ddof=0))))
    lengths = np.array([6, 6, 5])
    np.testing.assert_allclose([(soft / lengths).sum(), (hard / lengths).sum()], [0.076980, 0.102640], atol=1e-5)

    def clipped_sum(credit):
        return lambda log_ratio: jnp.minimum(
            jnp.exp(log_ratio) * credit, jnp.clip(jnp.exp(log_ratio), 0.8, 1.2) * credit
        ).sum()

    with float64():
        for credit, value, slope in ((soft, 0.577349, -1.501107), (hard, 0.692819, 0.0)):
            got, gradient = jax.value_and_grad(clipped_sum(credit))(jnp.log(1.3))
            np.testing.assert_allclose([got, gradient], [value, slope], atol=1e-5)


def test_prefix_weights_sum_sqrt_and_mean():
    batch = two_trees([1, 0, 0, 1, 1, 0])
    base = run(A.group_normalized(), batch)
    for power, factor in ((1.0, 1.0), (0.5, 3**-0.5), (0.0, 1 / 3)):
        got = run(A.prefix_weighted(A.group_normalized(), power=power), batch)
        np.testing.assert_allclose(got[:, 1:5], base[:, 1:5] * factor, rtol=1e-12)
        np.testing.assert_allclose(got[:, 5:], base[:, 5:], rtol=1e-12)


# The other rows of the table


@pytest.mark.parametrize(
    ("function", "prefix", "own"),
    [
        (A.group_normalized(), None, [0.912869, -0.912869, -0.912869, 0.912869, 0.912869, -0.912869]),
        (A.leave_one_out(), None, [0.6, -0.6, -0.6, 0.6, 0.6, -0.6]),
        (A.value_gain(), [-1 / 6, 1 / 6], [2 / 3, -1 / 3, -1 / 3, 1 / 3, 1 / 3, -2 / 3]),
        (A.value_gain(value_fn=trees.child_mean), [-1 / 6, 1 / 6], [2 / 3, -1 / 3, -1 / 3, 1 / 3, 1 / 3, -2 / 3]),
        (A.ancestor_centered(), None, [7 / 12, -5 / 12, -5 / 12, 5 / 12, 5 / 12, -7 / 12]),
        (A.whitened(A.ancestor_centered()), None, [1.208346, -0.863105, -0.863105, 0.863105, 0.863105, -1.208346]),
        (
            A.shared_mean(A.group_normalized(ddof=0)),
            [-1 / 3, 1 / 3],
            [0.999998, -0.999998, -0.999998, 0.999998, 0.999998, -0.999998],
        ),
        (A.depth_normalized(), [-0.707107, 0.707107], [0.912871, -0.912871, -0.912871, 0.912871, 0.912871, -0.912871]),
        (A.prefix_baseline(), [0, 0], [7 / 12, -5 / 12, -5 / 12, 5 / 12, 5 / 12, -7 / 12]),
    ],
)
def test_the_same_toy_forest_under_every_method(function, prefix, own):
    prefix = own if prefix is None else np.repeat(prefix, 3)
    check(function, two_trees([1, 0, 0, 1, 1, 0]), prefix=prefix, own=own)


def test_at2po_averages_with_the_surprisal_of_turns():
    batch = two_trees([1, 0, 0, 1, 1, 0])
    turns = np.where(np.arange(11) < 5, 0, np.where(np.arange(11) < 8, 1, 2))
    level = {0: 0.5, 1: 0.2, 2: 0.3, 3: 1.0, 4: 0.5, 5: 0.5}  # mean surprisal of each row's first own turn
    logprobs = np.array(batch.behavior_logprobs)
    for row, mean in level.items():
        logprobs[row, 5:8] = -mean * np.array([0.5, 1.0, 1.5])
        logprobs[row, 8:] = -7.0  # a later turn of the same node has no say
    batch = dataclasses.replace(
        batch, behavior_logprobs=logprobs, turn_ids=np.broadcast_to(turns, (6, 11)).astype(np.int32)
    )
    z = [0.999998, -0.999998, -0.999998, 0.999998, 0.999998, -0.999998]
    prefix = [(0.5 - 0.2 - 0.3) / 1.0 * z[0]] * 3 + [(1.0 + 0.5 - 0.5) / 2.0 * z[0]] * 3
    check(A.surprisal_weighted(), batch, prefix=prefix, own=z)
    equal = dataclasses.replace(batch, behavior_logprobs=np.full_like(logprobs, -0.4))
    check(A.surprisal_weighted(), equal, prefix=[-1 / 3] * 3 + [1 / 3] * 3, own=z)
    silent = dataclasses.replace(batch, behavior_logprobs=np.zeros_like(logprobs))
    check(A.surprisal_weighted(), silent, prefix=[-1 / 3] * 3 + [1 / 3] * 3, own=z)


def test_treerpo_compares_siblings():
    got = run(A.sibling_normalized(), two_trees([1, 0, 0, 1, 1, 0]))
    z = np.array([1, 0, 0]) - 1 / 3
    z = z / (z.std() + 1e-6)
    np.testing.assert_allclose(got[:, 6], [*z, *-z[::-1]], atol=1e-9)
    np.testing.assert_allclose(got[:, 1], np.repeat([-1, 1], 3), atol=1e-4)


def test_depth_normalized_clips():
    rewards = [1.0] + [0.0] * 40
    got = run(jax.jit(A.depth_normalized(clip=5.0)), chains(rewards))
    assert got.max() == 5.0
    assert run(jax.jit(A.depth_normalized(clip=50.0)), chains(rewards)).max() > 6


def test_probability_mask_keeps_uncertain_tokens():
    batch = two_trees([1, 0, 0, 1, 1, 0])
    logprobs = np.log(np.where(np.arange(11) % 2, 0.95, 0.5)) * np.ones((6, 1))
    batch = dataclasses.replace(batch, behavior_logprobs=logprobs)
    full, got = run(A.value_gain(), batch), run(A.below_probability(A.value_gain(), threshold=0.9), batch)
    np.testing.assert_array_equal(got, np.where(np.arange(11) % 2, 0, full))
    assert got.any()


def test_vineppo_takes_values_from_the_rows_forked_at_each_step():
    """Two samples of 8 tokens after a prompt of 2. The first is cut at 2, 5 and 8, the second at 6 alone."""
    forks = [(0, 2, 1.0), (0, 2, 0.0), (0, 5, 1.0), (0, 5, 1.0), (0, 8, 0.0), (0, 8, 0.5), (1, 6, 0.0), (1, 6, 0.25)]
    batch = forest_batch(
        prompt=2,
        parent_row=[-1, -1, *(f[0] for f in forks)],
        fork_index=[0, 0, *(f[1] for f in forks)],
        lengths=[10] * 10,
        rewards=[1.0, 0.0, *(f[2] for f in forks)],
        dtype=np.float64,
    )
    got = run(A.vine_gain(), batch)
    np.testing.assert_allclose(got[0], [0, 0, *[0.5] * 3, *[-0.75] * 3, *[0.75] * 2], atol=1e-12)
    np.testing.assert_allclose(got[1], [0, 0, *[0.125 - 0.5] * 4, *[-0.125] * 4], atol=1e-12)
    assert not got[2:].any()


def test_tempo_adds_the_step_in_value_where_samples_part():
    batch = forest_batch(
        parent_row=[-1] * 4, fork_index=[0] * 4, lengths=[5] * 4, rewards=[1, 0, 0, 1], dtype=np.float64
    )
    tokens = np.array([[9, 1, 2, 3, 4], [9, 1, 2, 5, 4], [9, 1, 6, 6, 6], [9, 7, 7, 7, 7]], np.int32)
    batch = dataclasses.replace(batch, tokens=tokens)
    std = np.std([1, 0, 0, 1], ddof=1) + 1e-6
    centred, value = np.array([0.5, -0.5, -0.5, 0.5]), 1 / 2
    step = np.zeros((4, 5))
    step[:3, 1], step[3, 1] = 1 / 3 - value, 1 - value
    step[:2, 2], step[2, 2] = 1 / 2 - 1 / 3, 0 - 1 / 3
    step[0, 3], step[1, 3] = 1 - 1 / 2, 0 - 1 / 2
    want = (centred[:, None] + step) / std
    want[:, 0] = 0
    np.testing.assert_allclose(run(A.trie_difference(), batch), want, atol=1e-9)


# What all of them keep


EVERY = {
    "tree_grpo": A.intra_and_inter_tree(),
    "treerl": A.global_and_local(),
    "treerl_released": A.global_and_local_released(),
    "hard": A.shared_mean(A.group_normalized(ddof=0)),
    "lambda_grpo": A.prefix_weighted(A.group_normalized(), power=0.0),
    "treepo": A.ancestor_centered(),
    "spo": A.value_gain(value_fn=trees.child_mean),
    "treerpo": A.sibling_normalized(),
    "branchgrpo": A.depth_normalized(),
    "at2po": A.surprisal_weighted(),
    "tree_opo": A.prefix_baseline(),
    "tempo": A.trie_difference(),
    "vineppo": A.vine_gain(),
    "appo": A.dual_group(),
    "appo_released": A.shared_branch_credit(),
    "aepo": A.entropy_scaled(A.group_normalized()),
    "resum": A.summary_contrast(natural=0.0, injected=0.0),
    "resum_own": A.summary_own_group(natural=0.0, injected=0.0),
}
JITTED = {name: jax.jit(function) for name, function in EVERY.items()}
every = pytest.mark.parametrize("name", EVERY)
examples = settings(max_examples=12, deadline=None)


def credit(name, batch):
    """Of the jitted function, on 10 rows so that it compiles once."""
    rows = len(batch.group_id)
    filled = pad(batch, 10 - rows, WIDTH - batch.tokens.shape[1])
    return np.asarray(JITTED[name](map_fields(filled, np.asarray)))[:rows]


@every
@examples
@given(random_forests())
def test_credit_is_finite_and_lies_on_valid_action_tokens(name, forest):
    _, batch = forest
    got = credit(name, dataclasses.replace(batch, reward=np.where(batch.is_valid, batch.reward, NAN)))
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    assert not got[~(batch.action_mask & batch.is_valid[:, None])].any()


@every
@examples
@given(random_forests())
def test_equal_rewards_earn_exactly_nothing(name, forest):
    _, batch = forest
    for value in (0.1, 0.2, 0.8, 1.1, 1 / 3):
        reward = np.full(len(batch.reward), value, np.float32)
        np.testing.assert_array_equal(credit(name, dataclasses.replace(batch, reward=reward)), 0)


@every
@examples
@given(random_forests())
def test_the_order_of_rows_does_not_matter(name, forest):
    _, batch = forest
    order = np.random.default_rng(len(batch.reward)).permutation(len(batch.reward))
    np.testing.assert_allclose(credit(name, permute(batch, order))[order], credit(name, batch), atol=2e-5)


@every
@examples
@given(random_forests(max_rows=8))
def test_padding_and_rows_that_failed_change_nothing(name, forest):
    _, batch = forest
    rows = len(batch.reward)
    short = int(batch.lengths.max())
    narrow = map_fields(batch, lambda x: x[:, :short] if x.ndim == 2 else x)
    got = credit(name, narrow)[:, :WIDTH]
    np.testing.assert_allclose(got, credit(name, batch), atol=2e-5)
    failed = pad(batch, 1, 0)
    failed = dataclasses.replace(
        failed,
        group_id=np.append(batch.group_id, batch.group_id[0]).astype(np.int32),
        parent_row=np.append(batch.parent_row, 0).astype(np.int32),
        fork_index=np.append(batch.fork_index, batch.lengths[0] - 1).astype(np.int32),
        lengths=np.append(batch.lengths, WIDTH).astype(np.int32),
    )
    np.testing.assert_allclose(credit(name, failed)[:rows], got, atol=2e-5)


@pytest.mark.slow
def test_jit_changes_nothing():
    batch = two_trees([1, 0.2, 0, 0.8, 0.1, 0.2])
    single = map_fields(batch, lambda x: x.astype(np.float32) if x.dtype == np.float64 else x)
    jitted = jax.jit(lambda b: {name: function(b) for name, function in EVERY.items()})(single)
    for name, function in EVERY.items():
        np.testing.assert_allclose(function(single), jitted[name], atol=1e-5, err_msg=name)
