"""Run by test_training_optimizers.py on 4 virtual devices: prints JSON of two updates on one device and on a mesh."""

import json

import jax
import numpy as np
from test_training_learner import CONFIG, grpo, params, rollout

from rljax.parallel import make_mesh
from rljax.training import Learner, LightSAMConfig, MuonConfig, UpdateConfig

OPTIMIZERS = {
    "muon": MuonConfig(learning_rate=1e-2, eps=1e-3),
    "lightsam": LightSAMConfig(learning_rate=1e-2, eps=0.1),  # smaller ones amplify the rounding of tiny gradients
}


def moved(optimizer, mesh):
    """How far every weight has moved in two updates, and how often the update was compiled."""
    update = UpdateConfig(pack_length=32, microbatch_size=4, head_chunk=32)
    learner = Learner(CONFIG, grpo(), optimizer, update, mesh=mesh)
    batch, advantages = rollout(groups=6)
    state = learner.init_state(params())
    for _ in range(2):
        state, _ = learner.update(state, learner.prepare(state, batch, advantages)[0])
    change = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), dict(state.trainable), params())
    named = {jax.tree_util.keystr(k): v.reshape(-1).tolist() for k, v in jax.tree_util.tree_leaves_with_path(change)}
    return {"moved": named, "compiled": learner._update._cache_size()}


def main():
    assert jax.device_count() == 4
    meshes = {"one device": None, "mesh": make_mesh(1, 2, 2)}
    print(json.dumps({name: {m: moved(o, mesh) for m, mesh in meshes.items()} for name, o in OPTIMIZERS.items()}))


if __name__ == "__main__":
    main()
