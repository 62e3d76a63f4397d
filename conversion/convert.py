# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Rewriting a checkpoint as a Hub folder of safetensors: of a training run, or the Hub's own in another container."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .architecture import MODEL_TYPE, Architecture, load_config, load_preset, preset_names
from .checkpoint.budget import reading_threads
from .checkpoint.containers import Shard
from .checkpoint.dtypes import DType, parse_dtype
from .checkpoint.errors import CheckpointError, NotFinite
from .checkpoint.execute import CheckpointResult, WriteOptions, execute
from .checkpoint.job import read_json
from .checkpoint.numbers import parse_size
from .checkpoint.parent import parent_of
from .checkpoint.plan import CheckpointPlan, TensorPlan, View
from .checkpoint.promises import verify_sources
from .checkpoint.sharded import ShardedTensor
from .checkpoint.sources import WEIGHT_FILES, Source, open_checkpoint
from .compressed_tensors import (
    Float8Weights,
    check_scheme,
    is_float8,
    other_scheme,
    quantise_linear,
    quantised_config,
    read_float8,
)
from .exports.export import exported_weights
from .family import is_llama
from .hub.card import model_facts
from .hub.contents import hub_config, hub_sidecars, sidecar_notes
from .hub.published_card import CardOptions
from .hub.remote import local_view
from .hub.small_files import check_read_files, copied_file, left_behind, small_files
from .hub.streaming import Streamed, stream_to_hub
from .input_mult import InputFold, fold_input_mult, folded_lineage, input_mult_warning, input_mult_warning_of
from .llama import check_complete, why_only_copied
from .mapping import check_tensors, weights
from .native.checkpoint import NativeCheckpoint
from .native.find import FORMATS as NATIVE_FORMATS
from .native.find import exported_folder, open_native
from .native.hub_plan import compare_replicas, plan_run
from .native.masters import check_masters
from .native.table import read_table
from .optimizer_state import OPTIMIZER_FILE
from .quantisation import CONFIG_FIELDS, quantisation

FORMATS = ("auto", "hf", *NATIVE_FORMATS)


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "auto",
    iteration: int | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    multipliers: str | None = None,
    mapping: str | Path | None = None,
    fp32_master: bool = False,
    optimizer: bool = False,
    allow_unequal_replicas: bool = False,
    allow_nonfinite: bool = False,
    fold_input_mult: bool = False,
    dtype: str | None = None,
    quantize: str | None = None,
    options: WriteOptions | None = None,
    dry_run: bool = False,
) -> CheckpointResult:
    """Rewrite a checkpoint as safetensors, without loading it and without executing anything it contains.

    A Tele-FLM's tensors are checked against its configuration and written in data-flow order, with our code and
    configuration; any other Hugging Face model keeps its tensors, its configuration and its small files as they are, of
    a Llama it is checked that no weight of its configuration is missing or of another shape.
    Of a training run every weight is accounted for: copies that the run kept are compared, values checked to be finite.

    Args:
        source: folder of a Hugging Face checkpoint, `.bin` or safetensors, or of a training run (Megatron, DCP,
            DeepSpeed); or one file of weights, of which nothing else is known then: what lies beside it is not read.
        out: folder to write: new, or the finished or interrupted result of the same call.
        format: of the source, one of `FORMATS`; `auto` looks, `hf` is the Hugging Face layout.
        iteration: of a training run; its latest unless given.
        config: what the run's own arguments do not say: a preset's name, the path of a config.json, or its content.
        tokenizer: folder of the tokenizer that goes with the model.
        vocab_size: true size of the vocabulary, without the padding of a training run.
        multipliers: of a training run that does not say them: `none`, or `input_mult=16,output_mult=0.5` and so on.
        mapping: YAML file with the names of a fork of Megatron, see `native.table.read_table`.
        fp32_master: of a DeepSpeed or Megatron run: take the optimizer's float32 weights.
        optimizer: of a DeepSpeed, FSDP2 or Megatron run: write the moments of Adam too, as the optimizer.pt that
            transformers' Trainer loads and growth grows.
        allow_unequal_replicas: take rank 0's where copies differ.
        allow_nonfinite: write a run's NaN and infinities as they are, and infinity for what is too large for `dtype`.
        fold_input_mult: multiply a Tele-FLM's factor on the embeddings into these, so that it is 1: exactly if it is a
            power of two, else each is rounded once. The notes say which.
        dtype: of the output's floating-point tensors; the source's unless given. Weights in 8-bit floats that
            `compressed_tensors.is_float8` become their products with their scales.
        quantize: of a Tele-FLM: `fp8`, its linear layers but the head in 8-bit floats with a scale for each row.
        options: how to write.
        dry_run: plan and check everything that headers allow, write nothing.

    Raises:
        CheckpointError: the source cannot be used; nothing was written.
        CorruptData: a value is not finite, or a file was cut short; the output folder is not loadable.
        OSError: the disk failed; the output folder is not loadable, and the same call resumes.
    """
    how: dict[str, Any] = {
        "format": format,
        "iteration": iteration,
        "config": config,
        "tokenizer": tokenizer,
        "mapping": mapping,
    }
    how |= {"vocab_size": vocab_size, "multipliers": multipliers, "fp32_master": fp32_master}
    how |= {"optimizer": optimizer}
    how |= {"allow_unequal_replicas": allow_unequal_replicas, "allow_nonfinite": allow_nonfinite, "dtype": dtype}
    how |= {"fold_input_mult": fold_input_mult}
    how |= {"quantize": quantize}
    planned = _plan(source, options or WriteOptions(), dry_run=dry_run, **how)
    try:
        return execute(
            planned.plan,
            Path(out),
            planned.options,
            planned.notes,
            dry_run=dry_run,
            recorded=planned.recorded,
            states=planned.states,
        )
    except NotFinite as error:
        raise NotFinite(f"{error} --allow-nonfinite converts the run as it is.") from None


def convert_to_hub(
    source: str | Path,
    repo_id: str,
    low_disk: str | int,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    message: str | None = None,
    card: CardOptions = CardOptions(),  # noqa: B008  (frozen)
    work: Path | None = None,
    options: WriteOptions | None = None,
    dry_run: bool = False,
    **how: Any,
) -> Streamed:
    """Convert a checkpoint into a repository of the Hub, with at most `low_disk` of it on this disk at any time.

    Args:
        source: see `convert_checkpoint`.
        repo_id: `OWNER/NAME`.
        low_disk: bytes, or text such as `50GB`.
        private, revision, tag, message, card, work: see `hub.streaming.stream_to_hub`.
        options: how to write.
        dry_run: plan and check everything that headers allow, write nothing.
        how: what `convert_checkpoint` takes of the source: `format`, `dtype` and so on.

    Raises:
        CheckpointError, OSError: see `convert_checkpoint` and `stream_to_hub`.
    """
    planned = _plan(source, options or WriteOptions(), dry_run=dry_run, **how)
    if planned.states:
        raise CheckpointError("--optimizer writes a state to train on with, which is not published; leave it out.")
    notes = planned.notes
    if planned.options.verify_source and not dry_run:
        threads = reading_threads(planned.options.workers, parse_size(planned.options.memory))
        progress = planned.options.verify_progress
        notes = [*notes, *verify_sources(planned.plan, planned.recorded, threads, progress)]
    to = {"private": private, "revision": revision, "tag": tag, "message": message, "work": work, "card": card}
    return stream_to_hub(planned.plan, repo_id, low_disk, planned.options, notes, dry_run=dry_run, **to)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Planned:
    plan: CheckpointPlan
    notes: list[str]
    options: WriteOptions
    recorded: dict[str, View]
    states: list[Shard]


def _plan(
    source: str | Path,
    options: WriteOptions,
    *,
    format: str = "auto",
    iteration: int | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    multipliers: str | None = None,
    mapping: str | Path | None = None,
    fp32_master: bool = False,
    optimizer: bool = False,
    allow_unequal_replicas: bool = False,
    allow_nonfinite: bool = False,
    fold_input_mult: bool = False,
    dtype: str | None = None,
    quantize: str | None = None,
    dry_run: bool = False,
) -> _Planned:
    """The plan of a conversion, and how to write it; see `convert_checkpoint`."""
    if format not in FORMATS:
        raise CheckpointError(f"format is {format!r}, expected one of {', '.join(FORMATS)}.")
    check_scheme(quantize)
    if quantize and optimizer:
        raise CheckpointError(
            f"--optimizer writes moments to train on with, which --quantize {quantize} does not leave weights for; "
            "leave one of them out."
        )
    folder = local_view(source)
    options = replace(options, allow_nonfinite=options.allow_nonfinite or allow_nonfinite)
    recorded: dict[str, View] = {}
    cast = parse_dtype(dtype) if dtype else None
    states: list[Shard] = []
    run = _open_run(folder, format, iteration, mapping, fp32_master=fp32_master, optimizer=optimizer)
    if run is None:
        run_only = {"config": config, "tokenizer": tokenizer, "vocab_size": vocab_size, "iteration": iteration}
        run_only |= {"multipliers": multipliers, "mapping": mapping, "fp32_master": fp32_master or None}
        run_only |= {"allow_unequal_replicas": allow_unequal_replicas or None, "optimizer": optimizer or None}
        _refuse_run_options(run_only)
        plan, notes = plan_conversion(
            open_checkpoint(folder), dtype=cast, quantize=quantize, alone=folder.is_file(), fold_input=fold_input_mult
        )
    else:
        plan, states, notes = plan_run(
            run, _read_config(config), tokenizer, vocab_size, cast, multipliers, quantize, fold_input=fold_input_mult
        )
        options = replace(options, finite=not options.allow_nonfinite)
        exported = exported_folder(Path(run.folder)) if options.verify_source else None
        recorded = exported_weights(exported, with_state=optimizer or fp32_master) if exported else {}
        if not dry_run:
            check_masters(run)
            notes += compare_replicas(run, plan.config, allow=allow_unequal_replicas)
    return _Planned(plan, notes, options, recorded, states)


def _open_run(
    source: Path,
    format: str,
    iteration: int | None,
    mapping: str | Path | None,
    *,
    fp32_master: bool,
    optimizer: bool,
) -> NativeCheckpoint | None:
    """The training checkpoint that the source is; None if it is in the Hugging Face layout."""
    if format == "hf" or (format == "auto" and any((source / name).exists() for name in WEIGHT_FILES)):
        return None
    table = read_table(Path(mapping)) if mapping else None
    run = open_native(source, iteration, table=table, fp32_master=fp32_master, optimizer=optimizer)
    if format != "auto" and (run is None or run.format != format):
        raise CheckpointError(f"{source}: format is {format}, but this looks like {run.format if run else 'none'}.")
    return run


def _refuse_run_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            raise CheckpointError(
                f"--{name.replace('_', '-')} is for checkpoints of training runs; this one is a Hugging Face folder."
            )


def _read_config(config: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What the user says about the model, from wherever it is."""
    if config is None or isinstance(config, Mapping):
        return config
    return load_preset(str(config)) if str(config) in preset_names() else load_config(Path(config))


def plan_conversion(
    checkpoint: Source,
    *,
    dtype: DType | None = None,
    quantize: str | None = None,
    alone: bool = False,
    fold_input: bool = False,
) -> tuple[CheckpointPlan, list[str]]:
    """The plan of a conversion, and notes on it.

    Args:
        checkpoint: the source.
        dtype: of the output's floating-point tensors; each source tensor's own unless given.
        quantize: see `convert_checkpoint`.
        alone: take the weights alone, and nothing that lies beside them.
        fold_input: multiply `input_mult` into the embeddings.

    Raises:
        CheckpointError: a Tele-FLM's tensors are not those of its configuration, a Llama lacks one of them, quantised
            tensors are to be cast or quantised again, or a file that goes with them is a link that leads out of the
            folder.
    """
    if not checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.folder}: {Path(checkpoint.files[0].name).name} holds no tensors.")
    how = quantisation(checkpoint.config, checkpoint.tensors)
    is_teleflm = (checkpoint.config or {}).get("model_type") == MODEL_TYPE
    if quantize:
        _refuse_quantising(checkpoint, quantize, how, alone=alone)
    float8 = read_float8(checkpoint) if how and dtype and not alone and is_float8(checkpoint.config) else None
    if how and dtype and not float8:
        other = "of one file alone no config.json is read" if alone else other_scheme(checkpoint.config)
        raise CheckpointError(
            f"{checkpoint.folder}: is quantised ({how}); --dtype {dtype} would round its scales. Without --dtype it is "
            "copied as it is; for another dtype take the original, or dequantise it first: --dtype does so of "
            f"compressed-tensors' 8-bit floats with a scale a tensor or a row, and {other}."
        )
    if fold_input:
        _check_foldable(checkpoint, how, alone=alone)
    if alone:
        plan, notes = _plan_alone(checkpoint, dtype)
    elif is_teleflm and (float8 or not how):
        plan, notes = _plan_teleflm(checkpoint, dtype, quantize, float8, fold_input=fold_input)
    else:
        plan, notes = _plan_any(checkpoint, dtype, float8)
    if float8:
        notes.append(f"Dequantised ({how}): {len(float8.scales)} weights are products with their scales, rounded once.")
        if float8.left_out:
            notes.append(f"{len(float8.left_out)} scales of activations were left out, as {float8.left_out[0]}.")
    elif how:
        notes.append(f"Quantised ({how}): every tensor was kept as it is.")
        warning = None if alone else input_mult_warning_of(checkpoint.config or {}, quantised=True)
        notes += [warning] if warning else []
    plan.check()
    return plan, notes


def _check_foldable(checkpoint: Source, how: str | None, *, alone: bool) -> None:
    """Whether `input_mult` of a source can be folded, which takes its configuration and weights that can be scaled."""
    said = None if alone else (checkpoint.config or {}).get("model_type")
    if alone:
        reason = "is one file of weights, whose configuration is not read; name its folder"
    elif said != MODEL_TYPE:
        reason = f"model_type is {said!r}, and --fold-input-mult is for {MODEL_TYPE}; leave it out"
    elif how:
        first = ", or what `teleflm convert --dtype bfloat16` makes of it" if is_float8(checkpoint.config) else ""
        reason = f"is quantised ({how}); fold the original{first}; or leave --fold-input-mult out"
    else:
        return
    raise CheckpointError(f"{checkpoint.folder}: {reason}.")


def _refuse_quantising(checkpoint: Source, quantize: str, how: str | None, *, alone: bool) -> None:
    """Refuse to quantise what is quantised already, and a model whose layers are not known here."""
    kind = (checkpoint.config or {}).get("model_type")
    if how:
        raise CheckpointError(
            f"{checkpoint.folder}: is quantised ({how}); --quantize {quantize} would round it again. Take the original."
        )
    if alone or kind != MODEL_TYPE:
        found = "a file of weights" if alone else f"a {kind} model" if kind else "one without a config.json"
        raise CheckpointError(
            f"{checkpoint.folder}: --quantize {quantize} is for the folder of a Tele-FLM, whose layers are known here; "
            f"this is {found}."
        )


def _plan_teleflm(
    checkpoint: Source, dtype: DType | None, quantize: str | None, float8: Float8Weights | None, *, fold_input: bool
) -> tuple[CheckpointPlan, list[str]]:
    where = f"{checkpoint.folder}/config.json"
    config = {key: value for key, value in (checkpoint.config or {}).items() if not (float8 and key in CONFIG_FIELDS)}
    architecture = Architecture.from_config(config, where, with_biases=True)
    check_scheme(quantize, architecture)
    found = float8.tensors if float8 else checkpoint.tensors
    check_tensors(found, architecture, checkpoint.folder)
    fold = fold_input_mult(architecture, where) if fold_input else InputFold(architecture, 1.0)
    tensors = tuple(
        _cast(name, found[name], dtype, float8, scale=fold.scales.get(name, 1.0)) for name, *_ in weights(architecture)
    )
    dropped = len(found) - len(tensors)
    lineage = {**_lineage(checkpoint, dtype, quantize, float8), **folded_lineage(fold)}
    out_dtype = tensors[0].dtype.name
    config = hub_config(config, fold.architecture, out_dtype)
    if quantize:
        tensors, config = quantise_linear(tensors), quantised_config(config)
    facts = model_facts(config, out_dtype, lineage)
    facts = replace(facts, num_bytes=sum(tensor.nbytes for tensor in tensors)) if quantize else facts
    sidecars = hub_sidecars(Path(checkpoint.folder), facts)
    notes = [f"{dropped} tensors that every runtime computes itself were left out."] if dropped else []
    notes += fold.notes(tensors[0].dtype) if fold_input else []
    if fold.factor != 1.0 and (Path(checkpoint.folder) / OPTIMIZER_FILE).is_file():
        notes.append(
            f"{OPTIMIZER_FILE} of the source is of embeddings that were not multiplied: it is no state of this model."
        )
    warning = input_mult_warning(fold.architecture)
    notes += [warning] if warning else []
    notes += sidecar_notes(Path(checkpoint.folder), sidecars)
    return CheckpointPlan(tensors, config, sidecars, lineage), notes


def _plan_any(
    checkpoint: Source, dtype: DType | None, float8: Float8Weights | None
) -> tuple[CheckpointPlan, list[str]]:
    folder = Path(checkpoint.folder)
    found = float8.tensors if float8 else checkpoint.tensors
    tensors = tuple(_cast(name, view, dtype, float8) for name, view in found.items())
    check_read_files(folder)
    config = {key: value for key, value in (checkpoint.config or {}).items() if not (float8 and key in CONFIG_FIELDS)}
    tokenizer = read_json(Path(path)) if (path := copied_file(folder, "tokenizer_config.json")) else None
    sidecars = small_files(folder, {"config.json": config, "tokenizer_config.json": tokenizer})
    if dtype:
        config = {**{key: value for key, value in config.items() if key != "torch_dtype"}, "dtype": dtype.name}
    notes = [] if checkpoint.config else ["The source has no config.json; the output's is empty."]
    model_type = config.get("model_type")
    if model_type and model_type != MODEL_TYPE:
        notes.append(f"A {model_type} model, not a Tele-FLM: {_kept(dtype, float8)}.")
    if unread := why_only_copied(checkpoint):
        notes.append(f"Whether its weights are all there was not looked at: {unread}.")
    elif is_llama(checkpoint.config):
        check_complete(checkpoint)
    notes += left_behind(folder, sidecars)
    return CheckpointPlan(tensors, config, sidecars, _lineage(checkpoint, dtype, None, float8)), notes


def _kept(dtype: DType | None, float8: Float8Weights | None) -> str:
    """What a copy keeps of a model whose layers are not known here, in words."""
    if dtype is None:
        return "tensors and configuration were kept as they are"
    quantised = " and the quantisation" if float8 else ""
    return f"floating-point tensors are {dtype} now, the configuration was kept but for the dtype{quantised}"


def _plan_alone(checkpoint: Source, dtype: DType | None) -> tuple[CheckpointPlan, list[str]]:
    tensors = tuple(_cast(name, view, dtype) for name, view in checkpoint.tensors.items())
    config = {"dtype": dtype.name} if dtype else {}
    lineage = {**_lineage(checkpoint, dtype), "parent": None}
    notes = ["The weights were converted alone: nothing beside them was read. Name their folder to have it all."]
    return CheckpointPlan(tensors, config, {}, lineage), notes


def _cast(
    name: str, view: View, dtype: DType | None, float8: Float8Weights | None = None, *, scale: float = 1.0
) -> TensorPlan:
    if float8 and dtype:
        return float8.plan(name, dtype)
    cast = dtype if dtype and view.dtype.is_floating else None
    if scale != 1.0:
        return ShardedTensor.of(view).plan(name, dtype=cast, scale=scale)
    return TensorPlan.copy_of(name, view, cast)


def _lineage(
    checkpoint: Source, dtype: DType | None, quantize: str | None = None, float8: Float8Weights | None = None
) -> dict[str, Any]:
    return {
        "operation": "convert",
        "from": checkpoint.format,
        "dtype": dtype.name if dtype else None,
        **({"quantized": quantize} if quantize else {}),
        **({"dequantized": True} if float8 else {}),
        "parent": parent_of(checkpoint),
    }
