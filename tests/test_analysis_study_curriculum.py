"""`rljax study curriculum`: what figures are made of, the page, what is refused, and the smoke run of both kinds."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rljax.algorithms import DecoupledPPO
from rljax.analysis import study_curriculum as S
from rljax.experiment import Guided, RolloutConfig
from rljax.tasks import MEASURES

CONFIGS = Path(__file__).parent.parent / "configs" / "papers"


@pytest.fixture
def smoke(monkeypatch):
    monkeypatch.syspath_prepend(CONFIGS)
    spec = importlib.util.spec_from_file_location("curriculum_study", CONFIGS / "curriculum_study.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "curriculum_study", module)
    spec.loader.exec_module(module)
    yield module.get_config("smoke")
    for name in ("evolving", "spelling"):
        sys.modules.pop(name, None)


def seeds(*averages):
    """Of each seed: the avg@k of the random order, of the random third, and of the orders behind them."""
    orders = [("", "random"), ("", "random_third"), ("margin", "forward"), ("margin", "low")]
    return [
        {
            "seed": seed,
            "start": {"greedy": 0.0, "average": 0.0},
            "arms": [
                {"measure": measure, "order": order, "tasks": 9, "greedy": 0.5, "average": average}
                for (measure, order), average in zip(orders, values, strict=True)
            ],
        }
        for seed, values in enumerate(averages)
    ]


def test_an_order_is_compared_with_as_many_tasks_whatever_their_difficulty():
    lines = S.summarise(seeds([0.5, 0.3, 0.6, 0.2], [0.4, 0.2, 0.6, 0.3]))
    assert "gains" not in lines[0] and "gains" not in lines[1]
    np.testing.assert_allclose(lines[2]["gains"], [0.1, 0.2])
    np.testing.assert_allclose(lines[3]["gains"], [-0.1, 0.1])
    assert lines[2]["average"] == pytest.approx(0.6)
    assert lines[2]["p"] == 0.5 and lines[3]["p"] == 1.0


def test_arms_that_ignore_difficulty_run_once():
    options = S.CurriculumOptions(measures=("accuracy", "margin"), orders=("high", "reverse", "forward"))
    assert S.arms_of(options) == [
        ("", "random"),
        ("", "random_third"),
        *((name, order) for name in ("accuracy", "margin") for order in ("forward", "reverse", "high")),
    ]
    assert S.arms_of(S.CurriculumOptions(orders=())) == []


def test_measures_that_order_alike_agree():
    values = {"a": [1.0, 2, 3, 4], "same": [10.0, 20, 30, 70], "opposite": [4.0, 3, 2, 1], "flat": [5.0] * 4}
    values = {name: [*map(float, given)] for name, given in values.items()}
    tied = {"b": [1.0, 1.0, 2.0, float("nan")], "c": [1.0, 2.0, 3.0, 9.0]}
    found = S.agreement([values])
    assert found["a"] == pytest.approx({"a": 1, "same": 1, "opposite": -1, "flat": 0})
    # Ranks 1.5, 1.5, 3 beside 1, 2, 3: sqrt(3) / 2.
    assert S.agreement([tied])["b"]["c"] == pytest.approx(3**0.5 / 2)


def test_the_page_has_a_line_for_each_arm_and_a_picture(tmp_path):
    report = {
        "options": dataclasses.asdict(S.CurriculumOptions()),
        "agreement": S.agreement([{"margin": [1.0, 2.0], "letters": [2.0, 1.0]}]),
        "lines": S.summarise(seeds([0.5, 0.3, 0.6, 0.2], [0.4, 0.2, 0.6, 0.3])),
        "seeds": seeds([0.5, 0.3, 0.6, 0.2], [0.4, 0.2, 0.6, 0.3]),
    }
    page = S.page_of(report, "curriculum.png")
    assert "| margin | margin | forward | 0.500 | 0.600 | +0.100 +0.200 | 0.50 |" in page
    assert "| margin | +1.00 | -1.00 |" in page and "![what orders bring over a random one](curriculum.png)" in page
    assert "random_third" in S.table(report)
    assert S.draw(report, tmp_path / "curriculum.png").stat().st_size > 1000
    assert S.draw({"lines": []}, tmp_path / "nothing.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": ()}, "--measures= names nothing"),
        ({"orders": ("upward",)}, "--orders=upward must be some of forward, reverse"),
        ({"orders": ("random",)}, "--orders=random must be some of"),
        ({"trained_by": "words"}, "--trained_by=words"),
        ({"samples": 1}, "--samples=1"),
        ({"seeds": 0}, "--seeds=0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    made = S.CurriculumOptions()
    for name, value in options.items():
        setattr(made, name, value)
    with pytest.raises(ValueError, match=message):
        made.check()


def test_what_cannot_be_ordered_is_refused_before_anything_is_trained(smoke, tmp_path):
    def refused(message, config, **options):
        with pytest.raises(ValueError, match=message):
            S.study_curriculum(config, str(tmp_path), S.CurriculumOptions(**options))

    refused("'answer' is none of accuracy.* no column of numbers .* letters", smoke, measures=("answer",))
    few = dataclasses.replace(smoke.stages, batch_size=9)
    refused("batch_size=9 is more than the 8 tasks", dataclasses.replace(smoke, stages=few), orders=("low",))
    few = dataclasses.replace(smoke, prompts_per_step=25)
    refused("prompts_per_step=25 is more than the 24", few, trained_by="rollouts")
    blind = dataclasses.replace(smoke, sampling=dataclasses.replace(smoke.sampling, top_logprobs=0))
    refused("top_logprobs=0 tells too little", blind)
    late = dataclasses.replace(smoke, rollout=RolloutConfig(staleness=1), algorithm=DecoupledPPO())
    refused("staleness=1 is not for this study", late)
    update = dataclasses.replace(smoke.update, use_sampler_logprobs=True)
    guided = dataclasses.replace(smoke, actor=Guided(actor=smoke.actor, column="answer"), update=update)
    refused("config.actor is Guided; tasks are measured by answers of one turn", guided)
    mute = dataclasses.replace(smoke, warmup=dataclasses.replace(smoke.warmup, completion_column="said"))
    refused("supervised examples need the column 'said'", mute)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("trained_by", ["demonstrations", pytest.param("rollouts", marks=pytest.mark.slow)])
def test_the_smoke_run_measures_orders_and_trains(smoke, tmp_path, trained_by, monkeypatch):
    measure = S._measure

    def with_one_unjudged(*args):
        first, *others = measure(*args)
        return [{**first, "accuracy": float("nan")}, *others]

    monkeypatch.setattr(S, "_measure", with_one_unjudged)
    options = S.CurriculumOptions(
        measures=("letters", "accuracy"), orders=("forward", "low"), trained_by=trained_by, samples=2, seeds=1
    )
    report = S.study_curriculum(smoke, str(tmp_path), options)
    # What nothing could tell of is in no arm, so that all have the same 23 of 24 tasks.
    assert [(line["measure"], line["order"], line["tasks"]) for line in report["lines"]] == [
        ("", "random", 23),
        ("", "random_third", 7),
        ("letters", "forward", 23),
        ("letters", "low", 7),
        ("accuracy", "forward", 23),
        ("accuracy", "low", 7),
    ]
    rows = [json.loads(line) for line in (tmp_path / "seed-0" / "tasks.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and set(rows[0]) == {"prompt", "answer", "completion", "letters", *MEASURES}
    assert rows[0]["accuracy"] is None and all(0 <= row["accuracy"] <= 1 for row in rows[1:])
    # A fresh model is sure of nothing: as likely as not, of nearly 55 letters.
    assert all(30 < row["sequence_perplexity"] < 80 for row in rows)
    assert json.loads((tmp_path / "curriculum.json").read_text())["lines"] == report["lines"]
    assert (tmp_path / "curriculum.md").exists() and (tmp_path / "curriculum.png").exists()
