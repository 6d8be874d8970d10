"""Mesh, sharding rules and multi-host helpers."""

from rljax.parallel.sharding import constrain

__all__ = ["constrain"]
