"""The files of launch/ start the same command on every host, each with its place, and begin it again where they promise
to. Their schedulers are stood in for by scripts that note what they are asked for."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml
from absl.testing import flagsaver
from jax._src.clusters import ClusterEnv

from rljax import parallel

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
NOTES = "NOTES"

# Notes its arguments and the variables that tell a process its place, and exits as it is told.
NOTE = f"""#!{sys.executable}
import json, os, sys
places = {{k: v for k, v in os.environ.items() if k.startswith(("RLJAX_", "SLURM_", "XLA_PYTHON"))}}
with open(os.environ["{NOTES}"], "a") as file:
    file.write(json.dumps({{"argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "places": places}}) + "\\n")
sys.exit(int(os.environ.get("STATUS", 0)))
"""

# Runs its command once a task, as two nodes do, and passes on the worst status.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
worst=0
for index in 0 1; do
  SLURM_PROCID=$index SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=2 \
    SLURM_STEP_NODELIST="node[1-2]" "$@" || worst=$?
done
exit $worst
"""


@pytest.fixture
def run(tmp_path):
    """Runs a command in bash with stand-ins on the path; gives (its result, what was noted)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("python", "gcloud", "xpk", "scontrol"):
        (folder / name).write_text(NOTE)
    (folder / "srun").write_text(SRUN)
    for file in folder.iterdir():
        file.chmod(0o755)

    def command(*words, **variables):
        notes = tmp_path / "notes"
        notes.unlink(missing_ok=True)
        environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHON": str(folder / "python"),
            NOTES: str(notes),
            **variables,
        }
        result = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
        noted = notes.read_text().splitlines() if notes.exists() else []
        return result, [json.loads(line) for line in noted]

    return command


def flags_of(argv):
    """The flags of a command line that runs launch/train.py, as the command itself reads them."""
    assert argv[:2] == ["python", "launch/train.py"], argv
    from rljax.cli import command_line

    with flagsaver.flagsaver():
        import rljax.cli.train as train

        old, sys.argv = sys.argv, ["train.py", *argv[2:]]
        try:
            command_line._parse(sys.argv, train)
            return {name: command_line.flags.FLAGS[name].value for name in ("workdir", "distributed", "fresh")} | {
                "steps": command_line.flags.FLAGS["config"].value.steps
            }
        finally:
            sys.argv = old
            del sys.modules["rljax.cli.train"]


def joined(monkeypatch, places):
    """What `initialize_distributed` joins with the variables of a process, as JAX understands it: coordinator, number
    of processes, index. Each process has all devices of its node."""
    found = []

    def initialize(coordinator=None, processes=None, index=None, *, local_device_ids=None, **_):
        given = (coordinator, processes, index, local_device_ids)
        found.extend(ClusterEnv.auto_detect_unset_distributed_params(*given, None, 300))

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    parallel.initialize_distributed()
    *place, devices = found
    assert not devices, f"one process a node takes {devices} of its devices alone"
    return tuple(place)


def test_slurm_runs_a_process_a_node_and_goes_back_into_the_queue(run, monkeypatch):
    words = [str(LAUNCH / "slurm.sh"), "quickstart_tiny", "runs/a b", "--config.steps=3"]
    job = {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(ROOT)}
    result, noted = run(*words, **job)
    assert result.returncode == 0, result.stderr
    assert [note["places"]["SLURM_PROCID"] for note in noted] == ["0", "1"]
    for note in noted:
        assert flags_of(note["argv"]) == {"workdir": "runs/a b", "distributed": True, "fresh": False, "steps": 3}
        # JAX knows this cluster by its variables.
        assert parallel.on_cluster(note["places"])
        assert note["places"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"
    for index, note in enumerate(noted):
        assert joined(monkeypatch, note["places"])[1:] == (2, index)

    for status in ("143", "75"):
        stopped, noted = run(*words, **job, STATUS=status)
        assert stopped.returncode == int(status)
        assert noted[-1]["argv"] == ["scontrol", "requeue", "17"]
    worn, noted = run(*words, **job, STATUS="143", SLURM_RESTART_COUNT="100")
    assert worn.returncode == 143 and len(noted) == 2, "often enough"
    failed, noted = run(*words, **job, STATUS="1")
    assert failed.returncode == 1
    assert len(noted) == 2, "a run that fails by itself would fail again"


def test_slurm_signals_in_time():
    directives = [line for line in (LAUNCH / "slurm.sh").read_text().splitlines() if line.startswith("#SBATCH ")]
    assert directives == ["#SBATCH --signal=USR1@120", "#SBATCH --requeue", "#SBATCH --open-mode=append"]


@pytest.mark.parametrize(
    ("words", "tool"),
    [
        (["slurm.sh", "quickstart_tiny", "runs/x"], "srun"),
        (["tpu_pod.sh", "pod", "zone", "quickstart_tiny", "runs/x"], "gcloud"),
        (["tpu_pod.sh", "pod", "zone", "--setup"], "tar"),
        (["xpk.sh", "name", "cluster", "v5p-128", "1", "quickstart_tiny", "runs/x"], "xpk"),
    ],
)
def test_a_dry_form_prints_its_commands_and_runs_nothing(run, words, tool):
    result, noted = run(str(LAUNCH / words[0]), *words[1:], DRY="1", IMAGE="image")
    assert result.returncode == 0, result.stderr
    assert shlex.split(result.stdout.splitlines()[0])[0] == tool
    assert noted == []


def test_a_pod_runs_the_same_on_all_workers(run):
    _, noted = run(str(LAUNCH / "tpu_pod.sh"), "pod", "zone", "quickstart_tiny", "gs://b/a b", "--config.steps=3")
    (note,) = noted
    assert note["argv"][:-1] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=zone", "--worker=all"]
    words = shlex.split(note["argv"][-1].removeprefix("--command="))
    assert words[:3] == ["cd", "rljax", "&&"]
    flags = flags_of(["python", *words[4:]])
    assert flags == {"workdir": "gs://b/a b", "distributed": True, "fresh": False, "steps": 3}


def test_xpk_makes_a_workload_that_starts_again(run):
    words = ["run1", "cluster", "v5p-128", "2", "quickstart_tiny", "gs://b/a b", "--config.steps=3"]
    _, noted = run(str(LAUNCH / "xpk.sh"), *words, IMAGE="gcr.io/p/rljax")
    (note,) = noted
    options = dict(word.removeprefix("--").partition("=")[::2] for word in note["argv"][3:])
    assert note["argv"][:3] == ["xpk", "workload", "create"]
    inside = shlex.split(options.pop("command"))
    assert options == {
        "workload": "run1",
        "cluster": "cluster",
        "tpu-type": "v5p-128",
        "num-slices": "2",
        "docker-image": "gcr.io/p/rljax",
        "max-restarts": "100",
        "restart-on-exit-codes": "75",
        "termination-grace-period-seconds": "120",
    }
    assert inside[0] == "exec"
    flags = flags_of(["python", *inside[2:]])
    assert flags == {"workdir": "gs://b/a b", "distributed": True, "fresh": False, "steps": 3}
    assert parallel.on_cluster({"TPU_WORKER_HOSTNAMES": "a,b"}), "what GKE tells the hosts of a slice"

    refused, noted = run(str(LAUNCH / "xpk.sh"), *words)
    assert refused.returncode != 0 and "IMAGE" in refused.stderr and noted == []


@pytest.mark.parametrize("index", [0, 1])
def test_skypilot_gives_every_node_its_place(run, monkeypatch, index):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [143, 75]
    node = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": str(index)}
    given = {"CONFIG": "quickstart_tiny", "WORKDIR": "gs://b/x", "FLAGS": "--config.steps=3 --fresh"}
    result, (note,) = run("bash", "-c", task["run"], **task["envs"] | given | node)
    assert result.returncode == 0, result.stderr
    assert flags_of(note["argv"]) == {"workdir": "gs://b/x", "distributed": False, "fresh": True, "steps": 3}
    assert joined(monkeypatch, note["places"]) == ("10.0.0.1:9911", 2, index)

    # The status is that of the run, which SkyPilot's recovery goes by.
    assert run("bash", "-c", task["run"], **task["envs"] | given | node, STATUS="143")[0].returncode == 143
    refused, noted = run("bash", "-c", task["run"], **task["envs"] | node)
    assert refused.returncode != 0 and "WORKDIR" in refused.stderr and noted == []


@pytest.mark.parametrize("index", [0, 1])
def test_kubeflow_gives_every_pod_its_place(run, monkeypatch, index):
    runtime, job = yaml.safe_load_all((LAUNCH / "kubeflow.yaml").read_text())
    # The trainer knows its replicated job by this label, and the container by its name.
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    (container,) = node["template"]["spec"]["template"]["spec"]["containers"]
    assert node["name"] == container["name"] == "node"
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["runtimeRef"]["kind"] == runtime["kind"]

    trainer = job["spec"]["trainer"]
    variables = {one["name"]: one["value"] for one in trainer["env"]}
    pod = {
        "JAX_COORDINATOR_ADDRESS": "rljax-node-0-0.rljax:6666",
        "JAX_NUM_PROCESSES": str(trainer["numNodes"]),
        "JAX_PROCESS_ID": str(index),
    }
    given = {"CONFIG": "quickstart_tiny", "FLAGS": "--config.steps=3"}
    result, (note,) = run(*trainer["command"], **variables | given | pod)
    assert result.returncode == 0, result.stderr
    flags = flags_of(note["argv"])
    assert flags == {"workdir": "gs://bucket/runs/x", "distributed": False, "fresh": False, "steps": 3}
    assert joined(monkeypatch, note["places"]) == ("rljax-node-0-0.rljax:6666", 2, index)


def test_ray_gives_every_node_its_place(monkeypatch):
    words = [sys.executable, str(LAUNCH / "ray_job.py"), "--dry", "--nodes=2", "--gpus=8", "--"]
    flags = ["--config=quickstart_tiny", "--workdir=runs/a b", "--config.steps=3"]
    result = subprocess.run([*words, *flags], capture_output=True, text=True, env={**os.environ, "PYTHON": "python"})
    assert result.returncode == 0, result.stderr
    for index, line in enumerate(result.stdout.splitlines()):
        words = shlex.split(line)
        places = dict(word.split("=") for word in words[:3])
        assert joined(monkeypatch, places) == ("NODE0:PORT", 2, index)
        assert Path(words[4]) == LAUNCH / "train.py"
        found = flags_of(["python", "launch/train.py", *words[5:]])
        assert found == {"workdir": "runs/a b", "distributed": False, "fresh": False, "steps": 3}
    assert index == 1


def test_ray_that_is_not_there_is_named():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, "-S", str(LAUNCH / "ray_job.py"), "--nodes=1", "--", "--config=quickstart"]  # no packages
    result = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert result.stderr.endswith(f"error: {sys.executable} lacks ray: pip install 'rljax-lm[ray]'\n")


# Two processes of one program; the first time, the second of them is told to stop.
JOIN = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from rljax import parallel
several = parallel.initialize_distributed()
found = parallel.gather(os.environ["RLJAX_PROCESS_ID"])
Path({folder!r}, os.environ["RLJAX_PROCESS_ID"]).write_text(f"{{several}} {{found}}")
first = Path({folder!r}, "first")
if parallel.on_main(lambda: first.exists()):
    sys.exit(0)
parallel.barrier("both have looked")
first.touch()
sys.exit(143)
"""


@pytest.mark.slow
def test_ray_actors_join_one_program_and_begin_again(tmp_path):
    """`ray_job.py` with a command in place of the training: two actors are processes of one JAX program."""
    script = tmp_path / "join.py"
    script.write_text(JOIN.format(root=str(ROOT), folder=str(tmp_path)))
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} {script} "$@"\n')
    stand_in.chmod(0o755)

    words = [sys.executable, str(LAUNCH / "ray_job.py"), "--nodes=2", "--strategy=PACK", "--", "--config=none"]
    environment = {**os.environ, "PYTHON": str(stand_in), "JAX_PLATFORMS": "cpu", "RAY_DISABLE_IMPORT_WARNING": "1"}
    result = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("exit statuses")]
    assert lines == ["exit statuses of the nodes: [143, 143]", "exit statuses of the nodes: [0, 0]"]
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == "True ['0', '1']"
