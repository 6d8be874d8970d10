"""Memory of one device by phase of a step, predicted from shapes and as the compiler has it.

What coexists is added up, and nothing else: weights and optimizer stay throughout, keys and values are there while
sampling, gradients and activations while updating.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from rljax.experiment.build import Run, sampled_by
from rljax.models import DecoderConfig, Forward, abstract_params, hidden_states, sequence_shares
from rljax.models.attention import MAX_BLOCKS, MIN_BLOCK, has_kernels, kernel_attention
from rljax.models.attention_stream import BLOCK
from rljax.models.sequence import CHUNKS
from rljax.parallel import (
    Bound,
    Chip,
    Collective,
    CompiledMemory,
    batch_parts,
    bound,
    chip_of,
    collectives,
    compiled_memory,
    num_processes,
    platform,
)
from rljax.sampling import DecoderPlan, lower_copies
from rljax.training import Learner
from rljax.types import TrainBatch

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Phase:
    """What lies on one device in one phase of a step. Bytes by part."""

    name: str
    """`sample`, `score`, `teach`, `critic` or `update`."""
    held: Mapping[str, int]
    """What is there before and after: it is known exactly."""
    working: Mapping[str, int]
    """What its programs add while they run, predicted from shapes."""

    @property
    def predicted(self) -> int:
        """Most bytes at a time."""
        return sum(self.held.values()) + sum(self.working.values())


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program of a phase, compiled."""

    phase: str
    name: str
    seconds: float
    """Wall seconds of tracing and compiling."""
    memory: CompiledMemory
    collectives: Sequence[Collective]
    """Of one call; of a program that decodes, of one step."""
    bound: Bound | None
    """What its kernels need at least on this kind of device, collectives left out, likewise; None where the kind is not
    known."""
    lacks: tuple[str, ...] = ()
    """Parts that its phase holds and that are not there yet when it runs."""

    @property
    def added(self) -> int:
        """Bytes that it adds to what it is called with."""
        memory = self.memory
        return memory.temporaries + memory.code + memory.outputs - memory.aliased

    def peak(self, phase: Phase) -> int:
        """Most bytes on one device while it runs in `phase`."""
        return self.added + sum(size for name, size in phase.held.items() if name not in self.lacks)


def phases(run: Run, batch: TrainBatch, plans: Sequence[DecoderPlan]) -> list[Phase]:
    """The phases of a step, in order; `plans` are those of the actor's decoders, `batch` is the largest minibatch."""
    state = held_state(run)
    bare = dataclasses.replace(batch, teacher_head=None)
    if run.teachers is not None and run.teachers.copies_head:
        # Any other teacher's head is a part of weights that are counted already.
        state |= {"teacher's head": bytes_of(batch.teacher_head)}
    weights = sum(bytes_of(plan.weights) for plan in plans)
    kept = sum(bytes_of(plan.cache) for plan in plans if plan.keeps_cache)
    passing = max((bytes_of(plan.cache) for plan in plans if not plan.keeps_cache), default=0)
    conversations = {"KV cache": kept} if kept else {}

    sampling = {"decoder weights": weights, "KV cache": kept + passing}
    training = state | {"batch": bytes_of(bare)}
    if run.beside is not None:
        # Devices of the actor's own have none of the learner's state, and the others nothing of the actor's.
        sampling |= _in_waiting(run)
    else:
        sampling |= state
        # Decoders hold no weights while the learner trains, but for those that older ones are needed of.
        staying = [plan for plan, of in zip(plans, run.actor.decoders, strict=True) if of not in run.actor.resting]
        if older := sum(bytes_of(plan.weights) for plan in staying):
            training["decoder weights"] = older
        training |= conversations

    found = [Phase("sample", sampling, _decoding(run, plans))]
    if scores(run):
        found.append(Phase("score", training, _scoring(run.learner, batch)))
    if run.teachers is not None and (models := run.teachers.models):
        # One after another, and what they say goes to the host before the next one speaks.
        said = bytes_of(batch.rows.teacher)
        parts = [{**_scoring(model.learner, batch), "teacher's states": said} for model in models]
        found.append(Phase("teach", training, max(parts, key=lambda part: sum(part.values()))))
    if run.critic is not None:
        found.append(Phase("critic", training, predict_update(run.critic.learner, bare)))
    return [*found, Phase("update", training, predict_update(run.learner, batch))]


def _in_waiting(run: Run) -> dict[str, int]:
    """Weights that were handed over and that no rollout has been made with yet: of each version that may wait."""
    assert run.beside is not None
    shapes = jax.tree.map(lambda x, where: x.update(sharding=where), abstract_params(run.decoder), run.beside.layout)
    return {"weights in waiting": max(1, run.config.rollout.staleness) * bytes_of(shapes)}


def scores(run: Run) -> bool:
    """Whether a step scores its rollout before it updates: for old log-probs of several updates, or a reference."""
    update = run.config.update
    several = update.minibatches * update.epochs > 1
    return run.algorithm.plan.needs_ref or (several and not update.use_sampler_logprobs)


def held_state(run: Run) -> dict[str, int]:
    """What a run's state takes on one device, by part: there throughout."""
    state = run.learner.abstract_state()
    parts = {
        "parameters": bytes_of(state.trainable) + bytes_of(state.base),
        "optimizer": bytes_of(state.opt_state),
    }
    if state.ref_trainable is not None:
        parts["reference"] = bytes_of(state.ref_trainable)
    if run.pushes_seldom:
        parts["pushed"] = bytes_of(state.trainable)
    if run.lags:
        parts["before"] = bytes_of(state.trainable)
    if run.teachers is not None:
        parts["teachers"] = sum(bytes_of(shapes) for shapes in run.teachers.abstract_params())
    if run.critic is not None:
        own = run.critic.abstract_state()
        # Frozen weights are the policy's own, unless it starts from another model.
        frozen = bytes_of(own.base) if run.config.critic.model else 0
        parts["critic"] = bytes_of(own.trainable) + frozen + bytes_of(own.opt_state)
    return parts


def bytes_of(tree: Any) -> int:
    """Bytes on one device of a tree of `jax.ShapeDtypeStruct`s; of an array without a sharding, all of them."""

    def one(x: Any) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * np.dtype(x.dtype).itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def compile_phases(run: Run, batch: TrainBatch, plans: Sequence[DecoderPlan]) -> Iterator[Compiled]:
    """The programs of a step at their largest shapes, compiled one by one for the run's devices. Nothing runs."""
    sampling = sampled_by(run.config, run.tokenizer, run.decoder)
    chip = chip_of(run.mesh.devices.flat[0])
    for index, (decoder, plan) in enumerate(zip(run.actor.decoders, plans, strict=True)):
        behind = f" {index}" if index else ""
        start = time.perf_counter()
        programs = decoder.lower(plan, sampling)
        # Where each process decodes by itself, its copy of the weights comes from all of them.
        if run.beside is None and num_processes(run.mesh) > num_processes(run.rollout_mesh):
            programs["weights"] = lower_copies(run.decoder, run.mesh)
        for name, lowered in programs.items():
            # The copy is what it returns: both are counted as the decoder's weights.
            copies = ("decoder weights",) if name == "weights" else ()
            lacks = (*copies, "KV cache") if copies and not plan.keeps_cache else copies
            yield _compile("sample", f"{name}{behind}", lowered, start, chip, lacks=lacks)
            start = time.perf_counter()

    microbatches = batch.packed.tokens.shape[0]
    # Microbatches are a loop whose number is data, in which the chunks of the vocabulary's head are another. An update
    # of one microbatch has no loop around it.
    loops = (microbatches, _chunks(run.learner, batch))
    of_update = loops if microbatches > 1 else loops[1:]
    if scores(run):
        start = time.perf_counter()
        yield _compile("score", "score", run.learner.lower_score(batch), start, chip, loops)
    for index, model in enumerate([] if run.teachers is None else run.teachers.models):
        behind = f" {index}" if index else ""
        start = time.perf_counter()
        yield _compile("teach", f"teach{behind}", model.lower(batch), start, chip, loops)
    if run.critic is not None:
        start = time.perf_counter()
        bare = dataclasses.replace(batch, teacher_head=None)
        yield _compile("critic", "critic", run.critic.learner.lower_update(bare), start, chip, (microbatches,))
    start = time.perf_counter()
    yield _compile("update", "update", run.learner.lower_update(batch), start, chip, of_update)


def _compile(
    phase: str,
    name: str,
    lowered: jax.stages.Lowered,
    start: float,
    chip: Chip | None,
    loops: Sequence[int] = (1,),
    *,
    lacks: tuple[str, ...] = (),
) -> Compiled:
    compiled = lowered.compile()
    seconds = time.perf_counter() - start

    text = compiled.as_text() or ""
    least = None if chip is None else bound(text, chip, loops)
    return Compiled(phase, name, seconds, compiled_memory(compiled), collectives(text, loops), least, lacks)


def _chunks(learner: Learner, batch: TrainBatch) -> int:
    """Chunks in which one device computes the vocabulary head of a microbatch."""
    return -(-_own_scored(learner, batch) // learner.update_config.head_chunk)


def _own_scored(learner: Learner, batch: TrainBatch) -> int:
    """Scored tokens of one device in a microbatch, padding included. Those that share a sequence take equal numbers."""
    _, rows, scored = batch.packed.score_index.shape
    return rows // batch_parts(_mesh(learner)) * -(-scored // _sharing(learner))


def predict_update(learner: Learner, batch: TrainBatch) -> dict[str, int]:
    """What an update of a learner on a mesh adds, by part: the most of three places in its passes."""
    config = learner.config
    microbatches = batch.packed.tokens.shape[0]
    trainable = jax.tree.map(lambda x: x.update(dtype=np.float32), learner.abstract_state().trainable)
    gradients = bytes_of(trainable)

    layers = _layers(learner, batch)
    head = _head(learner, batch)
    # Gradients of the table are added up whole on each device, and then shared out; of a tied one, two wait for that.
    table = config.vocab_size * config.embed_dim * 4 // _tensor(learner) if "embedding" in trainable else 0
    is_split = batch_parts(_mesh(learner)) * _sharing(learner) > 1
    embedding = (2 if config.tied_embeddings else 1) * table if is_split else table

    held = {"activations": layers["activations"]}
    if microbatches > 1:
        # The sum of earlier microbatches is kept beside the newest.
        held["sum of gradients"] = gradients
    at_head = held | head
    if is_split and platform(_mesh(learner)) == "gpu":
        # While it waits for the head, which is gathered, XLA for GPUs lays out the zeros that become the gradients of
        # the layers: so it is of 8B on 8 H100s. Where nothing is sent they come after the head.
        at_head["gradients"] = sum(bytes_of(trainable.get(stack, {})) for stack in config.stacks)
    in_layers = held | {"gradients": gradients, "a layer": layers["a layer"]}
    at_embedding = held | {"gradients": gradients, "embedding gradient": embedding}
    at_embedding["activations"] = 0
    return max(at_head, in_layers, at_embedding, key=lambda parts: sum(parts.values()))


def _scoring(learner: Learner, batch: TrainBatch) -> dict[str, int]:
    """What scoring a minibatch adds."""
    head = _head(learner, batch, backward=False)
    return max({"a layer": _layers(learner, batch, backward=False)["a layer"]}, head, key=lambda x: sum(x.values()))


def _decoding(run: Run, plans: Sequence[DecoderPlan]) -> dict[str, int]:
    """What sampling adds beside keys and values: the logits of a step, or a layer of a prefill. Nothing where it is
    done elsewhere."""
    if not plans:
        return {}
    config = run.decoder
    parts = batch_parts(run.rollout_mesh)
    tensor = run.rollout_mesh.shape["tensor"]

    def own(rows: int) -> int:
        """Rows of one device; those that do not divide are everybody's."""
        return rows if rows % parts else rows // parts

    # Logits as they are, tempered, truncated, and summed up along the vocabulary.
    logits = max(4 * own(plan.rows) * config.vocab_size * 4 // tensor for plan in plans)

    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    experts = config.experts
    inner = config.mlp_dim if experts is None else experts.mlp_dim * (experts.per_token + experts.shared)
    per_token = (2 * config.embed_dim + (heads + 2 * inner) // tensor) * np.dtype(config.dtype).itemsize
    layer = max(own(plan.prefill[0]) * plan.prefill[1] * per_token for plan in plans)
    return {"logits": logits} if logits > layer else {"prefill": layer}


def _mesh(learner: Learner) -> Mesh:
    assert learner.mesh is not None
    return learner.mesh


def _tensor(learner: Learner) -> int:
    return _mesh(learner).shape["tensor"]


def _sharing(learner: Learner) -> int:
    """Devices that share each packed sequence."""
    return _mesh(learner).shape["sequence"]


def _head(learner: Learner, batch: TrainBatch, *, backward: bool = True) -> dict[str, int]:
    """Of the vocabulary head: its copy for products, its own gradient, and a chunk of logits. None of a critic."""
    config = learner.config
    if config.value_head:
        return {}

    tensor = _tensor(learner)
    tokens = _own_scored(learner, batch)
    chunk = min(learner.update_config.head_chunk, tokens)
    size = config.vocab_size * config.embed_dim // tensor
    width = np.dtype(config.dtype).itemsize
    logits = chunk * config.vocab_size // tensor

    if not backward:
        # A head of which each device has some columns is gathered, and then turned: so it is of 8B on 8 H100s, the one
        # mesh whose scoring has been compared with what the compiler says. On one H100 it is there once.
        is_split = _mesh(learner).shape["fsdp"] * _sharing(learner) > 1
        return {"vocabulary head": size * width * (2 if is_split else 1), "logits": logits * 4}

    # The sum so far, and beside it what the newest chunk adds; a gradient of logits is of the compute dtype.
    gradient = size * 4 * (2 if chunk < tokens else 1)
    in_logits = logits * (width if chunk < tokens else 8)
    divergence = learner.program.divergence
    of_teacher = {}
    if divergence is not None:
        # A second pass over chunks, which has the teacher's head and logits beside the student's own.
        in_logits = logits * 8
        if divergence.teacher is not None:
            in_logits *= 2
            other = divergence.teacher
            of_teacher = {"teacher's head": other.vocab_size * other.embed_dim // tensor * width}
    is_trained = ("embedding" if config.tied_embeddings else "head") in learner.abstract_state().trainable
    of_gradient = {"its gradient": gradient} if is_trained else {}
    return {"vocabulary head": size * width, **of_gradient, **of_teacher, "logits": in_logits}


def _layers(learner: Learner, batch: TrainBatch, *, backward: bool = True) -> dict[str, int]:
    """Of the layers: what the forward pass keeps for the backward pass, and what one layer takes while it runs.

    The first is read off a trace of the forward pass as one device runs it: its own rows, its own heads. Of sequences
    that devices share it is read off a trace of theirs together, in which each has an equal part of every array.
    """
    config = learner.config
    tensor = _tensor(learner)
    sharing = _sharing(learner)
    _, rows, length = batch.packed.tokens.shape
    own_rows = rows // batch_parts(_mesh(learner))
    own = dataclasses.replace(
        config,
        num_heads=config.num_heads // tensor,
        num_kv_heads=config.num_kv_heads // tensor,
        mlp_dim=config.mlp_dim // tensor,
    )
    if config.experts is not None:
        inner = config.experts.mlp_dim // tensor
        own = dataclasses.replace(own, experts=dataclasses.replace(config.experts, mlp_dim=inner))
    how = learner.program.forward

    # The part of the mesh whose devices share a sequence.
    every = _mesh(learner).abstract_mesh
    part = AbstractMesh(
        tuple(sharing if name == "sequence" else 1 for name in every.axis_names),
        every.axis_names,
        axis_types=every.axis_types,
        abstract_device=every.abstract_device,
    )

    def kept_by(remat):
        def pull(params, tokens, positions, ends):
            shares = sequence_shares(*tokens.shape)
            attention = how.attention
            if shares is not None:
                attention = shares.attention(attention, positions, ends)
            forward = Forward(remat=remat, attention=attention)
            return jax.vjp(lambda p: hidden_states(own, p, tokens, positions, ends, forward=forward), params)[1]

        ids = jax.ShapeDtypeStruct((own_rows, length), np.int32)
        with jax.sharding.use_abstract_mesh(part):
            return _kept_by_scan(jax.make_jaxpr(pull)(abstract_params(own), ids, ids, ids).jaxpr) // sharing

    kept = kept_by(how.remat)
    whole = kept if how.remat == "none" else kept_by("none")

    def per_layer(layers: Any) -> int:
        return sum(math.prod(x.shape[1:]) for x in jax.tree.leaves(layers))

    params = abstract_params(own)
    copies = np.dtype(config.dtype).itemsize + (4 if backward else 0)
    # Where layers differ, the largest: those of a mixture that have experts.
    largest = max(own.stacks, key=lambda stack: per_layer(params[stack]))
    layer = per_layer(params[largest]) * np.dtype(config.dtype).itemsize
    if backward:
        # Only what is trained has a gradient.
        layer += 4 * per_layer(learner.subtree.split(params)[0].get(largest, {}))
    if sharing > 1:
        # Of the keys and values of a whole sequence: they are gathered.
        layer += 2 * own_rows * length * own.num_kv_heads * own.head_dim * copies
    if not runs_kernels(learner, length):
        layer += _scores(own, own_rows, length, sharing, backward=backward)
    if how.remat != "none" or not backward:
        layer += whole // config.num_layers
    return {"activations": kept, "a layer": layer}


def runs_kernels(learner: Learner, length: int) -> bool:
    """Whether a learner on a mesh attends in kernels where packed sequences have `length` tokens."""
    with jax.sharding.use_abstract_mesh(_mesh(learner).abstract_mesh):
        return learner.program.forward.attention is kernel_attention and has_kernels(length)


def _scores(config: DecoderConfig, rows: int, length: int, sharing: int, *, backward: bool) -> int:
    """Of a layer's attention on one device, whose heads are those of `config`: scores and weights, in float32."""
    if sharing == 1:
        # Blocks of queries need nothing of each other, so the compiler runs the backward pass of all side by side: all
        # scores exist. A forward pass alone goes block by block, as seen of 0.6B on one H100 and nowhere else.
        blocks = min(MAX_BLOCKS, -(-length // MIN_BLOCK))
        pairs = length**2 * (blocks + 1) // (2 * blocks) if backward else length * -(-length // blocks)
    else:
        # Blocks go one after another.
        pairs = min(length // (CHUNKS * sharing), BLOCK) * min(length, BLOCK)
    return 2 * rows * config.num_heads * pairs * 4


def _kept_by_scan(jaxpr: Any) -> int:
    """Bytes that the scan over layers stacks up for its backward pass."""
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    stacked = [x for scan in scans for x in scan.outvars[scan.params["num_carry"] :]]
    return sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in stacked)
