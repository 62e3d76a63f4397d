# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Making a tokenizer.json in a process of its own, which gives back what it took of memory, and fails alone.

With 80,000 pieces it takes some 200 MB, most of which a process keeps for itself once it had it. That of a small model
is made here. A child reads one JSON object, and answers with one.

It also takes four seconds of a processor, which a dry run has not got: what was made and compared once is kept in the
user's cache ($XDG_CACHE_HOME/teleflm, or ~/.cache/teleflm), under a digest of all that it depends on.
"""

import base64
import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoint.atomic_file import write_atomically
from ..checkpoint.errors import CheckpointError
from .rust_tokenizer import rust_tokenizer
from .tokenizer_settings import (
    SpecialToken,
    TokenizerMismatch,
    TokenizerSettings,
    read_names,
    read_settings,
)

_SMALL = 300_000  # bytes of a model that takes no memory worth speaking of
_PATIENCE = 1800  # seconds; 80,000 pieces take four of a processor


@dataclass(frozen=True)
class MadeTokenizer:
    """A tokenizer.json, and what it was made with.

    Args:
        text: content of the file.
        names: special tokens by name, such as `bos_token`.
        settings: at which texts are cut.
    """

    text: str
    names: Mapping[str, str | None]
    settings: TokenizerSettings


def make_tokenizer(model_file: bytes, config: Mapping[str, Any]) -> MadeTokenizer:
    """The tokenizer.json of a sentencepiece model and what a tokenizer_config.json says of it.

    Args:
        model_file: content of tokenizer.model.
        config: content of tokenizer_config.json.

    Raises:
        TokenizerMismatch: there is no such file.
        CheckpointError: a file is not what its name says.
    """
    said = json.dumps(config, sort_keys=True)
    return _make(model_file, said) if len(model_file) < _SMALL else _make_apart(model_file, said)


def _make(model_file: bytes, config: str) -> MadeTokenizer:
    said = json.loads(config)
    names, settings = read_names(said, model_file), read_settings(said, model_file)
    return MadeTokenizer(rust_tokenizer(model_file, settings), names, settings)


@lru_cache(maxsize=4)
def _make_apart(model_file: bytes, config: str) -> MadeTokenizer:
    request = json.dumps({"model": base64.b64encode(model_file).decode(), "config": config}).encode()
    kept = _cache_file(request)
    answer = _read_kept(kept)
    if answer is None:
        said = _ask_child(request)
        answer = json.loads(said)
        if "text" not in answer:
            raise (TokenizerMismatch if answer["mismatch"] else CheckpointError)(answer["said"])
        _keep(kept, said)
    cuts = tuple(SpecialToken(*token) for token in answer["cuts"])
    settings = TokenizerSettings(cuts, answer["bos"], answer["eos"])
    return MadeTokenizer(answer["text"], answer["names"], settings)


def _ask_child(request: bytes) -> bytes:
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        run = subprocess.run(
            [sys.executable, "-P", "-m", __name__],  # -P: what lies in the working folder is not imported
            input=request,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TokenizerMismatch(f"tokenizer.model: no tokenizer.json was made of it in {_PATIENCE} s.") from None
    if run.returncode:
        said = (run.stderr.decode(errors="replace").strip().splitlines() or ["without a word"])[-1]
        raise TokenizerMismatch(
            f"tokenizer.model: what makes a tokenizer.json of it ended with status {run.returncode}: {said[:200]}."
        )
    return run.stdout


# What was made before.


def _cache_file(request: bytes) -> Path | None:
    """Where the answer to a request is kept: under the digest of the request and of what answers it."""
    place = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(place):  # whose user has no home
        return None
    return Path(place, "teleflm", "tokenizers", hashlib.sha256(_makers() + request).hexdigest() + ".json")


@cache
def _makers() -> bytes:
    """What makes and compares the file: this package's modules, and both libraries."""
    here = Path(__file__)
    names = ("rust_tokenizer", "sentencepiece_file", "tokenizer_check", "tokenizer_process", "tokenizer_settings")
    digest = hashlib.sha256()
    for name in names:
        digest.update(here.with_name(f"{name}.py").read_bytes())
    return digest.digest() + f"{version('tokenizers')} {version('sentencepiece')}".encode()


def _read_kept(path: Path | None) -> dict[str, Any] | None:
    """An answer that this user kept whole under this name; None if there is none."""
    if path is None:
        return None
    with suppress(OSError), open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe is not waited for
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():  # what others wrote may be anything
            return None
        digest, _, said = file.read().partition(b"\n")
        if digest == _seal(path, said):
            answer: dict[str, Any] = json.loads(said)
            return answer
    return None


def _seal(path: Path, said: bytes) -> bytes:
    """The first line of what is kept: the digest of the rest and of its name, as the answer to another is whole too."""
    return hashlib.sha256(path.name.encode() + said).hexdigest().encode()


def _keep(path: Path | None, said: bytes) -> None:
    if path is None:
        return
    with suppress(OSError):  # a full disk, or a home that is not writable: it is made again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _seal(path, said) + b"\n" + said)


def answer_to(request: bytes) -> bytes:
    """What the child answers."""
    asked = json.loads(request)
    try:
        made = _make(base64.b64decode(asked["model"]), asked["config"])
    except CheckpointError as error:
        return json.dumps({"said": str(error), "mismatch": isinstance(error, TokenizerMismatch)}).encode()
    settings = asdict(made.settings)
    settings["cuts"] = [list(token.values()) for token in settings["cuts"]]
    return json.dumps({"text": made.text, "names": dict(made.names), **settings}).encode()


def main() -> None:
    """Answer the request on stdin."""
    sys.stdout.buffer.write(answer_to(sys.stdin.buffer.read()))


if __name__ == "__main__":
    main()


__all__ = ["MadeTokenizer", "make_tokenizer"]
