"""Who teaches the policy: where teachers come from, whose rows each of them scores, and what it says of them."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from rljax.batching import loss_mask
from rljax.experiment.model import ModelSource, PretrainedModel
from rljax.models import DecoderConfig, abstract_params, head_params
from rljax.plans import TeacherSpec
from rljax.sampling import SamplingParams
from rljax.tasks import Example
from rljax.text import Tokenizer
from rljax.training import TeacherModel, UpdateConfig
from rljax.types import TEACHER_LOGPROBS, Params, RolloutBatch

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

    def score(self, batch: RolloutBatch, mask: np.ndarray, student: StudentWeights) -> Scored:
        """What it says of the tokens in `mask`, bool [B, T]."""
        ...

    @property
    def decoder(self) -> DecoderConfig:
        """Of the head that its hidden states go through."""
        ...

    def head(self, student: StudentWeights) -> Params:
        """That head, in arrays that no update of the student donates."""
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

    @property
    def needs_reference(self) -> bool:
        return False

    def build(self, parts: TeacherParts, where: str) -> Teacher:
        return _Beside(self.model, parts, f"{where}.model")


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
        self._model = parts.model(self.decoder)

    def abstract_params(self) -> Any:
        shapes = abstract_params(self.decoder)
        where = self._model.param_shardings()
        return shapes if where is None else jax.tree.map(lambda x, s: x.update(sharding=s), shapes, where)

    def open(self) -> None:
        if self.params is None:
            self.params = self._source.params_of(self.decoder, self._model.param_shardings(), seed=0)

    def score(self, batch: RolloutBatch, mask: np.ndarray, student: StudentWeights) -> Scored:
        assert self.params is not None, "open comes before score"
        return self._model.score(self.params, batch, mask)

    def head(self, student: StudentWeights) -> Params:
        assert self.params is not None, "open comes before head"
        return head_params(self.decoder, self.params)


class Teachers:
    """All teachers of a run, each with the rows that are its own. ValueError for a tokenizer that is not the student's,
    and for a row of `examples` that no teacher, or more than one, would score."""

    def __init__(self, sources: Sequence[TeacherSource], parts: TeacherParts, examples: Sequence[Example]):
        self._by_task = _by_task(sources)
        for example in examples:
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

    @property
    def head_config(self) -> DecoderConfig | None:
        """Of the one teacher whose hidden states are kept."""
        return self.teachers[0].decoder if self.keeps_states else None

    def head(self, student: StudentWeights) -> Params | None:
        """The head of that teacher, for the updates on what it scored."""
        return self.teachers[0].head(student) if self.keeps_states else None

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
                scored, of_own = teacher.score(batch, own, student)
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
