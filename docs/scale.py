"""Draws docs/scale.png and prints the tables of docs/scale.md: two models from 8 to 4,096 devices, simulated.

    python docs/scale.py                # about five minutes on one core
    python docs/scale.py --quick        # the ends of the curves alone, and no picture

Nothing of it is measured: costs are a model's sizes at the data sheet of an H100, of which fixed shares are reached.
"""

import argparse
import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt

from rljax.parallel import CHIPS
from rljax.simulation import Machine, ModelSize, Outcome, Scenario, best_split, costs_of, roll_out, simulate

H100 = Machine(
    flops=CHIPS["h100"].flops,
    bandwidth=CHIPS["h100"].bandwidth,
    memory=float(CHIPS["h100"].memory),
    training_share=0.4,
    decoding_share=0.5,
)
MODELS = {
    "8B": ModelSize(layers=36, width=4096, heads=32, kv_heads=8, head_dim=128, mlp_dim=12288, vocabulary=151936),
    "30B-A3B": ModelSize(
        layers=48,
        width=2048,
        heads=32,
        kv_heads=4,
        head_dim=128,
        mlp_dim=768,
        vocabulary=151936,
        experts=128,
        active_experts=8,
    ),
}
"""Qwen3's published configs. rljax has no mixture of experts; that curve says what one would meet."""

DEVICES = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
STALENESS = (0, 1, 4)
ROWS_A_DEVICE = 32
PROMPT = 512
WORK = Scenario(
    groups=512,
    group_size=16,
    tokens=2048.0,
    tokens_cv=1.0,
    max_tokens=8192,
    judge_s=0.01,
    hand_over_bandwidth=CHIPS["h100"].links,
    network_bandwidth=CHIPS["h100"].links,
    update_fixed_s=2.0,
    checkpoint_every=10,
    checkpoint_stall_s=2.0,
    failures=2e-5,
    restart_s=600.0,
    steps=5000,
    drawn=2,
)
"""A step of 8,192 completions. Failures are those of 16,384 H100s in 54 days (2407.21783, section 3.3.4): 419."""


def outcomes_of(model: ModelSize, devices: int, groups: int) -> dict[int, list[Outcome]]:
    """By staleness, the outcomes of every split that memory allows."""
    found: dict[int, list[Outcome]] = {staleness: [] for staleness in STALENESS}
    for split in range(8):
        bare = dataclasses.replace(WORK, devices=devices, rollout_devices=split, groups=groups)
        # As many rows as memory holds, and no more than there are episodes: empty ones are computed too.
        episodes = -(-groups // bare.hosts) * bare.group_size
        bare = dataclasses.replace(bare, rows=min(ROWS_A_DEVICE * bare.decoding_devices, episodes))
        bare = dataclasses.replace(bare, checkpoint_bandwidth=2e9 * bare.hosts)
        scenario = costs_of(model, bare, H100, prompt=PROMPT, microbatch_tokens=16384)
        try:
            scenario.check()
        except ValueError:
            continue

        rollouts = roll_out(scenario)
        for staleness in STALENESS:
            # Without staleness both sides wait for each other, so that a split only takes devices away.
            if split and not staleness:
                continue
            outcome = simulate(dataclasses.replace(scenario, staleness=staleness), rollouts)
            found[staleness].append(outcome)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 and 4,096 devices, no picture")
    arguments = parser.parse_args()
    sizes = [DEVICES[0], DEVICES[-1]] if arguments.quick else DEVICES

    curves: dict[tuple[str, int, int], list[tuple[int, Outcome]]] = {}
    for name, model in MODELS.items():
        for groups in (512, 4096):
            print(f"\n{name}, {groups} groups of {WORK.group_size} a step")
            print("| devices | in turn | staleness 1 | its split | idle: rollout, training | staleness 4 | lost |")
            print("|---|---|---|---|---|---|---|")
            for devices in sizes:
                splits = outcomes_of(model, devices, groups)
                found = {staleness: best_split(all_of) if all_of else None for staleness, all_of in splits.items()}
                for staleness, outcome in found.items():
                    if outcome is not None:
                        curves.setdefault((name, groups, staleness), []).append((devices, outcome))
                print(row(devices, found), flush=True)
    if not arguments.quick:
        draw(curves)


def row(devices: int, found: dict[int, Outcome | None]) -> str:
    turns, one, four = (found[staleness] for staleness in STALENESS)
    if turns is None or one is None or four is None:
        return f"| {devices} | does not fit | | | | | |"
    cells = [
        f"{devices:,}",
        f"{turns.steps_per_hour:.3g}",
        f"{one.steps_per_hour:.3g}",
        f"{one.scenario.rollout_devices} of 8" if one.scenario.rollout_devices else "all, in turn",
        f"{one.rollout_idle:.0%}, {one.trainer_idle:.0%}",
        f"{four.steps_per_hour:.3g}",
        f"{one.lost:.2%}",
    ]
    return f"| {' | '.join(cells)} |"


def draw(curves: dict[tuple[str, int, int], list[tuple[int, Outcome]]]) -> None:
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.4), sharex=True)
    colors = {0: "tab:gray", 1: "tab:blue", 4: "tab:orange"}
    for (name, groups, staleness), points in curves.items():
        speed, lost = panels[:, list(MODELS).index(name)]
        devices = [count for count, _ in points]
        how = "in turn" if staleness == 0 else f"staleness {staleness}, best split"
        style = {"color": colors[staleness], "linestyle": "-" if groups == 4096 else "--", "marker": "."}
        rate = [outcome.tokens_per_s / count for count, outcome in points]
        speed.plot(devices, rate, label=f"{how}, {groups:,} groups", **style)
        lost.plot(devices, [100 * outcome.lost for _, outcome in points], **style)
        speed.set_title(name)

    for column in range(2):
        panels[0, column].set_ylabel("trained tokens a second and device")
        panels[1, column].set_ylabel("work lost to failures, %")
        panels[1, column].set_xlabel("devices")
        for panel in panels[:, column]:
            panel.set_xscale("log", base=2)
            panel.set_xticks(DEVICES, [f"{count}" for count in DEVICES], fontsize=7)
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=7)
    figure.suptitle("simulated on H100s: 16 completions a group, 2,048 tokens on average, 8,192 at most", fontsize=10)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=80)


if __name__ == "__main__":
    main()
