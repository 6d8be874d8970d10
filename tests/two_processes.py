"""Run twice by test_parallel_distributed.py, as processes 0 and 1 of one program of 2 x 4 virtual devices."""

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from sharded_program import CONFIG, batch, difference, loss

from rljax import parallel
from rljax.models import load_model, param_shardings, save_hf
from rljax.parallel import sharding
from rljax.parallel.exchange import client, exchange, tell_failure
from rljax.sampling import compile_count
from rljax.training import Checkpointer
from rljax.types import TrainState

os.environ["RLJAX_NUM_PROCESSES"] = "2"
os.environ["RLJAX_PROCESS_ID"] = sys.argv[1]
several = parallel.initialize_distributed(coordinator=sys.argv[2])
folder = Path(sys.argv[3])
assert parallel.initialize_distributed() is True  # a second call is harmless

mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
layout = param_shardings(CONFIG, mesh)
_, params = load_model(folder / "model", shardings=layout)
with parallel.use_mesh(mesh):
    step = jax.jit(jax.value_and_grad(lambda p, d: loss(p, d)[0]), out_shardings=(None, layout))
    value, grad = step(params, parallel.put_batch(mesh, batch()))
moved = parallel.reshard(params, param_shardings(CONFIG, mesh, parallel.DECODE_RULES))
save_hf(folder / "again", CONFIG, params)
parallel.barrier("saved")


def said_by(function):
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def fails():
    raise KeyError("judge")


def refuses():
    raise ValueError("no such folder")


def programs_of(*sizes):
    """Programs that are compiled to tell all processes texts of these lengths."""
    before = compile_count()
    for size in sizes:
        assert parallel.on_main(lambda size=size: "x" * size) == "x" * size
    return compile_count() - before


def restored(checkpoints, target):
    """The step that is gone on from where process 1 cannot read the newest, and believes in one that is not there."""
    manager = checkpoints._manager
    listed = manager.all_steps
    read = checkpoints._read
    if jax.process_index():
        manager.all_steps = lambda: [*listed(), 9]
        checkpoints._read = lambda step, name, args: read(step if name == "host" or step < 2 else 8, name, args)
    return checkpoints.restore(target)[2]


def saved_twice(params):
    """Checkpoints of steps 1 and 2, which the abstract state behind them is restored from."""
    none = jax.device_put(np.int32(0), parallel.replicated(mesh))
    state = TrainState(trainable=params, opt_state={}, step=none, skipped=none)
    checkpoints = Checkpointer(folder / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, state, {})
    checkpoints.wait()
    return checkpoints, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def handed_over(params):
    """Weights for the devices of this process, of which the learner's are donated: which part of the queries a device
    gets, how far they are from the weights, and what a second time compiles."""
    own_part = sharding.own_part
    parts = []

    def noted(x, mesh):
        parts.append(x.addressable_shards[0].data.nbytes / x.nbytes)
        return own_part(x, mesh)

    sharding.own_part = noted
    target = param_shardings(CONFIG, parallel.own_mesh(mesh), parallel.DECODE_RULES)
    want = parallel.to_host(params)
    learners = jax.tree.map(jax.numpy.copy, params)
    parallel.hand_over(learners, target)
    before = compile_count()
    found = parallel.hand_over(learners, target)
    compiled = compile_count() - before
    jax.tree.map(lambda x: x.delete(), learners)
    assert jax.tree.map(lambda x: x.sharding, found) == target
    return {"part": min(parts), "difference": difference(found, want), "compiled": compiled}


def late():
    """Process 0 waits for one that does not come."""
    return "" if index else said_by(lambda: exchange("late", b"", timeout_s=1.0))


def failed():
    """Process 0 waits for one that has failed."""
    return tell_failure("KeyError: judge") if index else said_by(lambda: exchange("last", b""))


index = jax.process_index()
large = [bytes([number]) * (2**20 * number + 5) for number in (1, 2)]
told = [exchange("large", large[index]) for _ in range(3)]
result = {
    "large": [parts == large for parts in told],
    "kept": sorted({key.split("/")[2] for key, _ in client().key_value_dir_get_bytes("rljax/large/")}),
    "handed_over": handed_over(params),
    "late": late(),
    "restored": restored(*saved_twice(params)),
    "once": parallel.on_main(lambda: {"process": index}),
    "failed": said_by(lambda: parallel.on_main(fails)),
    "refused": said_by(lambda: parallel.on_main(refuses)),
    "unsent": said_by(lambda: parallel.on_main(lambda: refuses.__code__)),
    "programs": programs_of(*range(300, 450, 15)),
    "equal": said_by(lambda: parallel.check_equal(config={"a": 1}, shapes=(4, 8), mask=np.arange(3))),
    "unequal": said_by(lambda: parallel.check_equal(config={"a": 1}, shapes=(4, index), mask=np.arange(3) + index)),
    "several": several,
    "devices": [jax.device_count(), jax.local_device_count()],
    "main": parallel.is_main_process(),
    "loss": float(value),
    "gathered": parallel.gather({"process": jax.process_index(), "text": "x" * (5 * jax.process_index())}),
    "moved": difference(parallel.to_host(moved), parallel.to_host(params)),
    "addressable": params["layers"]["q"].is_fully_addressable,
}
result["other_failed"] = failed()
np.savez(folder / f"grad{sys.argv[1]}.npz", *jax.tree.leaves(parallel.to_host(grad)))
print(json.dumps(result))
