# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A Tele-FLM or a Llama for other runtimes and trainers: Granite, Llama, GGUF, Megatron-LM, FSDP2.

Tele-FLM is Llama with two multipliers, on the embeddings and on the logits. Granite has both in its configuration, so
its weights are the same bytes; GGUF is a Granite's. Llama and stock Megatron-LM have neither, so there the multipliers
are folded into the embedding and the head, exactly where they are powers of two and rounded once where not. FSDP2
trains the model itself. A Llama is a Tele-FLM whose multipliers are 1.
"""

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias, get_args

from ..checkpoint.distributed_file import read_chunks_by_name
from ..checkpoint.dtypes import parse_dtype
from ..checkpoint.errors import CheckpointError
from ..checkpoint.execute import CheckpointResult, WriteOptions, execute
from ..checkpoint.manifest import is_plain, read_manifest
from ..checkpoint.mirror import origin
from ..checkpoint.plan import View
from ..hub.contents import sidecar_notes
from .dcp import open_state, plan_dcp
from .gguf import OutType, plan_gguf
from .gguf_tokenizer import Prompts
from .granite import link_note, linked_layout, plan_granite, uncut_note
from .llama import plan_llama
from .megatron import ParallelSizes, Spec, exported_tensors, plan_megatron_export
from .model import Target, open_model
from .torch_dist import plan_torch_dist

Multipliers: TypeAlias = Literal["fold", "keep"]


def export_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    to: str,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    pipeline_layout: str | None = None,
    multipliers: str = "fold",
    spec: str = "te",
    link: bool = False,
    optimizer: bool = False,
    dtype: str | None = None,
    outtype: str | None = None,
    prompts: str = "chat",
    name: str | None = None,
    options: WriteOptions | None = None,
    dry_run: bool = False,
) -> CheckpointResult:
    """Make a folder that another runtime or trainer loads, of a Tele-FLM or a Llama in Hub format; nothing is loaded.

    Args:
        source: folder of the model.
        out: folder to write: new, or the finished or interrupted result of the same call.
        to: `granite` and `llama` are folders that stock transformers loads, and whatever loads those; `gguf` is one of
            files that llama.cpp loads; `megatron` is
            one of Megatron-LM's `torch` format, `torch_dist` one of megatron-core's, for any number of ranks; `dcp` is
            one that FSDP2 loads in parts, as Accelerate calls them.
        tp: tensor-parallel ranks, for Megatron.
        pp: pipeline stages, for Megatron.
        vpp: chunks of layers in a stage, for Megatron.
        pipeline_layout: which layers each stage has, for Megatron: `first=N,last=N`, `embedding,loss` (which count as a
            layer each), or the string of its --pipeline-model-parallel-layout; as many in each unless given.
        multipliers: for Megatron: `fold` them into the weights, or `keep` the weights and note them in the arguments,
            for a trainer that knows them; a stock Megatron-LM does not.
        spec: for Megatron: the layers it builds, `te` (Transformer Engine) or `local`.
        link: for Granite: link to the source's weight files rather than copy them: hard links, or symbolic ones where
            these are not allowed, or copies where no links are. The result's notes say which.
        optimizer: for FSDP2 and `torch_dist`: the moments of Adam too, those of the optimizer.pt beside the model. For
            FSDP2 the rest of what transformers' Trainer resumes a checkpoint of its own from goes along.
        dtype: of the output's weights; the source's unless given. GGUF has `outtype` instead.
        outtype: for GGUF: `bf16`, `f16`, `f32` or `q8_0` (blocks of 32 with a scale); the source's unless given.
        prompts: for GGUF: whether llama.cpp tokenizes a `chat` as the model's tokenizer does, or plain `text`.
        name: for GGUF: of the model and its files; the source folder's unless given.
        options: how to write.
        dry_run: plan and check everything, write nothing.

    Raises:
        CheckpointError: the source is neither Tele-FLM nor Llama, or the target has no such model; nothing was written.
        OSError: the disk failed; the output folder is not loadable, and the same call resumes.
    """
    sizes = ParallelSizes(tp, pp, vpp, pipeline_layout)
    _check_choices(to, sizes, multipliers, spec, link, optimizer)
    _check_gguf(to, outtype, prompts, name, dtype)
    options = options or WriteOptions()
    if to == "megatron" and options.max_shard_size != WriteOptions.max_shard_size:
        raise CheckpointError(
            "--max-shard-size: --to megatron writes one file a rank, cut by --tp and --pp; leave it out."
        )
    model = open_model(source, masked=to == "megatron")
    if link and origin(model.folder):
        raise CheckpointError(f"{source}: is not on this machine, and cannot be linked to; leave --link out.")
    cast = parse_dtype(dtype) if dtype else None
    if to == "megatron":
        plan, layout, notes = plan_megatron_export(model, sizes, multipliers == "fold", spec, cast)
        return execute(plan, Path(out), options, notes, dry_run=dry_run, layout=layout)
    if to in ("dcp", "torch_dist"):
        state = open_state(model) if optimizer else None
        if to == "dcp":
            plan, layout, notes = plan_dcp(model, state, cast, options.shard_bytes)
        else:
            plan, layout, notes = plan_torch_dist(model, state, multipliers == "fold", cast, options.shard_bytes)
        return execute(plan, Path(out), options, notes, dry_run=dry_run, layout=layout)
    if to == "gguf":
        plan, layout, notes = plan_gguf(
            model, outtype, "text" if prompts == "text" else "chat", name, options.shard_bytes
        )
        return execute(plan, Path(out), options, notes, dry_run=dry_run, layout=layout)
    if to == "llama":
        plan, notes = plan_llama(model, cast)
        return execute(plan, Path(out), options, notes, dry_run=dry_run)
    plan = plan_granite(model, cast)
    linked = linked_layout(model.checkpoint, plan) if link else None
    kept = sidecar_notes(model.folder, plan.sidecars, family=model.family, stock=True)
    if linked is None:
        notes = ["The weights are copied: links need safetensors files of the output's very tensors."] if link else []
        notes += kept
        return execute(plan, Path(out), options, notes, dry_run=dry_run)
    result = execute(plan, Path(out), replace(options, digest=False), kept, dry_run=dry_run, layout=linked)
    notes = [link_note(Path(out), linked, written=not dry_run and options.rank == 0)]
    return replace(result, notes=[*result.notes, *notes, *uncut_note(linked, options)])


def exported_weights(folder: Path, *, with_state: bool = False) -> dict[str, View]:
    """The weights of a folder that was exported to train on, by the names of its plan and its record.

    Args:
        folder: the one with the record.
        with_state: also what its optimizer keeps.

    Raises:
        CheckpointError: a file is damaged.
    """
    files = (read_manifest(folder) or {}).get("files")
    listed = files.items() if isinstance(files, dict) else ()
    parts = [name for name, _ in listed if name.endswith(".distcp") and is_plain(name)]
    tensors = exported_tensors(folder)
    for place in sorted({str(PurePosixPath(name).parent) for name in parts}):
        tensors |= read_chunks_by_name(folder, place, lambda name: with_state or not name.startswith("optimizer."))
    return tensors


def _check_choices(to: str, sizes: ParallelSizes, multipliers: str, spec: str, link: bool, optimizer: bool) -> None:
    for option, value, known in (
        ("--to", to, Target),
        ("--multipliers", multipliers, Multipliers),
        ("--spec", spec, Spec),
    ):
        if value not in get_args(known):
            raise CheckpointError(f"{option} is {value!r}, expected one of {', '.join(get_args(known))}.")
    if to == "torch_dist" and (sizes, spec) != (ParallelSizes(), "te"):
        raise CheckpointError(
            "--tp, --pp, --vpp, --pipeline-layout and --spec are for --to megatron; torch_dist is the same for all "
            "ranks and layers."
        )
    if to not in ("megatron", "torch_dist") and (sizes, multipliers, spec) != (ParallelSizes(), "fold", "te"):
        raise CheckpointError(
            "--tp, --pp, --vpp, --pipeline-layout, --multipliers and --spec are for --to megatron, --multipliers also "
            f"for torch_dist, not {to}."
        )
    if optimizer and to not in ("dcp", "torch_dist"):
        raise CheckpointError(f"--optimizer is for --to dcp and torch_dist; {to} is written without Adam's moments.")
    if link and to != "granite":
        raise CheckpointError(f"--link is for --to granite; {to} is written anew.")


def _check_gguf(to: str, outtype: str | None, prompts: str, name: str | None, dtype: str | None) -> None:
    for option, value, known in (("--outtype", outtype, OutType), ("--prompts", prompts, Prompts)):
        if value is not None and value not in get_args(known):
            raise CheckpointError(f"{option} is {value!r}, expected one of {', '.join(get_args(known))}.")
    if to == "gguf":
        if dtype is not None:
            raise CheckpointError("--dtype: --to gguf has --outtype instead, which says what the files hold.")
    elif (outtype, prompts, name) != (None, "chat", None):
        raise CheckpointError(f"--outtype, --prompts and --name are for --to gguf, not {to}.")
