"""Runs whose tasks are made by the policy: what is added is drawn, and a run that is broken off goes on exactly."""

import pytest
from breaking import break_off
from docs_metrics import unexplained

from rljax.experiment import CoEvolvedTasks, D2EvoTasks, RewardConfig, SingleTurn
from rljax.experiment.train import train
from rljax.tasks.echo import EchoData
from rljax.testing import params_fingerprint, rollout_records, run_metrics, tiny_config


def coevolving():
    curriculum = CoEvolvedTasks(maker="evolving_tasks:EchoMaker", every=1, proposals=4, attempts=4, contexts=4)
    actor = SingleTurn(rewards=(RewardConfig("evolving_tasks:has_answer"),), prompt_buckets=(4,))
    return tiny_config(data=EchoData(letters="abcd"), actor=actor, curriculum=curriculum)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evolving")
    train(coevolving(), str(folder))
    return folder


@pytest.mark.slow
def test_tasks_that_the_policy_made_are_trained_on(undisturbed):
    lines = run_metrics(undisturbed)
    assert lines[-1]["rollout/curriculum/accepted"] > 0
    assert lines[-1]["rollout/curriculum/tasks"] == 12 + lines[-1]["rollout/curriculum/accepted"]
    assert sum(line["rollout/curriculum/asked_tokens"] for line in lines) > 0
    assert not unexplained(lines[-1])
    prompts = {r["prompt"] for records in rollout_records(undisturbed).values() for r in records}
    assert any(set(prompt) - set("abcd=") for prompt in prompts)


@pytest.mark.parametrize("before", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_makes_tasks_goes_on_with_the_same_numbers(before, undisturbed, tmp_path):
    break_off(coevolving(), tmp_path, before=before)
    train(coevolving(), str(tmp_path))
    assert run_metrics(tmp_path) == run_metrics(undisturbed)
    assert rollout_records(tmp_path) == rollout_records(undisturbed)
    assert params_fingerprint(tmp_path) == params_fingerprint(undisturbed)


def questioning():
    curriculum = D2EvoTasks(
        maker="evolving_tasks:EchoMaker",
        questioner_steps=1,
        solver_steps=1,
        attempts=4,
        least_anchors=4,
        votes=4,
        question_band=(0.25, 0.8),
        proposals=4,
        second_votes=0,
    )
    actor = SingleTurn(rewards=(RewardConfig("evolving_tasks:HasAnswer"),), prompt_buckets=(4,))
    return tiny_config(data=EchoData(letters="abcd"), actor=actor, curriculum=curriculum)


@pytest.fixture(scope="module")
def questioned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questioned")
    train(questioning(), str(folder))
    return folder


@pytest.mark.slow
def test_a_policy_that_asks_is_trained_on_questions_and_on_answers(questioned):
    lines = run_metrics(questioned)
    records = rollout_records(questioned)
    # The share is of tasks, which the steps of a questioner have none of.
    assert [line["rollout/curriculum/medium_share"] == "nan" for line in lines] == [True, False] * 2
    # A questioner's prompts begin with "=", and what they earn is what the curriculum says.
    asks = [{record["prompt"].startswith("=") for record in records[step]} for step in sorted(records)]
    assert asks == [{True}, {False}] * 2
    assert lines[-1]["rollout/curriculum/accepted"] > 0
    assert not unexplained(lines[-1])


@pytest.mark.slow
@pytest.mark.parametrize("before", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_of_rounds_goes_on_with_the_same_numbers(before, questioned, tmp_path):
    break_off(questioning(), tmp_path, before=before)
    train(questioning(), str(tmp_path))
    assert run_metrics(tmp_path) == run_metrics(questioned)
    assert rollout_records(tmp_path) == rollout_records(questioned)
    assert params_fingerprint(tmp_path) == params_fingerprint(questioned)
