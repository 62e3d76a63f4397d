# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The text: Python sources of installed packages, split by package.

Three sets: what is trained on, what arms are tuned by, and what results are measured on. No file of the latter two
shares eight lines in a row with a file that is trained on.
"""

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from modeling_teleflm import TeleFLMTokenizer

from .presets import Preset

# Import name -> distribution; all of them are pinned in constraints.txt.
TRAIN = {
    "torch": "torch",
    "transformers": "transformers",
    "sklearn": "scikit-learn",
    "numpy": "numpy",
    "datasets": "datasets",
    "peft": "peft",
    "trl": "trl",
    "hypothesis": "hypothesis",
    "pyarrow": "pyarrow",
    "fsspec": "fsspec",
    "megatron": "megatron-core",
}
TUNE = {"networkx": "networkx", "accelerate": "accelerate"}
HELD_OUT = {"matplotlib": "matplotlib", "huggingface_hub": "huggingface_hub", "rich": "rich"}
BYTES = 6_000_000  # of a package, at most
LEAST, MOST = 400, 16_000  # characters of a document; longer files are cut
WINDOW = 8  # lines in a row that no two sets share
TOKENIZER_CHARACTERS = 3_000_000


def make_corpus(folder: Path, preset: Preset) -> dict[str, Any]:
    """Write the documents of the three sets and the tokenizer into a folder, once; what they are, as JSON."""
    described = folder / "corpus.json"
    if not described.exists():
        folder.mkdir(parents=True, exist_ok=True)
        sets, overlaps = read_sets()
        for name, documents in sets.items():
            _write(folder / f"{name}.jsonl", documents)
        _train_tokenizer(folder / "tokenizer", sets["train"], preset.pieces)
        described.write_text(json.dumps(_describe(sets, overlaps, folder), indent=1))
    found: dict[str, Any] = json.loads(described.read_text())
    return found


def read_sets() -> tuple[dict[str, list[str]], int]:
    """The documents of `train`, `tune` and `held_out`, each in an order that is always the same.

    Returns:
        the sets, and how many files were left out of `tune` and `held_out` because they share lines with `train`.
    """
    train = dict.fromkeys(text for package in TRAIN for text in _files(package, BYTES))
    seen = {window for text in train for window in _windows(text)}
    sets, overlaps = {"train": list(train)}, 0
    for name, packages in (("tune", TUNE), ("held_out", HELD_OUT)):
        files = dict.fromkeys(text for package in packages for text in _files(package, BYTES))
        apart = [text for text in files if not seen & set(_windows(text))]
        overlaps += len(files) - len(apart)
        sets[name] = apart
    documents = {name: [part for text in texts for part in _cut(text)] for name, texts in sets.items()}
    for texts in documents.values():
        random.Random(0).shuffle(texts)
    return documents, overlaps


def _files(package: str, most: int) -> Iterator[str]:
    """The Python files of an installed package, in the order of their paths, up to so many bytes."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed; the study reads its source.")
    taken = 0
    for path in sorted(Path(found.submodule_search_locations[0]).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= LEAST and taken < most:
            taken += len(text)
            yield text


def _windows(text: str) -> Iterator[int]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for start in range(len(lines) - WINDOW + 1):
        yield int.from_bytes(hashlib.blake2b("\n".join(lines[start : start + WINDOW]).encode(), digest_size=8).digest())


def _cut(text: str) -> Iterator[str]:
    for start in range(0, len(text), MOST):
        part = text[start : start + MOST]
        if len(part) >= LEAST:
            yield part


def _train_tokenizer(folder: Path, texts: Sequence[str], pieces: int) -> None:
    sample, taken = [], 0
    for text in texts:
        if taken > TOKENIZER_CHARACTERS:
            break
        sample.append(text)
        taken += len(text)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in sample for line in text.splitlines() if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        byte_fallback=True,
        character_coverage=0.9995,  # what is rarer is written in bytes
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    TeleFLMTokenizer(str(folder / "tokenizer.model")).save_pretrained(folder)


def _describe(sets: dict[str, list[str]], overlaps: int, folder: Path) -> dict[str, Any]:
    packages = {**TRAIN, **TUNE, **HELD_OUT}
    return {
        "packages": {name: importlib.metadata.version(distribution) for name, distribution in packages.items()},
        "characters": {name: sum(map(len, texts)) for name, texts in sets.items()},
        "documents": {name: len(texts) for name, texts in sets.items()},
        "sha256": {name: hashlib.sha256((folder / f"{name}.jsonl").read_bytes()).hexdigest() for name in sets},
        "tokenizer": hashlib.sha256((folder / "tokenizer/tokenizer.model").read_bytes()).hexdigest(),
        "left_out": overlaps,
    }


# --- the text of a seed -----------------------------------------------------------------------------------------------


def seed_files(corpus: Path, folder: Path, seed: int, tokens: Sequence[int], block: int) -> list[Path]:
    """Documents of `train` in the order of a seed, in consecutive parts of at least so many tokens of whole blocks.

    Args:
        corpus: what `make_corpus` wrote.
        folder: for the parts, `part-0.jsonl` and so on; they are written once.
        seed: of the order.
        tokens: of each part.
        block: tokens of a sequence; what fills none at the end of a thousand documents is lost in packing.

    Raises:
        ValueError: there is not enough text.
    """
    files = [folder / f"part-{number}.jsonl" for number in range(len(tokens))]
    if all(file.exists() for file in files):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = TeleFLMTokenizer(str(corpus / "tokenizer/tokenizer.model"))
    documents = read_documents(corpus / "train.jsonl")
    random.Random(seed).shuffle(documents)
    remaining = iter(documents)
    for file, need in zip(files, tokens, strict=True):
        taken, found = [], 0
        while found < need + 2 * block:
            text = next(remaining, None)
            if text is None:
                raise ValueError(f"the packages have too little text for {sum(tokens):,} tokens.")
            taken.append(text)
            found += len(tokenizer(text)["input_ids"]) + 1
            found -= block if len(taken) % 1000 == 0 else 0
        _write(file, taken)
    return files


def measured_file(corpus: Path, folder: Path, name: str, blocks: int, block: int) -> Path:
    """Documents of a set that losses are measured on: enough for so many blocks, always the same."""
    file = folder / f"{name}.jsonl"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = TeleFLMTokenizer(str(corpus / "tokenizer/tokenizer.model"))
        taken, found = [], 0
        for text in read_documents(corpus / f"{name}.jsonl"):
            if found >= blocks * block:
                break
            taken.append(text[:2000])
            found += len(tokenizer(taken[-1])["input_ids"]) + 1
        _write(file, taken)
    return file


def read_documents(file: Path) -> list[str]:
    """The texts of a file of documents."""
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def _write(file: Path, documents: Sequence[str]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    partial.rename(file)
