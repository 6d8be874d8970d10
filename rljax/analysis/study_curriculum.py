"""What `rljax study curriculum` does: one training set in several orders (2510.19099), from several warm starts.

Each seed trains the config's model by its warm-up and measures with it how hard every training task is
(`rljax.tasks.measures`). Then it trains the same weights once for each measure and order, by the demonstrations of the
tasks, as the paper does, or by reinforcement, and answers the held-out tasks.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rljax.analysis.arena_statistics import sign_flip_p
from rljax.analysis.compare import of_seeds, with_seed
from rljax.evaluation import evaluate, sampled_answers
from rljax.experiment.build import Run, build, held_out_examples
from rljax.experiment.config import Config, to_dict
from rljax.experiment.report import aligned, describe_run, say
from rljax.experiment.sft import check_demonstrations, supervised_learner, supervised_step, warm_up
from rljax.experiment.train import train_step
from rljax.parallel import use_mesh
from rljax.rollouts import ScoredGroup, SingleTurn
from rljax.tasks import MEASURES, ORDERS, Example, Order, OrderedCurriculum, arranged, difficulties, measured_sample
from rljax.training import RunFolder, WarmupConfig, versions
from rljax.types import Params

TrainedBy = Literal["demonstrations", "rollouts"]
"""`config.stages.steps` supervised updates, or `config.steps` steps of the config's recipe."""

PARTS = ("low", "middle", "high")
BASELINES: Mapping[Order, Order] = {order: "random_third" if order in PARTS else "random" for order in ORDERS}
"""What an order is compared with: as many tasks, whatever their difficulty."""


@dataclasses.dataclass
class CurriculumOptions:
    """What the study asks beyond the config."""

    measures: tuple[str, ...] = ("accuracy", "sequence_perplexity", "margin", "token_entropy", "token_nll_variance")
    """What tasks are ordered by: `rljax.tasks.MEASURES`, and columns of the data that hold a number."""
    orders: tuple[str, ...] = ("forward", "reverse")
    """How (`rljax.tasks.arranged`); those that ignore difficulty always run beside them."""
    trained_by: TrainedBy = "demonstrations"
    """What an arm learns from."""
    samples: int = 20
    """Answers to each training task that it is measured by, at temperature 1. The paper takes 20, at 0.7."""
    seeds: int = 3
    """Warm starts."""

    def check(self) -> None:
        """Raises a ValueError of one line for a value that cannot be."""
        if not self.measures:
            raise ValueError(f"--measures= names nothing to order by; take some of {', '.join(MEASURES)}")
        for order in self.orders:
            if order not in ORDERS or order == BASELINES[order]:
                known = ", ".join(one for one in ORDERS if one != BASELINES[one])
                raise ValueError(f"--orders={','.join(self.orders)} must be some of {known}")
        if self.trained_by not in ("demonstrations", "rollouts"):
            raise ValueError(f"--trained_by={self.trained_by} must be demonstrations or rollouts")
        if self.samples < 2:
            raise ValueError(f"--samples={self.samples} must be at least 2, or nothing can be said of their variance")
        if self.seeds < 1:
            raise ValueError(f"--seeds={self.seeds} must be at least 1")


def study_curriculum(config: Config, workdir: str, options: CurriculumOptions | None = None) -> dict[str, Any]:
    """Runs the study, prints its table, writes `curriculum.json`, its page and picture, and for each seed the tasks
    with their measures (`seed-0/tasks.jsonl`) into `workdir`, and returns what the first holds.

    Without `options.orders` it measures alone. ValueError, before any training, for settings and data that cannot be.
    """
    options = options or CurriculumOptions()
    options.check()
    run = build(config)
    _check(run, options)
    say(describe_run(run))

    seeds = []
    with RunFolder(workdir, config=to_dict(config), fresh=True) as folder:
        for one in of_seeds(run, options.seeds):
            seeds.append(_one_seed(one, folder, options))

        # Difficulties of single tasks are in the files of the seeds.
        report = {
            "study": "curriculum",
            "options": dataclasses.asdict(options),
            "agreement": agreement([seed["difficulty"] for seed in seeds]),
            "lines": summarise(seeds),
            "seeds": [{name: value for name, value in seed.items() if name != "difficulty"} for seed in seeds],
            "versions": versions(),
        }
        file = folder.write_json("curriculum.json", report)
        page = Path(folder.path) / "curriculum.md"
        page.write_text(page_of(report, draw(report, page.with_suffix(".png")).name))

    say(f"\n{table(report)}\n\npage    {page}\nfigures {file}")
    return report


def _check(run: Run, options: CurriculumOptions) -> None:
    config = run.config
    if not isinstance(config.actor, SingleTurn):
        raise ValueError(
            f"config.actor is {type(config.actor).__name__}; tasks are measured by answers of one turn, so the study "
            "needs SingleTurn(...)"
        )
    if config.sampling.top_logprobs < 2:
        raise ValueError(
            f"config.sampling.top_logprobs={config.sampling.top_logprobs} tells too little of how sure the policy is; "
            "set it to at least 2, such as the paper's 5"
        )
    if config.rollout.staleness:
        raise ValueError(
            f"config.rollout.staleness={config.rollout.staleness} is not for this study, whose arms take turns on one "
            "machine; set it to 0"
        )
    held_out_examples(run)

    tasks = run.dataset.train
    for name in options.measures:
        if name not in MEASURES and not all(_is_number(task.columns.get(name)) for task in tasks):
            raise ValueError(
                f"--measures: {name!r} is none of {', '.join(MEASURES)}, and no column of numbers of the data, which "
                f"has {', '.join(sorted(tasks[0].columns))}"
            )

    # A batch has no task twice.
    field, size = "config.stages.batch_size", config.stages.batch_size
    if options.trained_by == "rollouts":
        field, size = "config.prompts_per_step", config.prompts_per_step
    smallest = len(tasks) // 3 if set(options.orders) & set(PARTS) else len(tasks)
    if size > smallest:
        raise ValueError(f"{field}={size} is more than the {smallest} tasks of an order; lower it, or give more data")

    if options.trained_by == "demonstrations":
        check_demonstrations(_taught(run))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _taught(run: Run) -> Run:
    """The run whose supervised updates are those of an arm."""
    own = run.config.stages
    warmup = WarmupConfig(
        steps=own.steps,
        batch_size=own.batch_size,
        completion_column=run.config.warmup.completion_column,
        optimizer=own.optimizer,
    )
    made = copy.copy(run)
    made.config = dataclasses.replace(run.config, warmup=warmup)
    return made


def _one_seed(run: Run, folder: RunFolder, options: CurriculumOptions) -> dict[str, Any]:
    tasks = list(run.dataset.train)
    seed = run.config.seed
    with run.actor, use_mesh(run.mesh):
        params = jax.tree.map(jnp.asarray, warm_up(run, folder))
        start = _evaluated(run, params)
        measured = _measure(run, tasks, options.samples)
        _write_tasks(Path(folder.path) / f"seed-{seed}" / "tasks.jsonl", tasks, measured)
        say(f"seed {seed}: {len(tasks)} tasks measured; before, {_in_words(start)}")

        difficulty = {name: _difficulty(name, tasks, measured) for name in options.measures}
        # All arms have the same tasks: those that every measure could tell of.
        lacking = np.isnan(list(difficulty.values())).any(axis=0)
        if lacking.any():
            say(f"seed {seed}: {lacking.sum()} tasks are left out: no reward could tell whether they are solved")

        # Each from the same weights.
        train = _by_demonstrations(run) if options.trained_by == "demonstrations" else _by_rollouts(run)
        arms = []
        for measure, order in arms_of(options):
            values = np.where(lacking, np.nan, difficulty.get(measure, 0.0))
            places = arranged(values.tolist(), order, seed=seed)
            scores = train(params, OrderedCurriculum([tasks[i] for i in places], seed=seed))
            arms.append({"measure": measure, "order": order, "tasks": len(places), **scores})
            say(f"seed {seed}: {measure or 'nothing'}, {order}: {_in_words(scores)}")

    return {
        "seed": seed,
        "start": start,
        "means": {name: float(np.nanmean([one[name] for one in measured])) for name in MEASURES},
        "arms": arms,
        "difficulty": difficulty,
    }


def arms_of(options: CurriculumOptions) -> list[tuple[str, Order]]:
    """(measure, order) of all arms of a seed, those that they are compared with first, once each."""
    orders = [order for order in ORDERS if order in options.orders]
    ignoring = dict.fromkeys(BASELINES[order] for order in orders)
    return [*(("", order) for order in ignoring), *((name, order) for name in options.measures for order in orders)]


def _measure(run: Run, tasks: Sequence[Example], samples: int) -> list[dict[str, float]]:
    # What is sampled has the model's own log-probs at temperature 1 alone.
    asked = dataclasses.replace(run.config.evaluation, samples=samples, temperature=1.0, top_p=1.0)
    return [_measured(group) for group in sampled_answers(run.actor, tasks, asked)]


def _measured(group: ScoredGroup) -> dict[str, float]:
    samples = []
    for sample in group.samples:
        assert sample.top_logprobs is not None, "checked by _check"
        samples.append(measured_sample(sample.logprobs, sample.top_logprobs))
    solved = [float(result.is_solved) if result.is_valid else math.nan for result in group.results]
    return difficulties(samples, solved)


def _difficulty(name: str, tasks: Sequence[Example], measured: Sequence[Mapping[str, float]]) -> list[float]:
    """Of every task, higher for harder ones."""
    if name not in MEASURES:
        return [float(task.columns[name]) for task in tasks]
    sign = -1.0 if MEASURES[name].is_easy_high else 1.0
    return [sign * one[name] for one in measured]


def _write_tasks(file: Path, tasks: Sequence[Example], measured: Sequence[Mapping[str, float]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": task.prompt, **task.columns, **{name: None if math.isnan(x) else x for name, x in one.items()}}
        for task, one in zip(tasks, measured, strict=True)
    ]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


Scores = dict[str, float]
"""`greedy` accuracy on the held-out tasks, and the `average` of its samples."""
Train = Callable[[Params, OrderedCurriculum], Scores]
"""What a training of these weights on these tasks comes to."""


def _by_demonstrations(run: Run) -> Train:
    taught = _taught(run)
    learner = supervised_learner(taught)

    def train(params: Params, curriculum: OrderedCurriculum) -> Scores:
        state = learner.init_state(jax.tree.map(jnp.copy, params))
        for step in range(taught.config.warmup.steps):
            state, _ = supervised_step(taught, learner, curriculum, state, step)
        return _evaluated(run, learner.policy_params(state))

    return train


def _by_rollouts(run: Run) -> Train:
    def train(params: Params, curriculum: OrderedCurriculum) -> Scores:
        arm = with_seed(run, run.config.seed)
        arm.curriculum = curriculum
        arm.pipeline.until = run.config.steps
        with arm.actor:
            arm.state = arm.init_state(jax.tree.map(jnp.copy, params))
            for step in range(run.config.steps):
                train_step(arm, step)
            arm.check()
        return _evaluated(run, arm.policy())

    return train


def _evaluated(run: Run, params: Params) -> Scores:
    run.actor.set_params(params, 0)
    estimates = evaluate(run.actor, held_out_examples(run), run.config.evaluation).estimates
    return {"greedy": estimates["greedy"].value, "average": estimates[f"avg@{run.config.evaluation.samples}"].value}


def _in_words(scores: Scores) -> str:
    return f"greedy {scores['greedy']:.3f}, avg@k {scores['average']:.3f}"


def agreement(difficulties: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """Rank correlation of each two measures over the tasks, mean over seeds: near 1 they order alike, and 0 where one
    is the same for all tasks."""
    names = list(difficulties[0])
    return {
        a: {b: float(np.mean([_rank_correlation(one[a], one[b]) for one in difficulties])) for b in names}
        for a in names
    }


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, ties at their mean rank, over the tasks that have both; 0 where one of them is constant."""
    both = np.array([a, b], np.float64)
    both = both[:, ~np.isnan(both).any(axis=0)]
    ranks = np.array([_mean_ranks(values) for values in both])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    scale = math.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum() / scale) if scale else 0.0


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[inverse]


def summarise(seeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line for each measure and order: means over seeds, and by seed what its avg@k has over that of the arm that
    ignores difficulty, with the two-sided p of an exact sign-flip test."""
    lines = []
    for index, first in enumerate(seeds[0]["arms"]):
        arms = [seed["arms"][index] for seed in seeds]
        line = {name: first[name] for name in ("measure", "order", "tasks")}
        line |= {name: float(np.mean([arm[name] for arm in arms])) for name in ("greedy", "average")}
        if first["measure"]:
            beside = [_found(seed, "", BASELINES[first["order"]])["average"] for seed in seeds]
            gains = [arm["average"] - other for arm, other in zip(arms, beside, strict=True)]
            line |= {"gains": gains, "p": sign_flip_p(gains)}
        lines.append(line)
    return lines


def _found(seed: Mapping[str, Any], measure: str, order: str) -> Mapping[str, Any]:
    return next(arm for arm in seed["arms"] if (arm["measure"], arm["order"]) == (measure, order))


def table(report: Mapping[str, Any]) -> str:
    """A line for each arm."""
    return aligned([_HEAD, *_rows(report)])


_HEAD = ["ordered by", "dimension", "order", "greedy", "avg", "minus random, by seed", "p"]


def _rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    start = {name: np.mean([seed["start"][name] for seed in report["seeds"]]) for name in ("greedy", "average")}
    rows.append(["start", "", "", f"{start['greedy']:.3f}", f"{start['average']:.3f}", "", ""])
    for line in report["lines"]:
        measure = line["measure"]
        dimension = MEASURES[measure].dimension if measure in MEASURES else "problem" if measure else ""
        gains = " ".join(f"{gain:+.3f}" for gain in line.get("gains", ()))
        p = f"{line['p']:.2f}" if "p" in line else ""
        scores = [f"{line['greedy']:.3f}", f"{line['average']:.3f}"]
        rows.append([measure or "nothing", dimension, line["order"], *scores, gains, p])
    return rows


def page_of(report: Mapping[str, Any], picture: str) -> str:
    """The page, in Markdown."""
    options = report["options"]
    rows = [f"| {' | '.join(row)} |" for row in (_HEAD, ["---"] * len(_HEAD), *_rows(report))]
    names = list(report["agreement"])
    agreement = [["rank correlation", *names], ["---"] * (len(names) + 1)]
    agreement += [[a, *(f"{report['agreement'][a][b]:+.2f}" for b in names)] for a in names]
    parts = [
        "# One training set in several orders",
        f"Dimensions of difficulty (2510.19099), measured with {options['samples']} answers of the model that is then "
        f"trained by {options['trained_by']}; {len(report['seeds'])} warm starts. What an order brings is its held-out "
        "avg@k minus that of the same number of tasks in a random order, from the same weights.",
        f"![what orders bring over a random one]({picture})",
        "\n".join(rows),
        "## Do the measures order alike?",
        "\n".join(f"| {' | '.join(row)} |" for row in agreement),
    ]
    return "\n\n".join(parts) + "\n"


def draw(report: Mapping[str, Any], file: Path) -> Path:
    """A bar for each measure and order, with a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for line in report["lines"] if "gains" in line]
    orders = list(dict.fromkeys(line["order"] for line in lines))
    measures = list(dict.fromkeys(line["measure"] for line in lines))

    # The bars of a measure stand around its tick.
    figure, axes = plt.subplots(figsize=(8, 4))
    width = 0.8 / max(len(orders), 1)
    for place, order in enumerate(orders):
        gains = [line["gains"] for line in lines if line["order"] == order]
        middles = np.arange(len(measures)) + (place - (len(orders) - 1) / 2) * width
        axes.bar(middles, [float(np.mean(values)) for values in gains], width * 0.9, label=order, alpha=0.7)
        for middle, values in zip(middles, gains, strict=True):
            axes.plot([middle] * len(values), values, "k.", markersize=4)

    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(measures)), [name.replace("_", "\n") for name in measures])
    axes.set_ylabel("held-out avg@k minus random order")
    axes.grid(axis="y", alpha=0.3)
    if orders:
        axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file
