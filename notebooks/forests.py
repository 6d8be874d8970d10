# %% [markdown]
# # Forests, drawn
# Samples of a prompt may branch: a fork goes on from any token of an earlier sample, credit is read off the tree, and
# each shared token is trained once. Here Tree-GRPO makes two chains a prompt and forks each, and the tree of a prompt
# is drawn.

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

# %%
from rljax.algorithms import TreeGRPO
from rljax.experiment import LogConfig, SamplingConfig
from rljax.experiment.train import train
from rljax.testing import tiny_config

# A tiny model on a toy task; every letter ends a step, so a fork may begin behind any of them.
config = tiny_config(
    steps=2,
    algorithm=TreeGRPO(chains=2, points=2, step_delimiters=tuple("abcdefgh=")),
    sampling=SamplingConfig(max_new_tokens=8, truncated_is_wrong=False),
    log=LogConfig(per_token=True),
)
summary = train(config, "runs/forests", fresh=True)

# %% [markdown]
# ## One prompt
# A line of the rollout log is a sample. `parent` is the sample that it leaves, `fork_index` the token where it does.

# %%
import json
from pathlib import Path

lines = Path("runs/forests/rollouts/step_000002.jsonl").read_text().splitlines()
records = [json.loads(line) for line in lines]
group = [record for record in records if record["prompt_id"] == records[0]["prompt_id"]]
for record in group:
    print(record["sample"], record["completion"], record["reward"], record.get("parent"), record.get("fork_index"))
assert any("parent" in record for record in group)

# %% [markdown]
# ## Its tree
# `lay_out` gives each sample a lane and cuts it where others leave it; a stretch has the mean reward of the leaves
# behind it.

# %%
import matplotlib.pyplot as plt
from IPython.display import Image

from rljax.viewer import lay_out

forest = lay_out(group)
lane_of = {branch.sample: branch.lane for branch in forest.branches}
figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
for branch in forest.branches:
    texts = group[branch.sample]["per_token"]["text"]
    if branch.parent is not None:
        start = branch.stretches[0].start
        axes.plot([start, start], [-lane_of[branch.parent], -branch.lane], color="gray", zorder=0)
    for stretch in branch.stretches:
        color = plt.cm.RdYlGn(0.5 if stretch.value is None else stretch.value)
        axes.plot([stretch.start, stretch.end], [-branch.lane, -branch.lane], color=color, linewidth=6)
        for place in range(stretch.start, stretch.end):
            axes.text(place + 0.4, -branch.lane + 0.15, texts[place], family="monospace")
axes.set_xlabel("token of the completion")
axes.set_yticks([])
axes.margins(y=0.2)
figure.savefig("forest.png")
plt.close(figure)
Image("forest.png")

# %% [markdown]
# `rljax view runs/forests --export=report.html` draws every forest of a run in one page, with what each token was
# worth.

# %%
subprocess.run([sys.executable, "-m", "rljax", "view", "runs/forests", "--export=report.html"], check=True)
assert Path("report.html").stat().st_size > 0
