# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What texts and tasks measured before and after training, side by side."""

from collections.abc import Sequence
from typing import Any


def comparison(before: dict[str, Any] | None, after: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Rows of a table of both: `name`, `metric`, `better` (`lower` or `higher`), `before`, `after`, `difference`.

    Args:
        before, after: from [`evaluation.measure.describe`]; None of what was not measured (yet).
    """
    rows = []
    for name, metric, better in _metrics(before or after or {}):
        values = [_value(found, name, metric) for found in (before, after)]
        difference = values[1] - values[0] if values[0] is not None and values[1] is not None else None
        rows.append(
            {
                "name": name,
                "metric": metric,
                "better": better,
                "before": values[0],
                "after": values[1],
                "difference": difference,
            }
        )
    return rows


def _metrics(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    texts = [(text["name"], "bits_per_byte", "lower") for text in found.get("texts", ())]
    tasks = [(task["name"], metric, "higher") for task in found.get("tasks", ()) for metric in ("acc", "acc_norm")]
    return [*texts, *tasks]


def _value(found: dict[str, Any] | None, name: str, metric: str) -> float | None:
    for entry in (*(found or {}).get("texts", ()), *(found or {}).get("tasks", ())):
        if entry["name"] == name and isinstance(entry.get(metric), int | float):
            return float(entry[metric])
    return None


def comparison_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal."""
    cells = [("text or task", "measure", "before", "after", "difference")]
    for row in rows:
        numbers = ("-" if row[key] is None else f"{row[key]:.4f}" for key in ("before", "after"))
        difference = "-" if row["difference"] is None else f"{row['difference']:+.4f}"
        cells.append((row["name"], f"{row['metric']} ({row['better']} is better)", *numbers, difference))
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


__all__ = ["comparison", "comparison_text"]
