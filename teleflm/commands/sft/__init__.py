# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The commands `teleflm sft ...`."""

import typer

from teleflm.terminal import FORWARDED

from .export import export
from .plan import plan
from .prepare import prepare
from .preview import preview
from .recipes import recipes
from .report import report
from .select import select
from .train import train
from .validate import validate

app = typer.Typer(help="Fine-tune a Tele-FLM on conversations.", no_args_is_help=True)
app.command()(validate)
app.command()(select)
app.command()(prepare)
app.command()(preview)
app.command()(recipes)
app.command()(plan)
app.command(context_settings=FORWARDED)(train)
app.command()(report)
app.command()(export)
