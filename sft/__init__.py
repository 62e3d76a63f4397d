# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Supervised fine-tuning of Tele-FLM with TRL.

Importing this package is cheap: torch, transformers and TRL are imported by the modules that need them.
`sft.training.train.train` is the entry point from Python; from a shell `teleflm sft train`, on several devices
`accelerate launch --no_python teleflm sft train`.
"""


class SFTError(ValueError):
    """Training refuses its input. The message is one line: what, where, and the way out."""


__all__ = ["SFTError"]
