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

    Returns:
        values of what was not measured are None; so is the difference if a resumed run measured another file of that
        name than its first session, or in another way.
    """
    rows = []
    same_way = all((before or {}).get(key) == (after or {}).get(key) for key in _HOW)
    for name, metric, better in dict.fromkeys([*_metrics(before or {}), *_metrics(after or {})]):
        first, second = (_entry(found, name) for found in (before, after))
        values = [_number(entry.get(metric)) for entry in (first, second)]
        comparable = same_way and first.get("sha256") == second.get("sha256")
        rows.append(
            {
                "name": name,
                "metric": metric,
                "better": better,
                "before": values[0],
                "after": values[1],
                "difference": _difference(*values) if comparable else None,
            }
        )
    return rows


_HOW = ("dtype", "window", "stride")


def _metrics(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    texts = [(text["name"], "bits_per_byte", "lower") for text in found.get("texts", ())]
    tasks = [(task["name"], metric, "higher") for task in found.get("tasks", ()) for metric in ("acc", "acc_norm")]
    return [*texts, *tasks]


def _entry(found: dict[str, Any] | None, name: str) -> dict[str, Any]:
    entries = (*(found or {}).get("texts", ()), *(found or {}).get("tasks", ()))
    return next((entry for entry in entries if entry["name"] == name), {})


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


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
