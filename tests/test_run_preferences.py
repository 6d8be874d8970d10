"""Learning from preferences: pairs in one packed sequence, a reward model from data to reward, runs that go on."""

import dataclasses
import json

import numpy as np
import pytest
from docs_metrics import unexplained

from rljax.algorithms import DPO, GRPO, KTO, BradleyTerry, SimPO
from rljax.experiment import CheckpointConfig, FileData, PreferenceConfig, RewardConfig, SingleTurn
from rljax.experiment.build import build
from rljax.experiment.convert import convert
from rljax.experiment.prefer import prefer
from rljax.experiment.preferences import check_preferences, preference_batch, preferring
from rljax.experiment.reward_model import RewardModel
from rljax.experiment.train import train
from rljax.losses import PAIR, SIDE
from rljax.testing import run_metrics, tiny_config
from rljax.training import OptimizerConfig, read_jsonl


def pairs(count):
    """Letters up to `d` are preferred to the others; prompts repeat, and one begins another."""
    rows = []
    for i in range(count):
        letter = "abcd"[i % 4]
        prompt = f"{letter}=" if i % 3 else f"{letter}=={'efgh'[i % 5 % 4]}"
        rows.append({"prompt": prompt, "chosen": letter * (1 + i % 3), "rejected": "efgh"[i // 3 % 4] * (1 + i % 2)})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    held_out = [{**row, "prompt": "h" + row["prompt"]} for row in pairs(8)]
    for name, rows in (("train", pairs(48)), ("test", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileData(train=str(folder / "train.jsonl"), test=str(folder / "test.jsonl"), repeated_prompts=True)


def config_of(data, method, **changes):
    own = {"steps": 4, "batch_size": 4, "optimizer": OptimizerConfig(learning_rate=1e-2)} | changes
    return tiny_config(
        data=data,
        actor=SingleTurn(prompt_buckets=(8,)),
        preferences=PreferenceConfig(method=method, **own),
        checkpoint=CheckpointConfig(every=2),
    )


def run_of(config):
    return build(config, plays=lambda dataset: False)


def test_pairs_share_their_prompt_in_one_packed_sequence_and_a_policy_begins_at_its_reference(data):
    run = run_of(config_of(data, DPO(), batch_size=12))
    stage = preferring(run, lambda folder: run.initial_params())
    batch = preference_batch(run, run.dataset.train[:12])
    prompts = [example.prompt for example in run.dataset.train[:12]]
    assert len(set(prompts)) < 12
    state = stage.initial(None)
    (minibatch,) = stage.learner.prepare(state, batch, np.zeros(batch.tokens.shape, np.float32))

    rows = minibatch.rows
    for sides, numbers in zip(rows.row_columns[SIDE], rows.row_columns[PAIR], strict=True):
        real = sides != 0
        found = sorted(zip(np.asarray(numbers)[real].tolist(), np.asarray(sides)[real].tolist(), strict=True))
        assert found == sorted((n, s) for n in {n for n, _ in found} for s in (-1, 1))
    assert np.sum(np.asarray(rows.row_columns[SIDE]) > 0) == 12
    # A prompt stands once for both.
    shared = sum(len(run.tokenizer.encode(prompt)) for prompt in prompts)
    unique = int(np.sum(np.asarray(minibatch.packed.subtree_end) > 0))
    assert unique <= int(np.sum(batch.lengths)) - shared

    _, metrics = stage.learner.update(state, minibatch)
    assert metrics["preference/margin"] == 0 and metrics["preference/chosen"] == 0
    np.testing.assert_allclose(metrics["preference/loss"], np.log(2), rtol=1e-6)
    assert metrics["loss/grad_norm"] > 1e-3


def test_labelled_completions_are_compared_with_those_of_other_prompts(data, tmp_path):
    """KTO, one update: at first every completion is as likely as in the reference, so that each is worth a half."""
    config = config_of(data, KTO(desirable=1.5), steps=1)
    metrics = prefer(config, str(tmp_path / "run"))
    assert metrics["preference/baseline"] == 0
    np.testing.assert_allclose(metrics["preference/loss"], (1.5 + 1) / 4, rtol=1e-6)
    assert metrics["loss/grad_norm"] > 1e-3 and not unexplained(metrics)


@pytest.mark.slow
def test_a_reward_model_learns_from_pairs_goes_on_after_a_stop_and_rewards_a_policy(data, tmp_path):
    config = config_of(data, BradleyTerry(center=0.01), steps=24, batch_size=16, evaluate_every=12)
    prefer(config, str(tmp_path / "straight"))
    lines = list(run_metrics(tmp_path / "straight"))
    assert not unexplained(lines[-1])
    assert lines[0]["preference/loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert lines[-1]["eval/preference_accuracy"] > 0.95
    assert [("eval/preference_accuracy" in line) for line in lines] == ([False] * 11 + [True]) * 2
    assert lines[-1]["eval/preference_pairs"] == 8

    half = dataclasses.replace(config, preferences=dataclasses.replace(config.preferences, steps=12))
    prefer(half, str(tmp_path / "resumed"))
    prefer(config, str(tmp_path / "resumed"))
    again = [line["preference/loss"] for line in run_metrics(tmp_path / "resumed")]
    assert again == [line["preference/loss"] for line in lines]

    # What it says of the held-out pairs as a reward is what the run measured.
    folder = convert(str(tmp_path / "straight"), str(tmp_path / "hf"))
    reward = RewardModel(str(folder), batch_size=3)
    rows = list(read_jsonl(data.test))
    prompts = [row["prompt"] for row in rows]
    chosen = reward(prompts, [row["chosen"] for row in rows])
    rejected = reward(prompts, [row["rejected"] for row in rows])
    right = np.mean(np.array(chosen) > np.array(rejected))
    assert right == lines[-1]["eval/preference_accuracy"]
    # Neither the other rows nor the padding enter.
    np.testing.assert_allclose(reward(prompts[:1], [rows[0]["chosen"]]), chosen[:1], rtol=1e-5)

    actor = SingleTurn(
        rewards=(RewardConfig("rljax.experiment.reward_model:RewardModel", args={"path": str(folder)}),),
        prompt_buckets=(8,),
    )
    train(dataclasses.replace(config, steps=1, algorithm=GRPO(group_size=4), actor=actor), str(tmp_path / "rl"))
    (record, *_) = read_jsonl(tmp_path / "rl" / "rollouts" / "step_000001.jsonl")
    assert record["error"] is None
    assert record["reward"] == pytest.approx(reward([record["prompt"]], [record["completion"]])[0], rel=1e-5)


@pytest.mark.parametrize(
    ("method", "own", "update", "says"),
    [
        (DPO(), {"chosen_column": "best"}, {}, r"DPO needs the columns 'best' and 'rejected'; .*chosen_column"),
        (KTO(), {"rejected_column": "no"}, {}, r"KTO needs .* or 'completion' and 'label'; .* label_column"),
        (KTO(), {"batch_size": 1}, {}, r"config.preferences.batch_size=1 leaves no other prompt .*at least 2"),
        (DPO(), {}, {"share_prefixes": False}, r"config.update.share_prefixes=False may pack the rows of a pair apart"),
        (
            DPO(),
            {},
            {"pack_length": 8, "length_buckets": ()},
            r"the pair of .* take \d+ tokens, .*raise it to at least",
        ),
        (SimPO(), {"batch_size": 400}, {}, r"config.preferences.batch_size=400 is more than the \d+ rows"),
        (DPO(beta=-1.0), {}, {}, r"config.preferences.method.beta=-1.0 must be above 0"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_in_a_line(data, method, own, update, says):
    config = config_of(data, method, **own)
    config = dataclasses.replace(config, update=dataclasses.replace(config.update, **update))
    run = run_of(config)
    with pytest.raises(ValueError, match=says):
        preferring(run, lambda folder: run.initial_params())
        check_preferences(run)
