# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Growing a checkpoint: source folder and target configuration to a plan, and the plan to a Hub folder."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes

from conversion.adam_state import TRAINER_STATE, check_gradients_alone, check_trainer_step
from conversion.architecture import Architecture, load_config, load_preset, package_folder, preset_names
from conversion.checkpoint.dtypes import DType, parse_dtype
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.execute import CheckpointResult, WriteOptions, execute
from conversion.checkpoint.manifest import read_manifest
from conversion.checkpoint.parent import parent_of
from conversion.checkpoint.plan import CheckpointPlan, Copy
from conversion.checkpoint.preflight import is_placed
from conversion.checkpoint.sources import Source, open_checkpoint, source_identity
from conversion.family import LLAMA, Family, find_family
from conversion.hub.card import model_facts
from conversion.hub.contents import count_pieces, count_token_ids, hub_config, hub_sidecars, sidecar_notes
from conversion.hub.remote import local_view
from conversion.mapping import check_tensors, weights
from conversion.masked import MASKED_CODE, MASKED_MODEL_TYPE
from conversion.optimizer_state import OPTIMIZER_FILE
from conversion.quantisation import refuse_quantised

from .fold import MaskState
from .layer_distance import LayerDistance, measure_layer_distances, nearest_layers, read_calibration
from .method import Mask, Method, Zero
from .moments import AdamState, plan_adam_state, read_adam_state
from .notes import growth_notes
from .operators import grow_weight
from .request import check_honoured, check_request
from .spec import Growth, lists_state, plan_target


@dataclass(frozen=True)
class GrowthResult(CheckpointResult):
    """A growth that was planned and, unless it was a dry run, written.

    Args:
        growth: what grows into what.
        distances: how far each layer of the source moves its input, if that was measured.
    """

    growth: Growth
    distances: Sequence[LayerDistance] = ()


def grow_checkpoint(
    source: str | Path,
    out: str | Path,
    target: str | Path | Mapping[str, Any] | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    method: Method = Zero(),  # noqa: B008  (frozen)
    optimizer: str | Path | None = None,
    layers: str = "interleave",
    new_layers: str = "silent",
    calibration: str | Path | None = None,
    multipliers: str = "preserve",
    dtype: str | None = None,
    seed: int = 0,
    options: WriteOptions | None = None,
    dry_run: bool = False,
) -> GrowthResult:
    """Grow a checkpoint into a larger one that computes the same function, unless what is asked for cannot.

    The methods `Random` and `Rms`, and `new_layers` other than `silent`, do not preserve it: notes, card and record say
    so. Every axis may grow at once and by any ratio: hidden_size, num_attention_heads, num_key_value_heads,
    intermediate_size, num_hidden_layers, vocab_size, and the multipliers may change. Needs no torch, and no more memory
    than a few blocks, whatever the model.

    Args:
        source: folder of a Tele-FLM or a Llama, safetensors or `.bin`; the grown model is of the same family.
        out: folder to write: new, or the finished result of the same call.
        target: a preset's name, the path of a config.json, its content, or None for the source's own.
        overrides: fields of the configuration on top of `target`, each of which is meant: none is ignored.
        method: `Zero()`, `Tile(noise)` or `Mask(steps)`, see `growth.method`.
        optimizer: a checkpoint of transformers' Trainer, or its optimizer.pt, whose AdamW state grows too.
        layers: which layers to copy, see `growth.layer_selection.select_layers`; or `distance`, those that move their
            input least on the calibration text. A dry run does not measure, and plans with `interleave` in its place.
        new_layers: what additional layers start as, see `growth.layer_selection`: `silent`, `active` or `random`.
        calibration: of `distance`: a text file, of which the first 1,024 tokens are used.
        multipliers: `preserve` or `target`, see `growth.spec.plan_target`.
        dtype: of the output's weights; the source's unless given.
        seed: of the random new entries.
        options: how to write.
        dry_run: plan and check everything, write nothing.

    Raises:
        CheckpointError: the source cannot be used, or the target cannot preserve it; nothing was written.
        OSError: the disk failed; the output folder is not loadable.
    """
    options = options or WriteOptions()
    checkpoint = open_checkpoint(local_view(source))
    refuse_quantised(checkpoint, "growth")
    architecture = source_architecture(checkpoint)
    family = find_family(checkpoint.config)
    _check_family(family, method, multipliers)
    given, meant = _requested(target), dict(overrides or {})
    requested, asked = check_request(checkpoint.config or {}, given, meant)
    distances = _layer_distances(checkpoint, layers, calibration, options.workers, dry_run)
    extra = requested.get("num_hidden_layers", architecture.num_hidden_layers) - architecture.num_hidden_layers
    growth = plan_target(
        architecture,
        requested,
        layers=_chosen_layers(layers, distances, extra),
        multipliers=multipliers,
        unused_rows=_unused_rows(Path(checkpoint.folder), family, architecture, requested),
        method=method,
        keeps_input=meant.get("input_mult") == architecture.embedding_scale,
        new_layers=new_layers,
    )
    asked += check_honoured(growth.source, growth.target, given, meant)
    plan = plan_growth(checkpoint, growth, dtype=parse_dtype(dtype) if dtype else None, seed=seed, distances=distances)
    adam = read_adam_state(optimizer, growth.source) if optimizer is not None else None
    if adam:
        check_gradients_alone(adam)
        _check_step(Path(checkpoint.folder), adam)
    states = [plan_adam_state(adam, growth)] if adam else []
    if adam:
        moments = (tensor for shard in states for tensor, _ in shard.tensors)
        lineage = {**plan.lineage, "optimizer": source_identity(adam.file)}
        plan = replace(plan, tensors=(*plan.tensors, *moments), lineage=lineage)
    _check_optimizer_in_the_way(Path(out), adam, overwrite=options.overwrite)
    notes = [
        *asked,
        *growth_notes(growth, plan.tensors[0].dtype, is_cast=_is_cast(plan), base_width=_base_width(plan.lineage)),
        *_layer_notes(layers, growth, distances),
        _optimizer_note(adam),
        *sidecar_notes(Path(checkpoint.folder), plan.sidecars, family=family),
    ]
    result = execute(plan, Path(out), options, notes, dry_run=dry_run, states=states)
    outcome = (plan, result.shards, result.notes, result.written)
    return GrowthResult(*outcome, growth, distances, foreseen=result.foreseen)


def plan_growth(
    checkpoint: Source,
    growth: Growth,
    *,
    dtype: DType | None = None,
    seed: int = 0,
    distances: Sequence[LayerDistance] = (),
) -> CheckpointPlan:
    """The plan of a growth: every tensor of the target in data-flow order, checked to tile.

    Args:
        checkpoint: the source; its tensors must be those of `growth.source`.
        growth: what grows into what.
        dtype: of the output's weights; each source tensor's own unless given.
        seed: of the random new entries.
        distances: by which the copied layers were chosen, if they were; for the record.

    Raises:
        CheckpointError: the tensors are not those of the architecture, or are not floating-point.
    """
    check_tensors(checkpoint.tensors, growth.source, checkpoint.folder)
    tensors = []
    for name, weight, layer in weights(growth.target):
        origin = growth.layers[layer] if layer is not None else None
        source_name = weight.name.format(origin.source if origin else None)
        view = checkpoint.tensors[source_name]
        if not view.dtype.is_floating:
            raise CheckpointError(
                f"{source_name} has dtype {view.dtype}; quantised weights cannot grow, use the originals."
            )
        is_copy = origin is not None and origin.is_copy
        out_dtype = dtype or view.dtype
        tensors.append(grow_weight(name, weight, source_name, view, growth, is_copy=is_copy, dtype=out_dtype))

    cast = dtype.name if dtype and any(view.dtype != dtype for view in checkpoint.tensors.values()) else None
    lineage = {**_lineage(checkpoint, growth, cast), "layer_distances": [asdict(distance) for distance in distances]}
    config = hub_config(checkpoint.config or {}, growth.target, tensors[0].dtype.name)
    if isinstance(growth.method, Mask):
        config = MaskState.of_growth(growth, growth.method.steps).to_config(config)
    facts = model_facts(config, tensors[0].dtype.name, lineage)
    sidecars = hub_sidecars(Path(checkpoint.folder), facts, family=find_family(checkpoint.config))
    if isinstance(growth.method, Mask):
        sidecars[MASKED_CODE] = str(package_folder() / MASKED_CODE)
    plan = CheckpointPlan(tuple(tensors), config, sidecars, lineage, seed)
    plan.check()
    _check_factors(plan)
    return plan


def _check_factors(plan: CheckpointPlan) -> None:
    """Refuse a factor so near 1 that rounding undoes it everywhere, which no rounding of single values makes up for."""
    for tensor in plan.tensors:
        nearest = 2.0 ** -(ml_dtypes.finfo(tensor.dtype.numpy).nmant + 2)
        for piece in tensor.pieces:
            if not isinstance(piece, Copy) or piece.source.dtype != tensor.dtype:
                continue
            if piece.scale != 1.0 and abs(piece.scale - 1.0) < nearest:
                raise CheckpointError(
                    f"{tensor.name} has to be multiplied by {piece.scale:.9g}, which {tensor.dtype} rounds away: every "
                    "product would be the value it was made from. Choose a dtype with more digits, for example float32."
                )


def _is_cast(plan: CheckpointPlan) -> bool:
    """Whether some weight is written in a dtype that cannot hold all values of its source's."""
    copies = ((tensor, piece) for tensor in plan.tensors for piece in tensor.pieces if isinstance(piece, Copy))
    return not all(tensor.dtype.holds(piece.source.dtype) for tensor, piece in copies)


def _layer_distances(
    checkpoint: Source, layers: str, calibration: str | Path | None, workers: int, dry_run: bool
) -> list[LayerDistance]:
    if layers != "distance":
        if calibration is not None:
            raise CheckpointError(
                f"calibration is {calibration}, but layers is {layers!r}; it serves 'distance' alone."
            )
        return []
    if calibration is None:
        raise CheckpointError("layers is 'distance', which measures on text; give a calibration file.")
    input_ids = read_calibration(calibration, checkpoint.folder)
    return [] if dry_run else measure_layer_distances(checkpoint, input_ids, workers)


def _chosen_layers(layers: str, distances: Sequence[LayerDistance], extra: int) -> str:
    if layers != "distance":
        return layers
    return ",".join(map(str, nearest_layers(distances, extra))) if distances and extra > 0 else "interleave"


def _layer_notes(layers: str, growth: Growth, distances: Sequence[LayerDistance]) -> list[str]:
    copied = [str(origin.source) for origin in growth.layers if origin.is_copy]
    if layers != "distance" or not copied:
        return []
    if not distances:
        return ["Which layers are copied is measured when this is run; the plan copies them evenly in their place."]
    return [f"Copied are layers {', '.join(copied)}, which move their input least."]


def source_architecture(checkpoint: Source) -> Architecture:
    """The architecture of a source checkpoint.

    Raises:
        CheckpointError: it has no usable config.json, or masks.
    """
    where = f"{checkpoint.folder}/config.json"
    if checkpoint.config is None:
        raise CheckpointError(f"{where}: no such file; a checkpoint needs its configuration beside the weights.")
    if checkpoint.config.get("model_type") == MASKED_MODEL_TYPE:
        raise CheckpointError(f"{where}: model_type is {MASKED_MODEL_TYPE!r}; `teleflm fold` it first, then grow that.")
    return Architecture.from_config(checkpoint.config, where)


def _check_family(family: Family | None, method: Method, multipliers: str) -> None:
    """Refuse what a Llama has no place for: masks, which are a class of ours, and multipliers."""
    if family is not LLAMA:
        return
    if isinstance(method, Mask):
        raise CheckpointError(
            "method is mask, and the source a Llama: masks are of a Tele-FLM's class, and transformers' Llama has "
            "none; use the method zero, whose new entries learn from the second step on."
        )
    if multipliers != "preserve":
        raise CheckpointError(
            f"multipliers is {multipliers!r}, and the source a Llama, which has none; leave --multipliers out."
        )


def _unused_rows(folder: Path, family: Family | None, source: Architecture, requested: Mapping[str, Any]) -> int | None:
    """First row of the vocabulary that no token has, if that is known; of a Llama, looked for where rows are added."""
    if family is not LLAMA:
        return count_pieces(folder)
    return count_token_ids(folder) if requested.get("vocab_size", source.vocab_size) != source.vocab_size else None


def _requested(target: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """The target's configuration, from wherever it is."""
    if target is None:
        return {}
    if isinstance(target, Mapping):
        return dict(target)
    if str(target) in preset_names():
        return load_preset(str(target))
    if not Path(target).exists() and Path(target).suffix != ".json":
        return load_preset(str(target))  # explains which presets there are
    path = Path(target)
    return load_config(path / "config.json" if path.is_dir() else path)


def _check_optimizer_in_the_way(out: Path, state: AdamState | None, *, overwrite: bool) -> None:
    """Refuse a state in OUT that no growth of ours left there: training would load it with the grown weights."""
    path = out / OPTIMIZER_FILE
    if overwrite or not path.exists():
        return
    record = read_manifest(out)
    if not lists_state(record) and not (state and is_placed(out, OPTIMIZER_FILE)):
        use = "be replaced" if state else "lie beside weights that it is not of"
        way = "--overwrite" if state else "--overwrite, which leaves it there"
        raise CheckpointError(f"{path}: was not written by a growth, and would {use}; move it away or {way}.")


def _base_width(lineage: Any) -> int | None:
    """The width that the learning rate of the last run of training is for: its `mup_base_width`, else what it trained.

    Growths since then have moved the weights, and no rate. None where no growth says a width.
    """
    width = None
    while isinstance(lineage, Mapping):
        operation = lineage.get("operation")
        if operation == "grow":
            source = lineage.get("source")
            width = source.get("hidden_size") if isinstance(source, Mapping) else None
        elif operation not in ("fold", "convert") or "parallel" in lineage:
            base = lineage.get("mup_base_width") if operation == "train" else None
            width = base if type(base) is int else width
            break
        parent = lineage.get("parent")
        lineage = parent.get("lineage") if isinstance(parent, Mapping) else None
    return width if type(width) is int else None


def _check_step(source: Path, adam: AdamState) -> None:
    """Check that weights and moments are of one step, where a Trainer says of which: of the source, of the state."""
    for folder in {source, Path(adam.file).parent}:
        if (folder / TRAINER_STATE).is_file():
            check_trainer_step(folder, adam.file, adam.steps)


def _optimizer_note(state: AdamState | None) -> str:
    if state:
        return f"optimizer.pt: Adam's moments after {max(state.steps.values()):.0f} steps, grown with the weights."
    return (
        "No optimizer state (--optimizer): with fresh moments the first steps are as large as the learning rate "
        "allows, so warm it up again, and to no more than where the last stage ended. FLM-101B took a twentieth of its "
        "first warm-up."
    )


def _lineage(checkpoint: Source, growth: Growth, dtype: str | None) -> dict[str, Any]:
    """The record of this growth, and of the dtype that it cast to, on top of the source's own record if it has one."""
    return {
        "operation": "grow",
        "method": growth.method.name,
        "noise": growth.noise,
        **({"dtype": dtype} if dtype else {}),
        "mask_steps": growth.method.steps if isinstance(growth.method, Mask) else 0,
        "source": asdict(growth.source),
        "target": asdict(growth.target),
        "layers": [{"source": origin.source, "copy": origin.is_copy} for origin in growth.layers],
        **({"new_layers": growth.new_layers} if growth.new_layers != "silent" else {}),
        **({"preserves_function": False, "departures": list(growth.departures)} if growth.departures else {}),
        "parent": parent_of(checkpoint),
    }
