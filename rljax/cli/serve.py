"""Serves a model to runs elsewhere: token ids in, ids and log-probs out, in vLLM's protocol.

    rljax serve --model=smollm2 --port=8000
    rljax serve --model=runs/x-export --port=8001 --rows=128 --context_length=4096 --max_new_tokens=2048

A run samples there with config.actor=Remote(engines=("http://127.0.0.1:8000",)), hands its weights over by folder, and
gets the tokens that it would have sampled itself. RLJAX_SERVE_KEY holds the API key, which other machines need.
"""

import os
from typing import cast

from absl import flags

from rljax.cli.command_line import launch

_MODEL = flags.DEFINE_string("model", "", "Hugging Face folder, GGUF file, or smollm2.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 lets other machines in.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen at; 0 takes a free one.")
_ROWS = flags.DEFINE_integer("rows", 64, "Completions that decode at once.")
_CONTEXT = flags.DEFINE_integer("context_length", 1024, "Tokens of a prompt and its completion.")
_NEW = flags.DEFINE_integer("max_new_tokens", 512, "Tokens of a completion.")
_TOP = flags.DEFINE_integer("top_logprobs", 0, "Most probable tokens that requests may ask for beside each token.")
_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that share each layer; the others split the rows.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "Of activations; config.model.dtype of the run."
)


def main() -> None:
    from rljax.experiment.model import ComputeDtype
    from rljax.experiment.serve import ServeConfig, serve

    config = ServeConfig(
        model=_MODEL.value,
        host=_HOST.value,
        port=_PORT.value,
        rows=_ROWS.value,
        context_length=_CONTEXT.value,
        max_new_tokens=_NEW.value,
        top_logprobs=_TOP.value,
        tensor=_TENSOR.value,
        dtype=cast(ComputeDtype, _DTYPE.value),
        key=os.environ.get("RLJAX_SERVE_KEY", ""),
    )
    serve(config)


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
