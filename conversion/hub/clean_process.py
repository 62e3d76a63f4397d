# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a stranger meets who loads a folder: tried in a process that has transformers and cannot import this package.

    python -P clean_process.py  <  {"folder": ..., "tensors": {name: shape}, "generate": true}

Prints one JSON object: {"done": [what was tried], "problem": what failed, or null}. Reads nothing of this package.
"""

import importlib.abc
import json
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

OURS = ("conversion", "evaluation", "growth", "modeling_teleflm", "sft", "teleflm")
TEXTS = ("The capital of France is Paris.", "天地玄黄，宇宙洪荒。", "def f(x):\n    return x + 1\n")


class WithoutUs(importlib.abc.MetaPathFinder):
    """Finds that this package is not installed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Refuse our names; leave others to others."""
        if name.split(".")[0] in OURS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def try_out(folder: str, tensors: dict[str, list[int]], generate: bool, done: list[str]) -> None:
    """Do what a reader of the model would.

    Args:
        folder: holds the model.
        tensors: name -> shape, of the weights that are there.
        generate: whether to load the weights and compute a token.
        done: what was tried, filled on the way.

    Raises:
        Exception: of any kind; something does not work.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    compare(model, tensors)
    done.append("configuration and model code, on the meta device")
    tokenizer = try_tokenizer(folder, done)
    if generate:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids if tokenizer else torch.tensor([[1, 2, 3]])
        before = ids.shape[1]
        made = loaded.generate(ids, max_new_tokens=1, do_sample=False)
        if made.shape[1] != before + 1:
            raise ValueError(f"generate made {made.shape[1] - before} tokens, expected 1")
        done.append("one token")


def compare(model: Any, tensors: dict[str, list[int]]) -> None:
    """Hold a model on the meta device against the weights that are there."""
    expected = {name: list(value.shape) for name, value in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, shape in expected.items():
        if name not in tensors and name not in tied:
            raise ValueError(f"the weights lack {name}, which the configuration asks for")
        if name in tensors and tensors[name] != shape:
            raise ValueError(f"{name} has shape {tensors[name]}, the configuration asks for {shape}")
    for name in tensors:
        if name not in expected:
            raise ValueError(f"the weights hold {name}, which the configuration has no place for")


def try_tokenizer(folder: str, done: list[str]) -> Any:
    """Encode and decode, and apply the chat template, if there is a tokenizer at all."""
    import os

    from transformers import AutoTokenizer

    names = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
    if not any(os.path.isfile(os.path.join(folder, name)) for name in names):
        return None
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        again = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids
        if again.strip() != text.strip() and not unknown:
            raise ValueError(f"the tokenizer makes {again!r} of {text!r}")
    done.append("tokenizer, there and back")
    if os.path.isfile(os.path.join(folder, "tokenizer.json")):
        compare_tokenizers(folder, tokenizer)
        done.append("tokenizer.json, to the same ids")
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": TEXTS[0]}]
        if not tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False).strip():
            raise ValueError("the chat template makes nothing of a question")
        done.append("chat template")
    return tokenizer


def compare_tokenizers(folder: str, tokenizer: Any) -> None:
    """Hold the tokenizer of programs without the folder's code against the folder's own."""
    from transformers import PreTrainedTokenizerFast

    stock: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    names = [name for name in tokenizer.get_vocab() if name.startswith("<") and name.endswith(">")][:16]
    for text in (*TEXTS, *(f" {name} a  b{name}{name}c" for name in names)):
        found, expected = stock(text).input_ids, tokenizer(text).input_ids
        if found != expected:
            raise ValueError(f"tokenizer.json makes {found} of {text!r}, the tokenizer of the folder {expected}")


def main() -> None:
    """Answer the request on stdin."""
    sys.meta_path.insert(0, WithoutUs())
    asked: dict[str, Any] = json.load(sys.stdin)
    done: list[str] = []
    answer: dict[str, Any] = {"done": done, "problem": None}
    try:
        try_out(asked["folder"], asked["tensors"], asked["generate"], done)
    except Exception as error:  # whatever it is, it is what a stranger would meet
        answer["problem"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
