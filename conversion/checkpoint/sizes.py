# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Sizes for people."""


def format_bytes(count: float) -> str:
    """A size for people: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # what is nearer to 1000 is one of the next unit, as 1e+03 of this one is for nobody
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB" if count < 999.95 else f"{count:,.0f} TB"
