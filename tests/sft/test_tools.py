# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Tools, reasoning, text parts and `train` on their way from a file to what is trained on."""

import copy
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from conversion.checkpoint.manifest import seal
from sft.data.dataset import prepare_dataset
from sft.data.examples import prepare_examples
from sft.data.labels import DataError, Labelling, read_conversations, tokenize_rows
from sft.data.preferences import PairJudge
from sft.data.prepare import prepare
from sft.data.preview import preview, render_text
from sft.data.validate import validate_conversations
from sft.tokenizer import TokenizerError, check_stop_token, control_tokens, find_template, load_tokenizer
from sft.training.recipe import RecipeError
from sft.training.train import build_trainer, train
from teleflm.reports.preview import render_html
from tests.fixtures.chat_formula import stretches
from tests.fixtures.tiny import tiny_model, tiny_tokenizer
from tests.sft.test_data import ANSWER, ASK, CALL, CALLS, TOOLS, chat, write
from tests.sft.test_preview import Page
from tests.sft.test_validate import sft

DOCS = Path(__file__).parents[2] / "docs/data.md"
TIME = {"type": "function", "function": {"name": "now", "arguments": {}}}
# As a chat template takes it, and as the formula of the tests does.
RENDERED = [
    {"role": "user", "content": "1 + 2, and the time?"},
    {"role": "assistant", "content": "", "reasoning_content": "Two calls.", "tool_calls": [CALL, TIME]},
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": "noon"},
    {"role": "assistant", "content": "3, at noon."},
]
BOTH = [*TOOLS, {"type": "function", "function": {"name": "now"}}]
ROW = {"messages": RENDERED, "tools": BOTH}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def learned(tokenizer, ids, labels) -> list[str]:
    """The trained stretches, decoded one by one behind the marker that they follow."""
    bot, texts, turn = tokenizer.convert_tokens_to_ids("<_bot>"), [], []
    for token, label in [*zip(ids, labels, strict=True), (None, -100)]:
        if label >= 0:
            assert token == label
            turn.append(token)
        elif turn:
            texts.append(tokenizer.decode([bot, *turn]).removeprefix("<_bot>"))
            turn = []
    return texts


def spelled(**changes) -> dict:
    """The row, with the assistant's first message spelled otherwise."""
    row = copy.deepcopy(ROW)
    row["messages"][1] = {**row["messages"][1], **changes}
    return row


SPELLINGS = {
    "as it is": ROW,
    "tools as JSON text": {**ROW, "tools": json.dumps(BOTH)},
    "calls as JSON text": spelled(tool_calls=json.dumps([CALL, TIME])),
    "arguments as JSON text": spelled(
        tool_calls=[{"function": {"name": "add", "arguments": '{"b":1,\n "a":2}'}}, {"name": "now", "arguments": "{}"}]
    ),
    "no content, no arguments": spelled(content=None, tool_calls=[CALL, {"name": "now"}]),
    "nulls as of Parquet": spelled(
        tool_calls=[
            {"id": None, "type": "function", "function": {"name": "add", "arguments": {"b": 1, "a": 2, "c": None}}},
            {"id": None, "type": None, "function": {"name": "now", "arguments": {"b": None, "a": None, "c": None}}},
        ],
        name=None,
        tool_call_id=None,
        thinking=None,
        weight=None,
        train=None,
    ),
    "thinking": spelled(reasoning_content=None, thinking="Two calls."),
    "reasoning, twice the same": spelled(reasoning="Two calls."),
    "parts": spelled(content=[{"type": "text", "text": "", "image_url": None}]),
    "train": spelled(train=True, weight=1),
    "ShareGPT": {
        "tools": json.dumps(BOTH),
        "conversations": [
            {"from": "human", "value": RENDERED[0]["content"]},
            {
                "from": "function_call",
                "value": json.dumps([CALL["function"], TIME["function"]]),
                "reasoning_content": "Two calls.",
            },
            {"from": "observation", "value": "3"},
            {"from": "observation", "value": "noon"},
            {"from": "gpt", "value": "3, at noon."},
        ],
    },
}


@pytest.mark.parametrize("row", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_gives_the_same_tokens(row, tokenizer, tmp_path):
    dataset, _ = prepare_dataset(write(tmp_path / "data.jsonl", [row]), tokenizer, max_length=None)
    expected = tokenizer.apply_chat_template(RENDERED, tools=BOTH, return_assistant_tokens_mask=True)
    assert dataset["input_ids"][0] == expected.input_ids
    assert [label >= 0 for label in dataset["labels"][0]] == [bool(mark) for mark in expected.assistant_masks]
    said = [text for generated, text in stretches(RENDERED, BOTH) if generated]
    assert learned(tokenizer, dataset["input_ids"][0], dataset["labels"][0]) == said
    assert not any("noon</" in text or "tool_response" in text for text in said), "results are not trained on"


def test_files_of_every_kind_give_the_same_conversations(tmp_path):
    """Arrow makes one struct of all: each call gets the arguments of all others, null."""
    rows = [ROW, chat(ASK, ANSWER), spelled(tool_calls=[CALL, {"name": "now", "arguments": {"zone": "UTC"}}])]
    jsonl = write(tmp_path / "data.jsonl", rows)
    (tmp_path / "data.json").write_text(json.dumps(rows))
    table = pyarrow.Table.from_pylist(rows)
    assert "zone" in str(table.schema.field("messages").type)
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (expected, rejects) = read_conversations(jsonl)
    assert not rejects
    for name in ("data.json", "data.parquet", "saved"):
        kept, rejects = read_conversations(tmp_path / name)
        assert not rejects
        assert [(row.messages, row.tools, row.weights) for row in kept] == [
            (row.messages, row.tools, row.weights) for row in expected
        ]


def test_ids_and_labels_are_those_of_trl(tokenizer, tmp_path):
    """TRL reads `tools` and `tool_calls` too; arguments as JSON text, since Arrow adds nulls to objects."""
    args = SFTConfig(
        output_dir=tmp_path,
        use_cpu=True,
        bf16=False,
        max_length=512,
        assistant_only_loss=True,
        gradient_checkpointing=False,
    )
    functions = [{"name": "add", "arguments": '{"b": 1, "a": 2}'}, {"name": "now", "arguments": "{}"}]
    row = spelled(tool_calls=[{"type": "function", "function": function} for function in functions], content="Well.")
    rows = [{**row, "tools": json.dumps(tools)} for tools in (BOTH, BOTH[::-1])]
    stock = SFTTrainer(tiny_model(), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    ours, _ = prepare_dataset(write(tmp_path / "data.jsonl", rows), tokenizer, max_length=512)
    assert ours["input_ids"][:] == stock.train_dataset["input_ids"][:]
    assert ours["labels"][:] == stock.train_dataset["labels"][:]


@pytest.mark.parametrize(
    ("spelling", "weights"),
    [
        ({}, (1, 1)),
        ({"train": False}, (0, 1)),
        ({"train": False, "weight": 0}, (0, 1)),
        ({"train": True, "weight": 1.0}, (1, 1)),
        ({"weight": 0.5}, (0.5, 1)),
    ],
)
def test_train_is_weight_0_or_1(spelling, weights, tokenizer, tmp_path):
    path = write(tmp_path / "data.jsonl", [spelled(**spelling)])
    ((_, row),) = tokenize_rows(path, tokenizer, Labelling(None))
    assert row.conversation.weights == weights
    texts = [text for generated, text in stretches(RENDERED, BOTH) if generated]
    trained = learned(tokenizer, row.input_ids, row.labels)
    assert trained == [text for text, weight in zip(texts, weights, strict=True) if weight]


def test_order_decides_tokens_and_so_the_digest(tokenizer, tmp_path):
    """Equal as JSON objects, rendered differently: a prepared folder must not be taken for the other's."""
    turned = spelled(tool_calls=[{"name": "add", "arguments": {"a": 2, "b": 1}}, TIME])
    made = [
        prepare(write(tmp_path / f"{n}.jsonl", [row]), tmp_path / str(n), tokenizer, Labelling(None))
        for n, row in enumerate([ROW, turned, {**ROW, "tools": BOTH[::-1]}, SPELLINGS["thinking"]])
    ]
    fingerprints = [prepared.fingerprint for prepared in made]
    assert fingerprints[0] == fingerprints[3]
    assert len(set(fingerprints)) == 3


def test_a_run_trains_on_tools(make_recipe, tmp_path):
    path = write(tmp_path / "data.jsonl", [ROW, chat(ASK, CALLS), chat(ASK, ANSWER)])
    recipe = make_recipe(data_files=str(path), max_steps=1, max_length=512)
    assert train(recipe, progress=False).data.kept == 3


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_may_be_of_calls(make_recipe, tokenizer, tmp_path):
    """As TRL tokenizes them, arguments and all; a row without tools stands beside."""
    other = {**CALLS, "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"b": 3}}}]}
    call = {"prompt": RENDERED[:1], "chosen": RENDERED[1:2], "rejected": [other], "tools": BOTH}
    after = {"prompt": RENDERED[:4], "chosen": RENDERED[4:], "rejected": [{"role": "assistant", "content": "4"}]}
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}, call, after])
    trainer, report, _ = build_trainer(make_recipe(trainer="dpo", data_files=str(path), max_length=512))
    assert report.kept == 3
    row = trainer.train_dataset[1]
    for ids, answer in ((row["chosen_ids"], RENDERED[1:2]), (row["rejected_ids"], [other])):
        expected = list(stretches([*RENDERED[:1], *answer], BOTH))
        assert tokenizer.decode([*row["prompt_ids"], *ids]) == "".join(text for _, text in expected)
        assert learned(tokenizer, ids, ids) == [expected[-1][1]]


def test_results_are_no_answers(tokenizer, tmp_path):
    row = {"prompt": RENDERED[:1], "chosen": RENDERED[1:], "rejected": ANSWER[1], "tools": BOTH}
    path = write(tmp_path / "pairs.jsonl", [row])
    with pytest.raises(DataError, match=r"chosen\[1\] is a tool's, in an answer"):
        prepare_examples(path, PairJudge(), tokenizer, max_length=None)
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c", "tools": "{"}])
    with pytest.raises(DataError, match="tools: is text that is no JSON"):
        prepare_examples(path, PairJudge(), tokenizer, max_length=None)


# --- special tokens as text -------------------------------------------------------------------------------------------

HTML = chat(("user", "Strike <s>this</s>."), ("assistant", "Old <s>price</s>, </s>new"))


def test_html_is_invalid_unless_it_is_to_be_text(make_recipe, tokenizer, tmp_path, model_dir):
    path = write(tmp_path / "data.jsonl", [HTML, chat(ASK, ANSWER)])
    with pytest.raises(DataError, match=r"data.jsonl:1: messages\[0\] contains <s>"):
        build_trainer(make_recipe(data_files=str(path)))
    trainer, report, _ = build_trainer(make_recipe(data_files=str(path), sanitize_control_tokens=True))
    assert report.kept == 2
    row = trainer.train_dataset[0]
    said = [text for generated, text in stretches(HTML["messages"]) if generated]
    assert learned(tokenizer, row["input_ids"], row["labels"]) == said
    assert row["labels"].count(tokenizer.eos_token_id) == 1
    assert tokenizer.bos_token_id not in row["input_ids"]

    assert sft("validate", path)[0] == 3
    for options in ([], ["--model", model_dir]):
        assert sft("validate", path, "--sanitize-control-tokens", *options)[0] == 0
    status, out, _ = sft("preview", path, "--model", model_dir, "--sanitize-control-tokens", "-k", 1)
    assert (status, "⟦Old <s>price</s>, </s>new</s>⟧" in out) == (0, True)
    assert sft("prepare", path, tmp_path / "prepared", "--model", model_dir, "--sanitize-control-tokens")[0] == 0
    with pytest.raises(DataError, match="sanitize_control_tokens True, this run has False"):
        build_trainer(make_recipe(data_files=str(tmp_path / "prepared"), max_length=2048))


def test_an_older_prepared_folder_is_of_no_sanitizing(tokenizer, tmp_path):
    path, out = write(tmp_path / "data.jsonl", [chat(ASK, ANSWER)]), tmp_path / "out"
    prepare(path, out, tokenizer, Labelling(64))
    record = json.loads((out / "prepared.json").read_text())
    del record["labelling"]["sanitize_control_tokens"]
    (out / "prepared.json").write_text(json.dumps(seal(record)))
    assert prepare_dataset(out, tokenizer, max_length=64)[1].kept == 1


def test_markers_stay_invalid(tokenizer, tmp_path):
    path = write(tmp_path / "data.jsonl", [chat(("user", "<_bot>"), ANSWER)])
    with pytest.raises(DataError, match=r"messages\[0\] contains <_bot>"):
        prepare_dataset(path, tokenizer, max_length=64, sanitize_control_tokens=True)
    assert control_tokens(tokenizer, sanitized=True) == ["<_bot>", "<_system>", "<_user>"]


# --- templates by name ------------------------------------------------------------------------------------------------

TALK = [("system", "Be brief."), ("user", " Why? "), ("assistant", "Because."), ("user", "And?")]
AND = ("assistant", "So.")
PROMPTS = {
    "teleflm": "<_system>Be brief.<_user> Why? <_bot>Because.</s><_user>And?<_bot>",
    "published": "<_system>Be brief.<_user> Why? <_bot>Because.<_user>And?<_bot>",
    # What vLLM's file makes of it, the space around its tags included.
    "vllm-example": "INDENT\n \nINDENT<_user>Why?<_bot>\n \nINDENTBecause.\n \nINDENT<_user>And?<_bot>\n \n".replace(
        "INDENT", " " * 8
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_shipped_template_renders_prompts_as_its_namesake(name, model_dir):
    tokenizer, _ = load_tokenizer(model_dir, name)
    prompt = tokenizer.apply_chat_template(chat(*TALK)["messages"], tokenize=False, add_generation_prompt=True)
    assert prompt == PROMPTS[name]
    whole = tokenizer.apply_chat_template(chat(*TALK, AND)["messages"], tokenize=False)
    assert whole == prompt + "So.</s>"


@pytest.mark.parametrize("name", ["published", "vllm-example"])
def test_templates_without_end_tokens_train_the_last_answer(name, make_recipe, tokenizer, tmp_path):
    path = write(tmp_path / "data.jsonl", [chat(*TALK, AND)])
    keys = {"data_files": str(path), "chat_template_path": name}
    with pytest.raises(
        TokenizerError, match=r"turn that another turn follows is '.+', not a stop .*Set last_turn_only: true"
    ):
        build_trainer(make_recipe(**keys))
    trainer, _, _ = build_trainer(make_recipe(last_turn_only=True, **keys))
    row = trainer.train_dataset[0]
    assert learned(tokenizer, row["input_ids"], row["labels"]) == ["So.</s>"]
    assert tokenizer.decode(row["input_ids"]) == PROMPTS[name] + "So.</s>"


@pytest.mark.parametrize("name", ["published", "vllm-example"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW, "no place for tools"),
        (chat(ASK, {"role": "assistant", "content": "x", "thinking": "y"}), "message 1: .* a place for texts alone"),
        (chat(ASK, CALLS), "message 1: .* a place for texts alone"),
    ],
)
def test_templates_without_a_place_for_it_refuse_it(name, row, message, model_dir, tmp_path):
    tokenizer, stop_ids = load_tokenizer(model_dir, name)
    check_stop_token(tokenizer, stop_ids, last_turn_only=True)
    path = write(tmp_path / "data.jsonl", [row])
    report = validate_conversations(path, tokenizer, Labelling(None, last_turn_only=True))
    assert re.search(message, report.findings["template_refuses"].examples[0])


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"tools": TOOLS, **chat(ASK, ANSWER)}, "tools"),
        (chat(ASK, {**CALLS, "content": "x"}), "tool_calls"),
        (chat(ASK, {**CALLS, "content": "x"}, ("tool", "3"), ANSWER), "tool_calls"),
        (chat(ASK, {"role": "assistant", "content": "x", "thinking": "y"}), "reasoning_content"),
    ],
)
def test_what_a_template_does_not_know_is_not_lost_without_a_word(row, name, make_recipe, tokenizer, tmp_path):
    """As with the template of 0.1.0, which rendered roles and texts alone."""
    (tmp_path / "old.jinja").write_text(
        "{% for m in messages %}<_user>{% if m.role == 'assistant' %}{% generation %}{{ m.content ~ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    keys = {"chat_template_path": str(tmp_path / "old.jinja")}
    path = write(tmp_path / "data.jsonl", [chat(ASK, ANSWER), row])
    wanted = rf"1 template_refuses.: .*data.jsonl:2: the chat template leaves out {name}, which it has; train it with"
    with pytest.raises(DataError, match=wanted):
        build_trainer(make_recipe(data_files=str(path), **keys))
    assert build_trainer(make_recipe(data_files=str(path)))[1].kept == 2
    *prompt, last = row["messages"]
    pair = {**row, "prompt": prompt, "chosen": [last], "rejected": "z"}
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}, pair])
    with pytest.raises(DataError, match=wanted.replace("data", "pairs")):
        build_trainer(make_recipe(trainer="dpo", data_files=str(path), **keys))


def test_a_template_that_is_none_is_named(make_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = "chat_template_path is 'publishd': there is no file publishd, and no template .*did you mean published"
    with pytest.raises(RecipeError, match=wanted):
        train(make_recipe(chat_template_path="publishd"))
    Path("published").write_text("a file here comes first")
    assert find_template("published") == Path("published")
    Path("data.jsonl").write_text('{"messages": []}\n')
    status, _, err = sft("validate", "data.jsonl", "--model", "x", "--chat-template-path", "fsdp2")
    assert (status, "x" in err) == (2, True)


# --- shown, and said --------------------------------------------------------------------------------------------------


def test_the_preview_shows_all_of_it(tokenizer, tmp_path):
    row = spelled(reasoning_content="</span><script>\x1b[31m")
    path = write(tmp_path / "data.jsonl", [row, chat(ASK, CALLS, ANSWER)])
    shown, reject = preview(path, tokenizer, Labelling(None))
    text = render_text(shown, marks=True).plain
    assert '<tools>\n{"type": "function", "function": {"name": "add"' in text
    assert '⟦<think>\n</span><script>\\x1b[31m\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"b": 1' in text
    assert (
        '"now", "arguments": {}}\n</tool_call></s>⟧<_user><tool_response>\n3\n</tool_response>\n<tool_response>' in text
    )
    page = Page(render_html([shown, reject], "data"))
    assert "".join(token[2] for token in page.tokens) == "".join(piece.text for piece in shown.pieces)
    assert "script" not in page.tags
    assert "comes before the result of 'add'" in str(reject)


def test_the_example_of_the_documentation(tmp_path, model_dir):
    """docs/data.md: the row that it shows, the command, and what that prints."""
    blocks = re.findall(r"```(\w+)\n(.*?)```", DOCS.read_text(), re.DOTALL)
    row = next(text for kind, text in blocks if kind == "json")
    shown = next(text for kind, text in blocks if kind == "text")
    path = write(tmp_path / "weather.jsonl", [json.dumps(json.loads(row))])
    assert sft("validate", path)[0] == 0
    status, out, _ = sft("preview", path, "--model", model_dir)
    assert status == 0
    assert out.split("\n", 1)[1].strip() == shown.strip()
