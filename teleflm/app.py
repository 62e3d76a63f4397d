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
from teleflm.commands.doctor import doctor
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
from teleflm.terminal import EXIT_BAD_INPUT, FORWARDED, fail, failures_named, prepare_stdout

_UsageError: Any = typer.BadParameter.__base__  # which typer itself does not name

app = typer.Typer(
    help="Load, convert, grow, fine-tune and publish Tele-FLM models.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
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
app.command()(doctor)
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
    sys.exit(status or 0)


def _exit_status() -> Any:
    try:
        return app(prog_name="teleflm", standalone_mode=False)
    except SystemExit as end:  # of completion, which knows no other mode
        return end.code
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            return EXIT_BAD_INPUT
        fail(_usage_line(error), EXIT_BAD_INPUT)


def _usage_line(error: Any) -> str:
    """What is wrong with a command line, in one line like every other error, and where its help is."""
    message = " ".join(error.format_message().split())
    path = error.ctx.command_path if error.ctx else "teleflm"
    return f"{message.removesuffix('.')}; see {path} --help."
