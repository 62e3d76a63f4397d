# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Answers with a judgement: pairs (`trainer: dpo`), and single ones with a label (`trainer: kto`).

A pair has `chosen` and `rejected`, in one of these layouts:

| layout | `prompt` | `chosen` and `rejected` |
|---|---|---|
| explicit prompt | a text, the user's; or messages, the user's last | a text; or messages, the assistant's first |
| implicit prompt | absent | two conversations; the messages that both begin with are the prompt |
| both (UltraFeedback) | a text: one of the user's messages that both begin with | two conversations, likewise |
| both, as messages | the messages that both begin with | two conversations |
| transcripts (HH-RLHF) | absent | two texts of turns, each after a blank line and `Human:` or `Assistant:` |

Two bare texts without a prompt are refused: nothing says where the question ends. A labelled answer has `prompt` and
`completion`, as an explicit prompt and its answer, and `label`, true or false. Texts are messages here, and get the
chat template; TRL would leave them bare. Columns that no layout names, such as `score_chosen`, are ignored.

Prompt and answer have to be a valid conversation by [`sft.data.checks`], with the row's `tools` where it has some. An
answer of several messages is compared whole, the user's messages in it included, as TRL does; so the results of tools,
which are never learned, may stand in prompts alone.
"""

import json
import re
from array import array
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from conversion.checkpoint.errors import one_line
from sft.data.checks import Conversation, check_turns, message_of, weight_of
from sft.data.examples import Example
from sft.data.formats import Problem, Row, Turn, turns_of
from sft.data.labels import Tokenized, say_left_out
from sft.data.tools import read_tools, to_json
from sft.tokenizer import find_left_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
Turns = list[Turn]
_ANSWERS = ("chosen", "rejected")
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")


# --- rows -------------------------------------------------------------------------------------------------------------


def read_pair(row: Row, controls: Collection[str] = ()) -> tuple[dict[str, Any], list[Problem]]:
    """The pair of a row, and all that is wrong with it.

    Args:
        row: as it stands in its file.
        controls: texts that no content may contain.

    Returns:
        `prompt`, `chosen` and `rejected` as messages, the prompt in neither answer; `tools` as JSON text, if there are.
    """
    columns, problems = _columns(row, _ANSWERS, "a pair needs both")
    if problems:
        return {}, problems
    turns, problems = _split(columns)
    if problems:
        return {}, problems
    tools, problems = read_tools(row.value)
    # The prompt is judged twice, with each answer; what is wrong with it is said once.
    found = [check_turns([*turns["prompt"], *turns[answer]], controls, tools) for answer in _ANSWERS]
    problems += list(dict.fromkeys(problem for problems in found for problem in problems))
    problems += _weighted(turns) + _results(turns, _ANSWERS)
    if problems:
        return {}, problems
    pair: dict[str, Any] = {name: [arrow_message(turn) for turn in turns[name]] for name in ("prompt", *_ANSWERS)}
    if tools:
        pair["tools"] = to_json(tools)
    if pair["chosen"] == pair["rejected"]:
        return pair, [Problem("same_answers", "chosen and rejected are the same; there is nothing to prefer")]
    return pair, []


def read_labelled(row: Row, controls: Collection[str] = ()) -> tuple[dict[str, Any], list[Problem]]:
    """The labelled answer of a row: `prompt` and `completion` as messages, and `label`; and all that is wrong with it.

    Args:
        row: as it stands in its file.
        controls: texts that no content may contain.
    """
    columns, problems = _columns(row, ("prompt", "completion", "label"), "a labelled answer needs all three")
    if problems:
        return {}, problems
    turns = {}
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        turns[column], wrong = _turns(columns[column], column, role)
        problems += wrong
    if not isinstance(columns["label"], bool):
        problems.append(Problem("bad_label", f"its label is {columns['label']!r}; expected true or false"))
    tools, wrong = read_tools(row.value)
    problems += wrong
    if not problems:
        problems = check_turns([*turns["prompt"], *turns["completion"]], controls, tools) + _weighted(turns)
        problems += _results(turns, ("completion",))
    if problems:
        return {}, problems
    answer: dict[str, Any] = {name: [arrow_message(turn) for turn in found] for name, found in turns.items()}
    return {**answer, "label": columns["label"], **({"tools": to_json(tools)} if tools else {})}, []


def _columns(row: Row, needed: Collection[str], why: str) -> tuple[dict[str, Any], list[Problem]]:
    """The columns of a row that have a value, if those needed are among them."""
    if row.problem:
        return {}, [row.problem]
    if not isinstance(row.value, dict):
        return {}, [Problem("not_an_object", f"it is a {type(row.value).__name__}; expected an object")]
    columns = {name: value for name, value in row.value.items() if value is not None}
    missing = [column for column in needed if column not in columns]
    if missing:
        return {}, [Problem("missing_columns", f"it has no {', '.join(missing)}; {why}")]
    return columns, []


def _turns(value: Any, column: str, role: str) -> tuple[Turns, list[Problem]]:
    """A text as one turn, messages as they are."""
    return ([Turn(column, role, value)], []) if isinstance(value, str) else turns_of(value, column)


def _results(turns: Mapping[str, Turns], answers: Collection[str]) -> list[Problem]:
    """Results of tools in what TRL learns, which is all that follows the prompt."""
    results = [turn.where for answer in answers for turn in turns[answer] if turn.role == "tool"]
    return [Problem("stray_result", f"{where} is a tool's, in an answer") for where in results[:1]]


def arrow_message(turn: Turn) -> dict[str, Any]:
    """A valid turn for a dataset, its arguments as JSON text: as objects, Arrow would give each the fields of all."""
    message = message_of(turn)
    for call in message.get("tool_calls", ()):
        call["function"]["arguments"] = to_json(call["function"]["arguments"])
    return message


def weighted(turns: Iterable[Turn], why: str) -> list[Problem]:
    """The first weight, also in the words of `train`, that something is to be learned otherwise than as all the rest.

    Args:
        turns: of a row.
        why: what makes that impossible.
    """
    for turn in turns:
        if turn.weight is not None and turn.weight != 1:
            return [Problem("bad_weight", f"{turn.where} has weight {turn.weight!r:.40}, but {why}; remove it")]
        if turn.role == "assistant" and weight_of(turn) != 1:
            return [Problem("bad_weight", f"{turn.where} has train false, but {why}; remove it")]
    return []


def _weighted(turns: Mapping[str, Turns]) -> list[Problem]:
    return weighted((turn for found in turns.values() for turn in found), "answers are judged whole")


# --- where the prompt ends --------------------------------------------------------------------------------------------


def _split(columns: Mapping[str, Any]) -> tuple[dict[str, Turns], list[Problem]]:
    """`prompt`, `chosen` and `rejected` as turns, the prompt in neither answer, whatever the layout."""
    prompt = columns.get("prompt")
    if prompt is None and all(isinstance(columns[answer], str) for answer in _ANSWERS):
        return _split_transcripts(columns)
    turns: dict[str, Turns] = {}
    problems: list[Problem] = []
    for answer in _ANSWERS:
        turns[answer], wrong = _turns(columns[answer], answer, "assistant")
        problems += wrong
    if prompt is not None:
        turns["prompt"], wrong = _turns(prompt, "prompt", "user")
        problems += wrong
    if problems:
        return {}, problems
    if prompt is None:
        return _split_common(turns)
    if any(turns[answer][0].role not in ("system", "user") for answer in _ANSWERS):
        return turns, []  # an explicit prompt, and whatever is wrong with the answers is said when they are judged
    if not isinstance(prompt, str):
        said = [_said(turn) for turn in turns["prompt"]]
        if all([_said(turn) for turn in turns[answer][: len(said)]] == said for answer in _ANSWERS):
            return _split_at(turns, len(said))
    split, problems = _split_common(turns)
    if not problems and not (isinstance(prompt, str) and _asks(split["prompt"], prompt)):
        what = "none of the user's messages" if isinstance(prompt, str) else "not the messages"
        detail = f"its prompt is {what} that chosen and rejected begin with; remove the one that is wrong"
        problems = [Problem("different_prompts", detail)]
    return split, problems


def _split_transcripts(columns: Mapping[str, Any]) -> tuple[dict[str, Turns], list[Problem]]:
    turns: dict[str, Turns] = {}
    for answer in _ANSWERS:
        before, *parts = _TRANSCRIPT.split(columns[answer])
        if not parts or before.strip():
            detail = (
                f"it has no prompt, and {answer} is neither a list of messages nor a transcript of `Human:` and "
                "`Assistant:` turns, so that nothing says where the question ends; add a column prompt"
            )
            return {}, [Problem("no_prompt", detail)]
        roles = {"Human": "user", "Assistant": "assistant"}
        turns[answer] = [
            Turn(f"{answer}[{index}]", roles[who], what.strip())
            for index, (who, what) in enumerate(zip(parts[::2], parts[1::2], strict=True))
        ]
    return _split_common(turns)


def _split_common(turns: Mapping[str, Turns]) -> tuple[dict[str, Turns], list[Problem]]:
    """Split what two conversations have in common from what differs, as TRL's `extract_prompt` does."""
    chosen, rejected = (turns[answer] for answer in _ANSWERS)
    if [_said(turn) for turn in chosen] == [_said(turn) for turn in rejected]:
        return {}, [Problem("same_answers", "chosen and rejected are the same; there is nothing to prefer")]
    length = 0
    while length < min(len(chosen), len(rejected)) and _said(chosen[length]) == _said(rejected[length]):
        length += 1
    if length == 0:
        detail = "chosen and rejected have no message in common, and there is no prompt; add a column prompt"
        return {}, [Problem("different_prompts", detail)]
    return _split_at(turns, length)


def _split_at(turns: Mapping[str, Turns], length: int) -> tuple[dict[str, Turns], list[Problem]]:
    """Take the first messages of two conversations for their prompt."""
    for answer in _ANSWERS:
        if len(turns[answer]) == length:
            detail = f"{answer} ends after the {length} messages that both begin with: there is no answer to compare"
            return {}, [Problem("no_answer", detail)]
        first = turns[answer][length]
        if first.role != "assistant":
            detail = f"chosen and rejected part at {first.where}, with role {first.role!r}; only answers may differ"
            return {}, [Problem("different_prompts", detail)]
    split = {answer: turns[answer][length:] for answer in _ANSWERS}
    return {"prompt": turns["chosen"][:length], **split}, []


def _said(turn: Turn) -> Turn:
    """A turn without where it stands and how it is weighed."""
    return turn._replace(where="", weight=None, train=None)


def _asks(turns: Turns, question: str) -> bool:
    """Whether one of the user's messages is a text, but for the spaces around it."""
    asked = [turn.content for turn in turns if turn.role == "user" and isinstance(turn.content, str)]
    return question.strip() in [content.strip() for content in asked]


# --- tokens -----------------------------------------------------------------------------------------------------------


def tokenize_answers(
    prompt: Messages,
    answers: Mapping[str, Messages],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
    source: str,
    tools: str | None = None,
) -> dict[str, Tokenized] | Problem:
    """Tokenize a prompt with each of its answers, as TRL does: with the chat template, and cut at `max_length`.

    Args:
        prompt: messages that end with the user's.
        answers: by name, the messages that follow.
        tokenizer: with the chat template.
        max_length: keep the first so many tokens of a conversation; `None` keeps all.
        source: of the row.
        tools: JSON text of its tools, if it has any.

    Returns:
        by name, the conversation; weights are 1 for the tokens of the answer, 0 for those of the prompt. The answer
        begins where the prompt alone and a whole conversation first differ. Or why that cannot be.
    """
    from jinja2 import TemplateError

    schemas = json.loads(tools) if tools else None
    said = [*prompt, *(message for answer in answers.values() for message in answer)]
    if name := find_left_out(tokenizer, said, schemas or ()):
        return say_left_out(name)

    def ids(messages: Messages, **kwargs: Any) -> list[int]:
        encoding: Any = tokenizer.apply_chat_template(messages, tools=schemas, return_dict=True, **kwargs)
        return list(encoding["input_ids"])

    try:
        alone = ids(prompt, add_generation_prompt=True)
        whole = {name: ids([*prompt, *answer]) for name, answer in answers.items()}
    except TemplateError as error:
        return Problem("template_refuses", f"the chat template refuses it: {error}")
    except Exception as error:  # a template may fail as any program
        return Problem("template_refuses", f"the chat template fails on it: {one_line(error)}")
    start = min(_common(alone, answered) for answered in whole.values())
    if max_length is not None and start >= max_length:
        return Problem("nothing_left", f"its prompt has {start} tokens, max_length is {max_length}")
    if any(len(answered) == start for answered in whole.values()):
        return Problem("nothing_trained", "the chat template gives an answer of it no token")
    return {
        name: Tokenized(
            Conversation([*prompt, *answers[name]], source, (1.0,)),
            array("i", answered[:max_length]),
            array("f", ([0.0] * start + [1.0] * (len(answered) - start))[:max_length]),
            max_length is not None and len(answered) > max_length,
        )
        for name, answered in whole.items()
    }


def _told_apart(parts: dict[str, Tokenized], max_length: int | None) -> dict[str, Tokenized] | Problem:
    """Both answers of a pair, if their tokens differ where they are read."""
    chosen, rejected = (parts[answer].input_ids for answer in _ANSWERS)
    if chosen != rejected:
        return parts
    what = f"up to max_length {max_length}" if any(part.truncated for part in parts.values()) else "to the tokenizer"
    return Problem("same_answers", f"chosen and rejected are the same {what}; there is nothing to prefer")


def _common(left: list[int], right: list[int]) -> int:
    """How many leading tokens are the same."""
    same = 0
    while same < min(len(left), len(right)) and left[same] == right[same]:
        same += 1
    return same


# --- examples ---------------------------------------------------------------------------------------------------------


class PairJudge:
    """Judges rows as pairs; see [`sft.data.examples.Judge`]."""

    what = "pairs of answers"

    def read(self, row: Row, controls: Collection[str]) -> tuple[dict[str, Any], list[Problem]]:
        """See [`read_pair`]."""
        return read_pair(row, controls)

    def tokenize(
        self, example: Example, tokenizer: "PreTrainedTokenizerBase", max_length: int | None
    ) -> dict[str, Tokenized] | Problem:
        """See [`tokenize_answers`]."""
        columns = example.columns
        answers = {answer: columns[answer] for answer in _ANSWERS}
        tools = columns.get("tools")
        parts = tokenize_answers(columns["prompt"], answers, tokenizer, max_length, example.source, tools)
        return parts if isinstance(parts, Problem) else _told_apart(parts, max_length)


class LabelledJudge:
    """Judges rows as labelled answers, or, if the first is a pair, as pairs; see [`sft.data.examples.Judge`].

    Of a pair TRL makes two labelled answers.
    """

    what = "labelled answers"

    def __init__(self) -> None:
        self._paired: bool | None = None

    def read(self, row: Row, controls: Collection[str]) -> tuple[dict[str, Any], list[Problem]]:
        """See [`read_labelled`] and [`read_pair`]."""
        paired = is_pair(row.value) and row.value.get("label") is None
        columns, problems = read_pair(row, controls) if paired else read_labelled(row, controls)
        if problems:
            return {}, problems
        if self._paired is None:
            self._paired = paired
        if paired != self._paired:
            kinds = ("a labelled answer", "a pair")
            detail = f"it is {kinds[paired]}, and the rows before are each {kinds[self._paired]}; train on one kind"
            return {}, [Problem("mixed_layouts", detail)]
        return columns, []

    def tokenize(
        self, example: Example, tokenizer: "PreTrainedTokenizerBase", max_length: int | None
    ) -> dict[str, Tokenized] | Problem:
        """See [`tokenize_answers`]; each answer of a pair is cut, and begins, as if it were alone."""
        prompt = example.columns["prompt"]
        parts: dict[str, Tokenized] = {}
        for name in [name for name in ("completion", *_ANSWERS) if name in example.columns]:
            answer, tools = {name: example.columns[name]}, example.columns.get("tools")
            part = tokenize_answers(prompt, answer, tokenizer, max_length, example.source, tools)
            if isinstance(part, Problem):
                return part
            parts |= part
        return _told_apart(parts, max_length) if all(answer in parts for answer in _ANSWERS) else parts


def is_pair(value: Any) -> bool:
    """Whether a row has both answers of a pair."""
    return isinstance(value, dict) and all(value.get(answer) is not None for answer in _ANSWERS)


def is_labelled(value: Any) -> bool:
    """Whether a row has a labelled answer."""
    return isinstance(value, dict) and all(value.get(name) is not None for name in ("prompt", "completion", "label"))


__all__ = [
    "LabelledJudge",
    "PairJudge",
    "arrow_message",
    "is_labelled",
    "is_pair",
    "read_labelled",
    "read_pair",
    "tokenize_answers",
    "weighted",
]
