"""Where a run folder may lie: on a local path, or on storage that has an address, such as `gs://bucket/run`."""

import contextlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from etils import epath

AnyPath: TypeAlias = Path | epath.Path
"""Local folders are `pathlib` paths, remote ones those of `etils.epath`, which have the same methods."""

_PIECE = 2**24  # bytes of a file that are in memory while it is copied

_REMEDIES = {
    "gs": "pip install gcsfs, and gcloud auth application-default login",
    "s3": "pip install s3fs, and set AWS credentials",
}


def is_remote(path: AnyPath | str) -> bool:
    """Whether a path is an address, whose objects are written whole and cannot be locked."""
    return "://" in str(path)


def as_path(path: AnyPath | str) -> AnyPath:
    """The path as an object; local ones absolute. ValueError for no text, and for an address of an unknown kind."""
    if not str(path).strip():
        raise ValueError("the name of a folder is empty; give a local path, such as runs/first, or an address")
    if not is_remote(path):
        return Path(path).expanduser().absolute()
    scheme, _, rest = str(path).partition("://")
    if "@" in rest.partition("/")[0]:
        raise ValueError(
            f"an address {scheme}://... must hold no credentials, which end up in logs; its client finds them itself"
        )
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
        why = _without_secrets(str(error).strip().splitlines()[0])[:200] if str(error).strip() else ""
        why = why or type(error).__name__
        remedy = _REMEDIES[str(path).partition("://")[0]]
        raise ValueError(f"{path} cannot be reached ({why}); {remedy}; or name a local folder") from None
    return found


def writable(path: AnyPath | str) -> AnyPath:
    """`reachable`, for a folder that will be written to; nothing is made yet. ValueError where a local one cannot be: a
    file, what lies below one, a place without permission."""
    found = reachable(path)
    if is_remote(found):
        return found
    there = next(folder for folder in (found, *found.parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"folder {found} cannot be made, for {there} is a file; name another one")
    try:
        Path(tempfile.mkdtemp(dir=str(there))).rmdir()
    except OSError as error:
        raise ValueError(f"folder {found} cannot be written to ({error.strerror}: {there}); name another one") from None
    return found


def writable_file(path: str, flag: str) -> Path:
    """The path of a file that will be written at the end, after long work. ValueError, with the name of its `flag`,
    where it lies in no folder, or is one."""
    file = Path(path)
    if not file.parent.is_dir():
        raise ValueError(f"--{flag}={path}: there is no folder {file.parent}; make it, or name another")
    if file.is_dir():
        raise ValueError(f"--{flag}={path} is a folder; name a file in it")
    return file


_SECRETS = re.compile(
    r"(//)[^/@\s]+@"  # //user:password@host
    r"|(\bBearer\s+)\S+"
    r"|([\w-]*(?:key|token|secret|signature|credential|password|authorization)[\w-]*['\"]?\s*[=:]\s*)"
    r"(?!Bearer\b)['\"]?[^\s'\"&,;)]+",
    re.IGNORECASE,
)


def _without_secrets(text: str) -> str:
    """What a client of a storage says, without what it may say of keys, signed addresses and headers."""
    return _SECRETS.sub(lambda found: next(part for part in found.groups() if part) + "...", text)


class GrowingFile:
    """A text file that lines are added to. On a disk it grows at once. A remote object cannot grow: it is written
    whole, every `UPLOAD_S` seconds at most, and by `flush`. A kill loses what came since."""

    UPLOAD_S = 30.0

    def __init__(self, path: AnyPath):
        self.path = path
        self._text = ""  # all of a remote file, once it is read
        self._is_read = False
        self._is_behind = False
        self._written = time.monotonic()

    def append(self, text: str) -> None:
        if not is_remote(self.path):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
            return
        if not self._is_read:
            self._text = self.path.read_text() if self.path.exists() else ""
            self._is_read = True
        self._text += text
        self._is_behind = True
        if time.monotonic() - self._written >= self.UPLOAD_S:
            self.flush()

    def flush(self) -> None:
        """Everything that was added is there afterwards."""
        if self._is_behind:
            self.path.write_text(self._text)
            self._is_behind = False
            self._written = time.monotonic()


def replace_bytes(path: AnyPath, content: bytes) -> None:
    """Writes a file so that a kill leaves the old or the new one, whole."""
    if is_remote(path):  # objects are written whole
        path.write_bytes(content)
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def replace_text(path: AnyPath, text: str) -> None:
    """`replace_bytes` of text as `write_text` writes it."""
    replace_bytes(path, _escaped(text))


def write_text(path: AnyPath, text: str) -> None:
    """Half characters, which prompts, completions and errors may hold, are escaped: in JSON they mean the same."""
    path.write_bytes(_escaped(text))


def _escaped(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def move_tree(source: AnyPath, goal: AnyPath, *, last: str = "") -> None:
    """Moves a folder, in place of one that is there. On a disk it then is at one of the two places, whole. The objects
    of a remote one go one by one, of which the file `last` is the first to go and the last to come: where it is, the
    folder is whole."""
    goal.parent.mkdir(parents=True, exist_ok=True)
    if not is_remote(source):
        remove_tree(goal)
        source.rename(goal)
        return

    if last:
        (goal / last).unlink(missing_ok=True)
    remove_tree(goal)
    copy_files(source, goal, last=last)
    remove_tree(source)


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


def copy_files(source: AnyPath, target: AnyPath, *, last: str = "") -> None:
    """Copies the files of a folder, and of those in it, to another; either may be remote. The file `last` comes when
    all others are there."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir(), key=lambda path: (path.name == last, path.name)):
        goal = target / file.name
        if file.is_dir():
            copy_files(file, goal)
        else:
            with file.open("rb") as old, goal.open("wb") as new:
                shutil.copyfileobj(old, new, _PIECE)
