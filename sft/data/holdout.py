# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Rows held out for evaluation, and whether evaluation data are in the training data.

What decides on which side a row comes is its question, the first thing the user says, without regard to case (as
Unicode folds it, which keeps the Turkish ı from I), width and spaces: all rows with one question come on one side,
exact duplicates with them. Questions are held out in the order of their hashes. So neither the order of rows, files and
sources matters, nor the seed of the run, nor how many processes there are: the rows held out are the same as long as
the rows are.
"""

import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from sft.data.checks import Conversation
from sft.data.formats import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def normalize_question(conversation: Conversation) -> str:
    """What the user says first: NFKC, case folded, NFKC again, every run of white space one space.

    Folding takes letters apart (ΐ becomes three), which the capitals written whole would not be; again they are one.
    """
    first = next((turn["content"] for turn in conversation.messages if turn["role"] == "user"), "")
    folded = unicodedata.normalize("NFKC", first).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def digest_question(conversation: Conversation) -> int:
    """xxh3-64 of [`normalize_question`]."""
    import xxhash

    return xxhash.xxh3_64_intdigest(normalize_question(conversation).encode())


def hold_out(questions: Sequence["NDArray[np.uint64]"], size: float, used: Sequence[int]) -> "NDArray[np.uint64]":
    """The questions that are held out, sorted.

    Of each source the questions with the least hashes are, until they have as many of its rows as they should; as all
    rows with these questions are held out, whatever source they are of, there may be more.

    Args:
        questions: of each source, the hash of each row's question.
        size: below 1: this share of the rows that an epoch would use of each source, rounded up. From 1: so many rows,
            shared among the sources by the rows that an epoch would use, the greatest remainders rounded up.
        used: of each source, how many different rows an epoch would use.

    Raises:
        DataError: there are no rows left to train on.
    """
    import numpy as np

    wanted = _apportion(int(size), used) if size >= 1 else [-(-Fraction(str(size)) * rows // 1) for rows in used]
    held = np.empty(0, np.uint64)
    for hashes, count in zip(questions, map(int, wanted), strict=True):
        if count:
            last = np.partition(hashes, min(count, len(hashes)) - 1)[min(count, len(hashes)) - 1]
            held = np.union1d(held, hashes[hashes <= last])
    if all(is_held(hashes, held).all() for hashes in questions):
        rows, different = sum(map(len, questions)), len(held)
        raise DataError(
            f"test_split_size {size} would hold out all {rows} rows, which ask {different} different questions; rows "
            "with one question come on one side. Make it less, or give eval_data_files."
        )
    return held


def _apportion(total: int, rows: Sequence[int]) -> list[int]:
    """Share a number in proportion, by greatest remainders; of equal ones the first counts."""
    shares = [Fraction(total * count, sum(rows) or 1) for count in rows]
    whole = [int(share) for share in shares]
    by_remainder = sorted(range(len(rows)), key=lambda index: whole[index] - shares[index])
    for index in by_remainder[: total - sum(whole)]:
        whole[index] += 1
    return whole


def is_held(questions: "NDArray[np.uint64]", held: "NDArray[np.uint64]") -> "NDArray[np.bool_]":
    """Of each row, whether its question is among some that are sorted."""
    import numpy as np

    return np.isin(questions, held)


class Overlap(NamedTuple):
    """Evaluation rows that are in the training data.

    Args:
        rows: evaluation rows in all.
        exact: of them, those that are a training row, message by message.
        question: those whose question is that of a training row; the exact ones among them.
        training_rows: training rows that overlap with an evaluation row in either way.
    """

    rows: int
    exact: int
    question: int
    training_rows: int

    def __str__(self) -> str:
        return (
            f"{self.question} of {self.rows} evaluation rows ask what a training row asks, and {self.exact} are a "
            f"training row; {self.training_rows} training rows"
        )


def find_overlap(training: Any, evaluation: Any) -> Overlap:
    """Count evaluation rows that are in the training data.

    Args:
        training, evaluation: pairs of arrays [rows]: hashes of conversations, of questions.
    """
    import numpy as np

    (train_rows, train_questions), (eval_rows, eval_questions) = training, evaluation
    either = np.isin(train_rows, eval_rows) | np.isin(train_questions, eval_questions)
    exact = np.isin(eval_rows, train_rows)
    question = exact | np.isin(eval_questions, train_questions)
    return Overlap(len(eval_rows), int(exact.sum()), int(question.sum()), int(either.sum()))


__all__ = ["Overlap", "digest_question", "find_overlap", "hold_out", "is_held", "normalize_question"]
