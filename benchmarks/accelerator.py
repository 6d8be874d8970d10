"""All that an accelerator can show, in two runs of under ten minutes each, into one JSON.

    python benchmarks/accelerator.py --part=1 --json=accelerator.json   # kernels, the loop, log-probs; decoding
    python benchmarks/accelerator.py --part=2 --json=accelerator.json   # training, forests, memory
    python benchmarks/accelerator.py --json=accelerator.json            # both

Each step is a process of its own with a limit of time, so one that fails or hangs costs only itself, and its last lines
are in the file. A second run adds to the file what the first has left there. `table` has a line per figure: the bound
(what the device's own rates would take, or the bytes that are predicted), what was measured, and the share of the
bound that is reached.

It needs what the extra `cuda` or `tpu` installs, and no rival. Without an accelerator the same steps run in a small
form, which shows that they work and measures nothing.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
PART_SECONDS = 560.0
"""Of a part, which leaves some of ten minutes for what comes before and after it."""
LEAST_SECONDS = 10.0
"""A step that has less is not begun."""


class Step(NamedTuple):
    """One process of a part."""

    name: str
    part: int
    command: tuple[str, ...]
    """Arguments of Python. `{json}` is the file for its result, `{repeats}` the rounds of a benchmark."""
    limit: float
    """Seconds after which it is ended."""


def _benchmark(name: str, part: int, limit: float) -> Step:
    script = str(HERE / f"{name}.py")
    rivals = ("--rivals=none",) if name in ("rollout", "train_step") else ()
    return Step(name, part, (script, "--preset=gpu", "--json={json}", "--repeats={repeats}", *rivals), limit)


def _own(name: str, part: int, limit: float) -> Step:
    return Step(name, part, (str(Path(__file__).resolve()), f"--step={name}", "--json={json}"), limit)


STEPS = (
    _own("device", 1, 60),
    _own("kernels", 1, 150),
    Step("loop", 1, ("-m", "pytest", str(HERE.parent / "tests" / "test_gpu.py"), "-m", "gpu", "-q"), 120),
    _benchmark("numerics", 1, 200),
    _benchmark("rollout", 1, 300),
    _benchmark("train_step", 2, 250),
    _benchmark("forest", 2, 250),
    _own("memory", 2, 150),
)
"""In the order of their worth: what is last may find no time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, choices=(1, 2), help="one of the two parts; none: both")
    parser.add_argument("--json", metavar="FILE", required=True, help="the result; what is there is added to")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds of each benchmark; medians are reported")
    parser.add_argument("--step", choices=sorted(OWN), help="this one alone, in this process")
    arguments = parser.parse_args()
    if arguments.step:
        Path(arguments.json).write_text(json.dumps(OWN[arguments.step]()))
        return

    file = Path(arguments.json)
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"steps": {}}
    for part in (1, 2) if arguments.part is None else (arguments.part,):
        end = time.monotonic() + PART_SECONDS
        for step in (step for step in STEPS if step.part == part):
            report["steps"][step.name] = run(step, end - time.monotonic(), arguments.repeats)
            # After each step, so that nothing is lost when the whole is ended from outside.
            report["table"] = table(report["steps"])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(report, indent=1) + "\n")

    show(report)
    if any(step["status"] == "failed" for step in report["steps"].values()):
        sys.exit(1)


def run(step: Step, seconds_left: float, repeats: int) -> dict[str, Any]:
    """{"status": "done", "failed" or "no time", "seconds", "said": its last lines, "result": its JSON}."""
    limit = min(step.limit, seconds_left)
    if limit < LEAST_SECONDS:
        return {"status": "no time", "seconds": 0.0, "said": f"{seconds_left:.0f} s were left", "result": None}

    print(f"[{step.name}] at most {limit:.0f} s", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [word.replace("{json}", str(file)).replace("{repeats}", str(repeats)) for word in step.command]
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=HERE.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=limit)
            # pytest says 5 where there is nothing to run.
            status = "done" if process.returncode in (0, 5) else "failed"
        except subprocess.TimeoutExpired:
            _end(process)
            said = f"{process.communicate()[0]}\nended after {limit:.0f} s"
            status = "failed"
        finally:
            _end(process)
        result = json.loads(file.read_text()) if file.exists() else None

    seconds = time.monotonic() - started
    print(f"[{step.name}] {status} after {seconds:.0f} s", flush=True)
    return {"status": status, "seconds": seconds, "said": "\n".join(said.splitlines()[-40:]), "result": result}


def _end(process: subprocess.Popen) -> None:
    """Ends a step and what it has started: a worker that goes on would hold the device's memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


# ---- what no other benchmark has --------------------------------------------------------------------------------


def device() -> dict[str, Any]:
    """What there is: devices, versions, the rates that the device reaches."""
    import jax
    from _probe import probe

    first = jax.devices()[0]
    return {
        "devices": len(jax.devices()),
        "kind": first.device_kind,
        "platform": first.platform,
        "jax": jax.__version__,
        "bytes": (first.memory_stats() or {}).get("bytes_limit"),
        "rates": probe("bfloat16", quick=first.platform == "cpu"),
    }


def kernels() -> dict[str, Any]:
    """The attention that a run would take here against XLA's form: largest differences of result and gradients, and
    seconds forward and backward, at several lengths."""
    import jax
    import numpy as np

    from rljax.models import forest_attention, kernel_attention

    on_cpu = jax.devices()[0].platform == "cpu"
    heads, kv_heads, head_dim = (2, 1, 16) if on_cpu else (16, 8, 128)
    lines = []
    for length in (1024,) if on_cpu else (1024, 4096, 8192, 32768):
        rng = np.random.default_rng(length)
        rows = max(8192 // length, 1) if not on_cpu else 1
        q, k, v, cotangent = (
            jax.numpy.asarray(rng.standard_normal((rows, length, n, head_dim)), "bfloat16")
            for n in (heads, kv_heads, kv_heads, heads)
        )
        positions, subtree_end = random_forest(rng, rows, length)

        found = {}
        for name, attention in (("kernel", kernel_attention), ("xla", forest_attention)):
            program = with_gradients(attention, positions, subtree_end)
            found[name] = timed(program, q, k, v, cotangent)

        (ours, seconds), (xla, xla_seconds) = found["kernel"], found["xla"]
        gaps = [float(np.max(np.abs(np.float32(a) - np.float32(b)))) for a, b in zip(ours, xla, strict=True)]
        pairs = int(np.sum(np.asarray(subtree_end) - np.arange(length)))
        lines.append(
            {
                "rows": rows,
                "length": length,
                "gap_out_dq_dk_dv": gaps,
                "seconds": seconds,
                "xla_seconds": xla_seconds,
                # Two products forward, five backward.
                "flops": 7 * 2 * pairs * heads * head_dim,
            }
        )
    return {"lengths": lines}


def with_gradients(attention, positions, subtree_end):
    """The jitted program (q, k, v, cotangent) -> (out, d_q, d_k, d_v)."""
    import jax

    def both(q, k, v, cotangent):
        where = (jax.numpy.asarray(positions), jax.numpy.asarray(subtree_end))
        out, pull = jax.vjp(lambda *x: attention(*x, *where, positions.shape[1]), q, k, v)
        return out, *pull(cotangent)

    return jax.jit(both)


def random_forest(rng, rows: int, length: int):
    """`positions` and `subtree_end` [rows, length]: a trunk of half the row, then leaves of an eighth each."""
    import numpy as np

    trunk, leaf = length // 2, length // 8
    positions = np.empty((rows, length), np.int32)
    subtree_end = np.empty((rows, length), np.int32)
    for row in range(rows):
        own = trunk + int(rng.integers(-leaf // 2, leaf // 2)) * (rows > 1)
        positions[row, :own] = np.arange(own)
        subtree_end[row, :own] = length
        for start in range(own, length, leaf):
            stop = min(start + leaf, length)
            positions[row, start:stop] = own + np.arange(stop - start)
            subtree_end[row, start:stop] = stop
    return positions, subtree_end


def timed(program, *arguments, repeats: int = 5) -> tuple[Any, float]:
    """(result, fastest seconds of some calls after the first)."""
    import jax

    out = jax.block_until_ready(program(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - start)
    return out, min(times)


def memory() -> dict[str, Any]:
    """The most bytes that an update of one long row takes, as compiled and as seen on the device."""
    import jax
    import numpy as np
    from _common import QWEN3_0P6B, QWEN3_TINY, write_model

    from rljax.batching import stack
    from rljax.experiment.sft import demonstration
    from rljax.losses import clipped, policy_loss, token_mean, token_ratio
    from rljax.models import load_model
    from rljax.training import Learner, OptimizerConfig, UpdateConfig

    on_cpu = jax.devices()[0].platform == "cpu"
    shape, length = (QWEN3_TINY, 1024) if on_cpu else (QWEN3_0P6B, 32768)
    config, params = load_model(write_model(shape), dtype="bfloat16", param_dtype="float32")
    update = UpdateConfig(pack_length=length, microbatch_size=1, length_buckets=(length,))
    learner = Learner(
        config, policy_loss(token_ratio, clipped(), token_mean), OptimizerConfig(learning_rate=1e-6), update
    )
    state = learner.init_state(params)
    tokens = np.random.default_rng(0).integers(3, shape["vocab_size"], length).tolist()
    row = demonstration(tokens[: length // 2], tokens[length // 2 :], 0, 0)
    batch = stack([row], row_buckets=(1,), length_buckets=(length,))
    (train_batch,) = learner.prepare(state, batch, np.ones((1, length), np.float32))
    analysis: Any = learner.lower_update(train_batch).compile().memory_analysis()
    predicted = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes

    state, metrics = learner.update(state, train_batch)
    loss = float(metrics["loss/total"])
    seen = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {"length": length, "compiled_bytes": int(predicted), "peak_bytes": seen, "loss": loss}


OWN = {"device": device, "kernels": kernels, "memory": memory}


# ---- the table --------------------------------------------------------------------------------------------------


def table(steps: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines {"what", "bound", "measured", "unit", "share"} of the steps that are done."""
    results = {name: step["result"] for name, step in steps.items() if step["result"]}
    rates = results.get("device", {}).get("rates")
    lines = []
    for name in ("rollout", "train_step", "forest"):
        for line in results.get(name, {}).get("results", ()):
            if "limit_seconds" in line:
                lines.append(_line(f"{name}: {line['name']}", line["limit_seconds"], line["seconds"], "s"))
    for line in results.get("kernels", {}).get("lengths", ()) if rates else ():
        bound = line["flops"] / rates["matmul_gflops"] / 1e9
        what = f"attention forward and backward, {line['rows']} x {line['length']}"
        lines.append(_line(what, bound, line["seconds"], "s"))
        lines.append(_line(f"{what}, XLA's form", bound, line["xla_seconds"], "s"))
    if seen := results.get("memory"):
        what = f"memory of an update of {seen['length']} tokens"
        if seen["peak_bytes"]:
            lines.append(_line(what, seen["compiled_bytes"] / 2**30, seen["peak_bytes"] / 2**30, "GiB"))
    return lines


def _line(what: str, bound: float, measured: float, unit: str) -> dict[str, Any]:
    return {"what": what, "bound": bound, "measured": measured, "unit": unit, "share": bound / measured}


def show(report: dict[str, Any]) -> None:
    rows: list[Sequence[str]] = [("what", "bound", "measured", "share")]
    for line in report["table"]:
        values = (f"{line[key]:.4g} {line['unit']}" for key in ("bound", "measured"))
        rows.append((line["what"], *values, f"{line['share']:.2f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for name, step in report["steps"].items():
        if step["status"] != "done":
            print(f"\n{name}: {step['status']}\n{step['said']}")


if __name__ == "__main__":
    main()
