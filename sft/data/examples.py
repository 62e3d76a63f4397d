# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Rows that are no plain conversations: one way to judge them, for `validate`, `preview` and `train` alike.

What a kind of row has of its own, its layouts and its tokens, is a [`Judge`]: pairs and labelled answers in
[`sft.data.preferences`], prompts in [`sft.data.prompts`].
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sft.data.checks import REASONS, Reject
from sft.data.formats import DataError, Problem, Progress, Row, read_rows
from sft.data.labels import DataReport, Labelling, Tokenized, require_rows
from sft.data.preview import PreviewedRow, spell
from sft.data.validate import ValidationReport, count_outcomes
from sft.tokenizer import control_tokens, family_control_tokens

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Beyond those of conversations.
MORE_REASONS = {
    "no_prompt": "nothing says where the prompt ends and the answers begin",
    "different_prompts": "the two answers are not to one prompt",
    "no_answer": "one of the answers is missing",
    "same_answers": "the two answers are the same",
    "bad_label": "the label is neither true nor false",
    "mixed_layouts": "the row is of another kind than those before",
    "bad_prompt": "the prompt is no text and no conversation that waits for an answer",
    "bad_column": "a column cannot be what a reward function needs, or would be left out of the prompt",
    "no_reward": "no reward function has what it needs to judge an answer",
    "no_room": "the prompt leaves no room for a completion",
}


ALL_REASONS = REASONS | MORE_REASONS


def reason(code: str) -> str:
    """What a code of a problem means."""
    return ALL_REASONS[code]


@dataclass(frozen=True, slots=True)
class Example:
    """A valid row.

    Args:
        columns: what the trainer gets.
        source: `file:row`, from 1.
        parts: by name, what is computed of it, as tokens and weights; nothing without a tokenizer.
    """

    columns: dict[str, Any]
    source: str
    parts: dict[str, Tokenized]


class Judge(Protocol):
    """What a kind of row has of its own. One judge sees the rows of one data set, in order."""

    what: str

    def read(self, row: Row, controls: Collection[str]) -> tuple[dict[str, Any], list[Problem]]:
        """The columns that the trainer gets of a row, or all that is wrong with it."""

    def tokenize(
        self, example: Example, tokenizer: "PreTrainedTokenizerBase", max_length: int | None
    ) -> dict[str, Tokenized] | Problem:
        """What is computed of it, by name; or why that cannot be."""


def judge_rows(
    data: str | Path | Sequence[str | Path],
    judge: Judge,
    tokenizer: "PreTrainedTokenizerBase | None",
    max_length: int | None,
    progress: Progress | None = None,
) -> Iterator[tuple[Row, Example | Reject]]:
    """Read and judge every row, in order and in bounded memory.

    Args:
        data: see [`sft.data.formats.read_rows`].
        judge: of their kind.
        tokenizer: with the chat template; without one only control tokens of Tele-FLM's own template are looked for.
        max_length: as the trainer's; `None` keeps all.
        progress: told of bytes.

    Raises:
        DataError: a file cannot be read.
    """
    controls = control_tokens(tokenizer) if tokenizer is not None else family_control_tokens()
    for row in read_rows(data, progress):
        columns, problems = judge.read(row, controls)
        example = Example(columns, row.source, {})
        if not problems and tokenizer is not None:
            parts = judge.tokenize(example, tokenizer, max_length)
            if isinstance(parts, Problem):
                problems = [parts]
            else:
                example = Example(columns, row.source, parts)
        yield row, Reject(row.source, row.id, tuple(problems)) if problems else example


def prepare_examples(
    data: str | Path | Sequence[str | Path],
    judge: Judge,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    allow_rejects: bool = False,
) -> tuple["Dataset", DataReport]:
    """Read rows for one of TRL's trainers, which tokenizes them itself.

    Args:
        data: see [`sft.data.formats.read_rows`].
        judge: of their kind.
        tokenizer: its chat template says how long a row is.
        max_length: rows of which it leaves no answer are dropped.
        allow_rejects: leave invalid rows out (they are in the report) instead of raising.

    Returns:
        a dataset with the columns of the judge, of at least one row; and what became of all rows.

    Raises:
        DataError: a file cannot be read; there are invalid rows and they are not allowed; no row is left.
    """
    import xxhash
    from datasets import Dataset

    places = [data] if isinstance(data, str | Path) else list(data)
    rows, truncated, tokens, trained = 0, 0, 0, 0
    kept: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    digest = xxhash.xxh3_128()
    for _, outcome in judge_rows(places, judge, tokenizer, max_length):
        rows += 1
        if isinstance(outcome, Reject):
            rejects.append(outcome)
            continue
        kept.append(outcome.columns)
        truncated += any(part.truncated for part in outcome.parts.values())
        tokens += sum(len(part.input_ids) for part in outcome.parts.values())
        trained += sum(part.trained_tokens for part in outcome.parts.values())
        digest.update(repr(_without_source(outcome.columns)).encode("utf-8", "surrogatepass"))
    report = DataReport(rows, tuple(rejects), truncated, tokens, trained, digest.hexdigest())
    require_rows(report, places, Labelling(max_length), allow_rejects)
    names = dict.fromkeys(name for columns in kept for name in columns)  # Dataset takes those of the first row
    return Dataset.from_list([{name: columns.get(name) for name in names} for columns in kept]), report


def _without_source(columns: dict[str, Any]) -> dict[str, Any]:
    """The digest of a row does not depend on where it lies."""
    return {name: value for name, value in columns.items() if name != "source"}


def validate_examples(
    data: str | Path | Sequence[str | Path],
    judge: Judge,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_length: int | None = None,
    *,
    rejects: str | Path | None = None,
    progress: Progress | None = None,
) -> ValidationReport:
    """Judge every row as training judges it; see [`sft.data.validate.validate_conversations`]."""
    outcomes = judge_rows(data, judge, tokenizer, max_length, progress)
    return count_outcomes(data, outcomes, rejects, tokenized=tokenizer is not None, count=_counts)


def _counts(outcome: Any) -> tuple[int, int, int]:
    parts = outcome.parts.values()
    return (
        any(part.truncated for part in parts),
        sum(len(part.input_ids) for part in parts),
        sum(part.trained_tokens for part in parts),
    )


def preview_examples(
    data: str | Path | Sequence[str | Path],
    judge: Judge,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
    count: int = 3,
) -> list[PreviewedRow | Reject]:
    """The first rows, each of their parts as it is computed with, and the rejects among them.

    Args:
        data, judge, tokenizer, max_length: see [`judge_rows`].
        count: how many rows that are trained on, at most.

    Raises:
        DataError: a file cannot be read.
    """
    shown: list[PreviewedRow | Reject] = []
    found = 0
    for _, outcome in judge_rows(data, judge, tokenizer, max_length):
        if isinstance(outcome, Reject):
            shown.append(outcome)
            continue
        shown += [
            PreviewedRow(f"{outcome.source} {name}", tuple(spell(part, tokenizer)), part.truncated)
            for name, part in outcome.parts.items()
        ]
        found += 1
        if found == count:
            break
    return shown


__all__ = [
    "ALL_REASONS",
    "MORE_REASONS",
    "DataError",
    "Example",
    "Judge",
    "judge_rows",
    "prepare_examples",
    "preview_examples",
    "reason",
    "validate_examples",
]
