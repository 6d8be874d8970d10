"""A reward may raise, hang, exit or return nonsense: it costs that sample, and no process stays behind."""

import concurrent.futures
import contextlib
import errno
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time

import numpy as np
import pytest

from rljax.tasks import (
    ExactMatch,
    LengthReward,
    MathVerify,
    RewardInput,
    RewardRunner,
    RewardSpec,
    WorkersFailed,
    batch_reward,
    load_callable,
)
from rljax.tasks.channel import read_data, write_data
from rljax.tasks.rewards import _outcomes_of, _resolve
from rljax.tasks.workers import CRASHED, DONE, TIMEOUT, Job, Reply, WorkerPool


def behave(completion):
    """A reward that does what the completion says."""
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "hang":
        while True:
            pass
    if completion == "sleep":
        time.sleep(1000)
    if completion == "hold":  # a C call that keeps the interpreter lock
        import re

        re.match(r"(a+)+$", "a" * 40 + "b")
    if completion == "die":
        os._exit(3)
    if completion == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if completion == "exit":
        sys.exit("done")
    if completion == "interrupt":
        raise KeyboardInterrupt
    if completion == "fork" and os.fork() == 0:
        raise RuntimeError("the child could not start its program")
    if completion == "fork":
        os.wait()  # if the child lived on, this would hang
        return 4.0
    if completion.startswith("scribble"):
        scribble(SCRIBBLES[completion])
        return 1.0
    special = {"nan": math.nan, "inf": -math.inf, "none": None, "text": "1.0", "list": [1.0], "huge": 10**400}
    special |= {"lambda": lambda: 0, "numpy": np.float32(0.5), "array": np.array(2), "true": True, "int": 3}
    return special[completion] if completion in special else float(completion)


def waits_until_killed(job):
    """Notes its process in a file, and waits for ever the first `kills` times; how often it was begun."""
    path, kills = job
    with open(path, "a+") as file:
        file.write(f"{os.getpid()} ")
        file.seek(0)
        begun = len(file.read().split())
    if begun <= kills:
        time.sleep(60)
    return float(begun)


class KilledAtStart:
    """A function whose first `kills` processes are killed while they make it ready."""

    def __init__(self, path, kills):
        self.path = path
        self.kills = kills

    def warm_up(self):
        with open(self.path, "a+") as file:
            file.write("x")
            file.seek(0)
            if len(file.read()) <= self.kills:
                os.kill(os.getpid(), signal.SIGKILL)

    def __call__(self, value):
        return value


class Executes:
    """Pickled, it runs a command wherever it is read."""

    def __reduce__(self):
        return os.mkdir, (os.path.join(tempfile.gettempdir(), f"executed-{os.getppid()}"),)


def frame(message):
    """A message as a worker sends it."""
    return b"rljx" + len(message).to_bytes(8, "big") + message


SCRIBBLES = {
    "scribble text": b"hello",
    "scribble pickle": pickle.dumps(("done", Executes())),
    "scribble framed pickle": frame(pickle.dumps((1, "done", Executes()))),
    "scribble half a message": frame(b"[1, null]")[:-4],
    "scribble endless message": b"rljx" + b"\xff" * 8,
    "scribble other number": frame(json.dumps([999, "done", [{"tuple": [1.0, None, ""]}]]).encode()),
    "scribble other kind": frame(json.dumps([None, "started", None]).encode()),
    "scribble nesting": frame(b"[" * 100_000),
}


def scribble(data):
    """Writes to every socket of this process."""
    for descriptor in range(3, 1024):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as end:
            end.send(data)


def wants_answer(completion, answer):
    return float(completion == answer)


def batch_lengths(completions, token_ids):
    return [len(c) + 10 * len(t) for c, t in zip(completions, token_ids)]


def batch_with_columns(prompts, completions, weight):
    if "hang" in completions:
        time.sleep(1000)
    return np.array([w if c != "nan" else math.nan for c, w in zip(completions, weight)])


def batch_too_short(completions):
    return [1.0]


@batch_reward
def marked(token_ids):
    return [float(sum(t)) for t in token_ids]


def everything(prompt, completion, token_ids, **columns):
    assert "prompt" not in columns
    return len(prompt) + len(completion) + len(token_ids) + columns["extra"]


def where(completion):
    return float(os.getpid())


def noise(completion):
    import random

    return random.random() + hash(completion) % 1000


def spawns_a_sleeper(completion):
    subprocess.Popen(["sleep", "600"])
    time.sleep(1000)


async def asynchronous(completion):
    return 1.0


def inputs(*completions, **columns):
    return [
        RewardInput("p", c, [1, 2], {name: values[i] for name, values in columns.items()})
        for i, c in enumerate(completions)
    ]


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def runner():
    spec = RewardSpec(behave, name="behave", timeout_s=1.0)
    with RewardRunner([spec], workers=2) as made:
        yield made


@pytest.mark.parametrize(
    ("completion", "kind", "message"),
    [
        ("raise", "exception", "KeyError: 'no such thing'"),
        ("exit", "exception", "SystemExit: done"),
        ("interrupt", "exception", "KeyboardInterrupt"),
        ("hang", "timeout", "longer than 1.0 s"),
        ("sleep", "timeout", "longer than 1.0 s"),
        ("hold", "timeout", "longer than 1.0 s"),
        ("die", "crash", "exit code 3"),
        ("kill", "crash", "signal 9"),
        ("nan", "not_finite", "nan"),
        ("inf", "not_finite", "-inf"),
        ("huge", "not_finite", "no finite float32"),
        ("text", "not_finite", "'1.0' of type str"),
        ("list", "not_finite", "of type list"),
        ("lambda", "not_finite", "of type function"),
    ],
)
def test_a_bad_reward_costs_its_sample_alone(runner, completion, kind, message):
    before = dict(runner.failures)
    results = runner.score(inputs("0.25", completion, "0.5", "-1"))
    assert [r.is_valid for r in results] == [True, False, True, True]
    assert [r.value for r in results] == [0.25, 0.0, 0.5, -1.0]
    assert results[1].error.startswith(f"behave: {kind}: ")
    assert message in results[1].error
    assert "\n" not in results[1].error
    changed = {k: n - before[k] for k, n in runner.failures.items() if n != before[k]}
    assert changed == {kind: 1}


def of_maths(completion, task):
    return 1.0 if task == "maths" else None


def of_code(completions, task):
    return [0.5 if t in ("code", "both") else None for t in task]


def forgets(completion):
    float(completion)


@pytest.mark.parametrize("in_process", [True, False])
def test_a_reward_that_does_not_apply_leaves_the_sample_to_the_others(in_process):
    rewards = [RewardSpec(of_maths, in_process=in_process), RewardSpec(of_code, weight=2.0, in_process=in_process)]
    with RewardRunner(rewards, workers=1) as made:
        results = made.score(inputs("a", "b", "c", task=["maths", "code", "law"]))
    assert [(r.value, r.is_valid) for r in results] == [(1.0, True), (1.0, True), (0.0, False)]
    assert [r.components for r in results] == [{"of_maths": 1.0}, {"of_code": 0.5}, {}]
    assert results[2].error == "none_applies: of_maths and of_code returned None"
    assert {kind: n for kind, n in made.failures.items() if n} == {"none_applies": 1}


def test_a_reward_that_applies_to_nothing_says_so_once(monkeypatch):
    from absl import logging

    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    with RewardRunner([RewardSpec(forgets, in_process=True), RewardSpec(behave, in_process=True)]) as made:
        assert [r.value for r in made.score(inputs("1", "2")) + made.score(inputs("1", "2"))] == [1.0, 2.0] * 2
    assert len(lines) == 1 and "forgets returned None for all of 2 samples" in lines[0]


def test_a_child_that_a_reward_forked_answers_for_nobody(runner):
    assert [r.value for r in runner.score(inputs("fork", "7", "fork", "8", "9"))] == [4.0, 7.0, 4.0, 8.0, 9.0]


@pytest.mark.parametrize("what", SCRIBBLES)
def test_what_a_reward_writes_to_its_socket_costs_its_sample_and_runs_nowhere(what):
    """One worker, so that the samples behind it are those whose answers could be mistaken."""
    with RewardRunner([RewardSpec(behave, timeout_s=1.0)], workers=1) as made:
        results = made.score(inputs(what, "7", "8"))
    assert [r.value for r in results] == [0.0, 7.0, 8.0]
    assert [r.is_valid for r in results] == [False, True, True]
    assert not os.path.exists(os.path.join(tempfile.gettempdir(), f"executed-{os.getpid()}"))


@pytest.mark.parametrize(
    "value", [[], [{"tuple": [1e39, None, ""]}], [{"tuple": ["1", None, ""]}], [[1.0, None, ""]], 5]
)
def test_a_forged_answer_is_no_reward(value):
    outcomes = _outcomes_of(_resolve(RewardSpec(behave)), Reply(DONE, read_data(json.dumps([value]).encode())[0]), 1)
    assert [(o.value, o.failure) for o in outcomes] == [(0.0, "crash")]


def test_data_of_workers_arrives_as_it_was():
    values = [None, True, 3, -0.1, "a\ud800", [1, (2, "x")], {1: {"a": (1.5,)}, ("k", 2): []}, {1, 2}]
    assert read_data(write_data(*values, np.float64(2.5), np.str_("s"))) == [*values, 2.5, "s"]
    with pytest.raises(TypeError, match="no plain data"):
        write_data(object())


def test_the_pool_survives_many_failures_at_once(runner):
    bad = ["hang", "die", "raise", "exit", "kill", "nan"]
    completions = [x for i in range(4) for x in (str(i), bad[i % 6], bad[(i + 3) % 6])]
    results = runner.score(inputs(*completions))
    assert [r.is_valid for r in results] == [c not in bad for c in completions]
    assert [r.value for r in runner.score(inputs("1", "2", "3"))] == [1.0, 2.0, 3.0]


def test_numbers_of_every_kind_count(runner):
    results = runner.score(inputs("numpy", "array", "true", "int"))
    assert [r.value for r in results] == [0.5, 2.0, 1.0, 3.0]


def test_order_is_kept_and_no_inputs_give_no_results(runner):
    values = [i / 8 for i in range(100)]
    assert [r.value for r in runner.score(inputs(*map(str, values)))] == values
    assert runner.score([]) == []


def test_the_first_failure_of_a_kind_is_logged_once_with_its_traceback(monkeypatch):
    from absl import logging

    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    with RewardRunner([RewardSpec(behave, in_process=True)]) as made:
        made.score(inputs("raise", "raise", "nan"))
        made.score(inputs("raise"))
    assert len(lines) == 2
    assert "Traceback" in lines[0] and "test_tasks_rewards.py" in lines[0] and "KeyError" in lines[0]
    assert "nan" in lines[1]
    assert {kind: n for kind, n in made.failures.items() if n} == {"exception": 3, "not_finite": 1}


def test_in_process_failures_cost_one_sample_too():
    with RewardRunner([RewardSpec(behave, in_process=True)]) as made:
        results = made.score(inputs("raise", "exit", "nan", "1"))
    assert [r.is_valid for r in results] == [False, False, False, True]


def test_weights_sum_and_a_failed_component_is_missing():
    specs = [
        RewardSpec(behave, weight=2.0, timeout_s=1.0),
        RewardSpec(wants_answer, weight=-0.5, name="exact"),
        (LengthReward(max_tokens=2), 1.0),
    ]
    with RewardRunner(specs, workers=2) as made:
        assert made.names == ["behave", "exact", "length_reward"]
        good, bad = made.score(inputs("1.5", "raise", answer=["1.5", "raise"]))
    assert good.components == {"behave": 1.5, "exact": 1.0, "length_reward": 1.0}
    assert good.value == 2.0 * 1.5 - 0.5 + 1.0
    assert bad.components == {"exact": 1.0, "length_reward": 1.0}
    assert (bad.value, bad.is_valid) == (0.0, False)


def test_batch_rewards_see_the_whole_batch():
    specs = [batch_lengths, (batch_with_columns, 100.0), (marked, 1000.0)]
    with RewardRunner(specs, workers=2) as made:
        results = made.score(inputs("a", "bbb", weight=[1.0, 2.0]))
    assert [r.value for r in results] == [21 + 100 + 3000, 23 + 200 + 3000]


def test_a_batch_reward_loses_one_sample_to_nan_and_all_to_a_timeout_or_a_wrong_length():
    with RewardRunner([RewardSpec(batch_with_columns, timeout_s=0.5)], workers=1) as made:
        nan = made.score(inputs("a", "nan", "b", weight=[1.0, 2.0, 3.0]))
        hang = made.score(inputs("a", "hang", weight=[1.0, 2.0]))
        after = made.score(inputs("a", weight=[1.0]))
    assert [r.is_valid for r in nan] == [True, False, True]
    assert [r.is_valid for r in hang] == [False, False]
    assert made.failures["timeout"] == 2
    assert after[0].value == 1.0
    with RewardRunner([RewardSpec(batch_too_short, in_process=True)]) as made:
        results = made.score(inputs("a", "b"))
    assert not any(r.is_valid for r in results)
    assert "returned 1 values for 2 samples" in results[0].error


def test_a_reward_gets_what_it_names():
    columns = {"extra": [5], "completion": ["column of that name"], "unused": [object]}
    with RewardRunner([RewardSpec(everything, in_process=True)]) as made:
        assert made.score(inputs("abc", **columns))[0].value == 1 + 3 + 2 + 5
    with RewardRunner([RewardSpec(batch_lengths, in_process=True)]) as made:
        assert made.score(inputs("abc", **columns))[0].value == 23


def takes_all(prompt, completion, **columns):
    """Counts what it finds, and leaves nothing behind."""
    found = len(columns["cases"]) + len(columns["table"]["a"]) + len(prompt)
    columns["cases"].clear()
    columns["table"]["a"].clear()
    prompt.clear()
    return found


@batch_reward
def takes_all_of_a_batch(prompts, cases):
    found = [len(prompt) + len(case) for prompt, case in zip(prompts, cases)]
    for value in (*prompts, *cases):
        value.clear()
    return found


@pytest.mark.parametrize(("reward", "value"), [(takes_all, 4.0), (takes_all_of_a_batch, 3.0)])
@pytest.mark.parametrize("in_process", [True, False])
def test_a_reward_cannot_change_the_data(reward, value, in_process):
    columns = {"cases": [1, 2], "table": {"a": [3]}}
    rows = [RewardInput([{"role": "user", "content": "?"}], "c", [1], columns) for _ in range(3)]
    spec = RewardSpec(reward, in_process=in_process)
    with RewardRunner([spec, RewardSpec(reward, name="again", in_process=in_process)], workers=1) as made:
        assert [r.value for r in made.score(rows)] == [2 * value] * 3
    assert columns == {"cases": [1, 2], "table": {"a": [3]}} and rows[0].prompt == rows[2].prompt != []


def test_samples_run_in_several_processes_and_not_in_this_one():
    with RewardRunner([RewardSpec(where)], workers=2) as made:
        pids = {r.value for r in made.score(inputs(*["x"] * 200))}
        assert pids == {float(p) for p in made._pool.pids}
    assert os.getpid() not in pids


def test_results_do_not_depend_on_the_workers():
    values = []
    for workers in (1, 2):
        with RewardRunner([noise], workers=workers) as made:
            values.append([r.value for r in made.score(inputs(*"abcdefgh"))])
    assert values[0] == values[1]


def test_a_value_that_cannot_be_sent_costs_its_sample():
    rows = inputs("a", "b", answer=[lambda: 0, "b"])
    with RewardRunner([wants_answer], workers=1) as made:
        assert [r.is_valid for r in made.score(rows)] == [False, True]


def test_math_verify_runs_in_workers_under_its_own_timeouts():
    with RewardRunner([MathVerify()], workers=1) as made:
        results = made.score(
            inputs(
                "1/2",
                r"so it is \boxed{\frac{1}{2}}",
                "$0.50$",
                "3",
                "",
                "((((",
                answer=["0.5", r"\frac12", "1/2", "4", "1", "2"],
            )
        )
    assert [r.value for r in results] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert all(r.is_valid for r in results)


class TestNoOrphans:
    def test_closing_ends_every_worker_even_a_hung_one(self):
        with WorkerPool([behave], 2) as pool:
            pids = pool.pids
            assert pool.run([Job(0, "sleep", 0.2), Job(0, "1", 5.0)])[0].kind == TIMEOUT
            pids += pool.pids
        assert not any(alive(p) for p in pids)
        with pytest.raises(RuntimeError, match="closed"):
            pool.run([Job(0, "1", 1.0)])

    def test_what_a_hung_reward_started_is_ended_with_it(self):
        with WorkerPool([spawns_a_sleeper], 1) as pool:
            group = pool.pids[0]
            assert pool.run([Job(0, "x", 1.0)])[0].kind == TIMEOUT
        members = subprocess.run(["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True).stdout.split()
        assert [m for m in members if not m.startswith("Z")] == []

    def test_an_interrupted_run_leaves_no_job_behind(self, monkeypatch):
        with WorkerPool([behave], 1) as pool:
            monkeypatch.setattr(pool, "_wait", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                pool.run([Job(0, "7", 5.0)])
            monkeypatch.undo()
            assert pool.run([Job(0, "8", 5.0)]) == [(DONE, 8.0)]

    def test_a_worker_that_dies_while_idle_is_replaced_and_its_job_done(self):
        with WorkerPool([behave], 1) as pool:
            os.kill(pool.pids[0], signal.SIGKILL)
            wait_until(lambda: not alive(pool.pids[0]))
            assert pool.run([Job(0, "8", 5.0), Job(0, "9", 5.0)])[1] == (DONE, 9.0)

    @pytest.mark.parametrize("kills", [1, 2])
    def test_what_a_worker_did_that_was_killed_from_outside_is_done_once_more(self, kills, tmp_path):
        began = tmp_path / "began"
        with WorkerPool([waits_until_killed], 1) as pool, concurrent.futures.ThreadPoolExecutor(1) as thread:
            replies = thread.submit(pool.run, [Job(0, (str(began), kills), 30.0), Job(0, (str(began), 0), 30.0)])
            for n in range(1, kills + 1):
                wait_until(lambda n=n: began.exists() and len(began.read_text().split()) == n)
                os.kill(int(began.read_text().split()[-1]), signal.SIGKILL)
            first, second = replies.result()
        assert first == ((DONE, 2.0) if kills == 1 else (CRASHED, "the worker process was ended by signal 9"))
        assert second == (DONE, 3.0)

    @pytest.mark.parametrize("kills", [1, 9])
    def test_a_worker_that_is_killed_while_it_starts_is_started_again_a_few_times(self, kills, tmp_path):
        pool = WorkerPool([KilledAtStart(str(tmp_path / "kills"), kills)], 1)
        if kills == 1:
            with pool:
                assert pool.run([Job(0, 2.0, 5.0)]) == [(DONE, 2.0)]
        else:
            with pytest.raises(WorkersFailed, match=r"^5 worker processes in a row did not start.*ended by signal 9"):
                pool.open()

    @pytest.mark.parametrize("completion", ["sleep", "hang", "1"])
    def test_workers_end_when_the_parent_is_killed(self, tmp_path, completion):
        script = f"""
            import sys
            sys.path.insert(0, {os.path.dirname(__file__)!r})
            from test_tasks_rewards import behave
            from rljax.tasks.workers import Job, WorkerPool
            pool = WorkerPool([behave], 2)
            pool.open()
            print(*pool.pids, flush=True)
            pool.run([Job(0, {completion!r}, 600.0)])
            import time; time.sleep(600)
        """
        parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
        pids = [int(p) for p in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        parent.kill()
        parent.wait()
        wait_until(lambda: not any(map(alive, pids)))

    def test_workers_end_when_the_parent_just_exits(self):
        script = f"""
            import sys
            sys.path.insert(0, {os.path.dirname(__file__)!r})
            from test_tasks_rewards import behave
            from rljax.tasks import RewardRunner
            runner = RewardRunner([behave], workers=2)
            runner.open()
            print(*runner._pool.pids)
        """
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
        )
        assert run.returncode == 0, run.stderr
        assert len(run.stdout.split()) == 2
        wait_until(lambda: not any(alive(int(p)) for p in run.stdout.split()))


def test_workers_neither_import_jax_nor_run_the_main_script(tmp_path):
    (tmp_path / "lean_reward.py").write_text(
        "import sys\ndef lean(completion):\n    return float('jax' in sys.modules or 'heavy' in sys.modules)\n"
    )
    (tmp_path / "heavy.py").write_text("print('main script ran')\n")
    (tmp_path / "main.py").write_text(
        "import heavy, jax\nfrom lean_reward import lean\nfrom rljax.tasks import *\n"
        "with RewardRunner([lean], workers=1) as runner:\n"
        "    print(runner.score([RewardInput('p', 'c')])[0].value)\n"
    )
    run = subprocess.run([sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "main script ran\n0.0\n", run.stderr


def local(completion):
    return 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RewardRunner([]), "at least one reward"),
        (lambda: RewardRunner([local, local]), r"\['local', 'local'\] must differ"),
        (lambda: RewardRunner([(local, math.nan)]), "weight nan of reward local"),
        (lambda: RewardRunner([RewardSpec(local, timeout_s=0.0)]), "timeout_s 0.0 of reward local"),
        (lambda: RewardRunner([local], workers=0), "at least 1"),
        (lambda: RewardRunner([lambda completion: 1.0]), "cannot be sent to a worker process.*in_process"),
        (lambda: RewardRunner([lambda a, b: 1.0]), r"\(a, b\) cannot be called as a reward; it must take some of"),
        (lambda: RewardRunner([lambda completion, /: 1.0]), "cannot be called as a reward"),
        (lambda: RewardRunner([lambda prompts, completion: 1.0]), "cannot be called as a reward"),
        (lambda: RewardRunner([asynchronous]), "async function"),
        (lambda: RewardRunner([ExactMatch]), "is the class ExactMatch; give an instance"),
        (lambda: RewardRunner([RewardSpec(MathVerify(), in_process=True)]), "relies on signals"),
        (lambda: load_callable("no_colon"), "'module:function'"),
        (lambda: load_callable("no_such_module:f"), "no module of that name is on the Python path"),
        (lambda: load_callable("rljax.no_such:f"), "no module of that name"),
        (lambda: load_callable("rljax.tasks.answers:nope"), r"has no 'nope'; functions there: .*in_box"),
        (lambda: load_callable("math:pi"), "cannot be called"),
        (lambda: load_callable("broken_reward:f"), "ZeroDivisionError.*repair the module"),
        (lambda: load_callable("needs_more:f"), "not_installed_at_all.*install what it needs"),
        (
            lambda: RewardRunner(["fails_elsewhere:f"], workers=1).open(),
            r"^a worker process cannot load its functions \(OSError: only there\); they must .* import on their own$",
        ),
    ],
)
def test_wrong_rewards_are_refused_before_the_run(make, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_reward.py").write_text("1 / 0\n")
    (tmp_path / "needs_more.py").write_text("import not_installed_at_all\n")
    (tmp_path / "fails_elsewhere.py").write_text(
        f"import os\nif os.getpid() != {os.getpid()}: raise OSError('only there')\ndef f(completion): return 1.0\n"
    )
    with pytest.raises(ValueError, match=message):
        make()


def test_a_worker_that_the_system_does_not_start_is_told_in_one_line(monkeypatch):
    def none_left(*_, **__):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    with RewardRunner([wants_answer], workers=1) as runner:
        monkeypatch.setattr(subprocess, "Popen", none_left)
        monkeypatch.setattr("rljax.tasks.workers._FORK_PAUSE_S", 0.0)
        why = r"\[Errno 11\] Resource temporarily unavailable: this user, machine or container has no room for .*$"
        with pytest.raises(ValueError, match=f"^worker process 1 of 3 does not start: {why}"):
            RewardRunner([wants_answer], workers=3).open()

        # of a run: what died cannot be replaced
        os.kill(runner._pool.pids[0], signal.SIGKILL)
        with pytest.raises(WorkersFailed, match=f"^5 worker processes .* did not start; the last: {why}"):
            runner.score([RewardInput("p", "a", [1], {"answer": "a"})])


def test_no_process_starts_before_the_runner_is_opened():
    runner = RewardRunner([wants_answer], workers=1)
    assert runner._pool.pids == []
    with pytest.raises(RuntimeError, match=r"not open; use it in a `with` block, or call open\(\) first$"):
        runner.score(inputs("x"))
    with runner:
        assert runner.score(inputs("x", answer=["x"]))[0].is_valid
    runner.close()
    with pytest.raises(RuntimeError, match="closed"), runner:
        pass

    never = RewardRunner([wants_answer], workers=1)
    never.close()
    with pytest.raises(RuntimeError, match="closed"):
        never.open()


def test_rewards_in_process_need_no_with():
    assert RewardRunner([RewardSpec(local, in_process=True)]).score(inputs("x"))[0].value == 1.0


def test_missing_columns_are_named_before_the_run():
    with RewardRunner([RewardSpec(wants_answer, in_process=True), ExactMatch(column="solution")]) as made:
        made.check_columns(["answer", "solution", "more"])
        with pytest.raises(
            ValueError, match=r"wants_answer wants the columns \['answer'\], and the data has \['solution'\]"
        ):
            made.check_columns(["solution"])
        with pytest.raises(ValueError, match=r"exact_match wants the columns \['solution'\]"):
            made.check_columns(["answer"])


def test_a_reward_is_found_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards_here.py").write_text("def score(completion, token_ids):\n    return len(token_ids) / 4\n")
    with RewardRunner(["rewards_here:score"], workers=1) as made:
        assert made.score(inputs("x"))[0].components == {"score": 0.5}
