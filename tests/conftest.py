# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Settings of the whole suite."""

from hypothesis import settings

# Shared machines stall at any moment, so the time of an example says nothing; and a suite that gates rolls no dice.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
