"""What a model says beside its weights, such as what ends a text, survives a run and both ways of exporting it."""

import json
import types
from unittest import mock

import jax
import numpy as np
import pytest

from rljax.experiment import Config, PretrainedModel, convert, model, train
from rljax.experiment.build import Run
from rljax.models import (
    DecoderConfig,
    Metadata,
    config_to_hf,
    init_params,
    load_model,
    read_metadata,
    save_hf,
    written_metadata,
)
from rljax.text import HuggingFaceTokenizer, load_tokenizer
from rljax.training import RunFolder

TINY = DecoderConfig(
    vocab_size=62, num_layers=3, embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=40, max_position=64
)
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"
GENERATION = {
    "bos_token_id": 1,
    "eos_token_id": [2, 17],
    "pad_token_id": 3,
    "temperature": 0.7,
    "top_p": 0.8,
    "transformers_version": "4.37.0",
}
HF = {"eos_token_id": 2, "bos_token_id": 1, "attention_dropout": 0.1}


def tokenizer_of_own():
    """Letters, and the special tokens <pad>, <s>, <|im_end|>, <|eot|> as 3, 1, 2, 17."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    names = {1: "<s>", 2: "<|im_end|>", 3: "<pad>", 17: "<|eot|>"}
    tokens = [names.get(i, chr(ord("0") + i)) for i in range(62)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names.values()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Hugging Face folder with a list of end tokens and settings of sampling."""
    folder = tmp_path_factory.mktemp("source")
    save_hf(folder, TINY, init_params(TINY, jax.random.key(1)), hf_config=HF)
    tokenizer_of_own().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def run_folder(source, folder):
    """A run folder of the model `source`, its checkpoint apart."""
    model = PretrainedModel(path=str(source))
    tokenizer = model.tokenizer_of()
    run = mock.Mock(spec=Run)  # neither data nor an actor is of use here
    run.tokenizer = tokenizer
    run.decoder = model.decoder_of(tokenizer)
    run.config = Config(model=model)
    opened = RunFolder(folder, config={})
    with opened:
        (opened.path / "model").mkdir(parents=True)
        (opened.path / "model" / "char_tokenizer.json").write_text("{}")  # of a run that was here before
        train.save_description(run, opened)
    return folder


def check(folder):
    """The folder says what the source says, to us and to transformers."""
    import transformers

    said = read_metadata(folder)
    assert said.generation == GENERATION
    assert {key: said.config[key] for key in HF} == HF
    ours = load_tokenizer(folder)
    assert ours.stop_ids[:2] == (2, 17)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.adds_bos) == (1, 2, 3, True)
    assert ours.hf.chat_template == TEMPLATE

    theirs = transformers.GenerationConfig.from_pretrained(folder)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == ([2, 17], 1, 3)
    assert (theirs.temperature, theirs.top_p) == (0.7, 0.8)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    messages = [{"role": "user", "content": "AB"}]
    assert tokenizer.apply_chat_template(messages, return_dict=False) == ours.apply_chat_template(messages, False)


def test_a_run_folder_and_its_export_say_what_the_source_says(source, tmp_path, monkeypatch):
    run = run_folder(source, tmp_path / "run")
    assert sorted(file.name for file in (run / "model").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    check(run / "model")

    decoder, params = load_model(source)
    monkeypatch.setattr(model, "run_checkpoints", lambda folder: folder)
    monkeypatch.setattr(model, "restore_params", lambda folder, like, step, **how: (params, 1))
    exported = convert.convert(str(run), str(tmp_path / "hf"))
    check(exported)
    assert load_model(exported)[0] == decoder

    # And an export of an export, straight from a folder.
    check(convert.convert(str(exported), str(tmp_path / "again")))


def test_an_export_of_a_source_that_says_nothing_ends_where_sampling_does(tmp_path):
    """As a GGUF file: there are only the tokenizer's own ids."""
    tokenizer = HuggingFaceTokenizer(tokenizer_of_own(), stop_ids=[17])
    written = written_metadata(TINY, Metadata({}, {}), tokenizer)
    assert written.generation == {"eos_token_id": list(tokenizer.stop_ids), "bos_token_id": 1, "pad_token_id": 3}
    assert written.config == config_to_hf(TINY) | written.generation
    # A tokenizer that is saved alone keeps them too.
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).stop_ids == tokenizer.stop_ids == (2, 17)


def test_a_source_with_fewer_end_tokens_than_sampling_gets_the_others_behind_them():
    tokenizer = types.SimpleNamespace(stop_ids=(2, 17, 5), bos_id=None, pad_id=2)
    written = written_metadata(TINY, Metadata({"eos_token_id": 17, "quantization_config": {}}, {}), tokenizer)
    assert written.generation == {"eos_token_id": [17, 2, 5], "pad_token_id": 2}
    assert written.config["eos_token_id"] == 17
    assert "quantization_config" not in written.config
    # Else transformers would take what ends a text from config.json.
    written = written_metadata(TINY, Metadata({}, {"_from_model_config": True, "eos_token_id": 4}), None)
    assert written.generation == {"eos_token_id": 4}


def test_generate_of_an_export_ends_at_the_second_end_token(source, tmp_path):
    torch = pytest.importorskip("torch", reason="generate needs torch")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    ids = torch.tensor([[1, 20, 30]])
    emitted = int(model(ids).logits[0, -1].argmax())
    said = read_metadata(source)
    (tmp_path / "source").mkdir()
    for file in source.iterdir():
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    generation = said.generation | {"eos_token_id": [2, emitted]}
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(generation))

    exported = convert.convert(str(tmp_path / "source"), str(tmp_path / "hf"))
    exported_model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    out = exported_model.generate(ids, do_sample=False, max_new_tokens=8, attention_mask=torch.ones_like(ids))
    assert np.asarray(out).tolist() == [[1, 20, 30, emitted]]
