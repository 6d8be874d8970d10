"""A signal that no type of rljax knows by name, from where it arises to a weight of the loss and to an advantage.

Two places name it: the environment, or the reward, that emits it, and the recipe that declares and uses it.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agent_tasks import Ask
from objectives import term
from test_run_environment import make_config

from rljax.advantages import group_centered, penalized
from rljax.algorithms import Algorithm
from rljax.batching import PackConfig, dense_rows, pack, stack, take_rows
from rljax.experiment import RewardConfig, SingleTurn
from rljax.experiment.train import train
from rljax.losses import clipped, policy_loss, token_mean, token_ratio
from rljax.plans import Column, RolloutPlan
from rljax.testing.toy import tiny_config
from rljax.types import Trajectory

SEEN = []
"""The batches that advantages were made of."""


class Wondering(Ask):
    """Emits the signals: `surprise` of each turn, and `effort`, which adds up to the letters of the episode."""

    def step(self, action):
        step = super().step(action)
        own = {"surprise": 0.25 * self._turns, "effort": float(len(action))}
        return dataclasses.replace(step, counts={**step.counts, **own})


def brevity(completion: str, answer: str) -> float:
    """Emits a component of the reward."""
    return 1.0 / (1 + len(completion) + completion.count(answer))


@dataclasses.dataclass
class Curious:
    """Declares two signals: one weighs tokens, one moves advantages."""

    weigh: str = "surprise"
    tax: str = "effort"
    group_size: int = 4

    def build(self) -> Algorithm:
        credit = penalized(group_centered(), column=self.tax, weight=0.5)

        def advantages(batch):
            jax.debug.callback(lambda b: SEEN.append(jax.tree.map(np.array, b)), batch)
            return credit(batch)

        def weights(logprobs, entropies, rows):
            return 1 + rows.columns[self.weigh]

        def report(logprobs, entropies, rows):
            return {"loss/signal": rows.columns[self.weigh], "loss/advantage": rows.advantages}

        columns = (Column(self.weigh, per="turn"), Column(self.tax, per="row"))
        loss = policy_loss(token_ratio, clipped(), token_mean, weight_fns=[weights], report_fns=[report])
        return Algorithm(RolloutPlan(self.group_size, columns=columns), advantages, loss)


def trained(config, folder):
    """The batch of the one step of a run, and what it logged."""
    SEEN.clear()
    train(dataclasses.replace(config, steps=1), str(folder))
    (batch,) = SEEN
    return batch, json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


def check_used(batch, logged, signal, tax):
    """Weights and advantages of the update are those of `signal` [B, T] and `tax` [B]."""
    mask = batch.action_mask & batch.is_valid[:, None]
    assert np.ptp(signal[mask]) > 0 and np.ptp(tax[batch.is_valid]) > 0
    np.testing.assert_allclose(logged["loss/signal"], signal[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(logged["loss/weight_mean"], 1 + signal[mask].mean(), rtol=1e-5)

    credit = np.zeros(len(tax))
    for group in np.unique(batch.group_id[batch.is_valid]):
        of = batch.is_valid & (batch.group_id == group)
        credit[of] = batch.reward[of] - batch.reward[of].mean() - 0.5 * (tax[of] - tax[of].mean())
    spread = np.broadcast_to(credit[:, None], mask.shape)
    np.testing.assert_allclose(logged["loss/advantage"], spread[mask].mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_counts_of_an_environment_reach_a_weight_and_an_advantage(tmp_path):
    config = make_config(Curious())
    config.actor = dataclasses.replace(config.actor, make="test_open_columns:Wondering")
    batch, logged = trained(config, tmp_path)

    surprise = batch.columns["surprise"]
    has_step = surprise > 0  # a turn that was cut short leads to no step
    np.testing.assert_allclose(surprise, np.where(has_step, 0.25 * (batch.turn_ids + 1), 0))
    assert has_step.any() and not has_step[~batch.action_mask].any()
    check_used(batch, logged, surprise, batch.columns["effort"])


def test_a_component_of_the_reward_reaches_a_weight_and_an_advantage(tmp_path):
    rewards = (
        RewardConfig("rljax.testing:echo_reward"),
        RewardConfig("test_open_columns:brevity", weight=0.1),
    )
    actor = SingleTurn(rewards=rewards, prompt_buckets=(4,))
    batch, logged = trained(tiny_config(algorithm=Curious("brevity", "echo_reward"), actor=actor), tmp_path)
    of_turn, of_row = batch.columns["brevity"], batch.columns["echo_reward"]
    assert of_turn.shape == batch.tokens.shape and of_row.shape == batch.reward.shape
    check_used(batch, logged, of_turn, of_row)


def trajectory(length, prompt, group, **columns):
    mask = np.arange(length) >= prompt
    zeros = np.zeros(length, np.float32)
    return Trajectory(
        tokens=np.arange(length, dtype=np.int32),
        action_mask=mask,
        behavior_logprobs=zeros,
        entropies=zeros,
        turn_ids=np.zeros(length, np.int32),
        policy_version=np.zeros(length, np.int32),
        prompt_id=group,
        group_id=group,
        episode_id=0,
        columns={name: value * mask if np.ndim(value) else value for name, value in columns.items()},
    )


def test_columns_are_padded_taken_and_packed_as_the_tokens_they_belong_to():
    made = [trajectory(n, 2, n % 2, on=np.arange(n) / 8, of=float(n), lone=1.0) for n in (5, 7, 4)]
    made[1] = dataclasses.replace(made[1], columns={k: v for k, v in made[1].columns.items() if k != "lone"})
    batch = stack(made, row_buckets=(4,), length_buckets=(8,))
    assert set(batch.columns) == {"on", "of"}  # what every trajectory has
    assert batch.columns["on"].dtype == batch.columns["of"].dtype == np.float32
    np.testing.assert_array_equal(batch.columns["of"], [5, 7, 4, 0])
    np.testing.assert_array_equal(batch.columns["on"][2], [0, 0, 0.25, 0.375, 0, 0, 0, 0])
    np.testing.assert_array_equal(take_rows(batch, np.array([1])).columns["of"], [7])

    packed = dense_rows(pack(batch, batch.reward[:, None] * batch.action_mask, PackConfig(8)).rows)
    for name, on_row in (("on", False), ("of", True)):
        lines = packed.columns[name]
        assert lines.shape == packed.loss_mask.shape[: 2 if on_row else 3]
        kept = np.asarray(packed.loss_mask.any(-1))
        got = sorted(lines[kept].tolist())
        assert got == sorted(batch.columns[name][:3].tolist())
        np.testing.assert_array_equal(lines[~kept], 0)


def test_columns_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"column 'x' has values of \[0, 1\] dimensions"):
        stack([trajectory(4, 2, 0, x=1.0), trajectory(4, 2, 0, x=np.ones(4))])
    with pytest.raises(ValueError, match="trajectory 0: column 'x' has 3 entries for 4 tokens"):
        stack([dataclasses.replace(trajectory(4, 2, 0), columns={"x": np.ones(3)})])


def test_what_a_column_holds_off_the_loss_mask_is_harmless():
    batch = stack([trajectory(6, 2, 0, x=np.ones(6), y=1.0)] * 2)
    packed = pack(batch, np.ones(batch.tokens.shape), PackConfig(8)).rows
    rows = jax.tree.map(lambda x: x[0], dense_rows(packed))

    def weights(logprobs, entropies, rows):
        return rows.columns["x"] * rows.columns["y"][:, None]

    loss = policy_loss(token_ratio, clipped(), token_mean, weight_fns=[weights])
    spoilt = {
        "x": jnp.where(rows.loss_mask, rows.columns["x"], jnp.nan),
        "y": jnp.where(jnp.any(rows.loss_mask, axis=1), rows.columns["y"], jnp.nan),
    }
    zeros = jnp.zeros(rows.loss_mask.shape)
    want = jax.value_and_grad(loss.loss, has_aux=True)(zeros, zeros, rows)
    got = jax.value_and_grad(loss.loss, has_aux=True)(zeros, zeros, dataclasses.replace(rows, columns=spoilt))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(a, b)
    assert term(weights, zeros, rows).shape == zeros.shape
