"""How far our programs are from what a machine allows, by compilation alone: nothing runs, no accelerator is needed.

    pip install 'rljax-lm[aot-tpu,aot-gpu]'
    python benchmarks/compiled.py --preset=full --json=compiled.json

`full` is Qwen3 0.6B and 8B on H100s and on a v5p:4x4x4, `small` the same programs with 4 layers and fewer devices,
`smoke` a tiny model on the CPU. A bound is the time that a program's kernels need at least, each at its own roofline
(`rljax.parallel.roofline`); a real machine is slower. `--only` takes some of the ratios:

`fsdp_traffic_over_need`: bytes that an update gathers and reduces on a device, over what each of its microbatches
needs: weights gathered twice in bfloat16, their gradient scattered once in float32. `decode_bound_*`: what a step must
read (weights, keys and values) at full bandwidth, over the bound of the step; top-p 0.95. `mfu_bound_*`: the model's
FLOPs at peak, over the bound of the update (forward, backward, optimizer), of 2 packed sequences a device: with
`products_saved` and all logits at once on a GPU, `attention_saved` for 8B. `peak_gib_32k`: GiB of one H100 in an update
of one row of 32k tokens, with `full`. `predicted_over_compiled`: what the plan of a run predicts of an update's peak
(state, batch and what it adds), over the compiled peak, 8B on 8 devices. Attention is in kernels, as on these machines
by default.
"""

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Callable

import jax
import numpy as np
from _common import QWEN3_0P6B, TINY, hf_config

from rljax.algorithms import GRPO
from rljax.experiment.memory import GIB, bytes_of, predict_update
from rljax.models import DecoderConfig, Remat, abstract_params, config_from_hf
from rljax.parallel import CHIPS, batch_parts, bound, collectives, compiled_memory, make_mesh, topology_devices, traffic
from rljax.sampling import Sampler, SamplerSpec, sampling_params
from rljax.testing import full_minibatch
from rljax.training import Learner, OptimizerConfig, UpdateConfig

QWEN3_8B = QWEN3_0P6B | {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """Machines and sizes; `layers` 0 is all of the model's."""

    pod: str
    eight: str
    one: str
    tpu: str
    layers: int = 0
    length: int = 4096
    long: int = 32768
    tokens: int = 1024
    scale: int = 1


PRESETS = {
    "smoke": Preset(pod="", eight="", one="", tpu="", layers=1, length=32, long=64, tokens=8, scale=32),
    "small": Preset(pod="h100:8", eight="h100:8", one="h100:1", tpu="v5e:2x2", layers=4, length=2048, long=8192),
    "full": Preset(pod="h100:64", eight="h100:8", one="h100:1", tpu="v5p:4x4x4"),
}


def model(shape, preset: Preset) -> DecoderConfig:
    if not preset.one:
        shape = TINY | {"family": "qwen3"}
    layers = {"num_hidden_layers": preset.layers} if preset.layers else {}
    config = config_from_hf(hf_config(shape | layers))
    return dataclasses.replace(config, dtype="bfloat16", param_dtype="float32")


def mesh_of(topology: str):
    return make_mesh(1, -1, 1, devices=topology_devices(topology) if topology else jax.devices()[:1])


def chip_named(topology: str):
    return CHIPS[topology.partition(":")[0] or "h100"]


def update_of(
    config,
    topology: str,
    *,
    rows: int,
    length: int,
    remat: Remat,
    microbatches: int = 1,
    head_chunk: int = UpdateConfig().head_chunk,
):
    """(learner, its minibatch, the compiled update) with `rows` packed sequences a device."""
    mesh = mesh_of(topology)
    count = rows * batch_parts(mesh)
    how = UpdateConfig(pack_length=length, microbatch_size=count, remat=remat, head_chunk=head_chunk)
    learner = Learner(config, GRPO(kl_coef=0.0).build().loss, OptimizerConfig(), how, mesh=mesh)
    batch = full_minibatch(mesh, microbatches=microbatches, rows=count, length=length)
    return learner, batch, learner.lower_update(batch).compile()


def fsdp_traffic_over_need(preset: Preset) -> float:
    config = model(QWEN3_8B, preset)
    microbatches = 2
    _, _, compiled = update_of(
        config, preset.pod, rows=1, length=preset.length, microbatches=microbatches, remat="attention_saved"
    )
    moved = sum(traffic(collectives(compiled, (microbatches, chunks(preset.length)))).values())
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract_params(config)))
    return moved / (microbatches * count * (2 * 2 + 4))


def chunks(tokens: int, head_chunk: int = UpdateConfig().head_chunk) -> int:
    """Chunks of the vocabulary head for `tokens` of which half is scored."""
    return max(tokens // 2 // head_chunk, 1)


def decode_bound(preset: Preset, shape, prompts: int, samples: int) -> float:
    config = model(shape, preset)
    chip = chip_named(preset.one)
    spec = SamplerSpec(
        prompt_buckets=(preset.tokens,),
        max_new_tokens=preset.tokens,
        prompt_slots=max(prompts // preset.scale, 1),
        sample_slots=samples,
    )

    def sampler_of(layers: int) -> Sampler:
        return Sampler(dataclasses.replace(config, num_layers=layers), spec, mesh=mesh_of(preset.one))

    def seconds(layers: int) -> float:
        sampler = sampler_of(layers)
        lowered = sampler.lower(sampler.plan(), sampling_params(temperature=1.0, top_p=0.95))["decode"]
        return bound(lowered.compile().as_text(), chip).seconds

    # A step has its layers one after the other, each of the same kernels: of many layers those behind the fourth take
    # as long as the fourth, and need not be compiled.
    few = min(config.num_layers, 4)
    least = seconds(few)
    if config.num_layers > few:
        least += (config.num_layers - few) * (least - seconds(few - 1))

    # What is looked up of the embeddings of an untied model is a few rows.
    plan = sampler_of(config.num_layers).plan()
    read = bytes_of(plan.weights) + bytes_of(plan.cache)
    if not config.tied_embeddings:
        read -= bytes_of(plan.weights["embedding"])
    return read / chip.bandwidth / least


def mfu_bound(preset: Preset, shape, topology: str, *, rows: int, remat: Remat, head_chunk: int) -> float:
    config = model(shape, preset)
    _, _, compiled = update_of(config, topology, rows=rows, length=preset.length, remat=remat, head_chunk=head_chunk)
    chip = chip_named(topology)
    found = bound(compiled.as_text(), chip, (chunks(rows * preset.length, head_chunk),))
    seconds = found.seconds
    if found.custom:
        # Attention in kernels of its own: two products forward, and five backward for the four of the derivative.
        seconds += attention_flops(config, rows, preset.length) * 7 / 6 / chip.flops
    return model_flops(config, rows, preset.length) / chip.flops / seconds


def model_flops(config: DecoderConfig, rows: int, length: int) -> float:
    """Of a forward and a backward pass on one device: products of the layers with their weights, attention to visible
    keys, the head on scored tokens. Recomputation does not count."""
    layers = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract_params(config)["layers"]))
    tokens = rows * length
    head = 2 * config.vocab_size * config.embed_dim * tokens / 2
    return 3 * (2 * layers * tokens + head) + attention_flops(config, rows, length)


def attention_flops(config: DecoderConfig, rows: int, length: int) -> float:
    """Of the scores of visible keys and the sums of their values, forward and backward."""
    return 3 * 2 * 2 * config.num_layers * config.num_heads * config.head_dim * rows * length * length / 2


def peak_gib_long(preset: Preset) -> float:
    _, _, compiled = update_of(model(QWEN3_0P6B, preset), preset.one, rows=1, length=preset.long, remat="full")
    return compiled_memory(compiled).peak / GIB


def predicted_over_compiled(preset: Preset) -> float:
    learner, batch, compiled = update_of(
        model(QWEN3_8B, preset), preset.eight, rows=1, length=preset.length, microbatches=2, remat="attention_saved"
    )
    memory = compiled_memory(compiled)
    return (memory.arguments + sum(predict_update(learner, batch).values())) / memory.peak


RATIOS: dict[str, Callable[[Preset], float]] = {
    "fsdp_traffic_over_need": fsdp_traffic_over_need,
    "decode_bound_0p6b": lambda preset: decode_bound(preset, QWEN3_0P6B, 32, 8),
    "decode_bound_8b": lambda preset: decode_bound(preset, QWEN3_8B, 8, 8),
    "mfu_bound_0p6b": lambda preset: mfu_bound(
        preset, QWEN3_0P6B, preset.one, rows=2, remat="products_saved", head_chunk=4096
    ),
    "mfu_bound_8b_v5p": lambda preset: mfu_bound(
        preset, QWEN3_8B, preset.tpu, rows=2, remat="attention_saved", head_chunk=1024
    ),
    "peak_gib_32k": peak_gib_long,
    "predicted_over_compiled": predicted_over_compiled,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(RATIOS)}")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(RATIOS)
    if unknown := sorted(set(names) - set(RATIOS)):
        parser.error(f"--only: {unknown[0]!r} is not one of {', '.join(RATIOS)}")
    jax.config.update("jax_platforms", "cpu")

    preset = PRESETS[arguments.preset]
    ratios: dict[str, float | None] = {}
    missing = {}
    seconds = {}
    for name in names:
        start = time.perf_counter()
        try:
            ratios[name] = RATIOS[name](preset)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            # A compiler that is not installed, or a program that does not fit: the others are still worth something.
            ratios[name] = None
            missing[name] = str(error).partition("\n")[0]
        seconds[name] = time.perf_counter() - start
        value = ratios[name]
        print(f"{name}: {missing[name] if value is None else f'{value:.3g}'}  ({seconds[name]:.0f} s)", flush=True)

    if arguments.json:
        report = {
            "benchmark": "compiled",
            "machine": {"cpu": platform.processor() or platform.machine(), "jax": jax.__version__},
            "setting": {"preset": arguments.preset, **dataclasses.asdict(preset)},
            "results": [{"name": name, "value": ratios[name], "compile_seconds": seconds[name]} for name in names],
            "ratios": ratios,
            "missing": missing,
        }
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
