"""The sandbox contains every attack on its list, ends with its programs, and goes on."""

import os
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rljax.envs.sandbox import LEVELS, Limits, Sandbox
from rljax.envs.sandbox.attacks import ATTACKS, LIMITS, Meter, Outside, attacks
from rljax.envs.sandbox.groups import remove_groups

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is Linux's")


def start(level, limits=LIMITS, **kwargs):
    sandbox = Sandbox(limits, level=level, **kwargs)
    try:
        sandbox.open()
        return sandbox
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def box(request):
    with start(request.param, workers=2) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def outside():
    with Outside() as outside:
        yield outside


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_is_contained_and_leaves_nothing_behind(box, outside, attack):
    if attack not in attacks(box):
        pytest.skip(f"level {box.level} says that it does not stop this")
    result = box.run(outside.program(attack), timeout_s=0.6)
    assert outside.leaks(result, box.limits) == []
    assert outside.left_behind(box) == []
    assert box.run("print(6 * 7)").output == "42\n"


HUNGRY = ("memory bomb", "memory bomb of several processes", "memory bomb of several processes at one moment")


def test_memory_of_the_machine_stays_within_the_limit(outside):
    """As control groups count it, with what the kernel holds for the programs; beyond what an empty program takes. A
    guard alone comes late on busy processors: several processes that filled memory at one moment had 1.3 times it."""
    with start("namespaces", workers=1) as sandbox:
        try:
            peaks: dict[str, float] = {}
            # What stands ready beside the program takes some MB more or less.
            for name in (*["nothing"] * 5, *HUNGRY, "memory in buffers of sockets", "memory in pipes"):
                meter = Meter(sandbox)
                result = sandbox.run(outside.program(name) if name in ATTACKS else "pass", timeout_s=1.0)
                peaks[name] = max(meter.peak_mb(), peaks.get(name, 0.0))
                assert outside.leaks(result, sandbox.limits) == []
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error}")
        groups = sandbox.groups
    assert not groups.exists()
    nothing = peaks.pop("nothing")
    for name, peak in peaks.items():
        assert peak - nothing <= 1.1 * LIMITS.memory_mb, (name, peak, nothing)


def test_a_group_that_a_killed_trainer_has_left_goes_at_the_next_start():
    with start("namespaces", workers=1) as sandbox:
        if sandbox.groups is None:
            pytest.skip("no control group can be made here")
        # Their names begin with those of the kind and of the namespace, then the number of the process.
        kind, own, _ = sandbox.groups.name.rpartition(f"-{os.getpid()}-")
        left = sandbox.groups.with_name(f"{kind}-4194400-left")  # above what a process can be numbered
        elsewhere = sandbox.groups.with_name("rljax-sandbox-7-4194400-left")  # whose number means nothing here
        assert own
        (left / "1").mkdir(parents=True)
        elsewhere.mkdir()
    try:
        with start("namespaces", workers=1):
            assert not left.exists() and elsewhere.exists()
    finally:
        elsewhere.rmdir()


def test_processes_that_start_at_one_moment_take_away_the_same_groups(tmp_path):
    """They are folders as far as that goes; whoever stumbled over another here went on without control groups."""
    groups = [tmp_path / str(i) for i in range(200)]
    for group in groups:
        (group / "1").mkdir(parents=True)
    start = threading.Barrier(8)

    def remove():
        start.wait()
        for group in groups:
            remove_groups(group)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(remove) for _ in range(8)]:
            done.result()
    assert not any(tmp_path.iterdir())


def test_a_program_that_the_kernel_ends_for_want_of_memory_is_told_so_and_the_next_one_runs():
    """Shared memory that a child has filled is no process's own any more once it has ended, and no guard finds it."""
    program = """
        import mmap, os, time
        read, write = os.pipe()
        for _ in range(3):
            if os.fork() == 0:
                shared = mmap.mmap(-1, 40 * 2**20)
                if os.fork() == 0:
                    for at in range(0, len(shared), 4096):
                        shared[at] = 1
                    os._exit(0)
                os.wait()
                os.write(write, b"x")
                time.sleep(5)
            os.read(read, 1)  # one after the other: the guard sees what several fill at one moment
        time.sleep(5)
    """
    with start("namespaces", workers=1) as sandbox:
        if sandbox.groups is None:
            pytest.skip("no control group can be made here")
        assert sandbox.run(textwrap.dedent(program), timeout_s=3.0).outcome == "memory"
        assert sandbox.run("print(1)").output == "1\n"


def test_an_attack_that_nothing_holds_is_noticed(outside):
    """The list can fail: without isolation the harmless ones among the attacks get out."""
    with start("rlimits", workers=1) as sandbox:
        held = ("survive as a daemon",)
        loose = (
            "read the home",
            "sockets",
            "climb out",
            "pairs of sockets",
            "memory in pipes",
            "watch what others open",
        )
        for attack in (*loose, *held):
            found = outside.leaks(sandbox.run(outside.program(attack)), sandbox.limits)
            assert bool(found) == (attack in loose), attack  # on Linux the guard ends orphans here too
        assert outside.left_behind(sandbox) == []


def test_output_errors_and_exit_codes_are_reported(box):
    assert box.run("import sys\nprint('a')\nprint('b', file=sys.stderr)\nprint('c')").output == "a\nb\nc\n"
    failed = box.run("def f(x):\n    return 1 / x\nf(0)")
    assert (failed.outcome, failed.exit_code) == ("error", 1)
    assert "line 2, in f" in failed.output and "return 1 / x" in failed.output
    assert "server.py" not in failed.output
    assert box.run("import sys; sys.exit(3)").exit_code == 3
    assert box.run("x = (").output.endswith("SyntaxError: '(' was never closed\n")
    assert box.run("\0").outcome == "error"
    assert box.run("print('\udc80')").outcome == "error"


def test_event_loops_run_without_sockets(box):
    program = """
import asyncio, signal, os
async def main():
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: print("signal"))
    os.kill(os.getpid(), signal.SIGUSR1)
    return await asyncio.gather(asyncio.to_thread(lambda: 1), asyncio.sleep(0.05, 2))
print(asyncio.run(main()))
"""
    assert box.run(program).output == "signal\n[1, 2]\n"


def test_each_program_gets_input_and_a_clean_start(box):
    assert box.run("print(input() + input())", stdin="x\ny\n").output == "xy\n"
    box.run("import math; math.pi = 3; open('left', 'w').write('x')")
    assert box.run("import math, os; print(math.pi > 3.1, os.path.exists('left'))").output == "True False\n"
    draw = "import random; print(random.random(), hash('word'))"
    assert box.run(draw).output == box.run(draw).output


def test_echo_prints_the_value_of_the_last_line(box):
    assert box.run("x = 20\nx + 1", echo=True).output == "21\n"
    assert box.run("x = 20\nx + 1").output == ""
    assert box.run("None", echo=True).output == ""


def test_each_limit_names_itself(box):
    outcomes = {
        "timeout": "import time\nprint('before', flush=True)\ntime.sleep(9)",
        "memory": "x = bytearray(400_000_000)",
        "output": "while True: print('x' * 500)",
        "signal": "import ctypes; ctypes.string_at(0)",
    }
    results = {name: box.run(code, timeout_s=0.5 if name == "timeout" else None) for name, code in outcomes.items()}
    assert {name: result.outcome for name, result in results.items()} == {name: name for name in outcomes}
    assert results["timeout"].output == "before\n"
    assert results["output"].is_truncated and len(results["output"].output) == LIMITS.output_bytes


def test_too_many_processes_are_ended_where_the_kernel_does_not_count_them(outside):
    with start("rlimits", workers=1) as sandbox:
        bomb = "import os, time\nfor _ in range(30):\n    if os.fork() == 0: time.sleep(3); os._exit(0)\ntime.sleep(3)"
        assert sandbox.run(bomb, timeout_s=2.0).outcome == "processes"
        assert outside.left_behind(sandbox) == []


MAPPINGS = """
import ctypes, os, time
os.fork()
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
start = libc.mmap(None, 40 << 20, 1, 0x22, -1, 0)
for page in range(0, 10_000, 2): libc.mprotect(start + 4096 * page, 4096, 0)
time.sleep(9)
"""


def test_what_the_kernel_notes_of_mappings_counts_as_memory():
    with start("namespaces", workers=1) as sandbox:
        assert sandbox.run(MAPPINGS, timeout_s=9.0).outcome == "memory"  # 40 MB of room, none of which is written to


def test_cpu_time_is_limited(box):
    result = box.run("while True: pass", timeout_s=20.0)
    assert result.outcome == "cpu"


def test_many_threads_share_a_sandbox(box):
    outputs = {}

    def work(i):
        outputs[i] = box.run(f"print({i} ** 2)").output

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {i: f"{i**2}\n" for i in range(16)}


def test_a_dead_server_is_replaced():
    with start("namespaces" if "namespaces" in working_levels() else "landlock", workers=1) as sandbox:
        before = sandbox.server_pid
        os.kill(before, 9)
        outputs = [sandbox.run("print(1)").output for _ in range(3)]
        assert outputs[-1] == "1\n"
        assert sandbox.server_pid != before


def test_closing_ends_everything(outside):
    sandbox = start("landlock", workers=2)
    folder, server = sandbox.folder, sandbox.server_pid
    sandbox.close()
    assert not os.path.exists(folder) and not os.path.exists(f"/proc/{server}")
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.run("print(1)")


def test_nothing_starts_before_it_is_opened():
    sandbox = Sandbox(LIMITS, workers=1, level="landlock")
    assert sandbox._servers == []
    with pytest.raises(RuntimeError, match=r"not open; use it in a `with` block"):
        sandbox.run("print(1)")
    sandbox.close()
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.open()


def test_the_level_is_chosen_and_described():
    with Sandbox(LIMITS, workers=1) as sandbox:
        assert sandbox.level == working_levels()[0]
        text = sandbox.describe()
    assert "memory of all processes together is bounded by" in text
    assert f"level: {sandbox.level}" in text and "does not stop" in text and "memory_mb 96" in text
    with pytest.raises(ValueError, match="'jail' is not one of namespaces, landlock"):
        Sandbox(level="jail")
    with pytest.raises(ValueError, match="wall_s is 0"):
        Limits(wall_s=0.0)


def test_a_sandbox_stands_ready_before_it_is_asked_for(box):
    box.run("pass")
    times = []
    for _ in range(9):
        time.sleep(0.03)
        begin = time.monotonic()
        times.append(float(box.run("import time; print(time.monotonic())").output) - begin)
    assert sorted(times)[4] < 0.06


def working_levels():
    found = []
    for level in LEVELS[:2]:
        try:
            with Sandbox(LIMITS, workers=1, level=level):
                found.append(level)
        except ValueError:
            pass
    return found or pytest.skip("no isolation here")
