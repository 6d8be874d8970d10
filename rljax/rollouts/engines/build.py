"""What every actor over engines is built from: its own fleet, the probe of that, and how weights are written."""

import contextlib
from pathlib import Path

from jax.sharding import Mesh

from rljax.models import DecoderConfig, base_config, cast_params, merged_params, save_hf
from rljax.parallel import use_mesh
from rljax.plans import RolloutPlan
from rljax.rollouts.config import ActorParts
from rljax.rollouts.engines.config import EnginesConfig
from rljax.rollouts.engines.fleet import Export, Fleet
from rljax.rollouts.engines.remote_sampler import SamplingProbe
from rljax.rollouts.engines.sharing import own_share
from rljax.sampling import Stops
from rljax.sampling.weights import take_params
from rljax.text import Tokenizer, render_prompt
from rljax.types import Params


def fleet_of(config: EnginesConfig, parts: ActorParts, stops: Stops, *, longest: int) -> Fleet:
    """Those engines of `config` that this process asks, closed. Probed are prompts of at most `longest` tokens. All
    processes come here. ValueError for engines that cannot be shared as the config says."""
    share = own_share(config)
    probe = SamplingProbe(
        parts.decoder,
        probed_prompts(parts, config.probes, longest),
        parts.settings.sampling,
        stops,
        limit=parts.sampling.max_new_tokens,
        mesh=parts.mesh,
    )
    export = exporter(parts.decoder, parts.tokenizer, config.weights_dtype, parts.mesh)
    return Fleet(config, export, probe, bound=config.bound(parts.decoder.dtype), share=share)


def probed_prompts(parts: ActorParts, count: int, longest: int) -> list[list[int]]:
    """Ids of the first prompts that are no longer than `longest`; where no row of the data is a prompt by itself, as
    for environments that write their own, of the end of a text alone."""
    found: list[list[int]] = []
    for example in parts.dataset.train:
        try:
            prompt = render_prompt(parts.tokenizer, example.prompt, parts.settings.chat)
        except ValueError:
            continue
        if 0 < len(prompt) <= longest and prompt not in found:
            found.append(prompt)
        if len(found) == count:
            break
    return found or [[parts.tokenizer.eos_id]]


def check_forks_served(config: EnginesConfig, plan: RolloutPlan) -> None:
    """ValueError for forks that engines cannot make."""
    forks = plan.forks
    if forks is None:
        return
    if config.engine == "vllm":
        raise ValueError(
            "config.actor.engine='vllm' says no entropies and knows nothing of forks, which config.algorithm makes;"
            " serve with engine='rljax', or choose an algorithm without forks"
        )
    if forks.suppressed or forks.lagged_chains:
        what = "begin with other tokens than some" if forks.suppressed else "come from older weights"
        raise ValueError(f"forks that {what} are not served by engines; use an actor that decodes in this process")


def exporter(decoder: DecoderConfig, tokenizer: Tokenizer, dtype: str, mesh: Mesh) -> Export:
    """Writes weights in `dtype`, adapters merged into them, with the tokenizer. Weights that are spread over several
    processes are gathered on `mesh`, which is this process's own: all come here at the same moment, also those that
    write nothing."""

    def export(folder: Path | None, params: Params) -> None:
        own = take_params(decoder, mesh, params)
        if folder is None:
            return
        # A copy lies on this process's devices alone, whatever mesh the run is on.
        with contextlib.nullcontext() if own is params else use_mesh(mesh):
            # In float32, and rounded once: what adapters add may be less than what a narrower weight can show.
            if decoder.lora is not None:
                own = merged_params(decoder, cast_params(own, "float32"))
            cast = cast_params(own, dtype)
            save_hf(folder, base_config(decoder), cast, tokenizer=tokenizer, on_every_process=True)

    return export
