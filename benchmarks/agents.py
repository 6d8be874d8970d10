"""What agents need: how soon a sandbox runs a program, and whether anything gets out of it.

    python benchmarks/agents.py --preset=full --json=agents.json

Part `sandbox`: the time from asking to the first statement of a program (`start`), to the end of a whole empty one, and
to the first statement in a Python process of its own; then programs of the attack list, one after another. A leak is
anything that an attack got at, and any process or file that it left behind. Where this user may make a control group,
`memory` is the most that an attack took, with the kernel's memory for it, beyond a program that does nothing. `full`
runs 1,000 attacks, `small` the list once.
"""

import argparse
import contextlib
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import finish, machine
from _probe import probe

from rljax.envs.sandbox import Limits, Sandbox, SandboxResult
from rljax.envs.sandbox.attacks import LIMITS, Meter, Outside, attacks

SIZES = {
    "smoke": dict(starts=2, attacks=2),
    "small": dict(starts=50, attacks=0),
    "full": dict(starts=500, attacks=1000),
}
NOW = "import time\nprint(time.monotonic())"
ATTACK_SECONDS = 0.5  # on the wall; enough for what an attack tries


def time_starts(count: int) -> dict[str, list[float]]:
    """Milliseconds of `count` programs: until the first statement runs, and until all is over."""
    found: dict[str, list[float]] = {"start": [], "whole": [], "own process": []}
    with Sandbox(Limits(), workers=2) as sandbox:
        for _ in range(count):
            time.sleep(0.02)  # as long as a model needs to write a program, and less
            begin = time.monotonic()
            output = sandbox.run(NOW).output
            found["whole"].append(1000 * (time.monotonic() - begin))
            found["start"].append(1000 * (float(output) - begin))
    for _ in range(max(10, count // 10)):
        begin = time.monotonic()
        done = subprocess.run([sys.executable, "-I", "-c", NOW], capture_output=True, text=True, check=True)
        found["own process"].append(1000 * (float(done.stdout) - begin))
    return found


def time_burst(programs: int, workers: int) -> float:
    """Empty programs a second when more are asked for than stand ready."""
    with Sandbox(Limits(), workers=workers) as sandbox:
        sandbox.run("pass")
        begin = time.monotonic()
        for _ in range(programs):
            sandbox.run("pass")
        return programs / (time.monotonic() - begin)


def count_leaks(runs: int) -> tuple[dict[str, list[str]], int, str, dict[str, float]]:
    """What attacks got at, by attack; how many ran; the level; MB of memory by attack, where it can be measured. `runs`
    0 is the whole list once."""
    before = _files()
    peaks: dict[str, float] = {}
    leaks: dict[str, list[str]] = {}
    with Outside() as outside, Sandbox(LIMITS, workers=1) as sandbox:
        names = attacks(sandbox)
        total = runs or len(names)
        _, idle = measured(sandbox, "pass")
        for i, name in enumerate(itertools.islice(itertools.cycle(names), total)):
            result, peak = measured(sandbox, outside.program(name))
            found = outside.leaks(result, sandbox.limits) + outside.left_behind(sandbox)
            if idle is not None and peak is not None:
                peaks[name] = max(peaks.get(name, 0.0), peak - idle)
            if found:
                leaks.setdefault(name, []).extend(found)
                print(f"  LEAK of {name!r}: {found[0]}", flush=True)
            if (i + 1) % 200 == 0:
                print(f"  {i + 1} of {total} attacks", flush=True)
        level = sandbox.level
    if left := _files() - before:
        leaks["files"] = sorted(left)
    return leaks, total, level, peaks


def measured(sandbox: Sandbox, program: str) -> tuple[SandboxResult, float | None]:
    """What came of a program, and the MB that it took at most; None where nothing can count them."""
    meter = None
    with contextlib.suppress(OSError):
        meter = Meter(sandbox)
    result = sandbox.run(program, timeout_s=ATTACK_SECONDS)
    return result, meter and meter.peak_mb()


def _files() -> set[str]:
    folders = [Path(tempfile.gettempdir()), Path.home(), Path("/dev/shm"), Path("/var/tmp")]
    return {str(file) for folder in folders if folder.is_dir() for file in folder.glob("*rljax-*")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(SIZES), default="small")
    parser.add_argument("--part", choices=("sandbox",), default="sandbox")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of the burst; medians are reported")
    arguments = parser.parse_args()
    size = SIZES[arguments.preset]
    is_smoke = arguments.preset == "smoke"

    # Times first: what attacks leave the machine to do would be in them.
    times = time_starts(size["starts"])
    bursts = [time_burst(2 if is_smoke else 40, workers=2) for _ in range(1 if is_smoke else arguments.repeats)]

    begin = time.monotonic()
    leaks, runs, level, peaks = count_leaks(size["attacks"])
    seconds = time.monotonic() - begin

    results = [
        {"name": f"{name}: {what} ms", "value": value}
        for name, values in times.items()
        for what, value in (("median", statistics.median(values)), ("95th percentile", _quantile(values, 0.95)))
    ]
    results.append({"name": "programs a second, one after another", "value": statistics.median(bursts)})
    results.append({"name": "attacks", "value": runs})
    results.append({"name": "seconds of all attacks", "value": seconds})
    results += [{"name": f"leaks: {name}", "value": len(found)} for name, found in leaks.items()]
    most = sorted(peaks.items(), key=lambda item: -item[1])[:5]
    results += [{"name": f"memory MB: {name}", "value": value} for name, value in most]

    start = statistics.median(times["start"])
    ratios = {
        "sandbox_start_ms": start,
        "sandbox_start_vs_own_process": statistics.median(times["own process"]) / start,
        "sandbox_leaks": sum(map(len, leaks.values())),
        "sandbox_attacks": runs,
    }
    if most:
        ratios["sandbox_memory_vs_limit"] = most[0][1] / LIMITS.memory_mb
    setting = {"level": level, **size, "limits": vars(LIMITS), "attack_seconds": ATTACK_SECONDS}
    finish("agents", arguments, machine([probe("float32", is_smoke)]), setting, results, ratios)


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


if __name__ == "__main__":
    main()
