# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm sft preview`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teleflm.terminal import Debug, Json, exit_codes, make_console, print_json

from .labelling import (
    AllTokens,
    LastTurn,
    MaxCompletion,
    MaxLength,
    Model,
    OneData,
    RewardFuncs,
    Sanitize,
    Template,
    TrainerName,
    choose_trainer,
    load_checked_tokenizer,
    make_judge,
    make_labelling,
)

if TYPE_CHECKING:
    from sft.data.checks import Reject
    from sft.data.preview import PreviewedRow

Count = Annotated[int, typer.Option("-k", help="Rows to show.", min=1)]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a self-contained page as well.")]


def preview(
    data: OneData,
    model: Model,
    count: Count = 3,
    html: Html = None,
    chat_template_path: Template = None,
    max_length: MaxLength = 2048,
    last_turn_only: LastTurn = False,
    all_tokens: AllTokens = False,
    trainer: TrainerName = None,
    reward_funcs: RewardFuncs = None,
    max_completion_length: MaxCompletion = 0,
    sanitize_control_tokens: Sanitize = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show, in colour, what of the first rows is trained on."""
    from sft.data.examples import preview_examples
    from sft.data.preview import PreviewedRow
    from sft.data.preview import preview as preview_rows
    from teleflm.reports.page import check_page

    with exit_codes(debug=debug):
        if html:
            check_page(html, "preview")
        given = {"--last-turn-only": last_turn_only, "--all-tokens": all_tokens}
        given |= {"--sanitize-control-tokens": sanitize_control_tokens}
        kind = choose_trainer(trainer, data, [name for name, value in given.items() if value])
        judge = make_judge(kind, reward_funcs, max_completion_length, model)
        tokenizer = load_checked_tokenizer(model, chat_template_path, all_tokens or kind != "sft", last_turn_only)
        if judge:
            rows = preview_examples(data, judge, tokenizer, max_length or None, count)
        else:
            labelling = make_labelling(max_length, last_turn_only, all_tokens, sanitize_control_tokens)
            rows = preview_rows(data, tokenizer, labelling, count)
        if html:
            from conversion.checkpoint.atomic_file import write_atomically
            from teleflm.reports.preview import render_html

            write_atomically(html, render_html(rows, title=Path(data).name).encode())
        if as_json:
            kinds = {"rows": True, "rejects": False}
            print_json(
                {
                    name: [asdict(row) for row in rows if isinstance(row, PreviewedRow) is kind]
                    for name, kind in kinds.items()
                }
            )
        else:
            _print_preview(rows, html)


def _print_preview(rows: "Sequence[PreviewedRow | Reject]", html: Path | None) -> None:
    from sft.data.preview import PreviewedRow, render_text, visible

    console = make_console(soft_wrap=False)
    for row in rows:
        if isinstance(row, PreviewedRow):
            console.rule(str(row), align="left")
            console.print(render_text(row, marks=console.color_system is None), soft_wrap=True)
        else:
            console.print(visible(f"rejected {row}"), style="red", soft_wrap=True)
    if html:
        console.print(f"Page: {html}", soft_wrap=True)


__all__ = ["preview"]
