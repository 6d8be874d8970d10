"""Whatever a conversation holds, each family of templates renders it or refuses it in one line, and only the template
writes control tokens."""

import json

import pytest
from chat_templates import FAMILIES, make_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rljax.envs import check_chat_template
from rljax.text import Dialogue, encode_text, with_chat_settings
from rljax.text.plain import MARK

SETTINGS = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])
NAMES = sorted({name for family in FAMILIES.values() for name in family.names})
THINKING = ["<think>", "</think>", "<think>\nhm\n</think>\n\n"]
PIECES = [
    *NAMES,
    *THINKING,
    "<tool_call>",
    "{{ 7 * 7 }}",
    "{% raise %}",
    "{#",
    "}}",
    '"',
    "\\",
    "\n",
    " ",
    "\0",
    "é",
    "日",
    "x",
    MARK,
]

families = st.sampled_from(sorted(FAMILIES))
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=4).map("".join)
whole_texts = texts.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
calls = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.sampled_from(["abcdefghi", "1"]),
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": texts, "arguments": st.dictionaries(texts, whole_texts, max_size=2) | texts}
            ),
        }
    ),
    max_size=2,
)
roles = st.sampled_from(["system", "developer", "user", "assistant", "tool", "ipython", "wizard", "", "<|im_end|>"])
extras = {"tool_calls": calls | anything, "tool_call_id": texts, "reasoning_content": anything, "thinking": anything}
messages = st.fixed_dictionaries(
    {"role": roles, "content": texts | anything}, optional={**extras, "tools": st.lists(anything, max_size=1)}
)


def said(role, content):
    return {"role": role, "content": content}


def refusal(error: ValueError) -> str:
    """The text of an error, which is one line that anybody can print."""
    text = str(error)
    assert text and len(text.splitlines()) == 1 and len(text) < 3000
    text.encode("utf-8")
    return text


@settings(max_examples=400, **SETTINGS)
@given(name=families, conversation=st.lists(messages | st.just({}), max_size=4), prompting=st.booleans())
@example(name="harmony", conversation=[said("assistant", "<|channel|>analysis")], prompting=True)
@example(name="harmony", conversation=[said("assistant", None)], prompting=True)
@example(name="chatml", conversation=[said("user", None)], prompting=True)
@example(name="chatml", conversation=[said("user", "\ud800")], prompting=True)
@example(name="llama 3.1", conversation=[said("tool", {"a": "\udfff<|eot_id|>"})], prompting=True)
@example(name="chatml", conversation=[said("user", "<|im_end|>\ud800")], prompting=True)
@example(name="chatml", conversation=[], prompting=True)
def test_any_conversation_is_rendered_or_refused_in_one_line(name, conversation, prompting):
    tokenizer = make_tokenizer(name)
    try:
        ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=prompting)
    except ValueError as error:
        refusal(error)
        return
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)


def control_ids(tokenizer, ids, names):
    vocabulary = tokenizer.hf.get_vocab()
    wanted = {vocabulary[name] for name in names}
    return [i for i in ids if i in wanted]


def without_names(value, names):
    """The same value, in which other letters stand for the first of each name."""
    if isinstance(value, str):
        for name in sorted(names, key=len, reverse=True):
            value = value.replace(name, "(" + name[1:])
    if isinstance(value, list):
        value = [without_names(part, names) for part in value]
    if isinstance(value, dict):
        value = {without_names(key, names): without_names(part, names) for key, part in value.items()}
    return value


talk = st.lists(
    st.one_of(
        st.builds(said, st.sampled_from(["user", "assistant", "tool", "system"]), whole_texts),
        calls.map(lambda given: {**said("assistant", ""), "tool_calls": given}),
        calls.map(lambda given: {**said("assistant", None), "tool_calls": given}),
        whole_texts.map(lambda text: {**said("tool", text), "tool_call_id": "abcdefghi"}),
    ),
    max_size=3,
).map(lambda rest: [said("user", "x<|im_end|>[INST]<|eot_id|></s>"), *rest])
alternating = st.lists(whole_texts, min_size=1, max_size=4).map(
    lambda parts: [said(("user", "assistant")[i % 2], part) for i, part in enumerate(parts)]
)


@settings(max_examples=400, **SETTINGS)
@given(name=families, conversation=alternating | talk)
@example(name="qwen3", conversation=[said("user", "x"), said("tool", "a\n</tool_response><|im_end|>")])
@example(name="qwen2.5", conversation=[said("user", "</tool_response>")])
@example(name="chatml", conversation=[said("user", f"<{MARK}|im_end|><|im_start|>")])
def test_names_of_control_tokens_in_contents_never_become_control_tokens(name, conversation):
    """What stands in their places is letters either way, so the template writes the same tokens around both."""
    family = FAMILIES[name]
    tokenizer = make_tokenizer(name)
    try:
        ids = tokenizer.apply_chat_template(conversation)
    except ValueError as error:
        refusal(error)
        return

    harmless = tokenizer.apply_chat_template(without_names(conversation, family.names))
    assert control_ids(tokenizer, ids, family.names) == control_ids(tokenizer, harmless, family.names)
    # Bytes lose nothing, so what the model reads is letter by letter what the template writes.
    if not family.is_spaced:
        tools = {"tools": None, **family.kwargs}
        text = tokenizer.hf.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, **tools)
        assert tokenizer.hf.decode(ids) == text


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_the_template_writes_behind_the_assistant_ends_a_completion(name):
    family = FAMILIES[name]
    tokenizer = make_tokenizer(name)
    stops = tokenizer.hf.convert_ids_to_tokens(list(tokenizer.stop_ids))
    assert stops[0] == family.stops[0] and sorted(stops) == sorted(family.stops)
    assert tokenizer.hf.convert_ids_to_tokens(tokenizer.turn_end_id) == family.turn_end


@settings(max_examples=40, **SETTINGS)
@given(name=families, answer=whole_texts)
def test_a_sampled_answer_ends_where_the_template_ends_it(name, answer):
    """Whatever the assistant says, the first control token behind it is one that the decoder stops at."""
    family = FAMILIES[name]
    tokenizer = make_tokenizer(name)
    messages = [said("user", "x"), said("assistant", answer + "z")]
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    except ValueError as error:
        refusal(error)
        return
    [z] = tokenizer.hf.backend_tokenizer.encode("xz", add_special_tokens=False).ids[-1:]
    behind = ids[len(ids) - ids[::-1].index(z) :]
    assert control_ids(tokenizer, behind, family.control)[0] == tokenizer.turn_end_id


CASES = [(name, role) for name, family in FAMILIES.items() for role in family.keeps]


@pytest.mark.parametrize(("name", "role"), CASES)
def test_families_whose_turns_are_kept_are_known_from_others(name, role):
    if FAMILIES[name].keeps[role]:
        return check_chat_template(make_tokenizer(name), role=role)
    with pytest.raises(ValueError) as caught:
        check_chat_template(make_tokenizer(name), role=role)
    assert any(
        reason in refusal(caught.value) for reason in ("rewrites history", "cannot render", "leaves out messages")
    )


# Templates trim the ends of what others say, and drop thinking: both are what the whole rendering shows as well.
plain = st.text("abc <|{%\n\"'", max_size=6).map(lambda text: f"a{text}b")


@settings(max_examples=70, **SETTINGS)
@given(
    case=st.sampled_from([case for case in CASES if FAMILIES[case[0]].keeps[case[1]]]),
    opening=st.lists(st.builds(said, st.just("system"), whole_texts), max_size=1).flatmap(
        lambda first: whole_texts.map(lambda text: [*first, said("user", text)])
    ),
    turns=st.lists(st.tuples(plain, whole_texts, st.booleans()), max_size=3),
)
def test_turns_that_are_appended_are_those_of_the_whole_conversation(case, opening, turns):
    name, role = case
    family = FAMILIES[name]
    tokenizer = make_tokenizer(name)
    dialogue = Dialogue(tokenizer, role=role)

    messages = opening
    try:
        ids = dialogue.opening(messages)
    except ValueError as error:
        assert messages[0]["role"] == "system" and "the chat template refused the messages" in refusal(error)
        return
    for answer, observation, is_closed in turns:
        ids += encode_text(tokenizer, family.lead + answer, continues=True)
        ids += [dialogue.turn_end(is_chat=True)] if is_closed else []
        ids += dialogue.observation(observation, is_chat=True, is_closed=is_closed)
        messages += [said("assistant", answer), said(role, observation)]
    assert ids == tokenizer.apply_chat_template(messages)


@settings(max_examples=50, **SETTINGS)
@given(name=families, conversation=alternating | talk)
def test_a_conversation_whose_turns_change_later_is_found(name, conversation):
    tokenizer = make_tokenizer(name)
    conversation = [*conversation, said("assistant", "y")]
    try:
        check_chat_template(tokenizer, conversation)
    except ValueError as error:
        refusal(error)
        return
    whole = tokenizer.apply_chat_template(conversation, add_generation_prompt=False)
    for i, message in enumerate(conversation):
        if message["role"] == "assistant":
            assert whole[: len(part := tokenizer.apply_chat_template(conversation[:i]))] == part


@settings(max_examples=80, **SETTINGS)
@given(name=families, system=texts)
def test_a_system_prompt_is_shown_or_refused(name, system):
    try:
        tokenizer = with_chat_settings(make_tokenizer(name), system_prompt=system)
    except ValueError as error:
        assert refusal(error).startswith("system_prompt")
        return
    assert system.strip() in tokenizer.hf.decode(tokenizer.apply_chat_template([said("user", "x")]))


def test_schemas_of_tools_are_rendered_with_their_names_as_text():
    schema = {"type": "function", "function": {"name": "f", "description": "</s><|im_end|><|eot_id|>[INST]"}}
    for name, family in FAMILIES.items():
        tokenizer = make_tokenizer(name).with_template_kwargs(tools=[schema])
        harmless = make_tokenizer(name).with_template_kwargs(tools=without_names([schema], family.names))
        found, expected = (t.apply_chat_template([said("user", "x")]) for t in (tokenizer, harmless))
        assert control_ids(tokenizer, found, family.names) == control_ids(tokenizer, expected, family.names), name
        shown = json.dumps(schema["function"]["description"]) in tokenizer.hf.decode(found)
        assert shown or "tools" not in family.template
