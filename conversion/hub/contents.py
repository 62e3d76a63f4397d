# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What makes a folder of weights a Hub repository: configuration, code, tokenizer and model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..architecture import Architecture, load_config, model_code_constant, package_folder, rope_parameters
from ..checkpoint.errors import CheckpointError
from ..checkpoint.manifest import MANIFEST
from .small_files import copied_file

TOKENIZER_CODE = "tokenization_teleflm.py"
CODE_FILES = ("configuration_teleflm.py", "modeling_teleflm.py", TOKENIZER_CODE)
TOKENIZER_FILES = ("tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_TOKENIZER_CONFIG = "tokenizer_config.json"
_CHAT_TEMPLATE = "chat_template.jinja"
_OTHER_FILES = ("generation_config.json",)

# Without these, transformers would encode with a class of its own, and other ids.
_TOKENIZER_CLASS = {
    "tokenizer_class": "TeleFLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_teleflm.TeleFLMTokenizer", None]},
}
_OLD_SPELLINGS = ("torch_dtype", "rope_theta", "rope_scaling", "transformers_version", "_name_or_path", "auto_map")


def hub_config(base: Mapping[str, Any], architecture: Architecture, dtype: str) -> dict[str, Any]:
    """The config.json of an output folder: `base` in today's spelling, with our numbers, code and dtype.

    Args:
        base: configuration of the source; fields we do not know are kept.
        architecture: the output's numbers.
        dtype: of the output's weights, for example `bfloat16`.
    """
    kept = {key: value for key, value in base.items() if key not in _OLD_SPELLINGS}
    own = {
        "architectures": ["TeleFLMForCausalLM"],
        "auto_map": model_code_constant("modeling_teleflm.py", "AUTO_MAP"),
        "dtype": dtype,
        "rope_parameters": rope_parameters(base),
    }
    return dict(sorted({**architecture.to_config(kept), **own}.items()))


def hub_sidecars(source: Path, card: str, code: Sequence[str] = CODE_FILES) -> dict[str, str | bytes]:
    """The other files of an output folder: our code, the source's tokenizer and generation settings, the model card.

    Python files of the source are left behind: their place is taken by ours.

    Args:
        source: folder to copy from.
        card: content of README.md.
        code: which of our files the output needs.

    Raises:
        CheckpointError: one of them is a link that leads out of the folder.
    """
    package = package_folder()
    files: dict[str, str | bytes] = {name: str(package / name) for name in code}
    copied_file(source, "config.json")  # what it says goes into the output's
    for name in (*TOKENIZER_FILES, *_OTHER_FILES):
        if path := copied_file(source, name):
            files[name] = path
    if "tokenizer.model" in files:
        tokenizer = load_config(source / _TOKENIZER_CONFIG) if copied_file(source, _TOKENIZER_CONFIG) else {}
        files[_TOKENIZER_CONFIG] = (json.dumps({**tokenizer, **_TOKENIZER_CLASS}, indent=2) + "\n").encode()
        if "chat_template" not in tokenizer:
            files.setdefault(_CHAT_TEMPLATE, str(package / _CHAT_TEMPLATE))
    files["README.md"] = card.encode()
    return files


def count_pieces(folder: Path) -> int | None:
    """Number of pieces of the folder's sentencepiece tokenizer, or None if it has none.

    Raises:
        CheckpointError: tokenizer.model cannot be read.
    """
    path = folder / "tokenizer.model"
    if not path.is_file():
        return None
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path)).get_piece_size()
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: not a sentencepiece model ({error}); restore it or remove it.") from None


def lineage_steps(lineage: Mapping[str, Any] | None) -> list[str]:
    """The lineage of a manifest as sentences, oldest first."""
    if not lineage:
        return []
    before = ["A checkpoint without a record of its own."]
    match lineage:
        case {"parent": {"lineage": dict() as earlier}}:
            before = lineage_steps(earlier)
        case {"operation": "convert", "parallel": _}:  # the training itself leaves none
            before = []
    match lineage:
        case {"operation": "grow", "source": dict() as old, "target": dict() as new}:
            fields = [f"{field} {old[field]} to {new.get(field)}" for field in old if old[field] != new.get(field)]
            grown = ", ".join(fields) or "nothing changed"
            step = f"Grown without changing the function it computes, rounding aside: {grown}."
        case {"operation": "convert", "from": trainer, "parallel": parallel, **rest}:
            at = f" at iteration {rest['iteration']}" if rest.get("iteration") is not None else ""
            cast = f", cast to {rest['dtype']}" if rest.get("dtype") else ""
            step = f"Converted from a training checkpoint{at} ({trainer}, {parallel}){cast}."
        case {"operation": "convert", "from": container}:
            cast = f", cast to {lineage['dtype']}" if lineage.get("dtype") else ""
            step = f"Rewritten as safetensors from {container} files{cast}."
        case {"operation": "fold", "alpha": float() | int() as alpha}:
            step = f"Growth masks folded into the weights at alpha {alpha:g}."
        case {
            "operation": "fine-tune",
            "trainer": str() as trainer,
            "method": str() as method,
            "data": {"rows": int() as rows, "trained_tokens": int() as tokens},
            "steps": int() as steps,
        }:
            merged = ", the adapter merged" if lineage.get("merged") else ""
            step = (
                f"Fine-tuned ({trainer[:80]}, {method[:80]}) in {steps:,} steps on {rows:,} conversations, {tokens:,} "
                f"tokens of which are trained on{merged}."
            )
        case {"operation": "export", "to": str() as target}:
            step = f"Exported to {target[:80]}{_export_details(lineage)}."
        case _:
            step = f"{str(lineage.get('operation'))[:80]}."
    return [*before, step]


def _export_details(lineage: Mapping[str, Any]) -> str:
    details = []
    match lineage:
        case {"parallel": {"tensor": int() as tensor, "pipeline": int() as pipeline, "virtual": int() as virtual}}:
            chunks = f" of {virtual} chunks" if virtual > 1 else ""
            details.append(f"tensor parallel {tensor}, {pipeline} stage{'s' if pipeline > 1 else ''}{chunks}")
    if lineage.get("multipliers") == "fold":
        details.append("the multipliers folded into embeddings and head")
    if isinstance(lineage.get("dtype"), str):
        details.append(f"cast to {lineage['dtype'][:80]}")
    return "".join(f", {detail}" for detail in details)


def model_card(architecture: Architecture, dtype: str, lineage: list[str], *, own_code: bool = True) -> str:
    """A README.md with the facts that follow from the configuration.

    Args:
        architecture: the model's numbers.
        dtype: of its weights.
        lineage: one sentence a step of what it was made from.
        own_code: whether it loads with our model code; the tokenizer always does.
    """
    a = architecture
    rows = {
        "Parameters": f"{a.num_parameters:,}",
        "Layers": a.num_hidden_layers,
        "Hidden size": f"{a.hidden_size:,}",
        "Attention heads (key/value)": f"{a.num_attention_heads} ({a.num_key_value_heads})",
        "Feed-forward size": f"{a.intermediate_size:,}",
        "Vocabulary rows": f"{a.vocab_size:,}",
        "Factor on the logits": f"{a.logit_scale:g}",
        "Weights": dtype,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    steps = "\n".join(f"{i}. {step}" for i, step in enumerate(lineage, 1))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- TeleFLM
---
# A Tele-FLM model

| | |
|---|---|
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("."{", trust_remote_code=True" if own_code else ""})
```

With the `teleflm` package installed, `import modeling_teleflm` replaces `trust_remote_code=True`.

## Made from

{steps}

`{MANIFEST}` has the full record and the digest of every tensor.
"""
