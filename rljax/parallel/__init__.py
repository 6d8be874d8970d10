"""Mesh, sharding rules and multi-host helpers."""

from rljax.parallel.distributed import barrier, broadcast, gather, initialize, is_main_process, on_cluster, to_host
from rljax.parallel.mesh import MESH_AXES, make_mesh, use_mesh
from rljax.parallel.sharding import (
    DECODE_RULES,
    RULES,
    AnyMesh,
    Rules,
    batch_parts,
    batch_sharding,
    constrain,
    named_sharding,
    partition_spec,
    put_batch,
    put_host,
    replicated,
    reshard,
    shardings,
)

__all__ = [
    "DECODE_RULES",
    "MESH_AXES",
    "RULES",
    "AnyMesh",
    "Rules",
    "barrier",
    "batch_parts",
    "batch_sharding",
    "broadcast",
    "constrain",
    "gather",
    "initialize",
    "is_main_process",
    "make_mesh",
    "named_sharding",
    "on_cluster",
    "partition_spec",
    "put_batch",
    "put_host",
    "replicated",
    "reshard",
    "shardings",
    "to_host",
    "use_mesh",
]
