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
own window: what lies beyond counts in neither mean. The first of the losses alone makes the perplexity of the answers
given what was said before, by which rows that a model knows by heart, or makes no sense of, may be dropped.

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

from .common import Reading
from .rows import conversations
from .scorers import CAUSAL, CAUSAL_TOKENS, PLAIN, SCORER, CausalScorer, ClassifierScorer, model_kind
from .stages import Kernel, SelectionError, drop_none, drop_where

ANSWERS = Reading("answer", own=False)
IFD_MIN, IFD_MAX = 0.0, 1.0
PERPLEXITY_MIN, PERPLEXITY_MAX = 0.0, 1e9  # none is outside
SCORE_CUT, PERPLEXITY_CUT = "score_cut", "perplexity_cut"  # columns: whether a row did not fit
LOW_SHARE, HIGH_SHARE = 0.05, 0.05
NOT_TEMPLATED, NOT_FINITE, TOO_LONG = "template_refused", "model_not_finite", "answer_not_in_window"  # reasons
SAMPLE = 2000
PERPLEXITY = "--perplexity"
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


def score_length(table: pa.Table, reading: Reading = ANSWERS) -> pa.Table:
    """`score`: characters of what is read, which are those of the answers unless told otherwise."""
    scores = [sum(len(message["content"]) for message in messages) for messages in reading.conversations(table)]
    return pa.table({"drop": drop_none(len(table)), "score": pa.array(scores, pa.float32())})


# --- by a causal language model ---------------------------------------------------------------------------------------


def make_ifd_kernel(model: str, ifd_min: float = IFD_MIN, ifd_max: float = IFD_MAX) -> Kernel:
    """A kernel that adds `score`, the IFD, by some causal language model; see [`score_ifd`].

    Raises:
        SelectionError: the model cannot be loaded.
    """
    _causal(model)
    return partial(score_ifd, model=model, ifd_min=ifd_min, ifd_max=ifd_max)


def score_ifd(table: pa.Table, model: str, ifd_min: float = IFD_MIN, ifd_max: float = IFD_MAX) -> pa.Table:
    """`score`, the IFD, and `score_cut`, whether a row was longer than the window.

    Args:
        table: with `row`.
        model: a Hub folder or the name of a model on the Hub.
        ifd_min, ifd_max: rows below the one, or not below the other, are dropped, and rows without a token of an answer
            in the window.
    """
    ifd, cut, has_answer = measure_ifd(_causal(model), conversations(table))
    drop = _name_reasons(
        (TOO_LONG, ~has_answer),
        (NOT_FINITE, ~np.isfinite(ifd)),
        ("ifd_low", ifd < ifd_min),
        ("ifd_high", ifd >= ifd_max),
    )
    return pa.table({"drop": drop, "score": pa.array(ifd.astype(np.float32)), SCORE_CUT: pa.array(cut)})


def measure_ifd(
    scorer: CausalScorer, chats: Iterable[Sequence[dict[str, str]]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The IFD of each conversation, whether it is longer than the window, and whether any token of an answer is inside.

    Returns:
        float64, bool and bool, `[chats]`; the IFD is NaN where no token of an answer is inside, and not finite
        where the model's losses are not.
    """
    inside, cut = _read_window(scorer, chats)
    together = scorer.losses([_sequence(pieces, scorer.start) for pieces in inside])[:, 0]
    # Every answer on its own, without what the conversation has no room for: as many tokens.
    single = [[piece] for pieces in inside for piece in pieces if piece[1]]
    alone = scorer.losses([_sequence(pieces, scorer.start) for pieces in single])[:, 0]
    owners = np.repeat(np.arange(len(inside)), [sum(is_answer for _, is_answer in pieces) for pieces in inside])
    with np.errstate(divide="ignore", invalid="ignore"):
        ifd = together / np.bincount(owners, weights=alone, minlength=len(inside))
    return ifd, cut, np.isin(np.arange(len(inside)), owners)


def check_perplexity_model(model: str) -> None:
    """Load it, before anything else takes long.

    Raises:
        SelectionError: it cannot be loaded, or is no causal language model.
    """
    if not is_causal(model, PERPLEXITY):
        raise SelectionError(f"{PERPLEXITY} {model}: is a classifier, and perplexity is of causal language models.")
    _causal(model, PERPLEXITY)


def fit_perplexity(sample: pa.Table, model: str, min: float, max: float, low_share: float, high_share: float) -> Kernel:
    """A kernel that drops rows by the perplexity of their answers; see [`drop_by_perplexity`].

    Args:
        sample: of the rows.
        model: see [`score_ifd`].
        min, max: see [`drop_by_perplexity`].
        low_share, high_share: of the sample, that has a perplexity below, or above, those that stay.

    Raises:
        SelectionError: the model cannot be loaded.
    """
    if low_share or high_share:
        found, _, _ = measure_perplexity(_causal(model), conversations(sample))
        if len(found := found[np.isfinite(found)]):
            low, high = np.quantile(found, [low_share, 1 - high_share]).tolist()
            min, max = (low if low > min and low_share else min), (high if high < max and high_share else max)
    return partial(drop_by_perplexity, model=model, min=min, max=max)


def drop_by_perplexity(table: pa.Table, model: str, min: float, max: float) -> pa.Table:
    """Drop rows by the perplexity of their answers, given what was said before; adds `perplexity` and `perplexity_cut`.

    Args:
        table: with `row`.
        model: see [`score_ifd`].
        min, max: of those that stay. Rows without a token of an answer in the window are dropped too.
    """
    found, cut, has_answer = measure_perplexity(_causal(model), conversations(table))
    drop = _name_reasons(
        (TOO_LONG, ~has_answer),
        (NOT_FINITE, ~np.isfinite(found)),
        ("perplexity_low", found < min),
        ("perplexity_high", found > max),
    )
    return pa.table({"drop": drop, "perplexity": pa.array(found.astype(np.float32)), PERPLEXITY_CUT: pa.array(cut)})


def measure_perplexity(
    scorer: CausalScorer, chats: Iterable[Sequence[dict[str, str]]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """exp of the mean loss of the answers' tokens in each conversation, and the rest as [`measure_ifd`].

    Returns:
        as [`measure_ifd`].
    """
    inside, cut = _read_window(scorer, chats)
    losses, counts = scorer.losses([_sequence(pieces, scorer.start) for pieces in inside]).T
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.exp(losses / counts), cut, counts > 0


def _name_reasons(*reasons: tuple[str, np.ndarray]) -> pa.Array:
    """The column `drop`: the first reason there is."""
    names, conditions = zip(*reasons, strict=True)
    return pa.array([name or None for name in np.select(conditions, names, "").tolist()], pa.string())


def _read_window(
    scorer: CausalScorer, chats: Iterable[Sequence[dict[str, str]]]
) -> tuple[list[list[tuple[list[int], bool]]], np.ndarray]:
    """The pieces of each conversation that the model's window has room for, and whether that is not all: bool."""
    whole = [_pieces(messages, scorer.tokenizer) for messages in chats]
    inside = [_cut(pieces, scorer.window - 1) for pieces in whole]
    return inside, np.array([_length(own) < _length(all_) for own, all_ in zip(inside, whole, strict=True)], bool)


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


# --- by a classifier --------------------------------------------------------------------------------------------------


def score_by_classifier(table: pa.Table, model: str, label: str | None = None, format: str | None = None) -> pa.Table:
    """`score`, what a model of sequence classification says of a row; `score_cut`, whether its end alone fitted.

    A row without a finite score is dropped, such as one whose roles the chat template refuses.

    Args:
        table: with `row`.
        model: a Hub folder or the name of a model on the Hub.
        label: whose probability is the score, if the model has several.
        format: `plain`, if the model has no chat template and reads texts separated by blank lines.
    """
    scores, cut, was_read = _classifier(model, label, format).scores(conversations(table))
    drop = _name_reasons((NOT_TEMPLATED, ~was_read), (NOT_FINITE, ~np.isfinite(scores)))
    return pa.table({"drop": drop, "score": pa.array(scores), SCORE_CUT: pa.array(cut)})


def is_causal(model: str, flag: str = SCORER) -> bool:
    """Whether it is a causal language model, and not a classifier; `flag` begins the message.

    Raises:
        SelectionError: it is neither.
    """
    return model_kind(model, flag) == CAUSAL


def make_scorer_kernel(
    model: str,
    label: str | None = None,
    format: str | None = None,
    ifd_min: float = IFD_MIN,
    ifd_max: float = IFD_MAX,
) -> Kernel:
    """The kernel for what a model is: [`score_by_classifier`], or [`score_ifd`] of a causal language model.

    Raises:
        SelectionError: the model is neither of the two, cannot be used, or was told something that is for the other.
    """
    if is_causal(model):
        for flag, value in (("--scorer-label", label), ("--scorer-format", format)):
            if value is not None:
                raise SelectionError(
                    f"{flag} {value}: is for reward models and other classifiers; --scorer {model} is a causal "
                    "language model, whose score is the IFD."
                )
        return make_ifd_kernel(model, ifd_min, ifd_max)
    if (ifd_min, ifd_max) != (IFD_MIN, IFD_MAX):
        raise SelectionError(
            f"--set scorer.ifd_min, scorer.ifd_max: are for causal language models; --scorer {model} is a classifier."
        )
    _classifier(model, label, format)
    return partial(score_by_classifier, model=model, label=label, format=format)


# --- models, one a process; loading takes longer than a part ----------------------------------------------------------

_causal_models: dict[str, CausalScorer] = {}
_classifiers: dict[tuple[str, str | None, str | None], ClassifierScorer] = {}


def _causal(name: str, flag: str = SCORER) -> CausalScorer:
    if name not in _causal_models:
        _causal_models[name] = CausalScorer.load(name, flag)
    return _causal_models[name]


def _classifier(name: str, label: str | None, format: str | None) -> ClassifierScorer:
    if (key := (name, label, format)) not in _classifiers:
        _classifiers[key] = ClassifierScorer.load(name, label, plain=format == PLAIN)
    return _classifiers[key]


__all__ = [
    "ANSWERS",
    "CAUSAL_TOKENS",
    "check_perplexity_model",
    "drop_by_perplexity",
    "fit_perplexity",
    "is_causal",
    "make_ifd_kernel",
    "make_scorer_kernel",
    "measure_ifd",
    "measure_perplexity",
    "score_by_classifier",
    "score_column",
    "score_ifd",
    "score_length",
]
