# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What is to grow into what: the target's numbers worked out and checked before anything is read or written."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from conversion.architecture import Architecture
from conversion.checkpoint.errors import CheckpointError
from conversion.optimizer_state import OPTIMIZER_FILE

from .layer_selection import NEW_LAYERS, LayerOrigin, select_layers
from .method import Mask, Method, Rms, Tile, Zero
from .request import GROWN

MULTIPLIERS = ("preserve", "target")
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads")


def lists_state(record: Mapping[str, Any] | None) -> bool:
    """Whether the record of a folder says that a grown optimizer state was written there."""
    files = (record or {}).get("files")
    return isinstance(files, Mapping) and OPTIMIZER_FILE in files


@dataclass(frozen=True)
class Growth:
    """A checked growth.

    Args:
        source: the architecture that grows.
        target: the architecture it becomes, multipliers and epsilon already worked out.
        layers: the origin of each target layer.
        unused_rows: first vocabulary row without a piece in the tokenizer, if known; rows from there to the source's
            vocab_size were never a training target.
        method: how what is new is kept from being heard.
        new_layers: what additional layers start as, see `growth.layer_selection`.
    """

    source: Architecture
    target: Architecture
    layers: tuple[LayerOrigin, ...]
    unused_rows: int | None = None
    method: Method = field(default_factory=Zero)
    new_layers: str = "silent"

    @property
    def departures(self) -> tuple[str, ...]:
        """What is heard at once, so that the target does not compute the source's function; empty if it does."""
        found = []
        grown = [name for name in _WIDTHS if getattr(self.source, name) != getattr(self.target, name)]
        if grown and not self.method.silences:
            found.append(f"what {' and '.join(grown)} gain is random (method {self.method.name})")
        extra = sum(origin.is_copy for origin in self.layers)
        if extra and self.new_layers != "silent":
            what = {"active": "whole copies", "random": "drawn anew"}[self.new_layers]
            found.append(f"{extra} additional layer{'s are' if extra > 1 else ' is'} {what}")
        return tuple(found)

    @property
    def keeps_rms(self) -> bool:
        """Whether readers of a wider axis are multiplied so that what they compute keeps its scale."""
        return isinstance(self.method, Rms)

    @property
    def noise(self) -> float:
        """Standard deviation of what tells copies of a weight apart, in units of the copy's own; 0 where none does."""
        return self.method.noise if isinstance(self.method, Tile) else 0.0

    @property
    def norm_scale(self) -> float:
        """s = sqrt(d / D): factor on every norm weight; 1 unless the method is `zero`.

        With D - d features that are zero, mean(H^2) = (d / D) mean(h^2); together with eps' = eps * d / D the root in
        RMSNorm shrinks by s, so the weights of the old features take up s. Features repeated as a whole leave the mean
        square as it is, and a masked norm divides by the features that count.
        """
        return math.sqrt(self.source.hidden_size / self.target.hidden_size) if isinstance(self.method, Zero) else 1.0

    @property
    def head_scale(self) -> float:
        """Factor on lm_head that makes up for a different multiplier on the logits."""
        ratio = self.source.logit_scale / self.target.logit_scale
        return 1.0 if math.isclose(ratio, 1.0, rel_tol=1e-15) else ratio  # output_mult was rounded: not a change

    @property
    def embedding_scale(self) -> float:
        """Factor on embed_tokens that makes up for a different multiplier on the embeddings."""
        return self.source.embedding_scale / self.target.embedding_scale


def plan_target(
    source: Architecture,
    requested: Mapping[str, Any],
    *,
    layers: str,
    multipliers: str,
    unused_rows: int | None,
    method: Method,
    keeps_input: bool = False,
    new_layers: str = "silent",
) -> Growth:
    """Work out a growth and check that it preserves the function, unless that is not asked of it.

    Args:
        source: the architecture that grows.
        requested: fields of the target's configuration, complete (a preset, a config.json) or some; what is not
            given stays as in the source.
        layers: which layers to copy, see `select_layers`.
        multipliers: `preserve` keeps the weights and sets output_mult so that the logits keep their factor; `target`
            takes the requested multipliers and rescales lm_head. Either way input_mult becomes 1.0, folded into
            embed_tokens, because not every runtime applies it: unless `keeps_input`, or the embeddings are tied, as one
            matrix cannot take a factor as embedding that it does not have as head.
        unused_rows: see `Growth`.
        method: see `Growth`.
        keeps_input: whether the source's input_mult stays.
        new_layers: see `Growth`.

    Raises:
        CheckpointError: something shrinks, or the function cannot be preserved; names the field and both values.
    """
    if multipliers not in MULTIPLIERS:
        raise CheckpointError(f"multipliers is {multipliers!r}, expected one of {', '.join(MULTIPLIERS)}.")
    if new_layers not in NEW_LAYERS:
        raise CheckpointError(f"new_layers is {new_layers!r}, expected one of {', '.join(NEW_LAYERS)}.")
    widens = any(requested.get(name) not in (None, getattr(source, name)) for name in _WIDTHS)
    if not method.silences and not widens:
        raise CheckpointError(
            f"method is {method.name}, but none of {', '.join(_WIDTHS)} grows, and it serves them alone; leave it out."
        )
    if new_layers != "silent" and isinstance(method, Mask):
        raise CheckpointError(
            f"new_layers is {new_layers!r} and the method is mask, which silences additional layers whatever they "
            "hold; leave one of the two out."
        )
    target = _target_architecture(source, requested)
    if new_layers != "silent" and target.num_hidden_layers == source.num_hidden_layers:
        raise CheckpointError(
            f"new_layers is {new_layers!r}, but num_hidden_layers stays {source.num_hidden_layers}: there are none; "
            "leave it out."
        )
    for name in GROWN:
        old, new = getattr(source, name), getattr(target, name)
        if new < old:
            raise CheckpointError(f"{name} would shrink from {old} to {new}; growth only adds.")
    _check_head_dim(source, target, is_given=requested.get("head_dim") is not None)
    _check_attention(source, target)
    target = _with_multipliers(source, target, multipliers, keeps_input=keeps_input)
    if isinstance(method, Tile) and target.hidden_size % source.hidden_size:
        raise CheckpointError(
            f"hidden_size {target.hidden_size} is not a multiple of the source's {source.hidden_size}: features "
            "repeated in part would change the norms; use the method zero."
        )
    # As a decimal: 1e-5 * 8192 / 20480 is to read 4e-06 in config.json, not 4.000000000000001e-06.
    shrink = source.hidden_size / target.hidden_size if isinstance(method, Zero) else 1.0
    epsilon = float(f"{source.rms_norm_eps * shrink:.15g}")
    growth = Growth(
        source=source,
        target=target.evolve(rms_norm_eps=epsilon),
        layers=select_layers(layers, source.num_hidden_layers, target.num_hidden_layers),
        unused_rows=unused_rows,
        method=method,
        new_layers=new_layers,
    )
    _check_tied(growth)
    for name, scale in (("embed_tokens", growth.embedding_scale), ("lm_head", growth.head_scale)):
        if not 0 < scale < math.inf:
            raise CheckpointError(f"{name} would be multiplied by {scale}; ask for multipliers nearer to the source's.")
    return growth


def _target_architecture(source: Architecture, requested: Mapping[str, Any]) -> Architecture:
    names = {known.name for known in fields(Architecture)}
    changes = {name: value for name, value in requested.items() if name in names and value is not None}
    if "num_attention_heads" in changes and source.num_key_value_heads == source.num_attention_heads:
        changes.setdefault("num_key_value_heads", changes["num_attention_heads"])  # multi-head attention stays so
    changes["rms_norm_eps"] = source.rms_norm_eps  # follows from the widths
    base = source.to_config({})
    derived = source.head_dim * source.num_attention_heads == source.hidden_size
    if derived and "head_dim" not in changes and {"hidden_size", "num_attention_heads"} & changes.keys():
        del base["head_dim"]  # as config.json has it: hidden_size / num_attention_heads, checked against the source's
    return Architecture.from_config({**base, **changes}, where="target")


def _check_head_dim(source: Architecture, target: Architecture, *, is_given: bool) -> None:
    if target.head_dim == source.head_dim:
        return
    reason = "rotary frequencies and the softmax scale depend on it"
    if is_given:
        raise CheckpointError(
            f"head_dim is asked to be {target.head_dim}, the source has {source.head_dim}: {reason}; "
            f"ask for head_dim {source.head_dim}."
        )
    heads, rest = divmod(target.hidden_size, source.head_dim)
    fitting = f"num_attention_heads {heads}" if not rest and heads >= source.num_attention_heads else ""
    raise CheckpointError(
        f"head_dim would change from {source.head_dim} to {target.head_dim} (hidden_size {target.hidden_size} / "
        f"num_attention_heads {target.num_attention_heads}): {reason}; use "
        f"{' or '.join(filter(None, (fitting, f'head_dim {source.head_dim}')))}."
    )


def _check_attention(source: Architecture, target: Architecture) -> None:
    copies = key_value_copies(source, target)
    if target.num_key_value_heads < source.num_key_value_heads * copies:
        raise CheckpointError(
            f"num_key_value_heads {target.num_key_value_heads} is too few for {target.num_attention_heads} heads: in "
            f"groups that small, each of the source's {source.num_key_value_heads} key/value heads needs {copies} "
            f"copies; use at least {source.num_key_value_heads * copies}."
        )
    if target.tie_word_embeddings != source.tie_word_embeddings:
        raise CheckpointError(
            f"tie_word_embeddings would change from {source.tie_word_embeddings} to {target.tie_word_embeddings}."
        )


def key_value_copies(source: Architecture, target: Architecture) -> int:
    """How many target key/value heads carry a copy of one source head: ceil(g / g'), g query heads a group."""
    return -(-source.group_size // target.group_size)


def _with_multipliers(
    source: Architecture, target: Architecture, multipliers: str, *, keeps_input: bool
) -> Architecture:
    """The target's multipliers: that on embeddings folded or kept, that on the logits kept or taken as requested."""
    if multipliers == "target" and source.tie_word_embeddings:
        return target  # what its one matrix has to make up for is checked when all is known
    folds = not keeps_input and not source.tie_word_embeddings
    input_mult = 1.0 if folds else source.embedding_scale
    if multipliers == "target":
        return target.evolve(input_mult=input_mult)
    if source.use_mup or target.use_mup:
        scale = target.mup_scale_factor
        return target.evolve(use_mup=True, input_mult=input_mult, output_mult=source.logit_scale * scale)
    return target


def _check_tied(growth: Growth) -> None:
    """With one matrix for embedding and head, only growth that treats both alike can be preserved."""
    if not growth.source.tie_word_embeddings:
        return
    if not isinstance(growth.method, Zero) and growth.source.hidden_size != growth.target.hidden_size:
        raise CheckpointError(
            f"tie_word_embeddings is true and hidden_size would grow from {growth.source.hidden_size} to "
            f"{growth.target.hidden_size} by {growth.method.name}: the head would read what the embedding repeats or "
            "draws at random; use the method zero, where the new columns are zero for both."
        )
    if not math.isclose(growth.head_scale, growth.embedding_scale, rel_tol=1e-15):
        old, new = growth.source, growth.target
        raise CheckpointError(
            f"tie_word_embeddings is true, and embeddings would be multiplied by {new.embedding_scale:.6g} instead of "
            f"{old.embedding_scale:.6g}, logits by {new.logit_scale:.6g} instead of {old.logit_scale:.6g}: one matrix "
            f"cannot be {growth.embedding_scale:.6g} and {growth.head_scale:.6g} times what it was; leave "
            "--multipliers target and the multipliers out, which keeps the source's."
        )
