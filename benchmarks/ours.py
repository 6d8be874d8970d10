"""Our side of the benchmarks: a worker that speaks `rivals/protocol.py`, as the rivals do.

Job fields as in `rivals/torch_hf.py`; of the ragged rollout `ragged_prompts`, `ragged_lengths` and `row_count` too.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import protocol
from _probe import probe

from rljax.algorithms import GRPO, RECIPES
from rljax.batching import PackConfig, stack
from rljax.losses import clipped, policy_loss, token_mean, token_ratio
from rljax.models import load_model
from rljax.sampling import Fork, Request, Sampler, SamplerSpec, compile_count, sampling_params
from rljax.training import Learner, LossNeeds, OptimizerConfig, UpdateConfig
from rljax.types import Trajectory


def make_sampler(job, model, prompt_length, new_tokens, prompt_slots, sample_slots):
    config, params = model
    sampler = Sampler(
        config,
        SamplerSpec(
            prompt_buckets=(prompt_length,),
            max_new_tokens=new_tokens,
            prompt_slots=prompt_slots,
            sample_slots=sample_slots,
        ),
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


def trajectories(rows, prompt_length, rewards, group_size):
    for i, (row, reward) in enumerate(zip(rows, rewards, strict=True)):
        length = len(row)
        zeros = np.zeros(length, np.float32)
        yield Trajectory(
            tokens=np.array(row, np.int32),
            action_mask=np.arange(length) >= prompt_length,
            behavior_logprobs=zeros,
            entropies=zeros,
            turn_ids=np.zeros(length, np.int32),
            policy_version=np.zeros(length, np.int32),
            prompt_id=i // group_size,
            group_id=i // group_size,
            episode_id=i,
            reward=reward,
        )


def make_step(job, model, *, share, microbatch_size):
    """One update on the rows of one prompt."""
    rows, length = np.shape(job["rows"])
    scored = length - job["prompt_length"]
    if share:
        size = job["prompt_length"] + rows * scored
        spec = PackConfig(size, 1, True, (size,), (rows * scored,), (rows,), (1,))
    else:
        count = rows // microbatch_size
        spec = PackConfig(length, microbatch_size, False, (length,), (scored,), (microbatch_size,), (count,))
    return make_update(job, model, job["rows"], job["advantages"], spec, group_size=rows)


def make_forest_step(job, model, forest, *, share):
    """One update on the rows of several trees: two trees, or four plain rows, to a microbatch, which is about as many
    tokens. Memory is that of a microbatch of one tree, or of its leaves."""
    rows, leaves = forest["rows"], forest["leaves"]
    length, prompt = len(rows[0]), job["prompt_length"]
    unique, advantages = forest["unique"], np.random.default_rng(4).standard_normal(len(rows)).tolist()
    size = unique if share else length

    def spec(microbatch_size, rows_of_it):
        scored, micro = (size - prompt,), (len(rows) // rows_of_it,)
        return PackConfig(size, microbatch_size, share, (size,), scored, (rows_of_it,), micro)

    timed, held = (spec(2, 2 * leaves), spec(1, leaves)) if share else (spec(4, 4), spec(leaves, leaves))
    return make_update(job, model, rows, advantages, timed, group_size=leaves, held=held)


def make_update(job, model, rows, advantages, spec, *, group_size, held=None):
    """`update`: loss, gradients, clipping by the global norm, Adam, the guard, all metrics. One minibatch. Memory is
    that of the update compiled for the packing `held`."""
    config, params = model
    batch = stack(
        list(trajectories(rows, job["prompt_length"], advantages, group_size)),
        row_buckets=(len(rows),),
        length_buckets=(len(rows[0]),),
    )
    advantages = np.broadcast_to(np.array(advantages, np.float32)[:, None], batch.tokens.shape)
    loss = policy_loss(token_ratio, clipped(clip_low=job["clip"], clip_high=job["clip"]), token_mean)

    def make_learner(spec):
        update = UpdateConfig(**dataclasses.asdict(spec), remat=job.get("remat", "none"))
        return Learner(config, loss, OptimizerConfig(learning_rate=job["learning_rate"]), update)

    learner = make_learner(spec)
    state = learner.init_state(jax.tree.map(jnp.array, params))
    temporaries = None

    def step():
        nonlocal state, temporaries
        start = time.perf_counter()
        (train_batch,) = learner.prepare(state, batch, advantages)
        prepared = time.perf_counter()
        state, metrics = learner.update(state, train_batch)
        jax.block_until_ready(state.trainable)
        if temporaries is None and job.get("memory"):
            other = make_learner(held or spec)
            (held_batch,) = other.prepare(state, batch, advantages)
            temporaries = int(other.lower_update(held_batch).compile().memory_analysis().temp_size_in_bytes)
        return {
            "prepare_seconds": prepared - start,
            "loss": float(metrics["loss/total"]),
            "grad_norm": float(metrics["loss/grad_norm"]),
            "packed_tokens": int(np.prod(train_batch.packed.tokens.shape)),
            "temporaries": temporaries,
        }

    return step


def make_objectives(job, model):
    """Updates under each recipe of `job["objectives"]`, each after one under GRPO, of the same packed rows and from one
    state that all of them hand on. Old and reference log-probs are given; a model that a method scores besides the
    policy is not part of the update."""
    config, params = model
    rows, length = np.shape(job["rows"])
    scored = length - job["prompt_length"]
    size = job["prompt_length"] + rows * scored
    spec = PackConfig(size, 1, True, (size,), (rows * scored,), (rows,), (1,))
    rng = np.random.default_rng(5)
    batch = stack(
        list(trajectories(job["rows"], job["prompt_length"], job["advantages"], rows)),
        row_buckets=(rows,),
        length_buckets=(length,),
    )
    behavior = -rng.exponential(size=batch.tokens.shape).astype(np.float32)
    batch = dataclasses.replace(batch, behavior_logprobs=behavior, ref_logprobs=behavior)
    advantages = np.broadcast_to(np.array(job["advantages"], np.float32)[:, None], batch.tokens.shape)
    shared = {}

    def make(recipe):
        algorithm = recipe().build()
        learner = Learner(
            config,
            algorithm.loss,
            OptimizerConfig(learning_rate=job["learning_rate"]),
            UpdateConfig(**dataclasses.asdict(spec), use_sampler_logprobs=True),
            needs=LossNeeds(uniforms=algorithm.plan.needs_uniforms),
        )

        def step():
            if not shared:
                shared["state"] = learner.init_state(jax.tree.map(jnp.array, params))
            state = shared["state"]
            minibatch = learner.prepare(state, batch, advantages)[0]
            shared["state"], metrics = learner.update(state, minibatch)
            jax.block_until_ready(shared["state"].trainable)
            return float(metrics["loss/total"])

        return step

    def seconds(step):
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def in_turns(plain, other):
        def run():
            grpo, mine = seconds(plain), seconds(other)
            return {"over_grpo": mine / grpo}

        return run

    recipes = {recipe.__name__: recipe for recipe in RECIPES}
    plain = make(GRPO)
    return {f"update_{name}": in_turns(plain, make(recipes[name])) for name in job["objectives"]}


def make_branches(job, model):
    """`fork`: branches from the end of a path that was just sampled, timed from there. `reprefill`: as many samples of
    prompts that hold prompt and path, each on its own."""
    fork = job["fork"]
    config, params = model
    prompts, path, branches, new = fork["prompts"], fork["path"], fork["branches"], fork["new_tokens"]
    length = len(prompts[0])
    forking = Sampler(
        config,
        SamplerSpec(
            prompt_buckets=(length,),
            max_new_tokens=path + new,
            prompt_slots=len(prompts),
            sample_slots=branches,
            path_slots=1,
        ),
    )
    plain = Sampler(
        config,
        SamplerSpec(
            prompt_buckets=(length + path,),
            max_new_tokens=new,
            prompt_slots=len(prompts) * branches,
            sample_slots=1,
        ),
    )
    for sampler in (forking, plain):
        sampler.set_params(params)
        sampler.warmup()
    steps = iter(range(10**6))

    def fork_all():
        began: list[float] = []

        def rounds(samples):
            began.append(time.perf_counter())
            return [Fork(0, path, i) for i in range(1, branches + 1)] if len(samples) == 1 else []

        requests = [Request(p, i, [0], rounds=rounds) for i, p in enumerate(prompts)]
        samples = forking.generate(requests, sampling_params(), seed=0, step=next(steps))
        seconds = time.perf_counter() - began[0]
        return {"seconds": seconds, "new_tokens": sum(len(s.tokens) - path for group in samples for s in group[1:])}

    def sample_all():
        # The tokens do not matter for the time, only how many there are.
        rows = np.random.default_rng(1).integers(3, config.vocab_size, (len(prompts) * branches, length + path))
        requests = [Request(row.tolist(), i, [0]) for i, row in enumerate(rows)]
        return report(plain, plain.generate(requests, sampling_params(), seed=0, step=next(steps)))

    return fork_all, sample_all


def make_random_forks(job, model):
    """Rounds of forks at random places; reports how many programs were compiled after warm-up."""
    config, params = model
    size = job["random_forks"]
    sampler = Sampler(
        config,
        SamplerSpec(
            prompt_buckets=(16, 32),
            max_new_tokens=32,
            prompt_slots=4,
            sample_slots=4,
            path_slots=12,
            max_injected=4,
        ),
    )
    sampler.set_params(params)
    sampler.warmup()
    seeds = iter(range(10**6))

    def rounds(rng):
        def fork(samples):
            if len(samples) >= 16:
                return []
            parents = rng.integers(0, len(samples), 4)
            return [
                Fork(
                    int(p), int(rng.integers(0, 28)), len(samples) + i, rng.integers(3, 50, rng.integers(0, 4)).tolist()
                )
                for i, p in enumerate(parents)
            ]

        return fork

    def run():
        rng, before = np.random.default_rng(next(seeds)), compile_count()
        lengths = rng.integers(1, 33, size["prompts"])
        requests = [
            Request(rng.integers(3, config.vocab_size, n).tolist(), i, range(4), rounds=rounds(rng))
            for i, n in enumerate(lengths)
        ]
        out = report(sampler, sampler.generate(requests, sampling_params(), seed=0, step=next(seeds)))
        return out | {"compiles": compile_count() - before}

    return run


def main():
    job = protocol.read_job()
    model = load_model(job["model"], dtype=job["dtype"], param_dtype=job.get("param_dtype"))
    tasks = {"probe": functools.partial(probe, job["dtype"], quick=job["quick"])}
    if "prompts" in job:
        tasks["rollout"] = make_rollout(job, model, job["prompts"], job["new_tokens"])
    if "prefill_prompts" in job:
        tasks["prefill"] = make_rollout(job, model, job["prefill_prompts"], 1)
    if "ragged_prompts" in job:
        tasks["continuous_slots"], tasks["static_batches"] = make_ragged(job, model)
    if "rows" in job and "objectives" not in job:
        tasks["step"] = make_step(job, model, share=False, microbatch_size=job["microbatch_size"])
        tasks["group_step"] = make_step(job, model, share=True, microbatch_size=1)
    if "objectives" in job:
        tasks |= make_objectives(job, model)
    for ratio, forest in job.get("forests", {}).items():
        tasks[f"forest_{ratio}"] = make_forest_step(job, model, forest, share=True)
        tasks[f"flat_{ratio}"] = make_forest_step(job, model, forest, share=False)
    if "fork" in job:
        tasks["fork"], tasks["reprefill"] = make_branches(job, model)
    if "random_forks" in job:
        tasks["random_forks"] = make_random_forks(job, model)
    protocol.serve(tasks, {"jax": jax.__version__, "compiles": compile_count()})


if __name__ == "__main__":
    main()
