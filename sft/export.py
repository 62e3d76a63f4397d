# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""From what training saved to a Hub folder: weights, code, tokenizer, chat template, generation settings, lineage.

An adapter is merged by [`sft.merge`], weight by weight; the merged weights lie beside OUT until the folder is written,
and take as much disk as it does.
"""

import json
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conversion.architecture import MODEL_TYPE
from conversion.checkpoint.dtypes import DType, parse_dtype
from conversion.checkpoint.execute import WriteOptions, write_checkpoint
from conversion.checkpoint.manifest import MANIFEST, read_manifest
from conversion.checkpoint.parent import parent_notes, parent_of, parent_record
from conversion.checkpoint.plan import View
from conversion.checkpoint.safetensors_file import read_safetensors
from conversion.checkpoint.sources import WEIGHT_FILES, Source, open_checkpoint
from conversion.checkpoint.strict_json import read_json_object
from conversion.convert import convert_checkpoint, plan_conversion
from conversion.family import find_family
from conversion.hub.card import CARD, CardFacts, adapter_facts, is_repo_id, model_facts
from conversion.hub.contents import hub_sidecars, tokenizer_notes
from conversion.hub.saved_model import ADAPTER_WEIGHTS, record_saved_model
from conversion.hub.small_files import is_text, small_files
from conversion.model_identity import base_digest, is_base
from sft import SFTError

ADAPTER_CONFIG = "adapter_config.json"
CONFIG, TOKENIZER = "config.json", "tokenizer.model"
_GENERATION_CONFIG = "generation_config.json"
# Of the standard deviation of the logits. Merging in float32 changes 1e-7 to 1e-6 of it; a wrong factor on an adapter
# that has learned anything, a thousand times as much.
_TOLERANCE = 1e-5


class ExportError(SFTError):
    """A checkpoint cannot be exported as asked. Nothing was written."""


@dataclass(frozen=True)
class Exported:
    """A written Hub folder.

    Args:
        folder: where it is.
        merged: tensors that an adapter changed; 0 if there was nothing to merge.
        gap: root mean square of what merging changed in the logits, over their standard deviation; None if nothing was
            merged.
        notes: what a user should know, one sentence each.
    """

    folder: Path
    merged: int = 0
    gap: float | None = None
    notes: tuple[str, ...] = ()


def export_model(
    checkpoint: str | Path,
    out: str | Path,
    *,
    merge: bool = False,
    base: str | Path | None = None,
    dtype: str | None = None,
    options: WriteOptions | None = None,
) -> Exported:
    """Write a Hub folder from what `sft train` saved.

    Args:
        checkpoint: `output_dir` of a run, or one of its checkpoints: a whole model, one in parts, or an adapter.
        out: the folder to write.
        merge: merge the adapter into its base. Without it an adapter stays one, and its folder names the base.
        base: what the adapter was trained on, if it is not where it was then: a folder, or the name of a model on the
            Hub that has been downloaded.
        dtype: of the written weights; the checkpoint's, or the base's, unless given.
        options: how to write.

    Raises:
        ExportError: there is no such checkpoint, nothing to merge, or the adapter is for another base.
        CheckpointError: the weights are damaged, or `out` is in use.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    options = options or WriteOptions()
    cast = parse_dtype(dtype) if dtype else None
    if not (checkpoint / ADAPTER_CONFIG).is_file():
        if merge or base:
            raise ExportError(f"{checkpoint} holds no {ADAPTER_CONFIG}: there is no adapter to merge.")
        where: dict[str, Any] = {"format": "hf"}
        if not any((checkpoint / name).is_file() for name in WEIGHT_FILES) and (checkpoint / CONFIG).is_file():
            # One that FSDP or DeepSpeed saved in parts, with what else makes a model beside them.
            where = {"config": checkpoint / CONFIG}
            if (checkpoint / TOKENIZER).is_file():
                where["tokenizer"] = checkpoint
        converted = convert_checkpoint(checkpoint, out, **where, dtype=dtype, options=options)
        notes = [
            *parent_notes(converted.plan.lineage),
            *tokenizer_notes(checkpoint, family=find_family(converted.plan.config)),
        ]
        return Exported(out, notes=tuple(notes))

    adapter = _read_adapter(checkpoint)
    source = _open_base(adapter, base)
    _check_fit(adapter, source)
    if not merge:
        if dtype:
            raise ExportError(f"dtype is {dtype}, but an adapter keeps its own; add --merge.")
        _write_adapter(adapter, source, out, base, overwrite=options.overwrite)
        kept = tokenizer_notes(_tokenizer_folder(adapter, source))
        return Exported(out, notes=(*parent_notes({"parent": adapter.record()}), *kept))
    return _write_merged(adapter, source, out, base, cast, options)


# --- the adapter and its base -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Adapter:
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, View]
    lineage: dict[str, Any] | None

    def record(self) -> dict[str, Any] | None:
        """What a lineage keeps of it."""
        return parent_record(self.folder, self.tensors)


def _read_adapter(folder: Path) -> _Adapter:
    config = read_json_object(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise ExportError(f"{folder / ADAPTER_CONFIG}: peft_type is {config.get('peft_type')!r}; LORA can be exported.")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ExportError(f"{folder} holds {ADAPTER_CONFIG} and no {ADAPTER_WEIGHTS}; was the run interrupted?")
    manifest = read_manifest(folder)
    return _Adapter(
        folder, config, read_safetensors(folder / ADAPTER_WEIGHTS), manifest["lineage"] if manifest else None
    )


def _open_base(adapter: _Adapter, base: str | Path | None) -> Source:
    name = str(base or adapter.config.get("base_model_name_or_path"))
    folder = find_model(name, adapter.config.get("revision"))
    if folder is None:
        raise ExportError(
            f"the base {name} of {adapter.folder} is neither a folder nor a downloaded model; say where it is: --base."
        )
    source = open_checkpoint(folder)
    model_type = (source.config or {}).get("model_type")
    if model_type != MODEL_TYPE:
        raise ExportError(f"{folder}/config.json: model_type is {model_type!r}, expected {MODEL_TYPE!r}.")
    return source


def find_model(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model: itself, or where the Hub's files were downloaded to; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if (Path(name) / "config.json").is_file():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError):
        return None


def _check_fit(adapter: _Adapter, base: Source) -> None:
    """That every part of the adapter has its place in the base, and that the base is the one it was trained on."""
    for name, view in adapter.tensors.items():
        target, expected = _place(name, view.shape, adapter.tensors)
        found = base.tensors.get(target)
        if found is None or (expected is not None and tuple(found.shape) != expected):
            there = f"is {list(found.shape)}" if found else "is missing"
            wanted = list(expected) if expected else "present"
            raise ExportError(
                f"{adapter.folder} is an adapter for another base: {target} of {base.folder} {there}, expected "
                f"{wanted}. Name the base that it was trained on: --base."
            )
    _check_complete(adapter, base)
    recorded = (adapter.lineage or {}).get("base")  # which the lineage of an exported adapter keeps
    if recorded and not is_base(base, str(recorded)):
        raise ExportError(
            f"{adapter.folder} is an adapter for another base: {base.folder} has the same shapes and other weights "
            f"(digest {base_digest(base)}, expected {recorded}). Name the base that it was trained on: --base."
        )


def _check_complete(adapter: _Adapter, base: Source) -> None:
    """That the adapter has both matrices of every module that its configuration adapts, as PEFT finds these."""
    from peft import PeftConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = PeftConfig.from_pretrained(str(adapter.folder))
    for name, view in base.tensors.items():
        module = name.removesuffix(".weight")
        if len(view.shape) != 2 or not check_target_module_exists(config, module):
            continue
        own = f"base_model.model.{module}"
        for half in ("A", "B"):
            if not adapter.tensors.keys() & {f"{own}.lora_{half}.weight", f"{own}.lora_embedding_{half}"}:
                raise ExportError(
                    f"{adapter.folder}/{ADAPTER_WEIGHTS}: has no lora_{half} of {module}, which target_modules of "
                    f"{ADAPTER_CONFIG} names. Copy the adapter again, or train it again."
                )


def _place(name: str, shape: tuple[int, ...], tensors: dict[str, View]) -> tuple[str, tuple[int, ...] | None]:
    """The tensor of the base that a tensor of an adapter goes with, and the shape it then has, where that is known."""
    module = name.removeprefix("base_model.model.")
    if ".lora_A." in name:
        other = tensors.get(name.replace(".lora_A.", ".lora_B."))
        return module.split(".lora_A.")[0] + ".weight", (other.shape[0], shape[1]) if other else None
    for part in (".lora_B.", ".lora_magnitude_vector"):
        if part in name:
            return module.split(part)[0] + ".weight", None
    return module, shape  # a module trained as a whole, by modules_to_save


# --- an adapter as it is ----------------------------------------------------------------------------------------------


def _write_adapter(adapter: _Adapter, source: Source, out: Path, base: str | Path | None, *, overwrite: bool) -> None:
    """Copy an adapter with the tokenizer and the settings that generation needs; all of it or nothing appears."""
    named = str(base) if base else adapter.config.get("base_model_name_or_path")
    config = {**adapter.config, "base_model_name_or_path": named}
    lineage = {"operation": "export", "to": "peft", "base": base_digest(source), "parent": adapter.record()}
    facts = adapter_facts(config, adapter.tensors, lineage)
    files: dict[str, str | bytes] = {ADAPTER_WEIGHTS: str(adapter.folder / ADAPTER_WEIGHTS)}
    files |= {ADAPTER_CONFIG: (json.dumps(config, indent=2) + "\n").encode(), **_small_files(adapter, source, facts)}

    if out.exists():
        _refuse_to_replace(out, (*files, MANIFEST), overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as place:
        folder = Path(place) / out.name
        folder.mkdir()
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)  # of chat templates
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                shutil.copyfile(content, folder / name)
        record_saved_model(folder, lineage, seed=0)
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)


def _refuse_to_replace(out: Path, files: Collection[str], *, overwrite: bool) -> None:
    """Nothing is replaced without being asked, and nothing but what an export of an adapter has written."""
    present = [path for path in out.rglob("*") if path.is_symlink() or not path.is_dir()] if out.is_dir() else []
    others = sorted({path.relative_to(out).as_posix() for path in present} - {*files}) if out.is_dir() else [out.name]
    if others:
        raise ExportError(f"{out} exists and holds {others[0]}, no file of an exported adapter; choose another folder.")
    if not overwrite:
        raise ExportError(f"{out} exists; choose another folder, or add --overwrite.")


def _small_files(adapter: _Adapter, base: Source, facts: CardFacts) -> dict[str, str | bytes]:
    """The tokenizer and template that the adapter was trained with, else the base's; generation settings likewise.

    Licence and notices are the base's, which decides under what terms anything made of it is passed on.
    """
    origin = Path(base.folder)
    files = hub_sidecars(_tokenizer_folder(adapter, base), facts, origin=origin)
    for name, path in small_files(origin, {}).items():
        if name == _GENERATION_CONFIG or (is_text(name) and name != CARD):
            files.setdefault(name, path)
    return files


def _tokenizer_folder(adapter: _Adapter, base: Source) -> Path:
    return adapter.folder if (adapter.folder / TOKENIZER).is_file() else Path(base.folder)


# --- merging ----------------------------------------------------------------------------------------------------------


def _write_merged(
    adapter: _Adapter,
    base: Source,
    out: Path,
    named: str | Path | None,
    dtype: DType | None,
    options: WriteOptions,
) -> Exported:
    import torch
    from safetensors.torch import save_file

    from sft.merge import merge_weights

    merged: dict[str, View] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-merged-") as place:

        def keep(name: str, weight: torch.Tensor) -> None:
            file = Path(place) / f"{len(merged)}.safetensors"
            rounded = weight.detach().to(getattr(torch, (dtype or base.tensors[name].dtype).name))
            save_file({name: rounded.contiguous()}, file)
            merged[name] = read_safetensors(file)[name]

        gap = merge_weights(adapter.folder, adapter.tensors, base, keep)
        if not gap <= _TOLERANCE:
            raise ExportError(
                f"{adapter.folder}: merging changes the logits by {gap:.2g} of their spread, expected at most "
                f"{_TOLERANCE} in float32. Export the adapter without --merge."
            )
        source = replace(base, tensors={**base.tensors, **merged})
        plan, _ = plan_conversion(source, dtype=dtype)
        lineage = _merged_lineage(adapter, base, dtype)
        facts = model_facts(plan.config, plan.tensors[0].dtype.name, lineage)
        names = [str(name) for name in (named, adapter.config.get("base_model_name_or_path")) if name]
        if known := [name for name in names if is_repo_id(name)]:
            facts = replace(facts, base_models=(known[0],), relation="finetune")
        plan = replace(plan, lineage=lineage, sidecars=_small_files(adapter, base, facts))
        written = write_checkpoint(plan, out, options)
    notes = [*parent_notes(lineage), *(f"The base: {note}" for note in parent_notes({"parent": lineage["base"]}))]
    notes += tokenizer_notes(_tokenizer_folder(adapter, base))
    return Exported(written.folder, len(merged), gap, tuple(dict.fromkeys(notes)))


def _merged_lineage(adapter: _Adapter, base: Source, dtype: DType | None) -> dict[str, Any]:
    """The adapter's own lineage leads to its base; of one without a record, the base's is all that is known."""
    own, below = adapter.record(), parent_of(base)
    told = ("record", "matches", "mismatch", "edited")
    link = {name: below[name] for name in told if name in below} if below else None
    return {
        "operation": "merge",
        "adapter": "recorded" if own else "unknown",
        "base": link,
        "dtype": dtype.name if dtype else None,
        "parent": own or below,
    }


__all__ = ["ExportError", "Exported", "export_model", "find_model"]
