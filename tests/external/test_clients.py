# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Clients that load what this package writes, each the real program; a row of docs/compatibility.md each.

What quantises is held against the same model with the weights that it says it has: its error is its own, and what is
tested is that it computes a Tele-FLM.
"""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from conversion import export_checkpoint
from modeling_teleflm import TeleFLMForCausalLM
from tests.fixtures.tiny import PIECE_COUNT, tiny_config, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.external
IDS = torch.arange(3, 67)[None]


def save(folder: Path, **fields) -> TeleFLMForCausalLM:
    model = tiny_model(tiny_config(**fields))
    with torch.no_grad():
        model.lm_head.weight[PIECE_COUNT:] = 0
    model.save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> np.ndarray:
    return model(IDS).logits.float().numpy()


# MLX.


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}],
    ids=str,
)
@pytest.mark.parametrize("to", ["granite", "llama"])
def test_mlx_reads_an_export(to, rope, tmp_path):
    mlx = pytest.importorskip("mlx.core")
    load_model = pytest.importorskip("mlx_lm.utils").load_model
    expected = logits(save(tmp_path / "source", rope_parameters=rope))
    export_checkpoint(tmp_path / "source", tmp_path / "out", to=to)

    def apart() -> float:
        model, _ = load_model(tmp_path / "out")
        found = np.array(model(mlx.array(IDS.numpy())).astype(mlx.float32))
        return float(np.abs(found - expected).max())

    assert apart() < 1e-5
    config = json.loads((tmp_path / "out/config.json").read_text())
    older = {"rope_theta": 1e4, "rope_scaling": None}  # what MLX takes where nothing is said, as it knows no newer one
    (tmp_path / "out/config.json").write_text(json.dumps({**config, **older}))
    assert apart() > 1e-3


# Quantised when loaded.


def with_weights(model: TeleFLMForCausalLM, weights: dict[str, torch.Tensor]) -> np.ndarray:
    """The logits of the model with some of its weights replaced, in float32."""
    model.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=False)
    return logits(model)


@pytest.mark.parametrize("width", [256, 240])
def test_bitsandbytes_on_a_cpu(width, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    source = save(tmp_path, hidden_size=width, intermediate_size=2 * width)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    loaded = TeleFLMForCausalLM.from_pretrained(
        tmp_path, quantization_config=how, dtype=torch.float32, device_map="cpu"
    )
    weights = {
        f"{name}.weight": bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in loaded.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    assert len(weights) == 7 * 3
    expected = with_weights(source, weights)
    assert np.abs(logits(loaded) - expected).max() < 1e-4 * np.abs(expected).max()


def test_torchao_int8(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    source = save(tmp_path, hidden_size=256, intermediate_size=512)
    how = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    loaded = TeleFLMForCausalLM.from_pretrained(
        tmp_path, quantization_config=how, dtype=torch.float32, device_map="cpu"
    )
    weights = {
        f"{name}.weight": module.weight.dequantize()
        for name, module in loaded.named_modules()
        if hasattr(module, "weight")
        and hasattr(module.weight, "dequantize")
        and type(module.weight) is not torch.nn.Parameter
    }
    assert len(weights) >= 7 * 3
    expected = with_weights(source, weights)
    assert np.abs(logits(loaded) - expected).max() < 1e-4 * np.abs(expected).max()


# lm-evaluation-harness, as it is.


def test_the_harness_scores_a_text_once_with_add_bos_token_false(tmp_path):
    """Its own class, its own rolling likelihood: as it is, it scores a first <s> after its own <s>."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = save(tmp_path).double()
    tokenizer = tiny_tokenizer(tmp_path)
    text = "The value of a subscription is the item that the key selects."
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    assert ids[0, 0] == tokenizer.bos_token_id

    def harness(**how) -> float:
        lm = HFLM(pretrained=str(tmp_path), dtype="float64", device="cpu", trust_remote_code=True, **how)
        (score,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
        return float(score)

    assert harness(add_bos_token=False) == pytest.approx(float(scores.sum()), rel=1e-9)
    assert harness() < float(scores.sum()) - 0.1


# transformers serve.


@pytest.fixture
def server(tmp_path) -> Iterator:
    """Starts `transformers serve` of a folder; its address, once it answers."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("openai")
    started = []

    def start(folder: Path) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--port", str(port)]
        log = (tmp_path / "serve.log").open("w")
        options = ["--device", "cpu", "--dtype", "float32", "--trust-remote-code", "--host", "127.0.0.1"]
        started.append(subprocess.Popen([*command, *options], stdout=log, stderr=log, cwd=tmp_path))
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                return f"http://127.0.0.1:{port}"
            except (urllib.error.URLError, OSError):
                assert started[-1].poll() is None, (tmp_path / "serve.log").read_text()[-3000:]
                time.sleep(0.5)
        raise AssertionError((tmp_path / "serve.log").read_text()[-3000:])

    yield start
    for process in started:
        process.terminate()
        process.wait(30)


def ask(address: str, folder: Path, *, stream: bool) -> str:
    body = {"model": str(folder), "messages": [{"role": "user", "content": "hello"}], "stream": stream}
    body |= {"temperature": 0, "max_tokens": 12}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        text = answer.read().decode()
    if not stream:
        return json.loads(text)["choices"][0]["message"]["content"]
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event.get("choices"))


def test_transformers_serve(server, tmp_path):
    """An export answers as the model does; a Tele-FLM is refused, as the class is looked for in transformers itself."""
    source = tmp_path / "source"
    model = save(source)
    with torch.no_grad():  # no bytes: of half a letter sentencepiece and Rust make different text
        model.lm_head.weight[:262] = 0
    model.save_pretrained(source)
    tokenizer = tiny_tokenizer(source)
    export_checkpoint(source, tmp_path / "granite", to="granite")
    chat = [{"role": "user", "content": "hello"}]
    template = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompt = type(tokenizer).from_pretrained(tmp_path / "granite").apply_chat_template(chat, **template)
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    address = server(tmp_path / "granite")
    assert ask(address, tmp_path / "granite", stream=False) == expected
    assert ask(address, tmp_path / "granite", stream=True) == expected  # with a tokenizer in Rust alone
    with pytest.raises(urllib.error.HTTPError):
        ask(address, source, stream=False)
    log, until = tmp_path / "serve.log", time.monotonic() + 60
    while "has no attribute TeleFLMForCausalLM" not in log.read_text():  # the answer comes before it is logged
        assert time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.5)
