# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Which checkpoint a run goes on from, and whether it is all there.

A Trainer loads what it finds: without an optimizer.pt it begins with fresh moments, without a scheduler.pt with the
first learning rate, without an rng_state with other dropout, and it says nothing. So a checkpoint has to have them all.
What a Trainer writes last, trainer_state.json, tells a checkpoint from what a kill has left of one.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import RunError

logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What a checkpoint has beside its weights: what it is, and the names under which Trainer, accelerate or DeepSpeed,
# which keeps all in one folder, leave it.
_PARTS: Mapping[str, tuple[str, ...]] = {
    "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_[0-9]*", "global_step*"),
    "learning rate schedule (scheduler.pt)": ("scheduler.pt", "global_step*"),
    "random state (rng_state)": ("rng_state*.pth",),
}


def find_checkpoint(wanted: str | Path | bool | None, output_dir: str | Path) -> str | None:
    """The checkpoint that a run goes on from, if it is one that can be resumed.

    Args:
        wanted: a `checkpoint-N` folder; `True` for the last whole one in `output_dir`; None or False for none.
        output_dir: of the run.

    Raises:
        RunError: there is none, or it lacks what a step needs.
    """
    if not wanted:
        return None
    found = _last(Path(output_dir)) if wanted is True else Path(wanted)
    if _read_state(found) is None:
        raise RunError(
            f"resume_from_checkpoint {found} holds no {_STATE} that can be read; name a checkpoint-N folder."
        )
    missing = [what for what, names in _PARTS.items() if not any(any(found.glob(name)) for name in names)]
    if missing:
        raise RunError(
            f"{found} has no {', '.join(missing)}, as where it was saved with save_only_model: the steps to come would "
            f"be those of another run. For a new run from its weights set model_name_or_path: {found}, and delete "
            "resume_from_checkpoint."
        )
    return str(found)


def step_of(checkpoint: str | Path) -> int:
    """Updates that a checkpoint has seen, of one that [`find_checkpoint`] has found."""
    state = _read_state(Path(checkpoint))
    return state["global_step"] if state else 0


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders of checkpoints in an output folder, whole or not, the last first."""
    folder = Path(output_dir)
    found = [path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: -int(path.name.partition("-")[2]))


def _last(output_dir: Path) -> Path:
    """The last checkpoint that was saved to its end; that others were not is said."""
    there = checkpoints(output_dir)
    whole = next((path for path in there if _read_state(path) is not None), None)
    if whole is None:
        left = f" ({', '.join(path.name for path in there)} was not saved to its end)" if there else ""
        raise RunError(f"output_dir {output_dir} holds no checkpoint-N to resume{left}; delete resume_from_checkpoint.")
    for path in there[: there.index(whole)]:
        logger.warning("%s was not saved to its end; the run goes on from %s", path, whole.name)
    return whole


def _read_state(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint says of its step; None if that was not written to its end, or not by a Trainer."""
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) and isinstance(state.get("global_step"), int) else None


__all__ = ["checkpoints", "find_checkpoint", "step_of"]
