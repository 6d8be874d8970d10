"""From ragged trajectories to the fixed shapes that are compiled. Host, numpy.

`stack` pads trajectories into a `RolloutBatch`, `pack` lays the rows of a minibatch out as forests of unique tokens.
"""

from rljax.batching.config import PackConfig
from rljax.batching.forest import Forest, SortedRows, build_forest, pad_rows, sort_rows, unique_tokens
from rljax.batching.pack import Packing, emptied, layout, loss_mask, masked, pack
from rljax.batching.rows import bare_rows, dense_rows, gather, ragged_rows, spread
from rljax.batching.sizes import Sizes, likely_sizes
from rljax.batching.stack import LENGTH_BUCKETS, ROW_BUCKETS, bucket, stack, take_rows

__all__ = [
    "LENGTH_BUCKETS",
    "ROW_BUCKETS",
    "Forest",
    "PackConfig",
    "Packing",
    "Sizes",
    "SortedRows",
    "bare_rows",
    "bucket",
    "build_forest",
    "dense_rows",
    "emptied",
    "gather",
    "layout",
    "likely_sizes",
    "loss_mask",
    "masked",
    "pack",
    "pad_rows",
    "ragged_rows",
    "sort_rows",
    "spread",
    "stack",
    "take_rows",
    "unique_tokens",
]
