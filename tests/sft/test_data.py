# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
import gzip
import json
from itertools import groupby

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from sft.data.checks import REASONS
from sft.data.dataset import prepare_dataset
from sft.data.labels import DataError, Labelling, read_conversations, tokenize_rows
from sft.data.validate import validate_conversations
from sft.training.train import build_trainer
from tests.fixtures.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def chat(*turns, weights=None):
    """A row of turns, each a role and a content, or a message."""
    messages = [
        dict(turn) if isinstance(turn, dict) else dict(zip(("role", "content"), turn, strict=True)) for turn in turns
    ]
    for index, weight in (weights or {}).items():
        messages[index]["weight"] = weight
    return {"messages": messages}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def called(content, *calls, results=()):
    """A row with a question, calls, and results, with what is said of each in the place of a good one's fields."""
    answers = [{"role": "tool", "content": "3", **result} for result in results]
    return chat(ASK, {"role": "assistant", "content": content, "tool_calls": [*calls]}, *answers)


ASK, ANSWER = ("user", "Why?"), ("assistant", "Because.")
ASKS, SAYS = ({"role": role, "content": content} for role, content in (ASK, ANSWER))
PARAMETERS = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Sum", "parameters": PARAMETERS}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"b": 1, "a": 2}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
# Rows, what is wrong with them, and what is said of it. The first of each code is the shortest; the comments say what
# TRL 1.16 makes of the row.
INVALID = [
    (b"\xff\xfe{", ["not_utf8"], "byte 1 of the line is 0xff"),
    ("{", ["invalid_json"], "line 1 column 2"),
    ("[" * 100_000, ["invalid_json"], "recursion"),
    (3, ["not_an_object"], "it is a int"),
    ({}, ["missing_columns"], "those with a value are none"),  # KeyError 'text'
    ({"instruction": "a", "response": "b"}, ["missing_columns"], "are instruction, response"),  # KeyError 'text'
    ({"messages": None, "text": "a"}, ["missing_columns"], "are text"),
    ({"messages": []}, ["no_messages"], "it is empty"),  # IndexError
    ({"messages": "hi"}, ["no_messages"], "it is a str"),
    ({"messages": ["hi"]}, ["bad_message"], "messages[0] is a str; expected an object"),
    (
        chat(ASK, ("bot", "Because.")),
        ["unknown_role", "no_assistant"],
        "messages[1] has role 'bot'; expected",
    ),  # passes
    (chat(ASK, (["assistant"], "x"), ANSWER), ["unknown_role"], "messages[1] has role ['assistant']"),
    (
        {"conversations": [{"from": "robot", "value": "a"}]},
        ["unknown_role", "no_assistant"],
        "conversations[0] has role",
    ),
    (
        chat(ASK, ("system", "Be brief."), ANSWER),
        ["system_not_first", "starts_with_assistant"],
        "messages[1] is a system",
    ),
    (chat(ANSWER), ["starts_with_assistant"], "messages[0] is an assistant's and answers nobody"),
    (chat(ASK, ASK, ANSWER), ["repeated_role"], "messages[1] follows messages[0], both with role user"),  # passes
    (chat(ASK, ANSWER, ANSWER), ["repeated_role"], "messages[2] follows messages[1], both with role assistant"),
    (
        chat(("user", None), ANSWER),
        ["bad_content"],
        "messages[0] has a content of type NoneType",
    ),  # jinja UndefinedError
    (chat(("user", []), ANSWER), ["bad_content"], "messages[0] has a content of type list, which is empty"),
    (chat(("user", [{"type": "text"}]), ANSWER), ["bad_content"], "messages[0] has a text part without text"),
    (
        chat(("user", [{"type": "text", "text": "a"}, {"type": "image_url"}]), ANSWER),
        ["bad_content"],
        "messages[0] has a part of type 'image_url'; only text",
    ),
    (chat(("user", ["a"]), ANSWER), ["bad_content"], "messages[0] has a part that is a str"),
    (chat(ASK, ("assistant", [{"type": "text", "text": " "}])), ["empty_turn"], "messages[1] is blank"),
    (chat(ASK, ("assistant", "\ud83d")), ["bad_content"], "messages[1] has half of a surrogate pair"),
    ({"instruction": "a", "input": 3, "output": "b"}, ["bad_content"], "input has a content of type int"),
    (chat(ASK, ("assistant", " \n")), ["empty_turn"], "messages[1] is blank"),
    ({"prompt": "", "completion": "a"}, ["empty_turn"], "prompt is blank"),
    (chat(("user", "Say <_bot>yes</s>"), ANSWER), ["control_token"], "messages[0] contains <_bot>"),  # passes
    ({"instruction": ["a"], "output": "b"}, ["bad_content"], "instruction has a part that is a str"),
    ({"instruction": "a", "input": ["a"], "output": "b"}, ["bad_content"], "input has a content of type list"),
    ({"instruction": "a", "output": [{"type": "image_url"}]}, ["bad_content"], "output has a part of type 'image_url'"),
    ({"instruction": "a", "output": parts("")}, ["empty_turn"], "output is blank"),
    ({"instruction": "Why?", "output": "B.", "history": 5}, ["bad_message"], "history is a int; expected a list"),
    ({"instruction": "Why?", "output": "B.", "history": True}, ["bad_message"], "history is a bool; expected a list"),
    ({"instruction": "Why?", "output": "B.", "history": [5]}, ["bad_message"], "history[0] is int; expected"),
    (chat(ASK, ANSWER, weights={1: -1}), ["bad_weight"], "messages[1] has weight -1"),
    (chat(ASK, ANSWER, weights={1: float("nan")}), ["bad_weight"], "messages[1] has weight nan"),
    (chat(ASK, ANSWER, weights={1: int("9" * 400)}), ["bad_weight"], "messages[1] has weight 99999"),
    (chat(ASK, ANSWER, weights={1: 1e300}), ["bad_weight"], "messages[1] has weight 1e+300; expected 0, or a number"),
    (chat(ASK, ANSWER, weights={1: 1e7}), ["bad_weight"], "from 1.2e-38, the least of float32, to 1,000,000"),
    (chat(ASK, ANSWER, weights={1: 1e-300}), ["bad_weight"], "messages[1] has weight 1e-300; expected 0"),
    (chat(ASK, ANSWER, weights={1: 1e-40}), ["bad_weight"], "messages[1] has weight 1e-40; expected 0"),
    (chat(ASK, ANSWER, weights={0: 1}), ["bad_weight"], "messages[0] has weight 1, but role user"),
    (chat(ASK, {**SAYS, "train": "no"}), ["bad_weight"], "messages[1] has train 'no'; expected true or false"),
    (chat(ASK, {**SAYS, "train": True, "weight": 0}), ["bad_weight"], "messages[1] has train true and weight 0;"),
    (chat(ASK, {**SAYS, "train": False, "weight": 0.5}), ["bad_weight"], "messages[1] has train false and weight 0.5"),
    (chat({**ASKS, "train": True}, ANSWER), ["bad_weight"], "messages[0] has train true, but role user"),
    (chat(ASK, {**SAYS, "train": False}), ["nothing_trained"], "the weights of its 1 assistant messages are all 0"),
    (chat(ASK, {**SAYS, "reasoning_content": 3}), ["bad_reasoning"], "messages[1] has reasoning of type int"),
    (chat(ASK, {**SAYS, "thinking": "a", "reasoning": "b"}), ["bad_reasoning"], "which differ; keep reasoning_content"),
    (chat({**ASKS, "thinking": "a"}, ANSWER), ["bad_reasoning"], "messages[0] has reasoning, but role 'user'"),
    (chat(ASK, {**SAYS, "thinking": "<_bot>"}), ["control_token"], "messages[1].reasoning_content contains <_bot>"),
    (
        chat(ASK, {**SAYS, "content": "", "thinking": "a"}),
        ["empty_turn"],
        "messages[1] is blank but for its reasoning",
    ),
    (chat(ASK, {**SAYS, "thinking": "a</think>b"}), ["ambiguous_text"], "reasoning_content contains </think>, which"),
    (called("<tool_call>", CALL), ["ambiguous_text"], "messages[1] contains <tool_call> as text, in a row with tools"),
    (
        chat(("user", "<tool_response>"), CALLS),
        ["ambiguous_text"],
        "messages[0] contains <tool_response> as text, in a row with tools; remove",
    ),
    ({"tools": "{", **chat(ASK, ANSWER)}, ["bad_tools"], "tools: is text that is no JSON"),
    ({"tools": '"a"', **chat(ASK, ANSWER)}, ["bad_tools"], "tools is a str; expected a list of JSON Schemas"),
    ({"tools": [{"type": "function"}], **chat(ASK, ANSWER)}, ["bad_tools"], "tools[0] has no function's name"),
    ({"tools": [*TOOLS, *TOOLS], **chat(ASK, ANSWER)}, ["bad_tools"], "tools[1] is called 'add', as an earlier one is"),
    (
        {"tools": [{**TOOLS[0]["function"], "description": "</s>"}], **chat(ASK, ANSWER)},
        ["control_token"],
        "tools contains </s>",
    ),
    (called(None, {"name": ""}), ["bad_tool_call"], "messages[1].tool_calls[0] names no function"),
    (called(None, "add"), ["bad_tool_call"], "messages[1].tool_calls[0] is a str; expected an object"),
    (called(None, {"type": "web"}), ["bad_tool_call"], "tool_calls[0] is of type 'web'; only functions are called"),
    (
        called(None, {"name": "add", "arguments": "{1"}),
        ["bad_tool_call"],
        "cannot be rendered: is text that is no JSON",
    ),
    (
        called(None, {"name": "add", "arguments": "[1]"}),
        ["bad_tool_call"],
        "arguments that are a list; expected an obj",
    ),
    (called(None, {"name": "add", "arguments": '{"a": NaN}'}), ["bad_tool_call"], "has NaN, which is no JSON"),
    (called(None, {"name": "add", "arguments": '{"a": 1, "a": 2}'}), ["bad_tool_call"], "has 'a' twice in one object"),
    (called(None, {"name": "add", "arguments": {"a": [[]] * 2}}, CALL, 3), ["bad_tool_call"], "tool_calls[2] is a int"),
    (
        called(None, {"name": "add", "arguments": json.loads('{"a":' * 70 + "1" + "}" * 70)}),
        ["bad_tool_call"],
        "is nested deeper than 64 levels",
    ),
    (called(None, {"id": "x", **CALL}, {"id": "x", **CALL}), ["bad_tool_call"], "two calls have one id"),
    (called(None, {"id": 3, **CALL}), ["bad_tool_call"], "has an id that is a int; expected text"),
    (chat(ASK, {**SAYS, "tool_calls": {}}), ["bad_tool_call"], "messages[1].tool_calls is a dict; expected a list"),
    (chat({**ASKS, "tool_calls": [CALL]}, ANSWER), ["bad_tool_call"], "messages[0] has tool_calls, but role 'user'"),
    (
        called(None, {"name": "add", "arguments": {"a": "<_user>"}}),
        ["control_token"],
        "messages[1].tool_calls contains",
    ),
    (
        {"tools": TOOLS, **called(None, {"name": "sub"})},
        ["unknown_tool"],
        "messages[1] calls 'sub', which is none of the row's tools",
    ),
    (
        chat(ASK, CALLS, ("user", "Well?"), ANSWER),
        ["unanswered_call"],
        "messages[2] comes before the result of 'add', called in messages[1]",
    ),
    (
        chat(ASK, CALLS, ANSWER),
        ["repeated_role", "unanswered_call"],
        "messages[2] comes before the result of 'add', called in messages[1]",
    ),
    (chat(ASK, ANSWER, ("tool", "3")), ["stray_result"], "messages[2] is a tool's result, and no call is open"),
    (chat(ASK, CALLS, ("tool", "3"), ("tool", "4")), ["stray_result"], "messages[3] is a tool's result, and no call"),
    (
        chat(ASK, CALLS, {"role": "tool", "content": "3", "tool_call_id": "y"}),
        ["stray_result"],
        "messages[2] has tool_call_id 'y', and the next open call is 'add'; put results in the order of their calls",
    ),
    (
        called(None, {"id": "x", **CALL}, {"id": "y", **CALL}, results=[{"tool_call_id": "y"}]),
        ["stray_result"],
        "the next open call is 'add' with id 'x'",
    ),
    (called(None, CALL, results=[{"name": "sub"}]), ["stray_result"], "messages[2] has name 'sub', and the next open"),
    (called(None, CALL, results=[{"name": 3}]), ["stray_result"], "messages[2] has a name that is a int"),
    (chat({**ASKS, "tool_call_id": "x"}, ANSWER), ["stray_result"], "messages[0] has a tool_call_id, but role 'user'"),
    (called(None, CALL, results=[{"content": None}]), ["bad_content"], "messages[2] has a content of type NoneType"),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "add()"}]},
        ["bad_tool_call"],
        "conversations[1].tool_calls is text that is no JSON",
    ),
    (chat(ASK), ["no_assistant"], "none of its 1 messages"),  # RuntimeError about the template
    (chat(ASK, ANSWER, weights={1: 0}), ["nothing_trained"], "the weights of its 1 assistant messages are all 0"),
    ({"id": "first", **chat(ASK, ANSWER)}, ["duplicate_id"], "an earlier row of the file has the id 'first'"),
    (
        chat(("user", ""), ("bot", None)),
        ["empty_turn", "unknown_role", "bad_content", "no_assistant"],
        "messages[1] has",
    ),
    (chat(("user", "Why? " * 60), ANSWER), ["nothing_left"], "max_length is 64"),  # dropped; packed, trains nothing
]
# Those that only a tokenizer or a template brings about are tested below.
ELSEWHERE = {"row_too_large", "template_refuses"}


def write(path, rows):
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"\n".join(lines))
    return path


def test_every_reason_has_a_case():
    assert {code for _, codes, _ in INVALID for code in codes} | ELSEWHERE == REASONS.keys()


@pytest.mark.parametrize(
    ("row", "codes", "detail"), INVALID, ids=[f"{case[1][0]}-{n}" for n, case in enumerate(INVALID)]
)
def test_an_invalid_row_is_named_and_judged_the_same_everywhere(row, codes, detail, tmp_path, tokenizer):
    path = write(tmp_path / "data.jsonl", [{"id": "first", **chat(ASK, ANSWER)}, b"", row])
    (_, kept), (_, reject) = tokenize_rows(path, tokenizer, Labelling(max_length=64))
    assert kept.conversation.source == f"{path}:1"
    assert reject.source == f"{path}:3"
    assert [problem.code for problem in reject.problems] == codes
    assert detail in str(reject)

    found = validate_conversations(path, tokenizer, Labelling(max_length=64))
    if codes == ["nothing_left"]:  # valid, but too long for this run: counted, not an error
        assert (found.rows, found.rejected, found.dropped.rows, found.findings, found.valid) == (2, 0, 1, {}, True)
        assert prepare_dataset(path, tokenizer, max_length=64)[1].dropped == (f"{path}:3",)
    else:
        assert (found.rows, found.rejected, sorted(found.findings)) == (2, 1, sorted(codes))
        with pytest.raises(DataError, match=f"1 invalid rows .1 {codes[0]}.: .*data.jsonl:3.*allow_rejects"):
            prepare_dataset(path, tokenizer, max_length=64)
        assert not validate_conversations(path).valid
    dataset, report = prepare_dataset(path, tokenizer, max_length=64, allow_rejects=True)
    assert (len(dataset), report.rows, report.kept, report.rejects) == (1, 2, 1, (reject,))


def test_ids_are_remembered_in_bounded_memory(tmp_path, monkeypatch):
    """Past a number of ids, hashes move to a sorted array; both places are looked up. Another file starts anew."""
    monkeypatch.setattr("sft.data.checks._Ids._RECENT", 8)
    rows = [{"id": index, **chat(ASK, ANSWER)} for index in (*range(20), 3, 19, "3", 20)]
    path, other = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:2])
    _, rejects = read_conversations([path, other])
    assert [reject.source for reject in rejects] == [f"{path}:21", f"{path}:22"]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [chat(ASK, ANSWER), chat(("system", "Be brief."), ASK, ANSWER)]
    jsonl = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/train.jsonl").write_bytes(jsonl)
    for path in sorted(tmp_path.iterdir()):
        kept, rejects = read_conversations(path)
        assert [conversation.messages for conversation in kept] == [row["messages"] for row in rows]
        assert [conversation.source for conversation in kept] == [f"{path}:1", f"{path}:2"]
        assert not rejects


SYSTEM, MORE, LAST = ("system", "Be brief."), ("user", "And then?"), ("assistant", "Then so.")
SHAREGPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because.", "weight": 0.5}]


@pytest.mark.parametrize(
    ("row", "turns", "weights"),
    [
        (chat(SYSTEM, ASK, ANSWER, MORE, LAST, weights={4: 0}), [SYSTEM, ASK, ANSWER, MORE, LAST], (1, 0)),
        ({"conversations": SHAREGPT}, [ASK, ANSWER], (0.5,)),
        ({"conversations": SHAREGPT, "system": "Be brief.", "messages": None}, [SYSTEM, ASK, ANSWER], (0.5,)),
        ({"conversations": chat(ASK, ANSWER)["messages"]}, [ASK, ANSWER], (1,)),
        ({"prompt": "Why?", "completion": "Because."}, [ASK, ANSWER], (1,)),
        (
            {"prompt": chat(SYSTEM, ASK, ANSWER, MORE)["messages"], "completion": chat(LAST)["messages"]},
            [SYSTEM, ASK, ANSWER, MORE, LAST],
            (0, 1),
        ),
        ({"instruction": "Why?", "output": "Because.", "input": "", "system": ""}, [ASK, ANSWER], (1,)),
        ({"instruction": "Why", "input": "me?", "output": "Because."}, [("user", "Why\nme?"), ANSWER], (1,)),
        (
            {
                "instruction": "And then?",
                "output": "Then so.",
                "system": "Be brief.",
                "history": [["Why?", "Because."]],
            },
            [SYSTEM, ASK, ANSWER, MORE, LAST],
            (1, 1),
        ),
        (
            {
                "instruction": parts("And", " then?"),
                "output": parts("Then so."),
                "system": parts("Be brief."),
                "history": [[parts("Why?"), parts("Because.")]],
            },
            [SYSTEM, ASK, ANSWER, MORE, LAST],
            (1, 1),
        ),
        (
            {"instruction": parts("Why"), "input": parts("me?"), "output": "Because."},
            [("user", "Why\nme?"), ANSWER],
            (1,),
        ),
        ({"instruction": "Why?", "output": "Because.", "system": parts("")}, [ASK, ANSWER], (1,)),
        (
            {
                "system": parts("Be brief."),
                "conversations": [{**turn, "value": parts(turn["value"])} for turn in SHAREGPT],
            },
            [SYSTEM, ASK, ANSWER],
            (0.5,),
        ),
    ],
)
def test_layouts(row, turns, weights, tmp_path):
    (conversation,), rejects = read_conversations(write(tmp_path / "data.jsonl", [row]))
    assert not rejects
    assert conversation.messages == chat(*turns)["messages"]
    assert conversation.weights == weights


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "missing.jsonl: No such file or directory"),
        ("data.csv", b"", "not a file of conversations; known are .jsonl"),
        ("data.json", b"{}", "holds a dict; expected a list of rows"),
        ("data.json", b"{}\n{}", "not JSON .*; one row a line is .jsonl"),
        ("data.jsonl.gz", b"{}", "data.jsonl.gz: Not a gzipped file"),
        ("data.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "damaged gzip file"),
        ("data.parquet", b"PAR1", "not a Parquet file"),
        ("data.jsonl", b"\n", "nothing to train on in .*data.jsonl: no rows"),
        ("data.jsonl", b"{}", "nothing to train on in .*data.jsonl: 1 invalid rows .1 missing_columns.*data.jsonl:1: "),
    ],
)
def test_a_broken_file_is_one_line(name, content, message, tmp_path, tokenizer):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        prepare_dataset(tmp_path / name, tokenizer, max_length=64, allow_rejects=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["owner/nowhere", "owner/nowhere:train", "owner/nowhere:config:train"])
def test_a_dataset_that_is_not_there_is_one_line(name, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=f"{name}: no such file, nor a dataset to be had"):
        read_conversations(name)


def test_a_line_that_never_ends_is_a_reject(tmp_path, monkeypatch):
    monkeypatch.setattr("sft.data.formats.MAX_ROW_BYTES", 1000)
    long = json.dumps(chat(("user", "x" * 5000), ANSWER))
    path = write(tmp_path / "data.jsonl", [long, chat(ASK, ANSWER), long])
    kept, rejects = read_conversations(path)
    assert [conversation.source for conversation in kept] == [f"{path}:2"]
    assert [(reject.source, reject.reason) for reject in rejects] == [
        (f"{path}:1", "row_too_large"),
        (f"{path}:3", "row_too_large"),
    ]


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
    with pytest.raises(
        DataError, match=r"no row has a trained token within max_length 3: 0 of 4 rows.*Raise max_length"
    ):
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
