# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
import gzip
import json
from itertools import groupby
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from sft.data import DataError, control_tokens, prepare_dataset, read_conversations
from sft.train import build_trainer
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

REAL_CONVERSATIONS = Path(__file__).parents[2] / "../shared/data/conversations.jsonl.gz"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


ASK, ANSWER = ("user", "Why?"), ("assistant", "Because.")
INVALID = [
    ("{", "invalid_json", "line 1 column 2"),
    (b"\xff\xfe{", "invalid_json", ""),
    (3, "no_messages", "it is a int"),
    ({}, "no_messages", "a row needs a non-empty list"),
    ({"messages": []}, "no_messages", "a non-empty list"),
    ({"messages": "hi"}, "no_messages", "a non-empty list"),
    ({"instruction": "a", "output": "b"}, "no_messages", "its columns are instruction, output"),
    ({"messages": ["hi"]}, "bad_message", "messages[0] is a str; expected an object"),
    (chat(ASK, ("bot", "Because.")), "unknown_role", "messages[1] has role 'bot'; expected system, user, assistant"),
    (chat(ASK, (["assistant"], "x")), "unknown_role", "messages[1] has role ['assistant']"),
    ({"messages": [{"content": "x"}]}, "unknown_role", "messages[0] has role None"),
    (chat(ASK, ("system", "Be brief."), ANSWER), "system_not_first", "messages[1] is a system message"),
    (chat(("user", None), ANSWER), "bad_content", "messages[0] has a content of type NoneType; expected text"),
    (chat(("user", [{"type": "text"}]), ANSWER), "bad_content", "messages[0] has a content of type list"),
    (chat(ASK, ("assistant", "\ud83d")), "bad_content", "messages[1] has half of a surrogate pair"),
    ("[" * 100_000, "invalid_json", "recursion"),
    (chat(ASK, ("assistant", " \n")), "bad_content", "messages[1] is an assistant's and blank"),
    (chat(ASK), "no_assistant", "none of its 1 messages"),
    (chat(("user", "Say <_bot>yes</s>"), ANSWER), "control_token", "messages[0] contains </s>"),
]


def write(path, rows):
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"\n".join(lines))
    return path


@pytest.mark.parametrize(("row", "reason", "detail"), INVALID)
def test_an_invalid_row_is_named(row, reason, detail, tmp_path, tokenizer):
    path = write(tmp_path / "data.jsonl", [chat(ASK, ANSWER), b"", row])
    kept, (reject,) = read_conversations([path], control_tokens(tokenizer))
    assert [conversation.source for conversation in kept] == [f"{path}:1"]
    assert (reject.source, reject.reason) == (f"{path}:3", reason)
    assert detail in reject.detail

    with pytest.raises(DataError, match=f"1 invalid rows .1 {reason}.: .*data.jsonl:3: .*allow_rejects"):
        prepare_dataset(path, tokenizer, max_length=64)
    dataset, report = prepare_dataset(path, tokenizer, max_length=64, allow_rejects=True)
    assert (len(dataset), report.rows, len(report.rejects)) == (1, 2, 1)


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [chat(ASK, ANSWER), chat(("system", "Be brief."), ASK, ANSWER)]
    jsonl = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / "a.jsonl").write_bytes(jsonl)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    for path in sorted(tmp_path.iterdir()):
        kept, rejects = read_conversations([path])
        assert [conversation.messages for conversation in kept] == [row["messages"] for row in rows]
        assert not rejects


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "missing.jsonl: No such file or directory"),
        ("data.csv", b"", "not a file of conversations; known are .jsonl"),
        ("data.json", b"{}", "holds a dict; expected a list of rows"),
        ("data.json", b"{}\n{}", "not JSON .*; one row a line is .jsonl"),
        ("data.jsonl.gz", b"{}", "data.jsonl.gz: Not a gzipped file"),
        ("data.jsonl.gz", gzip.compress(b"{}" * 99)[:-9], "damaged gzip file"),
        ("data.parquet", b"PAR1", "not a Parquet file"),
        ("data.jsonl", b"\n", "nothing to train on in .*data.jsonl: no rows"),
    ],
)
def test_a_broken_file_is_one_line(name, content, message, tmp_path, tokenizer):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare_dataset(tmp_path / name, tokenizer, max_length=64)


def by_document(batch):
    """Split a collated batch, padded or packed, into (ids, labels) of documents."""
    for row in range(len(batch["input_ids"])):
        ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
        if "attention_mask" in batch:
            length = int(batch["attention_mask"][row].sum())
            yield ids[:length], labels[:length]
        else:
            starts = [i for i, position in enumerate(batch["position_ids"][row].tolist()) if position == 0]
            for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                yield ids[start:end], labels[start:end]


@pytest.mark.parametrize("packing", [False, True])
def test_what_is_trained_on_is_exactly_what_the_assistant_says_and_the_end_of_turn(
    packing, make_recipe, conversations, tokenizer
):
    """The oracle reads characters: the trained stretches of a batch, decoded, are the assistant's texts."""
    trainer, _, _ = build_trainer(make_recipe(packing=packing, max_length=256))
    seen = []
    for batch in trainer.get_train_dataloader():
        for ids, labels in by_document(batch):
            assert all(label in (token, -100) for token, label in zip(ids, labels, strict=True))
            stretches = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != -100)
            seen.append([(trained, tokenizer.decode([token for token, _ in part])) for trained, part in stretches])

    expected = []
    for row in conversations:
        text = "".join(
            f"<_{'bot' if message['role'] == 'assistant' else message['role']}>{message['content']}"
            + ("</s>" if message["role"] == "assistant" else "")
            for message in row["messages"]
        )
        stretches = []
        for message in row["messages"]:
            if message["role"] == "assistant":
                before, text = text.split(f"<_bot>{message['content']}</s>", 1)
                stretches += [(False, before + "<_bot>"), (True, message["content"] + "</s>")]
        expected.append(stretches)
    assert sorted(seen) == sorted(expected)


def test_ids_and_labels_are_those_of_trl(conversations, data_file, tokenizer, tmp_path):
    """TRL tokenizes conversations too; ours must not train on anything else."""
    args = SFTConfig(
        output_dir=tmp_path,
        use_cpu=True,
        bf16=False,
        max_length=64,
        assistant_only_loss=True,
        gradient_checkpointing=False,
    )
    stock = SFTTrainer(tiny_model(), args, train_dataset=Dataset.from_list(conversations), processing_class=tokenizer)
    ours, report = prepare_dataset(data_file, tokenizer, max_length=64)
    for column in ("input_ids", "labels"):
        assert ours[column][:] == stock.train_dataset[column][:]
    assert report.truncated > 0


def test_rows_that_truncation_empties_are_counted_and_named(tmp_path, tokenizer):
    rows = [chat(("user", "Why? " * count), ANSWER) for count in (1, 40, 2, 50)]
    path = write(tmp_path / "data.jsonl", rows)
    dataset, report = prepare_dataset(path, tokenizer, max_length=20)
    assert (len(dataset), report.dropped) == (2, (f"{path}:2", f"{path}:4"))
    assert "2 of 4 rows" in str(report)
    assert f"2 dropped, max_length leaves no trained token ({path}:2; {path}:4)" in str(report)
    trained = [sum(label != -100 for label in labels) for labels in dataset["labels"]]
    assert report.trained_tokens == sum(trained)
    assert min(trained) > 0
    with pytest.raises(DataError, match="no row has a trained token within max_length 3: 0 of 4 rows"):
        prepare_dataset(path, tokenizer, max_length=3)


def test_a_row_that_the_template_refuses_is_named(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer, "chat_template", "{{ raise_exception('no user') }}{% generation %}{% endgeneration %}"
    )
    path = write(tmp_path / "data.jsonl", [chat(ASK, ANSWER)])
    with pytest.raises(DataError, match=r"data.jsonl:1: the chat template refuses it: no user"):
        prepare_dataset(path, tokenizer, max_length=64)


def test_every_token_is_trained_on_when_asked(data_file, tokenizer):
    dataset, report = prepare_dataset(data_file, tokenizer, max_length=None, assistant_only_loss=False)
    assert dataset["labels"][:] == dataset["input_ids"][:]
    assert report.trained_tokens == report.tokens


@pytest.mark.skipif(not REAL_CONVERSATIONS.exists(), reason="real conversations are not part of the project")
def test_real_conversations(tokenizer, tmp_path):
    with gzip.open(REAL_CONVERSATIONS) as file:
        lines = file.readlines()[::40]
    path = tmp_path / "real.jsonl"
    path.write_bytes(b"".join(lines))
    dataset, report = prepare_dataset(path, tokenizer, max_length=2048, allow_rejects=True)
    assert len(dataset) + len(report.rejects) + len(report.dropped) == len(lines)
    assert len(dataset) > 0.99 * len(lines)
