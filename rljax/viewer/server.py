"""The page over HTTP, on this machine alone unless another address is named."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from rljax.viewer.answers import Answers

PAGE = Path(__file__).parent / "page"

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/draw.js": ("draw.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
}

_HEADERS = {
    # Rollouts are text of a model: even if some of it were taken for markup, nothing of it could run or be sent away.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

_LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")


def open_server(answers: Answers, port: int = 0, host: str = "127.0.0.1") -> ThreadingHTTPServer:
    """A server that is bound and waits for `serve_forever`; its `server_port` is a free one for `port` 0. OSError for a
    port that is taken. It answers GET alone, and writes nothing."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page elsewhere may lead its own name to this address, and would read the rollouts from there.
            if host in _LOCAL and _host_name(self.headers.get("Host", "")) not in _LOCAL:
                self._send(403, "text/plain; charset=utf-8", b"this viewer answers to localhost")
                return

            asked = urlsplit(self.path)
            if asked.path in _FILES:
                name, kind = _FILES[asked.path]
                self._send(200, kind, (PAGE / name).read_bytes())
            elif asked.path.startswith("/api/"):
                self._answer(asked.path.removeprefix("/api/"), dict(parse_qsl(asked.query)))
            else:
                self._send(404, "text/plain; charset=utf-8", b"no such page")

        def _answer(self, path: str, params: dict[str, str]) -> None:
            status = 200
            try:
                found = answers(path, params)
            except KeyError:
                status, found = 404, {"error": f"no such question: {path}"}
            except (ValueError, FileNotFoundError) as error:
                status, found = 400, {"error": str(error)}
            self._send(status, "application/json", json.dumps(found, allow_nan=False).encode())

        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """The terminal stays quiet."""

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    return server


def _host_name(header: str) -> str:
    """The name of a Host header, without its port."""
    return header.rsplit(":", 1)[0] if not header.endswith("]") else header
