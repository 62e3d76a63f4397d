# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Multiple choice against the formulas written out, by a stock model; and files that are none."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from conversion.checkpoint.errors import CheckpointError
from evaluation.measure import evaluate
from evaluation.multiple_choice import read_task
from tests.fixtures.tiny import tiny_tokenizer

from .test_scores import granite

WORDS = [
    "the",
    "value",
    "of",
    "a",
    "subscription",
    "is",
    "item",
    "that",
    "key",
    "selects",
    "import",
    "statement",
    "天地",
    "玄黄",
    "café",
]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    draw = random.Random(0)

    def some(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    return [
        {
            "question": some(30) + draw.choice(["", " ", ":  "]),
            "choices": [some(5) for _ in range(draw.randint(2, 4))],
            "answer": draw.randrange(2),
        }
        for _ in range(40)
    ]


def by_hand(model, tokenizer, rows: list[dict]) -> dict[str, list[bool]]:
    """As lm-evaluation-harness documents it: text and choice encoded in one, split where the text alone ends."""
    hits: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for row in rows:
        sums = []
        context = row["question"].rstrip()
        for choice in row["choices"]:
            whole = tokenizer(row["question"] + " " + choice)["input_ids"]  # begins with <s>
            start = len(tokenizer(context)["input_ids"])
            with torch.no_grad():
                scores = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            sums.append(sum(float(scores[place - 1, whole[place]]) for place in range(start, len(whole))))
        characters = [len(choice) for choice in row["choices"]]
        nbytes = [len(choice.encode()) for choice in row["choices"]]
        for metric, lengths in (("acc", [1] * len(sums)), ("acc_norm", characters), ("acc_bytes", nbytes)):
            best = max(range(len(sums)), key=lambda n: sums[n] / lengths[n])
            hits[metric].append(best == row["answer"])
    return hits


@pytest.mark.parametrize("loaded", [False, True], ids=["streamed", "loaded"])
def test_accuracies_are_those_of_the_formulas(loaded, rows, folder, tmp_path):
    (task,) = evaluate(folder, tasks=[write(tmp_path / "quiz.jsonl", rows)], loaded=loaded).tasks
    expected = by_hand(granite(folder), tiny_tokenizer(tmp_path / "t"), rows)
    assert (task.name, task.questions, task.shortened) == ("quiz", 40, 0)
    for metric, hits in expected.items():
        assert task.metrics[metric].value == np.mean(hits)
        assert 0 < task.metrics[metric].value < 1
        assert task.metrics[metric].stderr == pytest.approx(np.std(hits, ddof=1) / 40**0.5)
    assert len({tuple(hits) for hits in expected.values()}) == 3  # the three ways choose otherwise


def test_the_answer_by_number_letter_and_text(rows, tmp_path):
    others = [{**row, "answer": answer(row)} for row, answer in zip(rows, _answers() * 20, strict=True)]
    first, second = (read_task(write(tmp_path / f"{n}.jsonl", them)) for n, them in enumerate((rows, others)))
    assert [question.answer for question in first.questions] == [question.answer for question in second.questions]


def _answers() -> list:
    return [lambda row: "ABCD"[row["answer"]], lambda row: row["choices"][row["answer"]]]


def test_a_yaml_file_says_how_questions_are_put(tmp_path):
    row = {"q": "Is {{it}}?", "choices": ["yes", "no"], "answer": "no", "context": "C", "n": 3}
    write(tmp_path / "rows.jsonl", [row])
    settings = ('task: "my  task"', "data: rows.jsonl", 'description: "Say. "', 'doc_to_text: "{{n}}. {{ q }} A:"')
    (tmp_path / "task.yaml").write_text("\n".join([*settings, 'target_delimiter: ""']))
    task = read_task(tmp_path / "task.yaml")
    (question,) = task.questions
    assert (task.name, task.delimiter, question.context, question.answer) == ("my task", "", "Say. 3. Is {{it}}? A:", 1)
    (tmp_path / "plain.YAML").write_text("data: rows.jsonl\n")
    plain = read_task(tmp_path / "plain.YAML")
    assert (plain.name, plain.delimiter, plain.questions[0].context) == ("plain", " ", "C")
    assert plain.sha256 != task.sha256
    both = write(tmp_path / "both.jsonl", [{"question": "Q", "context": "C", "choices": ["a", "b"], "answer": 0}])
    assert read_task(both).questions[0].context == "C\nQ"


GOOD = {"question": "What?", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": None}, "choices is missing"),
        ({"choices": ["a"]}, r"choices is \['a'\], expected two texts at least"),
        ({"choices": ["a", ""]}, "expected two texts at least, none empty"),
        ({"choices": ["a", 1]}, "expected two texts at least"),
        ({"answer": None}, "answer is missing, expected a number from 0 to 1"),
        ({"answer": 2}, "answer is 2, expected a number from 0 to 1"),
        ({"answer": -1}, "answer is -1"),
        ({"answer": True}, "answer is True"),
        ({"answer": "C"}, "answer is 'C'"),
        ({"question": "a\0"}, "holds NUL at character 1"),
        ({"choices": ["a", "\0"]}, "choice 1: holds NUL at character 0"),
        ({"question": 3}, "has neither question nor context as a text"),
    ],
    ids=str,
)
def test_rows_that_are_no_questions(change, message, tmp_path):
    path = write(tmp_path / "q.jsonl", [GOOD, {k: v for k, v in {**GOOD, **change}.items() if v is not None}])
    with pytest.raises(CheckpointError, match=f"q.jsonl: line 2: .*{message}"):
        read_task(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is a NoneType, expected keys"),
        ("- a", "is a list, expected keys"),
        ("data: [", "is no YAML"),
        ("a: &a [*a]", "has a key a, known are"),
        ("task: x", "data is missing"),
        ("data: 3", "data is a int, expected a text"),
        ("data: rows.jsonl\noutput_type: multiple_choice", "has a key output_type.*is for --harness"),
        ('data: rows.jsonl\ndescription: "a\\0"', "a.yaml: description: holds NUL"),
        ("data: nowhere.jsonl", "nowhere.jsonl: no such file"),
        ('data: rows.jsonl\ndoc_to_text: "{{it}}"', "rows.jsonl: line 1: it is missing, and doc_to_text needs it"),
        ("data: !!python/object/apply:os.system ['touch harm']", "is no YAML"),
    ],
)
def test_yaml_that_is_no_task(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", [GOOD])
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_task(tmp_path / "a.yaml")
    assert not (tmp_path / "harm").exists()


def test_questions_longer_than_the_window(folder, tmp_path):
    """They lose their beginning, which is said; a choice that is longer has no place at all."""
    long = {**GOOD, "question": "the value " * 200}
    result = evaluate(folder, tasks=[write(tmp_path / "q.jsonl", [long, GOOD])], window=32)
    assert result.tasks[0].shortened == 1
    assert result.notes == ("q: 1 of 2 questions lost their beginning, as they exceed the window with a choice.",)
    with pytest.raises(CheckpointError, match=r"q.jsonl: line 1: has a choice of \d+ tokens, and the window has 32"):
        evaluate(folder, tasks=[write(tmp_path / "q.jsonl", [{**GOOD, "choices": ["x", "天" * 40]}])], window=32)


def test_a_question_of_nothing(folder, tmp_path):
    """Then the choices stand after `<s>` alone."""
    (task,) = evaluate(folder, tasks=[write(tmp_path / "q.jsonl", [{**GOOD, "question": " "}])]).tasks
    assert task.metrics["acc"].value in (0.0, 1.0)
    assert task.metrics["acc"].stderr is None
