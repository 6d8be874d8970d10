"""Folders of adapters and PEFT itself: the logits of one model, whichever of the two wrote it."""

import dataclasses

import numpy as np
import pytest
from test_models_dora import trained as moved_dora
from test_models_lora import BASE, CONFIG, IDS, outputs, trained

from rljax.models import (
    MATRICES,
    TARGETS,
    Lora,
    load_peft,
    read_lora,
    save_hf,
    save_peft,
    with_adapters,
)

torch = pytest.importorskip("torch", reason="parity with PEFT needs torch; pip install torch==2.13.0")
peft = pytest.importorskip("peft", reason="parity with PEFT needs it; pip install --no-deps peft accelerate psutil")
transformers = pytest.importorskip("transformers", reason="parity needs transformers; pip install transformers")

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
TIED = dataclasses.replace(CONFIG, tied_embeddings=True)
CASES = {"with the head": (CONFIG, TARGETS), "tied": (TIED, MATRICES)}


@pytest.fixture(params=CASES, name="model")
def _model(request, tmp_path):
    """(config, targets, params, folder) of a model without adapters."""
    config, targets = CASES[request.param]
    params = {name: x for name, x in BASE.items() if name != "head" or not config.tied_embeddings}
    save_hf(tmp_path / "base", config, params)
    return config, targets, params, tmp_path / "base"


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("kind", [{}, {"rank_stabilized": True}, {"dora": True}], ids=["plain", "rslora", "dora"])
def test_peft_reads_what_is_written_here(model, kind, tmp_path):
    config, targets, params, folder = model
    targets = MATRICES if "dora" in kind else targets
    lora = Lora(rank=3, alpha=6.0, targets=targets, **kind)
    config = dataclasses.replace(config, lora=lora)
    params = with_adapters(params, moved_dora(lora) if lora.dora else trained(lora))
    save_peft(tmp_path / "adapter", config, params, base=str(folder))

    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = logits_of(plain)
    theirs = logits_of(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter"))
    np.testing.assert_allclose(outputs(config, params), theirs, atol=1e-4)
    assert np.abs(theirs - before).max() > 0.1


@pytest.mark.parametrize("dora", [False, True])
def test_what_peft_writes_is_read_here(model, dora, tmp_path):
    config, targets, params, folder = model
    targets = MATRICES if dora else targets
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = list(MODULES[: len(targets)])
    own = {"r": 4, "lora_alpha": 6, "target_modules": modules, "init_lora_weights": False, "use_dora": dora}
    theirs = peft.get_peft_model(plain, peft.LoraConfig(**own, task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)

    lora = read_lora(tmp_path / "adapter", config)
    assert (lora.rank, lora.alpha, lora.targets, lora.dora) == (4, 6.0, targets, dora)
    config = dataclasses.replace(config, lora=lora)
    params = with_adapters(params, load_peft(tmp_path / "adapter", config))
    np.testing.assert_allclose(outputs(config, params), logits_of(theirs), atol=1e-4)
