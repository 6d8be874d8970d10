"""The numerics benchmark on a tiny model: sampler and trainer agree, and nothing compiles after the warm-up."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SIZE = dict(prompts=2, samples=2, prompt=8, new=4, steps=4)


@pytest.fixture(scope="module")
def numerics(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLJAX_BENCH_HOME", str(tmp_path_factory.mktemp("benchmarks")))
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("numerics", "_common", "_environments", "_probe")
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        import numerics

        yield numerics
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tiny(numerics):
    _, shape, _ = numerics.setting_of("small", numerics.SIZES)
    return shape, numerics.load_model(numerics.write_model(shape), dtype="float32")


def test_sampler_and_trainer_agree_in_float32(numerics, tiny):
    gaps = numerics.logprob_gaps(*tiny, SIZE)
    assert len(gaps) == 4
    assert max(gaps.values()) < 2e-5


def test_varied_lengths_compile_nothing_after_warm_up(numerics, tiny):
    warm, after = numerics.count_compiles(*tiny, SIZE)
    assert warm > 0
    assert after == 0
