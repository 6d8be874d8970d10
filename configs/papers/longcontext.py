"""PRELUDE, arXiv 2508.09848, and CharToM-QA, arXiv 2501.01705: what a model finds in a long text, on generated texts.

    rljax study longcontext --config=papers/longcontext --workdir=runs/longcontext

SmolLM2-135M-Instruct judges episodes before 12 chronicles of 4,000 characters and answers questions about as many
stories, each with four windows of the text. `papers/longcontext:characters` is a model of characters that learns
answers to training texts first, and the smoke size a far smaller one. The reward `right` is one that a run may train
on; `rljax.tasks.prelude:reasoned` on the rows of `rljax.tasks.prelude:rows` also pays for reasons.
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
EVERYTHING = -1
LONGEST = 2304
"""Tokens of a prompt and its answer, at most."""


def get_config(size: str = "full") -> Config:
    if size not in SIZES:
        raise ValueError(f"--config=papers/longcontext:{size}: the size must be one of {', '.join(SIZES)}")

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
        name="longcontext",
        model=model,
        data=RowsData(
            rows="rljax.tasks.longcontext:rows",
            args={"size": 1 if smoke else 100, "split": "train", "length": 4000 if is_pretrained else 1500},
            test_args={
                "size": 1 if smoke else 12,
                "split": "test",
                "windows": (0, EVERYTHING) if smoke else (0, 500, 1000, EVERYTHING),
                "modes": ("choice", "generative") if is_pretrained or smoke else ("choice",),
            },
            chat=is_pretrained,
            # Windows that show the same make equal prompts, and each is to be answered.
            repeated_prompts=True,
        ),
        actor=SingleTurn(
            rewards=(
                RewardConfig("rljax.tasks.longcontext:right"),
                RewardConfig("rljax.tasks.longcontext:readable", weight=0.0),
            ),
            prompt_buckets=(512, 1024, 2048) if is_pretrained else (LONGEST - 64,),
        ),
        sampling=SamplingConfig(max_new_tokens=48 if is_pretrained else 32, truncated_is_wrong=False),
        update=UpdateConfig(pack_length=LONGEST, microbatch_size=1, head_chunk=2048),
        warmup=WarmupConfig(steps=steps, batch_size=2 if smoke else 16, optimizer=optimizer),
        evaluation=EvaluationConfig(problems=1 if smoke else 12, samples=1, batch_prompts=8),
        checkpoint=CheckpointConfig(every=0),
    )
