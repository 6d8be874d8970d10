"""A tiny run, what to compare of two runs, minibatches in shapes. For tests, benchmarks and notebooks only."""

from rljax.tasks.echo import EchoData, echo_reward
from rljax.testing.results import params_fingerprint, rollout_records, run_metrics
from rljax.testing.shapes import full_minibatch
from rljax.testing.toy import tiny_config

__all__ = [
    "EchoData",
    "echo_reward",
    "full_minibatch",
    "params_fingerprint",
    "rollout_records",
    "run_metrics",
    "tiny_config",
]
