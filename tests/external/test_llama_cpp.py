# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""GGUF files in llama.cpp itself, by its server, which xllamacpp ships: ids, logits, answers, its chat endpoint."""

import json
import random
import shutil
import subprocess
import urllib.request
from pathlib import Path
from pydoc_data import topics

import pytest
import torch

from conversion import WriteOptions
from conversion.exports.export import export_checkpoint
from modeling_teleflm import TeleFLMForCausalLM, TeleFLMTokenizer
from tests.fixtures.tiny import PIECE_COUNT, tiny_config, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.external

SIZES = {"hidden_size": 64, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96}
MODELS = {
    "grouped queries": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "narrow rows": {"intermediate_size": 88, "hidden_size": 48},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
    "no multipliers": {"use_mup": False},
}
ROWS = tiny_config().vocab_size
LINES = [line for text in topics.topics.values() for line in text.splitlines() if line.strip()]
LETTERS = [chr(code) for code in range(1, 127)] + [*"é中文。，😀‍▁　­̀Пא ا\ue000\ufeff🇩"]
SPELLED = ["<_user>", "<_bot>", "<_system>", "<unk>", "<0x0A>", " ", "  ", "\n", "[PAD601]", "<_use", "<|im_end|>"]


def save(folder: Path, **fields) -> TeleFLMForCausalLM:
    model = tiny_model(tiny_config(**{**SIZES, **fields}))
    model.save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    return model


class Server:
    """llama-server, in this process, with states in float32."""

    def __init__(self, path: Path) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel, parameters.port = 256, 1, 0
        parameters.warmup, parameters.cpuparams.n_threads = False, 1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(parameters)

    def post(self, path: str, **body) -> dict:
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    def ids(self, prompt: str) -> list[int]:
        return self.post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]

    def answer(self, ids: list[int], count: int) -> list[int]:
        answer = self.post("/completion", prompt=ids, n_predict=count, temperature=0, return_tokens=True)
        return answer["tokens"]

    def log_probabilities(self, ids: list[int]) -> dict[int, float]:
        """Of every token behind some; empty where the answer ends at once, of which the server tells nothing."""
        answer = self.post("/completion", prompt=ids, n_predict=1, n_probs=ROWS, temperature=0, cache_prompt=False)
        first = answer.get("completion_probabilities", [{"top_logprobs": []}])[0]
        return {token["id"]: token["logprob"] for token in first["top_logprobs"]}


def some_text(rng: random.Random, *more: str) -> str:
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(LINES)
    if kind < 0.7:
        return "".join(rng.choice(LETTERS) for _ in range(rng.randrange(1, 40)))
    parts = lambda: (rng.choice([*SPELLED, *more]), rng.choice(LINES)[: rng.randrange(1, 20)], rng.choice(LETTERS))  # noqa: E731
    return "".join(rng.choice(parts()) for _ in range(rng.randrange(1, 10)))


def some_chat(rng: random.Random) -> list[dict[str, str]]:
    ends = ("<s>", "</s>")
    messages = [{"role": "system", "content": some_text(rng, *ends)}] * rng.randrange(2)
    for _ in range(rng.randrange(3)):
        messages.append({"role": "user", "content": some_text(rng, *ends)})
        messages.append({"role": "assistant", "content": some_text(rng, *ends)})
    return [*messages, {"role": "user", "content": some_text(rng, *ends)}]


def test_ids(tmp_path):
    """Of 200 chats and 800 texts, in many scripts and with the names of tokens in them."""
    save(tmp_path / "tele")
    tokenizer = TeleFLMTokenizer.from_pretrained(tmp_path / "tele")
    rng = random.Random(0)
    export_checkpoint(tmp_path / "tele", tmp_path / "chat", to="gguf")
    server = Server(tmp_path / "chat/tele-F32.gguf")
    for _ in range(200):
        chat = some_chat(rng)
        prompt = server.post("/apply-template", messages=chat)["prompt"]
        expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert server.ids(prompt) == expected, chat
    for _ in range(800):
        text = some_text(rng)
        assert server.ids(f"<s> {text}") == tokenizer(text).input_ids, text
    del server
    export_checkpoint(tmp_path / "tele", tmp_path / "text", to="gguf", prompts="text")
    server = Server(tmp_path / "text/tele-F32.gguf")
    for text in rng.sample(LINES, 200):
        assert server.ids(text) == tokenizer(text).input_ids, text


TEMPLATE = (
    "{{ unk_token }}{# {% generation %} #}{%- for m in messages %}\n<_user>{% generation %}{{ m.role ~ m.content }}"
    "{% endgeneration %}{{ eos_token }}{% endfor %}{{ '{% generation %}' if add_generation_prompt }}"
)


def test_ids_with_settings_of_the_users_own(tmp_path):
    """Special tokens in an older file, and a template with names and marks that llama.cpp does not have."""
    save(tmp_path / "tele")
    (tmp_path / "tele/tokenizer_config.json").write_text('{"tokenizer_class": "TeleFLMTokenizer"}')
    (tmp_path / "tele/special_tokens_map.json").write_text('{"cls_token": "<_user>", "pad_token": "</s>"}')
    (tmp_path / "tele/chat_template.jinja").write_text(TEMPLATE)
    tokenizer = TeleFLMTokenizer.from_pretrained(tmp_path / "tele")
    export_checkpoint(tmp_path / "tele", tmp_path / "out", to="gguf")
    server, rng = Server(tmp_path / "out/tele-F32.gguf"), random.Random(0)
    for _ in range(30):
        chat = some_chat(rng)
        prompt = server.post("/apply-template", messages=chat)["prompt"]
        expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert server.ids(prompt) == expected, chat


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_the_same_function(fields, tmp_path):
    """In several files; states are float32, and so are the sums, in another order."""
    model = save(tmp_path / "tele", **fields)
    options = WriteOptions(max_shard_size="100KB")
    export_checkpoint(tmp_path / "tele", tmp_path / "out", to="gguf", options=options)
    first, *others = sorted((tmp_path / "out").glob("*.gguf"))
    assert others
    server, rng, compared = Server(first), random.Random(0), 0
    for length in (1, 2, 5, 7, 30, 60, 120):
        ids = [rng.randrange(3, PIECE_COUNT) for _ in range(length)]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            answer = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, length:]
        found = server.log_probabilities(ids)
        compared += len(found) == ROWS
        assert all(abs(expected[token].item() - value) < 2e-5 for token, value in found.items())
        assert server.answer(ids, 12) == [token for token in answer.tolist() if token != 2]
    assert compared >= 3
    assert expected.std() > 0.05


@pytest.mark.parametrize(("outtype", "bound"), [("bf16", 0.05), ("f16", 0.006), ("q8_0", 0.12)])
def test_rounded_weights(outtype, bound, tmp_path):
    model = save(tmp_path / "tele", use_mup=False)
    export_checkpoint(tmp_path / "tele", tmp_path / "out", to="gguf", outtype=outtype)
    server = Server(tmp_path / f"out/tele-{outtype.upper()}.gguf")
    ids = [random.Random(1).randrange(3, PIECE_COUNT) for _ in range(40)]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    found = server.log_probabilities(ids)
    gaps = [abs(expected[token].item() - value) for token, value in found.items()]
    assert len(gaps) == ROWS
    assert 0 < max(gaps) < bound < expected.std() / 5


def test_its_chat_endpoint(tmp_path):
    model = save(tmp_path / "tele")
    export_checkpoint(tmp_path / "tele", tmp_path / "out", to="gguf")
    tokenizer, server = TeleFLMTokenizer.from_pretrained(tmp_path / "tele"), Server(tmp_path / "out/tele-F32.gguf")
    for question in ("hello", "<_user> once </s> more", "多谢"):
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        answer = server.post("/v1/chat/completions", messages=chat, max_tokens=8, temperature=0)
        assert answer["usage"]["prompt_tokens"] == ids.shape[1]
        expected = tokenizer.decode([token for token in tokens if token != 2])
        assert answer["choices"][0]["message"]["content"].strip() == expected.strip()


@pytest.mark.skipif(shutil.which("llama-quantize") is None, reason="needs llama-quantize on the PATH")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_llama_quantize_takes_it_on(kind, tmp_path):
    """Where rows are no multiple of 256, which K types need, it takes others for these."""
    save(tmp_path / "tele", hidden_size=256, intermediate_size=352, head_dim=64)
    export_checkpoint(tmp_path / "tele", tmp_path / "out", to="gguf", outtype="bf16")
    out = tmp_path / f"tele-{kind}.gguf"
    subprocess.run(["llama-quantize", tmp_path / "out/tele-BF16.gguf", out, kind], check=True, capture_output=True)
    assert Server(out).answer([*range(3, 20)], 4)
