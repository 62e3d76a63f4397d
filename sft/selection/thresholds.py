# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The thresholds of the stages, by name, so that a command can set them: `--set heuristics.min_words=5`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import common, decontaminate, dedup, heuristics
from .stages import SelectionError


@dataclass(frozen=True)
class Threshold:
    """A number that a stage goes by.

    Args:
        default: unless set; if it is a whole number, others have to be.
        least, greatest: possible.
        meaning: in one line.
    """

    default: float
    least: float
    greatest: float
    meaning: str


THRESHOLDS: dict[str, Threshold] = {
    "common-text.max_share": Threshold(
        common.MAX_SHARE, 0, 1, "of the rows; a run of words that more of them have does not count"
    ),
    "near-duplicates.overlap": Threshold(dedup.OVERLAP, 0, 1, "of two rows' word pairs, from which on they are near"),
    "near-duplicates.answer_overlap": Threshold(dedup.ANSWER_OVERLAP, 0, 1, "the same, of their answers"),
    "near-duplicates.min_pairs": Threshold(dedup.MIN_PAIRS, 1, 1000, "distinct word pairs; rows with fewer stay"),
    "decontamination.ngram": Threshold(decontaminate.NGRAM, 1, 100, "words in a row that give an item away"),
    "decontamination.min_words": Threshold(decontaminate.MIN_WORDS, 1, 100, "words; shorter items are not looked for"),
    **{
        f"heuristics.{name}": Threshold(default, 0, 10**9 if isinstance(default, int) else 1, meaning)
        for name, default, meaning in (
            ("min_words", heuristics.MIN_WORDS, "words of all answers"),
            ("max_words", heuristics.MAX_WORDS, "words of the whole row"),
            ("max_repeated", heuristics.MAX_REPEATED, "of the runs of eight words in the answers, which are repeats"),
            ("max_garbled", heuristics.MAX_GARBLED, "of the characters, which are no text"),
        )
    },
}


def check_thresholds(given: Mapping[str, float]) -> None:
    """Refuse what is no threshold, or out of its range.

    Raises:
        SelectionError: naming those that are known, or the range.
    """
    for name, value in given.items():
        if name not in THRESHOLDS:
            raise SelectionError(f"--set: unknown threshold {name!r}; known are {', '.join(THRESHOLDS)}.")
        known = THRESHOLDS[name]
        if not known.least <= value <= known.greatest:  # also of NaN
            raise SelectionError(f"--set: {name} is {value:g}; it is from {known.least:g} to {known.greatest:g}.")
        if isinstance(known.default, int) and value != int(value):
            raise SelectionError(f"--set: {name} is {value:g}; it is a whole number.")


def parse_thresholds(pairs: Sequence[str]) -> dict[str, float]:
    """STAGE.NAME=VALUE, as on the command line.

    Raises:
        SelectionError: one is of another form, or given twice.
    """
    given: dict[str, float] = {}
    for pair in pairs:
        name, _, text = (part.strip() for part in pair.partition("="))
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not name or math.isnan(value):
            raise SelectionError(f"--set: {pair!r} is not STAGE.NAME=NUMBER, as in heuristics.min_words=5.")
        if name in given:
            raise SelectionError(f"--set: {name} is given twice.")
        given[name] = value
    return given


def stage_thresholds(stage: str, given: Mapping[str, float]) -> dict[str, Any]:
    """The thresholds of a stage, without its name, as they are set: int or float, as their default is."""
    found: dict[str, Any] = {}
    for name, known in THRESHOLDS.items():
        owner, _, own = name.partition(".")
        if owner == stage:
            found[own] = type(known.default)(given.get(name, known.default))
    return found


__all__ = ["THRESHOLDS", "Threshold", "check_thresholds", "parse_thresholds", "stage_thresholds"]
