# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The IFD of `sft select --scorer`, for many pools that have most of their rows in common: each is scored once.

Written anew from the description in `sft.selection.score` at commit 8487ae6, in batches that suit a small model on a
CPU. Since then `--scorer` has changed for conversations that are longer than its window: it leaves what lies beyond out
of both means, where the second mean here is of all of each answer that fits when the answer stands alone. For the
others both are the same, which the tests hold. (The window is now the model's own, if that is less than
[`MAX_TOKENS`]; that of the study's base is not.)
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_teleflm  # noqa: F401  (registers the architecture)

MAX_TOKENS = 1024
BATCH_TOKENS = 2048
_IGNORED = -100

Labelled = tuple[list[int], list[int]]  # ids and labels


class Scorer:
    """A model that scores.

    Args:
        folder: of the model and its tokenizer.
        device: `cpu` or `cuda`.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()

    def score(self, chats: Sequence[list[dict[str, str]]]) -> list[float | None]:
        """The IFD of each conversation; None where there is no token to predict."""
        together, alone, owners = [], [], []
        for owner, messages in enumerate(chats):
            ids = self.tokenizer([f"{m['content']}\n\n" for m in messages], add_special_tokens=False)["input_ids"]
            answers = [message["role"] == "assistant" for message in messages]
            together.append(self._join(list(zip(ids, answers, strict=True))))
            for row, is_answer in zip(ids, answers, strict=True):
                if is_answer:
                    alone.append(self._join([(row, True)]))
                    owners.append(owner)
        sums = [[0.0, 0] for _ in chats]
        for owner, (loss, count) in zip(owners, self._losses(alone), strict=True):
            sums[owner][0] += loss
            sums[owner][1] += count
        return [_ratio(*with_question, *own) for with_question, own in zip(self._losses(together), sums, strict=True)]

    def _join(self, pieces: Sequence[tuple[list[int], bool]]) -> Labelled:
        ids, labels = [self.tokenizer.bos_token_id], [_IGNORED]
        for piece, is_answer in pieces:
            ids += piece
            labels += piece if is_answer else [_IGNORED] * len(piece)
        return ids[:MAX_TOKENS], labels[:MAX_TOKENS]

    @torch.inference_mode()
    def _losses(self, rows: Sequence[Labelled]) -> list[tuple[float, int]]:
        """Sum of the losses of the labelled tokens of each row, and their number."""
        found: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place][0]))
        while order:
            longest = len(rows[order[-1]][0])
            batch = [order.pop() for _ in range(min(len(order), max(1, BATCH_TOKENS // longest)))]
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            labels = torch.full_like(ids, _IGNORED)
            for row, place in enumerate(batch):  # padding at the end, which no token before it sees
                ids[row, : len(rows[place][0])] = torch.tensor(rows[place][0])
                labels[row, : len(rows[place][1])] = torch.tensor(rows[place][1])
            logits = self.model(input_ids=ids.to(self.model.device), use_cache=False).logits[:, :-1].float()
            wanted = labels[:, 1:].to(logits.device)
            losses = cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=_IGNORED, reduction="none")
            sums = losses.view(wanted.shape).sum(1).tolist()
            for place, loss, count in zip(batch, sums, (wanted != _IGNORED).sum(1).tolist(), strict=True):
                found[place] = loss, count
        return found


def _ratio(loss: float, count: int, own_loss: float, own_count: int) -> float | None:
    if not count or not own_count or not own_loss:
        return None
    ifd = (loss / count) / (own_loss / own_count)
    return ifd if math.isfinite(ifd) else None
