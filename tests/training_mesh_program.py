"""Run by test_training_mesh.py on 8 virtual devices: prints JSON of what several meshes compute."""

import json
import sys

import jax
import numpy as np
from test_training_learner import CONFIG, grpo, params, rollout

from rljax.parallel import make_mesh
from rljax.training import Checkpointer, Learner, LossNeeds, OptimizerConfig, UpdateConfig, add_metrics

MESHES = {"data 4 x tensor 2": (4, 1, 2), "fsdp 8": (1, 8, 1), "2 x 2 x 2": (2, 2, 2)}


def learner_on(mesh):
    update = UpdateConfig(pack_length=32, microbatch_size=8, head_chunk=32)
    optimizer = OptimizerConfig(learning_rate=1e-2, eps=1e-3)  # Adam's own eps amplifies rounding of tiny gradients
    return Learner(CONFIG, grpo(), optimizer, update, needs=LossNeeds(reference=True), mesh=mesh)


def steps(learner, state, count):
    batch, advantages = rollout(groups=6)
    lines = []
    for _ in range(count):
        state, metrics = learner.update(state, learner.prepare(state, batch, advantages)[0])
        lines.append(add_metrics([metrics]))
    return state, lines


def report(state, lines, learner):
    return {
        "metrics": lines,
        "sums": {jax.tree_util.keystr(k): np.asarray(v).tolist() for k, v in _some(state.trainable)},
        "compiled": learner._update._cache_size(),
    }


def _some(tree):
    return [(k, np.asarray(v).reshape(-1)[:50]) for k, v in jax.tree_util.tree_leaves_with_path(tree)]


def main(folder):
    assert jax.device_count() == 8
    results = {}
    single = learner_on(None)
    state, lines = steps(single, single.init_state(params()), 2)
    results["one device"] = report(state, lines, single)
    for name, shape in MESHES.items():
        learner = learner_on(make_mesh(*shape))
        state, lines = steps(learner, learner.init_state(params()), 2)
        results[name] = report(state, lines, learner)

    first = learner_on(make_mesh(2, 2, 2))
    state, _ = steps(first, first.init_state(params()), 1)
    saved = jax.device_get(state.trainable)
    checkpointer = Checkpointer(folder)
    checkpointer.save(1, state, {"mesh": "2 x 2 x 2"})
    checkpointer.close()
    other = learner_on(make_mesh(1, 8, 1))
    target = other.abstract_state()
    restored, host, step = Checkpointer(folder).restore(target)
    assert (host, step) == ({"mesh": "2 x 2 x 2"}, 1)
    jax.tree.map(np.testing.assert_array_equal, saved, jax.device_get(restored.trainable))
    assert jax.tree.all(jax.tree.map(lambda x, t: x.sharding == t.sharding, restored, target))
    state, lines = steps(other, restored, 1)
    results["restored"] = report(state, lines, other)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
