"""What a `TurnDecoder` makes of turns, made by engines: each turn is a request of its own."""

import queue
import time
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from rljax.models import DecoderConfig
from rljax.rollouts.engines.api import Said, write_request
from rljax.rollouts.engines.client import prefer
from rljax.rollouts.engines.endings import Endings
from rljax.rollouts.engines.fleet import Fleet
from rljax.rollouts.engines.remote_sampler import refuse_penalties, seed_of, told_strings, written_sampling
from rljax.sampling import SamplingParams, Stops, Turn, TurnDecoderSpec, TurnResult
from rljax.sampling.turns import MOST_TURNS
from rljax.types import Params

LOOK_S = 0.005
"""Seconds for which `run` waits for a turn to end: whoever runs it has other things to look for."""


class RemoteTurnDecoder:
    """Decodes turns with the engines of `fleet`, as `spec` says how many and how long. Tokens are those of a
    `TurnDecoder` of the same weights, if engines draw the same random numbers (`engine` rljax), and depend on the same
    things.

    Keys and values are the engines' own business: a turn's request holds all of its conversation, and turns of one
    prompt go to one engine, which finds what it has computed. `stops` as for a `TurnDecoder`. The fleet must be open.
    Not safe for several threads.
    """

    parts = 1

    def __init__(self, fleet: Fleet, config: DecoderConfig, spec: TurnDecoderSpec, stops: Stops):
        stops.check(config)
        self.fleet = fleet
        self.config = config
        self.spec = spec
        self.stats: dict[str, float] = {}
        self._stops = stops
        self._endings = Endings(stops, config.num_ids)
        self._sampling: SamplingParams | None = None
        self._seed = 0
        self._step = 0
        self._hand_overs = 0
        # The engine of each prompt of this step, by id.
        self._places: dict[int, int] = {}
        self._pools: list[ThreadPoolExecutor] = []
        self._running: dict[Future[Said], Turn] = {}
        self._over: queue.SimpleQueue[Future[Said]] = queue.SimpleQueue()
        self._count_anew()

    def close(self) -> None:
        """Gives up what is under way. The fleet must have ended, or been told to abandon its requests."""
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        self._pools = []
        self._running = {}
        self._over = queue.SimpleQueue()

    def set_params(self, params: Params, *, keep: Collection[int] = ()) -> None:
        """Returns when every engine speaks with these weights. Raises EngineFailed where one cannot be brought to that,
        and RuntimeError while turns are under way. Nothing of older weights is kept."""
        if self.num_open:
            raise RuntimeError(f"{self.num_open} turns are under way with the old weights; interrupt them first")
        self.fleet.hand_over(params, self._hand_overs)
        self._hand_overs += 1

    def begin(self, sampling: SamplingParams, *, seed: int, step: int) -> None:
        """How turns are sampled from now on; clears `stats`. (seed, step) enter the random numbers. ValueError for
        penalties."""
        refuse_penalties(sampling)
        if step != self._step:
            self._places = {}
        self._sampling = sampling
        self._seed = seed
        self._step = step
        self._count_anew()

    def set_stops(self, stops: Stops) -> None:
        """What ends turns from now on. Raises RuntimeError while turns are under way, and ValueError for a token that
        the model does not know."""
        if self.num_open:
            raise RuntimeError(f"{self.num_open} turns are under way; interrupt them first")
        stops.check(self.config)
        self._stops = stops
        self._endings = Endings(stops, self.config.num_ids)

    def forget(self, *, keep: Collection[int] = ()) -> None:
        """Nothing is kept here; engines compute anew what other weights have computed."""

    def pick(self, free: Sequence[int], near: int | None = None) -> int:
        """The first of the conversations `free`."""
        return free[0]

    def part_of(self, conversation: int) -> int:
        """0: no conversation lies nearer than another."""
        return 0

    def cache_bytes(self) -> int:
        """0: the engines' memory is their own."""
        return 0

    @property
    def finds_strings(self) -> bool:
        return self._endings.finds_strings

    @property
    def num_open(self) -> int:
        """Turns under way."""
        return len(self._running)

    def submit(self, turn: Turn) -> None:
        """Asks an engine for a turn. Raises ValueError for one that cannot be served."""
        if turn.suppress:
            raise ValueError(f"conversation {turn.conversation}: no token can be suppressed at engines")
        if turn.grammar is not None:
            raise ValueError(
                f"conversation {turn.conversation}: engines follow no grammar, and {turn.grammar.name!r:.80} was "
                "given; leave it out, or sample in this process"
            )
        if self._limit(turn) < 1:
            raise ValueError(
                f"conversation {turn.conversation}: {len(turn.tokens)} tokens leave no room for a new one within "
                f"context_length={self.spec.context_length}"
            )
        assert self._sampling is not None, "call begin(sampling, seed=..., step=...) first"
        if not self._pools:
            connections = self.fleet.config.connections
            self._pools = [
                ThreadPoolExecutor(connections, thread_name_prefix=f"engine-{i}")
                for i in range(len(self.fleet.config.engines))
            ]

        place = self._place_of(turn.prompt_id)
        future = self._pools[place].submit(self.fleet.ask, place, self._body(turn, self._sampling))
        self._running[future] = turn
        # A worker's thread only reports.
        future.add_done_callback(self._over.put)

    def run(self) -> list[TurnResult]:
        """Turns that have ended, after a wait of at most `LOOK_S` seconds for the first of them. Raises EngineFailed
        for an engine that the run cannot go on with."""
        begin = time.perf_counter()
        results = []
        try:
            results.append(self._result(self._over.get(timeout=LOOK_S)))
            while True:
                results.append(self._result(self._over.get_nowait()))
        except queue.Empty:
            pass
        self.stats["seconds"] += time.perf_counter() - begin
        return results

    def interrupt(self, *, keep: bool = False) -> list[TurnResult]:
        """Waits for all turns under way, so that none is said by two weights: one that was broken off and drawn again
        would favour short turns."""
        results = []
        while self._running:
            results += self.run()
        return results

    def _place_of(self, prompt_id: int) -> int:
        """The engine of a prompt: the one that it prefers, of those with no more prompts than their share."""
        if prompt_id not in self._places:
            engines = self.fleet.config.engines
            loads = Counter(self._places.values())
            most = -(-(len(self._places) + 1) // len(engines))
            self._places[prompt_id] = next(i for i in prefer(prompt_id, engines) if loads[i] < most)
        return self._places[prompt_id]

    def _limit(self, turn: Turn) -> int:
        return min(turn.max_new_tokens or self.spec.max_new_tokens, self.spec.context_length - len(turn.tokens))

    def _body(self, turn: Turn, sampling: SamplingParams) -> dict[str, Any]:
        own = {
            "seed": self._seed,
            "step": self._step,
            "prompt_id": turn.prompt_id,
            # A turn counts as a sample of its own, so that no two turns share numbers.
            "sample_id": turn.sample_id * MOST_TURNS + turn.turn,
            "begun": turn.begun,
            "drawn": turn.drawn,
        }
        return write_request(
            turn.tokens,
            limit=self._limit(turn),
            sampling=written_sampling(sampling) | told_strings(self.fleet.config, self._stops, turn.stop),
            stop_tokens=self._stops.tokens,
            own=own,
            seed=seed_of(own),
        )

    def _result(self, future: "Future[Said]") -> TurnResult:
        turn = self._running.pop(future)
        said, end = self._endings.cut(
            turn.tokens, (), future.result(), begun=turn.begun, limit=self._limit(turn), stop=turn.stop
        )
        self.stats["turns"] += 1
        self.stats["new_tokens"] += len(said.tokens)
        return TurnResult(turn, said.tokens, said.logprobs, said.entropies, end)

    def _count_anew(self) -> None:
        self.stats = {"turns": 0.0, "new_tokens": 0.0, "seconds": 0.0}
