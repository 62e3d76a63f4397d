# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Choose the conversations that are worth training on: no duplicates, nothing damaged, every subject.

python examples/select_conversations.py DATA.jsonl OUT COUNT
"""

import sys

from sft.selection import SelectionSettings, select_conversations


def main(data: str, out: str, count: str) -> None:
    """Write OUT/selected.jsonl, OUT/rejects.jsonl and OUT/selection.json."""
    selection = select_conversations(data, out, SelectionSettings(count=int(count)), rejects=True)
    for stage in selection.stages:
        print(f"{stage.name}: {stage.rows_in} -> {stage.rows_out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
