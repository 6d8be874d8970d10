# ruff: noqa: RUF001  (the bars of DeepSeek's tokens are wide ones)
"""Families of chat templates in our own words, each with the tokens that its models mark as control tokens.

They keep what differs between the real ones: who may speak and in which order, what is put around a turn, what becomes
of thinking and tool calls, what is written at the end.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from rljax.text import HuggingFaceTokenizer

CHATML = """
{%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

_QWEN_HEAD = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '<tools>' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}DEFAULT{%- endif %}"""

_QWEN_CALLS = """
{%- for call in m.tool_calls %}
    {%- set call = call.function if call.function else call %}
    {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}{{- call.arguments | tojson }}
    {{- '}\\n</tool_call>' }}
{%- endfor %}"""

_QWEN_TOOL = """
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"""

QWEN25 = (
    _QWEN_HEAD.replace("DEFAULT", "{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}")
    + """
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first)
           or (m.role == 'assistant' and not m.tool_calls) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}{%- if m.content %}{{- '\\n' + m.content }}{%- endif %}"""
    + _QWEN_CALLS
    + "{{- '<|im_end|>\\n' }}{%- elif m.role == 'tool' %}"
    + _QWEN_TOOL
    + """
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
)

# Thinking before the last question of the user is dropped; the newest turn always shows the place for it.
QWEN3 = (
    _QWEN_HEAD.replace("DEFAULT", "")
    + """
{%- set ns = namespace(last=messages | length - 1, open=true) %}
{%- for m in messages[::-1] %}
    {%- if ns.open and m.role == 'user' and m.content is string
           and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}
        {%- set ns.open = false %}
        {%- set ns.last = messages | length - loop.index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set said = m.content if m.content is string else '' %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + said + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}
        {%- elif '</think>' in said %}
            {%- set thought = said.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + said.lstrip('\\n') }}
        {%- else %}{{- said }}{%- endif %}"""
    + _QWEN_CALLS
    + "{{- '<|im_end|>\\n' }}{%- elif m.role == 'tool' %}"
    + _QWEN_TOOL
    + """
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
)

LLAMA3 = """
{%- for m in messages %}
    {%- if loop.first %}{{- bos_token }}{%- endif %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# Whatever can be iterated over is shown as JSON, and text can.
LLAMA31 = """
{{- bos_token }}
{%- set rest = messages %}{%- set system = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{%- set rest = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools %}{{- 'Environment: ipython\\n' }}{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\\n\\n' + system + '<|eot_id|>' }}
{%- for m in rest %}
    {%- if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) %}
        {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}{{- raise_exception('one tool call at a time!') }}{%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if m.content is mapping or m.content is iterable %}{{- m.content | tojson }}
        {%- else %}{{- m.content }}{%- endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

MISTRAL1 = """
{{- bos_token }}
{%- for m in messages %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
    {%- if m['role'] == 'user' %}{{- '[INST] ' + m['content'] + ' [/INST]' }}
    {%- elif m['role'] == 'assistant' %}{{- ' ' + m['content'] + eos_token }}
    {%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}
{%- endfor %}"""

# Tools stand before the last question and instructions in it, and move with it.
MISTRAL3 = """
{%- set rest = messages %}{%- set system = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] + '\\n\\n' %}{%- set rest = messages[1:] %}
{%- endif %}
{%- set asked = rest | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace(turn=0) %}
{%- for m in rest %}
    {%- if not (m.tool_calls is defined or m.role == 'tool') %}
        {%- if (m.role == 'user') != (ns.turn % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
        {%- set ns.turn = ns.turn + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for m in rest %}
    {%- if m.role == 'user' %}
        {%- if tools and m == asked[-1] %}
            {{- '[AVAILABLE_TOOLS] ' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}
    {%- elif m.tool_calls is defined %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
            {%- endif %}
            {{- call.function | tojson }}{{- ', "id": "' + call.id + '"}' }}
            {{- ', ' if not loop.last else ']' + eos_token }}
        {%- endfor %}
    {%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}
    {%- elif m.role == 'tool' %}
        {%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}
            {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + m.content | string }}
        {{- ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}
{%- endfor %}"""

GEMMA = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
    {%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

# A conversation in which nobody is to speak ends with the end of the text.
PHI3 = """
{%- for m in messages %}
    {%- if m['role'] in ('system', 'user', 'assistant') %}
        {{- '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

DEEPSEEK = """
{%- set ns = namespace(tool=false, system='') %}
{%- for m in messages %}{%- if m['role'] == 'system' %}{%- set ns.system = m['content'] %}{%- endif %}{%- endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}{%- set ns.tool = false %}{{- '<｜User｜>' + m['content'] }}
    {%- elif m['role'] == 'assistant' and m['content'] is none %}
        {{- '<｜Assistant｜><｜tool▁calls▁begin｜>' }}
        {%- for call in m['tool_calls'] %}
            {{- '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] + '\\n'
                + call['function']['arguments'] + '<｜tool▁call▁end｜>' }}
        {%- endfor %}
        {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
    {%- elif m['role'] == 'assistant' %}
        {%- set said = m['content'].split('</think>')[-1] %}
        {{- ('' if ns.tool else '<｜Assistant｜>') + said + '<｜end▁of▁sentence｜>' }}
        {%- set ns.tool = false %}
    {%- elif m['role'] == 'tool' %}
        {%- set ns.tool = true %}
        {{- '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + m['content'] }}
        {{- '<｜tool▁output▁end｜><｜tool▁outputs▁end｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.tool %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"""

ZEPHYR = """
{%- for m in messages %}
    {%- if m['role'] in ('user', 'system', 'assistant') %}
        {{- '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}
    {%- endif %}
    {%- if loop.last and add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
{%- endfor %}"""

GRANITE = """
{%- set rest = messages %}{%- set system = 'You are helpful.' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\\n' }}
{%- if tools %}
    {{- '<|start_of_role|>tools<|end_of_role|>' }}{{- tools | tojson(indent=4) }}{{- '<|end_of_text|>\\n' }}
{%- endif %}
{%- for m in rest %}
    {%- set role = 'tool_response' if m['role'] == 'tool' else m['role'] %}
    {{- '<|start_of_role|>' + role + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"""

SMOLLM3 = """
{%- set ns = namespace(mode='/think', system='') %}
{%- if enable_thinking is defined and not enable_thinking %}{%- set ns.mode = '/no_think' %}{%- endif %}
{%- if messages[0].role == 'system' %}
    {%- set ns.system = messages[0].content %}
    {%- if '/no_think' in ns.system %}{%- set ns.mode = '/no_think' %}{%- endif %}
    {%- set ns.system = ns.system.replace('/no_think', '').replace('/think', '').rstrip() %}
{%- endif %}
{{- '<|im_start|>system\\n## Metadata\\n\\nReasoning Mode: ' + ns.mode + '\\n\\n' + ns.system + '<|im_end|>\\n' }}
{%- for m in messages %}
    {%- set said = m.content if m.content is string else '' %}
    {%- if m.role == 'user' or m.role == 'tool' %}{{- '<|im_start|>user\\n' + said + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + ('' if ns.mode == '/think' else '<think>\\n\\n</think>\\n') }}
        {{- said.lstrip('\\n') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' + ('' if ns.mode == '/think' else '<think>\\n\\n</think>\\n') }}
{%- endif %}"""

OLMO2 = """
{{- bos_token }}
{%- for m in messages %}
    {%- if m['role'] in ('system', 'user') %}{{- '<|' + m['role'] + '|>\\n' + m['content'] + '\\n' }}
    {%- elif m['role'] == 'assistant' %}
        {{- '<|assistant|>\\n' + m['content'] + eos_token + ('' if loop.last else '\\n') }}
    {%- endif %}
    {%- if loop.last and add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
{%- endfor %}"""

# Answers end with <|return|> where they are the last word, and with <|end|> once others follow.
HARMONY = """
{{- '<|start|>system<|message|>Reasoning: medium\\n# Valid channels: analysis, commentary, final.<|end|>' }}
{%- set rest = messages %}
{%- if messages[0].role in ('developer', 'system') %}
    {{- '<|start|>developer<|message|># Instructions\\n\\n' + messages[0].content + '<|end|>' }}
    {%- set rest = messages[1:] %}
{%- endif %}
{%- set ns = namespace(call=none) %}
{%- for m in rest %}
    {%- if m.role == 'assistant' %}
        {%- if 'content' in m and ('<|channel|>analysis' in m.content or '<|channel|>final' in m.content) %}
            {{- raise_exception('You have passed a message containing <|channel|> tags.\\n\\nUse `thinking`.') }}
        {%- endif %}
        {%- if 'tool_calls' in m %}
            {%- set call = m.tool_calls[0].function %}
            {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
            {{- call.arguments | tojson }}{{- '<|call|>' }}
            {%- set ns.call = call.name %}
        {%- else %}
            {%- if loop.last and not add_generation_prompt and m.thinking %}
                {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
            {%- endif %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
            {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
            {%- set ns.call = none %}
        {%- endif %}
    {%- elif m.role == 'tool' %}
        {%- if ns.call is none %}{{- raise_exception('Message has tool role, but no call came before') }}{%- endif %}
        {{- '<|start|>functions.' + ns.call + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- m.content | tojson }}{{- '<|end|>' }}
    {%- elif m.role == 'user' %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of model: its template, and how its tokenizer is made."""

    template: str
    control: tuple[str, ...]  # tokens marked special
    stops: tuple[str, ...]  # all that ends a completion, the end of sequence first
    turn_end: str  # what the template writes behind the assistant
    keeps: Mapping[str, bool] = dataclasses.field(default_factory=dict)  # by role of observations: are turns kept?
    added: tuple[str, ...] = ()  # tokens of their own that are not marked special
    wrappers: tuple[str, ...] = ()  # of these, what the template writes around the words of others
    bos: str | None = None
    lead: str = ""  # what the template writes in front of the assistant's words, as a part of them
    is_spaced: bool = False  # characters and spaces in front of words, as sentencepiece has them; else bytes
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that only the template may write."""
        return (*self.control, *self.wrappers)


_IM = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
_QWEN_ADDED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_LLAMA = (
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
)
_DEEPSEEK = tuple(
    f"<｜{name}｜>"
    for name in (
        *("end▁of▁sentence", "begin▁of▁sentence", "User", "Assistant", "tool▁calls▁begin", "tool▁calls▁end"),
        *("tool▁call▁begin", "tool▁call▁end", "tool▁outputs▁begin", "tool▁outputs▁end", "tool▁output▁begin"),
        *("tool▁output▁end", "tool▁sep"),
    )
)
_MISTRAL = ("</s>", "<s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
_HARMONY = ("<|return|>", "<|call|>", "<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>")
_EVERYBODY = {"tool": True, "user": True}
_USER = {"tool": False, "user": True}
_NOBODY = {"tool": False, "user": False}
_IM_STOPS = ("<|im_end|>", "<|endoftext|>")
_LLAMA_STOPS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
_QWEN = {
    "control": _IM,
    "stops": _IM_STOPS,
    "turn_end": "<|im_end|>",
    "added": _QWEN_ADDED,
    "wrappers": ("<tool_response>", "</tool_response>"),
}

FAMILIES = {
    "chatml": Family(CHATML, _IM, _IM_STOPS, "<|im_end|>", _EVERYBODY),
    "qwen2.5": Family(QWEN25, keeps=_EVERYBODY, **_QWEN),
    "qwen3": Family(QWEN3, keeps=_NOBODY, **_QWEN),
    "qwen3 without thinking": Family(QWEN3, keeps=_NOBODY, kwargs={"enable_thinking": False}, **_QWEN),
    "llama 3": Family(LLAMA3, _LLAMA, _LLAMA_STOPS, "<|eot_id|>", _EVERYBODY, bos="<|begin_of_text|>"),
    "llama 3.1": Family(
        LLAMA31, _LLAMA, _LLAMA_STOPS, "<|eot_id|>", {**_EVERYBODY, "ipython": True}, bos="<|begin_of_text|>"
    ),
    "mistral v1": Family(MISTRAL1, ("</s>", "<s>"), ("</s>",), "</s>", _USER, bos="<s>", lead=" ", is_spaced=True),
    "mistral v3": Family(
        MISTRAL3,
        (*_MISTRAL, "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ("</s>",),
        "</s>",
        _NOBODY,
        bos="<s>",
        lead=" ",
        is_spaced=True,
    ),
    "gemma": Family(
        GEMMA,
        ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        ("<eos>", "<end_of_turn>"),
        "<end_of_turn>",
        _USER,
        bos="<bos>",
    ),
    "phi 3": Family(
        PHI3,
        ("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
        ("<|endoftext|>", "<|end|>"),
        "<|end|>",
        _NOBODY,
        is_spaced=True,
    ),
    "deepseek r1": Family(
        DEEPSEEK,
        _DEEPSEEK,
        _DEEPSEEK[:1],
        _DEEPSEEK[0],
        _NOBODY,
        added=("<think>", "</think>"),
        bos=_DEEPSEEK[1],
    ),
    "zephyr": Family(ZEPHYR, ("</s>", "<s>"), ("</s>",), "</s>", _USER, bos="<s>", is_spaced=True),
    "granite": Family(
        GRANITE,
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
        ("<|end_of_text|>",),
        "<|end_of_text|>",
        _EVERYBODY,
        bos="<|end_of_text|>",
    ),
    "smollm3": Family(SMOLLM3, _IM, _IM_STOPS, "<|im_end|>", _EVERYBODY, added=("<think>", "</think>")),
    "smollm3 without thinking": Family(
        SMOLLM3,
        _IM,
        _IM_STOPS,
        "<|im_end|>",
        _EVERYBODY,
        added=("<think>", "</think>"),
        kwargs={"enable_thinking": False},
    ),
    "olmo 2": Family(OLMO2, _IM[2:], ("<|endoftext|>",), "<|endoftext|>", _USER, bos="<|endoftext|>"),
    "harmony": Family(HARMONY, _HARMONY, ("<|return|>", "<|call|>", "<|endoftext|>"), "<|return|>", _NOBODY),
}


@functools.cache
def make_tokenizer(name: str) -> HuggingFaceTokenizer:
    """The tokenizer of a family, made here: bytes or characters, and its tokens."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    backend = _characters() if family.is_spaced else _bytes()
    tokens = [(token, True) for token in family.control] + [(token, False) for token in family.added]
    for token, is_special in tokens:
        add = backend.add_special_tokens if is_special else backend.add_tokens
        add([AddedToken(token, special=is_special, normalized=False)])

    bos = {"bos_token": family.bos} if family.bos else {}
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=family.stops[0], clean_up_tokenization_spaces=False, **bos
    )
    hf.chat_template = family.template
    return HuggingFaceTokenizer(hf, template_kwargs=family.kwargs)


def _bytes() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _characters() -> Any:
    """As Llama 2's: a space in front of every piece of text, bytes for what is no letter."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    letters = [chr(i) for i in range(33, 127)]
    vocab = {token: i for i, token in enumerate(["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend
