# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What is computed to measure anything: passages of token ids, and which of their tokens are predicted."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from conversion.checkpoint.errors import CheckpointError


@dataclass(frozen=True)
class Passage:
    """Token ids [T + 1], of which the last `scored` are predicted, each from all that stand before it.

    Args:
        ids: int64.
        scored: at least 1, at most T.
    """

    ids: np.ndarray
    scored: int

    @property
    def inputs(self) -> np.ndarray:
        """What the model reads, ids [T]: the last token is only predicted."""
        return self.ids[:-1]

    @property
    def targets(self) -> np.ndarray:
        """The tokens that are predicted [scored]."""
        return self.ids[-self.scored :]


def check_window(window: int, stride: int) -> None:
    """Check how a long document is to be cut.

    Raises:
        CheckpointError: a token would be left out, or have nothing before it.
    """
    if window < 2 or not 1 <= stride < window:
        raise CheckpointError(
            f"window is {window} and stride {stride}; a window has at least 2 tokens, a stride 1 to window - 1."
        )


def document_passages(ids: np.ndarray, window: int, stride: int) -> Iterator[Passage]:
    """A document as windows: each token but the first is predicted once.

    As transformers' documentation measures perplexity with a sliding window: windows begin every `stride` tokens, and
    in each the tokens are predicted that no window before had. So a token is predicted from all that stand before it if
    these are fewer than `window`, else from at least `window - stride` of them.

    Args:
        ids: of the document [N], its beginning-of-sequence token first.
        window: tokens of a passage at most.
        stride: tokens from the begin of one window to that of the next.
    """
    check_window(window, stride)
    end = 1
    for begin in range(0, max(len(ids) - 1, 1), stride):
        stop = min(begin + window, len(ids))
        if stop > end:
            yield Passage(ids[begin:stop], stop - end)
        end = stop
        if stop == len(ids):
            return


def continuation_passage(context: Sequence[int], continuation: Sequence[int], window: int) -> Passage:
    """A continuation to predict after a context, of which the beginning is cut off where both exceed the window.

    Args:
        context: ids, at least one.
        continuation: ids, at least one.
        window: tokens that the model reads at most.

    Raises:
        CheckpointError: the continuation alone is longer than the window.
    """
    if len(continuation) > window:
        raise CheckpointError(f"has a choice of {len(continuation)} tokens, and the window has {window}.")
    return Passage(np.array([*context, *continuation][-(window + 1) :], np.int64), len(continuation))


def pack(passages: Sequence[Passage], tokens: int) -> list[range]:
    """Passages as groups to compute at a time: neighbours, as many as have at most so many inputs, one at least."""
    groups, begin, size = [], 0, 0
    for number, passage in enumerate(passages):
        length = len(passage.inputs)
        if size and size + length > tokens:
            groups.append(range(begin, number))
            begin, size = number, 0
        size += length
    return [*groups, range(begin, len(passages))] if passages else []


def digest_of(passages: Sequence[Passage]) -> str:
    """A digest of all that is to be predicted, and from what: sha256."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(f"{len(passage.ids)} {passage.scored} ".encode())
        digest.update(np.ascontiguousarray(passage.ids, "<i8").data)
    return digest.hexdigest()


__all__ = ["Passage", "check_window", "continuation_passage", "digest_of", "document_passages", "pack"]
