"""What a worker process speaks: it prints one JSON object when ready, then one for every task named on its stdin.

Standard library only, since it is imported inside environments that hold nothing of ours. A worker's own prints go to
stderr, so that a library's banner cannot be taken for an answer.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


def read_job() -> dict[str, Any]:
    """The job file named on the command line: `model` (a Hugging Face folder), `tasks` and free settings."""
    with open(sys.argv[1]) as f:
        return json.load(f)


def serve(tasks: Mapping[str, Callable[[], dict[str, Any] | None]], about: dict[str, Any]) -> None:
    """Answers `{"task": name}` until stdin closes: wall seconds, processor seconds of all threads, what it returned.

    `about` goes out first and tells that imports and loading are done. A task that raises is answered with `error`;
    the worker lives on.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer({"ready": True, **about})
    for line in sys.stdin:
        name = json.loads(line)["task"]
        try:
            start, cpu_start = time.perf_counter(), time.process_time()
            extra = tasks[name]() or {}
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            answer({"task": name, "seconds": seconds, "cpu_seconds": cpu, **extra})
        except Exception as e:
            answer({"task": name, "error": f"{type(e).__name__}: {e}"})
