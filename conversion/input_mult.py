# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The factor on the embeddings, which vLLM's own class leaves out: what to say of it, and how to be rid of it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from .architecture import Architecture
from .checkpoint.dtypes import DType
from .checkpoint.errors import CheckpointError
from .exports.multipliers import folding_error
from .family import TELEFLM, find_family
from .mapping import EMBED_TOKENS

# vLLM's class for TeleFLM has the factor on the logits alone: read in 0.32.0, and seen in what it computes.
_ENGINE, _VERSION = "vLLM", "0.32.0"


class InputFold(NamedTuple):
    """How a model gets rid of its factor on the embeddings.

    Args:
        architecture: that computes the same without it.
        factor: on the embeddings; 1 if there is nothing to fold.
    """

    architecture: Architecture
    factor: float

    @property
    def scales(self) -> dict[str, float]:
        """Name of a weight -> the factor on it."""
        return {EMBED_TOKENS.name: self.factor}

    def notes(self, dtype: DType) -> list[str]:
        """What was done, and how exact it is in the dtype of the output."""
        if self.factor == 1.0:
            return ["The factor on the embeddings is 1: --fold-input-mult had nothing to fold."]
        tied = ""
        if self.architecture.tie_word_embeddings:
            tied = f" The head is tied to it, so output_mult was divided by {self.factor:g}."
        return [
            f"{EMBED_TOKENS.name} was multiplied by input_mult, {self.factor:g}, which is 1 now: "
            f"{folding_error(self.factor, dtype)}.{tied}"
        ]


def fold_input_mult(architecture: Architecture, where: str) -> InputFold:
    """The model with `input_mult` multiplied into its embeddings.

    A head that is tied to them is multiplied with them; the factor on the logits makes up for it.

    Args:
        architecture: of the source.
        where: what to call it in errors.

    Raises:
        CheckpointError: the factor on the logits that would make up for it is no number above 0.
    """
    factor = architecture.embedding_scale
    if factor == 1.0:
        return InputFold(architecture, 1.0)
    folded = architecture.evolve(input_mult=1.0)
    if architecture.tie_word_embeddings:
        folded = folded.evolve(output_mult=architecture.output_mult / factor)
        if not (folded.output_mult > 0 and 0 < folded.logit_scale < math.inf):
            raise CheckpointError(
                f"{where}: input_mult is {factor:g} and the head is tied to the embeddings, so that output_mult "
                f"{architecture.output_mult:g} would become {folded.output_mult:g}; leave --fold-input-mult out."
            )
    return InputFold(folded, factor)


def folded_lineage(fold: InputFold) -> dict[str, float]:
    """What the record of a conversion says of it; nothing where nothing was folded."""
    return {} if fold.factor == 1.0 else {"folded_input_mult": fold.factor}


def input_mult_warning(architecture: Architecture, *, quantised: bool = False) -> str | None:
    """What a serving engine makes of a model's factor on the embeddings; None if it is 1.

    Args:
        architecture: of the model.
        quantised: whether that is quantised, so that it has to be folded before.
    """
    if architecture.embedding_scale == 1.0:
        return None
    of = " of the model that was quantised" if quantised else ""
    return (
        f"input_mult is {architecture.embedding_scale:g}: {_ENGINE}'s own class for TeleFLM ({_VERSION}) leaves it out "
        f"and computes another function, without a word. `teleflm convert --fold-input-mult`{of} makes it 1 for every "
        f"engine; with the teleflm package installed beside {_ENGINE}, a class that has it takes its place."
    )


def input_mult_warning_of(config: Mapping[str, Any], *, quantised: bool = False) -> str | None:
    """The same of a configuration that nobody has checked: None too if it is no Tele-FLM's, or makes no sense."""
    if find_family(config) is not TELEFLM:
        return None
    try:
        return input_mult_warning(Architecture.from_config(config, with_biases=True), quantised=quantised)
    except CheckpointError:
        return None


__all__ = ["InputFold", "fold_input_mult", "folded_lineage", "input_mult_warning", "input_mult_warning_of"]
