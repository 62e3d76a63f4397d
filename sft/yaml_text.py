# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""YAML that people write, read as they mean it. Plain values only: nothing in a file can make an object or run."""

import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
# The core schema of YAML 1.2. PyYAML is 1.1: it reads `1e-9` as a string, `no` as False, `010` as 8, `1:30` as 90.
_PATTERNS = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
_MERGE = "<<"
_MAX_REPEATED = 10_000  # values that aliases say once more
_MAX_BITS = 14_000  # of an integer: Python writes out no longer ones, not even into a message


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars, no key twice, no merges."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # PyYAML's own readers of a tag raise whatever comes
            told = f"{node.value[:40]!r} is" if isinstance(node, yaml.ScalarNode) else "there is what is"
            raise _refusal(f"{told} no {node.tag.removeprefix(_TAG)}", node) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):  # else the base class says what it is
            seen = set[Hashable]()
            for key_node, _ in node.value:
                if isinstance(key_node, yaml.ScalarNode) and key_node.style is None and key_node.value == _MERGE:
                    raise _refusal("merges (<<) are not supported; write the keys out", key_node)
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, Hashable):
                    raise _refusal("a list or a mapping is no key", key_node)
                if key in seen:
                    raise _refusal(f"{str(key_node.value)[:40]} is given twice", node)
                seen.add(key)
        return super().construct_mapping(node, deep)


def _refusal(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _read_scalar(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """A value of one of the kinds there are patterns for, whether it was told its kind (`!!int 3`) or has its form."""
    text, kind = loader.construct_scalar(node), node.tag.removeprefix(_TAG)
    if not re.fullmatch(_PATTERNS[kind][0], text):
        raise ValueError
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        number = int(text.replace("0o", "").replace("0x", ""), {"0o": 8, "0x": 16}.get(text[:2], 10))
        if number.bit_length() > _MAX_BITS:
            raise ValueError
        return number
    lower = text.lower()
    if lower.endswith(".inf"):
        return -math.inf if lower[0] == "-" else math.inf
    return math.nan if lower == ".nan" else float(lower)


for _kind, (_pattern, _first) in _PATTERNS.items():
    _Loader.add_implicit_resolver(
        _TAG + _kind, re.compile(f"(?:{_pattern})$"), ["" if _kind == "null" else _first[0], *_first]
    )
    _Loader.add_constructor(_TAG + _kind, _read_scalar)


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """How many values a node stands for, each alias counted as what it repeats.

    Args:
        node: to count.
        counts: of the nodes that are counted; 0 of those that are being counted.
    """
    if id(node) not in counts:
        counts[id(node)] = 0
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        counts[id(node)] = 1 + sum(_count(child, counts) for child in children)
    elif not counts[id(node)]:
        raise _refusal("it holds an alias of itself", node)
    return counts[id(node)]


def load_yaml(text: str) -> Any:
    """What a text of YAML says.

    Raises:
        yaml.YAMLError: it is no YAML, gives a key twice, asks for more than plain values, or its aliases repeat more
            than [`_MAX_REPEATED`] of them.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        counts: dict[int, int] = {}
        if _count(node, counts) > len(counts) + _MAX_REPEATED:
            raise _refusal(f"its aliases stand for more than {_MAX_REPEATED:,} values; write out what is meant", node)
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None


__all__ = ["load_yaml"]
