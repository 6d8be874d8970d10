"""Runs that break off, to be gone on with."""

import pytest

import rljax.experiment.train
from rljax.experiment import Config


def break_off(config: Config, folder: object, *, before: int) -> None:
    """Trains in `folder` and ends by Ctrl-C when step `before`, counted from 0, is to begin."""
    step = rljax.experiment.train.train_step

    def breaks(run, index):
        if index == before:
            raise KeyboardInterrupt
        return step(run, index)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rljax.experiment.train, "train_step", breaks)
        rljax.experiment.train.train(config, str(folder))
