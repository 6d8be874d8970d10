"""Reinforcement learning of language models in JAX."""

from rljax.moved import install

install()
del install
