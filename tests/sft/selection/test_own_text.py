# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Text that many rows share does not count, and what the user wrote in a row stays."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from sft.data.checks import Conversation, check_rows
from sft.data.labels import Labelling
from sft.data.validate import validate_conversations
from sft.selection import SelectionError, SelectionSettings, select_conversations
from sft.selection.common import CommonText, find_common, fit_marks, mark_common, own_conversations
from sft.selection.operators import THRESHOLDS
from sft.selection.options import parse_thresholds

from .conftest import chat, table
from .test_pipeline import run, selected

ROWS = 500
LEFT = 0.95
TEMPLATE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request. ### Instruction: "
)


class Text:
    """Words drawn at random, of a vocabulary of 5,000; or of Chinese characters, without spaces."""

    def __init__(self, seed: int = 0, chinese: bool = False) -> None:
        self.draw, self.between = random.Random(seed), "" if chinese else " "
        letters = random.Random(1)
        words = ["".join(letters.choices("abcdefghijklmnoprstu", k=letters.randint(3, 9))) for _ in range(5000)]
        self.words = [chr(code) for code in range(0x4E10, 0x5600)] if chinese else words

    def __call__(self, count: int) -> str:
        return self.between.join(self.draw.choices(self.words, k=count))

    def edit(self, messages: list[dict]) -> list[dict]:
        """One word in twenty changed."""
        return [
            {**m, "content": " ".join(w if self.draw.random() > 0.05 else self(1) for w in m["content"].split())}
            for m in messages
        ]


def survivors(lines, tmp_path, chats, evaluation=None) -> tuple[int, Counter]:
    """Rows that reach the choice, and the reasons of those that do not."""
    settings = SelectionSettings(
        count=len(chats), allow_fewer=True, decontaminate=(str(evaluation),) if evaluation else ()
    )
    data = lines(*({"messages": messages} for messages in chats))
    selection = select_conversations(data, tmp_path / "out", settings)
    dropped = Counter()
    for stage in selection.stages:
        dropped.update(stage.dropped)
    return selection.count, dropped


@pytest.mark.parametrize("chinese", [False, True], ids=["English", "Chinese"])
@pytest.mark.parametrize("kind", ["system", "passages", "short answers", "template"])
def test_different_rows_with_shared_context_stay(kind, chinese, lines, tmp_path):
    text = Text(chinese=chinese)
    shared = text(400)
    passages = [text(200) for _ in range(50)]
    make = {
        "system": lambda _: [{"role": "system", "content": shared}, *chat(text(12), text(25))],
        "passages": lambda number: chat(f"{passages[number % 50]}\n{text(8)}?", text(12)),
        "short answers": lambda number: chat(f"{passages[number % 50]} {text(8)}?", text(2)),
        "template": lambda _: chat(f"{shared} {text(8)}", text(12)),
    }[kind]
    left, _ = survivors(lines, tmp_path, [make(number) for number in range(ROWS)])
    assert left >= LEFT * ROWS


def test_ten_questions_on_each_of_many_passages_stay(lines, tmp_path):
    """Each passage stands in 0.5 % of the rows, so it is not common: the answers tell the rows apart."""
    text = Text()
    passages = [text(200) for _ in range(200)]
    chats = [chat(f"{passage} {text(8)}?", text(6)) for passage in passages for _ in range(10)]
    left, _ = survivors(lines, tmp_path, chats)
    assert left >= LEFT * len(chats)


@pytest.mark.parametrize("items", [1, 5, 164])
def test_a_template_that_an_evaluation_shares_is_no_item(items, lines, tmp_path):
    text = Text()
    questions = [TEMPLATE + text(20) for _ in range(items)]
    evaluation = lines(*({"prompt": question} for question in questions), name="evaluation.jsonl")
    leaks = [chat(questions[number % items], text(20)) for number in range(5)]
    left, dropped = survivors(
        lines, tmp_path, [chat(TEMPLATE + text(15), text(20)) for _ in range(ROWS)] + leaks, evaluation
    )
    assert left >= LEFT * ROWS
    assert dropped["contaminated"] == len(leaks)


def test_an_item_that_leaked_into_many_rows_is_found(lines, tmp_path):
    text = Text()
    question = text(30)
    evaluation = lines({"prompt": question}, name="evaluation.jsonl")
    leaks = [chat(f"{text(5)} {question} {text(7)}", text(20)) for _ in range(20)]
    _, dropped = survivors(lines, tmp_path, [chat(text(15), text(20)) for _ in range(300)] + leaks, evaluation)
    assert dropped["contaminated"] == len(leaks)


def test_duplicates_under_a_shared_prompt_are_found(lines, tmp_path):
    text = Text()
    system = {"role": "system", "content": text(400)}
    originals = [chat(text(20), text(40)) for _ in range(150)]
    chats = [[system, *messages] for original in originals for messages in (original, text.edit(original))]
    left, _ = survivors(lines, tmp_path, chats)
    assert 150 <= left <= 150 * 1.05


def test_one_row_many_times_over_is_no_template(lines, tmp_path):
    """Copies of a row in a fifth of the data: what they share is common, and they are duplicates all the same."""
    text = Text()
    row = chat(text(30), text(60))
    chats = [text.edit(row) for _ in range(60)] + [chat(text(20), text(40)) for _ in range(240)]
    left, _ = survivors(lines, tmp_path, chats)
    assert 240 <= left <= 240 + 0.15 * 60


def test_what_is_common_is_marked_word_by_word():
    text, passage = Text(), Text(7)(30)
    chats = [chat(f"{text(3)}: «{passage}», {text(9)}?", text(5)) for _ in range(40)]
    rows = table(chats)
    marked = fit_marks(rows)(rows)
    own = list(own_conversations(rows.append_column("common", marked["common"])))
    for messages, left in zip(chats, own, strict=True):
        before, _, after = messages[0]["content"].partition(f"«{passage}»,")
        assert left[0]["content"].split() == [*before.split(), *after.split()]
        assert left[1] == messages[1]
    assert mark_common(rows, CommonText(find_common([]).places))["common"].null_count == len(rows)


# --- columns ----------------------------------------------------------------------------------------------------------


def accepted(file: Path) -> int:
    outcomes = [outcome for _, outcome in check_rows(file)]
    assert all(isinstance(outcome, Conversation) for outcome in outcomes)
    return len(outcomes)


def test_columns_of_the_user_stay_byte_for_byte(lines, tmp_path):
    data = tmp_path / "data.jsonl"
    row = '{"id" : 7, "score": 1.50e3,"domain":"caf\\u00e9", "x": [ 1 ], "messages": %s }'
    rows = [row % json.dumps(chat(f"Who was number {n}?", f"It was the number {n * 37}.")) for n in range(3)]
    data.write_text("".join(f"{line}\n" for line in rows[:1]) + f"\ufeff  {rows[1].replace('7', '8', 1)}  \r\n")
    select_conversations(data, tmp_path / "out", SelectionSettings(count=2))
    written = (tmp_path / "out/selected.jsonl").read_text().splitlines()
    for line, given in zip(written, (rows[0], rows[1].replace("7", "8", 1)), strict=True):
        assert line.startswith(given[:-1])
        added = json.loads(line).keys() - json.loads(given).keys()
        assert added == {"teleflm_id", "teleflm_domain"}


def numbered(lines) -> list[Path]:
    text = Text()
    return [
        lines(*({"id": n, "messages": chat(f"{text(9)}?", text(9))} for n in range(20)), name=name)
        for name in ("one.jsonl", "two.jsonl")
    ]


def test_files_numbered_from_0_give_rows_that_validate(lines, tmp_path):
    select_conversations(numbered(lines), tmp_path / "out", SelectionSettings(count=40))
    ids = [row["id"] for row in selected(tmp_path / "out")]
    assert ids == [*range(20), *range(20)]
    assert accepted(tmp_path / "out/selected.jsonl") == 40
    select_conversations(tmp_path / "out/selected.jsonl", tmp_path / "again", SelectionSettings(count=30))
    assert accepted(tmp_path / "again/selected.jsonl") == 30
    assert (tmp_path / "again/selected.jsonl").read_text().count("teleflm_id") == 30


def test_ids_are_made_unique_where_asked(lines, tmp_path):
    select_conversations(numbered(lines), tmp_path / "out", SelectionSettings(count=40, unique_ids=True))
    ids = [row["id"] for row in selected(tmp_path / "out")]
    assert ids[:20] == list(range(20))
    assert len(set(ids)) == 40


def test_what_is_not_read_is_named_and_kept(lines, tmp_path):
    picture = {"messages": chat("What is in the picture?", "A cat on a red sofa, asleep in the sun.")}
    thinking = chat("Why is it so?", "Because of the wind, as far as we can tell.")
    tool = {"name": "look", "description": "Who is at the door."}
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": {"at": "the door"}}]}]
    calls = [chat("Who is at the door?", "")[0], *calls, {"role": "tool", "content": [{"type": "text", "text": "Ann"}]}]
    rows = [
        {**picture, "images": ["one.png"]},
        {**picture, "images": ["two.png"]},
        {"messages": [thinking[0], {**thinking[1], "reasoning_content": "Hm.", "train": True}], "images": []},
        {"messages": chat("Who was at the door?", "Nobody in particular, I should think.")},
        {"messages": calls, "tools": [tool, {"name": "open"}]},
        {"messages": calls, "tools": [tool]},
    ]
    notes: list[str] = []
    data = lines(*rows)
    select_conversations(data, tmp_path / "out", SelectionSettings(count=5), notify=notes.append)
    assert [
        {name: row[name] for name in given} for row, given in zip(selected(tmp_path / "out"), rows[:5], strict=True)
    ] == rows[:5], "tools tell exact duplicates apart, and like system prompts not near ones"
    summary = json.loads((tmp_path / "out/selection.json").read_text())
    assert summary["unread"] == {
        "images": {"rows": 2, "example": "data.jsonl:1"},
        "messages[].reasoning_content": {"rows": 1, "example": "data.jsonl:3"},
        "tools": {"rows": 2, "example": "data.jsonl:5"},
    }
    assert "rows: 2 have images: kept as it is, but neither read nor trained on (data.jsonl:1)" in notes
    assert "rows: 2 have tools: kept as it is, and trained on, but not read (data.jsonl:5)" in notes
    assert accepted(tmp_path / "out/selected.jsonl") == 5


def test_special_tokens_are_judged_as_training_will(lines, tmp_path):
    html = {"messages": chat("How is a price struck out?", "With <s>the old price</s> and the new one behind it.")}
    rows = [html, {"messages": chat("Who was at the door?", "Nobody in particular, I should think.")}]
    data = lines(*rows)
    with pytest.raises(SelectionError, match="1 control_token"):
        select_conversations(data, tmp_path / "fewer", SelectionSettings(count=2))
    sanitized = SelectionSettings(count=2, sanitize_control_tokens=True)
    select_conversations(data, tmp_path / "out", sanitized)
    assert len(selected(tmp_path / "out")) == 2
    for judged, kept in ((False, 1), (True, 2)):
        labelling = Labelling(None, sanitize_control_tokens=judged)
        report = validate_conversations(tmp_path / "out/selected.jsonl", labelling=labelling)
        assert report.rows - report.rejected == kept


# --- thresholds and quotas --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "heuristics.min_word=3",
            r"unknown threshold 'heuristics.min_word'; did you mean heuristics.min_words\?",
        ),
        ("heuristics.min_words", "'heuristics.min_words' is not OPERATOR.NAME=NUMBER"),
        ("heuristics.min_words=many", "is not OPERATOR.NAME=NUMBER"),
        ("heuristics.min_words=nan", "is not OPERATOR.NAME=NUMBER"),
        ("heuristics.min_words=2.5", r"is 2\.5; it is a whole number"),
        ("near-duplicates.overlap=1.5", r"overlap is 1\.5; it is from 0 to 1"),
    ],
)
def test_thresholds_are_checked(given, message):
    with pytest.raises(SelectionError, match=message):
        SelectionSettings(thresholds=parse_thresholds([given]))


def test_thresholds_from_the_command_line(lines, tmp_path):
    data = lines(*({"messages": chat(f"Where is {n}?", f"Here {n}")} for n in range(10)))
    status, output = run(data, tmp_path / "out", "-n", 10, "--workers", 1, "--set", "heuristics.min_words=3")
    assert (status, "10 answer_too_short" in output) == (2, True)
    status, output = run(data, tmp_path / "out", "-n", 10, "--workers", 1)
    assert (status, "min_words was 3, is 1" in output) == (2, True)
    status, output = run(data, tmp_path / "two", "-n", 10, "--workers", 1)
    assert status == 0, output


def test_explain_prints_the_thresholds_and_does_nothing(lines, tmp_path):
    data = lines({"messages": chat("a", "b")})
    status, output = run(data, tmp_path / "out", "--explain", "--json", "--set", "heuristics.min_words=3")
    explained = json.loads(output)
    assert (status, explained["thresholds"]["heuristics.min_words"]) == (0, 3)
    off = ("decontamination", "target-copies", "perplexity", "scorer", "ifd")
    assert set(explained["thresholds"]) == {name for name in THRESHOLDS if not name.startswith(off)}
    assert explained["stages"][:3] == ["rows", "exact-duplicates", "common-text"]
    assert not (tmp_path / "out").exists()
    assert "operator: near-duplicates\n    overlap: 0.65" in run("--explain")[1]


def test_a_quota_that_cannot_be_met(lines, tmp_path):
    rows = [{"messages": chat(f"Who was number {n}?", f"It was somebody, {n * 37}.")} for n in range(40)]
    quota = {"math": 0.5, "general": 0.5}
    data = lines(*rows)
    with pytest.raises(SelectionError, match=r"--quota cannot be met: 0 of 10 math rows are left; --allow-fewer"):
        select_conversations(data, tmp_path / "out", SelectionSettings(count=20, quota=quota))
    assert not list((tmp_path / "out/stages").glob("*embeddings"))
    notes: list[str] = []
    allowed = SelectionSettings(count=20, quota=quota, allow_fewer=True)
    assert select_conversations(data, tmp_path / "out", allowed, notify=notes.append).count == 20
    said = "0 of 10 math rows are left; other domains of the quota take their place"
    assert f"selection: --quota cannot be met: {said}" in notes
