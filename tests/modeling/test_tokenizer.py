# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The tokenizer against sentencepiece's own runtime: ids, text, special tokens, saving."""

import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from modeling_teleflm import TeleFLMTokenizer
from tests.fixtures.tiny import CHAT_SYMBOLS, tiny_sentencepiece

ROOT = Path(__file__).parents[2]
TEXTS = [
    "The quick brown fox.",
    "",
    " ",
    "  two spaces before, and two after  ",
    "tabs\tand\n\n\nnewlines \r\n",
    "中文句子,没有空格。全角！",
    "emoji 😀👩‍👩‍👧 and flags 🇨🇳",
    "café cafe\u0301 ﬁ ½ ㍿",
    "ناص עברית हिन्दी",
    "def f(x):\n    return x ** 2  # 平方\n",
    "<_system>s<_user>hello<_bot>world",
    "<_user>  <_bot>",
    "<_user><_user>",
    "▁ already a metasymbol ▁▁",
    "<unk> and <0x41> are ordinary text",
    "\x00\x7f\u200b\ufeff",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model_type(request):
    return request.param


@pytest.fixture(scope="module", params=["identity", "nmt_nfkc"])
def variant(request, model_type, tmp_path_factory):
    """(our tokenizer, sentencepiece) on one file: both algorithms, with and without a normaliser."""
    file = tmp_path_factory.mktemp("variant") / "tokenizer.model"
    file.write_bytes(tiny_sentencepiece(model_type, request.param))
    return TeleFLMTokenizer(str(file)), SentencePieceProcessor(model_file=str(file))


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_ids_and_text_are_sentencepieces(variant, text):
    ours, oracle = variant
    ids = oracle.encode(text)
    assert ours(text, add_special_tokens=False).input_ids == ids
    assert ours.decode(ids) == oracle.decode(ids)
    assert ours.tokenize(text) == oracle.encode(text, out_type=str)


@pytest.mark.parametrize("text", [text for text in TEXTS if "▁" not in text], ids=ascii)  # sentencepiece's own space
def test_round_trip_is_exact(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[:1] == [1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) == text


# Text in which special tokens, chat symbols, spaces and rare characters are frequent.
spiky_text = st.lists(
    st.one_of(
        st.sampled_from([" ", "\n", "</s>", "<s>", "<unk>", "é", "中", "😀", *CHAT_SYMBOLS]),
        st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=4),
    )
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=spiky_text)
def test_every_part_between_special_tokens_is_sentencepieces(tokenizer, text):
    expected = []
    for part in re.split("(</?s>)", text):
        expected += {"<s>": [1], "</s>": [2]}.get(part) or tokenizer.sp_model.encode(part)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == expected
    assert tokenizer.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(text=spiky_text)
def test_offsets_belong_to_the_same_pieces_and_cover_the_text(tokenizer, text):
    tokens = list(tokenizer._tokenize_with_offsets(text))
    assert [piece for piece, _, _ in tokens] == tokenizer.tokenize(text)
    covered = set()
    for _, start, end in tokens:
        covered.update(range(start, end))
    assert set(range(len(text))) <= covered
    assert [start for _, start, _ in tokens] == sorted(start for _, start, _ in tokens)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [1, "a"]),
        ({"add_bos_token": False}, ["a"]),
        ({"add_eos_token": True}, [1, "a", 2]),
        ({"add_bos_token": False, "add_eos_token": True}, ["a", 2]),
    ],
    ids=str,
)
def test_bos_and_eos(tokenizer, tmp_path, flags, expected):
    a = tokenizer.sp_model.piece_to_id("▁a")
    expected = [a if token == "a" else token for token in expected]
    built = TeleFLMTokenizer(tokenizer.vocab_file, **flags)
    encoding = built("a", return_special_tokens_mask=True)
    assert encoding.input_ids == expected
    assert encoding.special_tokens_mask == [int(token != a) for token in expected]
    assert built("a", add_special_tokens=False).input_ids == [a]
    # transformers drops both flags from tokenizer_config.json; they have to survive all the same.
    built.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a").input_ids == expected
    changed = AutoTokenizer.from_pretrained(tmp_path, add_bos_token=True, add_eos_token=True)
    assert changed("a").input_ids == [1, a, 2]
    changed.add_bos_token = False
    assert changed("a").input_ids == [a, 2]


def test_special_tokens_are_those_of_the_file(tokenizer):
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token is None
    assert len(tokenizer) == tokenizer.vocab_size == 600
    for symbol in CHAT_SYMBOLS:
        assert tokenizer.convert_tokens_to_ids(symbol) not in (None, tokenizer.unk_token_id)
    assert tokenizer("</s>", add_special_tokens=False).input_ids == [2]
    assert 2 not in tokenizer("</s>", add_special_tokens=False, split_special_tokens=True).input_ids


def test_decoding_special_and_single_tokens(tokenizer):
    ids = tokenizer(" a</s> b").input_ids
    assert tokenizer.decode(ids) == "<s> a</s> b"
    assert tokenizer.decode(ids, skip_special_tokens=True) == " a b"
    assert tokenizer.decode(2) == "</s>"
    assert tokenizer.decode(torch.tensor(ids)) == "<s> a</s> b"
    assert tokenizer.batch_decode([ids, [2]]) == ["<s> a</s> b", "</s>"]
    # An unknown piece reads as sentencepiece writes it, and its neighbours keep their spaces.
    pieces = ["▁a", "<unk>", "▁a"]
    assert tokenizer.convert_tokens_to_string(pieces) == tokenizer.sp_model.decode(pieces) == "a \u2047  a"


@pytest.mark.parametrize("index", [600, 639, 80000])
def test_an_id_without_a_piece_decodes_to_nothing(tokenizer, index):
    """A vocabulary is padded: a server may ask for the text of any id that the model has a row for."""
    assert tokenizer.decode([5, index, 4]) == "<_bot><_user>"
    assert tokenizer.convert_ids_to_tokens([5, index]) == ["<_bot>", ""]
    assert tokenizer.convert_tokens_to_string(["<_bot>", ""]) == "<_bot>"


@pytest.mark.parametrize("index", [-1, -100])
def test_a_label_is_no_id(tokenizer, index):
    with pytest.raises(IndexError, match=f"{index} is no id: ids begin at 0"):
        tokenizer.decode([5, index])


def test_an_added_token_takes_an_id_after_the_pieces(tokenizer):
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens(["<_tool>"])
    ids = extended("<_user>x<_tool> y", add_special_tokens=False).input_ids
    assert ids[ids.index(600) - 1] == tokenizer.sp_model.piece_to_id("x")
    assert extended.decode(ids) == "<_user>x<_tool> y"


def test_saving_pickling_and_copying_keep_everything(tokenizer, tmp_path):
    text = "<_user> 中 é</s>"
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == Path(tokenizer.vocab_file).read_bytes()
    assert not (tmp_path / "tokenizer.json").exists()
    for other in (
        AutoTokenizer.from_pretrained(tmp_path),
        TeleFLMTokenizer.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(tokenizer)),
        copy.deepcopy(tokenizer),
    ):
        assert type(other) is TeleFLMTokenizer
        assert other(text).input_ids == tokenizer(text).input_ids
        assert other.get_vocab() == tokenizer.get_vocab()
        assert other.chat_template == tokenizer.chat_template


def test_a_configuration_of_transformers_4_loads(tokenizer, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(Path(tokenizer.vocab_file).read_bytes())
    special = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    old = {
        "add_bos_token": False,
        "add_eos_token": False,
        "auto_map": {"AutoTokenizer": ["tokenization_teleflm.TeleFLMTokenizer", None]},
        "bos_token": {**special, "content": "<s>"},
        "eos_token": {**special, "content": "</s>"},
        "legacy": False,
        "pad_token": "</s>",
        "tokenizer_class": "TeleFLMTokenizer",
        "unk_token": {**special, "content": "<unk>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(old))
    (tmp_path / "config.json").write_text('{"model_type": "TeleFLM"}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is TeleFLMTokenizer
    assert loaded.pad_token_id == 2
    assert loaded("  <_user>a").input_ids == loaded.sp_model.encode("  <_user>a")


@pytest.mark.slow
def test_protobuf_is_not_needed(tokenizer, tmp_path):
    """Protobuf is the package `google`; tiktoken is what transformers asks for when it misses protobuf."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['google', 'google.protobuf', 'tiktoken']));"
        "from modeling_teleflm import TeleFLMTokenizer as T; t = T(sys.argv[1]); t.save_pretrained(sys.argv[2]);"
        "c = [{'role': 'assistant', 'content': 'a'}];"
        "print(T.from_pretrained(sys.argv[2]).apply_chat_template(c, return_assistant_tokens_mask=True)['input_ids'])"
    )
    command = [sys.executable, "-c", program, tokenizer.vocab_file, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [*tokenizer.sp_model.encode("<_bot>a"), 2]
