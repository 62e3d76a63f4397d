# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Which small files of a folder go with its weights to a new one: those on a list, and none from outside of the folder.

A folder may come from anyone. A link in it that leads elsewhere would make a file of this machine part of what is
written, and perhaps published; whatever else lies in it (optimizer states, logs, notes) is nobody's business.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.errors import CheckpointError
from ..checkpoint.folder_formats import HUB, is_weights, known_files
from ..checkpoint.manifest import MANIFEST, OLD_MANIFEST

_MAX_BYTES = 100_000_000  # the largest tokenizer.json that is published has 35 MB
_TEXTS = re.compile(r"README\.md|(LICEN[CS]E|NOTICE|Notice|COPYING|USE_POLICY)([-_.][\w.-]+)?")
_CODE = re.compile(r"\w+\.py")
# Those that are written anew, or are another model's.
_NOT_COPIED = ("config.json", "adapter_config.json", MANIFEST, OLD_MANIFEST)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf", ".h5", ".msgpack")


def copied_file(folder: Path, name: str) -> str | None:
    """The path of a small file of a folder that may be copied; None if there is none.

    Args:
        folder: where it may lie.
        name: its path in there.

    Raises:
        CheckpointError: it is a link to something outside of the folder (a snapshot of a Hub cache links to its
            blobs), or too large to be what its name says.
    """
    path = folder / name
    if not path.is_file():
        return None
    target, root = path.resolve(), folder.resolve()
    blobs = [root.parents[1] / "blobs"] if root.parent.name == "snapshots" else []
    if not any(target.is_relative_to(place) for place in (root, *blobs)):
        raise CheckpointError(
            f"{path}: is a link to {target}, outside of {folder}; put a copy in its place if it belongs to the model, "
            "or remove it."
        )
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(
            f"{path}: has {path.stat().st_size} bytes, expected at most {_MAX_BYTES} of such a file; move it away."
        )
    return str(path)


def small_files(folder: Path, configs: Mapping[str, Any]) -> tuple[dict[str, str | bytes], list[str]]:
    """The small files of a folder that a copy of the model needs, and the names of those that stay behind.

    Those are settings that transformers reads (tokenizer, templates, generation, processors), licence and card, and the
    model's own code where its configuration refers to some.

    Args:
        folder: the model's.
        configs: what its config.json and tokenizer_config.json say.

    Raises:
        CheckpointError: see `copied_file`.
    """
    has_code = any("auto_map" in config for config in configs.values() if isinstance(config, Mapping))
    copied: dict[str, str | bytes] = {}
    left: list[str] = []
    for name in known_files(folder):
        wanted = HUB.settings is not None and HUB.settings.fullmatch(name)
        wanted = wanted or _TEXTS.fullmatch(name) or (has_code and _CODE.fullmatch(name))
        path = copied_file(folder, name) if wanted and name not in _NOT_COPIED else None
        if path:
            copied[name] = path
        elif name not in _NOT_COPIED and not is_weights(name) and not name.endswith(_WEIGHT_SUFFIXES):
            left.append(name)
    return copied, [name for name in left if not name.startswith(".")]
