"""One thread that owns a `TurnDecoder`, so that any number of threads may ask it for turns. Host."""

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
class _TurnRequest:
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
    """Decodes the turns of all threads together, and chooses the decoder's conversation for each.

    A turn goes on in the conversation that holds what it continues, else in the one unused for longest, where it begins
    with a copy of what another one has computed.
    """

    def __init__(self, decoder: TurnDecoder):
        self._decoder = decoder
        self.version = -1
        self._inbox: queue.SimpleQueue[_TurnRequest | _Call | None] = queue.SimpleQueue()
        self._waiting: deque[_TurnRequest] = deque()
        self._running: dict[int, _TurnRequest] = {}  # by conversation
        self._free = deque(range(decoder.spec.conversations))  # unused for longest first
        self._cached = [np.zeros(0, np.int32)] * decoder.spec.conversations  # ids, by conversation
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve, daemon=True, name="decoder")
        self._thread.start()

    def ask(
        self, tokens: Sequence[int], *, prompt_id: int, sample_id: int, turn: int, limit: int
    ) -> "Future[tuple[TurnResult, int]]":
        """What comes behind `tokens`, and the version of the weights that say it. The future raises Interrupted if the
        turn was called off, or what the decoder raises."""
        request = _TurnRequest(np.asarray(tokens, np.int32), prompt_id, sample_id, turn, limit)
        self._put(request)
        return request.future

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

    def _put(self, item: _TurnRequest | _Call) -> None:
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
                    for result in self._decoder.run():
                        self._finish(result)
            except Exception as error:  # of the device, say: all who wait must hear of it
                self._call_off(error)

    def _take(self, *, wait: bool) -> bool:
        """Takes what has arrived; False at the end."""
        while wait or not self._inbox.empty():
            item = self._inbox.get()
            wait = False
            if isinstance(item, _TurnRequest):
                self._waiting.append(item)
                continue

            # A call may change the weights or the sampling, so no turn goes on across one.
            self._call_off(Interrupted("the weights or the sampling changed" if item else "the endpoint is closed"))
            if item is None:
                return False

            try:
                item.future.set_result(item.function(self._decoder))
            except BaseException as error:
                item.future.set_exception(error)
        return True

    def _admit(self) -> None:
        """Gives waiting turns to the decoder, as long as it has a free conversation."""
        while self._waiting and self._free:
            request = self._waiting.popleft()
            common = [_common_length(cached, request.tokens) for cached in self._cached]
            source = int(np.argmax(common))

            # A conversation grows at its end only: it can go on where all that it holds is part of the request.
            goes_on = source in self._free and 0 < common[source] == len(self._cached[source])
            conversation = source if goes_on else self._decoder.pick(self._free)
            # Of several that share as much, one of the same devices need not be sent.
            place = self._decoder.part_of(conversation)
            best = np.flatnonzero(np.equal(common, common[source])).tolist()
            source = next((x for x in best if self._decoder.part_of(x) == place), source)
            turn = Turn(
                conversation=conversation,
                tokens=request.tokens.tolist(),
                prompt_id=request.prompt_id,
                sample_id=request.sample_id,
                turn=request.turn,
                prefix_of=source if common[source] else None,
                max_new_tokens=request.limit,
            )

            # A turn that the decoder refuses costs its own request, not the thread that serves all others.
            try:
                self._decoder.submit(turn)
            except ValueError as error:
                request.future.set_exception(error)
                continue

            # At once, so that the next turn finds the prefix that this one is computing.
            self._free.remove(conversation)
            self._running[conversation] = request
            self._cached[conversation] = request.tokens

    def _finish(self, result: TurnResult) -> None:
        conversation = result.turn.conversation
        request = self._running.pop(conversation)
        self._free.append(conversation)
        self._cached[conversation] = np.concatenate([request.tokens, result.tokens])
        request.future.set_result((result, self.version))

    def _call_off(self, error: Exception) -> None:
        with contextlib.suppress(Exception):
            self._decoder.interrupt()

        # After a failure of the device nothing says what the cache holds.
        if not isinstance(error, Interrupted):
            self._decoder.forget()
            self._cached = [np.zeros(0, np.int32)] * self._decoder.spec.conversations

        requests = [*self._running.values(), *self._waiting]
        self._free.extend(self._running)
        self._running.clear()
        self._waiting.clear()
        for request in requests:
            request.future.set_exception(error)


def _common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many first entries are the same."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
