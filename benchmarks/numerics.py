"""Do sampler and trainer agree, and does a run compile nothing after warm-up?

    python benchmarks/numerics.py --preset=full --json=numerics.json

`logprob_gap`: max |log-prob that the sampler reports - log-prob that the trainer computes|, over samples of prompts of
many lengths, plain and with temperature, top-k, top-p and min-p; the trainer packs with shared prompts, and as plain
rows. `full` looks at SmolLM2 as well where its package is installed, since random weights give flat distributions.
`compiles_after_warmup`: programs compiled during whole training steps with varied prompt and completion lengths.
`small` is a tiny model, `full` the 57.9M Llama, both float32; `gpu` is a Qwen3-0.6B shape in bfloat16, whose gap is
that of bfloat16 rounding. No rivals.
"""

import numpy as np
from _common import finish, machine, parse_arguments, random_prompts, setting_of, write_model
from _probe import probe

from rljax.advantages import group_normalized
from rljax.batching import stack
from rljax.losses import clipped, policy_loss, token_mean, token_ratio
from rljax.models import find_smollm2, load_model
from rljax.sampling import Request, Sampler, SamplerSpec, compile_count, sampling_params
from rljax.training import Learner, LossNeeds, OptimizerConfig, UpdateConfig
from rljax.types import Trajectory

SIZES = {
    "smoke": dict(prompts=2, samples=2, prompt=8, new=4, steps=4),
    "small": dict(prompts=4, samples=4, prompt=32, new=16, steps=50),
    "full": dict(prompts=4, samples=8, prompt=64, new=128, steps=50),
    "gpu": dict(prompts=16, samples=8, prompt=512, new=512, steps=50),
}
# A step of the loop that counts compiles is short where the model is not tiny.
LOOP = {"full": dict(prompts=4, samples=4, prompt=64, new=32, steps=50)}
PRETRAINED = dict(prompts=2, samples=4, prompt=64, new=64)
SAMPLING = {
    "plain": dict(),
    "truncated": dict(temperature=0.7, top_k=200, top_p=0.9, min_p=0.001),
}


def varied_requests(shape, size, step: int) -> list[Request]:
    """Prompts of any length up to the limit, and completions too."""
    rng = np.random.default_rng(100 + step)
    prompts = random_prompts(shape, size["prompts"], size["prompt"], 100 + step)
    lengths = rng.integers(2, size["prompt"] + 1, size["prompts"])
    new = rng.integers(1, size["new"] + 1, size["prompts"])
    return [
        Request(p[:n], step * size["prompts"] + i, range(size["samples"]), int(m))
        for i, (p, n, m) in enumerate(zip(prompts, lengths, new, strict=True))
    ]


def to_batch(requests, samples, size):
    """The samples as a `RolloutBatch` of one shape; rewards are arbitrary."""
    made = []
    for group, (request, of_prompt) in enumerate(zip(requests, samples, strict=True)):
        prompt = np.array(request.prompt, np.int32)
        for i, sample in enumerate(of_prompt):
            zeros = np.zeros(len(prompt), np.float32)
            length = len(prompt) + len(sample.tokens)
            made.append(
                Trajectory(
                    tokens=np.concatenate([prompt, sample.tokens]),
                    action_mask=np.arange(length) >= len(prompt),
                    behavior_logprobs=np.concatenate([zeros, sample.logprobs]),
                    entropies=np.concatenate([zeros, sample.entropies]),
                    turn_ids=np.zeros(length, np.int32),
                    policy_version=np.zeros(length, np.int32),
                    prompt_id=request.prompt_id,
                    group_id=group,
                    episode_id=len(made),
                    reward=float(sample.tokens[-1] % 2 + i % 3),
                )
            )
    return stack(made, row_buckets=(len(made),), length_buckets=(size["prompt"] + size["new"],))


def make_sampler(config, size) -> Sampler:
    """Two prompt buckets, so that varied prompts use more than one program."""
    return Sampler(
        config,
        SamplerSpec(
            prompt_buckets=(size["prompt"] // 2, size["prompt"]),
            max_new_tokens=size["new"],
            prompt_slots=size["prompts"],
            sample_slots=size["samples"],
        ),
    )


def make_learner(config, size, sampling=None, *, share=True) -> Learner:
    """Tables of one entry: one program, whatever the lengths. Short rows and groups share a packed row."""
    rows, width = size["prompts"] * size["samples"], size["prompt"] + size["new"]
    length = size["prompt"] + size["samples"] * size["new"] if share else width
    microbatch_size, micro = (1, size["prompts"]) if share else (size["samples"], size["prompts"])
    update = UpdateConfig(length, microbatch_size, share, (length,), (length,), (rows,), (micro,))
    loss = policy_loss(token_ratio, clipped(), token_mean)
    return Learner(config, loss, OptimizerConfig(learning_rate=1e-5), update, needs=LossNeeds(sampling=sampling))


def logprob_gaps(shape, model, size) -> dict[str, float]:
    """Largest difference by how it was sampled and packed."""
    config, params = model
    sampler = make_sampler(config, size)
    sampler.set_params(params)
    gaps = {}
    for name, options in SAMPLING.items():
        sampling = sampling_params(**options)
        requests = varied_requests(shape, size, 0)
        batch = to_batch(requests, sampler.generate(requests, sampling, seed=0, step=0), size)
        for share in (True, False):
            scored = make_learner(config, size, sampling, share=share).score_rows(params, batch)
            difference = np.abs(scored - batch.behavior_logprobs)[np.asarray(batch.action_mask)]
            gaps[f"{name}, {'shared prompts' if share else 'plain rows'}"] = float(difference.max())
    return gaps


def pretrained_gaps() -> dict[str, float]:
    """The same for SmolLM2-135M-Instruct in float32; nothing where it is not installed."""
    try:
        path = find_smollm2()
    except ValueError as reason:
        print(f"without a pretrained model: {reason}")
        return {}
    model = load_model(path, dtype="float32")
    gaps = logprob_gaps({"vocab_size": model[0].vocab_size}, model, PRETRAINED)
    return {f"SmolLM2, {name}": gap for name, gap in gaps.items()}


def count_compiles(shape, model, size) -> tuple[int, int]:
    """(programs compiled until warm, programs compiled in `steps` steps after that). A step samples, packs, updates,
    and hands the weights back to the sampler; temperature and truncation change from step to step."""
    config, params = model
    before = compile_count()
    sampler, learner = make_sampler(config, size), make_learner(config, size)
    state = learner.init_state(params)
    advantage_fn, warm = group_normalized(), 0
    for step in range(size["steps"] + 2):
        if step == 2:
            warm = compile_count()
        sampler.set_params(learner.policy_params(state))
        if step == 0:
            sampler.warmup()
        requests = varied_requests(shape, size, step)
        sampling = sampling_params(**SAMPLING["truncated" if step % 2 else "plain"])
        batch = to_batch(requests, sampler.generate(requests, sampling, seed=0, step=step), size)
        for train_batch in learner.prepare(state, batch, advantage_fn(batch)):
            state, _ = learner.update(state, train_batch)
    learner.check()
    return warm - before, compile_count() - warm


def main() -> None:
    arguments = parse_arguments(__doc__.splitlines()[0], rivals=())
    size, shape, dtype = setting_of(arguments.preset, SIZES)
    model = load_model(write_model(shape), dtype=dtype)
    gaps = logprob_gaps(shape, model, size)
    pretrained = pretrained_gaps() if arguments.preset == "full" else {}
    loop = LOOP.get(arguments.preset, size)
    warm, after = count_compiles(shape, model, loop)
    results = [{"name": f"log-prob gap: {name}", "value": value} for name, value in (gaps | pretrained).items()]
    results.append({"name": "programs compiled in the warm-up", "value": warm})
    results.append({"name": f"programs compiled in {loop['steps']} steps after it", "value": after})
    ratios = {"logprob_gap": max(gaps.values()), "compiles_after_warmup": after}
    if pretrained:
        ratios["logprob_gap_smollm2"] = max(pretrained.values())
    setting = {"model": shape, "dtype": dtype, **size, "loop": loop, "sampling": SAMPLING}
    finish("numerics", arguments, machine([probe(dtype, quick=arguments.preset == "smoke")]), setting, results, ratios)


if __name__ == "__main__":
    main()
