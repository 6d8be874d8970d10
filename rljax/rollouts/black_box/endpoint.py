"""An endpoint in OpenAI's manner over the decoder for conversations: agents that cannot be changed speak with the
policy, and every token that it says to them is recorded."""

import contextlib
import hashlib
import json
import re
import secrets
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from rljax.envs import get_format
from rljax.envs.formats import Parser, ToolFormat
from rljax.rollouts.black_box.chat_api import (
    ApiError,
    ChatRequest,
    key_of,
    read_message,
    read_request,
    stream_answer,
    write_answer,
)
from rljax.rollouts.black_box.decoder_thread import DecoderThread, Interrupted
from rljax.rollouts.black_box.recording import Renderer, Reply, Session
from rljax.sampling import SamplingParams, TurnDecoder, TurnResult
from rljax.text import Tokenizer
from rljax.types import Params

_MOST_BYTES = 64 * 2**20  # of a request
_ROUTE = re.compile(r"(?:/session/(?P<session>[^/]+))?/v1/(?P<what>[^?]*)")
_CALL_MARKS = ("<tool_call>", "<|python_tag|>", '{"name"')


class ChatEndpoint:
    """Serves `POST /v1/chat/completions`, `GET /v1/models` and `GET /health` on `host` (`port` 0 takes a free one).

    An agent gets a session: `url(session)` is its base URL, or the session's id is its API key. Requests of any number
    of agents are decoded together, under the sampling of `begin`. Those that go on from what was answered before get
    the recorded ids and what the chat template puts behind them; others begin a conversation of their own. With `tools`
    in a request, calls are read by `tool_format` (see `rljax.envs.formats`). `stop_strings` are those of the decoder.

    It owns the decoder until `close`: give weights through `set_params`. A context manager. Raises ValueError for a
    tokenizer without a chat template or an unknown format, OSError for a port that is taken.
    """

    def __init__(
        self,
        decoder: TurnDecoder,
        tokenizer: Tokenizer,
        *,
        tool_format: str | Parser | ToolFormat = "hermes",
        stop_strings: tuple[str, ...] = (),
        host: str = "127.0.0.1",
        port: int = 0,
        model: str = "policy",
    ):
        self.tokenizer, self.model = tokenizer, model
        self.failure: Exception | None = None  # what the decoder raised, if it did
        self.renderer = Renderer(tokenizer)
        self._format, self._stop_strings = get_format(tool_format), stop_strings
        self._context_length, self._max_new_tokens = decoder.spec.context_length, decoder.spec.max_new_tokens
        self._sampling: dict[str, float] | None = None
        self._sessions: dict[str, Session] = {}
        self._server = _Server((host, port), self)
        self._decoder = DecoderThread(decoder)
        self._listener = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True, name="endpoint"
        )
        self._listener.start()

    def __enter__(self) -> "ChatEndpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Calls off what is under way and ends all threads. The decoder can be used again, by another endpoint too."""
        self._server.shutdown()
        self._decoder.close()
        self._server.close()
        self._listener.join()

    def set_params(self, params: Params, *, version: int) -> None:
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

    def cache_bytes(self) -> int:
        """Bytes of keys and values over all devices."""
        return self._decoder.call(lambda decoder: decoder.cache_bytes())

    def open_session(self, prompt_id: int = 0, sample_id: int = 0) -> Session:
        """A session of an agent. (`prompt_id`, `sample_id`) name its random numbers, as in `Turn`."""
        session = Session(secrets.token_hex(8), prompt_id, sample_id)
        self._sessions[session.id] = session
        return session

    def url(self, session: Session) -> str:
        """The session's base URL, such as `OPENAI_BASE_URL` holds."""
        host, port = self._server.server_address[:2]
        return f"http://{host if isinstance(host, str) else host.decode()}:{port}/session/{session.id}/v1"

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

    def complete(self, session: Session, body: Any) -> tuple[ChatRequest, dict[str, Any]]:
        """Answers a chat completion, from any thread: the request as it was read, and the answer. Raises ApiError."""
        if self._sampling is None:
            raise ApiError("the endpoint was not told how to sample; call begin first", status=503, code="not_ready")
        request = read_request(body, sampling=self._sampling, stop_strings=self._stop_strings)
        parent, keys, given, ids, turn = self._place(session, request)
        limit = min(request.limit or self._max_new_tokens, self._max_new_tokens)
        spoken, version = self._speak(session, ids, turn, limit)
        wire, finish_reason, is_malformed = self._message(request, spoken, turn)
        message = read_message("the answer", wire)
        reply = Reply(
            parent,
            [*keys, key_of(message)],
            message,
            given,
            spoken.tokens,
            spoken.logprobs,
            spoken.entropies,
            version,
            spoken.end == "length",
        )
        with session.lock:
            if session.is_closed:
                raise ApiError("the session is over", status=410, code="session_closed")
            session.replies.append(reply)
            session.counts["tool_calls"] += len(wire.get("tool_calls", ()))
            session.counts["malformed_calls"] += is_malformed
        counts = len(ids), len(spoken.tokens)
        shown = self._shown_logprobs(spoken) if request.logprobs else ()
        request = request._replace(model=request.model or self.model)
        return request, write_answer(request, wire, finish_reason, counts=counts, logprobs=shown)

    def _place(self, session: Session, request: ChatRequest):
        """Where a request stands: the reply it goes on from, keys and ids since then, all ids, its turn."""
        with session.lock:
            parent, start = session.find(request.keys)
        given = None
        if parent is not None:
            with contextlib.suppress(ValueError):  # a template that does not append: the whole is rendered anew
                given = self.renderer.behind(parent, request.messages[start - 1 :])
        if given is None:
            parent, start = None, 0
            try:
                given = self.renderer.opening(request.messages, request.tools)
            except ValueError as error:
                raise ApiError(str(error), param="messages") from error
        ids = [*(parent.ids if parent else ()), *given]
        if len(ids) >= self._context_length:
            if parent is not None:
                parent.is_cut = True
            raise ApiError(
                f"this model's maximum context length is {self._context_length} tokens; your messages have {len(ids)}, "
                "and one must be left to say",
                code="context_length_exceeded",
                param="messages",
            )
        with session.lock:
            turn = session.number(ids, len(parent.path) if parent else 0)
        return parent, request.keys[start:], given, ids, turn

    def _speak(self, session: Session, ids: list[int], turn: int, limit: int) -> tuple[TurnResult, int]:
        try:
            future = self._decoder.ask(
                ids, prompt_id=session.prompt_id, sample_id=session.sample_id, turn=turn, limit=limit
            )
            return future.result()
        except Interrupted as error:
            raise ApiError(f"called off: {error}", status=503, code="interrupted") from error
        except Exception as error:
            self.failure = error
            raise ApiError(f"the decoder failed: {type(error).__name__}: {error}", status=500) from error

    def _message(self, request: ChatRequest, spoken: TurnResult, turn: int) -> tuple[dict[str, Any], str, bool]:
        """The answer's message, why it ended, and whether a call in it could not be read."""
        text = self.renderer.decode(spoken.tokens.tolist())
        parsed = self._format.parse(text) if request.reads_calls else None
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if parsed is not None and parsed.calls and parsed.problem is None:
            marks = (*_CALL_MARKS, *(f"<{call.name}>" for call in parsed.calls))
            places = [text.find(mark, text.rfind("</think>") + 1) for mark in marks]
            before = text[: min((place for place in places if place >= 0), default=0)].strip()
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
        if spoken.end == "stop_string" and (ends := [text.find(stop) for stop in request.stop if stop in text]):
            message["content"] = text[: min(ends)]
        return message, "length" if spoken.end == "length" else "stop", bool(parsed and parsed.problem)

    def _shown_logprobs(self, spoken: TurnResult) -> list[dict[str, Any]]:
        texts = [self.renderer.decode([token]) for token in spoken.tokens.tolist()]
        return [
            {"token": text, "logprob": float(logprob), "bytes": list(text.encode()), "top_logprobs": []}
            for text, logprob in zip(texts, spoken.logprobs, strict=True)
        ]


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for them
    request_queue_size = 1024
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], endpoint: ChatEndpoint):
        self.endpoint = endpoint
        self._connections: set[socket.socket] = set()
        self._is_closing = False
        super().__init__(address, _Handler)

    def close(self) -> None:
        self._is_closing = True
        for connection in list(self._connections):
            self._end_input(connection)
        self.server_close()

    def _end_input(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RD)  # answers still go out

    def finish_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        if self._is_closing:
            self._end_input(request)
        try:
            super().finish_request(request, client_address)
        finally:
            self._connections.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """An agent that went away is no fault of ours."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # of a connection on which nothing arrives
    server: _Server

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, serve: Any) -> None:
        try:
            serve()
        except ApiError as error:
            self._send(error.status, json.dumps(error.body).encode())
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            self._send(500, json.dumps(ApiError(message, status=500).body).encode())

    def _get(self) -> None:
        path = urlsplit(self.path).path.rstrip("/")
        endpoint = self.server.endpoint
        if path == "/health":
            return self._send(200, json.dumps({"status": "ok", "version": endpoint.version}).encode())
        card = {"id": endpoint.model, "object": "model", "created": 0, "owned_by": "rljax"}
        route = _ROUTE.fullmatch(path)
        if route and route["what"] == "models":
            return self._send(200, json.dumps({"object": "list", "data": [card]}).encode())
        if route and route["what"] == f"models/{endpoint.model}":
            return self._send(200, json.dumps(card).encode())
        raise ApiError(f"nothing is served at GET {self.path}", status=404, code="unknown_url")

    def _post(self) -> None:
        body = self._body()
        route = _ROUTE.fullmatch(urlsplit(self.path).path.rstrip("/"))
        if not route or route["what"] != "chat/completions":
            raise ApiError(f"nothing is served at POST {self.path}", status=404, code="unknown_url")
        endpoint = self.server.endpoint
        key = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        session = endpoint.session(unquote(route["session"]) if route["session"] else key)
        try:
            value = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ApiError(f"the body is no JSON: {error}") from error
        request, answer = endpoint.complete(session, value)
        if not request.stream:
            return self._send(200, json.dumps(answer).encode())
        self._send(200, b"".join(stream_answer(answer, include_usage=request.include_usage)), "text/event-stream")

    def _body(self) -> bytes:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= _MOST_BYTES:
            raise ApiError(f"Content-Length must lie between 0 and {_MOST_BYTES}", status=411 if length < 0 else 413)
        return self.rfile.read(length)

    def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses, in OpenAI's shape too."""
        self._send(code, json.dumps(ApiError(message or explain or "bad request", status=code).body).encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a run has thousands of requests."""
