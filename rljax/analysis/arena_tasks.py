"""The arena's tasks, each with predictions that were written before its runs.

Where a prediction is a factor, it is of `rljax.analysis.snr`: the squared signal to noise of the policy gradient for
each sampled token. At equal tokens a larger one should learn faster; by how much the simulation does not say.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rljax.advantages import global_and_local, intra_and_inter_tree
from rljax.algorithms import DIS, GRPO, M2PO, VCPO, ActGuideRL, DecoupledPPO, IcePop, RandomForks, ReSum, TreeGRPO
from rljax.analysis.arena import SEQUENCE_ROWS, Method, Size, Task, pass_rate
from rljax.analysis.arena_parts import (
    AGAIN,
    CERTAIN,
    LATE_ALPHABET,
    RELAY_ALPHABET,
    RESTART_ALPHABET,
    SPARSE_ALPHABET,
    SPARSE_LENGTH,
    TURNS,
    EntropyMask,
    RandomForksWith,
    SurprisalForks,
    after_restart,
    late_demonstrations,
    miscounted,
    never_restarting,
    relay_demonstrations,
    restarting,
    sparse_demonstrations,
)
from rljax.experiment import (
    CheckpointConfig,
    Config,
    EnvironmentLimits,
    EvaluationConfig,
    FreshModel,
    MultiTurn,
    OptimizerConfig,
    ReasoningGymData,
    RewardConfig,
    RowsData,
    SamplingConfig,
    SingleTurn,
    UpdateConfig,
    WarmupConfig,
)
from rljax.rollouts import Guided
from rljax.tasks import DataSource, Example, final_number

ROWS = 8000
"""Training rows of a task."""


class Shape(NamedTuple):
    """What a task's texts and training are like."""

    length: int
    """Most tokens of a prompt and its completion, or of an episode."""
    new_tokens: int
    """Most tokens of a completion, or of a turn."""
    warmup: int
    """Supervised steps at full size."""
    learning_rate: float


def character_config(
    size: Size,
    alphabet: str,
    data: DataSource,
    actor: SingleTurn | MultiTurn,
    demonstrations: Callable[[Sequence[Example]], list[Example]],
    shape: Shape,
) -> Config:
    """A run of a character model of 0.35M parameters."""
    steps = max(1, round(shape.warmup * size.warmup))

    packed = SEQUENCE_ROWS * shape.length
    return Config(
        name="arena",
        steps=size.updates,
        prompts_per_step=size.prompts,
        model=FreshModel(
            alphabet=alphabet,
            num_layers=size.layers,
            embed_dim=96,
            num_heads=3,
            num_kv_heads=3,
            mlp_dim=288,
        ),
        data=data,
        actor=actor,
        algorithm=GRPO(group_size=8, kl_coef=0.0),
        sampling=SamplingConfig(max_new_tokens=shape.new_tokens),
        update=UpdateConfig(
            pack_length=packed,
            microbatch_size=4,
            length_buckets=(packed,),
            score_buckets=(packed,),
            head_chunk=2048,
            # Early in training whole steps may have no signal, and they belong to the curve.
            max_empty=size.updates + 1,
        ),
        optimizer=OptimizerConfig(learning_rate=shape.learning_rate),
        warmup=WarmupConfig(
            steps=steps,
            batch_size=128,
            demonstrations=demonstrations,
            optimizer=OptimizerConfig(
                learning_rate=2e-3, schedule="cosine", warmup_steps=min(20, steps - 1), total_steps=steps
            ),
        ),
        evaluation=EvaluationConfig(problems=size.problems, samples=4, batch_prompts=min(32, size.problems)),
        checkpoint=CheckpointConfig(every=0),
    )


def late_config(size: Size) -> Config:
    """`word=`, then certain text and six digits."""
    return character_config(
        size,
        LATE_ALPHABET,
        RowsData(
            rows="rljax.analysis.arena_parts:late_rows",
            args={"size": ROWS, "seed": 0},
            test_args={"size": size.problems, "seed": 1},
        ),
        SingleTurn(rewards=(RewardConfig("rljax.tasks.verifiers:ExactMatch"),), prompt_buckets=(7,)),
        late_demonstrations,
        Shape(length=7 + len(CERTAIN) + 6 + 1, new_tokens=len(CERTAIN) + 6 + 1, warmup=300, learning_rate=2e-4),
    )


def relay_config(size: Size) -> Config:
    """Eight turns of a letter."""
    return character_config(
        size,
        RELAY_ALPHABET,
        RowsData(
            rows="rljax.analysis.arena_parts:relay_rows",
            args={"size": ROWS, "seed": 0},
            test_args={"size": size.problems, "seed": 1},
        ),
        MultiTurn(
            make="rljax.analysis.arena_parts:Relay",
            tool_format="rljax.analysis.arena_parts:RELAY_FORMAT",
            context_length=5 * TURNS,
            prefill_chunks=(8,),
            check_every=2,
            workers=4,
            limits=EnvironmentLimits(turns=TURNS),
        ),
        relay_demonstrations,
        Shape(length=5 * TURNS, new_tokens=2, warmup=200, learning_rate=1e-4),
    )


def sums_config(size: Size) -> Config:
    """Four one-digit terms, `7 - 2 + 4 - 1 =` to `5;9;8`."""
    return character_config(
        size,
        "0123456789+-=; ",
        ReasoningGymData(
            task="chain_sum",
            args={"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1},
            size=ROWS,
            test_size=size.problems,
            prompt="{expression} =",
            chat=False,
            extract=final_number,
        ),
        SingleTurn(prompt_buckets=(20,)),
        miscounted,
        Shape(length=34, new_tokens=14, warmup=300, learning_rate=1e-4),
    )


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
    methods=(
        Method("GRPO 8", grpo(8)),
        Method("random forks 4x2", RandomForks(4, 2), against="GRPO 8", expected="level", claim="level"),
        Method(
            "random forks 4x2, Tree-GRPO's credit",
            RandomForksWith(4, 2, credit=intra_and_inter_tree),
            against="GRPO 8",
            expected="level",
            claim="level",
        ),
        Method(
            "random forks 4x2, TreeRL's credit",
            RandomForksWith(4, 2, credit=global_and_local),
            against="GRPO 8",
            expected="level",
            claim="level",
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


def stale(steps_of: Callable[[Size], int], *, to_sampler: bool = False) -> Callable[[Config, Size], Config]:
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


def restart_config(size: Size) -> Config:
    """Six digits, which may be begun anew behind a mark that demonstrations have."""
    return _restart_config(size, restarting)


def no_restart_config(size: Size) -> Config:
    """The same from demonstrations without the mark."""
    return _restart_config(size, never_restarting)


def _restart_config(size: Size, demonstrations: Callable[[Sequence[Example]], list[Example]]) -> Config:
    config = character_config(
        size,
        RESTART_ALPHABET,
        RowsData(
            rows="rljax.analysis.arena_parts:restart_rows",
            args={"size": ROWS, "seed": 0},
            test_args={"size": size.problems, "seed": 1},
        ),
        SingleTurn(
            rewards=(RewardConfig("rljax.tasks.verifiers:ExactMatch", args={"extract": after_restart}),),
            prompt_buckets=(7,),
        ),
        demonstrations,
        Shape(length=7 + 16, new_tokens=16, warmup=200, learning_rate=2e-4),
    )
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, truncated_is_wrong=True))


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
    methods=(
        Method("GRPO 8", grpo(8)),
        Method("ReSum 4x1", resum(), against="GRPO 8", expected="below", claim="below", share=1.33),
    ),
)


def sparse_config(size: Size) -> Config:
    """Five digits, of which the warm start knows next to nothing without a plan."""
    config = character_config(
        size,
        SPARSE_ALPHABET,
        RowsData(
            rows="rljax.analysis.arena_parts:sparse_rows",
            args={"size": ROWS, "seed": 0},
            test_args={"size": size.problems, "seed": 1},
        ),
        SingleTurn(
            rewards=(RewardConfig("rljax.tasks.verifiers:ExactMatch"),),
            # Plain prompts, and those with a plan.
            prompt_buckets=(SPARSE_LENGTH + 1, 160),
        ),
        sparse_demonstrations,
        # A packed sequence holds a demonstration with its plan.
        Shape(length=21, new_tokens=SPARSE_LENGTH + 1, warmup=200, learning_rate=2e-4),
    )
    return dataclasses.replace(config, warmup=dataclasses.replace(config.warmup, batch_size=64))


def guided(config: Config, size: Size) -> Config:
    """Rollouts with the shortest plan that helps, where plain ones all fail."""
    assert isinstance(config.actor, SingleTurn)
    return dataclasses.replace(config, actor=Guided(actor=config.actor, probes=2))


SPARSE = Task(
    name="sparse",
    about="Five letters, and a digit for each by a hidden table that the warm start hardly knows: unguided, next to no "
    "answer is right. Rows have an action that names the digits, which may be shown as a plan.",
    prediction="ActGuide-RL (2605.12004) learns from rollouts that were shown the plan where plain ones all failed; "
    "GRPO has no signal, and does not.",
    config=sparse_config,
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

TASKS = {task.name: task for task in (LATE, RELAY, SUMS, CERTAIN_TASK, SPARSE, RESTART, NO_RESTART, STALE, PASS_RATE)}
"""All tasks, by name."""
