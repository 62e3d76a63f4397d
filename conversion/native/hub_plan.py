# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""From a training checkpoint to the plan of a Hub folder: the configuration completed, every tensor accounted for."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ..adam_state import TRAINER_STATE, check_trainer_step
from ..architecture import MODEL_TYPE, Architecture, load_config, rope_parameters
from ..checkpoint.containers import Shard
from ..checkpoint.dtypes import FLOAT32, DType
from ..checkpoint.errors import CheckpointError
from ..checkpoint.parent import parent_record
from ..checkpoint.plan import CheckpointPlan, Shape, TensorPlan
from ..checkpoint.reader import FileReader, boxes_of_range
from ..checkpoint.sharded import ShardedTensor
from ..compressed_tensors import check_scheme, quantise_linear, quantised_config
from ..family import LLAMA, MULTIPLIERS, find_family, is_llama
from ..hub.card import model_facts
from ..hub.contents import CODE_FILES, count_pieces, hub_config, hub_sidecars, sidecar_notes
from ..input_mult import InputFold, fold_input_mult, folded_lineage, input_mult_warning
from ..mapping import EMBED_TOKENS, LM_HEAD, Weight, is_derived, weights
from ..masked import MASKED_CODE, is_masked, masked_config, split_masked_config
from ..optimizer_state import OPTIMIZER_FILE, adam_shard, check_is_adam, check_settings, parameter_names, unsaid_notes
from ..saved_files import check_saved_files
from .checkpoint import AdamMoments, NativeCheckpoint, Replica
from .find import exported_folder
from .model_parallel import copies
from .table import NativeWeight, hub_table, native_tensors, split
from .training_args import (
    config_from_args,
    parse_multipliers,
    states_multipliers,
    unread_multipliers,
)

_LAYER = re.compile(r"\blayers\.(\d+)\.")
# Fields of a configuration that a run may have its own value of: they decide nothing that the weights compute.
_INDIFFERENT = ("max_position_embeddings", "initializer_range")
_LOGITS = ("output_mult", "mup_scale_factor")
_MUP = ("use_mup", "input_mult", *_LOGITS)
_NATIVE_HEAD = ("output_layer.weight", LM_HEAD.name)
_COMPARED = 1 << 17  # elements of a replica that are read at a time


def plan_run(
    run: NativeCheckpoint,
    config: Mapping[str, Any] | None,
    tokenizer: str | Path | None,
    vocab_size: int | None,
    dtype: DType | None,
    multipliers: str | None = None,
    quantize: str | None = None,
    *,
    fold_input: bool = False,
) -> tuple[CheckpointPlan, list[Shard], list[str]]:
    """The plan of the Hub folder that a training checkpoint becomes, its files of state, and notes on it.

    Args:
        run: the checkpoint.
        config: what its arguments do not say; a config.json beside it unless given.
        tokenizer: folder of its tokenizer; the one of that config.json unless given.
        vocab_size: rows of the vocabulary without padding.
        dtype: of the output; the run's unless given.
        multipliers: `none`, or the model's, as `training_args.parse_multipliers` reads them.
        quantize: `fp8`, or nothing; see `compressed_tensors.py`.
        fold_input: multiply `input_mult` into the embeddings.

    Raises:
        CheckpointError: something is missing, or two sources of one fact disagree.
    """
    beside = _folder_with_config(run)
    if config is None and beside:
        config = load_config(beside / "config.json")
    folder = Path(tokenizer) if tokenizer else beside or Path(run.folder)
    pieces = count_pieces(folder)
    if tokenizer and pieces is None and not (is_llama(config) and (folder / "tokenizer.json").is_file()):
        raise CheckpointError(f"{folder}: holds no tokenizer.model.")
    state = None
    if is_masked(config):
        config, state = split_masked_config(config or {}, "config.json of the run")
        state = _masks_now(run, state)
        if quantize:
            raise CheckpointError(
                f"{run.folder}: grows by masks, which --quantize {quantize} would leave no weights to train on for; "
                "convert it, `teleflm fold` it, and quantise that."
            )
    complete = complete_config(run, config, vocab_size, pieces, multipliers)
    architecture = Architecture.from_config(complete, f"{run.folder}: configuration", with_biases=True)
    if quantize and is_llama(complete):
        raise CheckpointError(
            f"{run.folder}: --quantize {quantize} is for a Tele-FLM; by its config.json this is a llama model."
        )
    check_scheme(quantize, architecture)
    fold = fold_input_mult(architecture, run.folder) if fold_input else InputFold(architecture, 1.0)
    if fold.factor != 1.0:
        _check_foldable(run, masked=state is not None)
    tensors, notes = plan_tensors(run, architecture, dtype or run.dtype, fold.scales)
    exported = exported_folder(Path(run.folder))
    lineage = {
        "operation": "convert",
        "from": run.format,
        "parallel": run.parallel,
        "iteration": run.iteration,
        "dtype": dtype.name if dtype else None,
        **folded_lineage(fold),
        **({"quantized": quantize} if quantize else {}),
        **({"optimizer": True} if run.adam else {}),
        **({"masks": {"step": state["step"], "steps": state["total_steps"]}} if state else {}),
        "parent": parent_record(exported) if exported else None,
    }
    out_dtype = tensors[0].dtype.name
    hub = hub_config(complete, fold.architecture, out_dtype)
    code: tuple[str, ...] = CODE_FILES
    if state:
        hub, code = masked_config(hub, state), (*CODE_FILES, MASKED_CODE)
        notes.append(f"Growth masks at step {state['step']} of {state['total_steps']}.")
    if quantize:
        tensors, hub = list(quantise_linear(tensors)), quantised_config(hub)
    facts = model_facts(hub, out_dtype, lineage)
    facts = replace(facts, num_bytes=sum(tensor.nbytes for tensor in tensors)) if quantize else facts
    sidecars = hub_sidecars(folder, facts, code, family=find_family(complete))
    for place in (Path(run.folder), Path(run.folder).parent):
        check_saved_files(place)
    states: list[Shard] = []
    if run.adam:
        for place in (Path(run.folder), Path(run.folder).parent):  # DeepSpeed's is a folder of its own in there
            if (place / TRAINER_STATE).is_file():
                check_trainer_step(place, run.folder, run.adam.steps)
                break
        states = [plan_adam(run, run.adam, architecture)]
        tensors += [tensor for shard in states for tensor, _ in shard.tensors]
        notes.append(f"{OPTIMIZER_FILE}: Adam's moments after {max(run.adam.steps.values()):.0f} steps.")
        notes += unsaid_notes(run.adam.groups)
    plan = CheckpointPlan(tuple(tensors), hub, sidecars, lineage)
    plan.check()
    if tokenizer or beside:  # what else lies in a run's own folder is the run
        notes += sidecar_notes(folder, sidecars, family=find_family(complete))
    notes += fold.notes(tensors[0].dtype) if fold_input else []
    warning = None if state else input_mult_warning(fold.architecture)
    return plan, states, [*notes, *([warning] if warning else [])]


def _check_foldable(run: NativeCheckpoint, *, masked: bool) -> None:
    """Whether the embeddings of a run can be multiplied, which are no longer those that it trains."""
    if run.adam:
        raise CheckpointError(
            f"{run.folder}: a step of Adam is as large as the learning rate, whatever the weights, so embeddings that "
            "were multiplied would train at another rate; leave --optimizer or --fold-input-mult out."
        )
    if masked:
        raise CheckpointError(
            f"{run.folder}: its growth masks still rise, for which it is converted as it is; leave --fold-input-mult "
            "out, and fold the plain model that `teleflm fold` makes of it."
        )


def _masks_now(run: NativeCheckpoint, state: Mapping[str, Any]) -> dict[str, Any]:
    """The growth_state of a run whose configuration is masked.

    Megatron knows nothing of masks: its configuration is that of the export with which it began, and they rise by one
    step an iteration. Other runs save their own.
    """
    if run.table is None:
        return dict(state)
    if run.iteration is None:
        raise CheckpointError(f"{run.folder}: does not say its iteration, so where its growth masks are is not known.")
    return {**state, "step": state["step"] + run.iteration}


def _folder_with_config(run: NativeCheckpoint) -> Path | None:
    folder = Path(run.folder)
    return next((place for place in (folder, folder.parent) if (place / "config.json").is_file()), None)


def run_architecture(run: NativeCheckpoint) -> Architecture | None:
    """What a training checkpoint says of its model, with the padding of its vocabulary; None if it says nothing.

    Raises:
        CheckpointError: the model is no Tele-FLM.
    """
    said = config_from_args(run.args, run.folder)
    if not said:
        return None
    config = {**said, "vocab_size": _embedding(run).shape[0], "model_type": MODEL_TYPE}
    return Architecture.from_config(config, f"{run.folder}: arguments of the run", with_biases=True)


def complete_config(
    run: NativeCheckpoint,
    config: Mapping[str, Any] | None,
    vocab_size: int | None,
    pieces: int | None,
    multipliers: str | None = None,
) -> dict[str, Any]:
    """The configuration of a training checkpoint, from its arguments and what the user adds.

    Args:
        run: the checkpoint.
        config: a configuration that says what the arguments do not; the two must agree on what both say.
        vocab_size: rows of the vocabulary without Megatron's padding.
        pieces: of the tokenizer, which is the vocabulary's size where nothing else says it.
        multipliers: see `plan_run`.

    Raises:
        CheckpointError: they disagree, or something is missing; names the field and both values.
    """
    said = config_from_args(run.args, run.folder)
    if not said and config is None:
        raise CheckpointError(f"{run.folder}: holds no arguments of its run; --config has to say what model it is.")
    for field, value in said.items():
        given = _given(config or {}, field)
        if field not in _INDIFFERENT and given is not None and given != value:
            raise CheckpointError(
                f"{run.folder}: {field} is {value!r} by the run's arguments and {given!r} by --config; correct it."
            )
    merged = {
        **said,
        **{name: value for name, value in (config or {}).items() if value is not None or name not in said},
    }
    merged |= _multipliers(run, merged, config or {}, multipliers)
    size = _vocab_size(run, config or {}, vocab_size, pieces)
    if is_llama(config):
        return _llama_config(run, merged, size)
    return {**merged, "vocab_size": size, "model_type": MODEL_TYPE}


def _llama_config(run: NativeCheckpoint, merged: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """What is known of a run whose configuration is a Llama's, which has no multipliers."""
    factors = _factors(merged, merged)
    if any(factor not in (None, 1.0) for factor in factors):
        raise CheckpointError(
            f"{run.folder}: the factors on embeddings and logits are {factors} by the run's arguments or "
            "--multipliers, and config.json is a Llama's, which has none; give the configuration of a Tele-FLM."
        )
    kind = rope_parameters(merged, "config.json")["rope_type"]
    if run.table is not None and kind != "default":
        raise CheckpointError(
            f"{run.folder}: rope_type is 'default' by the run's arguments and {kind!r} by config.json; correct it."
        )
    return {**{name: value for name, value in merged.items() if name not in MULTIPLIERS}, "vocab_size": vocab_size}


def _multipliers(
    run: NativeCheckpoint, merged: Mapping[str, Any], config: Mapping[str, Any], stated: str | None
) -> dict[str, Any]:
    """The multipliers that the user states; where nobody states any, the run is refused.

    Every published Tele-FLM has some, so that a run which does not say rather has them by another name. Where the
    tensors have the Hub's names, the configuration is the model's own, and silence means what it means there: none.
    """
    missing = _missing_multipliers(run, config)
    if stated is None:
        if missing is None:
            return {}
        raise CheckpointError(
            f"{run.folder}: {missing}; give them with --multipliers or --config, or say --multipliers none."
        )
    fields = parse_multipliers(stated)
    if _factors(fields, merged) != _factors(merged, merged):
        raise CheckpointError(
            f"{run.folder}: the factors on embeddings and logits are {_factors(merged, merged)} by the run's arguments "
            f"or --config and {_factors(fields, merged)} by --multipliers; correct it."
        )
    return fields


def _missing_multipliers(run: NativeCheckpoint, config: Mapping[str, Any]) -> str | None:
    """That nothing says the multipliers of a run, with what may be them; None if something does."""
    if run.table is None or states_multipliers(run.args) or config.get("use_mup") is not None or is_llama(config):
        return None
    like = ", ".join(f"{name} {value!r}" for name, value in sorted(unread_multipliers(run.args).items())[:8])
    return "the run's arguments do not say the factors on embeddings and logits that every published Tele-FLM has" + (
        f" (unknown here: {like})" if like else ""
    )


def run_model_type(run: NativeCheckpoint) -> str:
    """The model_type of what a training checkpoint converts to: of a config.json beside it, if that is a Llama's."""
    folder = _folder_with_config(run)
    config = load_config(folder / "config.json") if folder else {}
    return LLAMA.model_type if is_llama(config) else MODEL_TYPE


def missing_multipliers(run: NativeCheckpoint) -> str | None:
    """A sentence where neither a training checkpoint nor a config.json beside it says its multipliers, else None."""
    folder = _folder_with_config(run)
    missing = _missing_multipliers(run, load_config(folder / "config.json") if folder else {})
    return f"{missing}: those shown are a guess." if missing else None


def _factors(fields: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The factors on the embeddings and on the logits that some fields come to, each where it is known at all."""
    is_known = [any(known.get(name) is not None for name in names) for names in (("input_mult",), _LOGITS)]
    is_off = known.get("use_mup") is False and not any(is_known)
    values = {name: 1.0 if fields.get(name) is None or not fields.get("use_mup") else fields[name] for name in _MUP}
    embeddings, logits = float(values["input_mult"]), values["output_mult"] / values["mup_scale_factor"]
    return embeddings if is_known[0] or is_off else None, logits if is_known[1] or is_off else None


def _given(config: Mapping[str, Any], field: str) -> Any:
    if field == "rope_theta":
        return (config.get("rope_parameters") or {}).get(field, config.get(field))
    return config.get(field)


def _vocab_size(run: NativeCheckpoint, config: Mapping[str, Any], vocab_size: int | None, pieces: int | None) -> int:
    """The vocabulary's true size. Padding is trained noise, so where there may be some, nothing is guessed."""
    said = config.get("vocab_size")
    if vocab_size is not None and said is not None and vocab_size != said:
        raise CheckpointError(f"--vocab-size is {vocab_size}, vocab_size of --config is {said}; give one of them.")
    size = vocab_size or said or pieces
    rows = _embedding(run).shape[0]
    if size is None and run.table is None:
        return rows
    if size is None:
        raise CheckpointError(
            f"{run.folder}: the embeddings have {rows} rows, padding included; say how many count with "
            "--vocab-size, --tokenizer or --config."
        )
    if pieces is not None and pieces > size:
        raise CheckpointError(
            f"the tokenizer has {pieces} pieces, vocab_size is {size}; one of them is of another model."
        )
    if size > rows:
        raise CheckpointError(f"{run.folder}: the embeddings have {rows} rows, vocab_size is {size}.")
    return size


def _embedding(run: NativeCheckpoint) -> ShardedTensor:
    lines = run.table or (NativeWeight(EMBED_TOKENS.name, (EMBED_TOKENS.name,), "replicated"),)
    name = next((line.name for line in lines if line.hub == (EMBED_TOKENS.name,)), EMBED_TOKENS.name)
    if name not in run.tensors:
        raise CheckpointError(f"{run.folder}: {name} is missing.")
    return run.tensors[name]


def plan_tensors(
    run: NativeCheckpoint,
    architecture: Architecture,
    dtype: DType | None,
    scales: Mapping[str, float] = MappingProxyType({}),
) -> tuple[list[TensorPlan], list[str]]:
    """The Hub tensors of a training checkpoint in data-flow order, and notes on them.

    Args:
        run: the checkpoint.
        architecture: its numbers, with the true vocab_size.
        dtype: of the output; each tensor's own unless given.
        scales: name of a Hub tensor -> a factor on it.

    Raises:
        CheckpointError: a tensor is missing, has another shape than the architecture says, or would be lost.
    """
    table = run.table or hub_table(architecture)
    parts: dict[str, ShardedTensor] = {}
    gammas: set[str] = set()
    explained = set()
    _check_layers(run, architecture)
    for name, line, hub in native_tensors(table, architecture):
        tensor = run.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{run.folder}: {name} is missing.")
        explained.add(name)
        _check_shape(run, name, tensor, hub, architecture)
        tensor = tensor[: sum(_rows(weight, architecture) for _, weight in hub)]  # without the vocabulary's padding
        parts.update(split(tensor, line, hub, architecture, run.order))
        if run.order.zero_centered_gamma and "norm" in line.hub[0]:
            gammas.update(hub_name for hub_name, _ in hub)
    _check_explained(run, architecture, explained)
    tensors = []
    for name, weight, _ in weights(architecture):
        # Megatron has no bias on the output of attention; the Hub's model has one wherever q, k and v do.
        shape = weight.shape(architecture)
        part = parts.get(name) or ShardedTensor.zeros(shape, next(iter(parts.values())).dtype)
        offset = 1.0 if name in gammas else 0.0
        tensors.append(part.plan(name, shape, dtype=dtype, scale=scales.get(name, 1.0), offset=offset))
    return tensors, [*run.notes, *_notes(run, architecture, gammas)]


def plan_adam(run: NativeCheckpoint, adam: AdamMoments, architecture: Architecture) -> Shard:
    """The optimizer.pt of a run: its moments in float32, cut and named as the weights are.

    Args:
        run: the checkpoint.
        adam: its optimizer's state.
        architecture: its numbers, with the true vocab_size.

    Raises:
        CheckpointError: a weight was not trained, so that there are no moments of it; a shape differs; or a group has a
            setting that Adam cannot have.
    """
    for number, (settings, _) in enumerate(adam.groups):
        where = f"{run.folder}: parameter group {number} of the optimizer"
        check_settings(settings, where)
        check_is_adam(settings, where)
    names = parameter_names(architecture)
    frozen = [name for name in names if name not in adam.steps]
    if frozen:
        raise CheckpointError(
            f"{run.folder}: {frozen[0]} has no moments, as it was not trained, and what there is of the others is no "
            "state of the whole model; leave --optimizer out."
        )
    moments: dict[str, dict[str, TensorPlan]] = {name: {} for name in names}
    for key, tensors in adam.moments.items():
        of_key = replace(run, tensors=tensors, order=replace(run.order, zero_centered_gamma=False))
        for plan in plan_tensors(of_key, architecture, FLOAT32)[0]:
            moments[plan.name][key] = plan
    groups = [(settings, [name for name in names if name in set(members)]) for settings, members in adam.groups]
    return adam_shard(groups, moments, adam.steps)


def _rows(weight: Weight, architecture: Architecture) -> int:
    return weight.shape(architecture)[0]


def _check_layers(run: NativeCheckpoint, architecture: Architecture) -> None:
    numbers = {int(match[1]) for name in run.tensors if (match := _LAYER.search(name))}
    if len(numbers) != architecture.num_hidden_layers:
        raise CheckpointError(
            f"{run.folder}: holds {len(numbers)} layers, num_hidden_layers is {architecture.num_hidden_layers}."
        )


def _check_shape(
    run: NativeCheckpoint,
    name: str,
    tensor: ShardedTensor,
    hub: Sequence[tuple[str, Weight]],
    architecture: Architecture,
) -> None:
    shapes = [weight.shape(architecture) for _, weight in hub]
    expected: Shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    padded = "vocab" in hub[0][1].axes and run.table is not None
    fits = tensor.shape[1:] == expected[1:] and (
        tensor.shape[0] >= expected[0] if padded else tensor.shape[0] == expected[0]
    )
    if not tensor.dtype.is_floating:
        raise CheckpointError(
            f"{run.folder}: {name} is {tensor.dtype}, expected bfloat16, float16 or float32; FP8 weights come with "
            "scales that no Hub model reads: save them in bfloat16."
        )
    if not fits:
        numbers = ", ".join(f"{field} {getattr(architecture, field)}" for field in _DECISIVE)
        raise CheckpointError(
            f"{run.folder}: {name} has shape {tensor.shape}, the run's arguments and --config make it {expected} "
            f"({numbers})."
        )


_DECISIVE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def _check_explained(run: NativeCheckpoint, architecture: Architecture, explained: set[str]) -> None:
    for name in run.tensors:
        tied_copy = architecture.tie_word_embeddings and name in _NATIVE_HEAD
        if name not in explained and not tied_copy and not is_derived(name):
            raise CheckpointError(f"{run.folder}: {name} is not a weight of this Tele-FLM model; it would be lost.")


def _notes(run: NativeCheckpoint, architecture: Architecture, gammas: set[str]) -> Iterator[str]:
    rows = _embedding(run).shape[0]
    padding = rows - architecture.vocab_size
    if padding:
        yield f"{padding} rows of padding after the {architecture.vocab_size} of the vocabulary were left out."
    if gammas:
        yield f"1 was added to {len(gammas)} norm weights, which the run stored less 1."
    unread = unread_multipliers(run.args)
    if unread:
        like = ", ".join(f"{name} {value!r}" for name, value in sorted(unread.items())[:8])
        yield f"Arguments of the run that look like multipliers were not read: {like}."
    if architecture.attention_bias:
        yield "o_proj.bias is zeros: the run has biases on q, k and v only."


def compare_replicas(run: NativeCheckpoint, config: Mapping[str, Any], *, allow: bool) -> list[str]:
    """Compare the copies that a run kept of one tensor, the two ends of tied embeddings among them.

    Args:
        run: the checkpoint.
        config: its configuration.
        allow: note what differs instead of raising; the first copy counts.

    Returns:
        One sentence for each pair that differs.

    Raises:
        CheckpointError: a pair differs; names it, where its copies are, and by how much.
    """
    notes = []
    with FileReader() as reader:
        for replica in [*run.replicas, *_tied_replicas(run, config), *_tied_moments(run, config)]:
            difference = _difference(replica, reader)
            if difference is None:
                continue
            one, other = replica.places
            text = f"{run.folder}: {replica.name} differs by up to {difference:.3g} between {one} and {other}"
            if not allow:
                raise CheckpointError(f"{text}; --allow-unequal-replicas takes that of {one}.")
            notes.append(f"{text}; that of {one} was taken.")
    return notes


def _tied_replicas(run: NativeCheckpoint, config: Mapping[str, Any]) -> Iterator[Replica]:
    """The head of a model that has none of its own, where the run kept a copy for the last stage."""
    head = next((run.tensors[name] for name in _NATIVE_HEAD if name in run.tensors), None)
    if not config.get("tie_word_embeddings") or head is None:
        return
    embedding = _embedding(run)
    if embedding.shape != head.shape:
        raise CheckpointError(
            f"{run.folder}: the tied embedding has shape {embedding.shape}, the head {head.shape}; they are one weight."
        )
    yield from copies("the tied embedding", embedding, head, ("the embedding", "the head"))


def _tied_moments(run: NativeCheckpoint, config: Mapping[str, Any]) -> Iterator[Replica]:
    """The same of the moments, which both ends of a tied model update alike."""
    for key, tensors in run.adam.moments.items() if run.adam else ():
        for replica in _tied_replicas(replace(run, tensors=tensors), config):
            yield replace(replica, name=f"{key} of {replica.name}")


def _difference(replica: Replica, reader: FileReader) -> float | None:
    """The largest difference between two copies, or None if their bytes are equal."""
    largest = None
    for start in range(0, replica.first.numel, _COMPARED):
        for box in boxes_of_range(replica.first.shape, start, min(start + _COMPARED, replica.first.numel)):
            a, b = reader.read(replica.first.window(box)), reader.read(replica.second.window(box))
            if a.tobytes() != b.tobytes():
                largest = max(largest or 0.0, float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()))
    return largest
