"""`make agent-demo`: the task cannot be done without its tools, and the script says what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rljax.analysis.agent_demo import Look, Result, summarise, table, verdict
from rljax.analysis.compare import Spent, train_on_budget
from rljax.experiment.build import Run
from rljax.rollouts.collect import Rollout

ROOT = Path(__file__).parent.parent


@pytest.fixture
def shop(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "configs")
    import shop

    yield shop
    sys.modules.pop("shop", None)


def play(shop, row, actions):
    """(observations, reward, tool calls) of an episode."""
    environment = shop.Shop()
    assert environment.reset(row) == f"{row['prompt']}:"
    steps = [environment.step(action) for action in actions]
    assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
    return [s.observation for s in steps], steps[-1].reward, sum(s.counts["tool_calls"] for s in steps)


def test_the_shop_pays_for_the_right_sum_alone(shop):
    row = {"prompt": "jam+pie", "shop": 7}
    jam, pie = shop.price(7, "jam"), shop.price(7, "pie")
    told = [str(jam), str(pie), str(jam + pie), ""]
    assert play(shop, row, ["?jam;", "?pie;", f"{jam}+{pie};", f"={jam + pie}"]) == (told, 1.0, 3)
    assert play(shop, row, [f"={jam + pie + 1}"]) == ([""], 0.0, 0)
    assert play(shop, row, ["jam;", "?joy;", "1+;", "9**9**9;", "="]) == ([shop.WRONG] * 4 + [""], 0.0, 3)


def test_prices_cannot_be_known(shop):
    prices = np.array([[shop.price(s, name) for name in shop.GOODS] for s in range(400)])
    assert prices.min() == 10 and prices.max() == 49
    best = max(np.mean(prices[:, 0] + prices[:, 1] == guess) for guess in range(20, 99))
    assert best < 0.06  # the best answer without a tool


def test_demonstrations_are_mostly_flawed(shop):
    from rljax.tasks import Example

    examples = [Example(r["prompt"], {"shop": r["shop"]}) for r in shop.rows(400)]
    rewards, calls = [], []
    for example, shown in zip(examples, shop.flawed(examples), strict=True):
        turns = shown.columns["completion"]
        told, reward, count = play(shop, {"prompt": example.prompt, **example.columns}, turns[::2])
        assert [f" {text}\n" for text in told[:-1]] == turns[1::2]  # what the demonstration shows is what tools say
        assert set("".join(turns)) <= set(shop.ALPHABET)
        rewards.append(reward)
        calls.append(count)
    assert 0.2 <= np.mean(rewards) < 0.25 and set(calls) == {0, 1, 3}


class Rows:
    """Stands in for a trajectory of 30 trained tokens."""

    action_mask = np.ones(30, bool)


def test_a_budget_ends_a_run_and_its_looks_are_evenly_spaced(monkeypatch):
    rollout = Rollout([Rows(), Rows()], [], [], np.zeros((1, 2)), {}, {}, {})
    monkeypatch.setattr("rljax.analysis.compare.train_step", lambda run, step: ({"rollout/new_tokens": 40.0}, rollout))
    run, seen = object.__new__(Run), []  # never looked at
    spent = train_on_budget(run, 200, lambda s: seen.append((s.sampled, s.trained, s.steps)), looks=2)
    assert seen == [(0, 0, 0), (120, 180, 3), (200, 300, 5)] and spent == Spent(200, 300, 5)
    assert train_on_budget(run, 200, lambda s: None, of="trained").steps == 4


def result(method, seed, *scores):
    looks = [Look(1000 * i, 1500 * i, i, s, s, 3 * s, (0.0, 10), []) for i, s in enumerate(scores)]
    return Result(method, seed, looks, 0, 0, 1.0)


def test_a_winner_is_named_only_outside_the_spread():
    close = [result("A", i, 0.1, 0.5, 0.8 + 0.02 * i) for i in range(3)]
    close += [result("B", i, 0.1, 0.9, 0.86 - 0.02 * i) for i in range(3)]
    said = verdict(close).splitlines()
    assert said[0] == "without a tool: 0 of 150 held-out episodes that called none were right"
    assert "mean +0.40: outside the spread" in said[1] and "no winner" in said[2]
    lines = summarise(close)
    assert lines[0]["avg_after"] == pytest.approx([0.82, 0.02]) and "0.10 -> 0.82 ± 0.02" in table(lines, 8)


@pytest.mark.slow
def test_the_script_runs(tmp_path):
    command = ["launch/agent_demo.py", "--config=configs/agent_demo.py:smoke", "--tokens=300", "--seeds=1"]
    done = subprocess.run(
        [sys.executable, *command, f"--workdir={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "RLJAX_ALLOCATOR": "system"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "agent_demo.json").read_text())
    assert (tmp_path / "agent_demo.png").stat().st_size > 10_000
    grpo, tree = report["runs"]
    assert (grpo["method"], tree["method"]) == ("GRPO", "Tree-GRPO")
    assert grpo["forks"] == 0 < tree["forks"]
    assert grpo["looks"][0]["transcripts"] == tree["looks"][0]["transcripts"]  # one warm start
    assert all(run["looks"][-1]["sampled"] >= 300 for run in report["runs"])
    for text in ("held-out success, tool calls per episode", "warm start", "reward 0", "without a tool"):
        assert text in done.stdout


def test_the_script_finds_its_own_config():
    command = [sys.executable, "-m", "rljax", "agent-demo", "--seeds=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: flag --seeds=0"), done.stderr[-500:]
