"""`rljax study geosketch`: what episodes come to, the page, and a run of the whole from a config's warm-up."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from rljax.analysis.study_geosketch import MEASURED, draw, page_of, study_geosketch, summarise, table
from rljax.envs.library.geosketch import ARMS
from rljax.experiment import FileData
from rljax.experiment.train import train
from rljax.testing import run_metrics

CONFIG = Path(__file__).parent.parent / "configs" / "papers" / "geosketch.py"


def smoke():
    spec = importlib.util.spec_from_file_location("paper_geosketch", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config("smoke")


def records(num_problems):
    """Episodes that are right in the full loop, in half of the problems without effect, and never without action."""
    right = {"none": lambda number: 0.0, "mute": lambda number: float(number % 2), "full": lambda number: 1.0}
    return [
        {
            **dict.fromkeys(MEASURED, 0.0),
            "problem": number,
            "arm": arm,
            "family": "altitude" if number < 2 else "median",
            "prompt": "Known: AB=4.\n",
            "text": "answer(4);",
            "answer": "4",
            "is_right": right[arm](number),
            "reward": 1.1 * right[arm](number),
        }
        for number in range(num_problems)
        for arm in ARMS
    ]


def test_a_page_sets_the_arms_beside_each_other_paired_by_problem(tmp_path):
    episodes = records(8)
    report = {"checkpoint": None, "step": 0, "answers": episodes, **summarise(episodes)}
    assert {arm: found["is_right"] for arm, found in report["arms"].items()} == {"none": 0, "mute": 0.5, "full": 1}
    assert report["arms"]["mute"]["reward"] == pytest.approx(0.55)
    assert report["gains"]["none"] == {"mean": 1.0, "interval": [1.0, 1.0]}
    low, high = report["gains"]["mute"]["interval"]
    assert report["gains"]["mute"]["mean"] == 0.5 and 0 <= low < 0.5 < high <= 1
    assert report["families"]["altitude"] == {"none": 0.0, "mute": 0.5, "full": 1.0}

    page = page_of(report, "geosketch.png")
    assert "on 8 generated problems" in page and "| altitude | 0.000 | 0.500 | 1.000 |" in page
    assert "- beyond no action: only an answer: +1.000 [+1.000, +1.000]" in page
    assert page.count("> answer(4);") == 3 and "the full loop" in table(report)
    assert draw(report, tmp_path / "geosketch.png").stat().st_size > 1000
    json.dumps(report, allow_nan=False)


def test_what_cannot_be_studied_is_refused_in_one_line(tmp_path):
    config = smoke()
    other = dataclasses.replace(config.actor, make="rljax.envs.library:MapEnvironment", args={})
    with pytest.raises(ValueError, match=r"plays rljax\.envs\.library:MapEnvironment; the study needs MultiTurn with"):
        study_geosketch(dataclasses.replace(config, actor=other), str(tmp_path))

    files = [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]
    for file in files:
        file.write_text(json.dumps({"prompt": f"{file.stem}?", "answer": "1"}) + "\n")
    data = FileData(train=str(files[0]), test=str(files[1]))
    with pytest.raises(ValueError, match=r"the study needs the rows of rljax\.envs\.library\.sketches:rows"):
        study_geosketch(dataclasses.replace(config, data=data), str(tmp_path))


@pytest.mark.slow
def test_the_study_plays_every_problem_under_every_arm_and_leaves_a_page(tmp_path):
    report = study_geosketch(smoke(), str(tmp_path))
    assert json.loads((tmp_path / "geosketch.json").read_text())["arms"] == report["arms"]
    assert [(r["problem"], r["arm"]) for r in report["answers"]] == [(p, arm) for p in range(2) for arm in ARMS]
    assert (tmp_path / "geosketch.png").exists() and "## The first problem" in (tmp_path / "geosketch.md").read_text()


@pytest.mark.slow
def test_the_config_trains(tmp_path):
    train(smoke(), str(tmp_path))
    lines = list(run_metrics(tmp_path))
    assert len(lines) == 2 and np.isfinite([line["loss/total"] for line in lines]).all()
    assert {f"rollout/component/{name}" for name in ("is_right", "proven", "unused")} <= set(lines[-1])
