"""The plan of a run, before it runs: parameters, tokens, shapes, mesh, and memory per device by part."""

import os
from typing import Any

import jax
import numpy as np

from rljax.batching import PackConfig, layout, loss_mask, stack
from rljax.experiment.build import Run, build, held_out_examples, stack_rows
from rljax.experiment.config import Config
from rljax.experiment.prompts import describe_prompts
from rljax.experiment.report import aligned
from rljax.experiment.sft import check_demonstrations, demonstration, longest_demonstrations
from rljax.models import DecoderConfig, abstract_params, param_shardings
from rljax.parallel import DECODE_RULES, batch_parts, is_main_process, use_mesh
from rljax.text import render_prompt
from rljax.types import Rows, TrainBatch, Trajectory

GIB = 2**30
_ADVICE = {
    "parameters": "a larger config.mesh.fsdp or config.mesh.tensor",
    "optimizer": "a larger config.mesh.fsdp",
    "gradients": "a larger config.mesh.fsdp",
    "reference": "an algorithm with kl_coef=0, which needs no reference model",
    "critic": "a larger config.mesh.fsdp, or an algorithm without a critic",
    "decoder weights": "a larger config.mesh.tensor, or config.model.dtype=bfloat16",
    "KV cache": "fewer config.actor.prompt_slots x sample_slots (or conversations), or a smaller max_new_tokens",
    "activations": "config.update.remat=True, or a smaller config.update.pack_length or microbatch_size",
    "logits": "a smaller config.update.head_chunk",
}


def print_plan(config: Config, *, measure: bool = True) -> dict[str, Any]:
    """Prints the plan and returns it. With `measure` the update is compiled, not run, and the compiler asked."""
    run = build(config)
    check_run(run)
    batch = worst_batch(run)
    predicted = predict_memory(run, batch)
    result = {
        "parameters": sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract_params(run.decoder))),
        "shapes": {
            "packed [M, R, S]": batch.packed.tokens.shape,
            "scored [M, R, K]": batch.packed.score_index.shape,
            "rows [M, B, T]": batch.rows.row_index.shape,
        },
        "predicted": predicted,
        "measured": measure_update(run, batch) if measure else {},
        "total": sum(predicted.values()),
        "limit": device_memory(),
    }
    if is_main_process():
        print(describe(run, result))
    return result


def describe(run: Run, result: dict[str, Any]) -> str:
    """The plan as text."""
    config, update = run.config, run.config.update
    samples = config.prompts_per_step * run.algorithm.plan.group_size
    shapes = ", ".join(f"{name} = {list(shape)}" for name, shape in result["shapes"].items())
    lines = [
        f"model        {result['parameters'] / 1e6:.1f}M parameters, {run.decoder.family}, {run.decoder.dtype}",
        f"data         {len(run.dataset.train)} training examples, {len(run.dataset.test)} held out",
        f"prompts      {describe_prompts(config, run.dataset, run.tokenizer)}",
        f"mesh         {dict(run.mesh.shape)} on {jax.device_count()} x {jax.devices()[0].device_kind}",
        f"a step       {config.prompts_per_step} prompts x {run.algorithm.plan.group_size} = {samples} samples, up to "
        f"{samples * config.sampling.max_new_tokens} new tokens, {update.minibatches * update.epochs} updates",
        f"actor        {config.actor}",
        f"an update    at most {shapes}; {_tables(config.update)}",
    ]

    rows = [(name, f"{size / GIB:.3f}") for name, size in result["predicted"].items()]
    rows += [("total", f"{result['total'] / GIB:.3f}"), ("device has", f"{result['limit'] / GIB:.3f}")]
    lines += ["", aligned([("memory per device (GiB)", "predicted"), *rows])]
    if result["measured"]:
        rows = [(name, f"{size / GIB:.3f}") for name, size in result["measured"].items()]
        lines += ["", aligned([("compiled update, per device (GiB)", "measured"), *rows])]

    fits = result["total"] <= result["limit"]
    return "\n".join(
        [*lines, "", "it fits" if fits else _remedy(result["predicted"], result["total"], result["limit"])]
    )


def _tables(spec: PackConfig) -> str:
    names = ("length_buckets", "score_buckets", "row_buckets", "microbatch_buckets")
    return ", ".join(f"{name} {getattr(spec, name) or 'automatic'}" for name in names)


def _remedy(predicted: dict[str, int], total: int, limit: int) -> str:
    largest = sorted(predicted, key=lambda name: -predicted[name])[:2]
    advice = "; ".join(f"{name}: {_ADVICE[name]}" for name in largest)
    return f"DOES NOT FIT: {total / GIB:.2f} GiB of {limit / GIB:.2f}. Largest parts first, {advice}"


def check_run(run: Run) -> None:
    """ValueError, before weights load, for what would be found when a run has gone on for long: a demonstration or a
    table of `config.update` that does not fit, or nothing to evaluate on."""
    check_demonstrations(run)
    check_tables(run)
    held_out_examples(run)


def check_tables(run: Run) -> None:
    """ValueError for a table of `config.update` that the run's own largest minibatch, of rollouts or of its warm-up,
    does not fit into; else that is found in the middle of the run. Automatic tables fit anything."""
    update = run.config.update
    if not (update.score_buckets or update.row_buckets or update.microbatch_buckets or update.trajectory_buckets):
        return

    demonstrations = longest_demonstrations(run) if run.config.warmup.steps else []
    for what, rows in (("rollouts of full length", worst_rows(run)), ("the longest demonstrations", demonstrations)):
        if not rows:
            continue
        try:
            batch = stack_rows(run.config, rows)
            layout(batch, loss_mask(batch), update)
        except ValueError as error:
            raise ValueError(f"config.update does not fit {what}: {error}, or leave the table empty") from None


def worst_rows(run: Run) -> list[Trajectory]:
    """The rows of the largest minibatch: every completion of full length, sharing only prompts."""
    config = run.config
    prompts = sorted((render_prompt(run.tokenizer, e.prompt, config.data.chat) for e in run.dataset.train), key=len)
    group = run.algorithm.plan.group_size

    # Random completions share nothing but their prompt, which is the least that forests can save.
    rng = np.random.default_rng(0)
    rows = []
    for index in range(config.prompts_per_step // config.update.minibatches):
        for _ in range(group):
            prompt = prompts[-1 - index % len(prompts)]
            length = run.actor.longest_row(len(prompt)) - len(prompt)
            completion = rng.integers(0, run.decoder.vocab_size, length).tolist()
            rows.append(demonstration(prompt, completion, index, index))
    return rows


def worst_batch(run: Run) -> TrainBatch:
    """`worst_rows` as the minibatch that they become, in shapes."""
    config = run.config
    batch = stack(worst_rows(run))
    packing = layout(batch, loss_mask(batch), config.update)

    plan = run.algorithm.plan
    like = packing.row_index.shape

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    real = shaped(like, np.float32)
    of_row = shaped(like[:2], np.float32)
    return TrainBatch(
        packed=jax.tree.map(lambda x: shaped(x.shape, x.dtype), packing.packed),
        rows=Rows(
            row_index=shaped(like, np.int32),
            loss_mask=shaped(like, bool),
            loss_weights=real,
            token_count=shaped(like[:1], np.float32),
            advantages=real,
            behavior_logprobs=real,
            old_logprobs=real,
            source=shaped(like[:2], np.int32),
            ref_logprobs=real if plan.needs_ref else None,
            uniforms=real if plan.needs_uniforms else None,
            columns={column.name: of_row if column.per == "row" else real for column in plan.columns},
        ),
    )


def predict_memory(run: Run, batch: TrainBatch) -> dict[str, int]:
    """Bytes per device by part, from shapes and shardings alone.

    Activations are what the backward pass keeps of one microbatch: per token and layer the inputs of each product, or
    with remat the layer's input alone (and one layer's worth while it is recomputed).
    """
    config = run.config
    state = run.learner.abstract_state()
    microbatches, sequences, length = batch.packed.tokens.shape
    tensor = run.mesh.shape["tensor"]
    parts = batch_parts(run.mesh)

    weights = _bytes(state.trainable)
    gradients = _bytes(_as_float32(state.trainable))
    critic = {}
    if run.critic is not None:
        # Weights and optimizer; gradients and activations are there one model at a time.
        own = run.critic.abstract_state()
        critic["critic"] = _bytes(own.trainable) + _bytes(own.base) + _bytes(own.opt_state)
        gradients = max(gradients, _bytes(_as_float32(own.trainable)))

    # The decoder keeps a copy of the weights in the dtype that it computes in, laid out by rules of its own.
    decoder = run.decoder
    as_computed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, np.dtype(decoder.dtype)), run.learner.policy_params(state)
    )
    decoder_weights = _bytes(as_computed, param_shardings(decoder, run.mesh, DECODE_RULES))

    # Logits in float32, their gradient and what the softmax keeps of them, of a chunk on each device.
    chunk = min(config.update.head_chunk, sequences // parts * batch.packed.score_index.shape[-1])
    logits = chunk * decoder.vocab_size * 4 * 3 // tensor

    return {
        "parameters": weights + _bytes(state.base),
        "optimizer": _bytes(state.opt_state),
        # Of several microbatches the sum is kept beside the newest.
        "gradients": gradients * (2 if microbatches > 1 else 1),
        **({"reference": weights} if state.ref_trainable is not None else {}),
        **critic,
        "decoder weights": decoder_weights,
        "KV cache": run.actor.cache_bytes() // parts,
        "activations": _activation_bytes(decoder, sequences // parts, length, tensor, remat=config.update.remat),
        "logits": logits,
    }


def _activation_bytes(decoder: DecoderConfig, sequences: int, length: int, tensor: int, *, remat: bool) -> int:
    """Of one microbatch of `sequences` packed sequences on a device, whose weights are split `tensor` ways."""
    tokens = sequences * length
    width = np.dtype(decoder.dtype).itemsize
    heads = (2 * decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim // tensor
    per_layer = tokens * width * (4 * decoder.embed_dim + heads + 3 * decoder.mlp_dim // tensor)
    # Half of the scores are invisible to their query.
    scores = sequences * decoder.num_heads // tensor * length * length * 4 // 2
    if not remat:
        return (per_layer + scores) * decoder.num_layers

    inputs = tokens * width * decoder.embed_dim * decoder.num_layers
    return inputs + per_layer + scores


def measure_update(run: Run, batch: TrainBatch) -> dict[str, int]:
    """What the compiler says of the update's memory per device: arguments (state and batch) and temporaries."""
    with use_mesh(run.mesh):
        analysis: Any = run.learner.lower_update(batch).compile().memory_analysis()
        critic: Any = run.critic and run.critic.learner.lower_update(batch).compile().memory_analysis()
    sizes = {"state and batch": analysis.argument_size_in_bytes, "temporaries": analysis.temp_size_in_bytes}
    if critic is not None:
        sizes |= {"critic and batch": critic.argument_size_in_bytes, "its temporaries": critic.temp_size_in_bytes}
    return {name: int(size) for name, size in sizes.items()}


def device_memory() -> int:
    """Bytes that one device may use: what the backend allows, or this machine's memory shared by its CPU devices."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def _as_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.update(dtype=np.float32), tree)


def _bytes(tree: Any, where: Any = None) -> int:
    """Bytes on one device of a tree of `ShapeDtypeStruct`s; `where` are the shardings if the leaves have none."""
    leaves = jax.tree.leaves(tree)
    places = [x.sharding for x in leaves] if where is None else jax.tree.leaves(where)
    return sum(
        int(np.prod(place.shard_shape(x.shape))) * np.dtype(x.dtype).itemsize
        for x, place in zip(leaves, places, strict=True)
    )
