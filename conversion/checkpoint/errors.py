# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The errors that readers, planners and the executor raise for bad input."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used as it is.

    The message is one line: the file or field, the two values that disagree, and what to do.
    """


class CorruptData(CheckpointError):
    """A source that was readable when the plan was made failed while its data was being read."""


class NotFinite(CorruptData):
    """A value that was to be written is NaN or infinite."""


class Overflow(CorruptData):
    """A finite value is too large for the type that it was to be written in."""
