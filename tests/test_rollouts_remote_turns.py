"""Turns of engines in other processes: episodes, agents and guidance over them are those of an own decoder."""

import dataclasses
import time

import numpy as np
import pytest
from agent_tasks import Ask
from test_rollouts_endpoint import CONFIG as MODEL
from test_rollouts_endpoint import make_tokenizer, params
from test_rollouts_remote import assert_same_samples, served
from test_run_environment import make_config

from rljax.algorithms import ActGuideRL, DecoupledPPO, TreeGRPO
from rljax.envs import Parsed, ToolFormat
from rljax.experiment import BlackBox, Guided, MultiTurn, PretrainedModel, RemoteBlackBox, RemoteMultiTurn, UpdateConfig
from rljax.experiment.build import build
from rljax.experiment.check import check
from rljax.models import save_hf
from rljax.rollouts import number_groups
from rljax.types import SOURCE_GUIDED

# Of log-probs between 4 and 8 a unit in the last place is 4.8e-7; the largest difference seen is eight of them, on
# processors whose wider vectors add up in another order. What is extended together depends on when agents ask.
ROUNDING = 1e-5

FORMAT = ToolFormat("plain", lambda text: Parsed(), stop_strings=tuple(";abcdefghijklmnop"), wrap=(" ", "\n"))
"""Turns end often."""
TURNS = MultiTurn(
    make="agent_tasks:Ask",
    tool_format="test_rollouts_remote_turns:FORMAT",
    context_length=64,
    prefill_chunks=(64,),
    workers=4,
)


class Late(Ask):
    """Takes its time where the hidden number is odd."""

    def step(self, action):
        time.sleep(0.3 * (self._number % 2))
        return super().step(action)


AGENT = BlackBox(agent="agent_tasks:chat", context_length=64, prefill_chunks=(64,), workers=8, timeout_s=60.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_hf(folder, MODEL, params(), tokenizer=make_tokenizer())
    return folder


@pytest.fixture(scope="module")
def urls(folder):
    with served(folder, context_length=64) as one, served(folder, context_length=64, rows=3) as other:
        yield one.url, other.url


def config_of(folder, actor, algorithm=None):
    config = make_config(
        algorithm, model=PretrainedModel(path=str(folder)), actor=actor, update=UpdateConfig(pack_length=64)
    )
    return dataclasses.replace(config, prompts_per_step=3)


def over(urls, actor, **changes):
    """The same actor over engines."""
    kind = RemoteMultiTurn if isinstance(actor, MultiTurn) else RemoteBlackBox
    defaults = kind(**{"make": "a:b"} if kind is RemoteMultiTurn else {})
    # What a decoder of the run's own needs has no effect there.
    kept = {f.name: getattr(actor, f.name) for f in dataclasses.fields(actor) if f.name != "prefill_chunks"}
    return dataclasses.replace(defaults, **{**kept, "engines": tuple(urls), "wait_s": 20.0, **changes})


def played(config, steps=1, n=3):
    """The groups of `steps` steps, each behind a hand-over, and the actor's stats of the last."""
    check(config)
    run = build(config)
    groups = []
    with run.actor as actor:
        for step in range(steps):
            actor.set_params(run.initial_params(), step)
            actor.submit(
                number_groups(run.dataset.train[n * step : n * step + actor.missing(n)], 4), run.algorithm.plan, step
            )
            groups += actor.ready(n)
    return groups, actor.stats


def assert_same_groups(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one.prompt, one.texts, one.results) == (other.prompt, other.texts, other.results)
        assert_same_samples(one.samples, other.samples, ROUNDING)
        for steps, others in zip(one.steps, other.steps, strict=True):
            np.testing.assert_array_equal(steps, others)


def test_episodes_over_engines_are_those_of_a_decoder(folder, urls):
    algorithm = TreeGRPO(chains=2, points=1, rounds=1)
    wanted, _ = played(config_of(folder, TURNS, algorithm))
    found, stats = played(config_of(folder, over(urls, TURNS), algorithm))
    assert_same_groups(found, wanted)
    assert max(result.components["turns"] for group in wanted for result in group.results) == 3
    assert any(sample.fork_index for group in wanted for sample in group.samples)
    # What decoders of this process would have done is not told of them.
    assert stats["probe_gap"] < 1e-5 and stats["turns"] > 12 and "reused_share" not in stats


@pytest.mark.slow
def test_an_agent_over_engines_says_what_it_would_by_a_decoder(folder, urls):
    wanted, _ = played(config_of(folder, AGENT))
    found, stats = played(config_of(folder, over(urls, AGENT)))
    assert_same_groups(found, wanted)
    assert stats["failed"] == 0 and stats["turns"] == 2 * 12 and stats["probe_gap"] < 1e-5


def test_guidance_over_engines_guides_the_same_prompts(folder, urls):
    algorithm = ActGuideRL(group_size=4)
    wanted, _ = played(config_of(folder, Guided(TURNS, probes=1), algorithm))
    found, _ = played(config_of(folder, Guided(over(urls, TURNS), probes=1), algorithm))
    assert_same_groups(found, wanted)
    assert SOURCE_GUIDED in {group.source for group in found}


def test_no_turn_at_engines_is_said_by_two_weights(folder, urls):
    actor = over(urls, TURNS, make="test_rollouts_remote_turns:Late", groups_in_flight=3)
    groups, _ = played(config_of(folder, actor, DecoupledPPO(group_size=4)), steps=3)
    samples = [sample for group in groups for sample in group.samples]
    assert len(samples) == 3 * 3 * 4
    assert any(len(set(sample.versions[sample.sampled])) > 1 for sample in samples), "no episode spans two steps"
    for sample in samples:
        said = set(zip(sample.turns[sample.sampled], sample.versions[sample.sampled], strict=True))
        assert len(said) == len({turn for turn, _ in said})


@pytest.mark.parametrize(
    ("actor", "message"),
    [
        (over(["http://h:1"], TURNS), r"config\.actor\.engines holds http://h:1, which may be another machine"),
        (over(["http://127.0.0.1:1"], TURNS, check_every=4), r"config\.actor\.check_every=4 has no effect with"),
        (over(["http://127.0.0.1:1"], TURNS, stale_share=0.5), r"config\.actor\.stale_share=0\.5 has no effect with"),
        (over(["http://127.0.0.1:1"], AGENT, decode_rows=4), r"config\.actor\.decode_rows=4 has no effect with"),
    ],
)
def test_what_engines_cannot_do_is_refused_in_one_line(folder, actor, message):
    with pytest.raises(ValueError, match=message):
        check(config_of(folder, actor))
