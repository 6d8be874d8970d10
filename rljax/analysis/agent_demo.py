"""What `make agent-demo` does: one warm start for each seed, GRPO and Tree-GRPO from it, at equal measured tokens."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax.analysis.compare import Spent, draw_curves, train_on_budget, with_seed
from rljax.evaluation import answers, summarize
from rljax.experiment.build import Run, build
from rljax.experiment.config import Config, Recipe, to_dict
from rljax.experiment.report import aligned, describe_run, say
from rljax.experiment.sft import warm_up
from rljax.parallel import use_mesh
from rljax.rollouts import Rollout, ScoredGroup
from rljax.text import Tokenizer
from rljax.training import RunFolder, versions
from rljax.types import NO_PARENT, Params

SHOWN = 3
"""Greedy episodes that are printed, the first ones."""


@dataclasses.dataclass
class Look:
    """Held-out success of a policy, and how it came about."""

    sampled: int
    """Tokens sampled in training until here."""
    trained: int
    """Tokens trained on until here."""
    steps: int
    """Rollouts until here."""
    greedy: float
    """Share of greedy episodes that succeed."""
    avg: float
    """Share of sampled episodes that succeed."""
    tool_calls: float
    """Tool calls of a sampled episode, on average."""
    alone: tuple[float, int]
    """The sampled episodes that called no tool: the share that succeeds, and how many there are."""
    transcripts: list[str]
    """The first greedy episodes, as `transcript` writes them."""


@dataclasses.dataclass
class Result:
    """One method, trained from one warm start."""

    method: str
    """Its name."""
    seed: int
    """Of the warm start and of training."""
    looks: list[Look]
    """The policy at the warm start, and at equal shares of the budget."""
    forks: int
    """Rows that were forked in training."""
    forks_after_observations: int
    """Those of them that begin where a tool has just answered."""
    seconds: float
    """Wall time of training and its looks."""


def agent_demo(
    config: Config, methods: Mapping[str, Recipe], workdir: str, *, tokens: int, seeds: int = 3, looks: int = 4
) -> dict[str, Any]:
    """Trains every method on `config` for `tokens` sampled tokens, from each of `seeds` warm starts.

    Prints what came of it, and writes `agent_demo.json` and `agent_demo.png` into `workdir`; returns what the former
    holds. Each run is looked at `looks` times. ValueError as `build`.
    """
    began = time.perf_counter()
    runs = {name: build(dataclasses.replace(config, algorithm=recipe)) for name, recipe in methods.items()}
    first = next(iter(runs.values()))
    say(f"{describe_run(first)}\nruns   {', '.join(runs)}: {tokens:,} sampled tokens each, from {seeds} warm starts\n")

    results = []
    with RunFolder(workdir, config=to_dict(config), fresh=True) as folder:
        for seed in range(seeds):
            start, before = _warm_start(with_seed(first, seed), folder)
            say(f"seed {seed}  {_figures('warm start', before)}")
            for name, run in runs.items():
                results.append(_train(name, with_seed(run, seed), start, before, tokens, looks))
                say(_progress(results[-1]))

        lines = summarise(results)
        report = {
            "tokens": tokens,
            "results": lines,
            "runs": [dataclasses.asdict(result) for result in results],
            "seconds": round(time.perf_counter() - began, 1),
            "versions": versions(),
        }
        file = folder.write_json("agent_demo.json", report)

    picture = _draw(results, folder.path / "agent_demo.png", f"held-out avg@{config.evaluation.samples}")
    say(f"\n{episodes(results[: len(runs)])}\n\n{table(lines, config.evaluation.samples)}\n\n{verdict(results)}")
    say(f"\n{report['seconds']:.0f} s\ncurves  {picture}\nfigures {file}")
    return report


def _warm_start(run: Run, folder: RunFolder) -> tuple[Params, Look]:
    """The policy that all methods of a seed begin with."""
    with run.actor, use_mesh(run.mesh):
        params = warm_up(run, folder)
        return params, _look(run, params, Spent())


def _train(name: str, run: Run, start: Params, before: Look, tokens: int, looks: int) -> Result:
    """Trains one method from a copy of `start`, which the other methods need too."""
    began = time.perf_counter()
    found = [before]
    forks = 0
    forks_after_observations = 0

    def look(spent: Spent) -> None:
        if spent.steps:  # the look at the start is `before`
            found.append(_look(run, run.policy(), spent))

    def count(metrics: Mapping[str, float], rollout: Rollout) -> None:
        nonlocal forks, forks_after_observations
        for trajectory in rollout.trajectories:
            if trajectory.parent_row == NO_PARENT:
                continue
            forks += 1
            # Something was said, and the last token before the fork was not: it is a tool's.
            earlier = trajectory.action_mask[: trajectory.fork_index]
            forks_after_observations += bool(earlier.any() and not earlier[-1])

    with run.actor, use_mesh(run.mesh):
        run.state = run.init_state(jax.tree.map(jnp.copy, start))
        train_on_budget(run, tokens, look, looks=looks, after=count)

    return Result(
        method=name,
        seed=run.config.seed,
        looks=found,
        forks=forks,
        forks_after_observations=forks_after_observations,
        seconds=time.perf_counter() - began,
    )


def _look(run: Run, params: Params, spent: Spent) -> Look:
    """Success on the held-out examples, greedy and sampled."""
    config = run.config.evaluation
    run.actor.set_params(params, spent.steps)
    greedy, sampled = answers(run.actor, run.dataset.test[: config.problems or None], config)
    metrics = summarize(greedy, sampled, config).metrics

    results = [result for group in sampled for result in group.results]
    calls = np.array([result.components.get("tool_calls", 0.0) for result in results])
    alone = np.array([result.is_solved for result in results])[calls == 0]

    return Look(
        **dataclasses.asdict(spent),
        greedy=metrics["greedy"],
        avg=metrics[f"avg@{config.samples}"],
        tool_calls=float(calls.mean()),
        alone=(float(alone.mean()) if len(alone) else 0.0, len(alone)),
        transcripts=[transcript(run.tokenizer, group) for group in greedy[:SHOWN]],
    )


def transcript(tokenizer: Tokenizer, group: ScoredGroup, index: int = 0) -> str:
    """An episode on one line: what the policy said, in brackets what came back, and the reward."""
    sample = group.samples[index]
    end = len(sample.tokens)

    parts = []
    start = 0
    for given, stop in [*sample.forced, (end, end)]:
        parts.append(tokenizer.decode(sample.tokens[start:given].tolist()).strip())
        if stop > given:
            parts.append(f"[{tokenizer.decode(sample.tokens[given:stop].tolist()).strip()}]")
        start = stop

    said = " ".join(part for part in parts if part)
    return f"{tokenizer.decode(group.prompt)}  {said}   reward {group.results[index].value:g}"


def _figures(name: str, look: Look) -> str:
    return f"{name:<11} success {look.avg:.2f}, greedy {look.greedy:.2f}, {look.tool_calls:.1f} tool calls"


def _progress(result: Result) -> str:
    after = result.looks[-1]
    line = f"seed {result.seed}  {_figures(result.method, after)}, {after.steps} steps, {result.seconds:.0f} s"
    if result.forks:
        line += f"; {result.forks} forks, {result.forks_after_observations} of them after a tool's answer"
    return line


def episodes(results: Sequence[Result]) -> str:
    """The same held-out episodes before and after training, of one seed; what tools answered is in brackets."""
    lines = [f"held-out episodes of seed {results[0].seed}, greedy; in brackets what the tools answered"]
    for i in range(len(results[0].looks[0].transcripts)):
        lines.append(f"  {'warm start':<11} {results[0].looks[0].transcripts[i]}")
        lines += [f"  {result.method:<11} {result.looks[-1].transcripts[i]}" for result in results]
    return "\n".join(lines)


def summarise(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One line a method: each figure with its standard deviation over seeds."""
    lines = []
    for method in _methods(results):
        runs = [result for result in results if result.method == method]
        line: dict[str, Any] = {"method": method, "seeds": len(runs)}

        moments = {"before": 0, "halfway": len(runs[0].looks) // 2, "after": -1}
        for name in ("avg", "greedy", "tool_calls"):
            for when, index in moments.items():
                values = [getattr(_look_at(run, index), name) for run in runs]
                spread = np.std(values, ddof=len(values) > 1)
                line[f"{name}_{when}"] = [float(np.mean(values)), float(spread)]

        for name in ("sampled", "trained", "steps"):
            line[name] = float(np.mean([getattr(run.looks[-1], name) for run in runs]))
        lines.append(line)
    return lines


def _methods(results: Sequence[Result]) -> list[str]:
    """Names of the methods, in order of appearance."""
    return list(dict.fromkeys(result.method for result in results))


def _look_at(result: Result, index: int) -> Look:
    """Look `index`, or the last one: a step that spends several shares of the budget makes one look of them."""
    return result.looks[min(index, len(result.looks) - 1)]


def table(lines: Sequence[dict[str, Any]], samples: int) -> str:
    """Means over seeds, with standard deviations."""

    def figures(line: dict[str, Any], name: str, *moments: str) -> str:
        """The means at these moments, and the standard deviation of the last one."""
        *earlier, last = (line[f"{name}_{moment}"] for moment in moments)
        mean, spread = last
        return "".join(f"{value[0]:.2f} -> " for value in earlier) + f"{mean:.2f} ± {spread:.2f}"

    rows = [("", f"avg@{samples}", "halfway", "greedy", "tool calls", "sampled", "trained on", "steps")]
    for line in lines:
        cells = [figures(line, "avg", "before", "after"), figures(line, "avg", "halfway")]
        cells += [figures(line, name, "before", "after") for name in ("greedy", "tool_calls")]
        cells += [f"{line[name] / 1e3:.0f}k" for name in ("sampled", "trained")]
        rows.append((line["method"], *cells, f"{line['steps']:.0f}"))

    title = f"held-out success, tool calls per episode; mean and standard deviation over {lines[0]['seeds']} seeds"
    return f"{title}\n{aligned(rows)}"


def verdict(results: Sequence[Result]) -> str:
    """What the figures allow to say: of episodes that called no tool, and of the methods beside the first one."""
    # All methods of a seed share its warm start; it counts once.
    starts = {result.seed: result.looks[0] for result in results}
    looks = [*starts.values(), *(look for result in results for look in result.looks[1:])]
    count = sum(look.alone[1] for look in looks)
    right = sum(share * number for share, number in (look.alone for look in looks))
    said = [f"without a tool: {right:.0f} of {count} held-out episodes that called none were right"]

    first, *others = _methods(results)
    moments = {"halfway": len(results[0].looks) // 2, "at the end": -1}
    for other in others:
        for moment, index in moments.items():
            gains = np.subtract(_scores(results, other, index), _scores(results, first, index))
            said.append(f"{other} less {first}, {moment}, by seed: {_gain_in_words(gains)}")
    return "\n".join(said)


def _scores(results: Sequence[Result], method: str, index: int) -> list[float]:
    """avg@k of a method at look `index`, by seed."""
    return [_look_at(result, index).avg for result in results if result.method == method]


def _gain_in_words(gains: np.ndarray) -> str:
    """The gains [seeds], their mean, and whether they tell a winner: all of one sign, with a mean above two standard
    deviations. One seed has no spread and tells none."""
    spread = float(gains.std(ddof=1)) if len(gains) > 1 else float("inf")
    is_clear = abs(gains.mean()) > 2 * spread and abs(np.sign(gains).sum()) == len(gains)
    judgement = "outside the spread" if is_clear else "within the spread of seeds, no winner"
    return f"{' '.join(f'{x:+.2f}' for x in gains)}, mean {gains.mean():+.2f}: {judgement}"


def _draw(results: Sequence[Result], path: Path, label: str) -> Path:
    """Success and tool calls over tokens, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {"avg": label, "tool_calls": "tool calls per episode"}
    for axes, (value, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        curves: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in _methods(results)}
        for result in results:
            curves[result.method].append([(look.sampled, getattr(look, value)) for look in result.looks])
        draw_curves(axes, curves)
        axes.set(xlabel="tokens sampled (thousands)", ylabel=title)
    axes.legend()
    figure.savefig(path, dpi=110)
    return path
