"""Machines by name: their devices, to compile for where there are none, and what a device can do.

A TPU's compiler is libtpu, a GPU's is jax's CUDA plugin; both run on any Linux machine. Devices made here hold no
memory and run nothing: a mesh of them lowers and compiles.
"""

import dataclasses
import importlib.util
import math
import os
import re
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from rljax.parallel.compile_cache import OFF, keep_compiled

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device of a kind can do, by its vendor's data sheet; dense bfloat16."""

    flops: float
    """Floating-point operations a second of bfloat16 products."""
    bandwidth: float
    """Bytes a second of its memory."""
    memory: int
    """Bytes of its memory, before what the runtime keeps for itself."""
    links: float
    """Bytes a second that the others of a large machine can send it: over a TPU's links, or a GPU's network card."""
    kinds: tuple[str, ...]
    """Its names as `jax.Device.device_kind`."""
    clock: float = 0.0
    """Cycles a second of a TPU's core, in which its compiler estimates; 0 of others."""

    @property
    def is_gpu(self) -> bool:
        return self.kinds[0].startswith("NVIDIA")


CHIPS = {
    "v4": Chip(275e12, 1228e9, 32 * GIB, 300e9, ("TPU v4",), 1.05e9),
    "v5e": Chip(197e12, 819e9, 16 * GIB, 200e9, ("TPU v5 lite", "TPU v5e"), 1.5e9),
    "v5p": Chip(459e12, 2765e9, 95 * GIB, 600e9, ("TPU v5", "TPU v5p"), 1.75e9),
    "v6e": Chip(918e12, 1640e9, 32 * GIB, 400e9, ("TPU v6 lite", "TPU v6e"), 1.75e9),
    "h100": Chip(989e12, 3352e9, 84_929_347_584, 50e9, ("NVIDIA H100 80GB HBM3",)),
    "h200": Chip(989e12, 4800e9, 141_000_000_000, 50e9, ("NVIDIA H200",)),
}
"""By the name that a topology begins with."""

_NAME = re.compile(r"([a-z0-9]+):(\d+(?:x\d+)*)")
_TPU_AXES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
_GPUS_A_HOST = 8

# What the compiler is told of an H100 or H200 (SXM); compute capability 9.0, CUDA 12.
_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{kind}"
"""


_HOSTS = {2: {1: "1x1", 4: "2x2", 8: "2x4"}, 3: {4: "2x2x1"}}
"""By the number of axes of a pod: the shape of a host by its chips."""


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of the machine `name`, without hardware: `v5e:16x16`, `v5p:4x4x4` (chips by axis of the pod), or
    `h100:64` (GPUs, in hosts of 8).

    Compiled programs are not kept from here on (`keep_compiled`). ValueError of one line for a name that is none, a
    shape that such machines do not have, and a compiler that is not installed.
    """
    kind, sizes = _parse(name)
    devices = _gpus(name, kind, sizes[0]) if CHIPS[kind].is_gpu else _tpus(name, kind, sizes)
    if len(devices) != math.prod(sizes):
        raise ValueError(f"topology {name!r} has {len(devices)} devices with this compiler, not {math.prod(sizes)}")

    # A compiler without devices cannot read its programs back: each would be written, and warned of the next time.
    keep_compiled(OFF)
    return devices


def on_one_host(mesh: Mesh) -> Mesh:
    """`mesh`, whose devices are those of one host of a larger machine that is not here, on a machine of one such host:
    no compiler takes a part of a machine. ValueError for a part that is no host of its kind."""
    count = mesh.size
    kind = next((name for name, chip in CHIPS.items() if mesh.devices.flat[0].device_kind in chip.kinds), "")
    shapes = _HOSTS.get(_TPU_AXES.get(kind, 1), {})
    shape = shapes.get(count, "" if kind in _TPU_AXES else str(count))
    if not kind or not shape:
        raise ValueError(f"no host of {count} x {mesh.devices.flat[0].device_kind} is known, to plan its rollouts for")
    devices = np.array(topology_devices(f"{kind}:{shape}")).reshape(mesh.devices.shape)
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def chip_of(device: jax.Device) -> Chip | None:
    """What `device` can do; None for a kind that the table `CHIPS` lacks, such as a CPU."""
    return next((chip for chip in CHIPS.values() if device.device_kind in chip.kinds), None)


def _parse(name: str) -> tuple[str, tuple[int, ...]]:
    """("v5e", (16, 16)) of "v5e:16x16"."""
    found = _NAME.fullmatch(name)
    if found is None or found[1] not in CHIPS:
        raise ValueError(
            f"topology {name!r} is none; write chip:shape, e.g. v5e:16x16, v5p:4x4x4 or h100:64, with one of the "
            f"chips {', '.join(CHIPS)}"
        )

    kind = found[1]
    sizes = tuple(map(int, found[2].split("x")))
    axes = _TPU_AXES.get(kind, 1)
    if len(sizes) != axes or min(sizes) < 1:
        example = {1: f"{kind}:8", 2: f"{kind}:4x4", 3: f"{kind}:4x4x4"}[axes]
        raise ValueError(f"topology {name!r}: {kind} takes {axes} positive sizes, e.g. {example}")
    if CHIPS[kind].is_gpu and sizes[0] > _GPUS_A_HOST and sizes[0] % _GPUS_A_HOST:
        raise ValueError(f"topology {name!r}: more than {_GPUS_A_HOST} GPUs come in hosts of {_GPUS_A_HOST}")
    return kind, sizes


def _tpus(name: str, kind: str, sizes: tuple[int, ...]) -> list[jax.Device]:
    spec = importlib.util.find_spec("libtpu")
    if spec is None or spec.origin is None:
        raise ValueError(f"topology {name!r} needs the compiler for TPUs: pip install 'rljax-lm[aot-tpu]'")

    # Off Google Cloud the library would ask a metadata server that is not there, and wait for it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    # It guards a TPU against a second process; here there is none to guard.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_LIBRARY_PATH", str(Path(spec.origin).parent / "libtpu.so"))

    options: dict = {}
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    if kind == "v4":
        # A v4 chip is two cores that act as one device.
        options["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ValueError(f"topology {name!r}: {_first_line(error)}") from error


def _gpus(name: str, kind: str, count: int) -> list[jax.Device]:
    if not any(_is_installed(f"jax_plugins.xla_cuda{version}") for version in (12, 13)):
        raise ValueError(f"topology {name!r} needs the compiler for GPUs: pip install 'rljax-lm[aot-gpu]'")

    # JAX registers its plugins when it first looks for devices.
    jax.devices("cpu")
    chip = CHIPS[kind]
    target = _HOPPER.format(bandwidth=int(chip.bandwidth), memory=chip.memory, kind=chip.kinds[0])
    inside = min(count, _GPUS_A_HOST)
    shape = f"1x{count // inside}x{inside}"
    try:
        described = topologies.get_topology_desc(
            platform="cuda", topology_name=kind, target_config=target, topology=shape
        )
        return described.devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ValueError(f"topology {name!r}: {_first_line(error)}") from error


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
