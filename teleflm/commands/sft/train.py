# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm sft train`."""

from typing import Annotated

import typer

from teleflm.terminal import Debug, Json

Config = Annotated[str, typer.Option(metavar="RECIPE", help="A YAML file, or a name of `teleflm sft recipes`.")]


def train(context: typer.Context, config: Config, as_json: Json = False, debug: Debug = False) -> None:
    """Fine-tune a model as a recipe says.

    Any key of the recipe can be given as --key value. OUT gets loss.png and training_report.html, also of a run that
    fails or is interrupted; sft report makes them while it goes on. On several devices: accelerate launch --no_python
    teleflm sft train, with the same arguments.
    """
    from sft.training.train import run
    from teleflm.reports.run import draw_page

    raise typer.Exit(run(config, context.args, as_json=as_json, debug=debug, pictures=[draw_page]))


__all__ = ["train"]
