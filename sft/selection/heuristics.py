# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Conversations that are broken, by rules that can be read. Each has a reason code ([`REASONS`]); the first that
applies counts. None looks at more than a row.
"""

import ast
import re
import textwrap
import warnings
import zlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from .rows import answers, conversations, whole_text
from .words import hash_words, ngrams, split_words

MIN_WORDS = 3
MAX_WORDS = 16_384
MAX_REPEATED = 0.5
MAX_GARBLED = 0.005
LIMITS = ("MIN_WORDS", "MAX_WORDS", "MAX_REPEATED", "MAX_GARBLED")
REASONS = {
    "answer_too_short": f"the assistant says fewer than {MIN_WORDS} words in all",
    "too_long": f"it has more than {MAX_WORDS:,} words, several times what a model reads at once",
    "repetitive": f"more than {MAX_REPEATED:.0%} of the runs of eight words in the answers are repeats",
    "garbled": f"more than {MAX_GARBLED:.1%} of its characters are replacement, control or private-use characters",
    "refusal": "the last answer begins by refusing, or by speaking of itself as a language model",
    "cut_code": "an answer opens a code block and does not close it",
    "broken_code": "a block marked as Python is no Python",
    "no_result": "it is tagged as mathematics, and the last answer holds no number and no formula",
}
_RUN = 8  # words; shorter, and the zeros of large numbers would repeat each other
_MIN_RUNS = 50  # in fewer, a refrain is no fault
_MAX_CODE = 20_000

_GARBLED = re.compile("[\ufffd\ue000-\uf8ff\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")
_REFUSAL = re.compile(
    r"\W*((i'?m|i am|we'?re|we are)( very| so)? (sorry|afraid)\b.{0,40}"
    r"\b(can'?t|cannot|can not|unable|not able|won'?t)\b|"
    r"(i|we) (can'?t|cannot|can not|am unable to|am not able to) (help|assist|provide|fulfil|comply|answer|do that)|"
    r"as an? (ai|artificial intelligence|(large )?language model)\b|"
    r"(很|非常)?(抱歉|对不起|遗憾).{0,12}(无法|不能|没有办法)|作为(一个|一名|一款)?(ai|人工智能|语言模型|大语言模型|大模型))",
    re.IGNORECASE,
)
_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
_PYTHON = re.compile(r"^([ \t]*)```(?:python|py)[ \t]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL | re.IGNORECASE)
_SESSION = re.compile(r"^\s*(>>>|In \[|[%!?])", re.MULTILINE)  # of a shell or a notebook, which is not Python
_RESULT = re.compile(
    r"\d|\\[a-z]|[零一二三四五六七八九十百千]|\b(yes|no|true|false|zero|one|two|three|never|none|infinite)\b",
    re.IGNORECASE,
)


def drop_broken(table: pa.Table) -> pa.Table:
    """Rows that a rule speaks against are dropped; `domain` tells which are mathematics."""
    chats = list(conversations(table))
    replies = ["\n".join(answers(messages)) for messages in chats]
    repeated = np.zeros(len(chats))
    suspects = [number for number, text in enumerate(replies) if _shrinks(text)]
    repeated[suspects] = repeated_shares([replies[number] for number in suspects])
    reasons = [
        find_fault(messages, domain, share)
        for messages, domain, share in zip(chats, table["domain"].to_pylist(), repeated.tolist(), strict=True)
    ]
    return pa.table({"drop": pa.array(reasons, pa.string())})


def _shrinks(text: str) -> bool:
    """Whether zlib makes a third of it: cheaper than counting, and what repeats itself by half does."""
    data = text.encode()
    return len(zlib.compress(data, 1)) < len(data) / 3


def repeated_shares(texts: Sequence[str]) -> np.ndarray:
    """The share of each text's runs of words that stood before in it; 0 for a text with few of them."""
    words = hash_words(texts)
    *_, (_, hashes, starts) = ngrams(words, _RUN)
    owner = words.owners[starts]
    total = np.bincount(owner, minlength=len(texts))
    order = np.lexsort((hashes, owner))
    again = (hashes[order[1:]] == hashes[order[:-1]]) & (owner[order[1:]] == owner[order[:-1]])
    repeats = np.bincount(owner[order[1:]][again], minlength=len(texts))
    return np.where(total >= _MIN_RUNS, repeats / np.maximum(total, 1), 0.0)


def find_fault(messages: Sequence[dict[str, str]], domain: str, repeated: float = 0.0) -> str | None:
    """The first reason that speaks against a conversation.

    Args:
        messages: with `role` and `content`.
        domain: of [`sft.selection.domains`].
        repeated: the share of repeats among its runs of words.
    """
    replies, text = answers(messages), whole_text(messages)
    if len(split_words(" ".join(replies)[:200])) < MIN_WORDS:
        return "answer_too_short"
    if len(text) > MAX_WORDS and len(text.split()) + 2 * sum("\u3400" <= c <= "\u9fff" for c in text) // 3 > MAX_WORDS:
        return "too_long"
    if repeated > MAX_REPEATED:
        return "repetitive"
    if len(_GARBLED.findall(text)) > MAX_GARBLED * len(text):
        return "garbled"
    if _REFUSAL.match(replies[-1][:200]):
        return "refusal"
    if any("```" in reply for reply in replies):
        if any(len(_FENCE.findall(reply)) % 2 for reply in replies):
            return "cut_code"
        if not all(is_python(code) for reply in replies for _, code in _PYTHON.findall(reply)):
            return "broken_code"
    if domain == "math" and not _RESULT.search(replies[-1]):
        return "no_result"
    return None


def is_python(code: str) -> bool:
    """Whether a text parses as Python; it is not run. Shell sessions, notebooks and very long texts pass unseen."""
    if len(code) > _MAX_CODE or _SESSION.search(code):
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            ast.parse(textwrap.dedent(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


__all__ = [
    "LIMITS",
    "MAX_GARBLED",
    "MAX_REPEATED",
    "MAX_WORDS",
    "MIN_WORDS",
    "REASONS",
    "drop_broken",
    "find_fault",
    "is_python",
]
