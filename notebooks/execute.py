"""Runs the notebooks as a reader would: from a wheel, in a fresh environment, in a folder that holds nothing else.

python notebooks/execute.py --out=notebooks/out              # all of them; `make notebooks`
python notebooks/execute.py --out=notebooks/out quickstart   # one

Their sources are jupytext's percent format; what is written is .ipynb with outputs, for Colab or Jupyter. The
environment sees the packages of this one, but not the clone: rljax comes from the wheel, by the notebook's first cell.
"""

import argparse
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

HERE = Path(__file__).parent
NAMES = ("quickstart", "own_loop", "forests", "agent", "bring_your_own", "lora")
"""In the order in which they are read."""

_CELL_TIMEOUT_S = 1800

# Runs in the fresh environment, whose interpreter is the kernel's.
_EXECUTE = """
import sys
import jupytext, nbclient, nbformat
source, target, folder, timeout = sys.argv[1:]
notebook = jupytext.read(source)
client = nbclient.NotebookClient(
    notebook,
    timeout=int(timeout),
    startup_timeout=600,
    kernel_name="python3",
    resources={"metadata": {"path": folder}},
)
try:
    client.execute()
finally:
    nbformat.write(notebook, target)
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", required=True, help="folder for .ipynb with outputs, and for what they write")
    arguments.add_argument("names", nargs="*", help=f"some of {', '.join(NAMES)}; none is all")
    given = arguments.parse_args()
    unknown = sorted(set(given.names) - set(NAMES))
    if unknown:
        sys.exit(f"there is no notebook {', '.join(unknown)}; there are {', '.join(NAMES)}")

    out = Path(given.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    wheel = build_wheel(out)
    for name in given.names or NAMES:
        started = time.perf_counter()
        execute(name, wheel, out)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


def build_wheel(folder: Path) -> Path:
    """The wheel of this clone."""
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", build, str(folder)]
    named = subprocess.run(command, cwd=HERE.parent, check=True, capture_output=True, text=True).stdout.split()[-1]
    return folder / named


def execute(name: str, wheel: Path, out: Path) -> Path:
    """Runs one notebook in an environment of its own; returns the .ipynb, which is also written where a cell fails.
    CalledProcessError where one does."""
    folder = out / name
    folder.mkdir(exist_ok=True)
    python = fresh_environment(folder)
    target = out / f"{name}.ipynb"

    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"RLJAX_WHEEL": str(wheel), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "MPLBACKEND": "agg"}
    command = [python, "-c", _EXECUTE, HERE / f"{name}.py", target, folder, _CELL_TIMEOUT_S]
    subprocess.run([str(part) for part in command], cwd=folder, env=environment, check=True)
    return target


def fresh_environment(folder: Path) -> Path:
    """The interpreter of a new environment with the packages of this one, but for rljax."""
    venv.create(folder / "environment", clear=True, with_pip=False)
    (packages,) = (folder / "environment").glob("lib/python*/site-packages")

    # Links lie outside of the environment, so that pip changes nothing behind them.
    links = []
    for number, path in enumerate(path for path in map(Path, sys.path) if is_of_packages(path)):
        link = folder / f"packages-{number}"
        link.mkdir(exist_ok=True)
        links.append(f"{link}\n")
        for found in path.iterdir():
            if not found.name.startswith("rljax") and found.suffix != ".pth" and not (link / found.name).is_symlink():
                (link / found.name).symlink_to(found.absolute())
    (packages / "packages.pth").write_text("".join(links))
    return folder / "environment" / "bin" / "python"


def is_of_packages(path: Path) -> bool:
    """Whether a folder holds installed packages, rather than the clone or the standard library."""
    return path.is_dir() and next(path.glob("*.dist-info"), None) is not None


if __name__ == "__main__":
    main()
