# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What was measured, as data and as a page: `results.json` keeps it, `RESULTS.md` is made of it and of nothing else.

A section is one table of one script. Goals are stated by the scripts; whether they are held is read off the cells of
the table, so that no figure of the summary is typed by hand.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

DATA = Path(__file__).with_name("results.json")
PAGE = Path(__file__).with_name("RESULTS.md")

HEAD = """# Benchmark results

Made by the scripts beside this page from `results.json`; `make bench` runs those that a CPU does in minutes. First
every claim that has a bound, then a section a table, the newest first. `cp` is plain `cp` followed by fsync of the
copy, and every other run that writes ends with its output on the disk too. Times are median (least - most) of the
rounds; ratios are of runs of the same round, in which the order is random. Peak RSS is the sum of the high-water marks
of all processes of a run. The load average beside each table says how busy the machine was, the benchmark itself
included.
"""
SUMMARY_COLUMNS = ("claim", "table", "measured", "spread", "goal", "held", "date")

_NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
_CELL = re.compile(rf"\s*({_NUMBER})(?:/(\d+))?[^(\[]*(?:[(\[]({_NUMBER})(?: - |, )({_NUMBER})[)\]])?")


@dataclass(frozen=True)
class Goal:
    """A bound on the figures of a column.

    Args:
        claim: what holds if they keep it.
        column: the name of the column.
        bound: the most that a figure may be, or the least if `at_least`.
        at_least: which of both.
        rows: a regular expression that a row, its cells joined by " | ", has to match; of several, the worst counts.
    """

    claim: str
    column: str
    bound: float
    at_least: bool = False
    rows: str = ""


@dataclass(frozen=True)
class Section:
    """A table, and where it comes from.

    Args:
        title: unique; a newer section takes the place of the older one of the same title.
        date: and time, UTC.
        command: what makes it again.
        about: what was run, and on which machine.
        columns: their names.
        rows: their cells, as they are shown.
        goals: bounds that the script states.
        note: what there is to say about the figures.
    """

    title: str
    date: str
    command: str
    about: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    goals: Sequence[Goal] = field(default_factory=tuple)
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A number of a cell, and the least and the most it was, if the cell has them."""

    value: float
    least: float | None = None
    most: float | None = None


def read(file: Path = DATA) -> list[Section]:
    """The sections of a file, as they are in it."""
    sections = json.loads(file.read_text()) if file.exists() else []
    return [Section(**{**section, "goals": [Goal(**goal) for goal in section["goals"]]}) for section in sections]


def write(sections: Iterable[Section], data: Path = DATA, page: Path = PAGE) -> None:
    """Keep sections, and make the page of them."""
    kept = list(sections)
    data.write_text(json.dumps([asdict(section) for section in kept], indent=1, ensure_ascii=False) + "\n")
    page.write_text(render(kept))


def put_on_top(section: Section, sections: Iterable[Section]) -> list[Section]:
    """Sections with another one before them, without that which it replaces."""
    return [section, *(old for old in sections if old.title != section.title)]


def figure_of(cell: str) -> Figure | None:
    """The figure of a cell such as `1.13 (1.02 - 1.23)`, `0.995 [0.950, 1.043]`, `1/79` or `98.24%`, if it has one."""
    match = _CELL.match(cell)
    if match is None:
        return None
    value, denominator, least, most = match.groups()
    figure = _number(value) / int(denominator or 1)
    return Figure(figure, _number(least), _number(most)) if least else Figure(figure)


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def worst(goal: Goal, section: Section) -> Figure | None:
    """The figure of a section that is furthest from a goal, if the section has any for it."""
    column = list(section.columns).index(goal.column)
    cells = [row[column] for row in section.rows if re.search(goal.rows, " | ".join(row))]
    figures = [figure for cell in cells if (figure := figure_of(cell))]
    pick = min if goal.at_least else max
    return pick(figures, key=lambda figure: figure.value, default=None)


def held(goal: Goal, figure: Figure | None) -> str:
    """Whether a figure keeps a goal: `yes`, `no`, or `within the spread` if the bound lies in what was measured."""
    if figure is None:
        return "not measured"
    if figure.value >= goal.bound if goal.at_least else figure.value <= goal.bound:
        return "yes"
    best = figure.most if goal.at_least else figure.least
    if best is not None and (best >= goal.bound if goal.at_least else best <= goal.bound):
        return "within the spread"
    return "no"


def summary(sections: Iterable[Section]) -> list[tuple[str, ...]]:
    """A row a goal, the cells of which are `SUMMARY_COLUMNS`."""
    rows = []
    for section in sections:
        for goal in section.goals:
            figure = worst(goal, section)
            rows.append(
                (
                    goal.claim,
                    f"[{section.title}](#{anchor(section.title)})",
                    f"{figure.value:,.4g}" if figure else "",
                    f"{figure.least:,.4g} - {figure.most:,.4g}" if figure and figure.least is not None else "",
                    f"{'>=' if goal.at_least else '<='} {goal.bound:,g}",
                    held(goal, figure),
                    section.date.partition(" ")[0],
                )
            )
    return rows


def anchor(title: str) -> str:
    """What links to a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])


def render(sections: Sequence[Section]) -> str:
    """The page: its head, the summary, and the sections."""
    parts = [HEAD, "## Summary\n", table(SUMMARY_COLUMNS, summary(sections)) + "\n"]
    for section in sections:
        parts += [f"## {section.title}\n", f"{section.date} UTC. `{section.command}`\n", section.about + "\n"]
        parts += [table(section.columns, section.rows) + "\n"]
        parts += [section.note.rstrip("\n") + "\n"] if section.note else []
    return "\n".join(parts)
