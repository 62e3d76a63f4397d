# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The study of docs/selection-study.md at toy size, its numbers, and that its page says what its runs say."""

import itertools
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

from benchmarks.selection_study import arms, base, ifd, pool, report, runs
from benchmarks.selection_study.__main__ import DOCS, RESULTS
from benchmarks.selection_study.presets import PRESETS, Preset
from benchmarks.selection_study.training import Encoded, Trainer, stream
from demo.corpus import collect
from sft.selection import SelectionSettings, select_conversations
from sft.selection.diversity import share_out
from sft.selection.heuristics import find_fault
from sft.selection.score import measure_ifd
from sft.selection.scorers import CausalScorer

from .conftest import chat, write_rows

pytestmark = pytest.mark.slow

TOY = Preset(
    "toy",
    bfloat16=False,
    pieces=700,
    width=32,
    layers=1,
    heads=2,
    base_steps=20,
    base_held_out=5,
    length=64,
    steps=2,
    count=12,
    counts=(6, 24),
    per_source=80,
    held_out=10,
    least_rows=40,
    faults=(0.0, 0.3),
    seeds=(0, 1),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two sources, and a third of which nothing is left: its rows are near duplicates of each other."""
    draw = random.Random(0)
    documented = [messages for messages in collect().conversations if len(messages) > 2][:150]
    sums = [
        chat(f"What is {a} plus {b}, {word}?", f"{word.title()}, {a} + {b} = {a + b}. That is {a + b} in all, {word}.")
        for a, b, word in ((draw.randrange(1000), draw.randrange(1000), draw.choice(_WORDS)) for _ in range(120))
    ]
    same = [chat(f"Who are you, number {n}?", "I am a small model and I like to answer questions.") for n in range(60)]
    rows = [
        {"source": source, "messages": messages}
        for source, own in (("python", documented), ("sums", sums), ("same", same))
        for messages in own
    ]
    return write_rows(tmp_path_factory.mktemp("study") / "data.jsonl", rows)


_WORDS = ("apple", "river", "stone", "cloud", "tiger", "lemon", "piano", "rocket", "garden", "winter", "copper")


@pytest.fixture(scope="module")
def study(data) -> runs.Study:
    """The whole study, run."""
    study = runs.Study(data, data.parent / "work", data.parent / "results", TOY)
    texts = collect()
    described = base.pretrain(study.base, TOY, (texts.texts[:300], texts.heldout_texts))
    study.results.mkdir()
    (study.results / "base.json").write_text(json.dumps(described))
    for share in TOY.faults:
        runs.prepare(study, TOY.seeds, [share])
        list(runs.run_all(study, TOY.seeds, [share]))
    return study


@pytest.fixture
def presets(monkeypatch):
    monkeypatch.setitem(PRESETS, "toy", TOY)


# --- the study --------------------------------------------------------------------------------------------------------


def test_every_arm_is_run_once_and_goes_on_where_it_stopped(study, tmp_path):
    file = study.results / "runs.jsonl"
    before = file.read_text()
    found = [(run["seed"], run["faults"], run["arm"]) for run in runs.read_lines(file)]
    ladder = [*arms.LADDER, arms.AGAIN]
    second = ["random 6", "choice 6", "random 24", "choice 24", "all"]
    expected = [(seed, 0.0, arm) for seed in TOY.seeds for arm in ["base", *ladder]]
    expected += [(seed, 0.3, arm) for seed in TOY.seeds for arm in [*ladder, *second]]
    assert sorted(found) == sorted(expected)

    copied = runs.Study(study.data, study.work, tmp_path, TOY)
    file, lines = tmp_path / "runs.jsonl", before.splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    (again,) = runs.run_all(copied, TOY.seeds, TOY.faults)
    assert {**again, "seconds": 0} == {**json.loads(lines[-1]), "seconds": 0}, "a run depends on its seed alone"
    assert list(runs.run_all(copied, TOY.seeds, TOY.faults)) == []


def test_each_arm_takes_what_its_name_says(study):
    for seed in TOY.seeds:
        made = json.loads(study.prepared(seed, 0.3).read_text())
        rows, quota = made["rows"], pool.allot(TOY.count, made["shares"])
        assert all(len(numbers) == len(set(numbers)) for numbers in made["arms"].values())
        for arm in arms.LADDER:
            assert len(made["arms"][arm]) == TOY.count
            if arm != "random":
                taken = [rows[number]["source"] for number in made["arms"][arm]]
                assert {source: taken.count(source) for source in quota} == quota
        for arm in list(arms.LADDER)[2:]:
            keys = [arms.key(rows[number]["messages"]) for number in made["arms"][arm]]
            assert len(keys) == len(set(keys))
        for arm in list(arms.LADDER)[3:]:
            assert not any(find_fault(rows[n]["messages"], rows[n]["source"]) for n in made["arms"][arm])
        assert made["arms"]["random 6"] == made["arms"]["random"][:6]
        assert set(made["arms"]["random"]) != set(made["arms"][arms.AGAIN])
        assert len(made["arms"]["all"]) == len(rows)


def test_the_scored_choice_is_that_of_a_scorer(study, tmp_path):
    """Scores are made once for all pools; `--scorer` would have chosen the same rows."""
    made = json.loads(study.prepared(0, 0.3).read_text())
    data = write_rows(
        tmp_path / "data.jsonl",
        [{"messages": row["messages"], "source": row["source"], "number": n} for n, row in enumerate(made["rows"])],
    )
    settings = SelectionSettings(
        count=TOY.count, scorer=str(study.base), domain_column="source", quota=made["shares"], allow_fewer=True
    )
    chosen = select_conversations(data, tmp_path / "out", settings)
    numbers = [json.loads(line)["number"] for line in Path(chosen.file).read_text().splitlines()]
    assert numbers == made["arms"]["choice"]


def test_the_study_s_ifd_is_that_of_a_scorer_where_the_window_holds_the_row(study):
    """Of longer rows it is what it was when the study was run, and its page says so."""
    then, now = ifd.Scorer(study.base, "cpu"), CausalScorer.load(str(study.base))
    assert now.window == ifd.MAX_TOKENS
    made = json.loads(study.prepared(0, 0.3).read_text())
    chats = [row["messages"] for row in made["rows"][:60]]
    words = 100 * 1000 // len(now.tokenizer("why " * 100, add_special_tokens=False)["input_ids"])
    long = chat("why " * words, "Because of this. " + "猫" * 300)  # whose end is harder, and beyond the window
    expected, cut, _ = measure_ifd(now, [*chats, long])
    found = np.array(then.score([*chats, long]), float)
    assert (~cut[:-1]).sum() > 20
    assert cut[-1]
    np.testing.assert_allclose(found[~cut], expected[~cut], rtol=1e-5)
    assert abs(found[-1] / expected[-1] - 1) > 1e-3
    assert "the IFD of `--scorer` has changed for conversations" in DOCS.read_text(encoding="utf-8")


def test_the_pool_has_no_near_duplicate_of_what_is_held_out(data):
    conversations = pool.Conversations.read(data)
    split = conversations.split(TOY, 0)
    assert split.dropped == {"same": 0}
    assert set(split.held_out) == {"python", "sums"}
    held = [_pairs(messages) for own in split.held_out.values() for messages in own]
    for row in split.pool:
        own = _pairs(row.messages)
        assert all(len(own & other) < pool.OVERLAP * max(1, min(len(own), len(other))) for other in held)
    assert conversations.split(TOY, 0) == split
    assert conversations.split(TOY, 1).held_out != split.held_out


def _pairs(messages) -> set[tuple[str, str]]:
    """Brute force, beside the study's matrices."""
    words = re.findall(r"\w+", "\n".join(message["content"] for message in messages).lower())
    return set(itertools.pairwise(words))


def test_faults_replace_a_share_of_each_kind_alike_and_less_are_among_more(data):
    split = pool.Conversations.read(data).split(TOY, 0)
    none, some, many = (pool.plant(split.pool, share, 0.3, 0) for share in (0.0, 0.15, 0.3))
    assert none == split.pool
    assert sum(bool(row.fault) for row in many) == round(0.3 * len(many))
    assert all(more == less for less, more in zip(some, many, strict=True) if less.fault)
    counts = [sum(row.fault == kind for row in many) for kind in pool.KINDS]
    assert max(counts) - min(counts) <= 1
    clean = [row.messages for row in many if not row.fault]
    assert all(row.messages in clean for row in many if row.fault == "exact duplicate")
    assert all(row.messages[-1]["content"] in pool.REFUSALS for row in many if row.fault == "refusal")


@pytest.mark.parametrize("limits", [(500, 130, 5), (500, 500, 500), (3, 2, 1), (0, 90, 40), (60, 10, 68)])
def test_a_quota_is_shared_out_as_the_selection_shares_it_out(limits):
    shares = {"a": 0.457, "b": 0.086, "c": 0.457}
    count = min(150, sum(limits))
    found = pool.allot(count, shares, dict(zip(shares, limits, strict=True)))
    assert list(found.values()) == share_out(150, np.array(list(shares.values())), np.array(limits)).tolist()


# --- the machinery ----------------------------------------------------------------------------------------------------


def test_the_losses_are_those_of_the_model(study):
    """The batched, padded sums beside transformers' own loss of a conversation at a time."""
    trainer = Trainer(study.base, TOY)
    rows = [trainer.encode(chat("Hello there", "A short answer.")), trainer.encode(chat("Hm?", "A longer one. " * 9))]
    total = count = 0.0
    for row in rows:
        own = sum(label != -100 for label in row.labels[1:])
        loss = trainer.model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([row.labels])).loss.item()
        total, count = total + loss * own, count + own
    assert trainer.judge({"a": rows})["a"] == pytest.approx(total / count, rel=1e-5)


def test_training_learns_what_it_reads_and_starts_from_the_base_each_time(study):
    trainer = Trainer(study.base, Preset("toy", bfloat16=False, length=64, batch=2, steps=60, learning_rate=1e-2))
    row = trainer.encode(chat("What is it?", "It is a stone in the river."))
    before = trainer.judge({"a": [row]})["a"]
    trainer.train([row], 0)
    assert trainer.judge({"a": [row]})["a"] < before / 2
    trainer.reset()
    assert trainer.judge({"a": [row]})["a"] == before


def test_a_stream_reads_all_rows_once_before_it_repeats_one():
    rows = [Encoded([n] * 3, [-100, n, n]) for n in range(5)]
    ids, labels = stream(rows, 20, 0)
    assert sorted(ids[:15:3].tolist()) == [0, 1, 2, 3, 4]
    assert labels[:3].tolist() == [-100, ids[0], ids[0]]
    assert stream(rows, 20, 0)[0].tolist() == ids.tolist() != stream(rows, 20, 1)[0].tolist()


def test_the_base_has_learned_something(study):
    bits = json.loads((study.results / "base.json").read_text())["bits_per_byte"]
    assert bits["base"] < bits["untrained"]


def test_comparisons_are_paired_t_intervals():
    draw = np.random.default_rng(0)
    one, other = draw.normal(size=10), draw.normal(size=10)
    made = report.Comparison(0.0, "a", "b", tuple((one - other).tolist()))
    expected = ttest_rel(one, other)
    assert made.p == pytest.approx(expected.pvalue)
    assert made.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_holm_is_that_of_its_definition():
    assert report.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])


def test_a_verdict_needs_an_interval_a_correction_and_a_size():
    sure = report.Comparison(0.0, "a", "b", (-1.0, -1.1, -0.9, -1.0))
    assert report.verdict(sure, 0.01, 0.5) == "**better**"
    assert report.verdict(sure, 0.01, 2.0) == "better, but too little to count"
    assert report.verdict(sure, 0.5, 0.5) == "better by itself, not among all"
    unsure = report.Comparison(0.0, "a", "b", (1.0, -1.1, 0.9, -1.0))
    assert report.verdict(unsure, 0.01, 0.5) == "no difference shown"
    assert report.verdict(report.Comparison(0.0, "a", "b", (1.0, 1.1, 0.9)), 0.01, 0.5) == "**worse**"


# --- the page ---------------------------------------------------------------------------------------------------------


def test_a_page_is_made_of_the_runs_and_of_nothing_else(study, presets, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}old\n{report.END}after\n")
    report.write_page(study.results, page)
    text = page.read_text()
    assert text.startswith(f"before\n{report.BEGIN}")
    assert text.endswith(f"{report.END}after\n")
    assert report.results_text(study.results) in text
    found = report.read_runs(study.results)
    means = [np.mean([found[seed, 0.3, arm]["primary"] for seed in TOY.seeds]) for arm in ("choice", "random")]
    assert f"| choice | random | {means[0] - means[1]:+.4f} |" in text
    assert "<svg" in page.with_suffix(".svg").read_text()

    copied = tmp_path / "results"
    shutil.copytree(study.results, copied)
    lines = (copied / "runs.jsonl").read_text().splitlines()
    (copied / "runs.jsonl").write_text("\n".join([lines[0], *lines[2:], ""]))
    found = report.complete(report.read_runs(copied), TOY)
    assert found.faults == (0.3,), "a level with a run missing is not shown"


def test_the_page_says_what_the_runs_say():
    _, _, rest = DOCS.read_text(encoding="utf-8").partition(report.BEGIN)
    results, found, _ = rest.partition(report.END)
    assert found
    assert results == report.results_text(RESULTS), "python -m benchmarks.selection_study page"


def test_the_kept_runs_are_complete():
    found = report.read_runs(RESULTS)
    preset = report.complete(found, PRESETS["small"])
    assert len(preset.seeds) == 10
    for run in found.values():
        shares = run["primary"]
        assert min(run["losses"].values()) <= shares <= max(run["losses"].values())


def test_readme_and_docs_claim_what_the_runs_show():
    """No arm is better than random; without a score none is worse; scores do harm; fewer are not better than all."""
    found = report.read_runs(RESULTS)
    preset = report.complete(found, PRESETS["small"])
    said = report.verdicts(found, preset)
    assert len(said) == 13 * len(preset.faults) + 8
    assert "**better**" not in said.values()
    for share in preset.faults:
        for arm in ("quota", "dedup", "heuristics", "unscored"):
            assert said[share, arm, "random"] != "**worse**"
        for arm in ("score", "choice"):
            assert said[share, arm, "random"] == "**worse**"
    text = DOCS.with_name("selection.md").read_text(encoding="utf-8")
    assert "No arm was shown to be better than `random`; without a score\nnone was worse." in text
