# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""How much there is to learn from a conversation, as a number: from a column of the data, or by a model.

A column holds what somebody else found, such as the judgement of a language or reward model; the higher the better.
What cannot be told without a model is not told: the length of the answers, which is hard to beat as a criterion (Zhao
et al. 2024, arXiv 2402.04833), is a baseline.

With a causal language model: the instruction-following difficulty (IFD; Li et al. 2023, arXiv 2308.12032), the mean
loss of the answers' tokens in the conversation over the mean loss of the same tokens when each answer stands on its
own. Near 0, the question gives the answer away; from 1 on, the answer has nothing to do with it, and such rows are
dropped. A small model ranks much as a large one does (Li et al. 2024, arXiv 2402.00530). Answers of all turns count; a
conversation is read as plain text, its texts separated by blank lines, up to [`CAUSAL_TOKENS`] tokens or the model's
own window: what lies beyond counts in neither mean. From the first of the losses comes the perplexity of the answers
given what was said before, by which rows that a model finds too easy or cannot make sense of may be dropped.

With a model of sequence classification, such as a reward model: its output for the conversation, written with the chat
template of its own tokenizer. Of a conversation that is longer than its window, the end is read.
"""

import json
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from .rows import answers, conversations
from .scorers import CAUSAL, CAUSAL_TOKENS, CLASSIFIER, PLAIN, CausalScorer, ClassifierScorer, model_kind
from .stages import Kernel, SelectionError, drop_none, drop_where

IFD_MIN, IFD_MAX = 0.0, 1.0
PERPLEXITY_MIN, PERPLEXITY_MAX = 0.0, 1e9  # none is outside
PERPLEXITY_MIN_SHARE, PERPLEXITY_MAX_SHARE = 0.0, 0.0
_LARGEST = float(np.finfo(np.float32).max)
_IGNORED = -100


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


def score_length(table: pa.Table) -> pa.Table:
    """`score`: characters of the answers."""
    scores = [sum(map(len, answers(messages))) for messages in conversations(table)]
    return pa.table({"drop": drop_none(len(table)), "score": pa.array(scores, pa.float32())})


# --- by a causal language model ---------------------------------------------------------------------------------------


def make_ifd_kernel(model: str, ifd_min: float = IFD_MIN, ifd_max: float = IFD_MAX) -> Kernel:
    """A kernel that adds `score`, the IFD, by some causal language model; see [`score_ifd`].

    Args:
        model: a Hub folder or the name of a model on the Hub.
        ifd_min, ifd_max: see [`score_ifd`].

    Raises:
        SelectionError: the model cannot be loaded.
    """
    _causal(model)
    return partial(score_ifd, model=model, ifd_min=ifd_min, ifd_max=ifd_max)


def score_ifd(table: pa.Table, model: str, ifd_min: float = IFD_MIN, ifd_max: float = IFD_MAX) -> pa.Table:
    """`score`, the IFD; `perplexity`; and `cut`, whether a row was longer than the window.

    Args:
        table: with `row`.
        model: see [`make_ifd_kernel`].
        ifd_min, ifd_max: rows below the one, or not below the other, are dropped, and rows without a token of an answer
            in the window.
    """
    ifd, perplexity, cut = measure_ifd(_causal(model), conversations(table))
    outside = (~np.isfinite(ifd), ifd < ifd_min, ifd >= ifd_max)
    reasons = np.select(outside, ("no_score", "ifd_low", "ifd_high"), "")
    return pa.table(
        {
            "drop": pa.array([reason or None for reason in reasons.tolist()], pa.string()),
            "score": pa.array(ifd.astype(np.float32)),
            "perplexity": pa.array(perplexity.astype(np.float32)),
            "cut": pa.array(cut),
        }
    )


def measure_ifd(
    scorer: CausalScorer, chats: Iterable[Sequence[dict[str, str]]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The IFD and the perplexity of the answers of each conversation, and whether it is longer than the window.

    Returns:
        float64, float64 and bool, `[chats]`; NaN where no token of an answer is in the window.
    """
    whole = [_pieces(messages, scorer.tokenizer) for messages in chats]
    inside = [_cut(pieces, scorer.window - 1) for pieces in whole]
    together = scorer.losses([_sequence(pieces, scorer.start) for pieces in inside])
    # Every answer on its own, without what the conversation has no room for.
    single = [[piece] for pieces in inside for piece in pieces if piece[1]]
    alone = scorer.losses([_sequence(pieces, scorer.start) for pieces in single])
    owners = np.repeat(np.arange(len(inside)), [sum(is_answer for _, is_answer in pieces) for pieces in inside])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # Both sums are of the same tokens, so their ratio is that of the means.
        ifd = together[:, 0] / np.bincount(owners, weights=alone[:, 0], minlength=len(inside))
        perplexity = np.exp(together[:, 0] / together[:, 1])
    cut = [_length(kept) < _length(pieces) for kept, pieces in zip(inside, whole, strict=True)]
    return ifd, perplexity, np.array(cut, bool)


def _pieces(messages: Sequence[dict[str, str]], tokenizer: Any) -> list[tuple[list[int], bool]]:
    """The ids of each message, with the blank line after it, and whether it is an answer."""
    texts = [message["content"] + "\n\n" for message in messages]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [(row, message["role"] == "assistant") for row, message in zip(ids, messages, strict=True)]


def _cut(pieces: Sequence[tuple[list[int], bool]], room: int) -> list[tuple[list[int], bool]]:
    """The first `room` tokens; pieces that are all beyond are left out."""
    inside = []
    for ids, is_answer in pieces:
        if kept := ids[:room]:
            inside.append((kept, is_answer))
        room -= len(kept)
    return inside


def _length(pieces: Sequence[tuple[list[int], bool]]) -> int:
    return sum(len(ids) for ids, _ in pieces)


def _sequence(pieces: Sequence[tuple[list[int], bool]], start: int) -> tuple[list[int], list[int]]:
    """Input ids, and labels: the ids of answers."""
    ids, labels = [start], [_IGNORED]
    for piece, is_answer in pieces:
        ids += piece
        labels += piece if is_answer else [_IGNORED] * len(piece)
    return ids, labels


def drop_by_perplexity(
    table: pa.Table,
    min: float = PERPLEXITY_MIN,
    max: float = PERPLEXITY_MAX,
    min_share: float = PERPLEXITY_MIN_SHARE,
    max_share: float = PERPLEXITY_MAX_SHARE,
) -> pa.Table:
    """Drop rows whose answers have a perplexity outside a band; it is all there is unless something is given.

    Args:
        table: with `perplexity`, of all rows.
        min, max: of those that stay.
        min_share, max_share: of all rows, that are dropped because theirs are the lowest, or the highest. Of equal ones
            none is dropped that a share would not drop all of.
    """
    values = table["perplexity"].to_numpy().astype(np.float64)
    ordered = np.sort(values)
    low, high = (np.searchsorted(ordered, values, side) for side in ("right", "left"))
    too_low = (values < min) | (low <= min_share * len(values) + 1e-9)
    too_high = (values > max) | (len(values) - high <= max_share * len(values) + 1e-9)
    reasons = np.select((too_low, too_high), ("perplexity_low", "perplexity_high"), "")
    return pa.table({"drop": pa.array([reason or None for reason in reasons.tolist()], pa.string())})


# --- by a classifier --------------------------------------------------------------------------------------------------


def make_classifier_kernel(model: str, label: str | None = None) -> Kernel:
    """A kernel that adds `score` by some model of sequence classification; see [`score_by_classifier`].

    Args:
        model: a Hub folder or the name of a model on the Hub; after `plain:` if it has no chat template and reads the
            texts of a conversation, separated by blank lines.
        label: whose probability is the score, if the model has several.

    Raises:
        SelectionError: the model cannot be loaded, has no chat template, or several labels and none of that name.
    """
    _classifier(model, label)
    return partial(score_by_classifier, model=model, label=label)


def score_by_classifier(table: pa.Table, model: str, label: str | None = None) -> pa.Table:
    """`score`, what the model says of a conversation, and `cut`, whether its beginning did not fit.

    A row without a finite score is dropped, such as one whose roles the chat template refuses.
    """
    scores, cut = _classifier(model, label).scores(conversations(table))
    drop = drop_where(~np.isfinite(scores), "no_score")
    return pa.table({"drop": drop, "score": pa.array(scores), "cut": pa.array(cut)})


def make_model_kernel(model: str, label: str | None, ifd_min: float, ifd_max: float) -> tuple[str, Kernel]:
    """The kernel for what a model is, and which: see [`make_ifd_kernel`] and [`make_classifier_kernel`].

    Raises:
        SelectionError: the model is neither of the two, or cannot be used.
    """
    name = model.removeprefix(PLAIN)
    if model_kind(name) == CLASSIFIER:
        return CLASSIFIER, make_classifier_kernel(model, label)
    if name != model:
        raise SelectionError(f"--scorer {model}: is a causal language model, which reads plain text anyway; no {PLAIN}")
    if label is not None:
        raise SelectionError(f"--scorer-label {label}: --scorer {model} is a causal language model, without labels.")
    return CAUSAL, make_ifd_kernel(model, ifd_min, ifd_max)


# --- models, one a process; loading takes longer than a part ----------------------------------------------------------

_causal_models: dict[str, CausalScorer] = {}
_classifiers: dict[tuple[str, str | None], ClassifierScorer] = {}


def _causal(name: str) -> CausalScorer:
    if name not in _causal_models:
        _causal_models[name] = CausalScorer.load(name)
    return _causal_models[name]


def _classifier(name: str, label: str | None) -> ClassifierScorer:
    if (name, label) not in _classifiers:
        own = name.removeprefix(PLAIN)
        _classifiers[name, label] = ClassifierScorer.load(own, label, plain=own != name)
    return _classifiers[name, label]


__all__ = [
    "CAUSAL_TOKENS",
    "drop_by_perplexity",
    "make_classifier_kernel",
    "make_ifd_kernel",
    "make_model_kernel",
    "measure_ifd",
    "score_by_classifier",
    "score_column",
    "score_ifd",
    "score_length",
]
