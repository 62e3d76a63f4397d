# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Whether a row can be trained on: one judgement, for `validate`, `prepare`, `preview` and `train` alike."""

import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft.data.formats import Problem, Progress, Row, Turn, find_turns, read_rows

ROLES = ("system", "user", "assistant")

# Every code a row can be rejected with.
REASONS = {
    "not_utf8": "the line is not UTF-8",
    "invalid_json": "the line is not JSON",
    "row_too_large": "the line is longer than any conversation",
    "not_an_object": "the row is not an object",
    "missing_columns": "the row has the columns of no known layout",
    "no_messages": "the messages are no list, or an empty one",
    "bad_message": "a message is not an object",
    "unknown_role": "a role is none of system, user, assistant",
    "system_not_first": "a system message comes after another message",
    "starts_with_assistant": "the assistant answers nothing",
    "repeated_role": "two messages in a row are from the same side",
    "bad_content": "a content is missing or not text",
    "empty_turn": "a user or the assistant says nothing",
    "control_token": "a content spells out a control token, which would become the real one",
    "bad_weight": "a weight is not a number from 0, or not the assistant's",
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
        messages: reduced to `role` and `content`.
        source: `file:row`, from 1.
        weights: of the loss, one for each assistant message.
    """

    messages: list[dict[str, str]]
    source: str
    weights: tuple[float, ...] = ()


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
) -> Iterator[tuple[Row, Conversation | Reject]]:
    """Read and judge every row, in order, in bounded memory: of a file's earlier rows only 8 bytes an id are kept.

    Args:
        data: see [`sft.data.formats.read_rows`].
        control_tokens: texts that no content may contain; see [`sft.tokenizer.control_tokens`].
        progress: told of bytes.
        repeated_ids: whether rows of one file may have one id.

    Raises:
        DataError: a file cannot be read.
    """
    spelled_out, place, ids = _any_of(control_tokens), None, _Ids()
    for row in read_rows(data, progress):
        if row.place != place:  # files that number their rows from 0 may lie side by side
            place, ids = row.place, _Ids()
        if row.problem:
            yield row, Reject(row.source, row.id, (row.problem,))
            continue
        turns, problems = find_turns(row.value)
        if turns:
            problems += _turn_problems(turns, spelled_out)
        if not repeated_ids and row.unique_id is not None and not ids.add(row.unique_id):
            problems.append(Problem("duplicate_id", f"an earlier row of the file has the id {row.unique_id!r}"))
        if problems:
            yield row, Reject(row.source, row.id, tuple(problems))
        else:
            weights = tuple(float(_weight(turn)) for turn in turns if turn.role == "assistant")
            yield row, Conversation([message_of(turn) for turn in turns], row.source, weights)


def message_of(turn: Turn) -> dict[str, str]:
    """A valid turn as a chat template takes it."""
    return {"role": turn.role, "content": turn.content}


def check_turns(turns: Sequence[Turn], control_tokens: Collection[str] = ()) -> list[Problem]:
    """All that is wrong with the turns of a conversation; nothing if it can be trained on.

    Args:
        turns: at least one.
        control_tokens: texts that no content may contain.
    """
    return _turn_problems(turns, _any_of(control_tokens))


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    # Without texts: what never matches. One search a message, however many tokens there are; the longest name first.
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _turn_problems(turns: Sequence[Turn], control_tokens: re.Pattern[str]) -> list[Problem]:
    problems: list[Problem] = []
    for index, turn in enumerate(turns):
        problems += _role_problems(index, turn, turns[index - 1] if index else None)
        problems += _content_problems(turn, control_tokens)
        problems += _weight_problems(turn)
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        problems.append(Problem("no_assistant", f"none of its {len(turns)} messages is an assistant's"))
    elif not problems and not any(_weight(turn) for turn in answers):
        problems.append(Problem("nothing_trained", f"the weights of its {len(answers)} assistant messages are all 0"))
    return problems


def _role_problems(index: int, turn: Turn, previous: Turn | None) -> Iterator[Problem]:
    if turn.role not in ROLES:
        yield Problem("unknown_role", f"{turn.where} has role {turn.role!r}; expected {', '.join(ROLES)}")
    elif turn.role == "system":
        if index > 0:
            yield Problem("system_not_first", f"{turn.where} is a system message; only the first one may be")
    elif previous is not None and turn.role == previous.role:
        yield Problem("repeated_role", f"{turn.where} follows {previous.where}, both with role {turn.role}")
    elif turn.role == "assistant" and (previous is None or previous.role == "system"):
        yield Problem("starts_with_assistant", f"{turn.where} is an assistant's and answers nobody")


def _content_problems(turn: Turn, control_tokens: re.Pattern[str]) -> Iterator[Problem]:
    if not isinstance(turn.content, str):
        found = type(turn.content).__name__
        yield Problem("bad_content", f"{turn.where} has a content of type {found}; expected text")
    elif re.search("[\ud800-\udfff]", turn.content):
        yield Problem("bad_content", f"{turn.where} has half of a surrogate pair, which is no character")
    elif turn.role != "system" and not turn.content.strip():
        yield Problem("empty_turn", f"{turn.where} is blank")
    elif spelled := control_tokens.search(turn.content):
        yield Problem("control_token", f"{turn.where} contains {spelled[0]}; remove or rewrite it")


def _weight_problems(turn: Turn) -> Iterator[Problem]:
    weight = turn.weight
    if weight is None:
        return
    # Comparing is exact; an integer of 400 digits is no float, not even infinity.
    if not isinstance(weight, int | float) or not 0 <= weight <= sys.float_info.max:
        yield Problem("bad_weight", f"{turn.where} has weight {_shown(weight)}; expected a number from 0")
    elif weight and turn.role != "assistant":
        yield Problem(
            "bad_weight", f"{turn.where} has weight {weight}, but role {turn.role}; only answers are trained on"
        )


def _shown(weight: object) -> str:
    try:
        text = repr(weight)
    except ValueError:  # more digits than Python prints
        return "of thousands of digits"
    return text if len(text) <= 40 else f"{text[:37]}..."


def _weight(turn: Turn) -> float:
    return 1.0 if turn.weight is None else turn.weight


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


__all__ = ["REASONS", "ROLES", "Conversation", "Reject", "check_rows", "check_turns", "message_of"]
