"""Names of folders and files that will be written to are looked at before long work."""

import pytest

from rljax.experiment import Config, WarmupConfig
from rljax.experiment.convert import convert
from rljax.experiment.fine_tune import fine_tune
from rljax.experiment.train import train
from rljax.training import as_path, writable, writable_file


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"file cannot be made, for .*file is a file; name another"):
        writable(file)
    with pytest.raises(ValueError, match=r"below/it cannot be made, for .*/file is a file"):
        writable(file / "below" / "it")
    # Nobody may make a folder there, not even root.
    with pytest.raises(ValueError, match=r"/proc/x cannot be written to \(.+: /proc\); name another"):
        writable("/proc/x")
    with pytest.raises(ValueError, match="the name of a folder is empty"):
        writable("")


def test_a_folder_that_can_be_is_not_made_yet(tmp_path):
    assert writable(tmp_path / "a" / "b") == as_path(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("begin", [train, fine_tune])
def test_a_run_is_not_built_for_a_folder_that_cannot_be(begin, tmp_path):
    (tmp_path / "file").write_text("")
    # The config would be refused next: it has no data.
    config = Config(warmup=WarmupConfig(steps=1))
    for folder in (str(tmp_path / "file"), ""):
        with pytest.raises(ValueError, match=r"folder .*(cannot be made|is empty)"):
            begin(config, folder)


def test_a_file_is_written_into_a_folder(tmp_path):
    assert writable_file(str(tmp_path / "x.json"), "json") == tmp_path / "x.json"
    with pytest.raises(ValueError, match=r"--json=.*: there is no folder .*nowhere; make it"):
        writable_file(str(tmp_path / "nowhere" / "x.json"), "json")
    with pytest.raises(ValueError, match=r"--report=.* is a folder; name a file in it"):
        writable_file(str(tmp_path), "report")


def test_a_model_is_not_converted_into_an_address(tmp_path):
    with pytest.raises(ValueError, match=r"--target=gs://bucket/x is an address; name a local folder"):
        convert("smollm2", "gs://bucket/x")
