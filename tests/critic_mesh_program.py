"""Run by test_training_critic.py on 4 virtual devices: prints JSON of what a critic learns on several meshes."""

import json

import jax
import numpy as np
import optax
from test_training_critic import make
from test_training_learner import params, rollout

from rljax.batching import PackConfig
from rljax.parallel import make_mesh

MESHES = [None, (4, 1, 1), (1, 4, 1), (1, 2, 2)]


def result(shape):
    optimizer = optax.sgd(0.02, momentum=0.9)  # Adam amplifies the rounding of tiny gradients
    mesh = None if shape is None else make_mesh(*shape)
    critic = make(PackConfig(pack_length=64, microbatch_size=4), optimizer=optimizer, mesh=mesh, epochs=2)
    batch, _ = rollout(groups=6)
    state = critic.init_state(params())
    for _ in range(2):
        batch = critic.with_values(state, batch)
        state, metrics = critic.update(state, batch)
    assert jax.tree.all(jax.tree.map(lambda x, target: x.sharding == target.sharding, state, critic.abstract_state()))
    weight = state.trainable["layers"]["gate"]
    return {
        "metrics": metrics,
        "values": np.asarray(critic.with_values(state, batch).values).tolist(),
        "split": shape in (None, (4, 1, 1)) or weight.sharding.shard_shape(weight.shape) != weight.shape,
    }


if __name__ == "__main__":
    assert jax.device_count() == 4
    print(json.dumps([result(shape) for shape in MESHES]))
