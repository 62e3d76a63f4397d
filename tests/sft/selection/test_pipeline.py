# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The whole selection: what it writes, that it goes on and comes out the same, and what it refuses."""

import json
import os
import re
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from sft.data.formats import DataError
from sft.selection import SelectionError, SelectionSettings, select_conversations
from sft.selection.executors import open_executor
from sft.selection.stages import Workspace
from teleflm.commands.sft import app
from teleflm.reports.selection import EXAMPLES, write_report

from .conftest import chat

QUOTA = {"math": 0.25, "code": 0.25, "multi_turn": 0.25, "general": 0.25}
SETTINGS = SelectionSettings(count=120, quota=QUOTA, allow_fewer=True)  # the corpus may lack a domain


def selected(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "selected.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def small_pieces():
    """Several parts even of a small corpus."""
    from sft.selection import rows

    patch = pytest.MonkeyPatch()
    patch.setattr(rows, "PIECE_ROWS", 300)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def out(corpus_file, tmp_path_factory) -> Path:
    """A finished selection."""
    folder = tmp_path_factory.mktemp("selection") / "out"
    select_conversations(corpus_file, folder, SETTINGS)
    return folder


# --- what it writes ---------------------------------------------------------------------------------------------------


def test_rows_come_out_as_they_came(out, corpus):
    chosen = selected(out)
    assert len(chosen) == 120
    keys = {json.dumps(row) for row in corpus}
    places = [corpus.index({name: row[name] for name in corpus[0]}) for row in chosen]
    assert places == sorted(places), "in the order of the input"
    for row in chosen:
        assert json.dumps({name: row[name] for name in corpus[0]}) in keys
        assert len(row["teleflm_id"]) == 32
        assert "teleflm_score" not in row, "without a model there is none"
    assert len({row["teleflm_id"] for row in chosen}) == len(chosen)
    domains = Counter(row["teleflm_domain"] for row in chosen)
    summary = json.loads((out / "selection.json").read_text())
    assert summary["domains"] == dict(domains)


def test_no_copy_is_selected_with_its_original(out):
    groups = Counter(row["group"] for row in selected(out))
    assert max(groups.values()) == 1


def test_every_row_is_accounted_for(out, corpus):
    stages = json.loads((out / "selection.json").read_text())["stages"]
    assert stages[0]["rows_in"] == len(corpus)
    for stage, following in pairwise(stages):
        assert stage["rows_in"] - sum(stage["dropped"].values()) == stage["rows_out"] == following["rows_in"]
    assert stages[-1]["rows_out"] == 120
    for stage, folder in zip(stages, sorted((out / "stages").iterdir()), strict=True):
        marker = json.loads((folder / "_stage.json").read_text())
        assert {"digest", "seed", "settings", "versions"} <= marker.keys()
        assert pq.read_table(folder, columns=["drop"])["drop"].null_count == stage["rows_out"]
        assert stage["parts"] == len(list(folder.glob("*.parquet"))) > 1


def test_the_summary_names_no_place(corpus_file, out):  # nor with a model: test_a_models_embeddings
    assert str(corpus_file.parent) not in (out / "selection.json").read_text()


def test_an_own_id_stays(lines, tmp_path):
    data = lines({"id": "mine", "messages": chat("Who was that?", "Nobody in particular.")})
    select_conversations(data, tmp_path / "out", SelectionSettings(count=1))
    assert selected(tmp_path / "out")[0]["id"] == "mine"


def test_layouts_and_invalid_rows(lines, tmp_path):
    data = lines(
        {"conversations": [{"from": "human", "value": "Who was it?"}, {"from": "gpt", "value": "It was the wind."}]},
        {"instruction": "Name a colour", "output": "Green is a colour."},
        {"prompt": "Name an animal", "completion": "Otters are animals."},
        {"messages": []},
        ["no object"],
        {"messages": chat("Name a colour", "Green is a colour.")},
    )
    selection = select_conversations(data, tmp_path / "out", SelectionSettings(count=3))
    assert selection.stages[0].dropped == {"no_messages": 1, "not_an_object": 1}
    assert selection.stages[1].dropped == {"exact_duplicate": 1}
    assert [next(iter(row)) for row in selected(tmp_path / "out")] == ["conversations", "instruction", "prompt"]


# --- the same again ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_any_number_of_workers_selects_the_same(out, corpus, corpus_file, tmp_path):
    """With two workers parts of two files are made out of order; one file whole or in two is another input, though."""
    select_conversations(corpus_file, tmp_path / "out", SETTINGS, workers=2)
    assert (tmp_path / "out/selected.jsonl").read_bytes() == (out / "selected.jsonl").read_bytes()
    for folder in sorted((out / "stages").iterdir()):
        for part in folder.glob("*.parquet"):
            assert pq.read_table(part).equals(pq.read_table(tmp_path / "out/stages" / folder.name / part.name))


def test_a_finished_selection_is_not_done_again(out, corpus_file):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    selection = select_conversations(corpus_file, out, SETTINGS)
    assert (selection.already_done, selection.count) == (True, 120)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("stage", range(1, 10))
def test_an_interrupted_selection_goes_on(stage, out, corpus_file, tmp_path):
    """Killed in the middle of a stage: its first part is there, its marker and all that comes later is not."""
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out/selection.json").unlink()
    (tmp_path / "out/selected.jsonl").unlink()
    folders = sorted((tmp_path / "out/stages").iterdir())
    kept = sorted(folders[stage - 1].glob("*.parquet"))
    for path in [folders[stage - 1] / "_stage.json", *kept[1:]]:
        path.unlink()
    for folder in folders[stage:]:
        shutil.rmtree(folder)
    (folders[stage - 1] / "00000-00001.77.partial").write_bytes(b"half a part")
    ran = []
    select_conversations(corpus_file, tmp_path / "out", SETTINGS, notify=ran.append)
    assert (tmp_path / "out/selected.jsonl").read_bytes() == (out / "selected.jsonl").read_bytes()


def test_only_missing_parts_are_made(out, corpus_file, tmp_path):
    shutil.copytree(out, tmp_path / "out")
    folder = tmp_path / "out/stages/04-sketches"
    (folder / "_stage.json").unlink()
    kept, *lost = sorted(folder.glob("*.parquet"))
    for part in lost:
        part.unlink()
    before = kept.stat().st_mtime_ns
    select_conversations(corpus_file, tmp_path / "out", SETTINGS)
    assert kept.stat().st_mtime_ns == before


def test_nothing_looks_finished_before_it_is(corpus_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Workspace, "read", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        select_conversations(corpus_file, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out/selection.json").exists()


# --- another configuration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 100}, r"09-selection: of another configuration: count was 120, is 100; --overwrite"),
        ({"seed": 1}, r"01-rows: of another configuration: seed was 0, is 1; --overwrite"),
        ({"method": "random"}, r"03-common-text: of another configuration, which has here domains; --overwrite"),
        ({"domain_column": "kind"}, r"06-domains: of another configuration: column was None, is kind; --overwrite"),
    ],
)
def test_another_configuration_is_refused(changes, message, out, corpus_file):
    before = (out / "selected.jsonl").read_bytes()
    with pytest.raises(SelectionError, match=message):
        select_conversations(corpus_file, out, SelectionSettings(**{**vars(SETTINGS), **changes}))
    assert (out / "selected.jsonl").read_bytes() == before


def test_other_data_is_refused(out, lines):
    with pytest.raises(
        SelectionError, match=r"01-rows: of another configuration: files was .*corpus.jsonl.*data.jsonl"
    ):
        select_conversations(lines({"messages": chat("a", "b")}), out, SETTINGS)


def test_overwrite_keeps_what_both_have_in_common(out, corpus_file, tmp_path):
    shutil.copytree(out, tmp_path / "out")
    sketches = tmp_path / "out/stages/04-sketches/00000-00000.parquet"
    before = sketches.stat().st_mtime_ns
    fewer = SelectionSettings(count=50, quota=QUOTA, allow_fewer=True)
    select_conversations(corpus_file, tmp_path / "out", fewer, overwrite=True)
    assert sketches.stat().st_mtime_ns == before
    select_conversations(corpus_file, tmp_path / "fresh", fewer)
    assert selected(tmp_path / "out") == selected(tmp_path / "fresh")


# --- what is in the way -----------------------------------------------------------------------------------------------


def _edit_a_row(out: Path) -> None:
    text = (out / "selected.jsonl").read_text()
    (out / "selected.jsonl").write_text(text.replace("a", "A", 1))  # as long as before


def _add_a_row(out: Path) -> None:
    with (out / "selected.jsonl").open("a") as file:
        file.write("my own note\n")


def _edit_the_summary(out: Path) -> None:
    summary = json.loads((out / "selection.json").read_text())
    (out / "selection.json").write_text(json.dumps({**summary, "count": 121}))


def _lose_the_summary(out: Path) -> None:
    (out / "selection.json").unlink()


def _put_another_summary(out: Path) -> None:
    (out / "selection.json").write_text('{"digest": "mine"}')


def _put_deep_json(out: Path) -> None:
    (out / "selection.json").write_text('{"a":' * 5000)


def _link_to_the_rows(out: Path) -> None:
    (out / "selected.jsonl").rename(out.parent / "mine.jsonl")
    (out / "selected.jsonl").symlink_to("../mine.jsonl")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_edit_a_row, "selected.jsonl"),
        (_add_a_row, "selected.jsonl"),
        (_edit_the_summary, "selection.json"),
        (_lose_the_summary, "selected.jsonl"),
        (_put_another_summary, "selection.json"),
        (_put_deep_json, "selection.json"),
        (_link_to_the_rows, "selected.jsonl"),
    ],
)
def test_what_a_selection_did_not_write_is_in_the_way(change, name, out, corpus_file, tmp_path):
    here = tmp_path / "out"
    shutil.copytree(out, here)
    change(here)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SelectionError, match=rf"{here}/{name}: is not what a selection wrote there; .*--overwrite"):
        select_conversations(corpus_file, here, SETTINGS)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert select_conversations(corpus_file, here, SETTINGS, overwrite=True).already_done is False
    assert (here / "selected.jsonl").read_bytes() == (out / "selected.jsonl").read_bytes()
    assert not (here / "selected.jsonl").is_symlink()
    assert select_conversations(corpus_file, here, SETTINGS).already_done is True
    if change is _link_to_the_rows:
        assert (tmp_path / "mine.jsonl").exists()


def test_a_file_of_the_user_is_seen_before_any_work(corpus_file, tmp_path):
    (tmp_path / "selected.jsonl").write_text("mine\n")
    with pytest.raises(SelectionError, match=r"selected\.jsonl: is not what a selection wrote there"):
        select_conversations(corpus_file, tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["selected.jsonl"]


def test_rows_that_are_lost_are_written_again(out, corpus_file, tmp_path):
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out/selected.jsonl").unlink()
    assert select_conversations(corpus_file, tmp_path / "out", SETTINGS).already_done is False
    assert (tmp_path / "out/selected.jsonl").read_bytes() == (out / "selected.jsonl").read_bytes()


def test_rows_of_another_configuration_are_in_the_way_without_their_stages_too(out, corpus_file, tmp_path):
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/stages")
    fewer = SelectionSettings(count=50, quota=QUOTA, allow_fewer=True)
    with pytest.raises(SelectionError, match=r"selected\.jsonl: is of another configuration; --overwrite"):
        select_conversations(corpus_file, tmp_path / "out", fewer)


def test_a_kill_between_the_two_files_is_no_obstacle(out, corpus_file, tmp_path):
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out/selection.json").rename(tmp_path / "out/selection.json.partial")
    select_conversations(corpus_file, tmp_path / "out", SETTINGS)
    assert (tmp_path / "out/selection.json").read_bytes() == (out / "selection.json").read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["selected.jsonl", "selection.json", "stages"]


@pytest.mark.parametrize("name", ["selected.jsonl", "selection.json", "selected.jsonl.partial"])
def test_a_folder_in_the_place_of_a_file_is_named(name, corpus_file, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(SelectionError, match=rf"{name}: is a folder, where a file has to be"):
        select_conversations(corpus_file, tmp_path, SETTINGS, overwrite=True)


def _foreign_part(stages: Path) -> None:
    shutil.copy(stages / "06-domains/00000-00000.parquet", stages / "04-sketches/00000-00000.parquet")


def _additional_part(stages: Path) -> None:
    shutil.copy(stages / "04-sketches/00000-00000.parquet", stages / "04-sketches/00009-00000.parquet")


def _edited_part(stages: Path) -> None:
    part = stages / "06-domains/00000-00000.parquet"
    table = pq.read_table(part)
    edited = table.set_column(table.schema.get_field_index("domain"), "domain", [["math"] * len(table)])
    pq.write_table(edited.replace_schema_metadata(table.schema.metadata), part)


def _lost_part(stages: Path) -> None:
    (stages / "04-sketches/00000-00000.parquet").unlink()


def _damaged_part(stages: Path) -> None:
    (stages / "04-sketches/00000-00000.parquet").write_bytes(b"PAR1 no more")


def _damaged_marker(stages: Path) -> None:
    (stages / "04-sketches/_stage.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_foreign_part, r"04-sketches/00000-00000.parquet: of another configuration \(digest \w+, not \w+\)"),
        (_additional_part, r"04-sketches: has 5 parts, not 4"),
        (_edited_part, r"06-domains/00000-00000.parquet: is not what was written there; --overwrite"),
        (_lost_part, r"04-sketches: has 3 parts, not 4"),
        (_damaged_part, r"04-sketches/00000-00000.parquet: not a Parquet file"),
        (_damaged_marker, r"04-sketches/_stage.json: damaged"),
    ],
)
def test_stage_files_are_checked(damage, message, out, corpus_file, tmp_path):
    shutil.copytree(out, tmp_path / "out")
    damage(tmp_path / "out/stages")
    with pytest.raises(SelectionError, match=message):
        select_conversations(corpus_file, tmp_path / "out", SETTINGS)
    select_conversations(corpus_file, tmp_path / "out", SETTINGS, overwrite=True)
    assert (tmp_path / "out/selected.jsonl").read_bytes() == (out / "selected.jsonl").read_bytes()


# --- baselines --------------------------------------------------------------------------------------------------------


def test_longest_are_the_longest(corpus, corpus_file, tmp_path):
    select_conversations(corpus_file, tmp_path / "out", SelectionSettings(count=50, method="longest"))

    def length(row):
        return sum(len(message["content"]) for message in row["messages"] if message["role"] == "assistant")

    distinct = {json.dumps(row["messages"]): length(row) for row in corpus}
    assert sorted(map(length, selected(tmp_path / "out"))) == sorted(distinct.values())[-50:]


def test_random_takes_valid_decontaminated_rows(corpus, corpus_file, lines, tmp_path):
    barred = [row for row in corpus if len(row["messages"][0]["content"].split()) > 20][:300]
    evaluation = lines(*({"text": row["messages"][0]["content"]} for row in barred))
    settings = SelectionSettings(count=200, method="random", decontaminate=(str(evaluation),))
    select_conversations(corpus_file, tmp_path / "out", settings)
    assert not {row["group"] for row in selected(tmp_path / "out")} & {
        row["group"] for row in barred if row["planted"] == "unique"
    }


def test_ifd_top_takes_the_highest(lines, model_dir, tmp_path):
    data = lines(*({"messages": chat(f"What is number {n}?", f"It is {n * n} or so, {n}.")} for n in range(30)))
    settings = SelectionSettings(count=5, method="ifd-top", scorer=str(model_dir))
    select_conversations(data, tmp_path / "out", settings)
    scores = pq.read_table(tmp_path / "out/stages/04-scores")
    kept = scores.filter(scores["drop"].is_null())["score"].to_numpy()
    assert len(selected(tmp_path / "out")) == 5
    assert 5 < len(kept) <= 30
    chosen = pq.read_table(tmp_path / "out/stages/05-selection")["drop"].is_null().to_numpy()
    assert min(kept[chosen]) >= max(kept[~chosen])


def test_quota_by_a_column(corpus, lines, tmp_path):
    kinds = ["prose", "poetry", "drama"]
    rows = [{**row, "kind": kinds[n % 3]} for n, row in enumerate(r for r in corpus if r["planted"] == "unique")][:150]
    settings = SelectionSettings(count=40, quota={"poetry": 0.75, "prose": 0.25}, domain_column="kind")
    selection = select_conversations(lines(*rows), tmp_path / "out", settings)
    assert selection.domains == {"poetry": 30, "prose": 10}


def test_quality_by_a_column(corpus, lines, tmp_path):
    """The best of each cluster, of which there is one here; rows without a number go no further."""
    rows = [{**row, "points": n * 7 % 100} for n, row in enumerate(r for r in corpus if r["planted"] == "unique")][:100]
    damaged = [None, "9", True, float("nan"), 10**400, 1e39, [1], float("-inf")]
    rows += [
        {"messages": chat(f"Who was at door {n}?", f"Nobody at {n}."), "points": points}
        for n, points in enumerate(damaged)
    ]
    settings = SelectionSettings(count=10, score_column="points", domain_column="planted")
    selection = select_conversations(lines(*rows), tmp_path / "out", settings)
    stages = {stage.name: stage for stage in selection.stages}
    assert stages["scores"].dropped == {"no_score": len(damaged)}
    chosen = selected(tmp_path / "out")
    assert all(0 <= row["teleflm_score"] <= 1 for row in chosen)
    assert np.mean([row["points"] for row in chosen]) > 85


@pytest.mark.slow
def test_k_center_is_an_option(corpus_file, tmp_path):
    for method in ("teleflm", "k-center"):
        settings = SelectionSettings(count=120, method=method)
        select_conversations(corpus_file, tmp_path / method, settings)
    ids = [{row["teleflm_id"] for row in selected(tmp_path / method)} for method in ("teleflm", "k-center")]
    assert len(ids[0]) == len(ids[1]) == 120
    assert ids[0] != ids[1]


def test_a_models_embeddings(corpus, lines, model_dir, tmp_path):
    data = lines(*corpus[:120])
    settings = SelectionSettings(count=30, embedder=str(model_dir), quota=QUOTA, allow_fewer=True)
    assert select_conversations(data, tmp_path / "out", settings).count == 30
    summary = (tmp_path / "out/selection.json").read_text()
    told = {entry["operator"]: entry for entry in json.loads(summary)["pipeline"]["operators"]}
    assert told["embeddings"]["embedder"] == model_dir.name
    assert str(model_dir.parent) not in summary
    width = AutoConfig.from_pretrained(model_dir).hidden_size
    assert (
        pq.read_schema(tmp_path / "out/stages/08-embeddings/00000-00000.parquet").field("embedding").type.list_size
        == width
    )


# --- the report -------------------------------------------------------------------------------------------------------


def test_report(lines, corpus, tmp_path):
    rows = [
        {
            "messages": [
                {**message, "content": f"<script>1</script> <img src=x> {message['content']}"} for message in messages
            ]
        }
        for messages in (row["messages"] for row in corpus[:300])
    ]
    data = lines(*rows)
    settings = SelectionSettings(count=160, quota=QUOTA, allow_fewer=True)
    selection = select_conversations(data, tmp_path / "out", settings)
    write_report(selection, settings, tmp_path / "report")
    page = (tmp_path / "report/index.html").read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;1" in page
    shown = sum(min(EXAMPLES, count) for count in selection.domains.values())
    assert page.count("<details") == shown + sum(len(stage.dropped) for stage in selection.stages)
    assert not re.findall(r"(?:src|href)=\"(?!data:image/svg\+xml)", page), "nothing is loaded"
    assert page.count("data:image/svg+xml;base64,") == 4
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "index.html",
        "selection.json",
        *(f"{name}.png" for name in ("funnel", "domains", "lengths", "map")),
    }
    for stage in selection.stages:
        for reason, count in stage.dropped.items():
            assert f"<code>{reason}</code>" in page
            assert f"{count:,}" in page
    shares = json.loads((tmp_path / "report/selection.json").read_text())["shares"]
    assert sum(before for before, _ in shares.values()) == pytest.approx(1)
    assert sum(after for _, after in shares.values()) == pytest.approx(1)
    assert str(tmp_path) not in page
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    write_report(select_conversations(data, tmp_path / "out", settings), settings, tmp_path / "again")
    assert (tmp_path / "again/index.html").read_text() == page
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "-n is 0"),
        ({"method": "best"}, "--method is 'best'; expected one of teleflm, k-center, target, random, longest, ifd-top"),
        ({"method": "ifd-top"}, "give --scorer"),
        ({"within": "best"}, "--within is 'best'; expected one of quality, medoid, random"),
        ({"within": "quality"}, "--within quality needs a score: give --score-column or --scorer"),
        ({"within": "medoid", "method": "k-center"}, "--within is for --method teleflm, not k-center"),
        ({"scorer": "m", "score_column": "c"}, "--scorer m and --score-column c both give a score"),
        ({"score_column": "c", "method": "longest"}, "--score-column is for --method teleflm or k-center, not longest"),
        ({"quota": {"maths": 1.0}}, "unknown domain 'maths'; known are code, math, multi_turn, general"),
        ({"quota": {"math": 0.5, "code": 0.4}}, r"the shares sum to 0\.9, not to 1"),
        ({"quota": {"math": 1.5, "code": -0.5}}, r"math is 1\.5; a share is from 0 to 1"),
        ({"quota": {"math": float("nan"), "code": 1}}, "math is nan"),
        ({"quota": {}}, "the shares sum to 0, not to 1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(SelectionError, match=message):
        SelectionSettings(**settings)


ANSWER = {"messages": chat("Who was that at the door?", "Nobody in particular, I think.")}


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, r"no row is left after rows\. Of 0 rows were dropped: none"),
        ([{"messages": []}, {"text": ""}], {}, "no row is left after rows. Of 2 .* 1 no_messages, 1 missing_columns"),
        ([ANSWER, ANSWER], {"count": 2}, "only 1 rows are left, fewer than -n 2; --allow-fewer .* 1 exact_duplicate"),
        ([{"messages": chat("Why?", "No.")}], {}, "no row is left after heuristics. .* 1 answer_too_short"),
        (
            [ANSWER],
            {"quota": {"poetry": 1.0}, "domain_column": "kind"},
            "no row has the domain poetry; the rows left are of gen",
        ),
        ([ANSWER], {"quota": {"code": 1.0}}, r"0 of 1 code rows are left; --allow-fewer fills"),
        ([ANSWER], {"scorer": "/nowhere"}, "--scorer /nowhere"),
        ([ANSWER], {"score_column": "points"}, "no row is left after scores. .* 1 no_score"),
        ([ANSWER], {"embedder": "/nowhere"}, "--embedder /nowhere"),
        ([ANSWER], {"embedder": "sentence-transformers:/nowhere"}, "--embedder sentence-transformers:/nowhere: "),
    ],
)
def test_unusable_input_is_refused(rows, settings, message, lines, tmp_path):
    with pytest.raises(SelectionError, match=message) as error:
        select_conversations(lines(*rows), tmp_path / "out", SelectionSettings(**{"count": 1, **settings}))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out/selected.jsonl").exists()
    assert not (tmp_path / "out/selection.json").exists()


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.jsonl: No such file"):
        select_conversations(tmp_path / "nowhere.jsonl", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"nowhere.jsonl: No such file"):
        select_conversations(tmp_path / "nowhere.jsonl", tmp_path / "two", workers=2)


def test_a_worker_that_dies():
    with pytest.raises(SelectionError, match="fewer --workers"), open_executor(2) as executor:
        list(executor.map(os._exit, [1]))


def test_a_quota_that_cannot_be_met_is_refused_with_numbers(lines, tmp_path):
    rows = [{"messages": chat(f"Who was at door {n}?", f"Nobody at {n}."), "kind": "ab"[n > 7]} for n in range(10)]
    asked = {"count": 8, "quota": {"a": 0.5, "b": 0.5}, "domain_column": "kind"}
    data = lines(*rows)
    with pytest.raises(SelectionError, match=r"--quota cannot be met: 2 of 4 b rows are left; --allow-fewer") as error:
        select_conversations(data, tmp_path / "out", SelectionSettings(**asked))
    assert "\n" not in str(error.value)
    settings = SelectionSettings(**asked, allow_fewer=True)
    assert select_conversations(data, tmp_path / "out", settings).domains == {"a": 6, "b": 2}


def test_fewer_by_a_flag(lines, tmp_path):
    settings = SelectionSettings(count=5, allow_fewer=True)
    assert select_conversations(lines(ANSWER, ANSWER), tmp_path / "out", settings).count == 1


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["select", *map(str, arguments)])
    return result.exit_code, result.output


def test_command(corpus_file, tmp_path):
    quota = "math=.25, code=.25,multi_turn=.25,general=.25"
    status, output = run(corpus_file, tmp_path / "out", "-n", 60, "--quota", quota, "--allow-fewer", "--workers", 1)
    assert status == 0, output
    assert "selected.jsonl: 60 rows" in output
    status, output = run(
        corpus_file, tmp_path / "out", "-n", 60, "--quota", quota, "--allow-fewer", "--workers", 1, "--json"
    )
    summary, _ = json.JSONDecoder().raw_decode(output[output.index("{") :])
    assert (status, summary["count"], summary["already_done"]) == (0, 60, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{out}"], "DATA is missing"),
        (["{data}", "{out}", "--quota", "math"], "'math' is not DOMAIN=SHARE"),
        (["{data}", "{out}", "--quota", "math=1,math=0"], "math is given twice"),
        (["{data}", "{out}", "--quota", "math=0.5"], "the shares sum to 0.5, not to 1"),
        (["{data}", "{out}", "-n", "20"], "only 1 rows are left, fewer than -n 20"),
        (["{data}", "{out}", "--decontaminate", "{out}.jsonl"], "No such file"),
        (["{data}.txt", "{out}"], "not a file of conversations"),
        (["{data}", "{out}", "--report", "{data}"], "is a file; give --report a folder"),
        (["{data}", "{out}", "--report", "{out}/../out"], "is OUT, which has a selection.json of its own"),
    ],
)
def test_command_refuses_in_one_line(arguments, message, lines, tmp_path):
    places = {"data": lines(ANSWER), "out": tmp_path / "out"}
    status, output = run(*(argument.format(**places) for argument in arguments), "--workers", 1)
    assert status == 2
    assert message in output.splitlines()[-1]
    assert "Traceback" not in output
    assert not (tmp_path / "out/selected.jsonl").exists()
