# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What is compared: how each model comes about, and how long it trains.

Three shapes: the small model, `wide` with twice its width (four times the weights of a layer), `deep` with twice its
layers. A grown model trains for `grown_steps` after the `small_steps` of the small one.
"""

from dataclasses import dataclass
from typing import Any, Literal

from conversion.architecture import MODEL_TYPE, Architecture
from growth.method import Mask, Method, Random, Rms, Tile, Zero
from growth.stages import flops_per_token

from .presets import Preset

Shape = Literal["small", "wide", "deep"]
EQUAL_TOKENS, EQUAL_FLOPS = "equal tokens", "equal FLOPs"
_MASKED = 0.5  # of the steps of a grown model are under masks


@dataclass(frozen=True)
class Arm:
    """One way to a model.

    Args:
        name: of the arm.
        shape: of the model.
        method: how the small model grows; "" is a start from random weights.
        new_layers: of a deeper model, see `growth.layer_selection`.
        layers: likewise: where they go.
        moments: whether Adam's moments grow too.
        length: of a start from random weights: as many tokens as the grown models of a shape have seen, the small
            model's steps included, or steps of as many FLOPs as they took.
        of: that shape; the small model's FLOPs depend on it.
    """

    name: str
    shape: Shape
    method: str = ""
    new_layers: str = "silent"
    layers: str = "interleave"
    moments: bool = False
    length: str = EQUAL_TOKENS
    of: Shape = "wide"


def _grown(shape: Shape, name: str, method: str, **fields: Any) -> list[Arm]:
    """An arm with fresh moments, and one with grown ones."""
    fresh = Arm(name, shape, method, of=shape, **fields)
    return [fresh, Arm(f"{name}, moments", shape, method, moments=True, of=shape, **fields)]


def _scratch(shape: Shape) -> list[Arm]:
    return [
        Arm(f"{shape} from scratch, {length}", shape, length=length, of=shape) for length in (EQUAL_TOKENS, EQUAL_FLOPS)
    ]


SMALL_ARMS = (
    Arm("small, equal tokens", "small"),
    Arm("small, equal FLOPs to wide", "small", length=EQUAL_FLOPS, of="wide"),
    Arm("small, equal FLOPs to deep", "small", length=EQUAL_FLOPS, of="deep"),
)
ARMS = (
    *SMALL_ARMS,
    *_scratch("wide"),
    *_grown("wide", "zero", "zero"),
    *_grown("wide", "tile", "tile"),
    *_grown("wide", "rms", "rms"),
    Arm("mask", "wide", "mask"),
    Arm("random", "wide", "random"),
    *_scratch("deep"),
    *_grown("deep", "silent copies", "zero", layers="interleave"),
    *_grown("deep", "stacked copies", "zero", layers="stack", new_layers="active"),
    Arm("interleaved copies", "deep", "zero", layers="interleave", new_layers="active", of="deep"),
    Arm("masked copies", "deep", "mask", layers="interleave", of="deep"),
)
BY_NAME = {arm.name: arm for arm in ARMS}


def config(shape: Shape, preset: Preset) -> dict[str, Any]:
    """The configuration of a model that starts from nothing, under muP."""
    width = preset.width * (2 if shape == "wide" else 1)
    return {
        "model_type": MODEL_TYPE,
        "vocab_size": preset.pieces,
        "hidden_size": width,
        "intermediate_size": 11 * width // 4 // 8 * 8,
        "num_hidden_layers": preset.layers * (2 if shape == "deep" else 1),
        "num_attention_heads": width // preset.head_dim,
        "head_dim": preset.head_dim,
        "max_position_embeddings": preset.block,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_mup": True,
        "input_mult": 1.0,
        "output_mult": 1.0,
        "mup_scale_factor": width / preset.base_width,
    }


def make_method(arm: Arm, preset: Preset) -> Method:
    """The method of growth of an arm."""
    methods: dict[str, Method] = {
        "zero": Zero(),
        "tile": Tile(),
        "rms": Rms(),
        "random": Random(),
        "mask": Mask(round(_MASKED * preset.grown_steps)),
    }
    return methods[arm.method]


def step_flops(shape: Shape, preset: Preset) -> float:
    """FLOPs of a step of training."""
    architecture = Architecture.from_config(config(shape, preset))
    return float(flops_per_token(architecture, preset.block)) * preset.block * preset.batch


def steps(arm: Arm, preset: Preset) -> int:
    """Steps that an arm trains for; of a grown model, without the small one's."""
    if arm.method:
        return preset.grown_steps
    if arm.length == EQUAL_TOKENS:
        return preset.small_steps + preset.grown_steps
    spent = preset.small_steps * step_flops("small", preset) + preset.grown_steps * step_flops(arm.of, preset)
    return round(spent / step_flops(arm.shape, preset))


def total_flops(arm: Arm, preset: Preset) -> float:
    """FLOPs of an arm, those of the small model before it grew included."""
    before = preset.small_steps * step_flops("small", preset) if arm.method else 0.0
    return before + steps(arm, preset) * step_flops(arm.shape, preset)
