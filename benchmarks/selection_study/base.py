# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The base model: a small Tele-FLM, pretrained on the documentation and the source of installed packages.

It has seen none of the study's conversations, and neither has its tokenizer. What it has learned is measured: bits a
byte on texts that were held out, beside those of the same model untrained and of single tokens (unigrams).
"""

import ast
import importlib.metadata
import importlib.util
import json
import math
import random
import textwrap
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch.nn.functional import cross_entropy

from demo.corpus import collect
from modeling_teleflm import TeleFLMConfig, TeleFLMForCausalLM, TeleFLMTokenizer

from .presets import Preset

# Import name -> distribution; all of them are pinned in constraints.txt.
PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "numpy": "numpy",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "hypothesis": "hypothesis",
    "datasets": "datasets",
    "accelerate": "accelerate",
    "peft": "peft",
    "trl": "trl",
    "huggingface_hub": "huggingface_hub",
    "rich": "rich",
    "fsspec": "fsspec",
}
CODE = ("networkx", "hypothesis", "rich", "fsspec", "numpy", "accelerate")  # those whose source is read too
CHARACTERS = 3_000_000  # of docstrings, and of source, that a package gives at most
LEAST = 80  # characters of a text
MOST = 6_000
HELD_OUT = 40  # one text in so many
TOKENIZER_CHARACTERS = 4_000_000
ADAM: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1}
CLIP = 1.0

Sample = tuple[list[int], int]  # token ids, and bytes of the text they are of


def autocast(preset: Preset) -> Any:
    """bfloat16 in matrix products, with float32 weights; nothing for a preset that has it off."""
    return torch.autocast(preset.device, torch.bfloat16) if preset.bfloat16 else nullcontext()


# --- texts ------------------------------------------------------------------------------------------------------------


def read_texts(characters: int = CHARACTERS) -> tuple[list[str], list[str]]:
    """Texts to pretrain on and to measure by, in a random order that is always the same."""
    texts = dict.fromkeys(collect().texts)
    for package in PACKAGES:
        for kind in ("doc", "code"):
            taken = 0
            for text in _package_texts(package, kind):
                if taken > characters:
                    break
                if text not in texts:
                    texts[text] = None
                    taken += len(text)
    kept, held_out = [], []
    for text in texts:
        (held_out if zlib.crc32(text.encode()) % HELD_OUT == 0 else kept).append(text)
    random.Random(0).shuffle(kept)
    return kept, held_out


def _package_texts(package: str, kind: str) -> Iterator[str]:
    """Docstrings, or for some packages the source of functions and classes without them."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed; the base is pretrained on its text.")
    if kind == "code" and package not in CODE:
        return
    for file in sorted(Path(spec.origin).parent.rglob("*.py")):
        if {"test", "tests", "testing", "_vendor"}.intersection(file.parts):
            continue
        source = file.read_text(encoding="utf-8", errors="ignore")
        lines = source.splitlines(keepends=True)
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            if kind == "doc":
                text = ast.get_docstring(node)
            else:
                whole = isinstance(node, ast.FunctionDef)
                text = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])) if whole else None
            if text and len(text) >= LEAST:
                yield text[:MOST]


def versions() -> dict[str, str]:
    """Those of the packages whose text the base has read."""
    return {name: importlib.metadata.version(name) for name in sorted(PACKAGES.values())}


# --- tokenizer and model ----------------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], folder: Path, pieces: int) -> TeleFLMTokenizer:
    """A sentencepiece BPE of so many pieces, from some of the texts; every byte is a piece."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(texts, TOKENIZER_CHARACTERS),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=pieces,
        byte_fallback=True,
        character_coverage=0.9995,
        user_defined_symbols=["<_system>", "<_user>", "<_bot>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return TeleFLMTokenizer(str(folder / "tokenizer.model"))


def _lines(texts: Sequence[str], characters: int) -> Iterator[str]:
    taken = 0
    for text in texts:
        yield from (line for line in text.splitlines() if line.strip())
        taken += len(text)
        if taken > characters:
            return


def make_model(preset: Preset) -> TeleFLMForCausalLM:
    """The untrained model of a preset; weights by seed 0."""
    torch.manual_seed(0)
    return TeleFLMForCausalLM(
        TeleFLMConfig(
            vocab_size=preset.pieces,
            hidden_size=preset.width,
            intermediate_size=preset.width * 8 // 3 // 8 * 8,
            num_hidden_layers=preset.layers,
            num_attention_heads=preset.heads,
            max_position_embeddings=1024,  # what the score reads
        )
    ).to(preset.device)


# --- training ---------------------------------------------------------------------------------------------------------


def pretrain(folder: Path, preset: Preset, texts: tuple[list[str], list[str]] | None = None) -> dict[str, Any]:
    """Make the base in a folder; returns what the page says of it."""
    kept, held_out = texts or read_texts()
    tokenizer = train_tokenizer(kept, folder / "tokenizer", preset.pieces)
    needed = preset.base_steps * preset.base_batch * preset.length
    ids: list[int] = []
    used = 0
    for used, text in enumerate(kept, start=1):  # noqa: B007
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= needed:
            break
    blocks = torch.tensor(ids[: len(ids) // preset.length * preset.length]).view(-1, preset.length)
    samples = [(tokenizer(text)["input_ids"][: preset.length], text) for text in held_out[: preset.base_held_out]]
    # A text that is cut gives only the bytes whose tokens are there.
    measured = [(row, len(tokenizer.decode(row, skip_special_tokens=True).encode())) for row, _ in samples]
    model = make_model(preset)
    untrained = bits_per_byte(model, measured, preset)
    started = time.perf_counter()
    _train(model, blocks, preset)
    seconds = time.perf_counter() - started
    described = {
        "preset": preset.name,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "texts": used,
        "characters": sum(map(len, kept[:used])),
        "tokens": needed,
        "distinct_tokens": min(blocks.numel(), needed),
        "seconds": round(seconds),
        "held_out_texts": len(measured),
        "held_out_bytes": sum(size for _, size in measured),
        "bits_per_byte": {
            "untrained": round(untrained, 3),
            "unigram": round(unigram_bits_per_byte(blocks, measured, preset.pieces), 3),
            "base": round(bits_per_byte(model, measured, preset), 3),
        },
        "packages": versions(),
    }
    tokenizer.save_pretrained(folder)
    model.cpu().save_pretrained(folder)
    (folder / "base.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return described


def _train(model: TeleFLMForCausalLM, blocks: torch.Tensor, preset: Preset) -> None:
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), preset.base_learning_rate, **ADAM)
    order = torch.cat([torch.randperm(len(blocks), generator=draw) for _ in range(1 + preset.base_rounds(len(blocks)))])
    model.train()
    for step in range(preset.base_steps):
        rate = preset.base_learning_rate * base_schedule(step, preset.base_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = blocks[order[step * preset.base_batch : (step + 1) * preset.base_batch]].to(preset.device)
        with autocast(preset):
            logits = model(input_ids=batch, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"base: step {step} of {preset.base_steps}, loss {loss.item():.3f}", flush=True)
    model.eval()


def base_schedule(step: int, steps: int) -> float:
    """The share of the peak rate: up in a hundredth of the steps, and as a cosine down to a tenth."""
    warmup = max(1, steps // 100)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# --- what it has learned ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def bits_per_byte(model: TeleFLMForCausalLM, samples: Sequence[Sample], preset: Preset) -> float:
    """Of texts that begin with `<s>`, which itself is not predicted."""
    bits, size = 0.0, 0
    for ids, nbytes in samples:
        row = torch.tensor([ids], device=preset.device)
        logits = model(input_ids=row, use_cache=False).logits
        bits += cross_entropy(logits[0, :-1].float(), row[0, 1:], reduction="sum").item() / math.log(2)
        size += nbytes
    return bits / size


def unigram_bits_per_byte(blocks: torch.Tensor, samples: Sequence[Sample], pieces: int) -> float:
    """Of the same texts by how often each token is in the training text, one added to each."""
    counts = Counter(blocks.flatten().tolist())
    total = blocks.numel() + pieces
    bits = -sum(math.log2((counts[token] + 1) / total) for ids, _ in samples for token in ids[1:])
    return bits / sum(nbytes for _, nbytes in samples)
