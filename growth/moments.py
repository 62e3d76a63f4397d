# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Growing Adam's moments with the weights, so that training goes on without a new warm-up.

If a weight becomes w' = c w without changing the function, its gradient becomes g' = g / c, and so the moments become
m' = m / c and v' = v / c^2; n copies of it share that gradient (`gradient_factor`). A new entry starts at
m = 0 and at the mean of its tensor's v: with v = 0 and a step counter that goes on, its first update would be several
times the learning rate (3.2 times at beta2 = 0.999, where this one is 0.1 times).
"""

import math
from dataclasses import replace

from conversion.adam_state import AdamState, read_adam_state, read_grown_state
from conversion.checkpoint.containers import Shard
from conversion.checkpoint.dtypes import FLOAT32
from conversion.checkpoint.plan import Copy, Fill, Statistic, TensorPlan, complement
from conversion.mapping import LM_HEAD, Weight, weights
from conversion.optimizer_state import MOMENTS, adam_shard, parameter_names

from .layer_selection import LayerOrigin
from .operators import grow_weight, rms_scale
from .spec import Growth


def plan_adam_state(state: AdamState, growth: Growth) -> Shard:
    """The optimizer.pt of the grown model, as `torch.optim.AdamW.load_state_dict` takes it; moments are float32.

    Groups and settings are the source's. `param_names` names the parameters of each group, so that a run with other
    groups can use the state too (`growth.training.grown_adam`). It is written as the weights are: streamed, resumable,
    with a digest of every tensor; 8 bytes a parameter of the target.

    Args:
        state: of `growth.source`.
        growth: what grows into what.
    """
    origins = {name: (weight, _origin(layer, growth)) for name, weight, layer in weights(growth.target)}
    names = parameter_names(growth.target)
    sources = {name: _source_name(*origins[name]) for name in names}
    groups = [(settings, [name for name in names if sources[name] in members]) for settings, members in state.groups]
    moments = {name: _plan_moments(state, *origins[name], growth) for name in names}
    return adam_shard(groups, moments, {name: state.steps[sources[name]] for name in names})


def _origin(layer: int | None, growth: Growth) -> LayerOrigin | None:
    return None if layer is None else growth.layers[layer]


def _source_name(weight: Weight, origin: LayerOrigin | None) -> str:
    return weight.name.format(origin.source if origin else None)


def _plan_moments(
    state: AdamState, weight: Weight, origin: LayerOrigin | None, growth: Growth
) -> dict[str, TensorPlan]:
    """The moments of one parameter: old entries times a factor, new ones at zero and at the mean."""
    source_name = _source_name(weight, origin)
    views = dict(zip(MOMENTS, state.moments[source_name], strict=True))
    is_new = origin is not None and origin.is_copy
    # As if it were no additional layer: the plan of those that start at zero has no factor.
    plans = {
        key: grow_weight(key, weight, source_name, view, growth, is_copy=False, dtype=FLOAT32)
        for key, view in views.items()
    }
    first, second = MOMENTS
    factor = gradient_factor(weight, plans[first], growth)
    mean = Statistic("mean", f"{second} of {source_name}", views[second], factor**2)
    return {
        first: _moment(plans[first], factor, 0.0, is_new=is_new),
        second: _moment(plans[second], factor**2, mean, is_new=is_new),
    }


def _moment(plan: TensorPlan, factor: float, rest: float | Statistic, *, is_new: bool) -> TensorPlan:
    """The old entries times a factor where the plan of the weight copies them, `rest` everywhere else."""
    copies = [] if is_new else [piece for piece in plan.pieces if isinstance(piece, Copy)]
    old = [Copy(piece.box, piece.source, factor) for piece in copies]
    new = [Fill(box, rest) for box in complement(plan.layout, [piece.box for piece in old])]
    return replace(plan, pieces=(*old, *new))


def gradient_factor(weight: Weight, plan: TensorPlan, growth: Growth) -> float:
    """How the gradient of an old entry changes, m' / m.

    The n copies of an entry w, of value c w each, move together: n c g' = g. So a weight that is scaled has g / c, and
    one that is repeated and shared out (c = 1 / n) keeps its gradient, unless it is repeated as an output too. Where
    nothing makes up for the factor, as with that of `rms`, what a weight reads keeps its scale, and so does what comes
    back to it but for one place: each of the D features of the last hidden state goes into the logits with sqrt(d / D)
    of its weight, so that much comes back to everything below the head.

    Args:
        weight: the weight's line in the table.
        plan: how it grows, by `growth.operators.grow_weight`.
        growth: what grows into what.
    """
    copies = [piece for piece in plan.pieces if isinstance(piece, Copy)]
    times = sum(piece.box.numel for piece in copies) / math.prod(weight.shape(growth.source))
    factor = rms_scale(weight, growth) / (copies[0].scale * times)
    if growth.keeps_rms and weight is not LM_HEAD:
        factor *= rms_scale(LM_HEAD, growth)
    return factor


__all__ = ["AdamState", "gradient_factor", "plan_adam_state", "read_adam_state", "read_grown_state"]
