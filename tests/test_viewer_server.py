"""The viewer's answers, its index and its server, on run folders that a test writes."""

import http.client
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rljax.viewer import Answers, export, open_server

ROOT = Path(__file__).parent.parent
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>\u2028\ud800"


def record(step, prompt_id, sample, **more):
    return {
        "step": step,
        "prompt_id": prompt_id,
        "sample": sample,
        "prompt": f"What is {prompt_id}?",
        "completion": f"it is {sample}",
        "columns": {},
        "reward": float(sample % 2),
        "shaped_reward": float(sample % 2),
        "components": {"right": float(sample % 2)},
        "error": None,
        "finish_reason": "stop",
        "tokens": list(range(3 + sample)),
        "logprobs": [-1.0] * (3 + sample),
        "advantage": sample - 0.5,
        **more,
    }


def write(folder, steps=(1, 2), *, records=None):
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"steps": 9, "algorithm": {"class": "GRPO"}}))
    lines = [{"step": s, "rollout/reward_mean": s / 10, "loss/total": "nan", "eval/avg@4": 0.5} for s in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in steps:
        found = records or [record(step, p, s) for p in (5, 6) for s in range(3)]
        put(folder, step, found)
    return folder


def put(folder, step, records):
    text = "".join(json.dumps(one) + "\n" for one in records)
    (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text(text)


def asked(folder, tmp_path, path, **params):
    with Answers([folder], index_folder=tmp_path / "index") as answers:
        return answers(path, {name: str(value) for name, value in params.items()})


def searched(answers, search):
    """The answer to a search, when all files have been read."""
    for _ in range(2000):
        found = answers("find", {"run": "0", "search": search})
        if not found["pending"]:
            return found["found"]
        threading.Event().wait(0.005)
    raise AssertionError("files of rollouts are not read")


def test_a_run_is_told_as_it_is_on_disk(tmp_path):
    folder = write(tmp_path / "run")
    told = asked(folder, tmp_path, "runs")
    (run,) = told["runs"]
    assert (run["name"], run["step"], run["total"], run["algorithm"]) == ("run", 2, 9, "GRPO")
    assert run["rollouts"] == [[1, False], [2, False]]
    assert "raw reward of valid samples" in told["texts"]["rollout/reward_mean"]["meaning"]
    assert "problems that one of k solves" in told["texts"]["eval/avg@4"]["meaning"]

    columns = asked(folder, tmp_path, "metrics", run=0)
    assert columns["step"] == [1, 2] and columns["loss/total"] == ["nan", "nan"]
    groups = asked(folder, tmp_path, "groups", run=0, step=2)
    assert [(g["group"], g["samples"], g["reward"], g["prompt"]) for g in groups] == [
        (0, 3, pytest.approx(1 / 3), "What is 5?"),
        (1, 3, pytest.approx(1 / 3), "What is 6?"),
    ]
    found = asked(folder, tmp_path, "group", run=0, step=2, group=1)
    assert found["records"] == [record(2, 6, s) for s in range(3)]


def test_one_prompt_drawn_twice_in_a_step_is_two_groups(tmp_path):
    folder = write(tmp_path / "run", records=[record(1, 5, s) for s in (0, 1, 0, 1)])
    assert [g["samples"] for g in asked(folder, tmp_path, "groups", run=0, step=1)] == [2, 2]


def test_a_run_is_followed_while_it_writes_and_when_it_goes_back(tmp_path):
    folder = write(tmp_path / "run")
    with Answers([folder], index_folder=tmp_path / "index") as answers:
        before = answers("stamp", {})
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "rollout/reward_mean"')
            file.flush()
            assert answers("metrics", {"run": "0"})["step"] == [1, 2]
            file.write(": 0.3}\n")
        put(folder, 3, [record(3, 7, 0, error="ValueError: no answer", reward=None)])
        assert answers("metrics", {"run": "0"})["step"] == [1, 2, 3]
        assert answers("stamp", {}) != before
        answers("runs", {})
        assert [row["error"] for row in wait_for(answers, "failed", 1)] == ["ValueError: no answer"]

        # A start that goes on from step 1 drops what came behind, and writes it anew.
        write(folder, steps=(1,))
        (folder / "rollouts" / "step_000003.jsonl").unlink()
        put(folder, 2, [record(2, 8, 0)])
        assert answers("metrics", {"run": "0"})["step"] == [1]
        assert [g["prompt_id"] for g in answers("groups", {"run": "0", "step": "2"})] == ["8"]
        answers("runs", {})
        assert wait_for(answers, "failed", 0) == []


def wait_for(answers, search, count):
    """The answer to a search, as soon as it has so many rows."""
    for _ in range(2000):
        found = answers("find", {"run": "0", "search": search})["found"]
        if len(found) == count:
            break
        threading.Event().wait(0.005)
    return found


def test_searches_find_what_they_say(tmp_path):
    columns = {"trained": [1, 1, 0], "log_ratio": [-0.25, 0.0, 9.0]}
    records = [
        record(1, 5, 0, per_token=columns),
        record(1, 5, 1, finish_reason="length"),
        record(1, 5, 2, reward=None, error="TimeoutError: 5 s\ud800"),
        record(1, 5, 9),
    ]
    folder = write(tmp_path / "run", steps=(1,), records=records)
    with Answers([folder], index_folder=tmp_path / "index") as answers:
        # A difference on a token that is not trained on is none: 0.25, and not 9.
        assert [(row["sample"], row["gap"]) for row in searched(answers, "gap")] == [(0, 0.25)]
        assert [row["sample"] for row in searched(answers, "longest")] == [9, 2, 1, 0]
        assert [row["error"] for row in searched(answers, "failed")] == ["TimeoutError: 5 s?"]
        assert [row["sample"] for row in searched(answers, "truncated")] == [1]
        assert [row["reward"] for row in searched(answers, "worst")] == [0.0, 1.0, 1.0]


def test_what_has_been_read_is_not_read_again(tmp_path, monkeypatch):
    folder = write(tmp_path / "run")
    with Answers([folder], index_folder=tmp_path / "index") as answers:
        searched(answers, "longest")
    monkeypatch.setattr("rljax.viewer.index.records_in", lambda file: pytest.fail(f"{file} is read again"))
    with Answers([folder], index_folder=tmp_path / "index") as answers:
        assert len(searched(answers, "longest")) == 12


def test_a_line_that_is_no_record_is_passed_over(tmp_path):
    folder = write(tmp_path / "run", steps=(1,))
    with (folder / "rollouts" / "step_000001.jsonl").open("ab") as file:
        file.write(b'[1]\n\xff\n{"step": 1, "promp')
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\n[]\n")
    groups = asked(folder, tmp_path, "groups", run=0, step=1)
    assert [g["samples"] for g in groups] == [3, 3]
    assert asked(folder, tmp_path, "metrics", run=0)["step"] == [1]


def test_a_report_holds_hostile_text_as_data_alone(tmp_path):
    records = [record(1, 5, s, prompt=HOSTILE, completion=HOSTILE, error=HOSTILE) for s in range(2)]
    folder = write(tmp_path / "run", steps=(1,), records=records)
    with Answers([folder], index_folder=tmp_path / "index") as answers:
        searched(answers, "failed")
        export(answers, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "taken" in page and "<script>document" not in page and "<img" not in page
    data = page.split('id="told">')[1].split("</script>")[0]
    told = json.loads(data)
    assert told["group?group=0&run=0&step=1&untrained=0"]["prompt"] == HOSTILE
    assert not any(mark in page for mark in ('src="', 'href="style.css"', "http://localhost"))


def test_the_server_gives_the_page_and_answers_and_nothing_else(tmp_path):
    folder = write(tmp_path / "run")
    with Answers([folder], index_folder=tmp_path / "index") as answers, open_server(answers) as server:
        assert server.server_address[0] == "127.0.0.1"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()

        def get(path, **headers):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            body = answer.read()
            connection.close()
            return answer.status, body, answer

        status, body, answer = get("/")
        assert status == 200 and b'id="tab-rollouts"' in body
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
        assert json.loads(get("/api/runs")[1])["runs"][0]["step"] == 2
        assert get("/api/group?run=0&step=1&group=0")[0] == 200

        for path in ("/../../etc/passwd", "/config.json", "/api/none", "/metrics.json"):
            assert get(path)[0] == 404
        status, body, _ = get("/api/groups?run=0&step=77")
        assert status == 400 and json.loads(body)["error"] == "step=77: the run has no such rollouts"
        assert json.loads(get("/api/groups?run=9&step=1")[1])["error"] == "run=9 must be from 0 to 0"
        assert json.loads(get("/api/groups?run=x&step=1")[1])["error"] == "run='x' must be a number"

        # A name that another page has led here may not read.
        assert get("/api/runs", Host="evil.example:80")[0] == 403
        assert get("/api/runs", Host=f"localhost:{server.server_port}")[0] == 200
        server.shutdown()
        thread.join()


def test_the_searches_of_a_report_list_what_lies_in_it(tmp_path):
    """Though more than a search lists, of steps that are not in it, would come first."""
    folder = write(tmp_path / "run", steps=range(1, 8))
    put(folder, 2, [record(2, p, s, tokens=[0] * 50) for p in range(20) for s in range(6)])
    with Answers([folder], index_folder=tmp_path / "index") as answers:
        assert {row["step"] for row in searched(answers, "longest")} == {2}
        export(answers, tmp_path / "report.html")
    told = json.loads((tmp_path / "report.html").read_text().split('id="told">')[1].split("</script>")[0])
    assert [step for step, _ in told["runs?"]["runs"][0]["rollouts"]] == [1, 3, 4, 5, 7]
    found = told["find?run=0&search=longest"]["found"]
    assert len(found) == 5 * 6 and {row["step"] for row in found} == {1, 3, 4, 5, 7}


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere", "is no folder; name the --workdir of a run"),
        ("", "holds no run (no metrics.jsonl, config.json or rollouts/); runs below it: "),
    ],
)
def test_a_folder_that_is_no_run_is_named(name, message, tmp_path):
    folder = write(tmp_path / "run")
    with pytest.raises(ValueError) as error:
        Answers([tmp_path / name])
    below = "" if name else str(folder)
    assert str(error.value) == f"{tmp_path / name} {message}{below}"


def test_the_command_writes_a_report_and_names_what_is_wrong_in_one_line(tmp_path):
    write(tmp_path / "run")
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def view(*words):
        return subprocess.run(
            [sys.executable, "-m", "rljax", "view", *words], cwd=tmp_path, env=env, capture_output=True, text=True
        )

    done = view("run", "--export=report.html")
    assert (done.returncode, done.stdout) == (0, "written  report.html\n")
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    done = view()
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: name the folder of a run, e.g. rljax view runs/x"
