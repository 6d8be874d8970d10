"""Settings of chats reach the template, and one that could have no effect is refused by name."""

import dataclasses

import pytest

from rljax.envs import check_chat_template
from rljax.experiment import Config, FileData, MultiTurn, PretrainedModel
from rljax.experiment.prompts import check_chat_settings, describe_prompts
from rljax.tasks import Example
from rljax.tasks.config import FileRows
from rljax.text import CharTokenizer, HuggingFaceTokenizer, load_tokenizer, render_prompt, with_chat_settings

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
OWN = TURNS + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
THINKING = OWN + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + OWN
DEAF = "{% for m in messages if m.role != 'system' %}" + TURNS.partition("%}")[2]
# As Qwen3's does it: thinking before the last question is dropped.
DROPS = (
    "{% set last = (messages | selectattr('role', 'equalto', 'user') | list | last) %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.index0 < messages.index(last) %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(template: str | None) -> HuggingFaceTokenizer:
    """Bytes, and the marks of turns."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", clean_up_tokenization_spaces=False)
    hf.chat_template = template
    return HuggingFaceTokenizer(hf)


def text(tokenizer, prompt, chat=None):
    return tokenizer.hf.decode(render_prompt(tokenizer, prompt, chat))


def test_settings_reach_the_template_and_leave_the_given_tokenizer_alone():
    plain = tokenizer(THINKING)
    told = with_chat_settings(plain, system_prompt=" Be brief. ", template_kwargs={"enable_thinking": False})
    assert text(told, "hi", chat=True) == "<|system|> Be brief. <|end|><|user|>hi<|end|><|assistant|><think></think>"
    assert text(plain, "hi", chat=True) == "<|user|>hi<|end|><|assistant|>"
    assert text(told, "hi") == "hi"  # text as it is has no turns
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "hi"}]
    assert text(told, own) == "<|system|>Mine.<|end|><|user|>hi<|end|><|assistant|><think></think>"
    assert with_chat_settings(plain) is plain


def test_a_template_replaces_the_tokenizers_own_and_is_saved_with_it(tmp_path):
    told = with_chat_settings(tokenizer(None), chat_template=OWN)
    assert text(told, "hi", chat=True) == "<|user|>hi<|end|><|assistant|>"
    told.save(tmp_path)
    assert text(load_tokenizer(tmp_path), "hi", chat=True) == "<|user|>hi<|end|><|assistant|>"


def test_agents_refused_for_a_template_that_drops_thinking_have_a_remedy():
    with pytest.raises(
        ValueError, match=r"rewrites history: .*config\.model\.chat_template.*config\.model\.template_k"
    ):
        check_chat_template(tokenizer(DROPS))
    check_chat_template(with_chat_settings(tokenizer(DROPS), chat_template=OWN))
    check_chat_template(with_chat_settings(tokenizer(DROPS), chat_template=OWN, system_prompt="Use tools."))


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (OWN, {"template_kwargs": {"enable_thinking": False}}, "template_kwargs has 'enable_thinking', which the chat"),
        (None, {"system_prompt": "x"}, "system_prompt is set, but the tokenizer has no chat template; give one"),
        (NO_SYSTEM, {"system_prompt": "x"}, "system_prompt does not go with the chat template: .*no system role"),
        (DEAF, {"system_prompt": "Be brief."}, r"system_prompt='Be brief\.' is not in what the chat template writes"),
        (OWN, {"chat_template": "{% for m in"}, "chat_template does not go with the chat template: "),
        (
            OWN,
            {"chat_template": "{{ 1 + 'a' }}"},
            "chat_template does not go with the chat template: .*TypeError: ",
        ),
    ],
)
def test_a_setting_without_effect_is_refused_in_one_line(template, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        with_chat_settings(tokenizer(template), **settings)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_messages_takes_no_settings():
    with pytest.raises(ValueError, match="template_kwargs is set, but CharTokenizer takes no chat messages"):
        with_chat_settings(CharTokenizer("ab"), template_kwargs={"a": 1})


def test_the_models_config_offers_them_and_names_its_fields(tmp_path):
    tokenizer(THINKING).save(tmp_path)
    (tmp_path / "own.jinja").write_text("OWN " + OWN)
    model = PretrainedModel(path=str(tmp_path), chat_template=str(tmp_path / "own.jinja"), system_prompt="Be brief.")
    assert text(model.tokenizer_of(), "hi", chat=True).startswith("OWN <|system|>Be brief.<|end|>")
    for change, message in [
        (
            {"chat_template": str(tmp_path / "none.jinja")},
            r"config\.model\.chat_template='.*none\.jinja' cannot be read",
        ),
        ({"template_kwargs": {"thinking": 1}, "chat_template": ""}, r"config\.model\.template_kwargs has 'thinking'"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(model, **change).tokenizer_of()


def rows(*prompts):
    return FileRows([Example(id=i, prompt=prompt, columns={}) for i, prompt in enumerate(prompts)], [])


CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("config", "prompts", "template", "said"),
    [
        ({}, ["a"], None, "text as it is; the tokenizer has no chat template"),
        ({}, ["a"], OWN, "text as it is, though the tokenizer has a chat template; config.data.chat=True makes each"),
        ({"data": FileData(chat=True)}, ["a"], OWN, "text as a user message of the chat template"),
        ({}, [CHAT], OWN, "chat messages through the chat template"),
        ({}, [CHAT, "a"], OWN, "text as it is, chat messages (50%) through the chat template"),
        ({"actor": MultiTurn()}, ["a"], OWN, "opened by the environment or agent"),
        (
            {"data": FileData(chat=True), "model": PretrainedModel(system_prompt="Be brief.")},
            ["a"],
            OWN,
            "text as a user message of the chat template (config.data.chat=True), system_prompt='Be brief.'",
        ),
    ],
)
def test_a_run_says_what_stands_around_its_prompts(config, prompts, template, said):
    config = Config(**{"data": FileData(), **config})
    check_chat_settings(config, rows(*prompts))
    assert describe_prompts(config, rows(*prompts), tokenizer(template)).startswith(said)


@pytest.mark.parametrize("field", [{"system_prompt": "x"}, {"chat_template": "f"}, {"template_kwargs": {"a": 1}}])
def test_settings_of_chats_that_no_prompt_sees_are_refused(field):
    config = Config(data=FileData(), model=PretrainedModel(**field))
    with pytest.raises(
        ValueError, match=rf"config\.model\.{next(iter(field))} is set, but .*set config\.data\.chat=True"
    ):
        check_chat_settings(config, rows("a", "b"))
    check_chat_settings(config, rows("a", CHAT))
    check_chat_settings(dataclasses.replace(config, data=FileData(chat=True)), rows("a"))
