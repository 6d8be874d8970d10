"""A simulated run keeps what can be worked out by hand: phases in turn and beside each other, failures, queues."""

import builtins
import dataclasses
import math

import pytest

from rljax.simulation import Scenario, best_split, draw_tokens, draw_turns, roll_out, simulate, simulate_splits

EVEN = Scenario(groups=16, group_size=4, rows=64, tokens=100.0, step_s=0.05, update_s=8.0, steps=400)
"""A rollout takes 100 x 0.05 = 5 s; an update 8 device-seconds, which are 1 s on 8 devices and 2 s on 4."""


def test_in_turn_a_step_takes_the_sum_of_its_phases():
    for staleness in (0, 3):
        outcome = simulate(dataclasses.replace(EVEN, staleness=staleness))
        assert outcome.step_s == pytest.approx(5 + 1, rel=1e-9)
        assert outcome.rollout_idle == outcome.trainer_idle == 0


@pytest.mark.parametrize(("update_s", "slower"), [(8.0, 5.0), (40.0, 10.0)])
def test_beside_each_other_a_step_takes_the_longer_phase(update_s, slower):
    scenario = dataclasses.replace(EVEN, rollout_devices=4, update_s=update_s)
    apart = simulate(dataclasses.replace(scenario, staleness=1))
    assert apart.step_s == pytest.approx(slower, rel=0.01)
    idle = {"rollout": 1 - 5 / slower, "trainer": 1 - update_s / 4 / slower}
    assert apart.rollout_idle == pytest.approx(idle["rollout"], abs=0.01)
    assert apart.trainer_idle == pytest.approx(idle["trainer"], abs=0.01)

    # Without staleness both still wait for each other.
    assert simulate(scenario).step_s == pytest.approx(5 + update_s / 4, rel=1e-9)


def test_a_rollout_is_as_stale_as_the_schedule_says():
    outcome = simulate(dataclasses.replace(EVEN, rollout_devices=4, staleness=2, steps=10))
    assert outcome.staleness == {0: 0.1, 1: 0.1, 2: 0.8}
    assert simulate(EVEN).staleness == {0: 1.0}


def test_a_rollout_waits_for_the_weights_it_is_to_be_sampled_by():
    """A hand-over goes before the next rollout and the next update."""
    scenario = dataclasses.replace(EVEN, rollout_devices=4, hand_over_bytes=30.0, hand_over_bandwidth=10.0)
    assert simulate(scenario).step_s == pytest.approx(5 + 2 + 3)
    assert simulate(dataclasses.replace(scenario, staleness=1)).step_s == pytest.approx(5, rel=0.01)
    assert simulate(dataclasses.replace(scenario, staleness=1, update_s=16.0)).step_s == pytest.approx(4 + 3, rel=0.01)


def test_rows_and_turns_obey_littles_law():
    """Busy rows = episodes a second x seconds that an episode decodes, whatever waits; a tool holds no row."""
    scenario = Scenario(groups=40, group_size=8, rows=24, tokens=60.0, tokens_cv=1.0, step_s=0.1, turns=3.0, tool_s=4.0)
    found = roll_out(dataclasses.replace(scenario, drawn=1))
    decoding = draw_tokens(scenario, 0).sum(axis=1) * 0.1
    assert found.busy_rows[0] == pytest.approx(320 / found.sample_s[0] * decoding.mean(), rel=1e-9)
    assert 20 < found.busy_rows[0] < 24
    assert found.tokens[0] == draw_tokens(scenario, 0).sum()


def test_a_mean_of_turns_is_met_by_whole_ones():
    """Of 1.6 turns and rows for all, without tools: an episode takes one completion or two, and tokens are those of its
    turns alone."""
    scenario = Scenario(groups=500, group_size=8, rows=4000, turns=1.6, tokens=10.0, step_s=0.1, drawn=1)
    turns = draw_turns(scenario, 0)
    assert set(turns) == {1, 2}
    assert turns.mean() == pytest.approx(1.6, abs=0.03)

    found = roll_out(scenario)
    assert found.sample_s[0] == pytest.approx(2.0)
    assert found.tokens[0] == 10 * turns.sum()


def test_a_tool_holds_an_episode_up_and_no_row():
    """One row, two episodes of two turns: 10 s each turn, 15 s a tool: the row is free from 20 to 25 alone."""
    scenario = Scenario(groups=2, group_size=1, rows=1, tokens=10.0, step_s=1.0, turns=2.0, tool_s=15.0, tool_cv=0.0)
    found = roll_out(dataclasses.replace(scenario, drawn=1))
    assert found.sample_s[0] == pytest.approx(10 + 15 + 10 + 10)
    assert found.busy_rows[0] == pytest.approx(40 / 45)


def test_groups_in_flight_go_on_with_the_next_rollout():
    """Four groups of one sample decode 10 s side by side, of which a rollout takes two, and the next the others."""
    scenario = Scenario(groups=2, group_size=1, groups_in_flight=2, rows=4, tokens=10.0, step_s=1.0, drawn=4)
    found = roll_out(scenario)
    assert sorted(found.sample_s) == pytest.approx([0, 0, 10, 10])
    assert found.tokens.tolist() == [20] * 4
    assert [dict(spans) for spans in found.spans] == [{1: 2}] * 4
    # Its first tokens are of the weights of the rollout before.
    assert simulate(dataclasses.replace(scenario, steps=10)).staleness == {0: 0.1, 1: 0.9}


def test_groups_in_flight_leave_no_row_without_a_turn():
    scenario = Scenario(groups=16, group_size=1, rows=16, tokens=100.0, tokens_cv=1.0, step_s=1.0, drawn=200)
    alone = roll_out(scenario)
    beside = roll_out(dataclasses.replace(scenario, groups_in_flight=16))
    assert alone.busy_rows.mean() < 8
    busy = (beside.busy_rows * beside.sample_s).sum() / beside.sample_s.sum()
    assert busy == pytest.approx(16, rel=0.02)
    assert beside.sample_s.mean() == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize(("staleness", "seconds"), [(0, 5 + 1), (1, 5)])
def test_engines_take_no_device_from_training(staleness, seconds):
    outcome = simulate(dataclasses.replace(EVEN, engines=8, staleness=staleness))
    assert outcome.step_s == pytest.approx(seconds, rel=0.01)
    (only,) = simulate_splits(dataclasses.replace(EVEN, engines=8, staleness=staleness))
    assert only == outcome


def test_lengths_have_the_mean_and_spread_that_were_asked_for():
    drawn = draw_tokens(Scenario(groups=5000, group_size=8, tokens=500.0, tokens_cv=0.8), 0)
    assert drawn.mean() == pytest.approx(500, rel=0.02)
    assert drawn.std() / drawn.mean() == pytest.approx(0.8, rel=0.05)
    assert draw_tokens(Scenario(tokens=500.0, tokens_cv=0.8, max_tokens=600), 0).max() == 600


def test_hosts_play_their_own_groups_and_wait_for_the_longest():
    scenario = Scenario(devices=16, groups=6, group_size=2, rows=4, tokens=50.0, tokens_cv=1.0, step_s=1.0, drawn=1)
    lengths = draw_tokens(scenario, 0).sum(axis=1).reshape(6, 2)
    found = roll_out(dataclasses.replace(scenario, gather_bandwidth=100.0))

    def serial(own):
        """Four rows take episodes in their order: whichever is free first takes the next."""
        free = [0] * 4
        for episode in own.ravel():
            first = free.index(min(free))
            free[first] += episode
        return max(free)

    assert found.sample_s[0] == max(serial(lengths[0::2]), serial(lengths[1::2]))
    # One host tells the other of all, 20 bytes a token.
    assert found.after_s[0] == pytest.approx(lengths.sum() * 20 / 100)

    # More hosts are more to tell, though each has played less.
    more = roll_out(dataclasses.replace(scenario, devices=24, gather_bandwidth=100.0))
    assert more.after_s[0] == pytest.approx(2 * found.after_s[0])


def test_failures_cost_what_daly_says():
    """J. T. Daly, A higher order estimate of the optimum checkpoint interval (2006), equation 20: work in pieces of
    tau + delta, failures at rate 1/M, a restart of R: M e^(R/M) (e^((tau + delta)/M) - 1) seconds a piece."""
    devices, update, every, restart = 8, 10.0, 5, 40.0
    between = 300.0
    scenario = Scenario(
        devices=devices,
        step_s=0.0,
        update_s=update * devices,
        checkpoint_every=every,
        checkpoint_stall_s=6.0,
        failures=3600 / between / devices,
        restart_s=restart,
        steps=6000,
    )
    outcome = simulate(scenario)
    piece = every * update + 6.0
    expected = between * math.exp(restart / between) * (math.exp(piece / between) - 1)
    # More than a thousand pieces, whose times scatter by less than twice their mean.
    assert outcome.seconds / (6000 / every) == pytest.approx(expected, rel=0.05)
    # What was lost is what was not spent on steps and checkpoints that lasted.
    assert outcome.lost == pytest.approx(1 - piece / expected, abs=0.03)
    expected_failures = outcome.seconds / between
    assert abs(outcome.failures - expected_failures) < 3 * math.sqrt(expected_failures)


def test_a_finished_rollout_is_not_made_again():
    """With rollouts that take all the time, a failure costs the one under way, whatever checkpoints there are."""
    scenario = dataclasses.replace(EVEN, update_s=0.0, failures=3600 / 100 / 8, restart_s=0.0, steps=2000)
    rare = simulate(dataclasses.replace(scenario, checkpoint_every=500))
    assert rare.step_s == pytest.approx(100 * (math.exp(5 / 100) - 1), rel=0.05)
    assert simulate(dataclasses.replace(scenario, checkpoint_every=1)).step_s == pytest.approx(rare.step_s, rel=1e-9)


def test_a_checkpoint_counts_when_it_is_written_and_its_rollouts_are_there():
    """Written behind the steps for 30 s; a second one waits for it."""
    scenario = dataclasses.replace(
        EVEN, checkpoint_every=1, checkpoint_bytes=300.0, checkpoint_bandwidth=10.0, steps=50
    )
    assert simulate(scenario).step_s == pytest.approx(30, rel=0.05)
    assert simulate(scenario).writing == pytest.approx(24 / 30, rel=0.05)


def test_the_best_split_evens_out_the_two_sides():
    # A part of a rollout's 100 decoding steps stays the same on more devices, so that all in turn is not the best.
    scenario = dataclasses.replace(EVEN, staleness=1, step_s=0.1, step_row_s=0.00625, update_s=120.0)
    found = simulate_splits(scenario)
    assert [outcome.scenario.rollout_devices for outcome in found] == list(range(8))
    times = {r: max(10 + math.ceil(64 / r) * 0.625, 120 / (8 - r)) for r in range(1, 8)} | {0: 15 + 15}
    for outcome in found:
        assert outcome.step_s == pytest.approx(times[outcome.scenario.rollout_devices], rel=0.02)
    assert best_split(found).scenario.rollout_devices == min(times, key=times.get) == 3


def test_a_run_is_the_same_for_a_seed():
    scenario = Scenario(
        devices=32, rollout_devices=4, staleness=2, tokens_cv=1.0, failures=0.5, checkpoint_every=3, steps=300
    )
    assert simulate(scenario) == simulate(scenario)
    assert simulate(dataclasses.replace(scenario, seed=1)).seconds != simulate(scenario).seconds


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"devices": 12}, r"devices=12 must be a multiple of devices_per_host=8"),
        ({"rollout_devices": 8}, r"rollout_devices=8 must leave a device of a host's 8 to training"),
        ({"devices": 0}, r"devices=0 must be at least 1"),
        ({"tokens": 0.0}, r"tokens=0\.0 must be above 0"),
        ({"least_trainers": 16}, r"leaves 8 devices to training, and the state needs the memory of 16"),
        ({"rollout_devices": 1, "least_rollout": 2}, r"rollout_devices=1 is too few for a decoder"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        simulate(dataclasses.replace(Scenario(), **fields))
    assert "\n" not in str(error.value)


def test_a_missing_simpy_is_named(monkeypatch):
    imported = builtins.__import__

    def without(name, *rest, **words):
        if name == "simpy":
            raise ImportError(name)
        return imported(name, *rest, **words)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"needs the package simpy: pip install 'rljax-lm\[simulate\]'"):
        simulate(Scenario())
