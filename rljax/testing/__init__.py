"""A run that takes seconds, and what to compare of two runs. For tests and notebooks only."""

from rljax.tasks.echo import EchoData, echo_reward
from rljax.testing.results import params_fingerprint, rollout_records, run_metrics
from rljax.testing.toy import tiny_config

__all__ = ["EchoData", "echo_reward", "params_fingerprint", "rollout_records", "run_metrics", "tiny_config"]
