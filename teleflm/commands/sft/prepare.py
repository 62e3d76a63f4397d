# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm sft prepare`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from teleflm.terminal import (
    Debug,
    Json,
    Rank,
    WorldSize,
    byte_progress,
    exit_codes,
    print_json,
    process_rank,
)

from .labelling import (
    AllTokens,
    LastTurn,
    MaxLength,
    Model,
    NumProc,
    OneData,
    Sanitize,
    Template,
    load_checked_tokenizer,
    make_labelling,
)

Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; a recipe's data_files may name it.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the prepared folder OUT.")]
AllowRejects = Annotated[bool, typer.Option("--allow-rejects", help="Leave invalid rows out instead of stopping.")]


def prepare(
    data: OneData,
    out: Out,
    model: Model,
    chat_template_path: Template = None,
    max_length: MaxLength = 2048,
    last_turn_only: LastTurn = False,
    all_tokens: AllTokens = False,
    sanitize_control_tokens: Sanitize = False,
    allow_rejects: AllowRejects = False,
    num_proc: NumProc = 1,
    rank: Rank = None,
    world_size: WorldSize = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tokenize conversations once, to disk; a recipe trains from there with data_files: OUT.

    Started by torchrun or srun, or with --rank and --world-size, several processes share the work. Killed, it goes on.
    """
    from sft.data.prepare import prepare as prepare_to_disk

    with exit_codes(debug=debug):
        here, world = process_rank(rank, world_size)
        tokenizer = load_checked_tokenizer(model, chat_template_path, all_tokens, last_turn_only)
        labelling = make_labelling(max_length, last_turn_only, all_tokens, sanitize_control_tokens)
        with byte_progress("preparing") as progress, _no_bars():
            prepared = prepare_to_disk(
                data,
                out,
                tokenizer,
                labelling,
                allow_rejects=allow_rejects,
                overwrite=overwrite,
                num_proc=num_proc,
                progress=progress,
                rank=here,
                world_size=world,
            )
        if here:  # one line of all
            return
        if as_json:
            print_json(asdict(prepared))
        else:
            print(f"{prepared.folder}: {prepared.report}")


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bars of `datasets`, which know nothing of `--json` and of terminals."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bar()


__all__ = ["prepare"]
