# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The trackers themselves, without a server: what they were given, read from the files that they wrote."""

import json
import sqlite3
import time

import pytest
from datasets import Dataset

import sft.training.train
from sft.training.train import train
from sft.training.trainer import WeightedSFTTrainer
from tests.sft.conftest import conversations, data_file, make_recipe, model_dir  # noqa: F401

pytestmark = pytest.mark.external
RUN = {
    "max_steps": 2,
    "learning_rate": 0.05,
    "max_length": 128,
    "sample_prompts": ["Who?"],
    "sample_max_new_tokens": 3,
}
NUMBERS = {"train/loss", "train/tokens_per_second", "train/source_loss/one", "train/source_loss/two", "train/grad_norm"}


@pytest.fixture
def recipe(make_recipe, monkeypatch, tmp_path):  # noqa: F811
    """Rows of two sources in turn, and a folder of its own for whatever a tracker writes."""
    build = WeightedSFTTrainer.__init__

    def build_with_sources(self, **keys):
        rows = keys["train_dataset"].to_dict()
        numbers = [[index % 2] * len(ids) for index, ids in enumerate(rows["input_ids"])]
        build(self, **{**keys, "train_dataset": Dataset.from_dict({**rows, "sources": numbers})})

    monkeypatch.setattr(WeightedSFTTrainer, "__init__", build_with_sources)
    monkeypatch.setattr(sft.training.train, "source_names", lambda report: ["one", "two"])
    monkeypatch.chdir(tmp_path)
    return lambda **keys: make_recipe(**RUN, **keys)


def samples(tmp_path):
    return [json.loads(line)["text"] for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]


def test_tensorboard_has_the_numbers_and_the_texts(recipe, tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    result = train(recipe(report_to="tensorboard"), progress=False)
    found = events.EventAccumulator(str(tmp_path / "board"))
    found.Reload()
    assert set(found.Tags()["scalars"]) >= NUMBERS
    logged = [entry["source_loss/two"] for entry in result.log_history if "loss" in entry]
    assert [event.value for event in found.Scalars("train/source_loss/two")] == pytest.approx(logged)
    tag = next(name for name in found.Tags()["tensors"] if name.startswith("train/sample_1"))
    shown = [event.tensor_proto.string_val[0].decode() for event in found.Tensors(tag)]
    assert shown == samples(tmp_path)
    assert [event.step for event in found.Tensors(tag)] == [0, 2]


def test_trackio_has_the_numbers_and_the_texts(recipe, tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for module in (trackio, trackio.utils, trackio.sqlite_storage):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    result = train(recipe(report_to="trackio", project="ours"), progress=False)
    (database,) = (tmp_path / "trackio").glob("ours*.db")
    with sqlite3.connect(database) as connection:
        rows = [json.loads(row[0]) for row in connection.execute("select metrics from metrics order by id")]
    logged = [entry["source_loss/one"] for entry in result.log_history if "loss" in entry]
    assert [row["train/source_loss/one"] for row in rows if "train/source_loss/one" in row] == pytest.approx(logged)
    assert set().union(*rows) >= NUMBERS
    assert [row["train/sample_1"] for row in rows if "train/sample_1" in row] == samples(tmp_path)


def test_wandb_works_without_its_server(recipe, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train(recipe(report_to="wandb"), progress=False)
    wandb.finish()  # a process of its own writes, when it likes to
    names = [name.encode() for name in ("train/source_loss/one", "train/tokens_per_second", "train/sample_1")]
    missing = names
    for _ in range(100):
        files = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
        content = b"".join(file.read_bytes() for file in files)
        missing = [name for name in names if name not in content]
        if not missing:
            break
        time.sleep(0.3)
    assert missing == []


def test_mlflow_works_on_a_folder(recipe, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    result = train(recipe(report_to="mlflow"), progress=False)
    logged = [entry["source_loss/two"] for entry in result.log_history if "loss" in entry]
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [point.value for point in client.get_metric_history(run.info.run_id, "source_loss/two")] == pytest.approx(
        logged
    )
