# %% [markdown]
# # Adapters (LoRA)
# `config.lora` trains low-rank matrices beside frozen weights. It takes a base model in files, so that adapters can
# be loaded over it again.

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
# ## A base
# A tiny model in Hugging Face's format stands in for yours.

# %%
from rljax.models import DecoderConfig, init_params, save_hf
from rljax.text import CharTokenizer

tokenizer = CharTokenizer("abcdefgh=")
shape = DecoderConfig(
    vocab_size=tokenizer.vocab_size, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64
)
save_hf("base", shape, init_params(shape, jax.random.key(0)), tokenizer=tokenizer)

# %% [markdown]
# ## The run
# Adapters bear ten times the learning rate of whole weights, and more.

# %%
from rljax.experiment import LoraConfig, OptimizerConfig, PretrainedModel
from rljax.experiment.train import train
from rljax.testing import tiny_config

config = tiny_config(
    steps=6,
    model=PretrainedModel(path="base"),
    lora=LoraConfig(rank=4, alpha=8.0),
    optimizer=OptimizerConfig(learning_rate=2e-2, weight_decay=0.0),
)
summary = train(config, "runs/lora", fresh=True)

# %% [markdown]
# ## Files
# The adapters alone, as PEFT and vLLM read them; or merged into the base.

# %%
from pathlib import Path

from rljax.experiment.convert import convert

adapter = convert("runs/lora", "adapter", adapter=True)
merged = convert("runs/lora", "merged")
sizes = {folder.name: sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in (adapter, merged)}
print(sizes)
assert sizes["adapter"] < sizes["merged"]

# %% [markdown]
# ## Further from there

# %%
config.lora = LoraConfig(path="adapter")
config.steps = 2
summary = train(config, "runs/lora-more", fresh=True)
assert Path("runs/lora-more/summary.json").exists()
