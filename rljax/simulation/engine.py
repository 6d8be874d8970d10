"""A rollout in detail: the rows of every host's decoder, and the episodes that pass through them."""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from rljax.simulation.scenario import Scenario


@dataclasses.dataclass(frozen=True)
class RolloutTimes:
    """What the rollouts of a scenario take, sample by sample; one number for each rollout that is drawn."""

    sample_s: np.ndarray
    """Seconds until the last host has its last sample, float64 `[N]`."""
    after_s: np.ndarray
    """Seconds of judging and of gathering behind that, float64 `[N]`."""
    tokens: np.ndarray
    """New tokens of all hosts, int64 `[N]`."""
    busy_rows: np.ndarray
    """Mean rows that hold an episode over `sample_s`, all hosts together, float64 `[N]`."""

    @property
    def seconds(self) -> np.ndarray:
        """Of a whole rollout, float64 `[N]`."""
        return self.sample_s + self.after_s


def draw_tokens(scenario: Scenario, rollout: int) -> np.ndarray:
    """New tokens of every turn of a rollout, int64 `[samples, turns]`: lognormal, from 1 to `max_tokens`."""
    rng = np.random.default_rng([scenario.seed, 1, rollout])
    size = (scenario.groups * scenario.group_size, scenario.turns)
    drawn = lognormal(rng, scenario.tokens, scenario.tokens_cv, size)
    return np.clip(np.rint(drawn), 1, scenario.max_tokens).astype(np.int64)


def draw_tools(scenario: Scenario, rollout: int) -> np.ndarray:
    """Seconds of every tool of a rollout, float64 `[samples, turns - 1]`."""
    rng = np.random.default_rng([scenario.seed, 2, rollout])
    size = (scenario.groups * scenario.group_size, scenario.turns - 1)
    return lognormal(rng, scenario.tool_s, scenario.tool_cv, size)


def lognormal(rng: np.random.Generator, mean: float, cv: float, size: tuple[int, ...]) -> np.ndarray:
    """Lognormal numbers of a mean and a coefficient of variation, float64 of shape `size`."""
    if mean == 0:
        return np.zeros(size)
    variance = math.log1p(cv**2)
    return rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), size)


def roll_out(scenario: Scenario) -> RolloutTimes:
    """Simulates the rollouts of a scenario. Deterministic for its seed. ValueError where simpy is not installed."""
    found = [_one_rollout(scenario, index) for index in range(scenario.drawn)]
    columns = zip(*found, strict=True)
    return RolloutTimes(*(np.asarray(column) for column in columns))


def _one_rollout(scenario: Scenario, rollout: int) -> tuple[float, float, int, float]:
    """(seconds of sampling, seconds behind it, new tokens, mean busy rows)."""
    tokens = draw_tokens(scenario, rollout)
    episodes = tokens.sum(axis=1) * scenario.token_s + draw_tools(scenario, rollout).sum(axis=1)
    host_of = np.arange(len(episodes)) // scenario.group_size % scenario.hosts

    env = environment()
    decoders = [Decoder(env, scenario, episodes[host_of == host]) for host in range(scenario.hosts)]
    env.run()

    sample_s = env.now
    busy = sum(decoder.row_seconds for decoder in decoders) / sample_s if sample_s else 0.0
    # A host judges what it has played. Then all trajectories leave one process, once for each of the others.
    own = math.ceil(scenario.groups / scenario.hosts) * scenario.group_size
    total = int(tokens.sum())
    sent = total * scenario.trajectory_bytes * (scenario.hosts - 1)
    return sample_s, own * scenario.judge_s + sent / scenario.gather_bandwidth, total, busy


class Decoder:
    """The rows of one host, which take the host's episodes in their order. `row_seconds` adds up rows over time."""

    def __init__(self, env, scenario: Scenario, episodes: np.ndarray):
        self.env = env
        self.row_seconds = 0.0
        self._active = 0
        self._since = 0.0
        groups = len(episodes) / scenario.group_size
        prefill = groups * scenario.prefill_s / scenario.decoding_devices
        env.process(self._play(episodes.tolist(), scenario.rows, prefill))

    def _play(self, episodes: Sequence[float], rows: int, prefill: float) -> Iterator:
        """Whichever row is free first takes the next episode. Prompts are computed before all."""
        yield self.env.timeout(prefill)
        waiting = iter(episodes)
        ends = [self.env.now + seconds for seconds in itertools.islice(waiting, rows)]
        heapq.heapify(ends)
        self._count(len(ends))

        while ends:
            # The clock may be a rounding ahead of an end.
            yield self.env.timeout(max(heapq.heappop(ends) - self.env.now, 0.0))
            following = next(waiting, None)
            if following is None:
                self._count(-1)
            else:
                heapq.heappush(ends, self.env.now + following)

    def _count(self, change: int) -> None:
        now = self.env.now
        self.row_seconds += self._active * (now - self._since)
        self._since = now
        self._active += change


def environment(now: float = 0.0):
    """A `simpy.Environment` that begins at `now`. ValueError where simpy is not installed."""
    try:
        import simpy
    except ImportError:
        raise ValueError("--simulate needs the package simpy: pip install 'rljax-lm[simulate]'") from None
    return simpy.Environment(now)
