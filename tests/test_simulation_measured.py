"""What a run folder says of the costs of its steps, and what a model's sizes say where there is none."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from rljax.simulation import (
    Machine,
    Scenario,
    calibrated,
    costs_of,
    read_run,
    roll_out,
    simulate,
    with_values,
)


def write_run(folder, devices=1, groups=4, **changed):
    """A run of 4 steps of 8 samples in `groups`: the first compiles, the others take 4 seconds, in which scoring and
    updating take 0.25 + 1 and the learner waits for 2.5, and the actor samples for 2 and judges for 0.5."""
    (folder / "rollouts").mkdir(parents=True)
    line = {
        "compile/count": 0.0,
        "rollout/new_tokens": 80.0,
        "rollout/length_mean": 10.0,
        "time/sample_s": 2.0,
        "time/reward_s": 0.5,
        "time/score_s": 0.25,
        "time/update_s": 1.0,
        "time/total_s": 4.0,
        **({"time/learner_wait_s": 2.5} if devices else {}),
        **changed,
    }
    lines = [line | {"step": step, "compile/count": float(step == 1)} for step in range(1, 5)]
    lines[0] |= {"time/sample_s": 60.0, "time/total_s": 62.0}
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(one) for one in lines) + "\n")
    for step in (1, 2):
        records = [{"tokens": [7] * length} for length in (5, 15, 5, 15, 5, 15, 5, 15)]
        text = "\n".join(json.dumps(record) for record in records)
        (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text(text)
    (folder / "versions.json").write_text(json.dumps({"devices": ["cpu:cpu"] * 8, "processes": 2}))
    config = {"prompts_per_step": groups, "rollout": {"class": "RolloutConfig", "devices": devices}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_run_folder_is_read_without_the_steps_that_compiled(tmp_path):
    found = read_run(write_run(tmp_path / "run"), 2)
    assert dataclasses.asdict(found) == {
        "steps": 3,
        "devices": 8,
        "processes": 2,
        "rollout_devices": 1,
        "engines": 0,
        "sample_s": 2.0,
        "reward_s": 0.5,
        "update_s": 1.25,
        "other_s": 0.25,
        "step_s": 4.0,
        "samples": 8,
        "turns": 1.0,
        "tokens": 10.0,
        "tokens_cv": 0.5,
    }


def test_beside_an_actor_a_learner_waits_for_a_part_of_the_rollout(tmp_path):
    assert read_run(write_run(tmp_path / "beside", **{"time/learner_wait_s": 0.75}), 2).other_s == 2.0
    assert read_run(write_run(tmp_path / "in turn", devices=0), 2).other_s == 0.25


def test_engines_beside_updates_are_handed_weights_within_a_rollout(tmp_path):
    """The learner waits for a part of it, though no device of the run rolls out."""
    folder = write_run(tmp_path / "run", devices=0, **{"time/learner_wait_s": 0.75, "play/hand_over_s": 0.125})
    actor = {"class": "Guided", "actor": {"class": "Remote", "engines": ["http://a:1", "http://b:1"]}}
    config = {"prompts_per_step": 4, "actor": actor, "rollout": {"devices": 0, "staleness": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    found = read_run(folder, 2)
    assert (found.engines, found.rollout_devices) == (2, 0)
    assert (found.sample_s, found.other_s) == (2.125, 2.0)


def test_turns_share_the_tokens_of_a_sample(tmp_path):
    found = read_run(write_run(tmp_path / "run", **{"play/turns": 32.0}), 2)
    assert (found.turns, found.tokens) == (4.0, 2.5)


def test_samples_are_counted_whatever_else_their_lengths_hold(tmp_path):
    """8 are trained on, of 10 new tokens each. What environments say makes them longer; 16 are played for these."""
    longer = {"rollout/length_mean": 14.0, "rollout/prompts_drawn": 8.0, "play/turns": 24.0}
    found = read_run(write_run(tmp_path / "run", **longer), 2)
    assert (found.samples, found.turns) == (8, 1.5)
    assert found.tokens == pytest.approx(10 / 1.5)


def test_a_folder_that_says_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--measured=.*none has no metrics\.jsonl; name the folder of a run"):
        read_run(tmp_path / "none", 2)
    folder = write_run(tmp_path / "run")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"--measured=.* has no config\.json"):
        read_run(folder, 2)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "compile/count": 3.0}) + "\n")
    with pytest.raises(
        ValueError, match=r"has no step that updated and compiled nothing among its 1; let the run go on"
    ):
        read_run(folder, 2)


@pytest.mark.parametrize("turns", [1.0, 4.0])
def test_the_seconds_of_a_step_are_those_that_explain_a_rollout(turns):
    """Queues, unequal lengths and tools included; where turns overtake each other, several explain it about as well."""
    scenario = Scenario(groups=20, rows=32, tokens=60.0, tokens_cv=1.0, turns=turns, tool_s=2.0)
    seconds = roll_out(dataclasses.replace(scenario, step_s=0.0371)).sample_s[:4].mean()
    found = calibrated(scenario, float(seconds))
    assert found.step_s == pytest.approx(0.0371, rel=1e-6 if turns == 1 else 0.005)
    assert roll_out(found).sample_s[:4].mean() == pytest.approx(seconds, rel=1e-6 if turns == 1 else 0.001)


def test_tools_that_take_longer_than_what_was_measured_are_refused():
    with pytest.raises(ValueError, match=r"tools and prompts alone take .* give a smaller tool_s"):
        calibrated(Scenario(turns=3.0, tool_s=20.0), 5.0)


def test_given_values_go_before_all_and_are_checked():
    scenario = with_values(Scenario(), {"devices": "64", "step_s": "1e-3"}, "--assume")
    assert scenario == Scenario(devices=64, step_s=0.001)
    for text, message in {"6.5": "must be a whole number", "nan": "must be a whole", "many": "must be a whole"}.items():
        with pytest.raises(ValueError, match=rf"--assume=devices={text} {message}"):
            with_values(Scenario(), {"devices": text}, "--assume")


# The sizes that docs/scale.md is simulated with.
_SPEC = importlib.util.spec_from_file_location("scale", Path(__file__).parent.parent / "docs" / "scale.py")
_SCALE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_SCALE)
QWEN3_8B = _SCALE.MODELS["8B"]
QWEN3_30B_A3B = _SCALE.MODELS["30B-A3B"]


def test_sizes_of_models_are_those_that_their_cards_say():
    """8.2B and 30.5B parameters (without norms), 3.3B active with the embedding that is looked up."""
    assert QWEN3_8B.parameters == pytest.approx(8.19e9, rel=0.005)
    assert QWEN3_30B_A3B.parameters == pytest.approx(30.53e9, rel=0.005)
    assert QWEN3_30B_A3B.multiplied + 151936 * 2048 == pytest.approx(3.35e9, rel=0.01)
    # One token reads its own experts, many read all.
    assert QWEN3_30B_A3B.read(1.0) == pytest.approx(QWEN3_30B_A3B.multiplied)
    assert QWEN3_30B_A3B.read(1000.0) == pytest.approx(QWEN3_30B_A3B.parameters - 151936 * 2048, rel=1e-6)
    assert QWEN3_8B.read(1.0) == QWEN3_8B.read(1000.0) == QWEN3_8B.multiplied


def test_costs_of_a_model_are_its_rooflines():
    machine = Machine(flops=1e15, bandwidth=4e12, memory=80e9, training_share=0.4, decoding_share=0.5)
    scenario = Scenario(devices=16, groups=8, group_size=4, rows=32, tokens=1000.0)
    found = costs_of(QWEN3_8B, scenario, machine, prompt=500, microbatch_tokens=8192)

    # 36,000 tokens, whose 4/3 forward and backward passes are four forward passes of 2 x 7.57e9 and attention.
    attention = 2 * 36 * 32 * 128 * 1500
    assert found.update_s == pytest.approx(36000 * 4 * (2 * QWEN3_8B.multiplied + attention) / 0.4e15)
    # 16.4 GB of weights in every device, read once a step.
    assert found.step_s == pytest.approx(QWEN3_8B.multiplied * 2 / 2e12)
    assert found.step_row_s == pytest.approx(2 * 36 * 8 * 128 * 2 * 1000 / 2e12)
    assert found.update_bytes == pytest.approx(QWEN3_8B.parameters * 8)
    assert (found.least_trainers, found.least_rollout) == (4, 1)
    assert simulate(dataclasses.replace(found, steps=3)).step_s > found.update_s / 16

    # Weights that one device does not hold are split over two, which both decode the same rows.
    two = costs_of(QWEN3_30B_A3B, scenario, machine, prompt=500, microbatch_tokens=8192)
    assert two.least_rollout == 2
    assert two.hand_over_bytes == QWEN3_30B_A3B.parameters
