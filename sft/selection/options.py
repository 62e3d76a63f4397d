# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What an operator of the selection can be told, and how it is checked, in a file and on the command line alike."""

import difflib
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .stages import SelectionError


class Option(Protocol):
    """Something to be told.

    Args:
        default: unless told.
        meaning: in one line.
        setting: field of [`sft.selection.settings.SelectionSettings`], and so the option of the command line, that
            tells it too; empty if only `--set` does, or the file alone.
    """

    @property
    def default(self) -> Any:
        """Unless told."""

    @property
    def meaning(self) -> str:
        """In one line."""

    @property
    def setting(self) -> str:
        """Field of the settings."""

    def read(self, value: Any, name: str) -> Any:
        """A value as the operator takes it.

        Args:
            value: as YAML or the settings have it.
            name: begins the message if it cannot be taken.

        Raises:
            SelectionError: it is of another type, or out of range.
        """


@dataclass(frozen=True)
class Number:
    """A number that an operator goes by.

    Args:
        default: unless set; if it is a whole number, others have to be.
        least, greatest: possible.
        meaning, setting: see [`Option`].
    """

    default: float
    least: float
    greatest: float
    meaning: str
    setting: str = ""

    def read(self, value: Any, name: str) -> Any:
        """See [`Option`]: int or float, as the default is."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SelectionError(f"{name} is {show(value)}; expected a number.")
        if not self.least <= value <= self.greatest:  # also of NaN
            raise SelectionError(f"{name} is {_show_number(value)}; it is from {self.least:g} to {self.greatest:g}.")
        if isinstance(self.default, int) and value != int(value):
            raise SelectionError(f"{name} is {_show_number(value)}; it is a whole number.")
        return type(self.default)(value)


@dataclass(frozen=True)
class Name:
    """One name: of a column, or of a model.

    Args:
        meaning, setting: see [`Option`].
        is_path: it may be a path of this machine, which is nobody else's business.
    """

    meaning: str
    setting: str = ""
    is_path: bool = False
    default: str | None = None

    def read(self, value: Any, name: str) -> str | None:
        """See [`Option`]."""
        if value is not None and not (isinstance(value, str) and value):
            raise SelectionError(f"{name} is {show(value)}; expected a name, or null.")
        return value


@dataclass(frozen=True)
class Names:
    """Any number of files."""

    meaning: str
    setting: str = ""
    is_path: bool = True
    default: tuple[str, ...] = ()

    def read(self, value: Any, name: str) -> tuple[str, ...]:
        """See [`Option`]."""
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) and item for item in value):
            raise SelectionError(f"{name} is {show(value)}; expected a list of names.")
        if repeated := [item for place, item in enumerate(value) if item in value[:place]]:
            raise SelectionError(f"{name}: {repeated[0]} is given twice.")
        return tuple(value)


@dataclass(frozen=True)
class OneOf:
    """One of some names, or none of them, which leaves it to the operator."""

    names: tuple[str, ...]
    meaning: str
    setting: str = ""
    default: str | None = None

    def read(self, value: Any, name: str) -> str | None:
        """See [`Option`]."""
        if value is not None and value not in self.names:
            raise SelectionError(f"{name} is {show(value)}; expected one of {', '.join(self.names)}.")
        return value


@dataclass(frozen=True)
class Shares:
    """Shares of a whole, by name; None: none are asked for."""

    meaning: str
    setting: str = ""
    default: dict[str, float] | None = None

    def read(self, value: Any, name: str) -> dict[str, float] | None:
        """See [`Option`]."""
        if value is None:
            return None
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise SelectionError(
                f"{name} is {show(value)}; expected names with shares, as in {{math: 0.5, code: 0.5}}."
            )
        for key, share in value.items():
            if isinstance(share, bool) or not isinstance(share, int | float):
                raise SelectionError(f"{name}: {key} is {show(share)}; expected a number.")
            if not 0 <= share <= 1:
                raise SelectionError(f"{name}: {key} is {_show_number(share)}; a share is from 0 to 1.")
        total = math.fsum(value.values())
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise SelectionError(f"{name}: the shares sum to {total:g}, not to 1.")
        return dict(value)


_SHOWN = 60  # characters
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 2 * _SHOWN


def show(value: Any) -> str:
    """A value in a message: as Python writes it, no more of it than fits."""
    if isinstance(value, int) and value.bit_length() > 4 * _SHOWN:
        return f"a number of {value.bit_length():,} bits"
    text = _SHORT.repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _show_number(value: float) -> str:
    try:
        return f"{value:g}"
    except OverflowError:  # whole numbers may be larger than a float
        return show(value)


def name_nearest(name: object, known: Iterable[str]) -> str:
    """What may be meant by a name that is not known, in words."""
    names = list(known)
    nearest = difflib.get_close_matches(name, names, n=1) if isinstance(name, str) else []
    return f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(names)}."


def parse_thresholds(pairs: Sequence[str]) -> dict[str, float]:
    """OPERATOR.NAME=VALUE, as on the command line.

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
            raise SelectionError(f"--set: {pair!r} is not OPERATOR.NAME=NUMBER, as in heuristics.min_words=5.")
        if name in given:
            raise SelectionError(f"--set: {name} is given twice.")
        given[name] = value
    return given


__all__ = ["Name", "Names", "Number", "OneOf", "Option", "Shares", "name_nearest", "parse_thresholds", "show"]
