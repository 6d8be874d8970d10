# %% [markdown]
# # Your own model, data and reward
# A model in Hugging Face's format, rows in a JSON Lines file, a reward in a Python file.

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
# ## A model
# Set `MODEL` to a model of the hub, such as `Qwen/Qwen3-0.6B`, or to a folder. Without it a tiny one is written here,
# in the same format.

# %%
from pathlib import Path

model = os.environ.get("MODEL", "")
if model and not Path(model).exists():
    from huggingface_hub import snapshot_download

    model = snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"])

if not model:
    from rljax.models import DecoderConfig, init_params, save_hf
    from rljax.text import CharTokenizer

    tokenizer = CharTokenizer("0123456789+=")
    shape = DecoderConfig(
        vocab_size=tokenizer.vocab_size, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64
    )
    model = "tiny-model"
    save_hf(model, shape, init_params(shape, jax.random.key(0)), tokenizer=tokenizer)

# %% [markdown]
# ## Data and a reward
# A prompt is text, or a list of chat messages; any other column is yours. The reward asks for the columns that it
# reads.

# %%
import json

rows = [{"prompt": f"{a}+{b}=", "digit": str(a)} for a in range(8) for b in range(8)]
Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
Path("my_rewards.py").write_text(
    """
def has_digit(completion, digit):
    return completion.count(digit) / max(1, len(completion))

def short(completion):
    return float(len(completion) <= 6)
"""
)
sys.path.insert(0, "")  # where my_rewards.py is

# %% [markdown]
# ## The run
# Several rewards add up by weight, and each has its own curve. One that raises or hangs costs a sample, never the
# run.

# %%
from rljax.experiment import FileData, OptimizerConfig, PretrainedModel, RewardConfig, SingleTurn
from rljax.experiment.train import train
from rljax.testing import tiny_config

config = tiny_config(
    steps=6,
    model=PretrainedModel(path=model),
    data=FileData(train="train.jsonl", test_fraction=0.2),
    actor=SingleTurn(
        rewards=(RewardConfig("my_rewards:has_digit"), RewardConfig("my_rewards:short", weight=0.1)),
        prompt_buckets=(4,),
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2),
)
summary = train(config, "runs/own", fresh=True)

# %% [markdown]
# ## Weights for others
# A Hugging Face folder, which `transformers`, vLLM and rljax itself read. `push="user/name"` sends it to the hub,
# with a model card.

# %%
from rljax.experiment.convert import convert

folder = convert("runs/own", "own-trained")
sorted(file.name for file in folder.iterdir())
