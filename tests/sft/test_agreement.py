# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""`sft validate` and training agree on every row: valid ones, nearly valid ones and hostile ones, of every layout.

What is trained on is held against a formula that knows the rows as they were made, and neither template nor readers.
"""

import copy
import json
import random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from sft.data.checks import REASONS
from sft.data.dataset import prepare_dataset
from sft.data.labels import DataError, Labelling
from sft.data.validate import validate_conversations
from tests.fixtures.chat_formula import stretches
from tests.fixtures.tiny import tiny_sentencepiece, tiny_tokenizer

pytestmark = pytest.mark.slow

WORDS = [
    "Why",
    "because",
    "é",
    "你好",
    "🎉",
    "\n",
    "  ",
    "{{ x }}",
    "</tool_response>",
    "</tools>",
    "<think>",
    '"',
    "\\",
]
HOSTILE = [
    None,
    True,
    0,
    -1,
    1.5,
    "",
    " ",
    "<s>",
    "</s>",
    "x<_bot>y",
    "\ud800",
    "<tool_call>",
    "</think>",
    "tool",
    "user",
]
HOSTILE += [
    "assistant",
    "system",
    "robot",
    [],
    {},
    ["a"],
    [{"type": "text", "text": "x"}],
    [{"type": "image"}],
    {"a": None},
]
HOSTILE += ['{"name": "add"}', "[1", '{"a": NaN}', 10**400, [[[]]], {"function": 3}, {"name": "add", "arguments": "7"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pieces():
    return SentencePieceProcessor(model_proto=tiny_sentencepiece())


def make_text(draw: random.Random) -> str:
    return "x" + "".join(draw.choices(WORDS, k=draw.randint(0, 5)))


def make_chat(draw: random.Random) -> tuple[list[dict], list[dict]]:
    """A valid conversation as it is rendered, and its tools."""
    names = draw.sample(["add", "sub", "weather"], k=draw.choice([0, 0, 1, 3]))
    tools = [{"type": "function", "function": {"name": name, "description": make_text(draw)}} for name in names]
    chat = [{"role": "system", "content": draw.choice(["", make_text(draw)])}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 2)):
        chat.append({"role": "user", "content": make_text(draw)})
        for _ in range(draw.choice([0, 1, 2]) if names else 0):
            asked = [draw.choice(names) for _ in range(draw.randint(1, 2))]
            chat.append(make_answer(draw, draw.choice(["", make_text(draw)])))
            chat[-1]["tool_calls"] = [
                {"type": "function", "function": {"name": name, "arguments": make_arguments(draw)}} for name in asked
            ]
            chat += [{"role": "tool", "content": draw.choice(["", make_text(draw)])} for _ in asked]
        if chat[-1]["role"] != "tool" or draw.random() < 0.8:
            chat.append(make_answer(draw, make_text(draw)))
    return chat, tools


def make_answer(draw: random.Random, content: str) -> dict:
    reasoning = {"reasoning_content": make_text(draw)} if draw.random() < 0.3 else {}
    return {"role": "assistant", "content": content, **reasoning}


def make_arguments(draw: random.Random) -> dict:
    values = [1, 1.5, True, [1, {"z": "</tool_call>"}], {"b": 1, "a": []}, make_text(draw)]
    return {draw.choice("abc"): value for value in draw.choices(values, k=draw.randint(0, 2))}


def write_row(draw: random.Random, chat: list[dict], tools: list[dict]) -> tuple[dict, list[float]]:
    """A conversation in one of the layouts and spellings, and the weights of its answers."""
    messages = copy.deepcopy(chat)
    weights = []
    for message in messages:
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if draw.random() < 0.3:
                function["arguments"] = json.dumps(function["arguments"])
        if message.get("tool_calls") and not message["content"] and draw.random() < 0.5:
            message["content"] = None
        elif draw.random() < 0.2:
            half = len(message["content"]) // 2
            parts = message["content"][:half], message["content"][half:]
            message["content"] = [{"type": "text", "text": part, "image_url": None} for part in parts]
        if message["role"] == "assistant":
            weights.append(draw.choice([1.0, 1.0, 1.0, 0.0]))
            if weights[-1] == 0 or draw.random() < 0.2:
                message |= draw.choice([{"weight": weights[-1]}, {"train": bool(weights[-1])}])
            if draw.random() < 0.2:
                message |= {"tool_calls": message.get("tool_calls"), "name": None, "weight": message.get("weight")}
    row = {"tools": draw.choice([tools, json.dumps(tools)])} if tools or draw.random() < 0.2 else {}
    layout = draw.choice(["messages", "conversations", "completion"])
    if layout == "completion" and chat[-1]["role"] == "assistant" and len(chat) > 1:
        weights = [0.0] * (len(weights) - 1) + weights[-1:]
        return {"prompt": messages[:-1], "completion": messages[-1:], **row}, weights
    if layout == "conversations":
        row["conversations"] = [write_sharegpt(message) for message in messages]
        return row, weights
    return {"messages": messages, **row}, weights


def write_sharegpt(message: dict) -> dict:
    names = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}
    rest = {name: value for name, value in message.items() if name not in ("role", "content")}
    if message.get("tool_calls") and not message["content"]:
        calls = [call["function"] for call in rest.pop("tool_calls")]
        value = json.dumps(calls[0] if len(calls) == 1 else calls)
        return {"from": "function_call", "value": value, **rest}
    return {"from": names[message["role"]], "value": message["content"], **rest}


def spoil(draw: random.Random, row: dict) -> dict:
    """A row with one thing in it replaced, removed or doubled."""
    row = copy.deepcopy(row)
    places = []

    def visit(value):
        if isinstance(value, dict | list):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            places.extend((value, key) for key in keys)
            for key in keys:
                visit(value[key])

    visit(row)
    holder, key = draw.choice(places)
    match draw.randint(0, 3):
        case 0 if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        case 1:
            del holder[key]
        case _:
            holder[key] = copy.deepcopy(draw.choice(HOSTILE))
    return row


def expect(pieces, chat, tools, weights, max_length):
    """(ids, labels) of a conversation, by the formula and sentencepiece itself."""
    ids, labels, text = [], [], ""
    remaining = iter(weights)
    for generated, part in stretches(chat, tools):
        text += part.removesuffix("</s>") if generated else part
        if generated:
            said = pieces.encode(text)
            start = len(said) - said[::-1].index(pieces.piece_to_id("<_bot>"))
            ids += [*said, pieces.eos_id()]
            learned = [*said[start:], pieces.eos_id()] if next(remaining) else [-100] * (len(said) - start + 1)
            labels += [-100] * start + learned
            text = ""
    rest = pieces.encode(text)
    return [*ids, *rest][:max_length], [*labels, *[-100] * len(rest)][:max_length]


def prepared(path, tokenizer, labelling, **options):
    """What training makes of a file: rows, their report; a report alone where it refuses all."""
    try:
        return prepare_dataset(
            path,
            tokenizer,
            max_length=labelling.max_length,
            last_turn_only=labelling.last_turn_only,
            sanitize_control_tokens=labelling.sanitize_control_tokens,
            **options,
        )
    except DataError as error:
        return str(error), None


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # files do not shrink well
)
@given(st.randoms(use_true_random=False), st.sampled_from([None, 60, 150]), st.booleans(), st.booleans())
def test_validate_and_train_agree(tokenizer, pieces, tmp_path, draw, max_length, last_turn_only, sanitize):
    made, rows = {}, []
    for number in range(1, 9):
        chat, tools = make_chat(draw)
        row, weights = write_row(draw, chat, tools)
        if number % 2:
            made[number] = chat, tools, weights
        else:
            row = spoil(draw, spoil(draw, row) if draw.random() < 0.3 else row)
        rows.append(row)
    path, rejects = tmp_path / "data.jsonl", tmp_path / "rejects.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelling = Labelling(max_length, last_turn_only=last_turn_only, sanitize_control_tokens=sanitize)

    report = validate_conversations(path, tokenizer, labelling, rejects=rejects)
    found = {(line["source"], tuple(map(tuple, map(dict.values, line["reasons"])))) for line in read(rejects)}
    dataset, data = prepared(path, tokenizer, labelling, allow_rejects=True)
    assert (prepared(path, tokenizer, labelling)[1] is not None) == report.valid
    if data is None:  # nothing to train on
        assert report.rejected + report.dropped.rows == report.rows
        return
    # The same rows, for the same reasons in the same words.
    assert {(reject.source, tuple(map(tuple, reject.problems))) for reject in data.rejects} == found
    assert (len(data.invalid), len(data.dropped)) == (report.rejected, report.dropped.rows)
    assert (data.tokens, data.trained_tokens, data.truncated) == (
        report.tokens,
        report.trained_tokens,
        report.truncated,
    )
    # Without a tokenizer the same but for what only a tokenizer can tell.
    blind = validate_conversations(path, labelling=labelling, rejects=rejects)
    seen = {(line["source"], tuple(map(tuple, map(dict.values, line["reasons"])))) for line in read(rejects)}
    assert blind.dropped.rows == 0
    by_tokenizer = ("nothing_left", "nothing_trained")  # the second also of last_turn_only
    seen, told = ({(at, why) for at, why in some if why[0][0] not in by_tokenizer} for some in (seen, found))
    assert seen == told

    kept = iter(zip(dataset["input_ids"], dataset["labels"], strict=True))
    left_out = {int(source.rpartition(":")[2]): why[0][0] for source, why in found}
    for number in range(1, len(rows) + 1):
        if number in left_out:
            if number in made:  # the formula agrees that there is nothing to learn
                chat, tools, weights = made[number]
                weights = [0.0] * (len(weights) - 1) + weights[-1:] if last_turn_only else weights
                assert left_out[number] in ("nothing_left", "nothing_trained")
                assert not any(label >= 0 for label in expect(pieces, chat, tools, weights, max_length)[1])
            continue
        ids, labels = next(kept)
        assert any(label >= 0 for label in labels)
        if number in made:
            chat, tools, weights = made[number]
            weights = [0.0] * (len(weights) - 1) + weights[-1:] if last_turn_only else weights
            assert (ids, labels) == expect(pieces, chat, tools, weights, max_length)
    assert next(kept, None) is None


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_fuzz_reaches_most_reasons(tokenizer, tmp_path):
    """Else agreement would say little."""
    draw = random.Random(0)
    rows = [spoil(draw, write_row(draw, *make_chat(draw))[0]) for _ in range(1500)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = validate_conversations(path)
    assert 0.2 < report.rejected / report.rows < 0.9
    others = {"not_utf8", "invalid_json", "row_too_large", "not_an_object", "template_refuses", "nothing_left"}
    assert report.findings.keys() | others | {"duplicate_id", "system_not_first"} >= REASONS.keys() - {"ambiguous_text"}
