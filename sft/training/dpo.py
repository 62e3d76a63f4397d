# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Pairs of answers for direct preference optimization, judged as conversations are.

A row has `prompt`, a text or a list of messages that ends with the user's, and `chosen` and `rejected`, each a text or
a list of messages with the assistant's answer. Both conversations, prompt and answer, must be valid by
[`sft.data.checks`]; the other reason to reject a row is that the two answers are the same.

TRL tokenizes the pairs: with the chat template, the answer being what follows the prompt.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from sft.data.checks import Reject, check_turns, message_of
from sft.data.formats import Problem, Row, Turn, read_rows, turns_of
from sft.data.labels import DataReport, Labelling, require_rows, say_left_out
from sft.data.tools import read_tools, to_json
from sft.tokenizer import control_tokens, find_left_out

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_COLUMNS = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
# The messages of each column; and `tools`, as JSON text, where a row has them.
Pair = dict[str, Any]


def prepare_preferences(
    files: str | Path | Sequence[str | Path],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    allow_rejects: bool = False,
) -> tuple["Dataset", DataReport]:
    """Read pairs of answers.

    Args:
        files: see [`sft.data.formats.read_rows`].
        tokenizer: its chat template says how long a prompt is.
        max_length: rows whose prompt alone is as long are dropped, because nothing of the answers would be left.
        allow_rejects: leave invalid rows out (they are in the report) instead of raising.

    Returns:
        a dataset with columns `prompt`, `chosen` and `rejected` (lists of messages), of at least one row; and what
        became of all rows. Its tokens are those of both conversations, its trained tokens those after the prompts,
        each conversation cut at `max_length`.

    Raises:
        DataError: a file cannot be read; there are invalid rows and they are not allowed; no row is left.
    """
    from datasets import Dataset

    places = [files] if isinstance(files, str | Path) else list(files)
    controls = control_tokens(tokenizer)
    pairs: list[Pair] = []
    rejects, rows, truncated, tokens, trained = [], 0, 0, 0, 0
    digest = xxhash.xxh3_128()
    for row in read_rows(places):
        rows += 1
        pair, problems = read_pair(row, controls)
        said = [message for column in _COLUMNS for message in pair.get(column, ())]
        if not problems and (name := find_left_out(tokenizer, said, pair.get("tools", ()))):
            problems = [say_left_out(name)]
        if not problems:
            lengths = _lengths(pair, tokenizer)
            cut = [length if max_length is None else min(length, max_length) for length in lengths]
            if min(cut[1:]) <= lengths[0]:
                problems = [Problem("nothing_left", f"its prompt has {lengths[0]} tokens, max_length is {max_length}")]
        if problems:
            rejects.append(Reject(row.source, row.id, tuple(problems)))
            continue
        pairs.append(pair)
        truncated += cut != lengths
        tokens += sum(cut[1:])
        trained += sum(cut[1:]) - 2 * lengths[0]
        digest.update(repr(pair).encode("utf-8", "surrogatepass"))
    report = DataReport(rows, tuple(rejects), truncated, tokens, trained, digest.hexdigest())
    require_rows(report, places, Labelling(max_length), allow_rejects)
    if any("tools" in pair for pair in pairs):  # a column of all rows: Dataset takes the columns of the first
        pairs = [{"tools": None, **pair} for pair in pairs]
    return Dataset.from_list(pairs), report


def read_pair(row: Row, controls: Collection[str] = ()) -> tuple[Pair, list[Problem]]:
    """The pair of a row, and all that is wrong with it.

    Args:
        row: as it stands in its file.
        controls: texts that no content may contain.
    """
    if row.problem:
        return {}, [row.problem]
    if not isinstance(row.value, dict):
        return {}, [Problem("not_an_object", f"it is a {type(row.value).__name__}; expected an object")]
    missing = [column for column in _COLUMNS if row.value.get(column) is None]
    if missing:
        return {}, [Problem("missing_columns", f"it has no {', '.join(missing)}; a pair needs all of {[*_COLUMNS]}")]

    turns: dict[str, list[Turn]] = {}
    problems: list[Problem] = []
    for column, role in _COLUMNS.items():
        value = row.value[column]
        turns[column], wrong = ([Turn(column, role, value)], []) if isinstance(value, str) else turns_of(value, column)
        problems += wrong
        if column != "prompt":
            # TRL learns all that follows the prompt.
            results = [turn.where for turn in turns[column] if turn.role == "tool"]
            problems += [Problem("stray_result", f"{where} is a tool's, in an answer") for where in results]
    tools, wrong = read_tools(row.value)
    problems += wrong
    if not problems:
        # The prompt is judged twice, with each answer; what is wrong with it is said once.
        found = [check_turns([*turns["prompt"], *turns[answer]], controls, tools) for answer in ("chosen", "rejected")]
        problems = list(dict.fromkeys(problem for problems in found for problem in problems))
    pair: Pair = {column: [_arrow_message(turn) for turn in turns[column]] for column in _COLUMNS}
    if tools:
        pair["tools"] = to_json(tools)
    if not problems and pair["chosen"] == pair["rejected"]:
        problems = [Problem("same_answers", "chosen and rejected are the same; there is nothing to prefer")]
    return pair, problems


def _arrow_message(turn: Turn) -> dict[str, Any]:
    """A message whose arguments are JSON text: as objects, Arrow would give each the fields of all others."""
    message = message_of(turn)
    for call in message.get("tool_calls", ()):
        call["function"]["arguments"] = to_json(call["function"]["arguments"])
    return message


def _lengths(pair: Pair, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokens of the prompt, of the conversation with the chosen answer, of that with the other."""

    def length(messages: list[dict[str, str]], **kwargs: Any) -> int:
        tools = json.loads(pair["tools"]) if "tools" in pair else None
        encoding: Any = tokenizer.apply_chat_template(messages, tools=tools, return_dict=True, **kwargs)
        return len(encoding["input_ids"])

    prompt = pair["prompt"]
    answered = [length([*prompt, *pair[answer]]) for answer in ("chosen", "rejected")]
    return [length(prompt, add_generation_prompt=True), *answered]


__all__ = ["prepare_preferences", "read_pair"]
