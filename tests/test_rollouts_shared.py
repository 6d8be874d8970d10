"""Groups shared out to processes: here threads that hand each other bytes, in test_run_shared.py processes."""

import threading

import jax
import numpy as np
import pytest

from rljax.plans import RolloutPlan
from rljax.rollouts import GroupRequest, ScoredGroup, Shared
from rljax.rollouts.orders import QueuedActor
from rljax.rollouts.plain import from_bytes, group_of, plain_group, to_bytes
from rljax.rollouts.shared import check_processes
from rljax.sampling import Sample, sampling_params
from rljax.tasks import Example, RewardResult
from rljax.types import SOURCE_GUIDED

PLAN = RolloutPlan(group_size=2)


def group_for(request, step):
    """A group that depends on nothing but what was asked for."""
    rng = np.random.default_rng([request.example.id, request.first_sample, step])
    samples = [
        Sample(
            tokens=rng.integers(0, 9, length).astype(np.int32),
            logprobs=-rng.random(length).astype(np.float32),
            entropies=rng.random(length).astype(np.float32),
            finish_reason="stop",
            forced=((0, 1),) if length else (),
        )
        for length in rng.integers(0, 5, 2)
    ]
    results = [RewardResult(float(rng.random()), {"echo": 1.0}) for _ in samples]
    return ScoredGroup(request.example, [1, 2], samples, ["a", "b"], results, [sample.tokens for sample in samples])


class Counted(QueuedActor):
    """Makes groups, and notes which."""

    def __init__(self, in_flight=0):
        super().__init__()
        self.in_flight = in_flight
        self.played = []
        self.decoders = ()

    def missing(self, n, pending=None):
        return super().missing(n + self.in_flight, pending)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        pass

    def set_params(self, params, version):
        pass

    def cache_bytes(self):
        return 0

    def longest_row(self, prompt_length):
        return prompt_length

    def for_evaluation(self, sampling):
        return Counted()

    def ready(self, n):
        orders = [(request, order.step) for order in self._orders.take(n) for request in order.requests]
        self.played += [request.example.id for request, _ in orders]
        self.stats = {"turns": float(len(orders)), "busy_share": float(len(orders))}
        self.seconds = {"sample": float(len(orders))}
        return [group_for(request, step) for request, step in orders]


def on_processes(count, play, monkeypatch):
    """What `play()` gives in each of `count` processes, which exchange bytes."""
    index = threading.local()
    barrier = threading.Barrier(count, timeout=20)
    table = [b""] * count

    def exchange(name, data):
        table[index.own] = data
        barrier.wait()
        told = list(table)
        barrier.wait()
        return told

    monkeypatch.setattr("rljax.rollouts.shared.exchange", exchange)
    monkeypatch.setattr(jax, "process_index", lambda: index.own)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    found = [None] * count

    def run(number):
        index.own = number
        try:
            found[number] = play()
        except BaseException as error:
            found[number] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in found:
        if isinstance(error, BaseException):
            raise error
    return found


def requests(*ids):
    return [GroupRequest(Example(f"p{i}", {}, id=i), 2 * i) for i in ids]


def same(a, b):
    """Bit for bit, in everything that bytes hold."""
    return to_bytes(plain_group(a)) == to_bytes(plain_group(b)) and a.example is b.example


def test_every_process_sees_all_groups_in_order_and_plays_its_share(monkeypatch):
    rounds = [requests(3, 1, 4, 15, 9), requests(2, 6)]

    def play():
        actor = Shared(Counted())
        groups = []
        for step, asked in enumerate(rounds):
            assert actor.missing(len(asked)) == len(asked)
            actor.submit(asked, PLAN, step)
            assert actor.missing(len(asked)) == 0
            groups += actor.ready(len(asked))
        return groups, actor.actor.played, actor.stats, actor.seconds

    wanted = [group_for(request, step) for step, asked in enumerate(rounds) for request in asked]
    found = on_processes(3, play, monkeypatch)
    for groups, *_ in found:
        assert len(groups) == len(wanted) and all(map(same, groups, wanted))
    assert [played for _, played, *_ in found] == [[3, 15, 6], [1, 9], [4, 2]]

    # Of the last call, in which one had nothing to play: numbers of things add up, shares are means of those that
    # played, and the time is that of the slowest.
    for _, _, stats, seconds in found:
        assert stats == {"turns": 2.0, "busy_share": 1.0}
        assert seconds == {"sample": pytest.approx(2 / 3), "waiting": pytest.approx(1 / 3)}


def test_an_evaluation_leaves_what_is_under_way_alone(monkeypatch):
    def play():
        actor = Shared(Counted())
        actor.submit(requests(1, 2, 3), PLAN, 0)
        evaluated = actor.for_evaluation(sampling_params())
        evaluated.submit(requests(7), PLAN, 5)
        return [evaluated.ready(1), actor.ready(3)]

    for seen, trained in on_processes(2, play, monkeypatch):
        assert [group.example.id for group in seen] == [7]
        assert [group.example.id for group in trained] == [1, 2, 3]


def test_groups_in_flight_come_back_from_a_checkpoint_of_all_processes(monkeypatch):
    rows = {example.id: example for example, _ in requests(*range(9))}

    def begin():
        actor = Shared(Counted(in_flight=3))
        assert actor.missing(2) == 5
        actor.submit([GroupRequest(rows[i], 2 * i) for i in range(5)], PLAN, 0)
        actor.ready(2)
        return actor.state_dict()

    def go_on():
        actor = Shared(Counted(in_flight=3))
        actor.load_state_dict(saved, PLAN, rows)
        assert actor.missing(2) == 2
        actor.submit([GroupRequest(rows[i], 2 * i) for i in (5, 6)], PLAN, 1)
        return actor.ready(5), actor.actor.played

    first, second = on_processes(2, begin, monkeypatch)
    assert first == second
    saved = first
    for groups, _ in on_processes(2, go_on, monkeypatch):
        wanted = [group_for(GroupRequest(rows[i], 2 * i), int(i > 4)) for i in range(2, 7)]
        assert all(map(same, groups, wanted))

    with pytest.raises(ValueError, match=r"under way on 2 processes, and this run has 3; go on with 2"):
        on_processes(3, go_on, monkeypatch)
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with pytest.raises(ValueError, match=r"under way on 2 processes, and this run has 1"):
        check_processes(saved)


def test_more_groups_than_are_under_way_are_refused(monkeypatch):
    with pytest.raises(RuntimeError, match="3 groups were asked for, but only 2 are under way"):
        actor = Shared(Counted())
        actor.submit(requests(1, 2), PLAN, 0)
        actor.ready(3)


def test_a_group_is_its_bytes():
    """Every field, texts that are no UTF-8, values that are no numbers, empty arrays, and numbers bit for bit."""
    tokens = np.array([1, 2, 3], np.int32)
    empty = np.zeros(0, np.int32)
    full = Sample(
        tokens=tokens,
        logprobs=np.array([-0.1, -np.inf, np.nan], np.float32),
        entropies=np.array([0.1, 0.2, 1e-45], np.float32),
        finish_reason="stop_string",
        parent=0,
        fork_index=1,
        fork_score=np.float32(0.1),
        forced=((0, 1), (2, 3)),
        intervention=2,
        turns=np.array([0, 0, 1], np.int32),
        versions=tokens,
    )
    bare = Sample(empty, empty.astype(np.float32), empty.astype(np.float32), "length")
    results = [
        RewardResult(0.1 + 0.2, {"array": 1.0, "é": float("inf")}, True, None, "array", True, ("other",)),
        RewardResult(0.0, {}, False, "half \ud800 character"),
    ]
    group = ScoredGroup(
        example=Example("p", {"answer": object()}, id=5),
        prompt=[7, 8],
        samples=[full, bare],
        texts=["\ud83d", "naïve"],
        results=results,
        steps=[tokens, empty],
        turn_fields=[{"state_ids": tokens}, {"state_ids": empty}],
        signals=[{"hits": np.array([1, 0, 0], np.float32)}, {}],
        episodes=[0, 0],
        source=SOURCE_GUIDED,
        answers=["3", None],
    )
    again = group_of(from_bytes(to_bytes(plain_group(group))), {5: group.example}.__getitem__)

    assert again.example is group.example and again.texts == group.texts and again.results == group.results
    assert again.results[0].not_applied == ("other",) and again.results[0].is_void and not again.results[1].is_valid
    assert again.prompt == [7, 8] and again.answers == ["3", None] and list(again.episodes) == [0, 0]
    assert again.source == SOURCE_GUIDED
    for a, b in zip(again.samples, group.samples, strict=True):
        for one, other in zip(a, b, strict=True):
            if isinstance(other, np.ndarray):
                assert one.dtype == other.dtype and one.tobytes() == other.tobytes() and one.flags.writeable
            else:
                assert (one == other and type(one) is type(other)) or (isinstance(other, np.generic) and one == other)
    assert again.turn_fields[0]["state_ids"].tolist() == [1, 2, 3] and again.signals[1] == {}
    assert again.steps[1].dtype == np.int32 and again.steps[1].shape == (0,)


@pytest.mark.parametrize("value", [{"x": object()}, np.array([None]), {1: 2}, {"\0array": 1}])
def test_what_is_no_plain_data_is_refused(value):
    with pytest.raises(TypeError):
        to_bytes(value)
