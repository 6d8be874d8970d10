"""One thread that owns what says turns, so that any number of threads may ask it for turns. Host."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from rljax.rollouts.actor import TurnSource
from rljax.sampling import NO_STOPS, Stops, Turn, TurnResult, sampling_params
from rljax.types import Params

T = TypeVar("T")


UnderWay = Literal["call off", "begin anew", "wait for", "leave"]
"""What becomes of the turns under way when the decoder is told something: they are called off; they begin anew behind
it; they end before; or they are left alone, by what does not touch the decoder."""


class Interrupted(Exception):
    """The decoder was told something else before a turn was over."""


class Manner(NamedTuple):
    """How a turn is sampled, and what ends it. Turns of one manner are decoded together."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    step: int = 0
    stops: Stops = NO_STOPS

    def begin(self, decoder: TurnSource) -> None:
        sampling = sampling_params(
            self.temperature, self.top_k, self.top_p, self.min_p, logit_bias=dict(self.logit_bias)
        )
        decoder.set_stops(self.stops)
        decoder.begin(sampling, seed=self.seed, step=self.step)


@dataclass(eq=False)
class _TurnRequest:
    turn: Turn  # its conversation is chosen later
    manner: Manner | None
    future: "Future[tuple[TurnResult, int]]" = field(default_factory=Future)
    tokens: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = np.asarray(self.turn.tokens, np.int32)


@dataclass(eq=False)
class _Call:
    function: Callable[[TurnSource], Any]
    under_way: UnderWay
    future: "Future[Any]" = field(default_factory=Future)


class DecoderThread:
    """Decodes the turns of all threads together, and chooses the decoder's conversation for each.

    A turn goes on in the conversation that holds what it continues, else in the one unused for longest, where it begins
    with a copy of what another one has computed.
    """

    def __init__(self, decoder: TurnSource):
        self._decoder = decoder
        self.version = -1
        self._manner: Manner | None = None
        self._is_paused = False  # nothing runs while it is
        self._ending: _Call | None = None  # waits for what runs, and everything behind it waits too
        self._inbox: queue.SimpleQueue[_TurnRequest | _Call | None] = queue.SimpleQueue()
        self._waiting: deque[_TurnRequest] = deque()
        self._running: dict[int, _TurnRequest] = {}  # by conversation
        self._free = deque(range(decoder.spec.conversations))  # unused for longest first
        self._cached = [np.zeros(0, np.int32)] * decoder.spec.conversations  # ids, by conversation
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve, daemon=True, name="decoder")
        self._thread.start()

    def ask(self, turn: Turn, manner: Manner | None = None) -> "Future[tuple[TurnResult, int]]":
        """What comes of `turn`, in whatever conversation, and the version of the weights that say it. The future raises
        Interrupted if the turn was called off, or what the decoder raises.

        With `manner` the turn waits until no turn of another one runs; without, it is sampled as the decoder was told
        last.
        """
        request = _TurnRequest(turn, manner)
        self._put(request)
        return request.future

    def call(self, function: Callable[[TurnSource], T], under_way: UnderWay = "call off") -> T:
        """Runs `function(decoder)` between turns."""
        call = _Call(function, under_way)
        self._put(call)
        return call.future.result()

    def set_params(self, params: Params, version: int, under_way: UnderWay = "call off") -> None:
        """The weights to speak with from now on."""

        def change(decoder: TurnSource) -> None:
            decoder.set_params(params)
            self.version = version

        self.call(change, under_way)

    def pause(self, under_way: UnderWay) -> None:
        """Turns wait from now on, until `resume`."""
        self.call(lambda _: setattr(self, "_is_paused", True), under_way)

    def resume(self) -> None:
        """Turns go on."""
        self.call(lambda _: setattr(self, "_is_paused", False), "leave")

    @property
    def is_paused(self) -> bool:
        return self._is_paused

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
                if not self._take(wait=not self._has_work()):
                    return
                if not self._is_paused and self._ending is None:
                    self._admit()
                if self._decoder.num_open:
                    for result in self._decoder.run():
                        self._finish(result)
                if self._ending is not None and not self._running:
                    call = self._ending
                    self._ending = None
                    self._run_call(call)
            except Exception as error:  # of the device, say: all who wait must hear of it
                self._call_off(error)

    def _has_work(self) -> bool:
        waits = bool(self._waiting) and not self._is_paused
        return waits or self._ending is not None or self._decoder.num_open > 0

    def _take(self, *, wait: bool) -> bool:
        """Takes what has arrived; False at the end."""
        while self._ending is None and (wait or not self._inbox.empty()):
            item = self._inbox.get()
            wait = False
            if isinstance(item, _TurnRequest):
                self._waiting.append(item)
                continue
            if item is None:
                self._call_off(Interrupted("the endpoint is closed"))
                return False

            # A call may change the weights or the sampling, so no turn goes on across one.
            if item.under_way == "wait for":
                self._ending = item
                break
            if item.under_way == "call off":
                self._call_off(Interrupted("the weights or the sampling changed"))
            elif item.under_way == "begin anew":
                self._begin_anew()
            self._run_call(item)
        return True

    def _run_call(self, call: _Call) -> None:
        try:
            call.future.set_result(call.function(self._decoder))
        except BaseException as error:
            call.future.set_exception(error)

    def _begin_anew(self) -> None:
        """Turns under way wait again, before all others."""
        self._decoder.interrupt()
        self._free.extend(self._running)
        self._waiting.extendleft(reversed(self._running.values()))
        self._running.clear()

    def _admit(self) -> None:
        """Gives waiting turns to the decoder, as long as it has a free conversation."""
        while self._waiting and self._free:
            manner = self._waiting[0].manner
            if manner is not None and manner != self._manner:
                # In the order of arrival: turns of the manner that runs may not overtake, or others would wait forever.
                if self._running:
                    break
                self._begin(manner)
                continue
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
            prefix_of = source if common[source] else None
            turn = request.turn._replace(conversation=conversation, prefix_of=prefix_of)

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

    def _begin(self, manner: Manner) -> None:
        """Samples in another manner from now on. One that the decoder refuses costs the turns that want it."""
        try:
            manner.begin(self._decoder)
            self._manner = manner
        except ValueError as error:
            refused = [request for request in self._waiting if request.manner == manner]
            self._waiting = deque(request for request in self._waiting if request.manner != manner)
            for request in refused:
                request.future.set_exception(error)

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

        requests: list[_TurnRequest | _Call] = [*self._running.values(), *self._waiting]
        if self._ending is not None:
            requests.append(self._ending)
            self._ending = None
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
