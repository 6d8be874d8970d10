"""Start-up of several processes, and one program run as two processes over loopback."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from devices import xla_flags
from sharded_program import CONFIG, batch, loss

from rljax import parallel
from rljax.models import init_params, save_hf

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    params = init_params(CONFIG, jax.random.key(0))
    save_hf(folder / "model", CONFIG, params)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(4)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "two_processes.py"), str(index), address, str(folder)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    value, grad = jax.jit(jax.value_and_grad(lambda p, d: loss(p, d)[0]))(params, batch())
    found = [json.loads(output.strip().splitlines()[-1]) for output, _ in outputs]
    return found, folder, float(value), jax.tree.leaves(grad)


def test_two_processes_are_one_program(two_processes):
    found, _, value, _ = two_processes
    for index, result in enumerate(found):
        assert result["several"] is True
        assert result["devices"] == [8, 4]
        assert result["main"] == (index == 0)
        assert result["addressable"] is False  # weights really are spread over both
        assert abs(result["loss"] - value) < 2e-6


def test_two_processes_give_the_gradient_of_one(two_processes):
    _, folder, _, grad = two_processes
    for index in range(2):
        with np.load(folder / f"grad{index}.npz") as stored:
            for name, want in zip(stored.files, grad, strict=True):
                assert np.abs(stored[name] - want).max() < 1e-6


def test_host_data_crosses_processes(two_processes):
    for result in two_processes[0]:
        assert result["gathered"] == [{"process": 0, "text": ""}, {"process": 1, "text": "xxxxx"}]
        assert result["moved"] == 0


def test_each_process_is_handed_the_weights(two_processes):
    """By way of the learner's devices, none of which has more of a matrix than its part along `tensor`."""
    for result in two_processes[0]:
        assert result["handed_over"] == {"part": 0.5, "difference": 0, "compiled": 0}


def test_what_may_differ_is_made_once_and_what_must_not_is_compared(two_processes):
    main, other = two_processes[0]
    assert main["once"] == other["once"] == {"process": 0}
    assert main["failed"] == "KeyError: 'judge'"
    assert other["failed"] == "RuntimeError: process 0 failed with KeyError: 'judge'"
    assert main["refused"] == other["refused"] == "ValueError: no such folder"
    # What cannot be told is an error too, in every process.
    assert main["unsent"] == "TypeError: cannot pickle code objects"
    assert other["unsent"] == f"RuntimeError: process 0 failed with {main['unsent']}"
    assert main["equal"] is None is other["equal"]
    assert main["unequal"] == other["unequal"]
    assert "shapes of process 1 differs from that of process 0" in main["unequal"]


def test_a_checkpoint_that_one_process_cannot_read_is_left_by_all(two_processes):
    found, folder, *_ = two_processes
    assert [result["restored"] for result in found] == [1, 1]
    assert [path.name for path in (folder / "checkpoints_unreadable").iterdir()] == ["2"]


def test_what_hosts_tell_each_other_takes_no_device(two_processes):
    assert all(result["programs"] == 0 for result in two_processes[0])


def test_bytes_of_any_size_go_round_and_leave_nothing(two_processes):
    """They are cut into pieces of a MiB, and go once all have read them; the last are kept until the next."""
    for result in two_processes[0]:
        assert result["large"] == [True, True, True]
        assert set(result["kept"]) <= {"1", "2"}
    assert two_processes[0][0]["kept"] == ["2"]


def test_who_waits_says_for_whom(two_processes):
    main, _ = two_processes[0]
    assert main["late"] == "TimeoutError: process 0 has waited too long for process 1 in late"
    assert main["other_failed"] == "RuntimeError: process 1 failed: KeyError: judge"


def test_an_export_from_two_processes_is_the_export_from_one(two_processes):
    folder = two_processes[1]
    for name in ("model.safetensors", "config.json"):
        assert (folder / "again" / name).read_bytes() == (folder / "model" / name).read_bytes()


def test_one_process_needs_no_start_up(monkeypatch):
    for name in ("RLJAX_COORDINATOR", "RLJAX_NUM_PROCESSES", "RLJAX_PROCESS_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert parallel.initialize_distributed() is False
    assert parallel.initialize_distributed("localhost:1", 1, 0) is False
    assert parallel.is_main_process()
    parallel.barrier("alone")
    assert parallel.gather("x") == ["x"]
    assert parallel.on_main(lambda: "x") == "x"
    with pytest.raises(ValueError, match="as it was"), parallel.end_together():
        raise ValueError("as it was")
    assert parallel.to_host({"x": jax.numpy.ones(2)})["x"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("localhost:1", None, None), {}, "needs RLJAX_NUM_PROCESSES, RLJAX_PROCESS_ID too; give all three or none"),
        ((None, 2, 0), {}, "needs RLJAX_COORDINATOR too"),
        (("localhost:1", 2, 2), {}, r"process_id=2 must lie in 0\.\.1"),
        (("localhost", 2, 0), {}, "coordinator='localhost' must be host:port"),
        (("localhost:1", None, 0), {"RLJAX_NUM_PROCESSES": "two"}, "RLJAX_NUM_PROCESSES='two' must be a whole number"),
    ],
)
def test_incomplete_start_up_is_refused(arguments, environment, message, monkeypatch):
    for name in ("RLJAX_COORDINATOR", "RLJAX_NUM_PROCESSES", "RLJAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        parallel.initialize_distributed(*arguments)


def test_detection_that_finds_nothing_says_what_to_give(monkeypatch):
    for name in ("RLJAX_COORDINATOR", "RLJAX_NUM_PROCESSES", "RLJAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)

    def undefined(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", undefined)
    with pytest.raises(ValueError, match="recognises no cluster in this environment; give coordinator"):
        parallel.initialize_distributed(auto=True)


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "4"}, ()),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "4"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ()),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "4", "JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
    ],
)
def test_a_process_alone_on_its_machine_has_all_devices_there(environment, devices, monkeypatch):
    """JAX takes one device a process under Slurm and Open MPI, unless it is told of no device in particular."""
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_LOCAL_SIZE", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **given: found.append(given["local_device_ids"]))
    parallel.initialize_distributed("host:1", 4, 0)
    assert found == [devices]


@pytest.mark.parametrize("name", ["RLJAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_what_runs_on_one_process_says_so(name, monkeypatch):
    for other in ("RLJAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(other, "1")
    parallel.require_one_process("rljax convert")
    monkeypatch.setenv(name, "4")
    with pytest.raises(ValueError, match=rf"^rljax convert runs on one process, .*\({name}=4\); start it once$"):
        parallel.require_one_process("rljax convert")


def test_a_heartbeat_takes_a_second_at_least():
    with pytest.raises(ValueError, match="heartbeat_s=0 must be at least 1 second"):
        parallel.initialize_distributed(heartbeat_s=0)


def test_clusters_are_recognised_by_their_environment():
    assert parallel.on_cluster({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert parallel.on_cluster({"SLURM_STEP_NUM_TASKS": "4"})
    assert parallel.on_cluster({"OMPI_COMM_WORLD_SIZE": "2"})
    assert not parallel.on_cluster({})
    assert not parallel.on_cluster({"TPU_WORKER_HOSTNAMES": "localhost", "SLURM_STEP_NUM_TASKS": "1"})
    assert not parallel.on_cluster({"SLURM_NTASKS": "8"})  # an allocation without a step runs one process
