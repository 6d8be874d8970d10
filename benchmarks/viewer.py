"""How long `rljax view` takes to open a run, and what it holds in memory: rollouts of a synthetic run.

python benchmarks/viewer.py                       # 100,000 rollouts of 200 tokens
python benchmarks/viewer.py --preset=smoke

"open" is what the page asks before it shows the last step: runs, metrics, its prompts and one of them whole.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from rljax.viewer import Answers

SAMPLES = 8
PROMPTS = 64


def write_run(folder: Path, rollouts: int, tokens: int) -> int:
    """Writes the run; returns its steps."""
    steps = -(-rollouts // (SAMPLES * PROMPTS))
    (folder / "rollouts").mkdir()
    record = {"prompt": "p" * 200, "completion": "c" * 4 * tokens, "reward": 0.5, "error": None, "advantage": 0.5}
    record |= {"finish_reason": "stop", "tokens": list(range(tokens)), "logprobs": [-0.12345] * tokens}
    rest = json.dumps(record)[1:]
    for step in range(1, steps + 1):
        with (folder / "rollouts" / f"step_{step:06d}.jsonl").open("w") as file:
            for place in range(SAMPLES * PROMPTS):
                prompt, sample = divmod(place, SAMPLES)
                file.write(f'{{"step": {step}, "prompt_id": {prompt}, "sample": {sample}, {rest}\n')
    lines = [{"step": step, "rollout/reward_mean": 0.5} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return steps


def open_page(answers: Answers, steps: int) -> float:
    """Seconds until everything is answered that the page asks for the last step."""
    started = time.perf_counter()
    place = {"run": "0", "step": str(steps)}
    answers("runs", {})
    answers("metrics", {"run": "0"})
    assert len(answers("groups", place)) == PROMPTS
    assert len(answers("group", {**place, "group": "0"})["records"]) == SAMPLES
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("full", "smoke"), default="full")
    size = parser.parse_args().preset
    rollouts, tokens = (100_000, 200) if size == "full" else (1_000, 10)

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        run.mkdir()
        steps = write_run(run, rollouts, tokens)
        size_mb = sum(file.stat().st_size for file in run.rglob("*")) / 1e6
        print(f"{steps * SAMPLES * PROMPTS} rollouts in {steps} steps, {size_mb:.0f} MB")

        started = time.perf_counter()
        with Answers([run], index_folder=Path(folder) / "index") as answers:
            first = time.perf_counter() - started + open_page(answers, steps)
            while pending := answers("find", {"run": "0", "search": "longest"})["pending"]:
                assert pending > 0
                time.sleep(0.01)
            whole = time.perf_counter() - started
        index_mb = sum(file.stat().st_size for file in (Path(folder) / "index").iterdir()) / 1e6

        started = time.perf_counter()
        with Answers([run], index_folder=Path(folder) / "index") as answers:
            again = time.perf_counter() - started + open_page(answers, steps)
            started = time.perf_counter()
            answers("find", {"run": "0", "search": "longest"})
            search = time.perf_counter() - started

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("| open, no index | index whole after | open, with index | a search | index | memory |")
    print("|---|---|---|---|---|---|")
    cells = (f"{first:.2f} s", f"{whole:.1f} s", f"{again:.2f} s", f"{search * 1000:.0f} ms", f"{index_mb:.0f} MB")
    print(f"| {' | '.join(cells)} | {peak:.0f} MiB |")


if __name__ == "__main__":
    main()
