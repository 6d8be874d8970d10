"""Every config of configs/agents runs two steps of a tiny model, from its file."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rljax.experiment.check import check
from rljax.experiment.train import train

FOLDER = Path(__file__).parent.parent / "configs" / "agents"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "search")


@pytest.fixture
def load(monkeypatch):
    pytest.importorskip("bm25s", reason="search needs the extra agents")
    monkeypatch.syspath_prepend(str(FOLDER))

    def make(name, size):
        spec = importlib.util.spec_from_file_location(f"agent_config_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config(size)

    yield make
    sys.modules.pop("search", None)


@pytest.mark.parametrize("name", NAMES)
def test_the_full_config_is_possible(load, name):
    check(load(name, "full"), 1)


def test_held_out_rows_are_of_every_task_and_none_is_trained_on(load):
    data = load("agentrl", "smoke").data.load()
    assert {e.columns["task"] for e in data.test} == {"search", "sums"} == {e.columns["task"] for e in data.train}
    assert not {str(e.prompt) for e in data.test} & {str(e.prompt) for e in data.train}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_config_trains(load, name, tmp_path):
    config = load(name, "smoke")
    train(config, str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(np.isfinite(line["loss/total"]) for line in lines)
    assert all(line["rollout/new_tokens"] > 0 for line in lines)


def test_an_unknown_size_is_refused(load):
    with pytest.raises(ValueError, match="the size must be one of full, smoke"):
        load("tree_grpo", "huge")
