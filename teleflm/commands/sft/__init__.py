# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The commands `teleflm sft ...`."""

import typer

from teleflm.commands.sft.data import plan, prepare, preview, validate
from teleflm.commands.sft.select import select
from teleflm.commands.sft.train import export, train

app = typer.Typer(help="Fine-tune a Tele-FLM on conversations.", no_args_is_help=True)
app.command()(validate)
app.command()(select)
app.command()(prepare)
app.command()(preview)
app.command()(plan)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)
app.command()(export)
