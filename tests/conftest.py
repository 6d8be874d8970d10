"""Tests run on the CPU, offline, and share compiled programs through the persistent cache."""

import ctypes
import gc
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Most of the suite's time is XLA's backend at work on programs that run once or twice, on arrays of a few hundred
# numbers. `make test-slow` compiles as in production.
# `-n` has a worker for every core, so that threads of one would only wait for each other.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

# Where in the sources each operation of a program stands is a tenth of the time to trace and lower it.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS", "0")

import jax
import pytest

COSTLY = (
    "test_agent_demo",
    "test_algorithms_conformance",
    "test_algorithms_forest",
    "test_algorithms_ppo",
    "test_analysis_",
    "test_benchmarks_smoke",
    "test_composability",
    "test_configs_agents",
    "test_docs_code",
    "test_docs_first_run",
    "test_docs_papers",
    "test_docs_site",
    "test_envs_ray",
    "test_envs_sandbox",
    "test_cli_command_line",
    "test_models_attention_kernel",
    "test_models_parity",
    "test_open_columns",
    "test_parallel_distributed",
    "test_parallel_mesh",
    "test_rollouts_",
    "test_run_",
    "test_sampling_",
    "test_training_",
)
"""Files, by how their names begin, that train runs, start programs with JAX or compile a matrix of programs: what
`make test-fast` leaves out, and what `make test` runs without checks of array annotations."""

gc.disable()  # imports allocate much and free nothing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Costly files come first, so that no worker is left alone with one at the end."""
    for item in items:
        if item.path.stem.startswith(COSTLY):
            item.add_marker("costly")
    items.sort(key=lambda item: item.get_closest_marker("costly") is None)


def pytest_collection_finish() -> None:
    """What imports have made stays, so the collector need not look at it again; tracing makes many objects that live
    for long, so it looks less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    gc.enable()


MOST_BYTES = 2 * 2**30
"""Memory of a process from which on the programs of files that are done are dropped."""


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Files hardly share programs, and all of them together take several gigabytes per process."""
    yield
    pages = pathlib.Path("/proc/self/statm")
    if not pages.exists() or int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") < MOST_BYTES:
        return
    jax.clear_caches()
    gc.collect()
    # The allocator keeps what is freed, unless told otherwise.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
