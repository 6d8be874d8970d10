"""Run by test_training_token_objectives.py on 4 virtual devices: two updates with selection and rescue, as JSON."""

import json

import jax
import numpy as np
import optax
from test_training_learner import CONFIG, params, rollout

from rljax import losses as L
from rljax.parallel import make_mesh
from rljax.training import Learner, LossNeeds, UpdateConfig


def main():
    parts = L.rescue(L.token_ratio, clip_low=0.2, clip_high=0.28, noise=L.two_sided(0.5))
    loss = L.policy_loss(
        parts.ratio_fn,
        L.clipped(clip_low=0.2, clip_high=0.28, dual_clip=10.0),
        L.token_mean,
        report_fns=[parts.report_fn],
        select_fn=L.high_entropy(0.3),
    )
    batch, advantages = rollout()
    results = []
    for shape in (None, (4, 1, 1), (1, 2, 2)):
        mesh = None if shape is None else make_mesh(*shape)
        update = UpdateConfig(pack_length=32, microbatch_size=4, epochs=2, head_chunk=16)
        learner = Learner(CONFIG, loss, optax.sgd(1.0), update, needs=LossNeeds(uniforms=True), mesh=mesh)
        state = learner.init_state(params())
        for minibatch in learner.prepare(state, batch, advantages):
            state, metrics = learner.update(state, minibatch)
        flat = np.concatenate([np.asarray(x).reshape(-1)[:40] for x in jax.tree.leaves(state.trainable)])
        results.append({"metrics": {k: float(v) for k, v in metrics.items()}, "params": flat.tolist()})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
