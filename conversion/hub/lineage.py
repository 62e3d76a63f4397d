# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The lineage of a model as sentences."""

from collections.abc import Mapping
from typing import Any


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
