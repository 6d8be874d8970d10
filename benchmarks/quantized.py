"""Frozen matrices in few bits: what a product of them costs beside a plain one, and what a model loses.

    python benchmarks/quantized.py --preset=full --json=quantized.json

`int8_train_cost` and `nf4_train_cost`: the time of a product and of its gradient by the input, of many tokens, over
that of a float32 matrix; `.._decode_cost`: of a product of a few tokens. `qwix_.._over_ours`: the same by qwix (pip
install qwix) over ours, where it is installed. `.._bits`: bits a weight. `.._kl`: KL divergence of a model from the one
whose matrices are kept so, in nats a token: a random one in the smoke form, else SmolLM2 on English sentences.
"""

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from _common import QWEN3_TINY, finish, machine, parse_arguments, write_model
from _probe import probe

from rljax.models import (
    LAYOUTS,
    DecoderConfig,
    dequantized_params,
    find_smollm2,
    hidden_states,
    load_model,
    logits,
    quantized_params,
)
from rljax.models.quantized import quantize, quantized_product
from rljax.text import load_tokenizer

SIZES = {
    "smoke": dict(rows=128, columns=64, many=16, few=2, length=8),
    "small": dict(rows=512, columns=1536, many=512, few=8, length=64),
    "full": dict(rows=1024, columns=3072, many=1024, few=8, length=256),
}
SIZES["gpu"] = SIZES["full"]
TEXT = (
    "The quick brown fox jumps over the lazy dog. Twelve plus nine is twenty-one, and water boils at 100 degrees. " * 8
)


Product = tuple[Callable[..., jax.Array], Any]
"""`fn(weights, x)`, and the weights: arguments of a compiled program, which would work out constants in advance."""


def qwix_product(kind: str, matrix: jax.Array) -> Product:
    """The product by qwix, of blocks as ours have them."""
    import qwix

    tiles = {"channelwise_axes": (1,), "tiled_axes": {0: LAYOUTS[kind].block}}
    held = qwix.quantize(matrix, "nf4" if kind == "nf4" else jnp.int8, **tiles)
    return lambda held, x: x @ qwix.dequantize(held).astype(x.dtype), held


def our_product(kind: str, matrix: jax.Array) -> Product:
    return lambda held, x: quantized_product(kind, x, *held), quantize(kind, matrix)


def products(rows: int, columns: int) -> dict[str, Product]:
    """By name, of inputs [tokens, rows]."""
    matrix = jax.random.normal(jax.random.key(0), (rows, columns)) / rows**0.5
    found: dict[str, Product] = {"float32": (lambda w, x: x @ w, matrix)}
    for kind in LAYOUTS:
        found[kind] = our_product(kind, matrix)
        if importlib.util.find_spec("qwix"):
            found[f"qwix {kind}"] = qwix_product(kind, matrix)
    return found


def with_gradient(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The product's gradient by its input, which needs the product too."""
    return jax.grad(lambda weights, x: jnp.sum(product(weights, x) ** 2), argnums=1)


def seconds_of(
    found: dict[str, Product], x: jax.Array, repeats: int, change: Callable[[Callable], Callable]
) -> dict[str, list[float]]:
    """Of one `change(product)` each, in turn, compiled."""
    programs = {name: (jax.jit(change(product)), weights) for name, (product, weights) in found.items()}
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for repeat in range(5 * repeats + 1):
        for name, (program, weights) in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(weights, x))
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def divergence(config: DecoderConfig, params: Any, kind: str, ids: jax.Array) -> float:
    """KL of the model from the one that is kept so, in nats a token."""
    kept = dataclasses.replace(config, quantized=kind)
    rounded = dequantized_params(kept, quantized_params(kept, params))

    @jax.jit
    def log_probs(params):
        positions = jnp.arange(ids.shape[1])[None]
        hidden = hidden_states(config, params, ids, positions, jnp.full(ids.shape, ids.shape[1]))
        return jax.nn.log_softmax(logits(config, params, hidden)[0])

    ours, theirs = log_probs(params), log_probs(rounded)
    return float(jnp.mean(jnp.sum(jnp.exp(ours) * (ours - theirs), axis=-1)))


def model_and_ids(preset: str, length: int) -> tuple[DecoderConfig, Any, jax.Array]:
    if preset == "smoke":
        config, params = load_model(write_model(QWEN3_TINY), dtype="float32", param_dtype="float32")
        return config, params, jnp.arange(length)[None] % config.vocab_size

    config, params = load_model(find_smollm2(), dtype="float32", param_dtype="float32")
    ids = load_tokenizer(find_smollm2()).encode(TEXT)[:length]
    return config, params, jnp.asarray(ids)[None]


def main() -> None:
    arguments = parse_arguments(__doc__.splitlines()[0], rivals=())
    size = SIZES[arguments.preset]
    probes = [probe("float32", arguments.preset == "smoke")]
    found = products(size["rows"], size["columns"])
    lines = []
    ratios: dict[str, float] = {}
    for what, tokens, change in (
        ("train", size["many"], with_gradient),
        ("decode", size["few"], lambda product: product),
    ):
        x = jax.random.normal(jax.random.key(1), (tokens, size["rows"]))
        seconds = seconds_of(found, x, arguments.repeats, change)
        median = {name: statistics.median(times) for name, times in seconds.items()}
        for name, value in median.items():
            lines.append({"name": f"{what}, {name}", "value": value, "seconds": value, "all_seconds": seconds[name]})
        for kind in LAYOUTS:
            ratios[f"{kind}_{what}_cost"] = median[kind] / median["float32"]
            if f"qwix {kind}" in median:
                ratios[f"qwix_{kind}_{what}_over_ours"] = median[f"qwix {kind}"] / median[kind]

    config, params, ids = model_and_ids(arguments.preset, size["length"])
    for kind, layout in LAYOUTS.items():
        ratios[f"{kind}_bits"] = 8 / layout.packed + 16 / layout.block
        ratios[f"{kind}_kl"] = divergence(config, params, kind, ids)
    finish("quantized", arguments, machine(probes), {"size": size}, lines, ratios)


if __name__ == "__main__":
    main()
