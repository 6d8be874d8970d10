"""Checkpoints in a bucket that Orbax cannot write to: it knows local folders and `gs://` alone."""

import shutil
import tempfile
import weakref
from pathlib import Path

import jax
from absl import logging

from rljax.training.storage import AnyPath, copy_files, is_remote, remove_tree

_MARK = "_CHECKPOINT_METADATA"
"""The file of a checkpoint that goes out last and is removed first: where it is, the checkpoint is whole."""


def needs_mirror(folder: AnyPath) -> bool:
    """Whether Orbax cannot write checkpoints there."""
    return is_remote(folder) and not str(folder).startswith("gs://")


class Mirror:
    """A local folder with the whole checkpoints of a remote one, which `push` brings up to date.

    With `cleans`, what an interrupted `push` left behind is removed. Raises ValueError on several processes, each of
    which would have a part of the arrays in a folder of its own.
    """

    def __init__(self, remote: AnyPath, *, cleans: bool):
        if jax.process_count() > 1:
            raise ValueError(
                f"checkpoints at {remote} need one process; name a folder that all processes share, or one on gs://"
            )
        self.remote = remote
        self.local = Path(tempfile.mkdtemp(prefix="rljax-checkpoints-"))
        weakref.finalize(self, shutil.rmtree, str(self.local), True)

        for step in self._steps(remote):
            if (remote / step / _MARK).exists():
                copy_files(remote / step, self.local / step)
            elif cleans:
                logging.warning("checkpoint %s is not whole and is removed", remote / step)
                remove_tree(remote / step)

    def push(self) -> None:
        """Afterwards the remote folder holds the checkpoints of the local one. At every moment it holds one that is
        whole, if it did before."""
        wanted = self._steps(self.local)
        there = self._steps(self.remote)
        for step in wanted:
            if step not in there:
                copy_files(self.local / step, self.remote / step, last=_MARK)
        for step in there:
            if step not in wanted:
                (self.remote / step / _MARK).unlink(missing_ok=True)
                remove_tree(self.remote / step)

    @staticmethod
    def _steps(folder: AnyPath) -> list[str]:
        names = [child.name for child in folder.iterdir()] if folder.exists() else []
        return sorted((name for name in names if name.isdigit()), key=int)
