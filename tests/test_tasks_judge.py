"""Judges against a local stub of the chat protocol: what they ask, read, retry and refuse; and the bias measures."""

import contextlib
import http.server
import json
import threading
import time

import pytest

from rljax.tasks import (
    AfterMarker,
    AnswerJudge,
    ChatEndpoint,
    Completion,
    EndpointCompletions,
    ExactMatch,
    FactJudge,
    GroundedAnswer,
    JudgeError,
    PairJudge,
    RewardInput,
    RewardRunner,
    RewardSpec,
    position_bias,
)
from rljax.tasks.judge import read_choice, read_flags, read_yes_no, swapped_reward


class Stub:
    """Answers each request by `respond(body, number)`: a reply text, a status, or a function of the handler."""

    def __init__(self, respond):
        self.requests, self.headers = [], []
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append((self.path, body))
                stub.headers.append(dict(self.headers))
                answer = respond(body, len(stub.requests))
                if callable(answer):
                    answer(self)
                elif isinstance(answer, int):
                    self.reply(answer, b'{"error": "no"}')
                else:
                    self.reply(200, json.dumps({"choices": [{"message": {"content": answer}}]}).encode())

            def reply(self, status, data):
                with contextlib.suppress(BrokenPipeError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def endpoint(self, **options):
        url = f"http://127.0.0.1:{self._server.server_port}/v1"
        return ChatEndpoint(**{"base_url": url, "model": "stub", "backoff_s": 0.0, "timeout_s": 5.0} | options)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def asked(body):
    return body["messages"][0]["content"]


def test_answer_judge_asks_with_question_reference_and_answer_and_reads_the_verdict():
    with Stub(lambda body, n: "Let me see. YES" if "Answer: four" in asked(body) else "No.") as stub:
        judge = AnswerJudge(endpoint=stub.endpoint(), extract=AfterMarker("####"))
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
        assert judge(prompt=chat, completion="so #### four", answer=4) == 1
        assert judge(prompt="2 + 2?", completion="so #### five", answer=4) == 0
        assert judge(prompt="2 + 2?", completion="no answer", answer=4) == 0
    assert len(stub.requests) == 2  # nobody is asked about no answer
    path, body = stub.requests[0]
    assert path == "/v1/chat/completions"
    assert body["model"] == "stub" and body["temperature"] == 0
    assert "Question: 2 + 2?" in asked(body) and "Reference: 4" in asked(body)
    assert "Authorization" not in stub.headers[0]


def test_a_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("STUB_KEY", "secret")
    with Stub(lambda body, n: "YES") as stub:
        assert AnswerJudge(endpoint=stub.endpoint(api_key_variable="STUB_KEY"))(prompt="", completion="a", answer="a")
        assert stub.headers[0]["Authorization"] == "Bearer secret"
        monkeypatch.delenv("STUB_KEY")
        with pytest.raises(JudgeError, match="'STUB_KEY' with the judge's key is not set"):
            stub.endpoint(api_key_variable="STUB_KEY").ask([])
        assert len(stub.requests) == 1


def test_passing_failures_are_retried():
    def garbage(handler):
        handler.reply(200, b"not json")

    def hangs_up(handler):
        handler.close_connection = True

    replies = [503, 429, garbage, hangs_up, "", "fine"]
    with Stub(lambda body, n: replies[n - 1]) as stub:
        assert stub.endpoint(retries=5).ask([]) == "fine"
    assert len(stub.requests) == 6


def test_failures_that_stay_are_errors_that_say_what_happened():
    with Stub(lambda body, n: 500) as stub:
        with pytest.raises(JudgeError, match="gave no reply in 3 attempts; the last: status 500"):
            stub.endpoint(retries=2).ask([])
        assert len(stub.requests) == 3
    with Stub(lambda body, n: 401) as stub:
        with pytest.raises(JudgeError, match="refused the request, status 401"):
            stub.endpoint(retries=2).ask([])
        assert len(stub.requests) == 1
    closed = stub.endpoint(retries=1)
    with pytest.raises(JudgeError, match=r"in 2 attempts.*refused"):
        closed.ask([])


def test_a_slow_judge_times_out():
    def slow(handler):
        time.sleep(1.0)
        handler.reply(200, b"{}")

    with Stub(lambda body, n: slow if n < 3 else "fine") as stub:
        started = time.perf_counter()
        with pytest.raises(JudgeError, match=r"(?i)in 1 attempts.*timed? ?out"):
            stub.endpoint(timeout_s=0.1, retries=0).ask([])
        assert time.perf_counter() - started < 0.9
        assert stub.endpoint(timeout_s=0.2, retries=1).ask([]) == "fine"


def test_pauses_double_and_the_longest_call_is_known():
    endpoint = ChatEndpoint(
        base_url="http://x/v1", model="m", timeout_s=10.0, retries=3, backoff_s=1.0, max_pause_s=3.0
    )
    assert endpoint.longest_s == 4 * 10 + 1 + 2 + 3
    with pytest.raises(ValueError, match="must begin with http"):
        ChatEndpoint(base_url="localhost:8000", model="m")
    for address in ("http://judge:x/v1", "http://judge:65536", "http:///v1"):
        with pytest.raises(ValueError, match=f"base_url '{address}' names no host and port"):
            ChatEndpoint(base_url=address, model="m")
    with pytest.raises(ValueError, match="retries -1"):
        ChatEndpoint(base_url="http://x", model="m", retries=-1)


@pytest.mark.parametrize(
    ("prefers", "verdicts", "reward"),
    [
        (lambda first, second: "A" if first == "good" else "B", "AB", 1.0),
        (lambda first, second: "A" if first == "bad" else "B", "BA", -1.0),
        (lambda first, second: "A", "AA", 0.0),
        (lambda first, second: "B", "BB", 0.0),
        (lambda first, second: "C", "CC", 0.0),
        (lambda first, second: "A" if first == "good" else "C", "AC", 0.0),
    ],
)
def test_pair_judge_asks_in_both_orders_and_pays_for_agreement(prefers, verdicts, reward):
    def respond(body, n):
        text = asked(body)
        first = text.split("Answer A: ")[1].split("\n")[0]
        second = text.split("Answer B: ")[1].split("\n")[0]
        return f"My choice is {prefers(first, second)}."

    with Stub(respond) as stub:
        judge = PairJudge(endpoint=stub.endpoint())
        assert judge.verdicts("q", "good", "bad") == verdicts
        assert judge(prompt="q", completion="good", baseline="bad") == reward
    assert swapped_reward(verdicts) == reward
    shown = [asked(body) for _, body in stub.requests]
    assert "Answer A: good" in shown[0] and "Answer A: bad" in shown[1]


def test_fact_judge_serves_the_grounded_answer():
    with Stub(lambda body, n: "Checked: [1, 0, 1, 1]") as stub:
        judge = FactJudge(endpoint=stub.endpoint())
        reward = GroundedAnswer(verify=ExactMatch(), stated=judge, pattern=".*")
        value = reward(prompt="q", completion="x", token_ids=[], answer="x", facts=["a", "b", "c", "d"])
        assert value == pytest.approx(1.525, abs=1e-6)
        assert not reward.is_cheap  # it waits for a network, so it runs in a worker
    assert "4. d" in asked(stub.requests[0][1])


def test_replies_are_read_from_their_end():
    assert read_yes_no("No... on reflection: **Yes**") is True
    assert read_yes_no("yes? no!") is False
    assert read_choice("A is shorter, B is right: [[B]]") == "B"
    assert read_choice("C") == "C"
    assert read_flags("[1, 2] and then [0, 1]", 2) == [0, 1]
    readers = {"YES nor NO": read_yes_no, "none of A": read_choice, "no list of 2": lambda reply: read_flags(reply, 2)}
    for message, read in readers.items():
        with pytest.raises(ValueError, match=message):
            read("Know nothing, [1], BAD")


def test_an_unreadable_or_unreachable_judge_costs_the_sample_and_not_the_run():
    def respond(body, n):
        return {"right": "YES", "wrong": "NO", "odd": "Perhaps."}[asked(body).split("Answer: ")[1].split("\n")[0]]

    with Stub(respond) as stub:
        spec = RewardSpec(AnswerJudge(endpoint=stub.endpoint(retries=0)), name="judge", in_process=True)
        with RewardRunner([spec]) as runner:
            inputs = [RewardInput("q", text, columns={"answer": "x"}) for text in ("right", "odd", "wrong")]
            results = runner.score(inputs)
            assert [r.is_valid for r in results] == [True, False, True]
            assert [r.value for r in results] == [1, 0, 0]
            assert "'Perhaps.' cannot be read: neither YES nor NO" in results[1].error
            assert runner.failures["exception"] == 1


def test_a_judge_runs_in_worker_processes():
    with (
        Stub(lambda body, n: "YES") as stub,
        RewardRunner([AnswerJudge(endpoint=stub.endpoint())], workers=1) as runner,
    ):
        (result,) = runner.score([RewardInput("q", "a", columns={"answer": "a"})])
    assert result.is_valid and result.value == 1


def test_position_bias_meets_the_worked_example():
    pairs = ["AB", "AB", "BA", "AA", "AA", "AC", "BB", "CC", "CB", "AB"]
    bias = position_bias(pairs)
    assert (bias.pairs, bias.primacy, bias.recency, bias.consistency) == (10, 3, 2, 0.5)
    assert bias.fairness == pytest.approx(-0.1)
    assert bias.ties == 0.1
    assert position_bias([*pairs, "A?", ""]) == bias
    assert position_bias(["AA"] * 4).fairness == -1
    assert position_bias(["BC"] * 4).fairness == 1
    assert position_bias(["CC"] * 3).fairness == 0


def test_an_endpoint_completes_prompts_in_their_order_and_says_which_answers_were_cut_off():
    def cut_off(handler):
        choice = {"message": {"content": "long"}, "finish_reason": "length"}
        handler.reply(200, json.dumps({"choices": [choice]}).encode())

    with Stub(lambda body, n: cut_off if asked(body) == "c" else asked(body).upper()) as stub:
        complete = EndpointCompletions(stub.endpoint(temperature=1.0), at_once=3)
        found = complete(["a", [{"role": "user", "content": "b"}], "c"], 2)
    assert found == [[Completion("A")] * 2, [Completion("B")] * 2, [Completion("long", False)] * 2]
    assert len(stub.requests) == 6
