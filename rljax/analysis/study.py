"""What `rljax study` does: a trained policy beside the base that it came from.

Three studies, each a function of a `Pair`: where the policy has moved (2603.22446), what accuracy does when single
tokens change hands (cross-sampling, 2603.22446), and what extrapolating the move brings (2603.22117).
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from rljax.analysis import two_models
from rljax.analysis.arms import (
    Arm,
    Decoding,
    Pair,
    arms_table,
    describe_answers,
    evaluation_sampling,
    held_out_examples,
)
from rljax.analysis.shifts import RARE, TAILS, ShiftSummary, summarize_shifts, token_shifts
from rljax.analysis.two_models import at_random, divergence_above, entropy_above, redraw_where_shifted, switch_where
from rljax.evaluation.evaluate import EVALUATION_STEP
from rljax.experiment.build import Run, build, stack_rows
from rljax.experiment.config import Config, to_dict
from rljax.experiment.evaluate import checkpoint_params, of_answers, run_checkpoints
from rljax.experiment.report import aligned, describe_run, say
from rljax.parallel import use_mesh
from rljax.plans import RolloutPlan
from rljax.rollouts import SingleTurn, collect
from rljax.tasks import Example
from rljax.training import writable_file
from rljax.types import Trajectory

STUDIES = ("shifts", "cross", "extrapolate")


@dataclasses.dataclass
class StudyOptions:
    """What the studies ask beyond the config."""

    threshold: float = 0.1
    """Divergence (nats) above which a token counts as one where the models differ. Below 0 is every token."""
    budget: int | None = None
    """Most interventions of a completion in cross-sampling; None is no limit."""
    entropy: float | None = None
    """Adds a control to cross-sampling: interventions where the first model's entropy (nats) is above this."""
    tau: float = -0.3
    """Extrapolation redraws a token whose log-prob has fallen by this much from base to policy, nats."""
    gamma: float = 0.1
    """How far extrapolation goes beyond the policy; 0 is the policy itself. The paper takes 0.05 to 0.1."""

    def check(self) -> None:
        """Raises a ValueError of one line for a value that cannot be."""
        if not self.threshold < math.log(2):
            raise ValueError(
                f"--threshold={self.threshold} is never passed: the divergence is at most ln 2 = 0.693; take e.g. 0.1"
            )
        if self.budget is not None and self.budget < 0:
            raise ValueError(f"--budget={self.budget} must be at least 0; leave it out for no limit")
        if self.entropy is not None and not math.isfinite(self.entropy):
            raise ValueError(f"--entropy={self.entropy} must be a number of nats")
        if not math.isfinite(self.tau):
            raise ValueError(f"--tau={self.tau} must be finite, e.g. -0.3")
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"--gamma={self.gamma} must be at least 0 and finite, e.g. 0.1")


@dataclasses.dataclass(frozen=True)
class CrossSampling:
    """Accuracy when single tokens come from the other model."""

    into_base: list[Arm]
    """The base's completions with the policy's tokens in them: no intervention, by divergence, then the controls."""
    into_policy: list[Arm]
    """The policy's completions with the base's tokens in them."""


@dataclasses.dataclass(frozen=True)
class Extrapolation:
    """Accuracy when tokens from which the policy has turned away are drawn again."""

    arms: list[Arm]
    """The base and the policy alone; the base's tokens redrawn from the policy, and from beyond it; the policy's tokens
    redrawn from beyond it."""


def study(
    config: Config,
    name: str,
    *,
    checkpoint: str,
    step: int | None = None,
    base: str | None = None,
    base_step: int | None = None,
    options: StudyOptions | None = None,
    json_file: str | None = None,
) -> ShiftSummary | CrossSampling | Extrapolation:
    """Runs one of `STUDIES` on the held-out examples of `config`, prints its table and returns its result.

    The policy is the checkpoint of the run folder `checkpoint`. The base is that of the run folder `base`, or the
    config's initial model. A step of None is the newest. `config.evaluation` says how examples are answered.
    ValueError, before weights load, for what cannot work.
    """
    options = options or StudyOptions()
    check_study(config, name, options)
    if json_file:
        writable_file(json_file, "json")
    # A folder without checkpoints is refused before a run is built.
    for folder in (checkpoint, base):
        if folder is not None:
            run_checkpoints(folder)

    run = build(of_answers(config, config.evaluation.samples))
    say(describe_run(run))

    with run.actor, use_mesh(run.mesh):
        pair = load_pair(run, checkpoint, step, base, base_step)
        say(f"base   {_base_in_words(config, base)}\npolicy step {pair.step} of {checkpoint}")
        say(f"asked  {describe_answers(run)}\n")

        result: ShiftSummary | CrossSampling | Extrapolation
        if name == "shifts":
            result = study_shifts(pair, options)
            say(shift_table(result, options))
        elif name == "cross":
            result = study_cross_sampling(pair, options)
            say(arms_table("policy's tokens in the base", result.into_base) + "\n")
            say(arms_table("base's tokens in the policy", result.into_policy))
        else:
            result = study_extrapolation(pair, options)
            say(arms_table("extrapolation", result.arms))

    if json_file:
        report = {
            "study": name,
            "checkpoint": checkpoint,
            "step": pair.step,
            "base": base,
            "options": dataclasses.asdict(options),
            "evaluation": to_dict(config.evaluation),
            "max_new_tokens": config.sampling.max_new_tokens,
            "result": dataclasses.asdict(result),
        }
        # Answers may hold half characters, which are escaped: in JSON they mean the same.
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        Path(json_file).write_bytes(text.encode("utf-8", "backslashreplace"))
    return result


def check_study(config: Config, name: str, options: StudyOptions) -> None:
    """Raises ValueError for a study that cannot be made of this config."""
    if name not in STUDIES:
        raise ValueError(f"--study={name} is none of {', '.join(STUDIES)}")
    options.check()
    if name != "shifts" and not isinstance(config.actor, SingleTurn):
        raise ValueError(
            f"--study={name} decodes answers of one turn and rewards their texts, so it needs "
            f"config.actor=SingleTurn(...), not {type(config.actor).__name__}; --study=shifts takes every actor"
        )


def load_pair(run: Run, checkpoint: str, step: int | None, base: str | None, base_step: int | None) -> Pair:
    """Both models on the mesh of `run`, as `study` names them."""
    policy, step = checkpoint_params(run, checkpoint, step)
    of_base = run.initial_params() if base is None else checkpoint_params(run, base, base_step)[0]
    return Pair(run=run, base=of_base, policy=policy, step=step)


def study_shifts(pair: Pair, options: StudyOptions) -> ShiftSummary:
    """The policy answers; both models read what it said (2603.22446, first part). Any actor."""
    run = pair.run
    sampling = evaluation_sampling(run)
    batch = stack_rows(run.config, _policy_rows(pair))
    measure = jax.jit(
        lambda base, policy, tokens: token_shifts(
            run.decoder, base, policy, tokens, sampling, vocab_size=run.tokenizer.vocab_size
        )
    )

    # Hidden states of all rows at once would not fit; what comes back is a few numbers a token.
    size = run.config.evaluation.batch_prompts * run.config.evaluation.samples
    parts = [
        jax.device_get(measure(pair.base, pair.policy, batch.tokens[start : start + size]))
        for start in range(0, len(batch.tokens), size)
    ]
    shifts = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    return summarize_shifts(shifts, batch.action_mask, threshold=options.threshold)


def study_cross_sampling(pair: Pair, options: StudyOptions) -> CrossSampling:
    """Cross-sampling in both directions beside its controls (2603.22446, second part)."""
    decoding = Decoding(pair.run)
    sampling = decoding.sampling

    # One of each for both directions: a rule is what a program is compiled for.
    def by_divergence(level):
        return switch_where(divergence_above(level), sampling, budget=options.budget)

    def by_chance(level):
        return switch_where(at_random(level), sampling)

    def by_entropy(level):
        return switch_where(entropy_above(level), sampling, budget=options.budget)

    def direction(first, second) -> list[Arm]:
        alone = decoding.answer("no interventions", by_chance, 0.0, first, second)
        name = f"divergence above {options.threshold:g}"
        switched = decoding.answer(name, by_divergence, options.threshold, first, second)
        # As many interventions as the criterion made within its budget, wherever they fall.
        control = decoding.answer("as many at random", by_chance, switched.share, first, second)
        arms = [alone, switched, control]
        if options.entropy is not None:
            name = f"entropy above {options.entropy:g}"
            arms.append(decoding.answer(name, by_entropy, options.entropy, first, second))
        return arms

    return CrossSampling(
        into_base=direction(pair.base, pair.policy),
        into_policy=direction(pair.policy, pair.base),
    )


def study_extrapolation(pair: Pair, options: StudyOptions) -> Extrapolation:
    """Test-time extrapolation where the policy has turned away from the token drawn, in both forms of 2603.22117.

    Beside it: both models alone, and the paper's token replacement, which is the same redraw with gamma 0.
    """
    decoding = Decoding(pair.run)
    sampling = decoding.sampling
    beyond = f"redrawn at gamma {options.gamma:g}"

    def alone(level):
        return switch_where(at_random(level), sampling)

    def base_drafts(gamma):
        return redraw_where_shifted(sampling, tau=options.tau, redraw=two_models.extrapolated(gamma))

    def policy_drafts(gamma):
        redraw = two_models.extrapolated(gamma)
        return redraw_where_shifted(sampling, tau=options.tau, redraw=redraw, draft=two_models.policy)

    return Extrapolation(
        [
            decoding.answer("base", alone, 0.0, pair.base, pair.policy),
            decoding.answer("policy", alone, 0.0, pair.policy, pair.base),
            decoding.answer("base, redrawn from policy", base_drafts, 0.0, pair.base, pair.policy),
            decoding.answer(f"base, {beyond}", base_drafts, options.gamma, pair.base, pair.policy),
            decoding.answer(f"policy, {beyond}", policy_drafts, options.gamma, pair.base, pair.policy),
        ]
    )


def shift_table(summary: ShiftSummary, options: StudyOptions) -> str:
    """The summary, a line for each number."""
    quantiles = " ".join(f"{x:+.3f}" for x in summary.signed_quantiles)
    levels = ", ".join(f"{level:.0%}" for level in TAILS)
    profile = " ".join("-" if x is None else f"{x:.3f}" for x in summary.profile)
    rows = [
        ("policy beside base, on the policy's tokens", ""),
        ("tokens", f"{summary.tokens:,}"),
        ("divergence, mean (nats)", f"{summary.divergence_mean:.4f}"),
        (f"tokens of divergence above {options.threshold:g}", f"{summary.high_share:.1%}"),
        ("  of these: policy's favourite is the base's", f"{summary.same_favourite:.1%}"),
        ("  ... is among the base's first three", f"{summary.in_base_top3:.1%}"),
        (f"  ... has less than {RARE:.0%} in the base", f"{summary.rare_in_base:.1%}"),
        ("log p_policy - log p_base, mean (nats)", f"{summary.signed_mean:+.4f}"),
        (f"  at {levels} of tokens", quantiles),
    ]
    return f"{aligned(rows)}\n\ndivergence from the start of a response to its end (nats)\n  {profile}"


def _policy_rows(pair: Pair) -> list[Trajectory]:
    """The policy's answers to the held-out examples, as `config.evaluation` asks for them."""
    run = pair.run
    evaluation = run.config.evaluation
    run.actor.set_params(pair.policy, pair.step)
    actor = run.actor.for_evaluation(evaluation_sampling(run))
    plan = RolloutPlan(group_size=evaluation.samples)

    rows: list[Trajectory] = []
    examples = iter(held_out_examples(run))
    while batch := list(itertools.islice(examples, evaluation.batch_prompts)):
        rollout = collect(actor, plan, _giving(batch), len(batch), EVALUATION_STEP)
        rows += rollout.trajectories
    return rows


def _giving(examples: Sequence[Example]) -> Callable[[int], Sequence[Example]]:
    """What `collect` draws from: the first ones of `examples`."""
    return lambda n: examples[:n]


def _base_in_words(config: Config, base: str | None) -> str:
    if base is not None:
        return f"checkpoint of {base}"
    if config.warmup.steps:
        return (
            f"the config's initial model, before its {config.warmup.steps} warm-up steps; --base=FOLDER takes the "
            "checkpoint of `rljax sft`, which does these steps alone"
        )
    return "the config's initial model"
