"""Which engines sample, and how they get weights."""

import dataclasses
import os
import re
import shlex
import string
from pathlib import Path
from typing import Literal

from rljax.settings import field, has_variable, is_web_address

_LOCAL = re.compile(r"https?://(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?/?")
_PLACES = {"address": "http://host:8000", "host": "host", "port": 8000, "weights": Path("folder")}
"""What a command may name, each with an example."""


def is_local(address: str) -> bool:
    """Whether an address is of the machine that asks it, whichever that is."""
    return _LOCAL.fullmatch(address) is not None


@dataclasses.dataclass
class EnginesConfig:
    """Engines that speak vLLM's protocol of token ids."""

    engines: tuple[str, ...] = ("http://127.0.0.1:8000",)
    """Addresses. The prompts of a step are spread over them in equal numbers, the same to the same one each time. Of P
    processes each asks every P-th, and with fewer engines several ask one; name as many to each. Addresses of the
    machine itself (localhost) are engines of every machine, which its processes share."""
    engine: Literal["rljax", "vllm"] = "rljax"
    """What runs there. `rljax` (`rljax serve`) gives the tokens that this process would have sampled, forks too. `vllm`
    draws other random numbers, says no entropies and knows nothing of forks."""
    weights: str = ""
    """Folder that the weights of each hand-over are exported to, which this process and all engines see under this
    path; process 0 writes it. Empty is a folder of each process's own, for engines on its machine."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the exported weights. bfloat16 halves what a hand-over writes and reads, and rounds once more than the trainer
    where `model.dtype` is float32."""
    hand_over: Literal["reload", "restart"] = "reload"
    """How an engine takes new weights: `reload` loads them in place; `restart` ends it and has `command` start it on
    them, for an engine whose reload is found to be partial."""
    command: str = ""
    """Starts an engine in the foreground, such as `rljax serve --model={weights} --port={port}`; also names `{host}`
    and `{address}`. It is run once an engine on this machine, again when the engine dies, and ended with the run. Empty
    leaves starting to the user."""
    key_variable: str = ""
    """Environment variable that holds the engines' API key; empty is no key."""
    connections: int = field(default=256, least=1)
    """Requests under way at an engine at most, of one sample each. `rljax serve` takes 1,024 in all."""
    request_s: float = field(default=600.0, above=0)
    """Seconds after which an engine that has not answered a request counts as dead."""
    wait_s: float = field(default=600.0, above=0)
    """Seconds for which a run waits for an engine, at its start and where one dies, before it ends."""
    probes: int = field(default=4, least=1)
    """Prompts of the training data that an engine continues behind each hand-over, of up to 16 tokens, and which the
    trainer's own forward pass scores."""
    probe_bound: float = field(default=0.0, least=0)
    """Largest mean difference (nats a token) between those log-probs. 0 is 0.001 where `model.dtype` is float32, else
    0.05."""

    def check_engines(self) -> None:
        """Raises a ValueError of one line for what can never work."""
        if not self.engines or len(set(self.engines)) < len(self.engines):
            raise ValueError(f"config.actor.engines={self.engines} must be addresses, each of them once")

        for address in self.engines:
            if not is_web_address(address):
                raise ValueError(
                    f"config.actor.engines holds {address!r}, which is no address such as http://host:8000"
                )
            if not self.weights and not is_local(address):
                raise ValueError(
                    f"config.actor.engines holds {address}, which may be another machine, and config.actor.weights='' "
                    "is a folder of this one; name a folder that both see"
                )

        # Engines read the folder as a path.
        if "://" in self.weights:
            raise ValueError(
                f"config.actor.weights={self.weights!r} is no folder of a file system; mount the bucket, and name the "
                "folder where this process and all engines see it"
            )
        if self.hand_over == "restart" and not self.command:
            raise ValueError("config.actor.hand_over='restart' needs config.actor.command, which starts an engine")
        if self.command:
            self._check_command()

        if self.key_variable and not has_variable(self.key_variable):
            raise ValueError(
                f"config.actor.key_variable={self.key_variable!r} is not in the environment; set it, or leave it out"
            )

    def _check_command(self) -> None:
        try:
            # As an engine's words are made: split first, so that a folder with a space is one word.
            words = [word.format(**_PLACES) for word in shlex.split(self.command)]
            named = {name for _, name, _, _ in string.Formatter().parse(self.command)}
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"config.actor.command={self.command!r} cannot be filled in ({error!r}); it may hold "
                f"{', '.join(f'{{{name}}}' for name in _PLACES)}, and its quotes must close"
            ) from None
        if not words or not words[0] or "weights" not in named:
            raise ValueError(
                f"config.actor.command={self.command!r} must say where the weights are: write {{weights}} in it"
            )

    @property
    def says_entropies(self) -> bool:
        """Whether answers hold the entropies of the distribution that was sampled from."""
        return self.engine == "rljax"

    def bound(self, dtype: str) -> float:
        """`probe_bound`, or that of the compute dtype."""
        return self.probe_bound or (1e-3 if dtype == "float32" else 0.05)

    @property
    def key(self) -> str:
        return os.environ.get(self.key_variable, "") if self.key_variable else ""
