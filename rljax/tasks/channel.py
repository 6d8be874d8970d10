"""Messages between this process and a worker process that runs code which may do anything.

Such code may fork, write to every descriptor that it finds, or hang halfway through a message. So what a worker sends
is data and never pickle, every message repeats the number of what it answers, and no read waits for the rest of a
message longer than it was told to.
"""

import contextlib
import json
import select
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

MOST_BYTES = 2**30
"""Of one message of a worker."""

_MARK = b"rljx"  # what is no message is known by its first bytes, without waiting for more
_HEAD = struct.Struct(">4sQ")
_CHUNK = 2**16


class Garbled(Exception):
    """What came is no message."""


class Channel:
    """One end of a stream socket, over which whole messages go. Several threads may send, or receive, but not both
    the same. `most_bytes` is the longest message that is taken in; None trusts the other end."""

    def __init__(self, end: socket.socket, most_bytes: int | None = MOST_BYTES):
        end.setblocking(False)
        self._socket = end
        self._most_bytes = most_bytes
        self._buffer = bytearray()

    def fileno(self) -> int:
        """For `select` and its like."""
        return self._socket.fileno()

    def end(self) -> None:
        """Tell the other end that nothing more comes; a thread that waits for its answer goes on waiting."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def send(self, message: bytes, timeout_s: float | None = None) -> None:
        """Send a message; None waits for as long as it takes. Raises OSError if the other end is gone, and
        TimeoutError, which is one, if it takes nothing in."""
        deadline = _deadline(timeout_s)
        rest = memoryview(_HEAD.pack(_MARK, len(message)) + message)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                if not self._wait(select.POLLOUT, deadline):
                    raise TimeoutError(f"the other end took no message in for {timeout_s:g} s") from None

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        """The next message; None if it is not there, as a whole, in time. Raises as `take`."""
        deadline = _deadline(timeout_s)
        while (message := self.take()) is None:
            if not self._wait(select.POLLIN, deadline):
                return None
        return message

    def take(self) -> bytes | None:
        """The next message if it has come as a whole, without waiting. Raises EOFError or OSError if the other end is
        gone, and `Garbled` for what is no message, or too long."""
        while (message := self._first()) is None:
            try:
                chunk = self._socket.recv(_CHUNK)
            except BlockingIOError:
                return None
            if not chunk:
                raise EOFError
            self._buffer += chunk
        return message

    def has_input(self) -> bool:
        """Whether anything is there to be read: a message, a part of one, or the end."""
        return bool(self._buffer) or self._wait(select.POLLIN, time.monotonic())

    def _first(self) -> bytes | None:
        """Takes the first message out of the buffer, if it is there as a whole."""
        buffer = self._buffer
        if not _MARK.startswith(buffer[: len(_MARK)]):
            raise Garbled(f"it begins with {bytes(buffer[:16])!r}")
        if len(buffer) < _HEAD.size:
            return None

        _, length = _HEAD.unpack_from(buffer)
        if self._most_bytes is not None and length > self._most_bytes:
            raise Garbled(f"it claims to have {length} bytes; the most is {self._most_bytes}")
        end = _HEAD.size + length
        if len(buffer) < end:
            return None

        message = bytes(buffer[_HEAD.size : end])
        del buffer[:end]
        return message

    def _wait(self, event: int, deadline: float | None) -> bool:
        """Whether `event` came before the deadline; the end of the other side is one too."""
        descriptor = self._socket.fileno()
        if descriptor < 0:
            raise OSError("this end is closed")
        poller = select.poll()
        poller.register(descriptor, event)
        rest = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        return bool(poller.poll(rest))


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s


def write_data(*values: Any) -> bytes:
    """Values as JSON that `read_data` turns into the same: None, booleans, numbers and text, and lists, tuples, sets
    and mappings of such. Subclasses of these, such as scalars of numpy, arrive as what they are a kind of.

    Raises TypeError for anything else.
    """
    return json.dumps([_plain(value) for value in values]).encode("ascii")


def read_data(message: bytes) -> list[Any]:
    """What `write_data` wrote, of whoever wrote it. Raises `Garbled` for anything else."""
    with contextlib.suppress(ValueError, TypeError, RecursionError, MemoryError):
        values = json.loads(message.decode("ascii"))
        if isinstance(values, list):
            return [_rich(value) for value in values]
    raise Garbled(f"it is no data: {message[:60]!r}")


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    # JSON has neither these nor keys that are no text, so an object names its kind
    if isinstance(value, tuple):
        return {"tuple": [_plain(item) for item in value]}
    if isinstance(value, (set, frozenset)):
        return {"set": [_plain(item) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": [[_plain(key), _plain(item)] for key, item in value.items()]}
    raise TypeError(f"{value!r:.100} of type {type(value).__name__} is no plain data")


def _rich(value: Any) -> Any:
    if isinstance(value, list):
        return [_rich(item) for item in value]
    if not isinstance(value, dict):
        return value

    ((kind, items),) = value.items()
    match kind:
        case "tuple":
            return tuple(_rich(item) for item in items)
        case "set":
            return {_rich(item) for item in items}
        case "dict":
            return {_rich(key): _rich(item) for key, item in items}
    raise ValueError(kind)
