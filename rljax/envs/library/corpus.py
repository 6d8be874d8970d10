"""Search over a local corpus: BM25 over JSONL or Parquet documents, the index kept on disk beside them."""

import builtins
import hashlib
import importlib
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rljax.envs.tools import cut

_IMPORTING = threading.Lock()
_TOKENS = {"stopwords": "en", "show_progress": False}


@dataclass(frozen=True)
class Document:
    """`id` is the text of the id column, or the row's number."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Hit:
    """A document and its BM25 score, above 0."""

    document: Document
    score: float


class Corpus:
    """Documents that can be searched. Safe for many threads at once.

    Scores are BM25 (Lucene's variant, k1 1.5, b 0.75) over title and text, English stop words left out, by the package
    bm25s; ties go to the earlier document. Raises ValueError for no documents, ImportError without bm25s.
    """

    def __init__(self, documents: Sequence[Document], *, folder: str | os.PathLike | None = None):
        if not documents:
            raise ValueError("a corpus needs at least one document; none was given")
        self.documents = list(documents)
        self._bm25s = _import_bm25s()
        found = Path(folder) if folder is not None else None
        self.was_cached = found is not None and found.is_dir()
        if found is not None and self.was_cached:
            self._index = self._bm25s.BM25.load(str(found))
        else:
            self._index = self._build()
            if found is not None:
                _save(self._index, found)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        text_column: str = "text",
        title_column: str = "title",
        id_column: str = "id",
        cache: str | os.PathLike | None = None,
    ) -> "Corpus":
        """Documents of a `.jsonl` or `.parquet` file; title and id may be missing.

        The index is kept in the folder `cache`, by default `PATH.bm25`, under a hash of the documents and of the
        version of bm25s, so a changed file gets a new one. Raises ValueError, naming file and row, for a row
        without text.
        """
        path = Path(path)
        rows = _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)
        documents = [_document(path, i, row, text_column, title_column, id_column) for i, row in enumerate(rows)]
        if not documents:
            raise ValueError(f"{path} holds no documents")
        digest = hashlib.blake2b(_import_bm25s().__version__.encode(), digest_size=12)
        for d in documents:
            digest.update(json.dumps([d.title, d.text]).encode())
        return cls(documents, folder=Path(cache or f"{path}.bm25") / digest.hexdigest())

    def search(self, query: str, top_k: int = 3) -> list[Hit]:
        """The best documents, best first; only those that share a word with the query."""
        count = min(top_k, len(self.documents))
        if count < 1:
            return []
        scores = self.scores(query)
        order = (-scores).argsort(kind="stable")[:count]
        return [Hit(self.documents[i], float(scores[i])) for i in order if scores[i] > 0]

    def scores(self, query: str) -> Float[np.ndarray, " N"]:
        """The BM25 score of each document, in their order; 0 where it shares no word with the query."""
        words = self._bm25s.tokenize([query], return_ids=False, **_TOKENS)
        known = [word for word in words[0] if word in self._index.vocab_dict]
        return self._index.get_scores(known) if known else np.zeros(len(self.documents), np.float32)

    def _build(self) -> Any:
        texts = [f"{d.title}\n{d.text}" if d.title else d.text for d in self.documents]
        index = self._bm25s.BM25(method="lucene")
        tokens = self._bm25s.tokenize(texts, **_TOKENS)
        # Where no document has a word, their mean length is no number, and nothing is ever found. The token that stands
        # for no word can be added to others alone.
        with np.errstate(invalid="ignore"):
            index.index(tokens, create_empty_token=bool(tokens.vocab), show_progress=False)
        return index


def search_tool(corpus: Corpus, *, top_k: int = 3, max_chars: int = 600) -> Callable[..., str]:
    """The tool `search`: the best documents for a query, each cut to `max_chars`."""

    def search(query: str) -> str:
        """Search the documents by keywords. Returns the best ones.

        Args:
            query: What to look for, in a few words.
        """
        hits = corpus.search(query, top_k)
        if not hits:
            return "No document matches; try other words."
        return "\n\n".join(
            f"[{i + 1}] {hit.document.title or hit.document.id}\n{cut(hit.document.text, max_chars)}"
            for i, hit in enumerate(hits)
        )

    return search


def _import_bm25s() -> Any:
    """bm25s, without the jax that it would take if it found it: on import it runs a program on the default device.

    It alone is refused jax. Others import it at any moment: a trace that is under way in another thread does.
    """
    with _IMPORTING:
        if "bm25s" not in sys.modules:
            genuine = builtins.__import__

            def without_jax(name: str, globals: Any = None, *rest: Any, **named: Any) -> Any:
                asking = str((globals or {}).get("__name__"))
                if name.partition(".")[0] == "jax" and asking.partition(".")[0] == "bm25s":
                    raise ImportError("bm25s runs without jax here")
                return genuine(name, globals, *rest, **named)

            builtins.__import__ = without_jax
            try:
                importlib.import_module("bm25s")
            except ImportError:
                raise ImportError("search over a corpus needs bm25s: pip install 'rljax-lm[agents]'") from None
            finally:
                builtins.__import__ = genuine
            logging.getLogger("bm25s").setLevel(logging.WARNING)  # it turns itself up to DEBUG
        return sys.modules["bm25s"]


def _save(index: Any, folder: Path) -> None:
    """All or nothing: another process may build the same index at this moment."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tempfile.mkdtemp(dir=folder.parent)
    try:
        index.save(unfinished)
        os.rename(unfinished, folder)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not folder.is_dir():
            raise


def _jsonl_rows(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}; a corpus is a .jsonl or .parquet file of documents")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError("reading Parquet needs pyarrow: pip install 'rljax-lm[parquet]'") from None
    try:
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from None


def _document(path: Path, number: int, row: Any, text: str, title: str, id_: str) -> Document:
    value = row.get(text) if isinstance(row, Mapping) else None
    if not isinstance(value, str) or not value.strip():
        columns = list(row) if isinstance(row, Mapping) else row
        raise ValueError(f"{path}, document {number + 1}: no text in the column {text!r}; it holds {columns!r:.200}")
    own = row.get(id_)
    return Document(str(number if own is None else own), str(row.get(title) or ""), value)
