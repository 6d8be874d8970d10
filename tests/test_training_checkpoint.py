"""Checkpoints: whole state, exact, and never lost to a kill or a broken file."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rljax.training.checkpoint import LAYOUT, Checkpointer, fingerprint, restore_params
from rljax.training.state import with_before
from rljax.types import TrainState


def make_state(seed):
    rng = np.random.default_rng(seed)
    return TrainState(
        trainable={
            "w": jnp.asarray(rng.normal(size=(64, 33)), jnp.float32),
            "b": jnp.asarray(rng.normal(size=(7,)), jnp.bfloat16),
        },
        opt_state=(jnp.int32(seed), {"m": jnp.asarray(rng.normal(size=(64, 33)), jnp.float32)}),
        step=jnp.int32(seed),
        skipped=jnp.int32(0),
    )


def target(sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), make_state(0))


def save_steps(folder, steps, **options):
    checkpointer = Checkpointer(folder, **options)
    for step in steps:
        checkpointer.save(step, make_state(step), {"position": step * 10}, {"score": float(step % 3)})
    checkpointer.close()


def assert_is_step(restored, step):
    state, host, found = restored
    assert found == step and host == {"position": step * 10}
    jax.tree.map(np.testing.assert_array_equal, state, make_state(step))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_steps(folder, (1, 2))
    return folder


def test_the_newest_comes_back_bit_for_bit(two_steps, tmp_path):
    assert_is_step(Checkpointer(two_steps).restore(target()), 2)
    assert Checkpointer(tmp_path / "empty").restore(target()) is None


def test_what_a_state_lacks_leaves_nothing_in_its_checkpoint(two_steps):
    """Else one that was written before there was such a field could not be gone on from."""
    written = json.loads((two_steps / "2" / "state" / "_METADATA").read_text())["tree_metadata"]
    fields = {entry["key_metadata"][0]["key"] for entry in written.values()}
    assert fields == {"trainable", "opt_state", "step", "skipped", "ref_trainable"}


def test_older_weights_may_be_asked_for_from_a_resume_on_or_no_longer(two_steps, tmp_path):
    """They are those of the checkpoint then, in arrays of their own: updates take the others for themselves."""
    asked = target()
    state, _, _ = Checkpointer(two_steps).restore(with_before(asked, asked.trainable))
    for one, other in zip(jax.tree.leaves(state.before), jax.tree.leaves(state.trainable), strict=True):
        assert one is not other
        np.testing.assert_array_equal(one, other)

    held = make_state(2)
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(2, with_before(held, make_state(1).trainable), {"position": 20})
    checkpoints.close()
    assert_is_step(Checkpointer(tmp_path).restore(target()), 2)
    state, _, _ = Checkpointer(tmp_path).restore(with_before(asked, asked.trainable))
    for one, other in zip(jax.tree.leaves(state.before), jax.tree.leaves(make_state(1).trainable), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_last_and_the_best_are_kept(tmp_path):
    save_steps(tmp_path, range(1, 8), keep_last=2, keep_best=1, best_metric="score")
    assert Checkpointer(tmp_path).steps == [5, 6, 7]
    save_steps(tmp_path / "last", range(1, 5), keep_last=1)
    assert Checkpointer(tmp_path / "last").steps == [4]


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    state = make_state(3).replace(trainable={"w": jnp.ones((2000, 2000)), "b": jnp.ones(3)})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    checkpointer.save(3, state, {})
    overwrite(state)
    checkpointer.wait()
    np.testing.assert_array_equal(checkpointer.restore(shapes)[0].trainable["w"], np.ones((2000, 2000)))


def files_of(folder):
    """One file of every kind: the random names of data files count as one kind per folder."""
    kinds = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size:
            relative = path.relative_to(folder)
            kinds[str(relative.parent / "data") if len(path.name) == 32 else str(relative)] = relative
    return kinds


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "remove"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(two_steps, tmp_path, damage, caplog):
    """Every kind of file in turn: where no reader needs it there is no effect, but what comes back is never wrong."""
    fallbacks = []
    for kind, relative in files_of(two_steps / "2").items():
        folder = tmp_path / kind.replace("/", "_") / "checkpoints"
        shutil.copytree(two_steps, folder)
        path = folder / "2" / relative
        data = path.read_bytes()
        if damage == "remove":
            path.unlink()
        else:
            middle = len(data) // 2
            flipped = data[:middle] + bytes([data[middle] ^ 0x55]) + data[middle + 1 :]
            path.write_bytes({"truncate": data[:middle], "empty": b"", "flip": flipped}[damage])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            restored = Checkpointer(folder).restore(target())
        assert_is_step(restored, restored[2])
        if restored[2] == 1:
            fallbacks.append(kind)
            listed = Checkpointer(folder)
            assert listed.steps == [1]
            listed.save(2, make_state(2), {"position": 20})
            listed.close()
            assert_is_step(Checkpointer(folder).restore(target()), 2)
    assert fallbacks, "no damage was noticed at all"
    if damage in ("truncate", "empty"):
        assert {"host/metadata", "state/manifest.ocdbt"} <= set(fallbacks)


def test_weights_alone_come_back_checked_and_in_the_dtype_asked_for(two_steps, tmp_path):
    wanted = target().trainable
    params, step = restore_params(two_steps, wanted)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, params, make_state(2).trainable)
    half = jax.tree.map(lambda t: t.update(dtype=jnp.bfloat16), wanted)
    params, step = restore_params(two_steps, half, 1)
    assert step == 1 and params["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["w"], make_state(1).trainable["w"].astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"no checkpoint of step 7 in .*; there are \[1, 2\]"):
        restore_params(two_steps, wanted, 7)
    with pytest.raises(ValueError, match=r"of another model: its weights w have the shape .*config\.model \(3,\)"):
        restore_params(two_steps, {**wanted, "w": jax.ShapeDtypeStruct((3,), jnp.float32)})

    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    file = next((folder / "2" / "host").glob("metadata"))
    host = json.loads(file.read_text())
    host["fingerprint"]["trainable/w"] ^= 1
    file.write_text(json.dumps(host))
    with pytest.raises(
        ValueError, match=r"the contents of trainable/w .* are not what was saved; .* take another step"
    ):
        restore_params(folder, wanted)


def test_a_changed_bit_in_any_array_is_noticed(two_steps, tmp_path):
    """Also where the file format would not notice: the saved fingerprint is of the arrays themselves."""
    shutil.copytree(two_steps, tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "2" / "host" / "metadata"
    host = json.loads(path.read_text())
    host["fingerprint"]["trainable/w"] ^= 1
    path.write_text(json.dumps(host))
    assert_is_step(Checkpointer(tmp_path / "checkpoints").restore(target()), 1)
    state = make_state(1)
    changed = state.replace(trainable=dict(state.trainable, w=state.trainable["w"].at[3, 4].multiply(1 + 1e-6)))
    swapped = state.replace(trainable=dict(state.trainable, w=state.trainable["w"][::-1]))
    for other in (changed, swapped):
        differing = {k for k in fingerprint(state) if fingerprint(state)[k] != fingerprint(other)[k]}
        assert differing == {"trainable/w"}


def test_a_changed_model_is_an_error_and_nothing_is_set_aside(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "checkpoints")

    def wider(x):
        return jax.ShapeDtypeStruct((64, 34), x.dtype, sharding=x.sharding) if x.shape == (64, 33) else x

    other = jax.tree.map(wider, target())
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be used .* start in a new folder"):
        Checkpointer(tmp_path / "checkpoints").restore(other)
    assert Checkpointer(tmp_path / "checkpoints").steps == [1, 2]


def old_checkpoint(folder, **host):
    """A checkpoint as it was written when weights were called `params`."""
    state = make_state(3)
    fields = {"params": state.trainable, "opt_state": state.opt_state, "step": state.step, "skipped": state.skipped}
    fields["ref_params"] = None
    host = {"step": 3, "host": {}, "fingerprint": fingerprint(fields), "score": None} | host
    with ocp.CheckpointManager(folder) as manager:
        manager.save(3, args=ocp.args.Composite(state=ocp.args.StandardSave(fields), host=ocp.args.JsonSave(host)))


@pytest.mark.parametrize(
    ("host", "what"), [({}, "before layouts were numbered"), ({"layout": LAYOUT + 1}, f"in layout {LAYOUT + 1}")]
)
def test_a_checkpoint_of_another_layout_is_refused_in_one_line(tmp_path, host, what):
    old_checkpoint(tmp_path, **host)
    for read in (
        lambda: Checkpointer(tmp_path).restore(target()),
        lambda: restore_params(tmp_path, target().trainable),
    ):
        with pytest.raises(
            ValueError, match=rf"checkpoint .*3 was written {what}.* layout {LAYOUT}; convert it"
        ) as one:
            read()
        assert "\n" not in str(one.value) and "start in a new folder" in str(one.value)
    assert Checkpointer(tmp_path).steps == [3]  # it stays where it is, for the release that can read it


def test_host_state_that_is_not_json_is_refused_at_once(tmp_path):
    with pytest.raises(TypeError):
        Checkpointer(tmp_path).save(1, make_state(1), {"bad": object()})


KILLED = """
import sys, pathlib
sys.path.insert(0, {tests!r})
from test_training_checkpoint import Checkpointer, make_state, target
checkpointer = Checkpointer(sys.argv[1], keep_last=1)
restored = checkpointer.restore(target())
first = 0 if restored is None else restored[2]
print("start", first, flush=True)
for step in range(first + 1, first + 400):
    checkpointer.save(step, make_state(step), {{"position": step * 10}})
    print("begun", step, flush=True)
"""


@pytest.mark.parametrize("kills", [4, pytest.param(25, marks=pytest.mark.slow)])
def test_kill_at_any_moment_leaves_a_restorable_folder(tmp_path, kills):
    """Saves one after the other, so that nearly every moment is during a save or a removal."""
    rng = random.Random(kills)
    script = KILLED.format(tests=str(Path(__file__).parent))
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(Path(__file__).parents[1]))
    reached = 0
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "c")], stdout=subprocess.PIPE, text=True, env=environment
        )
        start = int(process.stdout.readline().split()[1])
        assert start >= reached  # what was finished before the kill is there
        process.stdout.readline(), process.stdout.readline()  # the first of two saves is finished
        time.sleep(rng.random() * 0.7)
        process.send_signal(signal.SIGKILL)
        # The last line may be cut off by the kill, in the middle of a number too.
        whole, _, _ = process.stdout.read().rpartition("\n")
        process.wait()
        begun = int(whole.split()[-1]) if whole else start + 2
        reached = begun - 1  # saving a step waits for the one before
        restored = Checkpointer(tmp_path / "c", keep_last=1).restore(target())
        assert restored[2] in (reached, begun, begun + 1)
        assert_is_step(restored, restored[2])
        reached = restored[2]
    assert reached >= kills
