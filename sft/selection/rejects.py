# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The rows that a selection did not take, each with the operator that dropped it and the reason.

A row is written as it came, byte for byte, with columns at its end:

- `teleflm_operator`, `teleflm_reason`: what dropped it, and why; `rows` is the check that every row passes first;
- `teleflm_detail`: what is wrong with an invalid row, and where;
- `teleflm_id`: as in selected.jsonl; of a valid row;
- `teleflm_duplicate_of`: the `teleflm_id` of the row that it repeats, which went on at that place.

What is no JSON object, or an empty one, cannot hold columns: such a line is `teleflm_text`, or `teleflm_base64` if it
is no UTF-8 either.
"""

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from . import rows
from .stages import StageFiles

DUPLICATE_OF = "duplicate_of"  # the column in which an operator names the row that another repeats
EXAMPLES = 3  # of a reason


@dataclass(frozen=True)
class Reject:
    """A row that was not taken.

    Args:
        operator: that dropped it.
        reason: why.
        source: `file:row`.
        row: as it came.
        id: of its content, 16 bytes; zeros if it is invalid.
        detail: what is wrong with an invalid row.
        duplicate_of: the id of the row it repeats.
    """

    operator: str
    reason: str
    source: str
    row: bytes
    id: bytes
    detail: str | None = None
    duplicate_of: bytes | None = None

    def to_json(self) -> bytes:
        """One line, without its end."""
        told = {
            "operator": self.operator,
            "reason": self.reason,
            "detail": self.detail,
            "id": self.id.hex() if any(self.id) else None,
            "duplicate_of": self.duplicate_of.hex() if self.duplicate_of else None,
        }
        columns = {f"{rows.OWN}{name}": value for name, value in told.items() if value is not None}
        try:
            text = self.row.decode()
            value = json.loads(text)
        except UnicodeDecodeError:
            return rows.to_json({f"{rows.OWN}base64": base64.b64encode(self.row).decode(), **columns})
        except (ValueError, RecursionError):
            value = None
        if value and isinstance(value, dict):
            return rows.add_columns(self.row, columns)
        return rows.to_json({f"{rows.OWN}text": text, **columns})


def read_rejects(files: StageFiles, operators: Sequence[str]) -> Iterator[Reject]:
    """All rows that a stage dropped, in the order of the input.

    Args:
        files: of a selection that is done.
        operators: the name of each stage's operator.
    """
    for part in sorted(files.folders[0].glob("*.parquet")):
        first = pq.read_table(part, columns=["source", "row", "id", "detail", "position"], use_threads=False)
        dropped: dict[int, tuple[str, str, bytes | None]] = {}
        for folder, operator in zip(files.folders[: len(files.results)], operators, strict=False):
            if (folder / part.name).exists():
                for position, reason, original in _read_dropped(folder / part.name):
                    dropped[position] = operator, reason, original
        found = pa.array(sorted(dropped), pa.int64())
        for row in first.take(found).to_pylist():
            operator, reason, original = dropped[row.pop("position")]
            yield Reject(operator, reason, duplicate_of=original, **row)


def _read_dropped(part: Path) -> Iterator[tuple[int, str, bytes | None]]:
    """Position, reason, and the row that it repeats, of the rows that a part dropped."""
    names = pq.read_schema(part).names
    columns = ["position", "drop", *([DUPLICATE_OF] if DUPLICATE_OF in names else [])]
    table = pq.read_table(part, columns=columns, use_threads=False)
    table = table.filter(pc.is_valid(table["drop"]))
    originals = table[DUPLICATE_OF].to_pylist() if DUPLICATE_OF in names else [None] * len(table)
    return zip(table["position"].to_pylist(), table["drop"].to_pylist(), originals, strict=True)


def sample_rejects(rejects: Iterator[Reject], count: int = EXAMPLES) -> dict[tuple[str, str], list[Reject]]:
    """A few rows of each reason, those with the smallest ids: (operator, reason) -> rows."""
    samples: dict[tuple[str, str], list[Reject]] = {}
    for reject in rejects:
        key = reject.operator, reject.reason
        samples[key] = nsmallest(count, [*samples.get(key, []), reject], key=lambda each: (each.id, each.source))
    return samples


__all__ = ["DUPLICATE_OF", "EXAMPLES", "Reject", "read_rejects", "sample_rejects"]
