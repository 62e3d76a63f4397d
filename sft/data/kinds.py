# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Which trainer a file is for, as far as its first row tells."""

from collections.abc import Sequence
from pathlib import Path

from sft.data.formats import read_rows
from sft.data.preferences import is_labelled, is_pair
from sft.data.prompts import is_prompt


def detect_trainer(data: str | Path | Sequence[str | Path]) -> str:
    """Which trainer a file is for, by the columns with a value of its first row that is an object.

    `chosen` and `rejected`: `dpo`; `prompt`, `completion` and `label`: `kto`; `prompt` and none of the columns of
    conversations (`completion`, `messages`, `conversations`, `instruction`): `grpo`; anything else: `sft`.

    Raises:
        DataError: a file cannot be read.
    """
    for row in read_rows(data):
        if row.problem or not isinstance(row.value, dict):
            continue
        if is_pair(row.value):
            return "dpo"
        if is_labelled(row.value):
            return "kto"
        return "grpo" if is_prompt(row.value) else "sft"
    return "sft"


__all__ = ["detect_trainer"]
