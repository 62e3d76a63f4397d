# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Which rows of its sources an epoch has, and how often.

The weight of a source is how often an epoch has each of its rows. With n rows and weight w an epoch has t = w * n of
them, rounded, halves up: each row t // n times, and those t % n that the seed puts first once more. So sources are
mixed in proportion to weight * rows. It is no probability of drawing from a source: an epoch has just these rows.
`max_rows` and `max_tokens` then bound what an epoch has of the source: its rows come in the order of the seed, pass
after pass, and end before the first that would exceed a bound.

The order of the seed is of the hash of a conversation, not of its place: another order of rows or of files takes the
same. Of several sources the rows are mixed, in an order that the seed decides too, so that packs have rows of all.
"""

from fractions import Fraction
from typing import TYPE_CHECKING

from sft.data.formats import DataError
from sft.data.sources import Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def take(source: Source, rows: "NDArray[np.uint64]", tokens: "NDArray[np.int32]", seed: int) -> "NDArray[np.int64]":
    """How often an epoch has each row of a source.

    Args:
        source: its weight and bounds.
        rows: [rows], the hash of each conversation.
        tokens: [rows], the length of each.
        seed: of the choice.

    Returns:
        [rows], counts.

    Raises:
        DataError: that is no row.
    """
    import numpy as np

    count = len(rows)
    wanted = int(Fraction(repr(source.weight)) * count + Fraction(1, 2))
    if source.max_rows is not None:
        wanted = min(wanted, source.max_rows)
    order = np.argsort(_scramble(rows, seed), kind="stable")
    whole, rest = divmod(wanted, count) if count else (0, 0)
    if source.max_tokens is not None and count:
        lengths = tokens[order].astype(np.int64)
        passes = min(whole, source.max_tokens // int(lengths.sum()))
        within = np.searchsorted(np.cumsum(lengths), source.max_tokens - passes * int(lengths.sum()), side="right")
        rest = int(within) if passes < whole else min(rest, int(within))
        whole = passes
    counts = np.full(count, whole, np.int64)
    counts[order[:rest]] += 1
    if not counts.any():
        caps = [f"{key} {value}" for key in ("max_rows", "max_tokens") if (value := getattr(source, key)) is not None]
        bounds = " and ".join([f"weight {source.weight:g}", *caps])
        raise DataError(f"{source.name}: {bounds} of {count} rows is no row; raise it, or leave the source out.")
    return counts


def order_rows(counts: "list[NDArray[np.int64]]", seed: int) -> "NDArray[np.int64]":
    """The rows of an epoch, numbered through all sources.

    One source: in the order of its rows, pass after pass. Several: mixed.

    Args:
        counts: of each source, how often an epoch has each row.
        seed: of the order.
    """
    import numpy as np

    found, start = [], 0
    for source in counts:
        found += [start + np.flatnonzero(source > done) for done in range(int(source.max(initial=0)))]
        start += len(source)
    rows = np.concatenate(found) if found else np.empty(0, np.int64)
    return np.random.default_rng(seed).permutation(rows) if len(counts) > 1 else rows


def _scramble(rows: "NDArray[np.uint64]", seed: int) -> "NDArray[np.uint64]":
    """Another hash of each hash, for each seed: the finalizer of splitmix64, a bijection, of both together."""
    import numpy as np

    mixed = rows ^ _finalize(np.array([seed % (1 << 64)], np.uint64))
    return _finalize(mixed)


def _finalize(values: "NDArray[np.uint64]") -> "NDArray[np.uint64]":
    import numpy as np

    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


__all__ = ["order_rows", "take"]
