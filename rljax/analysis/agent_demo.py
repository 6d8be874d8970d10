"""What `make agent-demo` does: one warm start for each seed, GRPO and Tree-GRPO from it, at equal measured tokens."""

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax.analysis.compare import Spent, draw_curves, train_on_budget, with_seed
from rljax.evaluation import evaluate
from rljax.experiment.build import Run, load_params, plan
from rljax.experiment.config import Config, Recipe, to_dict
from rljax.experiment.report import aligned, describe_run, say
from rljax.experiment.sft import warm_up
from rljax.parallel import use_mesh
from rljax.rollouts.collect import Rollout, Scored
from rljax.text import Tokenizer
from rljax.training import RunFolder, versions
from rljax.types import NO_PARENT, Params

SHOWN = 3


@dataclasses.dataclass
class Look:
    """Held-out success of a policy, and how it came about. `alone`: the success of episodes that called no tool, and
    how many of the sampled ones those are; `transcripts` are the first greedy ones."""

    sampled: int
    trained: int
    steps: int
    greedy: float
    avg: float
    tool_calls: float
    alone: tuple[float, int]
    transcripts: list[str]


@dataclasses.dataclass
class Result:
    method: str
    seed: int
    looks: list[Look]
    forks: int  # made in training
    forks_after_observations: int
    seconds: float


def agent_demo(
    config: Config, methods: Mapping[str, Recipe], workdir: str, *, tokens: int, seeds: int = 3, looks: int = 4
) -> dict[str, Any]:
    """Runs every method on `config` for `tokens` sampled tokens from each of `seeds` warm starts, prints what came of
    it and writes `agent_demo.json` and `agent_demo.png`; returns what the former holds. ValueError as `plan` raises."""
    began = time.perf_counter()
    runs = {name: plan(dataclasses.replace(config, algorithm=recipe)) for name, recipe in methods.items()}
    first, results = next(iter(runs.values())), []
    say(f"{describe_run(first)}\nruns   {', '.join(runs)}: {tokens:,} sampled tokens each, from {seeds} warm starts\n")
    with RunFolder(workdir, config=to_dict(config), fresh=True) as folder, contextlib.ExitStack() as pools:
        for run in runs.values():
            pools.enter_context(run.rewards)
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
    with use_mesh(run.mesh):
        params = warm_up(run, load_params(run), folder)
        return params, _look(run, params, Spent())


def _train(name: str, run: Run, start: Params, before: Look, tokens: int, looks: int) -> Result:
    began, found, forks = time.perf_counter(), [before], [0, 0]

    def look(spent: Spent) -> None:
        if spent.steps:
            found.append(_look(run, run.learner.policy_params(run.state), spent))

    def count(metrics: Mapping[str, float], rollout: Rollout) -> None:
        for trajectory in rollout.trajectories:
            if trajectory.parent_row != NO_PARENT:
                earlier = trajectory.action_mask[: trajectory.fork_index]
                forks[0] += 1
                forks[1] += bool(earlier.any() and not earlier[-1])

    with use_mesh(run.mesh):
        run.state = run.init_state(jax.tree.map(jnp.copy, start))
        train_on_budget(run, tokens, look, looks=looks, after=count)
    return Result(name, run.config.seed, found, forks[0], forks[1], time.perf_counter() - began)


def _look(run: Run, params: Params, spent: Spent) -> Look:
    """Success on the held-out rows, greedy and sampled."""
    assert run.player is not None
    player, groups = run.player.aside(), []

    def play(*args: Any, **setup: Any) -> list[Scored]:
        groups.extend(player(*args, **setup))
        return groups[-len(args[0]) :]

    run.set_policy(params, spent.steps)
    own, examples = run.config.evaluation, run.dataset.test
    examples = examples[: own.problems or None]
    options: dict[str, Any] = {
        "samples": own.samples,
        "temperature": own.temperature,
        "batch_prompts": own.batch_prompts,
    }
    metrics = evaluate(examples, play=play, **options, **run.rollout_setup).metrics
    greedy, sampled = groups[: len(examples)], groups[len(examples) :]
    results = [result for group in sampled for result in group.results]
    calls = np.array([result.components.get("tool_calls", 0.0) for result in results])
    alone = np.array([result.value >= 1 for result in results])[calls == 0]
    return Look(
        **dataclasses.asdict(spent),
        greedy=metrics["greedy"],
        avg=metrics[f"avg@{own.samples}"],
        tool_calls=float(calls.mean()),
        alone=(float(alone.mean()) if len(alone) else 0.0, len(alone)),
        transcripts=[transcript(run.tokenizer, group) for group in greedy[:SHOWN]],
    )


def transcript(tokenizer: Tokenizer, group: Scored, index: int = 0) -> str:
    """An episode on one line: what the policy said, in brackets what came back, and the reward."""
    sample, parts, start = group.samples[index], [], 0
    for given, stop in [*sample.forced, (len(sample.tokens), len(sample.tokens))]:
        parts.append(tokenizer.decode(sample.tokens[start:given].tolist()).strip())
        parts.append(f"[{tokenizer.decode(sample.tokens[given:stop].tolist()).strip()}]" if stop > given else "")
        start = stop
    return f"{tokenizer.decode(group.prompt)}  {' '.join(filter(None, parts))}   reward {group.results[index].value:g}"


def _figures(name: str, look: Look) -> str:
    return f"{name:<11} success {look.avg:.2f}, greedy {look.greedy:.2f}, {look.tool_calls:.1f} tool calls"


def _progress(result: Result) -> str:
    forks = f"; {result.forks} forks, {result.forks_after_observations} of them after a tool's answer"
    after = result.looks[-1]
    what = f"{_figures(result.method, after)}, {after.steps} steps, {result.seconds:.0f} s"
    return f"seed {result.seed}  {what}{forks if result.forks else ''}"


def episodes(results: Sequence[Result]) -> str:
    """The same held-out episodes before and after, of one seed; what tools answered is in brackets."""
    lines = [f"held-out episodes of seed {results[0].seed}, greedy; in brackets what the tools answered"]
    for i in range(len(results[0].looks[0].transcripts)):
        lines.append(f"  {'warm start':<11} {results[0].looks[0].transcripts[i]}")
        lines += [f"  {result.method:<11} {result.looks[-1].transcripts[i]}" for result in results]
    return "\n".join(lines)


def summarise(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One line a method: each figure with its standard deviation over seeds."""
    lines = []
    for method in dict.fromkeys(result.method for result in results):
        runs = [result for result in results if result.method == method]
        line: dict[str, Any] = {"method": method, "seeds": len(runs)}
        for name in ("avg", "greedy", "tool_calls"):
            for when, index in (("before", 0), ("halfway", len(runs[0].looks) // 2), ("after", -1)):
                values = [getattr(run.looks[min(index, len(run.looks) - 1)], name) for run in runs]
                line[f"{name}_{when}"] = [float(np.mean(values)), float(np.std(values, ddof=len(values) > 1))]
        for name in ("sampled", "trained", "steps"):
            line[name] = float(np.mean([getattr(run.looks[-1], name) for run in runs]))
        lines.append(line)
    return lines


def table(lines: Sequence[dict[str, Any]], samples: int) -> str:
    """Means over seeds, with standard deviations."""

    def figures(line: dict[str, Any], name: str, *whens: str) -> str:
        mean, spread = line[f"{name}_{whens[-1]}"]
        return "".join(f"{line[f'{name}_{when}'][0]:.2f} -> " for when in whens[:-1]) + f"{mean:.2f} ± {spread:.2f}"

    rows = [("", f"avg@{samples}", "halfway", "greedy", "tool calls", "sampled", "trained on", "steps")]
    for line in lines:
        cells = [figures(line, "avg", "before", "after"), figures(line, "avg", "halfway")]
        cells += [figures(line, name, "before", "after") for name in ("greedy", "tool_calls")]
        cells += [f"{line[name] / 1e3:.0f}k" for name in ("sampled", "trained")]
        rows.append((line["method"], *cells, f"{line['steps']:.0f}"))
    title = f"held-out success, tool calls per episode; mean and standard deviation over {lines[0]['seeds']} seeds"
    return f"{title}\n{aligned(rows)}"


def verdict(results: Sequence[Result]) -> str:
    """What the figures allow to say: of the methods, and of episodes that called no tool."""
    starts = {result.seed: result.looks[0] for result in results}
    looks = [*starts.values(), *(look for result in results for look in result.looks[1:])]
    count = sum(look.alone[1] for look in looks)
    right = sum(share * number for share, number in (look.alone for look in looks))
    said = [f"without a tool: {right:.0f} of {count} held-out episodes that called none were right"]
    names = list(dict.fromkeys(result.method for result in results))
    for other in names[1:]:
        gains = []
        for where in (len(results[0].looks) // 2, -1):
            ends = {
                name: [r.looks[min(where, len(r.looks) - 1)].avg for r in results if r.method == name] for name in names
            }
            gains.append(np.subtract(ends[other], ends[names[0]]))
        for label, gain in zip(("halfway", "at the end"), gains, strict=True):
            each = " ".join(f"{x:+.2f}" for x in gain)
            spread = float(gain.std(ddof=1)) if len(gain) > 1 else float("inf")
            is_clear = abs(gain.mean()) > 2 * spread and abs(np.sign(gain).sum()) == len(gain)
            says = "outside the spread" if is_clear else "within the spread of seeds, no winner"
            said.append(f"{other} less {names[0]}, {label}, by seed: {each}, mean {gain.mean():+.2f}: {says}")
    return "\n".join(said)


def _draw(results: Sequence[Result], path: Path, label: str) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    names = dict.fromkeys(result.method for result in results)
    for axes, value, title in zip(figure.subplots(1, 2), ("avg", "tool_calls"), (label, "tool calls per episode")):
        curves = {
            name: [[(look.sampled, getattr(look, value)) for look in r.looks] for r in results if r.method == name]
            for name in names
        }
        draw_curves(axes, curves)
        axes.set(xlabel="tokens sampled (thousands)", ylabel=title)
    axes.legend()
    figure.savefig(path, dpi=110)
    return path
