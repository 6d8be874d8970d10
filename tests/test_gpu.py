"""What only a GPU can show; `make test-gpu` runs it on a machine that has one."""

import jax
import pytest

from rljax.experiment.train import train
from rljax.testing import tiny_config
from rljax.training import read_jsonl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU: make test-gpu"),
]


def test_the_loop_runs_on_a_gpu_and_sampler_and_trainer_agree(tmp_path):
    """With matrix products in full float32, so that the bound is the one of the CPU."""
    with jax.default_matmul_precision("highest"):
        train(tiny_config(), str(tmp_path))
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert len(lines) == tiny_config().steps
    assert max(line["rollout/logprob_gap_max"] for line in lines) < 2e-5
    assert sum(line["compile/count"] for line in lines[2:]) == 0
