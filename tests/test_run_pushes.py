"""Weights that are handed to the rollouts every few steps: the schedule, resets of the optimizer, and resumes."""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest
from breaking import break_off

import rljax.experiment.train
from rljax.algorithms import DecoupledPPO
from rljax.experiment import EvaluationConfig, LightSAMConfig, OptimizerConfig, RolloutConfig
from rljax.experiment.changes import review_changes
from rljax.experiment.check import check
from rljax.experiment.train import train
from rljax.testing import run_metrics, tiny_config
from rljax.training import MuonConfig, fingerprint, make_optimizer
from rljax.training.optimizers import reset_moments

EVERY = 3


def make_config(**changes):
    config = tiny_config(
        algorithm=DecoupledPPO(group_size=4),
        steps=7,
        evaluation=EvaluationConfig(problems=4, samples=1, every=2),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="linear", warmup_steps=2, total_steps=20),
        rollout=RolloutConfig(push_every=EVERY, staleness=1, reset_moments="all"),
    )
    return dataclasses.replace(config, **changes)


def digest(params):
    return tuple(sorted(fingerprint(jax.device_get(params)).items()))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of an undisturbed run; the policy's digest before each step, and (version, digest) of what the actor
    was given, for rollouts and for evaluations."""
    folder = tmp_path_factory.mktemp("pushes")
    policies = []
    given = {"rollout": [], "evaluation": []}
    moments = []
    with pytest.MonkeyPatch.context() as patch:
        step = rljax.experiment.train.train_step
        evaluate_run = rljax.experiment.train.evaluate_run
        where = ["rollout"]

        def watched(run, index):
            policies.append(digest(run.policy()))
            set_params = run.actor.set_params

            def record(params, version):
                given[where[0]].append((version, digest(params)))
                set_params(params, version)

            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(run.actor, "set_params", record)
                out = step(run, index)
            moments.append(int(optax.tree_utils.tree_get_all_with_path(run.state.opt_state, "count")[0][1]))
            return out

        def evaluated(run, params, index):
            given["evaluation"].append((index, digest(params) == digest(run.policy())))
            return evaluate_run(run, params, index)

        patch.setattr(rljax.experiment.train, "train_step", watched)
        patch.setattr(rljax.experiment.train, "evaluate_run", evaluated)
        train(make_config(), str(folder))
    return folder, policies, given, moments


def test_rollouts_have_the_weights_that_were_pushed_last(straight):
    folder, policies, given, moments = straight
    assert len(set(policies)) == 7
    # Rollout s is ordered at step max(0, s - 1), which has the weights of the push before it.
    ordered_at = [max(0, s - 1) for s in range(7)]
    assert given["rollout"] == [(at // EVERY, policies[at // EVERY * EVERY]) for at in ordered_at]
    # Evaluations are of the policy as it stands, pushed or not.
    assert given["evaluation"] == [(index, True) for index in (0, 2, 4, 6, 7)]

    # Versions count pushes, and so does staleness.
    lines = run_metrics(folder)
    trained = [s // EVERY for s in range(7)]
    sampled = [at // EVERY for at in ordered_at]
    assert [line["rollout/staleness_max"] for line in lines] == [t - s for t, s in zip(trained, sampled, strict=True)]

    # The moments began anew at steps 3 and 6, and the schedule did not.
    assert moments == [1, 2, 3, 1, 2, 3, 1]
    rates = [line["loss/learning_rate"] for line in lines]
    assert rates[0] < rates[1] < rates[2] and rates[2] > rates[3] > rates[6]


@pytest.mark.slow
def test_a_run_that_ends_between_two_pushes_goes_on_with_the_same_numbers(straight, tmp_path):
    for last in (4, 6):
        break_off(make_config(), tmp_path, before=last)
    train(make_config(), str(tmp_path))
    assert run_metrics(tmp_path) == run_metrics(straight[0])


def test_a_push_at_every_step_is_a_run_without(tmp_path):
    """The default keeps no second copy of the weights."""
    run = rljax.experiment.train.build(make_config(rollout=RolloutConfig()))
    state = run.init_state(run.initial_params())
    assert state.pushed is None and run.abstract_state().pushed is None
    pushed = run.learner.push(state)
    for one, other in zip(jax.tree.leaves(pushed), jax.tree.leaves(state), strict=True):
        assert one is other


def adam_step(gradient, mu, nu, count, rate):
    """One step of Adam without weight decay, float64: the change of the weight, and the moments."""
    mu = 0.9 * mu + 0.1 * gradient
    nu = 0.999 * nu + 0.001 * gradient**2
    count += 1
    direction = mu / (1 - 0.9**count) / (np.sqrt(nu / (1 - 0.999**count)) + 1e-8)
    return -rate * direction, mu, nu, count


@pytest.mark.parametrize("which", ["none", "first", "all"])
def test_moments_begin_anew_and_the_schedule_goes_on(which):
    config = OptimizerConfig(learning_rate=0.1, schedule="linear", total_steps=10, max_grad_norm=0.0)
    optimizer = make_optimizer(config)
    params = {"w": np.float32([[1.0, -2.0]])}
    state = optimizer.init(params)
    mu = nu = np.zeros((1, 2))
    count = 0
    rng = np.random.default_rng(0)
    for step in range(6):
        if step == 3:
            state = reset_moments(optimizer, state, params, which)
            mu = mu if which == "none" else np.zeros((1, 2))
            nu = np.zeros((1, 2)) if which == "all" else nu
            count = 0 if which == "all" else count
        gradient = rng.normal(size=(1, 2))
        updates, state = optimizer.update({"w": np.float32(gradient)}, state, params)
        want, mu, nu, count = adam_step(gradient, mu, nu, count, 0.1 * (1 - step / 10))
        np.testing.assert_allclose(updates["w"], want, rtol=2e-5)


@pytest.mark.parametrize(
    ("config", "first"),
    [(MuonConfig(), {"mu"}), (LightSAMConfig(), {"momentum"}), (OptimizerConfig(), {"mu"})],
    ids=["muon", "lightsam", "adamw"],
)
def test_every_optimizer_forgets_what_it_is_told(config, first):
    optimizer = make_optimizer(config)
    params = {"layers": {"q": np.ones((2, 4, 4), np.float32)}, "embedding": np.ones((3, 4), np.float32)}
    begin = optimizer.init(params)
    used = jax.tree.map(lambda x: x + 1, begin)

    def names(which):
        """Fields of the state that are as at the beginning."""
        state = reset_moments(optimizer, used, params, which)
        found = set()
        for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(begin), strict=True):
            if np.array_equal(new, old):
                found |= {key.name for key in path if hasattr(key, "name")} - {"inner_states", "inner_state"}
        return found

    assert names("none") == set() and names("first") == first
    assert (
        first < names("all")
        and optax.tree_utils.tree_get_all_with_path(reset_moments(optimizer, used, params, "all"), "count")[-1][1] == 1
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": RolloutConfig(push_every=7)}, "push_every=7 hands no trained weights .* config.steps=7"),
        ({"algorithm": tiny_config().algorithm}, r"staleness=1 trains on tokens that other policies sampled"),
        (
            {"algorithm": tiny_config().algorithm, "rollout": RolloutConfig(push_every=2)},
            r"push_every=2 trains on tokens that other policies sampled",
        ),
        (
            {
                "rollout": RolloutConfig(reset_moments="first"),
                "optimizer": LightSAMConfig(variant="norm"),
            },
            "reset_moments='first' has no effect: LightSAMConfig averages no gradients",
        ),
        ({"rollout": RolloutConfig(reset_moments="all"), "steps": 1}, "reset_moments='all' has no effect"),
    ],
)
def test_pushes_that_change_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check(make_config(**changes), jax.device_count())


def test_versions_cannot_change_their_meaning_within_a_run():
    old, new = ({"steps": 7, "rollout": {"push_every": every}} for every in (3, 2))
    with pytest.raises(ValueError, match=re.escape("config.rollout.push_every=2, but the run in this folder counts")):
        review_changes(old, new, 4, "config.steps")
