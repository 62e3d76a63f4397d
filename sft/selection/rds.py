# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Embeddings by a causal language model, `--embedder rds:MODEL`: what it makes of a text, not of its words one by one.

The vector of a text is the mean of the last hidden states (after the final norm) of its tokens, weighted by their
position from 1 on, for a causal model has read more of the text where it stands later; then of length 1. That is the
representation of RDS+ (Ivison et al. 2025, arXiv 2503.01807), which has the weights from SGPT (Muennighoff 2022, arXiv
2202.08904). A text is read as it is, without a chat template, after the token that begins a text, up to [`MAX_TOKENS`]
tokens.

The vectors are as wide as the model, and kept as float16: a million rows of one 4,096 wide take 8 GB.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .scorers import load_model
from .stages import SelectionError

PREFIX = "rds:"
MAX_TOKENS = 2048
BATCH_TOKENS = 8192


class HiddenStateEncoder:
    """A causal language model, on a GPU if there is one. It is loaded once in each process.

    Args:
        name: a Hub folder, or the name of a model on the Hub.

    Raises:
        SelectionError: the model cannot be loaded, lacks weights of its layers, or its tokenizer is another model's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._model: Any = None
        self._tokenizer: Any = None
        self._load()

    def __call__(self, texts: Iterable[str]) -> np.ndarray:
        """Vectors of length 1, float32 `[texts, hidden_size]`.

        Raises:
            SelectionError: the model gives values that are not finite.
        """
        model, tokenizer = self._load()
        starts = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
        start = next(start for start in starts if start is not None)
        cut = list(texts)
        rows = tokenizer(cut, add_special_tokens=False)["input_ids"] if cut else []
        sequences = [[start, *row][:MAX_TOKENS] for row in rows]
        result = np.zeros((len(sequences), model.config.get_text_config().hidden_size), np.float32)
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        while order:
            longest = len(sequences[order[-1]])
            batch = [order.pop() for _ in range(min(len(order), max(1, BATCH_TOKENS // longest)))]
            result[batch] = weighted_means(model, [sequences[index] for index in batch])
        if not np.isfinite(result).all():
            raise SelectionError(f"--embedder {PREFIX}{self._name}: its hidden states are not finite; is it damaged?")
        return result / np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-12)

    def __getstate__(self) -> dict[str, Any]:
        return {"_name": self._name, "_model": None, "_tokenizer": None}

    def _load(self) -> tuple[Any, Any]:
        if self._model is None:
            from transformers import AutoModelForCausalLM

            told = f"--embedder {PREFIX}{self._name}"
            model, self._tokenizer = load_model(self._name, AutoModelForCausalLM, told, with_head=False)
            self._model = model.base_model
        return self._model, self._tokenizer


def weighted_means(model: Any, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """The mean of the last hidden states, weighted by position from 1 on: float32 `[sequences, hidden_size]`.

    Args:
        model: without the head.
        sequences: ids, at least one each; what pads the shorter ones does not count.
    """
    import torch

    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    places = torch.arange(ids.shape[1])
    inside = places < lengths[:, None]
    weights = torch.where(inside, places + 1.0, 0.0)
    weights /= weights.sum(1, keepdim=True)
    with torch.inference_mode():
        states = model(
            ids.to(model.device), attention_mask=inside.long().to(model.device), use_cache=False
        ).last_hidden_state
        # Padding may hold anything, and 0 times infinity is no number.
        states = states.float().masked_fill(~inside[:, :, None].to(states.device), 0)
        return torch.einsum("bt,btd->bd", weights.to(states.device), states).cpu().numpy()


__all__ = ["BATCH_TOKENS", "MAX_TOKENS", "PREFIX", "HiddenStateEncoder", "weighted_means"]
