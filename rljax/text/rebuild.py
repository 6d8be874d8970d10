"""A folder with a SentencePiece `tokenizer.model`, settings of Hugging Face and no `tokenizer.json`."""

import json
from pathlib import Path
from typing import Any

from rljax.text.gguf import CONTROL, UNKNOWN, add_special_tokens, begin_with, sentencepiece_bpe
from rljax.text.huggingface import import_transformers
from rljax.text.spm import MODEL_FILE, SentencePieceTokenizer

_NORMAL = 1
_PROBES = (
    "Hello  world 1234 + 5.6\n\n\tdéjà vu 你好 it's I'LL",
    "def f(x):\n    return x**2  # ok\r\n   ",
    " ½ ① ﬁ 😀👩‍👧 ١٢٣ e\u0301 ",
)
"""What tells a byte-fallback BPE without normalisation from other kinds of SentencePiece models."""


def sentencepiece_folder_tokenizer(folder: Path) -> Any:
    """The `transformers` tokenizer of the folder, with the ids that the `sentencepiece` library gives.

    transformers makes one by itself, with other merges. ValueError for a model that is no BPE of the kind of Llama and
    Mistral.
    """
    import sentencepiece

    # It refuses a file that cannot be read or has no end of sequence.
    own = SentencePieceTokenizer(folder / MODEL_FILE)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL_FILE))
    tokens = [model.IdToPiece(i) for i in range(model.vocab_size())]
    types = [UNKNOWN if model.IsUnknown(i) else CONTROL if model.IsControl(i) else _NORMAL for i in range(len(tokens))]
    scores = [model.GetScore(i) for i in range(len(tokens))]

    # SentencePiece writes a space in front of a text, or does not; the library has no name for which.
    begins_with_space = model.EncodeAsPieces("a")[0].startswith("▁")
    backend = sentencepiece_bpe(tokens, scores, tokens[model.unk_id()], prefix=begins_with_space)
    add_special_tokens(backend, tokens, types)
    for text in _PROBES:
        if backend.encode(text, add_special_tokens=False).ids != model.EncodeAsIds(text):
            raise ValueError(
                f"{folder / MODEL_FILE} splits text in a way that cannot be rebuilt; save the folder with a "
                "tokenizer.json, or give this file as the tokenizer"
            )

    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8-sig"))
    if own.bos_id is not None and settings.get("add_bos_token", True):
        begin_with(backend, tokens[own.bos_id])
    names = {"bos_token": own.bos_id, "eos_token": own.eos_id, "unk_token": model.unk_id()}
    given = {name: tokens[i] for name, i in names.items() if i is not None and settings.get(name) is None}
    return import_transformers().PreTrainedTokenizerFast.from_pretrained(
        str(folder), local_files_only=True, tokenizer_object=backend, **given
    )
