"""Rollouts beside updates on two halves of a machine's devices, against the same halves taking turns.

    python benchmarks/overlap.py --preset=full --json=overlap.json

`sleep` puts pauses in place of device work, so that cores which both halves share do not count: a rollout takes `a`
seconds, updates take `b`; what is measured is the pipeline itself, with its copies of weights and its journal.
`device` is a run as it is: sampler on one half, learner on the other. On CPU devices, which share their cores, nothing
can be gained there, and it shows that the numbers are the same.

`time_ratio` is the time of a step overlapped over that of taking turns, `ideal_ratio` is `max(a, b) / (a + b)`, and
`share_of_ideal` the time saved over the time that could be. `hidden_rollout_share` is the share of the time of rollouts
in which the learner did not wait for them, behind the first. `digests_equal` is 1 if the weights of the device runs are
bit for bit the same.

`small` is a tiny model on eight virtual devices, `full` a larger one. Accelerators need two devices at least.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import character_model, finish, has_gpu, machine, parse_arguments, short_updates
from _probe import probe

SIZES = {
    "smoke": dict(steps=3, pause=(0.02, 0.02), width=32, layers=1, prompts=4, tokens=4),
    "small": dict(steps=10, pause=(0.5, 0.5), width=64, layers=2, prompts=8, tokens=16),
    "full": dict(steps=20, pause=(1.0, 1.0), width=256, layers=4, prompts=16, tokens=64),
}
STALENESS = 1


def paused(size: dict[str, Any], pause: tuple[float, float], *, beside: bool) -> dict[str, float]:
    """Seconds of a step of a run that sleeps in place of device work, and what the learner waited."""
    import jax
    import numpy as np

    from rljax.experiment.journal import Journal
    from rljax.experiment.pipeline import Beside, Pipeline
    from rljax.parallel import make_mesh, replicated
    from rljax.plans import RolloutPlan
    from rljax.rollouts import RolloutConfig, ScoredGroup
    from rljax.rollouts.orders import QueuedActor
    from rljax.sampling import Sample
    from rljax.tasks import Example, RewardResult, UniformCurriculum

    rollout_s, update_s = pause
    completion = Sample(
        np.arange(size["tokens"]), np.zeros(size["tokens"], np.float32), np.zeros(size["tokens"]), "stop"
    )

    class Sleeper(QueuedActor):
        """Answers at once, after a while."""

        def set_params(self, params, version):
            self.params = params

        def ready(self, n):
            begin = time.perf_counter()
            time.sleep(rollout_s)
            self.seconds = {"sample": time.perf_counter() - begin}
            requests = [request for order in self._orders.take(n) for request in order.requests]
            result = RewardResult(1.0, {})
            steps = np.zeros(size["tokens"], np.int32)
            return [
                ScoredGroup(request.example, [1], [completion] * 2, [""] * 2, [result] * 2, [steps] * 2)
                for request in requests
            ]

        for_evaluation = decoders = cache_bytes = longest_row = __enter__ = __exit__ = None

    # The learner has the first device, the actor the last.
    mesh = make_mesh(devices=jax.devices()[-1:])
    params = {"w": jax.device_put(np.ones((size["width"], 1024), np.float32), jax.devices()[0])}
    examples = [Example(str(i), {}, id=i) for i in range(64)]
    pipeline = Pipeline(
        Sleeper(),
        RolloutPlan(2),
        UniformCurriculum(examples),
        RolloutConfig(devices=1, staleness=STALENESS),
        prompts=size["prompts"],
        beside=Beside(mesh, {"w": replicated(mesh)}),
    )
    update = jax.jit(lambda p: {"w": p["w"] * 0.5}, donate_argnums=0)

    waited = []
    rollouts = []
    ends = []
    with tempfile.TemporaryDirectory() as folder, pipeline if beside else contextlib.nullcontext():
        pipeline.journal = Journal(Path(folder))
        for step in range(size["steps"] + 1):
            pipeline.order(step, params)
            made = pipeline.take(step)
            time.sleep(update_s)
            params = update(params)
            waited.append(pipeline.waited_s)
            rollouts.append(made.rollout.seconds["sample"])
            ends.append(time.perf_counter())

    # The first step has nothing to overlap with.
    return {
        "seconds": (ends[-1] - ends[0]) / size["steps"],
        "rollout_s": statistics.mean(rollouts[1:]),
        "waited_s": statistics.mean(waited[1:]),
    }


def build_device_run(size: dict[str, Any]) -> Any:
    """A run whose two halves have all devices."""
    import jax

    from rljax.algorithms import DecoupledPPO
    from rljax.experiment import MeshConfig, RolloutConfig, SamplingConfig
    from rljax.experiment.build import build
    from rljax.testing import tiny_config

    half = jax.device_count() // 2
    config = tiny_config(
        # The first two fill the pipeline.
        steps=size["steps"] + 2,
        prompts_per_step=size["prompts"],
        model=character_model("abcdefghi=", size),
        mesh=MeshConfig(fsdp=-1),
        actor=dataclasses.replace(tiny_config().actor, prompt_buckets=(8,)),
        algorithm=DecoupledPPO(group_size=4),
        sampling=SamplingConfig(max_new_tokens=size["tokens"], truncated_is_wrong=False),
        # Rows for every device of the half that trains.
        update=short_updates(microbatch_size=half, microbatch_buckets=(8,)),
        rollout=RolloutConfig(devices=half, staleness=STALENESS),
    )
    return build(config)


def device_runs(built: Any, size: dict[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Seconds of a step of the same run, in turn and overlapped, and the digest of its weights."""
    import jax

    from rljax.analysis.compare import with_seed
    from rljax.experiment.train import train_step
    from rljax.parallel import use_mesh
    from rljax.training import fingerprint

    found = {}
    for name in names:
        run = with_seed(built, 0)
        ends = []
        waited = []
        rollouts = []
        with run.actor, use_mesh(run.mesh), run.pipeline if name == "overlapped" else contextlib.nullcontext():
            run.state = run.init_state(run.initial_params())
            # The first two fill the pipeline.
            for step in range(size["steps"] + 2):
                metrics, rollout = train_step(run, step)
                jax.block_until_ready(run.state)
                ends.append(time.perf_counter())
                waited.append(metrics["time/learner_wait_s"])
                rollouts.append(sum(rollout.seconds.values()))
            digest = fingerprint(run.policy())
        found[name] = {
            "seconds": (ends[-1] - ends[1]) / size["steps"],
            "rollout_s": statistics.mean(rollouts[2:]),
            "waited_s": statistics.mean(waited[2:]),
            "digest": digest,
        }
    return found


def child(size: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """All measurements, in a process with as many devices as it takes."""
    built = build_device_run(size)
    device_runs(built, size, ["overlapped"])  # compiles
    rounds = []
    for _ in range(repeats):
        one = {"sleep": {"in turn": paused(size, size["pause"], beside=False)}}
        one["sleep"]["overlapped"] = paused(size, size["pause"], beside=True)
        one["device"] = device_runs(built, size, ["in turn", "overlapped"])
        rounds.append(one)
    return rounds


def ratios_of(form: str, rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over the rounds, of whose two runs each is compared with its neighbour."""
    found: dict[str, list[float]] = {}
    for one in rounds:
        in_turn, overlapped = one[form]["in turn"], one[form]["overlapped"]
        a = in_turn["rollout_s"]
        b = in_turn["seconds"] - a
        ideal = max(a, b) / (a + b)
        ratio = overlapped["seconds"] / in_turn["seconds"]
        hidden = 1 - min(1.0, overlapped["waited_s"] / overlapped["rollout_s"])
        values = {
            "time_ratio": ratio,
            "ideal_ratio": ideal,
            "share_of_ideal": (1 - ratio) / (1 - ideal),
            "hidden_rollout_share": hidden,
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        preset, repeats = sys.argv[2:4]
        print(json.dumps(child(SIZES[preset], int(repeats))))
        return

    arguments = parse_arguments(__doc__.splitlines()[0], rivals=(), presets=tuple(SIZES))
    size = SIZES[arguments.preset]
    quick = arguments.preset == "smoke"

    # Virtual devices are made when jax starts, so the runs have a process of their own.
    environment = dict(os.environ)
    if not has_gpu():
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={2 if quick else 8}"

    probes = [probe("float32", quick)]
    command = [sys.executable, __file__, "--child", arguments.preset, str(arguments.repeats)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rounds = json.loads(done.stdout.splitlines()[-1])
    probes.append(probe("float32", quick))

    results = [
        {
            "name": f"{form}, {name}",
            "seconds": statistics.median(one[form][name]["seconds"] for one in rounds),
            "value": statistics.median(one[form][name]["seconds"] for one in rounds),
            "all_seconds": [one[form][name]["seconds"] for one in rounds],
        }
        for form in ("sleep", "device")
        for name in ("in turn", "overlapped")
    ]

    digests = [one["device"][name]["digest"] for one in rounds for name in ("in turn", "overlapped")]
    sleep, device = ratios_of("sleep", rounds), ratios_of("device", rounds)
    ratios = {
        **sleep,
        **{f"device_{name}": value for name, value in device.items()},
        "digests_equal": float(all(digest == digests[0] for digest in digests)),
    }
    finish("overlap", arguments, machine(probes), {"staleness": STALENESS, **size}, results, ratios)


if __name__ == "__main__":
    main()
