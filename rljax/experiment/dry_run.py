"""The plan of a run, before it runs: parameters, tokens, shapes, mesh, and memory per device by phase of a step."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rljax.batching import PackConfig, layout, loss_mask
from rljax.experiment.build import Run, build, held_out_examples, stack_rows
from rljax.experiment.config import Config
from rljax.experiment.memory import GIB, Compiled, Phase, compile_phases, phases, runs_kernels
from rljax.experiment.prompts import describe_prompts
from rljax.experiment.report import aligned, describe_schedule
from rljax.experiment.sft import check_demonstrations, demonstration, longest_demonstrations
from rljax.models import count_weights
from rljax.parallel import batch_parts, batch_sharding, chip_of, is_main_process, replicated, topology_devices, traffic
from rljax.text import render_prompt
from rljax.types import TEACHER_LOGPROBS, TrainBatch, Trajectory

_ADVICE = {
    "parameters": "a larger config.mesh.fsdp or config.mesh.tensor",
    "optimizer": "a larger config.mesh.fsdp",
    "gradients": "a larger config.mesh.fsdp",
    "sum of gradients": "a larger config.mesh.fsdp, or one microbatch",
    "reference": "an algorithm with kl_coef=0, which needs no reference model",
    "teachers": "a larger config.mesh.fsdp, or config.teachers with param_dtype=bfloat16",
    "teacher's head": "a larger config.mesh.tensor, or config.algorithm.support above 0",
    "teacher's states": "config.algorithm.support above 0, which keeps a few numbers a token",
    "critic": "a larger config.mesh.fsdp, or an algorithm without a critic",
    "decoder weights": "a larger config.mesh.tensor, or config.model.dtype=bfloat16",
    "weights in waiting": "a smaller config.rollout.staleness, or more config.rollout.devices",
    "KV cache": "fewer config.actor.prompt_slots x sample_slots (or conversations), or a smaller max_new_tokens",
    "activations": "config.update.remat=attention_saved, or a smaller config.update.pack_length or microbatch_size",
    "a layer": "a smaller config.update.pack_length or microbatch_size",
    "prefill": "smaller config.actor.prompt_buckets (or prefill_chunks)",
    "logits": "a smaller config.update.head_chunk, or fewer rows that decode at once",
    "batch": "a smaller config.update.pack_length, or more config.update.minibatches",
    "vocabulary head": "a larger config.mesh.tensor",
    "its gradient": "a larger config.mesh.tensor",
    "embedding gradient": "a larger config.mesh.tensor",
}
"""By part of a phase: what makes it smaller."""


def print_plan(config: Config, *, topology: str = "", measure: bool = True) -> dict[str, Any]:
    """Prints the plan and returns it.

    With `measure` the programs of a step (the decoder's, scoring, the update) are compiled, not run, and the compiler
    is asked. `topology` names a machine to plan for, as `rljax.parallel.topology_devices` knows it; empty is this one.
    ValueError for one that does not exist or whose compiler is not installed, and for what a run would be refused for.
    """
    # A machine that is planned for elsewhere needs none of the accelerators here.
    if topology:
        jax.config.update("jax_platforms", "cpu")
    devices = topology_devices(topology) if topology else None
    run = build(config, devices)
    check_run(run)

    # The largest that a step can come to.
    batch = worst_batch(run)
    plans = [decoder.plan() for decoder in run.actor.decoders]

    limit, limit_is = device_memory(run)
    programs: list[Compiled] = []
    result = {
        "run": run,
        "topology": topology,
        "parameters": count_weights(run.decoder),
        "shapes": {
            "packed [M, R, S]": batch.packed.tokens.shape,
            "scored [M, R, K]": batch.packed.score_index.shape,
            "loss tokens of rows [M, Q, C]": batch.rows.place.shape,
        },
        "kernels": runs_kernels(run.learner, batch.packed.tokens.shape[-1]),
        "phases": phases(run, batch, plans),
        "compiled": programs,
        "limit": limit,
        "limit_is": limit_is,
    }

    # What is known comes first: compiling takes minutes for a large model.
    shows = is_main_process()
    if shows:
        print(describe(run, result), flush=True)

    if measure:
        if shows:
            print("\ncompiled, nothing runs:", flush=True)
        for program in compile_phases(run, batch, plans):
            programs.append(program)
            if shows:
                print(_compiled_line(program), flush=True)

    if shows:
        print("\n" + verdict(result))
    return result


def describe(run: Run, result: dict[str, Any]) -> str:
    """The plan as text."""
    config, update = run.config, run.config.update
    samples = config.prompts_per_step * run.algorithm.plan.group_size
    shapes = ", ".join(f"{name} = {list(shape)}" for name, shape in result["shapes"].items())
    devices = run.mesh.devices
    attention = "kernels" if result["kernels"] else "plain operations"
    lines = [
        f"model        {result['parameters'] / 1e6:.1f}M parameters, {run.decoder.family}, {run.decoder.dtype}",
        f"data         {len(run.dataset.train)} training examples, {len(run.dataset.test)} held out",
        f"prompts      {describe_prompts(config, run.dataset, run.tokenizer)}",
        f"mesh         {dict(run.mesh.shape)} on {devices.size} x {devices.flat[0].device_kind}",
        f"a step       {config.prompts_per_step} prompts x {run.algorithm.plan.group_size} = {samples} samples, up to "
        f"{samples * config.sampling.max_new_tokens} new tokens, {update.minibatches * update.epochs} updates",
        f"rollouts     {describe_schedule(run)}",
        f"actor        {config.actor}",
        f"an update    at most {shapes}; {_tables(config.update)}",
        f"attention    of updates in {attention} (config.update.attention_kernel={update.attention_kernel})",
    ]

    lines += ["", "memory of a device by phase, predicted (GiB)"]
    for phase in result["phases"]:
        sizes = f"{_parts(phase.held)}; while it runs {_parts(phase.working)}"
        lines.append(f"  {phase.name:<7} {phase.predicted / GIB:8.3f} = {sizes}")
    return "\n".join(lines)


def verdict(result: dict[str, Any]) -> str:
    """Peak by phase, predicted and compiled, beside what a device has; whether it fits, or what to change."""
    rows = [("peak by phase (GiB)", "predicted", *(("compiled", "largest program") if result["compiled"] else ()))]
    peaks = []
    for phase in result["phases"]:
        size, name = phase_peak(phase, result["compiled"])
        peaks.append((size, phase))
        measured = (f"{size / GIB:.3f}", name) if result["compiled"] else ()
        rows.append((phase.name, f"{phase.predicted / GIB:.3f}", *measured))

    limit = result["limit"]
    lines = [aligned(rows), "", f"a device has {limit / GIB:.2f} GiB ({result['limit_is']})"]
    largest, phase = max(peaks, key=lambda found: found[0])
    return "\n".join([*lines, "it fits" if largest <= limit else _remedy(phase, largest, limit)])


def phase_peak(phase: Phase, compiled: Sequence[Compiled]) -> tuple[int, str]:
    """Most bytes of a device in a phase, and the program that takes them; predicted where none is compiled."""
    found = [(program.peak(phase), program.name) for program in compiled if program.phase == phase.name]
    return max(found, default=(phase.predicted, ""))


def _compiled_line(program: Compiled) -> str:
    moved = ", ".join(f"{kind} {size / 2**20:.1f} MiB" for kind, size in traffic(program.collectives).items())
    count = sum(one.times for one in program.collectives)
    sent = f"{count} collectives, {moved}" if moved else "no collectives"
    return f"  {program.name:<12} {program.seconds:6.1f} s  adds {program.added / GIB:8.3f} GiB  {sent}"


def _parts(sizes: Any) -> str:
    return ", ".join(f"{name} {size / GIB:.3f}" for name, size in sizes.items())


def _tables(spec: PackConfig) -> str:
    names = ("length_buckets", "score_buckets", "row_buckets", "microbatch_buckets", "trajectory_buckets")
    return ", ".join(f"{name} {getattr(spec, name) or 'automatic'}" for name in names)


def _remedy(phase: Phase, peak: int, limit: int) -> str:
    parts = {**phase.held, **phase.working}
    largest = sorted(parts, key=lambda name: -parts[name])[:2]
    advice = "; ".join(f"{name}: {_ADVICE[name]}" for name in largest)
    return f"DOES NOT FIT: {phase.name} takes {peak / GIB:.2f} GiB of {limit / GIB:.2f}. Largest parts first, {advice}"


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
            layout(batch, loss_mask(batch), update, parts=batch_parts(run.mesh))
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
    batch = stack_rows(config, worst_rows(run))
    packing = layout(batch, loss_mask(batch), config.update, parts=batch_parts(run.mesh))

    plan = run.algorithm.plan
    rows = packing.rows_to_score()
    of_tokens = rows.loss_weights
    of_row = rows.source.astype(np.float32)
    columns = {column.name: of_tokens for column in plan.columns if column.per != "row"}
    said: dict[str, np.ndarray] = {}
    if run.teachers is not None:
        columns[TEACHER_LOGPROBS] = of_tokens
        # One zero for all: a vocabulary of states may be larger than this machine.
        said = {
            name: np.broadcast_to(np.zeros((), x.dtype), (*of_tokens.shape, *x.shape))
            for name, x in run.teachers.abstract_said().items()
        }
    rows = dataclasses.replace(
        rows,
        ref_logprobs=of_tokens if plan.needs_ref else None,
        uniforms=of_tokens if plan.needs_uniforms else None,
        columns=columns,
        row_columns={column.name: of_row for column in plan.columns if column.per == "row"},
        teacher=said,
    )
    minibatch = in_shapes(TrainBatch(packed=packing.packed, rows=rows), run.mesh)
    if run.teachers is None:
        return minibatch
    # It lies where its weights do.
    student = run.learner.policy_params(run.learner.abstract_state())
    return dataclasses.replace(minibatch, teacher_head=run.teachers.abstract_head(student))


def in_shapes(batch: TrainBatch, mesh: Mesh) -> TrainBatch:
    """A minibatch as `jax.ShapeDtypeStruct`s, laid out as a learner puts it."""
    everywhere = replicated(mesh)
    split = batch_sharding(mesh, axis=1)

    def shaped(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split if np.ndim(x) > 1 else everywhere)

    return jax.tree.map(shaped, batch)


def device_memory(run: Run) -> tuple[int, str]:
    """Bytes that one device of the run may use, and where the number comes from: the kind of chip, what the backend
    allows, or this machine's memory shared by its CPU devices."""
    device = run.mesh.devices.flat[0]
    if device.platform == "cpu":
        bytes_here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return bytes_here // jax.local_device_count(), "this machine's memory, shared by its devices"

    # Devices to compile for have no statistics.
    try:
        stats = device.memory_stats()
    except jax.errors.JaxRuntimeError:
        stats = None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]), "what the backend allows"
    chip = chip_of(device)
    if chip is None:
        raise ValueError(f"no memory is known of a {device.device_kind}; add it to rljax.parallel.CHIPS")
    return chip.memory, device.device_kind
