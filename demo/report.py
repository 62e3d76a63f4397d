# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the demo shows: a bar for each step, a table of them all, and a plot of the losses."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


class Step:
    """A step under way: its bar, and what it came to."""

    def __init__(self, progress: Progress, title: str):
        self._progress = progress
        self._task = progress.add_task(title, total=None, note="")
        self.shown = self.number = ""

    def start(self, total: float) -> None:
        """Set the length of the bar."""
        self._progress.update(self._task, total=total, completed=0)

    def advance(self, by: float = 1) -> None:
        """Move the bar; from any thread."""
        self._progress.advance(self._task, by)

    def note(self, text: str) -> None:
        """Show a few words beside the bar."""
        self._progress.update(self._task, note=text)

    def result(self, shown: str, number: str) -> None:
        """Say what the step showed, and the number that shows it."""
        self.shown, self.number = shown, number

    def finish(self) -> None:
        """Fill the bar and put the number beside it."""
        self._progress.update(self._task, total=1, completed=1, note=self.number)


@dataclass(frozen=True)
class Finished:
    """A finished step."""

    title: str
    seconds: float
    shown: str
    number: str


class Report:
    """The steps of the demo, one after the other."""

    def __init__(self, console: Console):
        self.console = console
        self.steps: list[Finished] = []

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Show a bar while a step is under way."""
        columns = (
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<26}"),
            BarColumn(bar_width=32),
            TimeElapsedColumn(),
            TextColumn("[cyan]{task.fields[note]}"),
        )
        start = time.monotonic()
        with Progress(*columns, console=self.console, refresh_per_second=5) as progress:
            step = Step(progress, f"{len(self.steps) + 1} {title}")
            yield step
            step.finish()
        self.steps.append(Finished(title, time.monotonic() - start, step.shown, step.number))

    @property
    def seconds(self) -> float:
        """How long the steps took."""
        return sum(step.seconds for step in self.steps)

    def table(self) -> Table:
        """All steps: how long each took, what it showed, and the number that shows it."""
        table = Table(show_footer=True)
        table.add_column("Step", footer="Total")
        table.add_column("Seconds", footer=f"{self.seconds:.1f}", justify="right")
        table.add_column("Shown")
        table.add_column("Number", style="cyan")
        for number, step in enumerate(self.steps, 1):
            table.add_row(f"{number} {step.title}", f"{step.seconds:.1f}", step.shown, step.number)
        return table


# --- the plot ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A stretch of training in the plot: its name (what stands before a comma marks its beginning) and its log."""

    name: str
    log: Sequence[dict[str, float]]

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one quantity of the log."""
        points = [(entry["step"], entry[key]) for entry in self.log if key in entry]
        return [step for step, _ in points], [value for _, value in points]


def plot_losses(phases: Sequence[Phase], path: Path) -> None:
    """Draw the losses of consecutive phases of training, and where each begins, into a PNG."""
    figure = Figure(figsize=(10, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    begin = 0.0
    for index, phase in enumerate(phases):
        _draw_phase(axes, phase, begin, color=f"C{index}")
        begin += phase.curve("loss")[0][-1]
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)", title="The life of a small Tele-FLM")
    axes.margins(x=0.01)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="dots: held out, thin: training batches", frameon=False)
    figure.savefig(path)


def _draw_phase(axes: Axes, phase: Phase, begin: float, color: str) -> None:
    steps, losses = phase.curve("loss")
    axes.plot([begin + step for step in steps], losses, color=color, alpha=0.35, linewidth=0.8)
    steps, losses = phase.curve("eval_loss")
    axes.plot([begin + step for step in steps], losses, "o-", color=color, markersize=4, label=phase.name)
    if begin:
        axes.axvline(begin, color="0.4", linestyle="--", linewidth=1)
        axes.annotate(
            phase.name.partition(",")[0],
            (begin, 0.98),
            (-4, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            rotation=90,
            va="top",
            ha="right",
        )
