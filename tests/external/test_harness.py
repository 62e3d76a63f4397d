# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""lm-evaluation-harness itself, on tasks of this folder: our numbers are its numbers, and no text begins twice."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conversion.checkpoint.errors import CorruptData
from evaluation import harness
from evaluation.harness import run_harness
from evaluation.measure import evaluate
from teleflm.app import app
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.external
WORDS = ("the", "value", "of", "a", "subscription", "is", "item", "that", "key", "selects", "天地", "玄黄", "café")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("lm_eval")
    path = tmp_path_factory.mktemp("model")
    tiny_model(tiny_config()).save_pretrained(path)
    tiny_tokenizer(path).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    path, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)

    def some(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    quiz = [
        {
            "question": some(30) + draw.choice(["", " "]),
            "choices": [some(5) for _ in range(4)],
            "answer": draw.randrange(4),
        }
        for _ in range(60)
    ]
    texts = [{"text": some(60)} for _ in range(5)]
    for name, rows, kind in (("quiz", quiz, "multiple_choice"), ("texts", texts, "loglikelihood_rolling")):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        is_quiz = name == "quiz"
        metrics = ["acc", "acc_norm", "acc_bytes"] if is_quiz else ["bits_per_byte"]
        task = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path / f"{name}.jsonl")}},
            "test_split": "test",
            "output_type": kind,
            "doc_to_text": "{{question}}" if is_quiz else "",
            "doc_to_target": "{{answer}}" if is_quiz else "{{text}}",
            "metric_list": [{"metric": metric} for metric in metrics],
            **({"doc_to_choice": "{{choices}}"} if is_quiz else {}),
        }
        (path / f"{name}.yaml").write_text(json.dumps(task))  # which is YAML
    return path


def test_multiple_choice_is_the_harness(folder, tasks):
    theirs = run_harness(str(folder), ["local_quiz"], dtype="float32", include_path=tasks)["results"]["local_quiz"]
    (ours,) = evaluate(folder, tasks=[tasks / "quiz.jsonl"]).tasks
    for metric, found in ours.metrics.items():
        assert found.value == pytest.approx(theirs[f"{metric},none"], abs=1e-12)
        assert found.stderr == pytest.approx(theirs[f"{metric}_stderr,none"], abs=1e-9)


def test_bits_per_byte_is_the_harness_without_its_second_beginning(folder, tasks):
    """As it is, the harness scores `<s>` after `<s>`: with the class of ours it does not."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    name = "local_texts"
    theirs = run_harness(str(folder), [name], dtype="float32", include_path=tasks)["results"][name][
        "bits_per_byte,none"
    ]
    assert evaluate(folder, texts=[tasks / "texts.jsonl"]).texts[0].bits_per_byte == pytest.approx(theirs, rel=1e-6)
    manager = TaskManager(include_path=str(tasks))
    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu")
    plain = simple_evaluate(model=model, tasks=[name], task_manager=manager)
    assert plain["results"][name]["bits_per_byte,none"] > theirs * 1.001


def test_the_command(folder, tasks, tmp_path):
    command = ["eval", str(folder), "--harness", "local_quiz,local_texts", "--include-path", str(tasks)]
    out = tmp_path / "results.json"
    result = CliRunner().invoke(app, [*command, "--output", str(out), "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["results"].keys() == {"local_quiz", "local_texts"}
    assert json.loads(out.read_bytes())["model"]["weights"] == said["model"]["weights"]
    assert str(tasks) not in out.read_text()
    unknown = CliRunner().invoke(app, ["eval", str(folder), "--harness", "no_such_task"])
    assert unknown.exit_code == 2
    assert "lm-evaluation-harness has no task no_such_task" in unknown.stderr
    limited = CliRunner().invoke(app, [*command, "--output", str(out), "--limit", "2"])
    assert "--limit is for a try" in limited.stderr


@pytest.mark.parametrize("identify", [True, False])
def test_a_model_that_is_swapped_while_the_harness_runs(identify, folder, tasks, tmp_path, monkeypatch):
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    run = harness.run_harness

    def swapping(*arguments, **options):
        with (model / "model.safetensors").open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\0\0\0\x3f")
        return run(*arguments, **options)

    monkeypatch.setattr(harness, "run_harness", swapping)
    time.sleep(0.02)  # a step of the clock by which file systems note times
    message = "it was changed or replaced meanwhile" if identify else "was written to or replaced"
    with pytest.raises(CorruptData, match=message):
        harness.measure_by_harness(
            str(model), ["local_quiz"], identify=identify, include_path=tasks, limit=1, dtype="float32"
        )
