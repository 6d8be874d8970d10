"""A model, data and rewards of one's own, through training, conversion, evaluation and supervised fine-tuning."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from rljax.algorithms import GRPO, RandomForks
from rljax.experiment import (
    CheckpointConfig,
    FileData,
    MultiTurn,
    PretrainedModel,
    RewardConfig,
    SingleTurn,
    WarmupConfig,
)
from rljax.experiment.convert import convert
from rljax.experiment.evaluate import evaluate_model, of_answers
from rljax.experiment.fine_tune import fine_tune
from rljax.experiment.train import train
from rljax.models import abstract_params, load_model
from rljax.testing import tiny_config
from rljax.training import LogConfig, OptimizerConfig, RunFolder, read_jsonl, restore_params

REWARDS = """
def correct(prompt, completion, token_ids, answer, **columns):
    assert columns["level"] == 1 and len(token_ids) >= 1
    return float(answer in completion)

def batch(completions, answer):
    return [c.count(a) / 4 for c, a in zip(completions, answer)]
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, config, run folder) of a run on a JSONL file with a per-sample and a batch reward."""
    folder = tmp_path_factory.mktemp("own")
    rows = [{"prompt": f"{a}{b}=", "answer": a, "level": 1} for a in "abcdefgh" for b in "abcdefgh"]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own_rewards.py").write_text(REWARDS)
    sys.path.insert(0, str(folder))
    config = tiny_config(
        steps=2,
        data=FileData(train=str(folder / "train.jsonl"), test_fraction=0.2),
        actor=SingleTurn(rewards=(RewardConfig("own_rewards:correct"), RewardConfig("own_rewards:batch", weight=0.5))),
        checkpoint=CheckpointConfig(every=2),
    )
    train(config, str(folder / "run"))
    yield folder, config, folder / "run"
    sys.path.remove(str(folder))


@pytest.mark.slow
def test_rewards_of_a_file_are_weighted_and_logged(trained):
    _, _, run = trained
    for record in read_jsonl(run / "rollouts" / "step_000001.jsonl"):
        assert record["error"] is None
        parts = record["components"]
        assert set(parts) == {"correct", "batch"}
        assert record["reward"] == pytest.approx(parts["correct"] + 0.5 * parts["batch"])


def test_a_run_converts_to_a_folder_that_trains_again(trained):
    folder, config, run = trained
    hf = convert(str(run), str(folder / "hf"))
    decoder, params = load_model(hf)
    saved, step = restore_params(run / "checkpoints", abstract_params(decoder))
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, params, saved)
    again = dataclasses.replace(config, model=PretrainedModel(path=str(hf)))
    summary = train(again, str(folder / "again"))
    assert summary["steps"] == 2


def test_a_checkpoint_evaluates_as_the_run_did(trained, capsys):
    _, config, run = trained
    evaluation = evaluate_model(config, checkpoint=str(run))
    said = capsys.readouterr()
    assert "avg@2" in said.out
    # Every held-out example is answered greedily and sampled.
    asked = 2 * len(evaluation.problems)
    assert "answers: 100%" in said.err and f"{asked}/{asked}" in said.err
    assert evaluation.metrics == json.loads((run / "evaluations" / "step_000002.json").read_text())["metrics"]


def test_what_only_answers_decodes_what_is_asked_and_no_more_than_a_step():
    def sizes(config, samples):
        actor = of_answers(config, samples).actor
        return [
            getattr(actor, name) for name in ("prompt_slots", "sample_slots", "decode_rows") if hasattr(actor, name)
        ]

    config = tiny_config(prompts_per_step=8, algorithm=GRPO(group_size=64, kl_coef=0.0))
    config.evaluation.batch_prompts = 10
    assert sizes(config, 1) == [8, 1] and sizes(config, 100) == [8, 64]
    config.evaluation.batch_prompts = 4
    assert sizes(config, 2) == [4, 2]

    # What a config says stays, and so does what methods with forks need.
    chosen = dataclasses.replace(config, actor=dataclasses.replace(config.actor, prompt_slots=6))
    assert sizes(chosen, 1) == [6, 1]
    assert sizes(dataclasses.replace(config, algorithm=RandomForks()), 1) == [0, 0]
    turns = dataclasses.replace(config, actor=MultiTurn(make="m:f"))
    assert sizes(turns, 2) == [8] and of_answers(turns, 2).actor.conversations == 0
    assert sizes(turns, 1000) == [8 * 64]


def test_supervised_fine_tuning_learns_and_resumes(trained, tmp_path, monkeypatch):
    _, config, _ = trained
    warmup = WarmupConfig(
        steps=8, batch_size=8, completion_column="answer", optimizer=OptimizerConfig(learning_rate=3e-2)
    )
    config = dataclasses.replace(
        config, warmup=warmup, checkpoint=CheckpointConfig(every=4), log=LogConfig(pulse_s=0.01)
    )
    shown = []
    monkeypatch.setattr(RunFolder, "status", lambda folder, line: shown.append(line))
    fine_tune(config, str(tmp_path / "straight"))
    assert any("supervised update" in line for line in shown) and any("evaluation" in line for line in shown)
    losses = [line["loss/nll"] for line in read_jsonl(tmp_path / "straight" / "metrics.jsonl")]
    assert len(losses) == 8 and losses[-1] < losses[0] / 2
    # What it learnt can be exported like the weights of any run.
    _, exported = load_model(convert(str(tmp_path / "straight"), str(tmp_path / "hf")))
    saved, _ = restore_params(tmp_path / "straight" / "checkpoints", jax.eval_shape(lambda: exported))
    jax.tree.map(np.testing.assert_array_equal, exported, saved)
    half = dataclasses.replace(config, warmup=dataclasses.replace(warmup, steps=4))
    fine_tune(half, str(tmp_path / "resumed"))
    fine_tune(config, str(tmp_path / "resumed"))
    assert [line["loss/nll"] for line in read_jsonl(tmp_path / "resumed" / "metrics.jsonl")] == losses


def test_supervised_fine_tuning_has_no_best_checkpoints(tmp_path):
    config = tiny_config(warmup=WarmupConfig(steps=1), checkpoint=CheckpointConfig(keep_best=2))
    with pytest.raises(ValueError, match=r"^config\.checkpoint\.keep_best=2 has no effect in supervised .*set it to 0"):
        fine_tune(config, str(tmp_path / "run"))
    assert not any(tmp_path.iterdir())
