"""How many groups may be under way, so that none is trained on too late. Pure functions. Host.

Staleness counts steps: a group that is asked for in step `s` is trained in step `s + staleness` at the latest. Two
rules keep to that together. Few enough are let in that all can be trained in time (AReaL, 2505.24298), and of those
that are complete the oldest are taken, and none before what would then come too late.
"""

from collections.abc import Sequence


def capacity(*, version: int, staleness: int, batch: int, accepted: int, running: int, most: int) -> int:
    """How many more may be begun, at least 0:
    `min(most - running, (staleness + version + 1) * batch - (accepted + running))` (AReaL, 2505.24298).

    `accepted` have been taken for training since the start, which is `version * batch` at the beginning of a step,
    after a resume as well; `running` are under way, and at most `most` may be at once.
    """
    allowed = (staleness + version + 1) * batch - (accepted + running)
    return max(0, min(most - running, allowed))


def all_in_time(submitted_in: Sequence[int], *, step: int, staleness: int, batch: int) -> bool:
    """Whether groups that were asked for in the steps `submitted_in` can all be trained by their last step, if the
    steps from `step` on take `batch` of them each, oldest first."""
    return all(
        count <= (submitted + staleness - step + 1) * batch for count, submitted in enumerate(sorted(submitted_in), 1)
    )
