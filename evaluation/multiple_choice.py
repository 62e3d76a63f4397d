# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Multiple choice as lm-evaluation-harness scores it: the choice with the largest log-likelihood after the question.

    acc         of the log-likelihoods themselves
    acc_norm    of each divided by the characters of its choice
    acc_bytes   of each divided by the bytes of its choice in UTF-8

Of equal choices the first counts. The choice is scored with what separates it from the question (`target_delimiter`, a
space); its length counts without.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conversion.checkpoint.errors import CheckpointError, one_line, printable

from .passages import Passage, continuation_passage
from .text import decode, json_lines, read_content, without_nul

_MAX_BYTES = 64 * 2**20
_YAML = (".yaml", ".yml")
_KEYS = {"task": str, "data": str, "doc_to_text": str, "description": str, "target_delimiter": str}
_FIELD = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """What is asked.

    Args:
        context: text before a choice.
        choices: two at least.
        answer: number of the right one.
        where: what to call it in a message.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    where: str = "question"


@dataclass(frozen=True)
class Task:
    """Questions of a file.

    Args:
        name: of the task.
        sha256: of the file with the questions, and before it of the YAML file, if there is one.
        questions: one at least.
        delimiter: between a question and a choice.
    """

    name: str
    sha256: str
    questions: tuple[Question, ...]
    delimiter: str = " "


@dataclass(frozen=True)
class Accuracy:
    """A share of questions, and its standard error; None of a single question."""

    value: float
    stderr: float | None


# The files.


def read_task(path: Path) -> Task:
    """Read questions: JSON Lines, or a YAML file that names one.

    A line of JSON has `question` or `context` (of both, the context comes first, a line above), `choices` (two texts at
    least) and `answer`: the number of the right one, counted from 0, its letter, or its text. A YAML file has `data`,
    the JSON Lines beside it, and may have `task` (a name), `doc_to_text` (text before a choice, in which `{{field}}`
    stands for a field of the line), `description` (before all of that) and `target_delimiter`.

    Raises:
        CheckpointError: a file cannot be read, or a field is missing or is not what it has to be.
    """
    if path.suffix.lower() not in _YAML:
        content = read_content(path, _MAX_BYTES)
        return Task(printable(path.stem), hashlib.sha256(content).hexdigest(), _questions(content, path, {}))
    settings_content = read_content(path, _MAX_BYTES)
    settings = _read_settings(decode(settings_content, path), path)
    data = path.parent / settings["data"]
    content = read_content(data, _MAX_BYTES)
    name = " ".join(settings.get("task", path.stem).split()) or path.stem
    digest = hashlib.sha256(settings_content + content).hexdigest()
    return Task(printable(name), digest, _questions(content, data, settings), settings.get("target_delimiter", " "))


def _read_settings(text: str, path: Path) -> dict[str, str]:
    import yaml

    try:
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no YAML ({one_line(error)}); correct it.") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: is a {type(settings).__name__}, expected keys: {', '.join(_KEYS)}.")
    for key, value in settings.items():
        if key not in _KEYS:
            raise CheckpointError(
                f"{path}: has a key {str(key)[:80]}, known are {', '.join(_KEYS)}; a task of lm-evaluation-harness is "
                "for --harness."
            )
        if not isinstance(value, str):
            raise CheckpointError(f"{path}: {key} is a {type(value).__name__}, expected a text.")
        without_nul(value, f"{path}: {key}")
    if "data" not in settings:
        raise CheckpointError(f"{path}: data is missing: the JSON Lines file with the questions.")
    return settings


def _questions(content: bytes, path: Path, settings: Mapping[str, str]) -> tuple[Question, ...]:
    questions = tuple(_question(row, where, settings) for where, row in json_lines(content, path))
    if not questions:
        raise CheckpointError(f"{path}: holds no question.")
    return questions


def _question(row: Mapping[str, Any], where: str, settings: Mapping[str, str]) -> Question:
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise CheckpointError(f"{where}: choices is {_shown(choices)}, expected two texts at least, none empty.")
    return Question(
        without_nul(settings.get("description", "") + _context(row, where, settings.get("doc_to_text")), where),
        tuple(without_nul(choice, f"{where}: choice {number}") for number, choice in enumerate(choices)),
        _answer(row.get("answer"), choices, where),
        where,
    )


def _context(row: Mapping[str, Any], where: str, template: str | None) -> str:
    if template is None:
        parts = [row[name] for name in ("context", "question") if name in row]
        if not parts or not all(isinstance(part, str) for part in parts):
            raise CheckpointError(f"{where}: has neither question nor context as a text; it has {', '.join(row)[:80]}.")
        return "\n".join(parts)

    def fill(match: re.Match[str]) -> str:
        value = row.get(match[1])
        if not isinstance(value, str | int | float):
            raise CheckpointError(f"{where}: {match[1]} is {_shown(value)}, and doc_to_text needs it as a text.")
        return str(value)

    return _FIELD.sub(fill, template)


def _answer(answer: Any, choices: Sequence[str], where: str) -> int:
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        if len(answer) == 1 and answer in _LETTERS[: len(choices)]:
            return _LETTERS.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise CheckpointError(
        f"{where}: answer is {_shown(answer)}, expected a number from 0 to {len(choices) - 1}, a letter, or the text "
        "of a choice."
    )


def _shown(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# What is computed, and what it says.


def choice_passages(
    task: Task, encode: Callable[[str], list[int]], start: int | None, window: int
) -> tuple[list[Passage], int]:
    """The passages of a task, for each question one for each choice; and how many questions the window cut.

    Question and choice are encoded together and cut where the question's own tokens end; spaces at the end of the
    question belong to the choice.

    Args:
        task: the questions.
        encode: a text as ids, without anything before it.
        start: token that a text begins with; None if there is none.
        window: tokens that the model reads at most; a longer question loses its beginning.

    Raises:
        CheckpointError: a choice has no token of its own, or more than the window.
    """
    begin = [] if start is None else [start]
    passages, shortened = [], 0
    for question in task.questions:
        context = question.context.rstrip()
        before = [*begin, *encode(context)]
        spaces = question.context[len(context) :]
        is_cut = False
        for number, choice in enumerate(question.choices):
            continuation = spaces + task.delimiter + choice
            after = [*begin, *encode(context + continuation)][len(before) :] if context else encode(continuation)
            if not after or not before:
                what = f"choice {number} has no token of its own" if before else "there is nothing before a choice"
                raise CheckpointError(f"{question.where}: {what}; give a question before it.")
            try:
                passages.append(continuation_passage(before, after, window))
            except CheckpointError as error:
                raise CheckpointError(f"{question.where}: {error}") from None
            is_cut |= len(before) + len(after) > window + 1
        shortened += is_cut
    return passages, shortened


def accuracies(task: Task, scores: Sequence[float]) -> dict[str, Accuracy]:
    """How often the right choice has the largest score, by the three ways to score.

    Args:
        task: the questions.
        scores: log-likelihood of each choice of each question, in order.
    """
    hits: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    begin = 0
    for question in task.questions:
        likelihoods = np.array(scores[begin : begin + len(question.choices)])
        begin += len(question.choices)
        lengths = {
            "acc": np.ones(len(likelihoods)),
            "acc_norm": np.array([len(choice) for choice in question.choices]),
            "acc_bytes": np.array([len(choice.encode()) for choice in question.choices]),
        }
        for metric, length in lengths.items():
            hits[metric].append(int(np.argmax(likelihoods / length)) == question.answer)
    return {metric: _mean(values) for metric, values in hits.items()}


def _mean(hits: Sequence[bool]) -> Accuracy:
    count = len(hits)
    stderr = float(np.std(hits, ddof=1) / count**0.5) if count > 1 else None
    return Accuracy(float(np.mean(hits)), stderr)


__all__ = ["Accuracy", "Question", "Task", "accuracies", "choice_passages", "read_task"]
