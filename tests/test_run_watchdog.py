"""A process that hangs and is not dead ends the run, with a word on which it was and what it did."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rljax.experiment.pulse import Pulse
from rljax.experiment.watchdog import STALLED, Look, Watchdog, stalled
from rljax.sampling.token_counter import count_tokens

TESTS = Path(__file__).parent


def test_who_waits_holds_nobody_up():
    hangs = Look(1, "rollout", 61.0, waits=False)
    waits = Look(0, "rollout", 63.0, waits=True)
    moves = Look(2, "update", 1.0, waits=False)
    assert stalled([waits, hangs, moves], 60.0) == [hangs]
    assert stalled([waits, moves], 60.0) == []
    # In a program all wait for one that cannot be told: all that stand still are named, the longest first.
    assert stalled([hangs, Look(0, "update", 62.0, False)], 60.0) == [Look(0, "update", 62.0, False), hangs]
    # All wait for each other.
    assert stalled([waits, Look(1, "rollout", 60.0, True)], 60.0) == [waits, Look(1, "rollout", 60.0, True)]
    assert stalled([waits, Look(1, "rollout", 59.0, True)], 60.0) == []


def hangs_until(ended):
    assert ended.wait(timeout=30)


def test_a_run_that_stands_still_is_ended_with_its_stacks(tmp_path, capfd):
    ended = threading.Event()
    status = []

    def end(number):
        status.append(number)
        ended.set()

    pulse = Pulse()
    with Watchdog(pulse, tmp_path / "stacks", 0.2, end), pulse("evaluation"):
        hangs_until(ended)
    assert set(status) == {STALLED}
    said = capfd.readouterr().err
    assert "error: nothing has moved for config.log.stall_s=0.2 seconds: process 0 in evaluation for " in said
    assert f"stacks are in {tmp_path / 'stacks'}" in said
    assert "hangs_until" in (tmp_path / "stacks" / "process_0.txt").read_text()


def test_only_a_standstill_of_that_length_counts(tmp_path):
    pulse = Pulse()
    watchdog = Watchdog(pulse, tmp_path, 60.0)
    watchdog._begin()
    start = watchdog._moved
    with pulse("rollout"):
        assert watchdog._look(start + 59.0) == ""  # a phase has begun
        count_tokens(1)
        assert watchdog._look(start + 100.0) == ""
        assert watchdog._look(start + 159.0) == ""
        assert "process 0 in rollout for 60 s" in watchdog._look(start + 160.0)
    assert watchdog._look(start + 161.0) == ""


def test_no_watch_is_kept_where_none_is_wanted(tmp_path):
    with Watchdog(Pulse(), tmp_path, 0.0):
        assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def hang(tmp_path, how):
    """Statuses and stderr of two processes, of which the second hangs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "watchdog_program.py"), str(tmp_path), str(index), address, how],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def test_a_process_that_hangs_ends_all_and_is_named(tmp_path):
    statuses, said = hang(tmp_path, "sleeps")
    assert statuses == [STALLED, STALLED], said
    for text in said:
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert line.startswith("error: nothing has moved for config.log.stall_s=8 seconds: process 1 in rollout for ")
        assert "process 0" not in line
    assert "judge_that_hangs" in (tmp_path / "stacks" / "process_1.txt").read_text()
    assert "exchange" in (tmp_path / "stacks" / "process_0.txt").read_text()


@pytest.mark.slow
def test_a_process_whose_interpreter_is_held_ends_all_too(tmp_path):
    """It can neither look nor speak: the others see that it is silent, and a timer ends it."""
    statuses, said = hang(tmp_path, "holds")
    assert statuses[0] == STALLED and statuses[1] not in (0, None), said
    assert "process 1 in rollout for " in said[0]
    assert "judge_that_holds" in said[1]
