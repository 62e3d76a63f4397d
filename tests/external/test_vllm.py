# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""vLLM on a CPU serves each kind of folder: token ids and log-probabilities beside those of transformers in float32.

    TELEFLM_VLLM_PYTHON=/path/to/python pytest -m external tests/external/test_vllm.py

vLLM pins its own transformers, so it may live in an environment of its own, with this package installed in it; without
the variable it has to be in this one.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conversion import convert_checkpoint, export_checkpoint
from modeling_teleflm import TeleFLMForCausalLM, TeleFLMTokenizer
from tests.fixtures.tiny import PIECE_COUNT, tiny_config, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.external
ROOT, WORKER = Path(__file__).parents[2], Path(__file__).with_name("vllm_worker.py")
NEW_TOKENS, SECONDS = 12, 900
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
PROMPTS = [[1, 300, 301, 302], [1, 5, 17, 400, 33, 250, 599], [1, 280]]
TEXTS = ["The value of a subscription", "Grüße, 世界", " leading  spaces", "x" * 40]
MODELS: dict[str, dict[str, Any]] = {
    "factor 1": {"input_mult": 1.0},
    "factor 16": {"input_mult": 16.0},
    "tied": {"input_mult": 16.0, "tie_word_embeddings": True},
    "biases": {"input_mult": 16.0, "attention_bias": True},
}


@pytest.fixture(scope="module")
def python() -> str:
    given = os.environ.get("TELEFLM_VLLM_PYTHON")
    if not given and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here, and TELEFLM_VLLM_PYTHON names no Python that has it")
    return given or sys.executable


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The models, and the factor of 16 folded and exported. No logit of a row without a piece is the largest."""
    made = {}
    for name, fields in MODELS.items():
        made[name] = tmp_path_factory.mktemp("served") / "model"
        model = tiny_model(tiny_config(**{**SIZES, **fields}))
        with torch.no_grad():
            model.lm_head.weight[PIECE_COUNT:] = 0
        model.save_pretrained(made[name])
        tiny_tokenizer(made[name]).save_pretrained(made[name])
    for name in ("folded", "granite", "llama"):
        made[name] = made["factor 16"].parent / name
        if name == "folded":
            convert_checkpoint(made["factor 16"], made[name], fold_input_mult=True)
        else:
            export_checkpoint(made["factor 16"], made[name], to=name)
    return made


def serve(python: str, folders: dict[str, Path], place: Path, *, plugin: bool, texts: str | None = None) -> dict:
    """What vLLM computes of each folder; without the plugin it is a vLLM that knows nothing of this package."""
    asked = {name: {"folder": str(folder), "prompts": PROMPTS} for name, folder in folders.items()}
    if texts:
        asked["texts"] = {"folder": str(folders[texts]), "prompts": TEXTS}
    out = place / "served.json"
    request = {"folders": asked, "remote_code": not plugin, "new_tokens": NEW_TOKENS, "out": str(out)}
    environment = {
        **os.environ,
        "VLLM_PLUGINS": "teleflm" if plugin else "none",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT) if plugin else "",
    }
    done = subprocess.run(
        [python, str(WORKER)],
        input=json.dumps(request),
        env=environment,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def with_plugin(python, folders, tmp_path_factory) -> dict:
    some = {name: folders[name] for name in MODELS}
    return serve(python, some, tmp_path_factory.mktemp("plugin"), plugin=True, texts="factor 1")


@pytest.fixture(scope="module")
def without(python, folders, tmp_path_factory) -> dict:
    some = {name: folders[name] for name in ("factor 1", "factor 16", "folded", "granite", "llama")}
    return serve(python, some, tmp_path_factory.mktemp("without"), plugin=False)


@torch.no_grad()
def expected(model: TeleFLMForCausalLM, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The greedy continuation by our class, and the log-probability of every token after the first."""
    ids = torch.tensor([prompt])
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return ids[0].tolist(), logprobs.tolist()


def farthest(source: Path, rows: Any, **changes: float) -> float:
    """How far log-probabilities are apart at most; infinite where another token was chosen."""
    assert isinstance(rows, list), rows
    model = TeleFLMForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, value in changes.items():
        setattr(model.config, name, value)
    apart = 0.0
    for row in rows:
        ids, logprobs = expected(model, row["prompt"])
        if ids != row["ids"]:
            return float("inf")
        apart = max(apart, *(abs(one - other) for one, other in zip(logprobs, row["logprobs"], strict=True)))
    print(f"{source.name}: {apart:.3g}")
    return apart


@pytest.mark.parametrize("name", MODELS)
def test_a_hub_folder_with_the_plugin(name, with_plugin, folders):
    assert farthest(folders[name], with_plugin[name]) < 2e-5


@pytest.mark.parametrize(
    ("name", "source"),
    [("factor 1", "factor 1"), ("folded", "factor 16"), ("granite", "factor 16"), ("llama", "factor 16")],
)
def test_a_folder_without_this_package(name, source, without, folders):
    assert farthest(folders[source], without[name]) < 2e-5


def test_the_warning_is_true(without, folders):
    """vLLM's own class leaves the factor out: with 16 it serves another model, that of a factor of 1."""
    assert farthest(folders["factor 16"], without["factor 16"]) > 0.1
    assert farthest(folders["factor 16"], without["factor 16"], input_mult=1.0) < 2e-5


def test_a_text_has_the_tokens_of_our_tokenizer(with_plugin, folders):
    tokenizer = TeleFLMTokenizer.from_pretrained(folders["factor 1"])
    rows = with_plugin["texts"]
    assert farthest(folders["factor 1"], rows) < 2e-5
    assert [row["prompt"] for row in rows] == [tokenizer(text).input_ids for text in TEXTS]
    for row in rows:
        answer = tokenizer.decode(row["ids"][len(row["prompt"]) :], skip_special_tokens=True)
        assert row["text"].strip() == answer.strip()
