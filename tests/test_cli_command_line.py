"""What the commands say: each mistake is one line with the value and the remedy, before a device is touched."""

import errno
import importlib
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from absl import logging
from absl.testing import flagsaver

from rljax.cli import command_line as cli
from rljax.cli.main import COMMANDS, main
from rljax.sampling import compile_count

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
CONFIG = """
from rljax.experiment import FileData, PretrainedModel, RewardConfig, SingleTurn
from rljax.testing import tiny_config

def get_config(kind="tiny"):
    if kind == "tiny":
        return tiny_config()
    if kind == "data":
        return tiny_config(data=FileData(train="{folder}/none.jsonl"))
    return tiny_config(model=PretrainedModel(path="{folder}/none", tokenizer="smollm2"),
                       data=FileData(train="{folder}/none.jsonl"))
"""


@pytest.fixture(scope="module")
def script():
    """(rljax.cli.command_line, rljax.cli.train), the flags of which are taken away again afterwards."""
    with flagsaver.flagsaver():
        yield cli, importlib.import_module("rljax.cli.train")
    del sys.modules["rljax.cli.train"]


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(CONFIG.format(folder=tmp_path))
    return file


@pytest.fixture
def mistake(script, capsys, tmp_path, config_file, monkeypatch):
    """Runs `rljax train` with arguments that must fail, and returns what it says."""
    cli, train = script
    verbosity = logging.get_verbosity()

    def run(*arguments, kind="tiny", workdir=True):
        if not any(argument.startswith("--config=") for argument in arguments):
            arguments = (f"--config={config_file}:{kind}", *arguments)
        if workdir:
            arguments = (*arguments, f"--workdir={tmp_path / 'run'}")
        compiled = compile_count()
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])  # where config overrides are read from
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
            cli._parse(["train.py", *arguments], train)
            cli._run(train.main)
        assert stop.value.code == 2
        assert compile_count() == compiled, "a device did work"
        assert not (tmp_path / "run").exists(), "a run folder was made"
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        rest = [line for line in said.splitlines() if line and not line.startswith(("error: ", "(RLJAX_TRACEBACK"))]
        assert len(lines) == 1 and not rest, said
        return lines[0]

    yield run
    logging.set_verbosity(verbosity)


MISTAKES = {
    "a simulation without costs": (
        ["--dry_run", "--simulate"],
        r"--simulate lacks the costs of a step: add --topology",
    ),
    "a simulation of a training run": (["--simulate"], r"--simulate belongs to a plan"),
    "what is measured for no simulation": (["--dry_run", "--measured=runs/x"], r"add --simulate"),
    "a measured run that is none": (["--dry_run", "--simulate", "--measured=runs/none"], r"has no metrics\.jsonl"),
    "an assumption that is no number": (
        ["--dry_run", "--simulate", "--assume=step_s=fast", "--assume=update_s=1"],
        r"--assume=step_s=fast must be a finite number",
    ),
    "an assumption about nothing": (
        ["--dry_run", "--simulate", "--assume=stepp_s=1", "--assume=step_s=1", "--assume=update_s=1"],
        r"--assume=stepp_s=1: no such number; did you mean step_s\?",
    ),
    "an assumption without a value": (["--dry_run", "--simulate", "--assume=devices"], r"must be field=value"),
    "an assumption out of range": (
        ["--dry_run", "--simulate", "--assume=step_s=1", "--assume=update_s=1", "--assume=devices_per_host=0"],
        r"--assume=devices_per_host=0 must be at least 1",
    ),
    "a misspelt field": (["--config.stepz=3"], r"--config\.stepz.*did you mean config\.steps\?"),
    "a misspelt field of a part": (
        ["--config.optimizer.learning_rat=1"],
        r"did you mean config\.optimizer\.learning_rate\?.*weight_decay",
    ),
    "a part instead of a field": (["--config.mesh=8"], r"--config\.mesh is a part.*data, fsdp, tensor"),
    "a field of a number": (["--config.steps.more=8"], r"config\.steps is a int, not a part"),
    "a wrong type": (["--config.steps=many"], r"config\.steps.*many"),
    "a group of one": (["--config.algorithm.group_size=1"], r"group_size=1.*at least 2"),
    "a negative clip": (["--config.algorithm.clip_low=-1"], r"clip_low=-1"),
    "a mesh of other devices": (["--config.mesh.data=3", "--config.mesh.fsdp=5"], r"data=3 x fsdp=5.*devices here.*-1"),
    "two open axes": (["--config.mesh.data=-1"], r"at most one may be -1"),
    "minibatches that do not divide": (
        ["--config.update.minibatches=3"],
        r"prompts_per_step=4.*minibatches=3.*divisor",
    ),
    "no steps": (["--config.steps=0"], r"config\.steps=0 must be at least 1"),
    "greedy training": (["--config.sampling.temperature=0.0"], r"temperature=0.*above 0"),
    "buckets out of order": (["--config.actor.prompt_buckets=(8, 4)"], r"prompt_buckets=\(8, 4\).*increasing"),
    "a prompt beyond the buckets": (
        ["--config.actor.prompt_buckets=(2,)"],
        r"more than 2 tokens: .* has 3, .*a bucket of at least 3.*\(2,\)",
    ),
    "a pack too short": (
        ["--config.update.pack_length=6", "--config.update.length_buckets=(6,)"],
        r"pack_length=6.*raise it to at least 7",
    ),
    "a model too short": (
        ["--config.model.max_position=6"],
        r"more than 2 tokens: .*the model's 6 positions must hold a prompt and .*max_new_tokens=4, so lower that.*drop",
    ),
    "too short with all dropped": (
        ["--config.actor.prompt_buckets=(2,)", "--config.actor.drop_long_prompts=True"],
        r"none would be left to train on; add a bucket of at least 3 to config\.actor\.prompt_buckets=\(2,\)$",
    ),
    "none of the choices": (
        ["--config.optimizer.schedule=foo"],
        r"config\.optimizer\.schedule='foo' must be one of 'constant', 'linear', 'cosine'",
    ),
    "no type of weights": (["--config.model.dtype=float16"], r"dtype='float16' must be one of 'float32', 'bfloat16'"),
    "heads that do not divide": (["--config.model.num_kv_heads=3"], r"config\.model\.num_heads=4 must be a multiple"),
    "an alphabet that repeats": (["--config.model.alphabet=aab"], r"config\.model\.alphabet='aab' must hold each"),
    "an empty stop string": (
        ["--config.sampling.stop_strings=('',)"],
        r"stop_strings, or the stops of a request, hold an empty text",
    ),
    "a part that has moved": (
        ["--config.environment.make=x:y"],
        r"config\.environment is config\.actor=MultiTurn\(\.\.\.\).*now",
    ),
    "an option that has another name": (
        ["--config.actor.processes=True"],
        "--config.actor.processes: no such field; config.actor.processes is config.actor.hosts='processes' now",
    ),
    "a field that has moved": (
        ["--config.sampling.prompt_buckets=(8,)"],
        r"config\.sampling\.prompt_buckets is config\.actor\.prompt_buckets now",
    ),
    "a function": (
        ["--config.warmup.demonstrations=mine"],
        r"--config\.warmup\.demonstrations is a function, which no flag can write; set it in a config file",
    ),
    "an unknown config file": (["--config=nothing"], r"=nothing is neither a file nor a config .*: .*quickstart"),
    "no name of a config": (["--config="], r"--config= is neither a file nor a config"),
    "a folder as config": (["--config=."], r"--config=\. is neither a file nor a config"),
    "a config that is no Python": (["--config=README.md"], r"--config=README\.md is no Python file; .*\.py"),
    "a stray argument": (["stray"], r"unexpected arguments \['stray'\].*--name=value"),
    "an unknown flag": (["--work_dir=x"], r"work_dir"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_names_value_and_remedy(name, mistake, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments, says = MISTAKES[name]
    line = mistake(*arguments)
    assert re.search(says, line), line


def test_a_run_without_a_folder_is_refused(mistake):
    assert re.search(r"--workdir is missing.*--workdir=", mistake(workdir=False))


def test_what_is_not_on_disk_is_named(mistake, tmp_path):
    line = mistake(kind="files")
    assert str(tmp_path / "none") in line


def test_a_model_that_does_not_exist_is_named(mistake, tmp_path, config_file):
    config_file.write_text(
        config_file.read_text().replace(
            f'FileData(train="{tmp_path}/none.jsonl")', "__import__('rljax').testing.EchoData()"
        )
    )
    line = mistake(kind="files")
    assert re.search(rf"{tmp_path}/none.*(folder|exist)", line)


def test_a_data_file_that_does_not_exist_is_named(mistake, tmp_path):
    assert f"{tmp_path}/none.jsonl" in mistake(kind="data")


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ("no_such_module:correct", r"no_such_module"),
        ("rljax.testing:no_such_reward", r"no_such_reward"),
        ("rljax.testing", r"rljax\.testing.*module:"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_named(reward, says, mistake, config_file):
    text = config_file.read_text().replace(
        "tiny_config()", f"tiny_config(actor=SingleTurn(rewards=(RewardConfig({reward!r}),)))"
    )
    config_file.write_text(text)
    assert re.search(says, mistake())


def test_a_reward_that_wants_a_missing_column_is_named(mistake, config_file, tmp_path, monkeypatch):
    (tmp_path / "wants_more.py").write_text("def reward(completion, solution):\n    return 0.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = config_file.read_text().replace(
        "tiny_config()", "tiny_config(actor=SingleTurn(rewards=(RewardConfig('wants_more:reward'),)))"
    )
    config_file.write_text(text)
    assert re.search(r"solution.*answer", mistake())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("from rljax.config import Config", r"rljax\.config.*is rljax\.experiment now"),
        (
            "from rljax.experiment import Config\ndef get_config():\n    return Config(environment=1)",
            r"'environment'; config\.environment is config\.actor=MultiTurn",
        ),
        (
            "from rljax.experiment import UpdateConfig\ndef get_config():\n    return UpdateConfig(packed_rows=1)",
            r"config\.update\.packed_rows is config\.update\.microbatch_size now",
        ),
        ("def get_config():\n    return 1 / 0", r"cannot be loaded: ZeroDivisionError: division by zero"),
        ("def get_config():\n    return {'steps': 1}", r"get_config\(\) returns a dict; it must return an .*Config"),
    ],
)
def test_a_config_file_that_cannot_be_loaded_says_why(text, says, mistake, config_file):
    config_file.write_text(text)
    line = mistake(f"--config={config_file}")
    assert re.search(says, line), line


def test_a_config_after_a_space_is_checked_like_one_after_an_equals_sign(script, capsys, config_file, monkeypatch):
    cli, train = script
    arguments = ["train.py", "--config", str(config_file), "--config.stepz=3"]
    monkeypatch.setattr(sys, "argv", arguments)
    with flagsaver.flagsaver(), pytest.raises(SystemExit):
        cli._parse(arguments, train)
    assert re.search(r"--config\.stepz.*did you mean config\.steps\?", capsys.readouterr().err)


@pytest.mark.parametrize("kind", ["rljax.experiment.train:RunFailed", "rljax.experiment:WorkersFailed"])
def test_a_run_that_cannot_go_on_ends_in_one_line_with_status_1(script, capsys, kind):
    module, name = kind.split(":")

    def fails():
        raise getattr(importlib.import_module(module), name)("5 steps in a row had nothing to learn from")

    cli, _ = script
    with pytest.raises(SystemExit) as stop:
        cli._run(fails)
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and said[0] == "error: 5 steps in a row had nothing to learn from" and len(said) == 2


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/runs/x/metrics.jsonl"),
        ValueError('RESOURCE_EXHAUSTED: Error writing "/runs/x/metrics.jsonl"\n[No space left on device]\n' * 99),
        OSError(errno.EDQUOT, "Disk quota exceeded", "/runs/x/metrics.jsonl"),
    ],
    ids=["a file", "a checkpoint", "a quota"],
)
def test_a_full_disk_ends_in_one_line_with_status_1(script, capsys, error):
    def fails():
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("a thread that writes has failed") from cause

    cli, _ = script
    with pytest.raises(SystemExit) as stop:
        cli._run(fails)
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and len(said) == 2
    assert said[0].startswith("error: /runs/x/metrics.jsonl: ") and "make room" in said[0]


def run_script(*arguments):
    environment = dict(os.environ, JAX_PLATFORMS="cpu", RLJAX_ALLOCATOR="system", PYTHONPATH=str(ROOT))
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        cwd=ROOT,
    )


def test_help_shows_flags_and_what_each_field_of_the_config_is(config_file):
    done = run_script(f"--config={config_file}", "--config.seed=7", "--help")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert "--config" in done.stdout and "--workdir" in done.stdout and "--[no]dry_run" in done.stdout
    assert "  --config.seed: 7\n    Enters every random number" in done.stdout
    assert "  --config.update.pack_length: 64\n" in done.stdout


def test_a_mistake_in_a_process_of_its_own_ends_with_status_2(config_file, tmp_path):
    done = run_script(f"--config={config_file}", f"--workdir={tmp_path / 'run'}", "--config.algorithm.group_size=1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "group_size=1" in done.stderr and "Traceback" not in done.stderr


def test_every_word_of_the_command_has_a_module_and_a_file_to_run_from_a_clone():
    for word, command in COMMANDS.items():
        assert (ROOT / "rljax" / "cli" / f"{command.module}.py").is_file(), word
        assert f'    run("{word}")\n' in (LAUNCH / f"{command.module}.py").read_text() or word == "plan"
        for module in command.words.values():
            assert (ROOT / "rljax" / "cli" / f"{module}.py").is_file(), word


@pytest.mark.parametrize("word", ["train", "view", "study"])
def test_a_python_without_packages_is_told_what_it_lacks_and_how_to_get_it(word):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    bare = [sys.executable, "-S", str(LAUNCH / f"{word}.py"), "--help"]  # -S: no packages but Python's own
    done = subprocess.run(bare, capture_output=True, text=True, env=environment, cwd=ROOT.parent, timeout=60)
    assert done.returncode == 2 and not done.stdout
    lacks, remedy = done.stderr.splitlines()
    packages = "absl, ml_collections" if word == "view" else "jax, flax, optax, orbax and 16 more packages"
    assert lacks == f"error: {sys.executable} lacks {packages}"
    assert f"{ROOT}/.venv/bin/python" in remedy and remedy.endswith(f"{sys.executable} -m pip install -e {ROOT}")


def test_what_a_command_looks_for_first_is_what_rljax_depends_on():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = [re.match(r"[\w-]+", dependency)[0].replace("-", "_") for dependency in dependencies]
    modules = {"absl_py": "absl", "orbax_checkpoint": "orbax"}
    assert sorted(COMMANDS["train"].packages) == sorted(modules.get(name, name) for name in names)


def test_who_stops_reading_the_output_sees_no_traceback():
    code = "from rljax.cli.main import main; import sys; sys.argv = ['rljax', 'view', '--help']; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_command_alone_lists_its_words(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rljax", *arguments])
    main()
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if line.startswith("  ")] == list(COMMANDS)


def test_a_word_that_is_none_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rljax", "trian"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: rljax has no command 'trian'; commands: {', '.join(COMMANDS)}\n"


def test_a_second_word_that_is_none_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rljax", "study", "stvv", "--seeds=1"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    words = ", ".join(COMMANDS["study"].words)
    assert words.startswith("surgery, stv, ")
    assert capsys.readouterr().err == f"error: rljax study has no 'stvv'; it has {words}\n"


def test_a_config_is_a_file_or_the_name_of_one_that_comes_with_rljax(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = ROOT / "configs"
    assert cli.find_config("quickstart_tiny") == cli.find_config("quickstart_tiny.py") == configs / "quickstart_tiny.py"
    assert cli.find_config("papers/grpo") == configs / "papers" / "grpo.py"
    assert not cli.find_config("papers/none").exists()
    (tmp_path / "quickstart_tiny.py").touch()
    assert cli.find_config("quickstart_tiny.py") == Path("quickstart_tiny.py")  # what lies here goes first

    argv, name = cli._with_config_file(["train", "--seed=1", "--config", "papers/grpo:smoke", "--fresh"])
    assert name == "papers/grpo:smoke"
    assert argv == ["train", "--seed=1", f"--config={configs}/papers/grpo.py:smoke", "--fresh"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(config_file, tmp_path):
    done = run_script(f"--config={config_file}", "--dry_run", f"--workdir={tmp_path / 'run'}", "--config.mesh.fsdp=1")
    assert done.returncode == 0, done.stderr[-2000:]
    for word in ("parameters", "new tokens", "buckets", "mesh", "packed [M, R, S] = [", "KV cache", "it fits"):
        assert word in done.stdout, (word, done.stdout)
    assert not (tmp_path / "run").exists()
