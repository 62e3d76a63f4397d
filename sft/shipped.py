# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The recipes, accelerate files and chat templates that come with this package, by name."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conversion.architecture import package_folder

Kind = Literal["recipe", "accelerate", "template"]
_FILES: dict[Kind, str] = {
    "recipe": "recipes/*.yaml",
    "accelerate": "accelerate_configs/*.yaml",
    "template": "chat_templates/*.jinja",
}


@dataclass(frozen=True)
class Shipped:
    """A file that comes with the package.

    Args:
        name: what it is called on the command line.
        kind: `recipe` of [`sft.training.recipe`]; `accelerate`, for `accelerate launch --config_file`; or `template`,
            for `chat_template_path`.
        path: where it is.
        title: its first sentence.
    """

    name: str
    kind: Kind
    path: Path
    title: str


def shipped_files() -> list[Shipped]:
    """All of them, recipes first, each kind by name; of the templates, the one that models come with first."""
    found = [
        Shipped(path.stem, kind, path, _title(path))
        for kind, pattern in _FILES.items()
        for path in sorted(Path(__file__).parent.glob(pattern))
    ]
    own = package_folder() / "chat_template.jinja"
    first = next(place for place, file in enumerate(found) if file.kind == "template")
    return [*found[:first], Shipped("teleflm", "template", own, _title(own)), *found[first:]]


def find_shipped(name: str, kind: Kind | None = None) -> Path:
    """The path of a shipped file.

    Raises:
        LookupError: there is none of this name; the message says which there are, the nearest first.
    """
    known = {file.name: file.path for file in shipped_files() if kind in (None, file.kind)}
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}."
    raise LookupError(f"no {kind or 'shipped file'} is called {name}; {hint}")


def _title(path: Path) -> str:
    """The first sentence of the comment that a file begins with."""
    lines = []
    mark = "# " if path.suffix == ".yaml" else "  "
    for line in path.read_text(encoding="utf-8").removeprefix("{#-\n").splitlines():
        if not line.startswith(mark):
            break
        lines.append(line.removeprefix(mark))
    return " ".join(lines).partition(". ")[0].rstrip(".")


__all__ = ["Kind", "Shipped", "find_shipped", "shipped_files"]
