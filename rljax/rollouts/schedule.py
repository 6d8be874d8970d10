"""When the rollouts of a run are made, beside its updates."""

import dataclasses
from typing import Literal

from rljax.rollouts.groups import GroupsConfig
from rljax.settings import field


@dataclasses.dataclass
class RolloutConfig:
    """Which weights sample which rollout, and whether rollouts and updates run at the same time.

    Rollout `s` is sampled by the weights after `max(0, s - staleness)` steps, or those pushed last before, always: a
    fixed schedule. Whether it is made beside the updates before it or after them changes no number.
    """

    devices: int = field(default=0, least=0)
    """How many devices of each process, the last of its local ones, roll out while the others train. 0 lets all of them
    do both in turn. Choose it so that a rollout takes about as long as the updates of a step. Over engines in other
    processes rollouts need none."""
    staleness: int = field(default=0, least=0)
    """Steps of training between the weights that sample a rollout and those that are first updated by it. 0 is
    on-policy. Rollouts overlap with updates from 1 on; more evens out rollouts of unequal length, costs a copy of the
    weights a step, and needs a method that looks at the log-probs of the policy that sampled."""
    push_every: int = field(default=1, least=1)
    """Steps of training between two hand-overs of weights to the rollouts (GLM-5, 2602.15763). Versions count these
    hand-overs. Raise it where they are slow; 2 to 4 is usual. Above 1 it takes a copy of the weights on the learner's
    devices, and a method that looks at the log-probs of the policy that sampled."""
    reset_moments: Literal["none", "first", "all"] = "none"
    """What the policy's optimizer forgets at a hand-over, after which another distribution is sampled: nothing; its
    averages of gradients (`first`); those of squares as well (`all`, as GLM-5 does). With `all` the first update behind
    it moves every weight by about the learning rate, so take it with a `push_every` of 4 and more."""
    groups: GroupsConfig = dataclasses.field(default_factory=GroupsConfig)
    """What becomes of groups that lack members, or are old."""
    in_step: bool = False
    """On several processes: whether all of them decode one batch over one mesh, in step, and process 0 judges alone. It
    is for a model of which the devices of a process cannot hold a copy, and for one turn without environments. Off,
    each process plays and judges its share of the groups by itself."""

    def version_of(self, step: int) -> int:
        """The version of the weights that a step hands to the rollouts, or that it trains."""
        return step // self.push_every
