# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Commands that write a checkpoint: how they run, and what they say, to scripts in JSON and to people in a table."""

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from conversion.checkpoint.errors import CheckpointError, printable
from conversion.checkpoint.execute import CheckpointResult, WriteOptions, free_space, peak_memory
from conversion.checkpoint.limits import high_water
from conversion.checkpoint.mirror import shown
from conversion.checkpoint.plan import TensorPlan
from conversion.checkpoint.preflight import Done, Resume
from conversion.checkpoint.ranks import Ranks
from conversion.checkpoint.sizes import format_bytes

from .terminal import byte_progresses, exit_codes, make_console, print_json, process_rank, terminated_as_interrupted

if TYPE_CHECKING:
    from conversion.hub.streaming import Streamed

# Parts of names that tell nothing in a table of one model's weights: also the ranks of Megatron's, which are alike.
_SAID_ANYWAY = r"^model\.|^mp_rank_\w+/model\d*/(decoder\.)?|\.weight$"


_NAME_WIDTH = 33  # of the longest name in a Hub checkpoint; Megatron's may be folded


def describe_result(result: CheckpointResult, out: Path, options: WriteOptions) -> dict[str, Any]:
    """The result as a JSON object; a dry run's has every tensor."""
    summary = {
        "out": str(out),
        "bytes": result.plan.nbytes,
        "files": [{"name": shard.filename, "bytes": shard.nbytes} for shard in result.shards],
        "memory_bytes": high_water() if result.written else peak_memory(result.plan, options),
        "threads": options.share(result.plan.tensors).workers,
        "disk": {"need": _disk_need(result), "free": result.foreseen.free if result.foreseen else free_space(out)},
        "notes": result.notes,
    }
    if result.written:
        return {**summary, "already_done": result.written.already_done, "restored": [*result.written.restored]}
    tensors = [
        {"name": t.name, "shape": t.shape, "dtype": t.dtype.name, "bytes": t.nbytes, "pieces": _pieces(t)}
        for t in result.plan.tensors
    ]
    refused = result.foreseen is not None and result.foreseen.refused
    return {**summary, "dry_run": True, "refused": refused, "tensors": tensors}


def print_result(result: CheckpointResult, out: Path, options: WriteOptions) -> None:
    """A summary for people; a dry run's has the whole plan, a line for each group of tensors made alike."""
    console = make_console()
    if result.written is None:
        states = {tensor.name for shard in result.shards if shard.state for tensor, _ in shard.tensors}
        console.print(_plan_table(tensor for tensor in result.plan.tensors if tensor.name not in states))
    for note in result.notes:
        console.print(f"- {printable(shown(note))}")
    size = f"{format_bytes(sum(shard.nbytes for shard in result.shards))} in {_count(len(result.shards), 'file')}"
    if result.written is None:
        console.print(_would_write(result, size, out, options))
    elif result.written.already_done:
        console.print(f"{out} is already done: {size}.")
    elif any(shard.twin for shard in result.shards):
        console.print(f"Made {out}, of {size}.")  # which a note calls links, or copies
    else:
        console.print(f"Wrote {size} to {out}.")


def _would_write(result: CheckpointResult, size: str, out: Path, options: WriteOptions) -> str:
    """What a dry run foresees, in a sentence."""
    memory, free = format_bytes(peak_memory(result.plan, options)), format_bytes(free_space(out))
    threads = _threads(options.share(result.plan.tensors).workers, options.workers)
    foreseen = result.foreseen
    if foreseen and foreseen.refused:
        return (
            f"Would be refused, and write none of {size} to {out} ({free} free); it takes at most {memory} of memory."
        )
    if foreseen and isinstance(foreseen.decision, Done):
        return f"Would write no weights: {size} are in {out}."
    if any(shard.twin for shard in result.shards):
        return f"Would make {out}, of {size} ({free} free)."
    rest = f"{format_bytes(foreseen.left)} of " if foreseen and isinstance(foreseen.decision, Resume) else ""
    return f"Would write {rest}{size} to {out} ({free} free), in at most {memory} of memory, by {threads}."


def _disk_need(result: CheckpointResult) -> int:
    return result.foreseen.need if result.foreseen else sum(shard.disk_bytes for shard in result.shards)


def _threads(number: int, asked: int) -> str:
    return _count(number, "thread") + (f" of the {asked} asked for" if number < asked else "")


def _write_options(
    progress: Callable[[int, int], None],
    verifying: Callable[[int, int], None],
    *,
    workers: int,
    memory: str,
    max_shard_size: str,
    overwrite: bool,
    no_digest: bool,
    verify_source: bool,
    allow_nonfinite: bool,
    rank: int | None,
    world_size: int | None,
) -> WriteOptions:
    """How to write, by the options of a command and what its launcher says."""
    here, world = process_rank(rank, world_size)
    return WriteOptions(
        max_shard_size=max_shard_size,
        workers=workers,
        digest=not no_digest,
        overwrite=overwrite,
        progress=progress,
        rank=here,
        world_size=world,
        memory=memory,
        allow_nonfinite=allow_nonfinite,
        verify_source=verify_source,
        verify_progress=verifying,
    )


def print_stream(
    doing: str,
    stream: Callable[[WriteOptions], "Streamed"],
    *,
    as_json: bool,
    debug: bool,
    **settings: Any,
) -> None:
    """What a command does that streams a checkpoint to the Hub; see `run_and_report`.

    Args:
        doing: for the progress.
        stream: plans, writes and sends.
        as_json, debug: the command's options.
        settings: likewise, see `_write_options`.
    """
    with exit_codes(debug=debug):
        with byte_progresses("verifying", doing) as (verifying, progress), terminated_as_interrupted():
            options = _write_options(progress, verifying, **settings)
            streamed = stream(options)
        size = f"{format_bytes(sum(streamed.files.values()))} in {_count(len(streamed.files), 'file')}"
        if as_json:
            described = {name: value for name, value in vars(streamed).items() if name != "plan"}
            print_json({**described, "dry_run": streamed.url is None})
            return
        console = make_console()
        if streamed.url is None:
            console.print(_plan_table(streamed.plan.tensors))
        for note in streamed.notes:
            console.print(f"- {printable(shown(note))}")
        if streamed.removed:
            console.print(f"- Removed there: {printable(', '.join(streamed.removed))}.")
        disk = f"{format_bytes(streamed.disk)} of this disk at a time"
        if streamed.url is None:
            console.print(f"Would send {size} to {streamed.repo_id}, with at most {disk}.")
        else:
            console.print(f"Sent {size} to {streamed.url}, with at most {disk}.")


def run_and_report(
    doing: str,
    out: Path,
    write: Callable[[WriteOptions], CheckpointResult],
    *,
    workers: int,
    memory: str,
    max_shard_size: str,
    overwrite: bool,
    no_digest: bool,
    verify_source: bool,
    as_json: bool,
    debug: bool,
    dry_run: bool = False,
    allow_nonfinite: bool = False,
    rank: int | None = None,
    world_size: int | None = None,
    describe: Callable[[Any, Path, WriteOptions], dict[str, Any]] = describe_result,
    show: Callable[[Any, Path, WriteOptions], None] = print_result,
) -> None:
    """What every command does that writes a checkpoint: progress, one-line errors, ranks, and a report.

    Args:
        doing: for the progress, for example `converting`.
        out: folder to write.
        write: plans and writes.
        workers, memory, max_shard_size, overwrite, no_digest, verify_source, as_json, debug, dry_run: the command's
            options.
        allow_nonfinite, rank, world_size: likewise, of the commands that have them.
        describe: the result as JSON.
        show: the result for people.
    """
    with exit_codes(debug=debug):
        if re.match(r"[A-Za-z][\w+.-]+:/", str(out)) and not out.exists():  # a path has lost one of the slashes
            raise CheckpointError(f"{str(out).partition(':')[0]}://: an output has to be a folder of this machine.")
        with byte_progresses("verifying", doing) as (verifying, progress):
            options = _write_options(
                progress,
                verifying,
                workers=workers,
                memory=memory,
                max_shard_size=max_shard_size,
                overwrite=overwrite,
                no_digest=no_digest,
                verify_source=verify_source,
                allow_nonfinite=allow_nonfinite,
                rank=rank,
                world_size=world_size,
            )
            here, world = options.rank, options.world_size
            if dry_run and here > 0:
                print(f"rank {here} of {world}: rank 0 shows the plan.", file=sys.stderr)
                return
            known = Ranks(out, here, 1 if dry_run else world, patience=options.patience)
            with terminated_as_interrupted(), known as ranks:
                result = write(replace(options, ranks=ranks))
        if here > 0:  # one of them speaks for all, when all is done
            return
        if as_json:
            print_json(describe(result, out, options))
        else:
            show(result, out, options)


def _plan_table(tensors: Iterable[TensorPlan]) -> Table:
    """The plan, with the layers that are made alike in one line."""
    groups: dict[tuple[str, str, str], list[TensorPlan]] = {}
    for tensor in tensors:
        name = printable(re.sub(_SAID_ANYWAY, "", re.sub(r"layers\.\d+", "layers.*", tensor.name)))
        pieces = [re.sub(r"\(.+\)", "(source)", piece) for piece in _pieces(tensor)]
        groups.setdefault((name, "x".join(map(str, tensor.shape)), "\n".join(pieces)), []).append(tensor)
    table = Table("weight", "count", "shape", "size", "made of", title="Plan", title_justify="left")
    table.columns[0].overflow = "fold"
    table.columns[0].min_width = min(_NAME_WIDTH, max(len(name) for name, *_ in groups))
    for column in table.columns[1:4]:  # numbers stay readable on a narrow terminal
        column.no_wrap = True
    for (name, shape, made_of), members in groups.items():
        table.add_row(name, str(len(members)), shape, format_bytes(sum(t.nbytes for t in members)), made_of)
    return table


def _pieces(tensor: TensorPlan) -> list[str]:
    """What a tensor is made of, each kind once, with the symbols that need data as symbols."""
    return list(dict.fromkeys(printable(piece.describe()) for piece in tensor.pieces))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
