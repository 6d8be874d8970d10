"""`rljax study cogmath`: what answers come to, the page, and a run of the whole from a config's warm-up."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from rljax.analysis.study_cogmath import draw, page_of, study_cogmath, summarise, table
from rljax.experiment import FileData
from rljax.tasks.cogmath import DIMENSIONS

CONFIG = Path(__file__).parent.parent / "configs" / "papers" / "cogmath.py"


def smoke():
    spec = importlib.util.spec_from_file_location("paper_cogmath", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config("smoke")


def records(num_problems):
    """Answers of which the first problem passes everything, and the others only follow-up 1 and the problem itself."""
    return [
        {
            "problem": number,
            "dimension": dimension,
            "prompt": f"question {dimension}\nGive it.\n",
            "answer": "7",
            "text": "7" if number == 0 or dimension < 2 else "",
            "passed": float(number == 0 or dimension < 2),
            "readable": float(number == 0 or dimension < 2),
        }
        for number in range(num_problems)
        for dimension in (0, *DIMENSIONS)
    ]


def test_a_page_says_what_was_passed_beside_what_chance_makes_of_it(tmp_path):
    answers = records(4)
    report = {"checkpoint": None, "step": 0, "answers": answers, **summarise(answers)}
    assert report["summary"]["original"] == 1.0 and report["summary"]["mastered"] == 0.25
    assert report["summary"]["product"] == pytest.approx(0.25**8)
    assert report["baseline"] == pytest.approx(2 / 9)
    assert report["interval"][0] <= 0.25 <= report["interval"][1]
    assert report["readable"] == pytest.approx((10 + 3 * 2) / 40)

    page = page_of(report, "cogmath.png")
    assert "| 4 | a condition too many | 0.250 | 0.250 |" in page and "on 4 generated problems" in page
    assert "![shares of problems passed, by dimension](cogmath.png)" in page
    assert "a condition too many" in table(report)
    assert draw(report, tmp_path / "cogmath.png").stat().st_size > 1000


def test_where_nothing_is_solved_there_is_no_share_among_solved():
    answers = [{**record, "passed": 0.0} for record in records(2)]
    report = {"checkpoint": None, "step": 0, "answers": answers, **summarise(answers)}
    assert set(report["summary"]["relative"].values()) == {None}
    assert "| 1 | told in other words | 0.000 | - |" in page_of(report, "x.png")
    json.dumps(report, allow_nan=False)


@pytest.mark.slow
def test_the_study_answers_every_follow_up_and_leaves_a_page(tmp_path, capsys):
    report = study_cogmath(smoke(), str(tmp_path))
    said = capsys.readouterr().err
    assert "answers: 100%" in said and "10/10" in said
    assert json.loads((tmp_path / "cogmath.json").read_text())["readable"] == report["readable"]
    assert [(r["problem"], r["dimension"]) for r in report["answers"]] == [(0, i) for i in range(10)]
    assert (tmp_path / "cogmath.png").exists() and "## The first problem" in (tmp_path / "cogmath.md").read_text()


def test_what_cannot_be_studied_is_refused_in_one_line(tmp_path):
    config = smoke()
    unjudged = dataclasses.replace(config, actor=dataclasses.replace(config.actor, rewards=config.actor.rewards[:1]))
    with pytest.raises(ValueError, match=r"config\.actor\.rewards has passed; the study needs"):
        study_cogmath(unjudged, str(tmp_path))

    files = [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]
    for file in files:
        file.write_text(json.dumps({"prompt": f"{file.stem}?", "answer": "1", "completion": "1"}) + "\n")
    data = FileData(train=str(files[0]), test=str(files[1]))
    with pytest.raises(ValueError, match=r"the study needs the rows of rljax\.tasks\.cogmath:rows"):
        study_cogmath(dataclasses.replace(config, data=data), str(tmp_path))
