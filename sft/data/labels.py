# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""From conversations to the token ids and labels that are trained on.

TRL can tokenize conversations itself. It is done here because TRL's errors name no row, rows that truncation leaves
without a trained token vanish uncounted (or, packed, stay and train nothing), and a control token inside a user's text
passes. What comes out is TRL's pre-tokenized format: `input_ids`, and `labels` with -100 where nothing is learned.

Which tokens are trained on follows from the characters: the chat template marks what the assistant says with
`{% generation %}` blocks, and a token is trained on if it covers a character of one. [`sft.data.formats`] says what a
file may hold, [`sft.data.checks`] what makes a row invalid.
"""

import json
import multiprocessing
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from conversion.checkpoint.errors import one_line
from sft.data.checks import Conversation, Reject, check_rows
from sft.data.formats import DataError, Problem, Progress, Row
from sft.tokenizer import control_tokens, find_left_out, require_fixed_template

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
_CHUNK = 64  # rows that travel to another process, and back, at once


@dataclass(frozen=True)
class Labelling:
    """Which tokens of a conversation are kept and trained on.

    Args:
        max_length: keep the first so many tokens of a row; `None` keeps all.
        assistant_only_loss: train on the `{% generation %}` blocks of the chat template; else on every token, and rows
            with weights other than 1 are invalid.
        last_turn_only: of those blocks, train on the last alone.
        sanitize_control_tokens: encode special tokens that a row spells out, such as HTML's `<s>`, as ordinary text;
            else such rows are invalid. It needs Tele-FLM's own tokenizer.

    Raises:
        DataError: the fields contradict each other.
    """

    max_length: int | None
    assistant_only_loss: bool = True
    last_turn_only: bool = False
    sanitize_control_tokens: bool = False

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise DataError(f"max_length is {self.max_length}; it must be at least 1.")
        if self.last_turn_only and not self.assistant_only_loss:
            raise DataError("last_turn_only is true and assistant_only_loss is false; choose one of the two.")


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A conversation as it is trained on.

    Args:
        conversation: what it was.
        input_ids: its tokens, cut at `max_length`.
        weights: of each token's loss, 0 where nothing is learned; as long as `input_ids`.
        truncated: whether there were more tokens.
    """

    conversation: Conversation
    input_ids: "array[int]"
    weights: "array[float]"
    truncated: bool

    @property
    def labels(self) -> list[int]:
        """The tokens, -100 where nothing is learned."""
        return [token if weight else IGNORE_INDEX for token, weight in zip(self.input_ids, self.weights, strict=True)]

    @property
    def trained_tokens(self) -> int:
        """How many tokens are learned."""
        return sum(weight > 0 for weight in self.weights)


@dataclass(frozen=True)
class SourceReport:
    """What became of the rows of one source of a run.

    Args:
        name: of the source.
        places: its files and datasets, those of the Hub with the commit that was read.
        weight: how often an epoch has each row.
        rows: rows read.
        rejected: rows that cannot be trained on.
        held_out: rows kept for evaluation.
        overlapping: rows left out because they overlap with the evaluation data.
        taken: rows of an epoch; a row that it has twice counts twice.
        tokens, trained_tokens: of the rows taken.
    """

    name: str
    places: tuple[str, ...]
    weight: float
    rows: int
    rejected: int
    held_out: int
    overlapping: int
    taken: int
    tokens: int
    trained_tokens: int

    @property
    def kept(self) -> int:
        """Rows that can be trained on."""
        return self.rows - self.rejected

    def __str__(self) -> str:
        text = f"{self.name}: {self.rows} rows read, {self.rejected} rejected, {self.kept} kept"
        text += f", {self.held_out} held out" if self.held_out else ""
        text += f", {self.overlapping} left out for their overlap with evaluation" if self.overlapping else ""
        often = f" (weight {self.weight:g})" if self.weight != 1 else ""
        return f"{text}, {self.taken} taken{often}: {self.trained_tokens} trained of {self.tokens} tokens"


@dataclass(frozen=True)
class DataReport:
    """What became of the rows of some files.

    Args:
        rows: rows read.
        rejects: the rows that are not trained on, and why.
        truncated: rows trained on without their end, because they are longer than `max_length`.
        tokens, trained_tokens: of the rows that are trained on, after truncation; in an epoch, if there are `sources`.
        digest: xxh3-128 of the digests of the conversations trained on (see [`digest_conversation`]), in order; it
            depends on neither layout nor file names.
        sources: of each source, where there are several, or not all rows of one are in an epoch once. The place in
            this tuple is the number in the dataset's column `sources`.
        pinned: places of the Hub, with the commit that was read.
    """

    rows: int
    rejects: tuple[Reject, ...]
    truncated: int
    tokens: int
    trained_tokens: int
    digest: str
    sources: tuple[SourceReport, ...] = ()
    pinned: tuple[str, ...] = ()

    @property
    def kept(self) -> int:
        """Rows that can be trained on."""
        return self.rows - len(self.rejects)

    @property
    def taken(self) -> int:
        """Rows that an epoch has."""
        return sum(source.taken for source in self.sources) if self.sources else self.kept

    @property
    def dropped(self) -> tuple[str, ...]:
        """Sources of valid rows of which `max_length` leaves no trained token."""
        return tuple(reject.source for reject in self.rejects if reject.is_dropped)

    @property
    def invalid(self) -> tuple[Reject, ...]:
        """The other rejects: rows that would not do at any length."""
        return tuple(reject for reject in self.rejects if not reject.is_dropped)

    def __str__(self) -> str:
        trained = f"{self.trained_tokens} trained of " if self.trained_tokens else ""  # of prompts, none is
        text = f"{self.kept} of {self.rows} rows, {trained}{self.tokens} tokens"
        if self.sources:
            text = f"{self.taken} rows an epoch, of {self.kept} valid ones of {self.rows}; {text.partition(', ')[2]}"
        if self.truncated:
            text += f"; {self.truncated} cut at max_length"
        if dropped := self.dropped:
            text += f"; {len(dropped)} dropped, max_length leaves no trained token ({_first(dropped)})"
        if invalid := self.invalid:
            text += f"; {summarize(invalid)}"
        return text


def summarize(rejects: Sequence[Reject]) -> str:
    """Some rejects in one line: how many of which reason, and the first three."""
    counts = Counter(reject.reason for reject in rejects)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    return f"{len(rejects)} invalid rows ({reasons}): {_first([str(reject) for reject in rejects])}"


def _first(items: Sequence[str], limit: int = 3) -> str:
    return "; ".join([*items[:limit], *(["..."] if len(items) > limit else [])])


def read_conversations(
    files: str | Path | Sequence[str | Path], control_tokens: Sequence[str] = ()
) -> tuple[list[Conversation], list[Reject]]:
    """Read and check every row, without a tokenizer; see [`sft.data.checks.check_rows`]."""
    conversations, rejects = [], []
    for _, outcome in check_rows(files, control_tokens):
        if isinstance(outcome, Reject):
            rejects.append(outcome)
        else:
            conversations.append(outcome)
    return conversations, rejects


# --- one conversation -------------------------------------------------------------------------------------------------


def tokenize(
    conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", labelling: Labelling
) -> Tokenized | Problem:
    """Tokenize a valid conversation with the tokenizer's chat template.

    Returns:
        the tokens, at least one of which is trained on; or why that cannot be.

    Raises:
        DataError: weights are asked for, and the template does not keep the turns of the assistant apart.
    """
    from jinja2 import TemplateError

    masked = labelling.assistant_only_loss
    if not masked and any(weight != 1 for weight in conversation.weights):
        return Problem("bad_weight", "its messages have weights, but assistant_only_loss is false: all is trained on")
    if name := find_left_out(tokenizer, conversation.messages, conversation.tools):
        return say_left_out(name)
    options: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": masked}
    if conversation.tools:
        options["tools"] = conversation.tools
    if labelling.sanitize_control_tokens:
        options["sanitize_control_tokens"] = True
    try:
        encoding: Any = tokenizer.apply_chat_template(conversation.messages, **options)
    except TemplateError as error:
        return Problem("template_refuses", f"the chat template refuses it: {error}")
    except Exception as error:  # a template may fail as any program
        return Problem("template_refuses", f"the chat template fails on it: {one_line(error)}")
    input_ids = encoding["input_ids"]
    factors = [float(marked) for marked in encoding["assistant_masks"]] if masked else [1.0] * len(input_ids)
    if masked:
        factors = _weigh_turns(factors, _turn_weights(conversation, labelling), conversation.source)
    weights = array("f", factors)  # as they are trained with, so that what is 0 there counts as untrained
    if not any(weights):
        return Problem("nothing_trained", "the chat template marks no token of it, or all that it marks has weight 0")
    if not any(weights[: labelling.max_length]):
        start = next(place for place, weight in enumerate(weights) if weight)
        detail = f"its first trained token is number {start + 1}, max_length is {labelling.max_length}"
        return Problem("nothing_left", detail)
    return Tokenized(
        conversation,
        array("i", input_ids[: labelling.max_length]),
        weights[: labelling.max_length],
        labelling.max_length is not None and len(input_ids) > labelling.max_length,
    )


def say_left_out(name: str) -> Problem:
    """What is wrong with a row of which the chat template leaves something out; see [`sft.tokenizer.find_left_out`]."""
    detail = f"the chat template leaves out {name}, which it has; train it with chat_template_path: teleflm"
    return Problem("template_refuses", detail)


def _turn_weights(conversation: Conversation, labelling: Labelling) -> tuple[float, ...]:
    if labelling.last_turn_only:
        return (*(0.0 for _ in conversation.weights[:-1]), conversation.weights[-1])
    return conversation.weights


def _weigh_turns(mask: list[float], turn_weights: Sequence[float], source: str) -> list[float]:
    """Give each run of ones in the mask, which is a turn of the assistant, its weight."""
    if all(weight == 1 for weight in turn_weights):
        return mask
    turns = [list(run) for _, run in groupby(mask)]
    if sum(run[0] for run in turns) != len(turn_weights):
        raise DataError(
            f"{source}: the chat template marks {sum(run[0] for run in turns):.0f} stretches for {len(turn_weights)} "
            "assistant messages, so that weights and last_turn_only do not know whose they are; close each "
            "{% generation %} block before the next message begins."
        )
    remaining = iter(turn_weights)
    return [weight for run in turns for weight in (run if not run[0] else [next(remaining)] * len(run))]


# --- all of them ------------------------------------------------------------------------------------------------------


def tokenize_rows(
    data: str | Path | Sequence[str | Path],
    tokenizer: "PreTrainedTokenizerBase",
    labelling: Labelling,
    *,
    num_proc: int | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Row, Tokenized | Reject]]:
    """Read, judge and tokenize every row, in order and in bounded memory.

    Args:
        data: see [`sft.data.formats.read_rows`].
        tokenizer: with the chat template; for `assistant_only_loss` this needs `{% generation %}` blocks.
        labelling: what is kept and trained on.
        num_proc: processes that tokenize.
        progress: told of bytes.

    Raises:
        DataError: a file cannot be read; or as [`tokenize`] says.
        TokenizerError: the chat template renders another text each time.
    """
    rows = check_rows(data, control_tokens(tokenizer, labelling.sanitize_control_tokens), progress)
    yield from tokenize_checked(rows, tokenizer, labelling, num_proc)


def tokenize_checked(
    rows: Iterator[tuple[Row, Conversation | Reject]],
    tokenizer: "PreTrainedTokenizerBase",
    labelling: Labelling,
    num_proc: int | None = None,
) -> Iterator[tuple[Row, Tokenized | Reject]]:
    """Tokenize rows that were judged, in order; see [`tokenize_rows`]."""
    require_fixed_template(tokenizer)
    if not num_proc or num_proc == 1:
        for row, outcome in rows:
            yield row, _judge(outcome, tokenizer, labelling, row.id)
        return
    # Not forked: torch's threads are not copied, but the locks that they hold are, and stay locked.
    start = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(
            num_proc, mp_context=start, initializer=_set_worker, initargs=(tokenizer, labelling)
        ) as pool:
            waiting: deque[tuple[list[tuple[Row, Conversation | Reject]], Future[list[_Tokens | Problem]]]] = deque()
            while chunk := list(islice(rows, _CHUNK)):
                valid = [outcome for _, outcome in chunk if isinstance(outcome, Conversation)]
                waiting.append((chunk, pool.submit(_work, [_to_text(conversation) for conversation in valid])))
                if len(waiting) > 4 * num_proc:
                    yield from _outcomes(*waiting.popleft())
            while waiting:
                yield from _outcomes(*waiting.popleft())
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {num_proc} processes that tokenize was killed or could not start; was there memory for all? A "
            'script that trains has to begin with `if __name__ == "__main__":`. Without num_proc there is one process.'
        ) from error


def _judge(
    outcome: Conversation | Reject,
    tokenizer: "PreTrainedTokenizerBase",
    labelling: Labelling,
    row_id: str | int | None,
) -> Tokenized | Reject:
    if isinstance(outcome, Reject):
        return outcome
    tokenized = tokenize(outcome, tokenizer, labelling)
    return Reject(outcome.source, row_id, (tokenized,)) if isinstance(tokenized, Problem) else tokenized


_Tokens: TypeAlias = "tuple[array[int], array[float], bool]"  # of [`Tokenized`], all but the conversation
_worker: tuple["PreTrainedTokenizerBase", Labelling] | None = None


def _set_worker(tokenizer: "PreTrainedTokenizerBase", labelling: Labelling) -> None:
    global _worker
    _worker = tokenizer, labelling


def _to_text(conversation: Conversation) -> str:
    """A conversation without its row, for another process, as what may be nested deeper than pickle goes."""
    return json.dumps([conversation.messages, conversation.source, conversation.weights, conversation.tools])


def _work(chunk: list[str]) -> list["_Tokens | Problem"]:
    assert _worker is not None
    outcomes = []
    for text in chunk:
        messages, source, weights, tools = json.loads(text)
        made = tokenize(Conversation(messages, source, tuple(weights), tools), *_worker)
        outcomes.append(made if isinstance(made, Problem) else (made.input_ids, made.weights, made.truncated))
    return outcomes


def _outcomes(
    chunk: list[tuple[Row, Conversation | Reject]], made: "Future[list[_Tokens | Problem]]"
) -> Iterator[tuple[Row, Tokenized | Reject]]:
    """Rows with what another process has made of their conversations."""
    tokens = iter(made.result())
    for row, outcome in chunk:
        if isinstance(outcome, Reject):
            yield row, outcome
            continue
        found = next(tokens)
        if isinstance(found, Problem):
            yield row, Reject(outcome.source, row.id, (found,))
        else:
            yield row, Tokenized(outcome, *found)


def digest_conversation(conversation: Conversation) -> bytes:
    """xxh3-128 of the messages, tools and weights of a conversation, 16 bytes."""
    import xxhash

    return xxhash.xxh3_128_digest(_content_of(conversation))


class Tally:
    """Counts what becomes of rows, as they go by; `report` is the sum."""

    def __init__(self) -> None:
        import xxhash

        self._rejects: list[Reject] = []
        self._rows = self._truncated = self._tokens = self._trained_tokens = 0
        self._digest = xxhash.xxh3_128()
        self.weighted = False

    def add(self, outcome: Tokenized | Reject) -> None:
        """Count one row."""
        self._rows += 1
        if isinstance(outcome, Reject):
            self._rejects.append(outcome)
            return
        self._truncated += outcome.truncated
        self._tokens += len(outcome.input_ids)
        self._trained_tokens += outcome.trained_tokens
        self.weighted = self.weighted or any(weight not in (0, 1) for weight in outcome.conversation.weights)
        self._digest.update(digest_conversation(outcome.conversation))

    def report(self) -> DataReport:
        """What became of the rows so far."""
        counts = (self._truncated, self._tokens, self._trained_tokens)
        return DataReport(self._rows, tuple(self._rejects), *counts, self._digest.hexdigest())


def _content_of(conversation: Conversation) -> bytes:
    """All of a conversation that decides its tokens and labels."""
    content: list[Any] = [conversation.messages, conversation.weights]
    if not conversation.tools and not any("tool_calls" in message for message in conversation.messages):
        return json.dumps(content, sort_keys=True).encode()
    # Schemas and arguments are rendered in the order that they have.
    return json.dumps([*content, conversation.tools]).encode()


def record_batches(
    rows: Iterable[tuple[Row, Tokenized | Reject]], tally: Tally, batch_size: int = 1000
) -> Iterator["pyarrow.RecordBatch"]:
    """Turn tokenized rows into Arrow batches with the columns `input_ids`, `labels` and `weights`; count all rows."""
    import pyarrow as pa

    def kept() -> Iterator[Tokenized]:
        for _, outcome in rows:
            tally.add(outcome)
            if isinstance(outcome, Tokenized):
                yield outcome

    remaining = kept()
    while batch := list(islice(remaining, batch_size)):
        columns = [
            pa.array([row.input_ids for row in batch], pa.list_(pa.int32())),
            pa.array([row.labels for row in batch], pa.list_(pa.int32())),
            pa.array([row.weights for row in batch], pa.list_(pa.float32())),
        ]
        yield pa.record_batch(columns, names=["input_ids", "labels", "weights"])


def require_rows(report: DataReport, places: Sequence[str | Path], labelling: Labelling, allow_rejects: bool) -> None:
    """Refuse data with invalid rows that are not allowed, and data of which nothing is left.

    Raises:
        DataError: it is so.
    """
    invalid = report.invalid
    if report.kept == 0:
        where = f"nothing to train on in {', '.join(map(str, places))}"
        if len(invalid) == report.rows:
            raise DataError(f"{where}: {summarize(invalid) if invalid else 'no rows'}.")
        raise DataError(
            f"{where}: no row has a trained token within max_length {labelling.max_length}: {report}. Raise max_length."
        )
    if invalid and not allow_rejects:
        raise DataError(f"{summarize(invalid)}. Correct them, or set allow_rejects: true to leave them out.")


__all__ = [
    "Conversation",
    "DataError",
    "DataReport",
    "Labelling",
    "Reject",
    "SourceReport",
    "Tokenized",
    "control_tokens",
    "digest_conversation",
    "read_conversations",
    "tokenize_checked",
    "tokenize_rows",
]
