"""The page for a first run, walked as a reader does: its files written, its commands run, in an empty folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = (Path(__file__).parent.parent / "docs" / "first-run.md").read_text()


def test_a_reader_gets_from_the_page_to_a_trained_model(tmp_path):
    # No module of the clone is found but through what is installed; the command stands beside the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    said = []
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL):
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", block)
            assert name, f"a file of the page has no name: {block[:40]!r}"
            (tmp_path / name[1]).write_text(block)
        else:
            command = ["bash", "-euo", "pipefail", "-c", block]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
            said.append(done.stdout)

    made, trained, read, model = said
    assert made.splitlines()[0] == '{"prompt": "the film was great:", "mood": "+"}'
    record = json.loads(read.splitlines()[0])
    assert record["prompt"].startswith("the ") and record["reward"] == float(
        record["completion"] == record["columns"]["mood"]
    )
    summary = json.loads((tmp_path / "runs/mine/summary.json").read_text())
    assert summary["before"]["greedy"] < 0.2 and summary["after"]["greedy"] > 0.9
    assert "held-out problems: 20" in trained and "parameters" in trained
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert {"config.json", "model.safetensors"} <= set(model.split())


def test_the_readme_leads_to_it():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert "docs/first-run.md" in readme
