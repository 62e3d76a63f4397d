# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm sft plan`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conversion.checkpoint.sizes import format_bytes
from teleflm.terminal import EXIT_NO, Debug, Json, exit_codes, make_console, print_json

if TYPE_CHECKING:
    from sft.plan import Plan


def plan(
    model: Annotated[str, typer.Option(metavar="PATH|PRESET", help="A folder with config.json, or a preset.")],
    method: Annotated[str, typer.Option(help="full, lora or qlora.")] = "full",
    gpus: Annotated[int, typer.Option(help="How many GPUs.", min=1)] = 8,
    gpu_memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory of each.")] = "80GB",
    strategy: Annotated[
        str | None, typer.Option(help="fsdp2, zero3 or ddp; fsdp2 unless given, and ddp for qlora.")
    ] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Rows a GPU computes with at once; 1 unless given.", min=1)
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a row.", min=1)] = 2048,
    activation_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--activation-checkpointing/--no-activation-checkpointing",
            help="Compute layers again going backward; yes unless given.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the loaded weights: bfloat16 or float32; bfloat16 unless given.")
    ] = None,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters.", min=1)] = 16,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on, all epochs together.", min=1)] = None,
    gpu_tflops: Annotated[float, typer.Option(help="Assumed peak of a GPU in bfloat16; 312 is an A100's.")] = 312.0,
    mfu: Annotated[float, typer.Option(help="Assumed share of the peak that is reached.")] = 0.35,
    write: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write a recipe, the file for accelerate launch and the command there."),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="With --write: conversations to train on.")
    ] = None,
    output_dir: Annotated[str | None, typer.Option(help="With --write: of the run; FOLDER/run unless given.")] = None,
    global_batch_size: Annotated[
        int | None, typer.Option(help="With --write: rows of a step, over all GPUs; 128 unless given.", min=1)
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="With --write: machines with as many GPUs each.", min=1)] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --write: replace the three files in FOLDER.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Estimate memory and time of a run, from sizes alone. Exit status 3 if it does not fit.

    With --write what is not given is chosen so that it fits: strategy, micro-batch, activation checkpointing, dtype. If
    nothing does, the exit status is 2, and nothing is written.
    """
    from conversion.checkpoint.numbers import parse_size
    from sft import plan as planning
    from sft import plan_files

    with exit_codes(debug=debug):
        weight_bytes = {None: None, "bfloat16": 2, "float32": 4}.get(dtype, 0)
        if weight_bytes == 0:
            raise ValueError(f"dtype is {dtype!r}; expected bfloat16 or float32.")
        _check_used_with_write(
            write, data=data, output_dir=output_dir, global_batch_size=global_batch_size, nodes=nodes
        )
        setup = planning.Setup(
            method=method,  # type: ignore[arg-type]  # checked there, with a line of its own
            gpus=gpus,
            strategy=strategy or ("ddp" if method == "qlora" else "fsdp2"),  # type: ignore[arg-type]
            micro_batch_size=micro_batch_size or 1,
            max_length=max_length,
            activation_checkpointing=activation_checkpointing is not False,
            weight_bytes=weight_bytes or 2,
            lora_rank=lora_rank,
        )
        architecture, memory = planning.load_architecture(model), parse_size(gpu_memory)
        files: tuple[Path, ...] = ()
        if write:
            rows = global_batch_size or plan_files.GLOBAL_BATCH_SIZE
            chosen = plan_files.choose_setup(
                architecture,
                setup,
                memory,
                global_batch_size=rows,
                strategy=strategy,  # type: ignore[arg-type]
                micro_batch_size=micro_batch_size,
                activation_checkpointing=activation_checkpointing,
                weight_bytes=weight_bytes,
            )
            run = plan_files.Run(
                model=model,
                data_files=data or (),
                output_dir=output_dir,
                global_batch_size=rows,
                nodes=nodes or 1,
            )
            files = plan_files.write_run(chosen, run, write, overwrite=overwrite)
            setup = chosen.setup
        result = planning.plan_training(architecture, setup, memory, gpu_tflops=gpu_tflops, mfu=mfu)
        if as_json:
            more = {"files": [str(path) for path in files]} if files else {}
            print_json({**planning.describe(result), "hours": _hours(result, tokens) if tokens else None, **more})
        else:
            _print_plan(result, tokens)
            for path in files:
                print(path)
            if files:
                print(f"To start it: {plan_files.command_of(files[-1])}")
    if not result.fits:
        raise typer.Exit(EXIT_NO)


def _check_used_with_write(write: Path | None, **options: object) -> None:
    for name, value in options.items():
        if value and not write:
            raise ValueError(f"--{name.replace('_', '-')} has no effect here; it needs --write FOLDER.")


def _print_plan(plan: "Plan", tokens: int | None) -> None:
    from rich.table import Table
    from rich.text import Text

    console, setup = make_console(), plan.setup
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
        console.print("It fits.", style="bold green")
        return
    more = " What would:" if plan.alternatives else ""
    console.print(Text.assemble(("It does not fit.", "bold red"), more))
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


__all__ = ["plan"]
