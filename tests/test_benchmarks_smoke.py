"""Every script of benchmarks/ runs in its smallest form, whose times say nothing: it is there to end well."""

import functools
import importlib.util
import json
import sys
from pathlib import Path

import jax
import pytest
from test_tasks_rewards import alive, wait_until

from rljax.envs import Sandbox

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = {
    str(file.relative_to(BENCHMARKS))
    for file in BENCHMARKS.rglob("*.py")
    if "def main(" in file.read_text() and "read_job" not in file.read_text()
}
"""What is called by hand. These start the workers, which read a job."""
SMALLEST = {
    "accelerator.py": ("--step=kernels",),
    "agents.py": ("--preset=smoke",),
    "chaos.py": ("--preset=smoke",),
    "compare_runs.py": (),
    "compiled.py": ("--preset=smoke", "--only=decode_bound_0p6b,predicted_over_compiled"),
    "distill.py": ("--preset=smoke", "--arms=both teachers"),
    "engines.py": ("--preset=smoke",),
    "episodes.py": ("--preset=smoke",),
    "evolve.py": ("--preset=smoke", "--arms=CoEvolve,D2Evo"),
    "folding.py": ("--preset=smoke", "--arms=folded"),
    "forest.py": ("--preset=smoke",),
    "growth.py": ("--preset=smoke",),
    "maps.py": ("--preset=smoke",),
    "memory.py": ("--preset=smoke",),
    "numerics.py": ("--preset=smoke",),
    "objectives.py": ("--preset=smoke",),
    "overlap.py": ("--preset=smoke",),
    "papers.py": ("--size=smoke", "--configs=grpo"),
    "parity/losses.py": (),
    "parity/preferences.py": (),
    "quantized.py": ("--preset=smoke",),
    "rollout.py": ("--preset=smoke",),
    "simulate.py": ("--preset=smoke",),
    "spread.py": ("--preset=smoke",),
    "train_step.py": ("--preset=smoke",),
    "viewer.py": ("--preset=smoke",),
}
ELSEWHERE = {
    "compare_runs.py": "test_benchmarks_compare_runs",
    "parity/losses.py": "test_benchmarks_parity",
    "parity/preferences.py": "test_losses_preferences",
}
"""Scripts that run in a test file of their own; those of parity are nothing without their peers' environments."""


@functools.cache
def can_isolate():
    try:
        with Sandbox(workers=1):
            return True
    except ValueError:
        return False


@pytest.fixture
def run(tmp_path_factory, tmp_path, monkeypatch):
    """Calls `main` of a script with arguments; the JSON that it wrote, if it can write any."""
    before = set(sys.modules)
    cache = jax.config.jax_compilation_cache_dir
    home = tmp_path_factory.getbasetemp() / "benchmarks"
    monkeypatch.setenv("RLJAX_BENCH_HOME", str(home))  # models are made once for all scripts
    monkeypatch.setenv("RLJAX_ALLOCATOR", "system")  # nothing starts this process again
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run_script(script, *arguments, json_flag="--json"):
        spec = importlib.util.spec_from_file_location(f"benchmark_{Path(script).stem}", BENCHMARKS / script)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        output = tmp_path / "result.json"
        written = [f"{json_flag}={output}"] if json_flag else []
        monkeypatch.setattr(sys, "argv", [script, *arguments, *written])
        module.main()
        return json.loads(output.read_text()) if written else None

    yield run_script
    jax.config.update("jax_compilation_cache_dir", cache)
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if name.startswith("benchmark_") or file.startswith(str(BENCHMARKS)):
            del sys.modules[name]


def test_every_script_has_a_smallest_form():
    assert set(SMALLEST) == SCRIPTS
    for name in ELSEWHERE.values():
        assert (Path(__file__).parent / f"{name}.py").exists()


@pytest.mark.parametrize(
    "script",
    [
        "episodes.py",
        "forest.py",
        "objectives.py",
        "overlap.py",
        "quantized.py",
        "rollout.py",
        "simulate.py",
        "train_step.py",
    ],
)
def test_a_benchmark_measures_everything_that_it_reports(run, script):
    report = run(script, *SMALLEST[script])
    assert report["benchmark"] == Path(script).stem and report["setting"]["preset"] == "smoke"
    assert report["results"] and all(line["seconds"] > 0 for line in report["results"])
    assert report["ratios"] and not report.get("missing")
    if "compiles_after_warmup" in report["ratios"]:
        assert report["ratios"]["compiles_after_warmup"] == 0
    assert report["ratios"].get("digests_equal", 1) == 1


def test_the_viewer_opens_a_run_and_reads_all_of_it(run, capsys):
    run("viewer.py", *SMALLEST["viewer.py"], json_flag=None)
    assert capsys.readouterr().out.startswith("1024 rollouts in 2 steps")


@pytest.mark.slow
def test_a_student_is_taught_by_two_teachers_in_their_tasks(run, tmp_path):
    (line,) = run("distill.py", *SMALLEST["distill.py"], f"--workdir={tmp_path}")["results"]
    (first, *_, last) = line["curve"]
    assert first[0] == 0 and last[0] >= 12
    assert line["reached"] is None
    for task in ("backward", "sorted"):
        assert (tmp_path / "smoke" / f"teacher_{task}" / "config.json").exists()


@pytest.mark.slow
def test_tasks_that_evolve_are_compared_at_equal_tokens(run, tmp_path):
    lines = run("evolve.py", *SMALLEST["evolve.py"], f"--workdir={tmp_path}")["results"]
    assert [line["arm"] for line in lines] == ["CoEvolve", "D2Evo"]
    for line in lines:
        assert line["curve"][0][0] == 0 and line["curve"][-1][0] >= 1200


@pytest.mark.slow
def test_answers_on_a_map_are_measured_before_and_after_and_over_samples(run, tmp_path):
    (report,) = run("maps.py", *SMALLEST["maps.py"], f"--workdir={tmp_path}")["results"]
    assert len(report["trained"]) == 1
    for when in ("before", "after"):
        table = report[when]["at_k"]
        assert set(table) == {"mean", "majority", "medoid", "fewest calls", "verifier", "oracle"}
        assert all(table["oracle"][k] >= table[rule][k] for rule in table for k in ("1", "2"))
        assert set(report[when]["greedy"]) == {"within_25_km", "within_200_km", "within_750_km", "within_2500_km"}


@pytest.mark.slow
def test_a_trail_is_walked_before_and_after_in_a_context_that_is_folded(run, tmp_path):
    (report,) = run("folding.py", *SMALLEST["folding.py"], f"--workdir={tmp_path}")["results"]
    # Two trails, each once greedily and once sampled; keys and values of 32 conversations of 224 tokens.
    assert set(report["before"]) == set(report["after"]) == {"greedy", "sampled"}
    assert len(report["trained"]) == 1 and report["trained"][0]["conversations"] >= 1
    assert report["context_bytes"] >= 32 * 224 * 2 * 2 * 4 * 32 * 4


@pytest.mark.slow
def test_a_searched_memory_is_measured_before_and_after_under_both_rewards(run, tmp_path):
    paid, unpaid = run("memory.py", *SMALLEST["memory.py"], f"--workdir={tmp_path}")["results"]
    assert paid["before"] == unpaid["before"] and (paid["arm"], unpaid["arm"]) == (
        "answers and evidence",
        "answers alone",
    )
    assert set(paid["after"]) == {"is_right", "evidence_recall", "sufficient", "tool_calls", "read_share"}


def test_growth_is_measured_and_ragged_updates_compile_nothing_after_the_warm_up(run):
    report = run("growth.py", *SMALLEST["growth.py"])
    ratios = report["ratios"]
    assert ratios["rows_bytes_per_token"] > 20
    assert all(ratios[name] > 0 for name in ("cap_cost", "context_cost", "stop_string_growth", "pack_us_per_token"))
    assert 1 <= ratios["update_programs"] <= 3 and ratios["compiles_after_warmup"] == 0


def test_sampler_and_trainer_agree_and_varied_lengths_compile_nothing_after_warm_up(run):
    report = run("numerics.py", *SMALLEST["numerics.py"])
    assert len(report["results"]) == 4 + 2
    assert report["ratios"]["logprob_gap"] < 2e-5
    assert report["ratios"]["compiles_after_warmup"] == 0
    assert next(x["value"] for x in report["results"] if "in the warm-up" in x["name"]) > 0


def test_engines_of_their_own_processes_are_asked_and_their_busy_share_is_measured(run):
    report = run("engines.py", *SMALLEST["engines.py"])
    assert 0 < report["ratios"]["busy_share"] <= 1
    assert all(report["results"][name] > 0 for name in ("tokens_per_s", "own_tokens_per_s", "hand_over_s"))


@pytest.mark.slow
def test_two_processes_and_two_engines_play_episodes_and_say_how_busy_they_are(run):
    report = run("spread.py", *SMALLEST["spread.py"])
    assert all(0 < report["ratios"][f"busy_share_{name}"] <= 1 for name in ("processes", "engines"))


@pytest.mark.slow
def test_a_run_whose_processes_are_killed_has_the_numbers_of_one_that_is_left_alone(run):
    report = run("chaos.py", *SMALLEST["chaos.py"])
    ratios = report["ratios"]
    assert all(ratios[f"answers_{part}_equal"] == 1 for part in ("metrics", "rollouts", "weights"))
    assert 0 <= ratios["answers_judged_again_over_under_way"] <= 1
    kills = [line["value"] for line in report["results"] if ": kills of the kind " in line["name"]]
    assert sum(kills) == 4


def test_programs_are_measured_by_compilation_alone(run):
    report = run("compiled.py", *SMALLEST["compiled.py"])
    assert report["benchmark"] == "compiled" and not report["missing"]
    assert 0 < report["ratios"]["decode_bound_0p6b"] < 1
    assert report["ratios"]["predicted_over_compiled"] > 0


def test_what_an_accelerator_shows_is_shown_of_a_cpu_in_small_form(run):
    (line,) = run("accelerator.py", *SMALLEST["accelerator.py"])["lengths"]
    assert line["length"] == 1024 and max(line["gap_out_dq_dk_dv"]) < 0.1
    assert line["seconds"] > 0 and line["flops"] > 0
    seen = run("accelerator.py", "--step=memory")
    assert seen["compiled_bytes"] > 0 and seen["length"] == 1024


def test_a_step_of_an_accelerator_that_fails_costs_only_itself(run, tmp_path, monkeypatch):
    run("accelerator.py", "--step=device")
    module = sys.modules["benchmark_accelerator"]
    monkeypatch.setattr(module, "LEAST_SECONDS", 1)
    writes = "import json, sys; json.dump({'rates': {'matmul_gflops': 2.0}}, open(sys.argv[1], 'w'))"
    done = module.run(module.Step("device", 1, ("-c", writes, "{json}"), 60), 60, 3)
    failed = module.run(module.Step("kernels", 1, ("-c", "raise SystemExit('no kernels here')"), 60), 60, 3)
    late = module.run(module.Step("loop", 1, ("-c", "pass"), 60), 0.5, 3)
    assert (done["status"], failed["status"], late["status"]) == ("done", "failed", "no time")
    assert done["result"] == {"rates": {"matmul_gflops": 2.0}} and failed["said"] == "no kernels here"

    # What a step has started would hold the device's memory in the next one.
    pid = tmp_path / "pid"
    starts = "import subprocess, sys; child = subprocess.Popen(['sleep', '600']); print('begun', flush=True)"
    waits = f"{starts}; open(sys.argv[1], 'w').write(str(child.pid)); child.wait()"
    hung = module.run(module.Step("rollout", 1, ("-c", waits, str(pid)), 3), 60, 3)
    assert (hung["status"], hung["said"].split("\n")[0]) == ("failed", "begun")
    wait_until(lambda: not alive(int(pid.read_text())))

    line = {"rows": 1, "length": 8, "flops": 4e9, "seconds": 4.0, "xla_seconds": 8.0}
    lines = module.table({"device": done, "kernels": {"result": {"lengths": [line]}}, "loop": late})
    assert [(x["bound"], x["measured"], x["share"]) for x in lines] == [(2.0, 4.0, 0.5), (2.0, 8.0, 0.25)]


def test_the_benchmark_of_the_sandbox_finds_no_leak(run):
    if not can_isolate():
        pytest.skip("no isolation of programs on this machine")
    report = run("agents.py", *SMALLEST["agents.py"])
    assert report["ratios"]["sandbox_leaks"] == 0 and report["ratios"]["sandbox_attacks"] == 2


def test_configs_of_papers_are_measured_into_a_table(run, tmp_path, capsys):
    run("papers.py", *SMALLEST["papers.py"], f"--workdir={tmp_path}", json_flag=None)
    assert "| [GRPO](#grpo) | " in capsys.readouterr().out
    (line,) = (tmp_path / "smoke" / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["config"] == "grpo"


@pytest.mark.slow
def test_pytorch_does_the_same_step(run):
    """The rival that runs in this environment, where it has torch; the others need environments of their own."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("this environment has no torch")
    report = run("train_step.py", "--preset=smoke", "--rivals=hf_here")
    steps = {(line["who"], line["name"]): line for line in report["results"]}
    assert set(steps) == {
        ("rljax", "step"),
        ("rljax", "group_step"),
        ("hf_here", "step"),
        ("hf_here", "step_all_logits"),
    }
    for line in steps.values():
        assert line["loss"] == pytest.approx(steps["rljax", "step"]["loss"], rel=1e-3, abs=1e-6)
        assert line["grad_norm"] == pytest.approx(steps["rljax", "step"]["grad_norm"], rel=1e-3)
