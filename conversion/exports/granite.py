# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Granite, which has both multipliers in its configuration: the weights are the same bytes, or links to them."""

import math
import re
from pathlib import Path

from ..architecture import Architecture
from ..checkpoint.containers import Layout, Shard, indexed_layout
from ..checkpoint.dtypes import DType
from ..checkpoint.errors import CheckpointError
from ..checkpoint.execute import WriteOptions
from ..checkpoint.finish import link_kind
from ..checkpoint.plan import CheckpointPlan, TensorPlan
from ..checkpoint.preflight import listed
from ..checkpoint.safetensors_file import read_header
from ..checkpoint.sources import Source
from ..mapping import weights
from .model import ExportedModel, stock_config, stock_sidecars

_HUB_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


def plan_granite(model: ExportedModel, cast: DType | None) -> CheckpointPlan:
    """The plan of a folder that stock transformers loads as Granite."""
    a = model.architecture
    tensors = tuple(TensorPlan.copy_of(name, model.checkpoint.tensors[name], cast) for name, *_ in weights(a))
    config = {**stock_config(model, a, "granite", model.dtype(cast)), **granite_multipliers(a)}
    lineage = model.lineage("granite", cast)
    return CheckpointPlan(tensors, config, stock_sidecars(model, config, lineage, model.dtype(cast)), lineage)


def granite_multipliers(architecture: Architecture) -> dict[str, float]:
    """The fields of Granite's configuration, and of GraniteMoE's, by which it computes what a Tele-FLM computes.

    Raises:
        CheckpointError: logits would be divided by what no float holds.
    """
    divisor = 1.0 / architecture.logit_scale
    if math.isinf(divisor):
        raise CheckpointError(
            f"logits are multiplied by {architecture.logit_scale:g}, and Granite divides them by logits_scaling, which "
            "would be infinite; ask for an output_mult and mup_scale_factor nearer to each other."
        )
    return {
        "embedding_multiplier": architecture.embedding_scale,
        "logits_scaling": divisor,
        "attention_multiplier": architecture.head_dim**-0.5,
        "residual_multiplier": 1.0,
    }


def linked_layout(checkpoint: Source, plan: CheckpointPlan) -> Layout | None:
    """The source's own files as the output's; None where they are not that."""
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    same = tensors.keys() == checkpoint.tensors.keys() and all(
        tensors[name].dtype == view.dtype for name, view in checkpoint.tensors.items()
    )
    if not same or not all(_HUB_SHARD.fullmatch(Path(file.name).name) for file in checkpoint.files):
        return None
    shards = []
    for file in checkpoint.files:
        inside = tuple((tensors[name], view.offset) for name, view in checkpoint.tensors.items() if view.file == file)
        shards.append(Shard(Path(file.name).name, ((0, read_header(file).raw),), inside, twin=file.name))
    return indexed_layout(shards)


def link_note(out: Path, layout: Layout, *, written: bool) -> str:
    """What became of the links, which a file system may refuse; read off the folder, so that it is what is there."""
    if not written:
        return "The weights are to be links to the source's files: hard, or symbolic where such are not allowed."
    found = {shard.filename: link_kind(out, shard) for shard in layout.shards}
    kinds = {*found.values()}
    undigested = "without digests of their own: change neither in place."
    if kinds == {"hard link"}:
        return f"The weights are links to the source's files, {undigested}"
    if "copy" in kinds and len(kinds) > 1:
        copies = listed([name for name, kind in found.items() if kind == "copy"])
        return (
            f"The weights are links to the source's files but for some, {undigested} "
            f"Not links to the source's files: {copies}."
        )
    if "symbolic link" in kinds:
        some = "" if len(kinds) == 1 else "some of them symbolic ones, "
        return (
            f"The weights are {'' if some else 'symbolic '}links to the source's files, {some}"
            f"{undigested} Nothing loads if the source moves."
        )
    return "The weights are copies, without digests of their own: they are no links to the source's files."


def uncut_note(layout: Layout, options: WriteOptions) -> list[str]:
    """A sentence on the links that are larger than a file was to be; none if no file is, or one tensor makes it so."""
    larger = [
        shard.filename
        for shard in layout.shards
        if len(shard.tensors) > 1 and sum(tensor.nbytes for tensor, _ in shard.tensors) > options.shard_bytes
    ]
    if not larger:
        return []
    return [
        f"Links keep the source's files as they are, so these are larger than --max-shard-size "
        f"{options.max_shard_size}: {listed(larger)}."
    ]
