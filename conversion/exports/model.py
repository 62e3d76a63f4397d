# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The model that is exported, and what every folder for stock transformers has."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..architecture import Architecture, rope_parameters
from ..checkpoint.dtypes import DType
from ..checkpoint.errors import CheckpointError
from ..checkpoint.parent import parent_of
from ..checkpoint.sharded import ShardedTensor
from ..checkpoint.sources import Source, open_checkpoint
from ..experts import GRANITEMOE, GRANITEMOE_CLASS
from ..family import Family, require_family
from ..hub.card import model_facts
from ..hub.contents import hub_config, hub_sidecars
from ..hub.remote import local_view
from ..mapping import EMBED_TOKENS, LM_HEAD, check_tensors, weights
from ..masked import is_masked, split_masked_config
from ..quantisation import refuse_quantised
from .multipliers import NEUTRAL

Target: TypeAlias = Literal["granite", "llama", "gguf", "megatron", "torch_dist", "dcp"]

_STOCK_CLASSES = {"granite": "GraniteForCausalLM", GRANITEMOE: GRANITEMOE_CLASS, "llama": "LlamaForCausalLM"}


@dataclass(frozen=True)
class ExportedModel:
    """A Tele-FLM or a Llama that is open for planning."""

    checkpoint: Source
    config: dict[str, Any]
    architecture: Architecture
    growth_state: dict[str, Any] | None = None
    """Of a masked checkpoint, whose `config` and `architecture` are those of the plain model of the same tensors."""

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return Path(self.checkpoint.folder)

    @cached_property
    def family(self) -> Family:
        """What its configuration is of."""
        return require_family(self.config, f"{self.folder}/config.json")

    @cached_property
    def parent(self) -> dict[str, Any] | None:
        """What the record of an export keeps of it."""
        return parent_of(self.checkpoint)

    def dtype(self, cast: DType | None) -> DType:
        """Of the output."""
        return cast or self.checkpoint.tensors[EMBED_TOKENS.name].dtype

    def one_dtype_notes(self, cast: DType | None) -> list[str]:
        """What becomes of weights in another dtype than the embedding's where the target has that for all of them."""
        if cast is not None:
            return []
        dtype, tensors, notes = self.dtype(None), self.checkpoint.tensors, []
        for other, count in Counter(tensors[name].dtype for name, *_ in weights(self.architecture)).items():
            if dtype.itemsize > other.itemsize:
                notes.append(f"{count} weights that are {other} are {dtype} as the embedding is, with the same values.")
            elif dtype != other:
                notes.append(
                    f"{count} weights that are {other} are rounded to {dtype}, as the embedding is and Megatron has "
                    f"one dtype for all; --dtype {'float32' if other.itemsize == 2 else other} keeps their values."
                )
        return notes

    def parts(self, target: Architecture) -> dict[str, ShardedTensor]:
        """The tensors of a model of the target's weights, which may have untied its head."""
        tensors = self.checkpoint.tensors
        is_tied = self.architecture.tie_word_embeddings
        sources = {
            name: EMBED_TOKENS.name if is_tied and name == LM_HEAD.name else name for name, *_ in weights(target)
        }
        return {name: ShardedTensor.of(tensors[source]) for name, source in sources.items()}

    def lineage(self, to: Target, cast: DType | None, **details: Any) -> dict[str, Any]:
        """The record of its export, on top of its own; a Llama's says that it is one, and nothing of multipliers."""
        if not self.family.has_multipliers:
            details = {"model_type": self.family.model_type, **details}
            details.pop("multipliers", None)
        return {
            "operation": "export",
            "to": to,
            "dtype": cast.name if cast else None,
            **details,
            "parent": self.parent,
        }


def open_model(source: str | Path, *, masked: bool = False, doing: str = "export") -> ExportedModel:
    """Open a Tele-FLM or a Llama in Hub format for export, or for what is made of it likewise.

    Args:
        source: its folder.
        masked: whether it may be a masked checkpoint, in the middle of its growth.
        doing: what is done with it, for the messages.

    Raises:
        CheckpointError: it is none, or quantised; or masked, and may not be.
    """
    checkpoint = open_checkpoint(local_view(source))
    config = checkpoint.config
    if config is None:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: no such file; only a Tele-FLM or a Llama can be exported or get experts."
        )
    refuse_quantised(checkpoint, doing)
    where, state = f"{checkpoint.folder}/config.json", None
    if is_masked(config):
        if not masked:
            trainer = "a trainer can raise (--to megatron)" if doing == "export" else "a trainer can raise"
            raise CheckpointError(
                f"{where}: grows by masks, which only {trainer}; `teleflm fold` makes it a plain model."
            )
        config, state = split_masked_config(config, where)
    architecture = Architecture.from_config(config, where, with_biases=True)
    check_tensors(checkpoint.tensors, architecture, checkpoint.folder)
    return ExportedModel(checkpoint, config, architecture, state)


def stock_config(model: ExportedModel, architecture: Architecture, model_type: str, dtype: DType) -> dict[str, Any]:
    """A config.json for a class of transformers' own."""
    config = hub_config(model.config, architecture, dtype.name)
    kept = {key: value for key, value in config.items() if key not in ("auto_map", *NEUTRAL)}
    # MLX reads the rotary embedding in the older spelling alone, and asks for both biases. Transformers takes the older
    # one where there are both, so that they have to agree.
    rope = rope_parameters(model.config, "the source's config.json")
    kept |= {"rope_theta": rope["rope_theta"], "mlp_bias": False}
    if rope["rope_type"] != "default" and not kept.get("rope_scaling"):
        kept["rope_scaling"] = rope
    return {**kept, "model_type": model_type, "architectures": [_STOCK_CLASSES[model_type]]}


def stock_sidecars(
    model: ExportedModel, config: Mapping[str, Any], lineage: Mapping[str, Any], dtype: DType
) -> dict[str, str | bytes]:
    """Its small files, none of them code, and a tokenizer that needs none either; of a Llama, its own."""
    facts = model_facts(config, dtype.name, lineage)
    return hub_sidecars(model.folder, facts, code=(), stock=True, family=model.family)
