# %% [markdown]
# # rljax in ten minutes
# A tiny model learns, by GRPO, to write the letter that is rewarded. It starts from nothing, takes seconds, and every
# part of it is the part that large runs use. Runtimes with a CPU, a GPU or a TPU will do.

# %%
# Installs rljax where it is missing, with the jax of the GPU or TPU of this machine.
# RLJAX_WHEEL=path/to/rljax_lm-...whl takes a wheel of your own.
import glob
import importlib.util
import os
import shutil
import subprocess
import sys

if importlib.util.find_spec("rljax") is None:
    device = (
        "cuda," if shutil.which("nvidia-smi") else "tpu," if glob.glob("/dev/accel*") + glob.glob("/dev/vfio/*") else ""
    )
    package = f"{os.environ.get('RLJAX_WHEEL', 'rljax-lm')}[{device}tasks,parquet]"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package, "pandas"], check=True)

import jax

print(jax.devices())

# %% [markdown]
# ## A task
# Rows are mappings with a `prompt`, and a reward is a function: it may ask for the completion and for columns of the
# row by name. Both stand in a file, so that they can be run in other processes.

# %%
from pathlib import Path

Path("letter_task.py").write_text(
    """
def rows():
    letters = "abcdefgh"
    return [{"prompt": f"{x}{y}=", "letter": "e"} for x in letters for y in letters]

def share(completion, letter):
    return completion[:4].count(letter) / 4
"""
)

# %% [markdown]
# ## A config
# Plain dataclasses; a field with a typo is refused.

# %%
from rljax.algorithms import GRPO
from rljax.experiment import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    FreshModel,
    LogConfig,
    OptimizerConfig,
    RewardConfig,
    RowsData,
    SamplingConfig,
    SingleTurn,
    UpdateConfig,
)

sys.path.insert(0, "")  # where the task is

config = Config(
    name="quickstart",
    steps=16,
    prompts_per_step=8,
    model=FreshModel(
        alphabet="abcdefgh=", num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64
    ),
    data=RowsData(rows="letter_task:rows", test_fraction=0.2),
    actor=SingleTurn(rewards=(RewardConfig("letter_task:share"),), prompt_buckets=(4,)),
    algorithm=GRPO(group_size=8, kl_coef=0.0),
    sampling=SamplingConfig(max_new_tokens=4, truncated_is_wrong=False),
    # One size of everything, so that little is compiled.
    update=UpdateConfig(
        pack_length=64,
        microbatch_size=2,
        length_buckets=(64,),
        score_buckets=(64,),
        row_buckets=(64,),
        microbatch_buckets=(8,),
        head_chunk=64,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    evaluation=EvaluationConfig(problems=8, samples=4),
    checkpoint=CheckpointConfig(every=0),
    log=LogConfig(recordings=True),
)

# %% [markdown]
# ## The run

# %%
from rljax.experiment.train import train

summary = train(config, "runs/quickstart", fresh=True)
summary["after"]

# %%
from IPython.display import Image

Image("runs/quickstart/learning_curve.png")

# %% [markdown]
# ## What the policy said
# With `log.recordings=True` each rollout is kept as a Parquet file, which pandas opens in two lines. A row is a
# sample with its tokens, their float32 log-probs, and the line of the rollout log.

# %%
import pandas

samples = pandas.read_parquet("runs/quickstart/recorded")

# %%
samples[["step", "prompt", "completion", "reward"]].groupby("step").sample(2, random_state=0)

# %%
by_step = samples.groupby("step").reward.mean()
assert by_step.iloc[-1] > by_step.iloc[0]
by_step

# %% [markdown]
# `rljax view runs/quickstart` shows all of this in a browser, also while a run trains.
