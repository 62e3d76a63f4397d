# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The reward functions that come with the package: an exact answer, a pattern, tests that code has to pass."""

import ast
import itertools
import math
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from fractions import Fraction
from typing import Any

import regex

from sft.rewards.reward import Reward, RewardError, what_failed
from sft.rewards.sandbox import LONGEST_SECONDS, Limits, SandboxError, check_sandbox, run_tests

_NUMBER = re.compile(r"[-+]?(\d+|(?!0)\d{1,3}(,\d{3})+)?(\.\d+)?(e[-+]?\d{1,3})?")
# Digits of a number: all of any float's, written out, and a few more.
_LONGEST_NUMBER = 1100
# What may stand around an answer; a full stop before a digit is of the number.
_BEFORE, _AFTER = " $", " $%.。"
# The line that begins or ends a block of code in Markdown: its indent, its marks, and what follows them.
_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([^`]*)")


class ExactMatch(Reward):
    """1 if the final answer of a completion is that of a column, else 0.

    The final answer of a text, completion or column alike: what the last `\\boxed{...}` holds; else what follows the
    last `####`; else, with `pattern`, what its first group, or all of it, matched last; else the whole text. But a
    completion in which `pattern` matches nothing has no answer. Two answers are the same if they are equal as texts, in
    Unicode's normal form KC, without case, with single spaces, and without `$` around and `%` and a full stop after
    them, a minus sign as a hyphen, superscripts after `^` and subscripts after `_`; or as decimal numbers, with an
    exponent (`1e-05`) or not, commas between thousands left out. A number in the column that is no whole one is a float
    with 53 bits, and is that of every text that is rounded to it.

    Args:
        column: holds a text or a number.
        pattern: regular expression (of the package regex) of the answer in a text.
    """

    def __init__(self, name: str, column: str = "answer", pattern: str | None = None) -> None:
        super().__init__(name, {"column": column, "pattern": pattern})
        self._column = column
        self._pattern = compiled(pattern, name) if pattern is not None else None

    def applies(self, columns: Mapping[str, Any]) -> bool:
        """Whether a row has the column."""
        return columns.get(self._column) is not None

    def fault(self, columns: Mapping[str, Any]) -> str | None:
        """A column that is neither text nor number, or a text of no answer."""
        value = columns[self._column]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return f"{self._column} is of type {type(value).__name__}; expected a text or a number"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{self._column} is {value}; expected a text or a finite number"
        return None if normalized(self._expected(value) or "") else f"{self._column} holds no answer"

    def rewards(self, texts: Sequence[str], columns: Sequence[Mapping[str, Any]], **given: Any) -> Sequence[Any]:
        """1 or 0, or None for a row without the column."""
        return [
            float(self._is_right(self._answer(text), row[self._column])) if self.applies(row) else None
            for text, row in zip(texts, columns, strict=True)
        ]

    def _is_right(self, answer: str | None, value: Any) -> bool:
        if same_answer(answer, self._expected(value)):
            return True
        # A file may write more digits of a number than a float keeps.
        number = _number(normalized(answer or "")) if isinstance(value, float) else None
        return number is not None and _as_float(number) == value

    def _expected(self, value: Any) -> str | None:
        """The answer of a column, which may be bare of what `pattern` finds in a completion."""
        return self._answer(str(value), otherwise=str(value))

    def _answer(self, text: str, otherwise: str | None = None) -> str | None:
        boxed = text.rpartition(r"\boxed{")
        if boxed[1]:
            return _within_braces(boxed[2])
        if "####" in text:
            return text.rpartition("####")[2]
        if self._pattern is None:
            return text
        try:
            found = list(self._pattern.finditer(text, timeout=_SECONDS))
        except _UNKNOWN:
            return None
        return found[-1][1 if self._pattern.groups else 0] if found else otherwise


def _within_braces(text: str) -> str | None:
    depth = 1
    for index, char in enumerate(text):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            return text[:index]
    return None


def normalized(answer: str) -> str:
    """An answer without what does not make another of it; see [`ExactMatch`]."""
    # Before the form KC, which makes 105 of 10 to the power of 5.
    raised = "".join(mark + "".join(run) for mark, run in itertools.groupby(answer, _raised_by))
    plain = unicodedata.normalize("NFKC", raised).replace("\u2212", "-")
    return " ".join(plain.casefold().split()).lstrip(_BEFORE).rstrip(_AFTER)


def _raised_by(char: str) -> str:
    return {"<super>": "^", "<sub>": "_"}.get(unicodedata.decomposition(char).partition(" ")[0], "")


def same_answer(answer: str | None, expected: str | None) -> bool:
    """Whether two answers are the same; see [`ExactMatch`]. What is no answer is the same as none."""
    if answer is None or expected is None:
        return False
    left, right = normalized(answer), normalized(expected)
    if left == right:
        return left != ""
    number = _number(left)
    return number is not None and number == _number(right)


def _number(text: str) -> Fraction | None:
    if len(text) > _LONGEST_NUMBER or not _NUMBER.fullmatch(text):
        return None
    try:
        return Fraction(text.replace(",", ""))
    except ValueError:  # a sign, say, without a digit
        return None


def _as_float(number: Fraction) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


_SECONDS = 1.0
# How a search ends that does not find out: a pattern may call itself, or try, without end.
_UNKNOWN = (TimeoutError, MemoryError, RecursionError)


def compiled(pattern: Any, name: str) -> "regex.Pattern[str]":
    """A regular expression of the package regex.

    Raises:
        RewardError: it is none.
    """
    if not isinstance(pattern, str):
        raise RewardError(f"reward function {name}: a pattern is of type {type(pattern).__name__}; expected a text.")
    try:
        return regex.compile(pattern)
    except Exception as error:  # beside its own kind, whatever a pattern can bring its parser to
        raise RewardError(
            f"reward function {name}: {pattern!r:.80} is no regular expression: {what_failed(error)}."
        ) from error


class Regex(Reward):
    """1 if a pattern matches a completion, else 0; also 0 if that is not known in time, or in memory.

    Args:
        pattern: regular expression, of the package regex; or
        column: holds one for each row.
        match: `search` anywhere, or `fullmatch` of the whole text.
        seconds: of searching in one completion, because a pattern may try without end.
    """

    def __init__(
        self,
        name: str,
        pattern: str | None = None,
        column: str | None = None,
        match: str = "search",
        seconds: float = _SECONDS,
    ) -> None:
        super().__init__(name, {"pattern": pattern, "column": column, "match": match, "seconds": seconds})
        if (pattern is None) == (column is None):
            raise RewardError(f"reward function {name} needs either a pattern or a column that holds one.")
        if match not in ("search", "fullmatch"):
            raise RewardError(f"reward function {name}: match is {match!r}; expected search or fullmatch.")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= LONGEST_SECONDS:
            raise RewardError(
                f"reward function {name}: seconds is {seconds!r:.80}; expected a number above 0, at most "
                f"{LONGEST_SECONDS}."
            )
        self._pattern = compiled(pattern, name) if pattern is not None else None
        self._column, self._match, self._seconds = column, match, seconds

    def applies(self, columns: Mapping[str, Any]) -> bool:
        """Whether there is a pattern for a row."""
        return self._column is None or columns.get(self._column) is not None

    def fault(self, columns: Mapping[str, Any]) -> str | None:
        """A column that is no regular expression."""
        if self._column is None:
            return None
        try:
            compiled(columns[self._column], self.name)
        except RewardError as error:
            return str(error)
        return None

    def rewards(self, texts: Sequence[str], columns: Sequence[Mapping[str, Any]], **given: Any) -> Sequence[Any]:
        """1 or 0, or None for a row without a pattern."""
        return [
            self._reward(text, row) if self.applies(row) else None for text, row in zip(texts, columns, strict=True)
        ]

    def _reward(self, text: str, columns: Mapping[str, Any]) -> float:
        pattern = self._pattern or compiled(columns[str(self._column)], self.name)
        find: Callable[..., Any] = pattern.search if self._match == "search" else pattern.fullmatch
        try:
            return float(find(text, timeout=self._seconds) is not None)
        except _UNKNOWN:
            return 0.0


class PythonTests(Reward):
    """1 if the code of a completion passes all the tests of a column, in a sandbox, else 0.

    The code is that of the last block of Markdown that is named `python`, `python3` or `py`; without one, of the last
    that has no name; without one, the whole completion. The standard library is there, nothing else. See
    [`sft.rewards.sandbox`] for what is stopped and what is not.

    Args:
        column: holds the tests, Python source: a text, or a list of texts, each a test, such as `assert f(2) == 4`. One
            that does nothing is refused, and so are those that define functions alone.
        partial: give the share of the tests that are passed.
        workers: how many sandboxes run at once; as many as there are processors, at most 8, unless given.
        **limits: see [`sft.rewards.sandbox.Limits`].
    """

    def __init__(
        self, name: str, column: str = "tests", partial: bool = False, workers: int | None = None, **limits: Any
    ) -> None:
        known = {field.name for field in fields(Limits)}
        if unknown := [key for key in limits if key not in known]:
            raise RewardError(
                f"reward function {name} has no setting {unknown[0]}; it has column, partial, workers, "
                f"{', '.join(sorted(known))}."
            )
        if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
            raise RewardError(f"reward function {name}: workers is {workers!r}; expected a number from 1.")
        try:
            self._limits = Limits(**limits)
        except ValueError as error:
            raise RewardError(f"reward function {name}: {error}") from error
        super().__init__(name, {"column": column, "partial": partial, **limits})
        self._column, self._partial = column, partial
        self._workers = workers or min(8, os.cpu_count() or 1)

    def check(self) -> None:
        """Refuse a machine that has no such sandbox, or limits in which nothing can run."""
        try:
            check_sandbox(self._limits)
        except SandboxError as error:
            raise RewardError(
                f"reward function {self.name}: code cannot be run here as it is to be: {error}. {self._way_out()}"
            ) from error

    def _way_out(self) -> str:
        """What helps, by trying: other limits, or no namespaces, or neither."""
        if _is_there(Limits(namespaces=self._limits.namespaces)):
            default = Limits()
            given = [
                f"{field.name} is {getattr(self._limits, field.name)}, {getattr(default, field.name)} unless set"
                for field in fields(Limits)
                if field.name != "namespaces" and getattr(self._limits, field.name) != getattr(default, field.name)
            ]
            return f"The limits leave it no room ({'; '.join(given)}); the usual ones do."
        if self._limits.namespaces and _is_there(Limits(namespaces=False)):
            return (
                "With namespaces: false it runs with limits alone, and can reach the network, write what you can write "
                "and see your processes."
            )
        return "It cannot be run here with any limits; drop python_tests."

    def applies(self, columns: Mapping[str, Any]) -> bool:
        """Whether a row has tests."""
        return bool(columns.get(self._column))

    def fault(self, columns: Mapping[str, Any]) -> str | None:
        """A column that holds no Python, or a test that no code can fail."""
        tests = self._tests(columns)
        if not all(isinstance(test, str) for test in tests):
            return f"{self._column} is neither a text nor a list of texts"
        done: list[ast.stmt] = []
        for test in tests:
            try:
                compile(test, self._column, "exec")
                statements = [each for each in ast.parse(test).body if not _is_constant(each)]
            except Exception as error:
                return f"{self._column} is no Python: {what_failed(error)}"
            if not statements:
                return f"{self._column} holds {test!r:.60}, which does nothing, so that any code passes it"
            done += statements
        names = [_defined(each) for each in done]
        if all(names):
            return f"{self._column} defines {names[0]}, which nothing calls, so that any code passes it"
        return None

    def rewards(self, texts: Sequence[str], columns: Sequence[Mapping[str, Any]], **given: Any) -> Sequence[Any]:
        """The share of tests passed, or whether all were; None for a row without tests."""
        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(self._reward, texts, columns))

    def _reward(self, text: str, columns: Mapping[str, Any]) -> float | None:
        if not self.applies(columns):
            return None
        tests = self._tests(columns)
        passed = run_tests(code_of(text), tests, self._limits).passed or 0
        return passed / len(tests) if self._partial else float(passed == len(tests))

    def _tests(self, columns: Mapping[str, Any]) -> list[Any]:
        tests = columns[self._column]
        return list(tests) if isinstance(tests, list) else [tests]


def _is_constant(statement: ast.stmt) -> bool:
    """Whether it does nothing whatever stands before it: a literal, such as the JSON text of tests, or `pass`."""
    kinds = ast.Pass | ast.Expr | ast.Constant | ast.List | ast.Tuple | ast.Set | ast.Dict | ast.Load
    return all(isinstance(node, kinds) for node in ast.walk(statement))


def _defined(statement: ast.stmt) -> str | None:
    """The name of a function, of a statement that defines one and calls nothing."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef) and not statement.decorator_list:
        return statement.name
    return None


def _is_there(limits: Limits) -> bool:
    try:
        check_sandbox(limits)
    except SandboxError:
        return False
    return True


def code_of(text: str) -> str:
    """The code of a completion; see [`PythonTests`]."""
    blocks = _blocks(text)
    for names in (("python", "python3", "py"), ("",)):
        if found := [code for name, code in blocks if name in names]:
            return found[-1]
    return text


def _blocks(text: str) -> list[tuple[str, str]]:
    """The blocks of code in a text in Markdown, with the name of their language; the last may lack its end."""
    blocks: list[tuple[str, str]] = []
    lines: list[str] = []
    indent, marks, name = "", "", ""
    for line in re.split(r"\r\n|\n", text):
        fence = _FENCE.fullmatch(line)
        if marks and fence and fence[2].startswith(marks) and not fence[3]:
            blocks.append((name, "".join(lines)))
            marks = ""
        elif marks:
            lines.append(line.removeprefix(indent) + "\n")
        elif fence:
            indent, marks, lines = fence[1], fence[2], []
            name = re.split(r"[\s{:,]", fence[3], maxsplit=1)[0].lower()
    return [*blocks, (name, "".join(lines))] if marks else blocks


__all__ = ["ExactMatch", "PythonTests", "Regex", "code_of", "normalized", "same_answer"]
