# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Text as sequences of hashed words, so that comparisons see words and not how they are written.

A word is a run of letters and digits, or one character of a script without spaces between words. Before that the text
is NFKC-normalised and case-folded, and digits of all scripts, as well as those that are spelled out in English, become
ASCII digits. Punctuation and spaces do not count.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash

# Han, kana, hangul, and the scripts of South-East Asia that put no spaces between words.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    "\u2e80-\u2fdf\u3005-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
_UNSPACED = re.compile(f"[{UNSPACED}]")
_FIRST_UNSPACED = UNSPACED.encode()[0]  # in UTF-8
_HAN_DIGITS = "〇零一二三四五六七八九"
_SPELLED_OUT = (b"zero", b"one", b"two", b"three", b"four", b"five", b"six", b"seven", b"eight", b"nine")
_DIGITS = {word: b"%d" % value for value, word in enumerate(_SPELLED_OUT)}

_NON_ASCII = re.compile(r"[^\x00-\x7f]+")
_ASCII_WORDS = bytes(ord(chr(code).lower()) if chr(code).isalnum() else ord(" ") for code in range(128))
_WORD_BYTES = _ASCII_WORDS + bytes(range(128, 256))

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses no bit; 2**64 / golden ratio
_END = np.uint64(0xD1B54A32D192ED03)


@dataclass(frozen=True)
class Words:
    """The words of some texts.

    Args:
        hashes: uint64, the words of all texts in a row.
        offsets: int64, one more than there are texts: text i has the words from `offsets[i]` to `offsets[i + 1]`.
        unspaced: uint64, those of the hashes that are of one character of a script without spaces.
    """

    hashes: np.ndarray
    offsets: np.ndarray
    unspaced: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    @property
    def counts(self) -> np.ndarray:
        """How many words each text has."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> np.ndarray:
        """The number of the text that each word is from."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def split(self, values: np.ndarray) -> Iterator[np.ndarray]:
        """What belongs to each text, of values that belong to words."""
        for start, end in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True):
            yield values[start:end]


def split_words(text: str) -> list[bytes]:
    """The words of a text, in UTF-8."""
    if not text.isascii():
        # Folding may leave what is no normal form: once more, so that a text and its capitals have the same words.
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        text = _NON_ASCII.sub(lambda run: "".join(map(_spellings.__getitem__, run[0])), text)
    return text.encode("utf-8", "surrogatepass").translate(_WORD_BYTES).split()


class _Spellings(dict[str, str]):
    """Character -> what stands for it where words are split at spaces."""

    def __missing__(self, character: str) -> str:
        if character.isdecimal() or character in _HAN_DIGITS:
            self[character] = str(int(unicodedata.numeric(character)))
        elif _UNSPACED.match(character):
            self[character] = f" {character} "
        else:
            self[character] = character if character.isalnum() else " "
        return self[character]


_spellings = _Spellings()


def count_unspaced(text: str) -> int:
    """How many characters are of a script without spaces between words."""
    return 0 if text.isascii() else len(_UNSPACED.findall(text))


def hash_words(texts: Iterable[str]) -> Words:
    """The words of some texts, as xxh3-64."""
    known = _Hashes()
    rows = [np.fromiter(map(known.__getitem__, split_words(text)), np.uint64) for text in texts]
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    unspaced = np.fromiter(known.unspaced, np.uint64)
    return Words(np.concatenate(rows) if rows else np.empty(0, np.uint64), offsets, unspaced)


def pair_characters(words: Words) -> Words:
    """The same with pairs of neighbours in place of characters of scripts without spaces; one without such stays.

    A pair says much more of what a text is about: most words of Chinese have two characters.
    """
    alone = np.isin(words.hashes, words.unspaced) if len(words.unspaced) else np.empty(0, bool)
    if not alone.any():
        return words
    follows = np.zeros(len(alone), bool)  # another one, in the same text
    follows[1:] = alone[1:] & alone[:-1]
    follows[words.offsets[:-1][words.counts > 0]] = False
    leads = np.append(follows[1:], False)
    hashes = words.hashes.copy()
    pairs = hashes[leads] * _MULTIPLIER + words.hashes[1:][follows[1:]]
    hashes[leads] = pairs ^ (pairs >> np.uint64(32))
    kept = leads | ~follows  # the last of a run is in a pair already
    offsets = np.concatenate([[0], np.cumsum(kept)])[words.offsets]
    return Words(hashes[kept], offsets)


def ngrams(words: Words, longest: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Hashes of all runs of n words within a text, for n from 1 to `longest`.

    Yields:
        n; the hashes, uint64; where each run begins in `words.hashes`.
    """
    remaining = np.repeat(words.offsets[1:], words.counts) - np.arange(len(words.hashes))
    hashes = words.hashes
    for n in range(1, longest + 1):
        if n > 1:
            hashes = hashes[:-1] * _MULTIPLIER + words.hashes[n - 1 :]
        within = np.flatnonzero(remaining[: len(hashes)] >= n)
        yield n, hashes[within], within


def hash_runs(words: Words, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of all runs of n words within a text, and where each begins; the last that [`ngrams`] yields."""
    hashes = words.hashes[: max(len(words.hashes) - n + 1, 0)]
    for next_word in range(1, n):
        hashes = hashes * _MULTIPLIER + words.hashes[next_word : next_word + len(hashes)]
    remaining = np.repeat(words.offsets[1:], words.counts)[: len(hashes)] - np.arange(len(hashes))
    within = np.flatnonzero(remaining >= n)
    return hashes[within], within


def word_pairs(words: Words) -> np.ndarray:
    """Hashes of every word with the next one of its text, or with its end: as many as there are words."""
    following = np.empty_like(words.hashes)
    following[:-1] = words.hashes[1:]
    following[words.offsets[1:][words.counts > 0] - 1] = _END
    pairs = words.hashes * _MULTIPLIER + following
    return pairs ^ (pairs >> np.uint64(32))


class _Hashes(dict[bytes, int]):
    """Word -> hash. Most words of a text have been met before."""

    def __init__(self) -> None:
        self.unspaced: list[int] = []

    def __missing__(self, word: bytes) -> int:
        value = xxhash.xxh3_64_intdigest(_DIGITS.get(word, word))
        if word[0] >= _FIRST_UNSPACED and _UNSPACED.fullmatch(word.decode("utf-8", "surrogatepass")):
            self.unspaced.append(value)
        self[word] = value
        return value


__all__ = [
    "UNSPACED",
    "Words",
    "count_unspaced",
    "hash_runs",
    "hash_words",
    "ngrams",
    "pair_characters",
    "split_words",
    "word_pairs",
]
