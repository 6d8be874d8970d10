# %% [markdown]
# # An agent with tools
# A small model learns to use tools. It is asked what two goods cost together, in a shop whose prices only a tool knows,
# and another tool calculates. Its demonstrations are right one time in three; from there the reward teaches it. About
# two minutes on two CPU cores.

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
# ## The environment
# A class with `reset(row)` and `step(action)`. What `reset` returns is the question, an action is what the model wrote
# up to a stop string, and a `Step` is what comes back: an observation, a reward, whether the episode is over, and
# counts that become metrics. The class stands in a file, as environments may run in other processes.

# %%
from pathlib import Path

Path("price_shop.py").write_text(
    """
import random

from rljax.envs import Parsed, Step, ToolCall, ToolFormat

GOODS = (
    "axe bag bed bin bow box bun cap cup dye egg fan fig gem gum hat ham ink jam jar jug key kit lid log map mat mop "
    "mug net nut oar oil pan pea pen pie pin pot rod rug saw tea tie tin toy tub urn van wax wig yam zip"
).split()


def price(shop, name):
    return random.Random(f"{shop} {name}").randint(10, 49)


def parse(text):
    text = text.removesuffix(";")
    tool = {"?": "price", "=": "answer"}.get(text[:1], "calculator")
    return Parsed((ToolCall(tool, {"text": text.lstrip("?=")}),))


FORMAT = ToolFormat("shop", parse, stop_strings=(";",), wrap=(" ", "\\n"))


class Shop:
    def reset(self, row):
        self.shop, self.goods = row["shop"], row["prompt"].split("+")
        return row["prompt"] + ":"

    def step(self, action):
        (call,) = parse(action).calls
        text = call.arguments["text"]
        if call.name == "answer":
            right = str(sum(price(self.shop, name) for name in self.goods))
            return Step("", float(text == right), True, {"tool_calls": 0.0})
        if call.name == "price":
            found = str(price(self.shop, text)) if text in GOODS else "no"
        else:
            one, _, two = text.partition("+")
            found = str(int(one) + int(two)) if one.isdecimal() and two.isdecimal() else "no"
        return Step(found, counts={"tool_calls": 1.0})


def rows(size, first=0):
    return [{"prompt": "+".join(random.Random(i).sample(GOODS, 2)), "shop": i} for i in range(first, first + size)]
"""
)
sys.path.insert(0, "")  # where price_shop.py is

# %% [markdown]
# An episode by hand: two prices, their sum, and the answer.

# %%
import price_shop

shop = price_shop.Shop()
print(shop.reset({"prompt": "jam+pie", "shop": 7}))
prices = [shop.step(f"?{name};").observation for name in ("jam", "pie")]
print(prices)
total = shop.step("+".join(prices) + ";").observation
print(total, shop.step("=" + total))

# %% [markdown]
# ## Demonstrations
# A completion over turns is a list: what the policy says, what comes back, and so on in turn; only what the policy says
# is learned. One in three is right; the others ask for one price twice, or guess.

# %%
import random

from rljax.tasks import Example


def flawed(examples):
    made = []
    for index, example in enumerate(examples):
        shop, (one, two) = example.columns["shop"], example.prompt.split("+")
        asked = (one, one) if index % 3 == 1 else (one, two)
        a, b = (price_shop.price(shop, name) for name in asked)
        turns = [f"?{asked[0]};", f" {a}\n", f"?{asked[1]};", f" {b}\n", f"{a}+{b};", f" {a + b}\n", f"={a + b}"]
        if index % 3 == 2:
            turns = [f"?{one};", f" {a}\n", f"={random.Random(index).randint(20, 98)}"]
        made.append(Example(f"{example.prompt}:", {"completion": turns}))
    return made


# %% [markdown]
# ## The run
# `MultiTurn` plays all episodes of a step at once: each has a conversation whose keys and values stay in the decoder,
# and while one waits for its tool others sample. `GRPO` compares eight episodes of a question.

# %%
from rljax.algorithms import GRPO
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
from rljax.experiment.train import train

config = Config(
    steps=24,
    prompts_per_step=24,
    model=FreshModel(
        alphabet="abcdefghijklmnopqrstuvwxyz0123456789+=?:; \n",
        num_layers=2,
        embed_dim=128,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        mlp_dim=384,
    ),
    data=RowsData(rows="price_shop:rows", args={"size": 4000}, test_args={"size": 64, "first": 100_000}),
    actor=MultiTurn(
        make="price_shop:Shop",
        tool_format="price_shop:FORMAT",
        context_length=48,
        prefill_chunks=(8,),
        limits=EnvironmentLimits(turns=6),
    ),
    algorithm=GRPO(group_size=8, kl_coef=0.0),
    sampling=SamplingConfig(max_new_tokens=10),
    update=UpdateConfig(pack_length=256, microbatch_size=8),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    warmup=WarmupConfig(
        steps=400,
        demonstrations=flawed,
        optimizer=OptimizerConfig(learning_rate=4e-3, schedule="cosine", warmup_steps=20, total_steps=400),
    ),
    evaluation=EvaluationConfig(problems=64, samples=8, batch_prompts=24),
    checkpoint=CheckpointConfig(every=0),
)
summary = train(config, "runs/agent", fresh=True)

# %% [markdown]
# ## What it has learned
# Success and calls by step, and an episode of the held-out shops before and after.

# %%
import json

import matplotlib.pyplot as plt
from IPython.display import Image

lines = [json.loads(line) for line in Path("runs/agent/metrics.jsonl").read_text().splitlines()]
figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for axis, name in zip(axes, ("rollout/reward_mean", "rollout/component/tool_calls")):
    axis.plot([line["step"] for line in lines], [line[name] for line in lines])
    axis.set_title(name.rpartition("/")[2])
    axis.set_xlabel("step")
figure.savefig("agent.png")
plt.close(figure)
Image("agent.png")

# %%
evaluations = [json.loads(path.read_text()) for path in sorted(Path("runs/agent/evaluations").glob("*.json"))]
for evaluation in (evaluations[0], evaluations[-1]):
    problem = evaluation["problems"][0]
    print(f"step {evaluation['step']}: avg@8 {evaluation['metrics']['avg@8']:.2f}")
    print(*problem["completions"][:2], sep="\n")
before, after = (evaluation["metrics"]["avg@8"] for evaluation in (evaluations[0], evaluations[-1]))
assert after > before + 0.2, (before, after)
