"""The engines of a run: who gives them weights, sees that they speak with these, and waits for those that die."""

import contextlib
import dataclasses
import itertools
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable
from urllib.parse import urlsplit

import jax

from rljax.parallel import exchange, is_main_process, one_at_a_time
from rljax.rollouts.engines import keeper
from rljax.rollouts.engines.api import Said
from rljax.rollouts.engines.client import Engine, EngineFailed, Unreachable
from rljax.rollouts.engines.config import EnginesConfig
from rljax.rollouts.engines.sharing import Share, at
from rljax.tasks.workers import has_ended
from rljax.types import Params

_ATTEMPTS = 10  # at one request, behind each of which the engine was found to be well
_STARTS = 3  # of an engine that ends by itself, until it answers
_PAUSE_S = 0.1  # between two looks at an engine; each pause is longer, up to
_LONGEST_PAUSE_S = 2.0
_END_S = 20.0  # for an engine to end by itself

Export = Callable[[Path | None, Params], None]
"""Writes weights as a Hugging Face folder; of several processes all call it, and None is for those that write none."""

NAME = "engines"
"""Of the exchanges of fleets: one thread has them all."""


@runtime_checkable
class Probe(Protocol):
    """Compares what an engine says with what the trainer computes."""

    def set_params(self, params: Params) -> None:
        """The weights that engines should speak with. Not copied."""
        ...

    def gap(self, ask: Callable[[dict[str, Any]], Said]) -> float:
        """Mean difference of log-probs, in nats a token."""
        ...


class _Process(NamedTuple):
    """An engine that this run has started."""

    popen: "subprocess.Popen[bytes]"
    """Its keeper, which leads its process group."""
    line: socket.socket
    """When this closes, the keeper kills the group."""
    label: str
    """Of the weights that it was started on."""


def _started(command: Sequence[str], log: Path, label: str) -> _Process:
    """Starts an engine that does not outlive this process. Raises OSError if the command cannot be run."""
    ours, theirs = socket.socketpair()
    with theirs, log.open("ab") as output:
        popen = subprocess.Popen(
            [sys.executable, "-S", "-E", keeper.__file__, str(theirs.fileno()), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    said = ours.recv(4096)
    if said != keeper.STARTED:
        popen.wait()
        ours.close()
        raise OSError(said.decode() or "its keeper ended")
    return _Process(popen, ours, label)


class Fleet:
    """The engines of `config` that are this process's `share`, each given the weights of `hand_over`, which `export`
    writes and `probe` looks for. None has no other process. `config` of a fleet names those engines alone.

    A context manager: processes of `config.command` and the folder of weights are there within `with` only. All of it
    may be called from any thread, but `hand_over` while nothing is under way.
    """

    def __init__(self, config: EnginesConfig, export: Export, probe: Probe, *, bound: float, share: Share):
        self.config = dataclasses.replace(config, engines=tuple(config.engines[place] for place in share.engines))
        self.share = share
        self.bound = bound
        self.label = ""
        self.lost = 0
        self.resent = 0
        self.largest_gap = 0.0
        self.hand_over_s = 0.0
        self._export = export
        self._probe = probe
        self._engines = [Engine(address, timeout_s=config.request_s, key=config.key) for address in self.config.engines]
        self._locks = [threading.Lock() for _ in self._engines]
        self._count_lock = threading.Lock()
        self._processes: dict[int, _Process] = {}
        self._failure: EngineFailed | None = None
        self._is_closing = False
        self._given: list[Any] = []
        self._numbers = itertools.count()
        # So that no engine takes the weights of an earlier run for this one's.
        self._run = uuid.uuid4().hex[:8]
        # What all see, one writes.
        self._writes = is_main_process() or not config.weights
        self._folder: Path | None = None
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> "Fleet":
        self._is_closing = False
        self._failure = None
        if self.config.weights:
            # Engines that were started in another folder are told the same place.
            self._folder = Path(self.config.weights).expanduser().absolute()
            self._folder.mkdir(parents=True, exist_ok=True)
        else:
            self._folder = Path(self._opened.enter_context(tempfile.TemporaryDirectory(prefix="rljax-weights-")))
        return self

    def __exit__(self, *error: object) -> None:
        self._is_closing = True
        self.abandon()
        for index in list(self._processes):
            self._end(index)
        if self._folder is not None:
            self._remove_folders()
        self._opened.close()
        self._folder = None
        self._given = []

    def stats(self) -> dict[str, float]:
        """Metrics since the last call, without prefix."""
        found = {
            "engines_lost": float(self.lost),
            "resent_requests": float(self.resent),
            "probe_gap": self.largest_gap,
            "hand_over_s": self.hand_over_s,
        }
        self.lost = 0
        self.resent = 0
        self.largest_gap = 0.0
        self.hand_over_s = 0.0
        return found

    def hand_over(self, params: Params, version: int) -> None:
        """Gives all engines the weights of `version`, and returns when each says that it has them and speaks with them.
        The very arrays that were handed over last are only looked for: an evaluation has other ones under the number of
        a push. All processes come here together. Raises EngineFailed."""
        if self._folder is None:
            raise RuntimeError("the engines are closed; use them within `with actor:`")
        begin = time.perf_counter()
        # One label for all, as several may ask one engine; and none of them asks for older weights any more.
        self._run = exchange(NAME, self._run.encode())[0].decode()
        self._probe.set_params(params)
        given = jax.tree.leaves(params)
        is_new = len(given) != len(self._given) or any(a is not b for a, b in zip(given, self._given, strict=True))
        if is_new:
            self.label = f"{self._run}-{version}-{next(self._numbers)}"
            partial = self._folder / f"{self.label}.partial"
            self._export(partial if self._writes else None, params)
            if self._writes:
                partial.rename(self._folder / self.label)
            self._given = given
            exchange(NAME, b"written")

        with ThreadPoolExecutor(len(self._engines), thread_name_prefix="hand-over") as pool:
            try:
                list(pool.map(lambda i: self._give(i, is_new=is_new), range(len(self._engines))))
            except BaseException:
                # The others, which would go on waiting for their engines.
                self._failed("the hand-over was given up")
                self.abandon()
                raise
        # An engine that is started again reads the newest alone.
        self._remove_folders(but=self.label)
        self.hand_over_s += time.perf_counter() - begin

    def ask(self, index: int, body: Mapping[str, Any]) -> Said:
        """One completion of an engine. If it dies it is waited for and asked again. Raises EngineFailed."""
        error: Unreachable | None = None
        for attempt in range(_ATTEMPTS):
            self._check_going()
            try:
                return self._ask_once(index, body)
            except Unreachable as unreachable:
                error = unreachable
            self._check_going()
            with self._count_lock:
                self.resent += 1
            self._revive(index, error)
            time.sleep(min(_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S))
        raise self._failed(
            f"engine {self.config.engines[index]} did not answer a request {_ATTEMPTS} times, though it was well "
            f"before each of them; the last time: {error}"
        )

    def abandon(self) -> None:
        """Ends all requests under way."""
        for engine in self._engines:
            engine.abandon()

    def _ask_once(self, index: int, body: Mapping[str, Any]) -> Said:
        said = self._engines[index].generate(body)
        # An engine that was started again in between answers at once, with whatever it was started on.
        if said.version is not None and said.version != self.label:
            raise Unreachable(f"it speaks with the weights {said.version!r} instead of {self.label!r}")
        return said

    def _check_going(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._is_closing:
            raise EngineFailed("the run ends")

    def _failed(self, message: str) -> EngineFailed:
        """What all others are told too, who would wait as long again."""
        self._failure = self._failure or EngineFailed(message)
        return self._failure

    def _revive(self, index: int, error: Unreachable) -> None:
        """Waits for an engine that did not answer, and gives it the weights again if it has lost them."""
        with self._locks[index], self._alone_at(index):
            self._check_going()
            # Another thread, or process, may have waited for it meanwhile, or it was only busy.
            if self._engines[index].label() == self.label:
                return
            address = self.config.engines[index]
            logging.getLogger(__name__).warning("engine %s is lost (%s); waiting for it", address, error)
            with self._count_lock:
                self.lost += 1
            self._give_locked(index, is_new=True)
            logging.getLogger(__name__).warning("engine %s is back, and has its weights again", address)

    def _give(self, index: int, *, is_new: bool) -> None:
        with self._locks[index], self._alone_at(index):
            self._give_locked(index, is_new=is_new)

    def _alone_at(self, index: int) -> AbstractContextManager[None]:
        """Keeps other processes from giving the engine weights meanwhile: what one has brought to that, the next only
        looks at."""
        return contextlib.nullcontext() if self.share.is_alone else one_at_a_time(at(self.config.engines[index]))

    def _give_locked(self, index: int, *, is_new: bool) -> None:
        """Brings an engine to where it speaks with the weights of `label`, in `config.wait_s` seconds and one more try
        at most. Raises EngineFailed.

        Its lock is held while this waits for the network: whoever else asks the engine has nothing to do until then,
        and the end of the run waits for no lock.
        """
        engine = self._engines[index]
        deadline = time.monotonic() + self.config.wait_s
        if self.config.hand_over == "restart" and is_new:
            self._end(index)

        pause = _PAUSE_S
        starts = 0
        while True:
            self._check_going()
            try:
                starts += self._start_if_due(index, starts)
                gap = self._gap_with_weights(index)
                break
            except Unreachable as error:
                if time.monotonic() > deadline:
                    raise self._failed(
                        f"engine {engine.address} was waited for {self.config.wait_s:g} s (config.actor.wait_s) and "
                        f"could not be given weights: {error}; start it again, or name config.actor.command, which does"
                    ) from None
            except EngineFailed as error:
                raise self._failed(str(error)) from None

            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

        self.largest_gap = max(self.largest_gap, gap)
        if not gap <= self.bound:
            raise self._failed(
                f"engine {engine.address} says log-probs that are {gap:.3g} nats a token from the trainer's on "
                f"average, above config.actor.probe_bound={self.bound:g}: it has not loaded all of {self.label}, or "
                "samples or computes otherwise (vLLM: --logprobs-mode=processed_logprobs, --dtype); start it anew with "
                "each hand-over (config.actor.hand_over='restart'), or raise the bound if its dtype explains this"
            )

    def _gap_with_weights(self, index: int) -> float:
        """Gives an engine the weights of `label`, unless it has them, and probes it. Raises Unreachable and
        EngineFailed."""
        engine = self._engines[index]
        if not engine.is_healthy():
            raise Unreachable("it is not there")
        if engine.label() != self.label:
            self._load(index)
        if (label := engine.label()) != self.label:
            raise Unreachable(f"it says that it has the weights {label!r} instead of {self.label!r}")
        return self._probe.gap(lambda body: self._ask_once(index, body))

    def _load(self, index: int) -> None:
        """The weights into a healthy engine that has others."""
        engine = self._engines[index]
        assert self._folder is not None
        process = self._processes.get(index)
        # Of one that was started on this very folder only the label is missing.
        if process is not None and process.label == self.label:
            engine.set_label(self.label)
        elif self.config.hand_over == "restart":
            raise EngineFailed(
                f"engine {engine.address} was there before this run started it, and config.actor.hand_over='restart' "
                "reloads nothing; end that process"
            )
        else:
            engine.load(str(self._folder / self.label), self.label)

    def _start_if_due(self, index: int, starts: int) -> int:
        """Starts the engine's process where it is ours to start and does not run; 1 if it did."""
        if not self.config.command:
            return 0
        process = self._processes.get(index)
        if process is not None and not has_ended(process.popen):
            return 0
        # One that was left behind, or that the user started, holds the port.
        if process is None and self._engines[index].is_healthy():
            return 0

        # What it started may have outlived it, with the memory and the port that the next one needs.
        self._end(index)
        if starts >= _STARTS:
            assert process is not None
            raise EngineFailed(
                f"config.actor.command ended by itself {starts} times before engine {self.config.engines[index]} "
                f"answered, the last time with status {process.popen.returncode}; {self._last_said(index)}"
            )

        assert self._folder is not None
        url = urlsplit(self.config.engines[index])
        port = url.port or (443 if url.scheme == "https" else 80)
        words = [
            word.format(
                address=self.config.engines[index],
                host=url.hostname,
                port=port,
                weights=self._folder / self.label,
            )
            for word in shlex.split(self.config.command)
        ]
        try:
            self._processes[index] = _started(words, self._log(index), self.label)
        except OSError as error:
            raise EngineFailed(f"config.actor.command={self.config.command!r} cannot be run: {error}") from None
        if self._is_closing:  # the run ended in between, and may not have seen it
            self._end(index)
        return 1

    def _log(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"engine-{self.share.engines[index]}.log"

    def _last_said(self, index: int) -> str:
        """The last line of an engine's output, and where all of it is: a folder of our own ends with the run."""
        lines = self._log(index).read_text(errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        if self.config.weights:
            return f"it said last: {last[:300]}; all of its output is in {self._log(index)}"
        return f"it said last: {last[:300]}; name a folder config.actor.weights to keep all of its output"

    def _end(self, index: int) -> None:
        """Ends the engine's process and all that it started, if it is ours."""
        process = self._processes.pop(index, None)
        if process is None:
            return
        popen = process.popen
        deadline = time.monotonic() + _END_S
        _kill_group(popen, signal.SIGTERM)
        while not has_ended(popen) and time.monotonic() < deadline:
            time.sleep(_PAUSE_S)
        _kill_group(popen, signal.SIGKILL)
        popen.wait()
        process.line.close()

    def _remove_folders(self, but: str = "") -> None:
        """Removes the weights that this process has written; those of the label `but` stay."""
        assert self._folder is not None
        if not self._writes:
            return
        for path in self._folder.glob(f"{self._run}-*"):
            if path.is_dir() and path.name != but:
                shutil.rmtree(path, ignore_errors=True)


def _kill_group(popen: "subprocess.Popen[bytes]", number: int) -> None:
    """A server may have workers of its own. Until it is reaped, its id names its group and no other one."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, number)
