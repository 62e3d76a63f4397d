# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Decontamination, heuristics and domains."""

import json
import random

import pyarrow as pa
import pytest

from sft.data.formats import DataError
from sft.selection import SelectionError
from sft.selection.common import find_common
from sft.selection.decontaminate import (
    MIN_WORDS,
    NGRAM,
    drop_contaminated,
    fit_kernel,
    index_evaluations,
    make_index,
    read_evaluations,
)
from sft.selection.domains import tag_domain, tag_domains
from sft.selection.heuristics import REASONS, drop_broken, find_fault, repeated_shares

from .conftest import chat, table

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "su", "ta") for b in ("ra", "po", "di", "ge", "vu", "xe")]


def sentence(length: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


# --- decontamination --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [MIN_WORDS, 9, NGRAM - 1, NGRAM, 40])
@pytest.mark.parametrize(
    "write",
    [str, str.upper, lambda text: text.replace(" ", ",\n"), lambda text: f"“{text}”", lambda text: f"**{text}**"],
    ids=["as it is", "upper case", "other spacing", "quoted", "marked up"],
)
def test_every_planted_item_is_found(lines, length, write):
    items = [sentence(length, seed) for seed in range(20)]
    index = index_evaluations([str(lines(*({"question": item} for item in items)))])
    for place in (0, 1, 2):
        around = [sentence(30, 100), sentence(50, 101)]
        chats = [chat(" ".join([*around[:place], write(item), *around[place:]]), "Yes.") for item in items]
        assert drop_contaminated(table(chats), index)["drop"].to_pylist() == ["contaminated"] * 20
    clean = [chat(sentence(200, seed), "Yes.") for seed in range(1000, 1100)]
    assert drop_contaminated(table(clean), index)["drop"].null_count == 100


def test_a_part_of_a_long_item_is_enough_from_13_words_on(lines):
    item = sentence(60, 0).split()
    index = index_evaluations([str(lines({"question": " ".join(item)}))])
    for length, found in ((NGRAM, True), (NGRAM - 1, False)):
        planted = chat(f"{sentence(20, 1)} {' '.join(item[7 : 7 + length])} {sentence(20, 2)}", "Yes.")
        assert (drop_contaminated(table([planted]), index)["drop"].null_count == 0) is found


HAN = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"


@pytest.mark.parametrize(
    ("length", "shared", "found"), [(40, 26, True), (40, 25, False), (12, 12, True), (12, 11, False)]
)
def test_without_spaces_two_characters_count_as_a_word(lines, length, shared, found):
    item = "".join(random.Random(0).choices(HAN, k=length))
    index = index_evaluations([str(lines({"question": item}, {"question": item[:11]}))])
    assert (index.items, index.too_short) == (1, 1)
    around = "".join(random.Random(1).choices("甲乙丙丁戊己庚辛壬癸", k=40))
    planted = chat(f"{around}{item[:shared]}，{around}", "好的。")
    assert (drop_contaminated(table([planted]), index)["drop"].null_count == 0) is found


def test_words_across_two_texts_are_no_item(lines):
    item = sentence(10, 0).split()
    index = index_evaluations([str(lines({"question": " ".join(item)}))])
    apart = [chat("x", f"{sentence(9, 5)} {' '.join(item[:5])}"), chat(" ".join(item[5:]), "y")]
    assert drop_contaminated(table(apart), index)["drop"].null_count == 2


def test_items_are_all_texts_of_a_row_and_lines_of_a_text(lines, tmp_path):
    nested = {"id": 1, "questions": [{"text": sentence(20, 0)}, sentence(20, 1)], "answer": "four"}
    conversation = {
        "messages": [{"role": "system", "content": sentence(20, 9)}, *chat(sentence(20, 2), sentence(20, 3))]
    }
    text = tmp_path / "items.txt"
    text.write_text(f"{sentence(20, 4)}\n\n{sentence(20, 5)}\n")
    index = index_evaluations([str(lines(nested, conversation)), str(text)])
    assert (index.items, index.too_short) == (6, 1)
    chats = [chat(sentence(20, seed), "Yes.") for seed in (0, 1, 2, 3, 4, 5, 9)]
    assert drop_contaminated(table(chats), index)["drop"].to_pylist() == ["contaminated"] * 6 + [None]


@pytest.mark.parametrize("others", [[], [sentence(30, seed) for seed in (500, 501, 502)]], ids=["alone", "one of four"])
def test_a_leaked_question_with_an_answer_of_its_own_is_found(others, lines):
    """8 rows of 100 hold the question, so it counts as common; the two words more in the item are in none of them."""
    question = sentence(30, 0)
    leaks = [chat(f"{sentence(5, seed)} {question}", sentence(20, seed)) for seed in range(100, 108)]
    clean = [chat(sentence(30, seed), sentence(20, seed)) for seed in range(200, 292)]
    file = lines(*({"question": item} for item in [f"{question}? Answer: Blois", *others]))
    sample = table(leaks + clean)
    kernel = fit_kernel(sample, read_evaluations([str(file)]))
    assert kernel(sample)["drop"].to_pylist() == ["contaminated"] * 8 + [None] * 92


def test_a_template_with_a_short_question_is_not_what_leaked(lines):
    """Its words are nearly all of each item, and of no item alone; what cannot be looked for is counted."""
    template = sentence(60, 0)
    rows = [chat(f"{template} {sentence(8, seed)}", sentence(20, seed)) for seed in range(100, 200)]
    sample = table(rows)
    evaluations = read_evaluations([str(lines(*({"question": f"{template} item {n}"} for n in range(4))))])
    index = make_index(evaluations, find_common(rows))
    assert (index.items, index.too_short, index.shared) == (0, 0, 4)
    assert fit_kernel(sample, evaluations)(sample)["drop"].null_count == 100


def test_too_little_left_of_an_item_is_counted(lines):
    question = sentence(20, 0)
    rows = [chat(f"{question} {sentence(8, seed)}", sentence(20, seed)) for seed in range(100, 200)]
    evaluations = read_evaluations([str(lines({"question": f"{question} four words at last"}))])
    before, after = make_index(evaluations), make_index(evaluations, find_common(rows))
    assert [(index.items, index.shared) for index in (before, after)] == [(1, 0), (0, 1)]
    notes: list[str] = []
    fit_kernel(table(rows), evaluations, notify=notes.append)
    fit_kernel(table(rows[:3]), evaluations, notify=notes.append)
    assert notes == ["decontamination: 1 of 1 texts are not looked for: many rows share most of their words"]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ('{"question": "too short"}\n', SelectionError, "no text of at least 6 words"),
        ("", SelectionError, "no text of at least 6 words"),
        ("{broken\n", SelectionError, "evaluation.jsonl:1: "),
        (None, DataError, "No such file"),
    ],
)
def test_useless_evaluation_sets_are_refused(tmp_path, content, error, message):
    file = tmp_path / "evaluation.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(error, match=message):
        index_evaluations([str(file)])


# --- heuristics -------------------------------------------------------------------------------------------------------

CODE = "Here:\n```python\n{}\n```\nThat is all."


@pytest.mark.parametrize(
    ("reason", "answer"),
    [
        ("answer_too_short", "…"),
        ("answer_too_short", " \n"),
        (None, "Yes."),
        (None, "👍 👍 👍"),
        ("too_long", "word " * 17_000),
        ("garbled", "It is \ufffd\ufffd\ufffd here, as you see"),
        ("garbled", "It is \x00\x01 here, as you see"),
        ("refusal", "I'm sorry, but I can't help with that request."),
        ("refusal", "As an AI language model, I have no opinion on that."),
        ("refusal", "抱歉，我无法回答这个问题。"),
        ("refusal", "作为一个人工智能语言模型，我没有看法。"),
        ("cut_code", "Here it is:\n```python\nprint(1)\n"),
        ("broken_code", CODE.format("def f(:\n    return 1")),
        (None, CODE.format("def f(x):\n    return x + 1")),
        (None, CODE.format("    return x  # a part, indented")),
        (None, CODE.format(">>> f(1)\n2")),
        (None, "Here:\n```js\nlet x = {;\n```\nNot Python."),
        (None, "I'm sorry to hear that. Have you tried turning it off and on?"),
        (None, "One lost letter, \ufffd, in three hundred. " + "The others are as they were. " * 10),
        (None, "好的，我来帮你。"),
    ],
)
def test_faults(reason, answer):
    assert find_fault(chat("Please?", answer), "general") == reason
    assert reason is None or reason in REASONS


def test_mathematics_needs_a_result():
    assert find_fault(chat("2 + 2 = ?", "You have to add them up."), "math") == "no_result"
    assert find_fault(chat("2 + 2 = ?", "You have to add them up: 4."), "math") is None
    assert find_fault(chat("2 + 2 = ?", "You have to add them up."), "general") is None


@pytest.mark.parametrize("loop", ["I think so too and so does everyone else here. ", "abc "])
def test_loops_are_repetitive(loop):
    looping = f"{sentence(30, 1)} {loop * 80}"
    normal, found, nothing = repeated_shares([sentence(300, 0), looping, ""])
    assert found > 0.5 > 0.05 > normal >= nothing == 0
    assert find_fault(chat("Why?", looping), "general", found) == "repetitive"
    columns = {"domain": ["general", "general"]}
    assert drop_broken(table([chat("Why?", looping), chat("Why?", sentence(300, 0))], **columns))[
        "drop"
    ].to_pylist() == [
        "repetitive",
        None,
    ]


# --- domains ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("domain", "contents"),
    [
        ("code", ("Write it.", "```\nx\n```")),
        ("code", ("Complete this:\n\ndef f(x):\n    pass", "Sure.")),
        ("code", ("Include what?", "#include <stdio.h>")),
        ("code", ("List them", "SELECT name FROM users")),
        ("math", ("How many?", "She has 3 + 4 = 7.\nThen 7 * 2 = 14 are left.")),
        ("math", ("Solve it.", r"It is \frac{1}{2}.")),
        ("math", ("How many?", "As said:\n#### 12")),
        ("multi_turn", ("Hi", "Hello!", "Who are you?", "A model.")),
        ("general", ("Who wrote Faust?", "Goethe, from 1772 to 1831.")),
        ("general", ("What did it cost?", "It was $5, later $7.")),
        ("general", ("When do classes begin?", "The class of 1990 begins at 8.")),
    ],
)
def test_domains_by_rule(domain, contents):
    assert tag_domain(chat(*contents)) == domain


def test_a_column_goes_before_the_rules():
    rows = [{"messages": chat("Hi", "Ho"), "topic": topic} for topic in ("poetry", None, 7)] + [
        {"messages": chat("a", "b")}
    ]
    given = pa.table({"row": pa.array([json.dumps(row).encode() for row in rows], pa.large_binary())})
    assert tag_domains(given, "topic")["domain"].to_pylist() == ["poetry", "general", "7", "general"]
