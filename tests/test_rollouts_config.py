"""The configs of actors refuse what cannot work, naming the setting."""

import pytest

from rljax.plans import ForkPlan, RolloutPlan
from rljax.rollouts import BlackBox, Guided, MultiTurn, SingleTurn
from rljax.sampling import SamplingConfig

FORKS = ForkPlan(chains=2, points=1, rule=lambda group: [])


@pytest.mark.parametrize(
    ("actor", "plan", "message"),
    [
        (SingleTurn(prompt_buckets=()), RolloutPlan(2), r"^config.actor.prompt_buckets=\(\) must be increasing"),
        (SingleTurn(prompt_buckets=(8, 8)), RolloutPlan(2), r"^config.actor.prompt_buckets=\(8, 8\) must be incr"),
        (SingleTurn(sample_slots=-1), RolloutPlan(2), r"^config.actor.sample_slots=-1 must be at least 0"),
        (MultiTurn(make="a:b", decode_rows=-1), RolloutPlan(2), r"^config.actor.decode_rows=-1 must be at least 0"),
        (MultiTurn(make="a:b", workers=0), RolloutPlan(2), r"^config.actor.workers=0 must be at least 1"),
        (MultiTurn(make="a:b", context_length=64), RolloutPlan(2), r"^config.actor.context_length=64, the length of"),
        (BlackBox(agent="a:b", timeout_s=0.0), RolloutPlan(2), r"^config.actor.timeout_s=0.0 must be a positive"),
        (BlackBox(agent="a:b"), RolloutPlan(4, forks=FORKS), r"cannot be forked"),
        (BlackBox(agent="a:b", trained_conversations=3), RolloutPlan(4), r"must be a multiple of .*=3"),
        (Guided(SingleTurn(), probes=0), RolloutPlan(2), r"^config.actor.probes=0 must be at least 1"),
        (Guided(SingleTurn(prompt_buckets=())), RolloutPlan(2), r"prompt_buckets=\(\) must be increasing"),
        (Guided(), RolloutPlan(4, forks=FORKS), r"an algorithm that forks do not go together"),
    ],
)
def test_impossible_actors_are_refused(actor, plan, message):
    with pytest.raises(ValueError, match=message):
        actor.check(plan, SamplingConfig(max_new_tokens=64), 1024)


@pytest.mark.parametrize("actor", [SingleTurn(), MultiTurn(make="a:b"), BlackBox(agent="a:b"), Guided()])
def test_a_possible_actor_is_taken(actor):
    actor.check(RolloutPlan(4), SamplingConfig(max_new_tokens=64), 1024)
