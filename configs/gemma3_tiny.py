"""`quickstart_tiny` with Gemma 3's layers: a character model learns to spell words backwards.

    rljax train --config=gemma3_tiny --workdir=runs/gemma3

Of six layers five see the last 8 tokens alone and rotate by a base of their own, and the last sees all, as in the
released models. `transformers` loads the export as a Gemma3ForCausalLM.
"""

import string

import quickstart_tiny

from rljax.experiment import Config, FreshModel


def get_config() -> Config:
    config = quickstart_tiny.get_config()
    config.name = "gemma3-tiny"
    config.steps = 90
    config.data.args = {"min_word_len": 3, "max_word_len": 5}
    config.model = FreshModel(
        family="gemma3_text",
        alphabet=string.ascii_letters + " =",
        num_layers=6,
        embed_dim=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        mlp_dim=288,
        sliding_window=8,
    )
    return config
