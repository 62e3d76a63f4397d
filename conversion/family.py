# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The families of models that are read here, one line each: what a config.json calls them, and what theirs leaves out.

They are one architecture, the decoder of Llama. A Tele-FLM has a factor on the embeddings and one on the logits, and
brings its code; a Llama has neither. A Llama's config.json may say nothing of a field that has a default in
transformers' `LlamaConfig`, and may say things that the class of transformers passes over and another runtime, or code
of the folder, does not: a model that may be another function than its tensors say is refused by the name of the field.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .checkpoint.errors import CheckpointError

MULTIPLIERS = ("use_mup", "input_mult", "output_mult", "mup_scale_factor")
"""The fields of a config.json that decide the factors on embeddings and logits."""

# transformers' LlamaConfig, as of 5.14; what follows from other fields (head_dim, num_key_value_heads) is not here.
_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
}
# What makes another function of a Llama's tensors wherever it is honoured, and the values that say it is not used.
_NOT_LLAMA: dict[str, tuple[Any, ...]] = {
    "use_mup": (False,),
    "partial_rotary_factor": (1,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "attention_chunk_size": (),
    "layer_types": (),
    "no_rope_layers": (),
    "no_rope_layer_interval": (0,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "qk_layernorm": (False,),
    "embedding_multiplier": (1,),
    "attention_multiplier": (),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "dim_model_base": (),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
}
_MODEL_CLASSES = ("AutoConfig", "AutoModel")  # how the keys of auto_map begin that are not a tokenizer's or processor's


@dataclass(frozen=True)
class Family:
    """What tells a family of models.

    Args:
        model_type: of its config.json.
        name: in a sentence.
        model_class: transformers' class, or ours.
        has_multipliers: whether there are factors on embeddings and logits.
        defaults: fields of a config.json that may be missing, with what they are then.
        others: fields that make another function of the tensors, with the values, beside null, that do not.
    """

    model_type: str
    name: str
    model_class: str
    has_multipliers: bool
    defaults: Mapping[str, Any]
    others: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def require_plain(self, config: Mapping[str, Any], where: str) -> None:
        """Refuse a configuration by which the model may be another function than its tensors say.

        Raises:
            CheckpointError: it names a field that is none of this family, code of the folder, or another class.
        """
        if not self.others:
            return
        for name, harmless in self.others.items():
            value = config.get(name)
            if value is None or any(type(value) in _same(one) and value == one for one in harmless):
                continue
            raise CheckpointError(
                f"{where}: {name} is {_shown(value)}, nothing that a {self.name} of transformers has; where it "
                "is honoured, it makes another function. Remove it, if the model was trained without."
            )
        classes = config.get("auto_map")
        if not isinstance(classes, Mapping | None):
            raise CheckpointError(f"{where}: auto_map is {_shown(classes)}, expected an object or null.")
        code = [name for name in map(str, classes or ()) if name.startswith(_MODEL_CLASSES)]
        if code:
            raise CheckpointError(
                f"{where}: auto_map names code of the folder for {code[0]}, which may compute another function than "
                f"transformers' {self.model_class}; remove it, if that class computes the same."
            )
        named = config.get("architectures")
        if named is not None and named != [self.model_class]:
            raise CheckpointError(f"{where}: architectures is {_shown(named)}, expected ['{self.model_class}'].")


TELEFLM = Family("TeleFLM", "Tele-FLM", "TeleFLMForCausalLM", True, {"rms_norm_eps": 1e-6})
LLAMA = Family("llama", "Llama", "LlamaForCausalLM", False, _LLAMA_DEFAULTS, _NOT_LLAMA)
FAMILIES = {family.model_type: family for family in (TELEFLM, LLAMA)}


def find_family(config: Mapping[str, Any] | None) -> Family | None:
    """The family that a config.json says its model is of; None if it is none of these."""
    kind = (config or {}).get("model_type")
    return FAMILIES.get(kind) if isinstance(kind, str) else None


def is_llama(config: Mapping[str, Any] | None) -> bool:
    """Whether a config.json says that its model is a Llama."""
    return find_family(config) is LLAMA


def require_family(config: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json says its model is of.

    Args:
        config: its content.
        where: what to call it in errors.

    Raises:
        CheckpointError: it is none of these.
    """
    family = find_family(config)
    if family is None:
        expected = " or ".join(map(repr, FAMILIES))
        raise CheckpointError(f"{where}: model_type is {_shown(config.get('model_type'))}, expected {expected}.")
    return family


def _same(value: Any) -> tuple[type, ...]:
    """The types of JSON in which a value may be written: 1 is 1.0, and neither is true."""
    return (bool,) if isinstance(value, bool) else (int, float)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


__all__ = ["FAMILIES", "LLAMA", "MULTIPLIERS", "TELEFLM", "Family", "find_family", "is_llama", "require_family"]
