# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What every reward function is: a name, what it needs of a row, and a call as TRL makes it.

TRL calls a reward function with lists, one entry a completion: `prompts`, `completions` and `completion_ids`, and the
columns of the rows by name. What it returns, a number or None (not applicable) for each, goes into the advantages
unchecked. Here it is checked, and whatever fails is told with the function and the row.
"""

import asyncio
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from conversion.checkpoint.errors import one_line, printable
from sft import SFTError
from sft.data.prompts import COLUMNS, GIVEN, SOURCE

LARGEST = 1e15
"""What a reward, or a weight, or the one times the other may be at most: TRL sums their squares in float32."""
# What is no list of one for each, though it can be gone through.
_NO_LISTS = (str, bytes, bytearray, memoryview, Mapping, Set)


class RewardError(SFTError):
    """A reward function cannot be used, or failed. The message names it, and the row where there is one.

    It is one line of what can be shown, whatever a file or an error of its code says.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Reward:
    """A reward function, as TRL calls it.

    `__name__` is its name in TRL's metrics, which no other reward function of a run has: see
    [`sft.rewards.spec.load_rewards`]. `weight` is what TRL multiplies its rewards by.

    Args:
        name: in the recipe and in errors.
        settings: as the recipe gives them; None stands for what a file of the user's decides itself.
    """

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name = self.__name__ = name
        self.settings = dict(settings)
        self.weight = 1.0

    def applies(self, columns: Mapping[str, Any]) -> bool:
        """Whether a row has what this needs; if not, its reward is None."""
        raise NotImplementedError

    def fault(self, columns: Mapping[str, Any]) -> str | None:
        """Why what this needs of a row cannot be used, if so."""
        raise NotImplementedError

    def rewards(self, texts: Sequence[str], columns: Sequence[Mapping[str, Any]], **given: Any) -> Sequence[Any]:
        """A reward for each completion, of rows to which this applies or not."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What the record of a run says of it."""
        return {"name": self.name, **self.settings}

    def check(self) -> None:
        """Refuse, before a run, what could only fail in it.

        Raises:
            RewardError: it cannot run here.
        """

    def __call__(self, **given: Any) -> list[float | None]:
        """The rewards of some completions, one each.

        Raises:
            RewardError: it failed, or returned something else than a number up to [`LARGEST`] or None for each.
        """
        sources, columns = given.pop(SOURCE), [json.loads(text) for text in given.pop(COLUMNS)]
        texts = [text_of(completion) for completion in given["completions"]]
        try:
            said = self.rewards(texts, columns, **given)
            if isinstance(said, _NO_LISTS):
                raise RewardError(
                    f"reward function {self.name} returned a {type(said).__name__}; return a list of one reward for "
                    "each completion."
                )
            found = list(said)
        except RewardError:
            raise
        except KeyboardInterrupt:  # the user's, who wants the run to end
            raise
        except BaseException as error:  # SystemExit, for example, would end the run as if it were done
            place = self._find_failure(texts, columns, sources, given)
            raise RewardError(f"reward function {self.name} failed on {place}: {what_failed(error)}") from error
        if len(found) != len(texts):
            raise RewardError(
                f"reward function {self.name} returned {len(found)} rewards for {len(texts)} completions; return one "
                "for each."
            )
        return [self._checked(value, source) for value, source in zip(found, sources, strict=True)]

    def _checked(self, value: Any, source: str) -> float | None:
        if value is None:
            return None
        try:
            # A text may spell a number, but is none.
            number = math.nan if isinstance(value, str | bytes | bytearray) else float(value)
        except KeyboardInterrupt:
            raise
        except BaseException:  # the value may be of a class of the user's, or a tensor of several numbers
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(
                f"reward function {self.name} returned {_shown(value)} for a completion of {source}; return a finite "
                "number, or None where it does not apply."
            )
        if abs(number) > LARGEST or abs(number * self.weight) > LARGEST:
            raise RewardError(
                f"reward function {self.name} returned {_shown(value)} for a completion of {source}, which with its "
                f"weight {self.weight} is more than the {LARGEST:g} that can be compared in float32; return less."
            )
        return number

    def _find_failure(
        self, texts: Sequence[str], columns: Sequence[Mapping[str, Any]], sources: Sequence[str], given: dict[str, Any]
    ) -> str:
        """The row that it fails on, by trying one after the other."""
        lists = {name: given[name] for name in ("prompts", "completions", "completion_ids") if name in given}
        others = {name: value for name, value in given.items() if name not in lists}
        for index, source in enumerate(sources):
            alone = {name: [values[index]] for name, values in lists.items()}
            try:
                list(self.rewards([texts[index]], [columns[index]], **alone, **others))
            except KeyboardInterrupt:
                raise
            except BaseException:
                return source
        return f"{sources[0]} to {sources[-1]} together, on none of them alone"


def what_failed(error: BaseException) -> str:
    """What an error of a user's code says, as one line, whatever its class does when it is asked."""
    try:
        return one_line(error)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return type(error).__name__


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except KeyboardInterrupt:
        raise
    except BaseException:
        return f"a {type(value).__name__}"


def text_of(completion: Any) -> str:
    """What the model said: the content of the last message, or the text itself."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


class FileReward(Reward):
    """A function of the user's, from a Python file, with TRL's signature.

    It gets what its parameters name, or, with `**kwargs`, everything. A row without a column that a parameter without
    default names is refused.

    Args:
        name: `FILE.py:function`.
        function: what the file defines.
        digest: of the file.
    """

    def __init__(self, name: str, function: Callable[..., Any], digest: str) -> None:
        super().__init__(name, {})
        self.__name__ = self._called = name.rpartition(":")[2]
        self._function = function
        self._digest = digest
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward_funcs: what {name} takes cannot be told: {what_failed(error)}.") from error
        by_name = [each for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)]
        self._takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
        self._names = {each.name for each in by_name}
        self._needs = [each.name for each in by_name if each.default is each.empty and each.name not in GIVEN]

    def applies(self, columns: Mapping[str, Any]) -> bool:
        """A function of the user's says itself where it does not apply."""
        return True

    def fault(self, columns: Mapping[str, Any]) -> str | None:
        """A column that it needs and a row has not."""
        missing = [name for name in self._needs if name not in columns]
        return f"it needs {', '.join(missing)}, which the row does not have" if missing else None

    def describe(self) -> dict[str, Any]:
        """The function and what its file holds, not where that lies."""
        return {"name": Path(self.name.rpartition(":")[0]).name + f":{self._called}", "digest": self._digest}

    def rewards(self, texts: Sequence[str], columns: Sequence[Mapping[str, Any]], **given: Any) -> Sequence[Any]:
        """What the function returns."""
        names = {name for row in columns for name in row} | (self._names - given.keys())
        everything = {**{name: [row.get(name) for row in columns] for name in names}, **given}
        wanted = {name: value for name, value in everything.items() if self._takes_all or name in self._names}
        found = self._function(**wanted)
        return asyncio.run(found) if inspect.iscoroutine(found) else found


__all__ = ["LARGEST", "FileReward", "Reward", "RewardError", "text_of", "what_failed"]
