# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Text as the tokens of a checkpoint, without transformers."""

from pathlib import Path

import numpy as np

from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.sources import Source
from conversion.hub.contents import open_pieces


def tokenize(checkpoint: Source, text: Path, max_tokens: int) -> np.ndarray:
    """The first tokens of a text, after the checkpoint's beginning-of-sequence token: ids [T].

    Raises:
        CheckpointError: the text is missing, empty or not UTF-8, or the checkpoint has no sentencepiece tokenizer.
    """
    vocabulary = Path(checkpoint.folder) / "tokenizer.model"
    if not vocabulary.is_file():
        raise CheckpointError(f"{vocabulary}: no such file; the text needs A's tokenizer.")
    try:
        with text.open(encoding="utf-8") as file:
            beginning = file.read(64 * max_tokens)  # no piece of these vocabularies is longer
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{text}: is not UTF-8 at byte {error.start}; convert it.") from None
    except FileNotFoundError:
        raise CheckpointError(f"{text}: no such file.") from None
    except OSError as error:
        raise CheckpointError(f"{text}: {error.strerror}.") from None
    pieces = open_pieces(vocabulary)
    ids = pieces.encode(beginning)
    if not ids:
        raise CheckpointError(f"{text}: is empty; give a text of some hundred words.")
    start = [pieces.bos_id()] if pieces.bos_id() >= 0 else []
    return np.array([*start, *ids][:max_tokens], np.int64)
