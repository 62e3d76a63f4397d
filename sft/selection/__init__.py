# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""From many conversations to fewer: no duplicates, nothing damaged, every subject.

In the spirit of the FLM-2 paper, whose own method is not public: this one is ours. The modules in the order in which
the data passes them: `rows`, `common`, `dedup`, `decontaminate`, `domains`, `heuristics`, `score`, `embed`,
`diversity`; `thresholds` names what can be set, `pipeline` puts them together, `stages` and `executors` say how they
run, `report` shows what came of it.
"""

from .pipeline import METHODS, Selection, SelectionSettings, select_conversations
from .stages import SelectionError, StageResult

__all__ = [
    "METHODS",
    "Selection",
    "SelectionError",
    "SelectionSettings",
    "StageResult",
    "select_conversations",
]
