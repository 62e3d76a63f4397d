# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a person reads of a model: its card."""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..architecture import MODEL_TYPE, Architecture
from ..checkpoint.dtypes import BY_NAME
from ..checkpoint.errors import CheckpointError, printable
from ..checkpoint.manifest import MANIFEST, is_edited, read_manifest
from ..checkpoint.parent import record_mismatch
from ..checkpoint.plan import View
from ..checkpoint.sizes import format_bytes
from ..checkpoint.sources import open_checkpoint, outside_target
from ..checkpoint.strict_json import read_json_object
from ..compressed_tensors import is_float8
from ..experts import Experts, has_experts, read_experts
from ..family import LLAMA
from ..input_mult import input_mult_warning
from ..masked import MASKED_MODEL_TYPE
from ..quantisation import quantisation
from .front_matter import parse_metadata, split_card, write_metadata
from .lineage import lineage_steps
from .results import Result, model_index

# --- what a card says -------------------------------------------------------------------------------------------------

CARD = "README.md"
TOKENIZER_CODE = "tokenization_teleflm.py"
ADAPTER_CONFIG = "adapter_config.json"
_FLOAT8 = "float8_e4m3fn"
_NO_NAME = "A Tele-FLM model"
_HERE = "."  # a folder without a name loads from where it lies
_LICENSES = (  # how the texts begin
    ("apache-2.0", re.compile(r"\s*Apache License\s+Version 2\.0, January 2004")),
    ("mit", re.compile(r"\s*(The )?MIT License\b[\s\S]{0,400}?Permission is hereby granted, free of charge")),
)
_LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
_LICENSE_KEYS = ("license", "license_name", "license_link")
# What a source's card says that is true of what is made of it as well: of the same model in another form, of one that
# grew (which is no quantised or merged one), of one that was trained (whose base and data are others).
_SAME_KEYS = (*_LICENSE_KEYS, "language", "datasets", "base_model", "base_model_relation")
_GROWN_KEYS = (*_LICENSE_KEYS, "language", "datasets", "base_model")
_TRAINED_KEYS = (*_LICENSE_KEYS, "language")
_MODEL_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)  # the oldest have no owner
_MAX_CARD_BYTES = 4_000_000
_LARGEST = 1e300  # of a number that a record may have


@dataclass(frozen=True)
class CardFacts:
    """What a card says of a model or an adapter.

    Args:
        dtype: of its weights; of those that are not quantised, if it is.
        num_parameters: how many weights it has.
        num_bytes: of them.
        architecture: the model's numbers; None if it is an adapter, or not of this family.
        experts: what it has in place of feed-forward layers; None if it is dense.
        context: positions that it was trained for, if the configuration says so.
        own_code: whether it loads with code from its repository.
        is_teleflm: whether it is a Tele-FLM, or an adapter for one.
        is_float8: whether its linear layers are in 8-bit floats with scales, as compressed-tensors has them.
        is_quantised: whether its configuration says that they are quantised, in these or any other way.
        masked_steps: of a checkpoint that grows by masks: steps of training until they are open; else None.
        adapter: of an adapter, the content of its `adapter_config.json`; else None.
        steps: what it was made from, a sentence a step.
        exact: what of that keeps the function and what does not, a sentence each.
        repo_id: `OWNER/NAME` on the Hub, if it has one.
        inherited: keys of the metadata of its source's card that are true of it as well.
        metadata: these, as that card has them.
        base_models: ids on the Hub that it was made from, where that is known and not only said.
        relation: to them: `finetune`, `adapter`, `merge` or `quantized`; None leaves it to the Hub.
        results: of evaluations.
        has_tokenizer: whether a tokenizer lies beside the weights.
        tokenizer_code: whether it is code of the repository.
        has_chat_template: and a chat template.
        has_record: and the record.
    """

    dtype: str
    num_parameters: int
    num_bytes: int
    architecture: Architecture | None = None
    experts: Experts | None = None
    context: int | None = None
    own_code: bool = True
    is_teleflm: bool = True
    is_float8: bool = False
    is_quantised: bool = False
    masked_steps: int | None = None
    adapter: Mapping[str, Any] | None = None
    steps: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    repo_id: str | None = None
    inherited: tuple[str, ...] = _SAME_KEYS
    metadata: Mapping[str, Any] = field(default_factory=dict)
    base_models: tuple[str, ...] = ()
    relation: str | None = None
    results: tuple[Result, ...] = ()
    has_tokenizer: bool = True
    tokenizer_code: bool = True
    has_chat_template: bool = False
    has_record: bool = True

    @property
    def certain(self) -> tuple[str, ...]:
        """Keys of the metadata that are facts, and not the owner's to decide; see `card_merge.merge_cards`."""
        return ("library_name", *(("base_model", "base_model_relation") if self.base_models else ()))


def model_facts(config: Mapping[str, Any], dtype: str, lineage: Mapping[str, Any] | None) -> CardFacts:
    """The facts that follow from a model's configuration and lineage.

    Args:
        config: content of its config.json.
        dtype: of its weights.
        lineage: of its record, if it has one.
    """
    experts = _experts(config)
    architecture = experts.dense if experts else _architecture(config)
    counted = experts or architecture
    num_parameters = counted.num_parameters if counted else 0
    context, growth = config.get("max_position_embeddings"), config.get("growth_state")
    total = growth.get("total_steps") if isinstance(growth, dict) else None
    classes, is_ours = config.get("auto_map"), config.get("model_type") in (MODEL_TYPE, MASKED_MODEL_TYPE)
    return CardFacts(
        dtype=dtype,
        num_parameters=num_parameters,
        num_bytes=num_parameters * _itemsize(dtype),
        architecture=architecture,
        experts=experts,
        context=context if isinstance(context, int) and context > 0 else None,
        own_code=isinstance(classes, dict) and "AutoModelForCausalLM" in classes,
        is_teleflm=is_ours or (architecture is not None and _is_exported(lineage or {})),
        is_float8=is_float8(config),
        is_quantised=quantisation(config, {}) is not None,
        masked_steps=total if isinstance(total, int) else None,
        inherited=_inherited_keys(lineage or {}),
        steps=tuple(lineage_steps(lineage)),
        exact=tuple(exactness(lineage)),
        base_models=_hub_parent(lineage or {}),
        relation="quantized" if (lineage or {}).get("quantized") and _hub_parent(lineage or {}) else None,
    )


def _is_exported(lineage: Mapping[str, Any]) -> bool:
    """Whether a lineage ends with a Tele-FLM in the format of another model, whose folder does not say so itself."""
    return lineage.get("operation") in ("export", "upcycle") and lineage.get("model_type", MODEL_TYPE) == MODEL_TYPE


def _hub_parent(lineage: Mapping[str, Any]) -> tuple[str, ...]:
    """The model of the Hub that a checkpoint was made from, where the lineage says that it was read there."""
    match lineage:
        case {"parent": {"origin": {"hub": str() as name}}} if is_repo_id(name):
            return (name,)
    return ()


def adapter_facts(
    config: Mapping[str, Any], tensors: Mapping[str, View], lineage: Mapping[str, Any] | None
) -> CardFacts:
    """The facts of an adapter.

    Args:
        config: content of its adapter_config.json.
        tensors: its weights.
        lineage: of its record, if it has one.
    """
    sizes = [(view.numel, view.dtype) for view in tensors.values()]
    base = config.get("base_model_name_or_path")
    bases = (base,) if isinstance(base, str) and is_repo_id(base) else ()
    return CardFacts(
        dtype=max({dtype.name for _, dtype in sizes}, default="float32"),
        num_parameters=sum(count for count, _ in sizes),
        num_bytes=sum(count * dtype.itemsize for count, dtype in sizes),
        adapter=config,
        steps=tuple(lineage_steps(lineage)),
        exact=("The weights of the base are as they were; the adapter changes what is computed with them.",),
        inherited=_TRAINED_KEYS,
        base_models=bases,
        relation="adapter" if bases else None,
        has_record=lineage is not None,
    )


def _inherited_keys(lineage: Mapping[str, Any]) -> tuple[str, ...]:
    match lineage:
        case {"operation": "grow" | "upcycle"}:
            return _GROWN_KEYS
        case {"steps": int()} | {"operation": "merge"}:
            return _TRAINED_KEYS
    return _SAME_KEYS


def with_files(facts: CardFacts, folder: Path | None, files: Collection[str]) -> CardFacts:
    """Facts completed by what lies beside the weights, and by the card of the source.

    Args:
        facts: of the configuration.
        folder: the source's, of which licence and card are read; None if there is none.
        files: names of the small files beside the weights.
    """
    return replace(
        facts,
        metadata=inherited_metadata(folder, facts.inherited) if folder else {},
        has_tokenizer="tokenizer.model" in files or "tokenizer.json" in files,
        tokenizer_code=any(name.endswith(".py") and name.startswith("token") for name in files),
        has_chat_template="chat_template.jinja" in files,
    )


def card_facts(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    results: Sequence[Result] = (),
    base_models: Sequence[str] = (),
    relation: str | None = None,
) -> CardFacts:
    """The facts of a finished folder: its configuration, record, licence and the metadata of the card in it.

    Args:
        folder: a Hub folder, or that of an adapter.
        repo_id: `OWNER/NAME` that it has, or will have.
        results: of evaluations, see `results.read_results`.
        base_models: ids on the Hub that it was made from; those of the card in the folder unless given.
        relation: to them.

    Raises:
        CheckpointError: the folder holds no model or adapter, or one of its files is damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    lineage = manifest["lineage"] if manifest else None
    names = [path.name for path in folder.iterdir() if path.is_file()]
    if ADAPTER_CONFIG in names:
        config = read_json_object(folder / ADAPTER_CONFIG)
        facts = adapter_facts(config, open_checkpoint(folder / "adapter_model.safetensors").tensors, lineage)
    else:
        source = open_checkpoint(folder)
        views = [(view.dtype.name, view.numel, view.nbytes) for view in source.tensors.values()]
        facts = planned_facts(source.config or {}, lineage or {}, views, folder)
    facts = with_files(replace(facts, inherited=_SAME_KEYS), folder, names)
    if doubt := _doubt(folder, manifest):
        facts = replace(facts, steps=(*facts.steps, doubt), exact=())
    if base_models:
        facts = replace(facts, base_models=tuple(base_models), relation=relation)
    return replace(facts, repo_id=repo_id, results=tuple(results), has_record=manifest is not None)


def _doubt(folder: Path, manifest: Mapping[str, Any] | None) -> str | None:
    """Why what a record says is not to be relied on; None if nothing speaks against it."""
    if manifest is None:
        return None
    if is_edited(manifest):
        return (
            "The record of this folder was edited after it was written: the steps above are what it says now, and "
            "nothing vouches for them."
        )
    mismatch = record_mismatch(folder, manifest)
    return (
        f"What lies here is not what its record says ({mismatch}); what was done to it is not known."
        if mismatch
        else None
    )


def planned_facts(
    config: Mapping[str, Any], lineage: Mapping[str, Any], views: Sequence[tuple[str, int, int]], folder: Path
) -> CardFacts:
    """The facts of a folder whose weights are elsewhere.

    Args:
        config: its configuration.
        lineage: its lineage.
        views: dtype, elements and bytes of each tensor.
        folder: holds its small files.
    """
    kinds = Counter(dtype for dtype, _, _ in views if not (is_float8(config) and dtype == _FLOAT8))
    facts = model_facts(config, max(kinds, key=lambda name: (kinds[name], name)), lineage)
    facts = replace(facts, num_bytes=sum(n for _, _, n in views))
    if not (facts.is_float8 and facts.architecture):  # there, scales are no parameters
        facts = replace(facts, num_parameters=sum(n for _, n, _ in views))
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return with_files(replace(facts, inherited=_SAME_KEYS), folder, names)


def inherited_metadata(folder: Path, keys: Collection[str]) -> dict[str, Any]:
    """What the card of a folder says that a card made from it repeats, and its licence if only a file tells.

    A card that cannot be read says nothing: it is not what the model depends on.

    Args:
        folder: the source's.
        keys: which of the metadata.
    """
    try:
        said = parse_metadata(split_card(_read_text(folder / CARD))[0])
    except CheckpointError:
        said = {}
    metadata = {key: said[key] for key in keys if _is_plain(said.get(key))}
    bases = metadata.get("base_model", [])
    if not all(map(_MODEL_ID.fullmatch, [bases] if isinstance(bases, str) else bases)):  # a folder, perhaps
        del metadata["base_model"]
    if "base_model" not in metadata:
        metadata.pop("base_model_relation", None)
    if "license" not in metadata:
        for file in _LICENSE_FILES:
            text = _read_text(folder / file)
            found = [name for name, begin in _LICENSES if begin.match(text)]
            if found:
                return {"license": found[0], **{k: v for k, v in metadata.items() if k not in _LICENSE_KEYS}}
    return metadata


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) and item.isprintable() for item in value)
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _read_text(path: Path) -> str:
    """A small text; nothing of what is none, or leads out of its folder."""
    try:
        if not path.is_file() or outside_target(path, path.parent) or path.stat().st_size > _MAX_CARD_BYTES:
            return ""
        return path.read_text(encoding="utf-8", errors="replace").removeprefix("\ufeff")
    except OSError:
        return ""


def _architecture(config: Mapping[str, Any]) -> Architecture | None:
    """The numbers of a Tele-FLM, under whatever name it is exported, or of a Llama; None if it is none."""
    kind = config.get("model_type")
    values = {**config, "model_type": kind if kind == LLAMA.model_type else MODEL_TYPE}
    if kind == "granite" and config.get("logits_scaling"):
        values |= {"use_mup": True, "input_mult": config.get("embedding_multiplier", 1.0)}
        values |= {"output_mult": 1.0, "mup_scale_factor": config["logits_scaling"]}
    elif kind not in (MODEL_TYPE, MASKED_MODEL_TYPE, LLAMA.model_type):
        return None
    try:
        return Architecture.from_config(values, with_biases=True)
    except CheckpointError:
        return None


def _experts(config: Mapping[str, Any]) -> Experts | None:
    """The numbers of a GraniteMoE; None if it is none, or they are not usable."""
    try:
        return read_experts(config) if has_experts(config) else None
    except CheckpointError:
        return None


def _itemsize(dtype: str) -> int:
    return BY_NAME[dtype].itemsize if dtype in BY_NAME else 4


def is_repo_id(name: str) -> bool:
    """Whether a name is one of the Hub's, as far as can be told: of the right form, and no folder here."""
    if Path(name).exists():
        return False
    return "/" in name and bool(_MODEL_ID.fullmatch(name)) and ".." not in name and len(name) <= 96


# --- what is exact ----------------------------------------------------------------------------------------------------


def exactness(lineage: Mapping[str, Any] | None) -> list[str]:
    """What the steps of a lineage keep of the function that the model computes, oldest first; nothing twice."""
    if not lineage:
        return []
    parent = lineage.get("parent")
    before = parent.get("lineage") if isinstance(parent, Mapping) else None
    said = exactness(before if isinstance(before, Mapping) else None)
    # Of training, it is the type of the parameters, which need not have been cast to it.
    cast = lineage.get("dtype") if lineage.get("operation") != "train" else None
    folded = _folded_factor(lineage)
    match lineage:
        case {"operation": "grow" | "upcycle", "preserves_function": False}:
            now = [
                "This growth did not preserve the function: the grown model computes another one than its source, and "
                "what is said above does not hold beyond it."
                if said
                else "This growth did not preserve the function: the grown model computes another one than its source."
            ]
        case {"operation": "grow", "source": dict() as old, "target": dict() as new}:
            now = _of_growth(old, new)
        case {"operation": "upcycle", "num_experts_per_tok": int() as top}:
            now = [_of_experts(top, is_cast=bool(cast))]
        case {"operation": "convert", "quantized": _}:
            now = [
                "Quantisation changes the function: each weight of a linear layer, the head aside, is an 8-bit float "
                "times the scale of its row, within 1/16 of what it was, or within 1/1024 of the scale where it is "
                "small (of rows whose scale is among the smallest numbers of its dtype, less exactly so). An engine "
                "that multiplies in 8 bits rounds activations too. Other weights are not quantised."
            ]
        case {"operation": "convert", "dequantized": True}:
            now = ["Weights that were 8-bit floats are their products with their scales: what was lost stays lost."]
        case {"operation": "convert"}:
            now = [] if cast or folded else ["Conversion keeps every value of the weights, bit by bit."]
        case {"operation": "fold", "alpha": float() | int() as alpha}:
            now = [f"Folding masks computes the function that the masked model has at alpha {alpha:g}, rounding aside."]
            if alpha != 0:
                now.append(
                    "There, what growth added is heard: the function is no longer that of the model before the growth."
                )
        case {"operation": "export", "multipliers": "fold"}:
            now = [
                "Multipliers are folded into embeddings and head: exactly where they are powers of two, otherwise each "
                "of these weights is rounded once."
            ]
        case {"operation": "train", "initial_weights": "random"}:
            now = []  # it began with no function that it could have changed
        case {"steps": int()}:
            now = [
                "Training has changed the weights, and with them the function; what is said above holds for the model "
                "that it began with."
            ]
            said = [sentence for sentence in said if sentence != now[0]]
            now = now if said else ["Training has changed the weights: the function is no longer that of the base."]
        case _:
            now = []
    if folded:
        now.insert(0, _of_input_fold(folded, others_kept=not (cast or lineage.get("quantized")), cast=bool(cast)))
    if isinstance(cast, str) and cast in BY_NAME:
        now.append(f"Every value that was cast to {cast} was rounded once, to the nearest.")
    return said + [sentence for sentence in now if sentence not in said]


def _folded_factor(lineage: Mapping[str, Any]) -> float | None:
    """What a conversion multiplied the embeddings by; None if it did not, or says no number."""
    match lineage:
        case {"operation": "convert", "folded_input_mult": float() | int() as factor} if 0 < factor < _LARGEST:
            return float(factor)
    return None


def _of_input_fold(factor: float, *, others_kept: bool, cast: bool) -> str:
    is_exact = not cast and math.frexp(factor)[0] == 0.5
    how = "exactly, but for products that are too small to be normal numbers" if is_exact else "each rounded once"
    rest = "" if not others_kept else " Every other weight keeps its value, bit by bit."
    return f"Embeddings are multiplied by {factor:g}, {how}; input_mult, which said so, is 1 now.{rest}"


def _of_experts(top: int, *, is_cast: bool) -> str:
    rounded = ", as far as its weights did not have to be rounded to their dtype" if is_cast else ""
    said = (
        "Experts that are copies of one feed-forward layer compute what it computes, as the gates of those that are "
        f"chosen add up to 1, whatever the router: in exact arithmetic this model gives its source's logits{rounded}."
    )
    return said if top == 1 else f"{said} Computed, gates are rounded, and logits differ as roundings do."


def _of_growth(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    said = [
        "Growing does not change the function, but for rounding: in exact arithmetic the grown model gives its "
        "source's logits, as far as its weights did not have to be rounded to their dtype. In float32 and float64 what "
        "is left is rounding."
    ]
    if old.get("hidden_size") != new.get("hidden_size"):
        said.append(
            "In bfloat16 a wider model's logits differ from its source's as two roundings of one model do; where two "
            "tokens are that close, another may come first."
        )
    if old.get("vocab_size") != new.get("vocab_size"):
        said.append(
            "Logits of the old vocabulary are kept; new rows take part in the softmax beside them, so probabilities "
            "change."
        )
    return said


# --- the text ---------------------------------------------------------------------------------------------------------

REGIONS = ("title", "model", "use", "origin", "results", "limits")


def region(name: str, text: str) -> str:
    """A part of a card between marks, which a later publication replaces; see `card_merge`."""
    return f"<!-- teleflm:begin {name} -->\n{text.strip()}\n<!-- teleflm:end {name} -->\n"


def render_card(facts: CardFacts) -> str:
    """The README.md of a model or an adapter; the same facts give the same text."""
    parts = {
        "title": _title(facts),
        "model": _table(facts),
        "use": _use(facts),
        "origin": _origin(facts),
        "results": _results(facts),
        "limits": _limits(facts),
    }
    body = "\n".join(region(name, parts[name]) for name in REGIONS if parts[name])
    return f"---\n{write_metadata(card_metadata(facts))}---\n{body}"


def card_metadata(facts: CardFacts) -> dict[str, Any]:
    """What the Hub reads of a card."""
    said = {key: facts.metadata[key] for key in _SAME_KEYS if key in facts.metadata}
    if facts.base_models:
        said["base_model"] = facts.base_models[0] if len(facts.base_models) == 1 else list(facts.base_models)
        said["base_model_relation"] = facts.relation
    metadata = {
        **said,
        "library_name": "peft" if facts.adapter is not None else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["TeleFLM", *(["lora"] if facts.adapter is not None else [])] if facts.is_teleflm else [],
    }
    if facts.results:
        metadata["model-index"] = model_index((facts.repo_id or _NO_NAME).rpartition("/")[2], facts.results)
    return {key: value for key, value in metadata.items() if value not in ([], None)}


def _title(facts: CardFacts) -> str:
    name = facts.repo_id.rpartition("/")[2] if facts.repo_id else None
    if facts.adapter is not None:
        of = f"[{facts.base_models[0]}](https://huggingface.co/{facts.base_models[0]})" if facts.base_models else None
        what = f"A LoRA adapter for {of or 'a Tele-FLM'}: a few weights that change what that model says."
        return f"# {name or 'A LoRA adapter for a Tele-FLM'}\n\n{what}"
    size, shape = f"{_count(facts.num_parameters)} parameters", "dense"
    if facts.experts:
        size += f", of which {_count(facts.experts.num_active_parameters)} compute a token"
        shape = "mixture-of-experts"
    if not facts.is_teleflm:
        what = f"A {shape}, decoder-only language model with {size}."
        return f"# {name or 'A model'}" + (f"\n\n{what}" if facts.architecture else "")
    kind = f"A {shape}, decoder-only language model of the Tele-FLM (FLM-2) architecture"
    stock = "" if facts.own_code else ", in the format of a model that transformers has itself"
    return f"# {name or _NO_NAME}\n\n{kind} with {size}{stock}."


def _count(number: int) -> str:
    for limit, unit in ((10**12, " T"), (10**9, " B"), (10**6, " M")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:,}"


def _table(facts: CardFacts) -> str:
    rows: dict[str, Any] = {"Parameters": f"{facts.num_parameters:,}"} if facts.num_parameters else {}
    if e := facts.experts:
        rows |= {
            "Parameters that compute a token": f"{e.num_active_parameters:,}",
            "Experts in a layer (that compute a token)": f"{e.num_local_experts:,} ({e.num_experts_per_tok:,})",
        }
    if a := facts.architecture:
        rows |= {
            "Layers": a.num_hidden_layers,
            "Hidden size": f"{a.hidden_size:,}",
            "Attention heads (key/value)": f"{a.num_attention_heads} ({a.num_key_value_heads})",
            "Feed-forward size": f"{a.intermediate_size:,}",
            "Vocabulary rows": f"{a.vocab_size:,}",
            **({"Context": f"{facts.context:,} tokens"} if facts.context else {}),
            **(_factors(a) if facts.is_teleflm or {a.embedding_scale, a.logit_scale} != {1.0} else {}),
        }
    if facts.adapter is not None:
        modules = facts.adapter.get("target_modules")
        rows |= {"Rank": facts.adapter.get("r"), "Alpha": facts.adapter.get("lora_alpha")}
        rows |= {"On": ", ".join(sorted(map(str, modules))) if isinstance(modules, list) else modules}
    kind = f"{_FLOAT8} in linear layers, {facts.dtype}" if facts.is_float8 else facts.dtype
    rows["Weights"] = f"{kind}, {format_bytes(facts.num_bytes)}" if facts.num_bytes else kind
    lines = [f"| {name} | {_line(str(value))} |" for name, value in rows.items() if value is not None]
    return "\n".join(["## Architecture\n", "| | |", "|---|---|", *lines])


def _factors(architecture: Architecture) -> dict[str, str]:
    return {
        "Factor on the embeddings": f"{architecture.embedding_scale:g}",
        "Factor on the logits": f"{architecture.logit_scale:g}",
    }


def _use(facts: CardFacts) -> str:
    parts = ["## Use", _code(facts)]
    if facts.own_code and facts.is_teleflm:
        parts.append(
            "`trust_remote_code=True` executes the Python files of the repository. With the `teleflm` package "
            "installed, `import modeling_teleflm` replaces it, and no such file is executed."
        )
    if facts.own_code and facts.architecture and facts.masked_steps is None:
        warning = input_mult_warning(facts.architecture, quantised=facts.is_quantised)
        parts += [warning] if warning else []
    if facts.is_float8:
        parts.append(
            "Its linear layers are quantised (FP8, compressed-tensors): transformers reads them with `pip install "
            "compressed-tensors`."
        )
    if facts.masked_steps is not None:
        parts.append(
            f"What is new in this model is behind masks, which {facts.masked_steps} steps of training raise: a "
            "checkpoint for training, made known by `import growth.training.masks`; `teleflm fold` writes a plain "
            "model."
        )
    if not facts.has_tokenizer:
        parts.append("There is no tokenizer here: take the one that the model was trained with.")
    return "\n\n".join([*parts, *_memory(facts)])


def _code(facts: CardFacts) -> str:
    """Blocks that run as they stand, where the model is what they name."""
    here = json.dumps(facts.repo_id or _HERE)
    trust = ", trust_remote_code=True" if facts.own_code else ""
    tokens = ", trust_remote_code=True" if facts.tokenizer_code else trust
    pipe = tokens if facts.has_tokenizer else trust
    how = ""
    if facts.experts and facts.dtype == "float64":  # in which what transformers would take does not compute
        how = ', experts_implementation="eager"'
        pipe += ', model_kwargs={"experts_implementation": "eager"}'
    auto = ["AutoModelForCausalLM", *(["AutoTokenizer"] if facts.has_tokenizer else [])]
    tokenizer = [f"tokenizer = AutoTokenizer.from_pretrained({here}{tokens})"] if facts.has_tokenizer else []
    if facts.adapter is not None and facts.base_models:
        base = json.dumps(facts.base_models[0])
        load = [
            "from peft import PeftModel",
            f"from transformers import {', '.join(auto)}",
            "",
            *tokenizer,
            f"base = AutoModelForCausalLM.from_pretrained({base}{trust})",
            f"model = PeftModel.from_pretrained(base, {here})",
        ]
    elif facts.adapter is not None:
        load = [
            "from peft import AutoPeftModelForCausalLM",
            *(["from transformers import AutoTokenizer"] if tokenizer else []),
            "",
            *tokenizer,
            f"model = AutoPeftModelForCausalLM.from_pretrained({here}{trust})",
        ]
    else:
        load = [
            f"from transformers import {', '.join(auto)}",
            "",
            *tokenizer,
            f"model = AutoModelForCausalLM.from_pretrained({here}{trust}{how})",
        ]
    blocks = [load]
    if facts.has_tokenizer and facts.adapter is None:
        blocks.append(
            [
                "from transformers import pipeline",
                "",
                f'generate = pipeline("text-generation", model={here}{pipe})',
                'print(generate("To grow is", max_new_tokens=32)[0]["generated_text"])',
            ]
        )
    if facts.has_tokenizer and facts.has_chat_template:
        ask = [
            'chat = [{"role": "user", "content": "What is a decorator?"}]',
            'prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", '
            "return_dict=True)",
            "answer = model.generate(**prompt, max_new_tokens=64)",
            'print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
        blocks.append(ask)
    texts = ["```python\n" + "\n".join(lines) + "\n```" for lines in blocks]
    if len(blocks) > 1 and blocks[-1][0].startswith("chat"):
        texts.insert(-1, "The chat template writes turns as the model expects them:")
    return "\n\n".join(texts)


def _memory(facts: CardFacts) -> list[str]:
    if not facts.num_bytes:
        return []
    if facts.adapter is not None:
        return [f"The adapter takes {format_bytes(facts.num_bytes)} beside its base."]
    stored = _FLOAT8 if facts.is_float8 else facts.dtype
    sizes = {stored: facts.num_bytes}
    for dtype in ("bfloat16", "float32") if facts.num_parameters else ():
        sizes.setdefault(dtype, facts.num_parameters * _itemsize(dtype))
    lines = [
        "## Memory",
        "\n".join(
            [
                "| to load in | weights |",
                "|---|---|",
                *(
                    f"| {name}{', as stored' if name == stored else ''} | {format_bytes(size)} |"
                    for name, size in sizes.items()
                ),
            ]
        ),
    ]
    if a := facts.architecture:
        size = _itemsize(facts.dtype)
        per_token = 2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim * size
        lines.append(
            f"To serve it, add {format_bytes(1000 * per_token)} for every 1,000 tokens of context of every sequence: 2 "
            f"(keys and values) x {a.num_hidden_layers} layers x {a.num_key_value_heads} key/value heads x "
            f"{a.head_dim} wide x {size} bytes x 1,000. Activations come on top. "
            '`device_map="auto"` spreads the weights over the devices there are.'
        )
    return lines


def _origin(facts: CardFacts) -> str:
    parts = []
    if facts.steps:
        parts += ["## Made from", "\n".join(f"{i}. {_line(step)}" for i, step in enumerate(facts.steps, 1))]
    if facts.exact:
        parts += ["## What is exact", "\n".join(f"- {_line(sentence)}" for sentence in facts.exact)]
    if facts.has_record:
        parts.append(
            f"`{MANIFEST}` is the full record: what was made from what, and the digest of every tensor. `teleflm "
            "inspect FOLDER --check` reads a downloaded folder and compares."
        )
    return "\n\n".join(parts)


def _results(facts: CardFacts) -> str:
    if not facts.results:
        return ""
    lines = ["| task | shots | metric | value | standard error |", "|---|---|---|---|---|"]
    for r in facts.results:
        metric = f"{r.metric}, {r.filter}" if r.filter else r.metric
        error = "" if r.stderr is None else f"{r.stderr:.4g}"
        cells = (r.task, "" if r.shots is None else str(r.shots), metric, f"{r.value:.4g}", error)
        lines.append(f"| {' | '.join(_line(cell) for cell in cells)} |")
    by = ", ".join(sorted({_line(result.evaluator) for result in facts.results if result.evaluator}))
    return "\n\n".join(
        ["## Evaluation", *([f"Measured with {by} by who published this model."] if by else []), "\n".join(lines)]
    )


def _limits(facts: CardFacts) -> str:
    points = []
    if not facts.results:
        points.append("No evaluation came with this model: nothing here says how good it is at anything.")
    if facts.architecture and facts.own_code:
        points.append(
            "Choose a dtype by `from_pretrained(dtype=...)`, not by `.to(torch.bfloat16)`, which rounds the rotary "
            "frequencies too."
        )
    if facts.context:
        points.append(f"It is configured for at most {facts.context:,} tokens of context.")
    if facts.is_teleflm and facts.has_chat_template:
        points.append(
            "A control token (`<_user>`, `<_bot>`) within the text of a user is a control token: check texts from "
            "strangers. That there is a chat template does not say that the model was trained to chat; what it was "
            "made from does."
        )
    return "## Limits\n\n" + "\n".join(f"- {point}" for point in points) if points else ""


def _line(text: str) -> str:
    """Text of a file as part of a line of Markdown: no line break, no mark, no cell of a table of its own."""
    line = printable(" ".join(text.split()))
    return line.replace("<!--", "&lt;!--").replace("-->", "--&gt;").replace("|", "\\|")


__all__ = [
    "CARD",
    "REGIONS",
    "CardFacts",
    "adapter_facts",
    "card_facts",
    "card_metadata",
    "exactness",
    "inherited_metadata",
    "is_repo_id",
    "lineage_steps",
    "model_facts",
    "region",
    "render_card",
    "with_files",
]
