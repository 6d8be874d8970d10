"""vLLM as the engine of a run, in an environment of its own: `make test-vllm VLLM=path/to/vllm`."""

import dataclasses
import os
import socket

import jax
import numpy as np
import pytest

from rljax.experiment import FreshModel, Remote
from rljax.experiment.build import build
from rljax.rollouts import EngineFailed, number_groups
from rljax.testing import tiny_config

VLLM = os.environ.get("RLJAX_VLLM", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM, reason="RLJAX_VLLM names no vllm command; see docs/engines.md"),
]
# Beyond the rounding of float32 over two layers: vLLM adds up in another order, and by other kernels.
FLOAT32 = 1e-4


def run_with(**changes):
    """A run of a tiny Llama whose head is one that vLLM has CPU kernels for, over one vLLM that it starts itself."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = (
        "env VLLM_SERVER_DEV_MODE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind "
        f"{VLLM} serve {{weights}} "
        "--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --enable-scale-out --skip-tokenizer-init "
        "--max-model-len 64 --logprobs-mode processed_logprobs --generation-config vllm"
    )
    config = tiny_config(
        model=FreshModel(
            alphabet="abcdefgh=", num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=64
        ),
    )
    actor = Remote(
        engines=(f"http://127.0.0.1:{port}",),
        engine="vllm",
        command=command,
        rewards=config.actor.rewards,
        longest_prompt=4,
        request_s=300.0,
        **changes,
    )
    return build(dataclasses.replace(config, actor=actor))


def moved(run):
    """Weights that differ in every layer, as those of another seed."""
    return jax.tree.map(lambda x: x[::-1] if x.ndim else x, run.initial_params())


def test_a_vllm_that_is_started_anew_speaks_with_the_weights_of_each_hand_over():
    run = run_with(hand_over="restart")
    with run.actor as actor:
        for version, params in enumerate((run.initial_params(), moved(run))):
            actor.set_params(params, version)
            actor.submit(number_groups(run.dataset.train[:4], 4), run.algorithm.plan, step=version)
            groups = actor.ready(4)
            assert actor.stats["probe_gap"] < FLOAT32
            samples = [sample for group in groups for sample in group.samples]
            assert len(samples) == 16 and all(1 <= len(sample.tokens) <= 4 for sample in samples)
            assert len({tuple(sample.tokens.tolist()) for sample in samples}) > 8
            stops = run.tokenizer.stop_ids
            assert all((sample.finish_reason == "stop") == (sample.tokens[-1] in stops) for sample in samples)
            assert all(np.isfinite(sample.logprobs).all() for sample in samples)


def test_a_reload_of_vllm_in_place_that_is_partial_is_found_out():
    run = run_with(hand_over="reload")
    with run.actor as actor:
        actor.set_params(run.initial_params(), 0)
        with pytest.raises(EngineFailed, match=r"log-probs that are 0.* above config.actor.probe_bound=0.001"):
            actor.set_params(moved(run), 1)
