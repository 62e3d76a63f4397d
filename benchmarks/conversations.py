# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A corpus of conversations as large as wanted, with planted duplicates and evaluation items that are known.

Sentences come from a pool of real conversations if there is one, else from the standard library's documentation. Each
conversation draws its sentences anew, and in them numbers and one word in ten change, so that two conversations have no
more in common than real ones on one subject. On top of that come copies, one in six of them exact, the others edited
in one of the ways of [`EDITS`], and conversations in whose text an evaluation item stands.
"""

import gzip
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

Messages = list[dict[str, str]]
POOL = Path(__file__).parents[2] / "shared" / "data" / "conversations.jsonl.gz"
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
NUMBER = re.compile(r"\d+")
MEAN_CHARACTERS = 2000
COPIES, CONTAMINATED = 0.25, 0.01  # shares of all rows
CHUNK = 1000


@dataclass(frozen=True)
class Pool:
    """What conversations are made of.

    Args:
        sentences: kind -> (of questions, of answers).
        weights: kind -> share of conversations.
        words: to put in the place of others.
        evaluation: texts of evaluation items, none of whose sentences is in `sentences`.
    """

    sentences: dict[str, tuple[list[str], list[str]]]
    weights: dict[str, int]
    words: list[str]
    evaluation: list[str]


def read_pool(items: int = 200) -> Pool:
    """The pool: `items` conversations of it are set aside as an evaluation set."""
    rows = _real_rows() if POOL.exists() else _documentation_rows()
    random.Random(0).shuffle(rows)
    long = [index for index, (_, messages) in enumerate(rows) if 20 < len(messages[0]["content"].split()) < 100]
    aside = set(long[:items])
    sentences: dict[str, tuple[list[str], list[str]]] = {}
    weights: dict[str, int] = {}
    for index, (kind, messages) in enumerate(rows):
        if index not in aside:
            weights[kind] = weights.get(kind, 0) + 1
            pair = sentences.setdefault(kind, ([], []))
            for message in messages:
                side = pair[message["role"] == "assistant"]
                side += [part for part in SENTENCE.split(message["content"]) if len(part) > 8]
    words = sorted({word for pair in sentences.values() for side in pair for part in side for word in part.split()})
    evaluation = [rows[index][1][0]["content"] for index in sorted(aside)]
    return Pool(sentences, weights, [word for word in words if word.isalpha()], evaluation)


def _real_rows() -> list[tuple[str, Messages]]:
    with gzip.open(POOL, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(row["source"], row["messages"]) for row in rows if row["source"] != "fastchat-dummy"]


def _documentation_rows() -> list[tuple[str, Messages]]:
    parts = [part for text in topics.topics.values() for part in text.split("\n\n") if len(part) > 200]
    return [("python", [_message("user", part[:150]), _message("assistant", part[150:])]) for part in parts]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# --- conversations ----------------------------------------------------------------------------------------------------


def make_conversation(pool: Pool, draw: random.Random) -> Messages:
    """A conversation unlike any other."""
    kind = draw.choices(list(pool.weights), list(pool.weights.values()))[0]
    questions, replies = pool.sentences[kind]
    rounds = draw.choice((1, 1, 2, 4, 6))
    size = MEAN_CHARACTERS * draw.uniform(0.25, 1.75) / rounds
    messages = []
    for _ in range(rounds):
        for role, sentences, share in (("user", questions, 0.3), ("assistant", replies, 0.7)):
            parts = [draw.choice(sentences)]
            while sum(map(len, parts)) < share * size - 40:  # half a sentence
                parts.append(draw.choice(sentences))
            messages.append(_message(role, _vary("\n".join(parts), pool.words, draw)))
    return messages


def _vary(text: str, words: list[str], draw: random.Random) -> str:
    """Another number for every number, another word for one word in ten."""
    words_of_text = NUMBER.sub(lambda old: str(draw.randrange(10 ** len(old[0][:6]))), text).split(" ")
    for index in draw.sample(range(len(words_of_text)), len(words_of_text) // 10):
        words_of_text[index] = draw.choice(words)
    return " ".join(words_of_text)


# --- edits ------------------------------------------------------------------------------------------------------------


def swap_words(messages: Messages, draw: random.Random) -> Messages:
    """One word in twelve changes places with its neighbour."""

    def edit(text: str) -> str:
        words = text.split(" ")
        for index in range(len(words) - 1):
            if draw.random() < 1 / 12:
                words[index], words[index + 1] = words[index + 1], words[index]
        return " ".join(words)

    return _edit_each(messages, edit)


def truncate(messages: Messages, draw: random.Random) -> Messages:
    """The end is missing: up to two fifths of the last messages, an answer being the last that is left."""
    keep = int(sum(len(message["content"]) for message in messages) * draw.uniform(0.6, 0.95))
    kept: Messages = []
    for message in messages:
        kept.append({**message, "content": message["content"][: max(keep, 1)]})
        keep -= len(message["content"])
        if keep <= 0 and message["role"] == "assistant":
            break
    return kept


def change_case_and_punctuation(messages: Messages, draw: random.Random) -> Messages:
    """All upper or lower case, and punctuation gone or doubled."""
    case = draw.choice((str.upper, str.lower))
    punctuation = draw.choice(("", r"\g<0>\g<0>", " "))
    return _edit_each(messages, lambda text: re.sub(r"[.,;:!?'\"()-]", punctuation, case(text)))


def reorder_turns(messages: Messages, draw: random.Random) -> Messages:
    """Questions with their answers in another order; in one question and its answer, sentences."""
    rounds = [messages[start : start + 2] for start in range(0, len(messages), 2)]
    if len(rounds) > 1:
        draw.shuffle(rounds)
        return [message for pair in rounds for message in pair]

    def edit(text: str) -> str:
        lines = text.split("\n")
        draw.shuffle(lines)
        return "\n".join(lines)

    return _edit_each(messages, edit)


def translate_digits(messages: Messages, draw: random.Random) -> Messages:
    """Digits of another script."""
    zero = draw.choice("\u0660\u0966\uff10\u0e50")  # Arabic-Indic, Devanagari, full width, Thai
    table = {ord("0") + value: chr(ord(zero) + value) for value in range(10)}
    return _edit_each(messages, lambda text: text.translate(table))


def _edit_each(messages: Messages, edit: Callable[[str], str]) -> Messages:
    return [{**message, "content": edit(message["content"]) or message["content"]} for message in messages]


EDITS: dict[str, Callable[[Messages, random.Random], Messages]] = {
    "word swaps": swap_words,
    "truncation": truncate,
    "casing and punctuation": change_case_and_punctuation,
    "reordered turns": reorder_turns,
    "translated digits": translate_digits,
}


# --- the corpus -------------------------------------------------------------------------------------------------------


def make_rows(pool: Pool, rows: int, seed: int = 0) -> Iterator[dict]:
    """Rows with what is known about them.

    Yields:
        `messages`, and `planted`: `unique`, `original`, `contaminated`, `exact` or a name of [`EDITS`]; an original and
        its copy have the same `group`.
    """
    for chunk in range(0, rows, CHUNK):
        draw = random.Random(f"{seed}-{chunk}")
        made = list(_make_chunk(pool, min(CHUNK, rows - chunk), draw, chunk))
        draw.shuffle(made)
        yield from made


def _make_chunk(pool: Pool, rows: int, draw: random.Random, first: int) -> Iterator[dict]:
    copies, contaminated = round(rows * COPIES), round(rows * CONTAMINATED)
    kinds = ["exact", *EDITS]
    for number in range(rows - copies - contaminated):
        messages, group = make_conversation(pool, draw), first + number
        yield {"messages": messages, "planted": "original" if number < copies else "unique", "group": group}
        if number < copies:
            kind = kinds[number % len(kinds)]
            copy = messages if kind == "exact" else EDITS[kind](messages, draw)
            yield {"messages": copy, "planted": kind, "group": group}
    for number in range(contaminated):
        messages = make_conversation(pool, draw)
        item = draw.choice(pool.evaluation)
        edit = draw.choice((str, str.upper, lambda text: text.replace(" ", "  ")))
        asked = messages[0]["content"]
        messages[0]["content"] = f"{asked[: len(asked) // 2]}\n{edit(item)}\n{asked[len(asked) // 2 :]}"
        yield {"messages": messages, "planted": "contaminated", "group": first + rows - number - 1}


def write_corpus(folder: Path, rows: int, files: int = 1, seed: int = 0) -> tuple[list[Path], Path]:
    """Write a corpus in so many files, and its evaluation set."""
    pool = read_pool()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"conversations-{number:03d}.jsonl" for number in range(files)]
    made = make_rows(pool, rows, seed)
    for number, path in enumerate(paths):
        with path.open("w", encoding="utf-8") as file:
            for _ in range(rows * number // files, rows * (number + 1) // files):
                file.write(json.dumps(next(made), ensure_ascii=False) + "\n")
    evaluation = folder / "evaluation.jsonl"
    evaluation.write_text("".join(json.dumps({"question": item}) + "\n" for item in pool.evaluation), encoding="utf-8")
    return paths, evaluation
