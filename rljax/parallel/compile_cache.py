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
    lacks. `OFF` keeps nothing, nor does empty for a user without a home. Call it before anything is compiled.

    Of the processes of a run the first writes and all read, so that one folder for all hosts serves all. One that
    cannot be written costs a warning and is done without.
    """
    if folder == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return ""

    folder = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if not folder:
        home = _user_cache()
        if home is None:
            return keep_compiled(OFF)
        folder = str(home / "rljax" / "programs" / _cpu())
    jax.config.update("jax_compilation_cache_dir", folder)
    return folder


def _user_cache() -> Path | None:
    """The user's cache folder; None where there is no home, as in a container under a user that it does not know."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return None


def _cpu() -> str:
    """A name of this machine's kind of CPU."""
    features = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        # On x86 the line of features is called `flags`, on ARM `Features`.
        lines = info.read_text().splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), features)
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
