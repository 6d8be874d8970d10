"""`rljax convert --push`: a folder with its card arrives at the hub, of which a stub stands on loopback."""

import json

import pytest
import yaml
from hub_stub import serving
from huggingface_hub import constants, utils

from rljax.experiment import convert, hub
from rljax.experiment.config import Config, to_dict
from rljax.models import DecoderConfig, init_params, save_hf
from rljax.text import CharTokenizer
from rljax.training import as_json


@pytest.fixture
def site(monkeypatch):
    with serving() as site:
        monkeypatch.setattr(constants, "ENDPOINT", site.address)
        # The suite runs offline.
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        utils.disable_progress_bars()
        monkeypatch.setenv("HF_TOKEN", site.token)
        yield site


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    import jax

    tokenizer = CharTokenizer("ab")
    decoder = DecoderConfig(
        vocab_size=tokenizer.vocab_size, num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8
    )
    folder = tmp_path_factory.mktemp("source")
    save_hf(folder, decoder, init_params(decoder, jax.random.key(0)), tokenizer=tokenizer)
    return folder


def test_a_folder_is_sent_with_its_card(site, source, tmp_path, capsys):
    target = convert.convert(str(source), str(tmp_path / "hf"), push="user/tiny")
    assert f"sent to {site.address}/user/tiny/commit/" in capsys.readouterr().out
    # It is made before anything is read, and nobody sees it until its owner says so.
    assert [(name, asked["visibility"]) for name, asked in site.made] == [("user/tiny", "private")]
    assert site.sent == {file.name: file.read_bytes() for file in target.iterdir()}
    assert 'AutoModelForCausalLM.from_pretrained("user/tiny")' in site.sent["README.md"].decode()


def test_a_refusal_is_one_line_before_anything_is_converted(site, source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    for name, message in (
        ("user/tiny", r"^--push=user/tiny: the hub refuses .*401.*hf auth login.*HF_TOKEN"),
        ("tiny", r"^--push=tiny must have the form user/name"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            convert.convert(str(source), str(tmp_path / "hf"), push=name)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"^--push=user/tiny: the hub refuses or cannot be reached \(.*refused"):
        convert.convert(str(source), str(tmp_path / "hf"), push="user/tiny")
    assert not (tmp_path / "hf").exists() and not site.sent


def test_the_card_says_what_the_run_says(tmp_path):
    config = Config(steps=20, seed=3)
    config.model.path = "org/base-1B"
    (tmp_path / "config.json").write_text(json.dumps(as_json(to_dict(config))))
    summary = {"before": {"avg@4": 0.25, "greedy": 0.5}, "after": {"avg@4": 0.75, "greedy": 0.625, "length": 3.0}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))

    card = hub.model_card("user/tiny", tmp_path, dtype="bfloat16", adapter=False)
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "org/base-1B",
        "tags": ["rljax", "grpo"],
    }
    assert "| data | `ReasoningGymData` (`chain_sum`) |" in text and "| steps of the run | 20 |" in text
    assert "| avg@4 | 0.250 | 0.750 |\n| greedy | 0.500 | 0.625 |\n" in text and "length" not in text

    # An earlier checkpoint has other numbers, and a path of this machine is nobody else's.
    config.model.path = "/models/base"
    (tmp_path / "config.json").write_text(json.dumps(as_json(to_dict(config))))
    card = hub.model_card("user/tiny", tmp_path, dtype="bfloat16", adapter=True, base="/models/base", step=10)
    assert "avg@4" not in card and "/models" not in card and "| checkpoint | step 10 |" in card
    assert "library_name: peft" in card and 'AutoPeftModelForCausalLM.from_pretrained("user/tiny")' in card
