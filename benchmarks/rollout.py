"""How fast we sample, beside Hugging Face generate, Tunix and vLLM on the CPU.

    python benchmarks/rollout.py --preset=full --json=rollout.json

`full` is the 57.9M Llama in float32: 4 prompts x 8 samples, 64 + 128 tokens; prefill of 4 x 8 with 512-token prompts;
ragged completions in continuous slots against static batches. `small` is a tiny model without rivals. `gpu` is a
Qwen3-0.6B shape in bfloat16 against generate of the torch in this environment; without a GPU it runs in a small form.
Nothing stops early: every row makes all its tokens.
"""

import numpy as np
from _common import Cost, finish, measure, on_gpu, parse_arguments, random_prompts, result, setting_of, write_model
from _environments import CORES

SIZES = {
    "smoke": dict(prompts=2, samples=2, prompt=8, new=4, prefill=8, ragged=4, rows=2, mean=2, longest=4),
    "small": dict(prompts=2, samples=4, prompt=16, new=16, prefill=32, ragged=32, rows=8, mean=8, longest=32),
    "full": dict(prompts=4, samples=8, prompt=64, new=128, prefill=512, ragged=128, rows=32, mean=64, longest=256),
    "gpu": dict(
        prompts=32, samples=8, prompt=512, new=512, prefill=2048, ragged=1024, rows=256, mean=256, longest=1024
    ),
}


def ragged_lengths(size) -> list[int]:
    """Geometric with the given mean, capped."""
    lengths = np.random.default_rng(2).geometric(1 / size["mean"], size["ragged"])
    return np.minimum(lengths, size["longest"]).tolist()


def limits(shape, size, dtype, lengths, host) -> dict[str, float]:
    """Seconds that the machine would need at its measured rates, prompts computed once."""
    cost = Cost(shape, 2 if dtype == "bfloat16" else 4)
    rows = size["prompts"] * size["samples"]

    def prefill(prompt: int) -> float:
        tokens = size["prompts"] * prompt
        return cost.forward_flops(tokens, tokens * (prompt + 1) / 2, 0) / host["matmul_gflops"] / 1e9

    def decode(prompt: int, new: int) -> float:
        return sum(cost.step_seconds(rows, size["prompts"], prompt, t + 1, host) for t in range(new))

    tokens = len(lengths) * size["prompt"]
    own_context = sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)
    ragged = cost.forward_flops(tokens, tokens * (size["prompt"] + 1) / 2, 0) / host["matmul_gflops"] / 1e9
    step = cost.step_seconds(size["rows"], size["rows"], size["prompt"], own_context, host)
    return {
        "rollout": prefill(size["prompt"]) + decode(size["prompt"], size["new"]),
        "prefill": prefill(size["prefill"]) + decode(size["prefill"], 1),
        "continuous_slots": ragged + sum(lengths) / size["rows"] * step,
    }


def main() -> None:
    arguments = parse_arguments(__doc__.splitlines()[0], rivals=("hf", "tunix", "vllm"))
    is_gpu = on_gpu(arguments.preset)
    size, shape, dtype = setting_of(arguments.preset, SIZES)
    lengths = ragged_lengths(size)
    job = {
        "model": write_model(shape),
        "model_shape": shape,
        "dtype": dtype,
        "threads": CORES,
        "device": "cuda" if is_gpu else "cpu",
        "samples": size["samples"],
        "new_tokens": size["new"],
        "prompts": random_prompts(shape, size["prompts"], size["prompt"], 1),
        "prefill_prompts": random_prompts(shape, size["prompts"], size["prefill"], 3),
    }
    ours = job | {
        "ragged_prompts": random_prompts(shape, size["ragged"], size["prompt"], 4),
        "ragged_lengths": lengths,
        "row_count": size["rows"],
        "variables": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"} if is_gpu else {},
    }
    shared = ["rollout", "prefill"]
    tasks = {"rljax": [*shared, "continuous_slots", "static_batches"], **{name: shared for name in arguments.rivals}}
    found, host = measure({"rljax": ours, **{name: job for name in arguments.rivals}}, tasks, arguments.repeats)
    new = {
        "rollout": size["prompts"] * size["samples"] * size["new"],
        "prefill": size["prompts"] * size["samples"] * size["prefill"],
        "continuous_slots": sum(lengths),
        "static_batches": sum(lengths),
    }
    expected = new | {"prefill": size["prompts"] * size["samples"]}
    for (who, task), answers in found.answers.items():
        if wrong := [a["new_tokens"] for a in answers if a["new_tokens"] != expected[task]]:
            raise SystemExit(f"{who} made {wrong[0]} tokens in {task}, not {expected[task]}: the times do not compare")
    limit = limits(shape, size, dtype, lengths, host)
    limit["static_batches"] = limit["continuous_slots"]
    results = [
        result(found, who, task, tokens=new[task], limit_seconds=limit[task])
        for task in new
        for who in tasks
        if task in tasks[who]
    ]
    rollout, prefill = found.median("rljax", "rollout"), found.median("rljax", "prefill")
    ratios = {
        "vs_hf_generate": found.ratio("hf_here" if arguments.preset == "gpu" else "hf", rollout, "rollout"),
        "vs_tunix": found.ratio("tunix", rollout, "rollout"),
        "vs_vllm_cpu": found.ratio("vllm", rollout, "rollout"),
        "prefill_vs_tunix": found.ratio("tunix", prefill, "prefill"),
        "slots_vs_static": found.ratio("rljax", found.median("rljax", "continuous_slots"), "static_batches"),
    }
    setting = {"model": shape, "dtype": dtype, **size, "ragged_tokens": sum(lengths), "versions": found.versions}
    finish("rollout", arguments, host, setting, results, ratios, found.missing)


if __name__ == "__main__":
    main()
