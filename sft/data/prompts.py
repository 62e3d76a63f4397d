# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Prompts whose completions are sampled and rewarded (`trainer: grpo`).

A row has `prompt`, a text (the user's) or messages that end with the user's, and any other columns: reward functions
get them, by name, exactly as the row has them. So they travel as JSON, because a table gives every row every column,
every object every key, and makes one type of numbers.
"""

import json
from array import array
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from conversion.checkpoint.errors import one_line
from sft.data.checks import Conversation, check_turns
from sft.data.examples import Example
from sft.data.formats import Problem, Row, Turn, turns_of
from sft.data.labels import Tokenized, say_left_out
from sft.data.preferences import arrow_message, weighted
from sft.tokenizer import find_left_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Columns of the dataset that hold a row's source and its other columns.
SOURCE, COLUMNS = "source", "columns"
# What TRL hands to every reward function, so that no column may be called so.
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
# What would be left out of the prompt, and why.
_NOT_READ = {
    **dict.fromkeys(("image", "images"), "but prompts are text here; remove or rename it"),
    "tools": "but TRL renders no tools of a row in the prompts that it samples from; remove it",
}


class Rewarder(Protocol):
    """What judging prompts has to know of a reward function."""

    name: str

    def applies(self, columns: Mapping[str, Any]) -> bool:
        """Whether a row has what it needs."""

    def fault(self, columns: Mapping[str, Any]) -> str | None:
        """Why what it needs of a row cannot be used, if so."""


class PromptJudge:
    """Judges rows as prompts; see [`sft.data.examples.Judge`].

    Args:
        rewards: the reward functions. At least one has to apply to a row; without any nothing of this is judged.
        max_completion_length: tokens that a completion may have.
        max_positions: tokens that the model can read, prompt and completion together; `None` is not judged.
        template_kwargs: of the chat template.
    """

    what = "prompts"

    def __init__(
        self,
        rewards: Sequence[Rewarder] = (),
        *,
        max_completion_length: int | None = None,
        max_positions: int | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._rewards = rewards
        self._max_completion_length = max_completion_length
        self._max_positions = max_positions
        self._template_kwargs = dict(template_kwargs or {})

    def read(self, row: Row, controls: Collection[str]) -> tuple[dict[str, Any], list[Problem]]:
        """`prompt` as messages, and the row's source and its other columns."""
        if row.problem:
            return {}, [row.problem]
        if not isinstance(row.value, dict):
            return {}, [Problem("not_an_object", f"it is a {type(row.value).__name__}; expected an object")]
        if row.value.get("prompt") is None:
            return {}, [Problem("missing_columns", "it has no prompt")]
        prompt = row.value["prompt"]
        turns, problems = (
            ([Turn("prompt", "user", prompt)], []) if isinstance(prompt, str) else turns_of(prompt, "prompt")
        )
        if problems:
            return {}, problems
        problems = _waits_for_answer(turns, controls) + weighted(turns, "nothing of a prompt is learned")
        others = {name: value for name, value in row.value.items() if name != "prompt" and value is not None}
        problems += self._column_problems(others)
        if problems:
            return {}, problems
        messages = [arrow_message(turn) for turn in turns]
        return {"prompt": messages, SOURCE: row.source, COLUMNS: json.dumps(others)}, []

    def _column_problems(self, others: Mapping[str, Any]) -> list[Problem]:
        why = {**dict.fromkeys(GIVEN, "which TRL itself gives; remove or rename it"), **_NOT_READ}
        for name, detail in why.items():
            if name in others and not (name == "tools" and not others[name]):
                return [Problem("bad_column", f"it has a column {name}, {detail}")]
        try:
            json.dumps(others)
        except (TypeError, ValueError) as error:
            return [Problem("bad_column", f"a column is no JSON: {one_line(error)}")]
        faults = [(reward.name, reward.fault(others)) for reward in self._rewards if reward.applies(others)]
        if self._rewards and not faults:
            names = ", ".join(reward.name for reward in self._rewards)
            return [Problem("no_reward", f"its columns ({', '.join(others) or 'none'}) are not what {names} needs")]
        return [Problem("bad_column", f"{name}: {fault}") for name, fault in faults if fault]

    def tokenize(
        self, example: Example, tokenizer: "PreTrainedTokenizerBase", max_length: int | None
    ) -> dict[str, Tokenized] | Problem:
        """The prompt as the model reads it, up to where it begins to write; of weight 0: nothing of it is learned."""
        messages = example.columns["prompt"]
        if name := find_left_out(tokenizer, messages, ()):
            return say_left_out(name)
        try:
            encoding: Any = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, **self._template_kwargs
            )
        except Exception as error:  # a template may refuse, and may fail as any program
            return Problem("template_refuses", f"the chat template refuses it: {one_line(error)}")
        ids = array("i", encoding["input_ids"])
        longest = self._max_completion_length
        if self._max_positions is not None and longest is not None and len(ids) + longest > self._max_positions:
            detail = (
                f"its prompt has {len(ids)} tokens, which with max_completion_length {longest} are more than the "
                f"{self._max_positions} that the model reads"
            )
            return Problem("no_room", detail)
        conversation = Conversation(messages, example.source)
        return {"prompt": Tokenized(conversation, ids, array("f", bytes(4 * len(ids))), truncated=False)}


def _waits_for_answer(turns: Sequence[Turn], controls: Collection[str]) -> list[Problem]:
    """What is wrong with a conversation that waits for the assistant; judged as if it had been answered."""
    if turns[-1].role == "assistant":
        return [Problem("bad_prompt", f"{turns[-1].where} is the assistant's; a prompt ends with the user's message")]
    return check_turns([*turns, Turn("the answer", "assistant", "...")], controls)


def is_prompt(value: Mapping[str, Any]) -> bool:
    """Whether a row has a prompt, and is no conversation."""
    others = ("completion", "messages", "conversations", "instruction")
    return value.get("prompt") is not None and all(value.get(name) is None for name in others)


__all__ = ["COLUMNS", "GIVEN", "SOURCE", "PromptJudge", "Rewarder", "is_prompt"]
