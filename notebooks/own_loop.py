# %% [markdown]
# # Pure functions in a loop of your own
# `rljax.losses`, `rljax.advantages` and `rljax.ops` take arrays and return arrays. Here a policy that rljax knows
# nothing about (a table of logits) is trained with them, in a loop of twenty lines. `jit`, `grad` and `vmap` work as
# always.

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
# ## A loss out of parts
# A ratio, a surrogate and an aggregation; weights, filters and penalties as many as you like. This is DAPO's clipping
# with GRPO's mean.

# %%
import jax.numpy as jnp
import optax

from rljax.losses import clipped, kl_penalty, policy_loss, sequence_mean, token_ratio
from rljax.ops import segment_mean, segment_std
from rljax.types import Rows

objective = policy_loss(
    ratio_fn=token_ratio, surrogate_fn=clipped(clip_low=0.2, clip_high=0.28), aggregate_fn=sequence_mean
)

# %% [markdown]
# ## A policy and a reward
# Four prompts, three tokens of an answer, eleven letters: the table holds a distribution for each place. The reward
# is the share of letters that are the prompt's own.

# %%
PROMPTS, LENGTH, LETTERS, GROUP = 4, 3, 11, 16
group_id = jnp.repeat(jnp.arange(PROMPTS), GROUP)
mask = jnp.ones((PROMPTS * GROUP, LENGTH), bool)
valid = jnp.ones(PROMPTS * GROUP, bool)


def logprobs_of(table, tokens):
    """Log-probs and entropies [B, T] of `tokens` under the table [P, T, V]."""
    logprobs = jax.nn.log_softmax(table)[group_id]
    entropies = -(jnp.exp(logprobs) * logprobs).sum(-1)
    return jnp.take_along_axis(logprobs, tokens[..., None], -1)[..., 0], entropies


def reward_of(tokens):
    return (tokens == group_id[:, None]).mean(-1)


# %% [markdown]
# ## The loop
# Credit is read off the group: reward minus its mean, over its deviation. Two updates a rollout, so that ratios leave
# 1.

# %%
optimizer = optax.adam(0.2)


@jax.jit
def step(table, moments, key):
    tokens = jax.random.categorical(key, jnp.repeat(table, GROUP, axis=0))
    reward = reward_of(tokens)
    mean, std = (fn(reward, group_id, valid)[group_id] for fn in (segment_mean, segment_std))
    old, _ = logprobs_of(table, tokens)
    rows = Rows(
        loss_mask=mask,
        loss_weights=objective.token_weights(mask),
        token_count=mask.sum().astype(jnp.float32),
        advantages=jnp.broadcast_to(((reward - mean) / (std + 1e-6))[:, None], mask.shape),
        behavior_logprobs=old,
        old_logprobs=old,
        source=jnp.zeros(len(tokens), jnp.int32),
    )
    for _ in range(2):
        gradient, metrics = jax.grad(lambda t: objective.loss(*logprobs_of(t, tokens), rows), has_aux=True)(table)
        updates, moments = optimizer.update(gradient, moments)
        table = optax.apply_updates(table, updates)
    return table, moments, reward.mean(), metrics


table = jnp.zeros((PROMPTS, LENGTH, LETTERS))
moments = optimizer.init(table)
rewards = []
for number in range(30):
    table, moments, reward, metrics = step(table, moments, jax.random.key(number))
    rewards.append(float(reward))
print([round(reward, 2) for reward in rewards])
assert rewards[-1] > 0.8 > 0.3 > rewards[0]

# %% [markdown]
# The metrics are those of every run of rljax.

# %%
{name: round(float(value), 4) for name, value in metrics.items()}

# %% [markdown]
# ## Another method is another part
# A KL penalty, or any function of `(logprobs, entropies, rows)`, goes in beside. `docs/papers.md` writes out every
# method this way.

# %%
with_kl = policy_loss(token_ratio, clipped(clip_low=0.2, clip_high=0.28), sequence_mean, penalties=(kl_penalty(0.04),))
