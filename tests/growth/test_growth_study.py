# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The study of docs/growth-study.md at toy size, its numbers, and that its page says what its runs say."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from scipy.stats import ttest_1samp, ttest_rel

from benchmarks.growth_study import arms, corpus, report, runs
from benchmarks.growth_study.__main__ import DOCS, RESULTS, main
from benchmarks.growth_study.presets import PRESETS, SMALL
from conversion.architecture import Architecture
from modeling_teleflm import TeleFLMConfig, TeleFLMForCausalLM

pytestmark = pytest.mark.slow

TOY = PRESETS["toy"]
DISTRIBUTIONS = {**corpus.TRAIN, **corpus.TUNE, **corpus.HELD_OUT}
# One of a kind; the others differ in numbers alone.
SOME = [
    arms.BY_NAME[name]
    for name in (
        "small, equal tokens",
        "wide from scratch, equal FLOPs",
        "zero",
        "zero, moments",
        "tile, moments",
        "rms",
        "mask",
        "random",
        "silent copies, moments",
        "stacked copies",
        "interleaved copies",
        "masked copies",
    )
]


@pytest.fixture(scope="module")
def packages():
    """Small ones, so that reading them takes no time."""
    patch = pytest.MonkeyPatch()
    patch.setattr(corpus, "TRAIN", {"trl": "trl", "fsspec": "fsspec"})
    patch.setattr(corpus, "TUNE", {"typer": "typer"})
    patch.setattr(corpus, "HELD_OUT", {"jinja2": "jinja2"})
    patch.setattr(corpus, "BYTES", 400_000)
    patch.setattr(corpus, "TOKENIZER_CHARACTERS", 200_000)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def study(packages, tmp_path_factory) -> runs.Study:
    """Two arms tuned, the others given the choices of one of them; and all run."""
    place = tmp_path_factory.mktemp("study")
    study = runs.Study(place / "work", place / "results", TOY)
    study.prepare()
    study.tune([arms.SMALL_ARMS[0], arms.BY_NAME["zero"]])
    file = study.results / "tuning.jsonl"
    tuned = runs.read_lines(file)
    for arm in arms.ARMS:
        if arm not in arms.SMALL_ARMS and arm.name != "zero":
            for run in tuned[-2:]:
                runs.append(file, {**run, "arm": arm.name})
    study.run((0,), SOME)
    return study


def test_every_arm_is_run_once_and_measured_at_its_last_step(study):
    found = runs.read_lines(study.results / "runs.jsonl")
    assert [run["arm"] for run in found] == [arm.name for arm in SOME]
    for run in found:
        assert run["losses"][-1][0] == run["steps"]
        assert run["losses"][0][0] == 0
    study.run((0,), SOME)
    assert runs.read_lines(study.results / "runs.jsonl") == found


def test_what_preserves_starts_at_the_loss_of_the_small_model_and_what_does_not_does_not(study):
    found = {run["arm"]: run for run in runs.read_lines(study.results / "runs.jsonl")}
    first = {arm: run["losses"][0][1] for arm, run in found.items()}
    same = [arm.name for arm in SOME if arm.method in ("zero", "tile", "mask") and arm.new_layers == "silent"]
    assert len(same) == 6
    assert all(first[name] == pytest.approx(first["zero"], abs=2e-5) for name in same)
    for name in ("random", "rms", "stacked copies", "interleaved copies"):
        assert abs(first[name] - first["zero"]) > 1e-3


def test_a_choice_is_that_of_the_least_loss(study):
    tuning = runs.read_lines(study.results / "tuning.jsonl")
    for arm in arms.ARMS:
        name = arms.SMALL_ARMS[0].name if arm in arms.SMALL_ARMS else arm.name
        own = [run for run in tuning if run["arm"] == name]
        assert len(own) == 2
        best = min(own, key=lambda run: run["losses"][-1][1])
        assert study.choice(arm.name) == runs.Chosen(best["learning_rate"], best["warmup"])


def test_an_interrupted_run_goes_on_to_the_same_end(study, tmp_path):
    """As on a GPU that is lent for some minutes: the time is over at the first step."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results/tuning.jsonl").write_bytes((study.results / "tuning.jsonl").read_bytes())
    short = runs.Study(tmp_path / "work", tmp_path / "results", TOY, deadline=time.monotonic() - 1)
    short.prepare()
    base, zero = short.choice(arms.SMALL_ARMS[0].name), arms.BY_NAME["zero"]
    interrupted, found = 0, None
    while not found:
        try:
            found = short._run(TOY, "held_out", zero, short.choice("zero"), base, 0)
        except runs.Interrupted:
            interrupted += 1
    assert interrupted == TOY.small_steps - 1 + TOY.grown_steps - 1
    expected = next(run for run in runs.read_lines(study.results / "runs.jsonl") if run["arm"] == "zero")
    assert [*map(list, found["losses"])] == expected["losses"]


def test_no_set_shares_lines_with_what_is_trained_on(packages):
    sets, left_out = corpus.read_sets()
    seen = {window for text in sets["train"] for window in corpus._windows(text)}
    for name in ("tune", "held_out"):
        assert sets[name]
        assert not seen & {window for text in sets[name] for window in corpus._windows(text)}
    assert left_out == 0 or left_out < 20


def test_a_file_that_shares_lines_is_left_out(packages, monkeypatch):
    """A copy of a file that is trained on, put into a held-out package."""
    files = corpus._files

    def with_copy(package, most):
        yield from files(package, most)
        if package == "jinja2":
            yield "# copied\n" + next(files("fsspec", most))

    before = corpus.read_sets()
    monkeypatch.setattr(corpus, "_files", with_copy)
    after = corpus.read_sets()
    assert after[1] == before[1] + 1
    assert after[0]["held_out"] == before[0]["held_out"]


@pytest.mark.parametrize("shape", ["small", "wide", "deep"])
def test_the_sizes_that_the_page_names(shape):
    fields = arms.config(shape, SMALL)
    parameters = Architecture.from_config(fields).num_parameters - fields["vocab_size"] * fields["hidden_size"]
    ratio = arms.step_flops(shape, SMALL) / arms.step_flops("small", SMALL)
    ratio_text = f"{ratio:.2g}"
    row = f"| {shape} | {fields['hidden_size']} | {fields['num_hidden_layers']} | {parameters:,} | {ratio_text} |"
    assert row in DOCS.read_text()
    model = TeleFLMForCausalLM(TeleFLMConfig(**{k: v for k, v in fields.items() if k != "model_type"}))
    assert sum(p.numel() for p in model.parameters()) == parameters + fields["vocab_size"] * fields["hidden_size"]


def test_equal_flops_are_equal():
    for shape in ("wide", "deep"):
        grown = arms.total_flops(arms.Arm("", shape, "zero"), SMALL)
        for name in (f"{shape} from scratch, equal FLOPs", f"small, equal FLOPs to {shape}"):
            arm = arms.BY_NAME[name]
            assert arms.total_flops(arm, SMALL) == pytest.approx(grown, rel=2e-3)
        arm = arms.BY_NAME[f"{shape} from scratch, equal tokens"]
        assert arms.steps(arm, SMALL) == SMALL.small_steps + SMALL.grown_steps


def test_intervals_are_those_of_scipy():
    first, second = [1.0, 1.2, 0.9, 1.1, 1.3], [0.8, 1.3, 0.7, 0.9, 1.0]
    found = report.Comparison("a", "b", tuple(a - b for a, b in zip(first, second, strict=True)))
    expected = ttest_rel(first, second).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.word == ("no difference shown" if ttest_1samp(found.differences, 0).pvalue > 0.05 else "worse")


def test_the_number_of_comparisons_that_the_page_announces():
    assert f"there are {len(list(report.pairs()))} of them" in DOCS.read_text()
    assert all(name in arms.BY_NAME for pair in report.pairs() for name in pair)


def test_the_page_says_what_the_runs_say(tmp_path):
    """Nothing, as long as there are not two seeds of every arm to say it with."""
    text = DOCS.read_text(encoding="utf-8")
    results = text.partition(report.BEGIN)[2].partition(report.END)[0]
    if not results:
        with pytest.raises(ValueError, match="the command `run` goes on"):
            report.results_text(RESULTS)
        return
    assert results == report.results_text(RESULTS), "python -m benchmarks.growth_study page"
    copy = tmp_path / "growth-study.md"
    copy.write_text(text, encoding="utf-8")
    assert main(["page", "--docs", str(copy)]) == 0
    assert copy.read_text(encoding="utf-8") == text
    assert copy.with_suffix(".svg").read_bytes() == DOCS.with_suffix(".svg").read_bytes()


@pytest.mark.skipif(not (RESULTS / "runs.jsonl").exists(), reason="the study has not been run")
def test_the_runs_are_those_of_the_preset():
    """Each line is checked against what its arm, its choice and its size say."""
    study = runs.Study(Path("unused"), RESULTS, SMALL)
    for run in runs.read_lines(RESULTS / "runs.jsonl"):
        arm = arms.BY_NAME[run["arm"]]
        assert run["steps"] == arms.steps(arm, SMALL)
        assert run["flops"] == arms.total_flops(arm, SMALL)
        assert study.choice(arm.name) == runs.Chosen(run["learning_rate"], run["warmup"])
    corpus_kept = json.loads((RESULTS / "corpus.json").read_text())
    pinned = Path(__file__).parents[2].joinpath("constraints.txt").read_text()
    for name, version in corpus_kept["packages"].items():
        distribution = DISTRIBUTIONS[name]
        assert re.search(rf"(?mi)^{distribution}=={re.escape(version.partition('+')[0])}", pinned), name


def test_a_model_starts_as_mup_has_it(packages, study):
    fields = arms.config("wide", TOY)
    runs.make_model(study.work / "model", fields, study.corpus / "tokenizer", TOY, 0)
    model = TeleFLMForCausalLM.from_pretrained(study.work / "model")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.std().item() == pytest.approx(0.1 / (fields["hidden_size"] / TOY.base_width) ** 0.5, rel=0.1)
    assert torch.all(model.model.norm.weight == 1)
