"""Compiled programs on disk, so that the next process does not compile them again."""

import hashlib
import os
import platform
from pathlib import Path

import jax

OFF = "off"
"""In place of a folder: nothing is kept."""


def keep_compiled(folder: str = "") -> str:
    """Keeps compiled programs in `folder`, and reads from it those that are there; returns the folder, "" for none.

    Empty is what the environment variable `JAX_COMPILATION_CACHE_DIR` names, else `rljax/programs` in the user's cache
    folder (`XDG_CACHE_HOME`, `~/.cache`), apart for each kind of CPU: a program for a CPU may use what another one
    lacks. `OFF` keeps nothing. Call it before anything is compiled.
    """
    if folder == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return ""

    folder = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if not folder:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = str(Path(home) / "rljax" / "programs" / _cpu())
    jax.config.update("jax_compilation_cache_dir", folder)
    return folder


def _cpu() -> str:
    """A name of this machine's kind of CPU."""
    features = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        # On x86 the line of features is called `flags`, on ARM `Features`.
        lines = info.read_text().splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), features)
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
