# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a selection says of its data, its ids and its quotas, where somebody tries to make it false."""

import json
import os
from pathlib import Path

import pytest

from sft.data.validate import validate_conversations
from sft.selection import SelectionError, SelectionSettings, select_conversations
from sft.selection.rows import add_columns

from .conftest import chat, write_rows


def rows(count: int, **fields) -> list[dict]:
    return [
        {"messages": chat(f"What is number {n}?", f"It is the number {n} of them."), **fields} for n in range(count)
    ]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


RANDOM = {"method": "random"}


@pytest.mark.parametrize("name", ["selected.jsonl", "rejects.jsonl", "selected.jsonl.partial", "stages/mine.jsonl"])
def test_data_that_a_selection_would_replace_is_refused(name, tmp_path):
    (tmp_path / "out/stages").mkdir(parents=True)
    data = write_rows(tmp_path / "out" / name, rows(9))
    before = data.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for out in (tmp_path / "out", tmp_path / "link"):
        with pytest.raises(SelectionError, match=r"is data, and .*give another OUT"):
            select_conversations(data, out, SelectionSettings(count=2, **RANDOM), overwrite=True)
    assert data.read_bytes() == before


def test_a_file_of_the_same_name_size_and_time_is_other_data(tmp_path):
    places = tmp_path / "x1/f.jsonl", tmp_path / "x2/f.jsonl"
    for place, word in zip(places, ("cats", "dogs"), strict=True):
        place.parent.mkdir()
        write_rows(place, [{"messages": chat(f"What of {n}?", f"All of {n} are {word}.")} for n in range(9)])
        os.utime(place, ns=(10**18, 10**18))
    assert places[0].stat().st_size == places[1].stat().st_size
    settings = SelectionSettings(count=5, **RANDOM)
    select_conversations(places[0], tmp_path / "out", settings)
    os.utime(places[0])
    assert select_conversations(places[0], tmp_path / "out", settings).already_done, "the same, touched"
    with pytest.raises(SelectionError, match="of another configuration"):
        select_conversations(places[1], tmp_path / "out", settings)


def test_unique_ids_are_unique_and_the_output_validates(tmp_path):
    given = [{**row, "id": own_id} for row, own_id in zip(rows(5), (7, 7, 7, True, None), strict=True)]
    data = write_rows(tmp_path / "data.jsonl", given)
    plain = select_conversations(data, tmp_path / "plain", SelectionSettings(count=2, **RANDOM))
    assert plain.stages[0].dropped == {"duplicate_id": 2}
    selected = select_conversations(data, tmp_path / "unique", SelectionSettings(count=5, unique_ids=True, **RANDOM))
    ids = [row["id"] for row in read(Path(selected.file))]
    assert ids[0] == 7
    assert len(set(map(str, ids))) == 5
    assert (report := validate_conversations(selected.file)).valid
    assert report.rows == 5


def test_equal_rows_that_a_pipeline_keeps_have_ids_of_their_own(tmp_path):
    pipeline = tmp_path / "equal.yaml"
    pipeline.write_text(
        "operators:\n- operator: domains\n  text: turns\n  own: false\n- operator: random\n  count: 3\n"
    )
    data = write_rows(tmp_path / "data.jsonl", [{"messages": chat("One?", "Yes, one.")}] * 3)
    for unique_ids in (False, True):
        settings = SelectionSettings(pipeline=str(pipeline), unique_ids=unique_ids)
        selected = select_conversations(data, tmp_path / f"out-{unique_ids}", settings)
        assert len({row["teleflm_id"] for row in read(Path(selected.file))}) == 3
        assert (report := validate_conversations(selected.file)).valid
        assert report.rows == 3


def test_columns_of_an_earlier_selection_are_left_out_and_the_rest_stays_byte_for_byte():
    row = b'{"a": 1.10, "e": 1E5, "u": "\\u00e9"}'
    earlier = {"teleflm_id": "x", "teleflm_target": 2, "teleflm_similarity": 0.25, "teleflm_detail": 'an "odd" one'}
    again = add_columns(add_columns(row, earlier), {"teleflm_id": "y"})
    assert again == row[:-1] + b', "teleflm_id": "y"}'
    assert add_columns(b"{}", {"teleflm_id": "y"}) == b'{"teleflm_id": "y"}'
    # Where they stand elsewhere, or only in a text, or in an object of the user's.
    assert json.loads(add_columns(b'{"teleflm_reason": "r", "a": 1}', {"teleflm_id": "y"})) == {
        "a": 1,
        "teleflm_id": "y",
    }
    for kept in (b'{"a": "\\"teleflm_id\\": \\"x\\""}', b'{"a": {"b": 1, "teleflm_id": "x"}}'):
        assert add_columns(kept, {"teleflm_id": "y"}) == kept[:-1] + b', "teleflm_id": "y"}'


def domains(**counts: int) -> list[dict]:
    return [
        {"messages": chat(f"What is {name} {n}?", f"It is {name} of number {n}."), "d": name}
        for name, count in counts.items()
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("quota", "count", "said", "found"),
    [
        ({"a": 1.0}, 30, "20 of 30 a rows are left; its domains have 20 rows in all, fewer than 30", {"a": 20}),
        ({"a": 0.9, "b": 0.1}, 30, "20 of 27 a rows are left; other domains of the quota take", {"a": 20, "b": 10}),
    ],
)
def test_what_fills_up_a_quota_is_said_as_it_is(quota, count, said, found, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", domains(a=20, b=20, c=20))
    asked = {"count": count, "quota": quota, "domain_column": "d", **RANDOM}
    with pytest.raises(SelectionError, match=r"--allow-fewer fills up from the other domains of the quota"):
        select_conversations(data, tmp_path / "out", SelectionSettings(**asked))
    lines: list[str] = []
    made = select_conversations(
        data, tmp_path / "fewer", SelectionSettings(**asked, allow_fewer=True), notify=lines.append
    )
    assert any(said in line for line in lines)
    assert made.domains == found


@pytest.mark.parametrize("allow_fewer", [False, True])
def test_a_quota_of_domains_that_no_row_has_is_refused_before_anything_costs_much(allow_fewer, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", domains(a=20, b=9))
    settings = SelectionSettings(
        count=5, quota={"zz": 1.0}, domain_column="d", allow_fewer=allow_fewer, within="random"
    )
    lines: list[str] = []
    with pytest.raises(SelectionError, match=r"no row has the domain zz; the rows left are of a \(\d+\), b \(\d\)"):
        select_conversations(data, tmp_path / "out", settings, notify=lines.append)
    assert not any(line.startswith("embeddings") for line in lines)


def test_a_domain_that_is_no_text_is_replaced(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({**row, "d": "\ud800"}) + "\n" for row in rows(6)))
    made = select_conversations(data, tmp_path / "out", SelectionSettings(count=2, domain_column="d"))
    assert made.domains == {"?": 2}
