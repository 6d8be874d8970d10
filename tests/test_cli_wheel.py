"""A wheel holds all that a user without the repository needs: the command, the configs, the types."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = folder.glob("rljax_lm-*.whl")
    return file


def test_it_holds_the_package_the_configs_the_types_and_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "rljax = rljax.cli.main:main" in archive.read(points).decode()

    files = [file for file in (ROOT / "rljax").rglob("*") if file.is_file() and file.suffix != ".pyc"]
    package = {str(file.relative_to(ROOT)) for file in files}
    configs = {f"rljax/{file.relative_to(ROOT)}" for file in (ROOT / "configs").rglob("*.py")}
    assert {"rljax/py.typed", "rljax/viewer/page/index.html", "rljax/envs/library/cities.csv"} <= package
    assert names >= package | configs
    assert not [name for name in names if name.startswith(("tests", "configs", "launch"))]


def run(wheel, folder, *arguments):
    """The command from the unpacked wheel, in a folder that holds nothing else."""
    installed = folder / "installed"
    if not installed.exists():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(installed)
    environment = {**os.environ, "PYTHONPATH": str(installed), "RLJAX_ALLOCATOR": "system", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "rljax", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_packaged_config_is_found_by_name(wheel, tmp_path):
    said = run(wheel, tmp_path, "train", "--config=papers/grpo:smoke", "--help")
    assert f"default: '{tmp_path}/installed/rljax/configs/quickstart.py'" in said.replace("\n", "").replace("    ", "")
    assert "config.algorithm.group_size" in said


@pytest.mark.slow
def test_the_tiny_quickstart_runs_from_it(wheel, tmp_path):
    said = run(wheel, tmp_path, "train", "--config=quickstart_tiny", "--workdir=run", "--config.steps=2")
    assert "avg@" in said and (tmp_path / "run" / "summary.json").is_file()
