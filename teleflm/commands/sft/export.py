# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm sft export`."""

from pathlib import Path
from typing import Annotated

import typer

from teleflm.terminal import (
    DEFAULT_WORKERS,
    Debug,
    Dtype,
    Json,
    MaxShardSize,
    Overwrite,
    Workers,
    byte_progress,
    exit_codes,
    print_json,
)

Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="What sft train saved: a model or an adapter.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]
Merge = Annotated[bool, typer.Option("--merge", help="Merge the adapter into its base.")]
Base = Annotated[str | None, typer.Option(metavar="PATH", help="The adapter's base, if it has moved.")]


def export(
    checkpoint: Checkpoint,
    out: Out,
    merge: Merge = False,
    base: Base = None,
    dtype: Dtype = None,
    workers: Workers = DEFAULT_WORKERS,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a Hub folder of a fine-tuned model, with its chat template and where it came from."""
    with exit_codes(debug=debug):
        from conversion.checkpoint.execute import WriteOptions
        from sft.export import export_model

        with byte_progress("export") as progress:
            options = WriteOptions(
                workers=workers, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress
            )
            exported = export_model(checkpoint, out, merge=merge, base=base, dtype=dtype, options=options)
        if as_json:
            found = {"merged": exported.merged, "gap": exported.gap, "notes": list(exported.notes)}
            print_json({"folder": str(exported.folder), **found})
            return
        print(exported.folder)
        for note in exported.notes:
            print(f"- {note}")
        if exported.gap is not None:
            print(f"{exported.merged} weights merged; the logits moved by {exported.gap:.1e} of their spread")


__all__ = ["export"]
