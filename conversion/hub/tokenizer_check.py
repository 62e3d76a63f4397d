# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A tokenizer.json against the sentencepiece model that it was made from: the same ids, and the same text of them.

What is compared: texts of many scripts, code, emoji, control characters, spaces and newlines in runs; the names of
special tokens and of pieces, alone and beside each other; chats of several turns; every piece by itself; and random
texts of pieces, of Unicode, of symbols and spaces, and of few characters that repeat. The seed is fixed: a file is
always compared on the same texts. Ids are decoded too as a model may write them, which no text makes; of bytes those of
texts alone, as what is no text differs.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from .sentencepiece_file import SPACE, PieceType, SentencePieceFile, open_model
from .tokenizer_settings import TokenizerMismatch, TokenizerSettings

_RANDOM_TEXTS = 500  # of each of the four kinds
_TOGETHER = 256  # pieces in a text
_SHOWN = 12  # ids in a message
_ORDINARY = (
    "The quick brown fox jumps over the lazy dog. It isn't 1,234.56 dollars, is it?",
    "Grüße aus Köln: naïve café, cafe\u0301, œuvre, Ångström, İstanbul, ﬁ ﬂ ½ ² ㍿ ﷺ",
    "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。全角：ＡＢＣ１２３！（括号）《书名》",
    "中文English混排123，没有空格;半角,逗号。\u3000全角空格",
    "吾輩は猫である。名前はまだ無い。カタカナ・ｶﾀｶﾅ　がぎぐ か\u3099",
    "대한민국 서울특별시 \u1112\u1161\u11ab글",
    "Съешь же ещё этих мягких французских булок. Є і ї ґ и\u0306",
    "Ο Σίσυφος κυλά τον βράχο· ἀρχὴ ἥμισυ παντός",
    "שלום עולם, שָׁלוֹם",
    "السلام عليكم، مَرْحَبًا ١٢٣",
    "नमस्ते दुनिया, क्षत्रिय ज्ञान",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง",
    "வணக்கம் உலகம் తెలుగు ಕನ್ನಡ മലയാളം বাংলা ਪੰਜਾਬੀ",
    "ສະບາຍດີ မင်္ဂလာပါ ភាសាខ្មែរ ཞབས་ཞྱ አማርኛ ქართული հայերեն",
    "😀 👩‍👩‍👧‍👦 🇨🇳🇪🇺 👍🏽 ❤️ ☺︎ 1️⃣ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, ∑ᵢ₌₁ⁿ αᵢ ≤ √2 · 10⁻³, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒜",
    "def f(x, *args):\n    if x >= 0 and x != 3:\n\treturn x ** 2  # 平方\n\n\n    return {'a': [1, 2]}\n",
    'for (int i = 0; i < n; ++i) {\r\n\tprintf("%d\\n", a[i]);\r\n}\r\n',
    "<html lang=\"en\"><body class='x'>&amp;&lt;&#8212;</body></html>\n<!-- <s>not a token</s> -->",
    "SELECT * FROM t WHERE a <> 'b' AND c <= 10; -- comment",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org ~/x/../y C:\\z\\w",
    "| a | b |\n|---|:-:|\n| 1 | 2 |\n\n* item\n  * inner\n1. one\n```\ncode\n```\n",
    '{"name": "f", "arguments": {"x": 1, "y": [true, null, -1.5e-3]}}',
    "\x00\x01\x07\x08\x0b\x0c\x1b\x7f\x80\x85\xa0\xad",
    "\u200b\u200c\u200d\u200e\u2028\u2029\u202f\u205f\u2060\ufeff\ufffd\ufffe\U0010ffff",
    "0 00 000 0000 00000 12 123 1234 12345 3.14159 1e10 0x1F",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!!!!!!!!! ----------------- ......... ======== ________",
    "你" * 40 + "哈" * 7,
    f"{SPACE}already {SPACE}{SPACE} a meta{SPACE}symbol{SPACE}",
    "<0x41><0x0A> <0x00>\u2047 \u2047 <pad> <mask> [CLS] <|endoftext|> <unk>",
)
# Where random characters are taken from, first and last of blocks that are alike likely; surrogates are none.
_BLOCKS = (
    (0x20, 0x7E),
    (0x00, 0x17F),
    (0x300, 0x36F),
    (0x370, 0x1FFF),
    (0x2000, 0x2BFF),
    (0x3000, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0xE000, 0xFFFF),
    (0x1F300, 0x1FAFF),
    (0x10000, 0x10FFFF),
)
_SPACES = ("", " ", "  ", "   ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u3000", "\xa0", " " * 17, "\n" * 9, " \t \t ")


def check_tokenizer(
    tokenizer_json: str, model: SentencePieceFile, model_file: bytes, settings: TokenizerSettings
) -> None:
    """Compare a tokenizer.json with the sentencepiece model that it was made from.

    Args:
        tokenizer_json: content of the one.
        model: what the other says.
        model_file: its content.
        settings: the special tokens.

    Raises:
        TokenizerMismatch: a text has other ids, or ids another text; names it and both.
    """
    from tokenizers import Tokenizer

    try:
        rust = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # of a class without a name of its own
        raise TokenizerMismatch(f"tokenizer.model: `tokenizers` cannot read what is made of it: {error}.") from None
    reference = Reference(model_file, settings)
    _compare_vocabulary(rust, model, settings)

    def ids_of(text: str) -> list[int]:
        ids: list[int] = rust.encode(text, add_special_tokens=False).ids
        return ids

    for text in check_texts(model, settings):
        found = ids_of(text)
        if found != reference.encode(text):
            shortest = _shortest(text, lambda part: ids_of(part) != reference.encode(part))
            _refuse_ids(shortest, reference.encode(shortest), ids_of(shortest))
        _compare_decoded(rust, reference, found)
    for ids in _check_ids(model):
        _compare_decoded(rust, reference, ids)
    _compare_frame(rust, reference, settings)


class Reference:
    """What `TeleFLMTokenizer` does, by sentencepiece's own runtime and without transformers.

    Args:
        model_file: content of tokenizer.model.
        settings: the special tokens.
    """

    def __init__(self, model_file: bytes, settings: TokenizerSettings) -> None:
        self._pieces = open_model(model_file)
        self._count = self._pieces.get_piece_size()
        self._ids = {token.text: token.id for token in settings.cuts}
        self._names = {token.id: token.text for token in settings.cuts}
        names = sorted(self._ids, key=lambda name: (-len(name), name))
        self._cut = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without what comes before and after it."""
        ids: list[int] = []
        for part in self._cut.split(text):
            if part:
                ids += [self._ids[part]] if part in self._ids else self._pieces.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens appear by name, ids without a piece not at all."""
        text = ""
        for is_special, run in groupby(ids, key=self._names.__contains__):
            part = list(run)
            if is_special:
                text += "".join(self._names[index] for index in part)
            else:
                text += self._pieces.decode([index for index in part if 0 <= index < self._count])
        return text


def _compare_vocabulary(rust: Any, model: SentencePieceFile, settings: TokenizerSettings) -> None:
    expected = {piece.text: index for index, piece in enumerate(model.pieces)}
    expected |= {token.text: token.id for token in settings.cuts}
    found = rust.get_vocab(with_added_tokens=True)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise TokenizerMismatch(
                f"tokenizer.model: the id of {name!r} is {expected.get(name)} and would be {found.get(name)} in "
                "tokenizer.json."
            )


def _compare_decoded(rust: Any, reference: Reference, ids: Sequence[int]) -> None:
    if (found := rust.decode(ids, skip_special_tokens=False)) != (expected := reference.decode(ids)):
        raise TokenizerMismatch(
            f"tokenizer.model: the ids {_shown(ids)} are {_cut(expected)} to sentencepiece and {_cut(found)} in "
            "tokenizer.json."
        )


def _compare_frame(rust: Any, reference: Reference, settings: TokenizerSettings) -> None:
    """What comes before and after a text."""
    before = [settings.bos] if settings.bos is not None else []
    after = [settings.eos] if settings.eos is not None else []
    for text in ("", "a b", " a"):
        expected, found = [*before, *reference.encode(text), *after], rust.encode(text).ids
        if found != expected:
            _refuse_ids(text, expected, found)


def _refuse_ids(text: str, expected: Sequence[int], found: Sequence[int]) -> None:
    raise TokenizerMismatch(
        f"tokenizer.model: the text {_cut(text)} has the ids {_shown(expected)} by sentencepiece and {_shown(found)} "
        "by the tokenizer.json that is made of it."
    )


def _shortest(text: str, differs: Callable[[str], bool]) -> str:
    """A part of a text that differs as it does, for a message: no half, quarter, ... of it can be left out."""
    step = len(text) // 2
    while step:
        shorter = (text[:at] + text[at + step :] for at in range(0, len(text), step))
        found = next((part for part in shorter if differs(part)), None)
        text, step = (found, min(step, len(found) // 2)) if found is not None else (text, step // 2)
    return text


def _cut(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def _shown(ids: Sequence[int]) -> str:
    return str(list(ids)) if len(ids) <= _SHOWN else f"[{', '.join(map(str, ids[:_SHOWN]))}, ...]"


# Texts.


def check_texts(model: SentencePieceFile, settings: TokenizerSettings) -> Iterator[str]:
    """The texts on which a file is compared: always the same ones of a model.

    Args:
        model: the sentencepiece model.
        settings: the special tokens.
    """
    symbols = model.texts(PieceType.USER_DEFINED)
    cuts = [token.text for token in settings.cuts]
    names = [*cuts, *symbols, *model.texts(PieceType.CONTROL, PieceType.UNKNOWN), "<0x41>", "<0x0A>"]
    yield from _ORDINARY
    yield from _SPACES
    yield from _around(names)
    yield from _chats(symbols, cuts)
    yield from _every_piece(model, (symbols or cuts or ["\n"])[0])
    yield from _random_texts(model, names)


def _around(names: Sequence[str]) -> Iterator[str]:
    """Names beside spaces, words and each other."""
    for name in names:
        yield from (name, f" {name}", f"{name} ", f"  {name}  a", f"a{name}b", f"a {name} b", f"a\n{name}\nb", name * 3)
        yield from (name[:-1], name[1:], f"{name}{SPACE}", f"{name}\u0301", f"中{name}文", f"{name}\x00{name}")
    for first in names[:8]:
        yield from (f"{space}{first}{space}{other}{space}x" for other in names[:8] for space in ("", " "))


def _chats(symbols: Sequence[str], cuts: Sequence[str]) -> Iterator[str]:
    """Turns as templates write them: a marker, a text, perhaps the token that ends it."""
    markers, ends = list(symbols[:4]) or [""], ["", *cuts[1:2]]
    for shift, end in ((shift, end) for shift in range(len(markers)) for end in ends):
        for strip in (False, True):
            turns = []
            for place, text in enumerate(_ORDINARY):
                words = text.strip() if strip else f" {text}\n"
                turns.append(f"{markers[(place + shift) % len(markers)]}{words}{end if place % 2 else ''}")
            yield "".join(turns)
            yield from ("".join(turns[at : at + 3]) for at in range(0, len(turns), 3))


def _every_piece(model: SentencePieceFile, name: str) -> Iterator[str]:
    """Many pieces in a text, each behind a name that separates it from the one before."""
    texts = [piece.text.replace(SPACE, " ") for piece in model.pieces]
    for at in range(0, len(texts), _TOGETHER):
        yield "".join(name + text for text in texts[at : at + _TOGETHER])


def _random_texts(model: SentencePieceFile, names: Sequence[str]) -> Iterator[str]:
    random_ = random.Random(0)
    pieces = [piece.text.replace(SPACE, " ") for piece in model.pieces if piece.type is PieceType.NORMAL] or ["a"]
    characters = sorted({character for text in pieces for character in text})
    small = [*names, *_SPACES[1:9], "a", "B", "1", ".", "中", "é", "😀", "\x00", SPACE]
    for _ in range(_RANDOM_TEXTS):
        yield "".join(random_.choices(pieces, k=random_.randint(1, 24)))
        blocks = random_.choices(_BLOCKS, k=random_.randint(1, 12))
        yield "".join(chr(random_.randint(first, last)) for first, last in blocks)
        yield "".join(random_.choices(small, k=random_.randint(1, 10)))
        few = random_.sample(characters, k=min(len(characters), random_.randint(1, 3)))
        yield "".join(random_.choices(few, k=random_.randint(2, 30)))


def _check_ids(model: SentencePieceFile) -> Iterator[list[int]]:
    """Random ids, the first ones often, some without a piece; none of bytes."""
    random_ = random.Random(0)
    known = [index for index, piece in enumerate(model.pieces) if piece.type is not PieceType.BYTE]
    spaced = [index for index in known if model.pieces[index].text.startswith(SPACE)] or known
    beyond = [len(model.pieces), len(model.pieces) + 9]
    kinds = (known, known[:8], spaced, beyond)
    for _ in range(_RANDOM_TEXTS):
        yield [random_.choice(random_.choice(kinds)) for _ in range(random_.randint(1, 8))]


__all__ = ["Reference", "check_texts", "check_tokenizer"]
