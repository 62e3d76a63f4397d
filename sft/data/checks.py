# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Whether a row can be trained on: one judgement, for `validate`, `prepare`, `preview` and `train` alike."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.data.formats import Opened, Problem, Progress, Row, Turn, find_turns, read_rows, wrong_part
from sft.data.tools import OpenCalls, read_calls, read_tools, to_json, tool_name

ROLES = ("system", "user", "assistant", "tool")
# Role -> what begins something else in its turn, in Tele-FLM's chat template; ordinary text to the tokenizer.
_ENCLOSING = {"system": "<tools>", "user": "<tool_response>", "assistant": "<tool_call>"}

# What a weight other than 0 may be: it is trained with as float32, where less has fewer digits, and in the end is 0.
MIN_WEIGHT, MAX_WEIGHT = 2.0**-126, 1e6

# Every code a row can be rejected with.
REASONS = {
    "not_utf8": "the line is not UTF-8",
    "invalid_json": "the line is not JSON",
    "row_too_large": "the line is longer than any conversation",
    "not_an_object": "the row is not an object",
    "missing_columns": "the row has the columns of no known layout",
    "no_messages": "the messages are no list, or an empty one",
    "bad_message": "a message is not an object",
    "unknown_role": "a role is none of system, user, assistant, tool",
    "system_not_first": "a system message comes after another message",
    "starts_with_assistant": "the assistant answers nothing",
    "repeated_role": "two messages in a row are from the same side",
    "bad_content": "a content is missing or not text",
    "empty_turn": "a user or the assistant says nothing",
    "control_token": "a content spells out a control token, which would become the real one",
    "bad_weight": "a weight is no number of float32, not the assistant's, not what train says, or of no effect here",
    "bad_reasoning": "reasoning is not text, or not the assistant's, or two fields of it differ",
    "bad_tools": "the tools are not a list of JSON Schemas of functions, each with its own name",
    "bad_tool_call": "a tool call is not a function's name with an object of arguments, or not the assistant's",
    "unknown_tool": "a call is of none of the row's tools",
    "unanswered_call": "a message comes between a call and its result",
    "stray_result": "a tool's result is not that of the next open call",
    "ambiguous_text": "a text beside tools or reasoning spells out what encloses them",
    "no_assistant": "there is no assistant message to learn from",
    "nothing_trained": "every assistant message that could be learned from has weight 0",
    "duplicate_id": "an earlier row of the file has the same id",
    "template_refuses": "the chat template refuses the conversation",
    "nothing_left": "cut at the greatest length, the row has no trained token left",
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A valid row.

    Args:
        messages: as [`message_of`] makes them.
        source: `file:row`, from 1.
        weights: of the loss, one for each assistant message.
        tools: JSON Schemas of what the assistant can call.
    """

    messages: list[dict[str, Any]]
    source: str
    weights: tuple[float, ...] = ()
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be trained on.

    Args:
        source: `file:row`, from 1.
        id: the row's own `id`, if it has one.
        problems: all that is wrong with it, at least one.
    """

    source: str
    id: str | int | None
    problems: tuple[Problem, ...]

    @property
    def reason(self) -> str:
        """The code of the first problem."""
        return self.problems[0].code

    @property
    def is_dropped(self) -> bool:
        """Whether the row is valid, and only too long for the greatest length: it is left out, and no error."""
        return self.reason == "nothing_left"

    @property
    def detail(self) -> str:
        """What exactly is wrong, all of it, in one line."""
        return "; ".join(problem.detail for problem in self.problems)

    def __str__(self) -> str:
        name = self.source if self.id is None else f"{self.source} (id {self.id!r})"
        return f"{name}: {self.detail}"


def check_rows(
    data: str | Path | Sequence[str | Path],
    control_tokens: Collection[str] = (),
    progress: Progress | None = None,
    *,
    repeated_ids: bool = False,
    opened: Opened | None = None,
) -> Iterator[tuple[Row, Conversation | Reject]]:
    """Read and judge every row, in order, in bounded memory: of a file's earlier rows only 8 bytes an id are kept.

    Args:
        data: see [`sft.data.formats.read_rows`].
        control_tokens: texts that no content may contain; see [`sft.tokenizer.control_tokens`].
        progress: told of bytes.
        repeated_ids: whether rows of one file may have one id.
        opened: see [`sft.data.formats.read_rows`].

    Raises:
        DataError: a file cannot be read.
    """
    spelled_out, place, ids = _any_of(control_tokens), None, _Ids()
    for row in read_rows(data, progress, opened):
        if row.place != place:  # files that number their rows from 0 may lie side by side
            place, ids = row.place, _Ids()
        if row.problem:
            yield row, Reject(row.source, row.id, (row.problem,))
            continue
        turns, problems = find_turns(row.value)
        tools, wrong = read_tools(row.value)
        if turns:
            problems += [*wrong, *_turn_problems(turns, spelled_out, tools)]
        if not repeated_ids and row.unique_id is not None and not ids.add(row.unique_id):
            problems.append(Problem("duplicate_id", f"an earlier row of the file has the id {row.unique_id!r}"))
        if problems:
            yield row, Reject(row.source, row.id, tuple(problems))
        else:
            weights = tuple(float(weight_of(turn)) for turn in turns if turn.role == "assistant")
            yield row, Conversation([message_of(turn) for turn in turns], row.source, weights, tools)


def message_of(turn: Turn) -> dict[str, Any]:
    """A valid turn as a chat template takes it: `role` and `content`, and of what else it says that which is rendered.

    The content of an assistant who only calls is an empty text; `arguments` are objects; reasoning is called
    `reasoning_content`.
    """
    message = {"role": turn.role, "content": turn.content or ""}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning[0]
    if calls := read_calls(turn)[0]:
        message["tool_calls"] = calls
    if turn.role == "tool":
        message |= {name: value for name in ("tool_call_id", "name") if (value := getattr(turn, name)) is not None}
    return message


def check_turns(
    turns: Sequence[Turn], control_tokens: Collection[str] = (), tools: Sequence[dict[str, Any]] = ()
) -> list[Problem]:
    """All that is wrong with the turns of a conversation; nothing if it can be trained on.

    Args:
        turns: at least one.
        control_tokens: texts that nothing that is rendered may contain.
        tools: of the row; see [`sft.data.tools.read_tools`].
    """
    return _turn_problems(turns, _any_of(control_tokens), tools)


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    # Without texts: what never matches. One search a message, however many tokens there are; the longest name first.
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _turn_problems(
    turns: Sequence[Turn], control_tokens: re.Pattern[str], tools: Sequence[dict[str, Any]]
) -> list[Problem]:
    problems = list(_text_problems("tools", to_json(list(tools)), control_tokens)) if tools else []
    has_tools = bool(tools) or any(turn.role == "tool" or turn.tool_calls is not None for turn in turns)
    open_calls = OpenCalls([name for tool in tools if (name := tool_name(tool))])
    for index, turn in enumerate(turns):
        calls, wrong = read_calls(turn)
        problems += [*_role_problems(index, turn, turns[index - 1] if index else None), *wrong]
        problems += open_calls.follow(turn, calls)
        problems += _content_problems(turn, control_tokens, has_calls=bool(calls or wrong))
        problems += _reasoning_problems(turn, control_tokens)
        if calls and not wrong:
            problems += _text_problems(f"{turn.where}.tool_calls", to_json(calls), control_tokens)
        problems += _ambiguity_problems(turn, has_tools)
        problems += _weight_problems(turn)
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        problems.append(Problem("no_assistant", f"none of its {len(turns)} messages is an assistant's"))
    elif not problems and not any(weight_of(turn) for turn in answers):
        problems.append(Problem("nothing_trained", f"the weights of its {len(answers)} assistant messages are all 0"))
    return problems


def _role_problems(index: int, turn: Turn, previous: Turn | None) -> Iterator[Problem]:
    if turn.role not in ROLES:
        yield Problem("unknown_role", f"{turn.where} has role {turn.role!r}; expected {', '.join(ROLES)}")
    elif turn.role == "system":
        if index > 0:
            yield Problem("system_not_first", f"{turn.where} is a system message; only the first one may be")
    elif turn.role == "tool":  # as many as there are calls; see OpenCalls
        return
    elif previous is not None and turn.role == previous.role:
        yield Problem("repeated_role", f"{turn.where} follows {previous.where}, both with role {turn.role}")
    elif turn.role == "assistant" and (previous is None or previous.role == "system"):
        yield Problem("starts_with_assistant", f"{turn.where} is an assistant's and answers nobody")


def _content_problems(turn: Turn, control_tokens: re.Pattern[str], *, has_calls: bool) -> Iterator[Problem]:
    if turn.content is None and has_calls:
        return
    if isinstance(turn.content, list) and turn.content:
        wrong = next(filter(None, map(wrong_part, turn.content)), "a content in parts that were not joined")
        yield Problem("bad_content", f"{turn.where} has {wrong}; only text can be trained on")
    elif not isinstance(turn.content, str):
        found = type(turn.content).__name__ if turn.content != [] else "list, which is empty"
        yield Problem("bad_content", f"{turn.where} has a content of type {found}; expected text")
    elif turn.role in ("user", "assistant") and not turn.content.strip() and not has_calls:
        yield Problem("empty_turn", f"{turn.where} is blank" + (" but for its reasoning" if turn.reasoning else ""))
    else:
        yield from _text_problems(turn.where, turn.content, control_tokens)


def _text_problems(where: str, text: str, control_tokens: re.Pattern[str]) -> Iterator[Problem]:
    """Why a text cannot be tokenized as the text that it is."""
    if re.search("[\ud800-\udfff]", text):
        yield Problem("bad_content", f"{where} has half of a surrogate pair, which is no character")
    elif spelled := control_tokens.search(text):
        yield Problem("control_token", f"{where} contains {spelled[0]}; remove or rewrite it")


def _reasoning_problems(turn: Turn, control_tokens: re.Pattern[str]) -> Iterator[Problem]:
    if not turn.reasoning:
        return
    if turn.role != "assistant":
        yield Problem("bad_reasoning", f"{turn.where} has reasoning, but role {turn.role!r}")
    elif not isinstance(turn.reasoning[0], str):
        found = type(turn.reasoning[0]).__name__
        yield Problem("bad_reasoning", f"{turn.where} has reasoning of type {found}; expected text")
    elif any(other != turn.reasoning[0] for other in turn.reasoning):
        yield Problem(
            "bad_reasoning", f"{turn.where} has two fields of reasoning, which differ; keep reasoning_content"
        )
    else:
        yield from _text_problems(f"{turn.where}.reasoning_content", turn.reasoning[0], control_tokens)


def _ambiguity_problems(turn: Turn, has_tools: bool) -> Iterator[Problem]:
    """What would be read as the end of the reasoning, or as a call, a result or tools.

    Only beside reasoning and tools: in a row without, a text is rendered as it stands, whatever it spells out.
    """
    if turn.reasoning and isinstance(turn.reasoning[0], str) and "</think>" in turn.reasoning[0]:
        where = f"{turn.where}.reasoning_content"
        yield Problem("ambiguous_text", f"{where} contains </think>, which would end it; remove or rewrite it")
    mark = _ENCLOSING.get(turn.role) if has_tools and isinstance(turn.role, str) else None
    if mark and isinstance(turn.content, str) and mark in turn.content:
        way_out = "put calls into tool_calls" if turn.role == "assistant" else "remove or rewrite it"
        yield Problem("ambiguous_text", f"{turn.where} contains {mark} as text, in a row with tools; {way_out}")


def _weight_problems(turn: Turn) -> Iterator[Problem]:
    weight = turn.weight
    if turn.train is not None and not isinstance(turn.train, bool):
        yield Problem("bad_weight", f"{turn.where} has train {_shown(turn.train)}; expected true or false")
        return
    if weight is None and turn.train and turn.role != "assistant":
        yield Problem("bad_weight", f"{turn.where} has train true, but role {turn.role}; only answers are trained on")
    if weight is None:
        return
    # Comparing is exact; an integer of 400 digits is no float, not even infinity.
    if not isinstance(weight, int | float) or not (weight == 0 or MIN_WEIGHT <= weight <= MAX_WEIGHT):
        expected = f"expected 0, or a number from {MIN_WEIGHT:.2g}, the least of float32, to {MAX_WEIGHT:,.0f}"
        yield Problem("bad_weight", f"{turn.where} has weight {_shown(weight)}; {expected}")
    elif weight and turn.role != "assistant":
        yield Problem(
            "bad_weight", f"{turn.where} has weight {weight}, but role {turn.role}; only answers are trained on"
        )
    elif turn.train is not None and weight != turn.train:
        said = str(turn.train).lower()
        yield Problem("bad_weight", f"{turn.where} has train {said} and weight {_shown(weight)}; leave one of them out")


def _shown(weight: object) -> str:
    try:
        text = repr(weight)
    except ValueError:  # more digits than Python prints
        return "of thousands of digits"
    return text if len(text) <= 40 else f"{text[:37]}..."


def weight_of(turn: Turn) -> float:
    """What a turn of the assistant counts in the loss, whichever of its fields says so."""
    if turn.weight is not None:
        return turn.weight
    return 0.0 if turn.train is False else 1.0


class _Ids:
    """The ids so far, as 64-bit hashes: two of ten million different ids meet with a probability of 3e-6."""

    _RECENT = 1 << 18

    def __init__(self) -> None:
        import numpy as np

        self._recent: set[int] = set()
        self._older = np.empty(0, np.uint64)

    def add(self, name: str | int) -> bool:
        """Whether the id is new."""
        import numpy as np
        import xxhash

        digest = xxhash.xxh3_64_intdigest(repr(name).encode("utf-8", "surrogatepass"))
        place = int(self._older.searchsorted(np.uint64(digest)))
        if digest in self._recent or (place < len(self._older) and self._older[place] == digest):
            return False
        self._recent.add(digest)
        if len(self._recent) == self._RECENT:
            self._older = np.sort(np.concatenate([self._older, np.fromiter(self._recent, np.uint64)]))
            self._recent.clear()
        return True


__all__ = ["REASONS", "ROLES", "Conversation", "Reject", "check_rows", "check_turns", "message_of", "weight_of"]
