"""The flags of commands that run on several hosts, once on each."""

from collections.abc import Callable

from absl import flags

# They are shown in the help of the command that defines them.
flags.disclaim_key_flags()


def define_processes() -> Callable[[], bool]:
    """Defines the flags. What it returns joins the processes that they, or the environment, name (before anything
    touches a device), and says whether there are several."""
    distributed = flags.DEFINE_bool("distributed", False, "Join a cluster that JAX can detect (TPU pod, Slurm, MPI).")
    coordinator = flags.DEFINE_string("coordinator", None, "host:port of process 0, for clusters JAX cannot detect.")
    count = flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator.")
    index = flags.DEFINE_integer("process_id", None, "Index of this process, with --coordinator.")
    heartbeat = flags.DEFINE_integer(
        "heartbeat_s", 100, "Seconds of silence after which a process counts as dead and the others are ended."
    )

    def join() -> bool:
        from rljax.parallel import initialize_distributed

        return initialize_distributed(
            auto=distributed.value,
            coordinator=coordinator.value,
            num_processes=count.value,
            process_id=index.value,
            heartbeat_s=heartbeat.value,
        )

    return join
