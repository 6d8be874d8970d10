"""A run on a cluster that is not here, simulated: what the config, compiled programs and measured runs say of it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from rljax.experiment.build import Run, build
from rljax.experiment.config import Config, actor_of
from rljax.experiment.dry_run import check_run, print_plan
from rljax.experiment.memory import Compiled, bytes_of
from rljax.experiment.report import aligned, say
from rljax.parallel import Chip, chip_of, is_main_process, num_processes, traffic
from rljax.simulation import (
    Measured,
    Outcome,
    Scenario,
    best_split,
    calibrated,
    read_run,
    replaced,
    simulate_splits,
    with_values,
)

REACHED = 0.5
"""Share of its roofline that a compiled program is assumed to reach on a device."""
FLAG = "--assume"


@dataclasses.dataclass
class Sourced:
    """A scenario under construction, and where each of its numbers comes from."""

    scenario: Scenario
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    """By field; a field that is not here has its default."""

    def take(self, source: str, **values: int | float) -> None:
        self.scenario = replaced(self.scenario, **values)
        self.sources |= dict.fromkeys(values, source)


def print_simulation(
    config: Config, *, topology: str = "", measured: str = "", assumed: Sequence[str] = ()
) -> list[Outcome]:
    """Simulates a run of `config` for every split of the hosts' devices, prints and returns what comes of each.

    Costs come from the programs of the run compiled for `topology` (as `print_plan` does), from the run in the folder
    `measured`, or from both: what was measured goes before what was compiled. `assumed` are texts `field=value` of
    `Scenario`, which go before all. ValueError for a text that is no such thing, where nothing says what a step costs,
    for a split that cannot be, and where simpy is not installed.
    """
    values = _values(assumed)
    if not (topology or measured or {"step_s", "update_s"} <= values.keys()):
        raise ValueError(
            "--simulate lacks the costs of a step: add --topology=h100:64 (compiled programs), --measured=runs/x (a "
            f"run that was made), or {FLAG}=step_s=... and {FLAG}=update_s=..."
        )
    # A mistake in a flag should not wait for a compiler.
    with_values(Scenario(), values, FLAG)
    found = read_run(measured, config.algorithm.build().plan.group_size) if measured else None

    if topology:
        plan = print_plan(config, topology=topology)
        run, programs = plan["run"], plan["compiled"]
    else:
        run, programs = build(config), []
        check_run(run)

    sourced = scenario_of(run, programs, found, values)
    say("\nsimulated\n" + describe_scenario(sourced))
    outcomes = simulate_splits(sourced.scenario)
    if is_main_process():
        print("\n" + describe_outcomes(outcomes))
    return outcomes


def _values(assumed: Sequence[str]) -> dict[str, str]:
    """The fields and values of texts `field=value`."""
    values = {}
    for text in assumed:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{FLAG}={text} must be field=value, such as {FLAG}=devices=512")
        values[name] = value
    return values


def scenario_of(
    run: Run, programs: Sequence[Compiled], measured: Measured | None, values: Mapping[str, str]
) -> Sourced:
    """The scenario of a run: what its config says, then its compiled programs, a measured run, and given values.

    ValueError for a run by engines in other processes, of which no program is compiled here, where nothing says what
    their steps take.
    """
    if not run.actor.decoders and measured is None and "step_s" not in values:
        raise ValueError(
            "--simulate cannot compile engines in other processes: add --measured=runs/x (a run that was made), or "
            f"{FLAG}=step_s=..."
        )
    sourced = Sourced(Scenario())
    _from_config(run, sourced)
    chip = chip_of(run.mesh.devices.flat[0])
    if programs and chip is not None:
        _from_programs(run, programs, chip, sourced)

    # What is given shapes the rollouts that the measured seconds are explained by, as far as it is no cost.
    sourced.scenario = with_values(sourced.scenario, dict(values), FLAG)
    if measured is not None:
        _from_measured(run, measured, sourced)
        sourced.scenario = with_values(sourced.scenario, dict(values), FLAG)
    sourced.sources |= dict.fromkeys(values, FLAG)
    return sourced


def _from_config(run: Run, sourced: Sourced) -> None:
    """Schedule, sizes and bytes: known without a device."""
    config = run.config
    hosts = num_processes(run.mesh)
    # Those of the rollouts' own are none of the mesh that trains.
    devices = run.mesh.devices.size + hosts * config.rollout.devices
    plans = [decoder.plan() for decoder in run.actor.decoders]
    state = run.learner.abstract_state()
    saved = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(state))
    actor = actor_of(config)
    limits = getattr(actor, "limits", None)

    sourced.take(
        "config",
        devices=devices,
        devices_per_host=devices // hosts,
        rollout_devices=config.rollout.devices,
        staleness=config.rollout.staleness,
        groups=config.prompts_per_step,
        group_size=run.algorithm.plan.group_size,
        groups_in_flight=getattr(actor, "groups_in_flight", 0),
        engines=len(getattr(actor, "engines", ())),
        max_tokens=config.sampling.max_new_tokens,
        hand_over_bytes=sum(bytes_of(plan.weights) for plan in plans),
        checkpoint_every=config.checkpoint.every,
        checkpoint_bytes=saved,
    )
    # Engines in other processes hold as many as they do.
    if plans:
        sourced.take("config", rows=max(sum(plan.rows for plan in plans) // num_processes(run.rollout_mesh), 1))
    # What the policy will say is not known before it speaks.
    sourced.take("half of config.sampling.max_new_tokens", tokens=config.sampling.max_new_tokens / 2)
    if limits is not None:
        sourced.take("config.actor.limits", turns=float(limits.turns))
        sourced.take("turns are told with their texts", trajectory_bytes=40.0)


def _from_programs(run: Run, programs: Sequence[Compiled], chip: Chip, sourced: Sourced) -> None:
    """Seconds from the rooflines of compiled programs, bytes from their collectives."""
    training_devices = run.mesh.devices.size
    decoding_devices = run.rollout_mesh.devices.size
    update = run.config.update
    minibatches = update.minibatches * update.epochs
    times = {"update": minibatches, "score": update.minibatches, "critic": minibatches}

    trained = [program for program in programs if program.phase in times]
    seconds = sum(times[one.phase] * one.bound.seconds for one in trained if one.bound)
    sent = sum(times[one.phase] * sum(traffic(one.collectives).values()) for one in trained)
    reached = f"compiled, at {REACHED:g} of the roofline"
    sourced.take(reached, update_s=seconds * training_devices / REACHED)

    plans = [decoder.plan() for decoder in run.actor.decoders]
    if plans:
        decoding = [one.bound.seconds for one in programs if one.name.startswith("decode") and one.bound]
        prefill = [one.bound.seconds for one in programs if one.name.startswith(("prefill", "extend")) and one.bound]
        prompts = max(plans[0].prefill[0], 1)
        # A step takes this long however few rows it has; what it takes beyond grows with the rows of a device.
        weights_s = sum(bytes_of(plan.weights) for plan in plans) / chip.bandwidth
        fixed = min(weights_s, sum(decoding))
        rows = max(sum(plan.rows for plan in plans) / decoding_devices, 1)
        sourced.take(
            reached,
            step_s=fixed / REACHED,
            step_row_s=(sum(decoding) - fixed) / rows / REACHED,
            prefill_s=sum(prefill) * decoding_devices / prompts / REACHED,
        )

    sourced.take("compiled collectives", update_bytes=sent)
    sourced.take("data sheet", network_bandwidth=chip.links, hand_over_bandwidth=chip.links)
    state = bytes_of(run.learner.abstract_state()) * training_devices
    sourced.take("state in half of the memory", least_trainers=max(math.ceil(state / (chip.memory / 2)), 1))


def _from_measured(run: Run, measured: Measured, sourced: Sourced) -> None:
    """Seconds of a run that was made, spread over its own devices."""
    own = measured.devices
    ahead = sourced.scenario.groups * sourced.scenario.group_size
    # Work of device and host grows with the samples of a step.
    larger = ahead / measured.samples
    training = own - measured.processes * measured.rollout_devices
    source = f"measured, {measured.steps} steps"

    sourced.take(
        source,
        tokens=measured.tokens,
        tokens_cv=measured.tokens_cv,
        turns=measured.turns,
        judge_s=measured.reward_s * measured.processes / measured.samples,
        update_s=measured.update_s * training * larger,
        update_fixed_s=measured.other_s * larger,
        # Within what was measured.
        update_bytes=0.0,
        prefill_s=0.0,
        hand_over_bytes=0.0,
    )
    there = dataclasses.replace(
        sourced.scenario,
        devices=own,
        devices_per_host=max(own // measured.processes, 1),
        rollout_devices=measured.rollout_devices,
        engines=measured.engines,
        groups=max(measured.samples // sourced.scenario.group_size, 1),
    )
    sourced.take(source, step_s=calibrated(there, measured.sample_s).step_s)


def describe_scenario(sourced: Sourced) -> str:
    """Every number of a scenario and where it comes from."""
    rows = [("number", "value", "from")]
    for one in dataclasses.fields(Scenario):
        value = getattr(sourced.scenario, one.name)
        shown = f"{value:d}" if isinstance(value, int) else f"{value:.4g}"
        rows.append((one.name, shown, sourced.sources.get(one.name, "assumed")))
    return aligned(rows)


def _without_split(scenario: Scenario) -> str:
    """Where rollouts are made that have no devices of their own."""
    if scenario.engines:
        return f"engines, {'beside' if scenario.is_beside else 'in turn'}"
    return "all, in turn"


def describe_outcomes(outcomes: Sequence[Outcome]) -> str:
    """A line for each split, and which of them is best."""
    head = ("rollout devices", "steps/hour", "tokens/s", "step s", "rollout s", "update s", "idle: rollout", "training")
    rows = [(*head, "empty rows", "lost", "checkpoint")]

    # Engines are devices of none of the hosts, so that a run by them has one split.
    for one in outcomes:
        count = one.scenario.rollout_devices
        rows.append(
            (
                f"{count} of {one.scenario.local_devices}" if count else _without_split(one.scenario),
                f"{one.steps_per_hour:.4g}",
                f"{one.tokens_per_s:.4g}",
                f"{one.step_s:.4g}",
                f"{one.rollout_s:.4g}",
                f"{one.update_s:.4g}",
                f"{one.rollout_idle:.1%}",
                f"{one.trainer_idle:.1%}",
                f"{one.empty_rows:.1%}",
                f"{one.lost:.2%}",
                f"{one.writing:.2%}",
            )
        )

    best = best_split(outcomes)
    ages = ", ".join(f"{share:.1%} at {age}" for age, share in best.staleness.items())
    return "\n".join(
        [
            "a split of each host's devices",
            aligned(rows),
            "",
            f"best: config.rollout.devices={best.scenario.rollout_devices}, {best.steps_per_hour:.4g} steps/hour, "
            f"{best.failures} failures in {best.scenario.steps} steps",
            f"staleness of its updates: {ages}",
        ]
    )
