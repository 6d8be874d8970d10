"""Tool-call formats: what is read, what is a problem, and that nothing raises. Chat templates that rewrite history."""

import json
import pkgutil
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rljax.envs import (
    FORMATS,
    Parsed,
    ParseProblem,
    ToolCall,
    check_chat_template,
    formats,
    get_format,
    library,
    tag_format,
)
from rljax.envs.chat import probe_conversation
from rljax.tasks import load_callable

marks_of = formats._marks

CALL = '{"name": "search", "arguments": {"query": "old bridge"}}'
SEARCH = ToolCall("search", {"query": "old bridge"})


def says(text):
    return json.dumps({"name": "say", "parameters": {"text": text}})


def said(text):
    return ToolCall("say", {"text": text})


def program(code):
    return ToolCall("python", {"code": code})


CLOSES = said("</tool_call>")
BLOCK = f"<tool_call>{CALL}</tool_call>"
THOUGHT = said("</think>")


def parse(name, text):
    return get_format(name).parse(text)


@pytest.mark.parametrize(
    ("name", "text", "calls"),
    [
        ("hermes", f"Let me look.\n<tool_call>\n{CALL}\n</tool_call>", [SEARCH]),
        ("qwen", f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>", [SEARCH, SEARCH]),
        ("hermes", f"<think>I may write <tool_call> here</think><tool_call>{CALL}</tool_call>", [SEARCH]),
        ("hermes", f"still thinking of <tool_call>\n</think>\n<tool_call>{CALL}</tool_call>", [SEARCH]),
        ("hermes", f"<think>not yet <tool_call>{CALL}</tool_call>", []),
        ("hermes", '<tool_call>{"name": "finish"}</tool_call>', [ToolCall("finish", {})]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', [ToolCall("f", {"x": 1})]),
        ("hermes", "The answer is 4.", []),
        ("hermes", "", []),
        ("llama3", '{"name": "search", "parameters": {"query": "old bridge"}}', [SEARCH]),
        ("llama3", f"<|python_tag|>{CALL}; {CALL}<|eom_id|>", [SEARCH, SEARCH]),
        ("llama3", "<|python_tag|>print(1)<|eom_id|>", [ToolCall("python", {"code": "print(1)"})]),
        ("llama3", "The answer is {4}.", []),
        ("llama3", '{"city": "Rome"}', []),
        ("tags", "I look.\n<search> old bridge </search>", [SEARCH]),
        ("tags", "<python>\n  x = 1\n  print(x)\n</python>", [ToolCall("python", {"code": "  x = 1\n  print(x)"})]),
        ("tags", "<python>```python\nprint(1)\n```</python>", [ToolCall("python", {"code": "print(1)"})]),
        ("tags", "<python>print('<search>')</python>", [ToolCall("python", {"code": "print('<search>')"})]),
        ("tags", "<search>old bridge</search><answer>b</answer>", [SEARCH, ToolCall("answer", {"answer": "b"})]),
        ("tags", "2 < 3 and <b>bold</b>", []),
        # a delimiter that a call says is none
        ("hermes", f'<tool_call>{says("</tool_call>")}</tool_call><tool_call>{CALL}</tool_call>', [CLOSES, SEARCH]),
        ("hermes", f'</think><tool_call>{says("</think>")}</tool_call>{BLOCK}', [THOUGHT, SEARCH]),
        ("hermes", f'<tool_call>{CALL}</tool_call><tool_call>{says("</think>")}</tool_call>', [SEARCH, THOUGHT]),
        ("hermes", f'<tool_call>{says("<think>")}</tool_call><tool_call>{CALL}</tool_call>', [said("<think>"), SEARCH]),
        ("hermes", f'<tool_call>{says("<tool_call> </think>")}</tool_call>', [said("<tool_call> </think>")]),
        ("hermes", f'so <tool_call>{says("a")}</think><tool_call>{CALL}</tool_call>', [SEARCH]),
        ("llama3", f'<think>a</think>{says("</think>")}', [said("</think>")]),
        ("llama3", f'{says("<think>")};{says("<|python_tag|>")}', [said("<think>"), said("<|python_tag|>")]),
        ("llama3", '<|python_tag|>print("</think>")<|eom_id|>', [program('print("</think>")')]),
        ("llama3", f'{says("a")}</think>{CALL}', [SEARCH]),
        ("tags", "<python>print('</python>')</python>", [program("print('</python>')")]),
        ("tags", '<python>x = """\n</python>\n"""</python>', [program('x = """\n</python>\n"""')]),
        ("tags", "<python>x = 1 # </python>\nprint(x)</python>", [program("x = 1 # </python>\nprint(x)")]),
        ("tags", "<python>x = 1 # one</python>\nNow <search>old bridge</search>", [program("x = 1 # one"), SEARCH]),
        ("tags", "<python>print('oops)</python>\nIt's <search>old bridge</search>", [program("print('oops)"), SEARCH]),
        ("tags", "hm</think><python>print('</think>')</python>", [program("print('</think>')")]),
        ("tags", "<python> isn't needed</think><python>print('a')</python>", [program("print('a')")]),
    ],
)  # fmt: skip
def test_calls_are_read(name, text, calls):
    assert parse(name, text) == Parsed(tuple(calls))


@pytest.mark.parametrize(
    ("name", "text", "kind", "says"),
    [
        ("hermes", "<tool_call>{", "unclosed", "never closed"),
        ("hermes", "x</tool_call>", "unclosed", "never opened"),
        ("hermes", "<tool_call>{'name': 1}</tool_call>", "bad_json", "not valid JSON"),
        ("hermes", "<tool_call>[1]</tool_call>", "bad_call", 'an object such as {"name"'),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', "bad_call", "name"),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "bad_call", "arguments of f must be"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "bad_json", "NaN"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>', "bad_json", "1e999 is beyond"),
        ("llama3", '{"name": "f", "parameters": {"x": -1e400}}', "bad_json", "-1e400 is beyond"),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1e999}"}</tool_call>', "bad_json", "1e999"),
        ("hermes", f"<tool_call>{says('</tool_call>')}", "unclosed", "never closed"),
        ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>", "bad_json", "nested too deeply"),
        ("llama3", '{"name": "search", "parameters": ', "bad_json", "not valid JSON"),
        ("llama3", '{"parameters": {}}', "bad_call", "parameters"),
        ("tags", "<search>old", "unclosed", "<search> was opened"),
        ("tags", "old</search>", "unclosed", "</search> was closed"),
        ("tags", "<answer> </answer>", "bad_call", "<answer> is empty"),
    ],
)
def test_a_malformed_call_says_what_is_wrong(name, text, kind, says):
    problem = parse(name, text).problem
    assert problem is not None and problem.kind == kind
    assert says in problem.text and len(problem.text) < 500


def test_calls_before_a_problem_count():
    parsed = parse("hermes", f"<tool_call>{CALL}</tool_call><tool_call>oops</tool_call>")
    assert parsed.calls == (SEARCH,) and parsed.problem.kind == "bad_json"


PIECES = [
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "<|python_tag|>",
    "<search>",
    "</search>",
    "<python>",
    "```",
]
PIECES += [
    "</answer>",
    CALL,
    '{"name":',
    "{",
    "}",
    "[",
    "]",
    '"',
    ":",
    ",",
    ";",
    "NaN",
    "1e999",
    "\\u",
    "\0",
    "\ud800",
    " a",
]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)), st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=12).map("".join)
)
@example("hermes", "<tool_call>" + "9" * 5000 + "</tool_call>")
@example("llama3", "{" + '"a":{' * 50_000)
@example("tags", "<search>" * 2000)
def test_no_input_makes_a_parser_raise(name, text):
    parsed = parse(name, text)
    assert all(isinstance(call, ToolCall) for call in parsed.calls)
    json.dumps([dict(call.arguments) for call in parsed.calls])


class Counting:
    """Stands for what finds marks, or for a JSON decoder, and notes how much of a text it is asked to read."""

    def __init__(self, inner):
        self.inner, self.passes, self.steps, self.chars = inner, 0, 0, 0

    def __call__(self, text):
        self.passes += 1
        end = 0
        for mark in self.inner(text):
            self.steps += 1
            self.chars += mark.end() - end
            end = mark.end()
            yield mark

    def decode(self, body):
        self.steps += 1
        self.chars += len(body)
        return self.inner.decode(body)

    def raw_decode(self, text, start=0):
        self.steps += 1
        value, end = self.inner.raw_decode(text, start)
        self.chars += end - start
        return value, end


def work(name, text, monkeypatch):
    """(passes over the text, marks and JSON values read, characters that they span, calls found)"""
    with monkeypatch.context() as patch:
        decoder = Counting(formats._DECODER)
        patch.setattr(formats, "_DECODER", decoder)
        made = []
        patch.setattr(formats, "_marks", lambda names: made.append(Counting(marks_of(names))) or made[-1])
        patch.setattr(formats, "_HERMES_MARKS", formats._marks(["tool_call"]))
        parser = {"hermes": formats.parse_hermes, "llama3": formats.parse_llama3, "tags": formats.tag_parser()}[name]
        found = len(parser(text).calls)
    read = [decoder, *made]
    return (*(sum(getattr(part, what) for part in read) for what in ("passes", "steps", "chars")), found)


@pytest.mark.parametrize(
    ("name", "piece", "passes", "steps", "calls"),
    [
        ("hermes", f"<tool_call>{CALL}</tool_call>", 1, 3, 1),  # two marks and a value
        ("hermes", "<tool_call>{}", 1, 1, 0),  # never closed: what stands inside is passed over
        ("tags", "<search>a</search>", 1, 2, 1),
        ("tags", "<search>a", 1, 1, 0),
        ("llama3", f"{CALL};\n", 0, 1, 1),
    ],
)
def test_parsing_takes_linear_time(name, piece, passes, steps, calls, monkeypatch):
    """Every mark is read once in one pass, and every call decoded once, however many of them a message holds."""
    for count in (1, 50, 1000):
        text = piece * count
        found = work(name, text, monkeypatch)
        assert (found[0], found[1], found[3]) == (passes, steps * count, calls * count)
        assert found[2] <= 2 * len(text)


def test_nesting_that_cannot_be_decoded_is_tried_once_more_for_its_message_alone(monkeypatch):
    decoder = Counting(formats._DECODER)
    monkeypatch.setattr(formats, "_DECODER", decoder)
    assert formats.parse_llama3('{"a":' * 10**5).problem.kind == "bad_json"
    assert decoder.steps == 2


def own_parser(text):
    if "boom" in text:
        raise RuntimeError("boom")
    return None if "none" in text else Parsed((ToolCall("echo", {"text": text}),))


def test_a_parser_of_ones_own_is_found_by_name_and_guarded():
    chosen = get_format(f"{__name__}:own_parser")
    assert chosen.parse("hi").calls == (ToolCall("echo", {"text": "hi"}),)
    assert isinstance(chosen.parse("boom").problem, ParseProblem)
    assert chosen.parse("none").problem.kind == "parser_failed"
    assert get_format(own_parser).name == "own_parser"
    assert get_format(chosen) is chosen


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="'xml' is not one of hermes, qwen, llama3, tags"):
        get_format("xml")
    with pytest.raises(ValueError, match="cannot load 'nowhere:parse'"):
        get_format("nowhere:parse")
    with pytest.raises(ValueError, match="cannot be called"):
        get_format(f"{__name__}:CALL")
    with pytest.raises(ValueError, match="must be names"):
        tag_format({"a b": "x"})


def test_own_tags_and_observations():
    chosen = tag_format({"move": "direction"})
    assert chosen.parse("<move>north</move>").calls == (ToolCall("move", {"direction": "north"}),)
    assert chosen.stop_strings == ("</move>",)
    assert chosen.wrap == ("\n<result>\n", "\n</result>\n")


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("rljax.envs:MultiHop", "rljax.envs.library.MultiHop"),
        ("rljax.envs:calculator", "rljax.envs.library.calculator"),
        ("rljax.envs.multihop:rows", "rljax.envs.library.multihop"),
        ("rljax.envs.reasoning:TAGS", "rljax.envs.library.reasoning"),
    ],
)
@pytest.mark.parametrize("load", [formats.load, load_callable])
def test_a_name_of_the_library_that_is_looked_for_above_it_says_where_it_stands(load, path, place):
    with pytest.raises(ValueError, match=f"stands in rljax.envs.library; write '{re.escape(place)}'") as error:
        load(path)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_every_name_of_the_library_is_known_above_it():
    import rljax.envs as envs

    names = {*library.__all__, *(module.name for module in pkgutil.iter_modules(library.__path__))} - {"sharing"}
    for name in names:
        with pytest.raises(ImportError, match=f"write 'rljax.envs.library.{name}'"):
            getattr(envs, name)
    assert not hasattr(envs, "no_such_name")
    with pytest.raises(ImportError, match=r"write 'rljax\.envs\.library\.MultiHop'"):
        from rljax.envs import MultiHop  # noqa: F401
    with pytest.raises(ValueError, match="no module of that name"):
        load_callable("rljax.envs.no_such_module:f")


# chat templates

KEEPS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DROPS_THINKING = (  # of all turns before the last question of the user
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and loop.index0 < ns.last %}"
    "{% set text = text.split('</think>')[-1].strip() %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENS_THINKING = KEEPS.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer with chat tokens, made here."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from rljax.text import HuggingFaceTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])

    def make(template):
        hf = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
        hf.chat_template = template
        return HuggingFaceTokenizer(hf)

    return make


def test_a_template_that_only_appends_passes(tokenizer):
    check_chat_template(tokenizer(KEEPS))
    check_chat_template(tokenizer(KEEPS), probe_conversation("user")[:4])


def test_a_template_that_drops_earlier_thinking_is_named_with_its_turn_and_a_remedy(tokenizer):
    with pytest.raises(ValueError, match=r"turn 1 \(assistant\) is not the same once 5 turns") as caught:
        check_chat_template(tokenizer(DROPS_THINKING))
    assert "<think>" in str(caught.value) and "keeps earlier turns word for word" in str(caught.value)
    check_chat_template(tokenizer(DROPS_THINKING), probe_conversation()[:4])  # within one question it is fine


def test_a_prompt_that_the_turn_does_not_begin_with_is_found(tokenizer):
    with pytest.raises(ValueError, match=r"turn 1 \(assistant\) is not the same once 2 turns"):
        check_chat_template(tokenizer(OPENS_THINKING))


def test_a_template_that_refuses_a_role_is_named(tokenizer):
    refuses = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m.content }} {% endfor %}"
    )
    with pytest.raises(ValueError, match=r"cannot render the first 3 turns.*no tools.*choose the role of observations"):
        check_chat_template(tokenizer(refuses))


def test_a_template_that_leaves_out_observations_is_refused(tokenizer):
    """A role that a template does not know may vanish without a word."""
    leaves_out = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant', 'tool') %}{{ m.content }} {% endif %}{% endfor %}"
    )
    check_chat_template(tokenizer(leaves_out))
    with pytest.raises(ValueError, match=r"leaves out messages of role 'ipython'.*The bridge was built in 1901"):
        check_chat_template(tokenizer(leaves_out), role="ipython")


def test_a_template_whose_instructions_move_with_the_questions_is_refused(tokenizer):
    """Environments open with a system message, which such a template writes into the last question."""
    moves = (
        "{% set system = messages[0].content + ' ' if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
        "{{ system if loop.last else '' }}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    check_chat_template(tokenizer(moves), probe_conversation())
    with pytest.raises(ValueError, match=r"rewrites history: .*'Answer in .* became 'How old"):
        check_chat_template(tokenizer(moves))
