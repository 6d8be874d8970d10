"""How fast we update, beside PyTorch and Tunix: one policy-gradient step on 8 rows.

    python benchmarks/train_step.py --preset=full --json=train_step.json

`full` is the 57.9M Llama in float32. The 8 rows are 64-token completions of one 512-token prompt, and the loss is on
the completions: token mean of the clipped surrogate on-policy, gradient clipped by its global norm, Adam. `step` shares
nothing (8 x 576 tokens, as the rivals compute it); `group_step` packs the rows with the prompt computed once. Loss and
gradient norm of the first step must be the same for everybody. PyTorch computes logits of the completions alone, or of
all positions; the faster form is the denominator. `small` and `gpu` as in rollout.py.
"""

import numpy as np
from _common import Cost, finish, measure, on_gpu, parse_arguments, random_prompts, result, setting_of, write_model
from _environments import CORES

# `microbatch_size` is that of our flat step, in packed sequences; on a CPU one at a time stays closest to the cache.
SIZES = {
    "smoke": dict(rows=2, prompt=6, completion=4, microbatch_size=2),
    "small": dict(rows=4, prompt=48, completion=16, microbatch_size=4),
    "full": dict(rows=8, prompt=512, completion=64, microbatch_size=1),
    "gpu": dict(rows=32, prompt=1024, completion=512, microbatch_size=4),
}


def group_rows(shape, size) -> list[list[int]]:
    """Completions of one prompt that differ in their first token."""
    prompt = random_prompts(shape, 1, size["prompt"], 1)[0]
    rng = np.random.default_rng(2)
    answers = rng.integers(3, shape["vocab_size"], (size["rows"], size["completion"]))
    answers[:, 0] = 3 + np.arange(size["rows"])
    return [prompt + answer for answer in answers.tolist()]


def limits(shape, size, host) -> dict[str, float]:
    """Seconds that forward, backward (twice the forward) and Adam would need at the machine's measured rates."""
    cost = Cost(shape, 4)
    rows, prompt, completion = size["rows"], size["prompt"], size["completion"]
    length, scored = prompt + completion, rows * completion
    own = completion * prompt + completion * (completion + 1) / 2
    return {
        "step": cost.update_seconds(rows * length, rows * length * (length + 1) / 2, scored, host),
        "group_step": cost.update_seconds(
            prompt + rows * completion, prompt * (prompt + 1) / 2 + rows * own, scored, host
        ),
    }


def check_same_work(found, tolerance: float) -> None:
    """The first step of everybody has the loss and gradient norm of our flat step."""
    wanted = found.answers["rljax", "step"][0]
    for (who, task), answers in found.answers.items():
        for key in ("loss", "grad_norm"):
            off = abs(answers[0][key] - wanted[key]) / max(abs(wanted[key]), 1e-3)
            if not off <= tolerance:
                print(f"note: {key} of {who} {task} is {answers[0][key]:.6g}, ours {wanted[key]:.6g}")


def main() -> None:
    arguments = parse_arguments(__doc__.splitlines()[0], rivals=("hf", "tunix"))
    is_gpu = on_gpu(arguments.preset)
    size, shape, dtype = setting_of(arguments.preset, SIZES)

    # Everybody has the same weights, rows and advantages.
    advantages = np.random.default_rng(3).standard_normal(size["rows"])
    job = {
        "model": write_model(shape),
        "model_shape": shape,
        "dtype": dtype,
        "param_dtype": "float32",
        "threads": CORES,
        "device": "cuda" if is_gpu else "cpu",
        "rows": group_rows(shape, size),
        "prompt_length": size["prompt"],
        "microbatch_size": size["microbatch_size"],
        "advantages": advantages.tolist(),
        "clip": 0.2,
        "learning_rate": 1e-6,
        "remat": "full" if is_gpu else "none",
        # Two frameworks share the device, neither of which may take all of its memory.
        "variables": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"} if is_gpu else {},
    }

    # In `gpu` the logits of all positions and their gradient are 28 GiB.
    tasks = {
        "rljax": ["step", "group_step"],
        "hf": ["step", "step_all_logits"],
        "hf_here": ["step"] if is_gpu else ["step", "step_all_logits"],
        "tunix": ["step"],
    }
    workers = ("rljax", *arguments.rivals)
    found, host = measure({name: job for name in workers}, tasks, arguments.repeats)
    check_same_work(found, 2e-2 if dtype == "bfloat16" else 1e-3)

    # Logits of the prompt are not asked for: computing them is no reason for a higher limit.
    limit = limits(shape, size, host)
    limit["step_all_logits"] = limit["step"]
    tokens = size["rows"] * (size["prompt"] + size["completion"])
    results = [
        result(found, who, task, tokens=tokens, limit_seconds=limit[task]) for who in workers for task in tasks[who]
    ]
    for line in filter(None, results):
        first = found.answers[line["who"], line["name"]][0]
        line |= {key: first[key] for key in ("loss", "grad_norm")}

    torch = "hf_here" if arguments.preset == "gpu" else "hf"
    step = found.median("rljax", "step")
    group = found.median("rljax", "group_step")
    ratios = {
        "step_vs_tunix": found.ratio("tunix", step, "step"),
        "step_vs_torch": found.ratio(torch, step, "step", "step_all_logits"),
        "group_step_vs_torch": found.ratio(torch, group, "step", "step_all_logits"),
        "group_step_vs_step": found.ratio("rljax", group, "step"),
    }
    setting = {"model": shape, "dtype": dtype, **size, "versions": found.versions}
    finish("train_step", arguments, host, setting, results, ratios, found.missing)


if __name__ == "__main__":
    main()
