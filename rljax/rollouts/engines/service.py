"""The decoder for conversations as an engine of its own, in vLLM's protocol."""

import itertools
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from rljax.rollouts.actor import TurnSource
from rljax.rollouts.black_box.decoder_thread import DecoderThread, Interrupted, Manner, UnderWay
from rljax.rollouts.engines.api import LARGEST_ID, GenerateRequest, read_request, write_choice, write_scores
from rljax.rollouts.engines.completions import (
    read_completion_request,
    told_of_prompt,
    write_text_choice,
)
from rljax.rollouts.http_server import Answer, ApiError, Asked, HttpServer, json_answer
from rljax.sampling import PromptScores, Sample, Stops, Turn, TurnDecoder, TurnResult, sampling_params
from rljax.sampling.stopping import find_stop
from rljax.sampling.turns import MOST_TURNS
from rljax.text import Tokenizer
from rljax.types import Params

T = TypeVar("T")

_LEAST_BYTES = 2**20  # a body may have so many whatever the context
_BYTES_A_TOKEN = 16  # of a list of ids
_PAUSES: Mapping[str, UnderWay] = {"abort": "call off", "wait": "wait for", "keep": "begin anew"}
_LORA = re.compile(r"/v1/(un)?load_lora_adapter")

Load = Callable[[str], Params]
"""From a folder with weights of the decoder's model to these. ValueError for any other folder."""


class _Weights(NamedTuple):
    """Weights that an engine speaks with, or spoke with."""

    folder: str
    label: str


class _PromptScores(NamedTuple):
    """What was said of a prompt, and the number of the weights that said it."""

    entries: list[dict[str, Any] | None]
    version: int


class EngineService:
    """Serves `decoder` at `host` (`port` 0 takes a free one) as vLLM serves token ids.

    - `POST /inference/v1/generate`: ids in, ids and log-probs out (`rljax.rollouts.engines.api`). Requests join those
      under way as rows become free. Turns of one manner (temperature and truncation, seed, step, what ends them) are
      decoded together; others wait for their end, in the order of arrival.
    - `POST /v1/completions`: texts or ids in, text out, as OpenAI has it (`rljax.rollouts.engines.completions`).
    - `POST /collective_rpc` with the method `reload_weights` and `kwargs.weights_path`: other weights, from a folder.
      What is under way begins anew.
    - `POST /pause?mode=abort|wait|keep`, `POST /resume`, `GET /is_paused`. With `keep`, what is under way begins anew
      behind the resume.
    - `POST /update_weight_version`, `GET /weight_info`: a label of the weights, which every answer repeats.
    - `POST /reset_prefix_cache`, `GET /health`, `GET /version`, `GET /v1/models`; and, of our own, `GET /stats`: the
      decoder's counts since the manner changed last.

    With a `key`, all but `/health` want it as a bearer token. A context manager: the port and the threads are open
    within `with` only. OSError on entering for a port that is taken.
    """

    def __init__(
        self,
        decoder: TurnDecoder,
        tokenizer: Tokenizer,
        load: Load,
        *,
        folder: str,
        host: str = "127.0.0.1",
        port: int = 0,
        key: str = "",
    ):
        self.tokenizer = tokenizer
        self.context_length = decoder.spec.context_length
        self._turn_decoder = decoder
        self._vocabulary = decoder.config.num_ids
        self._load = load
        self._address = (host, port)
        self._key = key
        self._most_bytes = max(_LEAST_BYTES, _BYTES_A_TOKEN * self.context_length)
        # By the number that the decoder's thread knows them by; `default` is what vLLM calls the first.
        self._weights = {0: _Weights(folder, "default")}
        self._numbers = itertools.count(1)
        self._loading = threading.Lock()
        self._opened: tuple[HttpServer, DecoderThread, threading.Thread] | None = None
        self._get: dict[str, Callable[[], Any]] = {
            "/health": lambda: {},
            "/version": lambda: {"version": "rljax"},
            "/is_paused": lambda: {"is_paused": self._thread.is_paused},
            "/weight_info": lambda: {"weight_version": self.weights.label},
            "/v1/models": self._models,
            "/stats": lambda: self.stats,
        }
        self._post: dict[str, Callable[[Asked, Any], Any]] = {
            "/inference/v1/generate": lambda _, body: self.generate(body),
            "/v1/completions": lambda _, body: self.complete(body),
            "/collective_rpc": lambda _, body: self._collective_rpc(body),
            "/update_weight_version": lambda _, body: self._update_weight_version(body),
            "/pause": lambda asked, _: self._pause(asked.query.get("mode", "abort")),
            "/resume": lambda *_: self._resume(),
            # What older weights have computed is never read, so that there is nothing to reset.
            "/reset_prefix_cache": lambda *_: {},
        }

    def __enter__(self) -> "EngineService":
        if self._opened is not None:
            raise RuntimeError("the engine is open already")
        # The port first: if it is taken, no thread is left behind.
        server = HttpServer(self._address, self)
        thread = DecoderThread(self._turn_decoder)
        thread.version = 0
        listener = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True, name="engine"
        )
        self._opened = (server, thread, listener)
        listener.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._opened is None:
            return
        server, thread, listener = self._opened
        # The order matters: no new requests, then answers to those under way, then their connections.
        server.shutdown()
        thread.close()
        server.close()
        listener.join()
        self._opened = None

    @property
    def url(self) -> str:
        return self._open[0].url

    @property
    def weights(self) -> _Weights:
        """Those that it speaks with."""
        return self._weights[self._thread.version]

    @property
    def stats(self) -> dict[str, float]:
        """The decoder's, since the manner changed last."""
        return {name: float(value) for name, value in self._turn_decoder.stats.items()}

    @property
    def _open(self) -> tuple[HttpServer, DecoderThread, threading.Thread]:
        if self._opened is None:
            raise RuntimeError("the engine is closed; use it within `with engine:`")
        return self._opened

    @property
    def _thread(self) -> DecoderThread:
        return self._open[1]

    def get(self, asked: Asked) -> Answer:
        """As `rljax.rollouts.http_server.Service` has it."""
        # Whoever starts engines may look whether one stands; where weights lie is for those who have the key.
        if asked.path != "/health":
            self._check_key(asked)
        if asked.path not in self._get:
            raise ApiError(f"nothing is served at GET {asked.path}", status=404, code="unknown_url")
        return json_answer(self._get[asked.path]())

    def post(self, asked: Asked) -> Callable[[Any], Answer]:
        """Likewise."""
        self._check_key(asked)
        if _LORA.fullmatch(asked.path):
            raise ApiError(
                "adapters are not served: the decoder holds whole weights; hand over a folder with merged weights",
                status=501,
                code="no_adapters",
            )
        if asked.path not in self._post:
            raise ApiError(f"nothing is served at POST {asked.path}", status=404, code="unknown_url")
        if asked.length > self._most_bytes:
            raise ApiError(
                f"the body has {asked.length} bytes; {self._most_bytes} are more than {self.context_length} ids take",
                status=413,
                code="request_too_large",
            )
        answer = self._post[asked.path]
        return lambda body: json_answer(answer(asked, body))

    def _check_key(self, asked: Asked) -> None:
        if self._key and not secrets.compare_digest(asked.key.encode(), self._key.encode()):
            raise ApiError("the API key is another", status=401, code="invalid_api_key")

    def _models(self) -> dict[str, Any]:
        card = {"id": self.weights.folder, "object": "model", "created": 0, "owned_by": "rljax"}
        return {"object": "list", "data": [{**card, "max_model_len": self.context_length}]}

    def generate(self, body: Any) -> dict[str, Any]:
        """Answers a request for completions, from any thread. Raises ApiError."""
        request = _read(lambda: read_request(body, new_seed=secrets.randbelow(LARGEST_ID)))
        turns, manner = self._turns(request)

        futures = [self._ask(turn, manner) for turn in turns]
        (scores,) = self._prompt_logprobs([request])
        try:
            results = [future.result() for future in futures]
        except Interrupted:
            # As vLLM ends what a pause calls off; it says what there was until then, which would be of no use here.
            aborted: dict[str, Any] = {
                "finish_reason": "abort",
                "stop_reason": None,
                "token_ids": [],
                "logprobs": {"content": []},
            }
            return {
                "request_id": request.request_id,
                "choices": [{"index": i, **aborted} for i in range(request.completions)],
            }
        except ValueError as error:  # what the decoder cannot serve
            raise ApiError(str(error)) from error

        said = sum(len(result.tokens) for result, _ in results)
        usage = _usage(len(request.tokens), said)
        choices = [self._choice(i, result, version, request) for i, (result, version) in enumerate(results)]
        answer: dict[str, Any] = {"request_id": request.request_id, "choices": choices, "usage": usage}
        if scores is not None:
            _check_same_weights(scores, results)
            answer["prompt_logprobs"] = scores.entries
        return answer

    def complete(self, body: Any) -> dict[str, Any]:
        """Answers a request for text, from any thread. Raises ApiError."""
        request = _read(
            lambda: read_completion_request(body, self.tokenizer, new_seed=secrets.randbelow(LARGEST_ID - 2**20))
        )
        asked = [self._turns(prompt) for prompt in request.prompts]
        futures = [[self._ask(turn, manner) for turn in turns] for turns, manner in asked if not request.is_silent]
        scored = self._prompt_logprobs(request.prompts)

        choices: list[dict[str, Any]] = []
        said = 0
        for number, (prompt, scores) in enumerate(zip(request.prompts, scored, strict=True)):
            try:
                results = [future.result() for future in futures[number]] if futures else []
            except Interrupted as error:
                raise ApiError(f"called off: {error}", status=503, code="interrupted") from error
            except ValueError as error:
                raise ApiError(str(error)) from error

            before = None
            if scores is not None:
                _check_same_weights(scores, results)
            if request.echoes:
                # Without log-probs none are read.
                entries = scores.entries if scores is not None else [None] * len(prompt.tokens)
                before = told_of_prompt(entries, prompt.tokens)

            made = [self._choice(0, result, version, prompt) for result, version in results]
            said += sum(len(choice["token_ids"]) for choice in made)
            silence: list[dict[str, Any] | None] = [None] * prompt.completions
            for choice in made or silence:
                tells = request.tells_logprobs
                written = write_text_choice(self.tokenizer, len(choices), prompt.tokens, before, choice, tells=tells)
                if scores is not None:
                    written["prompt_logprobs"] = scores.entries
                choices.append(written)

        usage = _usage(sum(len(prompt.tokens) for prompt in request.prompts), said)
        name = request.prompts[0].request_id
        return {
            "id": f"cmpl-{name}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.weights.folder,
            "choices": choices,
            "usage": usage,
        }

    def _prompt_logprobs(self, requests: Sequence[GenerateRequest]) -> "list[_PromptScores | None]":
        """What the model says of the prompts of those that ask for it, between two looks at the turns under way."""
        asking = [request for request in requests if request.prompt_top is not None]
        if not asking:
            return [None] * len(requests)

        def score(decoder: TurnSource) -> tuple[list[PromptScores], int]:
            # The thread's decoder is the one that the engine was built with.
            return self._turn_decoder.score_prompts([request.tokens for request in asking]), self._thread.version

        try:
            found, version = self._thread.call(score, "leave")
        except Interrupted as error:
            raise ApiError(f"called off: {error}", status=503, code="interrupted") from error
        left = iter(found)
        return [
            None
            if request.prompt_top is None
            else _PromptScores(write_scores(request.tokens, next(left), request.prompt_top), version)
            for request in requests
        ]

    def _ask(self, turn: Turn, manner: Manner) -> "Future[tuple[TurnResult, int]]":
        try:
            return self._thread.ask(turn, manner)
        except Interrupted as error:
            raise ApiError(f"called off: {error}", status=503, code="interrupted") from error

    def _turns(self, request: GenerateRequest) -> tuple[list[Turn], Manner]:
        """A turn of its own for each completion, and how they are sampled. Raises ApiError."""
        _check_sampling(request)
        named = (*request.tokens, *request.stop_tokens, *(token for token, _ in request.logit_bias))
        if outside := [token for token in named if token >= self._vocabulary]:
            raise ApiError(
                f"token {outside[0]} is outside the vocabulary of {self._vocabulary}; check that tokenizer and model "
                "belong together",
                param="token_ids",
            )

        # Refused and not cut: a client could not tell a completion that its own limit ended from one that ours did.
        room = self.context_length - len(request.tokens)
        if room < 1:
            raise ApiError(
                f"this model's maximum context length is {self.context_length} tokens; token_ids has "
                f"{len(request.tokens)}, and one must be left to say",
                code="context_length_exceeded",
                param="token_ids",
            )
        most = min(self._turn_decoder.spec.max_new_tokens, room)
        if request.limit is not None and request.limit > most:
            raise ApiError(
                f"max_tokens={request.limit} is more than the {most} that there is room for behind "
                f"{len(request.tokens)} tokens; lower it, or serve with more --max_new_tokens or --context_length",
                param="max_tokens",
            )

        most_top = self._turn_decoder.spec.top_logprobs
        for name, top in (("logprobs", request.top), ("prompt_logprobs", request.prompt_top or 0)):
            if top > most_top:
                raise ApiError(
                    f"{name}={top} is more than the {most_top} most probable tokens that are told; lower it, or serve "
                    "with more --top_logprobs",
                    param=name,
                )

        manner = Manner(
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            logit_bias=request.logit_bias,
            seed=request.seed,
            step=request.step,
            stops=Stops(
                tokens=tuple(sorted({*request.stop_tokens, *self._own_stops(request)})),
                strings=request.stop,
                decode_text=self.tokenizer.decode,
            ),
        )
        # The decoder counts a turn as a sample of its own: by quotient and remainder its random numbers are those of a
        # sampler's sample of this id.
        turns = [
            Turn(
                conversation=0,
                tokens=request.tokens,
                prompt_id=request.prompt_id,
                sample_id=sample_id // MOST_TURNS,
                turn=sample_id % MOST_TURNS,
                max_new_tokens=request.limit or most,
                begun=request.begun,
                drawn=request.drawn,
            )
            for sample_id in range(request.sample_id, request.sample_id + request.completions)
        ]
        return turns, manner

    def _own_stops(self, request: GenerateRequest) -> Sequence[int]:
        """What ends a completion whatever the client names."""
        return () if request.ignores_eos else self.tokenizer.stop_ids

    def _choice(self, index: int, result: TurnResult, version: int, request: GenerateRequest) -> dict[str, Any]:
        # As vLLM says it: which of the client's own stops it was; None for the model's.
        reason: int | str | None = None
        if result.end == "stop" and result.tokens[-1] not in self._own_stops(request):
            reason = int(result.tokens[-1])
        if result.end == "stop_string":
            begun = request.tokens[len(request.tokens) - request.begun :]
            text = self.tokenizer.decode([*begun, *result.tokens.tolist()])
            reason = next((string for string in request.stop if find_stop(text, (string,)) is not None), None)
        sample = Sample(
            result.tokens,
            result.logprobs,
            result.entropies,
            "length" if result.end == "length" else "stop",
            top_tokens=result.top_tokens,
            top_logprobs=result.top_logprobs,
        )
        return write_choice(index, sample, stop_reason=reason, version=self._weights[version].label, top=request.top)

    def _collective_rpc(self, body: Any) -> dict[str, Any]:
        method = body.get("method") if isinstance(body, dict) else None
        kwargs = body.get("kwargs") if isinstance(body, dict) else None
        folder = kwargs.get("weights_path") if isinstance(kwargs, dict) else None
        if method != "reload_weights" or not isinstance(folder, str):
            served = '{"method": "reload_weights", "kwargs": {"weights_path": FOLDER}}'
            raise ApiError(f"of collective_rpc {served} is served, and nothing else")

        with self._loading:
            try:
                params = self._load(folder)
            except (ValueError, OSError) as error:
                raise ApiError(f"weights_path: {error}", param="weights_path") from error
            number = next(self._numbers)
            # Until it is given a label it has that of the folder, so that no answer bears the label of other weights.
            self._weights[number] = _Weights(folder, folder)
            self._thread.set_params(params, number, "begin anew")
        return {"results": [None]}

    def _update_weight_version(self, body: Any) -> dict[str, Any]:
        label = body.get("new_version") if isinstance(body, dict) else None
        if not isinstance(label, str) or not label:
            raise ApiError('the body must be {"new_version": TEXT}')
        with self._loading:
            number = self._thread.version
            self._weights[number] = self._weights[number]._replace(label=label)
        return {"success": True, "new_version": label}

    def _pause(self, mode: str) -> dict[str, Any]:
        if mode not in _PAUSES:
            raise ApiError(f"mode={mode!r} is none of {', '.join(_PAUSES)}", param="mode")
        self._thread.pause(_PAUSES[mode])
        return {"status": "paused"}

    def _resume(self) -> dict[str, Any]:
        self._thread.resume()
        return {"status": "resumed"}


def _read(reading: Callable[[], T]) -> T:
    try:
        return reading()
    except RecursionError as error:
        raise ApiError("the body is nested too deeply") from error


def _usage(prompt: int, said: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}


def _check_same_weights(scores: _PromptScores, results: Sequence[tuple[TurnResult, int]]) -> None:
    if any(version != scores.version for _, version in results):
        raise ApiError("the weights changed meanwhile; ask again", status=503, code="interrupted")


def _check_sampling(request: GenerateRequest) -> None:
    try:
        sampling_params(
            request.temperature, request.top_k, request.top_p, request.min_p, logit_bias=dict(request.logit_bias)
        )
    except ValueError as error:
        raise ApiError(str(error)) from error
