# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Llama, which has no multipliers: they are folded into the embedding and the head. A Llama stays what it is."""

from ..checkpoint.dtypes import DType
from ..checkpoint.plan import CheckpointPlan
from ..hub.contents import sidecar_notes
from .model import ExportedModel, stock_config, stock_sidecars
from .multipliers import fold_multipliers, folding_notes


def plan_llama(model: ExportedModel, cast: DType | None) -> tuple[CheckpointPlan, list[str]]:
    """The plan of a folder that whatever runs a Llama loads, and notes on how exact it is."""
    target, scales = fold_multipliers(model.architecture)
    dtype = model.dtype(cast)
    parts = model.parts(target)
    tensors = tuple(part.plan(name, dtype=cast, scale=scales.get(name, 1.0)) for name, part in parts.items())
    lineage = model.lineage("llama", cast, multipliers="fold")
    config = stock_config(model, target, "llama", dtype)
    plan = CheckpointPlan(tensors, config, stock_sidecars(model, config, lineage, dtype), lineage)
    notes = sidecar_notes(model.folder, plan.sidecars, family=model.family, stock=True)
    dtypes = {tensor.name: tensor.dtype for tensor in tensors}
    return plan, notes + folding_notes(model.architecture, target, scales, dtypes)
