"""Sampled trees: fork columns as nodes, for credit (`topology`); where to fork next (`forks`)."""

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
    "Tree",
    "build_tree",
    "child_mean",
    "last_nodes",
    "leaf_mean",
    "match_owners",
    "on_tokens",
    "parent_values",
    "prefix_weights",
    "root_values",
    "token_leaf_counts",
    "token_mean",
]
