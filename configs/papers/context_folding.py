"""Keep-recent-k of GLM-5, arXiv 2602.15763: searches that are longer than the context, whose old results are folded.

    rljax train --config=papers/context_folding --workdir=runs/context_folding

Look at play/conversations and play/unused_conversations: those of an episode, and how many were not trained on. For a
model with a chat template that can call tools: SmolLM2-135M-Instruct starts from next to nothing; take another one with
`--config.model.path=...`, and a GPU. The smoke size is two steps of the same. `papers/context_folding:characters` is a
model of characters that walks a trail of which its context holds an eighth (trail.py), half an hour of a core, and
`:whole` the same without folding, in a context that holds all of it.
"""

import dataclasses

from trail import CONTEXT, FOLDING, WHOLE, WHOLE_CONTEXT, strayed, strayed_in_one

from rljax.advantages import once_per_episode
from rljax.algorithms import GRPO, Algorithm
from rljax.experiment import (
    BlackBox,
    CheckpointConfig,
    Config,
    EvaluationConfig,
    FreshModel,
    OptimizerConfig,
    PretrainedModel,
    RowsData,
    SamplingConfig,
    UpdateConfig,
    WarmupConfig,
)
from rljax.losses import policy_loss, token_mean, token_ratio

SIZES = ("full", "smoke", "characters", "whole")
ASCII = "".join(map(chr, range(32, 127))) + "\n"


@dataclasses.dataclass
class GRPOOfEpisodes(GRPO):
    """GRPO in which an episode counts once, however many conversations it was folded into: once in the mean and the
    spread of its group, and by its tokens in the loss."""

    def build(self) -> Algorithm:
        loss = policy_loss(token_ratio, self.surrogate(self.dual_clip), token_mean, penalties=self.penalties())
        return self.compose(once_per_episode(self.credit()), loss)


def get_config(size: str = "full") -> Config:
    if size not in SIZES:
        raise ValueError(f"--config=papers/context_folding:{size}: the size must be one of {', '.join(SIZES)}")
    if size in ("characters", "whole"):
        return of_characters(folds=size == "characters")
    smoke = size == "smoke"

    # Eight results of some 120 characters and what leads to them; a group size counts conversations.
    context = 512 if smoke else 1536
    conversations = 2 if smoke else 4
    runs = 2 if smoke else 8
    questions = {"size": 8 if smoke else 1000, "num_pages": 240 if smoke else 1000, "split": "train"}

    # What is discarded at three quarters leaves room for the latest result and an answer to it.
    actor = BlackBox(
        agent="rljax.rollouts.black_box:FoldingAgent",
        args={
            "make": "rljax.envs.library:MultiHop",
            "args": {"tool_format": "tags", "early_exit": False},
            "keep": 5,
            "most": 8,
            "discard_beyond": context * 3 // 4,
            "turns": 4 if smoke else 32,
        },
        context_length=context,
        prefill_chunks=(64, 256),
        trained_conversations=conversations,
    )

    return Config(
        name="context_folding",
        steps=2 if smoke else 200,
        prompts_per_step=2 if smoke else 16,
        model=PretrainedModel(),
        data=RowsData(
            rows="rljax.envs.library.multihop:rows",
            args=questions,
            test_args={"size": 4 if smoke else 64, "split": "test"},
        ),
        algorithm=GRPOOfEpisodes(group_size=runs * conversations, kl_coef=0.0),
        actor=actor,
        sampling=SamplingConfig(max_new_tokens=16 if smoke else 128),
        update=UpdateConfig(pack_length=context, head_chunk=256),
        optimizer=OptimizerConfig(learning_rate=1e-6),
        evaluation=EvaluationConfig(
            problems=2 if smoke else 64, samples=2 if smoke else 4, batch_prompts=2 if smoke else 16
        ),
        checkpoint=CheckpointConfig(every=0 if smoke else 20),
    )


def of_characters(*, folds: bool) -> Config:
    """A model of characters on a trail, of which its context holds an eighth if it `folds`, and all if not."""
    context, folding, demonstrations = (CONTEXT, FOLDING, strayed) if folds else (WHOLE_CONTEXT, WHOLE, strayed_in_one)

    # A folded trail is some twenty conversations, of which those that said most are trained on; else it is one.
    prompts, runs = 4, 8
    episodes = prompts * runs
    conversations = 8 if folds else 1
    rows = episodes * conversations

    # All episodes of a step are under way at once.
    actor = BlackBox(
        agent="rljax.rollouts.black_box:FoldingAgent",
        args={"make": "trail:Trail", **folding},
        tool_format="tags",
        context_length=context,
        conversations=episodes,
        decode_rows=episodes,
        workers=episodes,
        prefill_chunks=(64, CONTEXT),
        trained_conversations=conversations,
    )

    # One size of everything, so that the update compiles once; about as many tokens in either form.
    update = UpdateConfig(
        pack_length=context,
        microbatch_size=16 if folds else 2,
        length_buckets=(context,),
        score_buckets=(context,),
        row_buckets=(rows,),
        microbatch_buckets=(),
        trajectory_buckets=(context,),
    )

    # So many updates until what was read is copied; a demonstration without folding fills eight contexts.
    steps = 800
    warmup = WarmupConfig(
        steps=steps,
        batch_size=64 if folds else 8,
        demonstrations=demonstrations,
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=20, total_steps=steps),
    )
    shape = {"num_layers": 2, "embed_dim": 128, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32, "mlp_dim": 384}

    return Config(
        name="context_folding_characters" if folds else "context_folding_whole",
        steps=40,
        prompts_per_step=prompts,
        model=FreshModel(alphabet=ASCII, chat=True, max_position=context, **shape),
        data=RowsData(rows="trail:rows", args={"size": 400}, test_args={"size": 64, "split": "test"}),
        algorithm=GRPOOfEpisodes(group_size=runs * conversations, kl_coef=0.0),
        actor=actor,
        sampling=SamplingConfig(max_new_tokens=8),
        update=update,
        optimizer=OptimizerConfig(learning_rate=3e-4),
        warmup=warmup,
        evaluation=EvaluationConfig(problems=64, samples=4, batch_prompts=16),
        checkpoint=CheckpointConfig(every=0),
    )
