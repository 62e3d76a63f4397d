# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What was tokenized once is trained on as if it had just been, and only by who would tokenize it so."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from conversion.checkpoint.manifest import seal as with_checksum
from sft.data import prepare as module
from sft.data import sources
from sft.data.cache import Cache, CacheError
from sft.data.dataset import Loader, prepare_dataset
from sft.data.labels import DataError, Labelling
from sft.data.prepare import PREPARED, prepare
from sft.training.train import build_trainer
from tests.fixtures.tiny import tiny_tokenizer
from tests.sft.test_data import ANSWER, ASK, chat, write
from tests.sft.test_validate import sft

LABELLING = Labelling(max_length=64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def prepared(data_file, tokenizer, tmp_path):
    prepare(data_file, tmp_path / "prepared", tokenizer, LABELLING)
    return tmp_path / "prepared"


@pytest.mark.slow
@pytest.mark.parametrize("num_proc", [None, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_what_training_would_tokenize(weighted, num_proc, conversations, tokenizer, tmp_path):
    rows = [*conversations, chat(ASK, ANSWER, weights={1: 0.5}), {}] if weighted else [*conversations, {}]
    rows += [chat(ASK, ("assistant", "<unk> ä € 𝄞 " * 9)), {**chat(ASK, ANSWER), "ignored": nested(700)}]
    path = write(tmp_path / "data.jsonl", rows)
    made = prepare(path, tmp_path / "out", tokenizer, LABELLING, allow_rejects=True, num_proc=num_proc)
    opened, report = prepare_dataset(tmp_path / "out", tokenizer, max_length=64)
    fresh, fresh_report = prepare_dataset(path, tokenizer, max_length=64, allow_rejects=True)
    assert opened.column_names == fresh.column_names
    assert opened[:] == fresh[:]
    assert report == fresh_report == made.report
    assert len(report.invalid) == 1
    assert opened._fingerprint == made.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "out"]


def test_the_fingerprint_is_of_content(conversations, data_file, tokenizer, tmp_path):
    """The same conversations in another file and layout; then one change of each thing it stands for."""
    sharegpt = [
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in row["messages"]]}
        for row in conversations
    ]
    moved = write(tmp_path / "moved.jsonl", sharegpt)
    shorter = write(tmp_path / "shorter.jsonl", conversations[:-1])
    template = tiny_tokenizer(tmp_path / "template")
    template.chat_template += " "
    pieces = tiny_tokenizer(tmp_path / "pieces")
    pieces.add_tokens("<more>")
    runs = [
        (data_file, tokenizer, LABELLING),
        (moved, tokenizer, LABELLING),
        (shorter, tokenizer, LABELLING),
        (data_file, template, LABELLING),
        (data_file, pieces, LABELLING),
        (data_file, tokenizer, Labelling(max_length=65)),
        (data_file, tokenizer, Labelling(max_length=64, last_turn_only=True)),
    ]
    found = [
        prepare(data, tmp_path / f"out{number}", tokenizer, labelling).fingerprint
        for number, (data, tokenizer, labelling) in enumerate(runs)
    ]
    assert found[0] == found[1]
    assert len(set(found)) == len(found) - 1


def test_a_recipe_trains_from_it(make_recipe, prepared, data_file):
    """The batches are those of the file it was made from, without reading that file."""
    keys = {"max_length": 64, "packing": True}
    fresh = build_trainer(make_recipe(data_files=str(data_file), **keys))[0].train_dataset[:]
    assert build_trainer(make_recipe(data_files=str(prepared), **keys))[0].train_dataset[:] == fresh


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 32}, "prepared with max_length 64, this run has 32; prepare it again"),
        ({"last_turn_only": True}, "last_turn_only False, this run has True"),
        ({"assistant_only_loss": False}, "assistant_only_loss True, this run has False"),
    ],
)
def test_another_run_is_refused(settings, message, prepared, tokenizer):
    with pytest.raises(DataError, match=message):
        prepare_dataset(prepared, tokenizer, **{"max_length": 64, **settings})


def test_another_tokenizer_or_template_is_refused(prepared, tmp_path):
    other = tiny_tokenizer(tmp_path / "other")
    template = other.chat_template
    other.chat_template = template + " "
    with pytest.raises(DataError, match=r"prepared with chat template of digest \w{32}, this run's has \w{32}"):
        prepare_dataset(prepared, other, max_length=64)
    other.chat_template = template
    other.add_tokens("<more>")
    with pytest.raises(DataError, match=r"prepared with tokenizer of digest \w{32}, this run's has \w{32}"):
        prepare_dataset(prepared, other, max_length=64)


def test_a_damaged_folder_is_named(prepared, data_file, tokenizer):
    with pytest.raises(DataError, match="a prepared folder stands alone"):
        prepare_dataset([prepared, data_file], tokenizer, max_length=64)
    record = json.loads((prepared / PREPARED).read_text())
    record["report"]["rows"] += 1
    (prepared / PREPARED).write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"prepared\.json: is not what was written there; prepare it again\.$"):
        prepare_dataset(prepared, tokenizer, max_length=64)
    with pytest.raises(DataError, match="a damaged prepared folder; prepare it again"):
        module.require_made_for([str(prepared)], tokenizer, LABELLING)
    (prepared / PREPARED).write_text(json.dumps(with_checksum(record)))
    with pytest.raises(DataError, match=r"damaged prepared folder .*kept is 49, its rows have 48.*; prepare it again"):
        prepare_dataset(prepared, tokenizer, max_length=64)
    (prepared / PREPARED).write_text("{}")
    with pytest.raises(DataError, match="a damaged prepared folder"):
        prepare_dataset(prepared, tokenizer, max_length=64)


def test_nothing_is_left_of_what_fails_and_nothing_of_others_is_replaced(tokenizer, tmp_path):
    bad = write(tmp_path / "bad.jsonl", [chat(ASK, ANSWER), {}])
    with pytest.raises(DataError, match="1 invalid rows"):
        prepare(bad, tmp_path / "out", tokenizer, LABELLING)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out already exists; choose another folder"):
        prepare(bad, tmp_path / "out", tokenizer, LABELLING, allow_rejects=True, overwrite=True)


def _add_a_note(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def _put_another_record(folder: Path) -> None:
    (folder / PREPARED).write_text('{"dinner": "prepared"}')


def _put_a_folder(folder: Path) -> None:
    (folder / "cache-mine.arrow").mkdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_add_a_note, r"holds notes\.txt, which is not of it"),
        (_put_another_record, r"its prepared\.json is none of ours"),
        (_put_a_folder, r"holds cache-mine\.arrow, which is not of it"),
    ],
)
def test_overwriting_removes_nothing_of_others(change, message, prepared, data_file, tokenizer):
    change(prepared)
    before = sorted(prepared.rglob("*"))
    with pytest.raises(DataError, match=message):
        prepare(data_file, prepared, tokenizer, LABELLING, overwrite=True)
    assert sorted(prepared.rglob("*")) == before


def test_a_link_is_not_followed(prepared, data_file, tokenizer, tmp_path):
    (tmp_path / "link").symlink_to(prepared)
    with pytest.raises(DataError, match="link already exists; choose another folder"):
        prepare(data_file, tmp_path / "link", tokenizer, LABELLING, overwrite=True)


def test_rows_that_were_edited_are_not_trained_on(prepared, data_file, tokenizer):
    (data,) = prepared.glob("data-*.arrow")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(DataError, match=r"data-.*arrow: is not what was prepared there; prepare it again"):
        prepare_dataset(prepared, tokenizer, max_length=64)
    prepare(data_file, prepared, tokenizer, LABELLING, overwrite=True)
    prepare_dataset(prepared, tokenizer, max_length=64)


def nested(depth: int) -> list[Any]:
    """Deeper than pickle goes."""
    return [nested(depth - 1)] if depth else []


def change_meanwhile(monkeypatch, path, rows, *, put_back):
    """While the file is read, other rows are in it."""
    tokenize = module.tokenize_checked

    def with_other_rows(*args):
        before = path.read_bytes()
        write(path, rows)
        yield from tokenize(*args)
        if put_back:
            path.write_bytes(before)

    monkeypatch.setattr(module, "tokenize_checked", with_other_rows)


@pytest.mark.parametrize("put_back", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["prepare", "cache"])
def test_what_was_not_digested_is_not_kept_under_its_digest(shared, put_back, tokenizer, tmp_path, monkeypatch):
    """Else every later run on the file as it was would train on rows that were never in it."""
    path = write(tmp_path / "data.jsonl", [chat(ASK, ANSWER)] * 5)
    loader = Loader(Cache(tmp_path / "cache"), tokenizer)

    def tokens():
        if shared:
            return loader.open([str(path)], LABELLING).dataset["input_ids"][:]
        prepare(path, tmp_path / "out", tokenizer, LABELLING)
        return prepare_dataset(tmp_path / "out", tokenizer, max_length=64)[0]["input_ids"][:]

    with monkeypatch.context() as change:
        change_meanwhile(change, path, [chat(("user", "What?"), ("assistant", "WRONG"))] * 4, put_back=put_back)
        with pytest.raises(DataError, match=rf"^{path}: changed while it was read; run it again"):
            tokens()
    left = {found.name for found in tmp_path.glob("*") if found.is_dir()}
    assert left == ({"cache"} if shared else set())
    assert not [*(tmp_path / "cache").glob("tokens-*")]
    write(path, [chat(ASK, ANSWER)] * 5)
    assert tokens() == prepare_dataset(path, tokenizer, max_length=64)[0]["input_ids"][:]


def test_bytes_are_compared_where_the_system_tells_nothing(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "data.jsonl", [chat(ASK, ANSWER)] * 5)
    monkeypatch.setattr(sources, "_state", lambda path, **_: sources._State(0, 0, 0, 0))
    change_meanwhile(monkeypatch, path, [chat(("user", "What?"), ("assistant", "WRONG"))] * 4, put_back=False)
    with pytest.raises(DataError, match=r"data\.jsonl: changed while it was read"):
        prepare(path, tmp_path / "out", tokenizer, LABELLING)


def _replace_link(place: Path, old: Path, new: Path) -> tuple[Path, Callable[[], None], Callable[[], None]]:
    """A link that is put over another one, as a new version of data often is."""

    def point(target: Path) -> None:
        (place / "link").symlink_to(target / "data.jsonl")
        (place / "link").replace(place / "data.jsonl")

    point(old)
    return place / "data.jsonl", lambda: point(new), lambda: point(old)


def _rename_folders(place: Path, old: Path, new: Path) -> tuple[Path, Callable[[], None], Callable[[], None]]:
    def swap() -> None:
        old.rename(place / "third")
        new.rename(old)
        (place / "third").rename(new)

    return old / "data.jsonl", swap, swap


def _link_in_a_folder(place: Path, old: Path, new: Path) -> tuple[Path, Callable[[], None], Callable[[], None]]:
    (place / "folder").mkdir()
    _, away, back = _replace_link(place / "folder", old, new)
    return place / "folder", away, back


def _rename_in_a_folder(place: Path, old: Path, new: Path) -> tuple[Path, Callable[[], None], Callable[[], None]]:
    (place / "folder").mkdir()
    (place / "other").mkdir()
    old, new = old.rename(place / "folder" / "old"), new.rename(place / "other" / "new")
    return place / "folder", *_rename_folders(place, old, new)[1:]


@pytest.mark.parametrize("flip", [_replace_link, _rename_folders, _link_in_a_folder, _rename_in_a_folder])
def test_rows_are_of_the_file_that_was_digested_whatever_its_path_names_for_a_while(
    flip, tokenizer, tmp_path, monkeypatch
):
    """The path names another file while rows are read, and the one that was digested before and after."""
    for name, answer in (("old", "Old."), ("new", "New.")):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "data.jsonl", [chat(ASK, ("assistant", answer))])
    place, away, back = flip(tmp_path, tmp_path / "old", tmp_path / "new")
    loader, check = Loader(Cache(tmp_path / "cache"), tokenizer), module.check_rows

    def meanwhile(*args, **settings):
        away()
        try:
            yield from [*check(*args, **settings)]
        finally:
            back()

    with monkeypatch.context() as change:
        change.setattr(module, "check_rows", meanwhile)
        with pytest.raises(DataError, match=r": changed while it was read; run it again"):
            loader.open([str(place)], LABELLING)
    assert (
        loader.open([str(place)], LABELLING).dataset["input_ids"][:]
        == (prepare_dataset(place, tokenizer, max_length=64)[0]["input_ids"][:])
    )


def test_the_bytes_are_of_the_file_whose_state_is_noted(tokenizer, tmp_path, monkeypatch):
    """It is replaced after it was opened to be digested: its rows would be those of the next one."""
    path, state_of = write(tmp_path / "data.jsonl", [chat(ASK, ANSWER)]), sources._state

    def replaced_after(place, **settings):
        state = state_of(place, **settings)
        if isinstance(place, int) and not (tmp_path / "old.jsonl").exists():
            path.rename(tmp_path / "old.jsonl")
            write(path, [chat(ASK, ("assistant", "WRONG"))])
        return state

    monkeypatch.setattr(sources, "_state", replaced_after)
    with pytest.raises(DataError, match=r"data\.jsonl: changed while it was read"):
        prepare(path, tmp_path / "out", tokenizer, LABELLING)


def test_no_part_is_kept_of_a_file_that_has_changed(tokenizer, tmp_path, monkeypatch):
    """One that is killed then would else go on with it."""
    path = write(tmp_path / "data.jsonl", [chat(ASK, ANSWER)] * 20)
    write_part, written = module._write_part, []

    def change_after(folder, number, *args):
        write_part(folder, number, *args)
        written.append(number)
        if number == 1:
            write(path, [chat(ASK, ANSWER)] * 21)

    monkeypatch.setattr(module, "_PART_ROWS", 4)
    monkeypatch.setattr(module, "_write_part", change_after)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(path, tmp_path / "out", tokenizer, LABELLING)
    assert written == [0, 1]


def _change_tokens(record: dict[str, Any]) -> None:
    record["report"]["tokens"] ^= 1


def _be_text(record: dict[str, Any]) -> None:
    record["report"]["tokens"] = "many"


def _forget_rejects(record: dict[str, Any]) -> None:
    record["report"]["rows"] -= len(record["report"].pop("rejects"))
    record["report"]["rejects"] = []


def _forget_truncation(record: dict[str, Any]) -> None:
    record["report"]["truncated"] = 0


def _forget_places(record: dict[str, Any]) -> None:
    record["places"] = []


def _move_a_reject(record: dict[str, Any]) -> None:
    record["report"]["rejects"][0]["source"] = "nowhere:1"


def _forget_files(record: dict[str, Any]) -> None:
    record["files"] = {}


_TOLD_BY_THE_ROWS = [_change_tokens, _be_text, _forget_truncation, _forget_places, _move_a_reject]


@pytest.mark.parametrize(
    ("change", "sealed"),
    [
        *((change, True) for change in _TOLD_BY_THE_ROWS),
        *((change, False) for change in (*_TOLD_BY_THE_ROWS, _forget_rejects, _forget_files)),
        (lambda record: record.pop("checksum"), False),
    ],
)
def test_a_record_that_was_changed_is_made_again(change, sealed, tokenizer, tmp_path, caplog):
    """Whatever of it is, it is what is said of the rows; the rejects decide whether a run is refused."""
    path = write(tmp_path / "data.jsonl", [chat(ASK, ANSWER), {}, chat(ASK, ("assistant", "long " * 40))])
    loader = Loader(Cache(tmp_path / "cache"), tokenizer, allow_rejects=True)
    report = loader.open([str(path)], LABELLING).report
    assert (report.truncated, len(report.rejects)) == (1, 1)
    (file,) = (tmp_path / "cache").glob("tokens-*/prepared.json")
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(with_checksum(record) if sealed else record))
    assert loader.open([str(path)], LABELLING).report == report
    assert "It is made again." in caplog.text
    caplog.clear()
    assert loader.open([str(path)], LABELLING).report == report
    assert "again" not in caplog.text


def _say_relative(folder: Path, rows: Path) -> None:
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: ../{rows.name}\n---\n")


def _say_absolute(folder: Path, rows: Path) -> None:
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {rows}\n---\n")


def _save_state(folder: Path, rows: Path) -> None:
    """As `save_to_disk` does, of a table that lies outside the folder."""
    table = rows.with_suffix("")
    Dataset.from_list([json.loads(line) for line in rows.read_text().splitlines()]).save_to_disk(str(table))
    for name in ("state.json", "dataset_info.json"):
        shutil.copy(table / name, folder)
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": f"../{table.name}/{entry['filename']}"} for entry in state["_data_files"]]
    state["_fingerprint"] = "the same"
    (folder / "state.json").write_text(json.dumps(state, sort_keys=True))


@pytest.mark.parametrize("refer", [_say_relative, _say_absolute, _save_state])
def test_rows_of_a_folder_that_lie_outside_it_are_digested(refer, tokenizer, tmp_path):
    """Else the next run would train on what they were."""
    folder, rows = tmp_path / "folder", tmp_path / "rows.jsonl"
    folder.mkdir()
    loader = Loader(Cache(tmp_path / "cache"), tokenizer)

    def tokens():
        refer(folder, rows)
        return loader.open([str(folder)], LABELLING).dataset["input_ids"][:]

    for answer in ("Old.", "New."):
        write(rows, [chat(ASK, ("assistant", answer))])
        assert tokens() == prepare_dataset(rows, tokenizer, max_length=64)[0]["input_ids"][:]
    before = sources.read_content([str(folder)])
    write(rows, [chat(ASK, ("assistant", "Newest."))])
    refer(folder, rows)
    with pytest.raises(DataError, match=r"rows\S+: changed while it was read"):
        before.require_same()


def test_rows_of_a_folder_that_come_from_elsewhere_are_refused(tokenizer, tmp_path):
    """Nothing of theirs could be compared."""
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as file:
        file.writestr("rows.jsonl", json.dumps(chat(ASK, ANSWER)) + "\n")
    _say_absolute(tmp_path / "folder", f"zip://rows.jsonl::{tmp_path}/rows.zip")
    with pytest.raises(DataError, match=r"folder: its rows come from zip://rows\.jsonl::\S+, which is no file of this"):
        Loader(Cache(tmp_path / "cache"), tokenizer).open([str(tmp_path / "folder")], LABELLING)


@pytest.mark.parametrize("name", ["./data.jsonl", ".//data.jsonl", "sub/../data.jsonl"])
def test_rejects_are_found_whatever_a_file_is_called(name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    write(tmp_path / "data.jsonl", [chat(ASK, ANSWER), {}, chat(ASK, ("assistant", "long " * 9))])
    made = prepare(name, "out", tokenizer, Labelling(max_length=12), allow_rejects=True)
    rejects = prepare_dataset(name, tokenizer, max_length=12, allow_rejects=True)[1].rejects
    assert made.report.rejects == rejects
    assert rejects[0].source == f"{name}:2"
    loader = Loader(Cache(tmp_path / "cache"), tokenizer, allow_rejects=True)
    for place in (name, "data.jsonl"):  # the second opens what the first made
        assert loader.open([place], Labelling(max_length=12)).report.rejects[0].source == f"{place}:2"


def test_a_disk_that_fails_is_no_damage(data_file, prepared, tokenizer, tmp_path):
    """The entry stays where it is: another machine, or another user, may well read it."""
    loader = Loader(Cache(tmp_path / "cache"), tokenizer)
    loader.open([str(data_file)], LABELLING)
    (entry,) = (tmp_path / "cache").iterdir()
    for folder in (entry, prepared):
        (folder / "rows.arrow").unlink()
        (folder / "rows.arrow").symlink_to("/proc/self/mem")  # of which the first byte cannot be read
    message = rf"^dataset_cache_dir {tmp_path}/cache: .*rows\.arrow: Input/output error\. Ask .*chmod -R a\+rX .*tokens"
    with pytest.raises(CacheError, match=message):
        loader.open([str(data_file)], LABELLING)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [entry.name]
    with pytest.raises(DataError, match=r"^\S+rows\.arrow: Input/output error\.$"):
        prepare_dataset(prepared, tokenizer, max_length=64)


def test_the_command(data_file, model_dir, tmp_path):
    options = ["--model", model_dir, "--max-length", 64]
    status, out, _ = sft("prepare", data_file, tmp_path / "out", *options)
    assert (status, out.startswith(f"{tmp_path}/out: 48 of 48 rows")) == (0, True)
    assert sft("prepare", data_file, tmp_path / "out", *options)[0] == 2
    shutil.copy(data_file, tmp_path / "copy.jsonl")
    status, out, _ = sft("prepare", tmp_path / "copy.jsonl", tmp_path / "out", *options, "--overwrite", "--json")
    assert status == 0
    assert json.loads(out)["fingerprint"] == json.loads((tmp_path / "out" / PREPARED).read_text())["fingerprint"]
