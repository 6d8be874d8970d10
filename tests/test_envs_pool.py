"""Environments at once: limits, failures that end their own episode, forks by replay and by snapshot."""

import errno
import functools
import json
import os
import subprocess
import threading
import time
from concurrent.futures import wait

import pytest
from counting import Copyable, Counter, Killed, needs_a_file
from replays import replay
from test_tasks_rewards import SCRIBBLES, scribble

from rljax.envs import (
    EnvironmentLimits,
    EnvironmentPool,
    Episode,
    ReplayMismatch,
    Step,
    ToolBox,
    ToolEnvironment,
    answer,
    replay_same,
)
from rljax.envs.library import calculator
from rljax.tasks.evolving import ASKED


class Fickle(Counter):
    made = 0

    def reset(self, row):
        Fickle.made += 1
        return super().reset(row) + str(Fickle.made)


LIMITS = EnvironmentLimits(turns=6, tool_calls=2, observation_chars=100, step_s=0.5)


@pytest.fixture(scope="module", params=["threads", "processes"])
def pool(request):
    limits = LIMITS if request.param == "threads" else EnvironmentLimits(**{**vars(LIMITS), "step_s": 3.0})
    with EnvironmentPool(Counter, workers=2, hosts=request.param, limits=limits) as pool:
        yield pool


def play(pool, actions, row=None):
    episode = pool.start(row or {"goal": 5}).result(20)
    for action in actions:
        if episode.end is None:
            episode = pool.step(episode, action).result(20)
    return episode


def test_an_episode_runs_to_its_end(pool):
    episode = play(pool, ["2", "3"])
    assert episode.opening == "Count to 5."
    assert [s.observation for s in episode.steps] == ["2 after True", "5 after True"]
    assert (episode.end, episode.reward, episode.actions) == ("done", 1.0, ["2", "3"])
    with pytest.raises(ValueError, match=r"has ended \(done\)"):
        pool.step(episode, "1")


@pytest.mark.parametrize(
    ("action", "end", "says"),
    [
        ("raise", "raised", "RuntimeError: oops"),
        ("exit", "raised", "SystemExit: 3"),
        ("x", "raised", "ValueError"),
        ("nonsense", "malformed", "must be a Step"),
        ("nan", "malformed", "finite"),
        ("none", "malformed", "must hold text"),
        ("flag", "malformed", "True or False"),
        ("hang", "timeout", "longer than"),
    ],
)
def test_what_an_environment_does_wrong_ends_its_own_episode(pool, action, end, says):
    before = pool.failures[end]
    other = play(pool, ["1"])
    episode = play(pool, ["1", action])
    assert episode.end == end and says in episode.error
    assert episode.actions == ["1"] and pool.failures[end] == before + 1
    assert pool.step(other, "1").result(20).steps[-1].observation == "2 after True"
    assert play(pool, ["5"]).end == "done"


def test_a_child_that_an_environment_forked_answers_for_nobody():
    with EnvironmentPool(Counter, workers=1, hosts="processes", limits=EnvironmentLimits(step_s=5.0)) as pool:
        episode = play(pool, ["1", "fork", "2", "1"], {"goal": 9})
        assert [s.observation for s in episode.steps] == ["1 after True", "forked", "3 after True", "4 after True"]
        assert play(pool, ["5"]).opening == "Count to 5."


class Scribbles(Counter):
    def step(self, action):
        if action.startswith("scribble"):
            scribble(SCRIBBLES[action])
        return super().step(action.removeprefix("scribble ").replace("text", "1").replace("other number", "1"))


@pytest.mark.parametrize("what", ["scribble text", "scribble other number"])
def test_what_an_environment_writes_to_its_socket_ends_its_own_episode(what):
    with EnvironmentPool(Scribbles, workers=1, hosts="processes", limits=EnvironmentLimits(step_s=5.0)) as pool:
        other = play(pool, ["1"])
        assert (play(pool, [what]).end, pool.failures["crashed"]) == ("crashed", 1)
        assert pool.step(other, "1").result(20).steps[-1].observation == "2 after True"


def test_a_row_that_cannot_be_opened_ends_its_episode(pool):
    assert play(pool, [], {"goal": 1, "bad": True}).error == "RuntimeError: no such row"


def test_what_a_curriculum_asks_is_answered_in_one_turn_without_the_environment(pool):
    row = {"prompt": "Why did that fail?", ASKED: True, "goal": 5}
    episode = play(pool, ["2", "3"], row)
    assert (episode.opening, episode.actions, episode.end) == ("Why did that fail?", ["2"], "done")
    assert episode.steps == [Step("", done=True)]
    messages = [{"role": "user", "content": "Why?"}]
    assert play(pool, ["2"], {**row, "prompt": messages}).opening == messages
    assert play(pool, ["5"], {**row, ASKED: False}).opening == "Count to 5."


def test_limits_end_an_episode(pool):
    assert play(pool, ["0"] * 9).end == "turns"
    assert play(pool, ["tool"] * 9).end == "tool_calls"
    assert play(pool, ["long"]).steps[0].observation == "x" * 75 + "\n[900 characters left out]\n" + "x" * 25


def test_a_fork_goes_on_from_its_turn(pool):
    first = play(pool, ["1", "long", "2"])
    second = pool.fork(first, 2).result(20)
    assert second.actions == ["1", "long"] and second.steps == first.steps[:2] and second.parent == first.id
    assert pool.step(second, "1").result(20).steps[-1].observation == "2 after True"
    assert pool.step(first, "1").result(20).steps[-1].observation == "4 after True"
    assert pool.fork(first, 0).result(20).opening == "Count to 5."
    with pytest.raises(ValueError, match="cannot be forked after turn 5"):
        pool.fork(first, 5)
    with pytest.raises(ValueError, match="nothing follows"):
        pool.fork(play(pool, ["5"]), 1)


def test_a_worker_that_dies_is_replaced_and_its_other_episodes_go_on():
    limits = EnvironmentLimits(**{**vars(LIMITS), "step_s": 5.0})
    with EnvironmentPool(Counter, workers=1, hosts="processes", limits=limits) as pool:
        other, victim = play(pool, ["1", "1"]), play(pool, ["1", "die"])
        assert (victim.end, victim.error) == ("crashed", "the worker process ended with exit code 7")
        assert pool.step(other, "1").result(20).steps[-1].observation == "3 after True"
        assert pool.failures == {"crashed": 1}


@pytest.mark.parametrize("kills", [1, 2])
def test_what_was_under_way_in_a_process_that_was_killed_is_done_once_more(kills, tmp_path):
    make = functools.partial(Killed, str(tmp_path / "kills"), kills, when_made=False)
    with EnvironmentPool(make, workers=1, hosts="processes", limits=EnvironmentLimits(step_s=5.0)) as pool:
        other = play(pool, ["1"])
        episode = play(pool, ["2", "be killed"])
        if kills == 1:
            assert [step.observation for step in episode.steps] == ["2 after True", "3 after True"]
        else:
            assert (episode.end, episode.error) == ("crashed", "the worker process ended with exit code -9")
        assert pool.step(other, "1").result(20).steps[-1].observation == "2 after True"
        assert pool.failures["crashed"] == kills - 1


@pytest.mark.parametrize("kills", [2, 9])
def test_a_process_that_is_killed_while_it_starts_is_started_again_a_few_times(kills, tmp_path):
    make = functools.partial(Killed, str(tmp_path / "kills"), kills, when_made=True)
    pool = EnvironmentPool(make, workers=1, hosts="processes", limits=EnvironmentLimits(step_s=5.0))
    if kills == 2:
        with pool:
            assert play(pool, ["1"]).steps[-1].observation == "1 after True"
    else:
        with pytest.raises(ValueError, match=r"cannot make environments \(it ended with exit code -9\)"):
            pool.open()
        assert (tmp_path / "kills").read_text() == "xxx"


def test_worker_processes_end_with_the_pool():
    with EnvironmentPool(Counter, workers=1, hosts="processes", limits=LIMITS) as pool:
        process = pool._lanes[0].worker.process.process
        assert process.poll() is None
    assert process.poll() is not None
    with pytest.raises(RuntimeError, match="closed"):
        pool.start({"goal": 1})


def test_closing_resolves_what_is_under_way():
    pool = EnvironmentPool(Counter, workers=1, limits=EnvironmentLimits(step_s=20.0))
    pool.open()
    hanging = pool.step(pool.start({"goal": 1}).result(9), "hang")
    waiting = pool.start({"goal": 2})
    time.sleep(0.1)
    pool.close()
    assert {f.result(5).error for f in (hanging, waiting)} == {"the pool was closed"}


def test_snapshots_are_used_where_an_environment_has_them():
    with EnvironmentPool(Copyable, workers=2, limits=LIMITS) as pool:
        first = play(pool, ["1", "2"])
        resets = Copyable.resets
        second = pool.fork(first, 1).result(9)
        assert Copyable.resets == resets
        assert pool.step(second, "1").result(9).steps[-1].observation == "2 after True"
        third = pool.fork(second, 1).result(9)
        assert pool.step(third, "3").result(9).steps[-1].observation == "4 after True"
        pool.release(first)
        assert pool.step(pool.fork(first, 1).result(9), "2").result(9).steps[-1].observation == "3 after True"
        assert Copyable.resets == resets + 1  # its snapshots are gone, so it was played again


class Live(Counter):
    """Returns what it goes on in as its snapshot."""

    def snapshot(self):
        return self.__dict__

    def restore(self, state):
        self.__dict__.update(state)


@pytest.mark.parametrize("hosts", ["threads", "processes"])
def test_a_fork_stands_at_its_turn_though_the_snapshot_is_live_state(hosts):
    with EnvironmentPool(Live, workers=1, hosts=hosts, limits=LIMITS) as pool:
        first = play(pool, ["1", "2", "3"], {"goal": 20})
        fork = pool.fork(first, 1).result(9)
        assert pool.step(fork, "5").result(9).steps[-1].observation == "6 after True"
        assert pool.step(pool.fork(first, 2).result(9), "0").result(9).steps[-1].observation == "3 after True"


class Holds(Counter):
    """Notes in the row's file when it is closed; some rows hang or fail on the way."""

    def reset(self, row):
        self.row = row
        if row.get("wait"):
            time.sleep(row["wait"])
        return super().reset(row)

    def close(self):
        with open(self.row["file"], "a") as file:
            file.write(f"{self.row['goal']} ")
        if self.row.get("fails"):
            raise RuntimeError("did not close")


def closed(path, count):
    deadline = time.monotonic() + 10
    while not path.exists() or len(path.read_text().split()) < count:
        assert time.monotonic() < deadline, f"{path.exists() and path.read_text()!r}"
        time.sleep(0.01)
    return sorted(map(int, path.read_text().split()))


@pytest.mark.parametrize("hosts", ["threads", "processes"])
def test_environments_are_closed_when_they_are_left_and_with_the_pool(hosts, tmp_path):
    path = tmp_path / "closed"
    path.touch()
    limits = EnvironmentLimits(step_s=5.0)
    with EnvironmentPool(make_holds, workers=2, hosts=hosts, limits=limits) as pool:
        episodes = [play(pool, ["1"], {"goal": goal, "file": str(path)}) for goal in (2, 3, 4)]
        failing = play(pool, [], {"goal": 5, "file": str(path), "bad": True})
        pool.release(failing)
        assert (failing.end, closed(path, 1)) == ("raised", [5])
        pool.release(episodes[0])
        assert closed(path, 2) == [2, 5]
        unruly = play(pool, ["6"], {"goal": 6, "file": str(path), "fails": True})
        pool.release(unruly)
        assert closed(path, 3) == [2, 5, 6]
    assert (unruly.end, closed(path, 5)) == ("done", [2, 3, 4, 5, 6])
    assert pool.failures == {"raised": 1, "close": 1, "done": 0}


def make_holds():
    environment = Holds()
    environment.row = {"file": os.devnull, "goal": 0}
    return environment


def test_a_reset_that_comes_late_is_closed_and_not_kept(tmp_path):
    path = tmp_path / "closed"
    with EnvironmentPool(make_holds, workers=1, limits=EnvironmentLimits(step_s=0.1)) as pool:
        episode = pool.start({"goal": 7, "file": str(path), "wait": 0.5}).result(5)
        assert episode.end == "timeout"
        pool.release(episode)
        assert closed(path, 1) == [7]
        assert pool._host._environments == {} and pool._host._snapshots == {}
        deadline = time.monotonic() + 5
        while pool._hung and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (pool._hung, len(pool._lanes)) == (0, 1)


def test_hung_threads_are_bounded():
    with EnvironmentPool(HangsAtReset, workers=1, limits=EnvironmentLimits(step_s=0.05)) as pool:
        ends = [pool.start({}).result(5) for _ in range(5)]
        assert [e.end for e in ends] == ["timeout"] * 5
        assert "4 threads hang in environments" in ends[4].error and "longer than" in ends[3].error
        HANGS.set()
        deadline = time.monotonic() + 5
        while pool._hung and time.monotonic() < deadline:
            time.sleep(0.01)
        assert pool.start({}).result(5).opening == "late"


HANGS = threading.Event()


class HangsAtReset(Counter):
    def reset(self, row):
        HANGS.wait(30)
        return "late"


def test_an_environment_that_does_not_repeat_itself_is_found():
    with EnvironmentPool(Fickle, workers=1, limits=LIMITS) as pool:
        episode = pool.fork(play(pool, ["1"]), 1).result(9)
        assert episode.end == "replay" and "snapshot() and restore()" in episode.error
    opening, steps = replay(Fickle(), {"goal": 3}, ["1"])
    with pytest.raises(ReplayMismatch, match="reset began with"):
        replay_same(Fickle(), {"goal": 3}, opening, ["1"], steps)


def saved(episode):
    """What is left of an episode after it was written to a checkpoint and read again."""
    return json.loads(json.dumps(episode.state_dict()))


def story(episode):
    names = ("row", "opening", "actions", "steps", "end", "error", "reward", "counts")
    return [getattr(episode, name) for name in names]


def test_a_restored_episode_goes_on_as_it_would_have(pool):
    first = play(pool, ["1", "long", "tool"], {"goal": 9, "note": [1, None]})
    second = pool.restore(saved(first)).result(20)
    assert story(second) == story(first) and second.steps[1].observation != first._uncut[1].observation
    assert second.id != first.id and second.seconds == first.seconds
    for action in ("3", "long", "5"):
        first, second = pool.step(first, action).result(20), pool.step(second, action).result(20)
        assert story(second) == story(first)
    assert first.end == "done" and saved(second) == saved(first) | {"seconds": second.seconds}
    third = pool.fork(second, 1).result(20)  # a restored episode forks, too
    assert pool.step(third, "8").result(20).end == "done"


@pytest.mark.parametrize("actions", [["9"], ["raise"], ["0"] * 9, ["tool", "tool"]])
def test_an_episode_that_had_ended_is_restored_without_a_replay(pool, actions):
    first = play(pool, actions)
    before = dict(pool.failures)
    second = pool.restore(saved(first)).result(0)
    assert story(second) == story(first) and second.end is not None and pool.failures == before
    with pytest.raises(ValueError, match="has ended"):
        pool.step(second, "1")


def test_an_episode_without_an_opening_is_opened(pool):
    unopened = Episode(0, {"goal": 3}).state_dict()
    assert unopened["opening"] is None
    assert pool.restore(unopened).result(20).opening == "Count to 3."
    failed = play(pool, [], {"goal": 1, "bad": True})
    assert story(pool.restore(saved(failed)).result(0)) == story(failed)


def test_a_restored_episode_must_lead_to_the_same(pool):
    state = saved(play(pool, ["1", "2"]))
    state["steps"][1]["observation"] = "4 after True"
    before = pool.failures["replay"]
    episode = pool.restore(state).result(20)
    assert episode.end == "replay" and "turn 1 led to" in episode.error and pool.failures["replay"] == before + 1
    state = saved(play(pool, ["1"]))
    assert "reset began with 'Count to 6.'" in pool.restore(state, {"goal": 6}).result(20).error


@pytest.mark.parametrize("hosts", ["threads", "processes"])
def test_an_environment_that_differs_from_run_to_run_is_found(hosts):
    """`Fickle` numbers its openings, so that only a fresh process repeats the first."""
    limits = EnvironmentLimits(step_s=5.0)
    with EnvironmentPool(Fickle, workers=1, hosts=hosts, limits=limits) as pool:
        state = saved(play(pool, ["1"]))
        assert pool.restore(state).result(20).end == "replay"


def test_snapshots_are_there_again_after_a_replay():
    with EnvironmentPool(Copyable, workers=1, limits=LIMITS) as pool:
        episode = pool.restore(saved(play(pool, ["1", "2"]))).result(9)
        resets = Copyable.resets
        assert pool.step(pool.fork(episode, 1).result(9), "1").result(9).steps[-1].observation == "2 after True"
        assert Copyable.resets == resets


class Waits:
    def reset(self, row):
        return "go"

    def step(self, action):
        time.sleep(0.05)
        return Step(action, done=action == "4")


def test_hundreds_of_episodes_wait_at_the_same_time():
    with EnvironmentPool(Waits, workers=128) as pool:
        begin = time.monotonic()
        episodes = [f.result() for f in [pool.start({}) for _ in range(256)]]
        for turn in range(1, 5):
            wait([pool.step(e, str(turn)) for e in episodes])
        assert {e.end for e in episodes} == {"done"}
        assert time.monotonic() - begin < 256 * 4 * 0.05 / 8  # at least eight at a time, on a busy machine


def test_hung_threads_are_replaced():
    with EnvironmentPool(Counter, workers=2, limits=EnvironmentLimits(step_s=0.1)) as pool:
        episodes = [pool.start({"goal": 9}).result() for _ in range(4)]
        wait([pool.step(e, "hang") for e in episodes])
        assert {e.end for e in episodes} == {"timeout"}
        assert play(pool, ["9"]).end == "done"
        assert len(pool._lanes) == 2


class Tokens:
    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_observations_are_cut_by_tokens():
    limits = EnvironmentLimits(observation_tokens=8)
    with EnvironmentPool(Counter, workers=1, limits=limits, tokenizer=Tokens()) as pool:
        assert play(pool, ["long"]).steps[0].observation == "x" * 6 + "\n[992 tokens left out]\n" + "xx"


def test_bad_pools_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        EnvironmentPool(Counter, workers=0)
    with pytest.raises(ValueError, match="cannot be sent to a worker process"):
        EnvironmentPool(lambda: Counter(), workers=1, hosts="processes")
    with pytest.raises(ValueError, match="cannot load 'nowhere:make'"):
        EnvironmentPool("nowhere:make")
    with pytest.raises(ValueError, match="turns is 0"):
        EnvironmentLimits(turns=0)


def test_a_worker_that_the_system_does_not_start_is_told_in_one_line(monkeypatch):
    def none_left(*_, **__):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", none_left)
    why = r"\[Errno 11\] Resource temporarily unavailable: this user, machine or container has no room for .*$"
    with pytest.raises(ValueError, match=f"^a worker process for environments does not start: {why}"):
        EnvironmentPool(Counter, workers=2, hosts="processes").open()


@pytest.mark.parametrize("hosts", ["threads", "processes"])
def test_nothing_starts_before_the_pool_is_opened(hosts):
    threads = threading.active_count()
    pool = EnvironmentPool(Counter, workers=2, hosts=hosts, limits=LIMITS)
    assert threading.active_count() == threads and pool._lanes == []
    with pytest.raises(RuntimeError, match=r"not open; use it in a `with` block, or call open\(\) first$"):
        pool.start({"goal": 1})
    with pool:
        pool.open()  # stands already
        assert play(pool, ["5"]).end == "done"
    pool.close()
    with pytest.raises(RuntimeError, match="closed"), pool:
        pass

    never = EnvironmentPool(Counter, workers=2, hosts=hosts)
    never.close()
    with pytest.raises(RuntimeError, match="closed"):
        never.open()


@pytest.mark.parametrize("hosts", ["threads", "processes"])
def test_a_factory_that_makes_nothing_is_refused_as_the_pool_opens(hosts):
    pool = EnvironmentPool(needs_a_file, workers=1, hosts=hosts)
    with pytest.raises(ValueError, match="makes no environment: OSError: no such index") as error, pool:
        pass
    assert "\n" not in str(error.value)


def test_a_factory_that_no_worker_can_load_is_refused_as_the_pool_opens(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "only_here.py").write_text(
        f"import os\nif os.getpid() != {os.getpid()}: raise OSError('only there')\ndef make(): return None\n"
    )
    pool = EnvironmentPool("only_here:make", workers=1, hosts="processes")
    with pytest.raises(ValueError, match=r"a worker process cannot make environments.*only there"), pool:
        pass


def right(answer, row):
    return float(answer == row["answer"])


@pytest.mark.parametrize("tool_format", ["hermes", "tags"])
def test_a_tool_environment_plays_an_episode(tool_format):
    environment = ToolEnvironment(ToolBox([calculator, answer]), right, tool_format=tool_format, system="Use tools.")
    row = {"prompt": "What is 6 * 7?", "answer": "42"}
    assert environment.reset(row) == "Use tools.\n\nWhat is 6 * 7?"
    assert environment.reset({**row, "prompt": [{"role": "user", "content": "?"}]})[0] == {
        "role": "system",
        "content": "Use tools.",
        "tools": environment.tools.schemas,
    }
    environment.reset(row)
    calls = {
        "hermes": '<tool_call>{{"name": "{0}", "arguments": {{"{1}": "{2}"}}}}</tool_call>',
        "tags": "<{0}>{2}</{0}>",
    }[tool_format]
    step = environment.step("Let me see. " + calls.format("calculator", "expression", "6 * 7"))
    assert (step.observation, step.done, step.counts["tool_calls"]) == ("42", False, 1)
    step = environment.step(calls.format("calculator", "expression", "6 *"))
    assert "not an arithmetic expression" in step.observation and step.counts["tool_errors"] == 1
    step = environment.step("<tool_call>{" if tool_format == "hermes" else "<answer>4")
    assert "never closed" in step.observation and step.counts["malformed_calls"] == 1
    step = environment.step(calls.format("answer", "answer", "42"))
    assert (step.reward, step.done) == (1.0, True)


def test_a_message_without_a_call_is_the_answer_or_gets_a_nudge():
    box, row = ToolBox([calculator]), {"prompt": "?", "answer": "42"}
    environment = ToolEnvironment(box, right)
    environment.reset(row)
    assert environment.step("<think>hm</think> 42 ") == Step(
        "", 1.0, True, dict.fromkeys(("tool_calls", "tool_errors", "malformed_calls"), 0.0)
    )
    environment = ToolEnvironment(box, right, plain_text_ends=False)
    environment.reset(row)
    step = environment.step("42")
    assert not step.done and "Call a tool" in step.observation


def test_no_thread_of_a_pool_outlives_it():
    before = threading.active_count()
    with EnvironmentPool(Counter, workers=8) as pool:
        pool.start({"goal": 1}).result()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= before
