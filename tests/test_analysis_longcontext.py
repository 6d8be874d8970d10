"""`rljax study longcontext`: what answers come to in each window, the page, and a run of the whole."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from rljax.analysis.study_longcontext import draw, endpoint_judge, page_of, study_longcontext, summarise, table
from rljax.experiment import FileData
from rljax.tasks import ChatEndpoint, chartom, longcontext
from rljax.tasks.stories import FULL

CONFIG = Path(__file__).parent.parent / "configs" / "papers" / "longcontext.py"
ROWS = longcontext.rows(2, seed=0, length=1500, windows=(0, FULL), modes=chartom.MODES)


def smoke():
    spec = importlib.util.spec_from_file_location("paper_longcontext", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config("smoke")


def records(answer):
    """What somebody answers to every row."""
    return [row | {"text": answer(row), "scores": longcontext.score(row, answer(row))} for row in ROWS]


def report(answers):
    return {"checkpoint": None, "step": 0, "answers": answers, **summarise(answers)}


def test_who_reads_all_and_else_says_consistent_has_these_figures(tmp_path):
    def answer(row):
        if row["window"] == FULL:
            return row["completion"]
        return "consistent []" if row["suite"] == "prelude" else "I do not know"

    found = report(records(answer))
    none, whole = found["prelude"]
    assert (none["window"], none["items"], none["accuracy"]) == (0, 8, 0.5)
    assert none["macro_f1"] == pytest.approx(1 / 3) and none["kinds"] == dict(core=1, irrelevant=1, local=0) | {
        "global": 0
    }
    assert none["reasoned"] == 0.25 and none["visible"] == 0.25
    assert whole["macro_f1"] == whole["reasoned"] == whole["visible"] == 1.0
    assert whole["always_consistent"]["accuracy"] == 0.5

    none, whole = found["chartom"]
    assert none["right"] == none["readable"] == 0 and whole["right"] == whole["readable"] == 1.0
    assert whole["items"] == 10 and whole["sentences"]["covered"] == 1.0 and none["sentences"]["covered"] == 0
    assert whole["sentences"]["judged"] is None

    page = page_of(found, "longcontext.png")
    assert "| always consistent | 8 | 0.333 | 0.500 | 0.667 | 0.000 |" in page
    assert "| all | 10 | 1.000 [1.000, 1.000] | 0.000 | 1.000 | 1.000 |" in page
    assert "- window all: of 10 answers, points told 1.000" in page and "![accuracy by window](longcontext.png)" in page
    assert "macro F1" in table(found)
    assert draw(found, tmp_path / "longcontext.png").stat().st_size > 1000
    json.dumps(found, allow_nan=False)


def test_wrong_beliefs_are_counted_by_what_they_take_for_it():
    def answer(row):
        roles = row.get("roles", [])
        return chartom.LETTERS[roles.index("truth")] if "truth" in roles else "A"

    whole = report(records(answer))
    found = whole["chartom"][1]["errors"]
    assert f"Wrong beliefs with all in view: {found['truth']} are the truth" in page_of(whole, "x.png")
    beliefs = [r for r in ROWS if r["kind"].startswith("belief") and r["mode"] == "choice" and r["window"] == FULL]
    assert found["truth"] == sum("truth" in row["roles"] for row in beliefs) > 0


def test_a_judges_verdicts_stand_beside_points_told_by_their_words():
    answers = records(lambda row: row["completion"])
    for record in answers:
        if record.get("mode") == "generative":
            record["verdict"] = {"covered": [1], "defects": None}
    entry = report(answers)["chartom"][1]["sentences"]
    points = [len(row["points"]) for row in ROWS if row.get("mode") == "generative" and row["window"] == FULL]
    assert entry["judged"]["bpc"] == pytest.approx(len(points) / sum(points))
    assert entry["judged"]["penalty_rate"] is None and entry["judged"]["missing"] == 0.5
    assert "with a fault -, replies missing 0.500" in page_of(report(answers), "x.png")


def test_one_suite_alone_can_be_studied(tmp_path):
    answers = [record for record in records(lambda row: row["completion"]) if record["suite"] == "prelude"]
    found = report(answers)
    assert "chartom" not in found and "CharToM)" not in page_of(found, "x.png")
    assert draw(found, tmp_path / "x.png").exists()


def test_a_judge_is_a_chat_endpoint(monkeypatch):
    monkeypatch.setattr(ChatEndpoint, "ask", lambda endpoint, messages: f"{endpoint.model}: {messages[0]['content']}")
    assert endpoint_judge("http://localhost:8000/v1", "name")("which?") == "name: which?"


@pytest.mark.slow
def test_the_study_answers_in_every_window_and_leaves_a_page(tmp_path):
    judged = []

    def judge(prompt):
        judged.append(prompt)
        return "None"

    found = study_longcontext(smoke(), str(tmp_path), judge=judge)
    assert [entry["window"] for entry in found["prelude"]] == [0, FULL]
    assert len(found["answers"]) == 2 * (4 + 5 * 2) and len(judged) == 2 * 2 * 5
    assert found["chartom"][1]["sentences"]["judged"] == {"answers": 5, "bpc": 0, "penalty_rate": 0, "missing": 0}
    assert json.loads((tmp_path / "longcontext.json").read_text())["prelude"] == found["prelude"]
    assert (tmp_path / "longcontext.png").exists() and "macro F1" in (tmp_path / "longcontext.md").read_text()


def test_what_cannot_be_studied_is_refused_in_one_line(tmp_path):
    files = [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]
    for file in files:
        file.write_text(json.dumps({"prompt": f"{file.stem}?", "answer": "1", "completion": "1"}) + "\n")
    data = FileData(train=str(files[0]), test=str(files[1]))
    with pytest.raises(ValueError, match=r"the study needs the rows of rljax\.tasks\.longcontext:rows"):
        study_longcontext(dataclasses.replace(smoke(), data=data), str(tmp_path))
