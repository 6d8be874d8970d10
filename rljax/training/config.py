"""What a user sets of training: updates, critic, warm-up, checkpoints, logs."""

import dataclasses
from collections.abc import Callable
from typing import Any

from rljax.batching import PackConfig
from rljax.models import Remat
from rljax.settings import field
from rljax.training.optimizers import OptimizerConfig


@dataclasses.dataclass
class UpdateConfig(PackConfig):
    """How a rollout becomes updates: one optimizer step for each of its minibatches, `epochs` times over.

    A minibatch is packed as `PackConfig` says; gradients of its microbatches add up.
    """

    minibatches: int = field(default=1, least=1)
    """Optimizer steps per epoch. They share out whole groups, so it must divide `config.prompts_per_step`."""

    epochs: int = field(default=1, least=1)
    """Times that the updates go through a rollout. Above 1 the loss should clip ratios."""

    shuffle: bool = False
    """Draw the groups of the minibatches anew at every step, by the run's seed; else they keep the rollout's order. It
    takes effect with `minibatches` above 1."""

    use_sampler_logprobs: bool = False
    """Take the sampler's log-probs as the old ones: ratios, and what is clipped by them, are then to the policy that
    sampled each token. Set it for rollouts that older policies sampled in part. On fresh ones it saves scoring the
    rollout where there are several updates, if `rollout/logprob_gap_max` shows that sampler and trainer agree to
    rounding."""

    head_chunk: int = field(default=512, least=1)
    """Tokens of one device whose logits exist at a time. Lower it to save memory, raise it for speed with a small
    vocabulary; what devices send each other stays the same."""

    remat: Remat = "none"
    """What the backward pass computes again: `none`, by its bound the fastest on a TPU; `products_saved`, what lies
    between a layer's products (less memory, and by its bound the fastest on an H100); `attention_saved`, a layer from
    its input but for the attention itself (much less memory, for up to a quarter more time); `full`, the attention as
    well (a little less memory)."""

    attention_kernel: bool | None = None
    """Train packed sequences of 1024 tokens and more with kernels that leave out blocks which see nothing. None does so
    on a TPU, an H100 and an H200: at lengths up to 128k they have been compiled for v5e, v5p, v6e and H100, and timed
    on none. True does so on other GPUs too. False is for a jax without Pallas for Triton, which it is about to drop,
    and keeps the XLA form, which rounds otherwise. A CPU and short sequences have that form whatever it says."""

    compile_ahead: int = field(default=3, least=1)
    """Update programs of the policy, and of a critic, that are compiled, and run on nothing, before its first update:
    that of the first minibatch, and those of the sizes which later ones are most likely to have. 1 compiles each when
    it is met."""

    max_skipped: int = field(default=5, least=1)
    """Updates in a row that may be skipped for a loss or gradient that is not finite; the run stops at this number."""

    max_empty: int = field(default=5, least=1)
    """Steps in a row that may have nothing to learn from (no valid reward, or too few groups that dynamic sampling
    keeps); they update nothing, and the run stops at this number."""


@dataclasses.dataclass
class CriticConfig:
    """The value function, for an algorithm that has one; others leave it alone. It is updated before the policy, on
    the policy's minibatches."""

    model: str = ""
    """Language model that its trunk starts from: a Hugging Face folder, a `.gguf` file or `smollm2`, of any size with
    the policy's vocabulary. Empty is a copy of the policy. The head starts at 0."""

    epochs: int = field(default=1, least=1)
    """Times that its updates go through a rollout."""

    warmup_steps: int = field(default=0, least=0)
    """First steps of the run in which the policy stands still and the critic learns its values."""

    adapters: bool = False
    """Train adapters as `config.lora` has them, and the head, in place of all its weights. The frozen ones are the
    policy's own, unless `model` names others."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=5e-5))
    """Its own optimizer. A critic bears a larger learning rate than the policy."""


@dataclasses.dataclass
class WarmupConfig:
    """Supervised steps (next-token loss) before the first rollout, or all there is to `rljax sft`."""

    steps: int = field(default=0, least=0)
    """Updates; 0 is no warm-up, and the other fields take effect above it."""

    batch_size: int = field(default=64, least=1)
    """Examples in an update."""

    completion_column: str = "completion"
    """Column of the data that holds what to say: a text, a list of texts by turns, or a list of pieces of one turn,
    `{"text": ..., "learned": false}`, of which some are only read."""

    demonstrations: Callable[[list[Any]], list[Any]] | None = None
    """Makes the examples with that column from the training examples; None takes the training examples as they are."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """Optimizer of the warm-up; its moments end with it."""


@dataclasses.dataclass
class CheckpointConfig:
    """When a run saves its state, and which checkpoints it keeps."""

    every: int = field(default=50, least=0)
    """Steps between saves, of a supervised warm-up too; the last step is saved as well. With 0 a run saves only when it
    is asked to end (SIGTERM, SIGUSR1, Ctrl-C)."""

    keep_last: int = field(default=2, least=1)
    """Newest checkpoints that stay. More of them survive a damaged disk, and cost a whole state each. It takes effect
    with `every` above 0."""

    keep_best: int = field(default=0, least=0)
    """Checkpoints that stay besides, those with the highest `best_metric`."""

    best_metric: str = "rollout/reward_mean"
    """Metric, by its name in `metrics.jsonl`, that `keep_best` ranks by."""


@dataclasses.dataclass
class LogConfig:
    """What a run writes beside its metrics."""

    rollouts_every: int = field(default=1, least=1)
    """Steps between rollouts that are written to `rollouts/`, one JSON line a sample."""

    per_token: bool = False
    """Whether these lines also hold, of each token, its text, turn, entropy, advantage, how far the trainer's log-prob
    is from the sampler's before the first update, and the critic's value: `rljax view` colours tokens by them. Lines
    become about three times as long, each step that is written costs a forward pass, and the run's numbers stay the
    same."""

    recordings: bool = False
    """Whether each rollout is kept in `recorded/` as a Parquet file (the extra `parquet`): tokens and what the sampler
    said of them, in full precision. `rljax train --replay=FOLDER` trains from them, and `pandas.read_parquet` opens
    them. Some 10 bytes a token."""

    profile_steps: tuple[int, ...] = ()
    """The first and the last step of `rljax train`, counted from 1, that are traced for xprof in `profile/`, with the
    phases by name: (5, 6). Process 0 traces itself and its devices. Empty is none. A traced step is slower, and its
    numbers are the same."""

    pulse_s: float = field(default=10.0, least=0)
    """Seconds between two signs of life within a step: what is under way, for how long, tokens so far. 0 is none."""

    stall_s: float = field(default=3600.0, least=0)
    """Seconds without progress (a phase that begins or ends, a token, a compiled program), in a process that waits for
    no other, after which the stacks of its threads go to `stacks/` and all processes end with status 75. Raise it above
    the longest compilation or update; 0 is never."""

    wandb_project: str = ""
    """Weights & Biases project to log to (the extra `wandb`); empty is none."""

    trackio_project: str = ""
    """trackio project to log to (the extra `trackio`): on this machine, or where trackio's own variables say; empty is
    none."""

    mlflow_experiment: str = ""
    """MLflow experiment to log to (the extra `mlflow`), where `MLFLOW_TRACKING_URI` says; empty is none."""

    traces: int = field(default=4, least=0)
    """Rollouts of each written step, prompts and completions, that these three get too: trackio as traces, the others
    as a table. 0 keeps what the policy reads and says in the run folder."""
