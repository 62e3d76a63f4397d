# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Where conversations lie in relation to each other: one vector each.

By default nothing is downloaded. The vector of a conversation is the mean of its words' vectors under smooth inverse
frequency weights a / (a + p(word)), a = 1e-3, less its component along the common direction (SIF; Arora, Liang and Ma
2017), and of length 1. The words' vectors come from one of two places:

- the data itself: words, and pairs of characters where a script has no spaces, are hashed to 2^16 ids. A sample of
  [`SAMPLE`] conversations makes a matrix of 1 + log(count) times the SIF weights, and the words' vectors are its first
  [`DIMENSIONS`] right singular vectors (latent semantic analysis). A word of fewer than two conversations has no
  vector;
- a model, `--embedder FOLDER`: words are the ids that its tokenizer makes of the first [`MODEL_CHARACTERS`] characters,
  their vectors the rows of its input embeddings, of which no other weight is read. Rows wider than [`MODEL_WIDTH`] are
  projected by a seeded Gaussian matrix, which keeps angles.

A sentence encoder replaces all of this: a folder that is one (see [`is_encoder`]), or a name on the Hub as
`--embedder sentence-transformers:NAME`. It reads the beginning of a conversation, as far as its window goes, and runs
in one process, on a GPU if there is one. So does a causal language model, `--embedder rds:NAME` (see
[`sft.selection.rds`]).

The share p of each word, the vectors and the common direction come from the sample and are the same for every part.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from conversion.checkpoint.errors import one_line

from . import rds
from .common import OWN_TEXT, Reading
from .scorers import check_vocabulary
from .stages import Kernel, SelectionError, drop_none
from .words import hash_words, pair_characters

SAMPLE = 5000
DIMENSIONS = 64
MODEL_CHARACTERS = 1000
MODEL_WIDTH = 256
SIF_A = 1e-3
SENTENCE_TRANSFORMERS = "sentence-transformers:"
_MODULES = "modules.json"
_BUCKETS = 1 << 16
_MIN_TEXTS = 2  # of the sample; a word of one text says nothing about others
_POWER_ITERATIONS = 2
_TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight", "embed_in.weight")


class WordIds(Protocol):
    """Texts to ids: the ids of all texts in a row, and where each text ends."""

    def __call__(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids, int64; offsets, one more than there are texts."""


@dataclass(frozen=True)
class SifModel:
    """Embeds texts; it goes to every worker.

    Args:
        ids: texts to ids.
        vectors: float32 `[ids, d]`, times the SIF weights.
        common: float32 `[d]`, of length 1: the direction that is taken out.
    """

    ids: WordIds
    vectors: np.ndarray
    common: np.ndarray

    def embed(self, texts: Iterable[str]) -> np.ndarray:
        """Vectors of length 1, float32 `[texts, d]`; 0 for a text without a known word."""
        mean = _means(_count(self.ids, texts, len(self.vectors)), self.vectors)
        mean -= np.outer(mean @ self.common, self.common)
        return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


def fit_corpus(texts: Sequence[str], seed: int) -> SifModel:
    """Word vectors from the texts themselves."""
    from sklearn.utils.extmath import randomized_svd

    counts = _count(hashed_ids, texts, _BUCKETS)
    weights = sif_weights(np.asarray(counts.sum(axis=0)).ravel())
    seen = np.flatnonzero(np.bincount(counts.indices, minlength=_BUCKETS) >= _MIN_TEXTS)
    vectors = np.zeros((_BUCKETS, DIMENSIONS), np.float32)
    if len(seen):
        matrix = counts[:, seen]
        matrix.data = 1 + np.log(matrix.data)
        matrix = (matrix * weights[seen]).tocsr()
        size = min(DIMENSIONS, *matrix.shape)
        _, _, right = randomized_svd(matrix, size, n_iter=_POWER_ITERATIONS, random_state=seed)
        vectors[seen, :size] = right.T * weights[seen, None]
    return SifModel(hashed_ids, vectors, _common_direction(_means(counts, vectors)))


def fit_model(texts: Sequence[str], folder: str, seed: int) -> SifModel:
    """Word vectors from a model's input embeddings.

    Raises:
        SelectionError: the folder has no tokenizer or no such weights that can be read.
    """
    ids = ModelIds(folder)
    table = read_input_embeddings(folder, seed)
    ids.check(len(table))
    counts = _count(ids, texts, len(table))
    vectors = table * sif_weights(np.asarray(counts.sum(axis=0)).ravel())[:, None]
    return SifModel(ids, vectors, _common_direction(_means(counts, vectors)))


def sif_weights(counts: np.ndarray) -> np.ndarray:
    """a / (a + p) for ids seen so many times, float32; 1 for those not seen."""
    return (SIF_A / (SIF_A + counts / max(counts.sum(), 1))).astype(np.float32)


def _common_direction(means: np.ndarray) -> np.ndarray:
    """The first right singular vector, float32."""
    _, directions = np.linalg.eigh(means.T.astype(np.float64) @ means)
    common = directions[:, -1] * np.sign(directions[np.abs(directions[:, -1]).argmax(), -1])
    return common.astype(np.float32)


def _count(ids: WordIds, texts: Iterable[str], columns: int) -> Any:
    """How often each text has each id: a sparse `[texts, columns]` matrix."""
    from scipy.sparse import csr_array

    found, offsets = ids(texts)
    counts = csr_array((np.ones(len(found), np.float32), found, offsets), shape=(len(offsets) - 1, columns))
    counts.sum_duplicates()
    return counts


def _means(counts: Any, vectors: np.ndarray) -> np.ndarray:
    return counts @ vectors / np.maximum(counts.sum(axis=1), 1)[:, None]


# --- ids --------------------------------------------------------------------------------------------------------------


def hashed_ids(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Words, or pairs of characters (see [`pair_characters`]), as their hashes modulo 2^16."""
    words = pair_characters(hash_words(texts))
    return (words.hashes % np.uint64(_BUCKETS)).astype(np.int64), words.offsets


class ModelIds:
    """The ids of a model's tokenizer. It is loaded once in each process.

    Args:
        folder: of the model.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._tokenizer: Any = None
        self._load()

    def check(self, rows: int) -> None:
        """Raises: SelectionError, if a table of so many rows has none for some id."""
        check_vocabulary(self._load(), rows, f"--embedder {self._folder}")

    def __call__(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """See [`WordIds`]."""
        cut = [text[:MODEL_CHARACTERS] for text in texts]
        rows = self._load()(cut, add_special_tokens=False)["input_ids"] if cut else []
        flat = [np.asarray(row, np.int64) for row in rows]
        return np.concatenate([np.empty(0, np.int64), *flat]), np.cumsum([0, *map(len, rows)])

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_tokenizer": None}

    def _load(self) -> Any:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            import modeling_teleflm  # noqa: F401  (registers the tokenizer with the Auto classes)

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)
            except Exception as error:  # whatever the libraries that read its files raise
                raise SelectionError(f"--embedder {self._folder}: {one_line(error)}") from error
        return self._tokenizer


def read_input_embeddings(folder: str, seed: int) -> np.ndarray:
    """The input embeddings of a Hub folder, float32 `[vocab_size, at most MODEL_WIDTH]`; nothing else is read.

    Raises:
        SelectionError: there is no such tensor.
    """
    from conversion.checkpoint.errors import CheckpointError
    from conversion.checkpoint.sources import open_checkpoint

    try:
        tensors = open_checkpoint(folder).tensors
    except CheckpointError as error:
        raise SelectionError(f"--embedder {folder}: {error}") from error
    names = [name for name in tensors if name.endswith(_TABLES)]
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise SelectionError(f"--embedder {folder}: expected one tensor named {' or '.join(_TABLES)}; found {found}.")
    view = tensors[names[0]]
    rows, width = view.shape
    stored = np.memmap(view.file.name, view.dtype.numpy, mode="r", offset=view.offset, shape=(rows, width))
    if width <= MODEL_WIDTH:
        return stored.astype(np.float32)
    projection = np.random.default_rng(seed).standard_normal((width, MODEL_WIDTH), np.float32) / np.sqrt(MODEL_WIDTH)
    blocks = (stored[start : start + 4096].astype(np.float32) @ projection for start in range(0, rows, 4096))
    return np.concatenate(list(blocks))


# --- kernels ----------------------------------------------------------------------------------------------------------


def fit_kernel(sample: pa.Table, embedder: str | None, seed: int, reading: Reading = OWN_TEXT) -> Kernel:
    """A kernel that adds `embedding`, fitted to a sample of the rows.

    Args:
        sample: with `row`, and perhaps `common`, which is left out.
        embedder: a model's folder, `sentence-transformers:NAME`, `rds:NAME`, or None: the corpus.
        seed: of projections and of the singular value decomposition.
        reading: what of a conversation is embedded.

    Raises:
        SelectionError: the embedder cannot be loaded.
    """
    return partial(embed, encode=fit(list(reading.texts(sample)), embedder, seed), reading=reading)


def fit(texts: Sequence[str], embedder: str | None, seed: int) -> Callable[[Iterable[str]], np.ndarray]:
    """Texts to vectors of length 1, float32; see [`fit_kernel`]."""
    if embedder is None:
        return fit_corpus(texts, seed).embed
    if embedder.startswith(rds.PREFIX):
        return rds.HiddenStateEncoder(embedder.removeprefix(rds.PREFIX))
    if is_encoder(embedder):
        return load_encoder(embedder)
    return fit_model(texts, embedder, seed).embed


class SentenceEncoder:
    """A model of sentence-transformers. It is loaded once in each process, and executes nothing of its folder.

    Args:
        name: a folder, or `sentence-transformers:` and a folder or a name on the Hub.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._model: Any = None
        self._load()

    def __call__(self, texts: Iterable[str]) -> np.ndarray:
        """Vectors of length 1, float32."""
        vectors: np.ndarray = self._load().encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return vectors.astype(np.float32)

    def __getstate__(self) -> dict[str, Any]:
        return {"_name": self._name, "_model": None}

    def _load(self) -> Any:
        if self._model is None:
            own = self._name.removeprefix(SENTENCE_TRANSFORMERS)
            _check_modules(own)
            try:
                from sentence_transformers import SentenceTransformer
            except ImportError as error:
                way_out = 'pip install "teleflm[sentence]", or leave --embedder out'
                raise SelectionError(
                    f"--embedder {self._name}: a sentence encoder needs sentence-transformers ({one_line(error)}); "
                    f"{way_out}."
                ) from error
            try:
                self._model = SentenceTransformer(own, trust_remote_code=False)
            except Exception as error:  # whatever the libraries that read its files raise
                raise SelectionError(f"--embedder {self._name}: {one_line(error)}") from error
        return self._model


def load_encoder(embedder: str) -> SentenceEncoder:
    """The sentence encoder of that name; loaded once.

    Raises:
        SelectionError: it cannot be loaded, or sentence-transformers is not installed.
    """
    if embedder not in _encoders:
        _encoders[embedder] = SentenceEncoder(embedder)
    return _encoders[embedder]


_encoders: dict[str, SentenceEncoder] = {}


def is_encoder(embedder: str | None) -> bool:
    """Whether an embedder is a sentence encoder: by its prefix, `modules.json`, or a masked language model's family.

    Args:
        embedder: see [`fit_kernel`]. Names on the Hub are sentence encoders after `sentence-transformers:` only.
    """
    if embedder is None:
        return False
    if embedder.startswith(SENTENCE_TRANSFORMERS) or (Path(embedder) / _MODULES).is_file():
        return True
    try:
        config = json.loads((Path(embedder) / "config.json").read_text(encoding="utf-8"))
        family, architectures = config["model_type"], config.get("architectures") or []
        if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
            return False
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False  # what is wrong with it, its reader says
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return family in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _check_modules(folder: str) -> None:
    """Refuse a folder whose `modules.json` names classes that are not sentence-transformers' own: they would be run."""
    try:
        modules = json.loads((Path(folder) / _MODULES).read_text(encoding="utf-8"))
        types = [str(module["type"]) for module in modules]
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError) as error:
        raise SelectionError(f"--embedder {folder}: {_MODULES}: {one_line(error)}") from error
    except (LookupError, TypeError) as error:
        raise SelectionError(
            f"--embedder {folder}: {_MODULES}: expected a list of modules, each with a type."
        ) from error
    for name in types:
        if not name.startswith("sentence_transformers."):
            raise SelectionError(
                f"--embedder {folder}: {_MODULES} names {name}, which is not of sentence_transformers; code of "
                "others is not run."
            )


def embed(table: pa.Table, encode: Callable[[Iterable[str]], np.ndarray], reading: Reading = OWN_TEXT) -> pa.Table:
    """`embedding`: float16, of fixed size."""
    vectors = encode(reading.texts(table)).astype(np.float16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float16()), vectors.shape[1])
    return pa.table({"drop": drop_none(len(table)), "embedding": column})


__all__ = [
    "DIMENSIONS",
    "SENTENCE_TRANSFORMERS",
    "SifModel",
    "embed",
    "fit",
    "fit_corpus",
    "fit_kernel",
    "fit_model",
    "hashed_ids",
    "is_encoder",
    "load_encoder",
    "read_input_embeddings",
    "sif_weights",
]
