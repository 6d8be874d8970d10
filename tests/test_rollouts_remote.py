"""Engines in other processes: our decoder behind vLLM's protocol, and the actor that samples with them."""

import contextlib
import dataclasses
import http.client
import json

import numpy as np
import pytest

from rljax.experiment import Remote
from rljax.experiment.build import build
from rljax.experiment.serve import ServeConfig, engine_of
from rljax.experiment.train import train
from rljax.models import save_hf
from rljax.rollouts import number_groups
from rljax.testing import tiny_config

# Two programs add up in other orders, so log-probs differ by float32 rounding. Of these models' log-probs, which are
# below 4, a unit in the last place is 2.4e-7; the largest difference seen is one of them.
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(config, its run, a folder with its first weights)."""
    config = tiny_config(steps=2)
    run = build(config)
    folder = tmp_path_factory.mktemp("model")
    save_hf(folder, run.decoder, run.initial_params(), tokenizer=run.tokenizer)
    return config, run, folder


@contextlib.contextmanager
def served(folder, **changes):
    config = ServeConfig(model=str(folder), port=0, rows=8, context_length=16, max_new_tokens=8)
    with engine_of(dataclasses.replace(config, **changes)) as service:
        yield service


@pytest.fixture(scope="module")
def service(model):
    with served(model[2]) as service:
        yield service


def remote(config, *urls, **changes):
    return Remote(engines=urls, rewards=config.actor.rewards, longest_prompt=4, wait_s=20.0, **changes)


def ask(service, path, body=None, method="POST"):
    """(status, JSON) of one request."""
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def samples_of(actor, run, params, version=0, step=0):
    """All samples of a step's groups."""
    actor.set_params(params, version)
    examples = run.dataset.train[:4]
    actor.submit(number_groups(examples, 4), run.algorithm.plan, step)
    return [sample for group in actor.ready(4) for sample in group.samples]


def assert_same_samples(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert (one.finish_reason, one.parent, one.fork_index, one.forced) == (
            other.finish_reason,
            other.parent,
            other.fork_index,
            other.forced,
        )
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=ROUNDING, rtol=0)
        np.testing.assert_allclose(one.entropies, other.entropies, atol=ROUNDING, rtol=0)


def test_a_run_over_engines_trains_on_the_tokens_of_one_that_samples_itself(model, service, tmp_path):
    config, _, _ = model
    train(config, str(tmp_path / "own"))
    train(dataclasses.replace(config, actor=remote(config, service.url)), str(tmp_path / "engines"))

    def records(name):
        files = sorted((tmp_path / name / "rollouts").glob("*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    own = records("own")
    found = records("engines")
    assert len(own) == 2 * 4 * 4
    for one, other in zip(found, own, strict=True):
        assert {**one, "logprobs": 0} == {**other, "logprobs": 0}
