"""Model-written Python in a process of its own, as far from everything else as the machine can put it."""

from rljax.envs.sandbox.runner import LEVELS, OUTCOMES, Limits, Sandbox, SandboxResult

__all__ = ["LEVELS", "OUTCOMES", "Limits", "Sandbox", "SandboxResult"]
