"""The study of task vectors: the choice among centroids against all of them, its rows, and the study end to end in its
smallest size."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rljax.analysis import study_stv as S
from rljax.models import DecoderConfig, init_params

CONFIGS = Path(__file__).parent.parent / "configs" / "papers"
CONFIG = DecoderConfig(
    vocab_size=12, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24, tied_embeddings=True
)
QUERIES = S.Queries(np.array([[3, 1], [4, 1], [5, 0]]), np.array([1, 1, 0]), np.array([7, 7, 7]))


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 10 if x.ndim > 2 else x, init_params(CONFIG, jax.random.key(0)))


@pytest.fixture
def config(monkeypatch):
    monkeypatch.syspath_prepend(CONFIGS)
    spec = importlib.util.spec_from_file_location("stv_config", CONFIGS / "stv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.get_config("smoke")
    sys.modules.pop("tables", None)


def test_the_choice_is_the_best_of_all(params):
    """Of two heads with three outputs each, the nine choices one by one."""
    rng = np.random.default_rng(0)
    heads = np.array([[0, 1], [1, 2]])
    bank = S.Bank(heads, rng.normal(size=(2, 3, 8)).astype(np.float32) * 3)

    def worth(choice):
        return S.answered(CONFIG, params, QUERIES, bank, np.array(choice))[1]

    choices = [(i, j) for i in range(3) for j in range(3)]
    ranked = sorted(choices, key=worth)
    assert worth(ranked[-1]) > worth(ranked[-2]) + 0.01
    chosen = S.choose(CONFIG, params, QUERIES, bank, S.VectorOptions(steps=150), rng)
    assert tuple(chosen) == ranked[-1]


def test_a_bank_of_few_outputs_repeats_them():
    outputs = np.zeros((4, 1, 2, 3))
    outputs[:, 0, 1] = [[0, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 1]]
    bank = S.bank_of(outputs, np.array([[0, 1]]), 5, np.random.default_rng(0))
    assert bank.outputs[0, :, 0].tolist() == [0, 1, 0, 1, 0]


def test_an_answer_is_the_likeliest_token_behind_the_last_one(params):
    right, said = S.answered(CONFIG, params, QUERIES)
    logprobs = np.asarray(S._read(CONFIG, params, QUERIES)[0], np.float64)
    assert right == np.mean(logprobs.argmax(axis=1) == 7)
    assert said == pytest.approx(logprobs[:, 7].mean(), abs=1e-6)
    # Padding behind a query changes nothing.
    wide = S.Queries(np.pad(QUERIES.tokens, ((0, 0), (0, 3)), constant_values=9), QUERIES.places, QUERIES.answers)
    assert S.answered(CONFIG, params, wide)[1] == pytest.approx(said, abs=1e-5)


def test_rows_ask_with_and_without_demonstrations(config):
    tables = sys.modules["tables"]
    rows = tables.rows(600, part="test")
    for row in rows:
        *shown, query = row["prompt"].split(";")
        assert query == row["alone"] and query[0] in tables.ASKED["test"]
        assert len(shown) == 4 and all(part == f"{part[0]}>{tables.meaning(row['task'], part[0])}" for part in shown)
        assert query[0] not in {part[0] for part in shown}
        assert row["answer"] == tables.meaning(row["task"], query[0])
    assert not set(tables.ASKED["train"]) & set(tables.ASKED["test"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "--heads=0 must be at least 1"),
        ({"draws": 1}, "--draws=1 must be at least 2"),
        ({"heads": 3}, "--heads=3 is more than the 2 heads of the model"),
    ],
)
def test_options_that_cannot_be_are_refused_before_any_training(config, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        S.study_stv(config, str(tmp_path), S.VectorOptions(**options))


def test_rows_without_the_columns_are_refused(config, tmp_path, monkeypatch):
    tables = sys.modules["tables"]
    rows = tables.rows
    monkeypatch.setattr(
        tables, "rows", lambda **args: [{k: v for k, v in row.items() if k != "alone"} for row in rows(**args)]
    )
    message = "some training rows have no column 'alone'; the study needs alone, answer, task beside the prompt"
    with pytest.raises(ValueError, match=message):
        S.study_stv(config, str(tmp_path), S.VectorOptions(heads=1))


def test_a_task_of_one_training_row_is_refused(config, tmp_path):
    # Seven rows of six tables, of which one has two.
    config.data.args = {"size": 7}
    with pytest.raises(ValueError, match="the task 1 has one training row; to find its heads takes at least 2"):
        S.study_stv(config, str(tmp_path), S.VectorOptions(heads=1))


def figures(**accuracies):
    cases = {case: {"accuracy": accuracies.get(case, 0.1), "logprob": -1.0} for case in S.CASES}
    return {"seed": 0, "tasks": [{"task": "0", "cases": cases, "overlap_of_halves": 1.0}]}


def test_the_verdict_asks_every_seed_and_every_control():
    good = figures(**{S.NONE: 0.2, S.SHOWN: 1.0, S.VECTOR: 0.8, S.MEAN: 0.7})
    said = S.verdict([good, good])
    assert "0.200, with them 1.000, with the vector 0.800 (75% of the way); in every seed" in said
    bad = figures(**{S.NONE: 0.2, S.SHOWN: 1.0, S.VECTOR: 0.8, S.ANY_HEADS: 0.8})
    assert "a control does as well or better in some seed" in S.verdict([good, bad])


@pytest.mark.slow
def test_the_study_end_to_end(config, tmp_path, capsys):
    options = S.VectorOptions(heads=1, centroids=2, probes=8, contexts=16, steps=3, draws=2, seeds=1)
    report = S.study_stv(config, str(tmp_path), options)
    assert json.loads((tmp_path / "stv.json").read_text())["verdict"] == report["verdict"]
    assert len(report["seeds"][0]["tasks"]) == sys.modules["tables"].TABLES
    for task in report["seeds"][0]["tasks"]:
        assert set(task["cases"]) == set(S.CASES) and task["rows"] == 8 and len(task["heads"]) == 1
    assert "random heads" in capsys.readouterr().out
