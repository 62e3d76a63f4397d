# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Every example runs, one on what another made, on a tiny model."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = "What a function returns is what its last return statement says, or None where there is none. " * 20


def example(name: str, *arguments: str | Path) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*map(str, arguments))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("example") / "model"
    tiny_model(tiny_config(num_hidden_layers=2)).save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("example") / "out"
    example("convert", model, out)
    return out


@pytest.fixture(scope="module")
def grown(converted, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("example") / "grown"
    assert example("grow", converted, out)
    return out


def test_all_of_them_are_told_and_tested():
    told = (EXAMPLES / "README.md").read_text()
    here = Path(__file__).read_text()
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert len(names) == 9
    assert all(f"[{name}.py]({name}.py)" in told and f'example("{name}"' in here for name in names)


def test_load(model):
    assert example("load", model, "What is json?").startswith("What is json?")


def test_experts(converted, tmp_path):
    assert example("experts", converted, tmp_path / "out")


def test_train_on(grown, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    metrics = example("train_on", grown, tmp_path / "text.jsonl", tmp_path / "out", 32, 2)
    assert metrics["train_loss"] > 0
    assert (tmp_path / "out/model.safetensors").exists()


def test_select_and_fine_tune(model, tmp_path):
    said = [(f"What is {n} and {n}?", f"It is {2 * n}, I think.") for n in range(40)]
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in said]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    example("select_conversations", tmp_path / "data.jsonl", tmp_path / "selected", 8)
    selected = tmp_path / "selected/selected.jsonl"
    assert len(selected.read_text().splitlines()) == 8
    example("fine_tune", model, selected, tmp_path / "run", tmp_path / "out", 2)
    assert (tmp_path / "out/tokenizer.json").exists()


@pytest.mark.parametrize("to", ["granite", "llama", "gguf"])
def test_serve(to, converted, tmp_path):
    assert str(tmp_path / "out") in example("serve", converted, tmp_path / "out", to)


@pytest.mark.slow
def test_publish(converted, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= set(example("publish", converted, "owner/name"))
