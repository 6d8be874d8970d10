"""Our advantages and losses beside those that TRL and verl publish, on the same random inputs, in float64.

    python benchmarks/parity/losses.py --json=parity.json
    python benchmarks/parity/losses.py --peers=trl

Each peer runs its own shipped code in an environment of its own, made on first use. Rows have gaps, as in several
turns, and are of unequal length; ratios reach far outside every clipping range. Compared are values and, of losses,
gradients with respect to the log-probs; a difference is relative to the largest number of the peer's array. One above
1e-5 fails the script (exit code 1).
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from _environments import Missing, ensure  # noqa: E402
from _exchange import read_answer, write_data  # noqa: E402

from rljax import advantages as adv  # noqa: E402
from rljax import losses as ls  # noqa: E402
from rljax.algorithms import GKD  # noqa: E402
from rljax.types import RolloutBatch, Rows  # noqa: E402

WANTED = 1e-5
ROWS, GROUP, LENGTH, PROMPT = 16, 4, 24, 3
VOCABULARY = 7
Data = Mapping[str, np.ndarray]


def make_data(seed: int) -> dict[str, np.ndarray]:
    """Completions of unequal length, with tokens inside that the policy did not emit."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, LENGTH)
    lengths = rng.integers(5, LENGTH + 1, ROWS)
    place = np.arange(LENGTH)
    start = rng.integers(1, 3, ROWS)[:, None]
    mask = (place < lengths[:, None]) & ~((place >= start) & (place < start + 2))
    old = -rng.exponential(size=shape)
    rewards = rng.normal(size=ROWS).round(2)
    last = lengths - 1
    token_rewards = np.zeros(shape)
    token_rewards[np.arange(ROWS), last] = rewards
    row_advantages = rng.normal(size=ROWS)
    values = rng.normal(size=shape)
    return {
        "mask": mask,
        "logprobs": old + rng.normal(size=shape) * 0.5,
        "old": old,
        "behavior": old,
        "ref": old + rng.normal(size=shape) * 0.3,
        "row_advantages": row_advantages,
        "advantages": np.where(mask, row_advantages[:, None], 0),
        "rewards": rewards,
        "token_rewards": token_rewards,
        "groups": np.arange(ROWS) // GROUP,
        "values": values,
        "predicted": values + rng.normal(size=shape) * 0.4,
        "returns": rng.normal(size=shape),
        "student_logits": 2 * rng.normal(size=(*shape, VOCABULARY)),
        "teacher_logits": 2 * rng.normal(size=(*shape, VOCABULARY)),
    }


def batch_of(d: Data) -> RolloutBatch:
    """As a rollout with a prompt of `PROMPT` tokens before each completion."""

    def after_prompt(x):
        return np.concatenate([np.zeros((ROWS, PROMPT), x.dtype), x], axis=1)

    mask, nothing = after_prompt(d["mask"]), np.zeros(ROWS, np.int32)
    ends = mask.shape[1] - mask[:, ::-1].argmax(axis=1)
    return RolloutBatch(
        tokens=np.ones(mask.shape, np.int32),
        action_mask=mask,
        behavior_logprobs=after_prompt(d["behavior"]),
        entropies=np.zeros(mask.shape),
        turn_ids=np.zeros(mask.shape, np.int32),
        policy_version=np.zeros(mask.shape, np.int32),
        lengths=ends.astype(np.int32),
        reward=d["rewards"],
        is_valid=np.ones(ROWS, bool),
        is_truncated=np.zeros(ROWS, bool),
        group_id=d["groups"].astype(np.int32),
        episode_id=np.arange(ROWS, dtype=np.int32),
        source=nothing,
        parent_row=nothing - 1,
        fork_index=nothing,
        fork_score=np.zeros(ROWS),
        intervention=nothing,
        ref_logprobs=after_prompt(d["ref"]),
        values=after_prompt(d["values"]),
    )


def our_advantage(advantage_fn: adv.AdvantageFn) -> Callable[[Data], dict[str, np.ndarray]]:
    return lambda d: {"advantage": np.asarray(advantage_fn(batch_of(d)))[:, PROMPT:]}


def our_gae(lam: float, gamma: float) -> Callable[[Data], dict[str, np.ndarray]]:
    """The returns, and the advantages that GAE gives before whitening, whitened."""

    def call(d: Data) -> dict[str, np.ndarray]:
        batch = batch_of(d)
        found = adv.gae_advantages(lam=lam, gamma=gamma, whiten=True)(batch)
        returns = adv.gae_returns(lam=lam, gamma=gamma)(batch)
        return {"advantage": np.asarray(found)[:, PROMPT:], "returns": np.asarray(returns)[:, PROMPT:]}

    return call


def our_loss(*parts: Any, **more: Any) -> Callable[[Data], dict[str, np.ndarray]]:
    """Loss and gradient of `policy_loss(*parts, **more)`, the minibatch in one piece."""
    loss = ls.policy_loss(*parts, **more)

    def call(d: Data) -> dict[str, np.ndarray]:
        rows = rows_of(d, loss)
        entropies = jnp.zeros(d["old"].shape)
        value, slope = jax.value_and_grad(lambda x: loss.loss(x, entropies, rows)[0])(jnp.asarray(d["logprobs"]))
        return {"loss": np.asarray(value), "gradient": np.asarray(slope)}

    return call


def our_divergence(beta: float, temperature: float) -> Callable[[Data], dict[str, np.ndarray]]:
    """GKD's divergence as a mean over tokens, and its gradient by the student's logits, which its slopes give."""
    divergence = GKD(beta=beta).divergence()

    def call(d: Data) -> dict[str, np.ndarray]:
        log_p, log_q = (jax.nn.log_softmax(d[f"{who}_logits"] / temperature) for who in ("teacher", "student"))
        found = divergence(log_p, log_q)
        weights = d["mask"] / d["mask"].sum()
        slope = jnp.exp(log_q) * (found.slopes - found.mean_slope[..., None]) / temperature
        return {"loss": np.asarray((weights * found.value).sum()), "gradient": np.asarray(weights[..., None] * slope)}

    return call


def our_value_loss(clip: float) -> Callable[[Data], dict[str, np.ndarray]]:
    loss = ls.value_loss(clip=clip)

    def call(d: Data) -> dict[str, np.ndarray]:
        # A critic's rows carry its old values and its targets where a policy's have log-probs and advantages.
        rows = rows_of(d | {"old": d["values"], "advantages": d["returns"]}, loss)
        nothing = jnp.zeros(d["old"].shape)
        value, slope = jax.value_and_grad(lambda x: loss.loss(x, nothing, rows)[0])(jnp.asarray(d["predicted"]))
        return {"loss": np.asarray(value), "gradient": np.asarray(slope)}

    return call


def rows_of(d: Data, loss: ls.Loss) -> Rows:
    mask = d["mask"]
    return Rows(
        loss_mask=mask,
        loss_weights=loss.token_weights(mask),
        token_count=jnp.asarray(float(mask.sum())),
        advantages=jnp.asarray(d["advantages"]),
        behavior_logprobs=jnp.asarray(d["behavior"]),
        old_logprobs=jnp.asarray(d["old"]),
        source=np.zeros(ROWS, np.int32),
        ref_logprobs=jnp.asarray(d["ref"]),
    )


@dataclasses.dataclass(frozen=True)
class Call:
    """One comparison: what the peer is asked for, and what we compute."""

    peer: str
    name: str
    kind: str
    settings: dict[str, Any]
    ours: Callable[[Data], dict[str, np.ndarray]]


def trl(name: str, ours, config: dict[str, Any], *, trainer: str = "grpo", kind: str = "loss") -> Call:
    common = {"num_generations": GROUP, "per_device_train_batch_size": ROWS, "max_completion_length": LENGTH}
    settings = {"trainer": trainer, "num_generations": GROUP, "config": common | {"beta": 0.0} | config}
    return Call("trl", name, kind, settings, ours)


def verl_loss(name: str, ours, registered: str, *, aggregation: str = "token-mean", **config: Any) -> Call:
    clip = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2} | config
    return Call("verl", name, "loss", {"name": registered, "aggregation": aggregation, "config": clip}, ours)


def verl_advantage(name: str, ours, registered: str, **more: Any) -> Call:
    return Call("verl", name, "advantage", {"name": registered, **more}, ours)


EVEN, WIDE = ls.clipped(clip_low=0.2, clip_high=0.2), ls.clipped(clip_low=0.2, clip_high=0.28)
DUAL = ls.clipped(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
CALLS = (
    trl(
        "GRPO, k3",
        our_loss(ls.token_ratio, EVEN, ls.sequence_mean, penalties=[ls.kl_penalty(0.04)]),
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
    ),
    trl(
        "GRPO, k3 corrected",
        our_loss(ls.token_ratio, EVEN, ls.sequence_mean, penalties=[ls.importance_corrected_kl(0.04)]),
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": True},
    ),
    trl("Dr.GRPO", our_loss(ls.token_ratio, EVEN, ls.fixed_length(LENGTH)), {"loss_type": "dr_grpo"}),
    trl("DAPO", our_loss(ls.token_ratio, WIDE, ls.token_mean), {"loss_type": "dapo", "epsilon_high": 0.28}),
    trl(
        "GSPO",
        our_loss(ls.sequence_ratio, ls.clipped(clip_low=0.03, clip_high=0.04), ls.sequence_mean),
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.03,
            "epsilon_high": 0.04,
        },
    ),
    trl(
        "CISPO",
        our_loss(ls.token_ratio, ls.cispo(max_ratio=1.5), ls.token_mean),
        {"loss_type": "cispo", "epsilon_high": 1.5},
    ),
    trl("SAPO", our_loss(ls.token_ratio, ls.soft_gate(), ls.sequence_mean), {"loss_type": "sapo"}),
    trl("GRPO's advantage", our_advantage(adv.group_normalized(epsilon=1e-4)), {}, kind="advantage"),
    trl("Dr.GRPO's advantage", our_advantage(adv.group_centered()), {"scale_rewards": "none"}, kind="advantage"),
    trl("RLOO's advantage", our_advantage(adv.leave_one_out()), {}, trainer="rloo", kind="advantage"),
    verl_loss("PPO, dual clip", our_loss(ls.token_ratio, DUAL, ls.token_mean), "vanilla", clip_ratio_high=0.28),
    verl_loss(
        "GRPO",
        our_loss(ls.token_ratio, ls.clipped(dual_clip=3.0), ls.sequence_mean),
        "vanilla",
        aggregation="seq-mean-token-mean",
    ),
    verl_loss(
        "Dr.GRPO",
        our_loss(ls.token_ratio, ls.clipped(dual_clip=3.0), ls.fixed_length(LENGTH)),
        "vanilla",
        aggregation="seq-mean-token-sum-norm",
    ),
    verl_loss(
        "GSPO",
        our_loss(ls.sequence_token_ratio, ls.clipped(clip_low=0.03, clip_high=0.04), ls.sequence_mean),
        "gspo",
        aggregation="seq-mean-token-mean",
        clip_ratio_low=0.03,
        clip_ratio_high=0.04,
    ),
    verl_loss(
        "CISPO",
        our_loss(ls.token_ratio, ls.cispo(min_ratio=0.8, max_ratio=1.28), ls.token_mean),
        "cispo",
        clip_ratio_high=0.28,
    ),
    verl_loss("SAPO", our_loss(ls.token_ratio, ls.soft_gate(), ls.sequence_mean), "sapo"),
    verl_loss(
        "GMPO",
        our_loss(ls.geometric_ratio(log_clip=0.4), ls.unclipped(), ls.sequence_mean),
        "geo_mean",
        clip_ratio_low=0.4,
        clip_ratio_high=0.4,
    ),
    *(
        Call(
            "trl",
            f"GKD's divergence, beta {beta}",
            "gkd",
            {"beta": beta, "temperature": 0.7},
            our_divergence(beta, 0.7),
        )
        for beta in (0.0, 0.3, 1.0)
    ),
    Call("verl", "a critic's loss", "value_loss", {"clip": 0.2}, our_value_loss(0.2)),
    verl_advantage("GRPO's advantage", our_advantage(adv.group_normalized(epsilon=1e-6)), "grpo"),
    verl_advantage(
        "Dr.GRPO's advantage", our_advantage(adv.group_centered()), "grpo", options={"norm_adv_by_std_in_grpo": False}
    ),
    verl_advantage("RLOO's advantage", our_advantage(adv.leave_one_out()), "rloo"),
    verl_advantage("REINFORCE++'s advantage", our_advantage(adv.whitened_returns()), "reinforce_plus_plus"),
    verl_advantage(
        "REINFORCE++-baseline's", our_advantage(adv.group_centered_whitened()), "reinforce_plus_plus_baseline"
    ),
    verl_advantage("GAE", our_gae(0.95, 0.99), "gae", with_values={"lam": 0.95, "gamma": 0.99}),
)


def run_peer(peer: str, data: Data, folder: Path) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """The peer's answers by call, and its versions and failures. Missing when it cannot run here."""
    python = ensure(f"parity_{peer}")
    write_data(folder, data)
    calls = [{k: getattr(c, k) for k in ("name", "kind", "settings")} for c in CALLS if c.peer == peer]
    (folder / "calls.json").write_text(json.dumps({peer: calls}))
    done = subprocess.run([python, str(HERE / f"peer_{peer}.py"), str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"its process failed: {done.stderr.strip()[-2000:]}")
    return read_answer(folder, peer)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference over the largest number of theirs."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default="trl,verl")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    data = make_data(0)
    lines, about, missing = [], {}, {}
    for peer in arguments.peers.split(","):
        with tempfile.TemporaryDirectory() as folder:
            try:
                answers, about[peer] = run_peer(peer, data, Path(folder))
            except Missing as error:
                missing[peer] = str(error)
                continue
        for call in (c for c in CALLS if c.peer == peer and c.name in answers):
            ours = call.ours(data)
            for what in ours:
                lines.append((peer, call.name, what, difference(ours[what], answers[call.name][what])))
    for peer, name, what, value in lines:
        print(f"{peer:5} {name:26} {what:10} {value:9.1e}{'  above ' + str(WANTED) if value > WANTED else ''}")
    for peer, found in about.items():
        print(f"{peer}: {found['versions']}" + "".join(f"\n  failed: {k}: {v}" for k, v in found["failed"].items()))
    for peer, why in missing.items():
        print(f"{peer}: missing: {why}")
    if arguments.json:
        ratios = {f"{peer}: {name}, {what}": value for peer, name, what, value in lines}
        report = {"benchmark": "parity", "peers": about, "missing": missing, "ratios": ratios}
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    bad = any(value > WANTED for *_, value in lines) or any(found["failed"] for found in about.values())
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
