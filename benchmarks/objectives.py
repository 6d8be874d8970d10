"""What the objectives cost: one update under every recipe, over the same update under plain GRPO.

    python benchmarks/objectives.py --preset=full --json=objectives.json

The rows are those of train_step.py, packed with their prompt computed once, so that next to nothing hides the cost of
an objective. Old and reference log-probs are given: a second model that a method scores is not part of the update.
`over_grpo_X` is the median over rounds of X's time over GRPO's in the same round. `small` is a tiny model, on which
fixed costs dominate, `full` the 57.9M Llama in float32, `gpu` a Qwen3-0.6B shape in bfloat16.
"""

import statistics

import numpy as np
from _common import (
    QWEN3_0P6B,
    QWEN3_TINY,
    SETTING_A,
    TINY,
    finish,
    has_gpu,
    measure,
    parse_arguments,
    result,
    write_model,
)
from train_step import SIZES, group_rows

from rljax.algorithms import GRPO, PPO, RECIPES

# PPO's policy loss is that of the others; its critic is a model of its own.
OBJECTIVES = ["GRPO", *(recipe.__name__ for recipe in RECIPES if recipe not in (GRPO, PPO))]


def main() -> None:
    arguments = parse_arguments(__doc__.splitlines()[0], rivals=())
    on_gpu = arguments.preset == "gpu" and has_gpu()
    size = SIZES["small" if arguments.preset == "gpu" and not on_gpu else arguments.preset]
    shapes = {"small": TINY, "full": SETTING_A, "gpu": QWEN3_0P6B if on_gpu else QWEN3_TINY}
    shape, dtype = shapes[arguments.preset], "bfloat16" if arguments.preset == "gpu" else "float32"
    job = {
        "model": write_model(shape),
        "dtype": dtype,
        "param_dtype": "float32",
        "rows": group_rows(shape, size),
        "prompt_length": size["prompt"],
        "advantages": np.random.default_rng(3).standard_normal(size["rows"]).tolist(),
        "learning_rate": 1e-6,
        "objectives": OBJECTIVES,
    }
    tasks = [f"update_{name}" for name in OBJECTIVES]
    found, host = measure({"rljax": job}, {"rljax": tasks}, arguments.repeats)
    results = list(filter(None, (result(found, "rljax", task) for task in tasks)))
    plain = results[0]["all_seconds"]
    ratios: dict[str, float | None] = {}
    for name, line in zip(OBJECTIVES[1:], results[1:], strict=True):
        each = [mine / theirs for mine, theirs in zip(line["all_seconds"], plain, strict=True)]
        ratios[f"over_grpo_{name}"] = statistics.median(each)
    finish("objectives", arguments, host, {"model": shape, "dtype": dtype, **size}, results, ratios)


if __name__ == "__main__":
    main()
