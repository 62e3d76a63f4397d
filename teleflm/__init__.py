# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The program: everything that has a screen, and nothing else. Nothing below imports it."""

import sys
from types import TracebackType


def _say_interrupted(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """One line for Ctrl-C while modules are still imported, where no command is there to say it."""
    if issubclass(kind, KeyboardInterrupt) and "--debug" not in sys.argv:
        print("teleflm: interrupted; run the same command again.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _say_interrupted
