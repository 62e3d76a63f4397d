# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Publishing to a Hub on this machine, by the commands with which one publishes to huggingface.co.

Each command is a process of its own: the Hub's client reads where its Hub is when it is imported.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "owner/small-tele-flm"


def publish(folder: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Publish a folder as `NAME`; returns what `teleflm publish --json` says.

    Args:
        folder: holds the model.
        environment: of the process, which says where its Hub is.
    """
    return _run_teleflm(["publish", str(folder), NAME, "--license", "apache-2.0"], environment)


def read_lineage(environment: Mapping[str, str]) -> list[str]:
    """What the Hub knows of how `NAME` was made, oldest step first, as `teleflm inspect` reads it from there."""
    return [link["step"] for link in _run_teleflm(["inspect", NAME], environment)["chain"]]


def _run_teleflm(arguments: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "teleflm", *arguments, "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    said: dict[str, Any] = json.loads(result.stdout)
    return said
