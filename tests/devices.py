"""Flags for programs that simulate several devices on the CPU."""

import os


def xla_flags(devices: int) -> str:
    """`XLA_FLAGS` for so many devices, beside those of this process: both compile at one optimization level."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
