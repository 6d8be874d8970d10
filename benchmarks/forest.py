"""What forests save: training each prefix once, forking on keys and values that are there, leaves for each token.

    python benchmarks/forest.py --preset=full --json=forest.json

`forest_efficiency_2`, `_4`, `_8`: one update on the leaves of several trees, packed as forests, against the same leaves
as plain rows, where plain rows hold 2, 4 and 8 times the tokens: the speed-up over the ratio of the floating-point
operations that the mathematics asks for, vocabulary head included. Two trees or four plain rows make a microbatch,
which is about as many tokens. `memory_2` ...: temporaries of the update compiled for one tree a microbatch, over those
for its leaves as plain rows. `fork_vs_reprefill`: the time to decode branches from a prefix of prompt and path,
sampled as new prompts over forked. `leaves_per_token_*`: samples for each new token under the plans of Tree-GRPO
(2, 2, 1) and EPTree (6, 2, 1, 2), over independent samples of the same length. `compiles_after_warmup`: with forks at
random places.

`small` is a tiny model, `full` the 57.9M Llama in float32, `gpu` a Qwen3-0.6B shape in bfloat16. No rivals: no other
JAX trainer has forests.
"""

import jax
import numpy as np
from _common import Cost, finish, measure, parse_arguments, random_prompts, result, setting_of, write_model

from rljax.models import DecoderConfig, init_params
from rljax.plans import ForkPlan
from rljax.plans.fork_rules import random_step, top_surprisal
from rljax.rollouts.forks import ForkRounds
from rljax.sampling import Request, Sampler, SamplerSpec, sampling_params
from rljax.text import CharTokenizer, StepSplitter

# Lengths of the segments of a tree: the trunk, shared by all 8 leaves, two limbs, shared by 4 each, and the leaves;
# 16 leaves and four limbs for ratio 8.
TREES = {
    "2": dict(segments=(64, 48, 72), limbs=2, leaves=8),
    "4": dict(segments=(192, 64, 32), limbs=2, leaves=8),
    "8": dict(segments=(288, 32, 16), limbs=4, leaves=16),
}
SIZES = {
    "smoke": dict(trees=2, scale=8, prompt=4, fork=dict(prompts=1, prompt=4, path=6, branches=2, new=2)),
    "small": dict(trees=2, scale=4, prompt=8, fork=dict(prompts=2, prompt=16, path=48, branches=4, new=16)),
    "full": dict(trees=4, scale=1, prompt=32, fork=dict(prompts=4, prompt=64, path=448, branches=8, new=64)),
    "gpu": dict(trees=16, scale=1, prompt=32, fork=dict(prompts=32, prompt=64, path=448, branches=8, new=64)),
}


def make_forest(shape, size, segments, limbs, leaves) -> dict[str, object]:
    """Rows of all trees, and the floating-point operations of a forward pass over them, forest and plain."""
    rng = np.random.default_rng(5)
    trunk, limb, leaf = (n // size["scale"] for n in segments)

    def tokens(*counts):
        return rng.integers(3, shape["vocab_size"], counts)

    rows = []
    for _ in range(size["trees"]):
        stem, branches = tokens(trunk), tokens(limbs, limb)
        branches[:, 0] = 3 + np.arange(limbs)  # segments of one node differ from the first token on
        ends = tokens(leaves, leaf)
        ends[:, 0] = 3 + np.arange(leaves)
        rows += [np.concatenate([stem, branches[i * limbs // leaves], ends[i]]).tolist() for i in range(leaves)]
    unique, length = trunk + limbs * limb + leaves * leaf, trunk + limb + leaf

    def pairs(start, count):
        """Visible (query, key) pairs of `count` tokens after `start` others of their path."""
        return count * start + count * (count + 1) / 2

    seen = pairs(0, trunk) + limbs * pairs(trunk, limb) + leaves * pairs(trunk + limb, leaf)
    cost, trees, prompt = Cost(shape, 4), size["trees"], size["prompt"]
    return {
        "rows": rows,
        "leaves": leaves,
        "unique": unique,
        "token_ratio": leaves * length / unique,
        "forest_flops": trees * cost.forward_flops(unique, seen, unique - prompt),
        "flat_flops": trees
        * cost.forward_flops(leaves * length, leaves * pairs(0, length), leaves * (length - prompt)),
    }


def leaves_per_token(plan: ForkPlan, prompts: int, length: int) -> float:
    """Leaves for each new token under `plan`, over those of independent samples, on a tiny random model whose
    completions all have the same length."""
    tokenizer = CharTokenizer("abcdefghijklmnop.")
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32
    )
    sampler = Sampler(
        config,
        SamplerSpec(
            prompt_buckets=(8,),
            max_new_tokens=length,
            prompt_slots=16,
            sample_slots=plan.chains,
            path_slots=plan.parents,
        ),
    )
    sampler.set_params(init_params(config, jax.random.key(0)))
    splitter = StepSplitter(tokenizer, plan.step_delimiters)
    requests = []
    for i in range(prompts):
        rounds = ForkRounds(
            plan,
            tokenizer.decode,
            lambda sample: splitter(sample.tokens),
            seed=0,
            step=0,
            prompt_id=i,
            first_id=0,
            limit=length,
        )
        requests.append(Request([3, 4, 5], i, range(plan.chains), rounds=rounds))
    groups = sampler.generate(requests, sampling_params(), seed=0, step=0)
    return sum(map(len, groups)) * length / sampler.last_stats["new_tokens"]


def main() -> None:
    arguments = parse_arguments(__doc__.splitlines()[0], rivals=())
    size, shape, dtype = setting_of(arguments.preset, SIZES)
    is_smoke = arguments.preset == "smoke"
    trees = {"2": TREES["2"]} if is_smoke else TREES
    forests = {ratio: make_forest(shape, size, **tree) for ratio, tree in trees.items()}
    fork = size["fork"]
    job = {
        "model": write_model(shape),
        "dtype": dtype,
        "param_dtype": "float32",
        "prompt_length": size["prompt"],
        "clip": 0.2,
        "learning_rate": 1e-6,
        "memory": True,
        "forests": forests,
        "fork": {
            "prompts": random_prompts(shape, fork["prompts"], fork["prompt"], 6),
            "path": fork["path"],
            "branches": fork["branches"],
            "new_tokens": fork["new"],
        },
        "random_forks": {"prompts": 2 if is_smoke else 8},
    }
    tasks = [f"{kind}_{ratio}" for ratio in trees for kind in ("forest", "flat")]
    tasks += ["fork", "reprefill", "random_forks"]
    found, host = measure({"rljax": job}, {"rljax": tasks}, arguments.repeats)
    ratios: dict[str, float | None] = {}
    for ratio, forest in forests.items():
        speedup = found.ratio("rljax", found.median("rljax", f"forest_{ratio}"), f"flat_{ratio}")
        ratios[f"speedup_{ratio}"] = speedup
        ratios[f"flops_ratio_{ratio}"] = forest["flat_flops"] / forest["forest_flops"]
        ratios[f"forest_efficiency_{ratio}"] = speedup and speedup * forest["forest_flops"] / forest["flat_flops"]
        memory = [found.answers["rljax", f"{kind}_{ratio}"][0]["temporaries"] for kind in ("forest", "flat")]
        ratios[f"memory_{ratio}"] = memory[0] / memory[1]
    ratios["fork_vs_reprefill"] = found.ratio("rljax", found.median("rljax", "fork"), "reprefill")
    plans = {
        "tree_grpo": ForkPlan(2, 2, random_step(2, 2, from_root=False), step_delimiters=(".",)),
        "eptree": ForkPlan(6, 2, top_surprisal(2, 6, tail=0.0, last_words=()), branches=2),
    }
    sampled = dict(prompts=2, length=16) if is_smoke else dict(prompts=64, length=64)
    for name, plan in plans.items():
        ratios[f"leaves_per_token_{name}"] = leaves_per_token(plan, **sampled)
    ratios["compiles_after_warmup"] = max(a["compiles"] for a in found.answers["rljax", "random_forks"])
    results = [result(found, "rljax", task) for task in tasks]
    flops = {"forest": "forest_flops", "flat": "flat_flops"}
    for line in filter(None, results):
        kind, _, ratio = line["name"].partition("_")
        if ratio in forests:
            line["limit_seconds"] = 3 * forests[ratio][flops[kind]] / host["matmul_gflops"] / 1e9
            line["share_of_limit"] = line["limit_seconds"] / line["seconds"]
    setting = {"model": shape, "dtype": dtype, "trees": trees, **size}
    finish("forest", arguments, host, setting, results, ratios)


if __name__ == "__main__":
    main()
