"""Trains on a Ray cluster, one process a node.

    ray job submit --working-dir=. -- python launch/ray_job.py --nodes=2 --gpus=8 -- --config=quickstart --workdir=gs://bucket/runs/x
    python launch/ray_job.py --dry --nodes=2 --gpus=8 -- --config=quickstart --workdir=gs://bucket/runs/x

What follows `--` are flags of `rljax train`. `--dry` prints what each node runs, and runs nothing; Ray is not asked.

Each node has an actor that runs the command with the variables that `rljax.parallel.initialize_distributed` reads.
When this job is told to stop, so are the runs, which save and exit with 143. When a run is told to stop by its node or
stands still, or an actor is lost, all are started anew, `--restarts` times at most, and go on from the newest
checkpoint.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STOPPED = 143
"""Exit status of a run that was told to stop and saved."""
STOOD_STILL = 75
"""Exit status of a run in which nothing moved."""
LOST = -1
"""Status of a run whose actor is gone."""


class Node:
    """What runs on one node of the cluster."""

    def __init__(self):
        self.process: subprocess.Popen | None = None

    def address(self) -> str:
        """`host:port` of a port that is free here."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def run(self, command: Sequence[str], variables: Mapping[str, str]) -> int:
        """Runs a command to its end; returns its exit status."""
        # Ray has put the devices of this actor into its environment.
        self.process = subprocess.Popen(command, env={**os.environ, **variables})
        return self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)


def variables_of(index: int, nodes: int, coordinator: str) -> dict[str, str]:
    """What tells a process its place."""
    return {
        "RLJAX_COORDINATOR": coordinator,
        "RLJAX_NUM_PROCESSES": str(nodes),
        "RLJAX_PROCESS_ID": str(index),
    }


class Stop:
    """What this job does when it is told to stop: it tells the runs, and remembers."""

    def __init__(self):
        self.actors: Sequence[Any] = ()
        self.is_asked = False

    def __call__(self, *_: Any) -> None:
        self.is_asked = True
        for actor in self.actors:
            actor.stop.remote()


def start(arguments: argparse.Namespace, command: Sequence[str], stop: Stop) -> list[int]:
    """Runs `command` on all nodes; returns its exit statuses, `LOST` for an actor that is gone."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    needs = {"CPU": arguments.cpus, "GPU": arguments.gpus, "TPU": arguments.tpus}
    needs = {name: count for name, count in needs.items() if count}
    group = placement_group([needs] * arguments.nodes, strategy=arguments.strategy)
    ray.get(group.ready())

    options = {
        "num_cpus": arguments.cpus,
        "num_gpus": arguments.gpus,
        "resources": {"TPU": arguments.tpus} if arguments.tpus else None,
        # One thread waits for the run, another can stop it.
        "max_concurrency": 2,
    }
    actors = []
    for index in range(arguments.nodes):
        place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
        actors.append(ray.remote(Node).options(scheduling_strategy=place, **options).remote())

    coordinator = ray.get(actors[0].address.remote())
    runs = [
        actor.run.remote(command, variables_of(index, arguments.nodes, coordinator))
        for index, actor in enumerate(actors)
    ]

    stop.actors = actors
    statuses = []
    for run in runs:
        try:
            statuses.append(ray.get(run))
        except ray.exceptions.RayActorError:
            # JAX ends the others when the heartbeat of this one stays away.
            statuses.append(LOST)
    stop.actors = ()
    for actor in actors:
        ray.kill(actor)
    remove_placement_group(group)
    return statuses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, required=True, help="processes, one a node")
    parser.add_argument("--cpus", type=int, default=1, help="of a node; environments may want all of them")
    parser.add_argument("--gpus", type=int, default=0, help="of a node")
    parser.add_argument("--tpus", type=int, default=0, help="chips of a node")
    parser.add_argument(
        "--strategy", default="STRICT_SPREAD", choices=["STRICT_SPREAD", "SPREAD", "PACK"], help="of placement"
    )
    parser.add_argument("--restarts", type=int, default=100)
    parser.add_argument("--dry", action="store_true", help="print what each node runs")
    parser.add_argument("train", nargs="+", help="flags of rljax train, behind --")
    arguments = parser.parse_args()

    script = Path(__file__).resolve().parent / "train.py"
    command = [os.environ.get("PYTHON", sys.executable), str(script), *arguments.train]
    if arguments.dry:
        for index in range(arguments.nodes):
            places = variables_of(index, arguments.nodes, "NODE0:PORT")
            print(" ".join(f"{name}={value}" for name, value in places.items()), shlex.join(command))
        return

    try:
        import ray
    except ModuleNotFoundError:
        parser.error(f"{sys.executable} lacks ray: pip install 'rljax-lm[ray]'")

    ray.init(ignore_reinit_error=True)
    stop = Stop()
    signal.signal(signal.SIGTERM, stop)
    for _ in range(arguments.restarts + 1):
        statuses = start(arguments, command, stop)
        print(f"exit statuses of the nodes: {statuses}", flush=True)
        if stop.is_asked or not {STOPPED, STOOD_STILL, LOST} & set(statuses):
            break
    sys.exit(max(status if status >= 0 else 1 for status in statuses))


if __name__ == "__main__":
    main()
