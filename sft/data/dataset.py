# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The data set of a run: conversations tokenized now, or by `sft prepare` before."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sft.data.labels import DataReport, Labelling, Tally, record_batches, require_rows, tokenize_rows
from sft.data.prepare import is_prepared, open_prepared

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def prepare_dataset(
    files: str | Path | Sequence[str | Path],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    assistant_only_loss: bool = True,
    last_turn_only: bool = False,
    sanitize_control_tokens: bool = False,
    allow_rejects: bool = False,
    num_proc: int | None = None,
) -> tuple["Dataset", DataReport]:
    """Read conversations and tokenize them, or open what [`sft.data.prepare.prepare`] has tokenized.

    Conversations are held in memory, 12 bytes a token; a prepared folder is mapped from the disk.

    Args:
        files: see [`sft.data.formats.read_rows`]; or one folder written by [`sft.data.prepare.prepare`].
        tokenizer: see [`tokenize_rows`].
        max_length, assistant_only_loss, last_turn_only, sanitize_control_tokens: see [`Labelling`].
        allow_rejects: leave invalid rows out (they are in the report) instead of raising.
        num_proc: processes that tokenize.

    Returns:
        a dataset with columns `input_ids` and `labels` (lists of int32), of at least one row, each row with at least
        one label that is trained on; and what became of all rows. If a message has a weight that is neither 0 nor 1,
        there is a third column, `weights` (lists of float32): the factor on each token's loss, 0 where the label is
        -100.

    Raises:
        DataError: a file cannot be read; there are invalid rows and they are not allowed; no row is left; a prepared
            folder was made with another tokenizer, chat template or labelling.
    """
    import pyarrow as pa
    from datasets import Dataset

    labelling = Labelling(max_length, assistant_only_loss, last_turn_only, sanitize_control_tokens)
    places = [files] if isinstance(files, str | Path) else list(files)
    if any(is_prepared(place) for place in places):
        return open_prepared(places, tokenizer, labelling)

    tally = Tally()
    batches = list(record_batches(tokenize_rows(places, tokenizer, labelling, num_proc=num_proc), tally))
    report = tally.report()
    require_rows(report, places, labelling, allow_rejects)
    table = pa.Table.from_batches(batches)
    return Dataset(table if tally.weighted else table.drop_columns("weights")), report
