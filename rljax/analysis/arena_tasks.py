"""The arena's tasks, each with predictions that were written before its runs.

Where a prediction is a factor, it is of `rljax.analysis.snr`: the squared signal to noise of the policy gradient for
each sampled token. At equal tokens a larger one should learn faster; by how much the simulation does not say.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from rljax.advantages import global_and_local, intra_and_inter_tree
from rljax.algorithms import (
    APPO,
    ARPO,
    DAPO,
    DIS,
    FIPO,
    GRPO,
    M2PO,
    OWPO,
    VCPO,
    ActGuideRL,
    AgentRL,
    DecoupledPPO,
    DeepDive,
    DirectionReweighting,
    DivergenceWeighting,
    IcePop,
    NearBoundaryRescue,
    RandomForks,
    ReSum,
    RoleAgent,
    TreeGRPO,
)
from rljax.analysis.arena import Method, Size, Task, pass_rate
from rljax.analysis.arena_configs import (
    errands_config,
    late_config,
    no_restart_config,
    relay_config,
    restart_config,
    sparse_config,
    sums_config,
)
from rljax.analysis.arena_parts import AGAIN, EntropyMask, RandomForksWith, SurprisalForks
from rljax.analysis.arena_recipes import FixedPrompts
from rljax.experiment import Config, LightSAMConfig, MultiTurn, OptimizerConfig, SingleTurn
from rljax.rollouts import Guided


def grpo(samples: int) -> GRPO:
    """GRPO without a reference model."""
    return GRPO(group_size=samples, kl_coef=0.0)


LATE = Task(
    name="late",
    about="Six letters are asked; an answer is 17 certain characters and then a digit for each letter, by a hidden "
    "table. It is worth 1 if all digits are right. At every second place the warm start prefers a wrong digit.",
    prediction="Forks where the policy is uncertain beat forks anywhere, which beat none: all that is to be learned "
    "lies in six of 24 tokens, at the end, and a fork in front of them costs few tokens.",
    config=late_config,
    found="Forks beat no forks in every seed, and a second round of them most. Where they are made and which credit "
    "they get cannot be told apart: the factors are of the gradient at the warm start, where one answer in twenty is "
    "right, and after an eighth of the run nearly half of them are. TreeRL's credit, foreseen below GRPO's on the same "
    "forks, is not.",
    methods=(
        Method("GRPO 8", grpo(8)),
        Method(
            "random forks 4x2",
            RandomForks(4, 2),
            against="GRPO 8",
            claim="1.6 times GRPO's signal to noise for each token",
        ),
        Method(
            "surprisal forks 4x2",
            SurprisalForks(4, 2),
            against="GRPO 8",
            claim="2.3 times (EPTree's forks, 2506.11902, with GRPO's credit)",
            share=1.45,
        ),
        Method(
            "surprisal forks 4x2, TreeRL's credit",
            SurprisalForks(4, 2, credit=global_and_local),
            against="GRPO 8",
            claim="1.7 times; less than GRPO's credit on the same forks",
            share=1.45,
        ),
        Method(
            "surprisal forks 4x2x2",
            SurprisalForks(4, 2, rounds=2),
            against="GRPO 8",
            claim="2.2 times",
            share=1.14,
        ),
        Method(
            "surprisal forks 4x2, Tree-GRPO's credit",
            SurprisalForks(4, 2, credit=intra_and_inter_tree),
            against="GRPO 8",
            claim="2.1 times",
            share=1.45,
        ),
    ),
)


def tree_grpo(chains: int) -> TreeGRPO:
    """Tree-GRPO with two forks a chain, at the beginning of turns but the first: as many tokens as 2 `chains`."""
    return TreeGRPO(chains, 2, kl_coef=0.0, dual_clip=None, expand_from_root=False)


RELAY = Task(
    name="relay",
    about="Eight turns; each shows a letter and wants the digit that it means, by a hidden table. One outcome at the "
    "end: 1 if all eight are right.",
    prediction="Tree-GRPO (2509.21240) helps where chains are few, and its gain falls with their number: +52% signal "
    "to noise for each token at 2 chains' cost, +14% at 4, +8% at 8 (`rljax snr --chances=0.7*8`).",
    config=relay_config,
    found="The gain falls with the number of chains as predicted, 0.013, 0.009 and 0.006, and each is above 0 in every "
    "seed. The last two are level by the margin, and can be told all the same, since both methods of a seed begin from "
    "one warm start. At the end of the run 0.004 to 0.006 are left of each.",
    methods=(
        Method("GRPO 2", grpo(2), share=4.0),
        Method("Tree-GRPO 1x2", tree_grpo(1), against="GRPO 2", claim="+52% at the tokens of 2 chains", share=4.0),
        Method("GRPO 4", grpo(4), share=2.0),
        Method(
            "Tree-GRPO 2x2",
            tree_grpo(2),
            against="GRPO 4",
            expected="level",
            claim="+14% at the tokens of 4 chains: too little to see",
            share=2.0,
        ),
        Method("GRPO 8", grpo(8)),
        Method(
            "Tree-GRPO 4x2", tree_grpo(4), against="GRPO 8", expected="level", claim="+8% at the tokens of 8 chains"
        ),
    ),
)

SUMS = Task(
    name="chain_sum",
    about="Running totals of four one-digit terms, as in reasoning-gym's chain_sum; half of the demonstrations slip at "
    "some step.",
    prediction="The negative control: completions of 5 to 10 tokens, all of them uncertain, leave nothing for forks or "
    "for credit within a completion to tell apart.",
    config=sums_config,
    found="Level, as foreseen: of answers that rise from 0.22 to 0.42, no fork and no credit makes more. If anything "
    "forks make a little less, and credit within a completion less still.",
    methods=(
        # A prompt has few tokens, and four times as many make the steps as large as those of the other tasks.
        Method("GRPO 8", grpo(8), share=4.0),
        Method(
            "random forks 4x2",
            RandomForks(4, 2),
            against="GRPO 8",
            expected="level",
            claim="nothing to tell apart",
            share=4.0,
        ),
        Method(
            "random forks 4x2, Tree-GRPO's credit",
            RandomForksWith(4, 2, credit=intra_and_inter_tree),
            against="GRPO 8",
            expected="level",
            claim="nothing to tell apart",
            share=4.0,
        ),
        Method(
            "random forks 4x2, TreeRL's credit",
            RandomForksWith(4, 2, credit=global_and_local),
            against="GRPO 8",
            expected="level",
            claim="nothing to tell apart",
            share=4.0,
        ),
    ),
)


def mask(fraction: float) -> EntropyMask:
    """The high-entropy mask; 1 masks nothing."""
    return EntropyMask(group_size=8, fraction=fraction, overlong_buffer=0)


CERTAIN_TASK = Task(
    name="certain",
    about="The task `late`, where 6 of 24 tokens are uncertain: what does training on these alone lose?",
    prediction="Nothing at a quarter of the tokens, which holds all uncertain ones; the rest has next to no gradient. "
    "A mask of one token a row leaves out five of six decisions and loses.",
    config=late_config,
    found="Level by the margin, and yet below in every seed, by 0.026 at the end. The certain text is not quite "
    "certain: at the warm start it is right in 94.7% of answers (seeds 0 to 2). A slip in it stands at a place of "
    "little entropy, so that the mask leaves it out, and it is not unlearned.",
    methods=(
        Method("all tokens", mask(1.0)),
        Method(
            "highest quarter of entropy",
            mask(0.25),
            against="all tokens",
            expected="level",
            claim="parity (2506.01939)",
        ),
        Method("one token in 24", mask(1 / 24), against="all tokens", expected="below", claim="loss"),
    ),
)

PASS_RATE = Task(
    name="pass_rate",
    about="The warm start of `late`, without training: is a right answer among the leaves, at equal sampled tokens of "
    "a problem?",
    prediction="Surprisal forks above random forks above independent samples (TreeRL, 2506.11902: 52.4 to 56.9 on "
    "mathematics): forks spend their tokens on the six that are uncertain.",
    config=late_config,
    methods=(
        Method("independent 16", grpo(16)),
        Method("random forks 8x2", RandomForks(8, 2), against="independent 16", claim="above"),
        Method("surprisal forks 8x4", SurprisalForks(8, 4), against="independent 16", claim="above"),
        Method("surprisal forks 8x4, beside random", SurprisalForks(8, 4), against="random forks 8x2", claim="above"),
    ),
    measure=pass_rate,
)


Change = Callable[[Config, Size], Config]
"""What else a method changes of the task's config."""


def stale(steps_of: Callable[[Size], int], *, to_sampler: bool = False) -> Change:
    """Rollouts sampled by weights of so many steps before; `to_sampler` clips ratios to the policy that sampled."""

    def change(config: Config, size: Size) -> Config:
        rollout = dataclasses.replace(config.rollout, staleness=steps_of(size))
        update = dataclasses.replace(config.update, use_sampler_logprobs=to_sampler)
        return dataclasses.replace(config, rollout=rollout, update=update)

    return change


def far(size: Size) -> int:
    """16 steps, or two fifths of the updates where these are fewer."""
    return max(1, min(16, size.updates * 2 // 5))


STALE = Task(
    name="stale",
    about="The task `late`, with rollouts of weights 0, 1, 4 and 16 steps old; where there are fewer than 40 updates, "
    "16 stands for two fifths of them, and 4 for a quarter of that.",
    prediction="Without a correction, clipped to the policy that sampled, learning falls behind with staleness; "
    "corrections hold against it. Which holds best is open.",
    config=late_config,
    found="GRPO that is clipped to the policy that sampled is slow at first and then steady: it ends 0.05 below fresh "
    "rollouts. DecoupledPPO, DIS, IcePop and M2PO are twice as far after an eighth of the run, and break down "
    "later in most seeds, to 0 in many. VCPO alone is as fast as they are and stays whole: its steps grow smaller "
    "where few rows count. It fits that nothing holds the others where they are: with one update for each "
    "rollout a clip around the policy before it never binds, and tokens that are left out, since they have become "
    "far likelier, are answered only by the rollouts of 16 steps later. All have one learning rate, 2e-4; a "
    "smaller one was not tried.",
    methods=(
        Method("GRPO, fresh", grpo(8)),
        Method("GRPO, 1 step", grpo(8), change=stale(lambda size: 1, to_sampler=True)),
        Method("GRPO, 4 steps", grpo(8), change=stale(lambda size: max(1, far(size) // 4), to_sampler=True)),
        Method(
            "GRPO, 16 steps",
            grpo(8),
            against="GRPO, fresh",
            expected="below",
            claim="falls behind",
            change=stale(far, to_sampler=True),
        ),
        *(
            Method(f"{name}, 16 steps", recipe, against="GRPO, 16 steps", claim="holds", change=stale(far))
            for name, recipe in (
                ("DecoupledPPO", DecoupledPPO(group_size=8)),
                ("DIS", DIS(group_size=8)),
                ("IcePop", IcePop(group_size=8, kl_coef=0.0)),
                ("M2PO", M2PO(group_size=8)),
                ("VCPO", VCPO(group_size=8)),
            )
        ),
    ),
)


def resum() -> ReSum:
    """ReSum whose phrase is the mark that starts an answer over; one fork for each of four chains."""
    return ReSum(chains=4, rounds=1, inject=(AGAIN,), detect=(AGAIN,), reward_if_correct=True)


RESTART = Task(
    name="restart",
    about="Six letters, and a digit for each by a hidden table. Half of the demonstrations start over behind `=` after "
    "a doubtful beginning, and are then right more often.",
    prediction="ReSum (2606.13316) sets answers that start over beside those that do not, and so should learn to start "
    "over sooner than GRPO.",
    config=restart_config,
    found="GRPO learns to start over by itself, as soon as ReSum does: from the second look on nearly all of its "
    "answers do, which have 13 tokens; one that does not has 7. What is left to learn are the digits, for "
    "which starting over is of no more use. In the two seeds in which GRPO leaves it off it learns them "
    "fastest; ReSum, whose reward pays for every right answer that starts over, never leaves it off. These "
    "seeds are most of the mean difference; in the other six the two are close.",
    methods=(
        Method("GRPO 8", grpo(8)),
        Method("ReSum 4x1", resum(), against="GRPO 8", claim="above", share=1.33),
    ),
)
NO_RESTART = Task(
    name="restart_unseen",
    about="The same task from demonstrations that never start over: the phrase comes from nowhere, in the middle of an "
    "answer.",
    prediction="ReSum spends half of its rows behind a mark that means nothing to the policy, and falls behind GRPO.",
    config=no_restart_config,
    found="As predicted in every seed, and by as much as where the mark is known (`restart`): what ReSum costs is the "
    "tokens behind the mark, and not that the policy has never seen it.",
    methods=(
        Method("GRPO 8", grpo(8)),
        Method("ReSum 4x1", resum(), against="GRPO 8", expected="below", claim="below", share=1.33),
    ),
)


def guided(config: Config, size: Size) -> Config:
    """Rollouts with the shortest plan that helps, where plain ones all fail."""
    assert isinstance(config.actor, SingleTurn)
    return dataclasses.replace(config, actor=Guided(actor=config.actor, probes=2))


SPARSE = Task(
    name="sparse",
    about="Five letters, and a digit for each by a hidden table, of which the warm start prefers another one: next to "
    "no answer is right. Rows have an action that names all digits but one, which may be shown as a plan.",
    prediction="ActGuide-RL (2605.12004) learns from rollouts that were shown the plan where plain ones all failed; "
    "GRPO has no signal, and does not.",
    config=sparse_config,
    found="As predicted, in every seed: ActGuide-RL ends at 0.89 to 0.96, and no held-out sample of GRPO was ever "
    "right. Half of the seeds are at 0.5 after a third of the run, the slowest two after two thirds. It has a third of "
    "GRPO's prompts a step, since it samples again where all failed; when fewer do it need not, and ends with half of "
    "the tokens.",
    methods=(
        Method("GRPO 8", grpo(8)),
        Method(
            "ActGuide-RL",
            ActGuideRL(group_size=8, kl_coef=0.0),
            against="GRPO 8",
            claim="learns where GRPO does not",
            share=0.36,
            change=guided,
        ),
    ),
)

UPDATES_OF_ROLLOUT = 4
"""Of the task `moved`."""


def several_updates(config: Config, size: Size) -> Config:
    """Each rollout in minibatches of its own, so that the policy has moved when the later ones are learned from."""
    return dataclasses.replace(config, update=dataclasses.replace(config.update, minibatches=UPDATES_OF_ROLLOUT))


MOVED = Task(
    name="moved",
    about=f"The task `late`, with {UPDATES_OF_ROLLOUT} updates for each rollout: when the later ones are made, the "
    "policy has moved away from the one that sampled, which is what weights of tokens look at. All have DAPO's loss "
    "and clip, without its dynamic sampling.",
    prediction="The papers report each of these weights above DAPO. Little is to be seen of it here: they change a "
    "token's step by a fifth at most and turn none round, and Adam takes away what all tokens have in common.",
    config=late_config,
    found="As predicted, none can be told from DAPO, whose runs end at 0.82 to 0.94. Rescue comes nearest to it: it is "
    "below in seven seeds, by 0.018, which is too little beside four other comparisons. What differs most are falls of "
    "single runs, which four updates of one rollout bring about now and then, DAPO's too: rescue falls in seeds 2 and "
    "4, to 0 in the latter, direction reweighting in seeds 0 and 3, and all come back but one of divergence weights, "
    "in seed 5. That run is all of its mean difference.",
    methods=(
        Method("DAPO 8", FixedPrompts(DAPO(group_size=8)), change=several_updates),
        *(
            Method(name, FixedPrompts(recipe), against="DAPO 8", claim=f"as in {paper}", change=several_updates)
            for name, recipe, paper in (
                ("FIPO", FIPO(group_size=8), "2603.19835"),
                # Half a dozen references in a run.
                ("OWPO", OWPO(group_size=8, refresh_every=20), "2605.22156"),
                ("near-boundary rescue", NearBoundaryRescue(group_size=8), "2605.22703"),
                ("direction reweighting", DirectionReweighting(group_size=8), "2603.22117"),
                ("divergence weights", DivergenceWeighting(group_size=8), "2603.22446"),
            )
        ),
    ),
)


def acting(**fields: Any) -> Change:
    """`fields` of the actor over turns."""

    def change(config: Config, size: Size) -> Config:
        assert isinstance(config.actor, MultiTurn)
        return dataclasses.replace(config, actor=dataclasses.replace(config.actor, **fields))

    return change


ERRANDS = Task(
    name="errands",
    about="Three letters, or one: an agent asks for a digit a turn, saying which it expects, and answers with all of "
    "them. One demonstration in five asks for all that it answers; others ask for the same again, or guess.",
    prediction="To ask before answering is quickly learned, by all. Turns of one state stand beside each other in "
    "Role-Agent's and GiGPO's credit, which should find the turn that guesses sooner than one outcome does.",
    config=errands_config,
    found="Learned by all: an eighth of the run brings most of it, and six seeds end at 0.96 to 0.99. What is left for "
    "a method is little: GiGPO's credit is above one outcome's by 0.004, too little beside four other comparisons, and "
    "AgentRL's normalisation, its older weights and DeepDive's penalty are level. Role-Agent's returns of what was "
    "foreseen cost 0.008 of GiGPO's score, in every seed. It fits that a third of the digits cannot be foreseen: "
    "that is the house's luck, and noise to what asking is worth.",
    methods=(
        Method("GRPO 8", grpo(8)),
        Method("AgentRL", AgentRL(group_size=8, kl_coef=0.0), against="GRPO 8", claim="as in 2510.04206"),
        Method(
            "AgentRL, a quarter of turns by older weights",
            AgentRL(group_size=8, kl_coef=0.0),
            against="AgentRL",
            claim="cross-policy sampling, 2510.04206",
            change=acting(stale_share=0.25, stale_every=5),
        ),
        Method("DeepDive", DeepDive(group_size=8), against="GRPO 8", claim="as in 2509.10446"),
        Method(
            "GiGPO",
            RoleAgent(group_size=8, kl_coef=0.0),
            against="GRPO 8",
            claim="as in 2505.10978",
            change=acting(make="rljax.analysis.arena_errands:Unforeseen"),
        ),
        Method(
            "Role-Agent",
            RoleAgent(group_size=8, kl_coef=0.0),
            against="GiGPO",
            claim="returns of what was foreseen, 2606.10917",
        ),
    ),
)

ERRANDS_FORKS = Task(
    name="errands_forks",
    about="The task `errands`, for agents that fork: where a turn begins with more entropy, or where a token has "
    "proved to matter.",
    prediction="An episode has few turns, and what is uncertain is the first token of each: call or answer. Forks "
    "there share little and find what independent episodes find. Level, whatever the papers report.",
    config=errands_config,
    found="As predicted, level to 0.001, at a quarter more prompts a step than GRPO: forks share a fifth of the "
    "tokens. With as many prompts as GRPO they were above it at equal tokens, ARPO by 0.011 in every seed: by more "
    "updates for each token, and not by forks.",
    methods=(
        Method("GRPO 8", grpo(8)),
        Method("ARPO", ARPO(chains=4, window=1), against="GRPO 8", claim="as in 2507.19849", share=1.25),
        Method("APPO", APPO(chains=4, half_life=8.0), against="GRPO 8", claim="as in 2606.12384", share=1.25),
    ),
)


def optimized(optimizer: type[OptimizerConfig] = OptimizerConfig, *, rates: int = 1, **fields: Any) -> Change:
    """Another optimizer with the betas and clip of the task's own, at `rates` times its learning rate."""

    def change(config: Config, size: Size) -> Config:
        rate = rates * config.optimizer.learning_rate
        return dataclasses.replace(config, optimizer=optimizer(learning_rate=rate, **fields))

    return change


FAR_RATE = 8
"""Times the learning rate of the others, of the task `rates`."""
RADIUS = 1e-3
"""Of LightSAM's second gradient there, of each weight: five steps of the optimizer."""

RATES = Task(
    name="rates",
    about=f"The task `late` with GRPO, and optimizers: as it is, and with {FAR_RATE} times the learning rate.",
    prediction="LightSAM (2505.24399) converges at any learning rate and radius, which AdamW does not, and finds "
    "flatter places. Flatness should bring nothing here, where every rollout is of problems not seen before and is "
    "learned from once. Its steps are as long as AdamW's, so that a rate too high for one is too high for both.",
    config=late_config,
    found="The farther away it looks, the worse. Half a step away LightSAM learns nearly as AdamW does, a little less "
    "in every seed; five steps away it ends 0.48 below, half of its runs at nothing, and forty steps away all of them "
    "do. What is proved of it is proved of one fixed function. Here a minibatch was drawn by the policy at the "
    "weights, and uphill another policy has other ratios, which clipping bounds on one side alone. Eight times the "
    "rate breaks both.",
    methods=(
        Method("AdamW", grpo(8)),
        Method(
            "LightSAM",
            grpo(8),
            against="AdamW",
            claim="flatter (2505.24399), at twice the gradients",
            change=optimized(LightSAMConfig, rho=RADIUS),
        ),
        Method(
            "LightSAM, 8 times the radius",
            grpo(8),
            against="LightSAM",
            expected="level",
            claim="any radius converges (2505.24399)",
            change=optimized(LightSAMConfig, rho=8 * RADIUS),
        ),
        Method(
            "LightSAM, a tenth of the radius",
            grpo(8),
            against="AdamW",
            expected="level",
            claim="near AdamW, half of a step away",
            change=optimized(LightSAMConfig, rho=RADIUS / 10),
        ),
        Method(
            f"AdamW, {FAR_RATE} times the rate",
            grpo(8),
            against="AdamW",
            expected="below",
            claim="breaks down",
            change=optimized(rates=FAR_RATE),
        ),
        Method(
            f"LightSAM, {FAR_RATE} times the rate",
            grpo(8),
            against=f"AdamW, {FAR_RATE} times the rate",
            claim="any rate converges (2505.24399)",
            change=optimized(LightSAMConfig, rates=FAR_RATE, rho=RADIUS),
        ),
    ),
)

TASKS = {
    task.name: task
    for task in (
        LATE,
        RELAY,
        SUMS,
        CERTAIN_TASK,
        SPARSE,
        RESTART,
        NO_RESTART,
        STALE,
        MOVED,
        ERRANDS,
        ERRANDS_FORKS,
        RATES,
        PASS_RATE,
    )
}
"""All tasks, by name."""
