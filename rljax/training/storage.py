"""Where a run folder may lie: on a local path, or on storage that has an address, such as `gs://bucket/run`."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from etils import epath

AnyPath: TypeAlias = Path | epath.Path
"""Local folders are `pathlib` paths, remote ones those of `etils.epath`, which have the same methods."""

_REMEDIES = {
    "gs": "pip install gcsfs, and gcloud auth application-default login",
    "s3": "pip install s3fs, and set AWS credentials",
}


def is_remote(path: AnyPath | str) -> bool:
    """Whether a path is an address, whose objects are written whole and cannot be locked."""
    return "://" in str(path)


def as_path(path: AnyPath | str) -> AnyPath:
    """The path as an object; local ones absolute. ValueError for an address of an unknown kind."""
    if not is_remote(path):
        return Path(path).expanduser().absolute()
    scheme = str(path).partition("://")[0]
    if scheme not in _REMEDIES:
        known = ", ".join(f"{name}://" for name in _REMEDIES)
        raise ValueError(f"{path} is on storage of an unknown kind; give a local path or one of {known}")
    return epath.Path(str(path))


def reachable(path: AnyPath | str) -> AnyPath:
    """`as_path`, after a look at the storage. ValueError, with the remedy, where it cannot be reached."""
    found = as_path(path)
    try:
        found.exists()
    except Exception as error:  # whatever the client of the storage raises
        if not is_remote(path):
            raise
        why = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        remedy = _REMEDIES[str(path).partition("://")[0]]
        raise ValueError(f"{path} cannot be reached ({why}); {remedy}; or name a local folder") from None
    return found


def append_text(path: AnyPath, text: str) -> None:
    """Adds to the end of a file. Remote objects cannot grow, so that they are written anew."""
    if is_remote(path):
        path.write_text((path.read_text() if path.exists() else "") + text)
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def remove_tree(path: AnyPath) -> None:
    """Removes a folder and all in it; does nothing where there is none."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        epath.Path(path).rmtree()


@contextlib.contextmanager
def local_folder(path: AnyPath) -> Iterator[Path]:
    """A local folder for what can only be written locally: `path` itself, or one whose files are copied to it."""
    if not is_remote(path):
        yield Path(str(path))
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        copy_files(Path(folder), path)


@contextlib.contextmanager
def local_copy(path: AnyPath) -> Iterator[Path]:
    """A folder for what can only read local ones: `path` itself, or one with its files."""
    if not is_remote(path):
        yield Path(str(path))
        return
    with tempfile.TemporaryDirectory() as folder:
        copy_files(path, Path(folder))
        yield Path(folder)


def copy_files(source: AnyPath, target: AnyPath) -> None:
    """Copies the files of a folder, and of those in it, to another; either may be remote."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir(), key=lambda path: path.name):
        goal = target / file.name
        if file.is_dir():
            copy_files(file, goal)
        else:
            goal.write_bytes(file.read_bytes())
