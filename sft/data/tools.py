# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Tools of a row, calls of the assistant and their results: read, judged, and put into one form.

Tools and arguments come as objects or as JSON text. In objects a field that is null counts as absent, since Parquet and
Arrow give every object the fields of all others; JSON text is taken as it stands. All of it is rendered as JSON, so it
has to be JSON: no NaN, no name twice in one object, no more than [`MAX_DEPTH`] levels.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft.data.formats import Problem, Turn

MAX_DEPTH = 64  # far from where rendering, which recurses, would fail


def read_tools(row: Any) -> tuple[list[dict[str, Any]], list[Problem]]:
    """The tools of a row, none if it has no column of them, and what is wrong with them.

    Args:
        row: of any layout; `tools` is a list of JSON Schemas, each of a function (`{"type": "function", "function":
            {"name", "description", "parameters"}}`, or what stands in `function` alone), or JSON text of such a list.
    """
    tools = row.get("tools") if isinstance(row, dict) else None
    if tools is None or tools == [] or (isinstance(tools, str) and not tools.strip()):
        return [], []
    try:
        read = _plain(tools)
    except ValueError as error:
        return [], [Problem("bad_tools", f"tools: {error}")]
    if not isinstance(read, list):
        return [], [
            Problem("bad_tools", f"tools is a {_kind(read)}; expected a list of JSON Schemas, or JSON text of one")
        ]
    problems, names = [], set[str]()
    for index, tool in enumerate(read):
        name = tool_name(tool)
        if name is None:
            wanted = 'expected {"type": "function", "function": {"name": ...}}'
            problems.append(Problem("bad_tools", f"tools[{index}] has no function's name; {wanted}"))
        elif name in names:
            problems.append(Problem("bad_tools", f"tools[{index}] is called {_short(name)}, as an earlier one is"))
        else:
            names.add(name)
    return ([], problems) if problems else (read, [])


def tool_name(tool: Any) -> str | None:
    """What the function of a JSON Schema is called, if it says."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and name.strip() else None


def read_calls(turn: Turn) -> tuple[list[dict[str, Any]], list[Problem]]:
    """The calls of a message as `{"type": "function", "id", "function": {"name", "arguments"}}`, and what is wrong.

    `arguments` is an object; `id` is absent where the call has none.

    Args:
        turn: whose `tool_calls` is such a list, or of what stands in `function` alone, `arguments` perhaps as JSON text
            or absent; or JSON text of such a list, or of one call.
    """
    if turn.tool_calls is None:
        return [], []
    where = f"{turn.where}.tool_calls"
    if turn.role != "assistant":
        return [], [Problem("bad_tool_call", f"{turn.where} has tool_calls, but role {turn.role!r}")]
    try:
        calls = _parse(turn.tool_calls) if isinstance(turn.tool_calls, str) else turn.tool_calls
        calls = [calls] if isinstance(calls, dict) and isinstance(turn.tool_calls, str) else calls
        if not isinstance(calls, list):
            raise ValueError(f"is a {_kind(calls)}; expected a list of calls")
    except ValueError as error:
        return [], [Problem("bad_tool_call", f"{where} {error}")]
    read, problems = [], []
    for index, call in enumerate(calls):
        try:
            read.append(_read_call(call))
        except ValueError as error:
            problems.append(Problem("bad_tool_call", f"{where}[{index}] {error}"))
    ids = [call["id"] for call in read if "id" in call]
    if len(set(ids)) < len(ids):
        problems.append(Problem("bad_tool_call", f"{where}: two calls have one id"))
    return read, problems


def _read_call(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise ValueError(f"is a {_kind(call)}; expected an object")
    if call.get("type") not in (None, "function"):
        raise ValueError(f"is of type {_short(call['type'])}; only functions are called")
    function = call if call.get("function") is None else call["function"]
    if not isinstance(function, dict):
        raise ValueError(f"has a function that is a {_kind(function)}; expected an object with name and arguments")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name.strip():
        raise ValueError("names no function")
    try:
        arguments = {} if arguments is None else _plain(arguments)
    except ValueError as error:
        raise ValueError(f"has arguments that cannot be rendered: {error}") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"has arguments that are a {_kind(arguments)}; expected an object")
    if call.get("id") is not None and not isinstance(call["id"], str):
        raise ValueError(f"has an id that is a {_kind(call['id'])}; expected text")
    named = {"id": call["id"]} if call.get("id") else {}
    return {"type": "function", **named, "function": {"name": name, "arguments": arguments}}


# --- what answers what ------------------------------------------------------------------------------------------------


@dataclass
class OpenCalls:
    """The calls of the last assistant message that are not answered yet, as the messages of a row go by.

    Args:
        tools: names of the tools that may be called; any if there are none.
    """

    tools: Collection[str] = ()
    _open: list[dict[str, Any]] = field(default_factory=list)
    _where: str = ""

    def follow(self, turn: Turn, calls: Sequence[dict[str, Any]]) -> Iterator[Problem]:
        """What is wrong with the place of a message, going by the calls before it.

        Args:
            calls: of this message, from [`read_calls`].
        """
        if turn.role == "tool":
            yield from self._answer(turn)
            return
        if turn.tool_call_id is not None:
            yield Problem("stray_result", f"{turn.where} has a tool_call_id, but role {turn.role!r}")
        if self._open:
            names = ", ".join(_short(call["function"]["name"]) for call in self._open)
            yield Problem(
                "unanswered_call", f"{turn.where} comes before the result of {names}, called in {self._where}"
            )
        self._open, self._where = list(calls), turn.where
        for call in calls:
            if self.tools and call["function"]["name"] not in self.tools:
                name = _short(call["function"]["name"])
                yield Problem("unknown_tool", f"{turn.where} calls {name}, which is none of the row's tools")

    def _answer(self, turn: Turn) -> Iterator[Problem]:
        for name in ("tool_call_id", "name"):
            if getattr(turn, name) is not None and not isinstance(getattr(turn, name), str):
                kind = _kind(getattr(turn, name))
                yield Problem("stray_result", f"{turn.where} has a {name} that is a {kind}; expected text")
                return
        if not self._open:
            yield Problem("stray_result", f"{turn.where} is a tool's result, and no call is open")
            return
        # Results have no ids when rendered, so only their order says whose they are.
        call = self._open.pop(0)
        name, call_id = call["function"]["name"], call.get("id")
        if turn.tool_call_id is not None and turn.tool_call_id != call_id:
            found = f"has tool_call_id {_short(turn.tool_call_id)}"
        elif turn.name is not None and turn.name != name:
            found = f"has name {_short(turn.name)}"
        else:
            return
        of = f"the next open call is {_short(name)}" + ("" if call_id is None else f" with id {_short(call_id)}")
        yield Problem("stray_result", f"{turn.where} {found}, and {of}; put results in the order of their calls")


# --- JSON -------------------------------------------------------------------------------------------------------------


def to_json(value: Any) -> str:
    """A value as chat templates render it: transformers' filter `tojson`."""
    return json.dumps(value, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """What JSON text says, or an object without what is null in it.

    Raises:
        ValueError: it is no JSON, or could not be rendered as JSON.
    """
    value = _parse(value) if isinstance(value, str) else _without_nulls(value)
    try:
        json.dumps(value, allow_nan=False)
    except TypeError as error:  # a date or bytes, from Parquet
        raise ValueError(str(error)) from error
    return value


def _parse(text: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
        return _bounded(value)
    except RecursionError as error:
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is text that is no JSON ({error})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"has {_short(twice)} twice in one object")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"has {name}, which is no JSON")


def _bounded(value: Any, depth: int = 0) -> Any:
    """The value, if it is not nested too deep."""
    if depth > MAX_DEPTH:
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _bounded(part, depth + 1)
    return value


def _without_nulls(value: Any, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        return {name: _without_nulls(part, depth + 1) for name, part in value.items() if part is not None}
    return [_without_nulls(part, depth + 1) for part in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    return type(value).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


__all__ = ["MAX_DEPTH", "OpenCalls", "read_calls", "read_tools", "to_json", "tool_name"]
