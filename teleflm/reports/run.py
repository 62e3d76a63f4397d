# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A fine-tuning run for people: one self-contained HTML page of what it has logged so far."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from conversion.checkpoint.atomic_file import write_atomically
from conversion.checkpoint.errors import one_line
from sft.data.preview import visible
from sft.training.comparison import comparison
from sft.training.loss_plot import (
    LOSS_PLOT,
    MOST_OTHERS,
    loss_figure,
    neighbours,
    other_figures,
    other_names,
    smoothed,
    write_loss_plot,
)
from sft.training.run_log import RUN_LOG, RunHistory, RunLogError, lost_from, lost_steps, points, read_history
from teleflm.reports.page import address_of, check_page, render_page

RUN_PAGE = "training_report.html"
_TEMPLATE = Path(__file__).with_name("run.html.jinja")
_CHECKPOINT = re.compile(r"checkpoint-\d+")
# Inches; a phone shows the second, in which letters are larger beside the lines.
_WIDE, _NARROW = 9.0, 4.4
_SHOWN_TEXT = 4000  # characters of a sample or a prompt
_TITLES = {
    "learning_rate": ("Learning rate", "Of the step that was done."),
    "grad_norm": ("Gradient norm", ""),
    "tokens_per_second": (
        "Tokens per second",
        "All tokens that all processes read, as num_tokens counts them: those of prompts too, those that pad short "
        "rows not. Over the time between two logs without evaluating, saving, sampling and drawing.",
    ),
    "sources": (
        "Loss per source",
        "Of the tokens of each source that were trained on since the last log; weighted as in the loss.",
    ),
    "rewards": ("Rewards", "Implicit: beta times the log-ratio to the reference model, of both answers."),
    "margins": ("Reward margin", ""),
    "accuracies": ("Reward accuracy", ""),
    "other": ("What else was logged", ""),
}


@dataclass(frozen=True)
class Plot:
    """A plot in two widths, as addresses of pictures that are inside."""

    name: str
    title: str
    note: str
    wide: str
    narrow: str


def draw_page(folder: Path) -> None:
    """Write the page of the run in a folder into it."""
    write_run_page(folder)


def write_run_page(folder: Path, output: Path | None = None) -> tuple[Path, RunHistory]:
    """Write the page of a run, finished, interrupted or going on.

    Args:
        folder: see [`sft.training.run_log.read_history`].
        output: file; `training_report.html` in the folder unless given, of a checkpoint beside it (see [`place_of`]).

    Returns:
        where it is, and what it shows.

    Raises:
        RunLogError: there is no run.
        CheckpointError: something else than such a page is there.
        OSError: it cannot be written.
    """
    history = read_history(folder)
    target = output or place_of(folder, RUN_PAGE)
    check_page(target, "run")
    try:
        page = render_run(history)
    except (TypeError, ValueError, LookupError, AttributeError, UndefinedError) as error:
        raise RunLogError(f"{folder}: its log holds what no run of this version writes: {one_line(error)}") from error
    write_atomically(target, page.encode("utf-8"))
    return target, history


def place_of(folder: Path, name: str) -> Path:
    """Where a file about a run is written: into its folder; of a checkpoint beside it, as `NAME-checkpoint-N.SUFFIX`.

    What is put into a checkpoint changes when it was changed last, by which transformers' own Trainer decides which
    checkpoints are removed.
    """
    place = Path(folder).resolve()
    if _CHECKPOINT.fullmatch(place.name) is None or (place / RUN_LOG).is_file():
        return Path(folder) / name
    return place.parent / f"{Path(name).stem}-{place.name}{Path(name).suffix}"


def write_loss(history: RunHistory) -> Path | None:
    """Write `loss.png` of a run into its folder, of a checkpoint beside it; None where no loss was logged."""
    target = place_of(history.folder, LOSS_PLOT)
    return target if write_loss_plot(history, target) else None


def render_run(history: RunHistory) -> str:
    """The page of a run. Everything that comes from data or models is escaped, what would not show is written out."""
    facts = history.facts
    lost = sum(len(points(session.lost, "loss")) for session in history.sessions)
    smooth = smoothed(history.points("loss"))
    return render_page(
        _TEMPLATE,
        title=visible(str(facts.get("base") or history.folder.resolve().name)),
        state=_state(history),
        history=history,
        facts=facts,
        how=_how(facts),
        data=facts.get("data") if isinstance(facts.get("data"), Mapping) else None,
        eval_data=facts.get("eval_data") if isinstance(facts.get("eval_data"), Mapping) else None,
        figures=_headline(history),
        loss=_loss_plot(history),
        reach=neighbours(len(smooth)) if smooth else None,
        plots=_plots(history),
        unfinite=_unfinite(history),
        lost=lost,
        comparison=comparison(history.measured.get("before"), history.measured.get("after")),
        measured_how=_measured_how(history),
        prompts=_prompts(history),
        shown=visible,
    )


def _state(history: RunHistory) -> tuple[str, str]:
    """A class, and the sentence on how the run stands."""
    last, steps = history.sessions[-1], history.step
    match history.status:
        case "done":
            if (step := lost_from(history.entries(), "loss")) is not None:
                return "bad", f"Done after {steps} steps, of no use: from step {step} on the loss is no finite number."
            if (step := lost_from(history.entries(), "grad_norm")) is not None:
                return "bad", f"Done after {steps} steps. From step {step} on the gradient norm is no finite number."
            return "good", f"Done after {steps} steps."
        case "interrupted":
            return "unknown", f"Interrupted; the last log is of step {steps}."
        case "failed":
            return "bad", f"Failed; the last log is of step {steps}. {visible(last.error)}"
        case "checkpoint":
            return "unknown", f"As it was at the checkpoint of step {steps}."
    if history.from_state:
        return "unknown", f"From a Trainer's state: what was logged up to step {steps}."
    when = f" Last line of its log: {last.last}." if last.last else ""
    return "unknown", f"No end is recorded: it goes on, or was killed. The last log is of step {steps}.{when}"


def _how(facts: Mapping[str, Any]) -> str:
    """How it is trained, in one line."""
    parts = [
        f"{facts['trainer']}, {facts.get('method', '')}".rstrip(", ") if facts.get("trainer") else "",
        f"{facts['batch_size']} rows a step" if facts.get("batch_size") else "",
        f"max_length {facts['max_length']}" if facts.get("max_length") else "",
        f"{facts['processes']} processes ({facts.get('distributed_type')})" if facts.get("processes", 1) != 1 else "",
    ]
    return visible("; ".join(part for part in parts if part))


def _headline(history: RunHistory) -> list[tuple[str, str]]:
    """A few numbers: label and value."""
    found = [("steps", f"{history.step:,}")]
    for name, label in (("loss", "last loss"), ("eval_loss", "last evaluation loss")):
        if lost_from(history.entries(), name) is not None:
            found.append((label, "no finite number"))
        elif values := history.points(name):
            found.append((label, _number(values[-1][1])))
    speeds = sorted(value for _, value in history.points("tokens_per_second") if math.isfinite(value))
    if speeds:
        found.append(("tokens per second (median)", f"{speeds[len(speeds) // 2]:,.0f}"))
    return found


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def _loss_plot(history: RunHistory) -> Plot | None:
    if not (history.points("loss") or history.points("eval_loss")):
        return None
    wide, narrow = (address_of(loss_figure(history, width=width)) for width in (_WIDE, _NARROW))
    return Plot("loss", "Loss", "", wide, narrow)


def _plots(history: RunHistory) -> list[Plot]:
    wide, narrow = (
        {name: address_of(figure) for name, figure in other_figures(history, width=width).items()}
        for width in (_WIDE, _NARROW)
    )
    plots = [Plot(name, *_TITLES[name], wide[name], narrow[name]) for name in wide]
    if left := other_names(history)[MOST_OTHERS:]:
        note = f"{len(left)} more numbers have no plot here: {', '.join(map(visible, left))}."
        plots = [replace(plot, note=note) if plot.name == "other" else plot for plot in plots]
    return plots


def _unfinite(history: RunHistory) -> list[str]:
    """Where a number that should be finite was none."""
    found = []
    for name in ("loss", "eval_loss", "grad_norm"):
        if steps := lost_steps(history.entries(), name):
            shown = ", ".join(map(str, steps[:8])) + (", ..." if len(steps) > 8 else "")
            found.append(f"{name} is not a finite number at {len(steps)} logged steps: {shown}.")
    if found and history.facts.get("nan_filter"):
        found.append("With logging_nan_inf_filter a loss that is none is logged as the mean before it, or 0.")
    return found


def _measured_how(history: RunHistory) -> list[str]:
    """How texts and tasks were measured, and what was noted of it."""
    lines = [
        f"{when.capitalize()}: by the model in training, in {found.get('dtype')} on {found.get('device')}, window "
        f"{found.get('window')}, stride {found.get('stride')}."
        for when, found in history.measured.items()
    ]
    notes = [str(note) for found in history.measured.values() for note in found.get("notes", ())]
    return [visible(line) for line in dict.fromkeys([*lines, *notes])]


def _prompts(history: RunHistory) -> list[dict[str, Any]]:
    """The samples, by prompt: its messages, and the text of each step, the last one first."""
    by_prompt: dict[int, dict[str, Any]] = {}
    for sample in history.samples:
        messages = [message for message in sample["messages"] if isinstance(message, Mapping)]
        said = [
            {"role": _shown(message.get("role")), "content": _shown(message.get("content"))} for message in messages
        ]
        entry = by_prompt.setdefault(sample["prompt"], {"messages": said, "texts": {}})
        entry["texts"][sample["step"]] = {
            "step": sample["step"],
            "text": _shown(sample["text"]),
            "tokens": sample.get("new_tokens"),
            "ended": sample.get("ended") is True,
        }
    return [
        {**entry, "texts": sorted(entry["texts"].values(), key=lambda text: -text["step"])}
        for _, entry in sorted(by_prompt.items())
    ]


def _shown(text: Any) -> str:
    """A text as a page can show it: cut, and with what does not show, or turns the writing round, written out."""
    whole = str(text)
    return visible(whole[:_SHOWN_TEXT]) + (" …" if len(whole) > _SHOWN_TEXT else "")


__all__ = ["RUN_PAGE", "draw_page", "place_of", "render_run", "write_loss", "write_run_page"]
