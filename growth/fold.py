# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Folding masks into the weights: the plain checkpoint that computes what a masked one computes at some alpha.

The residual stream of a masked model is H = [h; alpha h'], and its RMSNorm divides the sum of squares by
d_eff = d + alpha (D - d). A plain RMSNorm divides by D, so its weights take sqrt(d_eff / D) and its epsilon d_eff / D;
everything else is linear and takes the factor of its mask. At alpha = 1 all factors are 1; at alpha = 0 the result is
what the method `zero` would have made, except that it holds no new weights any more.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from conversion.architecture import MODEL_TYPE, Architecture
from conversion.checkpoint.dtypes import DType, parse_dtype
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.execute import CheckpointResult, WriteOptions, execute
from conversion.checkpoint.parent import parent_of
from conversion.checkpoint.plan import Box, CheckpointPlan, Copy, Fill, Piece, TensorPlan, View
from conversion.checkpoint.sources import Source, open_checkpoint
from conversion.hub.card import model_facts
from conversion.hub.contents import hub_config, hub_sidecars, sidecar_notes
from conversion.hub.remote import local_view
from conversion.mapping import Weight, check_tensors, weights
from conversion.masked import MASKED_MODEL_TYPE, masked_config
from conversion.quantisation import refuse_quantised

from .operators import grow_axis
from .spec import Growth

_OUTPUTS = ("o_proj", "down_proj")

Run = tuple[int, int]
"""Neighbours along one dimension that share a mask: how many, and the power of alpha they are multiplied by."""


@dataclass(frozen=True)
class MaskState:
    """`growth_state` of a masked checkpoint's config.json: what is new in it, and how far its masks have gone.

    Args:
        step: optimizer steps done under the masks.
        total_steps: the number of steps after which alpha is 1.
        hidden_size, intermediate_size, rms_norm_eps: of the model that grew.
        new_heads: positions of the new query heads.
        new_layers: positions of the new layers.
        schedule: `linear`, alpha = step / total_steps.
    """

    step: int
    total_steps: int
    hidden_size: int
    intermediate_size: int
    rms_norm_eps: float
    new_heads: tuple[int, ...]
    new_layers: tuple[int, ...]
    schedule: str = "linear"

    @property
    def alpha(self) -> float:
        """The volume of what is new, 0 to 1."""
        return min(self.step / self.total_steps, 1.0)

    @classmethod
    def of_growth(cls, growth: Growth, steps: int) -> "MaskState":
        """The masks of a growth, before the first of the steps over which they rise."""
        target = growth.target
        old_heads = {
            key_value * target.group_size + query
            for part in grow_axis("query", growth).parts
            for key_value in range(part.start[0], part.start[0] + part.window.size[0])
            for query in range(part.start[1], part.start[1] + part.window.size[1])
        }
        return cls(
            step=0,
            total_steps=steps,
            hidden_size=growth.source.hidden_size,
            intermediate_size=growth.source.intermediate_size,
            rms_norm_eps=target.rms_norm_eps,
            new_heads=tuple(head for head in range(target.num_attention_heads) if head not in old_heads),
            new_layers=tuple(index for index, origin in enumerate(growth.layers) if origin.is_copy),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config.json") -> "MaskState":
        """Read and check the state of a masked checkpoint.

        Args:
            config: content of its config.json.
            where: what to call it in errors.

        Raises:
            CheckpointError: the checkpoint has no masks, or their state is incomplete or wrong.
        """
        if config.get("model_type") != MASKED_MODEL_TYPE:
            raise CheckpointError(
                f"{where}: model_type is {config.get('model_type')!r}, expected {MASKED_MODEL_TYPE!r}; only what "
                "`teleflm grow --method mask` made has masks to fold."
            )
        state = config.get("growth_state")
        if not isinstance(state, dict):
            raise CheckpointError(f"{where}: growth_state is {state!r}, expected an object.")
        return cls(**{field.name: _value(state, field.name, field.type, where) for field in fields(cls)})

    def to_config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of a masked checkpoint, from that of the plain one.

        `rms_norm_eps` is null in it: a runtime that does not know masks refuses that, whatever it makes of model_type.
        """
        state = {**asdict(self), "new_heads": list(self.new_heads), "new_layers": list(self.new_layers)}
        return masked_config(base, state)


def _value(state: Mapping[str, Any], name: str, kind: Any, where: str) -> Any:
    """One field of `growth_state`, of the type that `MaskState` declares."""
    value: Any = state.get(name)
    if kind is str:
        valid, expected = value == "linear", "'linear'"
    elif kind in (int, float):
        lowest_is_zero = name == "step"
        valid = _is_number(value, kind) and (value > 0 or (value == 0 and lowest_is_zero))
        expected = "a number from 0 on" if lowest_is_zero else "a number above 0"
    else:
        valid = isinstance(value, list) and all(_is_number(item, int) and item >= 0 for item in value)
        expected = "a list of positions"
    if not valid:
        raise CheckpointError(f"{where}: growth_state.{name} is {value!r}, expected {expected}.")
    return tuple(value) if isinstance(value, list) else value


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)


def masked_architecture(config: Mapping[str, Any], where: str = "config.json") -> tuple[Architecture, MaskState]:
    """The sizes of a masked checkpoint and the state of its masks; rms_norm_eps is that of the masked norm.

    Raises:
        CheckpointError: it has no masks, or the two contradict each other.
    """
    state = MaskState.from_config(config, where)
    plain = {**config, "model_type": MODEL_TYPE, "rms_norm_eps": state.rms_norm_eps}
    architecture = Architecture.from_config(plain, where)
    for field in ("hidden_size", "intermediate_size"):
        if getattr(state, field) > getattr(architecture, field):
            raise CheckpointError(
                f"{where}: growth_state.{field} is {getattr(state, field)}, above the model's "
                f"{getattr(architecture, field)}."
            )
    limits = {"new_heads": architecture.num_attention_heads, "new_layers": architecture.num_hidden_layers}
    for field, limit in limits.items():
        outside = [index for index in getattr(state, field) if index >= limit]
        if outside:
            raise CheckpointError(f"{where}: growth_state.{field} lists {outside[0]}, the model has 0 to {limit - 1}.")
    return architecture, state


def fold_masks(
    source: str | Path,
    out: str | Path,
    *,
    alpha: float | None = None,
    dtype: str | None = None,
    options: WriteOptions | None = None,
    dry_run: bool = False,
) -> CheckpointResult:
    """Write the plain Tele-FLM that computes what a masked checkpoint computes. Needs no torch.

    Args:
        source: folder of a masked checkpoint, for example a `checkpoint-N` of its training.
        out: folder to write: new, or the finished result of the same call.
        alpha: volume of what is new, 0 (the model that grew) to 1 (the target); the checkpoint's own unless given.
        dtype: of the output's weights; the source's unless given.
        options: how to write.
        dry_run: plan and check everything, write nothing.

    Raises:
        CheckpointError: the source has no masks or cannot be used; nothing was written.
        OSError: the disk failed; the output folder is not loadable.
    """
    options = options or WriteOptions()
    checkpoint = open_checkpoint(local_view(source))
    plan = plan_fold(checkpoint, alpha=alpha, dtype=parse_dtype(dtype) if dtype else None)
    state = MaskState.from_config(checkpoint.config or {})
    folded = plan.lineage["alpha"]
    notes = [f"Masks at alpha {folded:g}; the checkpoint is at step {state.step} of {state.total_steps}."]
    if folded < 1 and folded < state.alpha:
        notes.append("Below the checkpoint's own alpha, this is not the model that was trained.")
    notes += sidecar_notes(Path(checkpoint.folder), plan.sidecars)
    return execute(plan, Path(out), options, notes, dry_run=dry_run)


def plan_fold(checkpoint: Source, *, alpha: float | None = None, dtype: DType | None = None) -> CheckpointPlan:
    """The plan of a fold; see `fold_masks`.

    Raises:
        CheckpointError: the source has no masks, alpha is not from 0 to 1, or the tensors are not those expected.
    """
    where = f"{checkpoint.folder}/config.json"
    refuse_quantised(checkpoint, "folding")
    masked, state = masked_architecture(checkpoint.config or {}, where)
    alpha = state.alpha if alpha is None else alpha
    if not 0 <= alpha <= 1:
        raise CheckpointError(f"alpha is {alpha}, expected a number from 0 to 1.")
    check_tensors(checkpoint.tensors, masked, checkpoint.folder)

    share = (state.hidden_size + alpha * (masked.hidden_size - state.hidden_size)) / masked.hidden_size  # d_eff / D
    architecture = masked.evolve(rms_norm_eps=float(f"{masked.rms_norm_eps * share:.15g}"))
    tensors = tuple(
        _fold_weight(name, weight, layer, checkpoint.tensors[name], masked, state, alpha, share, dtype)
        for name, weight, layer in weights(architecture)
    )
    lineage = {
        "operation": "fold",
        "alpha": alpha,
        "masks": asdict(state),
        "parent": parent_of(checkpoint),
    }
    base = {key: value for key, value in (checkpoint.config or {}).items() if key != "growth_state"}
    out_dtype = tensors[0].dtype.name
    config = hub_config(base, architecture, out_dtype)
    sidecars = hub_sidecars(Path(checkpoint.folder), model_facts(config, out_dtype, lineage))
    plan = CheckpointPlan(tensors, config, sidecars, lineage)
    plan.check()
    return plan


def _fold_weight(
    name: str,
    weight: Weight,
    layer: int | None,
    view: View,
    masked: Architecture,
    state: MaskState,
    alpha: float,
    share: float,
    dtype: DType | None,
) -> TensorPlan:
    if weight.axes == ("hidden",):
        piece = Copy(Box.whole(view.shape), view, math.sqrt(share))
        return TensorPlan(name, view.shape, dtype or view.dtype, (piece,))
    powers = mask_powers(weight, masked, state, is_new_layer=layer in state.new_layers)
    if alpha == 1.0 or powers is None:
        return TensorPlan.copy_of(name, view, dtype)
    rows, columns = powers
    pieces = tuple(
        _scaled(Box((row, column), (height, width)), view, alpha ** (p + q))
        for row, (height, p) in _starts(rows)
        for column, (width, q) in _starts(columns)
    )
    return TensorPlan(name, view.shape, dtype or view.dtype, pieces)


def mask_powers(
    weight: Weight, masked: Architecture, state: MaskState, *, is_new_layer: bool
) -> tuple[list[Run], list[Run]] | None:
    """The powers of alpha on the rows and on the columns of a weight; they add up. None for a weight without a mask."""
    kind = weight.name.split(".")[-2]
    stream = _merge([(state.hidden_size, 0), (masked.hidden_size - state.hidden_size, 1)])
    if kind == "embed_tokens":
        return [(masked.vocab_size, 0)], stream
    if kind not in _OUTPUTS:
        return None
    neurons = [(state.intermediate_size, 0), (masked.intermediate_size - state.intermediate_size, 1)]
    heads = [(masked.head_dim, int(head in state.new_heads)) for head in range(masked.num_attention_heads)]
    return [(count, power + is_new_layer) for count, power in stream], _merge(heads if kind == "o_proj" else neurons)


def _merge(runs: Iterable[Run]) -> list[Run]:
    grouped = itertools.groupby((run for run in runs if run[0]), key=lambda run: run[1])
    return [(sum(count for count, _ in group), power) for power, group in grouped]


def _starts(runs: list[Run]) -> Iterable[tuple[int, Run]]:
    return zip(itertools.accumulate((count for count, _ in runs[:-1]), initial=0), runs, strict=True)


def _scaled(box: Box, view: View, scale: float) -> Piece:
    return Copy(box, view.window(box), scale) if scale else Fill(box)
