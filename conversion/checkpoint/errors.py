# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The errors that readers, planners and the executor raise for bad input."""

_MAX_MESSAGE = 2000
_MAX_QUOTED = 500  # characters of what a library says


def printable(text: str) -> str:
    """A text that a file holds, as it can be shown: line breaks and what would command a terminal are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def one_line(error: BaseException) -> str:
    """What a library's error says, as one line of bounded length; its kind too, where the words alone say too little.

    Args:
        error: of any kind.
    """
    text = " ".join(str(error).split())[:_MAX_QUOTED]
    is_plain = text and isinstance(error, OSError | ValueError | ImportError)
    return text if is_plain else f"{type(error).__name__}: {text}".removesuffix(": ")


class CheckpointError(ValueError):
    """A checkpoint cannot be used as it is.

    The message is one line: the file or field, the two values that disagree, and what to do. It stays one whatever a
    file calls its tensors.
    """

    def __init__(self, message: str) -> None:
        text = printable(message)
        super().__init__(text if len(text) <= _MAX_MESSAGE else f"{text[: _MAX_MESSAGE - 3]}...")


class CorruptData(CheckpointError):
    """A source that was readable when the plan was made failed while its data was being read."""


class NotFinite(CorruptData):
    """A value that was to be written is NaN or infinite."""


class Overflow(CorruptData):
    """A finite value is too large for the type that it was to be written in."""


class ImpossibleState(CorruptData):
    """A value of an optimizer's state that no optimizer has, or can go on from."""


class Unquantisable(CorruptData):
    """A value that is NaN or infinite was to be written in a type that has a scale for each row."""
