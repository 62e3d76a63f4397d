# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm grow-plan`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conversion.checkpoint.errors import CheckpointError, printable
from conversion.checkpoint.sizes import format_bytes
from teleflm.terminal import EXIT_NO, Debug, Json, exit_codes, make_console, print_json

if TYPE_CHECKING:
    from growth.stages import StageCost, StagePlan

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def grow_plan(
    schedule: Annotated[str, typer.Argument(metavar="SCHEDULE", help="A YAML file of stages, or tele-flm-1t.")],
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of each GPU; the schedule's unless given.")
    ] = None,
    gpu_tflops: Annotated[float | None, typer.Option(help="Peak of a GPU in bfloat16; 312 is an A100's.")] = None,
    mfu: Annotated[float | None, typer.Option(help="Share of the peak that training reaches.")] = None,
    disk_speed: Annotated[str | None, typer.Option(metavar="SIZE", help="Bytes read and written in a second.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw parameters over FLOPs.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What growing in stages takes, from sizes alone: FLOPs, hours, memory, disk; beside the last model from nothing.

    --json has, for each stage, the keys of teleflm train that it decides (train). Exit status 3 if a stage does not fit
    its GPUs.
    """
    from growth.stages import find_schedule, plan_stages, read_schedule, run_keys

    with exit_codes(debug=debug):
        path = find_schedule(schedule)
        given = {"gpu_memory": gpu_memory, "gpu_tflops": gpu_tflops, "mfu": mfu, "disk_speed": disk_speed}
        values = _read_yaml(path)
        if isinstance(values, dict):
            values = {**values, **{key: value for key, value in given.items() if value is not None}}
        result = plan_stages(read_schedule(values, str(path)))
        if plot:
            from teleflm.reports.stages import plot_stages

            plot_stages(result, plot)
        if as_json:
            keys = [run_keys(result.schedule, index) for index in range(len(result.stages))]
            print_json({**asdict(result), "saved": result.saved, "train": keys})
        else:
            _print(result)
        if any(cost.gpu_bytes > result.schedule.gpu_memory for cost in result.stages):
            raise typer.Exit(EXIT_NO)


def _read_yaml(path: Path) -> Any:
    import yaml

    from sft.yaml_text import load_yaml

    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except yaml.YAMLError as error:
        raise CheckpointError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def _print(result: "StagePlan") -> None:
    from rich.table import Table

    console = make_console()
    tables = (
        Table("stage", "parameters", "times", "tokens", "steps", "masks", "warm-up"),
        Table("stage", "peak lr", "of matrices", "FLOPs", "GPU hours", "days"),
        Table("stage", "tp x pp x dp", "state of a GPU", "activations"),
        Table("stage", "checkpoint", "moved to grow", "in"),
    )
    for table in tables:
        for column in table.columns[1:]:
            column.justify, column.no_wrap = "right", True
        table.columns[0].overflow = "fold"
    for cost in result.stages:
        for table, row in zip(tables, _rows(cost), strict=True):
            table.add_row(printable(cost.stage.name), *row)
    for table in tables:
        console.print(table)
    if result.schedule.note:
        console.print(f"- {printable(result.schedule.note)}")
    for cost in result.stages:
        name = printable(cost.stage.name)
        if cost.stage.note:
            console.print(f"- {name}: {printable(cost.stage.note)}.")
        for warning in cost.warnings:
            console.print(f"- {name}: warning: {printable(warning)}.")
    console.print(_comparison(result))


def _rows(cost: "StageCost") -> tuple[list[str], ...]:
    """A row for each table."""
    stage, grows = cost.stage, cost.growth_bytes > 0
    return (
        [
            f"{cost.parameters / 1e9:,.1f} B",
            f"{cost.growth_factor:.2f}" if grows else "",
            _tokens(stage.tokens),
            f"{cost.steps:,}",
            f"{stage.mask_steps:,}" if stage.mask_steps else "",
            f"{stage.warmup_steps:,}" + (f", decay {stage.decay_steps:,}" if stage.decay_steps else ""),
        ],
        [
            f"{stage.learning_rate:.3g}",
            f"{cost.matrix_learning_rate:.3g}",
            f"{cost.flops:.2e}",
            f"{cost.gpu_hours:,.0f}",
            f"{cost.days:,.1f}",
        ],
        [
            f"{stage.tensor_parallel} x {stage.pipeline_parallel} x {cost.data_parallel}",
            format_bytes(cost.state_bytes),
            format_bytes(cost.activation_bytes),
        ],
        [
            format_bytes(cost.checkpoint_bytes),
            format_bytes(cost.growth_bytes) if grows else "",
            _duration(cost.growth_seconds) if grows else "",
        ],
    )


def _tokens(count: float) -> str:
    size, unit = next(((size, unit) for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if count >= size), (1, ""))
    return f"{count / size:,.3g} {unit}".strip()


def _duration(seconds: float) -> str:
    if seconds < _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 2 * _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds / _HOUR:.1f} h" if seconds < 2 * _DAY else f"{seconds / _DAY:.1f} days"


def _comparison(result: "StagePlan") -> str:
    last = printable(result.stages[-1].stage.name)
    return (
        f"In all {_tokens(result.tokens)} tokens, {result.flops:.2e} FLOPs, {result.gpu_hours:,.0f} GPU hours at "
        f"{result.schedule.mfu:.0%} of {result.schedule.gpu_tflops:g} TFLOPS. {last} from nothing on as many tokens: "
        f"{result.scratch_flops:.2e} FLOPs, {result.scratch_gpu_hours:,.0f} GPU hours, of which growing saves "
        f"{result.saved:.0%}; with as many FLOPs it would see {_tokens(result.scratch_tokens)} tokens. Whether it "
        "would be as good no plan can say."
    )


__all__ = ["grow_plan"]
