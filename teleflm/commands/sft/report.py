# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm sft report`."""

from pathlib import Path
from typing import Annotated

import typer

from teleflm.terminal import Debug, Json, exit_codes, print_json

Run = Annotated[Path, typer.Argument(metavar="OUT", help="output_dir of a run, or a checkpoint-N in it.")]
Output = Annotated[
    Path | None, typer.Option(metavar="FILE.html", help="Write the page there, and no loss.png; else into OUT.")
]


def report(run: Run, output: Output = None, as_json: Json = False, debug: Debug = False) -> None:
    """Draw the loss and the page of a run: finished, interrupted, or going on.

    Writes OUT/training_report.html and OUT/loss.png from what the run has logged so far; of a checkpoint-N beside it,
    as training_report-checkpoint-N.html and loss-checkpoint-N.png.
    """
    from sft.training.run_log import read_history
    from teleflm.reports.page import check_page
    from teleflm.reports.run import write_loss, write_run_page

    with exit_codes(debug=debug):
        if output is not None:
            check_page(output, "run")
        history = read_history(run)
        picture = write_loss(history) if output is None else None
        page, history = write_run_page(run, output)
        if as_json:
            print_json(
                {
                    "page": str(page),
                    "loss": str(picture) if picture else None,
                    "status": history.status,
                    "step": history.step,
                    "sessions": len(history.sessions),
                }
            )
            return
        print(f"{page}: {history.status or 'no end recorded'}, step {history.step}")


__all__ = ["report"]
