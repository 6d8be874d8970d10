"""The tokenizer inside a GGUF file, rebuilt as a Hugging Face one: same ids, special tokens and chat template."""

import os
from collections.abc import Mapping
from typing import Any

from rljax.gguf_header import read_gguf_metadata
from rljax.text.huggingface import HuggingFaceTokenizer, import_transformers

# values of tokenizer.ggml.token_type
_NORMAL = 1
UNKNOWN = 2
CONTROL = 3
_USER_DEFINED = 4

_SPACE = "▁"

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tokenizer.ggml.pre -> what splits the text before merging. Splits of the same name in llama.cpp (src/llama-vocab.cpp)
# and in the tokenizer.json of the models that use them.
SPLIT_REGEX = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
SINGLE_DIGITS = ("smollm", "refact", "starcoder", "command-r")  # the GPT-2 split, each digit alone
GPT2_SPLIT = ("gpt-2", "gpt2", "olmo")
_WHOLE_TOKENS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a chunk that is a token is not merged up to it
_ADDS_BOS = _WHOLE_TOKENS_FIRST  # llama.cpp's default where a file has no tokenizer.ggml.add_bos_token
_NFC = ("qwen2", "deepseek-r1-qwen")


def load_gguf_tokenizer(
    path: str | os.PathLike, *, template_kwargs: Mapping[str, Any] | None = None
) -> HuggingFaceTokenizer:
    """Rebuild the tokenizer from the metadata of a GGUF file; tensors are not read.

    Byte-level BPE (`gpt2`) with the splits of SmolLM, Llama 3, Qwen 2 / 3, Mistral Tekken and GPT-2, and SentencePiece
    BPE (`llama`). Raises ValueError for another kind, naming it, and if a field is missing.
    """
    wanted = ("tokenizer.", "general.name", "general.architecture")
    meta = read_gguf_metadata(path, lambda key: key.startswith(wanted) or key.endswith(".context_length"))
    kind = meta.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level_bpe, "llama": _from_scores}
    if not isinstance(kind, str) or kind not in builders:
        raise ValueError(
            f"{path} has a tokenizer of the kind {kind!r:.80}; {sorted(builders)} can be rebuilt. "
            "Use the model's Hugging Face folder, or give its tokenizer by a path of its own"
        )

    tokens = _list(meta, "tokenizer.ggml.tokens", str, path)
    types = [_NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in meta:
        types = _list(meta, "tokenizer.ggml.token_type", int, path, len(tokens))
    try:
        tokenizer = builders[kind](meta, tokens, path)
        add_special_tokens(tokenizer, tokens, types)
        return _wrap(tokenizer, meta, tokens, template_kwargs)
    except Exception as error:  # the packages raise many kinds, from deep inside
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path} has a tokenizer that cannot be rebuilt: {reason:.200}") from error


def _list(
    meta: Mapping[str, Any], key: str, kind: type | tuple[type, ...], path: str | os.PathLike, length: int | None = None
) -> list[Any]:
    """A list from the file, all of one kind and, if told so, as long as the vocabulary."""
    if key not in meta:
        raise ValueError(f"{path} has no metadata field {key!r}, so its tokenizer cannot be rebuilt; convert it again")
    value = meta[key]
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise ValueError(f"{path}: metadata field {key!r} is {value!r:.80}, which has the wrong type; convert it again")
    if length is not None and len(value) != length:
        raise ValueError(
            f"{path}: metadata field {key!r} has {len(value)} entries for {length} tokens; convert it again"
        )
    return value


def _byte_level_bpe(meta: Mapping[str, Any], tokens: list[str], path: str | os.PathLike) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    pre = str(meta.get("tokenizer.ggml.pre"))
    if pre in SPLIT_REGEX:
        split = [
            pre_tokenizers.Split(Regex(SPLIT_REGEX[pre]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    elif pre in SINGLE_DIGITS:
        split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif pre in GPT2_SPLIT:
        split = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        known = sorted([*SPLIT_REGEX, *SINGLE_DIGITS, *GPT2_SPLIT])
        raise ValueError(
            f"{path} splits text by the rule {pre!r:.80} (tokenizer.ggml.pre), which is not known; known: {known}. "
            "Use the model's Hugging Face folder, or give its tokenizer by a path of its own"
        )

    # ids are places in the list; merges are ranked by theirs
    merges = [tuple(merge.split(" ", 1)) for merge in _list(meta, "tokenizer.ggml.merges", str, path)]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_TOKENS_FIRST))

    tokenizer.normalizer = normalizers.NFC() if pre in _NFC else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _from_scores(meta: Mapping[str, Any], tokens: list[str], path: str | os.PathLike) -> Any:
    scores = _list(meta, "tokenizer.ggml.scores", (int, float), path, len(meta["tokenizer.ggml.tokens"]))
    prefix = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
    return sentencepiece_bpe(tokens, scores, _special(meta, tokens, "unknown"), prefix=prefix)


def sentencepiece_bpe(tokens: list[str], scores: list[float], unknown: str | None, *, prefix: bool) -> Any:
    """A `tokenizers.Tokenizer` with the ids of a SentencePiece BPE model with byte fallback and no normalisation.

    `prefix`: whether a text begins as if behind a space.
    """
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=_merges(vocab, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )

    # SentencePiece joins pieces over spaces, which it writes as a sign.
    spaces = [normalizers.Replace(" ", _SPACE)]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), *spaces] if prefix else spaces)

    # in the opposite order: what was put in front comes off again
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores highest, so the pairs of a better piece come first."""
    ranked = []
    for piece, i in vocab.items():
        for cut in range(1, len(piece)):
            left = vocab.get(piece[:cut])
            right = vocab.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[i], left, right, piece[:cut], piece[cut:]))

    # pairs of one piece by their ids, so that the order does not depend on that of the vocabulary
    ranked.sort(key=lambda row: row[:3])
    return [row[3:] for row in ranked]


def add_special_tokens(tokenizer: Any, tokens: list[str], types: list[int]) -> None:
    """Makes special tokens of a `tokenizers.Tokenizer` those whose type (as in GGUF) says so."""
    from tokenizers import AddedToken

    # marks of the model never meet the text's normalisation, and a decoder leaves out those that are special
    special = [t for t, kind in zip(tokens, types) if kind in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])

    own = [t for t, kind in zip(tokens, types) if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in own])


def begin_with(tokenizer: Any, bos: str) -> None:
    """Has a `tokenizers.Tokenizer` put the token `bos` in front of every text that is encoded with special tokens."""
    from tokenizers.processors import TemplateProcessing

    begin = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=begin)


_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
"""llama.cpp's ids of special tokens for the kind `llama`. Those for `gpt2` (11) are no special tokens of any model."""


def _special(meta: Mapping[str, Any], tokens: list[str], name: str) -> str | None:
    """A special token by what it is for: the file's, or llama.cpp's where the file does not say."""
    default = _SENTENCEPIECE_IDS.get(name) if meta["tokenizer.ggml.model"] == "llama" else None
    i = meta.get(f"tokenizer.ggml.{name}_token_id", default)
    return tokens[i] if type(i) is int and 0 <= i < len(tokens) else None


def _wrap(
    tokenizer: Any, meta: Mapping[str, Any], tokens: list[str], template_kwargs: Mapping[str, Any] | None
) -> HuggingFaceTokenizer:
    def token(name: str) -> str | None:
        return _special(meta, tokens, name)

    # A file that does not say follows its kind.
    by_default = meta["tokenizer.ggml.model"] == "llama" or meta.get("tokenizer.ggml.pre") in _ADDS_BOS
    adds_bos = meta.get("tokenizer.ggml.add_bos_token", by_default)
    bos = token("bos")
    if adds_bos and bos is not None:
        begin_with(tokenizer, bos)

    names: dict[str, Any] = {
        "bos_token": bos,
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
    }
    context = next((v for k, v in meta.items() if k.endswith(".context_length")), None)
    if type(context) is int:
        names["model_max_length"] = context

    wrapped = import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **{name: value for name, value in names.items() if value is not None},
    )
    wrapped.chat_template = meta.get("tokenizer.chat_template")
    # llama.cpp ends a text at these too.
    turn_ends = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    return HuggingFaceTokenizer(
        wrapped,
        stop_ids=[i for i in turn_ends if type(i) is int and 0 <= i < len(tokens)],
        adds_bos=bool(adds_bos) and bos is not None,
        template_kwargs=template_kwargs,
    )
