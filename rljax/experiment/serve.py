"""What `rljax serve` does."""

import dataclasses
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import jax

from rljax.experiment.model import ComputeDtype, compute_dtype, model_path
from rljax.models import DecoderConfig, load_config, load_model, param_shardings
from rljax.parallel import DECODE_RULES, decoding_mesh, make_mesh, use_mesh
from rljax.rollouts import EngineService
from rljax.sampling import TurnDecoder, TurnDecoderSpec
from rljax.settings import check_fields, field
from rljax.text import load_tokenizer
from rljax.types import Params


@dataclasses.dataclass
class ServeConfig:
    """An engine: `rljax serve`."""

    model: str = ""
    """A Hugging Face folder, a `.gguf` file, or `smollm2`; of a run that hands weights over, its model."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in, and then wants a key."""
    port: int = field(default=8000, least=0, below=2**16)
    """Port to listen at; 0 takes a free one."""
    rows: int = field(default=64, least=1)
    """Completions that decode at once."""
    context_length: int = field(default=1024, least=2)
    """Tokens of a prompt and its completion."""
    max_new_tokens: int = field(default=512, least=1)
    """Tokens of a completion."""
    top_logprobs: int = field(default=0, least=0, most=100)
    """Most probable tokens that requests may ask for beside each token."""
    tensor: int = field(default=1, least=1)
    """Devices that share each layer; the others split the rows."""
    dtype: ComputeDtype = "auto"
    """Of activations and of weights in products. For the tokens that a run would sample itself, its `model.dtype`."""
    key: str = ""
    """API key that requests must bear; empty is none."""

    def check(self) -> None:
        """Raises a ValueError of one line for a value that cannot be."""
        check_fields(self, "")
        if not self.model:
            raise ValueError("name a model, e.g. --model=smollm2 or --model=folder")
        if self.host not in ("127.0.0.1", "localhost", "::1") and not self.key:
            raise ValueError(
                f"--host={self.host} lets other machines change the weights; set the environment variable "
                "RLJAX_SERVE_KEY to a key, and let config.actor.key_variable of the run name one that holds it"
            )


def engine_of(config: ServeConfig) -> EngineService:
    """The engine, with weights and nothing open. ValueError for what cannot work."""
    config.check()
    path = model_path(config.model)
    tokenizer = load_tokenizer(path)
    mesh = decoding_mesh(make_mesh(tensor=config.tensor))
    with use_mesh(mesh):
        dtype = compute_dtype(config.dtype)
        decoder = _decoder_of(path, dtype, tokenizer.vocab_size)
    spec = TurnDecoderSpec(
        conversations=2 * config.rows,
        rows=config.rows,
        context_length=config.context_length,
        max_new_tokens=config.max_new_tokens,
        top_logprobs=config.top_logprobs,
    )
    turns = TurnDecoder(decoder, spec, mesh=mesh)
    load = loader(decoder, mesh, tokenizer.vocab_size)
    turns.set_params(load(str(path)))
    return EngineService(turns, tokenizer, load, folder=str(path), host=config.host, port=config.port, key=config.key)


def loader(decoder: DecoderConfig, mesh: jax.sharding.Mesh, vocabulary: int) -> Callable[[str], Params]:
    """Reads folders with weights of the model `decoder` onto `mesh`. They are read in float32, so that they are rounded
    once, as in a trainer."""

    def load(folder: str) -> Params:
        path = model_path(folder)
        found = _decoder_of(path, decoder.dtype, vocabulary)
        if found != decoder:
            raise ValueError(f"{folder} holds another model than the one that is served; start an engine for it")
        with use_mesh(mesh):
            shardings = param_shardings(decoder, mesh, DECODE_RULES)
            return load_model(path, dtype=decoder.dtype, param_dtype="float32", shardings=shardings)[1]

    return load


def _decoder_of(path: Path, dtype: str, vocabulary: int) -> DecoderConfig:
    decoder = load_config(path, dtype=dtype, param_dtype="float32")
    if vocabulary < decoder.vocab_size:
        decoder = dataclasses.replace(decoder, tokenizer_size=vocabulary)
    return decoder


def serve(config: ServeConfig) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    service = engine_of(config)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with service:
        print(f"serving {config.model} at {service.url}", flush=True)
        ended.wait()
