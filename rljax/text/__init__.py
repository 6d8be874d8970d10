"""Tokenizers and chat templates: text in, token ids out. Nothing here imports jax.

A tokenizer is anything that follows `Tokenizer`. `load_tokenizer` reads the three kinds of files that models come
with; `CharTokenizer` and `ByteTokenizer` serve small models trained from nothing.
"""

from rljax.gguf_header import read_gguf_metadata
from rljax.text.base import Message, Tokenizer, WithinText, control_tokens_of, decode_behind, encode_text, token_of
from rljax.text.char import ByteTokenizer, CharTokenizer
from rljax.text.chat import with_chat_settings
from rljax.text.dialogue import Dialogue
from rljax.text.gguf import load_gguf_tokenizer
from rljax.text.grammar import Grammars
from rljax.text.huggingface import HuggingFaceTokenizer, load_huggingface_tokenizer
from rljax.text.load import load_tokenizer
from rljax.text.prompts import check_messages, render_prompt
from rljax.text.spm import SentencePieceTokenizer
from rljax.text.steps import StepSplitter

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "Dialogue",
    "Grammars",
    "HuggingFaceTokenizer",
    "Message",
    "SentencePieceTokenizer",
    "StepSplitter",
    "Tokenizer",
    "WithinText",
    "check_messages",
    "control_tokens_of",
    "decode_behind",
    "encode_text",
    "load_gguf_tokenizer",
    "load_huggingface_tokenizer",
    "load_tokenizer",
    "read_gguf_metadata",
    "render_prompt",
    "token_of",
    "with_chat_settings",
]
