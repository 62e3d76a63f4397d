# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A card that is published again: what we wrote is written anew, what its owner wrote stays.

What we write lies between `<!-- teleflm:begin NAME -->` and `<!-- teleflm:end NAME -->`, each on a line of its own. All
else is the owner's, letter by letter. Marks that do not pair mark
nothing, and are the owner's text as well; `card_check.check_card` names them.

A region that the owner took out stays out, but for two: `origin`, because a card that hides what a model was made from
is worse than none, and `results`, because whoever gives results wants them shown. A card without any of our regions
gets all of them, at its end, and keeps its own title.
"""

import re
from collections import Counter
from collections.abc import Collection
from itertools import pairwise
from typing import Any

from .card import REGIONS
from .front_matter import change_metadata, parse_metadata, split_card, write_metadata
from .results import merge_model_index, without_measured

_MARK = re.compile(r"^[ \t]*<!--[ \t]*teleflm:(begin|end)[ \t]+([a-z]+)[ \t]*-->[ \t]*\r?$", re.MULTILINE)
_ALWAYS = ("origin", "results")
_TITLE = "title"


def merge_cards(fresh: str, owners: str | None, certain: Collection[str] = ("library_name",)) -> str:
    """The card to publish, of the one that follows from the facts and the one that is there.

    Merging the result once more with the same facts changes nothing.

    Args:
        fresh: what `card.render_card` made.
        owners: the card that is there; None if there is none.
        certain: metadata that follows from facts, and replaces the owner's (`CardFacts.certain`). Of the rest, the
            owner's counts; `tags` and `model-index` are joined, but for results of `teleflm eval`, which are claimed
            of the weights that they were measured of, and of no later ones.

    Raises:
        CheckpointError: the owner's metadata is not YAML, so that nothing can be changed in it.
    """
    if owners is None or not owners.strip():
        return fresh
    block, body = split_card(owners.removeprefix("\ufeff"))
    new_block, new_body = split_card(fresh)
    metadata = _merge_metadata(new_block or "", block, certain)
    return f"---\n{metadata.rstrip()}\n---\n{_merge_body(new_body, body)}"


def has_owners_text(card: str) -> bool:
    """Whether anything of a card's text is not ours."""
    body = split_card(card)[1]
    ends = [0, *(place for _, start, end in _regions(body) for place in (start, end)), len(body)]
    return any(body[start:end].strip() for start, end in zip(ends[::2], ends[1::2], strict=True))


def _merge_metadata(fresh: str, owners: str | None, certain: Collection[str]) -> str:
    if owners is None:
        return fresh
    new, old = parse_metadata(fresh), parse_metadata(owners)
    changes: dict[str, Any] = {key: value for key, value in new.items() if key in certain or old.get(key) is None}
    if "base_model" in certain and old.get("base_model") != new.get("base_model"):
        changes["base_model_relation"] = new.get("base_model_relation")
    elif "base_model_relation" not in certain and old.get("base_model") is not None:
        changes.pop("base_model_relation", None)  # the relation is to the owner's base
    if isinstance(old.get("license"), str):
        changes = {key: value for key, value in changes.items() if key not in ("license_name", "license_link")}
    if old.get("tags"):
        theirs = old["tags"] if isinstance(old["tags"], list) else [old["tags"]]
        missing = [tag for tag in new.get("tags", []) if tag not in theirs]
        changes |= {"tags": [*theirs, *missing]} if missing else {}
    said = without_measured(old.get("model-index"))
    if new.get("model-index"):
        changes["model-index"] = merge_model_index(new["model-index"], said)
    elif said != old.get("model-index"):
        changes["model-index"] = said
    return change_metadata(owners, changes) if old else write_metadata(new)


def _merge_body(fresh: str, owners: str) -> str:
    new = {name: fresh[start:end] for name, start, end in _regions(fresh)}
    if not owners.strip():
        return fresh
    found = _regions(owners)
    marked = {mark[2] for mark in _MARK.finditer(owners)}
    if not found:
        rest = [text for name, text in new.items() if name != _TITLE and name not in marked]
        return owners + _gap(owners) + "\n\n".join(rest) + "\n" if rest else owners
    text, last = [], 0
    for name, start, end in found:
        text += [owners[last:start], new.get(name, owners[start:end])]
        last = end
    merged = "".join([*text, owners[last:]])
    for name in _ALWAYS:
        if name in new and name not in marked:
            merged = _insert(merged, name, new[name])
    return merged


def _insert(body: str, name: str, text: str) -> str:
    """Put a region where it belongs among those that are there: after the last that comes before it."""
    places = _regions(body)
    before = [end for other, _, end in places if REGIONS.index(other) < REGIONS.index(name)]
    if before:
        return f"{body[: max(before)]}\n\n{text}{body[max(before) :]}"
    return f"{body[: places[0][1]]}{text}\n\n{body[places[0][1] :]}"


def _regions(body: str) -> list[tuple[str, int, int]]:
    """Name, beginning and end of every region of ours.

    Of a name, every beginning has to be followed by its end and every end preceded by its beginning, or else all of
    its marks are text: which lines between them are whose cannot be told.
    """
    marks = list(_MARK.finditer(body))
    whole = [
        (first, end)
        for first, end in pairwise(marks)
        if (first[1], end[1]) == ("begin", "end") and first[2] == end[2] and first[2] in REGIONS
    ]
    paired = Counter(first[2] for first, _ in whole)
    found = Counter(mark[2] for mark in marks)
    return [
        (first[2], first.start(), end.end() - end[0].endswith("\r"))
        for first, end in whole
        if 2 * paired[first[2]] == found[first[2]]
    ]


def broken_marks(card: str) -> list[str]:
    """Names of the regions whose marks do not pair, so that what is between them is never renewed."""
    body = split_card(card)[1]
    whole = {name for name, *_ in _regions(body)}
    return sorted({mark[2] for mark in _MARK.finditer(body)} & {*REGIONS} - whole)


def _gap(text: str) -> str:
    return "" if text.endswith("\n\n") else "\n" if text.endswith("\n") else "\n\n"


__all__ = ["broken_marks", "has_owners_text", "merge_cards"]
