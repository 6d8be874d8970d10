"""Reasoning-gym with a Python tool: what is shown, how programs help, how answers are scored."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym", reason="needs the extra tasks")

from rljax.envs import EnvironmentPool, Sandbox
from rljax.envs.formats import load
from rljax.envs.library import ReasoningEnvironment
from rljax.envs.library.reasoning import rows
from rljax.tasks import ReasoningGymVerifier

CONFIG = {"min_terms": 3, "max_terms": 3, "min_digits": 3, "max_digits": 3}


@pytest.fixture(scope="module", autouse=True)
def isolation():
    try:
        with Sandbox(workers=1):
            pass
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def sums():
    return rows("chain_sum", 12, seed=5, config=CONFIG)


def test_rows_are_distinct_and_survive_json(sums):
    again = json.loads(json.dumps(sums))
    assert len({row["prompt"] for row in again}) == len(sums) == 12
    assert all(row["prompt"] == row["question"] and row["dataset"] == "chain_sum" for row in again)
    for row in again:
        assert ReasoningGymVerifier("chain_sum", row["config"])(
            row["answer"], row["question"], row["answer"], row["metadata"]
        )


def test_a_program_finds_what_is_scored(sums):
    make = load("rljax.envs.library.reasoning:ReasoningEnvironment")
    args = json.loads(json.dumps({"workers": 2, "wall_s": 4.0}))
    with EnvironmentPool(lambda: make(**args), workers=4) as pool:
        episodes = [future.result() for future in [pool.start(row) for row in sums[:4]]]
        for episode in episodes:
            assert episode.opening.endswith(episode.row["question"])
            assert "<python>code</python>" in episode.opening and "<answer>answer</answer>" in episode.opening
            expression = episode.row["question"].rpartition(":")[2].replace("?", "").split("=")[0].strip(" .")
            pool.step(episode, f"I compute it.<python>print({expression})</python>").result()
            assert episode.steps[-1].observation.strip() == episode.row["answer"]
        fork = pool.fork(episodes[0], 1).result()
        for episode in episodes:
            found = episode.steps[-1].observation
            pool.step(episode, f"<answer>{found}</answer>").result()
        pool.step(fork, "<answer>1</answer>").result()
    assert [(e.end, e.reward, e.counts["tool_calls"]) for e in episodes] == [("done", 1.0, 2.0)] * 4
    assert (fork.end, fork.reward) == ("done", 0.0)


def test_the_sandbox_is_shared(sums):
    one, two, other = (
        ReasoningEnvironment(),
        ReasoningEnvironment(tool_format="hermes"),
        ReasoningEnvironment(wall_s=4.0),
    )
    assert one.tools is two.tools is not other.tools
    assert '"arguments"' in str(two.reset(sums[0])) and "<python>" not in str(two.reset(sums[0]))
    assert ReasoningEnvironment(system="").reset(sums[0]) == sums[0]["question"]


def test_only_a_full_score_counts_unless_asked_otherwise():
    (row,) = rows("spell_backward", 1, seed=1)
    nearly = f"<answer>{row['answer'][:-1]}?</answer>"
    partial = ReasoningEnvironment(full_score_only=False)
    partial.reset(row)
    assert 0.0 < partial.step(nearly).reward < 1.0
    strict = ReasoningEnvironment()
    strict.reset(row)
    assert strict.step(nearly).reward == 0.0


def test_what_a_verifier_cannot_read_scores_nothing_and_ends_nothing_else():
    (row,) = rows("prime_factorization", 1, seed=1)
    environment = ReasoningEnvironment()
    environment.reset(row)
    step = environment.step("<answer>no idea</answer>")
    assert (step.done, step.reward) == (True, 0.0)


def test_messages_without_a_call_answer_or_are_nudged(sums):
    row = sums[0]
    for ends in (True, False):
        environment = ReasoningEnvironment(plain_text_ends=ends)
        environment.reset(row)
        step = environment.step(f"<think>hm</think> {row['answer']}")
        assert (step.done, step.reward) == (ends, float(ends))
    environment.reset(row)
    step = environment.step("<python>1/0</python>")
    assert not step.done and "ZeroDivisionError" in step.observation
    assert environment.step("<python>print(1)").counts["malformed_calls"] == 1.0


def test_data_sets_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="no data set 'chain_sums'"):
        rows("chain_sums", 1)


def test_the_example_of_the_docs_runs():
    page = (Path(__file__).parent.parent / "docs" / "environments.md").read_text()
    blocks = re.findall(r"^```py\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "ReasoningEnvironment(" in block]
    exec(block, {})
