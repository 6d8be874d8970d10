"""Forests as drawings: values of stretches against a walk over whole paths."""

import random

import pytest

from rljax.viewer import lay_out


def grow(seed):
    """Records as a run writes them: each fork shares the first `fork_index` tokens of its parent. All other tokens are
    different, so that two paths are one exactly where their tokens are."""
    draw = random.Random(seed)
    records = []
    for place in range(draw.randrange(2, 14)):
        fresh = [f"{place}.{i}" for i in range(draw.randrange(1, 9))]
        record = {"reward": draw.choice([None, 0.0, 0.25, 1.0])}
        if place and draw.random() < 0.7:
            parent = draw.randrange(place)
            fork = draw.randrange(len(records[parent]["tokens"]) + 1)
            record |= {"parent": parent, "fork_index": fork, "fork_score": draw.random()}
            fresh = records[parent]["tokens"][:fork] + fresh
        records.append({**record, "tokens": fresh})
    return records


@pytest.mark.parametrize("seed", range(30))
def test_every_token_is_drawn_once_with_the_mean_reward_of_the_leaves_behind_it(seed):
    records = grow(seed)
    forest = lay_out(records)

    drawn = {}
    for branch in forest.branches:
        tokens = records[branch.sample]["tokens"]
        for stretch in branch.stretches:
            for token in tokens[stretch.start : stretch.end]:
                assert token not in drawn
                drawn[token] = (stretch.leaves, stretch.value)

    expected = {}
    for token in {token for record in records for token in record["tokens"]}:
        leaves = [record for record in records if token in record["tokens"]]
        rewards = [leaf["reward"] for leaf in leaves if leaf["reward"] is not None]
        expected[token] = (len(leaves), sum(rewards) / len(rewards) if rewards else None)
    assert drawn.keys() == expected.keys()
    for token, (leaves, value) in expected.items():
        assert drawn[token] == (leaves, pytest.approx(value, abs=1e-12))
    assert forest.length == max(len(record["tokens"]) for record in records)


@pytest.mark.parametrize("seed", range(30))
def test_a_branch_lies_below_the_one_it_leaves_and_lines_cross_no_branch(seed):
    forest = lay_out(grow(seed))
    assert [branch.lane for branch in forest.branches] == list(range(len(forest.branches)))
    by_sample = {branch.sample: branch for branch in forest.branches}
    for branch in forest.branches:
        if branch.parent is None:
            continue
        above = by_sample[branch.parent].lane
        assert above < branch.lane
        # A line goes straight down where the fork is; what lies between begins further right, or there too.
        for other in forest.branches[above + 1 : branch.lane]:
            assert other.stretches[0].start >= branch.stretches[0].start


def test_a_record_whose_parent_is_missing_is_a_root():
    forest = lay_out([{"tokens": [1], "reward": 1.0, "parent": 7, "fork_index": 1}, {"tokens": [], "reward": None}])
    assert [(branch.sample, branch.parent) for branch in forest.branches] == [(0, None), (1, None)]
