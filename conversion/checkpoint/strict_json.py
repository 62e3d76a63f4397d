# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""JSON as checkpoints need it: one object, no name given twice, no surprise that is not a `CheckpointError`."""

import json
from typing import Any

from .errors import CheckpointError


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse UTF-8 JSON whose top level is an object.

    Python's parser keeps the last of two equal names; in a header or an index that would hide a tensor.

    Args:
        text: the JSON.
        where: what it is, for the message.

    Raises:
        CheckpointError: it is not JSON, nests too deeply, is no object, or one of its objects repeats a name.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_names)
    except RecursionError:
        raise CheckpointError(f"{where} nests too deeply to be JSON of a checkpoint.") from None
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}; copy or download the file again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is a JSON {type(value).__name__}, expected an object.")
    return value


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"{name!r} occurs twice")
        name.encode()  # an escaped half of a surrogate pair is no text: UnicodeEncodeError is a ValueError
        members[name] = value
    return members
