"""The loop: what a run leaves behind, that it repeats and resumes bit for bit, and that it learns."""

import dataclasses
import gc
import json
import os
import signal

import jax
import numpy as np
import pytest
from docs_metrics import unexplained

import rljax.experiment.pipeline
import rljax.experiment.train
from rljax.algorithms import DAPO, GRPO, RECIPES
from rljax.experiment import CheckpointConfig, EvaluationConfig, ModelTeacher, RewardConfig, SingleTurn
from rljax.experiment.train import RunFailed, train
from rljax.testing import params_fingerprint, rollout_records, run_metrics, tiny_config
from rljax.training import Checkpointer, Learner, OptimizerConfig, read_jsonl


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(folder, summary) of the tiny run, started once and never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, train(tiny_config(), str(folder))


def short(**changes):
    """Two steps and nothing else."""
    settings = {
        "steps": 2,
        "checkpoint": CheckpointConfig(every=0),
        "evaluation": EvaluationConfig(problems=2, samples=1),
    }
    return tiny_config(**settings | changes)


def with_reward(name, **changes):
    actor = SingleTurn(rewards=(RewardConfig(f"flaky_rewards:{name}"),), prompt_buckets=(4,))
    return short(actor=actor, **changes)


def finite(line):
    return all(isinstance(v, (int, float)) and np.isfinite(v) for v in line.values())


def test_a_run_leaves_every_promised_file(straight):
    folder, summary = straight
    present = {path.name for path in folder.iterdir()}
    assert present >= {
        "config.json",
        "versions.json",
        "metrics.jsonl",
        "tensorboard",
        "rollouts",
        "evaluations",
        "checkpoints",
        "learning_curve.png",
        "summary.json",
        "model",
    }
    assert json.loads((folder / "config.json").read_text())["prompts_per_step"] == 4
    assert json.loads((folder / "versions.json").read_text())["packages"]["jax"]
    assert sorted(p.name for p in (folder / "evaluations").iterdir()) == ["step_000000.json", "step_000004.json"]
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == [3, 4]
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert {p.name for p in (folder / "model").iterdir()} >= {"config.json", "char_tokenizer.json"}
    written = json.loads((folder / "summary.json").read_text())
    assert written["before"] == summary["before"] and written["after"] == summary["after"]
    assert written["steps"] == 4 and written["compiles_after_warmup"] == 0


def test_the_rollout_log_tells_what_was_sampled_and_what_it_was_worth(straight):
    folder, _ = straight
    steps = rollout_records(folder)
    assert list(steps) == [f"step_{n:06d}.jsonl" for n in (1, 2, 3, 4)]
    for records, line in zip(steps.values(), run_metrics(folder), strict=True):
        assert len(records) == 16
        for record in records:
            assert record["reward"] == record["components"]["echo_reward"]
            assert record["reward"] == record["completion"][:4].count(record["prompt"][0]) / 4
            assert len(record["tokens"]) == len(record["logprobs"]) <= 4
            assert record["error"] is None
        rewards = np.array([r["reward"] for r in records]).reshape(4, 4)
        assert line["rollout/reward_mean"] == pytest.approx(rewards.mean())
        assert line["rollout/new_tokens"] == sum(len(r["tokens"]) for r in records)
        assert line["rollout/no_signal_share"] == np.mean(np.ptp(rewards, axis=1) == 0)
        assert line["rollout/truncated_share"] == np.mean([r["finish_reason"] == "length" for r in records])
        centred = rewards - rewards.mean(axis=1, keepdims=True)  # GRPO: (R - mean) / (std + epsilon)
        want = centred / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-6)
        np.testing.assert_allclose([r["advantage"] for r in records], want.reshape(-1), rtol=1e-5, atol=1e-6)


def test_every_step_reports_the_promised_metrics(straight):
    folder, _ = straight
    lines = read_jsonl(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        for phase in ("sample", "reward", "score", "update", "total"):
            assert line[f"time/{phase}_s"] > 0
        assert line["time/tokens_per_s"] > 0
        assert 0 < line["rollout/entropy"] <= np.log(11) + 1e-6  # 8 letters, '=', padding, end of sequence
        assert line["rollout/logprob_gap_max"] < 2e-5
        assert line["loss/grad_norm"] >= 0 and line["loss/clip_fraction"] == 0 == line["loss/approx_kl"]
        assert 0 <= line["rollout/no_signal_share"] <= 1 and 0 <= line["rollout/truncated_share"] <= 1
        assert line["compile/count"] >= 0 and line["rollout/invalid_rewards"] == 0
        assert finite(line)
        assert not unexplained(line)  # docs/not-learning.md


def test_nothing_compiles_after_the_second_step(straight):
    counts = [line["compile/count"] for line in read_jsonl(straight[0] / "metrics.jsonl")]
    assert counts[0] > 0 and counts[2:] == [0, 0]


def test_a_run_repeats_bit_for_bit_and_another_seed_does_not(straight, tmp_path):
    train(tiny_config(), str(tmp_path / "again"))
    assert run_metrics(tmp_path / "again") == run_metrics(straight[0])
    assert rollout_records(tmp_path / "again") == rollout_records(straight[0])
    assert params_fingerprint(tmp_path / "again") == params_fingerprint(straight[0])
    train(short(seed=1), str(tmp_path / "other"))
    assert rollout_records(tmp_path / "other") != {k: v for k, v in list(rollout_records(straight[0]).items())[:2]}


@pytest.mark.parametrize("name", ["plain", pytest.param("everything", marks=pytest.mark.slow)])
def test_a_run_that_breaks_off_and_goes_on_equals_one_that_does_not(name, straight, tmp_path, monkeypatch):
    # Its last regular checkpoint is that of step 2.
    config = tiny_config(checkpoint=CheckpointConfig(every=2))
    if name == "everything":  # a reference that moves, dynamic sampling, several updates, a schedule
        config = tiny_config(
            algorithm=DAPO(group_size=4, overlong_buffer=0, kl_coef=0.1),
            reference_refresh=2,
            update=dataclasses.replace(config.update, minibatches=2, epochs=2),
            optimizer=OptimizerConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=1, total_steps=4),
            checkpoint=config.checkpoint,
        )
        train(config, str(tmp_path / "straight"))
    whole = straight[0] if name == "plain" else tmp_path / "straight"
    step = rljax.experiment.train.train_step
    collect = rljax.experiment.pipeline.collect

    def is_stopped(actor, plan, draw, n, index, version, **rules):
        rollout = collect(actor, plan, draw, n, index, version, **rules)
        if index == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return rollout

    monkeypatch.setattr(rljax.experiment.pipeline, "collect", is_stopped)
    with pytest.raises(SystemExit) as stop:
        train(config, str(tmp_path / "parts"))
    assert stop.value.code == 143
    assert not (tmp_path / "parts" / "summary.json").exists()
    monkeypatch.undo()
    steps_run = []
    monkeypatch.setattr(
        rljax.experiment.train, "train_step", lambda run, index: (steps_run.append(index), step(run, index))[1]
    )
    train(config, str(tmp_path / "parts"))
    assert steps_run == [3], "only the rollout under way is lost"
    assert run_metrics(tmp_path / "parts") == run_metrics(whole)
    assert rollout_records(tmp_path / "parts") == rollout_records(whole)
    assert params_fingerprint(tmp_path / "parts") == params_fingerprint(whole)
    evaluations = [(p / "evaluations" / "step_000004.json").read_text() for p in (tmp_path / "parts", whole)]
    assert evaluations[0] == evaluations[1]


def test_a_finished_run_started_again_changes_nothing(straight):
    folder, summary = straight
    before = run_metrics(folder), params_fingerprint(folder)
    again = train(tiny_config(), str(folder))
    assert (run_metrics(folder), params_fingerprint(folder)) == before
    assert again["after"] == summary["after"]


@pytest.mark.slow
def test_fresh_starts_over(tmp_path):
    train(short(), str(tmp_path))
    (tmp_path / "mine.txt").write_text("kept")
    train(short(steps=1), str(tmp_path), fresh=True)
    assert [line["step"] for line in run_metrics(tmp_path)] == [1]
    assert (tmp_path / "mine.txt").exists()


@pytest.mark.parametrize("name", ["raises_on_h", "nan_on_h"])
def test_a_failing_reward_costs_its_samples_and_no_more(name, tmp_path):
    train(with_reward(name), str(tmp_path))
    lines, steps = run_metrics(tmp_path), rollout_records(tmp_path)
    assert len(lines) == 2 and all(map(finite, lines))
    assert sum(line["rollout/invalid_rewards"] for line in lines) > 0
    for line, records in zip(lines, steps.values(), strict=True):
        failed = [r for r in records if "h" in r["completion"]]
        assert line["rollout/invalid_rewards"] == len(failed)
        for record in records:
            assert (record["reward"] is None) == (record["error"] is not None) == (record in failed)
            assert record not in failed or record["advantage"] == 0


def test_dynamic_sampling_trains_on_groups_that_disagree(tmp_path):
    config = with_reward("nearly_always_equal", algorithm=DAPO(group_size=4, overlong_buffer=0, max_sampling_rounds=20))
    train(config, str(tmp_path))
    lines = run_metrics(tmp_path)
    assert [line["rollout/no_signal_share"] for line in lines] == [0, 0]
    assert max(line["rollout/prompts_drawn"] for line in lines) > 4
    for records in rollout_records(tmp_path).values():
        rewards = np.array([r["reward"] for r in records]).reshape(4, 4)
        assert (np.ptp(rewards, axis=1) > 0).all()


def test_dynamic_sampling_that_finds_no_signal_says_what_to_change(tmp_path):
    hopeless = dataclasses.replace(tiny_config().sampling, temperature=1e-3)  # groups of equal samples
    config = short(sampling=hopeless, algorithm=DAPO(group_size=4, overlong_buffer=0, max_sampling_rounds=2))
    with pytest.raises(RunFailed, match=r"2 steps in a row .*after 2 rounds .*equal rewards.*group_size"):
        train(config, str(tmp_path))
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["rollout/empty_steps"] for line in lines] == [1, 2]
    assert [line["rollout/prompts_drawn"] for line in lines] == [8, 8]
    # All that was drawn can be read, and the next start would go on behind it.
    assert [len(records) for records in rollout_records(tmp_path).values()] == [32, 32]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_steps_whose_rewards_all_fail_update_nothing_and_end_the_run_with_the_reason(tmp_path):
    config = with_reward("always_raises", steps=3, checkpoint=CheckpointConfig(every=1, keep_best=1))
    config.update = dataclasses.replace(config.update, max_empty=2)
    with pytest.raises(RunFailed, match=r"2 steps in a row .*none of the 16 samples has a valid reward.*no judge here"):
        train(config, str(tmp_path))
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["rollout/reward_mean"] for line in lines] == ["nan", "nan"]
    assert [line["rollout/empty_steps"] for line in lines] == [1, 2]
    assert params_fingerprint(tmp_path, 1) == params_fingerprint(tmp_path, 2)
    saved = Checkpointer(tmp_path / "checkpoints")
    assert saved.steps == [1, 2] and [saved._score(step) for step in saved.steps] == [None, None]


def test_rollouts_are_compared_before_processes_compute_of_them_together(tmp_path, monkeypatch):
    """Those with other shapes would wait for each other, and never hear why."""

    def apart(**values):
        if "rollout" in values:
            raise RuntimeError("the processes of this run disagree")

    monkeypatch.setattr(rljax.experiment.train, "check_equal", apart)
    monkeypatch.setattr(Learner, "score_rows", None)
    with pytest.raises(RuntimeError, match="disagree"):
        train(short(algorithm=GRPO(group_size=4, kl_coef=0.1)), str(tmp_path))


def test_the_decoder_leaves_updates_the_room_of_its_weights(tmp_path, monkeypatch):
    """It takes turns with the learner, and each rollout or evaluation brings it weights anew."""
    config = short()

    def decoder_bytes():
        # Of a layer apart, which the learner has stacked.
        shape = (config.model.mlp_dim, config.model.embed_dim)
        return sum(x.nbytes for x in jax.live_arrays() if x.shape == shape)

    gc.collect()
    before = decoder_bytes()
    seen = {"rollout": [], "update": []}

    def spied(function, name):
        def call(*args, **kwargs):
            seen[name].append(decoder_bytes() - before)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(rljax.experiment.pipeline, "collect", spied(rljax.experiment.pipeline.collect, "rollout"))
    monkeypatch.setattr(Learner, "update", spied(Learner.update, "update"))
    train(config, str(tmp_path))
    gate_and_up = 2 * config.model.num_layers * config.model.mlp_dim * config.model.embed_dim * 4
    assert seen == {"rollout": [gate_and_up] * 2, "update": [0] * 2}


def test_a_metric_that_the_best_is_chosen_by_must_exist(tmp_path):
    with pytest.raises(ValueError, match=r"best_metric='rollout/reward_meen' is no .* mean rollout/reward_mean\?"):
        train(short(checkpoint=CheckpointConfig(keep_best=1, best_metric="rollout/reward_meen")), str(tmp_path))


RECIPE_RUNS = [
    pytest.param(recipe, marks=() if recipe is GRPO else pytest.mark.slow, id=recipe.__name__) for recipe in RECIPES
]


def recipe_of(cls):
    """The recipe with groups of four and, where it has one, a KL penalty."""
    names = {field.name for field in dataclasses.fields(cls)}
    values = {"group_size": 4, "kl_coef": 0.1, "overlong_buffer": 0, "max_sampling_rounds": 20}
    return cls(**{name: value for name, value in values.items() if name in names})


@pytest.mark.parametrize("recipe", RECIPE_RUNS)
def test_every_recipe_runs_with_several_minibatches_epochs_and_a_moving_reference(recipe, tmp_path):
    update = dataclasses.replace(tiny_config().update, minibatches=2, epochs=2)
    algorithm = recipe_of(recipe)
    # A teacher of another depth, so that it has something to teach.
    shallow = dataclasses.replace(tiny_config().model, num_layers=1)
    teachers = (ModelTeacher(shallow),) if algorithm.build().plan.teacher else ()
    train(short(steps=3, algorithm=algorithm, update=update, reference_refresh=1, teachers=teachers), str(tmp_path))
    lines = run_metrics(tmp_path)
    assert len(lines) == 3 and all(map(finite, lines))
    for line in lines:
        assert line["rollout/logprob_gap_max"] < 2e-5  # of the first update; later ones have moved
        assert line["loss/skipped"] == 0
    assert any(line["loss/grad_norm"] > 0 for line in lines)
    assert any(line["loss/approx_kl"] > 0 for line in lines)  # the second minibatch is off-policy
    assert read_jsonl(tmp_path / "metrics.jsonl")[2]["compile/count"] == 0


@pytest.mark.slow
def test_the_reference_holds_the_policy_back(tmp_path):
    """With a KL penalty so large that the reward hardly counts, the policy stays where the reference is."""
    moved = {}
    for coefficient in (0.0, 100.0):
        config = tiny_config(
            steps=6, algorithm=GRPO(group_size=4, kl_coef=coefficient), checkpoint=CheckpointConfig(every=0)
        )
        folder = tmp_path / str(coefficient)
        train(config, str(folder))
        lines = run_metrics(folder)
        moved[coefficient] = abs(lines[-1]["rollout/entropy"] - lines[0]["rollout/entropy"])
        assert ("loss/kl_ref" in lines[0]) == (coefficient > 0)
    assert moved[100.0] < moved[0.0] / 2


@pytest.mark.slow
def test_the_toy_task_is_learned(tmp_path):
    config = tiny_config(steps=60, prompts_per_step=16, checkpoint=CheckpointConfig(every=0))
    summary = train(config, str(tmp_path))
    rewards = [line["rollout/reward_mean"] for line in run_metrics(tmp_path)]
    assert np.mean(rewards[:5]) < 0.2
    assert np.mean(rewards[-5:]) > 3 * np.mean(rewards[:5])
    assert summary["after"]["avg@2"] >= summary["before"]["avg@2"]
