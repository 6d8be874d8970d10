"""Tools of MCP servers: real servers, started by their command or asked at their URL, through our pool."""

import contextlib
import http.server
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from replays import replay

pytest.importorskip("mcp", reason="needs mcp: pip install 'rljax-lm[mcp]'")

from rljax.envs import EnvironmentPool, ToolBox, ToolCall, replay_same
from rljax.envs.library import McpEnvironment, McpServer, mcp_tools
from rljax.experiment import (
    EvaluationConfig,
    FreshModel,
    MultiTurn,
    OptimizerConfig,
    RowsData,
    SamplingConfig,
    UpdateConfig,
    WarmupConfig,
)
from rljax.experiment.train import train
from rljax.tasks import Example
from rljax.testing import tiny_config

COMMAND = [sys.executable, str(pathlib.Path(__file__).with_name("mcp_server_program.py"))]


def is_exact(answer, row):
    return float(str(answer).strip() == row["answer"])


ROW = {"prompt": "What is 3 + 4?", "answer": "7"}


def call(name: str, arguments: str = "{}") -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


@pytest.fixture(scope="module")
def server():
    opened = McpServer(COMMAND, env={"GREETING": "hello"}, timeout_s=20.0)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def box(server):
    return ToolBox(server.tools, timeout_s=1.5)


def test_tools_are_listed_with_the_schemas_of_the_server(server, box):
    assert box.names == ("add", "keep", "variable", "refuse", "picture", "wait", "die")
    add = box.schemas[0]["function"]
    assert add["description"] == "Add two numbers."
    assert add["parameters"]["required"] == ["a"]
    assert add["parameters"]["properties"]["b"]["type"] == "integer"


def test_a_call_gives_the_text_of_the_result(box):
    assert box.call(ToolCall("add", {"a": 3, "b": 4})).text == "7"
    assert box.call(ToolCall("add", {"a": 3})).text == "5"
    assert box.call(ToolCall("variable", {"name": "GREETING"})).text == "hello"
    assert box.call(ToolCall("picture", {})).text == "Here it is.\n[image/png, which cannot be shown]"


def test_what_is_wrong_with_a_call_is_told_by_its_kind(server, box):
    assert box.call(ToolCall("add", {"a": "three"})).failure == "wrong_type"
    assert box.call(ToolCall("add", {})).failure == "missing_argument"
    assert box.call(ToolCall("none", {})).failure == "unknown_tool"
    refused = box.call(ToolCall("refuse", {"text": "no"}))
    assert refused.failure == "tool_raised"
    assert "refuse failed: McpToolError: Error executing tool refuse" in refused.text
    assert box.call(ToolCall("wait", {"seconds": 5.0})).failure == "tool_timeout"
    assert server.problem is None


def test_many_threads_call_at_the_same_time(box):
    found: dict[int, str] = {}

    def work(number: int):
        found[number] = box.call(ToolCall("add", {"a": number, "b": number})).text

    threads = [threading.Thread(target=work, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: str(2 * number) for number in range(40)}


def test_an_episode_ends_with_an_answer_that_is_scored():
    environment = McpEnvironment(COMMAND, is_exact, only=["add"], task="Use the tools.")
    opening = environment.reset({**ROW, "prompt": [{"role": "user", "content": ROW["prompt"]}]})
    assert opening[0]["role"] == "system"
    assert "add" in opening[0]["content"] and "keep" not in opening[0]["content"]
    assert opening[0]["content"].startswith("Use the tools.")

    step = environment.step(call("add", '{"a": 3, "b": 4}'))
    assert (step.observation, step.done, step.counts["tool_calls"]) == ("7", False, 1.0)
    last = environment.step("7")
    assert (last.reward, last.done) == (1.0, True)


def test_a_final_tool_of_ones_own_ends_an_episode():
    environment = McpEnvironment(COMMAND, is_exact, own_tools=["rljax.envs:answer"])
    environment.reset(ROW)
    step = environment.step(call("answer", '{"answer": "7"}'))
    assert (step.reward, step.done) == (1.0, True)


def test_shared_episodes_have_one_server_and_others_one_each():
    def kept_by(environment) -> tuple[str, str]:
        environment.reset(ROW)
        number, _, _, process = environment.step(call("keep", '{"text": "x"}')).observation.split()
        return number, process

    shared = [McpEnvironment(COMMAND, is_exact) for _ in range(2)]
    (first, process), (second, same) = (kept_by(environment) for environment in shared)
    assert process == same and int(second) == int(first) + 1

    own = [McpEnvironment(COMMAND, is_exact, shared=False) for _ in range(2)]
    (first, process), (second, other) = (kept_by(environment) for environment in own)
    assert process != other and first == second == "1"
    for environment in own:
        environment.close()
        environment.close()
    deadline = time.monotonic() + 10.0
    while pathlib.Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not pathlib.Path(f"/proc/{process}").exists()


def test_an_episode_can_be_forked_by_repeating_its_calls():
    own = [McpEnvironment(COMMAND, is_exact, shared=False) for _ in range(2)]
    opening = own[0].reset(ROW)
    step = own[0].step(call("add", '{"a": 1}'))
    replay_same(own[1], ROW, opening, [call("add", '{"a": 1}')], [step])
    again, steps = replay(McpEnvironment(COMMAND, is_exact), ROW, [call("add", '{"a": 1}'), "7"])
    assert (again, steps[0]) == (opening, step) and steps[1].reward == 1.0
    for environment in own:
        environment.close()


def test_a_pool_plays_episodes_and_a_server_that_dies_costs_one_alone():
    def make():
        return McpEnvironment(COMMAND, is_exact)

    def played(pool, *actions):
        episode = pool.start(ROW).result()
        for action in actions:
            pool.step(episode, action).result()
        return episode

    with EnvironmentPool(make, workers=2) as pool:
        good = played(pool, call("add", '{"a": 3, "b": 4}'), "7")
        bad = played(pool, call("die"))
        after = played(pool, call("add", '{"a": 3, "b": 4}'), "7")
    assert (good.end, good.reward) == ("done", 1.0)
    assert bad.end == "raised" and "MCP server" in bad.error and "failed" in bad.error
    assert (after.end, after.reward) == ("done", 1.0)


RAW = [sys.executable, pathlib.Path(__file__).with_name("mcp_raw_program.py")]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("internal", "upstream API returned 500"),
        ("custom", "no such document"),
        ("wrong_structure", "nvalid structured content"),
        ("wrong_result", "content"),
    ],
)
def test_a_call_that_fails_while_the_server_stands_costs_nobody_else_anything(name, told):
    one, other = (McpEnvironment(RAW, is_exact) for _ in range(2))
    one.reset(ROW)
    other.reset(ROW)
    step = one.step(call(name))
    assert told in step.observation and step.counts["tool_errors"] == 1.0
    assert other.step("7").reward == 1.0
    assert one.step(call("fine")).observation == other_process(RAW)


def other_process(command):
    again = McpEnvironment(command, is_exact)
    again.reset(ROW)
    return again.step(call("fine")).observation


def test_what_a_model_writes_breaks_no_connection():
    environment = McpEnvironment(COMMAND, is_exact)
    environment.reset(ROW)
    for text in ('"\\ud83d"', '"\ud83d"', '"\\u0000"', "[" * 300 + "]" * 300, "1e999", '{"a": {"b": NaN}}', "null"):
        step = environment.step(call("keep", f'{{"text": {text}}}'))
        assert step.observation and not step.done
    assert environment.step(call("add", '{"a": 3, "b": 4}')).observation == "7"


@pytest.mark.parametrize("name", ["any_schema", "no_properties", "wrong_enum"])
def test_odd_schemas_leave_the_server_to_decide(name):
    environment = McpEnvironment(RAW, is_exact)
    environment.reset(ROW)
    arguments = "{}" if name == "no_properties" else '{"x": 1}'
    assert environment.step(call(name, arguments)).observation.startswith("fine")
    assert environment.step(call("open", '{"whatever": [1, 2]}')).observation.startswith("fine")


@pytest.mark.parametrize("how", ["stopped", "deaf"])
def test_a_server_that_answers_nothing_more_is_replaced(how, monkeypatch):
    monkeypatch.setattr(mcp_tools, "_PING_S", 0.5)
    server = {"server": [*RAW, how], "timeout_s": 1.0}  # a connection of its own
    environment = McpEnvironment(server, is_exact)
    environment.reset(ROW)
    process = environment.step(call("fine")).observation.split()[-1]
    if how == "stopped":
        os.kill(int(process), signal.SIGSTOP)
    else:
        with contextlib.suppress(RuntimeError):  # found at once by a version of the package
            environment.step(call("not_text"))
    again = McpEnvironment(server, is_exact)
    again.reset(ROW)
    other = again.step(call("fine")).observation.split()[-1]
    assert other != process
    assert wait_until(lambda: not pathlib.Path(f"/proc/{process}").exists())


def wait_until(is_so):
    deadline = time.monotonic() + 20.0
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_so()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends them")
def test_servers_end_with_their_process_however_it_ends():
    program = (
        "import os, signal, sys; from rljax.envs.library import McpServer; "
        f"server = McpServer({[str(word) for word in RAW]} + ['stays']); "
        "print(server.tools[0](), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    process = done.stdout.split()[-1]
    assert wait_until(lambda: not pathlib.Path(f"/proc/{process}").exists())


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends them")
def test_a_server_starts_under_the_first_process_of_a_container():
    if subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("this user may not make a namespace of processes")
    program = (
        "import os; assert os.getpid() == 1; from rljax.envs.library import McpServer; "
        f"server = McpServer({[str(word) for word in RAW]}); print(server.tools[0]()); server.close()"
    )
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("fine"), done.stderr[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends them")
def test_a_server_whose_parent_has_ended_does_not_start():
    words = mcp_tools.with_parent(["true"])
    assert subprocess.run(words).returncode == 0
    elsewhere = [word if word != str(os.getpid()) else str(os.getppid()) for word in words]
    done = subprocess.run(elsewhere, capture_output=True, text=True)
    assert done.returncode == 1 and "its parent has ended" in done.stderr


def test_who_waits_for_a_server_that_does_not_start_shares_the_failure_and_nobody_else_waits():
    standing = McpEnvironment(COMMAND, is_exact)
    standing.reset(ROW)
    dead = {"server": [sys.executable, "-c", "import time; time.sleep(60)"], "timeout_s": 1.5}
    took = {}

    def reset(name, server):
        began = time.monotonic()
        try:
            McpEnvironment(server, is_exact).reset(ROW)
        except ValueError as error:
            assert "does not answer" in str(error)
        took[name] = time.monotonic() - began

    threads = [threading.Thread(target=reset, args=(f"dead{n}", dead)) for n in range(4)]
    threads += [threading.Thread(target=reset, args=("standing", COMMAND))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert took["standing"] < 1.0
    assert max(took.values()) < 4.0  # four attempts in turn would be 6


def test_misuse_is_told():
    environment = McpEnvironment(COMMAND, is_exact, shared=False)
    with pytest.raises(RuntimeError, match="step comes behind reset"):
        environment.step("7")
    environment.reset(ROW)
    environment.close()
    with pytest.raises(RuntimeError, match="before close"):
        environment.step("7")
    with pytest.raises(ValueError, match=r"server has \['serve'\]; it must have server"):
        McpEnvironment({"serve": COMMAND}, is_exact)
    with pytest.raises(ValueError, match=r"\['no_such_program'\] must be the words of a command"):
        McpEnvironment(["no_such_program"], is_exact)
    with pytest.raises(ValueError, match="NO_SUCH_TOKEN"):
        McpEnvironment({"server": "http://127.0.0.1:9/mcp", "token_variable": "NO_SUCH_TOKEN"}, is_exact)
    with pytest.raises(ValueError, match="only='add' must be a list"):
        McpEnvironment(COMMAND, is_exact, only="add")


def test_a_server_is_asked_at_its_url():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([*COMMAND, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}/mcp"
        deadline = time.monotonic() + 30.0
        while True:
            try:
                server = McpServer(url, timeout_s=5.0)
                break
            except ValueError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        add = ToolBox(server.tools[:1])
        assert add.call(ToolCall("add", {"a": 3, "b": 4})).text == "7"

        process.send_signal(signal.SIGKILL)
        process.wait()
        assert add.call(ToolCall("add", {"a": 3, "b": 4})).failure is not None
        assert server.problem is not None
        server.close()
    finally:
        process.kill()


def test_a_token_goes_to_the_server_and_into_no_message(monkeypatch):
    heard = []

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(self.headers["authorization"])
            self.send_response(401)
            self.end_headers()

        def log_message(self, *args):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    monkeypatch.setenv("TOOLS_TOKEN", "a-secret")
    with pytest.raises(ValueError, match="does not answer") as raised:
        McpServer(f"http://127.0.0.1:{listening.server_port}/mcp", token_variable="TOOLS_TOKEN", timeout_s=10.0)
    listening.shutdown()
    assert heard and set(heard) == {"Bearer a-secret"}
    assert "a-secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"server": ["no_such_program"]}, r"\['no_such_program'\] must be the words of a command"),
        ({"server": []}, r"\[\] must be the words of a command"),
        ({"server": [sys.executable, "-c", "print('hello')"]}, "does not answer"),
        ({"server": [sys.executable, "-c", "import time; time.sleep(60)"], "timeout_s": 0.5}, "does not answer"),
        ({"server": "http://127.0.0.1:9/mcp"}, "does not answer"),
        ({"server": "python server.py"}, "must be a URL, or the words of a command as a list"),
        ({"server": "http://127.0.0.1:9/mcp", "env": {"A": "1"}}, "is for a command"),
        ({"server": COMMAND, "token_variable": "TOKEN"}, "is for a URL"),
        ({"server": "http://127.0.0.1:9/mcp", "token_variable": "NO_SUCH_TOKEN"}, "NO_SUCH_TOKEN"),
    ],
)
def test_a_server_that_cannot_work_is_named(arguments, told):
    with pytest.raises(ValueError, match=told):
        McpServer(**arguments)


def test_an_unknown_name_in_only_is_told_with_those_there_are():
    with pytest.raises(ValueError, match=r"only names \['divide'\].*it has \['add'"):
        McpEnvironment(COMMAND, is_exact, only=["divide"]).reset(ROW)


def test_a_reward_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no_such_module"):
        McpEnvironment(COMMAND, "no_such_module:reward")
    with pytest.raises(ValueError, match="is not a function"):
        McpEnvironment(COMMAND, "math:pi")


def sums(size: int):
    return [{"prompt": f"{number}+1", "answer": str(number + 1)} for number in range(size)]


def demonstrations(examples):
    """A call, its result and the answer."""
    made = []
    for example in examples:
        number, answer = example.prompt.split("+")[0], example.columns["answer"]
        asked = call("add", json.dumps({"a": int(number), "b": 1}))
        turns = [f"{asked}\n", answer, f"\n{answer}\n"]
        made.append(Example(example.prompt, {"completion": turns}))
    return made


@pytest.mark.slow
def test_a_run_is_trained_with_tools_of_a_server(tmp_path):
    config = tiny_config(
        steps=2,
        prompts_per_step=2,
        model=FreshModel(
            alphabet="".join(map(chr, range(32, 127))) + "\n", num_layers=1, embed_dim=64, num_heads=2, num_kv_heads=2
        ),
        data=RowsData(rows="test_envs_mcp:sums", args={"size": 20}, test_fraction=0.2),
        actor=MultiTurn(
            make="rljax.envs.library:McpEnvironment",
            args={"server": COMMAND, "reward": "test_envs_mcp:is_exact", "only": ["add"], "system": ""},
            context_length=256,
            prefill_chunks=(16, 64),
            workers=4,
        ),
        sampling=SamplingConfig(max_new_tokens=80, truncated_is_wrong=False),
        update=UpdateConfig(pack_length=256, head_chunk=256),
        evaluation=EvaluationConfig(problems=2, samples=2),
        warmup=WarmupConfig(
            steps=150,
            batch_size=8,
            demonstrations=demonstrations,
            optimizer=OptimizerConfig(learning_rate=3e-3),
        ),
    )
    train(config, str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["rollout/component/tool_calls"] for line in lines) > 0
    assert all(line["play/failed"] == 0 for line in lines)
