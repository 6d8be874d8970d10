"""Packed forests by the parent of each token, -1 for roots, in depth-first order."""

import numpy as np


def ends(parent, padding=0):
    """Where each subtree ends, 0 for padding behind."""
    end = np.arange(1, len(parent) + 1)
    for i in reversed(range(len(parent))):
        if parent[i] >= 0:
            end[parent[i]] = max(end[parent[i]], end[i])
    return np.concatenate([end, np.zeros(padding, int)]).astype(np.int32)


def path_to(parent, token):
    """From the root to the token."""
    path = [token]
    while parent[path[-1]] >= 0:
        path.append(parent[path[-1]])
    return path[::-1]


def random_parents(seed, count):
    """Of a forest in depth-first order: each token follows one on the path to the token before it, or begins a tree."""
    rng = np.random.default_rng(seed)
    parent = [-1]
    for token in range(1, count):
        path = path_to(parent, token - 1)
        parent.append(token - 1 if rng.random() < 0.7 else int(rng.choice([-1, *path])))
    return parent


def depths(parent, padding=0):
    """How many tokens stand before each one on its path, 0 for padding behind."""
    found = [len(path_to(parent, token)) - 1 for token in range(len(parent))]
    return np.array([*found, *[0] * padding], np.int32)
