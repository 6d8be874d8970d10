"""CogMath, arXiv 2506.04481: word problems with nine follow-ups each, which tell solving from understanding.

    rljax study cogmath --config=papers/cogmath --workdir=runs/cogmath

SmolLM2-135M-Instruct answers 24 problems. `papers/cogmath:characters` is a model of characters that learns answers to
training problems first, and the smoke size a far smaller one. Each row has the column `dimension`; the reward `passed`
is the mean of passes, which a run may train on.
"""

from rljax.experiment import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    FreshModel,
    OptimizerConfig,
    PretrainedModel,
    RewardConfig,
    RowsData,
    SamplingConfig,
    SingleTurn,
    UpdateConfig,
    WarmupConfig,
)

SIZES = ("full", "smoke", "characters")
ASCII = "".join(map(chr, range(32, 127))) + "\n"
LONGEST = 512
"""Characters of a prompt and its answer, at most."""


def get_config(size: str = "full") -> Config:
    if size not in SIZES:
        raise ValueError(f"--config=papers/cogmath:{size}: the size must be one of {', '.join(SIZES)}")

    smoke = size == "smoke"
    is_pretrained = size == "full"
    tiny = {"num_layers": 1, "embed_dim": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 64}
    small = {"num_layers": 2, "embed_dim": 128, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32, "mlp_dim": 384}
    shape = tiny if smoke else small
    model = PretrainedModel() if is_pretrained else FreshModel(alphabet=ASCII, max_position=LONGEST, **shape)

    # A model that has been trained answers as it is.
    steps = 0 if is_pretrained else 2 if smoke else 600
    optimizer = OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=1, total_steps=max(steps, 2))

    return Config(
        name="cogmath",
        model=model,
        data=RowsData(
            rows="rljax.tasks.cogmath:rows",
            args={"size": 4 if smoke else 400, "split": "train"},
            test_args={"size": 2 if smoke else 48, "split": "test"},
            chat=is_pretrained,
            # Few numbers make some problems twice, and each is to keep all its follow-ups.
            repeated_prompts=True,
        ),
        actor=SingleTurn(
            rewards=(
                RewardConfig("rljax.tasks.cogmath:passed"),
                RewardConfig("rljax.tasks.cogmath:readable", weight=0.0),
            ),
            prompt_buckets=(256,) if is_pretrained else (480,),
        ),
        sampling=SamplingConfig(max_new_tokens=32 if is_pretrained else 16, truncated_is_wrong=False),
        update=UpdateConfig(pack_length=LONGEST, microbatch_size=4, head_chunk=2048),
        warmup=WarmupConfig(steps=steps, batch_size=4 if smoke else 32, optimizer=optimizer),
        evaluation=EvaluationConfig(problems=1 if smoke else 24, samples=1, batch_prompts=10),
        checkpoint=CheckpointConfig(every=0),
    )
