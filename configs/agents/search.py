"""What the configs of this folder share: an agent that searches pages for the answer to a question over several.

The questions and pages are made up (`rljax.envs.MultiHop`, extra `agents`), the model is SmolLM2-135M-Instruct. It
starts from next to nothing here; take a model that can call tools, with `--config.model.path=...`, and a GPU.

Every config takes a size: `--config=agents/arpo:smoke` is two steps of a tiny model of characters.
"""

import dataclasses

from rljax.experiment import (
    CheckpointConfig,
    Config,
    EnvironmentLimits,
    EvaluationConfig,
    FreshModel,
    Guided,
    MultiTurn,
    OptimizerConfig,
    PretrainedModel,
    Recipe,
    RowsData,
    SamplingConfig,
    UpdateConfig,
)

ASCII = "".join(map(chr, range(32, 127))) + "\n"
SIZES = ("full", "smoke")


def search_config(
    algorithm: Recipe,
    size: str = "full",
    *,
    actor: MultiTurn | Guided | None = None,
    data: RowsData | None = None,
    minibatches: int = 1,
) -> Config:
    """`algorithm` on questions that need a search; other actors and data go by their rows. ValueError for an
    unknown `size`."""
    if size not in SIZES:
        raise ValueError(f"--config=...:{size}: the size must be one of {', '.join(SIZES)}")
    smoke = size == "smoke"
    actor = actor or search_actor()
    turns = actor.actor if isinstance(actor, Guided) else actor
    assert isinstance(turns, MultiTurn)
    turns.context_length, turns.prefill_chunks = (1536, (64, 512)) if smoke else (2048, (64, 256, 1024))
    if smoke:
        turns.limits = dataclasses.replace(turns.limits, turns=2)
    return Config(
        name="search",
        steps=2 if smoke else 200,
        prompts_per_step=2 if smoke else 16,
        model=tiny_model() if smoke else PretrainedModel(dtype="bfloat16"),
        data=data or search_data(smoke),
        actor=actor,
        algorithm=algorithm,
        sampling=SamplingConfig(max_new_tokens=8 if smoke else 192),
        update=UpdateConfig(
            pack_length=turns.context_length, minibatches=min(minibatches, 2) if smoke else minibatches, head_chunk=1024
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3 if smoke else 1e-6),
        evaluation=EvaluationConfig(
            problems=2 if smoke else 64, samples=2 if smoke else 4, batch_prompts=2 if smoke else 16
        ),
        checkpoint=CheckpointConfig(every=0 if smoke else 20),
    )


def tiny_model() -> FreshModel:
    shape = {"num_layers": 1, "embed_dim": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 64}
    return FreshModel(alphabet=ASCII, max_position=4096, **shape)


def search_actor(**args: object) -> MultiTurn:
    """The tools `<search>`, `<open>` and `<finish>`; `args` go to `MultiHop`."""
    return MultiTurn(
        make="rljax.envs.library:MultiHop",
        args={"tool_format": "tags", **args},
        tool_format="rljax.envs.library.multihop:TAGS",
        limits=EnvironmentLimits(turns=8),
    )


def search_data(smoke: bool) -> RowsData:
    count, held_out, pages = (8, 4, 240) if smoke else (1000, 64, 1000)
    return RowsData(
        rows="rljax.envs.library.multihop:rows",
        args={"size": count, "num_pages": pages, "split": "train"},
        test_args={"size": held_out, "split": "test"},
    )
