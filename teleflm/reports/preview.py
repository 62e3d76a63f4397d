# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What is trained on and what is not, token by token, as a page."""

from collections.abc import Sequence
from pathlib import Path

from sft.data.checks import Reject
from sft.data.preview import PreviewedRow, visible

from .page import render_page

_TEMPLATE = Path(__file__).with_name("preview.html.jinja")


def render_html(rows: Sequence[PreviewedRow | Reject], title: str) -> str:
    """A self-contained page: every token with its id and weight, what is trained on in colour. Everything is escaped.

    Args:
        rows: from [`preview`].
        title: what the data are called.
    """
    return render_page(
        _TEMPLATE,
        title=visible(title),
        rows=[row for row in rows if isinstance(row, PreviewedRow)],
        rejects=[visible(str(row)) for row in rows if isinstance(row, Reject)],
    )
