# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Numbers in files that may come from anyone, and in what users type: one place decides what counts as one.

A pickle or a JSON text can say `True`, a text, NaN, -3 or an integer of four hundred digits where a count of steps is
meant. Python takes the first for 1, and fails of the last with an OverflowError wherever it first becomes a float.
"""

import math
import re
import sys
from typing import Any

from .errors import CheckpointError, printable
from .inert_pickle import Inert
from .plan import View
from .reader import FileReader
from .torch_file import UnreadableTensor

LARGEST = sys.float_info.max  # an integer of Python's may be larger than any float
MAX_COUNT = 2**53  # up to there a float holds every whole number
MAX_SIZE = 2**63 - 1  # bytes: no file system counts further
_INTEGERS = ("int8", "uint8", "int16", "int32", "int64")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SHOWN = 80
_NO_SIZE = "is not a positive number of bytes with an optional unit such as MB or GiB."


def read_number(
    value: Any,
    where: str,
    *,
    least: float = -LARGEST,
    most: float = LARGEST,
    below: float = math.inf,
    above: float = -math.inf,
    way_out: str = "",
) -> float:
    """A finite number.

    Args:
        value: an integer or a float; anything else is none, True and False too.
        where: what it is, for the message: file and field.
        least, most: what it may be.
        below, above: what it has to be below and above of.
        way_out: what to do where it is none, as the end of a sentence.

    Raises:
        CheckpointError: it is none, or out of that range.
    """
    fits = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -LARGEST <= value <= LARGEST  # which NaN is not
        and least <= value <= most
        and above < value < below
    )
    if not fits:
        raise _refusal(value, where, f"a number{_range(least, most, below, above)}", way_out)
    return float(value)


def read_count(value: Any, where: str, *, least: int = 0, most: int = MAX_COUNT, way_out: str = "") -> int:
    """A whole number, which may be written as a float: 3.0.

    Args:
        value, where, way_out: see `read_number`.
        least, most: what it may be.

    Raises:
        CheckpointError: it is none, or out of that range.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    if not is_number or value != int(value):
        upper = " on" if most == MAX_COUNT else f" to {most:,}"
        raise _refusal(value, where, f"a whole number from {least:,}{upper}", way_out)
    return int(value)


def plain_value(value: Any, reader: FileReader) -> Any:
    """What a tensor of one element holds, as a number; anything else as it is."""
    if isinstance(value, View) and value.numel == 1 and (value.dtype.is_floating or value.dtype.name in _INTEGERS):
        number = reader.read(value).reshape(-1)[0]
        return float(number) if value.dtype.is_floating else int(number)
    return value


def shown(value: Any) -> str:
    """A value for a message: a number or a short text as Python writes it, of anything else what it is."""
    if isinstance(value, int) and value.bit_length() > 4 * _SHOWN:  # Python refuses to write out the longest
        return f"an integer of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value[: 2 * _SHOWN] if isinstance(value, str) else value)
        return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
    if isinstance(value, Inert):
        return f"an object, {printable(value.qualified_name[:_SHOWN])}"
    return "a tensor" if isinstance(value, View | UnreadableTensor) else f"a {type(value).__name__}"


def parse_size(text: str | int | float) -> int:
    """Read a size as users write it (`5GB`, `500MB`, `2GiB`, or bytes) into bytes.

    Raises:
        ValueError: it is none, less than a byte, or 2^63 bytes or more; or a text of less than 1000 without a unit,
            which nobody means as bytes.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        nbytes = int(min(max(text, 0), 2.0 * MAX_SIZE)) if text == text else 0  # NaN is not itself
    else:
        match = re.fullmatch(r"\s*0*(\d*)(?:\.(\d+))?\s*((?:[KMGT]I?)?B)?\s*", str(text).upper(), re.ASCII)
        unit = _UNITS.get(match[3] or "") if match and (match[1] or match[2] or "0" in str(text)) else None
        if match is None or unit is None:
            raise ValueError(f"size {shown(text)} {_NO_SIZE}")
        # In integers, as 0.1 is no float; and of as many digits as count.
        whole, decimals = match[1][:40], (match[2] or "")[:40]
        nbytes = int(f"0{whole}{decimals}") * unit // 10 ** len(decimals)
        if match[3] is None and 0 < nbytes < 1000:
            raise ValueError(
                f"size {shown(text)} has no unit, and so few bytes hold nothing: {nbytes}GB, or {nbytes}MB?"
            )
    if nbytes < 1:
        raise ValueError(f"size {shown(text)} {_NO_SIZE}")
    if nbytes > MAX_SIZE:
        raise ValueError(f"size {shown(text)} is more than the {MAX_SIZE:,} bytes that a file can have.")
    return nbytes


def _range(least: float, most: float, below: float, above: float) -> str:
    ends = {"above": above, "at least": least, "below": below, "at most": most}
    said = " and ".join(f"{word} {end:g}" for word, end in ends.items() if abs(end) < LARGEST)
    return f" {said}" if said else ""


def _refusal(value: Any, where: str, expected: str, way_out: str) -> CheckpointError:
    return CheckpointError(f"{where} is {shown(value)}, expected {expected}{f'; {way_out}' if way_out else ''}.")


__all__ = ["LARGEST", "MAX_COUNT", "parse_size", "plain_value", "read_count", "read_number", "shown"]
