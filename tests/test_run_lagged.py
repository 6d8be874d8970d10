"""Runs whose chains are sampled by the weights before the newest: where they end makes no difference."""

import dataclasses

import pytest
from breaking import break_off

from rljax.algorithms import APPO
from rljax.experiment import RolloutConfig
from rljax.experiment.train import train
from rljax.testing import run_metrics, tiny_config
from rljax.training import CheckpointConfig

STEPS = 5


def make_config(rollout, **changes):
    tiny = tiny_config(algorithm=APPO(chains=3), steps=STEPS, rollout=rollout)
    update = dataclasses.replace(tiny.update, row_buckets=(64,), microbatch_buckets=(8,))
    sampling = dataclasses.replace(tiny.sampling, max_new_tokens=8)
    optimizer = dataclasses.replace(tiny.optimizer, learning_rate=1e-2)
    evaluation = dataclasses.replace(tiny.evaluation, problems=2, every=2)
    return dataclasses.replace(
        tiny, update=update, sampling=sampling, optimizer=optimizer, evaluation=evaluation, **changes
    )


@pytest.mark.parametrize(
    "rollout",
    [
        pytest.param(RolloutConfig(), id="each"),
        pytest.param(RolloutConfig(push_every=2, staleness=1), id="second", marks=pytest.mark.slow),
    ],
)
def test_chains_have_the_weights_before_the_newest_behind_a_resume_too(rollout, tmp_path):
    train(make_config(rollout, checkpoint=CheckpointConfig(every=0)), str(tmp_path / "straight"))
    want = run_metrics(tmp_path / "straight")

    # Chains are of other weights than those that are trained as soon as some have been handed over.
    first = rollout.push_every + rollout.staleness
    assert all(line["rollout/logprob_gap_max"] > 1e-4 for line in want[first:])

    for last in (2, 3):
        break_off(make_config(rollout), tmp_path / "resumed", before=last)
    train(make_config(rollout), str(tmp_path / "resumed"))
    assert run_metrics(tmp_path / "resumed") == want
