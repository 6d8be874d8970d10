"""Runs of a model with a delta rule in most layers: what forks and goes on recalls what the trainer computes."""

import dataclasses

import pytest
from breaking import break_off
from test_run_environment import make_config

from rljax.algorithms import ARPO, DecoupledPPO, TreeGRPO, TreeRL
from rljax.experiment import CheckpointConfig, FreshModel
from rljax.experiment.train import train
from rljax.testing import run_metrics, tiny_config
from rljax.training import read_jsonl


def hybrid(config, **changes):
    """`config` with three layers of a delta rule and one of attention."""
    alphabet = config.model.alphabet
    sizes = {"num_layers": 4, "embed_dim": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 64}
    model = FreshModel(alphabet=alphabet, family="qwen3_5_text", max_position=2048, **sizes)
    return dataclasses.replace(config, model=model, **changes)


def gaps(folder):
    return [line["rollout/logprob_gap_max"] for line in read_jsonl(folder / "metrics.jsonl")]


def test_forks_of_samples_are_trained(tmp_path):
    config = hybrid(tiny_config(), algorithm=TreeRL(chains=2, branches=2))
    train(config, str(tmp_path))
    assert len(gaps(tmp_path)) == config.steps and max(gaps(tmp_path)) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "memories"),
    [
        pytest.param(TreeGRPO(chains=2, points=1, rounds=1), 6, id="tree_grpo"),
        pytest.param(TreeGRPO(chains=2, points=1, rounds=1), 2, id="computed_again"),
        pytest.param(ARPO(chains=2, points=1), 2, id="arpo"),
    ],
)
def test_episodes_that_fork_are_trained(tmp_path, algorithm, memories):
    config = hybrid(make_config(algorithm))
    config.actor = dataclasses.replace(config.actor, memories=memories)
    train(config, str(tmp_path))
    shares = [line["play/reused_share"] for line in read_jsonl(tmp_path / "metrics.jsonl")]
    assert max(gaps(tmp_path)) < 2e-5 and 0 < min(shares) <= max(shares) < 1


@pytest.mark.slow
@pytest.mark.parametrize("at_hand_over", ["keep", "recompute"])
def test_groups_in_flight_go_on_with_the_same_numbers(tmp_path, at_hand_over):
    config = hybrid(make_config(DecoupledPPO(group_size=4)), steps=4, checkpoint=CheckpointConfig(every=2))
    config.actor = dataclasses.replace(
        config.actor, groups_in_flight=2, at_hand_over=at_hand_over, answers_after=1, workers=4
    )
    train(config, str(tmp_path / "whole"))
    break_off(config, tmp_path / "broken", before=3)
    train(config, str(tmp_path / "broken"))
    assert run_metrics(tmp_path / "broken") == run_metrics(tmp_path / "whole")
