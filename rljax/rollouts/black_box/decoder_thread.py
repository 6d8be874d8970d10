"""One thread that owns a decoder for conversations, so that any number of threads may ask it to speak. Host."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from rljax.sampling import Turn, TurnDecoder, TurnResult
from rljax.types import Params

T = TypeVar("T")


class Interrupted(Exception):
    """The decoder was told something else before a turn was over."""


@dataclass(eq=False)
class _Ask:
    tokens: np.ndarray
    prompt_id: int
    sample_id: int
    turn: int
    limit: int
    future: "Future[tuple[TurnResult, int]]" = field(default_factory=Future)


@dataclass(eq=False)
class _Call:
    function: Callable[[TurnDecoder], Any]
    future: "Future[Any]" = field(default_factory=Future)


class DecoderThread:
    """Turns from any thread are decoded together; contexts are given to conversations as they come.

    A turn goes on in the context that holds what it continues, else in the one unused for longest, where it begins with
    a copy of what another one has computed.
    """

    def __init__(self, decoder: TurnDecoder):
        self._decoder, self.version = decoder, -1
        self._inbox: queue.SimpleQueue[_Ask | _Call | None] = queue.SimpleQueue()
        self._waiting: deque[_Ask] = deque()
        self._running: dict[int, _Ask] = {}  # by context
        self._free = deque(range(decoder.spec.conversations))  # unused for longest first
        self._holds = [np.zeros(0, np.int32)] * decoder.spec.conversations
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve, daemon=True, name="decoder")
        self._thread.start()

    def ask(
        self, tokens: Sequence[int], *, prompt_id: int, sample_id: int, turn: int, limit: int
    ) -> "Future[tuple[TurnResult, int]]":
        """What comes behind `tokens`, and the version of the weights that say it. The future raises Interrupted if the
        turn was called off, or what the decoder raises."""
        ask = _Ask(np.asarray(tokens, np.int32), prompt_id, sample_id, turn, limit)
        self._put(ask)
        return ask.future

    def call(self, function: Callable[[TurnDecoder], T]) -> T:
        """Runs `function(decoder)` between turns; those under way are called off."""
        call = _Call(function)
        self._put(call)
        return call.future.result()

    def set_params(self, params: Params, version: int) -> None:
        """The weights to speak with from now on; turns under way are called off."""

        def change(decoder: TurnDecoder) -> None:
            decoder.set_params(params)
            self.version = version

        self.call(change)

    def close(self) -> None:
        """Calls off all turns and ends the thread; the decoder can be used again."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._inbox.put(None)
        self._thread.join()

    def _put(self, item: _Ask | _Call) -> None:
        with self._lock:
            if self._is_closed:
                raise Interrupted("the endpoint is closed")
            self._inbox.put(item)

    def _serve(self) -> None:
        while True:
            try:
                if not self._take(wait=not self._waiting and not self._decoder.num_open):
                    return
                self._admit()
                if self._decoder.num_open:
                    for spoken in self._decoder.run():
                        self._spoken(spoken)
            except Exception as error:  # of the device, say: all who wait must hear of it
                self._call_off(error)

    def _take(self, *, wait: bool) -> bool:
        """Takes what has arrived; False at the end."""
        while wait or not self._inbox.empty():
            item, wait = self._inbox.get(), False
            if isinstance(item, _Ask):
                self._waiting.append(item)
                continue
            self._call_off(Interrupted("the weights or the sampling changed" if item else "the endpoint is closed"))
            if item is None:
                return False
            try:
                item.future.set_result(item.function(self._decoder))
            except BaseException as error:
                item.future.set_exception(error)
        return True

    def _admit(self) -> None:
        while self._waiting and self._free:
            ask = self._waiting.popleft()
            common = [_common(held, ask.tokens) for held in self._holds]
            source = int(np.argmax(common))
            goes_on = source in self._free and 0 < common[source] == len(self._holds[source])
            context = source if goes_on else self._free[0]
            turn = Turn(
                context,
                ask.tokens.tolist(),
                ask.prompt_id,
                ask.sample_id,
                ask.turn,
                source if common[source] else None,
                ask.limit,
            )
            try:
                self._decoder.submit(turn)
            except ValueError as error:
                ask.future.set_exception(error)
                continue
            self._free.remove(context)
            self._running[context], self._holds[context] = ask, ask.tokens

    def _spoken(self, spoken: TurnResult) -> None:
        context = spoken.turn.conversation
        ask = self._running.pop(context)
        self._free.append(context)
        self._holds[context] = np.concatenate([ask.tokens, spoken.tokens])
        ask.future.set_result((spoken, self.version))

    def _call_off(self, error: Exception) -> None:
        with contextlib.suppress(Exception):
            self._decoder.interrupt()
        if not isinstance(error, Interrupted):
            self._decoder.forget()
            self._holds = [np.zeros(0, np.int32)] * self._decoder.spec.conversations
        asks = [*self._running.values(), *self._waiting]
        self._free.extend(self._running)
        self._running.clear()
        self._waiting.clear()
        for ask in asks:
            ask.future.set_exception(error)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many first entries are the same."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
