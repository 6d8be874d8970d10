"""Bytes between the processes of a run, from host to host: no device takes part, so that it may run beside programs.

They go through the key-value store of JAX's coordination service, which process 0 keeps. Every byte of an answer leaves
that process once for each of the others, so it is for what a host makes, not for weights.
"""

import contextlib
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax._src import distributed

ROOT = "rljax"
"""What all keys begin with."""

FAILED = "failed"
"""The topic under which processes say that they end by an error."""

CHUNK = 2**20
"""Bytes of a value: larger ones make the service's messages slow."""

SLICE_S = 2.0
"""Seconds of one wait, between which is looked whether another process has failed, and signals are heard."""

_PAUSE_S = 0.05
"""Between two tries to be let in."""

TIMEOUT_S = 24 * 3600.0
"""Seconds that processes wait for each other at most, where no watchdog ends them before."""

_lock = threading.Lock()
_waiting = 0
_calls: dict[str, int] = {}
"""By name, how often `exchange` was called: keys are never used twice."""


def exchange(name: str, data: bytes, timeout_s: float = TIMEOUT_S) -> list[bytes]:
    """The `data` of every process, by process index, in every process. Waits for all of them.

    All processes make the same calls of one `name` in the same order, and no two threads share a name. RuntimeError
    when another process has failed; TimeoutError, which names who is missing, when it is longer behind than `timeout_s`
    seconds.
    """
    count = jax.process_count()
    if count == 1:
        return [data]

    call = _calls.get(name, 0)
    _calls[name] = call + 1
    here = f"{ROOT}/{name}/{call}"
    mine = jax.process_index()
    deadline = time.monotonic() + timeout_s

    with _is_waiting():
        if mine:
            _put(f"{here}/{mine}", data)
            return _split(_get(f"{here}/all", f"process 0 in {name}", deadline))

        # One process collects: with P processes that are 2 P messages, where each asking each would be P * P.
        others = [_get(f"{here}/{index}", f"process {index} in {name}", deadline) for index in range(1, count)]
        _put(f"{here}/all", _joined([data, *others]))
        # Who has come here has read the answer before.
        if call:
            client().key_value_delete(f"{ROOT}/{name}/{call - 1}/")
        return [data, *others]


def _get(key: str, who: str, deadline: float) -> bytes:
    first = _wait_for(f"{key}/0", who, deadline)
    (chunks,) = struct.unpack_from("<Q", first)
    rest = [_wait_for(f"{key}/{number}", who, deadline) for number in range(1, chunks)]
    return b"".join([first[8:], *rest])


def _wait_for(key: str, who: str, deadline: float) -> bytes:
    while True:
        try:
            return client().blocking_key_value_get_bytes(key, int(SLICE_S * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise RuntimeError(f"process 0, through which the others speak, does not answer: {error}") from None
        check_others()
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {jax.process_index()} has waited too long for {who}")


def check_others() -> None:
    """RuntimeError if another process has said that it failed."""
    for index, text in heard(FAILED).items():
        if index != jax.process_index():
            raise RuntimeError(f"process {index} failed: {text}")


def tell_failure(text: str) -> None:
    """Tells the other processes that this one ends, so that none waits for it. Raises nothing."""
    with contextlib.suppress(Exception):
        say_to_all(FAILED, text)


def say_to_all(topic: str, text: str) -> None:
    """Leaves a word under a topic, in place of the last one, for others to hear when they look. Nothing in a single
    process. RuntimeError where process 0 is gone."""
    if jax.process_count() > 1:
        client().key_value_set(f"{ROOT}/{topic}/{jax.process_index()}", text, allow_overwrite=True)


def heard(topic: str) -> dict[int, str]:
    """What processes have left under a topic, by process index, this one's own too; nobody waits."""
    if jax.process_count() == 1:
        return {}
    said = client().key_value_dir_get(f"{ROOT}/{topic}/")
    return {int(key.rsplit("/", 1)[1]): text for key, text in said}


@contextlib.contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Waits until no other process is within a block of this name, and keeps others out of it. Nothing in a single
    process. RuntimeError when another process has failed, whose block is never left."""
    if jax.process_count() == 1:
        yield
        return

    key = f"{ROOT}/one at a time/{name}"
    with _is_waiting():
        while not _is_first(key):
            check_others()
            time.sleep(_PAUSE_S)
    try:
        yield
    finally:
        client().key_value_delete(key)


def _is_first(key: str) -> bool:
    """Whether this process has set the key: of those that try, one does."""
    try:
        client().key_value_set(key, str(jax.process_index()))
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise RuntimeError(f"process 0, through which the others speak, does not answer: {error}") from None
        return False
    return True


def is_waiting() -> bool:
    """Whether a thread of this process waits in an `exchange` for other processes."""
    return _waiting > 0


@contextlib.contextmanager
def _is_waiting() -> Iterator[None]:
    global _waiting
    with _lock:
        _waiting += 1
    try:
        yield
    finally:
        with _lock:
            _waiting -= 1


def client() -> Any:
    """This process's line to the coordination service. There is one where there are several processes."""
    return distributed.global_state.client


def _put(key: str, data: bytes) -> None:
    """`data` under `key` in chunks, of which the first begins with their number."""
    framed = memoryview(struct.pack("<Q", max(1, -(-(len(data) + 8) // CHUNK))) + data)
    for number, start in enumerate(range(0, len(framed), CHUNK)):
        client().key_value_set_bytes(f"{key}/{number}", bytes(framed[start : start + CHUNK]))


def _joined(parts: Sequence[bytes]) -> bytes:
    sizes = struct.pack(f"<{len(parts) + 1}Q", len(parts), *map(len, parts))
    return b"".join([sizes, *parts])


def _split(data: bytes) -> list[bytes]:
    """The inverse of `_joined`."""
    (count,) = struct.unpack_from("<Q", data)
    sizes = struct.unpack_from(f"<{count}Q", data, 8)
    parts = []
    start = 8 * (count + 1)
    for size in sizes:
        parts.append(data[start : start + size])
        start += size
    return parts
