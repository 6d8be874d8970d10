"""Runs whose tasks the policy makes or chooses: what is added is drawn, and a run that broke off goes on exactly."""

import dataclasses

import pytest
from breaking import break_off
from docs_metrics import unexplained
from test_run_environment import make_config

from rljax.experiment import (
    CheckpointConfig,
    CoEvolvedTasks,
    D2EvoTasks,
    ReflectedTasks,
    RewardConfig,
    SingleTurn,
    UpdateConfig,
    WarmupConfig,
)
from rljax.experiment.train import train
from rljax.tasks import Reflection, reflection
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


def reflecting():
    """Episodes of an environment, of which the policy reads those that failed."""
    base = make_config(alphabet="".join(map(chr, range(32, 127))) + "\n", warmup=WarmupConfig())
    return dataclasses.replace(
        base,
        steps=3,
        actor=dataclasses.replace(base.actor, context_length=1024),
        update=UpdateConfig(pack_length=1024, head_chunk=256),
        checkpoint=CheckpointConfig(every=1),
        curriculum=ReflectedTasks(modes=("too_low", "too_high"), rollouts=1, chars=60, shown=4),
    )


@pytest.mark.slow
def test_a_policy_reads_its_failed_episodes_and_a_run_goes_on_with_the_same_numbers(tmp_path, monkeypatch):
    """What it writes is read as if it held to the form, which an untrained model does not."""
    written = []

    def read_reflection(text, modes):
        written.append(text)
        return Reflection(modes[len(text) % 2], "detail", "step", f"lesson {len(text)}", "query")

    monkeypatch.setattr(reflection, "read_reflection", read_reflection)
    monkeypatch.setattr(reflection, "read_selected", lambda text, among, count: [len(text) % among])
    train(reflecting(), str(tmp_path / "whole"))
    lines = run_metrics(tmp_path / "whole")
    told = [line["rollout/curriculum/reflections"] for line in lines]
    assert told[0] == 0 < told[1] < told[2] == len(written)
    # One turn of six tokens at most, in which the environment has no part.
    assert all(len(text) <= 6 for text in written) and any(written)
    assert lines[-1]["rollout/curriculum/unread_reflections"] == 0
    assert lines[-1]["rollout/curriculum/retrieved"] > 0 and lines[-1]["rollout/curriculum/modes"] >= 1
    assert lines[1]["rollout/curriculum/asked_tokens"] > 0
    assert not unexplained(lines[-1])

    break_off(reflecting(), tmp_path / "parts", before=2)
    train(reflecting(), str(tmp_path / "parts"))
    assert run_metrics(tmp_path / "parts") == lines
    assert rollout_records(tmp_path / "parts") == rollout_records(tmp_path / "whole")


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
