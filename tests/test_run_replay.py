"""Rollouts that a run records: its replay has its numbers, and what cannot be replayed is refused in one line. The run
also traces two of its steps, which the replay shows to change nothing."""

import dataclasses

import jax
import pytest
from breaking import break_off
from hypothesis import given, settings
from hypothesis import strategies as st
from made import EXAMPLES, assert_same_rollout, made

from rljax.experiment.check import check
from rljax.experiment.pipeline import Pipeline
from rljax.experiment.recording import Recorder, from_parquet, to_parquet
from rljax.experiment.train import train
from rljax.testing import params_fingerprint, rollout_records, run_metrics, tiny_config
from rljax.text import CharTokenizer

pytest.importorskip("pyarrow", reason="recorded rollouts need pyarrow (the extra `parquet`)")

STEPS = 3
TOKENIZER = CharTokenizer("abcdefgh=")
WHOLE = to_parquet(made(), {"seed": 0}, TOKENIZER)


def config(**changes):
    tiny = tiny_config(steps=STEPS)
    evaluation = dataclasses.replace(tiny.evaluation, problems=2, every=2)
    return dataclasses.replace(tiny, evaluation=evaluation, **changes)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The folder of a run with recordings."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    log = dataclasses.replace(config().log, recordings=True, profile_steps=(2, 3))
    train(config(log=log), str(folder))
    return folder


def test_a_trace_has_the_steps_that_were_asked_for_and_their_phases_by_name(recorded):
    (file,) = (recorded / "profile").glob("**/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "step"]
    assert sorted(map(int, steps)) == [2, 3]
    for phase in ("rollout", "sample and judge", "scoring", "update"):
        assert sum(event.name == phase for event in events) == 2


@pytest.mark.parametrize("steps", [(2,), (0, 1), (3, 2), (2, 4)])
def test_steps_that_cannot_be_traced_are_refused(steps):
    log = dataclasses.replace(config().log, profile_steps=steps)
    with pytest.raises(ValueError, match=r"config.log.profile_steps=.* between 1 and config.steps=3"):
        check(config(log=log))


@pytest.fixture
def unsampled(monkeypatch):
    """Fails where a rollout is sampled."""

    def fail(*_):
        raise AssertionError("a replay samples nothing to train on")

    monkeypatch.setattr(Pipeline, "_roll_out", fail)


def numbers(folder):
    metrics = [{k: v for k, v in line.items() if not k.startswith("play/")} for line in run_metrics(folder)]
    return metrics, params_fingerprint(folder), rollout_records(folder)


def test_a_replay_has_the_numbers_of_the_run_though_it_is_broken_off(recorded, unsampled, tmp_path):
    """Metrics, weights, evaluations and the rollout log, bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rljax.experiment.train.train", _replaying(recorded))
        break_off(config(), tmp_path / "replay", before=2)
    train(config(), str(tmp_path / "replay"), replay=str(recorded))
    assert numbers(tmp_path / "replay") == numbers(recorded)


def _replaying(recorded):
    original = train

    def replaying(config, folder):
        return original(config, folder, replay=str(recorded))

    return replaying


@pytest.mark.slow
def test_a_learner_that_differs_is_said_and_trains_on_the_same_rollouts(recorded, unsampled, tmp_path, capsys):
    optimizer = dataclasses.replace(config().optimizer, learning_rate=1e-3)
    train(config(optimizer=optimizer), str(tmp_path / "replay"), replay=str(recorded))
    assert "config.optimizer.learning_rate: 0.01 -> 0.001" in capsys.readouterr().out
    sampled = ("rollout/reward_mean", "rollout/length_mean", "rollout/entropy")
    mine, theirs = run_metrics(tmp_path / "replay"), run_metrics(recorded)
    assert [[line[name] for name in sampled] for line in mine] == [[line[name] for name in sampled] for line in theirs]
    assert params_fingerprint(tmp_path / "replay") != params_fingerprint(recorded)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"seed": 1}, r"another config \(config.seed: 0 there, 1 here\); set it as there"),
        ({"steps": STEPS + 2}, r"it has 3 of 5 rollouts and lacks that of step 4 .*--config.steps=3"),
    ],
    ids=["another seed", "more steps"],
)
def test_what_was_recorded_otherwise_is_refused_before_a_folder_is_made(recorded, tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        train(config(**changes), str(tmp_path / "replay"), replay=str(recorded))
    assert not (tmp_path / "replay").exists()


def test_a_run_without_recordings_and_its_own_folder_are_refused(recorded, tmp_path):
    with pytest.raises(ValueError, match=r"no recorded rollouts in .*--config.log.recordings=True"):
        train(config(), str(tmp_path / "replay"), replay=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="is the folder of this run"):
        train(config(), str(recorded), replay=str(recorded))
    log = dataclasses.replace(config().log, recordings=True)
    with pytest.raises(ValueError, match="has no effect with --replay"):
        train(config(log=log), str(tmp_path / "replay"), replay=str(recorded))


def test_a_recording_gives_back_every_bit_of_a_rollout(tmp_path):
    want = made()
    Recorder(tmp_path, {"seed": 0}, TOKENIZER, lambda: None).write(want)
    content = (tmp_path / "rollout_000005.parquet").read_bytes()
    got = from_parquet(content, EXAMPLES, TOKENIZER, "it")
    assert got.is_recorded
    assert (got.step, got.version, got.lacking, got.behind) == (5, 4, "no signal", want.behind)
    assert_same_rollout(got.rollout, want.rollout)


def test_damage_other_data_and_another_tokenizer_are_refused():
    for broken in (WHOLE[: len(WHOLE) // 2], b"", WHOLE[:-20]):
        with pytest.raises(ValueError, match=r"it is damaged .* restore it"):
            from_parquet(broken, EXAMPLES, TOKENIZER, "it")
    with pytest.raises(ValueError, match="data row 2, which the data does not hold"):
        from_parquet(WHOLE, {0: EXAMPLES[0]}, TOKENIZER, "it")
    with pytest.raises(ValueError, match="the tokens of it mean something else"):
        from_parquet(WHOLE, EXAMPLES, CharTokenizer("hgfedcba="), "it")


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), length=st.integers(1, 4))
def test_a_changed_byte_of_a_recording_is_noticed_or_changes_nothing(place, flip, length):
    """A file has places that nothing reads: statistics, the name of who wrote it."""
    broken = bytearray(WHOLE)
    begin = int(place * len(broken))
    broken[begin : begin + length] = bytes(byte ^ flip for byte in broken[begin : begin + length])
    try:
        got = from_parquet(bytes(broken), EXAMPLES, TOKENIZER, "it")
    except ValueError as error:
        assert str(error).startswith("--replay: it ") and "\n" not in str(error)
        return
    assert_same_rollout(got.rollout, made().rollout)
    assert (got.step, got.version, got.lacking, got.behind) == (5, 4, "no signal", made().behind)


def test_recordings_open_in_pandas(recorded):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    rows = pandas.read_parquet(recorded / "recorded")
    logs = [record for file in rollout_records(recorded).values() for record in file]
    assert len(rows) == len(logs) == 3 * 16
    assert rows.completion.tolist() == [record["completion"] for record in logs]
    assert rows.reward.tolist() == [record["shaped_reward"] for record in logs]
    assert rows.behavior_logprobs[0].dtype == "float32"
    assert sorted(rows.step.unique()) == [1, 2, 3]
