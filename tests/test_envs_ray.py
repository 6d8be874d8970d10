"""Environments on a Ray cluster: what threads and processes promise, and that machines may be lost."""

import functools
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import test_rollouts_multi_turn as turns
from counting import Closes, Counter, Echo, Marks, needs_a_file
from test_envs_pool import (  # noqa: F401  these promises are those of every pool
    play,
    saved,
    story,
    test_a_fork_goes_on_from_its_turn,
    test_a_restored_episode_goes_on_as_it_would_have,
    test_a_restored_episode_must_lead_to_the_same,
    test_a_row_that_cannot_be_opened_ends_its_episode,
    test_an_episode_runs_to_its_end,
    test_limits_end_an_episode,
    test_what_an_environment_does_wrong_ends_its_own_episode,
)

from rljax.envs import EnvironmentLimits, EnvironmentPool, RayConfig

ray = pytest.importorskip("ray", reason="needs the extra ray")

LIMITS = EnvironmentLimits(turns=6, tool_calls=2, observation_chars=100, step_s=3.0)
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
SHARED = RayConfig(cpus=0.0)  # no CPU of the cluster is held, so that all pools of this file find room


@pytest.fixture(scope="module")
def pool():
    """It also holds the connection, so that the others of this file share its cluster."""
    with EnvironmentPool(Marks, workers=2, hosts="ray", ray=SHARED, limits=LIMITS) as pool:
        yield pool


def actor_of(pool, episode):
    return pool._where[episode.id].worker.actor


def kill(actor):
    """Returns when it is dead: `ray.kill` only asks for that."""
    ray.kill(actor)
    deadline = time.monotonic() + 20
    with pytest.raises(ray.exceptions.RayActorError):
        while time.monotonic() < deadline:
            ray.get(actor.__ray_ready__.remote())
            time.sleep(0.01)


def failures(pool):
    return {name: count for name, count in pool.failures.items() if count}


@pytest.mark.slow
def test_an_actor_that_is_killed_is_replaced_and_its_episodes_go_on(pool, tmp_path):
    path = tmp_path / "actor"
    row = {"goal": 9, "file": str(path)}
    with EnvironmentPool(Marks, workers=1, limits=LIMITS) as threads:
        want = [play(threads, actions, row) for actions in (["2", "wait", "3"], ["1", "4"])]
    path.unlink()

    before = failures(pool)
    first, second = play(pool, ["2"], row), play(pool, ["1"], row)
    under_way = pool.step(first, "wait")
    deadline = time.monotonic() + 20
    while not path.exists() or not path.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(int(path.read_text()), signal.SIGKILL)  # the actor's process, in the middle of a step
    assert under_way.result(60) is first

    for episode, action in ((second, "4"), (first, "3")):
        idle = actor_of(pool, episode)
        kill(idle)
        pool.step(episode, action).result(60)
        assert actor_of(pool, episode) is not idle
    assert [story(one) for one in (first, second)] == [story(one) for one in want]
    assert first.end is None and failures(pool) == before

    # its snapshots went with it, and are there again
    fork = pool.fork(first, 1).result(60)
    assert pool.step(fork, "4").result(60).steps[-1].observation == "6 after True"


@pytest.mark.slow
def test_what_takes_one_actor_after_another_with_it_ends_its_own_episode(pool):
    before = pool.failures["crashed"]
    victim = play(pool, ["2"], {"goal": 9})
    other = pool.fork(victim, 1).result(20)  # lives where that does
    pool.step(victim, "kill the actor").result(120)
    assert victim.end == "crashed" and "3 Ray actors were lost one after another" in victim.error
    assert pool.step(other, "1").result(60).steps[-1].observation == "3 after True"
    assert pool.failures["crashed"] == before + 1


def test_a_process_that_dies_is_replaced_behind_its_actor(pool):
    victim = play(pool, ["1", "1"], {"goal": 9})
    other = pool.fork(victim, 2).result(20)
    actor = actor_of(pool, victim)
    pool.step(victim, "die").result(20)
    assert (victim.end, victim.error) == ("crashed", "the worker process ended with exit code 7")
    assert pool.step(other, "1").result(20).steps[-1].observation == "3 after True"
    assert actor_of(pool, other) is actor


def test_tokens_are_those_of_threads_though_an_actor_is_killed(pool, monkeypatch):
    tokens = [sample.tokens.tolist() for group in turns.play(turns.make_actor(Echo)) for sample in group.samples]

    monkeypatch.setattr(turns, "EnvironmentPool", functools.partial(EnvironmentPool, hosts="ray", ray=SHARED))
    actor = turns.make_actor(Echo, workers=1)
    with actor.pool as here:
        doomed = here._lanes[0].worker.actor
        step = here.step

        def step_after_a_kill(episode, action):
            if len(episode.steps) == 1:
                kill(doomed)
            return step(episode, action)

        monkeypatch.setattr(here, "step", step_after_a_kill)
        assert [sample.tokens.tolist() for group in turns.play(actor) for sample in group.samples] == tokens
        assert here._lanes[0].worker.actor is not doomed


def test_environments_are_closed_and_nothing_is_left_of_a_pool(pool, tmp_path):
    with EnvironmentPool(Closes, workers=1, hosts="ray", ray=SHARED, limits=LIMITS) as here:
        for goal in (2, 3):
            episode = play(here, ["1"], {"goal": goal, "file": str(tmp_path / "closed")})
        pid = int(here.step(episode, "who").result(20).steps[-1].observation)
    assert sorted((tmp_path / "closed").read_text().split()) == ["2", "3"]
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")


def test_a_stop_still_reaches_the_run(pool):
    """Ray sets a handler of its own for SIGTERM, by which a run is asked to save."""
    assert {number: signal.getsignal(number) for number in HANDLERS} == HANDLERS


def test_what_cannot_start_is_refused_in_one_line(pool):
    def refused(make, **settings):
        with pytest.raises(ValueError) as error:
            EnvironmentPool(make, workers=1, hosts="ray", ray=RayConfig(**settings)).open()
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "makes no environment: OSError: no such index" in refused(needs_a_file, cpus=0.0)
    assert "1 of 1 workers found no room on the Ray cluster in 1 s (they hold 1000 CPU each" in refused(
        Counter, cpus=1000.0, start_s=1.0
    )
    assert "this process is connected to 'local'" in refused(Counter, address="10.0.0.1:6379")
    assert "'nowhere' is no top-level module" in refused(Counter, modules=("nowhere",))
    with pytest.raises(ValueError, match=r"hosts='cloud' must be one of 'threads', 'processes', 'ray'"):
        EnvironmentPool(Counter, hosts="cloud")


def test_a_cluster_that_is_not_there_is_refused_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = (
        "from counting import Counter; from rljax.envs import EnvironmentPool, RayConfig\n"
        f"EnvironmentPool(Counter, workers=1, hosts='ray', ray=RayConfig(address='{address}')).open()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert f"ValueError: config.actor.ray.address='{address}': the Ray cluster" in said.stderr
    assert "cannot be joined ([Errno 111] Connection refused); check that it runs" in said.stderr


def test_ray_is_imported_by_those_alone_who_ask_for_it():
    code = (
        "import sys; from rljax.envs import EnvironmentPool\n"
        "with EnvironmentPool(lambda: None, workers=1): pass\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_the_extra_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"hosts='ray' needs Ray: pip install 'rljax-lm\[ray\]'; or take"):
        EnvironmentPool(Counter, hosts="ray")
