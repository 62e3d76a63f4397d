# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Folding the multipliers of a Tele-FLM into its embedding and its head, for who knows neither."""

import math
from collections.abc import Mapping

import ml_dtypes

from ..architecture import Architecture
from ..checkpoint.dtypes import DType
from ..mapping import EMBED_TOKENS, LM_HEAD

NEUTRAL = {"use_mup": False, "input_mult": 1.0, "output_mult": 1.0, "mup_scale_factor": 1.0}


def fold_multipliers(architecture: Architecture) -> tuple[Architecture, dict[str, float]]:
    """The architecture that computes the same without multipliers, and the factors on its embedding and head.

    A head that is tied to the embedding needs weights of its own where the two factors differ.
    """
    scales = {EMBED_TOKENS.name: architecture.embedding_scale, LM_HEAD.name: architecture.logit_scale}
    tied = architecture.tie_word_embeddings and architecture.embedding_scale == architecture.logit_scale
    return architecture.evolve(**NEUTRAL, tie_word_embeddings=tied), scales


def folding_notes(
    source: Architecture, target: Architecture, scales: Mapping[str, float], dtypes: Mapping[str, DType]
) -> list[str]:
    """How exact the folding is: a sentence for each factor, and one if the head was untied.

    Args:
        source: what is folded.
        target: what it becomes.
        scales: factors by the names of weights.
        dtypes: of these weights of the output.
    """
    names = [
        name for name in scales if scales[name] != 1.0 and not (name == LM_HEAD.name and target.tie_word_embeddings)
    ]
    notes = [
        f"{name} was multiplied by {scales[name]:g}: {folding_error(scales[name], dtypes[name])}." for name in names
    ]
    if source.tie_word_embeddings and not target.tie_word_embeddings:
        notes.append(f"{LM_HEAD.name} is no longer tied to the embedding: their factors differ.")
    return notes


def folding_error(factor: float, dtype: DType) -> str:
    """How exact a product by a factor is that is rounded once to a dtype, in words."""
    limits = ml_dtypes.finfo(dtype.numpy)
    smallest = f"{float(limits.smallest_normal):.3g}"
    if math.frexp(factor)[0] == 0.5:
        return f"a power of two, so exact where the product is 0 or at least {smallest}"
    return f"rounded to {dtype}, by at most {float(limits.eps) / 2:.3g} of each product of at least {smallest}"
