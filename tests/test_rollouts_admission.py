"""How many groups are under way, and for how long."""

import threading

import numpy as np
import pytest
from test_rollouts_multi_turn import Echo, make_actor, params, play

from rljax.envs import EnvironmentLimits
from rljax.rollouts import MultiTurn
from rljax.rollouts.admission import all_in_time, capacity
from rljax.tasks import Example


def admits(submitted, *, version, staleness, batch):
    """The other form of the rule (AReaL, 2505.24298): whether the `submitted`-th sample may be begun while the learner
    has `version`."""
    return (submitted - 1) // batch <= version + staleness


@pytest.mark.parametrize(
    ("staleness", "version", "submitted", "want"),
    [(0, 0, 512, True), (0, 0, 513, False), (4, 3, 4096, True), (4, 3, 4097, False)],
)
def test_what_is_admitted(staleness, version, submitted, want):
    """The worked examples of AReaL's rule."""
    assert admits(submitted, version=version, staleness=staleness, batch=512) == want
    accepted = 512 * version
    running = submitted - 1 - accepted
    room = capacity(version=version, staleness=staleness, batch=512, accepted=accepted, running=running, most=5000)
    assert (room > 0) == want


@pytest.mark.parametrize(
    ("staleness", "version", "accepted", "running", "most", "want"),
    [
        (4, 0, 0, 0, 2000, 2000),
        (4, 3, 1536, 1000, 4000, 1560),
        (0, 2, 1024, 512, 4000, 0),
        (4, 0, 0, 2560, 4000, 0),
        (4, 0, 0, 700, 600, 0),  # most was lowered
    ],
)
def test_the_capacity(staleness, version, accepted, running, most, want):
    """The worked examples of AReaL's rule, and one of the edge cases."""
    found = capacity(version=version, staleness=staleness, batch=512, accepted=accepted, running=running, most=most)
    assert found == want
    # What is let in is what the other form of the rule admits, one by one.
    submitted = accepted + running
    open_to = sum(admits(submitted + i, version=version, staleness=staleness, batch=512) for i in range(1, 5000))
    assert max(0, min(most - running, open_to)) == want


@pytest.mark.parametrize("staleness", [1, 2, 4])
def test_no_order_of_completion_makes_a_group_late(staleness):
    """A simulated learner with everything against it: the newest complete first, and some only when they are waited
    for. A step never has to wait for a group that is not there, and no group is late."""
    rng = np.random.default_rng(staleness)
    batch = 4
    waits = []
    for _ in range(40):
        under_way: list[int] = []
        oldest = []
        for step in range(25):
            most = batch + int(rng.integers(0, 30))
            under_way += [step] * capacity(
                version=step, staleness=staleness, batch=batch, accepted=step * batch, running=len(under_way), most=most
            )
            # The newest are complete at first, and one by one the others.
            done = int(rng.integers(0, len(under_way) + 1))
            while True:
                complete = sorted(sorted(under_way)[len(under_way) - done :])
                left = sorted(under_way)
                for submitted in complete[:batch]:
                    left.remove(submitted)
                in_time = all_in_time(left, step=step + 1, staleness=staleness, batch=batch)
                if len(complete) >= batch and in_time:
                    break
                assert done < len(under_way)
                done += 1
                waits.append(step)
            oldest.append(step - complete[0])
            under_way = left
            assert not left or left[0] + staleness > step
        assert max(oldest) <= staleness
    assert waits


class Held(Echo):
    """Steps of one prompt are held until they are let go."""

    free = threading.Event()

    def step(self, action):
        if self.row["prompt"] == "held":
            assert self.free.wait(20)
        return super().step(action)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_a_slow_group_is_waited_for_in_its_last_step_and_not_before(steps_in_flight):
    Held.free.clear()
    actor = make_actor(
        Held,
        conversations=40,
        limits=EnvironmentLimits(turns=3),
        groups_in_flight=5,
        steps_in_flight=steps_in_flight,
        batch=2,
    )
    found = {}
    for step in range(steps_in_flight + 2):
        actor.set_params(params(), version=step)
        # The rule lets in a batch for every step that a group may take, and the constant five at most.
        assert actor.missing(2) + actor.num_pending == 2 + min(5, 2 * steps_in_flight)
        names = ["held" if step == i == 0 else f"task {step} {i}" for i in range(actor.missing(2))]
        if step == steps_in_flight:
            threading.Timer(0.05, Held.free.set).start()
        groups = play(actor, [Example(name) for name in names], step=step, n=2)
        found |= {group.example.prompt: step for group in groups}
        assert actor.stats["steps_in_flight"] <= steps_in_flight
    assert found["held"] == steps_in_flight


def test_one_of_several_processes_waits_for_groups_that_its_share_of_later_steps_could_not_train():
    """Of a batch of 4 each of two processes trains 2: four groups that are left need two steps, not one."""
    Held.free.clear()
    actor = make_actor(
        Held,
        conversations=40,
        limits=EnvironmentLimits(turns=3),
        workers=24,
        groups_in_flight=12,
        steps_in_flight=2,
        batch=4,
    )
    actor.processes = 2
    first = play(actor, [Example(name) for name in ("a", "b", "held", "held", "held", "held")], step=0, n=2)
    assert [group.example.prompt for group in first] == ["a", "b"]
    threading.Timer(0.05, Held.free.set).start()
    second = play(actor, [Example("c"), Example("d")], step=1, n=2)
    assert [group.example.prompt for group in second] == ["held", "held"]


def test_without_a_bound_the_others_go_first():
    Held.free.clear()
    actor = make_actor(Held, conversations=40, limits=EnvironmentLimits(turns=3), groups_in_flight=1)
    for step in range(4):
        actor.set_params(params(), version=step)
        names = ["held" if step == i == 0 else f"task {step} {i}" for i in range(actor.missing(2))]
        groups = play(actor, [Example(name) for name in names], step=step, n=2)
        assert "held" not in {group.example.prompt for group in groups}
    Held.free.set()


def test_a_decoder_has_room_for_what_is_let_in():
    assert MultiTurn(groups_in_flight=16).most_in_flight(4) == 16
    assert MultiTurn(groups_in_flight=16, steps_in_flight=2).most_in_flight(4) == 8
    assert MultiTurn(groups_in_flight=3, steps_in_flight=2).most_in_flight(4) == 3
