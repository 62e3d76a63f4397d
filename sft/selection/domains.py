# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a conversation is about, by rules: `code`, `math`, `multi_turn` or `general`; or as a column of the data says.

The rules ask in this order: does it hold code, does it calculate, has it several questions? They are meant for quotas,
where a mistake in a few of a hundred rows is harmless.
"""

import json
import re
from collections.abc import Sequence

import pyarrow as pa

from .common import OWN_TEXT, Reading
from .rows import whole_text
from .stages import drop_none

DOMAINS = ("code", "math", "multi_turn", "general")
MAX_CHARACTERS = 8192  # enough to see what it is about

# All take time in proportion to the text, whatever it is: no two repeats in a row can share out the same characters.
_CODE = re.compile(
    r"```|^[ \t]*+(def \w+\(.*:|class \w+[^\n]*:$|from [\w.]+ import |import \w+$|#include[ \t]*<|using namespace |"
    r"(public|private) (static )?\w+ \w+\(|(async )?function \w*\(|(const|let|var) \w+ = |SELECT .+ FROM |fn \w+\()",
    re.MULTILINE,
)
_FORMULA = re.compile(
    r"\\(frac|sqrt|sum|int|boxed|begin\{|cdot|times|leq?|geq?|pi)\b|\$[^$\n\\^_=]*+[\\^_=][^$\n]*+\$|^####",
    re.MULTILINE,
)
_CALCULATION = re.compile(r"\d\s{0,9}[%)\]]?\s{0,9}[-+*/×÷^]\s{0,9}[$(\[]?\s{0,9}\d[\d.,)\]]*+[^\n=]{0,40}+=")
MIN_CALCULATIONS = 2


def tag_domains(table: pa.Table, column: str | None = None, reading: Reading = OWN_TEXT) -> pa.Table:
    """`domain`: by the rules, or what the rows have in a column of theirs; by the rules where that is absent.

    Args:
        table: with `row`, and perhaps `common`: what many rows share, and the system's prompt, say nothing of one.
        column: of the data.
        reading: what the rules look at.
    """
    tags = [tag_domain(messages) for messages in reading.conversations(table)]
    if column is not None:
        given = (json.loads(row.as_py()).get(column) for row in table["row"])
        # Half of a surrogate pair, which JSON can spell, is no text.
        named = (None if own is None else str(own).encode("utf-8", "replace").decode() for own in given)
        tags = [tag if own is None else own for tag, own in zip(tags, named, strict=True)]
    return pa.table({"drop": drop_none(len(table)), "domain": pa.array(tags, pa.string())})


def tag_domain(messages: Sequence[dict[str, str]]) -> str:
    """The domain of one conversation."""
    text = whole_text(messages)[:MAX_CHARACTERS]
    if _CODE.search(text):
        return "code"
    if _FORMULA.search(text) or len(_CALCULATION.findall(text)) >= MIN_CALCULATIONS:
        return "math"
    questions = sum(message["role"] == "user" for message in messages)
    return "multi_turn" if questions > 1 else "general"


__all__ = ["DOMAINS", "tag_domain", "tag_domains"]
