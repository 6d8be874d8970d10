"""Settings of data, rewards and curricula: what is wrong by itself is refused in one line that names the field."""

import dataclasses
import json

import pytest

from rljax.tasks import (
    Curriculum,
    CurriculumSource,
    Dataset,
    DataSource,
    Example,
    FailedTasks,
    FileData,
    ReasoningGymData,
    RewardConfig,
    RowsData,
    UniformTasks,
    without_long_rows,
)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (ReasoningGymData(size=0), r"config\.data\.size=0"),
        (ReasoningGymData(size=9, test_size=9), r"config\.data\.test_size=9"),
        (FileData(), r"data file '' must end in .*set config\.data\.train"),
        (FileData(train="a.jsonl", test="b.csv"), r"data file 'b\.csv' must end in .*set config\.data\.test"),
        (FileData(train="a.jsonl", test_fraction=1.0), r"config\.data\.test_fraction=1\.0"),
        (RowsData(rows="my_rows"), r"config\.data\.rows='my_rows' must have the form 'module:function'"),
        (RowsData(rows="a:b", test_fraction=-0.1), r"config\.data\.test_fraction=-0\.1"),
        (RewardConfig(timeout_s=0.0), r"timeout_s=0\.0 of rljax\.tasks\.verifiers:NumberMatch"),
        (FailedTasks(eta=1.0), r"config\.curriculum\.eta=1\.0"),
        (FailedTasks(history=-1), r"config\.curriculum\.history=-1"),
    ],
)
def test_a_value_that_is_wrong_by_itself_is_refused(part, message):
    with pytest.raises(ValueError, match=message) as error:
        part.check()
    assert "\n" not in str(error.value)


def test_files_are_loaded_and_their_held_out_rows_kept_out_of_training(tmp_path):
    rows = [json.dumps({"prompt": f"p{i}", "answer": i}) for i in range(6)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "test.jsonl").write_text("\n".join(rows[:2]))
    source = FileData(train=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"))
    data = source.load()
    assert isinstance(source, DataSource) and isinstance(data, Dataset) and data.verifier is None
    assert [e.prompt for e in data.test] == ["p0", "p1"]
    assert [e.prompt for e in data.train] == ["p2", "p3", "p4", "p5"]


@pytest.mark.parametrize("source", [UniformTasks(), FailedTasks()])
def test_curricula_are_made_of_their_settings(source):
    curriculum = source.make([Example(f"p{i}") for i in range(4)], 7)
    assert isinstance(source, CurriculumSource) and isinstance(curriculum, Curriculum)
    assert curriculum.state_dict()["seed"] == 7


def pairs(first):
    return [{"prompt": f"p{i}", "chosen": c} for i, c in ((first, "a"), (first, "b"), (first, "a"), (first + 1, "c"))]


def test_other_rows_of_a_prompt_are_counted_or_kept(tmp_path):
    """For rows of a function as for files; equal rows stand once."""
    for name, first in (("train", 0), ("test", 5)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(first)))
    files = FileData(train=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"))
    rows = RowsData(rows=f"{__name__}:pairs", args={"first": 0}, test_args={"first": 5})

    for data in (files, rows):
        one = data.load()
        every = dataclasses.replace(data, repeated_prompts=True).load()
        assert [[e.columns["chosen"] for e in side] for side in (one.train, one.test)] == [["a", "c"]] * 2
        assert [[e.columns["chosen"] for e in side] for side in (every.train, every.test)] == [["a", "b", "c"]] * 2
        assert "2 training examples, 2 held out; dropped: 2 rows that differ from the first" in one.describe()
        assert every.describe() == "3 training examples, 3 held out"

        # what is then too long is told beside it
        shorter = without_long_rows(one, lambda e: int(e.prompt == "p1"), 0, drop=True, remedy=str)
        assert len(shorter.dropped) == 2 and shorter.describe().startswith(
            "1 training examples, 2 held out; dropped: 2"
        )


def some_rows(last):
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    return [{"prompt": f"p{i}", "answer": i} for i in range(5)] + [{"prompt": asked}, {"prompt": last}]


def test_rows_of_a_function_are_asked_without_their_answer_and_named_where_they_are_wrong():
    make = lambda last: RowsData(rows=f"{__name__}:some_rows", args={"last": last}, test_fraction=0.0)  # noqa: E731
    asked = make("p9").load().train[5]
    assert (asked.prompt, asked.columns) == ([{"role": "user", "content": "q"}], {"completion": "a"})
    assert asked.place == f"row 5 of {__name__}:some_rows"
    for last, says in ((["p"], "neither text nor chat"), ([{"role": "assistant", "content": "a"}], "nothing is left")):
        with pytest.raises(ValueError, match=f"^row 6 of {__name__}:some_rows: .*{says}"):
            make(last).load()
