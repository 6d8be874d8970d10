"""Machines that are not here, for tests that compile for them."""

import jax
import pytest

from rljax.parallel import topology_devices


def machine(name: str) -> list[jax.Device]:
    """The devices of the machine `name`; the test is skipped where its compiler is not installed."""
    try:
        return topology_devices(name)
    except ValueError as error:
        if "pip install" not in str(error):
            raise
        pytest.skip(str(error))
