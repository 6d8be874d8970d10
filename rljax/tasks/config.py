"""The settings of data, rewards and curricula; each builds itself."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rljax.tasks.answers import Extractor, whole_completion
from rljax.tasks.callables import load_callable
from rljax.tasks.curriculum import Curriculum, UniformCurriculum
from rljax.tasks.examples import Example, Split, decontaminate, prompt_digest, split_answer, split_by_hash
from rljax.tasks.failures import FailedTasks
from rljax.tasks.files import load_jsonl, load_parquet
from rljax.tasks.hub import is_commit, is_local, load_hub
from rljax.tasks.mixture import balanced
from rljax.tasks.reasoning_gym import reasoning_gym_task
from rljax.tasks.rewards import RewardSpec

__all__ = [
    "CurriculumSource",
    "DataSource",
    "Dataset",
    "FailedTasks",
    "FileData",
    "FileRows",
    "HubData",
    "ReasoningGymData",
    "RewardConfig",
    "RowsData",
    "UniformTasks",
]


@runtime_checkable
class Dataset(Protocol):
    """What a data config loads: examples, disjoint by content hash, and the reward that comes with them, if any."""

    @property
    def train(self) -> list[Example]: ...
    @property
    def test(self) -> list[Example]: ...
    @property
    def verifier(self) -> Callable[..., Any] | None: ...


@runtime_checkable
class DataSource(Protocol):
    """Where examples come from; `chat` is that of `rljax.text.render_prompt`."""

    chat: bool | None

    def load(self) -> Dataset: ...


@runtime_checkable
class CurriculumSource(Protocol):
    """Which examples are drawn."""

    def make(self, examples: Sequence[Example], seed: int) -> Curriculum: ...


@dataclasses.dataclass
class ReasoningGymData:
    """A reasoning-gym task; test items are kept out of training by the hash of the item."""

    task: str = "chain_sum"
    """Name of the data set, as `rljax.tasks.reasoning_gym_names` lists them."""
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of its own config, such as `{"max_terms": 2}`: how hard it is."""
    size: int = 2000
    """Items to make, before repeated ones are dropped. Raise it where the run would see them too often."""
    test_size: int = 64
    """Items held out of training, for the evaluation."""
    seed: int = 0
    """Of the items."""
    prompt: str = "{question}"
    """Format of the prompt: `question` and the item's metadata by name."""
    chat: bool | None = True
    """Whether the prompt becomes a user message of the chat template; False for a model without one."""
    full_score_only: bool = True
    """Whether partial credit counts as 0; several verifiers give some for junk."""
    extract: Extractor = whole_completion
    """Finds the answer in a completion. Change it for models that write more than the answer."""

    def check(self) -> None:
        """Raises ValueError for sizes that leave nothing to train on."""
        if not 0 <= self.test_size < self.size:
            raise ValueError(
                f"config.data.size={self.size} and config.data.test_size={self.test_size}: size must be at least 1, "
                "and test_size at least 0 and below it"
            )

    def load(self) -> Dataset:
        """Makes the items. Raises ValueError for what cannot be made."""
        self.check()
        task = reasoning_gym_task(
            self.task,
            size=self.size,
            num_test=self.test_size,
            seed=self.seed,
            config=self.args,
            format_prompt=self._format,
        )
        return task.scored(extract=self.extract, full_score_only=self.full_score_only)

    def _format(self, item: Mapping[str, Any]) -> str:
        known = {**item["metadata"], "question": item["question"]}
        try:
            return self.prompt.format(**known)
        except KeyError as error:
            raise ValueError(
                f"config.data.prompt={self.prompt!r} names {error.args[0]!r}, which items of {self.task} lack; "
                f"they have {', '.join(sorted(known))}"
            ) from None


@dataclasses.dataclass
class FileRows:
    """A `Dataset` of examples as they are."""

    train: list[Example]
    test: list[Example]
    verifier: Callable[..., Any] | None = None
    dropped: tuple[str, ...] = ()
    """What was left out and how many, for a person."""

    def describe(self) -> str:
        """For a person."""
        dropped = f"; dropped: {'; '.join(self.dropped)}" if self.dropped else ""
        return f"{len(self.train)} training examples, {len(self.test)} held out{dropped}"


def without_long_rows(
    dataset: Dataset, length_of: Callable[[Example], int], limit: int, *, drop: bool, remedy: Callable[[int], str]
) -> Dataset:
    """The data set without rows of more than `limit` tokens, or itself if there are none.

    Test rows too: an evaluation in the middle of a run would find a long one hours later. Raises ValueError that names
    the first such row and counts them, with a remedy for the longest, unless they are to be dropped, and if none would
    be left to train on.
    """
    long = {}
    for example in (*dataset.train, *dataset.test):
        if (length := length_of(example)) > limit:
            long[id(example)] = (example, length)
    if not long:
        return dataset

    first, length = next(iter(long.values()))
    longest = max(length for _, length in long.values())
    says = (
        f"{len(long)} of {len(dataset.train) + len(dataset.test)} prompts have more than {limit} tokens: {first.name} "
        f"has {length}, the longest {longest}"
    )
    train = [example for example in dataset.train if id(example) not in long]
    if not drop or not train:
        none_left = "; none would be left to train on" if drop else ""
        raise ValueError(f"{says}{none_left}; {remedy(longest)}")
    test = [example for example in dataset.test if id(example) not in long]
    before = dataset.dropped if isinstance(dataset, FileRows) else ()
    return FileRows(train, test, dataset.verifier, (*before, says))


@dataclasses.dataclass
class FileData:
    """JSONL or Parquet files with a prompt column and whatever columns the reward wants."""

    train: str = ""
    """The file to train on, `.jsonl` or `.parquet`."""
    test: str = ""
    """The held-out file; what it holds is taken out of training by the hash of its prompts. Empty: `test_fraction`."""
    test_fraction: float = 0.05
    """Share of `train` that is held out where there is no `test`."""
    prompt_column: str = "prompt"
    """Holds text, or a list of chat messages. A last turn of the assistant is taken out of these and becomes the column
    `completion`."""
    chat: bool | None = None
    """Whether text becomes a user message of the chat template; None leaves text as it is."""
    repeated_prompts: bool = False
    """Keep all rows of a prompt, which stay on one side of the split: data of demonstrations and preferences has
    several. Else the first row of a prompt is taken, and the run says how many others there are."""

    def check(self) -> None:
        """Raises ValueError for a file of no known kind, or a fraction out of range."""
        for name, path in (("train", self.train), ("test", self.test)):
            if (path or name == "train") and Path(path).suffix not in _LOADERS:
                raise ValueError(
                    f"data file {path!r} must end in .jsonl or .parquet; convert it, or set config.data.{name}"
                )
        _check_fraction(self.test_fraction)

    def load(self) -> Dataset:
        """Reads the files. Raises ValueError for what cannot be read."""
        self.check()
        train = self._read(self.train)
        test = self._read(self.test) if self.test else []
        split = decontaminate(train, test) if self.test else split_by_hash(train, test_fraction=self.test_fraction)
        return _rows_of_prompts(split, train, test or train, every=self.repeated_prompts)

    def _read(self, path: str) -> list[Example]:
        return _LOADERS[Path(path).suffix](path, prompt_column=self.prompt_column)


_LOADERS: dict[str, Callable[..., list[Example]]] = {".jsonl": load_jsonl, ".parquet": load_parquet}


@dataclasses.dataclass
class HubData:
    """A data set of the Hugging Face hub, or a folder of Parquet files, read by `datasets`."""

    path: str = ""
    """Its id on the hub, such as `openai/gsm8k`, or a local folder. A folder of that name comes first."""
    subset: str = ""
    """One of its subsets (the hub's configurations), where it has several."""
    split: str = "train"
    """What to train on."""
    test_split: str = ""
    """The held-out split; what it holds is taken out of training by the hash of its prompts. Empty: `test_fraction`."""
    test_fraction: float = 0.05
    """Share of `split` that is held out where there is no `test_split`."""
    revision: str = ""
    """Branch, tag or commit of the hub's repository; empty: the newest. A run reads the commit that this was when it
    began, also when it is resumed later (`data.json` in its folder)."""
    max_rows: int = 0
    """Take the first rows of each split alone, which are read as they come over the network: for sets that are too
    large to download. 0: all, kept in the cache of `datasets`."""
    prompt_column: str = "prompt"
    """Holds text, or a list of chat messages, such as `messages`. A last turn of the assistant is taken out of these
    and becomes the column `completion`, from which `rljax sft` learns."""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """New names of columns, new to old: `{"answer": "reward_model.ground_truth"}` gives rewards an `answer` out of a
    column that holds objects. The old ones stay."""
    chat: bool | None = None
    """Whether text becomes a user message of the chat template; None leaves text as it is."""
    repeated_prompts: bool = False
    """Keep all rows of a prompt, which stay on one side of the split: data of demonstrations and preferences has
    several. Else the first row of a prompt is taken, and the run says how many others there are."""

    @property
    def moves(self) -> bool:
        """Whether `revision` may hold other rows later: on the hub, all but a commit."""
        return not is_local(self.path) and not is_commit(self.revision)

    def check(self) -> None:
        """Raises ValueError for a field that is wrong by itself, or has no effect."""
        for name in ("path", "split"):
            if not getattr(self, name):
                raise ValueError(f"config.data.{name} is empty; name a data set of the hub or a folder, and its split")
        if self.max_rows < 0:
            raise ValueError(f"config.data.max_rows={self.max_rows} must be at least 0; 0 takes all rows")
        if self.revision and is_local(self.path):
            raise ValueError(
                f"config.data.revision={self.revision!r} has no effect: {self.path!r} is a local folder; leave it out"
            )
        _check_fraction(self.test_fraction)

    def load(self) -> Dataset:
        """Reads the splits. Raises ValueError for what cannot be read, ImportError without `datasets`."""
        self.check()
        train = self._read(self.split)
        test = self._read(self.test_split) if self.test_split else []
        split = (
            decontaminate(train, test) if self.test_split else split_by_hash(train, test_fraction=self.test_fraction)
        )
        return _rows_of_prompts(split, train, test or train, every=self.repeated_prompts)

    def _read(self, split: str) -> list[Example]:
        return load_hub(
            self.path,
            split=split,
            subset=self.subset,
            revision=self.revision,
            max_rows=self.max_rows,
            prompt_column=self.prompt_column,
            columns=self.columns,
        )


@dataclasses.dataclass
class RowsData:
    """Rows that a function gives: mappings with a `prompt`, whose other columns reward and environment read."""

    rows: str = ""
    """The function, `module:function`."""
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What it is called with."""
    test_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Go over `args` for the held-out rows, such as another seed. Empty: `test_fraction`."""
    test_fraction: float = 0.1
    """Share held out by the hash of the prompt where there are no `test_args`."""
    balance: bool = False
    """Whether the rows of small tasks (column `task`) are repeated until all tasks have about as many."""
    chat: bool | None = None
    """Whether text becomes a user message of the chat template; None leaves text as it is."""
    repeated_prompts: bool = False
    """Keep all rows of a prompt, which stay on one side of the split: data of demonstrations and preferences has
    several. Else the first row of a prompt is taken, and the run says how many others there are."""

    def check(self) -> None:
        """Raises ValueError for a name of no function's form, or a fraction out of range."""
        if self.rows.count(":") != 1:
            raise ValueError(f"config.data.rows={self.rows!r} must have the form 'module:function'")
        _check_fraction(self.test_fraction)

    def load(self) -> Dataset:
        """Calls the function. Raises ValueError for what is no row."""
        self.check()
        train = self._examples(self.args)
        if self.test_args:
            test = self._examples({**self.args, **self.test_args})
            split = decontaminate(train, test)
        else:
            test = train
            split = split_by_hash(train, test_fraction=self.test_fraction)
        rows = _rows_of_prompts(split, train, test, every=self.repeated_prompts)
        return dataclasses.replace(rows, train=balanced(rows.train)) if self.balance else rows

    def _examples(self, args: Mapping[str, Any]) -> list[Example]:
        make = load_callable(self.rows)
        try:
            rows = make(**args)
        except TypeError as error:
            raise ValueError(f"config.data.rows={self.rows}: args {dict(args)} do not fit: {error}") from None

        wrong = next((row for row in rows if not isinstance(row, Mapping) or "prompt" not in row), None)
        if wrong is not None:
            raise ValueError(f"config.data.rows={self.rows} gave {wrong!r:.100}; a row is a mapping with a 'prompt'")
        return [self._example(index, row) for index, row in enumerate(rows)]

    def _example(self, index: int, row: Mapping[str, Any]) -> Example:
        place = f"row {index} of {self.rows}"
        columns = {name: value for name, value in row.items() if name != "prompt"}
        try:
            prompt, columns = split_answer(row["prompt"], columns)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        except (AttributeError, TypeError):
            raise ValueError(f"{place}: the prompt {row['prompt']!r:.80} is neither text nor chat messages") from None
        return Example(prompt, columns, place=place)


def all_rows(chosen: Sequence[Example], rows: Sequence[Example]) -> list[Example]:
    """Of `rows`, in their order, all whose prompt is one of the `chosen` examples'; equal rows stand once."""
    prompts = {prompt_digest(example) for example in chosen}
    return list({example.id: example for example in rows if prompt_digest(example) in prompts}.values())


def _rows_of_prompts(split: Split, train: Sequence[Example], test: Sequence[Example], *, every: bool) -> FileRows:
    """Of the prompts of both sides, the first row of each, or `every` row; `train` and `test` are all there are."""
    whole = FileRows(all_rows(split.train, train), all_rows(split.test, test))
    if every:
        return whole

    # rows that say the same of a prompt lose nothing
    others = len(whole.train) + len(whole.test) - len(split.train) - len(split.test)
    says = f"{others} rows that differ from the first of their prompt (config.data.repeated_prompts=True keeps them)"
    return FileRows(split.train, split.test, dropped=(says,) if others else ())


def _check_fraction(value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"config.data.test_fraction={value} must be at least 0 and below 1")


@dataclasses.dataclass
class RewardConfig:
    """One reward by name. Several add up by `weight`."""

    reward: str = "rljax.tasks.verifiers:NumberMatch"
    """`module:attribute`: a plain callable, or a class that makes one, such as those of `rljax.tasks.verifiers`."""
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What such a class is called with."""
    weight: float = 1.0
    """Multiplies its value in the sum; negative for a penalty."""
    timeout_s: float = 10.0
    """Seconds of one call, a sample or a whole batch; what takes longer costs the sample."""

    def check(self) -> None:
        """Raises ValueError for a time that is not positive."""
        if not self.timeout_s > 0:
            raise ValueError(f"config.rewards: timeout_s={self.timeout_s} of {self.reward} must be above 0")

    def load(self) -> RewardSpec:
        """Imports it. Raises ValueError for a name that leads nowhere, or `args` that do not fit."""
        self.check()
        target = load_callable(self.reward)
        if isinstance(target, type):
            try:
                target = target(**self.args)
            except TypeError as error:
                raise ValueError(f"reward {self.reward}: args {self.args} do not fit: {error}") from None
        elif self.args:
            raise ValueError(f"reward {self.reward} is a function; args {self.args} are for classes that make one")
        return RewardSpec(target, weight=self.weight, timeout_s=self.timeout_s, name=self.reward.split(":")[-1])


@dataclasses.dataclass
class UniformTasks:
    """Every example equally often."""

    def make(self, examples: Sequence[Example], seed: int) -> Curriculum:
        """The curriculum over `examples`."""
        return UniformCurriculum(examples, seed=seed)
