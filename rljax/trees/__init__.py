"""Forests: rows as unique tokens, for the forward pass (packing); fork columns as nodes, for credit (topology)."""

from rljax.trees.packing import Forest, SortedRows, build_forest, pad_rows, sort_rows, unique_tokens
from rljax.trees.topology import (
    NO_NODE,
    Tree,
    build_tree,
    child_mean,
    last_nodes,
    leaf_mean,
    match_owners,
    on_tokens,
    parent_values,
    prefix_weights,
    root_values,
    token_leaf_counts,
    token_mean,
)

__all__ = [
    "NO_NODE",
    "Forest",
    "SortedRows",
    "Tree",
    "build_forest",
    "build_tree",
    "child_mean",
    "last_nodes",
    "leaf_mean",
    "match_owners",
    "on_tokens",
    "pad_rows",
    "parent_values",
    "prefix_weights",
    "root_values",
    "sort_rows",
    "token_leaf_counts",
    "token_mean",
    "unique_tokens",
]
