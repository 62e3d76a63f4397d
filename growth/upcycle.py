# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Sparse upcycling (arXiv 2212.05055): experts of a dense model, as a GraniteMoE that computes the same function.

A layer of the result computes sum_k g_k E_k(x) over the K experts that its router chooses for x, where the dense layer
computes E(x). The gates are a softmax over the router's K largest logits, so they add up to 1; with N copies of E the
sum is E(x), whichever experts are chosen and however large their gates. The router is free, then, and not all routers
are alike to what comes after:

Zeros send every token to the same K experts, as ties go to whichever comes first, with gates of 1/K. These K get the
same gradients and stay equal for ever, and the others get none. Random rows part the tokens, so each expert has
gradients of its own. With entries from N(0, 1 / hidden_size), the logits of an x with root mean square r are from
N(0, r^2), whatever the width: experts that are chosen together have different gates, and none has all of the weight.

While experts are equal, no gate matters to the loss, so the router learns from the load-balancing loss alone; it
learns from the loss itself as soon as they have parted. Noise parts them before the first step. It changes the
function: unlike repeated features, whose noise can be made to cancel, experts are mixed by gates that differ from token
to token.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes

from conversion.architecture import Architecture
from conversion.checkpoint.dtypes import FLOAT64, DType, parse_dtype
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.execute import CheckpointResult, WriteOptions, execute
from conversion.checkpoint.plan import Box, CheckpointPlan, Copy, Noise, Normal, Statistic, TensorPlan
from conversion.experts import GRANITEMOE, INPUT_LINEAR, OUTPUT_LINEAR, ROUTER, Experts
from conversion.exports.granite import granite_multipliers
from conversion.exports.model import ExportedModel, open_model, stock_config, stock_sidecars
from conversion.hub.contents import sidecar_notes
from conversion.mapping import weights

MOST_EXPERTS = 1024  # twice what published models have; each is three pieces of a plan in every layer
AUX_LOSS_COEF = 0.001  # GraniteMoeConfig's own


@dataclass(frozen=True)
class Upcycling(CheckpointResult):
    """Experts that were planned and, unless it was a dry run, written.

    Args:
        source: the dense model that they are of.
        experts: what it became.
        noise: by which they differ, see `upcycle_checkpoint`.
    """

    source: Architecture
    experts: Experts
    noise: float = 0.0


def upcycle_checkpoint(
    source: str | Path,
    out: str | Path,
    num_experts: int,
    top_k: int,
    *,
    noise: float = 0.0,
    dtype: str | None = None,
    seed: int = 0,
    options: WriteOptions | None = None,
    dry_run: bool = False,
) -> Upcycling:
    """Make a GraniteMoE of a dense model: N copies of each feed-forward layer, and a router that chooses K of them.

    Without noise it computes the same function. Needs no torch, and no more memory than a few blocks, whatever the
    model.

    Args:
        source: folder of a Tele-FLM or a Llama, safetensors or `.bin`.
        out: folder to write: new, or the finished or interrupted result of the same call.
        num_experts: N, experts in each layer.
        top_k: K, experts that compute a token.
        noise: standard deviation of what tells experts apart, as a fraction of a weight's own; 0 for none. Any other
            does not preserve the function: notes, card and record say so.
        dtype: of the output's weights; the source's unless given.
        seed: of the routers and of the noise.
        options: how to write.
        dry_run: plan and check everything, write nothing.

    Raises:
        CheckpointError: the source or the numbers cannot be used; nothing was written.
        OSError: the disk failed; the output folder is not loadable.
    """
    _check_numbers(num_experts, top_k, noise)
    options = options or WriteOptions()
    model = open_model(source, doing="making experts")
    experts = Experts(model.architecture, num_experts, top_k)
    plan = plan_upcycling(model, experts, noise=noise, cast=parse_dtype(dtype) if dtype else None, seed=seed)
    notes = [
        *upcycling_notes(experts, noise, plan.tensors),
        *sidecar_notes(model.folder, plan.sidecars, family=model.family, stock=True),
    ]
    result = execute(plan, Path(out), options, notes, dry_run=dry_run)
    outcome = (plan, result.shards, result.notes, result.written)
    return Upcycling(*outcome, model.architecture, experts, noise, foreseen=result.foreseen)


def _check_numbers(num_experts: int, top_k: int, noise: float) -> None:
    if not 2 <= num_experts <= MOST_EXPERTS:
        raise CheckpointError(f"experts is {num_experts}, expected 2 to {MOST_EXPERTS:,}.")
    if not 1 <= top_k <= num_experts:
        raise CheckpointError(f"top_k is {top_k}, expected 1 to {num_experts}, the number of experts.")
    if not 0 <= noise < 1:
        raise CheckpointError(f"noise is {noise}, expected a number from 0 to below 1.")


def plan_upcycling(
    model: ExportedModel, experts: Experts, *, noise: float = 0.0, cast: DType | None = None, seed: int = 0
) -> CheckpointPlan:
    """The plan of an upcycling: every tensor of the GraniteMoE in data-flow order, checked to tile.

    Args:
        model: the dense model, open.
        experts: what it becomes; `dense` is the model's architecture.
        noise: see `upcycle_checkpoint`.
        cast: dtype of the output's weights; each source tensor's own unless given.
        seed: of the routers and of the noise.

    Raises:
        CheckpointError: GraniteMoE has no way to say what the model is, or its tensors are not floating-point.
    """
    sources = model.checkpoint.tensors
    for name, *_ in weights(model.architecture):
        dtype = sources[name].dtype
        if not dtype.is_floating:
            raise CheckpointError(f"{name} has dtype {dtype}; experts are made of floating-point weights.")
    _check_heard(noise, model.dtype(cast))
    tensors: list[TensorPlan] = []
    for name, _, layer in weights(model.architecture):
        stem, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind == "gate_proj":
            pair = [f"{stem}.gate_proj.weight", f"{stem}.up_proj.weight"]
            tensors.append(_router(ROUTER.format(layer), experts, cast or sources[name].dtype))
            tensors.append(_stacked(INPUT_LINEAR.format(layer), pair, model, experts, noise, cast))
        elif kind == "down_proj":
            tensors.append(_stacked(OUTPUT_LINEAR.format(layer), [name], model, experts, noise, cast))
        elif kind != "up_proj":
            tensors.append(TensorPlan.copy_of(name, sources[name], cast))
    config = expert_config(model, experts, model.dtype(cast))
    is_cast = cast is not None and any(sources[name].dtype != cast for name, *_ in weights(model.architecture))
    lineage = _lineage(model, experts, noise, cast.name if cast and is_cast else None)
    sidecars = stock_sidecars(model, config, lineage, model.dtype(cast))
    plan = CheckpointPlan(tuple(tensors), config, sidecars, lineage, seed)
    plan.check()
    return plan


def _check_heard(noise: float, dtype: DType) -> None:
    """Refuse noise that nearly all weights are rounded out of: of it nobody could say that experts differ."""
    least = float(ml_dtypes.finfo(dtype.numpy).eps) / 16
    if 0 < noise < least:
        raise CheckpointError(
            f"noise is {noise:g}, which is lost where weights are rounded to {dtype}; expected 0 for none, or "
            f"{least:.2g} or more."
        )


def expert_config(model: ExportedModel, experts: Experts, dtype: DType) -> dict[str, Any]:
    """The config.json of the GraniteMoE.

    Raises:
        CheckpointError: the factor on the logits is none that it can say.
    """
    numbers = {
        "num_local_experts": experts.num_local_experts,
        "num_experts_per_tok": experts.num_experts_per_tok,
        "output_router_logits": False,
        "router_aux_loss_coef": AUX_LOSS_COEF,
    }
    return {
        **stock_config(model, model.architecture, GRANITEMOE, dtype),
        **granite_multipliers(model.architecture),
        **numbers,
    }


def _router(name: str, experts: Experts, dtype: DType) -> TensorPlan:
    """The router [N, hidden] of a layer, random: see the head of this module."""
    shape = (experts.num_local_experts, experts.dense.hidden_size)
    return TensorPlan(name, shape, dtype, (Normal(Box.whole(shape), router_std(experts)),))


def router_std(experts: Experts) -> float:
    """Standard deviation of a router's entries, with which logits have the scale of what the router reads."""
    return experts.dense.hidden_size**-0.5


def _stacked(
    name: str, originals: Sequence[str], model: ExportedModel, experts: Experts, noise: float, cast: DType | None
) -> TensorPlan:
    """Matrices [rows, columns] on top of each other, N times over: [N, all rows, columns]."""
    views = [model.checkpoint.tensors[original] for original in originals]
    dtypes = {cast or view.dtype for view in views}
    if len(dtypes) > 1:
        found = " and ".join(f"{original} is {view.dtype}" for original, view in zip(originals, views, strict=True))
        raise CheckpointError(f"{found}: experts have both in one tensor; --dtype gives them one dtype.")
    pieces, start = [], 0
    for original, view in zip(originals, views, strict=True):
        rows, columns = view.shape
        window = view.unflatten(0, (1, rows))
        std = Statistic("std", original, view, noise)
        for expert in range(experts.num_local_experts):
            own = Noise(std, 1.0, f"{name}/{expert}/{start}", view.offset) if noise else None
            pieces.append(Copy(Box((expert, start, 0), (1, rows, columns)), window, noise=own))
        start += rows
    return TensorPlan(name, (experts.num_local_experts, start, columns), dtypes.pop(), tuple(pieces))


def _lineage(model: ExportedModel, experts: Experts, noise: float, dtype: str | None) -> dict[str, Any]:
    """The record of this step, on top of the source's own."""
    departure = {"preserves_function": False, "departures": [_departure(noise)]} if noise else {}
    return {
        "operation": "upcycle",
        "to": GRANITEMOE,
        **({} if model.family.has_multipliers else {"model_type": model.family.model_type}),
        "num_local_experts": experts.num_local_experts,
        "num_experts_per_tok": experts.num_experts_per_tok,
        "noise": noise,
        "router_std": router_std(experts),
        **({"dtype": dtype} if dtype else {}),
        "source": asdict(model.architecture),
        **departure,
        "parent": model.parent,
    }


def _departure(noise: float) -> str:
    return f"experts differ by noise of {noise:g} of a weight's spread"


def upcycling_notes(experts: Experts, noise: float, tensors: Sequence[TensorPlan]) -> list[str]:
    """What a user should know of experts, a sentence or two each.

    Args:
        experts: what is made.
        noise: see `upcycle_checkpoint`.
        tensors: the plan.
    """
    count, top = experts.num_local_experts, experts.num_experts_per_tok
    dtype = next(tensor.dtype for tensor in tensors if "block_sparse_moe" in tensor.name)
    is_cast = any(
        isinstance(piece, Copy) and not tensor.dtype.holds(piece.source.dtype)
        for tensor in tensors
        for piece in tensor.pieces
    )
    if noise:
        function = (
            f"Not preserving: {_departure(noise)}. The model computes another function than its source; "
            "`teleflm verify --text` says how far apart they are."
        )
    else:
        rounded = f", but for the rounding of weights to {dtype}" if is_cast else ""
        function = (
            f"All {count} experts of a layer are its feed-forward layer, and the gates of the {top} that compute a "
            f"token add up to 1: in exact arithmetic the function is the source's{rounded}, whatever the router. "
            f"Computed, gates are rounded, to {dtype} at the latest, so logits may differ as they do between two "
            "roundings of the source."
            if top > 1
            else f"All {count} experts of a layer are its feed-forward layer, and the gate of the one that computes a "
            f"token is 1: in exact arithmetic the function is the source's{rounded}, whatever the router."
        )
    notes = [
        function,
        f"{experts.num_parameters:,} parameters, of which {experts.num_active_parameters:,} compute a token: "
        f"{top} of {count} experts in each layer.",
        "To train it, set output_router_logits to true in config.json: the loss then has the load-balancing loss, "
        f"times router_aux_loss_coef ({AUX_LOSS_COEF:g}). Without, nothing keeps the router from a few experts.",
    ]
    if dtype == FLOAT64:
        notes.append(
            'transformers computes experts in float64 only where it is loaded with experts_implementation="eager".'
        )
    if top == 1:
        notes.append(
            "With one expert a token, its gate is 1 whatever the router says: the load-balancing loss alone ever moves "
            "the router."
        )
    elif not noise:
        notes.append(
            "While experts are equal, gates do not matter to the loss, and the load-balancing loss alone moves the "
            "router; experts part by the tokens and the gates that each of them learns under."
        )
    return notes


__all__ = ["Upcycling", "plan_upcycling", "router_std", "upcycle_checkpoint", "upcycling_notes"]
