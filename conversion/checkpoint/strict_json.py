# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""JSON as checkpoints need it: one object, no name given twice, no surprise that is not a `CheckpointError`.

Three bytes of JSON can make 72 in memory, and few of them a stack as deep as the process has. So what a text would take
is estimated before it is parsed, from how many objects and members its punctuation allows, and how deep it nests is
looked at before anybody walks it.
"""

import json
from collections.abc import Iterator
from typing import Any

from .bytes import Where, full_name, reading
from .errors import CheckpointError

# The index of 140,000 tensors, more than any model has, takes 81 MB.
MAX_JSON_MEMORY = 96 * 2**20
MAX_JSON_DEPTH = 100
_MAX_DIGITS = 308  # of an integer: whoever makes a float of one may take it for granted that there is one
# Bytes in memory, measured: an object or list; a value after a comma; a name with its value, while its object grows.
_PER_CONTAINER, _PER_ITEM, _PER_MEMBER = 72, 72, 170


def read_json_object(
    where: Where, *, limit: int = MAX_JSON_MEMORY, infinite: bool = False, nan: bool = False
) -> dict[str, Any]:
    """Read a file of UTF-8 JSON whose top level is an object.

    Args:
        where: the file.
        limit, infinite, nan: see `parse_json_object`.

    Raises:
        CheckpointError: the file cannot be read, or see `parse_json_object`.
    """
    with reading(where) as data:
        text = data.read(0, data.size, limit=limit // 3, what="its JSON")  # bytes, text, and the strings in it
    return parse_json_object(text, full_name(where), limit=limit, infinite=infinite, nan=nan)


def parse_json_object(
    text: bytes, where: str, *, limit: int = MAX_JSON_MEMORY, infinite: bool = False, nan: bool = False
) -> dict[str, Any]:
    """Parse UTF-8 JSON whose top level is an object.

    Python's parser keeps the last of two equal names; in a header or an index that would hide a tensor.

    Args:
        text: the JSON.
        where: what it is, for the message.
        limit: bytes of memory that it may take at most.
        infinite: whether `Infinity` is a number, as in configurations of some models; NaN, which no two readings of a
            file can be compared by, is none.
        nan: whether both are, as in the log of a run that a Trainer keeps.

    Raises:
        CheckpointError: it is not JSON, nests too deeply, is no object, takes too much memory, or one of its objects
            repeats a name.
    """
    needed = _memory(text)
    if needed > limit:
        raise CheckpointError(f"{where} could take {needed} bytes of memory, the limit is {limit}; no checkpoint does.")
    decoder = _ANY if nan else _INFINITE if infinite else _FINITE
    try:
        value = decoder.decode(text.decode("utf-8"))
        _check_tree(value)
    except RecursionError:
        raise CheckpointError(f"{where} nests deeper than {MAX_JSON_DEPTH} levels; no checkpoint does.") from None
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}; copy or download the file again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is a JSON {type(value).__name__}, expected an object.")
    return value


def _memory(text: bytes) -> int:
    """What a JSON text takes at most, in bytes: its own, those of its characters twice, and what they describe.

    Punctuation inside of strings counts as if it were outside.
    """
    containers, items, members = text.count(b"{") + text.count(b"["), text.count(b","), text.count(b":")
    width = 1 if text.isascii() else 4
    described = _PER_CONTAINER * containers + _PER_ITEM * items + _PER_MEMBER * members
    return (1 + 2 * width) * len(text) + described


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"{_short(name)} occurs twice")
        _check_text(name)
        members[name] = value
    return members


def _short(name: str) -> str:
    return repr(name) if len(name) <= 100 else repr(name[:97]) + "..."


def _check_text(text: str) -> None:
    if not text.isascii():
        text.encode()  # an escaped half of a surrogate pair is no text: UnicodeEncodeError is a ValueError


def _check_tree(value: Any) -> None:
    """Look at every text, and at how deep they lie; RecursionError if that is too deep."""
    path: list[Iterator[Any]] = [iter((value,))]
    while path:
        for item in path[-1]:
            kind = type(item)
            if kind is str:
                _check_text(item)
            elif kind is dict or kind is list:
                path.append(iter(item.values()) if kind is dict else iter(item))
                break
        else:
            path.pop()
        if len(path) > MAX_JSON_DEPTH:
            raise RecursionError


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _infinity(constant: str) -> float:
    return float(constant) if constant != "NaN" else _refuse(constant)


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(digits.lstrip('-'))} digits")
    return int(digits)


_FINITE = json.JSONDecoder(object_pairs_hook=_unique_names, parse_int=_integer, parse_constant=_refuse)
_INFINITE = json.JSONDecoder(object_pairs_hook=_unique_names, parse_int=_integer, parse_constant=_infinity)
_ANY = json.JSONDecoder(object_pairs_hook=_unique_names, parse_int=_integer, parse_constant=float)
