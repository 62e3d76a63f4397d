# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a user should know about a growth, beside its numbers."""

import math
from collections import Counter

from conversion.checkpoint.dtypes import DType

from .method import Mask, Tile
from .spec import Growth

SHORT_MASKS = 2000


def growth_notes(growth: Growth, dtype: DType, *, is_cast: bool, base_width: int | None = None) -> list[str]:
    """What a user should know about a growth, a sentence or two each.

    Args:
        growth: what grows into what.
        dtype: of the grown model's weights.
        is_cast: whether it cannot hold all values of the source's.
        base_width: that the learning rate of the last run of training is for; the source's own unless given.
    """
    source, target = growth.source, growth.target
    notes = [
        *_departures(growth),
        *_exactness(growth, dtype, is_cast),
        *_learning_rate(growth, base_width),
        *_repeated_layers(growth),
    ]
    if isinstance(growth.method, Tile) and target.hidden_size > source.hidden_size and not growth.noise:
        notes.append("Without noise the copies stay equal for ever, and the new capacity is never used.")
    if isinstance(growth.method, Mask):
        notes.append(
            "A checkpoint for training: at step 0 its masks silence what is new. `teleflm train` raises them "
            f"over {growth.method.steps} steps; `teleflm fold` writes the plain model of any moment."
        )
        if growth.method.steps < SHORT_MASKS:
            notes.append(
                f"mask_steps {growth.method.steps} is short: untrained weights that speak up within less than "
                f"{SHORT_MASKS} steps disturb the model before they have adapted. MSG uses 5000."
            )
    if growth.norm_scale != 1.0:
        notes.append(
            f"Norm weights are multiplied by {growth.norm_scale:.6g} and rms_norm_eps becomes "
            f"{target.rms_norm_eps:.6g}: the mean square of a wider stream is smaller."
        )
    if source.vocab_size != target.vocab_size:
        if growth.unused_rows is None:
            rows = (
                "The source has no tokenizer that tells its unused vocabulary rows, so new ones repeat the mean of all"
            )
        elif growth.unused_rows < source.vocab_size:
            unused = source.vocab_size - growth.unused_rows
            rows = f"New lm_head rows repeat the mean of the {unused} rows without a piece"
        else:
            rows = "The source has no unused vocabulary rows, so new ones repeat the mean of all"
        change = (
            "probabilities change, whatever becomes of the old logits"
            if growth.departures
            else "old logits are kept, and probabilities change"
        )
        notes.append(f"{rows}, and take part in the softmax: {change}.")
    if growth.head_scale != 1.0 and not source.tie_word_embeddings:
        notes.append(f"lm_head is multiplied by {growth.head_scale:.6g} to make up for the new logit multiplier.")
    if growth.embedding_scale != 1.0:
        what = "The multipliers change" if source.tie_word_embeddings else "input_mult is folded into embed_tokens"
        also = ", so embed_tokens, which is the head too, is" if source.tie_word_embeddings else ","
        notes.append(f"{what}{also} multiplied by {growth.embedding_scale:.6g}.")
    return notes


def _departures(growth: Growth) -> list[str]:
    """That the function is not preserved, and why."""
    if not growth.departures:
        return []
    return [
        f"Not preserving: {'; '.join(growth.departures)}. The grown model computes another function than its source, "
        "and has to be trained before it is of use; `teleflm verify --text` says how far apart they are."
    ]


def _exactness(growth: Growth, dtype: DType, is_cast: bool) -> list[str]:
    """What is the same to the last digit, and what only up to rounding; of a growth that preserves the function."""
    if growth.departures:
        return []
    width = growth.source.hidden_size != growth.target.hidden_size
    factors = {
        f"norm weights x {growth.norm_scale:.4g}": growth.norm_scale,
        f"embed_tokens x {growth.embedding_scale:.4g}": growth.embedding_scale,
        f"lm_head x {growth.head_scale:.4g}": growth.head_scale,
    }
    rounded = [what for what, factor in factors.items() if math.frexp(factor)[0] != 0.5]
    rounded += ["shares of repeated weights"] if _are_shares_rounded(growth) else []
    rounded = ["all weights"] if is_cast else rounded
    if not is_cast and (dtype.itemsize == 8 or not (width or rounded)):
        return []
    holds = ", but for the rounding of weights" if rounded else ""
    cause = f"{' and '.join(rounded)} are rounded to {dtype}" if rounded else "sums are longer"
    grows = growth.source.vocab_size != growth.target.vocab_size
    what = "Old logits are the source's" if grows else "The function is the source's"
    return [
        f"{what} in exact arithmetic{holds}. In {dtype}, {cause}, so logits may differ as they "
        "do between two roundings of the source, and where two tokens are that close another may come first. "
        "`teleflm verify --text` shows by how much."
    ]


def _are_shares_rounded(growth: Growth) -> bool:
    """Whether a weight is repeated with noise, or by a number that is no power of two, and its copies share it out."""
    if not isinstance(growth.method, Tile):
        return False
    old, new = growth.source, growth.target
    fields = ("hidden_size", "intermediate_size", "num_attention_heads")
    times = {getattr(new, field) / getattr(old, field) for field in fields} - {1.0}
    return any(bool(growth.noise) or math.frexp(count)[0] != 0.5 for count in times)


def _learning_rate(growth: Growth, base_width: int | None) -> list[str]:
    old, new = growth.source.hidden_size, growth.target.hidden_size
    if isinstance(growth.method, Tile) and new > old:
        copies = new // old
        return [
            f"Train on with 1/{copies} of the learning rate: a step moves each of the {copies} copies that make up an "
            "old weight."
        ]
    if new == old:
        return []
    return [
        f"By muP, matrices of a stream {new / old:.3g} times as wide learn at {old / new:.3g} of the source's rate, "
        f"embeddings and norms at all of it: `teleflm train --mup_base_width {base_width or old}`."
    ]


def _repeated_layers(growth: Growth) -> list[str]:
    if growth.new_layers == "random":
        return []
    copies = Counter(origin.source for origin in growth.layers if origin.is_copy)
    often = [str(layer) for layer, count in sorted(copies.items()) if count > 1]
    if not often:
        return []
    some = ", ".join(often[:6]) + (", ..." if len(often) > 6 else "")
    return [
        f"Layers {some} are copied more than once: copies of one layer start alike and hardly part in training. Grow "
        "in two stages with training between them, or list other layers with --layers."
    ]
