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

import pytest
import torch

from conversion import convert_checkpoint, export_checkpoint
from modeling_teleflm import TeleFLMForCausalLM, TeleFLMTokenizer
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.external
ROOT, WORKER = Path(__file__).parents[2], Path(__file__).with_name("vllm_worker.py")
NEW_TOKENS, SECONDS = 12, 300
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXTS = ["The value of a subscription", "Grüße, 世界", " leading  spaces", "x" * 40]


@pytest.fixture(scope="module")
def python() -> str:
    given = os.environ.get("TELEFLM_VLLM_PYTHON")
    if not given and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here, and TELEFLM_VLLM_PYTHON names no Python that has it")
    return given or sys.executable


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A Tele-FLM with some factor on its embeddings, made once."""
    made: dict[tuple, Path] = {}

    def make(input_mult: float, **fields) -> Path:
        key = (input_mult, *fields.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("source")
            # Large enough that the factor is heard: a norm hides it from everything but the residual stream.
            tiny_model(tiny_config(**{**SIZES, "input_mult": input_mult, **fields})).save_pretrained(folder)
            tiny_tokenizer(folder).save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


def serve(python: str, folder: Path, tmp_path: Path, *, plugin: bool, prompts: list, **more) -> dict:
    """What vLLM computes of a folder; without the plugin it is a vLLM that knows nothing of this package."""
    out = tmp_path / "served.json"
    asked = {"folder": str(folder), "prompts": prompts, "remote_code": not plugin, "new_tokens": NEW_TOKENS}
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
        input=json.dumps({**asked, "out": str(out), **more}),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@torch.no_grad()
def expected(source: Path, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The greedy continuation by our class, and the log-probability of every token after the first."""
    model = TeleFLMForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.tensor([prompt])
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return ids[0].tolist(), logprobs.tolist()


def farthest(source: Path, served: dict) -> float:
    """How far log-probabilities are apart at most; infinite where another token was chosen."""
    apart = 0.0
    for row in served["rows"]:
        ids, logprobs = expected(source, row["prompt"])
        if ids != row["ids"]:
            return float("inf")
        gaps = [abs(one - other) for one, other in zip(logprobs, row["logprobs"], strict=True)]
        apart = max(apart, *gaps)
    return apart


def same(source: Path, out: Path) -> Path:
    return source


def folded(source: Path, out: Path) -> Path:
    convert_checkpoint(source, out, fold_input_mult=True)
    return out


def exported(to: str):
    def make(source: Path, out: Path) -> Path:
        export_checkpoint(source, out, to=to)
        return out

    return make


PROMPTS = [[1, 300, 301, 302], [1, 5, 17, 400, 33, 250, 599], [1, 280]]


@pytest.mark.parametrize(
    ("input_mult", "make", "plugin"),
    [
        pytest.param(1.0, same, False, id="Hub folder, its own code, factor 1"),
        pytest.param(1.0, same, True, id="Hub folder, plugin, factor 1"),
        pytest.param(16.0, same, True, id="Hub folder, plugin, factor 16"),
        pytest.param(16.0, folded, False, id="Hub folder, its own code, factor 16 folded"),
        pytest.param(16.0, exported("granite"), False, id="granite"),
        pytest.param(16.0, exported("llama"), False, id="llama"),
    ],
)
def test_what_is_served_is_the_model(input_mult, make, plugin, python, sources, tmp_path):
    source = sources(input_mult)
    served = serve(python, make(source, tmp_path / "out"), tmp_path, plugin=plugin, prompts=PROMPTS)
    assert farthest(source, served) < 2e-5


def test_the_warning_is_true(python, sources, tmp_path):
    """vLLM's own class leaves the factor out: with 16 it serves another model, that of a factor of 1."""
    source = sources(16.0)
    served = serve(python, source, tmp_path, plugin=False, prompts=PROMPTS)
    assert farthest(source, served) > 0.1
    ignored = TeleFLMForCausalLM.from_pretrained(source)
    ignored.config.input_mult = 1.0
    ignored.save_pretrained(tmp_path / "ignored")
    assert farthest(tmp_path / "ignored", served) < 2e-5


@pytest.mark.parametrize("fields", [{"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
def test_other_kinds_through_the_plugin(fields, python, sources, tmp_path):
    source = sources(16.0, **fields)
    served = serve(python, source, tmp_path, plugin=True, prompts=PROMPTS)
    assert farthest(source, served) < 2e-5


def test_a_text_has_the_tokens_of_our_tokenizer(python, sources, tmp_path):
    source = sources(1.0)
    tokenizer = TeleFLMTokenizer.from_pretrained(source)
    served = serve(python, source, tmp_path, plugin=True, prompts=TEXTS)
    assert [row["prompt"] for row in served["rows"]] == [tokenizer(text).input_ids for text in TEXTS]
    assert farthest(source, served) < 2e-5
    for row in served["rows"]:
        answer = row["ids"][len(row["prompt"]) :]
        assert row["text"].strip() == tokenizer.decode(answer, skip_special_tokens=True).strip()
