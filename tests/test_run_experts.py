"""A run of a mixture of experts: sampler and trainer agree, and nothing compiles once it goes."""

import dataclasses

import pytest

from rljax.experiment import FreshModel
from rljax.experiment.train import train
from rljax.testing import tiny_config
from rljax.training import read_jsonl

MIXTURE = FreshModel(
    alphabet="abcdefgh=",
    family="qwen3_moe",
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    experts=4,
    experts_per_token=2,
)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_sampler_and_trainer_agree_through_four_updates_a_step(family, tmp_path):
    base = tiny_config()
    rate = 0.01 if family == "glm4_moe" else 0.0
    config = dataclasses.replace(
        base,
        model=dataclasses.replace(MIXTURE, family=family),
        optimizer=dataclasses.replace(base.optimizer, balance_rate=rate),
        steps=3,
        actor=dataclasses.replace(base.actor, record_experts=True),
        update=dataclasses.replace(base.update, minibatches=2, epochs=2),
    )
    train(config, str(tmp_path))
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["rollout/logprob_gap_max"] < 5e-6
        assert 1 < line["rollout/experts_in_use"] <= 4
        assert 0.5 <= line["rollout/busiest_expert"] <= 1
        assert ("loss/expert_load_max" in line) == (family == "glm4_moe")
    assert lines[-1]["compile/count"] == 0
