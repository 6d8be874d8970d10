"""Data sets as `datasets` reads them: a local folder of Parquet files, and a stub of the hub on loopback."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
from hub_stub import serving

from rljax.tasks import Dataset, DataSource, HubData

ASKED = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
ROWS = [
    {"question": f"q{i}", "messages": ASKED, "reward_model": {"truth": str(i)}, "answer": f"because {i}"}
    for i in range(6)
]


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The package, which keeps nothing outside the test's folder."""
    datasets = pytest.importorskip("datasets", reason="needs rljax-lm[hub]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def parquet(rows):
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path, datasets):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "train.parquet").write_bytes(parquet(ROWS))
    (folder / "test.parquet").write_bytes(parquet(ROWS[:2]))
    return str(folder)


def test_a_folder_gives_its_splits_with_columns_under_new_names(folder):
    source = HubData(path=folder, test_split="test", prompt_column="question", columns={"answer": "reward_model.truth"})
    data = source.load()
    assert isinstance(source, DataSource) and isinstance(data, Dataset)
    assert [e.prompt for e in data.test] == ["q0", "q1"]
    # What is held out does not train, in whatever split it stands too.
    assert [e.prompt for e in data.train] == ["q2", "q3", "q4", "q5"]
    assert [e.columns["answer"] for e in data.train] == ["2", "3", "4", "5"]
    assert data.train[0].place == f"{folder}, split train, row 3"


@pytest.mark.parametrize("max_rows", [0, 4])
def test_the_first_rows_alone_are_the_same_rows(folder, max_rows):
    """In the same order with the same ids, so that a resumed run draws what it would have drawn."""
    made = [HubData(path=folder, prompt_column="question", test_fraction=0.0, max_rows=max_rows).load() for _ in "ab"]
    assert [e.id for e in made[0].train] == [e.id for e in made[1].train]
    assert [e.prompt for e in made[0].train] == [f"q{i}" for i in range(max_rows or 6)]
    whole = HubData(path=folder, prompt_column="question", test_fraction=0.0).load()
    assert [e.id for e in made[0].train] == [e.id for e in whole.train][: max_rows or 6]


def test_conversations_are_asked_without_their_answer(folder):
    """As supervised training wants them."""
    source = HubData(path=folder, prompt_column="messages", test_fraction=0.0, repeated_prompts=True)
    for example in source.load().train:
        assert (example.prompt, example.columns["completion"]) == (ASKED[:1], "2")


def test_what_cannot_be_read_is_one_line(folder, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.parquet").write_bytes(parquet([ROWS[0], {**ROWS[1], "question": " "}]))
    (tmp_path / "empty").mkdir()
    for change, message in (
        ({"split": "dev"}, r"split dev\) cannot be read: Unknown split \"dev\".*'train'.*give an id of the hub"),
        ({"split": "dev", "max_rows": 2}, r"cannot be read: Bad split: dev. Available splits: .*'train'"),
        ({"subset": "main"}, r"subset main, .*cannot be read: BuilderConfig 'main' not found"),
        ({"path": str(tmp_path / "empty")}, r"in the folder .*cannot be read: .*doesn't contain any data files"),
        ({"path": str(tmp_path / "bad")}, r"bad, split train, row 2: 'question' is ' '; it must be non-empty text"),
        ({"prompt_column": "ask"}, r"own, split train, row 1: no column 'ask' among \['answer', 'messages'"),
        ({"columns": {"a": "reward_model.x"}}, r"row 1: no column 'reward_model\.x', since 'x' is not among \['truth'"),
        ({"columns": {"a": "answer.x"}}, r"row 1: no column 'answer\.x', since 'x' is not among 'because 0', which is"),
    ):
        source = HubData(**{"path": folder, "prompt_column": "question", "test_fraction": 0.0, **change})
        with pytest.raises(ValueError, match=message) as error:
            source.load()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (HubData(), r"config\.data\.path is empty"),
        (HubData(path="a/b", split=""), r"config\.data\.split is empty"),
        (HubData(path="a/b", max_rows=-1), r"config\.data\.max_rows=-1"),
        (HubData(path="a/b", test_fraction=1.0), r"config\.data\.test_fraction=1\.0"),
        (HubData(path=".", revision="v1"), r"config\.data\.revision='v1' has no effect: '\.' is a local folder"),
    ],
)
def test_a_field_that_is_wrong_by_itself_is_refused(part, message):
    with pytest.raises(ValueError, match=message):
        part.check()


def test_without_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ImportError, match=re.escape("reading data of the hub needs datasets: pip install 'rljax-lm[hub]'")
    ):
        HubData(path="user/sums").load()


READ = """
import json, sys
from rljax.tasks import HubData

source = HubData(path="user/sums", revision="v1", prompt_column="question", test_fraction=0.0)
for source.max_rows in (0, 2):
    train = source.load().train
    print(json.dumps([[example.prompt for example in train], train[1].place]))
try:
    HubData(path="user/none").load()
except ValueError as error:
    print(json.dumps(str(error)))
"""


def test_a_data_set_of_the_hub_is_read_at_its_revision(datasets, tmp_path):
    """In a process of its own, since clients read the hub's address when they are imported."""
    with serving(name="user/sums", files={"data/train-00000-of-00001.parquet": parquet(ROWS)}) as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            # Downloads are counted at another address.
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        done = subprocess.run(
            [sys.executable, "-c", READ], env=environment, capture_output=True, text=True, timeout=600
        )
    assert done.returncode == 0, (hub.asked, done.stderr[-2000:])

    whole, first, refused = map(json.loads, done.stdout.splitlines())
    assert whole == [[f"q{i}" for i in range(6)], "user/sums, split train, row 2"]
    assert first == [["q0", "q1"], "user/sums, split train, row 2"]
    assert any("/resolve/v1/" in line or "/revision/v1" in line for line in hub.asked)
    assert re.match(r"the data set 'user/none' on the hub .*cannot be read: .*doesn't exist", refused)
