"""Episodes with slow tools over two processes, and over two engines: how busy each decoder is.

    python benchmarks/spread.py --json=spread.json

256 episodes are under way at once, of four turns each, between which a tool takes 50 ms. Once two processes of a run
play half of them each and tell each other of them; once two `rljax serve` on this machine say the turns of a run that
plays all of them. A decoder's busy share is the share of the rollout's time in which it worked. Of two processes, the
rollout's time ends where the slower one is done, and the smaller share is reported. All share this machine's cores, so
that tokens a second say nothing of what a second machine would bring.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
from _common import character_model, finish, machine
from _probe import probe
from engines import free_port, serve_command, stats_of

from rljax.algorithms import GRPO
from rljax.envs import Parsed, Step, ToolFormat
from rljax.experiment import (
    CheckpointConfig,
    Config,
    MeshConfig,
    MultiTurn,
    RemoteMultiTurn,
    RowsData,
    SamplingConfig,
    UpdateConfig,
)
from rljax.experiment.build import build
from rljax.parallel import initialize_distributed, use_mesh
from rljax.rollouts import number_groups

SIZES = {
    "smoke": dict(episodes=4, turns=2, new=8, rows=4, layers=1, width=32, repeats=1, tool_s=0.01),
    "small": dict(episodes=256, turns=4, new=64, rows=32, layers=4, width=256, repeats=3, tool_s=0.05),
}
PARTS = 2
"""Processes, and engines."""
PATIENCE_S = 900
ALPHABET = "".join(chr(i) for i in range(32, 127)) + "\n"

FORMAT = ToolFormat("plain", lambda text: Parsed(), stop_strings=tuple("abcdef"), wrap=(" ", "\n"))
"""Of 96 letters that are as likely as each other six end a turn: 16 tokens in the mean."""


class SlowTool:
    """So many turns, before each of which but the first the tool takes its time."""

    def __init__(self, turns: int, seconds: float):
        self._turns = turns
        self._seconds = seconds

    def reset(self, row):
        self._left = self._turns
        return row["prompt"]

    def step(self, action):
        time.sleep(self._seconds)
        self._left -= 1
        return Step("more of it, please", 1.0, self._left == 0)


def questions(size: int, first: int = 0) -> list[dict]:
    return [{"prompt": f"question {i:04d}: what is it?"} for i in range(first, first + size)]


def config_of(size: dict[str, Any], **engines: Any) -> Config:
    context = 32 + size["turns"] * (size["new"] + 24)
    turns: dict[str, Any] = dict(
        make="spread:SlowTool",
        args={"turns": size["turns"], "seconds": size["tool_s"]},
        tool_format="spread:FORMAT",
        context_length=context,
        workers=size["episodes"],
    )
    # An engine has the rows and the chunks that it was started with.
    own: dict[str, Any] = dict(decode_rows=size["rows"], prefill_chunks=(32, 64))
    return Config(
        steps=1,
        prompts_per_step=size["episodes"] // 2,
        model=character_model(ALPHABET, size, max_position=context),
        data=RowsData(rows="spread:questions", args={"size": size["episodes"]}, test_args={"size": 2, "first": 9000}),
        actor=RemoteMultiTurn(**turns, **engines) if engines else MultiTurn(**turns, **own),
        algorithm=GRPO(group_size=2, kl_coef=0.0),
        sampling=SamplingConfig(max_new_tokens=size["new"], truncated_is_wrong=False),
        update=UpdateConfig(pack_length=max(256, context), microbatch_size=PARTS),
        checkpoint=CheckpointConfig(every=0),
        mesh=MeshConfig(fsdp=-1),
    )


def play(run, step: int) -> float:
    """Seconds of a rollout of all episodes."""
    plan = run.algorithm.plan
    prompts = run.config.prompts_per_step
    begin = time.perf_counter()
    run.actor.submit(number_groups(run.dataset.train[:prompts], plan.group_size), plan, step)
    groups = run.actor.ready(prompts)
    seconds = time.perf_counter() - begin

    failed = [result.error for group in groups for result in group.results if result is not None and result.error]
    assert len(groups) == prompts and not failed, f"{len(failed)} episodes failed, one of them by {failed[0]}"
    return seconds


def play_as(index: int, address: str, size: dict[str, Any]) -> None:
    """One of several processes; prints the busy share of its own decoder in each rollout behind the first."""
    os.environ |= {"RLJAX_NUM_PROCESSES": str(PARTS), "RLJAX_PROCESS_ID": str(index)}
    assert initialize_distributed(coordinator=address)
    run = build(config_of(size))
    shares = []
    with run.actor, use_mesh(run.mesh):
        run.actor.set_params(run.initial_params(), 0)
        for step in range(1 + size["repeats"]):
            seconds = play(run, step)
            worked = sum(decoder.stats["seconds"] for decoder in run.actor.decoders)
            shares.append(worked / seconds)
    print(json.dumps(shares[1:]), flush=True)
    jax.distributed.shutdown()


def over_processes(preset: str) -> list[float]:
    """The smaller of the busy shares of two processes, of each rollout."""
    address = f"127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, __file__, f"--preset={preset}", f"--index={index}", f"--address={address}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(PARTS)
    ]
    try:
        outputs = [process.communicate(timeout=PATIENCE_S)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        raise RuntimeError(f"a process ended with {[process.returncode for process in started]}; see its lines above")
    return [min(shares) for shares in zip(*(json.loads(text.splitlines()[-1]) for text in outputs), strict=True)]


def over_engines(size: dict[str, Any]) -> list[float]:
    """The smaller of the busy shares of two engines, of each rollout."""
    context = config_of(size).actor.context_length
    command = serve_command(rows=size["rows"], context_length=context, new_tokens=size["new"])
    addresses = tuple(f"http://127.0.0.1:{free_port()}" for _ in range(PARTS))
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        run = build(config_of(size, engines=addresses, command=command, weights=folder, probes=1))
        with run.actor:
            run.actor.set_params(run.initial_params(), 0)
            for step in range(1 + size["repeats"]):
                seconds = play(run, step)
                # Engines count anew with each step.
                shares.append(min(stats_of(address)["seconds"] for address in addresses) / seconds)
    return shares[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(SIZES), default="small")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = SIZES[arguments.preset]
    arguments.repeats = size["repeats"]
    if arguments.index is not None:
        play_as(arguments.index, arguments.address, size)
        return

    shares = {"processes": over_processes(arguments.preset), "engines": over_engines(size)}
    results = [
        {"name": f"busy share of the less busy of two {name}, rollout {i}", "value": share}
        for name, found in shares.items()
        for i, share in enumerate(found, 1)
    ]
    ratios = {f"busy_share_{name}": statistics.median(found) for name, found in shares.items()}
    setting = {"parts": PARTS, **size}
    finish("spread", arguments, machine([probe("float32", arguments.preset == "smoke")]), setting, results, ratios)


if __name__ == "__main__":
    # The class that configs name is that of the module, not of the program.
    import spread

    spread.main()
