"""Which of a run's engines a process asks, where several processes play."""

import socket
from collections.abc import Sequence
from typing import NamedTuple

import jax

from rljax.parallel import gather
from rljax.rollouts.engines.config import EnginesConfig, is_local


class Share(NamedTuple):
    """What is a process's of the engines of a run."""

    engines: tuple[int, ...]
    """Their places in `EnginesConfig.engines`."""
    is_alone: bool
    """Whether no other process asks them."""


def own_share(config: EnginesConfig) -> Share:
    """That of this process; all processes come here. ValueError for engines that the run would start, and which two
    processes would ask."""
    share = share_of(config.engines, gather(socket.gethostname()), jax.process_index())
    if config.command and not share.is_alone:
        raise ValueError(
            f"config.actor.command starts an engine for the process that asks it, and config.actor.engines="
            f"{config.engines} are fewer than the processes that share them; name as many engines, or start them "
            "yourself and leave the command out"
        )
    return share


def share_of(engines: Sequence[str], hosts: Sequence[str], process: int) -> Share:
    """That of a process, where processes are on `hosts`.

    The k-th of P processes has every P-th engine, from the k-th on; with fewer engines than processes several share
    one. Addresses of the machine itself (localhost) mean others on each machine, so where all are such, the processes
    of each machine share them.
    """
    host = hosts[process]
    peers = list(range(len(hosts)))
    if all(map(is_local, engines)):
        peers = [other for other in peers if hosts[other] == host]
    rank = peers.index(process)
    count = len(engines)
    if count >= len(peers):
        return Share(tuple(range(rank, count, len(peers))), True)
    own = rank % count
    return Share((own,), sum(other % count == own for other in range(len(peers))) == 1)


def at(address: str) -> str:
    """What tells an engine from others, also where each machine calls one of its own by the same address."""
    return f"{socket.gethostname()} {address}" if is_local(address) else address
