"""Methods beside each other on tasks that can tell them apart, each with its prediction: `rljax arena`.

A task has methods, and each method names the one that it is compared with and what is predicted of the two. All of
them train from the same warm start of a seed, for as many updates of about as many sampled tokens. A run (task, method,
seed) makes one small file, a `Record`; whatever has its record already is not run again, so an arena can be made in
pieces, on several machines, and broken off at any time.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rljax.analysis.arena_statistics import Compared, Expected, compare_paired
from rljax.analysis.compare import with_seed
from rljax.evaluation.evaluate import EVALUATION_STEP, Evaluation
from rljax.experiment.build import Run, build
from rljax.experiment.config import Config, Recipe, to_dict
from rljax.experiment.report import say
from rljax.experiment.sft import warm_up
from rljax.experiment.train import evaluate_run, refresh_reference, train_step
from rljax.models import load_model, param_shardings, save_hf
from rljax.parallel import use_mesh
from rljax.rollouts import Rollout, collect
from rljax.tasks import Example
from rljax.training import RunFolder, is_remote, writable
from rljax.types import NO_PARENT, Params, Trajectory

CODE_THAT_MATTERS = (
    "ops",
    "losses",
    "trees",
    "advantages",
    "plans",
    "algorithms",
    "batching",
    "models",
    "sampling",
    "training",
)
"""Rooms whose code decides what a run gives. What a config names (data, demonstrations, environment) counts beside
them; comments and texts do not count."""


SEQUENCE_ROWS = 8
"""Rows of full length that a packed sequence must hold: `update.pack_length` of a task is at least as long."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything a run of the arena has."""

    updates: int
    """Steps of training, each a rollout and one update."""
    prompts: int
    """Prompts of a step, of the method that the others are measured by."""
    seeds: int
    """Warm starts, and runs of each method."""
    looks: int
    """Evaluations on the way, at equal shares of the updates; the warm start makes one more."""
    problems: int
    """Held-out problems, the same for all."""
    warmup: float = 1.0
    """Share of a task's supervised steps."""
    layers: int = 3
    """Layers of the model."""


# Few prompts a step: where a gradient has more signal than noise already, less noise shows in nothing.
SIZES = {
    "smoke": Size(updates=2, prompts=4, seeds=1, looks=1, problems=4, warmup=0.03, layers=1),
    "small": Size(updates=30, prompts=8, seeds=2, looks=3, problems=64),
    "full": Size(updates=120, prompts=8, seeds=8, looks=8, problems=128),
}


class Look(NamedTuple):
    """A point of a curve."""

    tokens: float
    """Sampled until here; without training, those of a prompt."""
    score: float
    """What is compared, on held-out problems."""


class Outcome(NamedTuple):
    """What a measurement of one run gives."""

    curve: list[Look]
    figures: dict[str, float]
    """What it cost, and whatever else is to be known of it."""


class Record(NamedTuple):
    """One run, as its file says it."""

    task: str
    method: str
    seed: int
    key: str
    """Digest of its config, which the seed is part of."""
    code: str
    """Digest of the code that made it."""
    curve: list[Look]
    figures: dict[str, float]


Measure = Callable[[Run, Params, Size], Outcome]
"""(a run with its seed, its actor open; the warm start, which is not to be donated; the size) -> what it came to."""


def as_it_is(config: Config, size: Size) -> Config:
    """Changes nothing."""
    return config


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of a task."""

    name: str
    """How it is called in tables and on the command line."""
    recipe: Recipe
    """The method itself."""
    against: str = ""
    """The method of the same task that it is compared with; empty for one that others are compared with."""
    expected: Expected = "above"
    """Where the prediction sees it beside that one."""
    claim: str = ""
    """The prediction in words, written before the runs, with its source."""
    share: float = 1.0
    """Prompts of a step as a share of the size's, such that the tokens of a step agree (`rljax arena --calibrate`)."""
    change: Callable[[Config, Size], Config] = as_it_is
    """What else differs from the task's config."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A question to methods. One of your own: a `Task`, or a function without arguments that gives one."""

    name: str
    """How it is called."""
    about: str
    """What is asked, in a sentence or two."""
    prediction: str
    """What is expected of the task as a whole, and why."""
    config: Callable[[Size], Config]
    """The run without method and seed. Its warm-up makes the start that all methods share."""
    methods: tuple[Method, ...]
    """Those that are compared with come before those that name them."""
    measure: Measure | None = None
    """How a run is measured; None: `learning_curve`."""
    found: str = ""
    """Where the full run came out otherwise than predicted, and why. Written after it."""

    def check(self) -> None:
        """ValueError, in one line, for methods that cannot be compared."""
        names = [method.name for method in self.methods]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"task {self.name}: two methods are called {twice[0]!r}; rename one")
        for index, method in enumerate(self.methods):
            if method.against and method.against not in names[:index]:
                raise ValueError(
                    f"task {self.name}: {method.name!r} is compared with {method.against!r}, which is none of the "
                    f"methods before it: {', '.join(names[:index]) or 'there are none'}"
                )
            if not method.share > 0:
                raise ValueError(f"task {self.name}: share={method.share} of {method.name!r} must be above 0")

    def run_config(self, method: Method, size: Size, seed: int) -> Config:
        """The config of one run, with the warm-up that its start comes from. ValueError as `recipe.build`."""
        config = method.change(dataclasses.replace(self.config(size), algorithm=method.recipe, seed=seed), size)
        prompts = max(1, round(size.prompts * method.share))

        # One size of everything, which holds the rows without shared prefixes, so that the update compiles once.
        rows = -(-prompts // config.update.minibatches) * method.recipe.build().plan.group_size
        update = dataclasses.replace(
            config.update,
            row_buckets=(rows,),
            microbatch_buckets=(-(-rows // (SEQUENCE_ROWS * config.update.microbatch_size)),),
        )
        return dataclasses.replace(config, prompts_per_step=prompts, steps=size.updates, update=update)


@dataclasses.dataclass(frozen=True)
class Folders:
    """Where an arena keeps things."""

    work: Path
    """Warm starts and logs, which can be made again."""
    records: Path
    """A file for each run."""

    @classmethod
    def named(cls, workdir: str, preset: str, records: str = "") -> "Folders":
        """Those of a preset in `workdir`; no `records` are records/ beside the warm starts. ValueError for folders that
        cannot be written to, and for addresses."""
        for flag, folder in (("workdir", workdir), ("records", records or workdir)):
            if is_remote(folder):
                raise ValueError(f"--{flag}={folder} is an address; an arena keeps its files in local folders")
            writable(folder)
        work = Path(workdir) / preset
        return cls(work, Path(records) if records else work / "records")


def load_task(name: str) -> Task:
    """The task `module:attribute`, also of a module in the working folder. ValueError for what is none."""
    if name.count(":") != 1:
        raise ValueError(f"--task={name!r} must have the form module:Task")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--task={name}: {error}; name a Task of a module that can be imported") from None
    task = found if isinstance(found, Task) else found() if callable(found) else found
    if not isinstance(task, Task):
        raise ValueError(
            f"--task={name} is a {type(task).__name__}; it must be an rljax.analysis.arena.Task, or return one"
        )
    task.check()
    return task


def run_arena(
    tasks: Sequence[Task],
    size: Size,
    seeds: Sequence[int],
    folders: Folders,
    *,
    methods: Sequence[str] = (),
    keep: bool = False,
    only_found: bool = False,
) -> list[Record]:
    """Makes the records that are missing, of all `methods` or of those named, and returns all that were asked for.

    A record of other code is made again, unless `keep`; `only_found` makes none. ValueError for a method that no task
    has.
    """
    known = {method.name for task in tasks for method in task.methods}
    if unknown := sorted(set(methods) - known):
        raise ValueError(f"--methods: {unknown[0]!r} is none of {'; '.join(sorted(known))}")

    wanted = [(task, method) for task in tasks for method in task.methods if not methods or method.name in methods]
    total = len(wanted) * len(seeds)
    records: list[Record] = []
    for task, method in wanted:
        run = None
        for seed in seeds:
            config = task.run_config(method, size, seed)
            record = find_record(folders.records, task, method, config, keep=keep)
            is_found = record is not None
            if record is None and only_found:
                continue
            if record is None:
                # Programs are compiled once for all seeds of a method.
                run = run or build(config)
                record = make_record(task, method, with_seed(run, seed), size, folders)
                write_record(folders.records, record)
            records.append(record)
            say(_progress(record, len(records), total, is_found))
        if run is not None:
            # Programs of a method are of no use to the next one.
            jax.clear_caches()
    return records


def _progress(record: Record, number: int, total: int, is_found: bool) -> str:
    first, last = record.curve[0], record.curve[-1]
    how = "from its record" if is_found else f"{record.figures['seconds']:.0f} s"
    return (
        f"[{number}/{total}] {record.task}, {record.method}, seed {record.seed}: {first.score:.3f} -> {last.score:.3f} "
        f"in {last.tokens / 1e3:.1f}k tokens, {how}"
    )


def make_record(task: Task, method: Method, run: Run, size: Size, folders: Folders) -> Record:
    """Measures one run from the warm start of its seed."""
    began = time.perf_counter()
    start = warm_start(task, size, run, folders.work / "starts")
    with run.actor, use_mesh(run.mesh):
        outcome = (task.measure or learning_curve)(run, start, size)
    figures = {**outcome.figures, "seconds": round(time.perf_counter() - began, 1)}
    key, code = digest_of(run.config), code_digest(run.config)
    return Record(task.name, method.name, run.config.seed, key, code, outcome.curve, figures)


def learning_curve(run: Run, start: Params, size: Size) -> Outcome:
    """Trains for `size.updates` steps, with held-out avg@k at `size.looks` equal shares of them.

    Guided actors sample tokens that nothing is trained on (probes, and rollouts that guided ones replace): they count
    as sampled.
    """
    run.state = run.init_state(jax.tree.map(jnp.copy, start))
    run.pipeline.until = size.updates
    name = f"avg@{run.config.evaluation.samples}"
    stops = {round(size.updates * (i + 1) / size.looks) for i in range(size.looks)}
    sampled = 0.0
    trained = 0
    empty = 0
    greedy = 0.0

    curve = []
    for step in range(size.updates + 1):
        if step == 0 or step in stops:
            estimates = _evaluated(run, step).estimates
            curve.append(Look(sampled, estimates[name].value))
            greedy = estimates["greedy"].value
        if step == 0:
            run.reference_scores = _evaluated(run, step).solved_shares()
        if step == size.updates:
            break

        _, rollout = train_step(run, step)
        sampled += tokens_of(rollout)
        trained += int(sum(trajectory.action_mask.sum() for trajectory in rollout.trajectories))
        empty += run.empty_steps > 0
        # A reference that moves is part of a method.
        refresh_reference(run, step + 1, functools.partial(_evaluated, run, step + 1))

    run.check()
    figures = {"updates": size.updates - empty, "sampled": sampled, "trained": trained, "greedy": greedy}
    return Outcome(curve, figures)


def _evaluated(run: Run, step: int) -> Evaluation:
    """The policy behind `step` steps on held-out problems, asked once."""
    if run.evaluation is None or run.evaluation.step != step:
        run.evaluation = evaluate_run(run, run.policy(), step)
    return run.evaluation


def pass_rate(run: Run, start: Params, size: Size) -> Outcome:
    """Without training: the share of held-out problems with a right leaf, over the tokens sampled for a problem.

    The curve has a point for the first chain of a problem with all that was forked from it, one for the first two, and
    so on. Only whole steps of problems are asked.
    """
    prompts = run.config.prompts_per_step
    asked = run.dataset.test[: size.problems // prompts * prompts]
    if not asked:
        raise ValueError(f"{size.problems} held-out problems are fewer than the {prompts} of a step; take more")
    run.actor.set_params(start, 0)
    tokens: list[np.ndarray] = []
    solved: list[np.ndarray] = []
    for first in range(0, len(asked), prompts):
        batch = asked[first : first + prompts]
        draw = functools.partial(_first_of, batch)
        rollout = collect(run.actor, run.algorithm.plan, draw, prompts, EVALUATION_STEP)
        for part, values in zip(leaves_of_chains(rollout.trajectories), (tokens, solved), strict=True):
            values.append(part)

    cost = np.concatenate(tokens).cumsum(axis=1).mean(axis=0)
    share = np.maximum.accumulate(np.concatenate(solved), axis=1).mean(axis=0)
    curve = [Look(float(x), float(y)) for x, y in zip(cost, share, strict=True)]
    return Outcome(curve, {"problems": len(asked), "sampled": float(cost[-1] * len(asked))})


def _first_of(examples: Sequence[Example], n: int) -> Sequence[Example]:
    return examples[:n]


def leaves_of_chains(trajectories: Sequence[Trajectory]) -> tuple[np.ndarray, np.ndarray]:
    """What each chain of each group came to with all that was forked from it, both [groups, chains]: the tokens that
    were sampled, and whether a leaf is right. Every group has as many chains."""
    found: dict[int, dict[int, list[float]]] = {}
    roots: list[int] = []
    for row, trajectory in enumerate(trajectories):
        parent = trajectory.parent_row
        root = row if parent == NO_PARENT else roots[parent]
        roots.append(root)
        chain = found.setdefault(trajectory.group_id, {}).setdefault(root, [0.0, 0.0])
        # A fork's first tokens are its parent's; what was given to it was not sampled.
        chain[0] += float(trajectory.action_mask[trajectory.fork_index :].sum())
        chain[1] = max(chain[1], float(trajectory.is_valid and trajectory.reward >= 1))
    table = np.array([list(chains.values()) for chains in found.values()])
    return table[..., 0], table[..., 1]


def tokens_of(rollout: Rollout) -> float:
    """Tokens that a rollout has cost."""
    beside = sum(rollout.actor_stats.get(name, 0.0) for name in ("probe_tokens", "replaced_tokens"))
    return float(rollout.stats["new_tokens"]) + beside


def warm_start(task: Task, size: Size, run: Run, folder: Path) -> Params:
    """The policy that all methods of a seed begin with, made once by one code; tasks of the same warm-up share it."""
    config = dataclasses.replace(task.config(size), seed=run.config.seed)
    target = folder / f"{digest_of(config)}-{code_digest(config)}"
    if not (target / "config.json").exists():
        first = build(config)
        with first.actor, RunFolder(target.with_suffix(".log"), fresh=True) as log, use_mesh(first.mesh):
            params = warm_up(first, log)
            # In one move: what was broken off is made again.
            part = target.with_suffix(".part")
            save_hf(part, first.decoder, params, tokenizer=first.tokenizer)
            part.rename(target)
    shardings = param_shardings(run.decoder, run.mesh)
    return load_model(target, dtype=run.decoder.dtype, param_dtype="float32", shardings=shardings)[1]


def calibrate(task: Task, size: Size, folders: Folders) -> Iterator[tuple[str, float, float]]:
    """For each method (its name, the tokens that a prompt costs at the warm start of seed 0, the `share` at which its
    steps cost as many tokens as those of the method that it is compared with)."""
    costs: dict[str, float] = {}
    shares: dict[str, float] = {}
    for method in task.methods:
        run = build(task.run_config(method, size, 0))
        start = warm_start(task, size, run, folders.work / "starts")
        with run.actor, use_mesh(run.mesh):
            run.state = run.init_state(jax.tree.map(jnp.copy, start))
            _, rollout = train_step(run, 0)
        costs[method.name] = tokens_of(rollout) / len(rollout.examples)
        base = method.against or method.name
        shares[method.name] = shares.get(base, method.share) * costs[base] / costs[method.name]
        yield method.name, costs[method.name], shares[method.name]


# Records.


def record_file(folder: Path, task: str, method: str, seed: int, key: str) -> Path:
    """The file of a run; its name says what it is of."""
    slug = re.sub(r"\W+", "-", method.lower()).strip("-")
    return folder / f"{task}-{slug}-{seed}-{key[:12]}.json"


def find_record(folder: Path, task: Task, method: Method, config: Config, *, keep: bool = False) -> Record | None:
    """The record of a run, if there is one of this config, and of this code unless `keep`."""
    key = digest_of(config)
    file = record_file(folder, task.name, method.name, config.seed, key)
    if not file.exists():
        return None
    try:
        record = read_record(file)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is no record of a run ({error}); delete it, and it is made again") from None
    return record if keep or record.code == code_digest(config) else None


def read_record(file: Path) -> Record:
    """The record in a file. ValueError, TypeError or KeyError for what is none."""
    found = json.loads(file.read_text())
    return Record(**{**found, "curve": [Look(*look) for look in found["curve"]]})


def write_record(folder: Path, record: Record) -> Path:
    """Writes a record in one move."""
    file = record_file(folder, record.task, record.method, record.seed, record.key)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(record._asdict()) + "\n")
    part.rename(file)
    return file


def digest_of(config: Config) -> str:
    """Names a config by what it says: fields at their defaults are left out, so that a new one changes no names.
    ValueError for a function in it that has no name of its own."""
    return hashlib.sha256(_text_of(_stated(config)).encode()).hexdigest()


def _stated(part: Any) -> Any:
    """JSON-ready form of a config without fields at their defaults, but for the class of each part."""
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        said = [field for field in dataclasses.fields(part) if getattr(part, field.name) != _default_of(field)]
        return {"class": type(part).__name__, **{field.name: _stated(getattr(part, field.name)) for field in said}}
    if isinstance(part, list | tuple):
        return [_stated(item) for item in part]
    return to_dict(part)


def _default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def code_digest(config: Config) -> str:
    """Names the code that decides what a run of `config` gives: `CODE_THAT_MATTERS` and the modules that it names."""
    named = re.findall(r'"([\w.]+):\w[\w.]*"', _text_of(to_dict(config)))
    modules = sorted({*named, type(config.algorithm).__module__})
    files = [*_files_of_rooms(), *filter(None, (_file_of(module) for module in modules))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(_code_of(file).encode())
    return digest.hexdigest()[:16]


def _text_of(said: Any) -> str:
    """What a config says, as JSON, functions by their names."""
    text = json.dumps(said, sort_keys=True, default=to_dict)
    # Two functions without a name of their own would pass for one, and so would their records.
    if found := re.search(r'"[^"]*<(?:lambda|locals)>[^"]*"', text):
        raise ValueError(f"the config of a task holds {found[0]}, which is not at the top of a module; move it there")
    return text


@functools.cache
def _files_of_rooms() -> tuple[str, ...]:
    root = Path(__file__).resolve().parent.parent
    return tuple(str(file) for room in CODE_THAT_MATTERS for file in sorted((root / room).rglob("*.py")))


def _file_of(module: str) -> str | None:
    return inspect.getsourcefile(importlib.import_module(module))


@functools.cache
def _code_of(file: str) -> str:
    """The code of a file without comments, texts and layout."""
    tree = ast.parse(Path(file).read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


# Comparisons.


def area_difference(curve: Sequence[Look], other: Sequence[Look]) -> float:
    """Mean height of one curve above another over the tokens that both have, with straight lines between looks.

    Of curves that share only a point it is the difference there. ValueError for curves that share none.
    """
    first = float(max(curve[0].tokens, other[0].tokens))
    last = float(min(curve[-1].tokens, other[-1].tokens))
    if first > last:
        raise ValueError(
            f"curves of {curve[0].tokens:g} to {curve[-1].tokens:g} tokens and of {other[0].tokens:g} to "
            f"{other[-1].tokens:g} have none in common"
        )
    return mean_height(curve, first, last) - mean_height(other, first, last)


def mean_height(curve: Sequence[Look], first: float, last: float) -> float:
    """Mean of a curve from `first` to `last` tokens, which it must hold; its height there where both are one."""
    tokens, scores = np.array(curve, np.float64).T
    if first == last:
        return float(np.interp(first, tokens, scores))
    inner = tokens[(tokens > first) & (tokens < last)]
    places = np.array([first, *inner, last])
    heights = np.interp(places, tokens, scores)
    return float(np.trapezoid(heights, places) / (last - first))


def compare_task(task: Task, records: Sequence[Record]) -> dict[str, Compared]:
    """Every method of a task beside the one that it is compared with, over the seeds that both have; those without a
    common seed are left out."""
    by_run = {(record.method, record.seed): record for record in records if record.task == task.name}
    differences = {}
    scores = {}
    for method in task.methods:
        seeds = sorted(seed for name, seed in by_run if name == method.name and (method.against, seed) in by_run)
        if not seeds:
            continue
        pairs = [(by_run[method.name, seed].curve, by_run[method.against, seed].curve) for seed in seeds]
        differences[method.name] = [area_difference(*pair) for pair in pairs]
        scores[method.name] = float(np.mean([mean_height(base, base[0].tokens, base[-1].tokens) for _, base in pairs]))

    expected = [method.expected for method in task.methods if method.name in differences]
    found = compare_paired(list(differences.values()), expected, list(scores.values()))
    return dict(zip(differences, found, strict=True))
