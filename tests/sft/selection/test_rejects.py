# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Rows that are not taken are written with what dropped them and why; an edited or interrupted file is noticed."""

import base64
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from sft.selection import SelectionError, SelectionSettings, select_conversations
from sft.selection.rejects import EXAMPLES, read_rejects, sample_rejects
from sft.selection.stages import StageFiles
from teleflm.reports.page import write_report_files
from teleflm.reports.selection import write_report

from .conftest import chat, write_rows
from .test_pipeline import run, selected

SETTINGS = SelectionSettings(count=60)
ROWS = 400


@pytest.fixture(scope="module", autouse=True)
def small_pieces():
    """Several parts even of a small corpus."""
    from sft.selection import rows

    patch = pytest.MonkeyPatch()
    patch.setattr(rows, "PIECE_ROWS", 150)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def corpus_file(corpus, tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "corpus.jsonl", corpus[:ROWS])


@pytest.fixture
def stages_only(out, tmp_path) -> Path:
    """All stages are done, and no file is written."""
    shutil.copytree(out / "stages", tmp_path / "out/stages")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def out(corpus_file, tmp_path_factory) -> Path:
    """A finished selection, with its rejects."""
    folder = tmp_path_factory.mktemp("rejects") / "out"
    select_conversations(corpus_file, folder, SETTINGS, rejects=True)
    return folder


def rejected(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]


def test_every_row_is_in_one_of_the_two_files(out, corpus_file):
    came = corpus_file.read_text().splitlines()
    written = {name: (out / name).read_text().splitlines() for name in ("selected.jsonl", "rejects.jsonl")}
    found = Counter(line[: line.index(', "teleflm_')] + "}" for lines in written.values() for line in lines)
    assert found == Counter(came), "byte for byte"
    once = [line for line, count in Counter(came).items() if count == 1]
    for lines in written.values():
        places = [
            once.index(line) for line in (line[: line.index(', "teleflm_')] + "}" for line in lines) if line in once
        ]
        assert places == sorted(places), "in the order of the input"
        assert len(places) > 50
    summary = json.loads((out / "selection.json").read_text())
    reasons = Counter((row["teleflm_operator"], row["teleflm_reason"]) for row in rejected(out))
    names = ["rows", *(entry["operator"] for entry in summary["pipeline"]["operators"])]
    stages = {stage["name"]: stage["dropped"] for stage in summary["stages"]}
    told = {(name, reason): n for name in names for reason, n in stages.get(name, {}).items()}
    told |= {("clusters", reason): n for reason, n in stages["selection"].items()}
    assert reasons == told
    assert summary["rejects"]["rows"] == len(rejected(out))


def test_duplicates_name_the_row_they_repeat(out, corpus):
    rows = [*selected(out), *rejected(out)]
    groups = {row["teleflm_id"]: row["group"] for row in rows if "teleflm_id" in row}  # a row that is invalid has none
    duplicates = [row for row in rejected(out) if row["teleflm_reason"].endswith("duplicate")]
    assert {row["teleflm_reason"] for row in duplicates} == {"exact_duplicate", "near_duplicate"}
    for row in duplicates:
        assert groups[row["teleflm_duplicate_of"]] == row["group"]
        assert (row["teleflm_duplicate_of"] == row["teleflm_id"]) is (row["teleflm_reason"] == "exact_duplicate")
    assert not any("teleflm_duplicate_of" in row for row in rejected(out) if row not in duplicates)


def test_what_cannot_hold_columns_comes_back_all_the_same(tmp_path):
    latin = "grüße".encode("latin-1")
    lines = [b'{"broken": ', b'["no object"]', b"{}", b'{"text" : "no conversation" , "n": 1.50}', latin]
    lines.append(json.dumps({"messages": chat("Who was it?", "It was the wind."), "teleflm_reason": "old"}).encode())
    lines.append(json.dumps({"messages": chat("Who was it?", "It was the wind.")}).encode())
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(lines))
    select_conversations(tmp_path / "data.jsonl", tmp_path / "out", SelectionSettings(count=1), rejects=True)
    found = rejected(tmp_path / "out")
    assert [row.get("teleflm_text") for row in found] == ['{"broken": ', '["no object"]', "{}", None, None, None]
    assert {row["teleflm_operator"] for row in found[:5]} == {"rows"}
    raw = (tmp_path / "out/rejects.jsonl").read_bytes().splitlines()
    assert raw[3].startswith(lines[3][:-1] + b', "teleflm_operator": "rows", "teleflm_reason": "missing_columns"')
    assert base64.b64decode(found[4]["teleflm_base64"]) == latin
    assert found[5]["teleflm_reason"] == "exact_duplicate"
    assert "teleflm_detail" in found[0]
    assert "teleflm_id" not in found[0]


def test_workers_write_the_same(out, corpus_file, tmp_path):
    select_conversations(corpus_file, tmp_path / "out", SETTINGS, rejects=True, workers=2)
    assert (tmp_path / "out/rejects.jsonl").read_bytes() == (out / "rejects.jsonl").read_bytes()


# --- asked for later, again, or after an interruption -----------------------------------------------------------------


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.is_file()}


def test_they_can_be_asked_for_later(out, stages_only, corpus_file):
    here = stages_only
    select_conversations(corpus_file, here, SETTINGS)
    before = times(here)
    assert not (here / "rejects.jsonl").exists()
    selection = select_conversations(corpus_file, here, SETTINGS, rejects=True)
    assert (selection.already_done, selection.rejects) == (False, str(here / "rejects.jsonl"))
    assert times(here)["selected.jsonl"] == before["selected.jsonl"], "what is there stays"
    assert (here / "rejects.jsonl").read_bytes() == (out / "rejects.jsonl").read_bytes()
    before = times(here)
    for asked in (True, False):
        assert select_conversations(corpus_file, here, SETTINGS, rejects=asked).already_done is True
    assert times(here) == before
    (here / "rejects.jsonl").unlink()
    assert select_conversations(corpus_file, here, SETTINGS, rejects=True).already_done is False
    assert (here / "rejects.jsonl").read_bytes() == (out / "rejects.jsonl").read_bytes()


def _edit(out: Path) -> None:
    text = (out / "rejects.jsonl").read_text()
    (out / "rejects.jsonl").write_text(text.replace("a", "A", 1))


def _link(out: Path) -> None:
    (out / "rejects.jsonl").rename(out.parent / "mine.jsonl")
    (out / "rejects.jsonl").symlink_to("../mine.jsonl")


def _replace(out: Path) -> None:
    (out / "rejects.jsonl").write_text("mine\n")


@pytest.mark.parametrize("change", [_edit, _link, _replace])
@pytest.mark.parametrize("asked", [True, False])
def test_what_a_selection_did_not_write_is_in_the_way(change, asked, out, corpus_file, tmp_path):
    here = tmp_path / "out"
    shutil.copytree(out, here)
    change(here)
    before = (here / "rejects.jsonl").read_bytes()
    with pytest.raises(SelectionError, match=r"rejects\.jsonl: is not what a selection wrote there; .*--overwrite"):
        select_conversations(corpus_file, here, SETTINGS, rejects=asked)
    assert (here / "rejects.jsonl").read_bytes() == before
    select_conversations(corpus_file, here, SETTINGS, rejects=asked, overwrite=True)
    assert (here / "rejects.jsonl").read_bytes() == (out / "rejects.jsonl").read_bytes()
    assert not (here / "rejects.jsonl").is_symlink()
    assert select_conversations(corpus_file, here, SETTINGS, rejects=asked).already_done is True


def test_a_file_of_the_user_is_left_alone_unless_they_are_asked_for(stages_only, corpus_file):
    (stages_only / "rejects.jsonl").write_text("mine\n")
    select_conversations(corpus_file, stages_only, SETTINGS)
    assert (stages_only / "rejects.jsonl").read_text() == "mine\n"
    with pytest.raises(SelectionError, match=r"rejects\.jsonl: is not what a selection wrote there"):
        select_conversations(corpus_file, stages_only, SETTINGS, rejects=True)
    assert (stages_only / "rejects.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_a_kill_between_the_files_is_no_obstacle(killed_after, out, stages_only, corpus_file, monkeypatch):
    """The files are put in place one after another; the one that is killed before the first left nothing."""
    replace, done = Path.replace, []

    def stop(path: Path, target: Path) -> Path:
        if len(done) == killed_after:
            raise KeyboardInterrupt
        done.append(path.name)
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            select_conversations(corpus_file, stages_only, SETTINGS, rejects=True)
    assert done == ["selected.jsonl.partial", "rejects.jsonl.partial"][:killed_after]
    select_conversations(corpus_file, stages_only, SETTINGS, rejects=True)
    for name in ("selected.jsonl", "rejects.jsonl"):
        assert (stages_only / name).read_bytes() == (out / name).read_bytes()
    assert not list(stages_only.glob("*.partial"))


def test_another_selection_takes_their_place(out, corpus_file, tmp_path):
    here = tmp_path / "out"
    shutil.copytree(out, here)
    select_conversations(corpus_file, here, SelectionSettings(count=30), overwrite=True)
    assert not (here / "rejects.jsonl").exists(), "of the selection before"
    assert "rejects" not in json.loads((here / "selection.json").read_text())


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_a_few_of_each_reason_are_shown(out, corpus_file, tmp_path):
    selection = select_conversations(corpus_file, out, SETTINGS)
    names = SETTINGS.declaration.stage_operators
    samples = sample_rejects(read_rejects(StageFiles.open(out / "stages"), names))
    counts = {(names[n], reason): c for n, stage in enumerate(selection.stages) for reason, c in stage.dropped.items()}
    assert {key: len(rows) for key, rows in samples.items()} == {key: min(EXAMPLES, n) for key, n in counts.items()}
    write_report(selection, SETTINGS, tmp_path / "report")
    page = (tmp_path / "report/index.html").read_text()
    for (operator, reason), found in samples.items():
        assert f"{operator}: <code>{reason}</code>" in page
        for row in found:
            assert row.source.rpartition("/")[2] in page
    for text in (page, (tmp_path / "report/selection.json").read_text()):
        assert str(corpus_file.parent) not in text
        assert str(out) not in text


def test_the_command(lines, tmp_path):
    data = lines(*({"messages": chat(f"Where is {n}?", f"Here {n}")} for n in range(10)))
    status, output = run(data, tmp_path / "out", "-n", 4, "--workers", 1, "--rejects")
    assert status == 0, output
    assert "Rejects: " in output
    assert [row["teleflm_reason"] for row in rejected(tmp_path / "out")] == ["not_selected"] * 6


def test_a_report_of_rows_with_half_of_a_surrogate_pair(corpus, tmp_path):
    """Such a row is rejected, but it is shown, and a file in UTF-8 cannot hold what it says."""
    half = "half of a pair: \ud800."
    rows = [*corpus[:20], {"messages": chat("What?", half)}, {"messages": chat(half, "That.")}, {"messages": half}]
    data = write_rows(tmp_path / "data.jsonl", rows)
    arguments = (data, tmp_path / "out", "-n", 10, "--rejects", "--report", tmp_path / "report", "--workers", 1)
    status, output = run(*arguments)
    assert status == 0, output
    assert r"half of a pair: \ud800." in (tmp_path / "report/index.html").read_text(encoding="utf-8")
    json.loads((tmp_path / "report/selection.json").read_text(encoding="utf-8"))


def test_every_page_and_its_numbers_are_utf_8(tmp_path):
    (tmp_path / "page.jinja").write_text("<p>{{ told }}</p>")
    told = "\ud800 é <b> 猫 🐈 \udfff"
    write_report_files(tmp_path / "report", tmp_path / "page.jinja", {}, ("numbers.json", {"told": told}), told=told)
    assert (tmp_path / "report/index.html").read_text("utf-8") == r"<p>\ud800 é &lt;b&gt; 猫 🐈 \udfff</p>"
    assert json.loads((tmp_path / "report/numbers.json").read_text("utf-8")) == {"told": told}
