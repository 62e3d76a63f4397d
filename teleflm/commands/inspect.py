# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm inspect`."""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conversion.checkpoint.limits import DEFAULT_MEMORY
from conversion.checkpoint.sizes import format_bytes
from teleflm.terminal import (
    DEFAULT_WORKERS,
    EXIT_NO,
    Debug,
    Json,
    Memory,
    Workers,
    byte_progress,
    exit_codes,
    make_console,
    print_json,
)

if TYPE_CHECKING:
    from conversion.inspect import Inspection

Path_ = Annotated[
    str, typer.Argument(metavar="PATH", help="Folder of a checkpoint, or one weight file; a URL of such; or a preset.")
]
Check = Annotated[
    bool,
    typer.Option("--check", help="Read all of it and compare it with its record."),
]


def inspect(
    path: Path_,
    check: Check = False,
    workers: Workers = DEFAULT_WORKERS,
    memory: Memory = DEFAULT_MEMORY,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a checkpoint is: architecture, parameters, files, record, problems."""
    with exit_codes(debug=debug):
        inspection = _inspect_preset(path, check) or _inspect(path, check, workers, memory)
        if as_json:
            print_json(_describe(inspection))
        else:
            _print_inspection(inspection)
    if inspection.damages:
        raise typer.Exit(EXIT_NO)


def _inspect(path: str, check: bool, workers: int, memory: str) -> "Inspection":
    from conversion.inspect import inspect_checkpoint

    with byte_progress("checking") as progress:
        return inspect_checkpoint(path, check=check, workers=workers, memory=memory, progress=progress)


def _inspect_preset(name: str, check: bool) -> "Inspection | None":
    """What a checkpoint of a preset is; None if the name is none's."""
    from conversion.checkpoint.errors import CheckpointError
    from conversion.hollow import hollow_checkpoint, is_preset
    from conversion.inspect import inspect_checkpoint

    if not is_preset(name):
        return None
    if check:
        raise CheckpointError(f"--check: {name} is a preset, which has no weights to read; give a folder.")
    with hollow_checkpoint(name) as folder:
        inspection = inspect_checkpoint(folder)
    note = "This is a preset: there are no weights here, and the files are what a checkpoint in bfloat16 would have."
    return replace(inspection, folder=name, lineage=[], chain=(), warnings=(note, *inspection.warnings))


def _describe(inspection: "Inspection") -> dict[str, Any]:
    """The inspection as one JSON object, with the numbers that follow from the architecture."""
    architecture = inspection.architecture
    derived: dict[str, Any] = {"logit_scale": architecture.logit_scale} if architecture else {}
    if inspection.experts:
        derived["active_parameters"] = inspection.experts.num_active_parameters
    return {**asdict(inspection), **derived}


def _print_inspection(inspection: "Inspection") -> None:
    from rich.table import Table
    from rich.text import Text

    from conversion.checkpoint.errors import printable

    console = make_console()
    table = Table(show_header=False, title=inspection.folder, title_justify="left")
    table.add_row("model type", inspection.model_type or "unknown: no configuration")
    if inspection.parallel is not None:
        step = f", iteration {inspection.iteration}" if inspection.iteration is not None else ""
        table.add_row("training run", f"{inspection.format}, {inspection.parallel}{step}")
    experts = inspection.experts
    active = f", of which {experts.num_active_parameters:,} compute a token" if experts else ""
    table.add_row("parameters", f"{inspection.parameters:,}{active}")
    table.add_row("dtypes", ", ".join(f"{name} ({count} tensors)" for name, count in inspection.dtypes.items()))
    if inspection.quantised:
        table.add_row("quantised", printable(inspection.quantised))
    sizes = inspection.files.values()
    table.add_row(
        "weights", f"{format_bytes(sum(sizes))} in {len(sizes)} {inspection.format} file{'s' * (len(sizes) != 1)}"
    )
    if inspection.architecture:
        a = inspection.architecture
        table.add_row("layers", f"{a.num_hidden_layers}")
        table.add_row("hidden size", f"{a.hidden_size:,}, feed-forward {a.intermediate_size:,}")
        if experts:
            top = experts.num_experts_per_tok
            chosen = f"{top} of which {'computes' if top == 1 else 'compute'} a token"
            table.add_row("experts", f"{experts.num_local_experts} in each layer, {chosen}")
        table.add_row("heads", f"{a.num_attention_heads} of {a.head_dim}, {a.num_key_value_heads} key/value")
        table.add_row("multipliers", f"embeddings x {a.embedding_scale:g}, logits x {a.logit_scale:g}")
        unit = "token ids" if experts or inspection.model_type == "llama" else "pieces"
        pieces = f", {inspection.pieces:,} {unit}" if inspection.pieces else ", no tokenizer"
        padding = f", {inspection.padding_rows:,} rows of padding" if inspection.padding_rows else ""
        padding = ", padding included" if inspection.parallel is not None else padding
        table.add_row("vocabulary", f"{a.vocab_size:,} rows{pieces}{padding}")
    console.print(table, soft_wrap=False)
    for number, link in enumerate(inspection.chain, 1):
        record = f" [record {link.record[:12]}]" if link.record else ""
        console.print(Text(printable(f"{number}. {link.step}{record}")))
        for problem in link.problems:
            console.print(Text.assemble(("   broken", "bold red"), printable(f" here: {problem}.")))
    for warning in inspection.warnings:
        console.print(Text.assemble(("warning", "bold yellow"), f" {warning}"))
    if inspection.refused:
        console.print(Text(printable(f"Copied, and neither grown nor exported: {inspection.refused}.")))
    for problem in inspection.problems:
        console.print(Text.assemble(("problem", "bold red"), f" {problem}"))
    for damage in inspection.damages or []:
        console.print(Text.assemble(("damaged", "bold red"), printable(f" {damage}.")))
    if inspection.damages == []:
        others = "the others were not looked at" if inspection.alone else "no other file would be loaded"
        files = f"{inspection.checked_files} file{'s' * (inspection.checked_files != 1)}, and {others}."
        if not inspection.checked_tensors:
            console.print("The record has no digests of tensors: of these, types, places and samples were compared.")
            console.print(f"They are what it says, and so is all else in its {files}")
        else:
            console.print("Every tensor has its digest.")
            if inspection.checked_files:
                console.print(f"So has all else in its {files}")
