"""Environments and tools that a policy acts in. Nothing here imports jax."""

__all__: list[str] = []
