"""Who teaches the policy: where teachers come from, whose rows each of them scores, and what it says of them."""

import collections
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rljax.batching import loss_mask, stack
from rljax.experiment.model import ModelSource, PretrainedModel
from rljax.models import DecoderConfig, head_params
from rljax.parallel import on_main
from rljax.plans import TeacherSpec
from rljax.rollouts import ScoringEngines
from rljax.sampling import SamplingParams
from rljax.settings import field, has_variable, is_web_address
from rljax.tasks import Example
from rljax.tasks.examples import with_paragraph
from rljax.text import Tokenizer, render_prompt
from rljax.training import TeacherModel, UpdateConfig, abstract_said
from rljax.types import TEACHER_LOGPROBS, Params, RolloutBatch, Trajectory

CONTEXT = "A right answer, for reference:\n{text}"

Scored = tuple[np.ndarray, dict[str, np.ndarray]]
"""Log-probs [B, T] of the tokens that were asked for, 0 elsewhere; and `RolloutBatch.teacher` likewise."""


@dataclasses.dataclass(frozen=True)
class TeacherParts:
    """What a teacher is built from."""

    tokenizer: Tokenizer
    """The student's."""
    decoder: DecoderConfig
    """The student's."""
    update: UpdateConfig
    mesh: Mesh
    sampling: SamplingParams
    spec: TeacherSpec
    chat: bool | None
    """That of `rljax.text.render_prompt`."""
    examples: Sequence[Example]
    """Whose rows it may be asked about."""
    room: int
    """Most tokens of a completion."""

    @property
    def support(self) -> int | None:
        """What is asked of whole distributions; None for nothing."""
        return None if self.spec.divergence is None else self.spec.support

    def model(self, decoder: DecoderConfig) -> TeacherModel:
        """The forward pass of a teacher."""
        return TeacherModel(decoder, self.update, sampling=self.sampling, mesh=self.mesh, support=self.support)


@dataclasses.dataclass(frozen=True)
class StudentWeights:
    """The student's, as the model takes them; they last until its next update."""

    policy: Callable[[], Params]
    reference: Callable[[], Params]


@runtime_checkable
class Teacher(Protocol):
    """Scores rows of the student."""

    def abstract_params(self) -> Any:
        """Shapes, with shardings, of weights that it holds on the student's mesh; None where it holds none."""
        ...

    def open(self) -> None:
        """Loads what it scores with."""
        ...

    def score(
        self, batch: RolloutBatch, mask: np.ndarray, examples: Sequence[Example], student: StudentWeights
    ) -> Scored:
        """What it says of the tokens in `mask`, bool [B, T]; `examples` are those of the rows."""
        ...

    @property
    def decoder(self) -> DecoderConfig | None:
        """Of the head that its hidden states go through; None of a teacher that has them elsewhere."""
        ...

    def head(self, student: StudentWeights) -> Params:
        """That head, in arrays that no update of the student donates."""
        ...

    @property
    def copies_head(self) -> bool:
        """Whether `head` is a copy: the student's own, which an update donates."""
        ...

    @property
    def model(self) -> TeacherModel | None:
        """What scores on the student's mesh; None of a teacher that is elsewhere."""
        ...


@runtime_checkable
class TeacherSource(Protocol):
    """Where a teacher comes from, an entry of `config.teachers`."""

    tasks: tuple[str, ...]

    @property
    def needs_reference(self) -> bool:
        """Whether it is the student's reference."""
        ...

    def build(self, parts: TeacherParts, where: str) -> Teacher:
        """ValueError, in one line that begins with the path `where`, for what cannot teach this student."""
        ...


@dataclasses.dataclass
class ModelTeacher:
    """A model on the student's mesh, beside it."""

    model: ModelSource = dataclasses.field(default_factory=PretrainedModel)
    """Its weights: `PretrainedModel`, `RunModel` for a checkpoint of another run, or `FreshModel`. Of any size and
    family, with the student's tokenizer."""
    tasks: tuple[str, ...] = ()
    """Values of the data's column `task` whose rows it teaches. Empty is all that no other teacher names."""
    context_column: str = ""
    """Column of the data with what the teacher knows beside the prompt, such as a right answer; empty is nothing."""
    context_format: str = CONTEXT
    """How that is put: a last paragraph of the prompt, with `{text}` for the column's."""

    @property
    def needs_reference(self) -> bool:
        return False

    def build(self, parts: TeacherParts, where: str) -> Teacher:
        teacher = _Beside(self.model, parts, f"{where}.model")
        return _with_context(teacher, self, parts, where)


@dataclasses.dataclass
class OwnTeacher:
    """The student's own network: its reference, which may be a moving average of its weights, or itself as it stands,
    which knows more (self-distillation)."""

    weights: Literal["reference", "policy"] = "reference"
    """`reference` is what the run began with, unless `config.reference_refresh` copies the policy into it, or moves it
    there by `config.reference_weight`, which is an exponential moving average; `policy` is the student as it stands."""
    tasks: tuple[str, ...] = ()
    """Values of the data's column `task` whose rows it teaches. Empty is all that no other teacher names."""
    context_column: str = ""
    """Column of the data with what the teacher knows beside the prompt, such as a right answer. The policy teaches
    itself nothing without one."""
    context_format: str = CONTEXT
    """How that is put: a last paragraph of the prompt, with `{text}` for the column's."""

    @property
    def needs_reference(self) -> bool:
        return self.weights == "reference"

    def build(self, parts: TeacherParts, where: str) -> Teacher:
        if self.weights == "policy" and not self.context_column:
            raise ValueError(
                f"{where}.context_column='' with weights='policy' is a teacher that says what the student says; name "
                "the column that it knows more by, or take weights='reference'"
            )
        return _with_context(_Own(self.weights, parts), self, parts, where)


@dataclasses.dataclass
class EngineTeacher:
    """A model that is served elsewhere, with the student's tokenizer: by `rljax serve`, or by vLLM (`vllm serve MODEL
    --enable-scale-out`).

    It costs no memory here, and a prompt's tokens on the wire for each sample.
    """

    engines: tuple[str, ...] = ("http://127.0.0.1:8000",)
    """Addresses of engines with one model. Rows go to them in turn."""
    tasks: tuple[str, ...] = ()
    """Values of the data's column `task` whose rows it teaches. Empty is all that no other teacher names."""
    context_column: str = ""
    """Column of the data with what the teacher knows beside the prompt, such as a right answer; empty is nothing."""
    context_format: str = CONTEXT
    """How that is put: a last paragraph of the prompt, with `{text}` for the column's."""
    key_variable: str = ""
    """Environment variable that holds the engines' API key; empty is no key."""
    connections: int = field(default=64, least=1)
    """Rows that are asked about at a time."""
    request_s: float = field(default=600.0, above=0)
    """Seconds after which an engine that has not answered a request is asked again."""
    wait_s: float = field(default=600.0, above=0)
    """Seconds for which an engine may stay away before the run ends."""

    @property
    def needs_reference(self) -> bool:
        return False

    def check(self) -> None:
        """Raises a ValueError of one line for what can never work."""
        if not self.engines or not all(map(is_web_address, self.engines)):
            raise ValueError(f"engines={self.engines} must be addresses such as http://host:8000")
        if self.key_variable and not has_variable(self.key_variable):
            raise ValueError(f"key_variable={self.key_variable!r} is not in the environment; set it, or leave it out")

    def build(self, parts: TeacherParts, where: str) -> Teacher:
        if parts.support == 0:
            raise ValueError(
                f"{where} is served elsewhere and tells its most likely tokens alone, with config.algorithm.support=0; "
                "set that to a number that the engine allows (--top_logprobs of rljax serve, --max-logprobs of vLLM)"
            )
        if float(parts.sampling.temperature) != 1:
            raise ValueError(
                f"config.sampling.temperature={float(parts.sampling.temperature):g}: {where} is served elsewhere and "
                "scores at temperature 1; set it to 1, or take a teacher on this mesh (ModelTeacher)"
            )
        return _with_context(_Elsewhere(self, parts), self, parts, where)


class _Elsewhere:
    """A teacher behind HTTP."""

    def __init__(self, source: EngineTeacher, parts: TeacherParts):
        self.decoder = None
        self.model = None
        self.copies_head = False
        self._support = parts.support or 0
        self._engines = ScoringEngines(
            source.engines,
            top=self._support,
            connections=source.connections,
            timeout_s=source.request_s,
            wait_s=source.wait_s,
            key=os.environ.get(source.key_variable, ""),
        )

    def abstract_params(self) -> Any:
        return None

    def open(self) -> None:
        """Nothing of its own."""

    def head(self, student: StudentWeights) -> Params:
        raise AssertionError("its head is elsewhere")

    def score(
        self, batch: RolloutBatch, mask: np.ndarray, examples: Sequence[Example], student: StudentWeights
    ) -> Scored:
        # Up to the last token that is asked for; process 0 asks for all, so that all go on with the same numbers.
        asked = np.flatnonzero(mask.any(axis=1))
        lengths = mask.shape[1] - mask[:, ::-1].argmax(axis=1)
        rows = [np.asarray(batch.tokens[row])[: lengths[row]].tolist() for row in asked]
        logprobs = np.zeros(mask.shape, np.float32)
        said: dict[str, np.ndarray] = {}
        if self._support:
            of_tokens = (*mask.shape, self._support)
            said = {"ids": np.zeros(of_tokens, np.int32), "logprobs": np.zeros(of_tokens, np.float32)}

        for row, scores in zip(asked, on_main(lambda: self._engines.score(rows)), strict=True):
            inside = slice(1, lengths[row])
            logprobs[row, inside] = scores.logprobs
            if said:
                said["ids"][row, inside] = scores.ids
                said["logprobs"][row, inside] = scores.top
        if said:
            # What is left of a probability that is nearly 1 is lost in rounding; it is never less than nothing.
            covered = np.minimum(np.exp(said["logprobs"].astype(np.float64)).sum(axis=-1, keepdims=True), 1 - 1e-12)
            said["tail"] = np.log1p(-covered).astype(np.float32)
        return np.where(mask, logprobs, 0), said


class _Own:
    """A teacher with the student's weights."""

    def __init__(self, weights: str, parts: TeacherParts):
        self.decoder = parts.decoder
        self._weights = weights
        self.model = parts.model(parts.decoder)
        self.copies_head = weights == "policy"

    def abstract_params(self) -> Any:
        # The reference is a part of the student's state.
        return None

    def open(self) -> None:
        """Nothing of its own."""

    def score(
        self, batch: RolloutBatch, mask: np.ndarray, examples: Sequence[Example], student: StudentWeights
    ) -> Scored:
        return self.model.score(self._params(student), batch, mask)

    def head(self, student: StudentWeights) -> Params:
        head = head_params(self.decoder, self._params(student))
        # The first update of a rollout donates the policy's own, which the next ones still compare with.
        return jax.tree.map(jnp.copy, head) if self.copies_head else head

    def _params(self, student: StudentWeights) -> Params:
        return student.reference() if self._weights == "reference" else student.policy()


class _Beside:
    """A teacher with weights of its own."""

    def __init__(self, source: ModelSource, parts: TeacherParts, where: str):
        try:
            own = source.tokenizer_of()
            self.decoder = source.decoder_of(own)
        except ValueError as error:
            # A source names its fields as those of the run's own model.
            raise ValueError(str(error).replace("config.model.", f"{where}.", 1)) from None
        check_same_tokens(parts.tokenizer, own, where)
        self.params: Params | None = None
        self._source = source
        self.model = parts.model(self.decoder)
        self.copies_head = False

    def abstract_params(self) -> Any:
        return self.model.abstract_params()

    def open(self) -> None:
        if self.params is None:
            self.params = self._source.params_of(self.decoder, self.model.param_shardings(), seed=0)

    def score(
        self, batch: RolloutBatch, mask: np.ndarray, examples: Sequence[Example], student: StudentWeights
    ) -> Scored:
        assert self.params is not None, "open comes before score"
        return self.model.score(self.params, batch, mask)

    def head(self, student: StudentWeights) -> Params:
        assert self.params is not None, "open comes before head"
        return head_params(self.decoder, self.params)


def _with_context(
    teacher: Teacher, source: ModelTeacher | OwnTeacher | EngineTeacher, parts: TeacherParts, where: str
) -> Teacher:
    if not source.context_column:
        return teacher
    if "{text}" not in source.context_format:
        raise ValueError(f"{where}.context_format={source.context_format!r} must hold {{text}}, where the column goes")
    told = _Told(teacher, source, parts)
    for example in parts.examples:
        if source.tasks and example.columns.get("task") not in source.tasks:
            continue
        if source.context_column not in example.columns:
            raise ValueError(
                f"{where}.context_column={source.context_column!r}: {example.name} has no such column, only "
                f"{', '.join(sorted(example.columns)) or 'none'}"
            )
        length = len(told.prompts(example)[1]) + parts.room
        if length > parts.update.pack_length:
            raise ValueError(
                f"config.update.pack_length={parts.update.pack_length} does not hold what {where} reads of "
                f"{example.name}, with the completion up to {length} tokens; raise it to at least {length}"
            )
    return told


class _Told:
    """A teacher that reads another prompt than the student did, which tells it more."""

    def __init__(self, teacher: Teacher, source: ModelTeacher | OwnTeacher | EngineTeacher, parts: TeacherParts):
        self._teacher = teacher
        self._source = source
        self._parts = parts

    @property
    def decoder(self) -> DecoderConfig | None:
        return self._teacher.decoder

    @property
    def model(self) -> TeacherModel | None:
        return self._teacher.model

    @property
    def copies_head(self) -> bool:
        return self._teacher.copies_head

    def abstract_params(self) -> Any:
        return self._teacher.abstract_params()

    def open(self) -> None:
        self._teacher.open()

    def head(self, student: StudentWeights) -> Params:
        return self._teacher.head(student)

    def prompts(self, example: Example) -> tuple[list[int], list[int]]:
        """Token ids of what the student reads, and of what the teacher does."""
        text = self._source.context_format.replace("{text}", str(example.columns[self._source.context_column]))
        both = (example.prompt, with_paragraph(example.prompt, text))
        own, told = (render_prompt(self._parts.tokenizer, prompt, self._parts.chat) for prompt in both)
        return own, told

    def score(
        self, batch: RolloutBatch, mask: np.ndarray, examples: Sequence[Example], student: StudentWeights
    ) -> Scored:
        rows, starts = self._rows(batch, mask, examples)
        tables = {"length_buckets": self._parts.update.trajectory_buckets}
        told = stack(rows, row_buckets=(len(mask),), **{name: table for name, table in tables.items() if table})
        scored = self._teacher.score(told, loss_mask(told), examples, student)

        def moved(values: np.ndarray) -> np.ndarray:
            """From the places of the teacher's rows to those of the student's."""
            out = np.zeros((*mask.shape, *values.shape[2:]), values.dtype)
            for row, (own, other) in enumerate(starts):
                count = len(rows[row].tokens) - other
                out[row, own : own + count] = values[row, other : other + count]
            return out

        return jax.tree.map(moved, scored)

    def _rows(
        self, batch: RolloutBatch, mask: np.ndarray, examples: Sequence[Example]
    ) -> tuple[list[Trajectory], list[tuple[int, int]]]:
        """The rows that the teacher reads, and where completions begin: in the student's, and in these."""
        rows = []
        starts = []
        for row, example in enumerate(examples):
            is_asked = bool(mask[row].any())
            # A row of another teacher is as short as can be, and nothing of it is scored.
            own, told = self.prompts(example) if is_asked else ([0], [0])
            length = int(batch.lengths[row]) if is_asked else 1

            # Behind the teacher's prompt stands what the student has said; of what it thought of that nothing is read.
            completion = np.asarray(batch.tokens[row])[len(own) : length]
            tokens = np.concatenate([np.asarray(told, np.int32), completion]).astype(np.int32)
            asked = np.concatenate([np.zeros(len(told), bool), mask[row, len(own) : length]])
            nothing = np.zeros(len(tokens), np.float32)

            rows.append(
                Trajectory(
                    tokens=tokens,
                    action_mask=asked,
                    behavior_logprobs=nothing,
                    entropies=nothing,
                    turn_ids=np.zeros(len(tokens), np.int32),
                    policy_version=np.zeros(len(tokens), np.int32),
                    prompt_id=example.id,
                    group_id=int(batch.group_id[row]),
                    episode_id=row,
                )
            )
            starts.append((len(own), len(told)))
        return rows, starts


class Teachers:
    """All teachers of a run, each with the rows that are its own. ValueError for a tokenizer that is not the student's,
    and for a row of the data that no teacher, or more than one, would score."""

    def __init__(self, sources: Sequence[TeacherSource], parts: TeacherParts):
        self._by_task = _by_task(sources)
        for example in parts.examples:
            self.of(example)
        self.keeps_states = parts.support == 0
        if self.keeps_states and len(sources) > 1:
            raise ValueError(
                f"config.teachers: {len(sources)} teachers with config.algorithm.support=0, which keeps the head of "
                "one; set it to a number of tokens, e.g. 64, or leave one teacher"
            )
        if parts.support and parts.support >= parts.decoder.num_ids:
            raise ValueError(
                f"config.algorithm.support={parts.support} must be below the {parts.decoder.num_ids} tokens of the "
                "vocabulary; 0 is all of them"
            )
        self.teachers = [source.build(parts, f"config.teachers[{i}]") for i, source in enumerate(sources)]
        self.copies_head = self.keeps_states and self.teachers[0].copies_head
        self._support = parts.support
        self._student = parts.decoder

    @property
    def head_config(self) -> DecoderConfig | None:
        """Of the one teacher whose hidden states are kept."""
        return self.teachers[0].decoder if self.keeps_states else None

    def head(self, student: StudentWeights) -> Params | None:
        """The head of that teacher, for the updates on what it scored."""
        return self.teachers[0].head(student) if self.keeps_states else None

    @property
    def models(self) -> list[TeacherModel]:
        """Those of the teachers that score on the mesh, in turn."""
        return [teacher.model for teacher in self.teachers if teacher.model is not None]

    def abstract_said(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """What a batch holds of one token beside its log-prob, [W] by name."""
        return abstract_said(self._support, self.head_config or self._student)

    def abstract_head(self, student: Params) -> Any:
        """The shapes of `head`, where those of the student's weights are `student`."""
        if not self.keeps_states:
            return None
        own = self.teachers[0].abstract_params()
        assert self.head_config is not None
        return head_params(self.head_config, student if own is None else own)

    def open(self) -> None:
        """Loads the teachers' weights."""
        for teacher in self.teachers:
            teacher.open()

    def abstract_params(self) -> list[Any]:
        """The shapes of the weights that they hold on the mesh, as `jax.ShapeDtypeStruct`s with shardings."""
        return [shapes for teacher in self.teachers if (shapes := teacher.abstract_params()) is not None]

    def of(self, example: Example) -> int:
        """Which teacher scores the rows of an example, as an index."""
        task = example.columns.get("task")
        chosen = self._by_task.get(task, self._by_task.get(None))
        if chosen is None:
            known = ", ".join(sorted(repr(name) for name in self._by_task))
            raise ValueError(
                f"config.teachers: {example.name} has the column task={task!r}, and the teachers' tasks are {known}; "
                "add it to one of them, or a teacher without tasks, which takes all others"
            )
        return chosen

    def taught(
        self, batch: RolloutBatch, examples: Sequence[Example], student: StudentWeights
    ) -> tuple[RolloutBatch, dict[str, float]]:
        """The batch with the column `TEACHER_LOGPROBS`, and `teacher` where distributions are compared; and metrics.
        `examples` are those of its rows, in order.

        `teacher/kl` is the mean of `lp_behavior - lp_teacher` over the loss tokens (nats): what the student's samples
        say of the reverse KL. With several teachers each has its own, `teacher/kl_0` and so on, and its share of the
        tokens, `teacher/share_0`.
        """
        mask = loss_mask(batch)
        chosen = np.full(len(mask), -1)
        chosen[: len(examples)] = [self.of(example) for example in examples]

        logprobs = np.zeros(mask.shape, np.float32)
        said: dict[str, np.ndarray] = {}
        metrics = {}
        for index, teacher in enumerate(self.teachers):
            own = mask & (chosen == index)[:, None]
            # A teacher without rows in this step still tells the shapes of what it would say.
            if own.any() or not said:
                scored, of_own = teacher.score(batch, own, examples, student)
                logprobs[own] = scored[own]
                for name, values in of_own.items():
                    said.setdefault(name, np.zeros_like(values))[own] = values[own]
            if len(self.teachers) > 1:
                metrics[f"teacher/share_{index}"] = float(own.sum()) / max(1, int(mask.sum()))
                metrics[f"teacher/kl_{index}"] = _mean_gap(batch, logprobs, own)
        metrics["teacher/kl"] = _mean_gap(batch, logprobs, mask)

        columns = {**batch.columns, TEACHER_LOGPROBS: logprobs}
        return dataclasses.replace(batch, columns=columns, teacher=said), metrics


def _mean_gap(batch: RolloutBatch, logprobs: np.ndarray, mask: np.ndarray) -> float:
    if not mask.any():
        return 0.0
    return float(np.mean((np.asarray(batch.behavior_logprobs) - logprobs)[mask], dtype=np.float64))


def _by_task(sources: Sequence[TeacherSource]) -> dict[Any, int]:
    """The teacher of each task, None standing for all other rows. ValueError for two of one."""
    named = [(task, index) for index, source in enumerate(sources) for task in source.tasks or (None,)]
    counts = collections.Counter(task for task, _ in named)
    for task, count in counts.items():
        if count > 1:
            what = "no tasks, which stands for all other rows," if task is None else f"the task {task!r}"
            raise ValueError(f"config.teachers: {count} teachers have {what} and a row has one teacher; leave one")
    return dict(named)


def check_same_tokens(student: Tokenizer, teacher: Tokenizer, where: str) -> None:
    """ValueError unless every id means the same text to both: a log-prob is of an id, and belongs to no other."""
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(f"{where} has {teacher.vocab_size} tokens and the student {student.vocab_size}: {_ONE}")
    for token in range(student.vocab_size):
        own = student.decode([token])
        other = teacher.decode([token])
        if own != other:
            raise ValueError(f"{where} has {other!r} for token {token} where the student has {own!r}: {_ONE}")


_ONE = (
    "a teacher scores the student's token ids, so both need one tokenizer; take a teacher of the student's family, or "
    "train on the teacher's texts instead (rljax sft)"
)
