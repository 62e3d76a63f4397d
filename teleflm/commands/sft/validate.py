# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm sft validate`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teleflm.terminal import EXIT_NO, Debug, Json, byte_progress, exit_codes, make_console, print_json

from .labelling import (
    AllTokens,
    LastTurn,
    MaxCompletion,
    MaxLength,
    NumProc,
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
    from sft.data.validate import ValidationReport

Data = Annotated[
    list[str], typer.Argument(metavar="DATA...", help="Files (.jsonl, .json, .parquet, .gz) or OWNER/NAME[:SPLIT].")
]
MaybeModel = Annotated[str | None, typer.Option(metavar="PATH", help="Also judge by this model's tokenizer.")]
Rejects = Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Write rejected rows and reasons here.")]


def validate(
    data: Data,
    rejects: Rejects = None,
    model: MaybeModel = None,
    chat_template_path: Template = None,
    max_length: MaxLength = 0,
    last_turn_only: LastTurn = False,
    all_tokens: AllTokens = False,
    sanitize_control_tokens: Sanitize = False,
    num_proc: NumProc = 1,
    trainer: TrainerName = None,
    reward_funcs: RewardFuncs = None,
    max_completion_length: MaxCompletion = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Judge every row as training would. Exit status 3 if any is rejected, or none is left to train on."""
    from sft.data.examples import validate_examples
    from sft.data.validate import validate_conversations

    with exit_codes(debug=debug):
        if model is None and (max_length or last_turn_only or all_tokens or chat_template_path):
            raise ValueError("only a tokenizer can tell lengths and turns: give --model as well.")
        given = {"--last-turn-only": last_turn_only, "--all-tokens": all_tokens, "--num-proc": num_proc > 1}
        given |= {"--sanitize-control-tokens": sanitize_control_tokens}
        kind = choose_trainer(trainer, data, [name for name, value in given.items() if value])
        if kind == "grpo" and max_length:
            raise ValueError("--max-length does nothing for trainer grpo; its key is --max-completion-length.")
        judge = make_judge(kind, reward_funcs, max_completion_length, model)
        # What the other trainers learn from is not marked by the chat template.
        unmarked = all_tokens or kind != "sft"
        tokenizer = load_checked_tokenizer(model, chat_template_path, unmarked, last_turn_only) if model else None
        with byte_progress("validating") as progress:
            if judge:
                report = validate_examples(
                    data, judge, tokenizer, max_length or None, rejects=rejects, progress=progress
                )
            else:
                labelling = make_labelling(max_length, last_turn_only, all_tokens, sanitize_control_tokens)
                report = validate_conversations(
                    data, tokenizer, labelling, rejects=rejects, num_proc=num_proc, progress=progress
                )
        if as_json:
            print_json({**asdict(report), "valid": report.valid, "trainer": kind})
        else:
            unjudged = []
            if kind == "grpo" and not reward_funcs:
                unjudged.append("what reward functions need of a row (--reward-funcs)")
            if kind == "grpo" and not max_completion_length:
                unjudged.append("whether there is room for a completion (--model and --max-completion-length)")
            _print_validation(report, rejects, kind, judge.what if judge else "conversations", unjudged)
    if not report.valid:
        raise typer.Exit(EXIT_NO)


def _print_validation(
    report: "ValidationReport", rejects: Path | None, kind: str, what: str, unjudged: list[str]
) -> None:
    from rich.table import Table

    from sft.data.examples import reason
    from sft.data.preview import visible

    console = make_console()
    if report.findings:
        table = Table("reason", "rows", "what it means", "for example", title="Rejected rows", title_justify="left")
        for code, finding in sorted(report.findings.items(), key=lambda item: -item[1].rows):
            table.add_row(code, f"{finding.rows:,}", reason(code), visible(finding.examples[0]))
        console.print(table, soft_wrap=False)
    if dropped := report.dropped.rows:
        first = visible(report.dropped.examples[0])
        console.print(f"{dropped:,} valid rows are dropped, max_length leaves no trained token of them: {first}")
    line = f"{report.rows - report.rejected - dropped:,} of {report.rows:,} rows can be trained on"
    if report.tokens is not None:
        trained = f"{report.trained_tokens:,} trained of " if kind != "grpo" else ""
        line += f": {trained}{report.tokens:,} tokens, {report.truncated:,} rows cut"
    console.print(f"{line}." if report.rows else "No rows.")
    if kind != "sft":
        console.print(f"Judged as {what}, for trainer {kind}; --trainer judges otherwise.", style="dim")
    if unjudged:
        console.print(f"Not judged: {'; '.join(unjudged)}.", style="dim")
    if report.tokens is None and kind != "grpo":
        console.print("Lengths were not judged; --model PATH --max-length N does.", style="dim")
    if rejects and (report.rejected or dropped):
        console.print(f"Rejects: {rejects}")


__all__ = ["validate"]
