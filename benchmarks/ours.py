"""Our side of the benchmarks: a worker that speaks `rivals/protocol.py`, as the rivals do.

Job fields as in `rivals/torch_hf.py`; of the ragged rollout `ragged_prompts`, `ragged_lengths` and `row_count` too.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import protocol
from _probe import probe

from rljax.losses import clipped, policy_loss, token_mean, token_ratio
from rljax.models import load_model
from rljax.rollouts.batching import PackSpec, stack
from rljax.sampling import Request, Sampler, compile_count, sampling_params
from rljax.training import Learner, OptimizerConfig
from rljax.types import Trajectory


def make_sampler(job, model, prompt_length, new_tokens, prompt_slots, sample_slots):
    config, params = model
    sampler = Sampler(
        config,
        prompt_buckets=(prompt_length,),
        max_new_tokens=new_tokens,
        prompt_slots=prompt_slots,
        sample_slots=sample_slots,
    )
    sampler.set_params(params)
    return sampler


def report(sampler, samples):
    """Log-probs and entropies come with every token, asked for or not."""
    tokens = sum(len(s.tokens) for of_prompt in samples for s in of_prompt)
    return {"new_tokens": tokens, "stats": {k: float(v) for k, v in sampler.last_stats.items()}}


def make_rollout(job, model, prompts, new_tokens):
    """All prompts at once, each prefilled once for its samples."""
    samples = job["samples"]
    sampler = make_sampler(job, model, len(prompts[0]), new_tokens, len(prompts), samples)
    requests = [Request(p, i, range(samples), new_tokens) for i, p in enumerate(prompts)]
    steps = iter(range(10**6))
    return lambda: report(sampler, sampler.generate(requests, sampling_params(), seed=0, step=next(steps)))


def make_ragged(job, model):
    """`continuous`: one call, idle rows take the next request. `static`: batches of `row_count`, each run until its
    longest row ends. The same requests, rows and program."""
    prompts, lengths, rows = job["ragged_prompts"], job["ragged_lengths"], job["row_count"]
    sampler = make_sampler(job, model, len(prompts[0]), max(lengths), rows, 1)
    requests = [Request(p, i, [0], n) for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))]
    sampler.warmup()

    def continuous():
        return report(sampler, sampler.generate(requests, sampling_params(), seed=0, step=0))

    def static():
        batches = [requests[i : i + rows] for i in range(0, len(requests), rows)]
        parts = [report(sampler, sampler.generate(b, sampling_params(), seed=0, step=0)) for b in batches]
        return {"new_tokens": sum(p["new_tokens"] for p in parts)}

    return continuous, static


def trajectories(job):
    prompt = job["prompt_length"]
    for i, (row, advantage) in enumerate(zip(job["rows"], job["advantages"], strict=True)):
        length = len(row)
        zeros = np.zeros(length, np.float32)
        yield Trajectory(
            tokens=np.array(row, np.int32),
            action_mask=np.arange(length) >= prompt,
            behavior_logprobs=zeros,
            entropies=zeros,
            turn_ids=np.zeros(length, np.int32),
            policy_version=np.zeros(length, np.int32),
            prompt_id=0,
            group_id=0,
            episode_id=i,
            reward=advantage,
        )


def make_step(job, model, *, share, packed_rows):
    """`update`: loss, gradients, clipping by the global norm, Adam, the guard, all metrics. One minibatch."""
    config, params = model
    rows, length = np.shape(job["rows"])
    completions = rows * (length - job["prompt_length"])
    if share:
        size = job["prompt_length"] + completions
        spec = PackSpec(size, 1, True, (size,), (completions,), (rows,), (1,))
    else:
        scored, micro = length - job["prompt_length"], rows // packed_rows
        spec = PackSpec(length, packed_rows, False, (length,), (scored,), (packed_rows,), (micro,))
    batch = stack(list(trajectories(job)), row_buckets=(rows,), length_buckets=(length,))
    advantages = np.broadcast_to(np.array(job["advantages"], np.float32)[:, None], batch.tokens.shape)
    loss = policy_loss(token_ratio, clipped(clip_low=job["clip"], clip_high=job["clip"]), token_mean)
    learner = Learner(
        config,
        OptimizerConfig(learning_rate=job["learning_rate"]),
        loss,
        spec,
        remat=job.get("remat", False),
        scan=job.get("scan", True),
    )
    state = learner.init_state(jax.tree.map(jnp.array, params))

    def step():
        nonlocal state
        start = time.perf_counter()
        (train_batch,) = learner.prepare(state, batch, advantages)
        prepared = time.perf_counter()
        state, metrics = learner.update(state, train_batch)
        jax.block_until_ready(state.params)
        return {
            "prepare_seconds": prepared - start,
            "loss": float(metrics["loss/total"]),
            "grad_norm": float(metrics["loss/grad_norm"]),
            "packed_tokens": int(np.prod(train_batch.packed.tokens.shape)),
        }

    return step


def main():
    job = protocol.read_job()
    model = load_model(job["model"], dtype=job["dtype"], param_dtype=job.get("param_dtype"))
    tasks = {"probe": functools.partial(probe, job["dtype"])}
    if "prompts" in job:
        tasks["rollout"] = make_rollout(job, model, job["prompts"], job["new_tokens"])
    if "prefill_prompts" in job:
        tasks["prefill"] = make_rollout(job, model, job["prefill_prompts"], 1)
    if "ragged_prompts" in job:
        tasks["continuous_slots"], tasks["static_batches"] = make_ragged(job, model)
    if "rows" in job:
        tasks["step"] = make_step(job, model, share=False, packed_rows=job["packed_rows"])
        tasks["group_step"] = make_step(job, model, share=True, packed_rows=1)
    protocol.serve(tasks, {"jax": jax.__version__, "compiles": compile_count()})


if __name__ == "__main__":
    main()
