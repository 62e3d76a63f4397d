# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Whether a stranger could load a folder: tried in a clean process, see `clean_process.py`.

Loading runs the model code that lies in the folder, so it is only tried where that is this package's own.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ..architecture import package_folder
from ..checkpoint.errors import CheckpointError
from ..checkpoint.kernel_copy import available_memory
from ..checkpoint.sources import check_utf8, open_checkpoint
from ..compressed_tensors import is_float8, read_float8
from . import clean_process
from .release import Release

_PATIENCE = 1800  # seconds; importing torch from a slow disk takes minutes


def try_loading(release: Release) -> list[str]:
    """Load a folder as a stranger would.

    Returns:
        Notes: what was tried and works, or why nothing was tried.

    Raises:
        CheckpointError: it does not load.
    """
    if release.is_adapter:
        return ["Not loaded: an adapter needs its base, which is not here."]
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return ["Not loaded: that needs transformers and torch, which are not installed."]
    if foreign := foreign_code(release):
        return [f"Not loaded: {foreign} is not of this version of this package, and is not run."]
    check_utf8(release.folder.absolute())
    source = open_checkpoint(release.folder)
    tensors = read_float8(source).tensors if is_float8(source.config) else source.tensors
    untried = ""
    if sum(release.weights.values()) >= available_memory() // 3:
        untried = "; no token was computed, as the weights take more than a third of the memory"
    elif tensors is not source.tensors and importlib.util.find_spec("compressed_tensors") is None:
        untried = "; no token was computed, as compressed-tensors, which reads 8-bit floats, is not installed"
    asked = {
        "folder": str(release.folder.absolute()),
        "tensors": {name: list(view.shape) for name, view in tensors.items()},
        "generate": not untried,
    }
    with tempfile.TemporaryDirectory() as cache:
        kept = os.environ.keys() - {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_MODULES_CACHE"}
        environment = {name: os.environ[name] for name in kept}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": cache, "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-P", str(Path(clean_process.__file__))]
        try:
            run = subprocess.run(
                command,
                input=json.dumps(asked),
                env=environment,
                cwd=cache,
                capture_output=True,
                text=True,
                timeout=_PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise CheckpointError(
                f"{release.folder}: did not load in a process of its own in {_PATIENCE} s; --no-load leaves that out."
            ) from None
    lines = run.stdout.strip().splitlines()
    if run.returncode or not lines:
        last = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        raise CheckpointError(f"{release.folder}: does not load in a process of its own: {last[:400]}.")
    answer = json.loads(lines[-1])
    if answer["problem"]:
        raise CheckpointError(f"{release.folder}: does not load in a process of its own: {answer['problem']}.")
    return [f"Loaded without this package: {', '.join(answer['done'])}{untried}."]


def foreign_code(release: Release) -> str | None:
    """The first file of code in a release that is not one of ours, byte for byte; None if there is none."""
    for name in release.small_files:
        own = package_folder() / name
        if name.endswith(".py") and (not own.is_file() or _digest(own) != _digest(release.folder / name)):
            return name
    return None


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


__all__ = ["foreign_code", "try_loading"]
