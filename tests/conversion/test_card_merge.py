# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A card that is published again: what its owner wrote is there, letter by letter, whatever became of the marks."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.checkpoint.errors import CheckpointError
from conversion.hub.card import REGIONS, CardFacts, region, render_card
from conversion.hub.card_check import check_card
from conversion.hub.card_merge import broken_marks, has_owners_text, merge_cards
from conversion.hub.front_matter import change_metadata, parse_metadata, split_card
from conversion.hub.results import Result

OLD = CardFacts("float32", 10, 40, steps=("Old step.",), metadata={"license": "mit"})
NEW = CardFacts("bfloat16", 20, 40, steps=("New step.",), repo_id="owner/name", metadata={"license": "apache-2.0"})
FRESH = render_card(NEW)
SCORED = render_card(CardFacts("bfloat16", 20, 40, repo_id="owner/name", results=(Result("arc", "acc", 0.5),)))


def said(card):
    return parse_metadata(split_card(card)[0])


def test_ours_is_replaced_and_theirs_stays():
    head, sep, tail = render_card(OLD).partition("<!-- teleflm:begin use -->")
    merged = merge_cards(FRESH, f"{head}## Mine\n\nA word.\n\n{sep}{tail}\nThe end.\r\n")
    assert "## Mine\n\nA word.\n\n<!-- teleflm:begin use -->" in merged
    assert merged.endswith("\nThe end.\r\n")
    assert "New step." in merged
    assert "Old step." not in merged
    assert "# name\n" in merged
    assert said(merged)["license"] == "mit", "the owner's word on it counts"


def test_without_an_owner_or_words_of_one_it_is_the_fresh_card():
    assert merge_cards(FRESH, None) == merge_cards(FRESH, " \n") == FRESH
    assert not has_owners_text(FRESH)
    assert merge_cards(FRESH, render_card(OLD), ("library_name", "license")) == FRESH


@pytest.mark.parametrize("front", ["", "---\nlicense: mit # ours\nx: [1,   2]\n---\n"])
def test_a_card_without_marks_keeps_all_and_gets_ours_at_its_end(front):
    owners = front + "# My model\n\nWhat I say.  \n"
    merged = merge_cards(FRESH, owners)
    assert "# My model\n\nWhat I say.  \n\n<!-- teleflm:begin model -->" in merged
    assert "# name" not in merged
    assert has_owners_text(merged)
    assert not front or "license: mit # ours\nx: [1,   2]\n" in merged
    assert check_card(merged) == []
    assert merge_cards(FRESH, merged) == merged


def test_what_the_owner_took_out_stays_out_but_for_the_origin_and_results():
    for name in {*REGIONS} - {"limits"}:
        cut = re.sub(rf"<!-- teleflm:begin {name} -->[\s\S]*?<!-- teleflm:end {name} -->\n", "", SCORED)
        assert merge_cards(SCORED, cut).count(f"begin {name}") == (name in ("origin", "results"))
        cut = re.sub(rf"<!-- teleflm:begin {name} -->[\s\S]*?<!-- teleflm:end {name} -->\n", "", FRESH)
        merged = merge_cards(FRESH, cut)
        assert merged.count(f"begin {name}") == (name == "origin")
        if name == "origin":
            places = [merged.index(f"begin {other}") for other in ("use", "origin", "limits")]
            assert places == sorted(places)


def test_results_of_before_stay_beside_those_of_now():
    def index(task, value):
        facts = CardFacts("float32", 1, 4, repo_id="o/n", results=(Result(task, "acc", value, shots=5),))
        return render_card(facts)

    merged = merge_cards(index("arc", 0.75), merge_cards(index("mmlu", 0.25), index("arc", 0.5)))
    found = {result.dataset_name: result.metric_value for result in ModelCard(merged).data.eval_results}
    assert found == {"arc": 0.75, "mmlu": 0.25}
    assert "arc" in said(merge_cards(FRESH, index("arc", 0.5)))["model-index"][0]["results"][0]["dataset"]["name"]


def test_facts_count_more_than_the_owner():
    owners = "---\nlibrary_name: keras\nbase_model: a/b\nbase_model_relation: merge\ntags: [mine]\n---\nx"
    facts = CardFacts("float32", 1, 4, base_models=("c/d",), relation="finetune")
    merged = said(merge_cards(render_card(facts), owners, facts.certain))
    assert (merged["library_name"], merged["base_model"], merged["base_model_relation"]) == (
        "transformers",
        "c/d",
        "finetune",
    )
    assert merged["tags"] == ["mine", "TeleFLM"]
    merged = said(merge_cards(render_card(facts), owners))
    assert (merged["base_model"], merged["base_model_relation"]) == ("a/b", "merge")
    unknown = CardFacts("float32", 1, 4, base_models=("c/d",))
    assert "base_model_relation" not in said(merge_cards(render_card(unknown), owners, unknown.certain))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("a: [", "is not YAML"),
        ("- a", "is a YAML list"),
        ("a: &a [x]\nb: *a", "refers to itself"),
        (f"a: {'[' * 3000}", "nests too deeply"),
        ("- " * 3000, "nests too deeply"),
        ("a: 2024-99-99", "is not YAML"),
        ("? [a]\n: b", "is not YAML"),
        ("a: " + "x" * 500_000, "has 500003 characters"),
    ],
)
def test_metadata_that_cannot_be_changed_is_refused_in_a_line(block, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        merge_cards(FRESH, f"---\n{block}\n---\nwords")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("a: 1 # one\nb: no\n# last", "a: 1 # one\nb: 2\nc: 3\n"),
        ("{a: 1, b: no}", "a: 1\nb: 2\nc: 3\n"),
        ("b: |\n  x\n\n  y\na: 'no'", "b: 2\na: 'no'\nc: 3\n"),
        ("# first\n\na: 1\r\nb: [x,\n y]\n", "# first\n\na: 1\r\nb: 2\nc: 3\n"),
    ],
)
def test_other_keys_stay_letter_by_letter(block, expected):
    assert change_metadata(block, {"b": 2, "c": 3}) == expected


# Marks in any order: our own marks, cut, doubled, between lines of the owner's.

_LINES = st.sampled_from(
    [f"<!-- teleflm:{side} {name} -->" for side in ("begin", "end") for name in (*REGIONS[:4], "other")]
    + ["", "text", "# Title", "---", "```", "<!--", "-->", "text\r"]
)
_FRONT = st.sampled_from(
    ["", "---\n---\n", "---\nlicense: mit\n---\n", "---\n# a\nlanguage: 'no'\ntags: x\n---\n", "---\r\na: 1\r\n---\r\n"]
)
_OWNERS = st.tuples(_FRONT, st.lists(_LINES, max_size=14)).map(lambda pair: pair[0] + "\n".join(pair[1]))


@settings(max_examples=400, deadline=None)
@given(_OWNERS, st.sampled_from([FRESH, SCORED, render_card(OLD)]))
def test_merging_twice_is_merging_once(owners, fresh):
    try:
        merged = merge_cards(fresh, owners)
    except CheckpointError:
        return
    assert merge_cards(fresh, merged) == merged


@settings(max_examples=400, deadline=None)
@given(st.sets(st.integers(0, 40)), st.lists(st.integers(0, 40), max_size=3))
def test_no_word_of_the_owner_is_lost_whatever_marks_are_missing_or_doubled(missing, doubled):
    """The owner's lines stand between the regions; any marks are cut out, any lines of marks are there twice."""
    lines, word, mark = [], 0, 0
    for name in REGIONS:
        for line in region(name, f"old {name}").splitlines():
            is_mark = line.startswith("<!--")
            times = 1 if not is_mark else 0 if mark in missing else 1 + doubled.count(mark)
            mark += is_mark
            lines += [line] * times
        lines.append(f"word {(word := word + 1)}.")
    merged = merge_cards(FRESH, "\n".join(lines))
    assert [f"word {n}." for n in range(1, word + 1)] == re.findall(r"word \d+\.", merged)
    assert merge_cards(FRESH, merged) == merged


def test_marks_that_do_not_pair_are_named():
    card = FRESH.replace("<!-- teleflm:end use -->\n", "")
    assert broken_marks(card) == ["use"]
    assert any("use is marked by" in problem for problem in check_card(card))
    assert broken_marks(FRESH) == []


def test_what_we_write_is_what_the_hubs_client_reads():
    merged = merge_cards(FRESH, "---\nlanguage: 'no'\nlicense: mit\n---\nx\n")
    assert ModelCard(merged).data.to_dict() == yaml.safe_load(split_card(merged)[0])
    assert ModelCard(merged).data.language == "no"
