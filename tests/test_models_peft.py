"""Folders of adapters and PEFT itself: the logits of one model, whichever of the two wrote it."""

import dataclasses

import jax
import numpy as np
import pytest
from test_models_lora import CONFIG, IDS, outputs

from rljax.models import (
    MATRICES,
    TARGETS,
    Experts,
    Lora,
    fresh_config,
    init_adapters,
    init_params,
    load_peft,
    read_lora,
    save_hf,
    save_peft,
    with_adapters,
)

torch = pytest.importorskip("torch", reason="parity with PEFT needs torch; pip install torch==2.13.0")
peft = pytest.importorskip("peft", reason="parity with PEFT needs it; pip install --no-deps peft accelerate psutil")
transformers = pytest.importorskip("transformers", reason="parity needs transformers; pip install transformers")

APART = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
# Modules that hold several matrices each, whose rows lie one behind the other or take turns by head.
JOINED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")
HYBRID = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "out_proj", "gate_proj", "up_proj", "down_proj")
TIED = dataclasses.replace(CONFIG, tied_embeddings=True)
SIZES = {"vocab_size": 24, "num_layers": 4, "embed_dim": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
CASES = {
    "with the head": (CONFIG, TARGETS, APART),
    "tied": (TIED, MATRICES, APART[:-1]),
    "phi3": (dataclasses.replace(CONFIG, family="phi3"), TARGETS, JOINED),
    "qwen3_5": (fresh_config("qwen3_5_text", mlp_dim=24, max_position=64, **SIZES), MATRICES, HYBRID),
    "qwen3_next": (
        fresh_config(
            "qwen3_next", experts=Experts(count=4, per_token=2, mlp_dim=12), mlp_dim=24, max_position=64, **SIZES
        ),
        ("q", "k", "v", "o"),
        ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"),
    ),
}


@pytest.fixture(params=CASES, name="model")
def _model(request, tmp_path):
    """(config, targets, modules, params, folder) of a model without adapters."""
    config, targets, modules = CASES[request.param]
    params = init_params(config, jax.random.key(0))
    # Phi-3 pads with an id beyond so small a vocabulary unless told otherwise.
    save_hf(tmp_path / "base", config, params, hf_config={"pad_token_id": 0})
    return config, targets, modules, params, tmp_path / "base"


def moved(config, params):
    """Adapters of `params` that add something."""
    rng = np.random.default_rng(1)
    adapters = init_adapters(config, jax.random.key(1), params)
    return jax.tree.map(lambda x: np.float32(x * (1 + 0.3 * rng.normal(size=x.shape)) + 0.03), adapters)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("kind", [{}, {"rank_stabilized": True}, {"dora": True}], ids=["plain", "rslora", "dora"])
def test_peft_reads_what_is_written_here(model, kind, tmp_path):
    config, targets, _, params, folder = model
    # A length is of a whole module, and Qwen3-Next's holds a gate, which has no adapter here.
    dropped = "head" if config.family != "qwen3_next" else "qkv"
    targets = tuple(x for x in targets if "dora" not in kind or x not in (dropped, *dropped))
    lora = Lora(rank=3, alpha=6.0, targets=targets, **kind)
    config = dataclasses.replace(config, lora=lora)
    params = with_adapters(params, moved(config, params))
    save_peft(tmp_path / "adapter", config, params, base=str(folder))

    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = logits_of(plain)
    theirs = logits_of(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter"))
    np.testing.assert_allclose(outputs(config, params), theirs, atol=1e-4)
    assert np.abs(theirs - before).max() > 0.02


@pytest.mark.parametrize("dora", [False, True])
def test_what_peft_writes_is_read_here(model, dora, tmp_path):
    config, targets, modules, params, folder = model
    targets = tuple(x for x in targets if not dora or x != "head")
    modules = [x for x in modules if not dora or x != "lm_head"]
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    own = {"r": 4, "lora_alpha": 6, "target_modules": modules, "init_lora_weights": False, "use_dora": dora}
    theirs = peft.get_peft_model(plain, peft.LoraConfig(**own, task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)

    lora = read_lora(tmp_path / "adapter", config)
    assert (lora.rank, lora.alpha, lora.targets, lora.dora) == (4, 6.0, targets, dora)
    config = dataclasses.replace(config, lora=lora)
    if dora and config.family == "qwen3_next":
        # Zeros are no lengths of the delta rule's matrices, which PEFT left as they are.
        with pytest.raises(ValueError, match="PEFT's DoRA takes whole"):
            load_peft(tmp_path / "adapter", config)
        return
    params = with_adapters(params, load_peft(tmp_path / "adapter", config))
    np.testing.assert_allclose(outputs(config, params), logits_of(theirs), atol=1e-4)
