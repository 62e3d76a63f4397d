# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The last step: what was chosen is held against what was asked for."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .domains import DOMAINS
from .stages import SelectionError

OTHERS = "--allow-fewer fills up from the other domains of the quota, and takes fewer rows if these have too few"


class TooFewError(SelectionError):
    """Fewer rows than asked for, before it is said where the others went."""


def choose_enough(
    table: Any, choose: Callable[[Any], Any], count: int, quota: Mapping[str, float] | None, allow_fewer: bool
) -> Any:
    """What `choose` makes of a table, if it found as many rows as were asked for, or fewer will do.

    Raises:
        TooFewError: it did not.
    """
    chosen = choose(table)
    found = chosen["drop"].null_count
    if found < count and not allow_fewer:
        left = "" if len(table) == found else f" in the domains of --quota ({len(table):,} in all)"
        raise TooFewError(f"only {found:,} rows are left{left}, fewer than -n {count:,}; --allow-fewer takes them.")
    if quota and not allow_fewer and (short := find_shortfall(table["domain"].to_pylist(), count, quota)):
        raise TooFewError(f"{short}; {OTHERS}.")
    return chosen


def find_shortfall(tags: Sequence[str], count: int, quota: Mapping[str, float]) -> str:
    """What a quota asks for and is not there, in words; empty if all of it is."""
    there = Counter(tags)
    wanted = {domain: math.floor(share * count + 1e-9) for domain, share in quota.items()}
    short = [f"{there[domain]:,} of {rows:,} {domain}" for domain, rows in wanted.items() if there[domain] < rows]
    return f"--quota cannot be met: {', '.join(short)} rows are left" if short else ""


def check_domains(tags: Sequence[str], quota: Mapping[str, float]) -> None:
    """Refuse a quota that names what neither the rules nor the data know.

    Raises:
        SelectionError: it does; with the domains that there are, and their rows.
    """
    there = Counter(tags)
    if unknown := sorted(set(quota) - {*there, *DOMAINS}):
        found = ", ".join(f"{domain} ({rows:,})" for domain, rows in there.most_common(20))
        raise SelectionError(f"--quota: no row has the domain {unknown[0]}; the rows left are of {found}.")


def say_what_fills(tags: Sequence[str], count: int, quota: Mapping[str, float]) -> str:
    """What `--allow-fewer` does about a shortfall."""
    found = sum(rows for domain, rows in Counter(tags).items() if quota.get(domain))
    if found >= count:
        return "other domains of the quota take their place"
    return f"its domains have {found:,} rows in all, fewer than {count:,}"


__all__ = ["OTHERS", "TooFewError", "check_domains", "choose_enough", "find_shortfall", "say_what_fills"]
