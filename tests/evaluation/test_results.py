# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Results in a file, and in a card: of the model that they were measured of, and of no other."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conversion import WriteOptions, convert_checkpoint
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import read_manifest
from conversion.checkpoint.sources import open_checkpoint
from conversion.hub.card import CardFacts, render_card
from conversion.hub.card_merge import merge_cards
from conversion.hub.front_matter import parse_metadata, split_card
from conversion.hub.results import RESULTS, Result, claimed_results, read_results
from conversion.inspect import inspect_checkpoint
from conversion.model_identity import model_identity
from evaluation.measure import evaluate
from evaluation.results_file import harness_results_of, results_of, write_results
from teleflm.app import app
from tests.fixtures.hub import running_hub

ROOT = Path(__file__).parents[2]
QUIZ = '{"question": "What?", "choices": ["a", "b"], "answer": 0}\n' * 3


@pytest.fixture
def model(folder, tmp_path) -> Path:
    """A folder with a record, as `convert` makes it."""
    out = tmp_path / "model"
    convert_checkpoint(folder, out)
    return out


@pytest.fixture
def measured(model, text, tmp_path) -> Path:
    """The same with results in it."""
    (tmp_path / "quiz.jsonl").write_text(QUIZ)
    teleflm("eval", model, "--text", text, "--tasks", tmp_path / "quiz.jsonl", "--record")
    return model


def teleflm(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return " ".join(result.output.split())


def change_weight(folder: Path) -> None:
    """One value, in the middle of a tensor: neither sizes nor names tell."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def claims(folder: Path, given=()):
    return claimed_results(given, folder, lambda: model_identity(open_checkpoint(folder)))


def test_the_file_says_all_that_it_rests_on(measured, text, tmp_path):
    said = json.loads((measured / RESULTS).read_bytes())
    evaluation = evaluate(measured, texts=[text], tasks=[tmp_path / "quiz.jsonl"], identify=True)
    assert said["results"]["text"]["bits_per_byte,none"] == evaluation.texts[0].bits_per_byte
    assert said["results"]["quiz"]["acc,none"] == evaluation.tasks[0].metrics["acc"].value
    assert said["model"]["weights"] == evaluation.identity.weights
    assert said["configs"]["text"]["sha256"] == evaluation.texts[0].sha256
    assert said["configs"]["text"]["dataset_name"] == "window 256, stride 128"
    assert said["versions"].keys() == {"teleflm", "torch", "transformers", "numpy"}
    assert said["date"].endswith("+00:00")
    assert str(tmp_path) not in (measured / RESULTS).read_text()
    results = {(result.task, result.metric): result for result in read_results(measured / RESULTS)}
    assert results["text", "bits_per_byte"].evaluator.startswith("teleflm ")
    assert results["quiz", "acc_norm"].shots == 0
    assert inspect_checkpoint(measured, check=True).damages == []  # the record is not hurt by it


def test_the_identity_is_of_values_and_numbers_alone(model, folder, tmp_path):
    """However they are spread over files; by the record's digests as by the weights; and any change of them shows."""
    identity = model_identity(open_checkpoint(model))
    assert model_identity(open_checkpoint(model), record=read_manifest(model)) == identity
    convert_checkpoint(folder, tmp_path / "shards", options=WriteOptions(max_shard_size="40kB"))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert model_identity(open_checkpoint(tmp_path / "shards")) == identity

    config = json.loads((model / "config.json").read_bytes())
    for fields, expected in (
        ({"auto_map": {}, "note": 1}, None),
        ({"rms_norm_eps": 1e-4}, "another config.json"),
        ({"mup_scale_factor": 5.0}, "another config.json"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "another config.json"),
    ):
        (model / "config.json").write_text(json.dumps({**config, **fields}))
        assert identity.difference(model_identity(open_checkpoint(model))) == expected
    (model / "config.json").write_text(json.dumps(config))
    with (model / "tokenizer.model").open("ab") as file:
        file.write(b"\0")
    assert identity.difference(model_identity(open_checkpoint(model))) == "another tokenizer"
    change_weight(model)
    assert identity.difference(model_identity(open_checkpoint(model))) == "other weights"


def test_results_are_claimed_of_these_weights_alone(measured):
    results, notes = claims(measured)
    assert {result.task for result in results} == {"text", "quiz"}
    assert notes == []
    change_weight(measured)
    note = f"{RESULTS} was measured with other weights than this folder has: its results are not in the card."
    assert claims(measured) == ((), [note])


def test_given_results_of_other_weights_are_refused(measured, tmp_path):
    other = Path(shutil.copytree(measured, tmp_path / "other"))
    (other / RESULTS).unlink()
    given = read_results(measured / RESULTS)
    assert len(claims(other, given)[0]) == len(given)
    change_weight(other)
    with pytest.raises(CheckpointError, match=r"results of text were measured with other weights .*other --record"):
        claims(other, given)


def test_results_that_name_no_weights(model, text, tmp_path):
    """Without digests nothing is claimed by itself; who gives a file answers for it, which is said."""
    teleflm("eval", model, "--text", text, "--record", "--no-digest")
    results, notes = claims(model)
    assert results == ()
    assert "names no weights (--no-digest)" in notes[0]
    results, notes = claims(model, read_results(model / RESULTS))
    assert len(results) == 2
    assert "nothing says that they are this model's" in notes[0]
    (model / RESULTS).write_text(
        json.dumps({"format": "teleflm-eval-1", "model": 3, "results": {"a": {"acc,none": 1}}})
    )
    with pytest.raises(CheckpointError, match="model is a JSON int, expected digests"):
        read_results(model / RESULTS)


def test_later_results_are_added_and_those_of_other_weights_go(measured, text, tmp_path):
    (tmp_path / "more.txt").write_text("more")
    teleflm("eval", measured, "--text", tmp_path / "more.txt", "--record")
    assert json.loads((measured / RESULTS).read_bytes())["results"].keys() == {"text", "quiz", "more"}
    change_weight(measured)
    said = teleflm("eval", measured, "--text", tmp_path / "more.txt", "--record")
    assert "had results of text, quiz, more that were measured with other weights; they are gone." in said
    assert json.loads((measured / RESULTS).read_bytes())["results"].keys() == {"more"}


def test_results_without_digests_are_never_mixed(measured, text, tmp_path):
    """Neither with each other nor with those of digests: nothing tells whether they are of one model."""
    (tmp_path / "more.txt").write_text("more")
    before = (measured / RESULTS).read_bytes()
    refused = "has results already, and without digests nothing tells whether others are of the same model"
    more = ("eval", measured, "--text", tmp_path / "more.txt", "--no-digest")
    assert refused in teleflm(*more, "--record", status=2)
    assert (measured / RESULTS).read_bytes() == before
    out = tmp_path / "results.json"
    teleflm(*more, "--output", out)
    other = tmp_path / "other"
    shutil.copytree(measured, other)
    change_weight(other)
    assert refused in teleflm("eval", other, "--text", text, "--no-digest", "--output", out, status=2)
    assert json.loads(out.read_bytes())["results"].keys() == {"more"}
    said = teleflm("eval", other, "--text", text, "--output", out)
    assert f"{out}: had results of more that name no weights (--no-digest); they are gone." in said
    assert json.loads(out.read_bytes())["results"].keys() == {"text"}
    content = results_of(evaluate(other, texts=[text]))  # nor by somebody who calls the function
    with pytest.raises(CheckpointError, match=refused):
        write_results(out, content)


def test_of_a_task_that_is_measured_anew_nothing_stays(measured, tmp_path):
    """A text that has its name is of no examples, and of another file, which is said."""
    path = tmp_path / "quiz.txt"
    path.write_text("What?")
    said = teleflm("eval", measured, "--text", path, "--record")
    assert f"{measured}/{RESULTS}: had results of another quiz, of other content; they are gone." in said
    content = json.loads((measured / RESULTS).read_bytes())
    assert content["n-shot"] == {}
    assert content["results"]["quiz"].keys() == {"bits_per_byte,none", "perplexity,none"}
    assert "questions" not in content["configs"]["quiz"]
    assert "had results" not in teleflm("eval", measured, "--text", path, "--record")


def test_numbers_are_shown_even_if_they_cannot_be_written(model, text, tmp_path, monkeypatch):
    """And the file is named; as on a full disk."""

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("evaluation.results_file.write_atomically", full)
    options = ("--text", str(text), "--work", str(tmp_path / "work"), "--output", str(tmp_path / "r.json"), "--json")
    result = CliRunner().invoke(app, ["eval", str(model), *options])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["texts"][0]["name"] == "text"
    assert f"teleflm: {tmp_path}/r.json: No space left on device" in result.stderr
    assert (tmp_path / "work/scores").is_file()


def test_a_file_of_somebody_else_is_not_replaced(model, text, tmp_path):
    for name, content in (("a.json", '{"results": {}}'), ("b.txt", "mine")):
        (tmp_path / name).write_text(content)
        said = teleflm("eval", model, "--text", text, "--output", tmp_path / name, status=2)
        assert "is there already, and no results file of teleflm eval" in said
        assert (tmp_path / name).read_text() == content
    assert "there is no such folder" in teleflm("eval", model, "--text", text, "--output", tmp_path / "x/y", status=2)
    assert "is a folder" in teleflm("eval", model, "--text", text, "--output", tmp_path, status=2)
    both = ("eval", model, "--text", text, "--output", tmp_path / "c.json", "--record")
    assert "exclude each other" in teleflm(*both, status=2)


def test_results_of_the_harness_are_of_a_model_too(model, tmp_path):
    """Its numbers and what names the data; neither texts nor paths."""
    pytest.importorskip("lm_eval")
    identity = model_identity(open_checkpoint(model))
    (tmp_path / "data").mkdir()
    said = {
        "results": {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": "N/A", "acc_norm,none": float("nan")}},
        "configs": {"arc": {"dataset_path": str(tmp_path / "data"), "dataset_name": "x", "doc_to_text": "secret"}},
        "n-shot": {"arc": 5},
    }
    content = harness_results_of(said, identity)
    assert content["results"] == {"arc": {"acc,none": 0.5}}
    assert content["configs"]["arc"].keys() == {"evaluator", "dataset_name"}
    write_results(tmp_path / "r.json", content)
    assert read_results(tmp_path / "r.json")[0].model == identity


def test_a_card_forgets_results_of_weights_that_were_replaced(measured):
    """What the owner says of other evaluations stays; ours are claimed of the weights they were measured of."""
    results = read_results(measured / RESULTS)
    facts = CardFacts("float32", 1, 4, repo_id="o/n", metadata={"license": "mit"})
    theirs = Result("arc", "acc", 0.5)
    before = render_card(replace(facts, results=(*results, theirs)))
    (index,) = parse_metadata(split_card(before)[0])["model-index"]
    assert len([metric for entry in index["results"] for metric in entry["metrics"]]) == len(results) + 1

    def claimed(card: str) -> list[tuple[str, str]]:
        data = ModelCard(card).data
        return sorted((result.dataset_name, result.metric_type) for result in data.eval_results or ())

    assert claimed(merge_cards(render_card(facts), before)) == [("arc", "acc")]
    only = render_card(replace(facts, results=results))
    assert "model-index" not in merge_cards(render_card(facts), only)
    assert claimed(merge_cards(only, before)) == sorted([("arc", "acc"), *((r.task, r.metric) for r in results)])
    assert merge_cards(before, before) == before


def test_results_of_an_evaluation_have_no_infinity(model, text):
    evaluation = evaluate(model, texts=[text])
    endless = replace(evaluation, texts=(replace(evaluation.texts[0], nats=1e9),))
    assert "perplexity,none" not in results_of(endless)["results"]["text"]


def test_publish_puts_them_into_the_card(measured):
    """By the real client, to a Hub on this machine."""
    card = (measured / "README.md").read_text()
    (measured / "README.md").write_text(card.replace("---\n", "---\nlicense: apache-2.0\n", 1))
    command = [sys.executable, "-m", "teleflm", "publish", str(measured), "owner/model", "--no-load"]
    with running_hub() as hub:
        environment = hub.environment(HF_HUB_DISABLE_XET="1")
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        files = hub.repositories["owner/model"].files()
    published = ModelCard(files["README.md"].decode())
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in published.data.eval_results}
    expected = json.loads((measured / RESULTS).read_bytes())["results"]
    assert found["text", "bits_per_byte"] == expected["text"]["bits_per_byte,none"]
    assert found["quiz", "acc_norm"] == expected["quiz"]["acc_norm,none"]
    assert "Measured with teleflm" in published.text
    assert RESULTS not in files
