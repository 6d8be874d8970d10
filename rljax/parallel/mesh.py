"""The device mesh: `data` x `fsdp` x `sequence` x `expert` x `tensor`."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

MESH_AXES = ("data", "fsdp", "sequence", "expert", "tensor")
"""From the axis whose devices speak least to each other to the one whose devices speak most."""


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    sequence: int = 1,
    expert: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over `devices` (all of them when None), with the axes of `MESH_AXES`.

    `data` replicates weights and splits the batch, `fsdp` splits both, `sequence` splits weights and the positions of
    packed sequences, `expert` splits experts, other weights and the batch, `tensor` splits heads, the MLP and the
    vocabulary. One size may be -1: what is left. Axis types are Auto: shardings are hints to the compiler, and code
    need not name them. Raises ValueError when the sizes do not
    multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "expert": expert, "tensor": tensor}
    count = jax.device_count() if devices is None else len(devices)
    described = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if wrong := [name for name, size in sizes.items() if size != -1 and size < 1]:
        raise ValueError(f"mesh {described}: {wrong[0]} must be at least 1, or -1 for what is left")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh {described}: only one size may be -1, not {' and '.join(free)}")

    fixed = math.prod(size for size in sizes.values() if size != -1)
    if count % fixed or (not free and fixed != count):
        remedy = f"choose sizes that multiply to {count}, or set one to -1 with the others dividing {count}"
        raise ValueError(
            f"mesh {described} needs {'a multiple of ' if free else ''}{fixed} devices, not {count}; {remedy}"
        )
    if free:
        sizes[free[0]] = count // fixed

    # jax.make_mesh orders devices so that neighbours on the mesh are near each other in the machine.
    return jax.make_mesh(
        tuple(sizes.values()),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=None if devices is None else tuple(devices),
    )


def decoding_mesh(mesh: Mesh) -> Mesh:
    """The same devices for decoding, which has no packed sequences to share: those along `sequence` split the batch, as
    those along `fsdp` do."""
    sizes = dict(mesh.shape)
    sizes["fsdp"] *= sizes["sequence"]
    sizes["sequence"] = 1
    return Mesh(mesh.devices.reshape(tuple(sizes.values())), mesh.axis_names, axis_types=mesh.axis_types)


def split_devices(devices: Sequence[jax.Device], beside: int) -> tuple[list[jax.Device], list[jax.Device]]:
    """Devices to train on, and those of this process to roll out on: of every process the last `beside`; with 0 all do
    both. ValueError where nothing is left to train on."""
    if not beside:
        return list(devices), list(devices)

    by_process: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    fewest = min(map(len, by_process.values()))
    if fewest <= beside:
        raise ValueError(
            f"devices={beside} leaves none of the {fewest} devices of a process to train on; take at most {fewest - 1}"
        )
    # Of devices to compile for, none need be of this process.
    own = by_process.get(jax.process_index(), by_process[min(by_process)])
    return [device for part in by_process.values() for device in part[:-beside]], own[-beside:]


def mesh_beside(mesh: Mesh, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh for decoding on other devices than those of `mesh`: weights split as there, as far as their number allows,
    and the batch over the rest."""
    tensor = math.gcd(len(devices), mesh.shape["tensor"])
    expert = math.gcd(len(devices) // tensor, mesh.shape["expert"])
    return make_mesh(data=1, fsdp=-1, tensor=tensor, expert=expert, devices=devices)


def num_processes(mesh: Mesh) -> int:
    """How many processes the devices of `mesh` belong to: also of devices that only a compiler knows."""
    return len({device.process_index for device in mesh.devices.flat})


def spread_mesh(mesh: Mesh) -> Mesh:
    """The devices of `mesh` in their order, as whole copies of a model along `data`, none of which lies in two
    processes: `tensor` is the largest divisor of that of `mesh` for which this is so, and `expert` likewise beside
    it."""
    devices = mesh.devices.reshape(-1)
    owners = np.array([device.process_index for device in devices])

    def is_within_processes(size: int) -> bool:
        by_copy = owners.reshape(-1, size)
        return bool((by_copy == by_copy[:, :1]).all())

    def most(axis: str, beside: int) -> int:
        whole = mesh.shape[axis]
        return max(n for n in range(1, whole + 1) if whole % n == 0 and is_within_processes(n * beside))

    tensor = most("tensor", 1)
    # Devices of a copy are neighbours: experts can lie on several only where `tensor` is whole.
    expert = most("expert", tensor) if tensor == mesh.shape["tensor"] else 1
    copies = devices.reshape(-1, 1, 1, expert, tensor)
    return Mesh(copies, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def own_mesh(mesh: Mesh, process: int | None = None) -> Mesh:
    """Those copies of `spread_mesh` that lie in one process (None: this one), for what it computes by itself.
    ValueError where it has none."""
    process = jax.process_index() if process is None else process
    copies = spread_mesh(mesh).devices
    own = copies[[row.flat[0].process_index == process for row in copies]]
    if not own.size:
        raise ValueError(f"process {process} has no device of the mesh {dict(mesh.shape)}")
    return Mesh(own, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def use_mesh(mesh: Mesh):
    """Context manager inside which `constrain` acts on `mesh`. Part of jit's cache key: a function traced inside and
    outside is compiled for each."""
    return jax.set_mesh(mesh)


def platform(mesh: Mesh | AbstractMesh | None = None) -> str:
    """What the devices of `mesh` are: "cpu", "gpu" or "tpu". None is the mesh in use (`use_mesh`), also while tracing;
    without one, or where it names no devices, the kind of device that JAX puts new arrays on."""
    device = _abstract_device(mesh)
    if device is not None:
        return device.platform

    default = jax.config.values["jax_default_device"]
    if isinstance(default, str):
        return default
    return (default or jax.local_devices()[0]).platform


def device_kind(mesh: Mesh | AbstractMesh | None = None) -> str:
    """The kind of the devices of `mesh` as `jax.Device.device_kind`, of the same mesh or device as `platform`."""
    device = _abstract_device(mesh)
    if device is not None:
        return device.device_kind

    default = jax.config.values["jax_default_device"]
    if isinstance(default, str):
        return jax.local_devices(backend=default)[0].device_kind
    return (default or jax.local_devices()[0]).device_kind


def _abstract_device(mesh: Mesh | AbstractMesh | None):
    """What a mesh, or the one in use, says of its devices; None where it names none."""
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
    return (mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh).abstract_device
