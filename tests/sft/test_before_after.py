# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Texts and tasks before and after training: the numbers of `teleflm eval`, of the models that they name."""

import json
import logging
from pydoc_data import topics

import pytest
import torch

import sft.training.before_after
import sft.training.train
from conversion.checkpoint.sources import open_checkpoint
from conversion.hub.results import RESULTS, claimed_results, read_results
from conversion.model_identity import model_identity
from evaluation.measure import describe, evaluate
from sft.export import export_model
from sft.training.before_after import BASE_RESULTS, MeasureError
from sft.training.comparison import comparison, comparison_text
from sft.training.run_log import read_history
from sft.training.train import main, train
from tests.sft.test_train import losses, weights

pytestmark = pytest.mark.slow

RUN = {"max_steps": 3, "learning_rate": 0.05, "max_length": 128, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "topic.txt"
    path.write_text("\n".join(topics.topics.values())[3000:4500])
    return path


@pytest.fixture(scope="module")
def quiz(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "quiz.jsonl"
    rows = [
        {"question": f"Is {name} a topic?", "choices": ["yes", "no, it is not"], "answer": index % 2}
        for index, name in enumerate(list(topics.topics)[:7])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbers(found):
    """Without the seconds, and how it was computed."""
    return {key: found[key] for key in ("texts", "tasks", "dtype", "window", "stride")}


def near(found, expected):
    for name in ("nats", "bits_per_byte", "perplexity"):
        assert found["texts"][0].pop(name) == pytest.approx(expected["texts"][0].pop(name), rel=1e-6)
    assert numbers(found) == numbers(expected)


def test_the_results_are_those_of_eval_of_the_base_and_of_what_was_saved(make_recipe, model_dir, text, quiz, tmp_path):
    recipe = make_recipe(**RUN, eval_texts=str(text), eval_tasks=[str(quiz)])
    result = train(recipe, progress=False)
    out = tmp_path / "out"
    for when, folder, file in (("before", model_dir, BASE_RESULTS), ("after", out, RESULTS)):
        expected = describe(evaluate(folder, texts=[text], tasks=[quiz], loaded=True))
        near(json.loads(json.dumps(result.measured[when])), expected)
        identity = model_identity(open_checkpoint(folder))
        results = read_results(out / file)
        assert {found.model for found in results} == {identity}
        assert {found.task for found in results} == {"topic", "quiz"}
    assert claimed_results((), out, lambda: model_identity(open_checkpoint(out))) == (read_results(out / RESULTS), [])
    assert result.measured["before"]["texts"] != result.measured["after"]["texts"]
    assert read_history(out).measured == json.loads(json.dumps(result.measured))


@pytest.mark.parametrize("keys", [{}, {"use_peft": True, "lora_dropout": 0.5}], ids=["full", "lora"])
def test_a_run_that_is_measured_is_the_run_that_is_not_to_the_bit(keys, make_recipe, text, quiz, tmp_path):
    keys = {**RUN, **keys, "activation_checkpointing": True}
    results = [
        train(make_recipe(**keys, **more, output_dir=str(tmp_path / name)), progress=False)
        for name, more in (("without", {}), ("with", {"eval_texts": [str(text)], "eval_tasks": str(quiz)}))
    ]
    assert losses(results[0]) == losses(results[1])
    name = "adapter_model.safetensors" if "use_peft" in keys else "model.safetensors"
    first, second = (weights(result.output_dir, name) for result in results)
    assert all(torch.equal(weight, second[key]) for key, weight in first.items())


def test_with_an_adapter_after_is_base_and_adapter_and_claimed_of_no_weights(make_recipe, model_dir, text, tmp_path):
    result = train(
        make_recipe(**{**RUN, "learning_rate": 1.0, "max_steps": 12}, use_peft=True, eval_texts=str(text)),
        progress=False,
    )
    base = evaluate(model_dir, texts=[text], loaded=True).texts[0].nats
    assert result.measured["before"]["texts"][0]["nats"] == pytest.approx(base, rel=1e-6)
    export_model(tmp_path / "out", tmp_path / "merged", merge=True)
    merged = evaluate(tmp_path / "merged", texts=[text], loaded=True).texts[0].nats
    assert result.measured["after"]["texts"][0]["nats"] == pytest.approx(merged, rel=1e-5)
    assert merged != pytest.approx(base, rel=1e-4)
    assert {found.model for found in read_results(tmp_path / "out" / RESULTS)} == {None}
    assert {found.model for found in read_results(tmp_path / "out" / BASE_RESULTS)} == {
        model_identity(open_checkpoint(model_dir))
    }


def test_the_best_model_is_measured_where_it_is_the_one_that_is_saved(make_recipe, data_file, text, tmp_path):
    keys = {
        **RUN,
        "learning_rate": 3.0,
        "eval_data_files": str(data_file),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
    }
    result = train(make_recipe(**keys, eval_texts=str(text)), progress=False)
    saved = evaluate(tmp_path / "out", texts=[text], loaded=True).texts[0].nats
    last = evaluate(tmp_path / "out" / "checkpoint-3", texts=[text], loaded=True).texts[0].nats
    assert result.measured["after"]["texts"][0]["nats"] == pytest.approx(saved, rel=1e-6)
    assert saved != pytest.approx(last, rel=1e-5), "the last one is another"


def test_a_resumed_run_has_measured_before_in_its_first_session(make_recipe, text, tmp_path):
    keys = {**RUN, "save_strategy": "steps", "save_steps": 1, "eval_texts": str(text)}
    first = train(make_recipe(**keys), progress=False)
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    second = train(make_recipe(**keys, resume_from_checkpoint=checkpoint), progress=False)
    assert second.measured["before"] == json.loads(json.dumps(first.measured["before"]))
    assert second.measured["after"]["texts"] == first.measured["after"]["texts"]


def test_in_bfloat16_the_results_say_so(make_recipe, text):
    result = train(make_recipe(**RUN, bf16=True, eval_texts=str(text)), progress=False)
    assert {found["dtype"] for found in result.measured.values()} == {"bfloat16"}


REFUSED = {
    "missing": ("missing.txt", "missing.txt: no such file"),
    "empty": ("empty.txt", "empty.txt: is empty"),
    "no text": ("bytes.txt", "bytes.txt: is not UTF-8"),
}


@pytest.mark.parametrize(("name", "message"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_cannot_be_measured_is_refused_before_a_model_is_loaded(
    name, message, make_recipe, tmp_path, monkeypatch
):  # fmt: skip
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    monkeypatch.setattr(sft.training.train, "load_model", lambda *args, **keys: pytest.fail("a model was loaded"))
    with pytest.raises(MeasureError) as error:
        train(make_recipe(**RUN, eval_texts=[str(tmp_path / name)]), progress=False)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_that_computes_in_float16_is_refused(make_recipe, text, monkeypatch):
    monkeypatch.setattr(sft.training.train, "compute_dtype", lambda trainer: "float16")
    with pytest.raises(MeasureError, match="computes in float16"):
        train(make_recipe(**RUN, eval_texts=str(text)), progress=False)


def test_a_failure_after_training_loses_no_model(make_recipe, text, tmp_path, monkeypatch, caplog):
    real, calls = sft.training.before_after.measure, []

    def fail_the_second_time(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("planted")
        return real(*args)

    monkeypatch.setattr(sft.training.before_after, "measure", fail_the_second_time)
    with caplog.at_level(logging.WARNING):
        result = train(make_recipe(**RUN, eval_texts=str(text)), progress=False)
    assert list(result.measured) == ["before"]
    assert weights(tmp_path / "out")
    assert any("results after training cannot be written" in record.getMessage() for record in caplog.records)


def test_the_table(make_recipe, model_dir, data_file, text, quiz, tmp_path, capsys):
    keys = {"model_name_or_path": model_dir, "data_files": data_file, "output_dir": tmp_path / "out", "max_steps": 2}
    keys |= {"use_cpu": "true", "bf16": "false", "eval_texts": text, "eval_tasks": quiz, "report_to": "none"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 0\n")
    arguments = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    assert main(["--config", str(recipe), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    measured = read_history(tmp_path / "out").measured
    before, after = (measured[when]["texts"][0]["bits_per_byte"] for when in ("before", "after"))
    assert lines[-4].split() == ["text", "or", "task", "measure", "before", "after", "difference"]
    assert lines[-3].split()[-3:] == [f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"]
    assert lines[-3].startswith("topic")
    assert "bits_per_byte (lower is better)" in lines[-3]
    assert [line.split()[1] for line in lines[-2:]] == ["acc", "acc_norm"]


@pytest.mark.parametrize("changed", ["sha256", "dtype", "window"])
def test_what_was_not_measured_alike_has_no_difference(changed):
    """As of a resumed run, whose files and precision may be others."""

    def found(bits, mark):
        text = {"name": "t", "bits_per_byte": bits, "sha256": mark if changed == "sha256" else "same"}
        return {"texts": [text], "tasks": [], changed: mark}

    (row,) = comparison(found(1.5, "one"), found(1.25, "two"))
    assert (row["before"], row["after"], row["difference"]) == (1.5, 1.25, None)
    (row,) = comparison(found(1.5, "one"), found(1.25, "one"))
    assert row["difference"] == -0.25
    rows = comparison(found(1.5, "one"), {"texts": [{"name": "u", "bits_per_byte": 1.0}]})
    assert [(row["name"], row["before"], row["after"]) for row in rows] == [("t", 1.5, None), ("u", None, 1.0)]


def test_a_table_without_after_has_no_difference():
    before = {"texts": [{"name": "t", "bits_per_byte": 1.5}], "tasks": []}
    (row,) = comparison(before, None)
    assert (row["before"], row["after"], row["difference"]) == (1.5, None, None)
    assert comparison_text([row]).splitlines()[1].split()[-3:] == ["1.5000", "-", "-"]
    assert comparison(None, None) == []
