# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""From many conversations to fewer: no duplicates, nothing damaged, every subject.

In the spirit of the FLM-2 paper, whose own method is not public: this one is ours. The modules in the order in which
the data passes them: `rows`, `common`, `dedup`, `decontaminate`, `domains`, `heuristics`, `score`, `embed` (and `rds`),
`diversity` or `target`. `operators` is the registry of what they offer and `options` what that can be told;
`declaration` reads the files that list operators (`pipelines/` has ours), `settings` lays the command line over one,
`pipeline` runs it, `stages` and `executors` say how.
"""

from .declaration import METHODS
from .pipeline import Selection, select_conversations
from .settings import SelectionSettings
from .stages import SelectionError, StageResult

__all__ = [
    "METHODS",
    "Selection",
    "SelectionError",
    "SelectionSettings",
    "StageResult",
    "select_conversations",
]
