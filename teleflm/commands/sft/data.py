# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The commands `teleflm sft validate`, `prepare`, `preview` and `plan`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conversion.checkpoint.sizes import format_bytes
from teleflm.terminal import EXIT_NO, Debug, Json, Overwrite, byte_progress, exit_codes, print_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.data.checks import Reject
    from sft.data.labels import Labelling
    from sft.data.preview import PreviewedRow
    from sft.data.validate import ValidationReport
    from sft.plan import Plan

Data = Annotated[
    list[str], typer.Argument(metavar="DATA...", help="Files (.jsonl, .json, .parquet, .gz) or OWNER/NAME[:SPLIT].")
]
OneData = Annotated[str, typer.Argument(metavar="DATA", help="A file (.jsonl, .json, .parquet, .gz) or OWNER/NAME.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; a recipe's data_files may name it.")]
Model = Annotated[str, typer.Option(metavar="PATH", help="The model to train, for its tokenizer and chat template.")]
MaybeModel = Annotated[str | None, typer.Option(metavar="PATH", help="Also judge by this model's tokenizer.")]
Template = Annotated[
    str | None, typer.Option("--chat-template-path", metavar="FILE", help="Jinja file instead of the tokenizer's.")
]
MaxLength = Annotated[int, typer.Option(help="Tokens kept of a row; 0 keeps all. As in the recipe.", min=0)]
LastTurn = Annotated[bool, typer.Option("--last-turn-only", help="Train on each row's last answer alone.")]
AllTokens = Annotated[bool, typer.Option("--all-tokens", help="Train on every token (assistant_only_loss: false).")]
AllowRejects = Annotated[bool, typer.Option("--allow-rejects", help="Leave invalid rows out instead of stopping.")]
NumProc = Annotated[int, typer.Option(help="Processes that tokenize.", min=1)]
Rejects = Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Write rejected rows and reasons here.")]
Count = Annotated[int, typer.Option("-k", help="Rows to show.", min=1)]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a self-contained page as well.")]


def validate(
    data: Data,
    rejects: Rejects = None,
    model: MaybeModel = None,
    chat_template_path: Template = None,
    max_length: MaxLength = 0,
    last_turn_only: LastTurn = False,
    all_tokens: AllTokens = False,
    num_proc: NumProc = 1,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Judge every row as training would. Exit status 3 if any is rejected."""
    from sft.data.validate import validate_conversations

    with exit_codes(debug=debug):
        if model is None and (max_length or last_turn_only or all_tokens or chat_template_path):
            raise ValueError("only a tokenizer can tell lengths and turns: give --model as well.")
        tokenizer = _load(model, chat_template_path, all_tokens) if model else None
        labelling = _labelling(max_length, last_turn_only, all_tokens)
        with byte_progress("validating") as progress:
            report = validate_conversations(
                data, tokenizer, labelling, rejects=rejects, num_proc=num_proc, progress=progress
            )
        if as_json:
            print_json({**asdict(report), "valid": report.valid})
        else:
            _print_validation(report, rejects)
    if not report.valid:
        raise typer.Exit(EXIT_NO)


def prepare(
    data: OneData,
    out: Out,
    model: Model,
    chat_template_path: Template = None,
    max_length: MaxLength = 2048,
    last_turn_only: LastTurn = False,
    all_tokens: AllTokens = False,
    allow_rejects: AllowRejects = False,
    num_proc: NumProc = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tokenize conversations once, to disk; a recipe trains from there with data_files: OUT."""
    from sft.data.prepare import prepare as prepare_to_disk

    with exit_codes(debug=debug):
        tokenizer = _load(model, chat_template_path, all_tokens)
        labelling = _labelling(max_length, last_turn_only, all_tokens)
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
            )
        if as_json:
            print_json(asdict(prepared))
        else:
            print(f"{prepared.folder}: {prepared.report}")


def preview(
    data: OneData,
    model: Model,
    count: Count = 3,
    html: Html = None,
    chat_template_path: Template = None,
    max_length: MaxLength = 2048,
    last_turn_only: LastTurn = False,
    all_tokens: AllTokens = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show, in colour, what of the first rows is trained on."""
    from sft.data.preview import PreviewedRow
    from sft.data.preview import preview as preview_rows

    with exit_codes(debug=debug):
        tokenizer = _load(model, chat_template_path, all_tokens)
        rows = preview_rows(data, tokenizer, _labelling(max_length, last_turn_only, all_tokens), count)
        if html:
            from teleflm.reports.preview import render_html

            html.write_text(render_html(rows, title=Path(data).name), encoding="utf-8")
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


def plan(
    model: Annotated[str, typer.Option(metavar="PATH|PRESET", help="A folder with config.json, or a preset.")],
    method: Annotated[str, typer.Option(help="full, lora or qlora.")] = "full",
    gpus: Annotated[int, typer.Option(help="How many GPUs.", min=1)] = 8,
    gpu_memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory of each.")] = "80GB",
    strategy: Annotated[
        str | None, typer.Option(help="fsdp2, zero3 or ddp; fsdp2 unless given, and ddp for qlora.")
    ] = None,
    micro_batch_size: Annotated[int, typer.Option(help="Rows a GPU computes with at once.", min=1)] = 1,
    max_length: Annotated[int, typer.Option(help="Tokens of a row.", min=1)] = 2048,
    activation_checkpointing: Annotated[bool, typer.Option(help="Compute layers again going backward.")] = True,
    dtype: Annotated[str, typer.Option(help="Of the loaded weights: bfloat16 or float32.")] = "bfloat16",
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters.", min=1)] = 16,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on, all epochs together.", min=1)] = None,
    gpu_tflops: Annotated[float, typer.Option(help="Assumed peak of a GPU in bfloat16; 312 is an A100's.")] = 312.0,
    mfu: Annotated[float, typer.Option(help="Assumed share of the peak that is reached.")] = 0.35,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Estimate memory and time of a run, from sizes alone. Exit status 3 if it does not fit."""
    from conversion.checkpoint.containers import parse_size
    from sft import plan as planning

    with exit_codes(debug=debug):
        weight_bytes = {"bfloat16": 2, "float32": 4}.get(dtype)
        if weight_bytes is None:
            raise ValueError(f"dtype is {dtype!r}; expected bfloat16 or float32.")
        setup = planning.Setup(
            method=method,  # type: ignore[arg-type]  # checked there, with a line of its own
            gpus=gpus,
            strategy=strategy or ("ddp" if method == "qlora" else "fsdp2"),  # type: ignore[arg-type]
            micro_batch_size=micro_batch_size,
            max_length=max_length,
            activation_checkpointing=activation_checkpointing,
            weight_bytes=weight_bytes,
            lora_rank=lora_rank,
        )
        architecture = planning.load_architecture(model)
        result = planning.plan_training(architecture, setup, parse_size(gpu_memory), gpu_tflops=gpu_tflops, mfu=mfu)
        if as_json:
            print_json({**planning.describe(result), "hours": _hours(result, tokens) if tokens else None})
        else:
            _print_plan(result, tokens)
    if not result.fits:
        raise typer.Exit(EXIT_NO)


# --- what they share --------------------------------------------------------------------------------------------------


def _load(model: str, chat_template_path: str | None, all_tokens: bool) -> "PreTrainedTokenizerBase":
    """The tokenizer, with a template that ends what it lets the model learn."""
    from sft.tokenizer import check_stop_token, load_tokenizer

    tokenizer, stop_ids = load_tokenizer(model, chat_template_path)
    check_stop_token(tokenizer, stop_ids, assistant_only_loss=not all_tokens)
    return tokenizer


def _labelling(max_length: int, last_turn_only: bool, all_tokens: bool) -> "Labelling":
    from sft.data.labels import Labelling

    return Labelling(max_length or None, assistant_only_loss=not all_tokens, last_turn_only=last_turn_only)


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


def _print_validation(report: "ValidationReport", rejects: Path | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from sft.data.checks import REASONS
    from sft.data.preview import visible

    console = Console(highlight=False, soft_wrap=True)
    if report.findings:
        table = Table("reason", "rows", "what it means", "for example", title="Rejected rows", title_justify="left")
        for code, finding in sorted(report.findings.items(), key=lambda item: -item[1].rows):
            table.add_row(code, f"{finding.rows:,}", REASONS[code], escape(visible(finding.examples[0])))
        Console(highlight=False).print(table)
    line = f"{report.rows - report.rejected:,} of {report.rows:,} rows can be trained on"
    if report.tokens is not None:
        line += f": {report.trained_tokens:,} trained of {report.tokens:,} tokens, {report.truncated:,} rows cut"
    console.print(f"{line}." if report.rows else "No rows.", markup=False)
    if report.tokens is None:
        console.print("Lengths were not judged; --model PATH --max-length N does.", style="dim", markup=False)
    if rejects and report.rejected:
        console.print(f"Rejects: {rejects}", markup=False)


def _print_preview(rows: "Sequence[PreviewedRow | Reject]", html: Path | None) -> None:
    from rich.console import Console

    from sft.data.preview import PreviewedRow, render_text, visible

    console = Console(highlight=False)
    for row in rows:
        if isinstance(row, PreviewedRow):
            console.rule(str(row), align="left")
            console.print(render_text(row, marks=console.color_system is None), soft_wrap=True)
        else:
            console.print(visible(f"rejected {row}"), markup=False, style="red", soft_wrap=True)
    if html:
        console.print(f"Page: {html}", markup=False, soft_wrap=True)


def _print_plan(plan: "Plan", tokens: int | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console, setup = Console(highlight=False, soft_wrap=True), plan.setup
    table = Table("on each GPU", "memory", title=_title(plan), title_justify="left")
    for name, size in {**asdict(plan.memory), "total": plan.memory.total}.items():
        table.add_row(name, format_bytes(size), style="bold" if name == "total" else None)
    table.add_row("of", format_bytes(plan.gpu_memory))
    console.print(table)
    time = plan.time
    console.print(
        f"{time.flops_per_token / 1e9:,.0f} GFLOP a token; {time.tokens_per_second:,.0f} tokens a second, if "
        f"{setup.gpus} x {time.gpu_tflops:g} TFLOP/s reach {time.mfu:.0%} (assumed)."
    )
    tokens = tokens or 10**9
    hours = _hours(plan, tokens)
    console.print(f"{tokens:,} tokens: {hours:,.1f} hours, {hours * setup.gpus:,.0f} GPU hours.")
    if plan.fits:
        console.print("[bold green]It fits.")
        return
    console.print("[bold red]It does not fit.[/] What would:" if plan.alternatives else "[bold red]It does not fit.")
    for change, _, memory in plan.alternatives:
        console.print(f"- {change}: {format_bytes(memory.total)} on each GPU")


def _title(plan: "Plan") -> str:
    setup = plan.setup
    spread = "one GPU" if setup.gpus == 1 else f"{setup.gpus} GPUs, {setup.strategy}"
    checkpointing = "with" if setup.activation_checkpointing else "without"
    return (
        f"{setup.method}, {plan.trained_parameters:,} of {plan.parameters:,} parameters trained; {spread}; "
        f"{setup.micro_batch_size} x {setup.max_length} tokens, {checkpointing} activation checkpointing"
    )


def _hours(plan: "Plan", tokens: int) -> float:
    return tokens / plan.time.tokens_per_second / 3600


__all__ = ["plan", "prepare", "preview", "validate"]
