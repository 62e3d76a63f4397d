# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Configuration of the Tele-FLM (FLM-2) family: Llama's fields and the four muP fields."""

import json
import math
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

_PRESETS = Path(__file__).parent / "presets"


@strict
class TeleFLMConfig(LlamaConfig):
    r"""
    Configuration of a Tele-FLM model: a [`LlamaConfig`] with four muP fields.

    With `use_mup`, the model multiplies the token embeddings by `input_mult` and the logits by
    `output_mult / mup_scale_factor` (Tele-FLM technical report, arXiv 2404.16645, section 3.5). Only the ratio counts:
    the published 52B writes 0.5 / 16, its instruction-tuned sibling 1.0 / 32. The defaults are neutral, so that a saved
    configuration keeps its meaning, and a default TeleFLM computes exactly what a Llama of the same shape computes.

    Args:
        use_mup (`bool`, *optional*, defaults to `False`): whether the three multipliers below apply.
        input_mult (`float`, *optional*, defaults to 1.0): factor on the token embeddings.
        output_mult (`float`, *optional*, defaults to 1.0): numerator of the factor on the logits.
        mup_scale_factor (`float`, *optional*, defaults to 1.0): denominator of the factor on the logits.
        **kwargs: every field of [`LlamaConfig`], with its meaning and default.

    Raises:
        ValueError: `hidden_size` or `num_attention_heads` is below 1.
        huggingface_hub.errors.StrictDataclassError: a field has the wrong type, or fields contradict each other; the
            message names them and their values.

    ```python
    >>> from modeling_teleflm import TeleFLMConfig

    >>> config = TeleFLMConfig.from_preset("tele-flm-52b")
    >>> config.hidden_size, config.logit_scale
    (8192, 0.03125)
    ```
    """

    model_type = "TeleFLM"

    # `int` too, because JSON writes 2.0 as 2 and `@strict` would refuse it for a `float`.
    use_mup: bool = False
    input_mult: float | int = 1.0
    output_mult: float | int = 1.0
    mup_scale_factor: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        # The parent derives head_dim by division, so a zero has to be refused before that.
        for field in ("hidden_size", "num_attention_heads"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        super().__post_init__(**kwargs)

    @property
    def embedding_scale(self) -> float:
        """Factor on the token embeddings: `input_mult` under muP, else 1."""
        return self.input_mult if self.use_mup else 1.0

    @property
    def logit_scale(self) -> float:
        """Factor on the logits: `output_mult / mup_scale_factor` under muP, else 1.

        TRL's fused language-model head bypasses the model's own forward and applies `config.logit_scale` itself, so
        this name is a contract with it. Derived, therefore read-only and never written to config.json.
        """
        return self.output_mult / self.mup_scale_factor if self.use_mup else 1.0

    def validate_architecture(self) -> None:
        """Cross-field checks, run by `@strict` after `__init__`."""
        for field in ("vocab_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "head_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )
        if self.head_dim is not None and self.head_dim % 2 != 0:
            raise ValueError(f"head_dim is {self.head_dim}; rotary position embeddings need an even one.")
        if self.num_attention_heads % (self.num_key_value_heads or 1) != 0:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}."
            )
        for field in ("input_mult", "output_mult", "mup_scale_factor"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{field} is {value}; a multiplier must be a finite number above 0.")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "TeleFLMConfig":
        """Build the configuration of a member of the family, by name.

        Args:
            name: `tele-flm-52b`, `flm-2-52b-instruct-2407` or `tele-flm-1t`, as published; or `tele-flm-102b`, which
                was never published: its sizes are inferred from the reports of its growth into the 1T.
            **overrides: fields to set on top of the preset, for example `num_hidden_layers=2`.

        Raises:
            ValueError: no preset has that name; the message lists those there are.
        """
        path = _PRESETS / f"{name}.json"
        presets = sorted(preset.stem for preset in _PRESETS.glob("*.json"))
        if name not in presets:
            known = f"known presets: {', '.join(presets)}" if presets else "presets ship with the teleflm package"
            raise ValueError(f"there is no preset {name!r}; {known}.")
        return cls(**{**json.loads(path.read_text()), **overrides})


__all__ = ["TeleFLMConfig"]
