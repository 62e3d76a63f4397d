# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""How documents are cut, against the loop of transformers' documentation and by counting."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion.checkpoint.errors import CheckpointError
from evaluation.passages import Passage, continuation_passage, digest_of, document_passages, pack


def documented(ids, window, stride):
    """The loop of https://huggingface.co/docs/transformers/perplexity: (begin, end, number of targets) of each window.

    It counts the first token of a text among its targets, which a loss on shifted labels does not.
    """
    windows, previous_end = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        windows.append((begin, end, end - previous_end - (begin == 0)))
        previous_end = end
        if end == len(ids):
            break
    return [window for window in windows if window[2]]


@given(st.integers(2, 90), st.integers(2, 40), st.data())
def test_windows_are_those_of_transformers_documentation(length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    ids = np.arange(length)
    found = list(document_passages(ids, window, stride))
    expected = documented(ids, window, stride)
    assert [(p.ids[0], p.ids[-1] + 1, p.scored) for p in found] == expected
    assert np.concatenate([p.targets for p in found]).tolist() == list(range(1, length))  # each once, in order
    for passage in found:
        first = len(passage.ids) - passage.scored
        for place in range(
            first, len(passage.ids)
        ):  # `place` tokens of the window stand before the one that is predicted
            assert place == passage.ids[place] or place >= window - stride
        assert len(passage.ids) <= window


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 0), (8, 8), (8, 9)])
def test_windows_that_would_leave_tokens_out(window, stride):
    with pytest.raises(CheckpointError, match=f"window is {window} and stride {stride}"):
        list(document_passages(np.arange(20), window, stride))


def test_a_long_question_loses_its_beginning():
    passage = continuation_passage(range(10), [100, 101], 6)
    assert passage.inputs.tolist() == [5, 6, 7, 8, 9, 100]  # as many as the window has
    assert passage.targets.tolist() == [100, 101]
    with pytest.raises(CheckpointError, match="a choice of 7 tokens, and the window has 6"):
        continuation_passage([1], range(7), 6)


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 60))
def test_packing(lengths, tokens):
    passages = [Passage(np.arange(length + 1), 1) for length in lengths]
    groups = pack(passages, tokens)
    assert [number for group in groups for number in group] == list(range(len(lengths)))
    sizes = [sum(lengths[number] for number in group) for group in groups]
    assert all(size <= tokens or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    for group, following in zip(sizes, groups[1:], strict=False):
        assert group + lengths[following[0]] > tokens  # no group ends before it has to


def test_the_digest_tells_passages_apart():
    ids = np.arange(6)
    variants = [
        [Passage(ids, 2)],
        [Passage(ids, 3)],
        [Passage(ids[:5], 2)],
        [Passage(ids[:3], 2), Passage(ids[3:], 2)],
        [Passage(ids[::-1], 2)],
    ]
    assert len({digest_of(passages) for passages in variants}) == len(variants)
    assert digest_of([Passage(ids.astype(np.int32), 2)]) == digest_of(variants[0])
