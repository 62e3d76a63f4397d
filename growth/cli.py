# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm grow`."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conversion.terminal import (
    DEFAULT_WORKERS,
    Debug,
    DryRun,
    Dtype,
    Json,
    MaxShardSize,
    NoDigest,
    Overwrite,
    Seed,
    Workers,
    byte_progress,
    exit_codes,
    format_bytes,
    print_json,
)

if TYPE_CHECKING:
    from rich.table import Table

    from conversion.checkpoint.plan import TensorPlan

    from .grow import GrowthResult

Source = Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a Tele-FLM checkpoint.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]
To = Annotated[str | None, typer.Option(metavar="PRESET|CONFIG.json", help="What to grow into.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A field of the target; repeatable.")]
Method = Annotated[str, typer.Option(help="zero: new entries that write the residual stream are zero.")]
Layers = Annotated[str, typer.Option(help="Layers to copy: interleave, stack, top, or a list such as 3,7,11.")]
Multipliers = Annotated[str, typer.Option(help="preserve the logit factor, or take the target's and rescale lm_head.")]


def grow(
    source: Source,
    out: Out,
    to: To = None,
    overrides: Set = None,
    method: Method = "zero",
    layers: Layers = "interleave",
    multipliers: Multipliers = "preserve",
    dtype: Dtype = None,
    seed: Seed = 0,
    workers: Workers = DEFAULT_WORKERS,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    no_digest: NoDigest = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Grow a checkpoint into a larger one that computes the same function."""
    from conversion.checkpoint.execute import WriteOptions

    from .grow import grow_checkpoint

    with exit_codes(debug=debug):
        if to is None and not overrides:
            raise ValueError("nothing to grow into: give --to PRESET|CONFIG.json, --set KEY=VALUE, or both.")
        with byte_progress("growing") as progress:
            result = grow_checkpoint(
                source,
                out,
                to,
                overrides=dict(parse_override(text) for text in overrides or ()),
                method=method,
                layers=layers,
                multipliers=multipliers,
                dtype=dtype,
                seed=seed,
                options=WriteOptions(max_shard_size, workers, not no_digest, overwrite, progress),
                dry_run=dry_run,
            )
        if as_json:
            print_json(describe(result, out, workers))
        else:
            print_growth(result, out, workers)


def parse_override(text: str) -> tuple[str, int | float | bool | str]:
    """Read `key=value`; the value is JSON, or text where it is none.

    Raises:
        ValueError: there is no `=` or no key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {text!r} is not KEY=VALUE, for example hidden_size=10240.")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def describe(result: "GrowthResult", out: Path, workers: int) -> dict[str, Any]:
    """The growth as one JSON object; a dry run's has every tensor."""
    from conversion.checkpoint.execute import free_space, peak_memory

    need = sum(shard.nbytes for shard in result.shards)
    summary = {
        "out": str(out),
        "source": asdict(result.growth.source),
        "target": asdict(result.growth.target),
        "parameters": result.growth.target.num_parameters,
        "layers": [{"source": origin.source, "copy": origin.is_copy} for origin in result.growth.layers],
        "bytes": result.plan.nbytes,
        "files": [{"name": shard.filename, "bytes": shard.nbytes} for shard in result.shards],
        "memory_bytes": peak_memory(result.plan, workers),
        "disk": {"need": need, "free": free_space(out)},
        "notes": result.notes,
    }
    if result.written:
        return {**summary, "already_done": result.written.already_done}
    tensors = [
        {"name": t.name, "shape": t.shape, "dtype": t.dtype.name, "bytes": t.nbytes, "pieces": pieces_of(t)}
        for t in result.plan.tensors
    ]
    return {**summary, "dry_run": True, "tensors": tensors}


def print_growth(result: "GrowthResult", out: Path, workers: int) -> None:
    """A summary for people; a dry run's has the whole plan, a line for each group of tensors made alike."""
    from rich.console import Console
    from rich.table import Table

    from conversion.checkpoint.execute import free_space, peak_memory

    console = Console()
    fields = Table("", "source", "target", title="Growth", title_justify="left")
    old, new = asdict(result.growth.source), asdict(result.growth.target)
    for field in old:
        if old[field] != new[field]:
            fields.add_row(field, f"{old[field]:,}", f"{new[field]:,}")
    fields.add_row("parameters", f"{result.growth.source.num_parameters:,}", f"{result.growth.target.num_parameters:,}")
    console.print(fields)
    if result.written is None:
        console.print(_plan_table(result.plan.tensors))
    for note in result.notes:
        console.print(f"- {note}", highlight=False, soft_wrap=True)
    need = sum(shard.nbytes for shard in result.shards)
    size = f"{format_bytes(need)} in {len(result.shards)} file{'s' if len(result.shards) > 1 else ''}"
    if result.written is None:
        memory = format_bytes(peak_memory(result.plan, workers))
        free = format_bytes(free_space(out))
        console.print(
            f"Would write {size} to {out} ({free} free), in about {memory} of memory.", highlight=False, soft_wrap=True
        )
    elif result.written.already_done:
        console.print(f"{out} is already done: {size}.", highlight=False, soft_wrap=True)
    else:
        console.print(f"Wrote {size} to {out}.", highlight=False, soft_wrap=True)


def _plan_table(tensors: "Iterable[TensorPlan]") -> "Table":
    """The plan, with the layers that are made alike in one line."""
    from rich.table import Table

    groups: dict[tuple[str, str, str], list[TensorPlan]] = {}
    for tensor in tensors:
        name = re.sub(r"^model\.|\.weight$", "", re.sub(r"layers\.\d+", "layers.*", tensor.name))
        pieces = [re.sub(r"\(.+\)", "(source)", piece) for piece in pieces_of(tensor)]
        groups.setdefault((name, "x".join(map(str, tensor.shape)), "\n".join(pieces)), []).append(tensor)
    table = Table("weight", "count", "shape", "size", "made of", title="Plan", title_justify="left")
    table.columns[0].no_wrap = True
    for (name, shape, made_of), members in groups.items():
        table.add_row(name, str(len(members)), shape, format_bytes(sum(t.nbytes for t in members)), made_of)
    return table


def pieces_of(tensor: "TensorPlan") -> list[str]:
    """What a tensor is made of, each kind once, with the symbols that need data as symbols."""
    return list(dict.fromkeys(piece.describe() for piece in tensor.pieces))
