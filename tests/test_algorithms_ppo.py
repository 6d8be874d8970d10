"""PPO: its credit and targets against loops, and its runs: that they train a critic, warm it up, resume and learn."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from breaking import break_off
from objectives import MASK, NAN, float64, make_batch

import rljax.experiment.train
from rljax.advantages import gae_advantages, gae_returns, length_adaptive
from rljax.algorithms import PPO
from rljax.experiment import CheckpointConfig, CriticConfig, EvaluationConfig
from rljax.experiment.build import build
from rljax.experiment.train import train
from rljax.testing import params_fingerprint, rollout_records, run_metrics, tiny_config
from rljax.training import Checkpointer, Critic, OptimizerConfig, fingerprint, read_jsonl

TESTS = Path(__file__).parent
EXAMPLE = make_batch(group_id=[0, 1], rewards=[1.0, 0.5], lengths=[4, 3], prompt=0, dtype=np.float64)
EXAMPLE = dataclasses.replace(EXAMPLE, values=np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.4, 0.3, NAN]]))


def test_the_worked_example():
    with float64():
        returns = gae_returns(lam=0.95)(EXAMPLE)
        np.testing.assert_allclose(returns, [[0.899675, 0.9365, 0.97, 1], [0.4855, 0.49, 0.5, 0]], atol=1e-12)
        plain = gae_advantages(lam=0.95, whiten=False)(EXAMPLE)
        np.testing.assert_allclose(plain, [[0.799675, 0.7365, 0.67, 0.6], [-0.0145, 0.09, 0.2, 0]], atol=1e-12)
        algorithm = PPO().build()
        want = [1.0657663050, 0.8784455029, 0.6812657111, 0.4737080356, -1.3483518443, -1.0384978859, -0.7123358244]
        np.testing.assert_allclose(np.asarray(algorithm.advantage_fn(EXAMPLE))[MASK], want, atol=2e-10)
        np.testing.assert_array_equal(algorithm.plan.critic.returns_fn(EXAMPLE), returns)
        whole = PPO(critic_lam=1.0).build()
        np.testing.assert_allclose(whole.plan.critic.returns_fn(EXAMPLE), np.where(MASK, [[1.0], [0.5]], 0), atol=1e-12)
        np.testing.assert_array_equal(whole.advantage_fn(EXAMPLE), algorithm.advantage_fn(EXAMPLE))


def test_observations_between_turns_are_stepped_over():
    """The sheet's example of tool results inside a row."""
    mask = np.array([[1, 1, 0, 0, 0, 1, 1]], bool)
    values = np.array([[0.2, 0.3, NAN, NAN, NAN, 0.5, 0.6]])
    batch = make_batch(group_id=[0], rewards=[1.0], lengths=[7], prompt=0, dtype=np.float64)
    batch = dataclasses.replace(batch, action_mask=mask, values=values)
    with float64():
        found = gae_advantages(lam=0.9, whiten=False)(batch)
        np.testing.assert_allclose(found, [[0.6526, 0.614, 0, 0, 0, 0.46, 0.4]], atol=1e-12)
        np.testing.assert_allclose(gae_returns(lam=1.0)(batch), mask, atol=1e-12)


def loop(batch, *, lam, gamma, kl_coef):
    """(advantages, returns) token by token, backwards; `lam` [B]."""
    advantages, returns = np.zeros((2, *batch.tokens.shape))
    for b in range(len(batch.lengths)):
        if not batch.is_valid[b]:
            continue
        value_after, advantage_after, is_last = 0.0, 0.0, True
        for t in reversed(np.flatnonzero(batch.action_mask[b])):
            kl = np.clip(batch.behavior_logprobs[b, t] - batch.ref_logprobs[b, t], -20, 20)
            reward = (batch.reward[b] if is_last else 0.0) - kl_coef * kl
            delta = reward + gamma * value_after - batch.values[b, t]
            advantage_after = delta + gamma * lam[b] * advantage_after
            value_after, is_last = batch.values[b, t], False
            advantages[b, t], returns[b, t] = advantage_after, advantage_after + value_after
    return advantages, returns


@pytest.mark.parametrize("alpha", [None, 1.5, 0.3])
def test_credit_and_targets_equal_the_backward_loop(alpha):
    rng = np.random.default_rng(3)
    lengths = np.array([6, 1, 4, 5])
    batch = make_batch(
        group_id=[0, 1, 2, 3], rewards=rng.normal(size=4), lengths=lengths, is_valid=[1, 1, 1, 0], dtype=np.float64
    )
    batch = dataclasses.replace(batch, reward=np.where(batch.is_valid, batch.reward, NAN))
    batch.action_mask[0, 4] = False
    counts = batch.action_mask.sum(axis=1)
    lam = np.full(4, 0.9) if alpha is None else np.maximum(1 - 1 / (alpha * counts), 0)
    algorithm = PPO(gamma=0.97, lam=0.9, critic_lam=0.8, length_alpha=alpha, kl_coef=0.1, whiten=False).build()
    with float64():
        advantages = algorithm.advantage_fn(batch)
        returns = algorithm.plan.critic.returns_fn(batch)
    np.testing.assert_allclose(advantages, loop(batch, lam=lam, gamma=0.97, kl_coef=0.1)[0], atol=1e-12)
    np.testing.assert_allclose(returns, loop(batch, lam=np.full(4, 0.8), gamma=0.97, kl_coef=0.1)[1], atol=1e-12)


def test_lambda_by_length_is_the_worked_example():
    mask = np.arange(1000) < np.array([[10], [100], [1000], [0]])
    np.testing.assert_allclose(length_adaptive(1.5)(mask)[:3, 0], [0.933333, 0.993333, 0.999333], atol=1e-6)
    np.testing.assert_allclose(length_adaptive(0.05)(mask)[:, 0], [0, 0.8, 0.98, 0], atol=1e-6)  # never below 0


def test_without_values_the_error_says_what_is_missing():
    for function in (gae_advantages(), gae_returns()):
        with pytest.raises(ValueError, match=r"batch\.values, which is None; give the plan a critic"):
            function(dataclasses.replace(EXAMPLE, values=None))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (PPO(lam=1.5), "PPO: lam=1.5 must be between 0 and 1"),
        (PPO(critic_lam=-0.1), "PPO: critic_lam=-0.1 must be between 0 and 1"),
        (PPO(gamma=2.0), "PPO: gamma=2.0 must be between 0 and 1"),
        (PPO(length_alpha=0.0), "alpha=0.0 must be above 0"),
        (PPO(value_clip=-1.0), "clip=-1.0 of the value loss must be above 0"),
        (PPO(group_size=0), "group_size=0 must be at least 1"),
    ],
)
def test_impossible_hyperparameters_are_one_clear_line(recipe, message):
    with pytest.raises(ValueError, match=message) as error:
        recipe.build()
    assert "\n" not in str(error.value)


def config(**changes):
    """Four steps of single samples, two minibatches twice over, the first step for the critic alone."""
    settings = {
        "steps": 4,
        "prompts_per_step": 16,
        "algorithm": PPO(critic_lam=1.0, kl_coef=0.01),
        "update": dataclasses.replace(tiny_config().update, minibatches=2, epochs=2),
        "critic": CriticConfig(epochs=3, warmup_steps=1, optimizer=OptimizerConfig(learning_rate=2e-2)),
        "evaluation": EvaluationConfig(problems=2, samples=1),
    }
    return tiny_config(**settings | changes)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder, train(config(checkpoint=CheckpointConfig(every=1, keep_last=4)), str(folder))


def test_a_run_trains_policy_and_critic(straight):
    lines = read_jsonl(straight[0] / "metrics.jsonl")
    assert len(lines) == 4
    for line in lines:
        for name in ("loss", "explained_variance", "value_mean", "return_mean", "clip_fraction", "grad_norm"):
            assert np.isfinite(line[f"critic/{name}"])
        assert line["critic/grad_norm"] > 0 and line["critic/skipped"] == 0
        assert all(np.isfinite(v) for v in line.values())
        assert line["pack/unique_tokens"] > 0
    assert lines[0]["critic/learning_rate"] == pytest.approx(2e-2)
    assert lines[0]["critic/explained_variance"] == 0  # its values are 0 before the first update
    assert "loss/policy" not in lines[0] and all("loss/policy" in line for line in lines[1:])
    assert all(line["rollout/logprob_gap_max"] < 2e-5 for line in lines[1:])
    assert lines[3]["compile/count"] == 0


def test_while_the_critic_warms_up_the_policy_stands_still(straight):
    folder, _ = straight
    start = build(config())
    first, second = (params_fingerprint(folder, step) for step in (1, 2))
    assert first == fingerprint(start.initial_params())
    assert second != first


def whole_state(folder):
    """Checksums of everything in the newest checkpoint, critic and moments included."""
    restored, _, step = Checkpointer(folder / "checkpoints").restore(build(config()).abstract_state())
    assert step == 4
    return fingerprint(restored)


@pytest.mark.slow
def test_a_run_that_breaks_off_and_goes_on_equals_one_that_does_not(straight, tmp_path, monkeypatch):
    break_off(config(), tmp_path, before=3)
    step = rljax.experiment.train.train_step
    steps_run = []
    monkeypatch.setattr(
        rljax.experiment.train, "train_step", lambda run, index: (steps_run.append(index), step(run, index))[1]
    )
    train(config(), str(tmp_path))
    assert steps_run and steps_run[0] > 0, "it did not resume"
    assert run_metrics(tmp_path) == run_metrics(straight[0])
    assert rollout_records(tmp_path) == rollout_records(straight[0])
    assert whole_state(tmp_path) == whole_state(straight[0])
    assert any(name.startswith("critic/opt_state") for name in whole_state(tmp_path))


@pytest.mark.slow
def test_a_killed_run_gives_the_same_critic(straight, tmp_path):
    """Killed once two steps are logged, while the second checkpoint may still be on its way to the disk."""
    program = "import sys; from test_algorithms_ppo import config, train; train(config(), sys.argv[1])"
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}")
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    with open(tmp_path / "log", "ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        until = time.monotonic() + 300
        while process.poll() is None and len(run_metrics(tmp_path / "run")) < 2:
            assert time.monotonic() < until, "it never got there"
            time.sleep(0.001)
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        process.kill()
        process.wait(timeout=60)
        assert len(run_metrics(tmp_path / "run")) < 4
        subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=300, check=True)
    assert run_metrics(tmp_path / "run") == run_metrics(straight[0])
    assert whole_state(tmp_path / "run") == whole_state(straight[0])


@pytest.mark.slow
def test_advantages_of_a_run_are_those_of_the_critic_before_its_update(tmp_path, monkeypatch):
    """The values are 0 before the first update, so the advantage of a row is largest at its end: the reward."""
    batches, update = [], Critic.update

    def spy(self, state, batch):
        batches.append(batch)
        state, metrics = update(self, state, batch)
        assert self.with_values(state, batch).values.any()
        return state, metrics

    monkeypatch.setattr(Critic, "update", spy)
    train(config(steps=1, checkpoint=CheckpointConfig(every=0), algorithm=PPO(whiten=False)), str(tmp_path))
    (batch,) = batches
    (records,) = rollout_records(tmp_path).values()
    assert not batch.values.any() and batch.reward.any()
    np.testing.assert_allclose([record["reward"] for record in records], batch.reward)
    np.testing.assert_allclose([record["advantage"] for record in records], batch.reward, rtol=1e-6)


@pytest.mark.slow
def test_the_toy_task_is_learned_without_groups(tmp_path):
    toy = tiny_config(
        steps=60,
        prompts_per_step=48,
        algorithm=PPO(),
        critic=CriticConfig(warmup_steps=5, optimizer=OptimizerConfig(learning_rate=1e-2)),
        checkpoint=CheckpointConfig(every=0),
    )
    train(toy, str(tmp_path))
    lines = run_metrics(tmp_path)
    rewards = [line["rollout/reward_mean"] for line in lines]
    assert np.mean(rewards[:5]) < 0.2
    assert np.mean(rewards[-5:]) > 3 * np.mean(rewards[:5]), rewards
    assert np.mean([line["critic/explained_variance"] for line in lines[-20:]]) > 0.2
