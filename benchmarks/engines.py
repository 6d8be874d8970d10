"""How busy engines are that sample for a run, and what asking them costs beside sampling in the run's own process.

    python benchmarks/engines.py --json=engines.json

Starts two `rljax serve` on this machine, hands weights over, and has them sample one step of 256 completions. The busy
share of an engine is the share of the step in which its decoder worked. Both share this machine's cores with each other
and with the run, so tokens a second say what asking costs, and not what a second machine brings.
"""

import argparse
import dataclasses
import json
import platform
import socket
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from rljax.experiment import FreshModel, Remote, SamplingConfig, SingleTurn, UpdateConfig
from rljax.experiment.build import build
from rljax.rollouts import number_groups
from rljax.testing import tiny_config

SIZES = {
    "smoke": dict(engines=1, prompts=2, group=2, new=4, rows=4, layers=1, width=32, repeats=1),
    "small": dict(engines=2, prompts=32, group=8, new=64, rows=64, layers=4, width=256, repeats=3),
}


def stats_of(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{address}/stats", timeout=30) as answer:
        return json.load(answer)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def config_of(size: dict[str, int]):
    base = tiny_config(prompts_per_step=size["prompts"])
    return dataclasses.replace(
        base,
        model=FreshModel(
            num_layers=size["layers"],
            embed_dim=size["width"],
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            mlp_dim=2 * size["width"],
        ),
        actor=SingleTurn(rewards=base.actor.rewards, prompt_buckets=(4,)),
        algorithm=dataclasses.replace(base.algorithm, group_size=size["group"]),
        sampling=SamplingConfig(max_new_tokens=size["new"], truncated_is_wrong=False),
        update=UpdateConfig(pack_length=256),
    )


def tokens_of(groups) -> int:
    return sum(len(sample.tokens) for group in groups for sample in group.samples)


def measure(run, repeats: int, after_each=lambda seconds: None) -> float:
    """Median tokens a second of `repeats` steps, after one that compiles."""
    prompts = run.config.prompts_per_step
    plan = run.algorithm.plan
    rates = []
    for step in range(1 + repeats):
        run.actor.submit(number_groups(run.dataset.train[:prompts], plan.group_size), plan, step)
        groups = run.actor.ready(prompts)
        seconds = run.actor.seconds["sample"]
        if step:
            after_each(seconds)
            rates.append(tokens_of(groups) / seconds)
    return sorted(rates)[len(rates) // 2]


def serve_command(*, rows: int, context_length: int, new_tokens: int) -> str:
    """`config.actor.command` of engines of this environment."""
    return (
        f"{sys.executable} -m rljax serve --model={{weights}} --port={{port}} --rows={rows} "
        f"--context_length={context_length} --max_new_tokens={new_tokens}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(SIZES), default="small")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    arguments = parser.parse_args()
    size = SIZES[arguments.preset]
    config = config_of(size)

    own = build(config)
    params = own.initial_params()
    with own.actor:
        own.actor.set_params(params, 0)
        own_rate = measure(own, size["repeats"])

    command = serve_command(rows=size["rows"], context_length=size["new"] + 32, new_tokens=size["new"])
    engines = tuple(f"http://127.0.0.1:{free_port()}" for _ in range(size["engines"]))
    with tempfile.TemporaryDirectory() as folder:
        actor = Remote(engines=engines, rewards=config.actor.rewards, longest_prompt=4, command=command, weights=folder)
        run = build(dataclasses.replace(config, actor=actor))
        shares: list[float] = []

        def end(seconds: float) -> None:
            # Counts begin anew with the step, whose number enters the random numbers.
            shares.append(sum(stats_of(engine)["seconds"] for engine in engines) / len(engines) / seconds)

        with run.actor:
            run.actor.set_params(params, 0)
            rate = measure(run, size["repeats"], end)
            start = time.perf_counter()
            run.actor.set_params(params, 1)
            hand_over = time.perf_counter() - start

    result = {
        "benchmark": "engines",
        "machine": platform.processor() or platform.machine(),
        "setting": size,
        "ratios": {"busy_share": sorted(shares)[len(shares) // 2], "rate_vs_own": rate / own_rate},
        "results": {"tokens_per_s": rate, "own_tokens_per_s": own_rate, "hand_over_s": hand_over},
    }
    print(
        f"{size['engines']} engines, {size['prompts'] * size['group']} completions of up to {size['new']} tokens a step"
    )
    print(f"busy share of an engine's decoder  {result['ratios']['busy_share']:.2f}")
    print(f"tokens a second                    {rate:,.0f} (in the run's own process {own_rate:,.0f})")
    print(f"a hand-over                        {hand_over:.2f} s")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
