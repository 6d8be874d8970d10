"""What a bucket is, for tests: objects that are written whole, no folders, nothing that is renamed or grows."""

import collections
import sys
from typing import ClassVar

from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem


class ObjectStore(MemoryFileSystem):
    """Behind `gs://` and `s3://`, through the same client interface as gcsfs and s3fs. The process is "killed"
    after `fails_after` changes, or when it is to change the object `fails_on`; `puts` counts the writes of every
    object."""

    protocol = ("gs", "gcs", "s3")
    cachable = False
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]
    puts: ClassVar = collections.Counter()
    fails_after: ClassVar = None
    fails_on: ClassVar = None

    def __init__(self, **options):
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path):
        for name in cls.protocol:
            path = path.removeprefix(f"{name}://")
        return "/" + path.strip("/") if path.strip("/") else ""

    def _change(self, path):
        if path == ObjectStore.fails_on:
            raise InterruptedError("killed")
        if ObjectStore.fails_after is not None:
            if ObjectStore.fails_after == 0:
                raise InterruptedError("killed")
            ObjectStore.fails_after -= 1

    def _open(self, path, mode="rb", **options):
        assert "a" not in mode and "+" not in mode, "an object cannot grow"
        if "w" in mode:
            self._change(path)
            ObjectStore.puts[path] += 1
        return super()._open(path, mode, **options)

    def mkdir(self, path, create_parents=True, **options):
        """There are no folders."""

    def makedirs(self, path, exist_ok=False):
        """There are no folders."""

    def rm(self, path, recursive=False, maxdepth=None):
        path = self._strip_protocol(path)
        found = [name for name in self.store if name == path or (recursive and name.startswith(f"{path}/"))]
        if not found:
            raise FileNotFoundError(path)
        for name in found:
            self._change(name)
            del self.store[name]

    def rename(self, path, dst, **options):
        raise AssertionError("a bucket renames nothing in one move")

    mv = rename


def install(monkeypatch):
    """An empty store."""
    ObjectStore.store.clear()
    ObjectStore.puts.clear()
    ObjectStore.fails_after = None
    ObjectStore.fails_on = None
    for name in ObjectStore.protocol:
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, name, ObjectStore)
    backend.fsspec_backend._get_filesystem.cache_clear()
    return ObjectStore


def contents(folder):
    """The objects below a folder by their name in it."""
    prefix = ObjectStore._strip_protocol(folder) + "/"
    return {
        name.removeprefix(prefix): file.getvalue()
        for name, file in ObjectStore.store.items()
        if name.startswith(prefix)
    }
