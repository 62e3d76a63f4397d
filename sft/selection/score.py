# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""How much there is to learn from a conversation, as a number: from a column of the data, or by a model.

A column holds what somebody else found, such as the judgement of a language or reward model; the higher the better.
What cannot be told without a model is not told: the length of the answers, which is hard to beat as a criterion (Zhao
et al. 2024, arXiv 2402.04833), is a baseline.

With a causal language model: the instruction-following difficulty (IFD; Li et al. 2023, arXiv 2308.12032), the mean
loss of the answers' tokens in the conversation over their mean loss on their own. Near 0, the question gives the answer
away; from 1 on, the answer has nothing to do with it: such rows are dropped. A small model ranks much as a large one
does (Li et al. 2024, arXiv 2402.00530). Answers of all turns count; a conversation is read as plain text, its texts
separated by blank lines, up to [`MAX_TOKENS`] tokens.
"""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from conversion.checkpoint.errors import one_line

from .common import Reading
from .rows import conversations
from .stages import Kernel, SelectionError, drop_none, drop_where

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 1024
BATCH_TOKENS = 8192
_LARGEST = float(np.finfo(np.float32).max)
_IGNORED = -100
ANSWERS = Reading("answer", own=False)


def score_column(table: pa.Table, column: str) -> pa.Table:
    """`score`: what the rows have in a column of theirs; without a finite number there they are dropped.

    Args:
        table: with `row`.
        column: of the data.
    """
    scores = np.array([_number(json.loads(row.as_py()).get(column)) for row in table["row"]], np.float32)
    return pa.table({"drop": drop_where(~np.isfinite(scores), "no_score"), "score": pa.array(scores)})


def _number(value: object) -> float:
    """A number of JSON that float32 can hold; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        return math.nan
    return float(value)


def score_length(table: pa.Table, reading: Reading = ANSWERS) -> pa.Table:
    """`score`: characters of what is read, which are those of the answers unless told otherwise."""
    scores = [sum(len(message["content"]) for message in messages) for messages in reading.conversations(table)]
    return pa.table({"drop": drop_none(len(table)), "score": pa.array(scores, pa.float32())})


# --- IFD --------------------------------------------------------------------------------------------------------------


def make_ifd_kernel(model: str) -> Kernel:
    """A kernel that adds `score`, the IFD, by some causal language model.

    Args:
        model: a Hub folder or the name of a model on the Hub.

    Raises:
        SelectionError: the model cannot be loaded.
    """
    _scorer(model)
    return partial(score_ifd, model=model)


def score_ifd(table: pa.Table, model: str) -> pa.Table:
    """`score`: the IFD; rows from 1 on are dropped, and rows without a token to predict."""
    scorer = _scorer(model)
    chats = [_pieces(messages, scorer.tokenizer) for messages in conversations(table)]
    together = scorer.losses([_sequence(pieces, scorer.start) for pieces in chats])
    # Every answer on its own; their mean weighs tokens alike, as the other one does.
    alone = scorer.losses([_sequence([piece], scorer.start) for pieces in chats for piece in pieces if piece[1]])
    counts = [sum(is_answer for _, is_answer in pieces) for pieces in chats]
    owners = np.repeat(np.arange(len(chats)), counts)
    sums = np.stack([np.bincount(owners, weights=column, minlength=len(chats)) for column in alone.T])
    with np.errstate(divide="ignore", invalid="ignore"):
        ifd = (together[:, 0] / together[:, 1]) / (sums[0] / sums[1])
    reasons = [None if value < 1 else "ifd_from_1" if np.isfinite(value) else "no_ifd" for value in ifd.tolist()]
    return pa.table({"drop": pa.array(reasons, pa.string()), "score": pa.array(ifd.astype(np.float32))})


def _pieces(messages: Sequence[dict[str, str]], tokenizer: Any) -> list[tuple[list[int], bool]]:
    """The ids of each message, with the blank line after it, and whether it is an answer."""
    texts = [message["content"] + "\n\n" for message in messages]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [(row, message["role"] == "assistant") for row, message in zip(ids, messages, strict=True)]


def _sequence(pieces: Sequence[tuple[list[int], bool]], start: int) -> tuple[list[int], list[int]]:
    """Input ids and labels, cut at [`MAX_TOKENS`]."""
    ids, labels = [start], [_IGNORED]
    for piece, is_answer in pieces:
        ids += piece
        labels += piece if is_answer else [_IGNORED] * len(piece)
    return ids[:MAX_TOKENS], labels[:MAX_TOKENS]


class _Scorer:
    """A model and its tokenizer, on a GPU if there is one."""

    def __init__(self, name: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import modeling_teleflm  # noqa: F401  (registers the architecture with the Auto classes)

        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)
        self.model = model.eval().to(device)
        starts = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, 0)
        self.start = next(start for start in starts if start is not None)

    def losses(self, sequences: Sequence[tuple[list[int], list[int]]]) -> np.ndarray:
        """Sum of the losses of the labelled tokens, in float32, and their number: float64 `[sequences, 2]`."""
        import torch

        result = np.zeros((len(sequences), 2))
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index][0]))
        while order:
            longest = len(sequences[order[-1]][0])
            batch = [order.pop() for _ in range(min(len(order), max(1, BATCH_TOKENS // longest)))]
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            labels = torch.full((len(batch), longest), _IGNORED)
            for row, index in enumerate(batch):
                ids[row, : len(sequences[index][0])] = torch.tensor(sequences[index][0])
                labels[row, : len(sequences[index][1])] = torch.tensor(sequences[index][1])
            result[batch] = self._batch_losses(ids, labels)
        return result

    def _batch_losses(self, ids: "torch.Tensor", labels: "torch.Tensor") -> np.ndarray:
        """Rows end in padding, which no token before it sees: a causal model needs no mask for that."""
        import torch

        with torch.inference_mode():
            logits = self.model(ids.to(self.model.device), use_cache=False).logits[:, :-1].float()
            targets = labels[:, 1:].to(logits.device)
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), targets, ignore_index=_IGNORED, reduction="none"
            ).sum(1)
        return torch.stack([losses.double(), (targets != _IGNORED).sum(1).double()], dim=1).cpu().numpy()


_loaded: dict[str, _Scorer] = {}  # one a process; loading takes longer than a part


def _scorer(name: str) -> _Scorer:
    if name not in _loaded:
        if not Path(name).exists() and name.startswith((".", "/")):
            raise SelectionError(f"--scorer {name}: no such folder.")
        try:
            _loaded[name] = _Scorer(name)
        except Exception as error:  # whatever the libraries that read its files raise
            raise SelectionError(f"--scorer {name} cannot be loaded: {one_line(error)}") from error
    return _loaded[name]


__all__ = ["ANSWERS", "BATCH_TOKENS", "MAX_TOKENS", "make_ifd_kernel", "score_column", "score_ifd", "score_length"]
