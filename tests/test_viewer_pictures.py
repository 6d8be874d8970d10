"""The pictures of docs/viewer.md, of a run over turns that forks: `PICTURES=docs pytest -m slow` writes them there."""

import dataclasses
import os
import threading
from pathlib import Path

import pytest
from chromium import BINARY, chromium

from rljax.algorithms import TreeGRPO
from rljax.experiment import LogConfig
from rljax.experiment.train import train
from rljax.viewer import Answers, open_server

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARY is None, reason="Chromium is not installed (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model that asks tools for prices, with a short warm-up: Tree-GRPO forks at the beginning of turns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "configs")
        from agent_demo import get_config

        config = get_config()
        config.steps = 8
        config.prompts_per_step = 6
        config.warmup.steps = 200
        config.evaluation = dataclasses.replace(config.evaluation, problems=8, samples=2)
        config.algorithm = TreeGRPO(chains=4, points=1, kl_coef=0.0)
        config.update = dataclasses.replace(config.update, row_buckets=(64,))
        config.log = LogConfig(per_token=True)
        folder = tmp_path_factory.mktemp("runs") / "tree_grpo"
        train(config, str(folder))
    return folder


def test_a_run_over_turns_is_pictured(folder, tmp_path):
    take_pictures(folder, Path(os.environ.get("PICTURES", tmp_path)), tmp_path)


def take_pictures(folder, where, tmp_path):
    """Writes them into the folder `where`; the browser's and the viewer's own files go to `tmp_path`."""
    with Answers([folder], index_folder=tmp_path / "index") as answers, open_server(answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        steps = [step for step, _ in answers("runs", {})["runs"][0]["rollouts"]]
        assert steps == list(range(1, 9))

        # The group whose rewards differ most, with as many forks as any.
        groups = [(g, step) for step in steps for g in answers("groups", {"run": "0", "step": str(step)})]
        mixed, step = max(groups, key=lambda found: (found[0]["high"] - found[0]["low"], found[0]["reward"], found[1]))
        assert mixed["low"] < mixed["high"]
        place = f"run=0&step={step}&untrained=0&group={mixed['group']}"
        views = {
            "viewer-overview": ("view=overview", 640),
            "viewer-forest": (f"view=rollouts&{place}&sample=0&colour=advantage", 1060),
            "viewer-compare": (f"view=compare&step1=1&step2={steps[-1]}&colour=entropy", 1060),
        }

        with chromium(tmp_path / "profile") as page:
            for name, (view, height) in views.items():
                page.open(f"http://127.0.0.1:{server.server_port}/#{view}", height=height)
                page.wait("document.getElementById('main')?.dataset.shown")
                if name != "viewer-overview":
                    page.wait("document.querySelectorAll('.forest .branch').length >= 8")
                    assert page.ask("document.querySelectorAll('.span-observation').length") > 0
                    assert page.ask("document.querySelectorAll('.turn').length") > 1
                    painted = "[...document.querySelectorAll('.token')].some((node) => node.style.background)"
                    assert page.ask(painted)
                page.picture(where / f"{name}.png")
                assert (where / f"{name}.png").stat().st_size > 20_000
            assert page.problems == []
        server.shutdown()
