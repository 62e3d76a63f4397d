# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Which tokens are trained on, beside an oracle that knows neither the template nor the tokenizer class."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

from sft.data import checks
from sft.data.checks import Conversation, Reject
from sft.data.dataset import prepare_dataset
from sft.data.labels import DataError, Labelling, tokenize, tokenize_rows
from tests.fixtures.tiny import tiny_sentencepiece, tiny_tokenizer
from tests.sft.test_data import ANSWER, ASK, chat, write

REAL_CONVERSATIONS = Path(__file__).parents[2] / "../shared/data/conversations.jsonl.gz"
SYSTEM, MORE, LAST = ("system", "Be brief.\n"), ("user", "  And then?"), ("assistant", "Then é 你好 🎉\n\n x ")
MULTI_TURN = [SYSTEM, ASK, ANSWER, MORE, LAST, ("user", "Thanks.")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def oracle():
    """Answer by answer, with sentencepiece itself: (ids, weights). What follows a <_bot> is learned, up to its </s>."""
    pieces = SentencePieceProcessor(model_proto=tiny_sentencepiece())
    names = {"system": "<_system>", "user": "<_user>", "assistant": "<_bot>"}

    def expect(messages, answer_weights=None, max_length=None):
        ids, weights, text = [], [], ""
        remaining = iter(answer_weights or [1.0] * len(messages))
        for message in messages:
            text += names[message["role"]] + message["content"]
            if message["role"] == "assistant":
                said = pieces.encode(text)
                before = said.index(pieces.piece_to_id("<_bot>")) + 1
                ids += [*said, pieces.eos_id()]
                weights += [0.0] * before + [next(remaining)] * (len(said) - before + 1)
                text = ""
        rest = pieces.encode(text)
        return [*ids, *rest][:max_length], [*weights, *[0.0] * len(rest)][:max_length]

    return expect


@pytest.mark.parametrize("max_length", [None, 40, 19])
@pytest.mark.parametrize(
    ("turns", "weights", "last_turn_only", "expected"),
    [
        ([ASK, ANSWER], (1.0,), False, (1, 1)),
        ([("system", ""), ASK, ANSWER], (1.0,), False, (1,)),
        (MULTI_TURN, (1.0, 1.0), False, (1, 1)),
        (MULTI_TURN, (1.0, 1.0), True, (0, 1)),
        (MULTI_TURN, (1.0, 0.0), False, (1, 0)),
        (MULTI_TURN, (0.25, 2.0), False, (0.25, 2)),
        (MULTI_TURN, (0.25, 2.0), True, (0, 2)),
    ],
)
def test_ids_and_weights(turns, weights, last_turn_only, expected, max_length, tokenizer, oracle):
    messages = chat(*turns)["messages"]
    ids, token_weights = oracle(messages, expected, max_length)
    row = tokenize(Conversation(messages, "here:1", weights), tokenizer, Labelling(max_length, True, last_turn_only))
    if not any(token_weights):
        assert row.code == "nothing_left"
        return
    assert (list(row.input_ids), list(row.weights)) == (ids, token_weights)
    assert row.labels == [token if weight else -100 for token, weight in zip(ids, token_weights, strict=True)]
    assert row.truncated == (len(ids) < len(oracle(messages)[0]))


@pytest.mark.parametrize(
    ("weights", "columns"), [({}, ["input_ids", "labels"]), ({1: 0}, ["input_ids", "labels"]), ({1: 0.5}, None)]
)
def test_weights_have_a_column_only_if_labels_cannot_say_them(weights, columns, tokenizer, oracle, tmp_path):
    rows = [chat(ASK, ANSWER), chat(ASK, ANSWER, MORE, LAST, weights=weights)]
    dataset, report = prepare_dataset(write(tmp_path / "data.jsonl", rows), tokenizer, max_length=64)
    assert dataset.column_names == (columns or ["input_ids", "labels", "weights"])
    expected = [oracle(row["messages"], [m.get("weight", 1) for m in row["messages"][1::2]])[1] for row in rows]
    assert [[float(label != -100) for label in row] for row in dataset["labels"]] == [
        [float(weight > 0) for weight in row] for row in expected
    ]
    if columns is None:
        assert dataset["weights"][:] == expected
    assert report.trained_tokens == sum(weight > 0 for row in expected for weight in row)


def test_a_template_that_runs_turns_together_cannot_be_weighed(tokenizer, tmp_path, monkeypatch):
    """Planted: one generation block after the other, with nothing between."""
    template = (
        "{% for m in messages if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    path = write(tmp_path / "data.jsonl", [chat(ASK, ANSWER, MORE, LAST)])
    with pytest.raises(DataError, match=r"data.jsonl:1: the chat template marks 1 stretches for 2 assistant messages"):
        prepare_dataset(path, tokenizer, max_length=None, last_turn_only=True)
    assert prepare_dataset(path, tokenizer, max_length=None)[1].kept == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"assistant_only_loss": False, "last_turn_only": True},
            "last_turn_only is true and assistant_only_loss is false",
        ),
        ({"max_length": 0}, "max_length is 0; it must be at least 1"),
    ],
)
def test_settings_that_contradict_each_other(settings, message, tokenizer):
    with pytest.raises(DataError, match=message):
        prepare_dataset("nowhere.jsonl", tokenizer, **{"max_length": 8, **settings})


@pytest.mark.parametrize("bound", [checks.MIN_WEIGHT, checks.MAX_WEIGHT])
def test_weights_are_what_float32_has(bound, tokenizer, tmp_path):
    """Both bounds are trained with as they are written; what is 0 as float32 trains nothing, wherever it comes from."""
    path = write(tmp_path / "data.jsonl", [chat(ASK, ANSWER, weights={1: bound})])
    dataset, report = prepare_dataset(path, tokenizer, max_length=64)
    assert report.trained_tokens > 0
    assert set(dataset["weights"][0]) == {0.0, float(np.float32(bound))}
    assert np.finfo(np.float32).smallest_normal == checks.MIN_WEIGHT
    messages = chat(ASK, ANSWER)["messages"]
    assert tokenize(Conversation(messages, "here:1", (1e-300,)), tokenizer, Labelling(64)).code == "nothing_trained"


def test_weights_do_not_vanish_when_every_token_is_trained_on(tokenizer, tmp_path):
    path = write(tmp_path / "data.jsonl", [chat(ASK, ANSWER, weights={1: 0.5})])
    with pytest.raises(DataError, match=r"1 bad_weight.*assistant_only_loss is false"):
        prepare_dataset(path, tokenizer, max_length=64, assistant_only_loss=False)


@pytest.mark.skipif(not REAL_CONVERSATIONS.exists(), reason="real conversations are not part of the project")
def test_template_and_labels_agree_token_by_token_on_real_conversations(tokenizer, oracle, tmp_path):
    with gzip.open(REAL_CONVERSATIONS) as file:
        lines = file.readlines()[::20]
    path = tmp_path / "real.jsonl"
    path.write_bytes(b"".join(lines))
    kinds = Counter()
    for line, (_, row) in zip(lines, tokenize_rows(path, tokenizer, Labelling(512), num_proc=2), strict=True):
        ids, weights = oracle(json.loads(line)["messages"], max_length=512)
        kinds[type(row).__name__] += 1
        if isinstance(row, Reject):
            assert not any(weights)
            assert row.reason == "nothing_left"
        else:
            assert (list(row.input_ids), list(row.weights)) == (ids, weights)
    assert kinds["Tokenized"] > 0.99 * len(lines)
