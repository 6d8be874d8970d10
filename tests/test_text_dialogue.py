"""What stands behind a sampled turn is what the chat template would put there, without touching the turn."""

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from rljax.text import CharTokenizer, Dialogue, HuggingFaceTokenizer

KEEPS = (
    "{% if tools %}<|im_start|> tools {{ tools[0].name }} <|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> nl {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
WORDS = [
    "<|im_start|>",
    "<|im_end|>",
    "nl",
    "user",
    "assistant",
    "tool",
    "tools",
    "add",
    "x",
    "y",
    "how",
    "old",
    "1901",
    "plus",
    "two",
    "is",
]


def make_tokenizer(template=KEEPS) -> HuggingFaceTokenizer:
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "?"])}, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"], "unk_token": "?"}
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)
    hf.chat_template = template
    return HuggingFaceTokenizer(hf)


@pytest.mark.parametrize("is_closed", [True, False])
def test_an_observation_is_what_the_template_puts_behind_a_turn(is_closed):
    tokenizer = make_tokenizer()
    dialogue = Dialogue(tokenizer)
    messages = [{"role": "user", "content": "how old"}]
    turn = tokenizer.encode("plus two")
    said = [*turn, tokenizer.eos_id] if is_closed else turn
    ids = dialogue.opening(messages) + said + dialogue.observation("is 1901", is_chat=True, is_closed=is_closed)
    messages += [{"role": "assistant", "content": "plus two"}, {"role": "tool", "content": "is 1901"}]
    assert ids == tokenizer.apply_chat_template(messages)
    assert dialogue.action(said) == "plus two"


def test_tools_of_a_message_are_shown_to_the_template():
    tokenizer = make_tokenizer()
    message = {"role": "user", "content": "how old"}
    with_tools = Dialogue(tokenizer).opening([{**message, "tools": [{"name": "add"}]}])
    assert with_tools == tokenizer.encode("<|im_start|> tools add <|im_end|>") + tokenizer.apply_chat_template(
        [message]
    )


def test_behind_plain_text_an_observation_is_wrapped():
    tokenizer = CharTokenizer("abcd()")
    dialogue = Dialogue(tokenizer, wrap=("(", ")"))
    assert not dialogue.is_chat("ab") and dialogue.is_chat([{"role": "user", "content": "ab"}])
    assert tokenizer.decode(dialogue.observation("cd", is_chat=False, is_closed=True)) == "(cd)"


def test_a_template_that_rewrites_the_turn_before_is_refused():
    rewrites = "{% for m in messages %}{{ m.content }} {% endfor %}{% if messages|length > 2 %}x{% endif %}"
    first = "{% if messages|length > 2 %}tool {% endif %}" + rewrites
    with pytest.raises(ValueError, match="does not append a message of role 'tool'"):
        Dialogue(make_tokenizer(first)).observation("x", is_chat=True, is_closed=True)
