# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm fold`."""

from pathlib import Path
from typing import Annotated

import typer

from conversion.checkpoint.limits import DEFAULT_MEMORY
from teleflm.terminal import (
    DEFAULT_WORKERS,
    AllowNonfinite,
    Debug,
    DryRun,
    Dtype,
    Json,
    MaxShardSize,
    Memory,
    NoDigest,
    Overwrite,
    Rank,
    VerifySource,
    Workers,
    WorldSize,
)

Source = Annotated[str, typer.Argument(metavar="SRC", help="Folder of a Tele-FLM checkpoint; or OWNER/NAME, a URL.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]
Alpha = Annotated[float | None, typer.Option(help="Volume of what is new, 0 to 1; the checkpoint's own unless given.")]


def fold(
    source: Source,
    out: Out,
    alpha: Alpha = None,
    dtype: Dtype = None,
    allow_nonfinite: AllowNonfinite = False,
    workers: Workers = DEFAULT_WORKERS,
    memory: Memory = DEFAULT_MEMORY,
    max_shard_size: MaxShardSize = "5GB",
    rank: Rank = None,
    world_size: WorldSize = None,
    overwrite: Overwrite = False,
    no_digest: NoDigest = False,
    verify_source: VerifySource = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the plain checkpoint that computes what a masked one computes."""
    from growth.fold import fold_masks
    from teleflm.plan_report import run_and_report

    run_and_report(
        "folding",
        out,
        lambda options: fold_masks(source, out, alpha=alpha, dtype=dtype, options=options, dry_run=dry_run),
        workers=workers,
        memory=memory,
        max_shard_size=max_shard_size,
        rank=rank,
        world_size=world_size,
        dry_run=dry_run,
        overwrite=overwrite,
        no_digest=no_digest,
        verify_source=verify_source,
        as_json=as_json,
        debug=debug,
        allow_nonfinite=allow_nonfinite,
    )
