# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A Tele-FLM for other runtimes and trainers: Granite, Llama, Megatron-LM.

Tele-FLM is Llama with two multipliers, on the embeddings and on the logits. Granite has both in its configuration, so
its weights are the same bytes. Llama and stock Megatron-LM have neither, so there the multipliers are folded into the
embedding and the head, exactly where they are powers of two and rounded once where not.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import ml_dtypes

from ..architecture import Architecture
from ..checkpoint.containers import Layout, Shard, indexed_layout
from ..checkpoint.dtypes import DType, parse_dtype
from ..checkpoint.errors import CheckpointError
from ..checkpoint.execute import CheckpointResult, WriteOptions, execute
from ..checkpoint.finish import link_kind
from ..checkpoint.manifest import parent_record
from ..checkpoint.plan import CheckpointPlan, TensorPlan
from ..checkpoint.preflight import listed
from ..checkpoint.safetensors_file import read_header
from ..checkpoint.sharded import ShardedTensor
from ..checkpoint.sources import Source, open_checkpoint
from ..hub.card import lineage_steps, model_card
from ..hub.contents import TOKENIZER_CODE, hub_config, hub_sidecars
from ..hub.small_files import check_read_files, left_behind, small_files
from ..mapping import EMBED_TOKENS, LM_HEAD, check_tensors, weights
from ..quantisation import refuse_quantised
from .megatron import ParallelSizes, Spec, padded_vocab_size, plan_megatron

Target: TypeAlias = Literal["granite", "llama", "megatron"]
Multipliers: TypeAlias = Literal["fold", "keep"]

_NEUTRAL = {"use_mup": False, "input_mult": 1.0, "output_mult": 1.0, "mup_scale_factor": 1.0}
_STOCK_CLASSES = {"granite": "GraniteForCausalLM", "llama": "LlamaForCausalLM"}
_HUB_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


def export_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    to: str,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    multipliers: str = "fold",
    spec: str = "te",
    link: bool = False,
    dtype: str | None = None,
    options: WriteOptions | None = None,
    dry_run: bool = False,
) -> CheckpointResult:
    """Make a folder that another runtime or trainer loads from a Tele-FLM in Hub format; nothing is loaded.

    Args:
        source: folder of the Tele-FLM.
        out: folder to write: new, or the finished or interrupted result of the same call.
        to: `granite` and `llama` are folders that stock transformers loads, and whatever loads those; `megatron` is
            one of Megatron-LM's `torch` format.
        tp: tensor-parallel ranks, for Megatron.
        pp: pipeline stages, for Megatron.
        vpp: chunks of layers in a stage, for Megatron.
        multipliers: for Megatron: `fold` them into the weights, or `keep` the weights and note them in the arguments,
            for a trainer that knows them; a stock Megatron-LM does not.
        spec: for Megatron: the layers it builds, `te` (Transformer Engine) or `local`.
        link: for Granite: link to the source's weight files rather than copy them: hard links, or symbolic ones where
            these are not allowed, or copies where no links are. The result's notes say which.
        dtype: of the output; the source's unless given.
        options: how to write.
        dry_run: plan and check everything, write nothing.

    Raises:
        CheckpointError: the source is no Tele-FLM, or the target has no such model; nothing was written.
        OSError: the disk failed; the output folder is not loadable, and the same call resumes.
    """
    _check_choices(to, ParallelSizes(tp, pp, vpp), multipliers, spec, link)
    options = options or WriteOptions()
    model = _open_model(source)
    cast = parse_dtype(dtype) if dtype else None
    if to == "megatron":
        plan, layout, notes = _plan_megatron(model, ParallelSizes(tp, pp, vpp), multipliers == "fold", spec, cast)
        return execute(plan, Path(out), options, notes, dry_run=dry_run, layout=layout)
    if to == "llama":
        plan, notes = _plan_llama(model, cast)
        return execute(plan, Path(out), options, notes, dry_run=dry_run)
    plan = _plan_granite(model, cast)
    linked = _linked_layout(model.checkpoint, plan) if link else None
    kept = left_behind(model.folder, plan.sidecars)
    if linked is None:
        notes = ["The weights are copied: links need safetensors files of the output's very tensors."] if link else []
        notes += kept
        return execute(plan, Path(out), options, notes, dry_run=dry_run)
    result = execute(plan, Path(out), replace(options, digest=False), kept, dry_run=dry_run, layout=linked)
    return replace(
        result, notes=[*result.notes, _link_note(Path(out), linked, written=not dry_run and options.rank == 0)]
    )


def _link_note(out: Path, layout: Layout, *, written: bool) -> str:
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


def _check_choices(to: str, sizes: ParallelSizes, multipliers: str, spec: str, link: bool) -> None:
    if to == "gguf":
        raise CheckpointError("--to gguf: export --to llama, then run llama.cpp's convert_hf_to_gguf.py on the output.")
    for option, value, known in (
        ("--to", to, Target),
        ("--multipliers", multipliers, Multipliers),
        ("--spec", spec, Spec),
    ):
        if value not in get_args(known):
            raise CheckpointError(f"{option} is {value!r}, expected one of {', '.join(get_args(known))}.")
    if to != "megatron" and (sizes, multipliers, spec) != (ParallelSizes(), "fold", "te"):
        raise CheckpointError(f"--tp, --pp, --vpp, --multipliers and --spec are for --to megatron, not {to}.")
    if link and to != "granite":
        raise CheckpointError(f"--link is for --to granite; the weights of {to} are other bytes.")


@dataclass(frozen=True)
class _Model:
    """A Tele-FLM that is open for planning."""

    checkpoint: Source
    config: dict[str, Any]
    architecture: Architecture

    @property
    def folder(self) -> Path:
        return Path(self.checkpoint.folder)

    def dtype(self, cast: DType | None) -> DType:
        """Of the output."""
        return cast or self.checkpoint.tensors[EMBED_TOKENS.name].dtype

    def parts(self, target: Architecture) -> dict[str, ShardedTensor]:
        """The tensors of a model of the target's weights, which may have untied its head."""
        tensors = self.checkpoint.tensors
        is_tied = self.architecture.tie_word_embeddings
        sources = {
            name: EMBED_TOKENS.name if is_tied and name == LM_HEAD.name else name for name, *_ in weights(target)
        }
        return {name: ShardedTensor.of(tensors[source]) for name, source in sources.items()}

    def lineage(self, to: Target, cast: DType | None, **details: Any) -> dict[str, Any]:
        return {
            "operation": "export",
            "to": to,
            "dtype": cast.name if cast else None,
            **details,
            "parent": parent_record(self.folder),
        }


def _open_model(source: str | Path) -> _Model:
    checkpoint = open_checkpoint(source)
    config = checkpoint.config
    if config is None:
        raise CheckpointError(f"{checkpoint.folder}/config.json: no such file; only a Tele-FLM can be exported.")
    refuse_quantised(checkpoint, "export")
    architecture = Architecture.from_config(config, f"{checkpoint.folder}/config.json", with_biases=True)
    check_tensors(checkpoint.tensors, architecture, checkpoint.folder)
    return _Model(checkpoint, config, architecture)


# Multipliers.


def fold_multipliers(architecture: Architecture) -> tuple[Architecture, dict[str, float]]:
    """The architecture that computes the same without multipliers, and the factors on its embedding and head.

    A head that is tied to the embedding needs weights of its own where the two factors differ.
    """
    scales = {EMBED_TOKENS.name: architecture.embedding_scale, LM_HEAD.name: architecture.logit_scale}
    tied = architecture.tie_word_embeddings and architecture.embedding_scale == architecture.logit_scale
    return architecture.evolve(**_NEUTRAL, tie_word_embeddings=tied), scales


def _folding_notes(source: Architecture, target: Architecture, scales: Mapping[str, float], dtype: DType) -> list[str]:
    """How exact the folding is: a sentence for each factor, and one if the head was untied."""
    names = [
        name for name in scales if scales[name] != 1.0 and not (name == LM_HEAD.name and target.tie_word_embeddings)
    ]
    notes = [f"{name} was multiplied by {scales[name]:g}: {_rounding(scales[name], dtype)}." for name in names]
    if source.tie_word_embeddings and not target.tie_word_embeddings:
        notes.append(f"{LM_HEAD.name} is no longer tied to the embedding: their factors differ.")
    return notes


def _rounding(factor: float, dtype: DType) -> str:
    limits = ml_dtypes.finfo(dtype.numpy)
    smallest = f"{float(limits.smallest_normal):.3g}"
    if math.frexp(factor)[0] == 0.5:
        return f"a power of two, so exact where the product is 0 or at least {smallest}"
    return f"rounded to {dtype}, by at most {float(limits.eps) / 2:.3g} of each product of at least {smallest}"


# Plans.


def _plan_granite(model: _Model, cast: DType | None) -> CheckpointPlan:
    a = model.architecture
    multipliers = {
        "embedding_multiplier": a.embedding_scale,
        "logits_scaling": 1.0 / a.logit_scale,
        "attention_multiplier": a.head_dim**-0.5,
        "residual_multiplier": 1.0,
    }
    tensors = tuple(TensorPlan.copy_of(name, model.checkpoint.tensors[name], cast) for name, *_ in weights(a))
    config = {**_stock_config(model, a, "granite", model.dtype(cast)), **multipliers}
    lineage = model.lineage("granite", cast)
    return CheckpointPlan(tensors, config, _stock_sidecars(model, a, lineage, model.dtype(cast)), lineage)


def _plan_llama(model: _Model, cast: DType | None) -> tuple[CheckpointPlan, list[str]]:
    target, scales = fold_multipliers(model.architecture)
    dtype = model.dtype(cast)
    parts = model.parts(target)
    tensors = tuple(part.plan(name, dtype=cast, scale=scales.get(name, 1.0)) for name, part in parts.items())
    lineage = model.lineage("llama", cast, multipliers="fold")
    config = _stock_config(model, target, "llama", dtype)
    plan = CheckpointPlan(tensors, config, _stock_sidecars(model, target, lineage, dtype), lineage)
    return plan, left_behind(model.folder, plan.sidecars) + _folding_notes(model.architecture, target, scales, dtype)


def _plan_megatron(
    model: _Model, sizes: ParallelSizes, fold: bool, spec: Any, cast: DType | None
) -> tuple[CheckpointPlan, Layout, list[str]]:
    source, dtype = model.architecture, model.dtype(cast)
    target, scales = fold_multipliers(source) if fold else (source, {})
    config = {key: value for key, value in hub_config(model.config, target, dtype.name).items() if key != "auto_map"}
    tensors, layout = plan_megatron(model.parts(target), scales, target, config, sizes, spec, dtype)
    details = {"parallel": asdict(sizes), "multipliers": "fold" if fold else "keep", "spec": spec}
    lineage = model.lineage("megatron", cast, **details)
    check_read_files(model.folder)
    # The card says how transformers loads the model, which is not how this folder is loaded.
    sidecars = {name: path for name, path in small_files(model.folder, {}).items() if name != "README.md"}
    notes = left_behind(model.folder, sidecars) + _folding_notes(source, target, scales, dtype)
    if not fold and (source.embedding_scale, source.logit_scale) != (1.0, 1.0):
        notes.append(
            f"The multipliers {source.embedding_scale:g} on the embeddings and {source.logit_scale:g} on the logits "
            "are in the arguments only; a stock Megatron-LM ignores them and computes another function."
        )
    padded = padded_vocab_size(target.vocab_size, sizes.tensor)
    if padded != target.vocab_size:
        notes.append(f"{padded - target.vocab_size} rows of zeros follow the {target.vocab_size} of the vocabulary.")
    notes.append(
        "Megatron-LM: --load OUT --use-checkpoint-args --use-mp-args-from-checkpoint-args --ckpt-format torch "
        f"--norm-epsilon {target.rms_norm_eps:g}."
    )
    return CheckpointPlan(tensors, config, sidecars, lineage), layout, notes


def _stock_config(model: _Model, architecture: Architecture, model_type: str, dtype: DType) -> dict[str, Any]:
    """A config.json for a class of transformers' own."""
    config = hub_config(model.config, architecture, dtype.name)
    kept = {key: value for key, value in config.items() if key not in ("auto_map", *_NEUTRAL)}
    return {**kept, "model_type": model_type, "architectures": [_STOCK_CLASSES[model_type]]}


def _stock_sidecars(
    model: _Model, architecture: Architecture, lineage: Mapping[str, Any], dtype: DType
) -> dict[str, str | bytes]:
    card = model_card(architecture, dtype.name, lineage_steps(lineage), own_code=False)
    return hub_sidecars(model.folder, card, code=(TOKENIZER_CODE,))


def _linked_layout(checkpoint: Source, plan: CheckpointPlan) -> Layout | None:
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
