# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The life of a small Tele-FLM in a few minutes: `python -m demo`. Read `demo/__main__.py` from the top."""

import os

# Libraries read these when they are imported, so they are set here, before `demo.__main__` imports them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that spin while they wait make a small model several times slower on cores that others use too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
