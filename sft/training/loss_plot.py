# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The loss of a run as a picture, and its other numbers: what was logged, and no line where nothing was."""

import io
import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.checkpoint.atomic_file import write_atomically
from sft.training.run_log import RunHistory, Session, points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS_PLOT = "loss.png"
# How many points there have to be for a moving average, and which part of them it reaches to either side.
_LEAST, _REACH = 20, 0.03
_BLUE, _GREY, _ORANGE = "#2563eb", "#94a3b8", "#ea580c"
_COLORS = (_BLUE, _ORANGE, "#15803d", "#9333ea", "#0891b2", "#be123c", "#a16207", "#475569", "#db2777", "#4d7c0f")
SOURCE_PREFIX = "source_loss/"  # not loss/: trackers that keep a file for each number have one called loss
_RATES = ("learning_rate", "learning_rate_matrix")
# Key, label of the axis. What is not here is drawn under its own name.
_KNOWN = {
    "grad_norm": "norm of the gradient, before clipping",
    "tokens_per_second": "tokens per second, all processes",
}
_PAIRS = (
    ("rewards", ("rewards/chosen", "rewards/rejected"), "reward"),
    ("margins", ("rewards/margins",), "chosen - rejected reward"),
    ("accuracies", ("rewards/accuracies",), "share of pairs, chosen reward larger"),
)
# Of these the run has a plot of its own, or they say nothing that a plot would.
_LEFT_OUT = {
    "epoch",
    "num_tokens",
    "num_input_tokens_seen",
    "total_flos",
    "train_loss",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_tokens_per_second",
}
MOST_OTHERS = 40


def write_loss_plot(history: RunHistory, path: Path, *, dpi: int = 160) -> bool:
    """Write the loss of a run as PNG; whether there was any.

    Raises:
        OSError: it cannot be written.
    """
    if not (history.points("loss") or history.points("eval_loss")):
        return False
    write_atomically(path, png_of(loss_figure(history), dpi=dpi))
    return True


def png_of(figure: "Figure", *, dpi: int = 160) -> bytes:
    """A figure as PNG; the same bytes from the same numbers."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def loss_figure(history: RunHistory, *, width: float = 9.0) -> "Figure":
    """Loss and evaluation loss over steps, with a moving average; resumed steps and lost ones are marked.

    Args:
        history: of the run.
        width: in inches; text is as large in any.
    """
    figure, axes = _new_figure(width, 4.2 if width > 6 else 3.4)
    for number, session in enumerate(history.sessions):
        first = not any(points(earlier.logs, "loss") for earlier in history.sessions[:number])
        _draw(axes, points(session.logs, "loss"), _GREY, "loss" if first else "", linewidth=0.9)
        lost = points(session.lost, "loss")
        first = not any(points(earlier.lost, "loss") for earlier in history.sessions[:number])
        _draw(axes, lost, "#d97706", "not counted" if first else "", linewidth=0.9, linestyle=":")
    smooth = smoothed([point for session in history.sessions for point in points(session.logs, "loss")])
    if smooth:
        _draw_average(axes, history.sessions, smooth)
    evaluated = history.points("eval_loss")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o", color=_ORANGE, markersize=4.5, label="evaluation loss", zorder=4)
    _mark_resumes(axes, history)
    what = "loss (nats per token)" if history.facts.get("trainer", "sft") == "sft" else "loss"
    _finish(axes, what)
    return figure


def smoothed(values: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means of neighbouring points, as many before as after, so that a trend is not shifted; none of too few points.

    [`neighbours`] to either side, fewer at the ends. Points that are not finite are left out.
    """
    finite = [(step, value) for step, value in values if math.isfinite(value)]
    if len(finite) < _LEAST:
        return []
    sums = list(accumulate((value for _, value in finite), initial=0.0))
    result = []
    for index, (step, _) in enumerate(finite):
        reach = min(neighbours(len(finite)), index, len(finite) - 1 - index)
        result.append((step, (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)))
    return result


def neighbours(count: int) -> int:
    """How many points to either side the moving average of so many points takes in."""
    return max(2, round(_REACH * count))


def other_figures(history: RunHistory, *, width: float = 9.0) -> dict[str, "Figure"]:
    """Plots of all else that was logged: name -> figure.

    `learning_rate`, `grad_norm`, `tokens_per_second`, `sources` (loss per source), those of preferences, and `other`.
    """
    names, figures = history.numbers(), {}
    rates = [name for name in _RATES if name in names]
    if rates:
        labels = ["vectors and norms", "matrices"] if len(rates) > 1 else [""]
        figures["learning_rate"] = _lines_figure(history, rates, labels, "learning rate", width)
    for name, label in _KNOWN.items():
        if name in names:
            figures[name] = _lines_figure(history, [name], [""], label, width)
    sources = sorted(name for name in names if name.startswith(SOURCE_PREFIX))
    if sources:
        labels = [name.removeprefix(SOURCE_PREFIX) for name in sources]
        figures["sources"] = _lines_figure(history, sources, labels, "loss (nats per token)", width)
    for key, members, label in _PAIRS:
        found = [name for name in members if name in names]
        if found:
            told = [name.removeprefix("rewards/") for name in found] if len(found) > 1 else [""]
            figures[key] = _lines_figure(history, found, told, label, width)
    others = other_names(history)
    if others:
        figures["other"] = _grid_figure(history, others[:MOST_OTHERS], width)
    return figures


def other_names(history: RunHistory) -> list[str]:
    """What was logged in training that has no plot of its own."""
    known = {"loss", "eval_loss", *_RATES, *_KNOWN, *_LEFT_OUT, *(name for _, members, _ in _PAIRS for name in members)}
    return [
        name
        for name in history.numbers()
        if name not in known and not name.startswith((SOURCE_PREFIX, "eval_")) and len(history.points(name)) > 1
    ]


# --- drawing ----------------------------------------------------------------------------------------------------------


def _new_figure(width: float, height: float) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure  # without pyplot there is no display that could be missing

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _style(axes)
    return figure, axes


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.6)
    axes.set_axisbelow(True)


def _draw(axes: Any, values: Sequence[tuple[int, float]], color: str, label: str, **style: Any) -> None:
    """A line, broken where a value is not finite; a point where it is alone."""
    if not values:
        return
    shown = [value if math.isfinite(value) else math.nan for _, value in values]
    marker = "o" if len(values) < 3 else None
    axes.plot([step for step, _ in values], shown, color=color, label=label, marker=marker, markersize=3, **style)


def _draw_average(axes: Any, sessions: Sequence[Session], smooth: Sequence[tuple[int, float]]) -> None:
    """The average goes on over a resume; its line does not."""
    remaining = iter(smooth)
    for number, session in enumerate(sessions):
        count = sum(math.isfinite(value) for _, value in points(session.logs, "loss"))
        part = [next(remaining) for _ in range(count)]
        first = not any(points(earlier.logs, "loss") for earlier in sessions[:number])
        _draw(axes, part, _BLUE, "moving average" if first else "", linewidth=1.9)


def _mark_resumes(axes: Any, history: RunHistory) -> None:
    for number, session in enumerate(history.sessions[1:]):
        axes.axvline(session.start, color="#64748b", linewidth=0.8, linestyle="--", label="" if number else "resumed")


def _finish(axes: Any, label: str, *, legend: bool = True) -> None:
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.yaxis.get_major_formatter().set_useOffset(False)
    handles = [handle for handle in axes.get_legend_handles_labels()[1] if handle]
    if legend and handles:
        columns = 2 if axes.figure.get_figwidth() < 6 else 4
        axes.legend(frameon=False, fontsize=9, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)


def _lines_figure(
    history: RunHistory, names: Sequence[str], labels: Sequence[str], what: str, width: float
) -> "Figure":
    figure, axes = _new_figure(width, 2.8)
    for index, (name, label) in enumerate(zip(names, labels, strict=True)):
        for number, session in enumerate(history.sessions):
            first = not any(points(earlier.logs, name) for earlier in history.sessions[:number])
            shown = _literal(label) if first else ""
            _draw(axes, points(session.logs, name), _COLORS[index % len(_COLORS)], shown, linewidth=1.2)
    _mark_resumes(axes, history)
    _finish(axes, what)
    return figure


def _grid_figure(history: RunHistory, names: Sequence[str], width: float) -> "Figure":
    """Small plots, as many in a row as have room."""
    from matplotlib.figure import Figure

    columns = 2 if width > 6 else 1
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(width, 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        _style(axes)
        for session in history.sessions:
            _draw(axes, points(session.logs, name), _BLUE, "", linewidth=1.1)
        axes.set_title(_literal(name), fontsize=9, loc="left")
        _finish(axes, "", legend=False)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    return figure


def _literal(text: str) -> str:
    """A name as it is: a dollar sign begins no formula, and a line of the legend has an end."""
    cut = text if len(text) <= 40 else text[:39] + "…"
    shown = "".join(char if char.isprintable() else "?" for char in cut).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib leaves names with a _ out


__all__ = [
    "LOSS_PLOT",
    "MOST_OTHERS",
    "SOURCE_PREFIX",
    "loss_figure",
    "neighbours",
    "other_figures",
    "other_names",
    "png_of",
    "smoothed",
    "write_loss_plot",
]
