"""Minibatches in shapes, for what is compiled and not run."""

import numpy as np
from jax.sharding import Mesh

from rljax.batching import PackConfig, layout, loss_mask, stack
from rljax.experiment.dry_run import in_shapes
from rljax.experiment.sft import demonstration
from rljax.parallel import batch_parts
from rljax.types import TrainBatch


def full_minibatch(mesh: Mesh, *, microbatches: int, rows: int, length: int) -> TrainBatch:
    """`microbatches` of `rows` packed sequences, each one row of `length` tokens whose later half is scored, as
    `jax.ShapeDtypeStruct`s laid out on `mesh`. `rows` must be a multiple of the devices that split the batch."""
    ids = np.random.default_rng(0).integers(1, 256, (microbatches * rows, length)).tolist()
    half = length // 2
    batch = stack([demonstration(row[:half], row[half:], i, i) for i, row in enumerate(ids)], length_buckets=(length,))
    config = PackConfig(pack_length=length, microbatch_size=rows, share_prefixes=False, score_buckets=(half,))
    packing = layout(batch, loss_mask(batch), config, parts=batch_parts(mesh))
    return in_shapes(TrainBatch(packed=packing.packed, rows=packing.rows_to_score()), mesh)
