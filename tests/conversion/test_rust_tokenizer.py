# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""tokenizer.json against sentencepiece: what is written is the same, and what is not the same is not written."""

import copy
import json
import random
import struct
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, normalizers

from conversion.checkpoint.errors import CheckpointError
from conversion.hub import rust_tokenizer as module
from conversion.hub.rust_tokenizer import rust_tokenizer, tokenizer_json
from conversion.hub.sentencepiece_file import PieceType, read_sentencepiece
from conversion.hub.tokenizer_check import check_tokenizer
from conversion.hub.tokenizer_settings import TokenizerMismatch, default_settings
from modeling_teleflm import TeleFLMTokenizer
from tests.fixtures.tiny import CHAT_SYMBOLS, tiny_sentencepiece, tiny_tokenizer

# Sentences of which every character becomes a piece: there are merges of several scripts.
FOREIGN = (
    "天地玄黄 宇宙洪荒 日月盈昃",
    "Съешь же ещё этих мягких булок",
    "が か\u3099 😀😀 é e\u0301",
    "a  b   c    d     e",
)
MODELS = {
    "plain": {},
    "scripts": {"extra_lines": FOREIGN * 8, "vocab_size": 700},
    "no bytes": {"byte_fallback": False, "vocab_size": 400},
    "no prefix": {"add_dummy_prefix": False},
    "no extra spaces": {"remove_extra_whitespaces": True},
    "no extra spaces, no prefix": {"remove_extra_whitespaces": True, "add_dummy_prefix": False},
    "digits": {"split_digits": True},
    "pieces across words": {"split_by_whitespace": False, "allow_whitespace_only_pieces": True},
    "no symbols": {"user_defined_symbols": ()},
    "symbols of spaces": {"user_defined_symbols": ("<_user>", "\n", "  ", "<", "<_")},
    "control and padding": {"pad_id": 3, "control_symbols": ("<mask>", "<x>")},
    "no ends": {"bos_id": -1, "eos_id": -1},
}


TOOL = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}
CHATS = [
    ([{"role": "user", "content": "What is a decorator?"}], {"add_generation_prompt": True}),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  天地 \n"}], {}),
    (
        [
            {"role": role, "content": text}
            for text in ("Hello", "a  b\n\nc", "def f():\n\treturn 1\n", "")
            for role in ("user", "assistant")
        ],
        {},
    ),
    (
        [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": 1}}}]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "It is 2.", "reasoning_content": "It said 2."},
        ],
        {"tools": [TOOL]},
    ),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def rust(tokenizer):
    return Tokenizer.from_str(rust_tokenizer(Path(tokenizer.vocab_file).read_bytes()))


@pytest.fixture(scope="module", params=MODELS, ids=MODELS)
def pair(request, tmp_path_factory):
    """(our tokenizer, Rust's) of one file."""
    content = tiny_sentencepiece(**MODELS[request.param])
    file = tmp_path_factory.mktemp("model") / "tokenizer.model"
    file.write_bytes(content)
    return TeleFLMTokenizer(str(file)), Tokenizer.from_str(rust_tokenizer(content))


def random_texts(tokenizer: TeleFLMTokenizer, count: int):
    """Texts of another seed and another making than those on which a file is compared."""
    source = random.Random(20)
    pieces = [piece.replace("▁", " ") for piece in tokenizer.get_vocab()]
    marks = [
        *CHAT_SYMBOLS,
        "<s>",
        "</s>",
        "<unk>",
        " ",
        "  ",
        "\n",
        "\r\n",
        "▁",
        "\u0301",
        "中",
        "😀",
        "<0x41>",
        "<mask>",
    ]
    for _ in range(count):
        yield "".join(source.choice(source.choice((pieces, marks))) for _ in range(source.randint(1, 12)))
        yield "".join(chr(source.choice((source.randrange(0x250), source.randrange(0xD800)))) for _ in range(9))


def test_ids_and_text_are_those_of_our_tokenizer(pair):
    ours, rust = pair
    for text in (*FOREIGN, *random_texts(ours, 120)):
        ids = ours(text, add_special_tokens=False).input_ids
        assert rust.encode(text, add_special_tokens=False).ids == ids, ascii(text)
        assert rust.decode(ids, skip_special_tokens=False) == ours.decode(ids), ascii(text)
    if ours.bos_token:
        for text in ("", "a b", " <_user>a"):
            assert rust.encode(text).ids == ours(text).input_ids
        assert rust.encode("a", "b").ids == ours("a", "b").input_ids


def test_chats_have_the_same_ids(tokenizer, rust):
    for chat, options in CHATS:
        text = tokenizer.apply_chat_template(chat, tokenize=False, **options)
        ids = tokenizer.apply_chat_template(chat, **options)["input_ids"]
        assert len(ids) > 8
        assert rust.encode(text, add_special_tokens=False).ids == ids
        assert rust.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids) == text


def test_the_file_is_a_function_of_the_model():
    content = tiny_sentencepiece()
    first = rust_tokenizer(content)
    rust_tokenizer.cache_clear()
    assert rust_tokenizer(content) == first
    assert json.loads(first)["model"]["vocab"]["<_bot>"] == 5


# Small vocabularies of pieces that overlap in every way, by sentencepiece itself.


def written_model(pieces: list[tuple[str, float, PieceType]]) -> bytes:
    """A BPE model without a normaliser, written by the rules of protobuf."""

    def message(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    def piece(text: str, score: float, kind: PieceType) -> bytes:
        return message(1, message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind]))

    content = b"".join(piece(*fields) for fields in pieces)
    return content + message(2, bytes([0x18, 2])) + message(3, bytes([0x18, 0, 0x20, 0, 0x28, 1]))


def overlapping_models(count: int):
    source = random.Random(3)
    names = [("<unk>", 0.0, PieceType.UNKNOWN), ("<s>", 0.0, PieceType.CONTROL), ("</s>", 0.0, PieceType.CONTROL)]
    for _ in range(count):
        alphabet = source.choice(("a", "ab", "abc"))
        known = list(alphabet)
        for _ in range(source.randint(2, 12)):
            joined = source.choice(known) + source.choice(known)
            known += [joined] if len(joined) < 9 and joined not in known else []
        source.shuffle(known)
        made = [(text, -float(place), PieceType.NORMAL) for place, text in enumerate(known)]
        yield alphabet, written_model([*names, ("<_u>", 0.0, PieceType.USER_DEFINED), *made])


def differing_texts(count: int) -> int:
    source, differing = random.Random(4), 0
    for alphabet, content in overlapping_models(count):
        pieces = SentencePieceProcessor(model_proto=content)
        try:
            made = tokenizer_json(read_sentencepiece(content), content, default_settings(content))
        except TokenizerMismatch:
            continue
        rust = Tokenizer.from_str(json.dumps(made))
        for _ in range(40):
            text = "".join(source.choices([*alphabet * 3, "<_u>"], k=source.randint(2, 20)))
            differing += rust.encode(text, add_special_tokens=False).ids != pieces.encode(text)
    return differing


def test_merges_are_made_in_the_order_of_sentencepiece():
    assert differing_texts(250) == 0


def test_the_order_of_merges_matters(monkeypatch):
    merges = module.piece_merges
    monkeypatch.setattr(module, "piece_merges", lambda model: merges(model)[::-1])
    assert differing_texts(50) > 0


# What differs is not written. Each mutant is a mistake that such a file may have.


def edit(content: dict, path: str, change) -> None:
    *parents, last = (int(part) if part.isdecimal() else part for part in path.split("."))
    for part in parents:
        content = content[part]
    content[last] = change(content[last])


MUTANTS = {
    "merges in another order": ("model.merges", lambda merges: merges[::-1]),
    "a merge is missing": ("model.merges", lambda merges: merges[:-1]),
    "no bytes": ("model.byte_fallback", lambda flag: False),
    "parts are merged although they are a piece": ("model.ignore_merges", lambda flag: False),
    "two pieces change ids": ("model.vocab", lambda vocab: {**vocab, "he": vocab["▁t"], "▁t": vocab["he"]}),
    "no prefix": ("normalizer.normalizers", lambda steps: steps[1:]),
    "spaces are not escaped": ("normalizer.normalizers", lambda steps: steps[:-1]),
    "symbols do not stand alone": ("pre_tokenizer.pretokenizers", lambda steps: steps[1:]),
    "a symbol is forgotten": (
        "pre_tokenizer.pretokenizers.0.pattern.Regex",
        lambda regex: regex.replace("|<_bot>", ""),
    ),
    "names of bytes are bytes": ("pre_tokenizer.pretokenizers", lambda steps: steps[:1]),
    "<s> is text": ("added_tokens", lambda tokens: tokens[1:]),
    "<unk> is a token": ("added_tokens", lambda tokens: [{**tokens[0], "id": 0, "content": "<unk>"}, *tokens]),
    "a token takes the space before it": ("added_tokens.0.lstrip", lambda flag: True),
    "no <s> in front": ("post_processor.single", lambda parts: parts[1:]),
    "an </s> behind": ("post_processor.single", lambda parts: [*parts, parts[0]]),
    "the first space stays": ("decoder.decoders", lambda steps: [s for s in steps if "FDD2" not in ascii(s).upper()]),
    "bytes stay names": ("decoder.decoders", lambda steps: [s for s in steps if s["type"] != "ByteFallback"]),
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=MUTANTS)
def test_a_file_that_differs_is_found(mutant):
    content = tiny_sentencepiece()
    model, settings = read_sentencepiece(content), default_settings(content)
    made = copy.deepcopy(tokenizer_json(model, content, settings))
    edit(made, *MUTANTS[mutant])
    with pytest.raises(TokenizerMismatch, match=r"^tokenizer\.model: the (text|ids?) "):
        check_tokenizer(json.dumps(made), model, content, settings)


def test_ids_that_no_text_makes_are_compared_too():
    """An unknown piece without a surface, at the beginning: where a text has a space before it."""
    content = tiny_sentencepiece(unk_surface="", byte_fallback=False, vocab_size=400)
    with pytest.raises(
        TokenizerMismatch, match=r"^tokenizer\.model: the ids \[.*\b0, .*\] are '.*' to sentencepiece and ' "
    ):
        rust_tokenizer(content)


def test_the_message_names_the_text_and_both_readings():
    content = tiny_sentencepiece()
    model, settings = read_sentencepiece(content), default_settings(content)
    made = tokenizer_json(model, content, settings)
    made["model"]["merges"] = []
    pieces, rust = SentencePieceProcessor(model_proto=content), Tokenizer.from_str(json.dumps(made))
    with pytest.raises(TokenizerMismatch) as raised:
        check_tokenizer(json.dumps(made), model, content, settings)
    text = str(raised.value).split("the text ")[1].split(" has the ids")[0].strip("'")
    assert len(text) <= 3
    assert f"ids {pieces.encode(text)} by sentencepiece and {rust.encode(text, add_special_tokens=False).ids}" in str(
        raised.value
    )


NORMALIZER, DENORMALIZER = 3, 5


def with_fields(content: bytes, message: int, fields: bytes) -> bytes:
    """A model with more fields: of a message that is there twice, the last word counts."""
    return content + bytes([message << 3 | 2]) + length(fields) + fields


def length(content: bytes) -> bytes:
    return bytes([len(content) >> shift & 0x7F | 0x80 for shift in (0, 7)] + [len(content) >> 14])


def with_denormalizer(content: bytes) -> bytes:
    rules = read_sentencepiece(tiny_sentencepiece("bpe", "nmt_nfkc")).charsmap
    return with_fields(content, DENORMALIZER, b"\x12" + length(rules) + rules)


UNSAYABLE = {
    "unigram": (lambda: tiny_sentencepiece("unigram"), "its algorithm is unigram, expected bpe"),
    "char": (lambda: tiny_sentencepiece("char", byte_fallback=False, vocab_size=90), "its algorithm is char"),
    "rules": (lambda: tiny_sentencepiece("bpe", "nmt_nfkc"), "its normaliser has rules for characters"),
    "suffix": (lambda: tiny_sentencepiece(treat_whitespace_as_suffix=True), "it puts spaces behind words"),
    "spaces": (lambda: with_fields(tiny_sentencepiece(), NORMALIZER, b"\x28\x00"), "it keeps spaces as they are"),
    "decoded": (lambda: with_denormalizer(tiny_sentencepiece()), "it has rules for decoded text"),
    "unused": (
        lambda: written_model(
            [("<unk>", 0.0, PieceType.UNKNOWN), ("a", 0.0, PieceType.NORMAL), ("aa", 0.0, PieceType.UNUSED)]
        ),
        "it has unused pieces",
    ),
}


@pytest.mark.parametrize("case", UNSAYABLE, ids=UNSAYABLE)
def test_what_the_file_cannot_say_is_refused(case):
    content, reason = UNSAYABLE[case]
    with pytest.raises(TokenizerMismatch, match=f"^tokenizer.model: {reason}.*, which tokenizer.json cannot say.$"):
        rust_tokenizer(content())


def test_rules_for_characters_would_differ():
    """Why models with them are refused: the end of a line, and a letter in two characters."""
    content = tiny_sentencepiece("bpe", "nmt_nfkc")
    rules = read_sentencepiece(content).charsmap
    pieces, rust = SentencePieceProcessor(model_proto=content), normalizers.Precompiled(rules)
    for text in ("a\r\nb", "か\u3099"):
        assert rust.normalize_str(text) != pieces.normalize(text).replace("▁", " ").removeprefix(" ")


@pytest.mark.parametrize("content", [b"", b"junk", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x0a\x05ab"])
def test_what_is_no_model_is_one_line(content):
    for call in (read_sentencepiece, rust_tokenizer):
        with pytest.raises(
            CheckpointError, match=r"tokenizer.model: not a sentencepiece model \(.*restore it"
        ) as raised:
            call(content)
        assert "\n" not in str(raised.value)


def test_a_model_is_read_as_sentencepiece_reads_it():
    content = tiny_sentencepiece(pad_id=3, control_symbols=("<mask>",))
    model, pieces = read_sentencepiece(content), SentencePieceProcessor(model_proto=content)
    kinds = {PieceType.UNKNOWN: pieces.is_unknown, PieceType.CONTROL: pieces.is_control, PieceType.BYTE: pieces.is_byte}
    assert len(model.pieces) == pieces.get_piece_size()
    for index, piece in enumerate(model.pieces):
        assert (piece.text, piece.score) == (pieces.id_to_piece(index), pieces.get_score(index))
        assert [kind for kind, holds in kinds.items() if holds(index)] == [kind for kind in kinds if kind is piece.type]
    assert model.texts(PieceType.USER_DEFINED) == CHAT_SYMBOLS
    assert (model.byte_fallback, model.add_dummy_prefix, model.remove_extra_whitespaces) == (True, True, False)


# What cannot be the same, and is documented.


def test_an_id_without_a_piece_decodes_to_nothing(tokenizer, rust):
    ids = [*tokenizer("a b").input_ids, 600, 639, *tokenizer("<_user>c", add_special_tokens=False).input_ids]
    for skip in (False, True):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == rust.decode(ids, skip_special_tokens=skip)
    assert tokenizer.convert_ids_to_tokens([600]) == [""]


def test_bytes_that_are_no_text_may_read_otherwise(tokenizer, rust):
    """sentencepiece keeps the characters of a run of bytes that are whole, Rust replaces every byte of the run."""
    you, broken = [6 + byte for byte in "你".encode()], [6 + 0xE4, 6 + 0xBD]
    for ids, same in ((you, True), (broken, True), ([*you, *broken], False)):
        assert (rust.decode(ids) == tokenizer.decode(ids)) is same
    assert tokenizer.decode([*you, *broken]) == "你\ufffd\ufffd"


def test_skipping_a_token_between_two_texts_leaves_the_space_of_the_second(tokenizer, rust):
    ids = tokenizer("a</s>b").input_ids
    assert (tokenizer.decode(ids), rust.decode(ids, skip_special_tokens=False)) == ("<s>a</s>b", "<s>a</s>b")
    assert (tokenizer.decode(ids, skip_special_tokens=True), rust.decode(ids)) == ("ab", "a b")


def test_an_unknown_piece_is_not_skipped(tmp_path):
    content = tiny_sentencepiece(byte_fallback=False, vocab_size=400)
    (tmp_path / "tokenizer.model").write_bytes(content)
    ours, rust = TeleFLMTokenizer(str(tmp_path / "tokenizer.model")), Tokenizer.from_str(rust_tokenizer(content))
    ids = ours("a 中文 b").input_ids
    assert ours.decode(ids, skip_special_tokens=True) == rust.decode(ids) == "a  \u2047  b"
