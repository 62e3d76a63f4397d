# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Judge data before anything is trained: every row, every problem, in bounded memory."""

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sft.data.checks import Reject, check_rows
from sft.data.formats import DataError, Progress, Row
from sft.data.labels import Labelling, Tokenized, tokenize_rows
from sft.tokenizer import family_control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXAMPLES = 3


@dataclass
class Finding:
    """The rows with one problem.

    Args:
        rows: how many.
        examples: the first of them, each as `file:row: detail`.
    """

    rows: int
    examples: list[str]


@dataclass
class ValidationReport:
    """What [`validate_conversations`] found.

    Args:
        rows: rows read.
        rejected: rows with a problem: training stops at them, unless it is told `allow_rejects`.
        findings: of these, by code of [`sft.data.checks.REASONS`]; a row with several problems counts in each.
        dropped: valid rows of which `max_length` leaves no trained token: training leaves them out, and says so.
        truncated, tokens, trained_tokens: of the rows that are trained on, as in [`sft.data.labels.DataReport`]; `None`
            without a tokenizer.
    """

    rows: int
    rejected: int
    findings: dict[str, Finding]
    dropped: Finding
    truncated: int | None = None
    tokens: int | None = None
    trained_tokens: int | None = None

    @property
    def valid(self) -> bool:
        """Whether training would begin: some row can be trained on, and none is rejected."""
        return self.rows > self.dropped.rows and self.rejected == 0


def validate_conversations(
    data: str | Path | Sequence[str | Path],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    labelling: Labelling | None = None,
    *,
    rejects: str | Path | None = None,
    num_proc: int | None = None,
    progress: Progress | None = None,
) -> ValidationReport:
    """Judge every row as training judges it.

    A row has at least one problem, or it is dropped, or it is trained on: as it is by
    [`sft.data.dataset.prepare_dataset`] with the same tokenizer and labelling.

    Args:
        data: see [`sft.data.formats.read_rows`].
        tokenizer: of the model to train; with it each row is also rendered, tokenized and cut. Without it only the
            control tokens of Tele-FLM's own chat template are looked for.
        labelling: with a tokenizer, what is trained on; all assistant messages at any length unless given. Without,
            only its `sanitize_control_tokens` counts.
        rejects: a JSON Lines file to write: for each rejected or dropped row its `source`, `id`, `reasons` (each a
            `code` and a `detail`), and the row as it came: `row`, or for what is no JSON the line as `text` or
            `base64`.
        num_proc: processes that tokenize.
        progress: told of bytes.

    Raises:
        DataError: a file cannot be read, or the rejects would replace it.
        OSError: the rejects cannot be written.
    """
    labelling = labelling or Labelling(max_length=None)
    if tokenizer is None:
        outcomes: Any = check_rows(data, family_control_tokens(labelling.sanitize_control_tokens), progress)
    else:
        outcomes = tokenize_rows(data, tokenizer, labelling, num_proc=num_proc, progress=progress)
    return count_outcomes(data, outcomes, rejects, tokenized=tokenizer is not None, count=_counts)


def count_outcomes(
    data: str | Path | Sequence[str | Path],
    outcomes: Iterable[tuple[Row, Any]],
    rejects: str | Path | None,
    *,
    tokenized: bool,
    count: Callable[[Any], tuple[int, int, int]],
) -> ValidationReport:
    """Count what rows of any kind were judged to be.

    Args:
        data, rejects: see [`validate_conversations`].
        outcomes: each row with a [`Reject`], or with what it is if it is valid; not begun.
        tokenized: whether what is valid has been tokenized.
        count: whether such a row is truncated, its tokens, its trained tokens.

    Raises:
        DataError, OSError: see [`validate_conversations`].
    """
    places = [data] if isinstance(data, str | Path) else list(data)
    if rejects and Path(rejects).exists() and any(Path(p).exists() and Path(p).samefile(rejects) for p in places):
        raise DataError(f"{rejects} is read and written; give the rejects another name.")
    report = ValidationReport(rows=0, rejected=0, findings={}, dropped=Finding(0, []))
    sums = (0, 0, 0)
    with _open(rejects) as file:
        for row, outcome in outcomes:
            report.rows += 1
            if isinstance(outcome, Reject):
                _count_reject(report, outcome)
                if file:
                    file.write(json.dumps(describe_reject(row, outcome), default=str) + "\n")
            elif tokenized:
                truncated, tokens, trained = count(outcome)
                sums = (sums[0] + truncated, sums[1] + tokens, sums[2] + trained)
    if tokenized:
        report.truncated, report.tokens, report.trained_tokens = sums
    return report


def describe_reject(row: Row, reject: Reject) -> dict[str, Any]:
    """A rejected row as one JSON object, from which the row can be had back exactly."""
    reasons = [problem._asdict() for problem in reject.problems]
    described = {"source": reject.source, "id": reject.id, "reasons": reasons}
    if not isinstance(row.value, bytes):
        return {**described, "row": row.value}
    try:
        return {**described, "text": row.value.decode("utf-8")}
    except UnicodeDecodeError:
        return {**described, "base64": base64.b64encode(row.value).decode("ascii")}


def _count_reject(report: ValidationReport, reject: Reject) -> None:
    if reject.is_dropped:
        report.dropped.rows += 1
        report.dropped.examples = [*report.dropped.examples, str(reject)][:_EXAMPLES]
        return
    report.rejected += 1
    for code in dict.fromkeys(problem.code for problem in reject.problems):
        finding = report.findings.setdefault(code, Finding(0, []))
        finding.rows += 1
        if len(finding.examples) < _EXAMPLES:
            details = "; ".join(problem.detail for problem in reject.problems if problem.code == code)
            finding.examples.append(
                str(Reject(reject.source, reject.id, (reject.problems[0]._replace(detail=details),)))
            )


def _counts(row: Tokenized) -> tuple[int, int, int]:
    return row.truncated, len(row.input_ids), row.trained_tokens


@contextmanager
def _open(path: str | Path | None) -> Iterator[IO[str] | None]:
    """The file of rejects, if one is asked for."""
    if path is None:
        yield None
        return
    with Path(path).open("w", encoding="utf-8") as file:
        yield file


__all__ = ["Finding", "ValidationReport", "count_outcomes", "describe_reject", "validate_conversations"]
