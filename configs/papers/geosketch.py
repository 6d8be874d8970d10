"""GeoSketch, arXiv 2509.22460, as text: geometry that is solved by drawing on a figure and asserting what it shows.

    rljax study geosketch --config=papers/geosketch --workdir=runs/geosketch
    rljax train --config=papers/geosketch --workdir=runs/geosketch_trained
    rljax study geosketch --checkpoint=runs/geosketch_trained --workdir=runs/geosketch

A model of characters learns solutions first, then trains with GRPO over turns. Look at rollout/component/is_right,
rollout/component/proven and rollout/component/unused: right answers, the share of what they need that was proven, and
constructions of no use. The problems are made by rljax.envs.library.sketches.

The smoke size is two steps of a far smaller model.
"""

from collections.abc import Sequence

from rljax.algorithms import GRPO
from rljax.envs.library.geosketch import ACTIONS, ARMS, SketchEnvironment, solved
from rljax.experiment import (
    CheckpointConfig,
    Config,
    EnvironmentLimits,
    EvaluationConfig,
    FreshModel,
    MultiTurn,
    OptimizerConfig,
    RowsData,
    SamplingConfig,
    UpdateConfig,
    WarmupConfig,
)
from rljax.tasks import Example

SIZES = ("full", "smoke")
ASCII = "".join(map(chr, range(32, 127))) + "\n"
LONGEST = 640
"""Characters of an episode, at most."""


def demonstrations(examples: Sequence[Example]) -> list[Example]:
    """The solution of every training row, under each arm in turn, so that no arm is strange to the model."""
    arms = list(ARMS)
    environment = SketchEnvironment(tool_format=ACTIONS, system="")
    made = []
    for index, example in enumerate(examples):
        row = {"prompt": example.prompt, **example.columns}
        prompt, turns = solved(row, arm=arms[index % len(arms)], environment=environment)
        made.append(Example(prompt, {"completion": turns}))
    return made


def get_config(size: str = "full") -> Config:
    if size not in SIZES:
        raise ValueError(f"--config=papers/geosketch:{size}: the size must be one of {', '.join(SIZES)}")

    smoke = size == "smoke"
    prompts, group = (2, 2) if smoke else (16, 8)
    warmup, ramp = (2, 1) if smoke else (1200, 50)
    rows = prompts * group
    tiny = {"num_layers": 1, "embed_dim": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 64}
    model = {"num_layers": 4, "embed_dim": 192, "num_heads": 6, "num_kv_heads": 6, "head_dim": 32, "mlp_dim": 576}

    actor = MultiTurn(
        make="rljax.envs.library:SketchEnvironment",
        args={"tool_format": "rljax.envs.library.geosketch:ACTIONS", "system": ""},
        tool_format="rljax.envs.library.geosketch:ACTIONS",
        context_length=LONGEST,
        decode_rows=rows,
        conversations=rows,
        prefill_chunks=(64,),
        check_every=8,
        workers=4,
        # The longest solution has eight turns.
        limits=EnvironmentLimits(turns=10, observation_tokens=160),
    )

    # One size of everything, so that the update compiles once.
    update = UpdateConfig(
        pack_length=LONGEST,
        microbatch_size=4,
        length_buckets=(LONGEST,),
        score_buckets=(LONGEST,),
        row_buckets=(rows,),
        microbatch_buckets=(),
        trajectory_buckets=(LONGEST,),
        head_chunk=2048,
    )

    return Config(
        name="geosketch",
        steps=2 if smoke else 60,
        prompts_per_step=prompts,
        model=FreshModel(alphabet=ASCII, max_position=LONGEST, **tiny if smoke else model),
        data=RowsData(
            rows="rljax.envs.library.sketches:rows",
            args={"size": 12 if smoke else 4400, "split": "train"},
            test_args={"size": 2 if smoke else 66, "split": "test"},
        ),
        actor=actor,
        algorithm=GRPO(group_size=group, kl_coef=0.0),
        sampling=SamplingConfig(max_new_tokens=32),
        update=update,
        optimizer=OptimizerConfig(learning_rate=3e-4),
        warmup=WarmupConfig(
            steps=warmup,
            batch_size=4 if smoke else 32,
            demonstrations=demonstrations,
            optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=ramp, total_steps=warmup),
        ),
        evaluation=EvaluationConfig(
            problems=2 if smoke else 66, samples=1 if smoke else 4, batch_prompts=prompts, solved_by="is_right"
        ),
        checkpoint=CheckpointConfig(every=0 if smoke else 20),
    )
