"""Data sets of the package reasoning-gym: procedural items with their own verifiers.

Four traps are dealt with here. Several verifiers give partial credit for junk, so by default a full score alone
counts. Some can be fooled or run the answer as Python (`reasoning_gym_guards`). Another seed is not a held-out set,
because small tasks have few distinct items, so training and test items are told apart by a hash of the question. And
some generators draw from Python's global generator or depend on the hash seed of the process, so items are made in a
worker process in which both are fixed: the same arguments give the same items in every run.
"""

import difflib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from rljax.tasks.answers import Extractor, whole_completion
from rljax.tasks.examples import Example, Prompt, Split, digest, split_by_hash
from rljax.tasks.reasoning_gym_guards import REFUSED, passes_guard
from rljax.tasks.workers import DONE, Job, WorkerPool

_GENERATION_TIMEOUT_S = 3600.0

Item = Mapping[str, Any]
"""What reasoning-gym makes: `question`, `answer` and `metadata`."""


@dataclass(frozen=True)
class ReasoningGymVerifier:
    """The reward of the data set `name`: what its `score_answer` gives.

    Only a full score of 1.0 counts unless `full_score_only` is off. `extract` finds the answer in the completion. No
    answer, and one over which `score_answer` raises, since it could not be read, score 0.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    extract: Extractor = whole_completion
    full_score_only: bool = True
    required_columns: ClassVar[tuple[str, ...]] = ("question", "answer", "metadata")

    def warm_up(self) -> None:
        """Import the package, which takes a second."""
        _scoring_dataset(self.name, self.config)

    def __call__(self, completion: str, question: str, answer: Any, metadata: Mapping[str, Any]) -> float:
        found = self.extract(completion)
        if found is None or not passes_guard(self.name, found, answer, metadata):
            return 0.0
        dataset = _scoring_dataset(self.name, self.config)
        try:
            score = float(dataset.score_answer(found, {"question": question, "answer": answer, "metadata": metadata}))
        except Exception:
            return 0.0
        return float(score == 1.0) if self.full_score_only else score


@dataclass(frozen=True)
class ReasoningGymTask:
    """Training and test examples that share no question, and the reward that scores them."""

    name: str
    split: Split
    verifier: ReasoningGymVerifier

    @property
    def train(self) -> list[Example]:
        """Examples to train on."""
        return self.split.train

    @property
    def test(self) -> list[Example]:
        """Examples held out."""
        return self.split.test

    @property
    def num_distinct(self) -> int:
        """Distinct questions among the items made."""
        return self.split.num_distinct

    def scored(self, *, extract: Extractor, full_score_only: bool) -> "ReasoningGymTask":
        """The same examples, their answers found and scored as `ReasoningGymVerifier` says."""
        return replace(self, verifier=replace(self.verifier, extract=extract, full_score_only=full_score_only))

    def describe(self) -> str:
        """One line for a person."""
        return f"{self.name}: {self.split.describe()}"


def question(item: Item) -> Prompt:
    """The question as the prompt, word for word."""
    return item["question"]


def reasoning_gym_task(
    name: str,
    *,
    size: int,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    test_fraction: float | None = None,
    num_test: int | None = None,
    format_prompt: Callable[[Item], Prompt] = question,
) -> ReasoningGymTask:
    """Make `size` items of the data set `name` and split the distinct ones into training and test.

    `config` holds fields of the data set's own config, such as `{"max_terms": 2}` for chain_sum. `test_fraction` and
    `num_test` are as in `split_by_hash`, by the hash of the question; without either nothing is held out.
    `format_prompt` makes the prompt (text or chat messages) from an item.

    Columns of the examples: `question`, `answer` and `metadata`, as reasoning-gym made them. The verifier has its
    defaults; `ReasoningGymTask.scored` changes them. Raises ValueError for an
    unknown or refused name (see `REFUSED`), a bad config and a split with an empty side; ImportError, naming the
    extra, without the package.
    """
    if size < 1:
        raise ValueError(f"size {size} must be at least 1")
    config = dict(config or {})
    examples: list[Example] = []
    keys: dict[int, int] = {}  # by identity: two items with one question are two examples with one key
    for item in _make_items(name, {**config, "size": size, "seed": seed}):
        key = digest({"task": name, "question": item["question"]})
        example = Example(prompt=format_prompt(item), columns=item, id=key >> 97)
        keys[id(example)] = key
        examples.append(example)

    split = split_by_hash(
        examples, test_fraction=test_fraction, num_test=num_test, key=lambda example: keys[id(example)]
    )
    return ReasoningGymTask(name, split, ReasoningGymVerifier(name, config))


def _make_items(name: str, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    _check_installed()
    if name in REFUSED:
        raise ValueError(f"the reasoning-gym data set {name!r} is refused: {REFUSED[name]}")
    with WorkerPool([_items], 1) as pool:
        (reply,) = pool.run([Job(0, (name, dict(config)), _GENERATION_TIMEOUT_S)])
    if reply.kind != DONE:
        raise RuntimeError(f"reasoning-gym failed to make items of {name!r} ({reply.kind}): {reply.value}")
    if isinstance(reply.value, str):
        raise ValueError(reply.value)
    return reply.value


def _items(arguments: tuple[str, dict[str, Any]]) -> list[dict[str, Any]] | str:
    """All items of a data set, or why it cannot be made; runs in a worker of its own."""
    name, config = arguments
    try:
        dataset = _create(name, config)
    except (ImportError, ValueError) as error:
        return str(error)
    import numpy as np

    np.random.seed(0)  # noqa: NPY002  the generators' own, in a process that does nothing else
    items = (dataset[index] for index in range(config["size"]))
    return [{c: item[c] for c in ReasoningGymVerifier.required_columns} for item in items]


def reasoning_gym_names() -> list[str]:
    """Names of the data sets that can be used."""
    return sorted(set(_registry()) - set(REFUSED))


def _check_installed() -> None:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ImportError("reasoning-gym tasks need the package reasoning-gym: pip install 'rljax-lm[tasks]'")


def _registry() -> Mapping[str, Any]:
    _check_installed()
    import reasoning_gym  # noqa: F401  registers the data sets
    from reasoning_gym.factory import DATASETS

    return DATASETS


def _create(name: str, config: Mapping[str, Any]) -> Any:
    registry = _registry()
    if name not in registry:
        near = difflib.get_close_matches(name, registry, n=5)
        hint = f"did you mean one of {near}?" if near else "reasoning_gym_names() lists all"
        raise ValueError(f"reasoning-gym has no data set {name!r}; {hint}")
    make_dataset, make_config = registry[name]
    known = [f.name for f in fields(make_config)]
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise ValueError(f"the config of {name!r} has no {unknown}; its fields are {known}")
    try:
        return make_dataset(config=make_config(**config))
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"reasoning-gym refuses the config {dict(config)} of {name!r}: {error}") from error


_scoring_datasets: dict[str, Any] = {}


def _scoring_dataset(name: str, config: Mapping[str, Any]) -> Any:
    """A data set to score with, made once in a process; items do not come from it."""
    key = f"{name} {sorted(config.items())!r}"
    if key not in _scoring_datasets:
        _scoring_datasets[key] = _create(name, {**config, "size": 1, "seed": 0})
    return _scoring_datasets[key]
