"""A rollout in detail: the rows of every host's decoder, and the episodes that pass through them."""

import dataclasses
import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Sequence

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
    """Mean rows that decode over `sample_s`, all hosts together, float64 `[N]`."""
    spans: tuple[Counter[int], ...]
    """Of each rollout its groups, by the rollouts that have begun since they began."""

    @property
    def seconds(self) -> np.ndarray:
        """Of a whole rollout, float64 `[N]`."""
        return self.sample_s + self.after_s


def draw_tokens(scenario: Scenario, rollout: int) -> np.ndarray:
    """New tokens of every turn of a rollout, int64 `[samples, turns]`: lognormal, from 1 to `max_tokens`. Turns behind
    the last of an episode (`draw_turns`) have some as well."""
    rng = np.random.default_rng([scenario.seed, 1, rollout])
    size = (scenario.groups * scenario.group_size, math.ceil(scenario.turns))
    drawn = lognormal(rng, scenario.tokens, scenario.tokens_cv, size)
    return np.clip(np.rint(drawn), 1, scenario.max_tokens).astype(np.int64)


def draw_turns(scenario: Scenario, rollout: int) -> np.ndarray:
    """Turns of every episode of a rollout, int64 `[samples]`: the two whole numbers next to the mean."""
    rng = np.random.default_rng([scenario.seed, 3, rollout])
    least = math.floor(scenario.turns)
    return least + (rng.random(scenario.groups * scenario.group_size) < scenario.turns - least)


def draw_tools(scenario: Scenario, rollout: int) -> np.ndarray:
    """Seconds of every tool of a rollout, float64 `[samples, turns - 1]`."""
    rng = np.random.default_rng([scenario.seed, 2, rollout])
    size = (scenario.groups * scenario.group_size, math.ceil(scenario.turns) - 1)
    return lognormal(rng, scenario.tool_s, scenario.tool_cv, size)


def lognormal(rng: np.random.Generator, mean: float, cv: float, size: tuple[int, ...]) -> np.ndarray:
    """Lognormal numbers of a mean and a coefficient of variation, float64 of shape `size`."""
    if mean == 0:
        return np.zeros(size)
    variance = math.log1p(cv**2)
    return rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), size)


def roll_out(scenario: Scenario) -> RolloutTimes:
    """Simulates the rollouts of a scenario. Deterministic for its seed.

    Each takes the groups that are complete first and leaves `groups_in_flight` under way, which the next goes on with.
    """
    hosts = [_Host(scenario, host) for host in range(scenario.hosts)]
    # What is under way at first has only begun; after some rollouts it is as it stays.
    settling = 0
    if scenario.groups_in_flight:
        settling = 2 * math.ceil(scenario.groups_in_flight / scenario.groups)
    found = [_one_rollout(scenario, hosts, index) for index in range(settling + scenario.drawn)][settling:]

    sample_s, after_s, tokens, busy, spans = zip(*found, strict=True)
    return RolloutTimes(
        np.asarray(sample_s), np.asarray(after_s), np.asarray(tokens), np.asarray(busy), spans=tuple(spans)
    )


def _one_rollout(
    scenario: Scenario, hosts: Sequence["_Host"], rollout: int
) -> tuple[float, float, int, float, Counter[int]]:
    """(seconds of sampling, seconds behind it, new tokens, mean busy rows, groups by the rollouts that they span)."""
    drawn = _groups_of(scenario, rollout)
    for host in hosts:
        host.submit(drawn[host.number :: scenario.hosts], rollout)
    own = [len(range(host.number, scenario.groups, scenario.hosts)) for host in hosts]
    taken = [host.play(count) for host, count in zip(hosts, own, strict=True)]

    sample_s = max(seconds for seconds, _, _ in taken)
    busy = sum(row_seconds for _, row_seconds, _ in taken) / sample_s if sample_s else 0.0
    groups = [group for _, _, found in taken for group in found]
    # A host judges what it has played. Then all trajectories leave one process, once for each of the others.
    judged = max(own) * scenario.group_size
    total = sum(group.tokens for group in groups)
    sent = total * scenario.trajectory_bytes * (scenario.hosts - 1)
    after_s = judged * scenario.judge_s + sent / scenario.gather_bandwidth
    return sample_s, after_s, total, busy, Counter(rollout - group.begun for group in groups)


def _groups_of(scenario: Scenario, rollout: int) -> list[tuple[list[np.ndarray], int]]:
    """Seconds of the episodes of the groups that a rollout begins, float64 `[2 turns - 1]` each: a completion, a tool,
    a completion and so on; the first rollout begins those that stay in flight as well. Then their tokens."""
    steps = [rollout]
    # Numbers of their own: no later rollout is drawn by them.
    if rollout == 0:
        steps += range(-1, -1 - math.ceil(scenario.groups_in_flight / scenario.groups), -1)
    tokens = np.concatenate([draw_tokens(scenario, step % 2**31) for step in steps])
    tools = np.concatenate([draw_tools(scenario, step % 2**31) for step in steps])
    turns = np.concatenate([draw_turns(scenario, step % 2**31) for step in steps])

    seconds = np.empty((len(tokens), tokens.shape[1] + tools.shape[1]))
    seconds[:, 0::2] = tokens * scenario.token_s
    seconds[:, 1::2] = tools
    episodes = [row[: 2 * count - 1] for row, count in zip(seconds, turns, strict=True)]
    said = np.where(np.arange(tokens.shape[1]) < turns[:, None], tokens, 0).sum(axis=1)

    count = scenario.groups + (scenario.groups_in_flight if rollout == 0 else 0)
    parts = [slice(group * scenario.group_size, (group + 1) * scenario.group_size) for group in range(count)]
    return [(episodes[part], int(said[part].sum())) for part in parts]


@dataclasses.dataclass
class _Group:
    """Episodes that are complete together."""

    begun: int
    """The rollout that began it."""
    tokens: int
    """New tokens of all of it."""
    missing: int
    """Episodes that are under way."""


class _Host:
    """The decoder of a host: whichever row is free first takes the turn that has waited longest. Between two rollouts
    its clock stands still, for tools too."""

    def __init__(self, scenario: Scenario, number: int):
        self.number = number
        self._scenario = scenario
        self._now = 0.0
        self._free = scenario.rows
        self._waiting: deque[tuple[_Group, np.ndarray, int]] = deque()
        self._order = itertools.count()
        # By when they end, and then in their order: what an episode of a group is at.
        self._ends: list[tuple[float, int, _Group, np.ndarray, int]] = []
        self._complete: deque[_Group] = deque()
        self._prefill_s = 0.0

    def submit(self, groups: Sequence[tuple[Sequence[np.ndarray], int]], rollout: int) -> None:
        """Begins groups: their prompts are computed before all."""
        scenario = self._scenario
        prefill = len(groups) * scenario.prefill_s / scenario.decoding_devices
        self._now += prefill
        # All shift alike, so that the heap stays one.
        self._ends = [(end + prefill, n, group, row, part) for end, n, group, row, part in self._ends]
        self._prefill_s = prefill
        for episodes, tokens in groups:
            group = _Group(rollout, tokens, len(episodes))
            self._waiting += ((group, episode, 0) for episode in episodes)

    def play(self, count: int) -> tuple[float, float, list[_Group]]:
        """(seconds, row-seconds, groups) until `count` groups are complete, the first of them."""
        begin = self._now
        row_s = 0.0
        self._fill()
        while len(self._complete) < count:
            busy = self._scenario.rows - self._free
            end, _, group, episode, part = heapq.heappop(self._ends)
            row_s += busy * (end - self._now)
            self._now = end
            self._go_on(group, episode, part)
            self._fill()
        seconds = self._now - begin + self._prefill_s
        return seconds, row_s, [self._complete.popleft() for _ in range(count)]

    def _go_on(self, group: _Group, episode: np.ndarray, part: int) -> None:
        """An episode is through with a part: a completion, which leaves its row, or a tool."""
        is_completion = part % 2 == 0
        self._free += is_completion
        following = part + 1
        if following == len(episode):
            group.missing -= 1
            if not group.missing:
                self._complete.append(group)
        elif is_completion:
            self._begin(group, episode, following)
        else:
            self._waiting.append((group, episode, following))

    def _fill(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            self._begin(*self._waiting.popleft())

    def _begin(self, group: _Group, episode: np.ndarray, part: int) -> None:
        heapq.heappush(self._ends, (self._now + float(episode[part]), next(self._order), group, episode, part))


def environment(now: float = 0.0):
    """A `simpy.Environment` that begins at `now`. ValueError where simpy is not installed."""
    try:
        import simpy
    except ImportError:
        raise ValueError("--simulate needs the package simpy: pip install 'rljax-lm[simulate]'") from None
    return simpy.Environment(now)
