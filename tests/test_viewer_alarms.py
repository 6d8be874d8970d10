"""Alarms: each has a run that raises it and it alone; a healthy run raises none."""

import re
from pathlib import Path

import pytest

from rljax.viewer import find_alarms
from rljax.viewer.alarms import RULES

PAGE = (Path(__file__).parent.parent / "docs" / "not-learning.md").read_text()
HEALTHY = {
    "rollout/reward_mean": 0.5,
    "rollout/entropy": 0.5,
    "rollout/no_signal_share": 0.3,
    "rollout/truncated_share": 0.02,
    "rollout/invalid_rewards": 0.0,
    "rollout/logprob_gap_max": 8e-6,
    "rollout/logprob_gap_mean": 1e-6,
    "loss/clip_fraction": 0.04,
    "loss/approx_kl": 0.03,
    "loss/skipped": 0.0,
}
FLOAT32 = {"model": {"dtype": "float32"}}
BROKEN = {
    "dead groups": ([{"rollout/no_signal_share": 0.95}] * 3, "95% of the groups"),
    "reward lost": ([{"rollout/reward_mean": 0.6}] + [{"rollout/reward_mean": 0.01}] * 3, "0.01; it has been 0.6"),
    "truncation": ([{"rollout/truncated_share": 0.87}] * 3, "87% of the samples are cut off"),
    "entropy collapse": ([{"rollout/entropy": 0.9}] + [{"rollout/entropy": 0.04}] * 3, "from 0.9 to 0.04 nats"),
    "log-prob gap": ([{"rollout/logprob_gap_max": 0.02}] * 3, "disagree by 0.02 nats"),
    "staleness": ([{"rollout/staleness_max": 9.0}] * 3, "on 9 hand-overs"),
    "KL": ([{"loss/approx_kl": 5.0}], "moves 5 nats"),
    "clipping": ([{"loss/clip_fraction": 0.52}] * 3, "52% of the tokens"),
    "failed rewards": ([{"rollout/invalid_rewards": 3.0}], "failed for 3 samples"),
    "updates skipped": ([{"loss/skipped": 2.0}], "2 updates in a row"),
    "empty steps": ([{"rollout/empty_steps": 4.0}], "4 steps in a row"),
}


def lines(changes):
    """Healthy lines, then those with `changes`."""
    found = [HEALTHY] * (4 - len(changes)) + [{**HEALTHY, **change} for change in changes]
    return [{"step": place + 1, **line} for place, line in enumerate(found)]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_raises_its_alarm_alone(name):
    changes, words = BROKEN[name]
    (alarm,) = find_alarms(lines(changes), FLOAT32)
    assert alarm.name == name and words in alarm.text and alarm.step == 4
    assert alarm.metric in changes[-1] and alarm.remedy


def test_every_rule_has_a_broken_run():
    assert len(RULES) == len(BROKEN)


@pytest.mark.parametrize("name", BROKEN)
def test_an_alarm_goes_when_the_run_recovers(name):
    changes, _ = BROKEN[name]
    recovered = [{"step": 9 + place, **HEALTHY} for place in range(3)]
    assert find_alarms(lines(changes) + recovered, FLOAT32) == []


def test_no_line_of_the_healthy_run_in_the_docs_raises_an_alarm():
    table = PAGE[PAGE.index("| step | `rollout/reward_mean`") :].split("\n\n")[0].splitlines()
    head = [cell.strip(" `") for cell in table[0].strip("|").split("|")]
    rows = [dict(zip(head, map(float, row.strip("|").split("|")), strict=True)) for row in table[2:]]
    assert len(rows) > 3
    for end in range(1, len(rows) + 1):
        assert find_alarms(rows[:end], FLOAT32) == []


def test_bounds_that_depend_on_the_config():
    wide = [{"rollout/logprob_gap_max": 0.02, "rollout/logprob_gap_mean": 0.001}] * 3
    assert find_alarms(lines(wide), {"model": {"dtype": "bfloat16"}}) == []
    assert find_alarms(lines(wide), {**FLOAT32, "rollout": {"staleness": 1}}) == []
    old = [{"rollout/staleness_max": 9.0}] * 3
    assert find_alarms(lines(old), {**FLOAT32, "rollout": {"staleness": 8}}) == []


def test_metrics_that_are_missing_or_not_finite_raise_nothing():
    assert find_alarms([]) == [] and find_alarms([{"step": 1}] * 4) == []
    assert find_alarms([{"step": 1, **dict.fromkeys(HEALTHY, "nan")}] * 4, FLOAT32) == []


def test_every_alarm_names_a_metric_that_the_docs_explain():
    for changes, _ in BROKEN.values():
        for alarm in find_alarms(lines(changes), FLOAT32):
            assert re.search(rf"`{alarm.metric}`", PAGE)
