"""Where compiled programs are kept: what is asked for, the environment, the user's cache folder; or nowhere."""

import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from rljax.parallel import keep_compiled, topologies, topology_devices


@pytest.fixture(autouse=True)
def restored():
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_named_folder_comes_before_the_environment_and_that_before_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    own = keep_compiled()
    assert own.startswith(str(tmp_path / "rljax" / "programs")) and jax.config.jax_compilation_cache_dir == own
    assert keep_compiled() == own

    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "of the environment"))
    assert keep_compiled() == jax.config.jax_compilation_cache_dir == str(tmp_path / "of the environment")
    assert keep_compiled(str(tmp_path / "named")) == jax.config.jax_compilation_cache_dir == str(tmp_path / "named")
    assert jax.config.jax_enable_compilation_cache


def test_programs_for_machines_that_are_not_here_are_not_kept(monkeypatch):
    """No process could read them back."""
    monkeypatch.setattr(topologies, "_gpus", lambda *_: jax.devices()[:1] * 8)
    assert jax.config.jax_enable_compilation_cache
    topology_devices("h100:8")
    assert not jax.config.jax_enable_compilation_cache


def test_off_keeps_nothing():
    assert keep_compiled("off") == ""
    assert not jax.config.jax_enable_compilation_cache


def test_a_user_without_a_home_keeps_nothing(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    # Nobody in the list of users has this number.
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    assert keep_compiled() == ""
    assert not jax.config.jax_enable_compilation_cache


def test_a_folder_that_cannot_be_written_costs_a_warning_and_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    keep_compiled(str(tmp_path / "file" / "programs"))
    compilation_cache.reset_cache()
    with pytest.warns(UserWarning, match="persistent compilation cache"):
        assert jax.jit(lambda x: 3 * x)(2.0) == 6.0
    compilation_cache.reset_cache()
