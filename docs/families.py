"""Prints the table of docs/families.md: each family beside transformers, on the tiny random models of the parity tests.

    python docs/families.py                   # every family; a few minutes on one core
    python docs/families.py gemma3_text phi3  # these alone

Needs torch and transformers, as the parity tests do.
"""

import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import test_models_parity as parity
import torch
import transformers

from rljax.models import FAMILIES, load_hf, save_hf
from rljax.sampling import Fork, Request, Sampler, SamplerSpec, sampling_params

NEW = 16
PROMPT = 12
HEADER = "| family | class in transformers | import | export | files | greedy | forks |\n|---|---|---|---|---|---|---|"


def row(family: str) -> str:
    """A family's line: the largest figure over its cases."""
    names = [name for name, (of, _) in parity.CASES.items() if of == family]
    found = [measure(name) for name in names]
    imported, exported, same, greedy, forks = zip(*found, strict=True)
    files = "equal" if all(same) else "differ"
    logits = f"{max(imported):.0e} | {max(exported):.0e}"
    agreed, total = (sum(x) for x in zip(*greedy, strict=True))
    decoded = f"{agreed}/{total} | {max(forks):.0e}"
    return f"| {family} | {FAMILIES[family].architecture} | {logits} | {files} | {decoded} |"


def measure(name: str) -> tuple[float, float, bool, tuple[int, int], float]:
    """Of one case: differences of logits both ways, whether files come back byte for byte, greedy tokens that agree,
    and the difference of log-probs of forks from one pass over their whole path."""
    model = parity.random_model(name)
    with tempfile.TemporaryDirectory() as scratch:
        theirs = Path(scratch) / "theirs"
        ours = Path(scratch) / "ours"
        model.save_pretrained(theirs)
        config, params = load_hf(theirs)
        save_hf(ours, config, params, hf_config={"pad_token_id": None})
        same = (theirs / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()
        again = transformers.AutoModelForCausalLM.from_pretrained(ours).eval()

    ids = parity.tokens()
    wanted = parity.their_logits(model, ids)
    got = parity.our_logits(config, params, ids)
    exported = parity.their_logits(again, ids)
    sampler = _sampler(config, params)
    return (
        float(np.abs(got - wanted).max()),
        float(np.abs(got - exported).max()),
        same,
        _greedy(model, sampler),
        _forks(config, params, sampler),
    )


def _sampler(config, params) -> Sampler:
    new = min(NEW, config.longest_sequence - PROMPT)
    sizes = {"prompt_slots": 1, "sample_slots": 4, "path_slots": 5, "max_injected": 2}
    sampler = Sampler(config, SamplerSpec(prompt_buckets=(PROMPT,), max_new_tokens=new, **sizes))
    sampler.set_params(params)
    return sampler


def _greedy(model, sampler) -> tuple[int, int]:
    """How many tokens, from the first on, the cached decoder and `generate` take alike, and of how many."""
    prompt = parity.tokens()[0, :PROMPT]
    request = Request(prompt=prompt.tolist(), prompt_id=0, sample_ids=(0,))
    [[sample]] = sampler.generate([request], sampling_params(temperature=0.0), seed=0, step=0)
    options = {"max_new_tokens": len(sample.tokens), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    reference = model.generate(torch.tensor(prompt[None]), **options)[0, PROMPT:].numpy()
    return int(np.cumprod(sample.tokens == reference).sum()), len(reference)


def _forks(config, params, sampler) -> float:
    """Two samples, forks from the middle of both with a given token, and log-probs of all that was sampled."""
    prompt = parity.tokens()[1, :PROMPT].tolist()
    forks = [Fork(0, 2, 10, [3], score=0.0), Fork(1, 3, 11, [], score=0.0), Fork(0, 0, 12, [1, 2], score=0.0)]

    def rounds(samples):
        return forks if len(samples) == 2 else []

    [samples] = sampler.generate([Request(prompt, 0, (0, 1), rounds=rounds)], sampling_params(), seed=1, step=0)
    assert len(samples) == 2 + len(forks)

    # Behind a path stands padding, which it does not see. Rows stay within what the model knows: dynamic scaling would
    # rotate longer ones otherwise.
    paths = np.zeros((len(samples), PROMPT + sampler.spec.max_new_tokens), np.int64)
    for path, sample in zip(paths, samples, strict=True):
        path[: PROMPT + len(sample.tokens)] = [*prompt, *sample.tokens]
    table = np.asarray(jax.nn.log_softmax(jnp.asarray(parity.our_logits(config, params, paths))))

    gaps = []
    for logprobs, sample in zip(table, samples, strict=True):
        places = np.arange(PROMPT - 1, PROMPT - 1 + len(sample.tokens))
        gaps.append(np.abs(logprobs[places, sample.tokens] - sample.logprobs)[sample.sampled].max())
    return float(max(gaps))


if __name__ == "__main__":
    print(HEADER)
    for name in sys.argv[1:] or sorted({family for family, _ in parity.CASES.values()}):
        print(row(name), flush=True)
