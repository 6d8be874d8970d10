"""An endpoint in OpenAI's manner over the decoder for conversations: agents that cannot be changed speak with the
policy, and every token that it says to them is recorded."""

import contextlib
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

from rljax.envs import get_format
from rljax.envs.formats import Parser, ToolFormat
from rljax.rollouts.actor import TurnSource
from rljax.rollouts.black_box.address import EndpointConfig, open_token, session_of
from rljax.rollouts.black_box.chat_api import (
    ChatRequest,
    key_of,
    read_message,
    read_request,
    stream_answer,
    write_answer,
)
from rljax.rollouts.black_box.decoder_thread import DecoderThread, Interrupted
from rljax.rollouts.black_box.recording import Renderer, Reply, Session
from rljax.rollouts.http_server import Answer, ApiError, Asked, HttpServer, json_answer
from rljax.sampling import SamplingParams, Turn, TurnResult
from rljax.sampling.logits import MASKED
from rljax.sampling.slots import Grammar
from rljax.text import Tokenizer, control_tokens_of
from rljax.types import Params

_LEAST_BYTES = 2**20  # a body may have so many whatever the context
_BYTES_A_TOKEN = 64  # beyond what any text with its JSON escapes takes
_ROUTE = re.compile(r"(?:/session/(?P<session>[^/]+))?/v1/(?P<what>[^?]*)")


class _Place(NamedTuple):
    """Where a request stands in its session."""

    parent: Reply | None
    """The reply that it continues; None begins a conversation."""
    keys: list[str]
    """Keys of the tools, if it begins a conversation, and of the messages since `parent`."""
    given: list[int]
    """Ids since `parent`."""
    ids: list[int]
    """All ids of the conversation, `given` at the end."""
    turn: int
    """What names the random numbers of its answer."""
    stop: tuple[str, ...] = ()
    """Texts that end its answer."""


class _Opened(NamedTuple):
    """What an endpoint holds while it is open."""

    server: HttpServer
    decoder: DecoderThread
    listener: threading.Thread
    token: str
    """What requests must bring; empty for nothing."""
    ending: contextlib.ExitStack
    """Takes the token out of the environment."""


class ChatEndpoint:
    """Serves `POST /v1/chat/completions`, `GET /v1/models` and `GET /health` at `address`.

    An agent gets a session: `url(session)` is its base URL, or the session's id is its API key. At an address that
    other machines can reach, every request but that for health must bring the endpoint's token as its API key, or
    TOKEN.SESSION where the key names the session. Requests of any number
    of agents are decoded together, under the sampling of `begin`. Those that go on from what was answered before get
    the recorded ids and what the chat template puts behind them; others begin a conversation of their own. With `tools`
    in a request, calls are read by `tool_format` (see `rljax.envs.formats`). `stop_strings` are those of the decoder; a
    request may name others where the decoder finds them.

    A context manager: the port and the threads are open within `with` only, and there it owns the decoder, so give
    weights through `set_params`. Raises ValueError for a tokenizer without a chat template or an unknown format, and
    OSError, on entering, for an address that cannot be had.
    """

    def __init__(
        self,
        decoder: TurnSource,
        tokenizer: Tokenizer,
        *,
        tool_format: str | Parser | ToolFormat = "hermes",
        stop_strings: Sequence[str] = (),
        address: EndpointConfig | None = None,
        model: str = "policy",
    ):
        self.address = EndpointConfig() if address is None else address
        self.address.check()
        self.tokenizer = tokenizer
        self.model = model
        self.failure: Exception | None = None  # what the decoder raised, if it did
        self.renderer = Renderer(tokenizer)
        self.context_length = decoder.spec.context_length
        self.most_bytes = max(_LEAST_BYTES, _BYTES_A_TOKEN * self.context_length)  # of a request's body
        self._turn_decoder = decoder
        self._format = get_format(tool_format)
        self._stop_strings = tuple(stop_strings)
        self._finds_strings = decoder.finds_strings
        self._most_top = decoder.spec.top_logprobs
        self._max_new_tokens = decoder.spec.max_new_tokens
        self._sampling: dict[str, float] | None = None
        self._sessions: dict[str, Session] = {}
        self._opened: _Opened | None = None

    def __enter__(self) -> "ChatEndpoint":
        if self._opened is not None:
            raise RuntimeError("the endpoint is open already")
        with contextlib.ExitStack() as opening:
            token = opening.enter_context(open_token(self.address))
            # The port before the threads: if it is taken, none is left behind.
            server = HttpServer((self.address.host, self.address.port), self)
            ending = opening.pop_all()
        listener = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True, name="endpoint"
        )
        self._opened = _Opened(server, DecoderThread(self._turn_decoder), listener, token, ending)
        listener.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Calls off what is under way and ends all threads. The decoder can be used again, by another endpoint too."""
        opened = self._opened
        if opened is None:
            return
        # The order matters: no new requests, then answers to those under way, then their connections.
        opened.server.shutdown()
        opened.decoder.close()
        opened.server.close()
        opened.listener.join()
        opened.ending.close()
        self._opened = None

    @property
    def _decoder(self) -> DecoderThread:
        return self._open.decoder

    @property
    def _open(self) -> "_Opened":
        if self._opened is None:
            raise RuntimeError("the endpoint is closed; use it within `with endpoint:`")
        return self._opened

    def set_params(self, params: Params, version: int) -> None:
        """The weights to speak with from now on, those of step `version`. What is under way is called off."""
        self._decoder.set_params(params, version)

    def begin(self, sampling: SamplingParams, *, seed: int, step: int) -> None:
        """How to sample from now on. What is under way is called off."""
        self._decoder.call(lambda decoder: decoder.begin(sampling, seed=seed, step=step))
        self._sampling = {name: float(getattr(sampling, name)) for name in ("temperature", "top_k", "top_p", "min_p")}

    @property
    def version(self) -> int:
        """The step of the weights; -1 before there are any."""
        return self._decoder.version

    def stats(self) -> dict[str, float]:
        """The decoder's, since `begin`, and its number of `rows`. What is under way is called off."""
        stats = self._decoder.call(lambda decoder: {**decoder.stats, "rows": decoder.spec.rows})
        return {name: float(value) for name, value in stats.items()}

    @property
    def decoder(self) -> TurnSource:
        """What it speaks with; while the endpoint is open another thread uses it."""
        return self._turn_decoder

    def cache_bytes(self) -> int:
        """Bytes of keys and values over all devices."""
        return self._turn_decoder.cache_bytes()

    def open_session(self, prompt_id: int = 0, sample_id: int = 0, grammar: Grammar | None = None) -> Session:
        """A session of an agent. (`prompt_id`, `sample_id`) name its random numbers, as in `Turn`; each of its turns
        follows `grammar`."""
        session = Session(secrets.token_hex(8), prompt_id, sample_id, grammar)
        self._sessions[session.id] = session
        return session

    def url(self, session: Session) -> str:
        """The session's base URL, such as `OPENAI_BASE_URL` holds."""
        return f"{self.address.origin(self._open.server.server_address[1])}/session/{session.id}/v1"

    @property
    def token(self) -> str:
        """What requests must bring as API key; empty where they need none."""
        return self._open.token

    def close_session(self, session: Session) -> None:
        """No further request of it is answered, and nothing more recorded."""
        with session.lock:
            session.is_closed = True
        self._sessions.pop(session.id, None)

    def session(self, name: str) -> Session:
        """The open session of this id. Raises ApiError for an unknown one."""
        session = self._sessions.get(name)
        if session is None:
            raise ApiError(
                f"there is no session {name!r}, or it is over; take the base URL that the agent was given, whole, or "
                "the session's id as API key",
                status=404,
                code="session_not_found",
            )
        return session

    def get(self, asked: Asked) -> Answer:
        """Answers a GET, as `rljax.rollouts.http_server.Service` has it."""
        if asked.path == "/health":
            return json_answer({"status": "ok", "version": self.version})
        session_of(asked.key, self.token)
        card = {"id": self.model, "object": "model", "created": 0, "owned_by": "rljax"}
        route = _ROUTE.fullmatch(asked.path)
        if route and route["what"] == "models":
            return json_answer({"object": "list", "data": [card]})
        if route and route["what"] == f"models/{self.model}":
            return json_answer(card)
        raise ApiError(f"nothing is served at GET {asked.path}", status=404, code="unknown_url")

    def post(self, asked: Asked) -> Callable[[Any], Answer]:
        """Answers a POST, likewise: of a session that is open, and no longer than its context."""
        # Clients that cannot be given a base URL of their own name their session by the API key.
        named = session_of(asked.key, self.token)
        route = _ROUTE.fullmatch(asked.path)
        if not route or route["what"] != "chat/completions":
            raise ApiError(f"nothing is served at POST {asked.path}", status=404, code="unknown_url")
        session = self.session(unquote(route["session"]) if route["session"] else named)
        if asked.length > self.most_bytes:
            raise ApiError(
                f"the body has {asked.length} bytes; {self.most_bytes} are more than the context of "
                f"{self.context_length} tokens can hold",
                status=413,
                code="request_too_large",
            )

        def answer(body: Any) -> Answer:
            request, said = self.complete(session, body)
            if not request.stream:
                return json_answer(said)
            return Answer(b"".join(stream_answer(said, include_usage=request.include_usage)), "text/event-stream")

        return answer

    def complete(self, session: Session, body: Any) -> tuple[ChatRequest, dict[str, Any]]:
        """Answers a chat completion, from any thread: the request as it was read, and the answer. Raises ApiError."""
        if self._sampling is None:
            raise ApiError("the endpoint was not told how to sample; call begin first", status=503, code="not_ready")
        try:
            request = read_request(
                body,
                sampling=self._sampling,
                stop_strings=None if self._finds_strings else self._stop_strings,
                most_top=self._most_top,
            )
            self._check_stops(request.stop)
        except RecursionError as error:
            raise ApiError("the body is nested too deeply") from error
        place = self._find_place(session, request)
        limit = min(request.limit or self._max_new_tokens, self._max_new_tokens)
        result, version = self._sample(session, place, limit)
        sent, finish_reason, is_malformed = self._message_of(result, request, place.turn)

        # The answer is read as the agent will send it back, so that its key is that of the history to come.
        message = read_message("the answer", sent)
        reply = Reply(
            parent=place.parent,
            keys=[*place.keys, key_of(message)],
            message=message,
            given=place.given,
            tokens=result.tokens,
            logprobs=result.logprobs,
            entropies=result.entropies,
            version=version,
            is_cut=result.end == "length",
            top_tokens=result.top_tokens,
            top_logprobs=result.top_logprobs,
        )

        # Under the lock nothing is recorded after `close_session`, when the run's conversations are already read.
        with session.lock:
            if session.is_closed:
                raise ApiError("the session is over", status=410, code="session_closed")
            session.replies.append(reply)
            session.counts["tool_calls"] += len(sent.get("tool_calls", ()))
            session.counts["malformed_calls"] += is_malformed

        counts = (len(place.ids), len(result.tokens))
        logprobs = self._shown_logprobs(result, request.top_logprobs) if request.logprobs else ()
        request = request._replace(model=request.model or self.model)
        return request, write_answer(request, sent, finish_reason, counts=counts, logprobs=logprobs)

    def _find_place(self, session: Session, request: ChatRequest) -> _Place:
        """Raises ApiError for messages that the chat template refuses, or that leave no room to answer."""
        with session.lock:
            parent, start = session.find(request.keys)

        # Keys begin with the one of the tools, so message i has key i + 1.
        given = None
        if parent is not None:
            with contextlib.suppress(ValueError):  # a template that does not append: the whole is rendered anew
                given = self.renderer.continuation_ids(parent, request.messages[start - 1 :])
        if given is None:
            parent = None
            start = 0
            try:
                given = self.renderer.opening_ids(request.messages, request.tools)
            except ValueError as error:
                raise ApiError(str(error), param="messages") from error

        ids = [*(parent.ids if parent else ()), *given]
        if len(ids) >= self.context_length:
            # The conversation ends here, by a limit and not by itself: that is what a truncated sample is.
            if parent is not None:
                parent.is_cut = True
            raise ApiError(
                f"this model's maximum context length is {self.context_length} tokens; your messages have {len(ids)}, "
                "and one must be left to say",
                code="context_length_exceeded",
                param="messages",
            )

        with session.lock:
            turn = session.assign_turn(ids, len(parent.path) if parent else 0)
        return _Place(parent, request.keys[start:], given, ids, turn, request.stop)

    def _check_stops(self, stops: Sequence[str]) -> None:
        """Raises ApiError for a control token that does not end turns: the text of an answer leaves it out."""
        try:
            controls = control_tokens_of(self.tokenizer, stops, "stop: {} never ends an answer")
        except ValueError as error:
            raise ApiError(str(error), param="stop") from error
        if set(controls) - set(self.tokenizer.stop_ids):
            raise ApiError(
                f"stop is {list(stops)}: its control token ends answers of all requests or of none; set it for the run",
                code="unsupported_value",
                param="stop",
            )

    def _sample(self, session: Session, place: _Place, limit: int) -> tuple[TurnResult, int]:
        """The policy's turn, and the version of the weights that sampled it."""
        try:
            turn = Turn(
                conversation=0,
                tokens=place.ids,
                prompt_id=session.prompt_id,
                sample_id=session.sample_id,
                turn=place.turn,
                max_new_tokens=limit,
                stop=place.stop,
                own=place.parent.own if place.parent else (),
                grammar=session.grammar,
            )
            return self._decoder.ask(turn).result()
        except Interrupted as error:
            raise ApiError(f"called off: {error}", status=503, code="interrupted") from error
        except Exception as error:
            self.failure = error
            raise ApiError(f"the decoder failed: {type(error).__name__}: {error}", status=500) from error

    def _message_of(self, result: TurnResult, request: ChatRequest, turn: int) -> tuple[dict[str, Any], str, bool]:
        """The answer's message, why it ended, and whether a call in it could not be read."""
        text = self.renderer.decode(result.tokens.tolist(), result.turn.tokens)
        parsed = self._format.parse(text) if request.reads_calls else None
        message: dict[str, Any] = {"role": "assistant", "content": text}

        if parsed is not None and parsed.calls and parsed.problem is None:
            # The content is what stands before the first call; a parser of one's own may not say where that is.
            before = text[: parsed.start or 0].strip()
            message["content"] = before or None
            message["tool_calls"] = [
                {
                    # of letters and digits alone, nine of them, as the strictest templates want it
                    "id": hashlib.sha256(f"{turn} {i} {text}".encode()).hexdigest()[:9],
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments))},
                }
                for i, call in enumerate(parsed.calls)
            ]
            return message, "tool_calls", False

        # OpenAI leaves the stop string out of the text; the recorded tokens keep it.
        if result.end == "stop_string" and (starts := [text.find(stop) for stop in request.stop if stop in text]):
            message["content"] = text[: min(starts)]
        return message, "length" if result.end == "length" else "stop", bool(parsed and parsed.problem)

    def _shown_logprobs(self, result: TurnResult, top: int) -> list[dict[str, Any]]:
        def shown(token: int, logprob: float) -> dict[str, Any]:
            text = self.renderer.decode([token])
            return {"token": text, "logprob": float(logprob), "bytes": list(text.encode())}

        best: list[list[dict[str, Any]]] = [[] for _ in result.tokens]
        if top and result.top_tokens is not None and result.top_logprobs is not None:
            pairs = zip(result.top_tokens[:, :top].tolist(), result.top_logprobs[:, :top].tolist(), strict=True)
            best = [[shown(*pair) for pair in zip(*one, strict=True) if pair[1] > MASKED / 2] for one in pairs]
        said = zip(result.tokens.tolist(), result.logprobs.tolist(), best, strict=True)
        return [{**shown(token, logprob), "top_logprobs": tops} for token, logprob, tops in said]
