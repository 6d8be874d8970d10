"""Where names of earlier releases are now: an import, a flag or a config field that moved says so in one line."""

import importlib.abc
import re
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULES = {
    "rljax.agent_demo": "rljax.analysis.agent_demo",
    "rljax.branching": "rljax.trees.forks",
    "rljax.build": "rljax.experiment.build",
    "rljax.commands": "rljax.experiment.evaluate, .fine_tune and .convert",
    "rljax.compare": "rljax.analysis.compare",
    "rljax.config": "rljax.experiment",
    "rljax.dry_run": "rljax.experiment.dry_run",
    "rljax.evaluation.shifts": "rljax.analysis.shifts",
    "rljax.report": "rljax.experiment.report",
    "rljax.rollouts.batching": "rljax.batching",
    "rljax.rollouts.fork_rules": "rljax.plans.fork_rules",
    "rljax.rollouts.plans": "rljax.plans",
    "rljax.run": "rljax.experiment.train",
    "rljax.sampling.shifts": "rljax.analysis.shifts",
    "rljax.sampling.two_models": "rljax.analysis.two_models",
    "rljax.supervised": "rljax.experiment.sft",
    "rljax.trees.packing": "rljax.batching.forest",
}

FIELDS = {
    "rewards": "actor=SingleTurn(rewards=...), or BlackBox(rewards=...)",
    "actor.processes": "actor.hosts='processes'",
    "environment": "actor=MultiTurn(...), or BlackBox(agent=...)",
    "environment.processes": "actor.hosts='processes'",
    "environment.rows": "actor.decode_rows",
    "environment.contexts": "actor.conversations",
    "environment.extend_buckets": "actor.prefill_chunks",
    "environment.turns": "actor.limits.turns",
    "environment.tool_calls": "actor.limits.tool_calls",
    "environment.observation_tokens": "actor.limits.observation_tokens",
    "environment.step_s": "actor.limits.step_s",
    "environment.episode_s": "actor.limits.episode_s, or actor.timeout_s of a BlackBox",
    "environment.conversations": "actor.trained_conversations of a BlackBox",
    "guidance": "actor=Guided(actor=..., column=...)",
    "sampling.prompt_buckets": "actor.prompt_buckets",
    "sampling.prompt_slots": "actor.prompt_slots",
    "sampling.sample_slots": "actor.sample_slots",
    "update.packed_rows": "update.microbatch_size",
    "update.anchor_to_behavior": "update.use_sampler_logprobs",
}
"""Of a config: what was at this dotted path, and where it is. A longer path went with the longest that is listed."""

_KEYWORD = re.compile(r"got an unexpected keyword argument '(\w+)'")
_PARTS = ("", "actor.", "sampling.", "update.")


def field_hint(dotted: str) -> str:
    """`config.a.b is config.c now`, for a path such as `environment.make`; empty for one that has not moved."""
    names = dotted.split(".")
    for count in range(len(names), 0, -1):
        old = ".".join(names[:count])
        if old in FIELDS:
            return f"config.{old} is config.{FIELDS[old]} now"
    return ""


def keyword_hint(error: TypeError) -> str:
    """The same for a dataclass of a config that was given a keyword which has moved; empty for any other error."""
    found = _KEYWORD.search(str(error))
    if not found:
        return ""
    return next((hint for part in _PARTS if (hint := field_hint(part + found[1]))), "")


class MovedModules(importlib.abc.MetaPathFinder):
    """Asked last, when nobody else has found a module."""

    def find_spec(
        self, fullname: str, path: Iterable[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Raises ModuleNotFoundError, with the new place, for a module that has moved."""
        if fullname in MODULES:
            message = f"No module named {fullname!r}: it is {MODULES[fullname]} now (docs/glossary.md)"
            raise ModuleNotFoundError(message, name=fullname)
        return None


def install() -> None:
    """Makes imports of modules that have moved say where they are."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
