"""Rounds of stages and updates: expert iteration that goes on from any place with the same numbers, and what is learned
of a turn in pieces."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from rljax.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    HubData,
    OptimizerConfig,
    SamplingConfig,
    StagesConfig,
    WarmupConfig,
    commits,
)
from rljax.experiment.build import build
from rljax.experiment.rounds import run_rounds
from rljax.experiment.sft import demonstration_row
from rljax.experiment.stage_parts import StageParts
from rljax.tasks import Example, best_attempts, judged, stage, with_attempts
from rljax.testing import run_metrics, tiny_config
from rljax.text import CharTokenizer, Dialogue


def echoes(examples):
    """Every second one is right."""
    said = [e.columns["answer"] if i % 2 else "h" for i, e in enumerate(examples)]
    return [Example(e.prompt, {"completion": 4 * letter}) for e, letter in zip(examples, said, strict=True)]


def sampled_and_kept(parts):
    return [
        stage("sampled", with_attempts, complete=parts.policy, count=4),
        stage("judged", judged, score=parts.rewards),
        stage("kept", best_attempts),
    ]


def config_of(**changes):
    own = {"make": sampled_and_kept, "rounds": 2, "steps": 3, "batch_size": 4} | changes
    return tiny_config(
        # Four letters and the end.
        sampling=SamplingConfig(max_new_tokens=5),
        warmup=WarmupConfig(
            steps=40, batch_size=8, demonstrations=echoes, optimizer=OptimizerConfig(learning_rate=1e-2)
        ),
        stages=StagesConfig(optimizer=OptimizerConfig(learning_rate=3e-3), **own),
        checkpoint=CheckpointConfig(every=10),
    )


def rows_of(folder):
    files = sorted(folder.glob("round-*/rows/*.json*"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def losses(folder):
    return {
        str(run.relative_to(folder)): [line["loss/nll"] for line in run_metrics(run)]
        for run in (folder / "start", *sorted(folder.glob("round-*/trained")))
    }


def whatever_was_said(rows):
    return [{**row, "completion": row["attempts"][0]["text"]} for row in rows]


def sampled(parts):
    return [stage("sampled", with_attempts, complete=parts.policy, count=1), stage("said", whatever_was_said)]


def test_a_round_leaves_rows_and_weights_and_is_not_made_twice(tmp_path, capsys):
    config = config_of(make=sampled, rounds=1, steps=1)
    config = dataclasses.replace(config, warmup=WarmupConfig(), evaluation=EvaluationConfig(problems=-1))
    scores = run_rounds(config, str(tmp_path))
    assert scores == [{"round": 0}, {"round": 1}]
    assert len((tmp_path / "round-01" / "rows" / "01-said.jsonl").read_text().splitlines()) == 51
    assert len(list(run_metrics(tmp_path / "round-01" / "trained"))) == 1
    assert json.loads((tmp_path / "summary.json").read_text()) == scores

    capsys.readouterr()
    assert run_rounds(config, str(tmp_path)) == scores
    assert "round 1\n" not in capsys.readouterr().out
    longer = dataclasses.replace(config, stages=dataclasses.replace(config.stages, steps=4))
    with pytest.raises(ValueError, match=r"config\.stages\.steps was 1 and is 4, since round 0; name"):
        run_rounds(longer, str(tmp_path))


def test_all_rounds_read_the_commit_that_they_began_with(tmp_path, monkeypatch):
    """Though the branch of the hub has moved between two starts."""
    config = config_of(make=sampled, rounds=1, steps=1)
    config = dataclasses.replace(config, warmup=WarmupConfig(), evaluation=EvaluationConfig(problems=-1))
    own = config.data
    newest = ["1" * 40]

    class Branch(HubData):
        def load(self):
            assert self.revision == "1" * 40, "another commit was read"
            return own.load()

    monkeypatch.setattr(commits, "commit_of", lambda path, revision: newest[0])
    config = dataclasses.replace(config, data=Branch("user/echo"))
    scores = run_rounds(config, str(tmp_path))
    held = json.loads((tmp_path / "data.json").read_text())
    assert held == {"path": "user/echo", "revision": config.data.revision, "commit": "1" * 40}

    newest[0] = "2" * 40
    two = dataclasses.replace(config, stages=dataclasses.replace(config.stages, rounds=2))
    assert run_rounds(two, str(tmp_path))[:2] == scores
    trained = json.loads((tmp_path / "round-02" / "trained" / "config.json").read_text())
    assert trained["data"]["revision"] == "1" * 40
    with pytest.raises(AssertionError, match="another commit was read"):
        run_rounds(two, str(tmp_path), fresh=True)


def test_a_second_start_takes_nothing_from_rounds_that_are_under_way(tmp_path):
    (tmp_path / "round-01").mkdir()
    program = (
        "import pathlib, sys; from rljax.training.lock import lock; "
        f"lock(pathlib.Path({str(tmp_path)!r})); print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(ValueError, match=rf"is in use by another run \(process {other.pid} on"):
        run_rounds(config_of(), str(tmp_path), fresh=True)
    assert (tmp_path / "round-01").is_dir()
    other.kill()
    other.communicate()


@pytest.mark.slow
def test_rounds_that_are_stopped_anywhere_make_the_same_rows_and_the_same_weights(tmp_path):
    straight = run_rounds(config_of(), str(tmp_path / "straight"))
    assert [score["round"] for score in straight] == [0, 1, 2]
    assert set(straight[2]) == {"round", "greedy", "avg@2", "pass@2"}
    kept = (tmp_path / "straight" / "round-01" / "rows" / "02-kept.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in kept]
    assert len(rows) >= 4
    assert all(row["completion"] == 4 * row["answer"] and row["prompt"][0] == row["answer"] for row in rows)
    attempts = (tmp_path / "straight" / "round-01" / "rows" / "00-sampled.jsonl").read_text().splitlines()
    assert len(attempts) > len(kept)

    # Round 1 breaks off in its second stage, and round 2 is asked for later.
    def breaks(rows):
        raise OSError("gone")

    def broken(parts):
        return [sampled_and_kept(parts)[0], stage("judged", breaks)]

    with pytest.raises(OSError, match="gone"):
        run_rounds(config_of(make=broken, rounds=1), str(tmp_path / "parts"))
    # Sampled again, it would be another file.
    (tmp_path / "parts" / "round-00.json").unlink()
    run_rounds(config_of(rounds=1), str(tmp_path / "parts"))
    assert run_rounds(config_of(), str(tmp_path / "parts")) == straight
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "straight")
    assert losses(tmp_path / "parts") == losses(tmp_path / "straight")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stages": StagesConfig()}, "config.stages.make=None names no stages"),
        ({"stages": StagesConfig(make=lambda parts: [])}, r"config\.stages\.make returns \[\]; it must be a list"),
        ({"checkpoint": CheckpointConfig(every=0)}, "config.checkpoint.every=0 saves no weights"),
        ({"checkpoint": CheckpointConfig(every=1, keep_best=1)}, "config.checkpoint.keep_best=1 has no effect"),
        (
            {"sampling": SamplingConfig(max_new_tokens=5, stop_column="answer")},
            "config.sampling.stop_column='answer' is of rows",
        ),
    ],
)
def test_what_cannot_work_is_named_before_anything_is_trained(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        run_rounds(dataclasses.replace(config_of(), **changes), str(tmp_path / "run"))
    assert {file.name for file in (tmp_path / "run").glob("*")} <= {"lock"}


def test_rounds_are_kept_in_a_folder_and_not_at_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--workdir=gs://bucket/rounds is an address"):
        run_rounds(config_of(), "gs://bucket/rounds")
    assert not list(tmp_path.glob("*"))


def test_an_answer_depends_on_its_prompt_and_round_and_on_no_other_prompt(tmp_path):
    run = build(config_of())
    with run.actor:
        run.actor.set_params(run.initial_params(), 0)
        one = StageParts(run, "w", 1, tmp_path / "one").policy
        prompts = [example.prompt for example in run.dataset.train[:6]]
        found = one(prompts, 3)
        alone = StageParts(run, "w", 1, tmp_path / "alone").policy(prompts[4:5], 3)
        assert [answer.text for answer in alone[0]] == [answer.text for answer in found[4]]
        later = StageParts(run, "w", 2, tmp_path / "later").policy(prompts, 3)
        assert later != found
    lines = (tmp_path / "one" / "asked.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == prompts


def test_of_a_turn_in_pieces_some_are_read_and_all_are_one_text():
    dialogue = Dialogue(CharTokenizer("abcdef="))
    pieces = [{"text": "ab", "learned": False}, {"text": "c"}, {"text": "de", "learned": True}]
    row = demonstration_row(dialogue, "f=", pieces, 0, 0)
    whole = demonstration_row(dialogue, "f=", "abcde", 0, 0)
    np.testing.assert_array_equal(row.tokens, whole.tokens)
    # The prompt, "ab", then "cde" and the end.
    assert row.action_mask.tolist() == [False] * 4 + [True] * 4
    assert whole.action_mask.tolist() == [False] * 2 + [True] * 6
    # The last piece has the end of the turn.
    read = demonstration_row(dialogue, "f=", [{"text": "ab"}, {"text": "c", "learned": False}], 0, 0)
    assert read.action_mask.tolist() == [False] * 2 + [True] * 2 + [False] * 2


@pytest.mark.parametrize("pieces", [[{"text": "a"}, "b"], [{"texts": "a"}], [{"text": "a", "learned": 0.5}], []])
def test_what_is_no_turn_in_pieces_is_refused(pieces):
    with pytest.raises(ValueError, match=r"or a list of texts by turns, or one of pieces|true or false"):
        demonstration_row(Dialogue(CharTokenizer("ab=")), "a=", pieces, 0, 0)
