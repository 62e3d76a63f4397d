# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The error of training itself; what is wrong with a checkpoint is a `CheckpointError`."""


class RunError(ValueError):
    """A run is not, or could not be, what it was asked to be, and no step was done; or it could not be saved.

    The message is one line.
    """


__all__ = ["RunError"]
