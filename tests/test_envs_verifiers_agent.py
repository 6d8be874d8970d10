"""Tasks of verifiers 0.4, played by its own harness against an endpoint."""

import concurrent.futures
import http.server
import json
import shutil
import threading

import pytest

pytest.importorskip("verifiers.v1", reason="needs verifiers 0.4: pip install 'rljax-lm[verifiers-v1]'")
if shutil.which("uv") is None:
    pytest.skip("needs uv on the path: pip install 'rljax-lm[verifiers-v1]'", allow_module_level=True)

import verifiers_sums
from test_rollouts_endpoint import CONFIG as MODEL
from test_rollouts_endpoint import make_tokenizer, params

from rljax.envs.library import VerifiersAgent, verifiers_agent
from rljax.envs.library.verifiers_agent import rows
from rljax.experiment import (
    BlackBox,
    EvaluationConfig,
    PretrainedModel,
    RowsData,
    SamplingConfig,
    UpdateConfig,
)
from rljax.experiment.train import train
from rljax.models import save_hf
from rljax.testing import tiny_config

SUMS = "verifiers_sums"
TEN = {"size": 10, "failing": -1}


class Policy(http.server.BaseHTTPRequestHandler):
    """Answers 1, streamed, and keeps what it was asked."""

    asked: list = []  # noqa: RUF012

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append((self.path, self.headers["authorization"], body["messages"]))
        same = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "policy"}
        parts = [
            {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "1"}, "finish_reason": None}]},
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}},
        ]
        text = "".join(f"data: {json.dumps(same | part)}\n\n" for part in parts) + "data: [DONE]\n\n"
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def policy():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Policy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_tasks_are_rows():
    data = rows(SUMS)
    assert [row["prompt"] for row in data] == ["0?", "1?", "2?", "3?"]
    assert [row["index"] for row in data] == [0, 1, 2, 3]
    assert data[1]["task"]["answer"] == "1"
    assert [row["index"] for row in rows(SUMS, args={"size": 9}, size=2)] == [0, 1]
    shuffled = rows(SUMS, args={"size": 9}, size=9, seed=3)
    assert sorted(row["index"] for row in shuffled) == list(range(9)) and shuffled != rows(SUMS, args={"size": 9})


def test_an_episode_speaks_with_the_endpoint_of_its_session_and_is_rewarded(policy, monkeypatch):
    monkeypatch.setenv("RLJAX_ENDPOINT_TOKEN", "secret")
    monkeypatch.setattr(verifiers_agent, "SERVED_EPISODES", 2)  # served anew within the test
    Policy.asked.clear()
    agent = VerifiersAgent(SUMS)
    data = rows(SUMS)[:3]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = [pool.submit(agent, f"{policy}/session/{row['index']}/v1", row) for row in data]
        rewards = [reward.result() for reward in found]
    assert rewards == [0.5, 1.5, 0.5]
    assert {(path, key) for path, key, _ in Policy.asked} == {
        (f"/session/{index}/v1/chat/completions", "Bearer secret") for index in range(3)
    }
    assert [{"role": "system", "content": "n"}, {"role": "user", "content": "1?"}] in [
        asked[2] for asked in Policy.asked
    ]


def test_what_fails_costs_the_sample(policy):
    agent = VerifiersAgent(SUMS)
    with pytest.raises(RuntimeError, match=r"the episode of verifiers failed: TaskError: .*KeyError"):
        agent(f"{policy}/v1", rows(SUMS)[3])
    with pytest.raises(RuntimeError, match="the episode of verifiers failed: ProviderError"):
        agent("http://127.0.0.1:9/v1", rows(SUMS)[0])
    with pytest.raises(ValueError, match="the taskset has 4 tasks, and the row wants index 7"):
        agent(f"{policy}/v1", {"index": 7})


@pytest.mark.parametrize("where", ["agent", "env"])
def test_an_episode_that_is_tried_again_has_the_reward_of_the_try_that_worked(policy, where):
    verifiers_sums.TRIES.clear()
    with pytest.raises(RuntimeError, match="KeyError"):
        VerifiersAgent(SUMS, args={"flaky": 2, "size": 3})(f"{policy}/v1", {"index": 2})
    verifiers_sums.TRIES.clear()
    agent = VerifiersAgent(SUMS, args={"flaky": 2}, **{where: {"retries": {"max_retries": 1}}})
    assert agent(f"{policy}/v1", {"index": 2}) == 0.5


def test_tasks_that_were_away_are_read_again(policy):
    agent = VerifiersAgent(SUMS, args={"lost": True})
    with pytest.raises(ConnectionError, match="the data are away"):
        agent(f"{policy}/v1", {"index": 2})
    assert agent(f"{policy}/v1", {"index": 2}) == 0.5
    assert agent(f"{policy}/v1", {"index": 1}) == 1.5
    with pytest.raises(ValueError, match="the row wants index -1"):
        agent(f"{policy}/v1", {"index": -1})


def test_what_cannot_work_is_named(policy):
    with pytest.raises(ValueError, match="no_such_taskset"):
        VerifiersAgent("no_such_taskset")
    with pytest.raises(ValueError, match="sizes"):
        VerifiersAgent(SUMS, args={"sizes": 3})
    with pytest.raises(ValueError, match="no_such_harness"):
        VerifiersAgent(SUMS, agent={"harness": {"id": "no_such_harness"}})
    with pytest.raises(ValueError, match=r"has the agents \[.*\], and only an environment of one"):
        VerifiersAgent(SUMS, env={"id": "agentic-judge"})
    with pytest.raises(RuntimeError, match="traces; only one can be rewarded"):
        VerifiersAgent(SUMS, env={"id": "best-of-n"})(f"{policy}/v1", rows(SUMS)[0])


def test_a_run_is_trained_on_its_tasks(tmp_path):
    """With the real endpoint and decoder."""
    save_hf(str(tmp_path / "model"), MODEL, params(), tokenizer=make_tokenizer())
    config = tiny_config(
        steps=1,
        prompts_per_step=2,
        data=RowsData(
            rows="rljax.envs.library.verifiers_agent:rows", args={"taskset": SUMS, "args": TEN}, test_fraction=0.3
        ),
        model=PretrainedModel(path=str(tmp_path / "model")),
        actor=BlackBox(
            agent="rljax.envs.library:VerifiersAgent",
            args={"taskset": SUMS, "args": TEN},
            context_length=128,
            prefill_chunks=(16, 64),
            workers=4,
        ),
        sampling=SamplingConfig(max_new_tokens=8, truncated_is_wrong=False),
        update=UpdateConfig(pack_length=128, head_chunk=256),
        evaluation=EvaluationConfig(problems=2, samples=2),
    )
    train(config, str(tmp_path / "run"))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["play/failed"] == 0
    assert line["rollout/logprob_gap_max"] < 2e-5
