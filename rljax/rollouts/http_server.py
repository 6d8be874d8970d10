"""An HTTP server on the standard library, for what answers JSON: a thread a request, each of them bounded. Host."""

import contextlib
import json
import math
import socket
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Protocol, runtime_checkable
from urllib.parse import parse_qsl, urlsplit

_MOST_DRAINED = 2**20  # bytes of a refused body that are read and dropped, so that the client sees the answer
_MOST_CONNECTIONS = 1024  # at a time, a thread each
_READ_S = 60.0  # for a whole request to arrive, however its pieces come


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Asked(NamedTuple):
    """What the head of a request says."""

    path: str
    """Without query and last slash."""
    query: Mapping[str, str]
    """What stands behind the question mark, by name."""
    key: str
    """The API key; empty for none."""
    length: int
    """Bytes of the body."""


class Answer(NamedTuple):
    """What a request is answered with, when nothing is wrong."""

    body: bytes
    kind: str = "application/json"


@runtime_checkable
class Service(Protocol):
    """What a server serves. Both raise `ApiError`, and are called from a thread a request."""

    def get(self, asked: Asked) -> Answer: ...

    def post(self, asked: Asked) -> Callable[[Any], Answer]:
        """Looks at the head of a request before its body is read, so that of a stranger nothing is kept; then answers
        the JSON value of the body, which is None for an empty one."""
        ...


def json_answer(value: Any) -> Answer:
    return Answer(json.dumps(value).encode())


class HttpServer(ThreadingHTTPServer):
    """Serves `service` at `address`, where port 0 takes a free one. OSError for a port that is taken."""

    daemon_threads = False  # so that closing waits for them
    request_queue_size = 1024
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], service: Service):
        self.service = service
        # when the request of each must have arrived, on the monotonic clock; infinity once it has
        self._connections: dict[socket.socket, float] = {}
        self._is_closing = False
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        name = host if isinstance(host, str) else host.decode()
        return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"

    def close(self) -> None:
        self._is_closing = True
        for connection in list(self._connections):
            self._end_input(connection)
        self.server_close()

    def _end_input(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RD)  # answers still go out

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._connections) >= _MOST_CONNECTIONS:
            self._turn_away(request)
            return
        self._connections[request] = time.monotonic() + _READ_S
        super().process_request(request, client_address)

    def _turn_away(self, request: socket.socket) -> None:
        """Clients of OpenAI's try again after this answer."""
        error = ApiError(f"{_MOST_CONNECTIONS} requests are under way; try again later", status=429, code="busy")
        body = json.dumps(error.body).encode()
        head = f"HTTP/1.1 429 Too Many Requests\r\nContent-Length: {len(body)}\r\nRetry-After: 1\r\n"
        with contextlib.suppress(OSError):
            request.settimeout(0)  # this thread takes in everybody
            request.sendall(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + body)
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        self._connections.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Some times a second: requests that come in drop by drop have had their time."""
        now = time.monotonic()
        for connection, deadline in list(self._connections.items()):
            if deadline < now:
                self._end_input(connection)

    def has_arrived(self, connection: socket.socket) -> None:
        """The whole request was read."""
        if connection in self._connections:
            self._connections[connection] = math.inf

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self._is_closing:
            self._end_input(request)
        super().finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """An agent that went away is no fault of ours."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # of a connection on which nothing arrives
    server: HttpServer

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, serve: Any) -> None:
        try:
            self._send(200, serve())
        except ApiError as error:
            self._send(error.status, json_answer(error.body))
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            self._send(500, json_answer(ApiError(message, status=500).body))

    def _asked(self, length: int) -> Asked:
        try:
            url = urlsplit(self.path)
        except ValueError as error:
            raise ApiError(f"the URL cannot be read: {error}") from error
        key = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        return Asked(url.path.rstrip("/"), dict(parse_qsl(url.query)), key, length)

    def _get(self) -> Answer:
        self.server.has_arrived(self.connection)
        return self.server.service.get(self._asked(0))

    def _post(self) -> Answer:
        # who asks is known from the head: of a stranger nothing is kept
        length = self._length()
        try:
            answer = self.server.service.post(self._asked(length))
        except ApiError:
            self._drain(length)
            raise

        body = self.rfile.read(length)
        self.server.has_arrived(self.connection)
        if len(body) < length:
            raise ApiError(f"the body ended after {len(body)} of {length} bytes, or came too slowly", status=408)
        try:
            value = json.loads(body) if body else None
        except (ValueError, RecursionError) as error:
            raise ApiError(f"the body is no JSON: {error}") from error
        return answer(value)

    def _length(self) -> int:
        text = self.headers.get("Content-Length", "").strip()
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise ApiError("Content-Length must be the number of bytes of the body", status=411)
        return int(text)

    def _drain(self, length: int) -> None:
        """A client that is still sending would see a broken connection, and no answer."""
        left = min(length, _MOST_DRAINED)
        while left > 0 and (piece := self.rfile.read(min(left, 2**16))):
            left -= len(piece)

    def _send(self, status: int, answer: Answer) -> None:
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Connection", "close")
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(answer.body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses, in OpenAI's shape too."""
        self._send(code, json_answer(ApiError(message or explain or "bad request", status=code).body))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a run has thousands of requests."""
