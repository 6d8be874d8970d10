"""What rollouts of agents by two versions of a policy go by (AgentRL, 2510.04206). Host.

In a cross-policy episode every turn draws its policy anew: the current one, or an older copy of it. The loss needs
nothing for it, because each token carries the log-prob of the policy that said it.
"""

import hashlib
import math
from collections.abc import Callable

from rljax.envs import DONE, END_REASONS, FAILED

INCOMPLETE_REWARD = -0.2
LENGTH = "length"


def episode_reward(end: str, reward: float, *, incomplete: float = INCOMPLETE_REWARD) -> float | None:
    """The reward of an episode by how it ended: `reward` clipped to [0, 1] if it is done; `incomplete` at a limit, that
    of its tokens (`length`) or one of the environment (`turns`, `tool_calls`, `seconds`); None, which is to take no
    part in training, where the environment failed. Raises ValueError for an end that is none."""
    if end == DONE:
        return min(max(float(reward), 0.0), 1.0)
    if end in FAILED:
        return None
    if end != LENGTH and end not in END_REASONS:
        raise ValueError(f"end {end!r} must be {LENGTH!r} or one of {', '.join(END_REASONS)}")
    return incomplete


def buffer_take(ready: int, *, minimum: int, multiple: int, group: int) -> int:
    """How many of the `ready` trajectories, those of complete groups, a learner takes: all that fill whole groups and
    whole multiples, or none below `minimum`."""
    for name, value in (("multiple", multiple), ("group", group)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    unit = math.lcm(group, multiple)
    return 0 if ready < minimum else ready // unit * unit


def warmup_minimum(minimum: int, *, factor: float = 1.7) -> int:
    """What the first take of a run waits for."""
    return math.ceil(factor * minimum)


def turn_uniform(seed: int, step: int, prompt_id: int, sample_id: int, turn: int) -> float:
    """A number in [0, 1) that depends on these five alone, and so not on which episode comes first."""
    name = f"{seed}/{step}/{prompt_id}/{sample_id}/{turn}".encode()
    return (int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 11) / 2**53


def pick_engine(uniform: float, *, stale_share: float = 0.25) -> bool:
    """Whether the older policy speaks this turn: `uniform < stale_share`."""
    if not 0 <= stale_share <= 1:
        raise ValueError(f"stale_share={stale_share} must be from 0 to 1")
    return uniform < stale_share


def stale_version(step: int, *, every: int = 25) -> int:
    """The version of the older policy after step `step`, when it is renewed each `every` steps."""
    if every < 1:
        raise ValueError(f"every={every} must be at least 1")
    return step // every * every


def mixed_share(turns: int, *, stale_share: float = 0.25) -> float:
    """The chance that an episode of so many turns has both policies in it."""
    return 1 - stale_share**turns - (1 - stale_share) ** turns


def stale_turns(seed: int, share: float) -> Callable[[int, int, int], int]:
    """(prompt id, sample id, turn) -> 1 for turns that the older policy speaks, 0 for others; the same every time, so
    that a turn goes on with the policy that began it."""
    return lambda prompt_id, sample_id, turn: int(
        pick_engine(turn_uniform(seed, 0, prompt_id, sample_id, turn), stale_share=share)
    )
