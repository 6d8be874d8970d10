"""What tests of environments share."""

import copy

from rljax.envs.base import checked_prompt, checked_step


def replay(environment, row, actions):
    """Play the actions in a fresh environment: its opening and steps, as a pool would keep them."""
    opening = checked_prompt(environment.reset(copy.deepcopy(dict(row))))
    return opening, [checked_step(environment.step(action)) for action in actions]
