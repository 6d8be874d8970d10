"""Whatever comes from outside is read, or refused in one line: data rows, requests, messages of workers, tool calls."""

import contextlib
import http.client
import json
import math
import pickle
import socket
import subprocess
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_rollouts_endpoint import ECHO, make_tokenizer

from rljax.envs import FORMATS, Step, ToolCall
from rljax.envs.base import CRASHED, MALFORMED, TIMEOUT
from rljax.envs.formats import get_format
from rljax.envs.host import Act, Answer, Close, HostProcess, Past, Start, write_answer
from rljax.rollouts import ChatEndpoint, http_server
from rljax.rollouts.black_box.address import session_of
from rljax.rollouts.black_box.chat_api import ApiError
from rljax.rollouts.black_box.recording import Renderer
from rljax.rollouts.http_server import HttpServer
from rljax.sampling import Turn, TurnResult
from rljax.tasks import load_jsonl
from rljax.tasks.channel import Channel, read_data, write_data
from rljax.tasks.workers import CRASHED as WORKER_CRASHED
from rljax.tasks.workers import DONE, RAISED, WorkerPool, _Worker

SETTINGS = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

TEXT = st.one_of(st.text(max_size=8), st.sampled_from(["user", "assistant", "\ud800", "x\udfff", "<|im_end|>", "\0"]))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**400, -(10**400), 2**63, math.nan, math.inf, -0.0, 1e308]),
    st.floats(),
    TEXT,
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool", "wizard", "", None])
CALLS = st.one_of(
    VALUES,
    st.lists(
        st.fixed_dictionaries(
            {"function": st.fixed_dictionaries({"name": TEXT, "arguments": VALUES | st.just('{"x": NaN}')})}
        ),
        max_size=2,
    ),
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES | SCALARS, "content": TEXT | VALUES}, optional={"tool_calls": CALLS}) | VALUES,
    max_size=4,
)


def broken(text):
    """JSON texts, cut and changed."""
    cut = st.tuples(text, st.floats(0, 1)).map(lambda pair: pair[0][: int(len(pair[0]) * pair[1])])
    changed = st.tuples(text, st.floats(0, 1), st.binary(min_size=1, max_size=2)).map(
        lambda t: t[0][: int(len(t[0]) * t[1])] + t[2] + t[0][int(len(t[0]) * t[1]) + 1 :]
    )
    return st.one_of(text, cut, changed)


ROWS = st.one_of(VALUES, st.fixed_dictionaries({"prompt": MESSAGES | TEXT | VALUES}, optional={"answer": VALUES}))
LINES = st.one_of(broken(ROWS.map(lambda row: json.dumps(row).encode())), st.binary(max_size=20))


@settings(max_examples=300, **SETTINGS)
@given(line=LINES)
@example(line=b'{"prompt": "a"}\xef\xbb\xbf')
@example(line=b"[" * 200_000)
@example(line=b"9" * 5000)
def test_a_line_of_data_loads_or_is_refused_by_file_and_line(tmp_path, line):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + line)
    try:
        examples = load_jsonl(file)
    except ValueError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
        assert "holds no rows" in str(error) or ", line " in str(error)
        return

    for row in examples:
        texts = [row.prompt] if isinstance(row.prompt, str) else [m["content"] for m in row.prompt]
        assert "".join(texts).encode("utf-8") is not None
        assert isinstance(row.prompt, str) or row.prompt[-1]["role"] != "assistant"
        assert row.place.startswith(f"{file}, line ")


class Canned(ChatEndpoint):
    """The endpoint whose policy always says the same: all of it but the decoder."""

    token = ""

    def __init__(self):
        self.tokenizer = make_tokenizer()
        self.model = "policy"
        self.failure = None
        self.renderer = Renderer(self.tokenizer)
        self.context_length = 2000
        self.most_bytes = 2**20
        self._format = get_format("hermes")
        self._stop_strings = ("\n\n",)
        self._finds_strings = True
        self._most_top = 0
        self._max_new_tokens = 8
        self._sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0.0, "min_p": 0.0}
        self._sessions = {}

    def _sample(self, session, place, limit):
        tokens = np.asarray(self.tokenizer.encode("hi"), np.int32)
        zeros = np.zeros(len(tokens), np.float32)
        turn = Turn(0, place.ids, prompt_id=0, sample_id=0, turn=place.turn)
        return TurnResult(turn, tokens, zeros, zeros, "stop"), 0


@pytest.fixture(scope="module")
def server():
    endpoint = Canned()
    server = HttpServer(("127.0.0.1", 0), endpoint)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.close()
    thread.join()


def post(server, body, session, headers=None):
    """(status, JSON) of one request."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", f"/session/{session}/v1/chat/completions", body, headers or {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


NAMES = ("temperature", "top_p", "top_k", "min_p", "n", "stop", "max_tokens", "tools", "tool_choice", "response_format")
NAMES += (
    "logit_bias",
    "logprobs",
    "stream_options",
    "model",
    "functions",
    "max_completion_tokens",
    "modalities",
    "top_logprobs",
)
REQUESTS = st.one_of(
    VALUES,
    st.fixed_dictionaries({"messages": MESSAGES | VALUES}, optional={name: VALUES | st.just([ECHO]) for name in NAMES}),
)


@settings(max_examples=120, **SETTINGS)
@given(body=broken(REQUESTS.map(lambda value: json.dumps(value).encode())) | st.binary(max_size=20))
@example(body=b'{"messages": [{"role": "user", "content": "x"}], "temperature": ' + b"9" * 400 + b"}")
@example(body=b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": ' + b"9" * 400 + b"}")
@example(body=b'{"messages": [{"role": "user", "content": "x"}], "n": ' + b"[" * 900 + b"]" * 900 + b"}")
@example(body=b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}")
@example(
    body=b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": {"name": "f", '
    b'"parameters": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}}]}"
)
def test_any_body_is_answered_or_refused(server, body):
    session = server.service.open_session()
    status, answer = post(server, body, session.id)
    server.service.close_session(session)
    assert status == 200 or 400 <= status < 500, answer
    assert ("choices" in answer) == (status == 200) and ("error" in answer) == (status != 200)


@settings(max_examples=60, **SETTINGS)
@given(head=st.binary(max_size=40) | st.sampled_from([b"POST //[ HTTP/1.1", b"GET /health", b"POST / HTTP/9"]))
def test_any_head_is_answered_or_the_connection_ends(server, head):
    with socket.create_connection(server.server_address, timeout=20) as connection:
        connection.sendall(head + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    # what is no POST or GET, or of no version that is known, is refused as the standard says
    assert (
        not answer.startswith(b"HTTP") or answer.split()[1][:1] in (b"2", b"4") or answer.split()[1] in (b"501", b"505")
    )


TOKEN = "a-token-of-sixteen.or-more"


@settings(max_examples=200, **SETTINGS)
@given(st.text(st.characters(max_codepoint=255), max_size=40) | st.sampled_from([TOKEN[:-1], f"{TOKEN}x", f".{TOKEN}"]))
def test_any_key_without_the_token_is_refused(key):
    with pytest.raises(ApiError, match="wants its token") as error:
        session_of(key, TOKEN)
    assert error.value.status == 401 and TOKEN not in str(error.value)
    assert session_of(f"{TOKEN}.{key.replace('.', '')}", TOKEN) == key.replace(".", "")


def test_a_stranger_is_refused_before_its_body_is_read(server):
    with socket.create_connection(server.server_address, timeout=20) as connection:
        head = f"POST /session/nobody/v1/chat/completions HTTP/1.1\r\nContent-Length: {10**9}\r\n\r\n"
        connection.sendall(head.encode() + bytes(http_server._MOST_DRAINED))
        assert b" 404 " in connection.recv(1000)


def test_a_body_that_no_context_holds_is_refused(server):
    session = server.service.open_session()
    status, answer = post(server, b" " * (server.service.most_bytes + 1), session.id)
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    for length in ("-1", "1_0", "9" * 30, "x", "\u0663"):
        headers = {"Content-Length": length.encode().decode("latin-1")}
        assert post(server, b"{}", session.id, headers)[0] == 411


def test_a_request_that_comes_in_drop_by_drop_has_an_end(server, monkeypatch):
    monkeypatch.setattr(http_server, "_READ_S", 0.2)
    session = server.service.open_session()
    target = f"POST /session/{session.id}/v1/chat/completions HTTP/1.1\r\n"
    for head, status in ((target, b""), (f"{target}Content-Length: 99\r\n\r\n", b" 408 ")):
        with socket.create_connection(server.server_address, timeout=20) as connection:
            connection.sendall(head.encode())
            begin = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() < begin + 2 and not connection.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK):
                    break
            connection.settimeout(5)
            assert status in connection.recv(1000) and time.monotonic() < begin + 5


def test_connections_are_bounded(server, monkeypatch):
    monkeypatch.setattr(http_server, "_MOST_CONNECTIONS", 2)
    session = server.service.open_session()
    body = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(socket.create_connection(server.server_address, timeout=20))
        deadline = time.monotonic() + 5
        while len(server._connections) < 2:
            assert time.monotonic() < deadline
        with socket.create_connection(server.server_address, timeout=20) as third:
            assert third.recv(1000).startswith(b"HTTP/1.1 429 ")
    while server._connections:
        assert time.monotonic() < deadline + 5
    assert post(server, body, session.id)[0] == 200


RAN = []


def ran():
    RAN.append(1)


class Executes:
    def __reduce__(self):
        return ran, ()


def frame(message):
    return b"rljx" + len(message).to_bytes(8, "big") + message


PICKLES = [pickle.dumps(value) for value in (Executes(), ("done", Executes()), (1, "done", [Executes()]))]
DATA = st.lists(st.one_of(SCALARS, st.sampled_from(["done", "raised", "started", 7]), VALUES), max_size=5)
PAYLOADS = st.one_of(
    st.binary(max_size=30),
    st.sampled_from(PICKLES),
    broken(DATA.map(lambda values: json.dumps(values).encode())),
    DATA.filter(lambda values: values == values).map(write_data),
    st.just(b"[" * 20_000),
)
STREAMS = st.lists(
    st.one_of(PAYLOADS, PAYLOADS.map(frame), PAYLOADS.map(frame).map(lambda b: b[:-1]), st.just(b"rljx" + b"\xff" * 8)),
    max_size=3,
).map(b"".join)


class Dead(subprocess.Popen):
    """A process that has ended."""

    def __init__(self):
        self.returncode = 3
        self.pid = -1
        self._child_created = False


@contextlib.contextmanager
def channel_with(stream):
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(stream)  # less than what the socket's buffer holds
        yield Channel(ours), theirs
    ours.close()


@settings(max_examples=250, **SETTINGS)
@given(stream=STREAMS, is_ready=st.booleans())
@example(stream=frame(write_data(7, "done", 1.0)), is_ready=True)
@example(stream=frame(write_data(8, "done", 1.0)), is_ready=True)
@example(stream=frame(write_data(7, "done", 1.0)), is_ready=False)
def test_any_bytes_of_a_worker_are_its_answer_or_its_end(stream, is_ready):
    with channel_with(stream) as (channel, _):
        worker = _Worker.__new__(_Worker)
        worker.process = Dead()
        worker.channel = channel
        worker.is_ready = is_ready
        worker.number = 7
        worker.job = 0
        reply = WorkerPool._hear(None, worker)
    # None: no whole message yet, so that its time runs out
    assert reply is None or reply.kind in (WORKER_CRASHED, RAISED, DONE if is_ready else "started")
    if reply is not None and reply.kind != WORKER_CRASHED:
        assert stream.startswith(b"rljx") and read_data(stream[12:][: int.from_bytes(stream[4:12], "big")])[0] == 7
    assert not RAN


PAST = Past({}, "o", (), ())
REPLIES = [
    write_answer(7, Answer("opening")),
    write_answer(7, Answer(Step("seen", 1.0, True, {"n": 1.0}), seconds=0.5)),
    write_answer(7, Answer(None, "raised", "boom")),
    write_answer(6, Answer("opening")),
    write_data(7, ["seen", math.nan, True, {}], None, "", 0.5),
    write_data(7, ["seen", 1.0, "no", {}], None, "", 0.5),
    write_data(7, None, "nonsense", "", 0.5),
    write_data(7, "opening", None, "", -1.0),
]


@settings(max_examples=250, **SETTINGS)
@given(
    stream=STREAMS | st.sampled_from(REPLIES).map(frame),
    request=st.sampled_from([Start({}), Act("a", PAST), PAST, Close()]),
)
def test_any_bytes_of_an_environments_process_are_its_answer_or_its_end(stream, request):
    with channel_with(stream) as (channel, theirs):
        process = HostProcess.__new__(HostProcess)
        process.process = Dead()
        process.channel = channel
        process._number = 7
        theirs.shutdown(socket.SHUT_WR)
        answer = process._exchange(request, b"", 0.2)
    if answer.reason is None:
        wanted = {Start: (str, list), Act: Step, Past: type(None), Close: type(None)}[type(request)]
        assert isinstance(answer.value, wanted)
        assert not isinstance(answer.value, Step) or math.isfinite(answer.value.reward)
    else:
        assert answer.reason in (CRASHED, TIMEOUT, MALFORMED, "raised", "replay") and answer.value is None
    assert not RAN


CALL = '{"name": "say", "parameters": {"text": "</tool_call></think>"}}'
PIECES = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", "<search>", "</search>", "<python>"]
PIECES += ["</python>", "print('</python>')", '"""', "'", "#", "\n", "\\", '"', "{", "}", "[", ",", ":", "1e999", CALL]
PIECES += ["\0", "\ud800", "   ", "x" * 30, "<|eom_id|>", ";", "```", "("]


@settings(max_examples=60, **SETTINGS)
@given(pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=5), name=st.sampled_from(sorted(FORMATS)))
@example(pieces=["<python>", "print('</think>')", "</python>"], name="tags")
@example(pieces=["<python>", "#", "</python>"], name="tags")
@example(pieces=["</think>", CALL], name="llama3")
@example(pieces=["<tool_call>", CALL, "</tool_call>"], name="hermes")
def test_tool_calls_are_read_in_linear_time_and_hold_what_json_does(pieces, name):
    """A hundred thousand characters: a second at most on a busy machine, minutes if time were quadratic."""
    text = "".join(pieces)
    text *= max(1, 100_000 // len(text))
    begin = time.thread_time()
    parsed = FORMATS[name].parse(text)
    assert time.thread_time() - begin < 8
    assert all(isinstance(call, ToolCall) for call in parsed.calls)
    json.dumps([dict(call.arguments) for call in parsed.calls], allow_nan=False)
    assert parsed.start is None or 0 <= parsed.start <= len(text)
