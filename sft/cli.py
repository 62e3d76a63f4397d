# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The commands `teleflm sft ...`."""

from typing import Annotated

import typer

app = typer.Typer(help="Fine-tune a Tele-FLM on conversations.", no_args_is_help=True)


@app.callback()
def _commands() -> None:
    """Keep `train` a sub-command: an app of one command would be that command itself."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[str, typer.Option(metavar="RECIPE.yaml", help="A recipe; sft/recipes has some to start from.")],
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Fine-tune a model as a recipe says.

    Any key of the recipe can be given as --key value. On several devices: accelerate launch -m sft.train with the same
    arguments.
    """
    from sft.train import run

    raise typer.Exit(run(config, context.args, as_json=json, debug=debug))
