"""Which turns an older copy of the policy speaks (cross-policy sampling of AgentRL, 2510.04206). Host.

In a cross-policy episode every turn draws its policy anew: the current one, or an older copy of it. The loss needs
nothing for it, because each token carries the log-prob of the policy that said it.
"""

import hashlib
from collections.abc import Callable


def turn_uniform(seed: int, step: int, prompt_id: int, sample_id: int, turn: int) -> float:
    """A number in [0, 1) that depends on these five alone, and so not on which episode comes first."""
    name = f"{seed}/{step}/{prompt_id}/{sample_id}/{turn}".encode()
    hashed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")

    # A float has 53 bits of precision: with all 64 the largest numbers would round to 1.
    return (hashed >> 11) / 2**53


def pick_engine(uniform: float, *, stale_share: float = 0.25) -> bool:
    """Whether the older policy speaks this turn: `uniform < stale_share`."""
    if not 0 <= stale_share <= 1:
        raise ValueError(f"stale_share={stale_share} must be from 0 to 1")
    return uniform < stale_share


def stale_turns(seed: int, share: float) -> Callable[[int, int, int], int]:
    """(prompt id, sample id, turn) -> 1 for turns that the older policy speaks, 0 for others; the same every time, so
    that a turn goes on with the policy that began it."""

    # The step does not enter: a turn that spans an update would change its policy in the middle.
    def pick(prompt_id: int, sample_id: int, turn: int) -> int:
        uniform = turn_uniform(seed, 0, prompt_id, sample_id, turn)
        return int(pick_engine(uniform, stale_share=share))

    return pick
