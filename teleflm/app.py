# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The front door: `teleflm`, also `python -m teleflm`. Every command is a call of a documented Python function."""

import sys
from typing import Annotated, Any

import typer

from teleflm.commands.chat import chat
from teleflm.commands.convert import convert
from teleflm.commands.eval import evaluate
from teleflm.commands.export import export
from teleflm.commands.fold import fold
from teleflm.commands.grow import grow
from teleflm.commands.grow_plan import grow_plan
from teleflm.commands.inspect import inspect
from teleflm.commands.publish import publish
from teleflm.commands.sft import app as sft_app
from teleflm.commands.train import train
from teleflm.commands.verify import verify
from teleflm.terminal import FORWARDED, failures_named, prepare_stdout

app = typer.Typer(
    help="Load, convert, grow, fine-tune and publish Tele-FLM models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(inspect)
app.command()(convert)
app.command()(export)
app.command()(grow)
app.command("grow-plan")(grow_plan)
app.command()(fold)
app.command()(verify)
app.command(context_settings=FORWARDED)(train)
app.command("eval")(evaluate)
app.command()(chat)
app.command()(publish)
app.add_typer(sft_app, name="sft")


def _print_version(wanted: bool) -> None:
    if wanted:
        from conversion.checkpoint.manifest import package_version

        print(f"teleflm {package_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    prepare_stdout()
    try:
        with failures_named(debug="--debug" in sys.argv):  # in --help and --version too, where no command is called
            status = _exit_status()
    except typer.Exit as end:
        status = end.exit_code
    sys.exit(status)


def _exit_status() -> Any:
    try:
        app(prog_name="teleflm")
    except SystemExit as end:
        return end.code
    return 0
