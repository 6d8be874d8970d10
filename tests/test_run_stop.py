"""A run that is asked to end saves what it has, exits with 143, and goes on as if nothing had happened."""

import contextlib
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
import stop_runs
import stopped_program

import rljax.experiment.pipeline
import rljax.experiment.sft
import rljax.experiment.train
from rljax.experiment.stops import EXIT_STATUS, Stopped, Stops
from rljax.experiment.train import train
from rljax.testing import tiny_config

COMPILATION = "/jax/core/compile/backend_compile_duration"


def ask(number=signal.SIGTERM):
    """The signal, taken before anything else runs."""
    os.kill(os.getpid(), number)
    time.sleep(0)


MOMENTS = {
    "warm-up": ("sft", "supervised_step", None, signal.SIGTERM),
    "evaluation before": ("train", "evaluate", 0, signal.SIGUSR1),
    "rollout": ("pipeline", "collect", None, signal.SIGTERM),
    "update": ("train", "add_metrics", None, signal.SIGINT),
    "evaluation of a step": ("train", "evaluate", 1, signal.SIGTERM),
    "evaluation after": ("train", "evaluate", 2, signal.SIGTERM),
}
"""By what is under way: the function of which module is called then, for which step, and the signal that comes."""


@pytest.mark.slow
def test_what_is_under_way_is_all_that_a_stop_costs(tmp_path, monkeypatch):
    """One run is asked to end in each of its phases in turn."""
    config = stopped_program.config(1)
    config.steps = 2
    config.warmup.steps = 2
    config.evaluation.every = 1
    config.checkpoint.every = 2
    train(config, str(tmp_path / "straight"))

    folder = tmp_path / "stopped"
    standing = []
    for module, name, at, number in MOMENTS.values():
        module = getattr(rljax.experiment, module)
        function = getattr(module, name)

        def in_the_middle(*args, function=function, at=at, number=number, **kwargs):
            result = function(*args, **kwargs)
            if at in (None, kwargs.get("step")):
                ask(number)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(module, name, in_the_middle)
            with pytest.raises(Stopped) as stop:
                train(config, str(folder))
        assert stop.value.code == EXIT_STATUS == 143
        warm = stop_runs.newest(folder / "warmup_checkpoints")
        standing.append((warm, stop_runs.newest(folder / "checkpoints")))

    # The update of step 1 goes to its end; rollouts and evaluations are given up.
    assert standing == [(1, -1), (2, 0), (2, 0), (-1, 1), (-1, 1), (-1, 2)]
    assert not (folder / "summary.json").exists()
    train(config, str(folder))
    stop_runs.assert_the_same(folder, tmp_path / "straight")


@pytest.fixture
def ctrl_c():
    """Python's own handler, which pytest's workers do without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_only_the_second_ctrl_c_ends_a_run_at_once():
    with Stops() as stops:
        ask(signal.SIGINT)
        ask(signal.SIGTERM)  # what a scheduler repeats changes nothing
        assert stops.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            ask(signal.SIGINT)
        with pytest.raises(Stopped):
            stops.check()
    with pytest.raises(KeyboardInterrupt):  # Python's own handler is back
        ask(signal.SIGINT)


def test_only_work_that_may_be_abandoned_is_broken_off():
    done = []
    with Stops() as stops:
        with pytest.raises(Stopped), stops.abandonable():
            ask()
            done.append("more of it")
        ask()  # while it saves
        done.append("saved")
        with pytest.raises(Stopped), stops.abandonable():
            done.append("another piece")
    assert done == ["saved"]


def test_a_reward_cannot_take_a_stop_for_its_own_failure():
    with Stops() as stops, pytest.raises(Stopped), stops.abandonable(), contextlib.suppress(Exception):
        ask()


def test_a_compilation_goes_to_its_end_before_a_run_is_broken_off():
    """One that is left running crashes the process on its way out, whose exit status is then another."""
    log = []

    def begins(event, *_, **__):
        if event == COMPILATION:
            ask()
            log.append("begins")

    def ends(event, *_, **__):
        if event == COMPILATION:
            log.append("ends")

    jax.monitoring.register_event_duration_secs_listener(ends)
    try:
        with Stops() as stops:
            jax.monitoring.register_scalar_listener(begins)
            with pytest.raises(Stopped), stops.abandonable():
                jax.jit(lambda x: x + 1)(np.ones(3))
                log.append("more of it")
    finally:
        jax.monitoring.unregister_scalar_listener(begins)
        jax.monitoring.unregister_event_duration_listener(ends)
    assert log == ["begins", "ends"]


def test_a_run_in_another_thread_leaves_signals_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with Stops():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_run_that_is_asked_before_it_has_weights_saves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rljax.experiment.train, "build", lambda *_, **__: ask())
    with pytest.raises(Stopped):
        train(tiny_config(), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_stopped_at_random_moments_gives_the_same_numbers(processes, tmp_path):
    aims = stop_runs.run(tmp_path, times=20, processes=processes)
    assert set(aims) == {"warm-up step", "evaluation", "step", "save"}
    assert min(aims.values()) > 1
