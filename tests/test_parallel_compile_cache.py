"""Where compiled programs are kept: what is asked for, the environment, the user's cache folder; or nowhere."""

import jax
import pytest

from rljax.parallel import keep_compiled


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


def test_off_keeps_nothing():
    assert keep_compiled("off") == ""
    assert not jax.config.jax_enable_compilation_cache
