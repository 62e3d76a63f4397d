# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The lineage of a record that may come from anyone: told as far as it goes, in lines that command no terminal."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import MANIFEST, read_manifest
from conversion.checkpoint.parent import MAX_STEPS, parent_record
from conversion.hub.lineage import lineage_chain, lineage_steps

DIGEST = "0123456789abcdef" * 4

# What our own lineages hold, anything of which may be anything.
KNOWN: list[dict[str, Any]] = [
    {"operation": "grow", "source": {"hidden_size": 32, "rope": {}}, "target": {"hidden_size": 40}},
    {"operation": "convert", "from": "torch", "parallel": "tp 2", "iteration": 5, "dtype": "bfloat16"},
    {"operation": "convert", "from": "torch", "dtype": None},
    {"operation": "fold", "alpha": 0.5},
    {
        "operation": "train",
        "initial_weights": "random",
        "steps": 5,
        "tokens": 10,
        "masks": {"start": 0, "end": 0.5},
        "sequence_length": 32,
        "learning_rate": 1e-3,
        "moments": "grown",
        "resumed": {"matches": False},
    },
    {
        "operation": "fine-tune",
        "trainer": "sft",
        "method": "lora",
        "data": {"rows": 1, "trained_tokens": 2},
        "steps": 3,
        "merged": True,
    },
    {"operation": "merge", "adapter": "unknown", "dtype": "bfloat16"},
    {
        "operation": "export",
        "to": "megatron",
        "parallel": {"tensor": 2, "pipeline": 2, "virtual": 2},
        "multipliers": "fold",
    },
]
LINK: dict[str, Any] = {
    "record": DIGEST,
    "matches": False,
    "mismatch": "a file differs",
    "edited": True,
    "verification": {
        "verdict": "certified",
        "against": {"record": DIGEST, "matches": False},
        "numbers": {"dtype": "float64", "tokens": 5, "max_difference": 0.0},
    },
}
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.builds(lambda: -(10**5000))  # Python writes no such number, so no strategy may show it
    | st.floats()
    | st.text()
    | st.sampled_from(["\x1b[2J", "a\nb", "x" * 5000, "\ud800", "\u202e", DIGEST]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def paths(value: Any) -> list[tuple[str, ...]]:
    """Every place in an object."""
    found: list[tuple[str, ...]] = []
    for name, inner in value.items() if isinstance(value, dict) else ():
        found += [(name,), *((name, *path) for path in paths(inner))]
    return found


def changed(value: Any, path: tuple[str, ...], new: Any) -> Any:
    if not path:
        return new
    return {**value, path[0]: changed(value[path[0]], path[1:], new)}


@st.composite
def lineages(draw: st.DrawFn) -> Any:
    """A few steps of ours, with anything in a few places."""
    lineage: Any = None
    for _ in range(draw(st.integers(1, 4))):
        step = draw(st.sampled_from(KNOWN))
        lineage = {**step, "parent": {**LINK, "lineage": lineage} if lineage else None}
    for _ in range(draw(st.integers(0, 3))):
        places = paths(lineage)
        if places:
            lineage = changed(lineage, draw(st.sampled_from(places)), draw(ANYTHING))
    return lineage


def check(sentences: list[str]) -> None:
    for sentence in sentences:
        assert isinstance(sentence, str)
        assert sentence.isprintable(), repr(sentence)
        assert len(sentence) <= 700


@given(lineages() | ANYTHING, ANYTHING)
def test_whatever_a_lineage_says_is_told_in_short_plain_lines(lineage, verification):
    check(lineage_steps(lineage, verification))
    chain = lineage_chain({"lineage": lineage, "verification": verification}, DIGEST, ["damaged"])
    check([text for link in chain for text in (link.step, *link.problems)])
    assert chain[-1].record in (DIGEST, None)
    if isinstance(lineage, dict) and lineage:
        assert chain[-1].problems == ("damaged",)


def nested(depth: int) -> dict[str, Any]:
    lineage: dict[str, Any] = {"operation": "fold", "alpha": 1.0}
    for _ in range(depth - 1):
        lineage = {"operation": "fold", "alpha": 1.0, "parent": {"record": DIGEST, "matches": True, "lineage": lineage}}
    return lineage


def test_parents_nested_deeply_are_cut(tmp_path):
    steps = lineage_steps(nested(10_000))
    assert steps[0] == "Earlier steps, which this record leaves out."
    assert len(steps) < 80
    deep = {"operation": "grow", "source": {"a": []}, "target": {"a": {}}}
    for _ in range(10_000):
        deep = {"operation": "grow", "source": {"a": deep}, "target": {"a": [deep]}}
    check(lineage_steps(deep))
    text = '{"parent": {"lineage": ' * 10_000 + "{}" + "}}" * 10_000
    (tmp_path / MANIFEST).write_text(f'{{"format": 2, "plan": "", "tensors": {{}}, "lineage": {text}}}')
    with pytest.raises(CheckpointError, match=r"manifest\.json nests deeper than 100 levels; no checkpoint does\.$"):
        read_manifest(tmp_path)


def test_a_life_of_many_steps_stays_readable(tmp_path):
    """Each step is recorded as the next is made of it; the oldest are left out, and that is said."""
    lineage: dict[str, Any] = {"operation": "train", "initial_weights": "random", "steps": 1}
    for number in range(60):
        record = {"format": 2, "plan": "", "lineage": lineage, "tensors": {}, "verification": LINK["verification"]}
        (tmp_path / MANIFEST).write_text(json.dumps(record))
        parent = parent_record(tmp_path)
        layers = [{"source": 0, "copy": False}]
        lineage = {"operation": "train", "steps": number, "layers": layers, "masks": {"end": 1}, "parent": parent}
    steps = lineage_steps(lineage)
    assert steps[0] == "Earlier steps, which this record leaves out."
    assert [step.split()[2] for step in steps[1:]] == [str(number) for number in range(60 - MAX_STEPS, 60)]
    chain = lineage_chain({"lineage": lineage}, DIGEST)
    assert chain[0].problems == ("earlier steps were left out of the record",)
    assert all(link.record for link in chain)


@pytest.mark.parametrize(
    ("verdict", "against", "sentence"),
    [
        ("certified", {"record": DIGEST}, "Certified against its source: every condition on its bytes holds."),
        ("certified", {"record": None}, "Certified against a checkpoint without a record: every condition"),
        ("certified", {"record": "f" * 64}, "Certified against the checkpoint of record ffffffffffff: every"),
        ("certified", {"record": DIGEST, "matches": False}, "its source, whose weights had changed since: every"),
        ("indistinguishable", {"record": DIGEST}, "Indistinguishable against its source by logits, which is no proof."),
        ("not-certified", {"record": DIGEST}, "Grown: nothing changed. Not certified against its source: its bytes"),
        ("different", {"record": DIGEST}, "Grown: nothing changed. Different against its source: the logits differ"),
        (
            "proven by me",
            {"record": DIGEST},
            "Grown without changing the function it computes, rounding aside: nothing",
        ),
    ],
)
def test_a_verdict_is_told_no_stronger_than_it_is(verdict, against, sentence):
    lineage = {"operation": "grow", "source": {}, "target": {}, "parent": {"record": DIGEST, "lineage": {}}}
    verification = {"verdict": verdict, "against": against}
    assert sentence in lineage_steps(lineage, verification)[-1]
    child = {"operation": "fold", "alpha": 1.0, "parent": {"lineage": lineage, "verification": verification}}
    assert sentence in lineage_steps(child)[-2]
