# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A verdict as B's record keeps it (`teleflm verify --record`), for its readers and for what is made of B.

verdict           see `Verification.verdict`
against           A's record: its sha256, null if A has none, and whether A's weights were those of it
certificate       whether every condition on B's bytes holds, and how near what was copied is to A's; null if none
numbers           what logits were computed in, of how many tokens, and how far they are apart; null if none
moments           whether B's optimizer.pt is the state that was given as A's, grown, and the identity of that state, as
                  a growth's `optimizer` has it; null if it was not looked at
teleflm_version   what found it
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import MANIFEST, package_version, read_own_manifest
from conversion.checkpoint.parent import parent_of, record_mismatch
from conversion.checkpoint.sources import open_checkpoint
from conversion.checkpoint.verdict import add_verification
from conversion.hub.remote import is_remote, local_view

from .verify import Verification


def check_recordable(b: str | os.PathLike[str]) -> str:
    """Check, before anything is read at length, that a verdict can be put into the record of a folder.

    Returns:
        what [`record_verification`] needs to know that the record is still this one.

    Raises:
        CheckpointError: B has no record of this version, or its weights are not those of its record.
    """
    if is_remote(b):
        raise CheckpointError(f"{b}: is not on this machine, and its record cannot be changed; leave --record out.")
    folder = Path(b)
    record = read_own_manifest(folder)
    if record is None:
        raise CheckpointError(
            f"{folder / MANIFEST}: no such file; there is no record that a verdict could be added to."
        )
    mismatch = record_mismatch(folder, record, open_checkpoint(folder).tensors)
    if mismatch:
        raise CheckpointError(
            f"{folder}: its weights are not those of its record ({mismatch}); a verdict on them does not belong there."
        )
    return _digest(folder)


def record_verification(
    a: str | os.PathLike[str], b: str | os.PathLike[str], verification: Verification, expected: str
) -> None:
    """Put a verdict into B's record, in place of an earlier one; see `conversion.checkpoint.verdict`.

    Args:
        a: folder of the source.
        b: folder of what was made from it.
        verification: what was found of them.
        expected: what [`check_recordable`] returned before they were compared.

    Raises:
        CheckpointError: B or its record was changed meanwhile, or the record cannot be written.
    """
    if check_recordable(b) != expected:
        raise CheckpointError(f"{Path(b) / MANIFEST}: was changed while the checkpoints were compared; verify again.")
    add_verification(Path(b), _describe(verification, _against(a)))


def _against(a: str | os.PathLike[str]) -> dict[str, Any]:
    record = parent_of(open_checkpoint(local_view(a)))
    found = {name: (record or {}).get(name) for name in ("record", "matches", "origin")}
    return {name: value for name, value in found.items() if name != "origin" or value}


def _describe(verification: Verification, against: dict[str, Any]) -> dict[str, Any]:
    certificate, numbers, moments = verification.certificate, verification.numbers, verification.moments
    return {
        "verdict": verification.verdict,
        "against": against,
        "certificate": certificate and {"holds": certificate.holds, "precision": certificate.precision},
        "numbers": numbers
        and {
            "dtype": numbers.dtype,
            "rounding": numbers.rounding,
            "tokens": numbers.difference.tokens,
            "max_difference": float(numbers.difference.max_difference),
            "rms_difference": float(numbers.difference.rms_difference),
            "max_logit": float(numbers.difference.max_logit),
            "same_argmax": float(numbers.difference.same_argmax),
            "divergence": float(numbers.difference.divergence),
            "losses": numbers.difference.losses and [*numbers.difference.losses],
            "blind_to": float(numbers.blind_to),
        },
        "moments": moments and {"holds": moments.holds, "state": moments.identity},
        "teleflm_version": package_version(),
    }


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


__all__ = ["check_recordable", "record_verification"]
