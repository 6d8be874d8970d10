"""What `rljax study stv` does: task vectors (STV, 2511.08246) beside their controls, from several warm starts.

Each seed trains the config's model on its demonstrations. Each task of the data then gets its vector from training
rows, and held-out rows of the task are answered without demonstrations, with them, and with the vector in their place.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from rljax.analysis.compare import of_seeds
from rljax.analysis.task_vectors import (
    centroids,
    overlap,
    placed,
    read_heads,
    selection_loss,
    sensitivity,
    top_heads,
)
from rljax.batching import pad_rows
from rljax.experiment.build import Run, build
from rljax.experiment.config import Config, to_dict
from rljax.experiment.report import aligned, describe_run, say
from rljax.experiment.sft import warm_up
from rljax.models import DecoderConfig
from rljax.parallel import use_mesh
from rljax.tasks import Example
from rljax.text import Dialogue, encode_text
from rljax.training import RunFolder, versions
from rljax.types import Params

COLUMNS = ("alone", "answer", "task")
"""Columns of the data beside the prompt: the query without demonstrations, the answer, and which task it is."""

ROWS_OF_UPDATE = 4
"""Training rows of an update of the choice, each with its own draws."""

NONE, SHOWN, VECTOR = "no demonstrations", "demonstrations", "vector"
MEAN, ANY_CENTROID, ANY_HEADS = "mean output", "any centroid", "random heads"
CASES = (NONE, SHOWN, VECTOR, MEAN, ANY_CENTROID, ANY_HEADS)
"""What a query is answered with: the last three are controls. The mean of a head's outputs, in the same heads; its
centroids, drawn blindly; and heads drawn blindly, with centroids that are chosen as those of the vector are."""


@dataclasses.dataclass
class VectorOptions:
    """What the study asks beyond the config."""

    heads: int = 4
    """Heads that are overwritten, of all layers (the paper's K)."""
    centroids: int = 8
    """Outputs that a head may be given, of which one is chosen (the paper's M)."""
    probes: int = 64
    """Training rows of a task by which heads are found."""
    contexts: int = 256
    """Training rows of a task whose outputs are clustered."""
    steps: int = 200
    """Updates of the choice among centroids."""
    draws: int = 16
    """Choices that are tried for a row in an update."""
    learning_rate: float = 0.05
    """Of Adam, for the logits of the choice."""
    seeds: int = 3
    """Warm starts."""

    def check(self) -> None:
        """Raises a ValueError of one line for a value that cannot be."""
        for name in ("heads", "centroids", "probes", "contexts", "steps", "draws", "seeds"):
            # A row's draws are compared with each other, and the probes are parted in two.
            least = 2 if name in ("draws", "probes") else 1
            if getattr(self, name) < least:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least {least}")


class Queries(NamedTuple):
    """Texts of one width, padded on the right, that are answered with one token."""

    tokens: Int[np.ndarray, "N T"]
    places: Int[np.ndarray, " N"]
    """Of the last token of each."""
    answers: Int[np.ndarray, " N"]
    """The tokens that are wanted."""

    def rows(self, which: Any) -> "Queries":
        return Queries(*(part[which] for part in self))


class Bank(NamedTuple):
    """Outputs that heads may be given, in place of what demonstrations would have them say."""

    heads: Int[np.ndarray, "K 2"]
    """Layer and head of each."""
    outputs: Float[np.ndarray, "K M hd"]
    """M of each head, of which one is chosen."""


def study_stv(config: Config, workdir: str, options: VectorOptions | None = None) -> dict[str, Any]:
    """Runs the study, prints its table, writes `stv.json` into `workdir` and returns what that holds.

    ValueError, before any training, for data without the columns or more heads than there are.
    """
    options = options or VectorOptions()
    options.check()
    run = build(config)
    _check(run, options)
    say(describe_run(run))

    seeds = []
    with RunFolder(workdir, config=to_dict(config), fresh=True) as folder:
        for one in of_seeds(run, options.seeds):
            seeds.append(_one_seed(one, folder, options))
            say(f"seed {one.config.seed}\n{table(seeds[-1:])}\n")

        report = {
            "study": "stv",
            "options": dataclasses.asdict(options),
            "verdict": verdict(seeds),
            "seeds": seeds,
            "versions": versions(),
        }
        file = folder.write_json("stv.json", report)
    say(f"{table(seeds)}\n\n{report['verdict']}\nfigures {file}")
    return report


def _check(run: Run, options: VectorOptions) -> None:
    for name, examples in (("training", run.dataset.train), ("held-out", run.dataset.test)):
        missing = [column for column in COLUMNS if any(column not in example.columns for example in examples)]
        if missing:
            raise ValueError(
                f"config.data: some {name} rows have no column {missing[0]!r}; the study needs {', '.join(COLUMNS)} "
                "beside the prompt, which holds the demonstrations"
            )
    untaught = sorted({*_tasks(run.dataset.test)} - {*_tasks(run.dataset.train)}, key=str)
    if untaught:
        raise ValueError(f"config.data: no training row is of the task {untaught[0]!r}, which held-out rows are of")
    # The probes are parted in two.
    if few := [task for task, rows in _tasks(run.dataset.train).items() if len(rows) < 2]:
        raise ValueError(f"config.data: the task {few[0]!r} has one training row; to find its heads takes at least 2")
    there_are = run.decoder.num_layers * run.decoder.num_heads
    if options.heads > there_are:
        raise ValueError(f"--heads={options.heads} is more than the {there_are} heads of the model")


def _tasks(examples: Sequence[Example]) -> dict[Any, list[Example]]:
    found: dict[Any, list[Example]] = {}
    for example in examples:
        found.setdefault(example.columns["task"], []).append(example)
    return found


def _one_seed(run: Run, folder: RunFolder, options: VectorOptions) -> dict[str, Any]:
    """The model of one warm start: what the held-out rows of each task are answered with."""
    with run.actor, use_mesh(run.mesh):
        params = jax.tree.map(jnp.asarray, warm_up(run, folder))
        train, test = _tasks(run.dataset.train), _tasks(run.dataset.test)
        tasks = []
        for index, task in enumerate(test):
            rng = np.random.default_rng([run.config.seed, index])
            found = _one_task(run, params, train[task], test[task], options, rng)
            tasks.append({"task": str(task), **found})
    return {"seed": run.config.seed, "tasks": tasks}


def _one_task(
    run: Run,
    params: Params,
    train: Sequence[Example],
    test: Sequence[Example],
    options: VectorOptions,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Accuracy and mean log-prob of the answer, on the held-out rows of a task, in each of `CASES`."""
    config = run.decoder
    train = train[: max(options.contexts, options.probes)]
    shown, alone = (queries_of(run, train, column) for column in ("", "alone"))
    outputs, bare = (np.asarray(_read(config, params, part)[1]) for part in (shown, alone))

    def most_moved(rows: slice) -> np.ndarray:
        return top_heads(sensitivity(outputs[rows], bare[rows]), options.heads)

    probes = min(options.probes, len(train))
    half = probes // 2
    agreement = overlap(most_moved(slice(half)), most_moved(slice(half, 2 * half)))

    def bank(heads: np.ndarray, count: int) -> Bank:
        return bank_of(outputs[: options.contexts], heads, count, rng)

    def vector(heads: np.ndarray) -> tuple[Bank, np.ndarray]:
        found = bank(heads, options.centroids)
        return found, choose(config, params, alone, found, options, rng)

    best = most_moved(slice(probes))
    places = (config.num_layers, config.num_heads)
    drawn = rng.choice(math.prod(places), options.heads, replace=False)
    own, chosen = vector(best)
    vectors = {
        VECTOR: (own, chosen),
        MEAN: (bank(best, 1), np.zeros(len(best), int)),
        ANY_CENTROID: (own, rng.integers(options.centroids, size=len(best))),
        ANY_HEADS: vector(np.stack(np.unravel_index(drawn, places), axis=1)),
    }
    asked = queries_of(run, test, "alone")
    cases = {NONE: answered(config, params, asked), SHOWN: answered(config, params, queries_of(run, test, ""))}
    cases |= {name: answered(config, params, asked, *vector) for name, vector in vectors.items()}

    return {
        "cases": {name: {"accuracy": right, "logprob": said} for name, (right, said) in cases.items()},
        "heads": best.tolist(),
        "overlap_of_halves": agreement,
        "rows": len(test),
    }


def queries_of(run: Run, examples: Sequence[Example], column: str) -> Queries:
    """The texts of `column`, or for an empty one the prompts, with the first token of each answer."""
    dialogue = Dialogue(run.tokenizer, chat=run.config.data.chat)
    texts = [example.columns[column] if column else example.prompt for example in examples]
    tokens, lengths = pad_rows([dialogue.opening(text) for text in texts])
    wanted = [encode_text(run.tokenizer, str(example.columns["answer"]), continues=True)[0] for example in examples]
    return Queries(tokens, lengths - 1, np.array(wanted))


def bank_of(
    outputs: Float[np.ndarray, "N L H hd"], heads: Int[np.ndarray, "K 2"], count: int, rng: np.random.Generator
) -> Bank:
    """The centroids of each head's outputs, `count` of each; where there are fewer they are repeated. `rng` is moved
    on."""
    found = [centroids(outputs[:, layer, head], count, rng) for layer, head in heads]
    return Bank(heads, np.stack([points[np.arange(count) % len(points)] for points in found]).astype(np.float32))


def choose(
    config: DecoderConfig,
    params: Params,
    queries: Queries,
    bank: Bank,
    options: VectorOptions,
    rng: np.random.Generator,
) -> Int[np.ndarray, " K"]:
    """The output of each head that REINFORCE ends at, with the log-prob of the answer as the reward. `rng` is moved
    on."""
    optimizer = optax.adam(options.learning_rate)
    alpha = jnp.zeros(bank.outputs.shape[:2])
    state = optimizer.init(alpha)
    for _ in range(options.steps):
        rows = np.repeat(rng.integers(len(queries.tokens), size=ROWS_OF_UPDATE), options.draws)
        # Gumbel noise beside the logits: a draw from their softmax.
        draws = np.argmax(np.asarray(alpha) + rng.gumbel(size=(len(rows), *alpha.shape)), axis=-1)

        part = queries.rows(rows)
        logprobs, _ = _read(config, params, part, bank, draws)
        rewards = np.asarray(logprobs)[np.arange(len(rows)), part.answers]
        gradient = _selection_gradient(alpha, draws, rewards, group=options.draws)
        step, state = optimizer.update(gradient, state)
        alpha = optax.apply_updates(alpha, step)
    return np.asarray(alpha).argmax(axis=1)


_selection_gradient = jax.jit(jax.grad(selection_loss), static_argnames="group")


def answered(
    config: DecoderConfig,
    params: Params,
    queries: Queries,
    bank: Bank | None = None,
    chosen: Int[np.ndarray, " K"] | None = None,
) -> tuple[float, float]:
    """The share of queries whose likeliest token is the answer, and the mean log-prob of the answer (nats); with the
    outputs `chosen` of a bank in place, or the model's own."""
    draws = None if chosen is None else np.broadcast_to(chosen, (len(queries.tokens), len(chosen)))
    logprobs = np.asarray(_read(config, params, queries, bank, draws)[0])
    said = logprobs[np.arange(len(logprobs)), queries.answers]
    return float(np.mean(logprobs.argmax(axis=1) == queries.answers)), float(np.mean(said, dtype=np.float64))


@functools.partial(jax.jit, static_argnums=0)
def _read(
    config: DecoderConfig,
    params: Params,
    queries: Queries,
    bank: Bank | None = None,
    draws: Int[Array, "N K"] | None = None,
) -> tuple[Float[Array, "N V"], Float[Array, "N L H hd"]]:
    """Log-probs behind each query, and head outputs there, with those that each row has drawn from the bank."""
    override = None
    if bank is not None and draws is not None:
        override = placed(bank.outputs, bank.heads, draws, (config.num_layers, config.num_heads))
    found, outputs = read_heads(config, params, queries.tokens, queries.places, override)
    return jax.nn.log_softmax(found.astype(jnp.float32), axis=-1), outputs


def means(seed: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Accuracy and log-prob in each of `CASES`, the mean over a seed's tasks."""
    return {
        case: {
            figure: float(np.mean([task["cases"][case][figure] for task in seed["tasks"]]))
            for figure in ("accuracy", "logprob")
        }
        for case in CASES
    }


def verdict(seeds: Sequence[Mapping[str, Any]]) -> str:
    """What share of the way from no demonstrations to demonstrations the vector goes, and whether in every seed it
    goes further than each control."""
    found = [means(seed) for seed in seeds]
    average = {case: float(np.mean([seed[case]["accuracy"] for seed in found])) for case in CASES}
    way = average[SHOWN] - average[NONE]
    share = f"{(average[VECTOR] - average[NONE]) / way:.0%} of the way" if way > 0 else "no way to go"
    controls = (MEAN, ANY_CENTROID, ANY_HEADS)
    beats = all(seed[VECTOR]["accuracy"] > max(seed[case]["accuracy"] for case in controls) for seed in found)
    judgement = "in every seed it is above every control" if beats else "a control does as well or better in some seed"
    return (
        f"accuracy without demonstrations {average[NONE]:.3f}, with them {average[SHOWN]:.3f}, with the vector "
        f"{average[VECTOR]:.3f} ({share}); {judgement}"
    )


def table(seeds: Sequence[Mapping[str, Any]]) -> str:
    """A line for each case; means over tasks and seeds."""
    found = [means(seed) for seed in seeds]
    rows = [("answered with", "accuracy", "log-prob")]
    for case in CASES:
        accuracy, logprob = (
            float(np.mean([seed[case][figure] for seed in found])) for figure in ("accuracy", "logprob")
        )
        rows.append((case, f"{accuracy:.3f}", f"{logprob:.3f}"))
    agree = float(np.mean([task["overlap_of_halves"] for seed in seeds for task in seed["tasks"]]))
    return f"{aligned(rows)}\nheads that two halves of the probes agree on: {agree:.2f} (Jaccard)"
