"""The settings of sampling and of the mesh refuse what cannot work, naming the setting."""

import dataclasses

import pytest

from rljax.parallel import MeshConfig
from rljax.sampling import SamplingConfig, sampling_params


def test_the_config_gives_the_distribution_that_it_names():
    config = SamplingConfig(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)
    config.check()
    want = sampling_params(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)
    assert dataclasses.asdict(config.params()) == dataclasses.asdict(want)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, r"^config.sampling.max_new_tokens=0 must be at least 1"),
        ({"top_p": 0.0}, r"^config.sampling.top_p=0.0 must be above 0"),
        ({"temperature": -1.0}, r"^config.sampling.temperature=-1.0 must be at least 0"),
    ],
)
def test_impossible_sampling_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": -1}, r"^config.mesh data=-1 x fsdp=-1 x tensor=1: .*at most one may be -1"),
        ({"tensor": 0}, r"sizes must be positive"),
        ({"data": 3}, r"data=3 x fsdp=-1 x tensor=1 does not multiply to the 8 devices here"),
        ({"fsdp": 4}, r"fsdp=4 x tensor=1 does not multiply to the 8 devices here"),
    ],
)
def test_impossible_meshes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**settings).check(8)


def test_a_mesh_that_fits_is_taken():
    MeshConfig(data=2, tensor=2).check(8)
    MeshConfig(data=2, fsdp=2, tensor=2).check(8)
    MeshConfig(data=3).check()  # how many devices there are is not known yet
