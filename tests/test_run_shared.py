"""Two processes play what one plays, whoever plays it: environments, forks, guidance, agents that cannot be changed."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import shared_program
from devices import xla_flags
from overlap_program import computed
from test_rollouts_endpoint import CONFIG, make_tokenizer, params

from rljax.experiment.serve import ServeConfig, engine_of
from rljax.models import save_hf

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """What one process plays, and what each of two does."""
    folder = tmp_path_factory.mktemp("shared")
    save_hf(str(folder / "model"), CONFIG, params(), tokenizer=make_tokenizer())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    os.environ["NOTES"] = str(folder)
    environment = {**os.environ, "XLA_FLAGS": xla_flags(1), "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    serve = ServeConfig(model=str(folder / "model"), port=0, rows=8, context_length=128, max_new_tokens=6)
    # One engine for the run that is alone, and one that both processes ask.
    with engine_of(serve) as of_one, engine_of(serve) as of_both:
        processes = [
            subprocess.Popen(
                [sys.executable, str(TESTS / "shared_program.py"), str(folder), of_both.url, str(index), address],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        ]
        try:
            alone = shared_program.main(folder, of_one.url)
            outputs = [process.communicate(timeout=400) for process in processes]
        finally:
            del os.environ["NOTES"]
            for process in processes:
                process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return alone, [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forks", "guided", "agents", "in_step", "engines", "turns_of_engines"])
def test_two_processes_play_what_one_plays(played, name):
    alone, both = played
    want = json.loads(json.dumps(alone[name]))
    for found in both:
        for part in ("tokens", "rewards", "texts", "components", "evaluation"):
            assert found[name][part] == want[part], part


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forks", "guided", "agents", "engines", "turns_of_engines"])
def test_what_hosts_do_is_done_once_and_shared_out(played, name):
    alone, both = played
    first, second = (found[name] for found in both)
    assert sorted([*first["asked"], *second["asked"]]) == alone[name]["asked"]
    for found in (first, second):
        assert len(found["asked"]) <= 0.6 * len(alone[name]["asked"])

    if "engines" in name:
        # Engines decode, here in the process of the test.
        assert first["decoded"] == second["decoded"] == 0
        return
    assert first["decoded"] + second["decoded"] == alone[name]["decoded"]
    for found in (first, second):
        assert found["decoded"] <= 0.6 * alone[name]["decoded"]


@pytest.mark.slow
def test_groups_in_flight_of_two_processes_are_gone_on_with(played):
    """Each process has one under way, goes on with it, and all know of all."""
    alone, both = played
    first, second = (found["in_flight"] for found in both)
    assert first == second

    # As many are drawn as by one process, and none is played twice or lost.
    assert first["drawn"] == json.loads(json.dumps(alone["in_flight"]["drawn"]))
    trained = [example_id for ids in first["ids"] for example_id in ids]
    left = [group["example_id"] for state in first["state"]["processes"] for group in state["groups"]]
    assert [len(state["groups"]) for state in first["state"]["processes"]] == [1, 1]
    assert len(trained) == 8 and len({*trained, *left}) == 10
    known = [example_id for ids in alone["in_flight"]["ids"] for example_id in ids]
    assert {*trained, *left} == {*known, *(group["example_id"] for group in alone["in_flight"]["state"]["groups"])}


@pytest.mark.slow
def test_in_step_one_judges_and_both_decode(played):
    alone, both = played
    first, second = (found["in_step"] for found in both)
    assert first["asked"] == alone["in_step"]["asked"] and not second["asked"]
    assert first["decoded"] == second["decoded"] == alone["in_step"]["decoded"]


def start_beside(folder, devices, *dies_at):
    """A run of overlap_program on two processes, with so many devices of each for rollouts alone; their statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": xla_flags(2), "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    program = str(TESTS / "shared_overlap_program.py")
    processes = [
        subprocess.Popen(
            [sys.executable, program, str(folder), str(index), address, "single", str(devices), *map(str, dies_at)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for index in range(2)
    ]
    try:
        return [process.wait(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_overlapped_rollouts_of_two_processes_are_those_of_the_schedule_in_turn(tmp_path):
    """Also where one of them is killed and both are started again."""
    assert start_beside(tmp_path / "turn", 0) == [0, 0]
    assert start_beside(tmp_path / "beside", 1) == [0, 0]
    assert start_beside(tmp_path / "killed", 1, 3)[1] == -signal.SIGKILL
    assert start_beside(tmp_path / "killed", 1) == [0, 0]
    wanted = computed(tmp_path / "turn")
    assert computed(tmp_path / "beside") == wanted
    assert computed(tmp_path / "killed") == wanted
