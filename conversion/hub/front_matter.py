# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The YAML at the beginning of a card, which the Hub reads: split off, parsed, changed key by key.

huggingface_hub parses and writes it as a whole, which loses comments and turns `language: no` into `false`; and to
import that costs ten times as much as `yaml`. What it and the Hub agree on, where the block ends, is the same here.
"""

import re
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from ..checkpoint.errors import CheckpointError

# As the Hub's server has it, and huggingface_hub after it.
_BLOCK = re.compile(r"\A\s*---(?:\r\n|\r|\n)([\s\S]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|\Z)")
_EMPTY = re.compile(r"\A\s*---(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|\Z)")
_MAX_CHARACTERS = 500_000  # model-index of hundreds of tasks included
_MAX_DEPTH = 100  # of brackets, whose parsing takes time with the square of it


def split_card(text: str) -> tuple[str | None, str]:
    """The YAML of a card, None if it has none, and what comes after it."""
    if match := _EMPTY.match(text) or _BLOCK.match(text):
        return (match[1] if match.re is _BLOCK else ""), text[match.end() :]
    return None, text


def parse_metadata(block: str | None, where: str = "README.md") -> dict[str, Any]:
    """What the YAML of a card says.

    Args:
        block: see `split_card`.
        where: what to call the card in errors.

    Raises:
        CheckpointError: it is not YAML, no mapping, or uses anchors, which can make much of little.
    """
    import yaml

    if not block:
        return {}
    if len(block) > _MAX_CHARACTERS:
        raise CheckpointError(f"{where}: its metadata has {len(block)} characters, expected at most {_MAX_CHARACTERS}.")
    if _depth(block) > _MAX_DEPTH:
        raise CheckpointError(f"{where}: its metadata nests too deeply; correct it.")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(block, Loader=yaml.SafeLoader)):
            raise CheckpointError(f"{where}: its metadata refers to itself (*name); write the value out instead.")
        value = yaml.safe_load(block)
    except RecursionError:
        raise CheckpointError(f"{where}: its metadata nests too deeply; correct it.") from None
    except CheckpointError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{where}: the metadata between its first --- and the next is not YAML ({said})."
        ) from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: its metadata is a YAML {type(value).__name__}, expected keys with values.")
    return value


def _depth(block: str) -> int:
    """How deep brackets nest at most, those within strings included."""
    steps = (1 if bracket[0] in "[{" else -1 for bracket in re.finditer(r"[][{}]", block))
    return max(accumulate(steps, initial=0))


def write_metadata(metadata: Mapping[str, Any]) -> str:
    """Metadata as the lines between the two `---`."""
    import yaml

    return str(yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=1000)) if metadata else ""


def change_metadata(block: str, changes: Mapping[str, Any]) -> str:
    """YAML with some top-level keys changed or added; all others stay letter by letter, with their comments.

    Args:
        block: the YAML, which `parse_metadata` accepts.
        changes: key -> its new value, or None to take it out.
    """
    old = parse_metadata(block)
    changes = {key: value for key, value in changes.items() if old.get(key) != value}
    if not changes:
        return block
    chunks = _chunks(block)
    if chunks is None or old.keys() - {key for key, _ in chunks}:
        return write_metadata({key: value for key, value in {**old, **changes}.items() if value is not None})
    lines, done = [], set()
    for key, chunk in chunks:
        if key not in changes:
            lines.append(chunk if chunk.endswith("\n") else chunk + "\n")
        elif key not in done and changes[key] is not None:
            lines.append(write_metadata({key: changes[key]}))
        done.add(key)
    added = {key: value for key, value in changes.items() if key not in done and value is not None}
    return "".join(lines) + write_metadata(added)


def _chunks(block: str) -> list[tuple[str | None, str]] | None:
    """Every top-level key with its lines, comments before it with the key above; None where it is not so simple."""
    import yaml

    node = yaml.compose(block, Loader=yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode) or node.flow_style:
        return None
    starts = [key.start_mark for key, _ in node.value]
    if any(mark.column for mark in starts) or re.search(r"^(---|\.\.\.|%)", block, re.MULTILINE):
        return None
    places = [mark.index for mark in starts]
    ends = [*places[1:], len(block)]
    head: list[tuple[str | None, str]] = [(None, block[: places[0]])] if places[0] else []
    keys = [str(key.value) for key, _ in node.value]
    return head + [(key, block[start:end]) for key, start, end in zip(keys, places, ends, strict=True)]
