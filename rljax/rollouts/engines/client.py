"""One engine over HTTP: what is asked of it, and which of its failures are worth waiting for."""

import contextlib
import hashlib
import http.client
import json
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode, urlsplit

from rljax.rollouts.engines.api import Said, read_answer

# Statuses after which the same request may be answered: an engine that is busy, paused, starting or ending.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_HEALTH_S = 5.0


class EngineFailed(RuntimeError):
    """An engine that a run cannot go on with; the message is one line."""


class Unreachable(Exception):
    """An engine did not answer, or not with what was asked for: it may be gone, or busy."""


class Engine:
    """Speaks with the engine at `address`, such as `http://host:8000`, from any number of threads.

    A request fails after `timeout_s` seconds without an answer. `key` is sent as a bearer token, unless it is empty.
    """

    def __init__(self, address: str, *, timeout_s: float, key: str = ""):
        self.address = address.rstrip("/")
        self.timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._lock = threading.Lock()
        self._open: set[http.client.HTTPConnection] = set()

    def generate(self, body: Mapping[str, Any]) -> Said:
        """One completion. Raises Unreachable, also for one that the engine gave up, and EngineFailed where it refuses
        the request."""
        answer = self.post("/inference/v1/generate", body)
        try:
            said = read_answer(answer)
        except ValueError as error:
            raise EngineFailed(f"engine {self.address}: {error}; is it of another version?") from error
        if said.finish_reason == "abort":
            raise Unreachable("it gave the request up")
        return said

    def load(self, folder: str, label: str) -> None:
        """Other weights, in place, under a label that answers repeat. What older ones have computed is forgotten.

        The label comes last: an engine that has it is ready, and one that was lost on the way begins from the start.
        """
        self.post("/pause", None, {"mode": "abort", "clear_cache": "true"})
        self.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        self.post("/reset_prefix_cache", None)
        self.post("/resume", None)
        self.set_label(label)

    def set_label(self, label: str) -> None:
        """Of the weights that it has."""
        self.post("/update_weight_version", {"new_version": label})

    def label(self) -> str | None:
        """Of its weights; None where it does not answer."""
        try:
            value = self._ask("GET", "/weight_info", None, _HEALTH_S)
        except Unreachable:
            return None
        return value.get("weight_version") if isinstance(value, dict) else None

    def is_healthy(self) -> bool:
        """Whether it is there and answers."""
        try:
            self._ask("GET", "/health", None, _HEALTH_S)
        except (Unreachable, EngineFailed):
            return False
        return True

    def post(self, path: str, body: Any, query: Mapping[str, str] | None = None) -> Any:
        """The JSON value of the answer; None for an empty one."""
        return self._ask("POST", f"{path}?{urlencode(query)}" if query else path, body, self.timeout_s)

    def abandon(self) -> None:
        """Ends all requests under way: they raise Unreachable."""
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            # The thread that asks may close it meanwhile.
            opened = connection.sock
            if opened is not None:
                with contextlib.suppress(OSError):
                    opened.shutdown(socket.SHUT_RDWR)

    def _ask(self, method: str, target: str, body: Any, timeout_s: float) -> Any:
        url = urlsplit(self.address)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.hostname or "", url.port, timeout=timeout_s)
        with self._lock:
            self._open.add(connection)
        try:
            payload = None if body is None else json.dumps(body).encode()
            if method == "POST" and payload is None:
                payload = b""
            connection.request(method, f"{url.path}{target}", payload, self._headers)
            answer = connection.getresponse()
            status = answer.status
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

        if status in _PASSING:
            raise Unreachable(f"status {status}: {_said(content)}")
        if status != 200:
            raise EngineFailed(
                f"engine {self.address} refuses {method} {target.partition('?')[0]} with status {status}: "
                f"{_said(content)}{_remedy(status, target)}"
            )
        try:
            return json.loads(content) if content else None
        except ValueError as error:
            raise Unreachable(f"an answer that is no JSON: {_said(content)}") from error


def _said(content: bytes) -> str:
    """What an answer says is wrong, in one line."""
    text = content.decode("utf-8", "replace")
    try:
        value = json.loads(text)
        value = value.get("error", value) if isinstance(value, dict) else value
        text = str(value.get("message", value) if isinstance(value, dict) else value)
    except ValueError:
        pass
    return " ".join(text.split())[:500]


def _remedy(status: int, target: str) -> str:
    if status == 404 and target.startswith("/inference"):
        return "; start vLLM with --enable-scale-out"
    if status == 404:
        return "; start vLLM with VLLM_SERVER_DEV_MODE=1"
    if status == 401:
        return "; put its key into the environment variable that config.actor.key_variable names"
    return ""


def assign(names: Sequence[int], engines: Sequence[str]) -> list[int]:
    """An engine for each of `names` (ids of prompts), as an index: by rendezvous hashing, so that a name goes to the
    same engine each time, and with one engine fewer only what it had goes elsewhere; but to none more than an equal
    share, rounded up, for which the next best is taken (bounded loads, 1608.01350)."""
    most = -(-len(names) // len(engines))
    loads = [0] * len(engines)
    chosen = []
    for name in names:
        best = next(i for i in prefer(name, engines) if loads[i] < most)
        loads[best] += 1
        chosen.append(best)
    return chosen


def prefer(name: int, engines: Sequence[str]) -> list[int]:
    """Indices of `engines` in the order in which rendezvous hashing has `name` prefer them."""
    return sorted(range(len(engines)), key=lambda i: _weight(name, engines[i]), reverse=True)


def _weight(name: int, engine: str) -> bytes:
    return hashlib.sha256(f"{engine} {name}".encode()).digest()
