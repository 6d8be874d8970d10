"""`config.log.per_token`: what the rollout log holds of each token, against the run's own metrics."""

import dataclasses

import numpy as np
import pytest

from rljax.algorithms import RandomForks
from rljax.batching import stack
from rljax.experiment import LogConfig
from rljax.experiment.token_log import log_tokens, token_texts
from rljax.experiment.train import train
from rljax.testing import rollout_records, run_metrics, tiny_config
from rljax.text import ByteTokenizer, CharTokenizer
from rljax.types import INTERVENTION_INJECT, INTERVENTION_SUPPRESS, Trajectory


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


@pytest.mark.slow
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


def test_what_was_not_sampled_or_is_not_trained_on_is_marked():
    """A row over turns behind a prompt of one token, whose observation is forced; the second row is not valid."""
    tokenizer = CharTokenizer("abcd")
    ids = tokenizer.encode("aabcd")
    rows = [
        Trajectory(
            tokens=np.array(ids, np.int32),
            action_mask=np.array([0, 1, 0, 0, 1], bool),
            behavior_logprobs=np.array([0, -1, 0, 0, -2], np.float32),
            entropies=np.array([0, 0.5, 0, 0, 0.25], np.float32),
            turn_ids=np.array([0, 0, 0, 0, 1], np.int32),
            policy_version=np.zeros(5, np.int32),
            prompt_id=7,
            group_id=0,
            episode_id=row,
            is_valid=row == 0,
            intervention=(INTERVENTION_INJECT, INTERVENTION_SUPPRESS)[row],
        )
        for row in range(2)
    ]
    batch = stack(rows)
    filled = np.zeros(np.shape(batch.tokens), np.float32)
    values, advantages, scored = (filled + x for x in (0.75, 3.0, -1.5))
    records = [{"tokens": ids[1:], "forced": [[1, 3]]}, {"tokens": ids[1:]}]
    log_tokens(records, rows, dataclasses.replace(batch, values=values), advantages, scored, tokenizer)

    assert records[0]["per_token"] == {
        "text": ["a", "b", "c", "d"],
        "turn": [0, 0, 0, 1],
        "sampled": [1, 0, 0, 1],
        "trained": [1, 0, 0, 1],
        "entropy": [0.5, 0.0, 0.0, 0.25],
        "advantage": [3.0] * 4,
        "log_ratio": [-0.5, 0.0, 0.0, 0.5],
        "value": [0.75] * 4,
    }
    assert records[1]["per_token"]["trained"] == [0] * 4 == records[1]["per_token"]["log_ratio"]
    assert [record["intervention"] for record in records] == ["injected", "suppressed"]
