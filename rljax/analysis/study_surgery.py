"""What `rljax study surgery` does: Model Surgery (2407.08770) beside its controls, from several warm starts.

Each seed trains the config's model on its demonstrations, fits a probe to texts with the label `unwanted`, and edits
the gates by every alpha. Each edited model then answers held-out unwanted prompts with the run's own decoder, and reads
held-out texts that are not unwanted.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rljax.analysis.compare import of_seeds
from rljax.analysis.surgery import (
    PAPER_SHARE,
    Probe,
    choose_neurons,
    edited,
    fit_probe,
    gate_columns,
    gate_directions,
    gate_inputs,
    of_each_layer,
)
from rljax.evaluation import sampled_answers
from rljax.experiment.build import Run, build
from rljax.experiment.config import Config, to_dict
from rljax.experiment.evaluate import of_answers
from rljax.experiment.report import aligned, describe_run, say
from rljax.experiment.sft import demonstration_row, warm_up
from rljax.models import DecoderConfig, hidden_states, logits
from rljax.parallel import use_mesh
from rljax.tasks import Example
from rljax.text import Dialogue
from rljax.training import RunFolder, versions
from rljax.types import Params

LABEL = "unwanted"
"""Column of the data, 0 or 1, and the reward that measures the behaviour in what is said."""

SLACK = 1.02
"""Most by which perplexity may grow for an edit to count."""

ProbedAt = Literal["gates", "final"]
"""The states that a probe is fitted to."""


@dataclasses.dataclass
class SurgeryOptions:
    """What the study asks beyond the config."""

    alphas: tuple[float, ...] = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
    """Sizes of the edit, in median norms of a gate. The paper adds the unwanted direction: above 0."""
    share: float = PAPER_SHARE
    """Share of all neurons that are edited."""
    texts: int = 1000
    """Training texts that the probe is fitted to."""
    probe: ProbedAt = "gates"
    """Where it is fitted: to what the gates of each layer read, one probe a layer, or to the final states, as in the
    paper's release."""
    seeds: int = 3
    """Warm starts."""

    def check(self) -> None:
        """Raises a ValueError of one line for a value that cannot be."""
        if not self.alphas or not all(math.isfinite(alpha) and alpha for alpha in self.alphas):
            raise ValueError(
                f"--alphas={','.join(map(str, self.alphas))} must be finite numbers other than 0, e.g. -1,1"
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"--share={self.share} must be above 0 and at most 1; the paper's is {PAPER_SHARE:.4f}")
        for name in ("texts", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Edit:
    """What one edit of one model came to."""

    kind: str
    """Which neurons were moved, and where to; `none` is the model itself."""
    alpha: float
    """Size of the edit."""
    rewards: dict[str, float]
    """Mean of each reward over the answers to unwanted prompts; `unwanted` is the behaviour."""
    perplexity: float
    """Of texts that are not unwanted, per token."""
    divergence: float
    """KL divergence (nats) from the edited model to the one it came from, mean over the tokens of these texts."""


class Texts(NamedTuple):
    """Texts of one width, padded on the right."""

    tokens: np.ndarray
    """int32 [N, T]."""
    mask: np.ndarray
    """bool [N, T]: what is no padding."""
    labels: np.ndarray
    """int64 [N]: 1 is unwanted."""


def study_surgery(config: Config, workdir: str, options: SurgeryOptions | None = None) -> dict[str, Any]:
    """Runs the study, prints its table, writes `surgery.json` into `workdir` and returns what that holds.

    ValueError, before any training, for data without the label or a config without the reward.
    """
    options = options or SurgeryOptions()
    options.check()
    run = build(of_answers(config, config.evaluation.samples))
    _check(run)
    say(describe_run(run))

    seeds = []
    with RunFolder(workdir, config=to_dict(config), fresh=True) as folder:
        for one in of_seeds(run, options.seeds):
            seeds.append(_one_seed(one, folder, options))
            say(_seed_in_words(seeds[-1]))

        lines = summarise(seeds)
        report = {
            "study": "surgery",
            "options": dataclasses.asdict(options),
            "lines": lines,
            "verdict": verdict(lines),
            "seeds": seeds,
            "versions": versions(),
        }
        file = folder.write_json("surgery.json", report)
    say(f"\n{table(lines)}\n\n{report['verdict']}\nfigures {file}")
    return report


def _check(run: Run) -> None:
    for name, examples in (("training", run.dataset.train), ("held-out", run.dataset.test)):
        labels = {example.columns.get(LABEL) for example in examples}
        if labels != {0, 1}:
            raise ValueError(
                f"config.data: the {name} rows have {sorted(map(str, labels))} as `{LABEL}`; each needs 1 for a text "
                "that shows the behaviour and 0 for one that does not, and both must occur"
            )
    rewards = [reward.reward.split(":")[-1] for reward in getattr(run.config.actor, "rewards", ())]
    if LABEL not in rewards:
        raise ValueError(
            f"config.actor.rewards has {', '.join(rewards) or 'none'}; the study needs one named `{LABEL}` that "
            "measures the behaviour in a completion"
        )


def _one_seed(run: Run, folder: RunFolder, options: SurgeryOptions) -> dict[str, Any]:
    """The model of one warm start: its probe, and what each edit comes to."""
    with run.actor, use_mesh(run.mesh):
        params = jax.tree.map(jnp.asarray, warm_up(run, folder))
        train = texts_of(run, list(run.dataset.train)[: options.texts])
        test = texts_of(run, run.dataset.test)
        features = mean_states(run.decoder, params, train, options.probe)
        held_out = mean_states(run.decoder, params, test, options.probe)
        probes = [fit_probe(x, train.labels) for x in features]

        # Labels that say nothing: what a probe reaches by chance.
        rng = np.random.default_rng(run.config.seed)
        chance = rng.permutation(train.labels)
        shuffled = [fit_probe(x, chance) for x in features]
        toward = _directions(run.decoder, params, [probe.direction for probe in probes], options.probe)
        measure = functools.partial(_measure, run, params, _calm(test))
        edits = [measure("none", 0.0, params)]
        for kind, edit in _edits(params, toward, options, rng).items():
            edits += [measure(kind, alpha, edit(alpha=alpha)) for alpha in options.alphas]

    return {
        "seed": run.config.seed,
        "probe_accuracy": _accuracy(probes, held_out, test.labels),
        "shuffled_accuracy": _accuracy(shuffled, held_out, rng.permutation(test.labels)),
        "edits": [dataclasses.asdict(edit) for edit in edits],
    }


def _accuracy(probes: Sequence[Probe], features: np.ndarray, labels: np.ndarray) -> float:
    """That of the worst probe."""
    return min(probe.accuracy(x, labels) for probe, x in zip(probes, features, strict=True))


def _directions(config: DecoderConfig, params: Params, found: Sequence[np.ndarray], probed: ProbedAt) -> Array:
    """At the gates of each layer: of a single direction of the final states, or of one a layer."""
    return gate_directions(config, params, found[0]) if probed == "final" else of_each_layer(params, np.stack(found))


def _edits(params: Params, toward: Array, options: SurgeryOptions, rng: np.random.Generator):
    """Functions from alpha to params, by kind: the paper's, and its controls."""
    gate = gate_columns(params)
    layers, width, inner = gate.shape
    count = max(1, round(layers * inner * options.share))
    anywhere = of_each_layer(params, rng.normal(size=(layers, width)))
    chance = jnp.asarray(rng.choice(layers * inner, count, replace=False))
    cases = {
        "silent neurons": (toward, choose_neurons(gate, toward, count)),
        "firing neurons": (toward, choose_neurons(gate, toward, count, region="firing")),
        "random neurons": (toward, chance),
        "random direction": (anywhere, choose_neurons(gate, anywhere, count)),
    }
    return {
        kind: functools.partial(edited, params, directions, neurons) for kind, (directions, neurons) in cases.items()
    }


def texts_of(run: Run, examples: Sequence[Example]) -> Texts:
    """Prompt and completion of each example as the warm-up learns them."""
    column = run.config.warmup.completion_column
    dialogue = Dialogue(run.tokenizer, chat=run.config.data.chat)
    rows = [demonstration_row(dialogue, e.prompt, e.columns[column], e.id, i).tokens for i, e in enumerate(examples)]
    width = max(map(len, rows))
    mask = np.arange(width) < np.array([len(row) for row in rows])[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(rows)
    return Texts(tokens, mask, np.array([example.columns[LABEL] for example in examples]))


def _calm(texts: Texts) -> Texts:
    return Texts(*(part[texts.labels == 0] for part in texts))


def mean_states(
    config: DecoderConfig, params: Params, texts: Texts, probed: ProbedAt, *, batch: int = 64
) -> Float[np.ndarray, "P N D"]:
    """The states of each text at each of the places that are probed, mean over its tokens, `batch` texts at a time."""
    parts = [
        np.asarray(_mean_states(config, probed, params, texts.tokens[i : i + batch], texts.mask[i : i + batch]))
        for i in range(0, len(texts.tokens), batch)
    ]
    return np.concatenate(parts, axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mean_states(config: DecoderConfig, probed: ProbedAt, params: Params, tokens: Array, mask: Array) -> Array:
    states = _states(config, params, tokens)[None] if probed == "final" else gate_inputs(config, params, tokens)
    return (states.astype(jnp.float32) * mask[..., None]).sum(axis=2) / mask.sum(axis=1, keepdims=True)


def _states(config: DecoderConfig, params: Params, tokens: Array) -> Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    # Padding lies behind a text, which does not see it.
    return hidden_states(config, params, tokens, positions, jnp.full(tokens.shape, tokens.shape[1]))


def reading(
    config: DecoderConfig, params: Params, base: Params, texts: Texts, *, batch: int = 64
) -> tuple[float, float]:
    """Perplexity of `texts` under `params`, and the mean divergence KL(params || base) of a token's distribution, nats;
    the first token of a text, which nothing predicts, is left out."""
    total = np.zeros(3)
    for i in range(0, len(texts.tokens), batch):
        part = texts.tokens[i : i + batch], texts.mask[i : i + batch]
        total += np.asarray(_reading(config, params, base, *part), np.float64)
    loss, divergence, count = total
    return float(np.exp(loss / count)), float(divergence / count)


@functools.partial(jax.jit, static_argnums=0)
def _reading(config: DecoderConfig, params: Params, base: Params, tokens: Array, mask: Array) -> Array:
    new, old = (
        jax.nn.log_softmax(logits(config, weights, _states(config, weights, tokens)[:, :-1]), axis=-1)
        for weights in (params, base)
    )
    weight = mask[:, 1:]
    said = jnp.take_along_axis(new, tokens[:, 1:, None], axis=-1)[..., 0]
    divergence = jnp.sum(jnp.exp(new) * (new - old), axis=-1)
    return jnp.stack([-(said * weight).sum(), (divergence * weight).sum(), weight.sum()])


def _measure(run: Run, base: Params, calm: Texts, kind: str, alpha: float, params: Params) -> Edit:
    """One edited model, which the run's decoder samples with."""
    evaluation = run.config.evaluation
    asked = [example for example in run.dataset.test if example.columns[LABEL]][: evaluation.problems or None]
    run.actor.set_params(params, 0)
    sampled = sampled_answers(run.actor, asked, evaluation)
    results = [result for group in sampled for result in group.results if result.is_valid]
    perplexity, divergence = reading(run.decoder, params, base, calm)
    return Edit(
        kind=kind,
        alpha=alpha,
        rewards={name: float(np.mean([r.components[name] for r in results])) for name in results[0].components},
        perplexity=perplexity,
        divergence=divergence,
    )


def summarise(seeds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each edit, in order: the means over seeds, and the behaviour and the perplexity relative to the model
    without an edit, by seed."""
    lines = []
    for index, first in enumerate(seeds[0]["edits"]):
        edits = [seed["edits"][index] for seed in seeds]
        bases = [seed["edits"][0] for seed in seeds]
        pairs = list(zip(edits, bases, strict=True))
        lines.append(
            {
                "kind": first["kind"],
                "alpha": first["alpha"],
                "rewards": {name: float(np.mean([e["rewards"][name] for e in edits])) for name in first["rewards"]},
                "moved": [e["rewards"][LABEL] - b["rewards"][LABEL] for e, b in pairs],
                "perplexity_ratio": [e["perplexity"] / b["perplexity"] for e, b in pairs],
                "divergence": float(np.mean([e["divergence"] for e in edits])),
            }
        )
    return lines


def verdict(lines: Sequence[dict[str, Any]]) -> str:
    """Whether the paper's edit lowers the behaviour by more than every control does, each at its best alpha, where
    perplexity stays within `SLACK`. An edit that lowers it in no seed-mean counts as 0."""
    best: dict[str, dict[str, Any] | None] = {}
    for line in lines[1:]:
        kept = best.setdefault(line["kind"], None)
        allowed = np.mean(line["perplexity_ratio"]) <= SLACK
        if allowed and (kept is None or np.mean(line["moved"]) < np.mean(kept["moved"])):
            best[line["kind"]] = line
    drops = {kind: min(0.0, float(np.mean(line["moved"]))) if line else 0.0 for kind, line in best.items()}
    own, *controls = drops.items()
    said = ", ".join(f"{kind} {drop:+.3f}" for kind, drop in drops.items())
    beats = all(own[1] < drop for _, drop in controls)
    judgement = "the edit moves it further than every control" if beats else "a control does as well or better"
    return f"largest fall of `{LABEL}` with perplexity within {SLACK - 1:.0%}: {said}; {judgement}"


def table(lines: Sequence[dict[str, Any]]) -> str:
    """A line for each edit; means over seeds."""
    names = list(lines[0]["rewards"])
    rows = [("edit", "alpha", *names, "perplexity", "divergence")]
    for line in lines:
        ratio = float(np.mean(line["perplexity_ratio"]))
        figures = [f"{line['rewards'][name]:.3f}" for name in names]
        rows.append((line["kind"], f"{line['alpha']:+g}", *figures, f"x {ratio:.3f}", f"{line['divergence']:.4f}"))
    return aligned(rows)


def _seed_in_words(seed: dict[str, Any]) -> str:
    base = seed["edits"][0]
    return (
        f"seed {seed['seed']}  probe {seed['probe_accuracy']:.3f} of held-out texts, with shuffled labels "
        f"{seed['shuffled_accuracy']:.3f}; {LABEL} {base['rewards'][LABEL]:.3f}, perplexity {base['perplexity']:.3f}"
    )
