# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Writes recipe-keys.md from the text of sft/training/recipe.py, importing none of it: `python docs/recipe_keys.py`."""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE.parent / "sft/training/recipe.py"
PAGE = HERE / "recipe-keys.md"
CLASSES = {"RunArguments": "The run", "DataArguments": "The data"}
HEAD = """# Keys of a recipe

What `teleflm sft train` takes in a recipe or as `--key value`, beside the fields of TRL's `ModelConfig` (the model,
LoRA, quantisation) and of `SFTConfig`, `DPOConfig`, `KTOConfig` or `GRPOConfig` (the training). An unknown key is an
error, and so is one that would do nothing. This page is written from the code; [fine-tuning.md](fine-tuning.md) says
how to use it.
"""


def described(docstring: str) -> dict[str, str]:
    """Name -> what it is, of the `Args:` of a docstring; names that share a text each have it."""
    found: dict[str, str] = {}
    arguments = docstring.partition("Args:\n")[2]
    for entry in re.split(r"\n {4}(?=\S)", "\n" + arguments.rstrip()):
        names, colon, text = entry.partition(":")
        if colon:
            found |= dict.fromkeys(names.replace(" ", "").split(","), " ".join(text.split()))
    return found


def rows(definition: ast.ClassDef) -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each field."""
    meaning = described(ast.get_docstring(definition) or "")
    return [
        (node.target.id, ast.unparse(node.annotation), ast.unparse(node.value), meaning[node.target.id])
        for node in definition.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value
    ]


def page(source: str) -> str:
    """The page, of the text of the module."""
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    parts = [HEAD]
    for name, title in CLASSES.items():
        parts.append(f"\n## {title}\n\n| key | type | default | meaning |\n|---|---|---|---|\n")
        for key, kind, default, meaning in rows(classes[name]):
            text = re.sub(r"\[(`[\w.]+`)\]", r"\1", meaning).replace("|", r"\|")
            parts.append(f"| `{key}` | `{kind.replace('|', 'or')}` | `{default}` | {text} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
