# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""How large the study is: `small` is the one whose results are kept, `large` is for a GPU, `toy` for the tests."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Preset:
    """Every number of the study that depends on its size.

    Args:
        name: of the preset.
        device: `cpu` or `cuda`.
        bfloat16: matrix products in it, on float32 weights.
        pieces: of the tokenizer.
        head_dim: of every model.
        width, layers: of the small model; the wide one has twice the width, the deep one twice the layers.
        base_width: at which learning rates are tuned; muP carries them to other widths.
        block, batch: tokens of a sequence, and sequences of a step.
        small_steps: of the small model before it grows.
        grown_steps: of every grown model.
        eval_steps: between two evaluations; divides `grown_steps` and `small_steps`.
        eval_blocks: sequences that a loss is measured on, at most.
        learning_rates, warmups: what every arm is tuned over; a warm-up is a share of `grown_steps`.
        tuning_seed: of the one run of every choice.
        seeds: of the results.
    """

    name: str
    device: str = "cpu"
    bfloat16: bool = False
    pieces: int = 1024
    head_dim: int = 16
    width: int = 64
    layers: int = 4
    base_width: int = 32
    block: int = 128
    batch: int = 8
    small_steps: int = 480
    grown_steps: int = 160
    eval_steps: int = 40
    eval_blocks: int = 64
    learning_rates: tuple[float, ...] = (3e-3, 6e-3, 1.2e-2)
    warmups: tuple[float, ...] = (0.0, 0.1)
    tuning_seed: int = 1000
    seeds: tuple[int, ...] = tuple(range(5))

    def for_tuning(self) -> "Preset":
        """Half the width, half the layers, half the steps."""
        return replace(
            self,
            width=self.width // 2,
            layers=self.layers // 2,
            small_steps=self.small_steps // 2,
            grown_steps=self.grown_steps // 2,
            eval_steps=self.eval_steps // 2,
            seeds=(self.tuning_seed,),
        )


SMALL = Preset("small")
LARGE = Preset(
    "large",
    device="cuda",
    bfloat16=True,
    pieces=16384,
    head_dim=64,
    width=768,
    layers=8,
    base_width=384,
    block=1024,
    batch=32,
    small_steps=4000,
    grown_steps=1200,
    eval_steps=200,
    eval_blocks=256,
    learning_rates=(5e-4, 1e-3, 2e-3, 4e-3),
)
TOY = Preset(
    "toy",
    pieces=512,
    head_dim=8,
    width=32,
    layers=2,
    base_width=16,
    block=32,
    batch=2,
    small_steps=4,
    grown_steps=4,
    eval_steps=2,
    eval_blocks=4,
    learning_rates=(4e-3,),
    warmups=(0.0, 0.5),
    seeds=(0, 1),
)
PRESETS = {preset.name: preset for preset in (SMALL, LARGE, TOY)}
