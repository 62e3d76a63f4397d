# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""How large a study is: `small` is the one whose results are kept, `large` is for a GPU, `toy` for the tests."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Every number of a study that depends on its size.

    Args:
        name: of the preset.
        device: `cpu` or `cuda`.
        bfloat16: matrix products in it.
        pieces, width, layers, heads: of the tokenizer and the model.
        base_steps, base_batch, base_learning_rate: of pretraining; a batch is of so many sequences.
        base_held_out: texts that bits a byte are measured on.
        length: tokens of a sequence, and of a conversation at most.
        steps, batch, learning_rate: of fine-tuning; every run makes as many steps of `batch * length` tokens.
        count: rows of an arm of the ladder.
        counts: rows of the arms of the second part, besides `count` and all.
        per_source: rows that a source gives to the pool at most.
        held_out: rows held out of a source at most; a fifth of it if that is less.
        least_rows: a source with fewer rows left for the pool is not used.
        faults: shares of the pool that are replaced by faults, in the order in which they are run.
        counted_at: the share of faults at which the second part is run.
        seeds: of everything random.
    """

    name: str
    device: str = "cpu"
    bfloat16: bool = True
    pieces: int = 2048
    width: int = 128
    layers: int = 3
    heads: int = 4
    base_steps: int = 1200
    base_batch: int = 4
    base_learning_rate: float = 3e-3
    base_held_out: int = 300
    length: int = 512
    steps: int = 24
    batch: int = 4
    learning_rate: float = 2e-3
    count: int = 150
    counts: tuple[int, ...] = (50, 450)
    per_source: int = 700
    held_out: int = 64
    least_rows: int = 100
    faults: tuple[float, ...] = (0.0, 0.3, 0.15)
    counted_at: float = 0.3
    seeds: tuple[int, ...] = tuple(range(10))

    def base_rounds(self, blocks: int) -> int:
        """How often pretraining reads its blocks, rounded up."""
        return -(-self.base_steps * self.base_batch // blocks)


SMALL = Preset("small")
LARGE = Preset(
    "large",
    device="cuda",
    pieces=8192,
    width=768,
    layers=12,
    heads=12,
    base_steps=6000,
    base_batch=128,
    base_learning_rate=1e-3,
    length=512,
    steps=200,
    batch=32,
    learning_rate=2e-4,
    count=1000,
    counts=(300, 3000),
    per_source=10_000,
)
PRESETS = {preset.name: preset for preset in (SMALL, LARGE)}
