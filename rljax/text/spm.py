"""A SentencePiece `.model` file behind the `Tokenizer` protocol."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from rljax.text.base import Message, unique
from rljax.text.plain import check_characters

MODEL_FILE = "tokenizer.model"
_APART = "\ue000"  # no vocabulary joins it with a neighbour


class SentencePieceTokenizer:
    """Token ids are those of the `sentencepiece` library itself.

    Models with such a tokenizer (Llama 1 and 2, Mistral) were trained with a beginning-of-sequence token in front of
    every text, which the file does not say; `adds_bos=False` is for one that was not. The file holds no chat
    template, so prompts are plain text. Raises ValueError if the file cannot be read or defines no end of sequence.
    """

    has_chat_template: bool = False

    def __init__(self, file: str | os.PathLike, *, adds_bos: bool = True):
        import sentencepiece

        self.file = Path(file)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.Load(str(file))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot load the SentencePiece model {file}: {error}") from None

        # -1 for a piece that there is not
        eos = self._processor.eos_id()
        bos = self._processor.bos_id()
        pad = self._processor.pad_id()
        if eos < 0:
            raise ValueError(
                f"the SentencePiece model {file} has no end-of-sequence piece, so a completion could never end; "
                "train it with eos_id set"
            )

        self.eos_id: int = eos
        self.bos_id: int | None = None if bos < 0 else bos
        self.pad_id: int = eos if pad < 0 else pad
        self.stop_ids: tuple[int, ...] = unique([eos])
        size = self._processor.vocab_size()
        control = [i for i in range(size) if self._processor.IsControl(i)]
        self.special_tokens: dict[str, int] = {self._processor.IdToPiece(i): i for i in control}
        self.vocab_size: int = size
        self.adds_bos: bool = adds_bos and self.bos_id is not None

    def encode(self, text: str) -> list[int]:
        """Raises ValueError for half of a character."""
        check_characters(text)
        return list(self._processor.EncodeAsIds(text))

    def encode_text(self, text: str, *, wrap: tuple[str, str] = ("", ""), continues: bool = False) -> list[int]:
        """See `rljax.text.encode_text`; SentencePiece never reads the names of control pieces as such."""
        text = f"{wrap[0]}{text}{wrap[1]}"
        if not continues:
            return self.encode(text)

        # Behind a character that joins with nothing there is no dummy space.
        apart = self.encode(_APART)
        ids = self.encode(_APART + text)
        return ids[len(apart) :] if ids[: len(apart)] == apart else self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Control pieces and ids outside of the vocabulary give nothing."""
        p = self._processor
        return p.DecodeIds([int(i) for i in ids if 0 <= i < self.vocab_size and not p.IsControl(int(i))])

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for within a text: one of a single byte need not be a character."""
        piece: str = self._processor.IdToPiece(token)
        if self._processor.IsByte(token):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace("\u2581", " ").encode()

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Raises ValueError: a SentencePiece file has no chat template."""
        raise ValueError(
            f"the SentencePiece model {self.file} has no chat template, so it cannot take a list of messages; "
            "give prompts as plain text, or use a Hugging Face folder whose tokenizer_config.json has one"
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Copy the file to `tokenizer.model` in the folder."""
        target = Path(folder) / MODEL_FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (target.exists() and target.samefile(self.file)):
            shutil.copyfile(self.file, target)
