# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Conversations that are broken, by rules that can be read. Each has a reason code ([`REASONS`]); the first that
applies counts. None looks at more than a row. In doubt a row stays: at most 5 of 1,000 healthy ones may be dropped,
which the tests count on real and on tricky rows, English and Chinese.

What others publish is made for web pages, and as it stands drops healthy conversations by the hundred: Gopher's shares
of repeated lines and of repeated and most frequent runs of words (Rae et al. 2021, arXiv 2112.11446, table A1; the
defaults of datatrove's `GopherRepetitionFilter`), its lengths, symbols and stop words (`GopherQualityFilter`), and
data-juicer's share of special characters, at most 0.25. docs/selection.md has the numbers. Runs of ten characters are
data-juicer's (`character_repetition_filter`), whose default drops none; but it counts the sqrt(d) most frequent of d
different runs, and a loop of five characters has 2 of 5, which is less than its 0.5. Here all repeats count.

The rule for misread text follows the idea of ftfy's detector of UTF-8: it is known which characters the bytes of UTF-8
become when they are read as another encoding.
"""

import ast
import re
import textwrap
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from .rows import answers, conversations, whole_text
from .words import hash_words, ngrams, split_words

MIN_WORDS = 1
MAX_WORDS = 16_384
MAX_REPEATED = 0.5
MAX_LOOPING = 0.8
MAX_GARBLED = 0.005
MAX_MISREAD = 0.005


@dataclass(frozen=True)
class Limits:
    """Thresholds of the rules.

    Args:
        min_words: of all answers together.
        max_words: of the conversation.
        max_repeated: share of the runs of eight words in the answers that are repeats.
        max_looping: share of the runs of ten characters in the answers that are repeats.
        max_garbled: share of the characters that are replacement, control or private-use characters.
        max_misread: share of the characters that are bytes of text in another encoding.
    """

    min_words: int = MIN_WORDS
    max_words: int = MAX_WORDS
    max_repeated: float = MAX_REPEATED
    max_looping: float = MAX_LOOPING
    max_garbled: float = MAX_GARBLED
    max_misread: float = MAX_MISREAD


DEFAULT_LIMITS = Limits()
REASONS = {
    "answer_too_short": "the assistant says no word and no symbol, or only yes, no or okay where more is asked for",
    "too_long": f"it has more than {MAX_WORDS:,} words, several times what a model reads at once",
    "repetitive": f"of the answers' runs of words {MAX_REPEATED:.0%}, or of characters {MAX_LOOPING:.0%}, are repeats",
    "garbled": f"more than {MAX_GARBLED:.1%} of its characters are replacement, control or private-use characters",
    "misread": f"more than {MAX_MISREAD:.1%} of its characters are text that was read in another encoding, as in cafÃ©",
    "refusal": "the last answer begins by refusing, or by saying what it cannot as a language model",
    "cut_code": "an answer opens a code block and does not close it",
    "broken_code": "a block marked as Python is no Python, neither of 3 nor of 2",
    "no_result": "it asks for a result of mathematics, and no answer holds a number, a formula or a verdict",
}
_RUN = 8  # words; shorter, and the zeros of large numbers would repeat each other
_MIN_RUNS = 50  # in fewer, a refrain is no fault
_LOOP_RUN = 10  # characters
_MIN_LOOP = 60  # characters; a shorter answer may be a line of stars, or laughter
_MAX_CODE = 20_000

_GARBLED = re.compile("[\ufffd\ue000-\uf8ff\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")


def _misreadings(first: int, last: int) -> str:
    """What the bytes from `first` to `last` become, read as Latin-1 or as Windows-1252: a class of characters."""
    data = bytes(range(first, last + 1))
    return re.escape("".join(sorted({*data.decode("latin-1"), *data.decode("cp1252", "ignore")})))


_MORE = f"[{_misreadings(0x80, 0xBF)}]"  # every byte of a character in UTF-8 but the first
_LEADS = re.compile("[\xc2-\xf4]")
_UTF8 = re.compile(f"[\xc2-\xdf]{_MORE}|[\xe0-\xef]{_MORE}{{2}}|[\xf0-\xf4]{_MORE}{{3}}")
_MIN_MISREAD = 3  # characters that were one each; fewer may be meant
_LATIN = re.compile("[\xc0-\xd6\xd8-\xf6\xf8-\u024f\u1e00-\u1eff]")
_MAX_QUOTED = 20  # in a text that has the right characters too; more are no examples
_MIN_SWAPPED = 20
_MIN_DIFFERENT = 8  # a frame is drawn with few, as U+2500, and a line with one
_MIN_LETTERS = 0.6
_NON_ASCII = re.compile("[^\x00-\x7f]")

# An answer of these alone says nothing to a question that asks for more, unless they are what it asks for.
_FILLER = re.compile(
    r"\W*(yes|yeah|yep|no|nope|ok|okay|sure|hmm+|n/a|none|null|nan|是|是的|不是|否|好|好的|嗯|对)\W*", re.IGNORECASE
)
_ASKS_MORE = re.compile(
    r"\bwhy\b|\bexplain|\bdescribe\b|\bsummari[sz]e|\bdiscuss\b|\bcompare\b|\b(essay|story|poem|paragraph)\b|"
    r"\bwrite (a|an|me|about|some|your)\b|\btell me (about|how|why)\b|\bgive (me )?(an?|some|two|three|\d+) \w|"
    r"\bhow (do|does|did|can|could|should|to)\b|"
    r"为什么|为何|介绍|解释|说明|描述|总结|讨论|写一?[篇首封段份则]|作文|如何|怎么办|怎样|谈谈",
    re.IGNORECASE,
)
_CLOSED = re.compile(
    r"(^|[.!?,;:\n])[^\S\n]*+(is|are|was|were|am|do|does|did|can|could|will|would|should|shall|has|have|had|may|might|"
    r"must|isn'?t|aren'?t|don'?t|doesn'?t|didn'?t|won'?t|can'?t)\b|"
    r"\b(or|whether|if|true|false|yes|no|ok|correct|right|say|reply|answer|word|symbol|abbreviat\w*+|return\w*+|output\w*+|"
    r"print\w*+|value)\b|[吗嘛]|是否|是不是|有没有|能否|可否|对不对|还是|判断|对错|正确|怎么[说写读念]|[“‘「『\"'](是|好|不是|否|对|嗯)",
    re.IGNORECASE,
)
_NAMES_A_SIGN = re.compile(
    r"\b(symbols?|characters?|operators?|punctuation|marks?|signs?|delimiters?|separators?)\b|符号|标点|字符|运算符",
    re.IGNORECASE,
)
_INSTRUCTIONS = 20  # words of a question, from which on it is no mere question

# Of an assistant that refuses, not of a shop, a letter or a tale: it refuses now, itself, and what it was asked for.
_CANNOT = r"(can'?t|can’t|cannot|can not|((am|are) )?(unable|not able) to|won'?t)"
_OF_AN_ASSISTANT = (
    r"(that|this|these|those|such|any|your (request|question)|you with (that|this|your)|an? (answer|response|opinion)|"
    r"information|content|the (information|answer|request)|with (that|this|your|any|such|requests?)|"
    r"personal|medical|legal)\b"
)
_REFUSED = (
    r"(assist\b|comply\b|fulfil+ (that|this|your|the|any|such)\b|do (that|this)\b|"
    r"help (you )?with (that|this|your|any|such|\w+ing)\b|help (you )?(\W*$|[.!,])|"
    r"(answer|generate|create|write|discuss|engage|respond|produce|participate|endorse|speculate|browse|recommend)\b|"
    r"(provide|give|offer|share|support|continue|complete|process|perform|access|view|open|see|say|tell|advise)( you)? "
    rf"{_OF_AN_ASSISTANT}|provide\b(?! (shipping|delivery|a?\s?refund|a room)))"
)
_NOT_ABLE = (
    r"\b(can'?t|can’t|cannot|\w+n['’]t|unable|won'?t|no|never|lack|"
    r"(can|do|does|am|are|is|have|has|must|may|could|would|should|was|were) not)\b"
)
_REFUSAL = re.compile(
    r"[\s*_#>-]*("
    r"(i'?m|i’m|i am)( very| so| truly)? (sorry|afraid)\b(?! that\b)[^.!?\n]{0,40}?"
    rf"\bi(?:'?m|’m)? {_CANNOT} {_REFUSED}|"
    rf"i (am )?{_CANNOT} ((assist|comply|help) (you )?(with|in)\b|(help|assist|comply)\W*$|do that\W*$|"
    rf"(provide|answer|fulfil|fulfill|generate|do|help|assist|comply with) {_OF_AN_ASSISTANT})|"
    r"as an? (ai|artificial intelligence|(large )?(ai )?language model)"
    r"( (language )?(model|assistant|chatbot|system|program|bot))?( (created|developed|trained|made) by [\w ]+)?"
    rf"\s*,?\s*(i|i'?m|i’m|my)\b(?=[^.!?\n]{{0,60}}?{_NOT_ABLE})|"
    r"(很|非常|十分|真的)?(抱歉|对不起|不好意思|遗憾)[，,、。\s]*"
    r"((但是?|不过|目前|暂时|作为[^，。！？\n]{1,12}?)[，,、\s]*)*(我们?)?(目前|暂时|现在|还|实在)?"
    r"(无法|不能|没有办法|没办法)[^。！？，\n]{0,6}?"
    r"(回答|提供|帮助|帮[您你](?!搬)|协助|满足|生成|回应|讨论|解答|创作|撰写|编写|(完成|执行|继续)[这该您你此])|"
    r"作为(一个|一名|一款|一位)?(ai|人工智能|大语言模型|语言模型|大模型)(语言)?(模型|助手|助理|系统|程序|机器人)?[，,、]?\s*"
    r"我(?![国省市县校院厂军党])[^。！？\n]{0,20}?(无法|不能|不会|不具备|不可以|没有|没办法|并不|不是人))",
    re.IGNORECASE,
)
# What is asked for may be a refusal: of an invitation, in another language.
_WORDING = re.compile(
    r"translat|rephras|paraphras|rewrite|proofread|"
    r"\bhow (do|does|did|would|can|could|should|to) [\w ]{0,12}?\b(say|write|put)\b|"
    r"übersetz|auf (englisch|deutsch)|ins (englische|deutsche)|tradui|traduc|traduz|tradur|en (anglais|inglés)|"
    r"перевед|перевод|翻译|改写|润色|译成|译为|英文怎么|怎么说|用英[语文]",
    re.IGNORECASE,
)

_FENCE = re.compile(r"^[ \t>]*(?:[-*+][ \t]+|\d+[.)][ \t]+)?(`{3,})([^`\n]*)$")
_OPENS_LATE = re.compile(r"[^`](`{3,})[\w+-]*[ \t]*$")  # after words on the same line
_PYTHON = ("python", "py", "python3")
# Of a shell or a notebook, which is not Python.
_SESSION = re.compile(r"^[ \t]*(>>>|In \[|[%!?$]|(pip3?|conda|python3?|cd|git) [\w./-])", re.MULTILINE)
# What a lesson on errors says.
_BROKEN_ON_PURPOSE = re.compile(
    r"(syntax|indentation|tab) ?error|invalid syntax|unexpected indent|not valid python|"
    r"does(n't| not) (parse|compile)|语法错误|缩进错误",
    re.IGNORECASE,
)
_DIFF = re.compile(r"^[-+@]", re.MULTILINE)
_DIFF_LINE = re.compile(r"^(?:-[^\n]*|@@[^\n]*|diff [^\n]*|index [^\n]*|\+\+\+ [^\n]*|[+ ])", re.MULTILINE)
_TEMPLATE_LINE = re.compile(r"^[ \t]*+\{[%#][^\n]*$", re.MULTILINE)
_PLACEHOLDER = re.compile(r"\{\{[^{}\n]{0,200}\}\}|\{%[^{}\n]{0,200}%\}|<[A-Za-z][\w ./:|-]{0,60}>")
_CLAUSE = re.compile(r"\s*(else|elif|except|finally|case)\b")  # of a statement that is not shown


def _print_call(found: re.Match[str]) -> str:
    """A statement of Python 2 as a call; the comma at its end, which kept the line open, goes."""
    return f"{found[1]}print(({found[2].rstrip().removesuffix(',')}))"


# Each takes time in proportion to the text: where a `print` is looked for in a line, the first one counts.
_PYTHON_2: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern, re.MULTILINE), by)
    for pattern, by in (
        (r"^(?>([ \t]*|.*[:;][ \t]*)print[ \t]*>>)[ \t]*([\w.]++)[ \t]*,?([^;\n]*+)", r"\1print(\3)"),
        (r"^(?>([ \t]*|.*?[:;][ \t]*)print(?![\w(=.,]))[ \t]*+([^;#\n]*+)", _print_call),
        (r"^(?>([ \t]*|.*?[:;][ \t]*)print)[ \t]*(\(.*\)[ \t]*[%,+].*)$", r"\1print(\2)"),
        (r"^([ \t]*)exec[ \t]+(?!\()([^\n]*)", r"\1exec('')"),
        (r"^([ \t]*+except[ \t]++[\w.() ,]*[\w.)])[ \t]*+,[ \t]*+(\w++)[ \t]*+:", r"\1 as \2:"),
        (r"^([ \t]*+raise[ \t]++[\w.]++)[ \t]*+,[ \t]*+([^\n]*+)", r"\1(\2)"),
        (r"<>", "!="),
        (r"\b0([0-7]+)\b", r"0o\1"),
        (r"\b(\d+|0x[\da-fA-F]+)[lL]\b", r"\1"),
        (r"\b[uU][rR](?=['\"])", "r"),
        (r"`([^`\n]+)`", r"repr(\1)"),
        (r"^([ \t]*def[ \t]+\w+[ \t]*\([^)\n]*?)\(([\w, ]++)\)", r"\1_"),
        (r"\blambda[ \t]*+\(([\w, ]++)\)[ \t]*+:", r"lambda _:"),
    )
]

_ASKS_RESULT = re.compile(
    r"=\s*\?|how (many|much|long|far|old|fast|often|likely)|calculat|comput|evaluat|\bsolve|"
    r"\bfind (?:the |all |an? |its )?"
    r"(?:value|sum|product|number|area|volume|perimeter|root|solution|length|probability|[a-z]\b)|"
    r"\bwhat is\b[^\n]{0,200}\d|\bsum of|simplif|多少|几[个只天元米人次]|计算|求|等于|解方程",
    re.IGNORECASE,
)
_ASKS_WORDS = re.compile(
    r"\b(who|whom|whose|which|where|why|explain|describe|name)\b|谁|哪|为什么|解释|说明", re.IGNORECASE
)
_RESULT = re.compile(
    r"\d|\\[a-z]|[零一二两三四五六七八九十百千半]|[=√π∞≤≥≠±]|是的|不是|正确|错误|不存在|无解|"
    r"\b(yes|no|not|true|false|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|thirty|forty|"
    r"fifty|sixty|seventy|eighty|ninety|hundred|thousand|half|third|quarter|once|twice|never|none|infinite|infinity|"
    r"infinitely|even|odd|prime|impossible|undefined|equal|equals|diverges|converges)\b|"
    r"^[^\w\n]*[A-Ea-e][^\w\n]*$|\b(option|choice|answer is)\W+[A-E]\b",
    re.IGNORECASE | re.MULTILINE,
)


def drop_broken(table: pa.Table, limits: Limits = DEFAULT_LIMITS) -> pa.Table:
    """Rows that a rule speaks against are dropped; `domain` tells which are mathematics."""
    chats = list(conversations(table))
    replies = ["\n".join(answers(messages)) for messages in chats]
    repeated = np.zeros(len(chats))
    suspects = [number for number, text in enumerate(replies) if _shrinks(text)]
    repeated[suspects] = repeated_shares([replies[number] for number in suspects])
    looping = {number: looping_share(replies[number]) for number in suspects}
    reasons = [
        find_fault(messages, domain, share, limits, looping.get(number, 0.0))
        for number, (messages, domain, share) in enumerate(
            zip(chats, table["domain"].to_pylist(), repeated.tolist(), strict=True)
        )
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


def looping_share(text: str) -> float:
    """The share of a text's runs of ten characters that stood before in it; 0 for a short text."""
    runs = len(text) - _LOOP_RUN + 1
    if len(text) < _MIN_LOOP:
        return 0.0
    return 1 - len({text[start : start + _LOOP_RUN] for start in range(runs)}) / runs


def is_misread(text: str, most: float = MAX_MISREAD) -> bool:
    """Whether a text was in another encoding than it was read in.

    Either it is UTF-8 that was read as Latin-1 or Windows-1252: more than `most` of its characters belong to sequences
    that UTF-8 makes of one character each, which belongs where it stands, and most of the accented letters begin one,
    as they do in no language. A text that also has most of the characters as they should be explains a few examples.
    Or it is UTF-16 in the other byte order: what was ASCII then is the characters whose code ends in 00, which are one
    in 256 of all others; put right, they are different ones, and most are letters, digits and spaces.
    """
    if text.isascii():
        return False
    found = _find_misread(text)
    if len(found) >= _MIN_MISREAD and sum(length for _, length in found) > most * len(text):
        meant = {character for character, _ in found}
        quoted = len(found) <= _MAX_QUOTED and 2 * sum(character in text for character in meant) >= len(meant)
        return not quoted and 2 * len(found) > len(_LEADS.findall(text))
    others = _NON_ASCII.findall(text)
    swapped = [character for character in others if ord(character) & 0xFF == 0]
    if len(swapped) < _MIN_SWAPPED or 2 * len(swapped) <= len(others) or len(swapped) <= most * len(text):
        return False
    right = "".join(chr(ord(character) >> 8) for character in swapped)
    letters = sum(character.isascii() and (character.isalnum() or character.isspace()) for character in right)
    return len(set(right)) >= _MIN_DIFFERENT and letters >= _MIN_LETTERS * len(right)


def _find_misread(text: str) -> list[tuple[str, int]]:
    """Characters that were misread, and of how many each was made.

    Quotation marks and spaces after an accented letter make such sequences in German and French: the letter that they
    would be has to be in a word, a Latin one beside letters, one of another script beside its like.
    """
    matches = [(match.start(), match.end(), _read_again(match[0])) for match in _UTF8.finditer(text)]
    starts, ends = {start for start, _, _ in matches}, {end for _, end, _ in matches}
    found = []
    for start, end, character in matches:
        before, after = text[max(start - 1, 0) : start], text[end : end + 1]
        joined = start in ends or end in starts
        if character == "" or (not character.isalpha() and not joined and not _is_letter(before + after)):
            continue
        if _LATIN.match(character):
            cut = not text[end - 1].isalnum() and not (end in starts or _is_letter(after))  # may be a closing quote
            if cut or not (joined or _is_letter(before) or _is_letter(after)):
                continue
        elif character.isalpha() and not joined:
            continue
        found.append((character, end - start))
    return found


def _is_letter(characters: str) -> bool:
    return any(character.isascii() and character.isalpha() for character in characters)


def _read_again(sequence: str) -> str:
    """The character whose bytes were read as these; empty if there is none."""
    try:
        data = b"".join(c.encode("latin-1" if c <= "\xff" else "cp1252") for c in sequence)
        return data.decode("utf-8")
    except UnicodeError:
        return ""


def find_fault(
    messages: Sequence[dict[str, str]],
    domain: str,
    repeated: float = 0.0,
    limits: Limits = DEFAULT_LIMITS,
    looping: float = 0.0,
) -> str | None:
    """The first reason that speaks against a conversation.

    Args:
        messages: with `role` and `content`.
        domain: of [`sft.selection.domains`].
        repeated: the share of repeats among its runs of words.
        limits: thresholds.
        looping: the share of its runs of characters that are repeats.
    """
    replies, text = answers(messages), whole_text(messages)
    questions = [message["content"] for message in messages if message["role"] == "user"]
    if _says_nothing(questions, replies, limits.min_words):
        return "answer_too_short"
    if len(text) > limits.max_words and _count_words(text) > limits.max_words:
        return "too_long"
    if repeated > limits.max_repeated or looping > limits.max_looping:
        return "repetitive"
    if len(_GARBLED.findall(text)) > limits.max_garbled * len(text):
        return "garbled"
    if is_misread(text, limits.max_misread):
        return "misread"
    if _REFUSAL.match(replies[-1][:200]) and not any(_WORDING.search(question) for question in questions[-1:]):
        return "refusal"
    if any("```" in reply for reply in replies):
        blocks = [find_code(reply) for reply in replies]
        if not all(closed for _, closed in blocks):
            return "cut_code"
        if not _BROKEN_ON_PURPOSE.search(text) and not all(
            is_python(code) for found, _ in blocks for language, code in found if language in _PYTHON
        ):
            return "broken_code"
    if domain == "math" and _lacks_result(questions, replies):
        return "no_result"
    return None


def _lacks_result(questions: Sequence[str], replies: Sequence[str]) -> bool:
    """Whether a result is asked for, and nothing that words alone can answer, and there is none."""
    if not any(map(_ASKS_RESULT.search, questions)) or any(map(_ASKS_WORDS.search, questions)):
        return False
    return not any(map(_RESULT.search, replies))


def _says_nothing(questions: Sequence[str], replies: Sequence[str], min_words: int) -> bool:
    """Whether the answers have too few words; a symbol or an emoji is one, a full stop is none unless asked for."""
    said, asked = " ".join(replies), " ".join(questions)
    if len(said) < 1000 and len(split_words(said)) < min_words:
        symbols = len(_symbols(said))
        if not symbols and _count_words(asked) < _INSTRUCTIONS and _NAMES_A_SIGN.search(asked):
            symbols = len(said.split())
        return len(split_words(said)) + symbols < min_words
    if len(said) > 20 or not _FILLER.fullmatch(said) or _CLOSED.search(asked) or _WORDING.search(asked):
        return False
    return bool(_ASKS_MORE.search(asked)) and _count_words(asked) < _INSTRUCTIONS


def _symbols(text: str) -> list[str]:
    return [character for character in text if unicodedata.category(character).startswith("S")]


def _count_words(text: str) -> int:
    """Of Chinese, two words for three characters."""
    return len(text.split()) + 2 * sum("\u3400" <= c <= "\u9fff" for c in text) // 3


def find_code(text: str) -> tuple[list[tuple[str, str]], bool]:
    """Language and content of each fenced block, and whether all are closed.

    A block ends with as many backticks as it began with, or more, as in CommonMark. A block in a block of as many
    backticks is nobody's fault: where fences come in pairs, nothing is missing.
    """
    blocks: list[tuple[str, str]] = []
    opened, language, lines, fences = 0, "", list[str](), 0
    for line in text.split("\n"):
        line = line.rstrip("\r")
        fence = _FENCE.match(line)
        fences += bool(fence)
        if opened:
            bare = line.strip()
            if (fence and len(fence[1]) >= opened and not fence[2].strip()) or (
                not fence and bare.endswith("`" * opened) and bare.count("`" * opened) == 1
            ):
                if not fence:
                    fences += 1
                    lines.append(line.rstrip().rstrip("`"))
                blocks.append((language, "\n".join(lines)))
                opened = 0
            else:
                lines.append(line)
        elif fence:
            opened, language, lines = len(fence[1]), (fence[2].strip().lower().split() or [""])[0], []
        elif (late := _OPENS_LATE.search(line)) and line.count("```") % 2:
            opened, language, lines = len(late[1]), "", []
            fences += 1
    return blocks, not opened or fences % 2 == 0


def is_python(code: str) -> bool:
    """Whether a text parses as Python, of 3 or 2; it is not run.

    Shell sessions, notebooks and very long texts pass unseen; so do parts of a statement, and what leaves a part out.
    """
    if len(code) > _MAX_CODE or _SESSION.search(code):
        return True
    code = textwrap.dedent(code.replace("\t", "        ")).replace("…", "...").rstrip()
    return any(map(_parses, _readings(code)))


def _readings(code: str) -> Iterator[str]:
    """A text, and what it may stand for."""
    yield code
    part = code
    if _CLAUSE.match(part):
        head = {"else": "if x:\n    pass\n", "elif": "if x:\n    pass\n", "case": ""}.get(part.split()[0].rstrip(":"))
        part = ("try:\n    pass\n" if head is None else head) + part
    if part.endswith(":"):
        part += f"\n{' ' * (len(part.splitlines()[-1]) - len(part.splitlines()[-1].lstrip()) + 4)}pass"
    yield part
    yield _PLACEHOLDER.sub("x", _TEMPLATE_LINE.sub("", part))
    if _DIFF.search(code):
        yield textwrap.dedent(_DIFF_LINE.sub("", code))  # the text after the change
    for pattern, by in _PYTHON_2:
        part = pattern.sub(by, part)
    yield part


def _parses(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


__all__ = [
    "DEFAULT_LIMITS",
    "MAX_GARBLED",
    "MAX_LOOPING",
    "MAX_MISREAD",
    "MAX_REPEATED",
    "MAX_WORDS",
    "MIN_WORDS",
    "REASONS",
    "Limits",
    "drop_broken",
    "find_code",
    "find_fault",
    "is_misread",
    "is_python",
    "looping_share",
]
