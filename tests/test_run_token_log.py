"""`config.log.per_token`: what the rollout log holds of each token, against the run's own metrics."""

import numpy as np
import pytest

from rljax.algorithms import RandomForks
from rljax.experiment import LogConfig
from rljax.experiment.token_log import token_texts
from rljax.experiment.train import train
from rljax.testing import rollout_records, run_metrics, tiny_config
from rljax.text import ByteTokenizer, CharTokenizer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder without the columns, folder with them)."""
    folders = []
    for per_token in (False, True):
        folder = tmp_path_factory.mktemp("run")
        algorithm = RandomForks(chains=2, points=1, kl_coef=0.0)
        train(tiny_config(steps=2, algorithm=algorithm, log=LogConfig(per_token=per_token)), str(folder))
        folders.append(folder)
    return folders


def test_the_run_is_the_same_with_and_without(runs):
    without, with_columns = runs
    assert run_metrics(without) == run_metrics(with_columns)
    stripped = {
        name: [{k: v for k, v in record.items() if k != "per_token"} for record in records]
        for name, records in rollout_records(with_columns).items()
    }
    assert rollout_records(without) == stripped


def test_columns_are_those_of_the_tokens(runs):
    line = run_metrics(runs[1])[0]
    records = rollout_records(runs[1])["step_000001.jsonl"]
    assert any("parent" in record for record in records)

    gaps, entropies = [], []
    for record in records:
        columns = record["per_token"]
        assert {len(values) for values in columns.values()} == {len(record["tokens"])}
        assert "".join(columns["text"]) == record["completion"]

        advantages = np.array(columns["advantage"])
        assert advantages[np.abs(advantages).argmax()] == pytest.approx(record["advantage"], abs=1e-5)
        trained = np.array(columns["trained"], bool)
        gaps.extend(np.abs(columns["log_ratio"])[trained])
        # Tokens that a fork inherits are its parent's: a run counts them once.
        own = range(record.get("fork_index", 0), len(record["tokens"]))
        entropies.extend(columns["entropy"][i] for i in own if columns["sampled"][i])

    # Scored apart from the update, in a program of its own: equal to rounding, far below what stale weights give.
    assert len(gaps) > 20 and 0 < max(gaps) < 2e-5 and line["rollout/logprob_gap_max"] < 2e-5
    assert np.mean(entropies) == pytest.approx(line["rollout/entropy"], abs=1e-4)


def test_texts_of_tokens_are_the_text():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("aé€😀b")
    texts = token_texts(tokenizer, ids)
    assert texts == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]
    cut = token_texts(tokenizer, ids[:4], ids[:1])
    assert cut[:3] == ["a", "", "é"] and cut[3] != ""
    letters = CharTokenizer("abc ")
    assert token_texts(letters, [*letters.encode("ab"), letters.eos_id]) == ["a", "b", ""]
