"""What the objectives cost: an update under each recipe, over the same update under plain GRPO.

    python benchmarks/objectives.py --preset=full --json=objectives.json

The rows are those of train_step.py, packed with their prompt computed once, so that next to nothing hides the cost of
an objective. Old and reference log-probs are given: a second model that a method scores is not part of the update.
`over_grpo_X` is a median of X's time over that of the GRPO update just before it, since machines have good and bad
minutes that differ by more than any objective. `small` is a tiny model, on which fixed costs dominate, `full` the 57.9M
Llama in float32, `gpu` a Qwen3-0.6B shape in bfloat16.
"""

import statistics

import numpy as np
from _common import finish, measure, parse_arguments, result, setting_of, write_model
from train_step import SIZES, group_rows

from rljax import algorithms

# Those whose loss differs from GRPO's. The others differ in their advantages, which are not part of the update.
RECIPES = (
    algorithms.AgentRL,
    algorithms.CISPO,
    algorithms.DecoupledPPO,
    algorithms.DirectionReweighting,
    algorithms.DIS,
    algorithms.DivergenceWeighting,
    algorithms.FIPO,
    algorithms.GMPO,
    algorithms.GSPO,
    algorithms.HighEntropy,
    algorithms.IcePop,
    algorithms.M2PO,
    algorithms.NearBoundaryRescue,
    algorithms.OWPO,
    algorithms.SAPO,
    algorithms.VCPO,
)
OBJECTIVES = [recipe.__name__ for recipe in RECIPES]


def main() -> None:
    arguments = parse_arguments(__doc__.splitlines()[0], rivals=())
    size, shape, dtype = setting_of(arguments.preset, SIZES)
    objectives = OBJECTIVES[:2] if arguments.preset == "smoke" else OBJECTIVES
    job = {
        "model": write_model(shape),
        "dtype": dtype,
        "param_dtype": "float32",
        "rows": group_rows(shape, size),
        "prompt_length": size["prompt"],
        "advantages": np.random.default_rng(3).standard_normal(size["rows"]).tolist(),
        "learning_rate": 1e-6,
        "objectives": objectives,
    }
    tasks = [f"update_{name}" for name in objectives]
    found, host = measure({"rljax": job}, {"rljax": tasks}, arguments.repeats)
    results = list(filter(None, (result(found, "rljax", task) for task in tasks)))
    ratios: dict[str, float | None] = {
        f"over_grpo_{name}": statistics.median(a["over_grpo"] for a in found.answers["rljax", f"update_{name}"][1:])
        for name in objectives
    }
    finish("objectives", arguments, host, {"model": shape, "dtype": dtype, **size}, results, ratios)


if __name__ == "__main__":
    main()
