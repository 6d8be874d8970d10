"""The settings of sampling and of the mesh refuse what cannot work, naming the setting."""

import dataclasses
import functools

import numpy as np
import pytest

from rljax.models import DecoderConfig, RopeScaling
from rljax.parallel import MeshConfig
from rljax.sampling import Request, Sampler, SamplerSpec, SamplingConfig, TurnDecoderSpec, sampling_params
from rljax.sampling.logits import MASKED, logit_biases
from rljax.text import CharTokenizer, token_of


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
        ({"logit_bias": ((3, 1e9),)}, r"^config.sampling.logit_bias=1000000000.0 must lie between -1e\+06 and 1e\+06"),
        ({"banned": (3, -1)}, r"^config.sampling.banned=-1 is no token id"),
        ({"banned": (3, 4, 3)}, r"^config.sampling.banned names the token 3 twice"),
    ],
)
def test_impossible_sampling_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings).check()


def test_tokens_are_named_by_their_id_or_by_their_text():
    tokenizer = CharTokenizer("abc")
    config = SamplingConfig(logit_bias=(("a", 2.0), (1, -3.0)), banned=("c",))
    config.check()
    params = config.params(functools.partial(token_of, tokenizer))
    assert logit_biases(params) == {2: 2.0, 1: -3.0, 4: MASKED}
    with pytest.raises(ValueError, match=r"^banned: 'ab' is 2 tokens of this tokenizer \(\[2, 3\]\)"):
        SamplingConfig(banned=("ab",)).params(functools.partial(token_of, tokenizer))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": -1}, r"^config.mesh data=-1 x fsdp=-1 x tensor=1 x sequence=1 x expert=1: .*at most one may be -1"),
        ({"tensor": 0}, r"sizes must be positive"),
        ({"data": 3}, r"data=3 x fsdp=-1 x tensor=1 x sequence=1 x expert=1 does not multiply to the 8 devices here"),
        ({"fsdp": 4}, r"fsdp=4 x tensor=1 x sequence=1 x expert=1 does not multiply to the 8 devices here"),
    ],
)
def test_impossible_meshes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**settings).check(8)


def test_a_mesh_that_fits_is_taken():
    MeshConfig(data=2, tensor=2).check(8)
    MeshConfig(data=2, fsdp=2, tensor=2).check(8)
    MeshConfig(data=3).check()  # how many devices there are is not known yet


TINY = DecoderConfig(
    vocab_size=7, num_layers=1, embed_dim=4, num_heads=1, num_kv_heads=1, head_dim=4, mlp_dim=4, max_position=16
)


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({}, 16),
        # As Qwen's model cards add it: the length in config.json stays, the factor stretches the original one.
        ({"type": "yarn", "factor": 4.0, "original_max_position": 16}, 64),
        ({"type": "yarn", "factor": 4.0, "original_max_position": 12}, 48),
        ({"type": "yarn", "factor": 4.0}, 64),
        ({"type": "yarn", "factor": 4.0, "original_max_position": 2}, 16),  # a file may state more by itself
        ({"type": "linear", "factor": 2.5}, 40),
        ({"type": "llama3", "factor": 8.0, "original_max_position": 16}, 16),  # states the stretched length
        ({"type": "dynamic", "factor": 4.0}, 16),
    ],
)
def test_lengths_that_a_scaling_covers_are_allowed_and_longer_ones_are_not(scaling, longest):
    model = dataclasses.replace(TINY, rope_scaling=RopeScaling(**scaling))
    assert model.longest_sequence == longest
    sampler = Sampler(model, SamplerSpec(prompt_slots=1, sample_slots=1, prompt_buckets=(128,), max_new_tokens=4))
    sampler._check(0, Request(prompt=np.zeros(longest - 4, np.int32), prompt_id=0, sample_ids=(0,)))
    with pytest.raises(ValueError, match=f"new tokens exceed {longest},"):
        sampler._check(0, Request(prompt=np.zeros(longest - 3, np.int32), prompt_id=0, sample_ids=(0,)))

    turns = TurnDecoderSpec(conversations=1, rows=1, context_length=longest, max_new_tokens=4)
    if scaling.get("type") != "dynamic":
        turns.check(model)
        with pytest.raises(ValueError, match=f"at most the model's {longest} positions"):
            dataclasses.replace(turns, context_length=longest + 1).check(model)
