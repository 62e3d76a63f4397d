# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Fine-tuning on some rows, and the losses on what is held out.

Tokens and labels are those of `sft train`, and so is the loss: the mean over the answers' tokens of a batch. Rows are
joined in a random order, again and again, into one stream that is cut into batches, so every run computes as many
tokens, whatever its rows are.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_teleflm  # noqa: F401  (registers the architecture)
from sft.data.checks import Conversation
from sft.data.labels import IGNORE_INDEX, Labelling, Tokenized, tokenize

from .base import CLIP, autocast
from .presets import Preset

WARMUP = 5  # steps
_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation, and its labels, -100 where nothing is learned."""

    ids: list[int]
    labels: list[int]


class Trainer:
    """The base, from which every run starts anew.

    Args:
        base: its folder.
        preset: size of the runs.
    """

    def __init__(self, base: Path, preset: Preset) -> None:
        self.preset = preset
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(preset.device)
        self.weights = {name: weight.clone() for name, weight in self.model.state_dict().items()}

    def encode(self, messages: list[dict[str, str]]) -> Encoded | None:
        """A conversation as `sft train` reads it, cut at `preset.length`; None if no token of an answer is left."""
        answers = sum(message["role"] == "assistant" for message in messages)
        conversation = Conversation(messages, "", (1.0,) * answers)
        made = tokenize(conversation, self.tokenizer, Labelling(self.preset.length))
        return Encoded(list(made.input_ids), made.labels) if isinstance(made, Tokenized) else None

    def reset(self) -> None:
        """Be the base again."""
        self.model.load_state_dict(self.weights)

    def train(self, rows: Sequence[Encoded], seed: int) -> int:
        """Fine-tune for `preset.steps`; returns how many tokens were learned, each time counted."""
        preset, model = self.preset, self.model.train()
        optimizer = torch.optim.AdamW(model.parameters(), preset.learning_rate, weight_decay=0.0)
        ids, labels = stream(rows, preset.steps * preset.batch * preset.length, seed)
        shape = (preset.steps, preset.batch, preset.length)
        learned = 0
        for step, (batch, wanted) in enumerate(zip(ids.view(shape), labels.view(shape), strict=True)):
            rate = min((step + 1) / WARMUP, (preset.steps - step) / preset.steps)
            for group in optimizer.param_groups:
                group["lr"] = preset.learning_rate * rate
            loss, count = self._loss(batch, wanted)
            (loss / max(count, 1)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            learned += count
        model.eval()
        return learned

    def _loss(self, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Sum of the losses of the labelled tokens, and their number."""
        ids, labels = ids.to(self.preset.device), labels.to(self.preset.device)[:, 1:]
        with autocast(self.preset):
            logits = self.model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return loss, int((labels != IGNORE_INDEX).sum())

    @torch.inference_mode()
    def judge(self, held_out: Mapping[str, Sequence[Encoded]]) -> dict[str, float]:
        """Source -> mean loss a token of its answers, in nats."""
        self.model.eval()
        return {source: self._mean_loss(rows) for source, rows in held_out.items()}

    def _mean_loss(self, rows: Sequence[Encoded]) -> float:
        waiting = sorted(rows, key=lambda row: len(row.ids))
        total, count = 0.0, 0
        while waiting:
            longest = len(waiting[-1].ids)
            size = max(1, _BATCH_TOKENS // longest)
            batch, waiting = waiting[-size:], waiting[:-size]
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            labels = torch.full_like(ids, IGNORE_INDEX)
            for place, row in enumerate(batch):  # padding at the end, which no token before it sees
                ids[place, : len(row.ids)] = torch.tensor(row.ids)
                labels[place, : len(row.labels)] = torch.tensor(row.labels)
            loss, learned = self._loss(ids, labels)
            total += loss.item()
            count += learned
        return total / count


def stream(rows: Sequence[Encoded], tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """So many token ids and labels: the rows one after another, in a new random order each time round."""
    draw = random.Random(f"order {seed}")
    ids: list[int] = []
    labels: list[int] = []
    order = list(rows)
    while len(ids) < tokens:
        draw.shuffle(order)
        for row in order:
            ids += row.ids
            labels += row.labels
    return torch.tensor(ids[:tokens]), torch.tensor(labels[:tokens])
