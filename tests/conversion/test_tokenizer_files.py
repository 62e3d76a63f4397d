# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The tokenizer of what we write: ours where our code is, and the same ids where it is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conversion import convert_checkpoint, inspect_checkpoint
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import MANIFEST
from conversion.exports.export import export_checkpoint
from conversion.hub import tokenizer_process
from conversion.hub.tokenizer_files import tokenizer_files
from conversion.hub.tokenizer_settings import TokenizerMismatch
from modeling_teleflm import TeleFLMTokenizer
from tests.fixtures.tiny import tiny_model, tiny_sentencepiece, tiny_tokenizer

TEXTS = (
    *("", " ", "a", "  two", "<_user>", "<_user>hello<_bot> world</s>", " <_user> a</s> b", "<unk>", "x<unk>y", "<s>"),
    *("a</s>b<pad>c", "<_tool>x <_tool>", "中文é😀\n\n", "<0x41><_bot><0x41>", "▁", "a<_extra>b"),
)
TOKENIZER = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model with its tokenizer, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("model") / "source"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    return folder


def special(text: str, **flags) -> dict:
    return {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, **flags}


OLD = {
    "bos_token": {"__type": "AddedToken", **special("<s>")},
    "eos_token": {"__type": "AddedToken", **special("</s>")},
    "unk_token": {"__type": "AddedToken", **special("<unk>")},
    "tokenizer_class": "TeleFLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_teleflm.TeleFLMTokenizer", None]},
}
SETTINGS = {
    "none": {},
    "of transformers 4": {
        "tokenizer_config.json": {**OLD, "add_bos_token": False, "legacy": False, "pad_token": "</s>"}
    },
    "both ends": {"tokenizer_config.json": {**OLD, "add_bos_token": True, "add_eos_token": True}},
    "no ends": {"tokenizer_config.json": {**OLD, "special_tokens_pattern": "none"}},
    "a map": {"special_tokens_map.json": {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": special("</s>")}},
    "symbols as special": {"tokenizer_config.json": {**OLD, "additional_special_tokens": ["<_user>", "<_bot>"]}},
    "added": {
        "tokenizer_config.json": {
            **OLD,
            "added_tokens_decoder": {
                "0": special("<unk>", special=True),
                "1": special("<s>", special=True),
                "2": special("</s>", special=True),
                "600": special("<_tool>", special=False, lstrip=True, normalized=True),
            },
        }
    },
    "added by an old file": {"added_tokens.json": {"<_tool>": 600}, "tokenizer_config.json": OLD},
    "of another kind": {
        "tokenizer_config.json": {**OLD, "tool_token": "<_tool>", "extra_special_tokens": ["<_extra>"]}
    },
    "of two kinds": {
        "tokenizer_config.json": {
            **OLD,
            "extra_special_tokens": {"tool_token": "<_tool>"},
            "additional_special_tokens": ["<_extra>"],
        }
    },
    "no token to transformers": {"tokenizer_config.json": {**OLD, "tool_token": special("<_tool>")}},
    "a map of tokens": {"special_tokens_map.json": {"extra_special_tokens": [special("<_user>"), special("<_tool>")]}},
    "lists that add up": {
        "tokenizer_config.json": {**OLD, "extra_special_tokens": ["<_tool>"]},
        "special_tokens_map.json": {"extra_special_tokens": ["<_tool>", "<_extra>"]},
    },
    "lists of which one counts": {
        "tokenizer_config.json": {**OLD, "additional_special_tokens": ["<_tool>"]},
        "special_tokens_map.json": {"additional_special_tokens": ["<_extra>"]},
    },
}


def beside_a_model(folder: Path, files: dict) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "TeleFLM"}')
    (folder / "tokenizer.model").write_bytes(tiny_sentencepiece())
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("case", SETTINGS, ids=SETTINGS)
def test_settings_stay_and_both_readers_have_them(case, tmp_path):
    """Loaded from the source, by our class from an output, and by transformers' own: the same ids and tokens."""
    before = AutoTokenizer.from_pretrained(beside_a_model(tmp_path / "source", SETTINGS[case]))
    assert type(before) is TeleFLMTokenizer
    for stock in (False, True):
        made = tokenizer_files(tmp_path / "source", stock=stock)
        assert made.problem is None
        out = tmp_path / f"out-{stock}"
        out.mkdir()
        for name, content in made.files.items():
            (out / name).write_bytes(content)
        (out / "config.json").write_text('{"model_type": "TeleFLM"}')
        readers = [
            PreTrainedTokenizerFast.from_pretrained(out),
            *([] if stock else [AutoTokenizer.from_pretrained(out)]),
        ]
        assert {type(reader) for reader in readers[1:]} <= {TeleFLMTokenizer}
        for after in readers:
            for text in TEXTS:
                assert after(text).input_ids == before(text).input_ids, text
                ids = before(text, add_special_tokens=False).input_ids
                assert after.decode(ids) == before.decode(ids), text
            for name in ("bos", "eos", "pad"):
                assert getattr(after, f"{name}_token_id") == getattr(before, f"{name}_token_id")
            assert {*after.all_special_tokens} - {"<unk>"} == {*before.all_special_tokens} - {"<unk>"}
            assert set(after("a")) == {"input_ids", "attention_mask"}


PROBLEMS = {
    "padding is the unknown piece": ({"pad_token": "<unk>"}, "another special token is that too"),
    "another unknown piece": ({"unk_token": "<u>"}, "unk_token is '<u>'"),
    "special tokens are split": ({"split_special_tokens": True}, "split_special_tokens is true"),
    "an id is taken": (
        {"added_tokens_decoder": {"9": special("<_tool>")}},
        r"the id of '<0x03>' is 9|the id of '<_tool>' is 9 and would be",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS, ids=PROBLEMS)
def test_settings_that_only_our_class_has_are_named(case, tmp_path):
    config, reason = PROBLEMS[case]
    folder = beside_a_model(tmp_path / "source", {"tokenizer_config.json": {**OLD, **config}})
    ours, stock = (tokenizer_files(folder, stock=stock) for stock in (False, True))
    assert ours.problem == stock.problem
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(ours.problem)
    assert (ours.files.keys(), stock.files.keys()) == ({"tokenizer.model", "tokenizer_config.json"}, set())
    assert json.loads(ours.files["tokenizer_config.json"]) == {**OLD, **config}


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_tokens_with_properties_are_written_by_name(file, tmp_path):
    """A stock client stops at properties in such a list."""
    tokens = {"additional_special_tokens": [special("<_user>", lstrip=True), "<_tool>"]}
    folder = beside_a_model(tmp_path / "source", {file: tokens})
    for stock in (False, True):
        out = tmp_path / f"out-{stock}"
        out.mkdir()
        for name, content in tokenizer_files(folder, stock=stock).files.items():
            (out / name).write_bytes(content)
        for loader in (PreTrainedTokenizerFast, *([] if stock else [TeleFLMTokenizer])):
            tokenizer = loader.from_pretrained(out)
            assert tokenizer.extra_special_tokens == ["<_user>", "<_tool>"]
            assert tokenizer("<_user>a<_tool>").input_ids == [1, 4, 264, 600]


def test_tokens_of_a_file_that_is_not_written_stay(tmp_path):
    """An id with none before it cannot be said in a tokenizer.json; the one of the source has it."""
    added = [{"id": 605, **special("<_tool>", special=True)}]
    folder = beside_a_model(
        tmp_path / "source",
        {"tokenizer.json": {"added_tokens": added}, "special_tokens_map.json": {"pad_token": special("<_pad>")}},
    )
    tiny_model().save_pretrained(folder)
    before = TeleFLMTokenizer.from_pretrained(folder)
    notes = convert_checkpoint(folder, tmp_path / "out").notes
    assert not {"tokenizer.json", "special_tokens_map.json"} & {path.name for path in (tmp_path / "out").iterdir()}
    after = TeleFLMTokenizer.from_pretrained(tmp_path / "out")
    for text in (*TEXTS, "a<_pad>"):
        assert after(text).input_ids == before(text).input_ids
    assert after.pad_token_id == before.pad_token_id
    assert "tokenizer_config.json says what was in special_tokens_map.json." in notes


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.model", "junk", r"source/tokenizer\.model: not a sentencepiece model"),
        ("tokenizer_config.json", "[1]", r"source/tokenizer_config\.json is a JSON list, expected an object"),
        ("special_tokens_map.json", "{", r"source/special_tokens_map\.json is not valid JSON"),
        ("tokenizer.json", "{", r"source/tokenizer\.json is not valid JSON"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": 1}}',
            r"source/tokenizer_config\.json: added_tokens_decode",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', None),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"' + "9" * 5000 + '": "<_tool>"}}',
            "added_tokens_decoder has",
        ),
        ("added_tokens.json", '{"<_tool>": "a"}', r"added_tokens_decoder has 'a'"),
    ],
    ids=str,
)
def test_a_broken_file_is_one_line(name, content, said, tmp_path):
    folder = beside_a_model(tmp_path / "source", {})
    (folder / name).write_text(content)
    if said is None:
        assert tokenizer_files(folder, stock=False).files
        return
    with pytest.raises(CheckpointError, match=said) as raised:
        tokenizer_files(folder, stock=False)
    assert "\n" not in str(raised.value)


# A large model's is made in a process of its own, once.


@pytest.fixture
def large(monkeypatch, tmp_path):
    """Takes every model for a large one, of a user with an empty cache."""
    monkeypatch.setattr(tokenizer_process, "_SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer_process._make_apart.cache_clear()
    yield
    tokenizer_process._make_apart.cache_clear()


def test_a_process_of_its_own_says_the_same(large, monkeypatch, tmp_path):
    content, config = tiny_sentencepiece(), {**OLD, "add_eos_token": True, "pad_token": "<pad>"}
    here = tokenizer_process._make(content, json.dumps(config))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conversion.py").write_text("raise SystemExit('not this one')")
    assert tokenizer_process.make_tokenizer(content, config) == here
    with pytest.raises(TokenizerMismatch, match=r"^tokenizer\.model: its algorithm is unigram"):
        tokenizer_process.make_tokenizer(tiny_sentencepiece("unigram"), config)
    with pytest.raises(CheckpointError, match=r"^tokenizer\.model: not a sentencepiece model") as raised:
        tokenizer_process.make_tokenizer(b"junk", config)
    assert not isinstance(raised.value, TokenizerMismatch)


@pytest.mark.parametrize(
    "damage",
    [
        "none",
        "cut",
        "changed",
        "a folder",
        "a pipe",
        "another's",
        "a stranger's",
        "other settings",
        "other makers",
        "no home",
    ],
)
def test_what_was_made_is_kept_and_what_is_damaged_or_of_others_is_made_again(damage, large, monkeypatch, tmp_path):
    content, config = tiny_sentencepiece(), {"pad_token": "<pad>"}
    asked = []
    answer = tokenizer_process.answer_to  # without a process, which the test above has
    monkeypatch.setattr(tokenizer_process, "_ask_child", lambda request: asked.append(request) or answer(request))
    made = tokenizer_process.make_tokenizer(content, config)
    (kept,) = (tmp_path / "cache/teleflm/tokenizers").iterdir()
    tokenizer_process._make_apart.cache_clear()
    match damage:
        case "cut":
            kept.write_bytes(kept.read_bytes()[:-9])
        case "changed":
            kept.write_bytes(kept.read_bytes().replace(b"<_user>", b"<_uses>"))
        case "a folder":
            kept.unlink()
            kept.mkdir()
        case "a pipe":
            kept.unlink()
            os.mkfifo(kept)
        case "another's":
            tokenizer_process.make_tokenizer(content, {"pad_token": "</s>"})
            (other,) = set(kept.parent.iterdir()) - {kept}
            other.replace(kept)
            asked.pop()
            tokenizer_process._make_apart.cache_clear()
        case "a stranger's":
            monkeypatch.setattr("os.geteuid", lambda: kept.stat().st_uid + 1)
        case "other settings":
            config = {"pad_token": "</s>"}
        case "other makers":
            monkeypatch.setattr(tokenizer_process, "_makers", lambda: b"of another version")
        case "no home":
            monkeypatch.delenv("XDG_CACHE_HOME")
            monkeypatch.setattr("os.path.expanduser", lambda path: path)
    again = tokenizer_process.make_tokenizer(content, config)
    assert (again == made) == (damage != "other settings")
    assert len(asked) == (1 if damage == "none" else 2)
    assert not Path("~").exists()


def test_a_process_that_ends_early_makes_no_file(large, monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho out of luck >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(TokenizerMismatch, match=r"it ended with status 3: out of luck\.$"):
        tokenizer_process.make_tokenizer(tiny_sentencepiece(pad_id=3), {})


# Whole folders.

PROGRAM = """
import importlib.abc, json, sys
class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("conversion", "modeling_teleflm"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Without())
from transformers import AutoTokenizer, PreTrainedTokenizerFast
asked = json.load(sys.stdin)
for folder in asked["folders"]:
    loaders = [PreTrainedTokenizerFast] + ([AutoTokenizer] if not folder.endswith("hub") else [])
    for loader in loaders:
        t = loader.from_pretrained(folder)
        chats = [t.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in asked["chats"]]
        print(json.dumps([[t(text).input_ids for text in asked["texts"]], chats, t.is_fast, t.decode([1, 620, 5])]))
"""


def test_programs_without_our_code_make_the_same_ids(source, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(source)
    chats = [[{"role": "system", "content": " a "}, {"role": "user", "content": "Was ist das?  中文\n"}]]
    chats.append([{"role": role, "content": "b  c"} for role in ("user", "assistant", "user")])
    convert_checkpoint(source, tmp_path / "hub")
    for to in ("granite", "llama"):
        export_checkpoint(source, tmp_path / to, to=to)
        names = {path.name for path in (tmp_path / to).iterdir()}
        assert names >= TOKENIZER
        assert not [name for name in names if name.endswith(".py")]
    folders = [str(tmp_path / name) for name in ("hub", "granite", "llama")]
    run = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        input=json.dumps({"folders": folders, "chats": chats, "texts": TEXTS}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    expected_ids = [tokenizer(text).input_ids for text in TEXTS]
    expected_chats = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    assert answers == [[expected_ids, expected_chats, True, "<s><_bot>"]] * 5


def test_the_file_is_of_the_checkpoint(source, tmp_path):
    """It is in the record, found missing or changed, and there already when the same command is given again."""
    convert_checkpoint(source, tmp_path / "out")
    record = json.loads((tmp_path / "out" / MANIFEST).read_bytes())
    assert record["files"]["tokenizer.json"]["bytes"] == (tmp_path / "out/tokenizer.json").stat().st_size
    assert convert_checkpoint(source, tmp_path / "out").written.already_done
    again = convert_checkpoint(tmp_path / "out", tmp_path / "again")
    assert not [note for note in again.notes if "tokenizer" in note]
    names = [name for name in TOKENIZER if name != "chat_template.jinja"]
    assert [(tmp_path / "again" / name).read_bytes() for name in names] == [
        (tmp_path / "out" / name).read_bytes() for name in names
    ]
    with (tmp_path / "out/tokenizer.json").open("a") as file:
        file.write(" ")
    assert [d for d in inspect_checkpoint(tmp_path / "out", check=True).damages if "tokenizer.json" in str(d)]


def test_a_model_that_only_sentencepiece_reads(source, tmp_path):
    """Rules for characters: our class alone has them, so a stock folder is written without a tokenizer, and says so."""
    rules = tmp_path / "rules"
    tiny_model().save_pretrained(rules)
    (rules / "tokenizer.model").write_bytes(tiny_sentencepiece("bpe", "nmt_nfkc"))
    tokenizer = TeleFLMTokenizer(str(rules / "tokenizer.model"))
    tokenizer.save_pretrained(rules)
    (rules / "tokenizer.json").write_text('{"old": 1, "added_tokens": []}')
    reason = "tokenizer.model: its normaliser has rules for characters, which tokenizer.json cannot say."
    result = convert_checkpoint(rules, tmp_path / "hub")
    assert f"There is no tokenizer.json, so only our code reads the tokenizer: {reason}" in result.notes
    assert not (tmp_path / "hub/tokenizer.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "hub")("ﬁ a\r\n").input_ids == tokenizer("ﬁ a\r\n").input_ids
    for to in ("granite", "llama"):
        result = export_checkpoint(rules, tmp_path / to, to=to)
        assert f"Written without a tokenizer, as stock programs would read other ids: {reason}" in result.notes
        assert not [path.name for path in (tmp_path / to).iterdir() if "token" in path.name]
        assert "There is no tokenizer here" in (tmp_path / to / "README.md").read_text()


def test_files_of_the_source_that_are_merged_or_made_anew_are_named(tmp_path):
    folder = tmp_path / "source"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(folder)
    (folder / "special_tokens_map.json").write_text('{"pad_token": "</s>"}')
    (folder / "tokenizer.json").write_text('{"added_tokens": []}')
    notes = convert_checkpoint(folder, tmp_path / "out").notes
    assert [note for note in notes if "token" in note] == [
        "tokenizer_config.json says what was in special_tokens_map.json.",
        "tokenizer.json is made of tokenizer.model, and is not the one of the source.",
    ]
    assert not (tmp_path / "out/special_tokens_map.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "</s>"
