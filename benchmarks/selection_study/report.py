# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""From the runs to the numbers: paired differences, their intervals, and the results of the page."""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from .arms import AGAIN, ALL, BOTH, LADDER
from .presets import PRESETS, Preset
from .runs import UNTRAINED, read_lines

LEVEL = 0.05
BEGIN, END = "<!-- results: made by `python -m benchmarks.selection_study page` -->\n", "<!-- end of results -->\n"

Run = dict[str, Any]
Runs = dict[tuple[int, float, str], Run]  # by seed, share of faults, and arm


@dataclass(frozen=True)
class Comparison:
    """An arm beside another, seed by seed.

    Args:
        faults: share of the pool.
        arm, other: what is compared.
        differences: of the losses, arm less other, one for each seed.
    """

    faults: float
    arm: str
    other: str
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Below 0 the arm is better."""
        return statistics.mean(self.differences)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return statistics.stdev(self.differences) / math.sqrt(len(self.differences))

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by Student's t over the seeds."""
        half = float(student.ppf(1 - LEVEL / 2, len(self.differences) - 1)) * self.error
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float:
        """Of a mean of zero, two-sided."""
        if not self.error:
            return 1.0 if not self.mean else 0.0
        return float(2 * student.sf(abs(self.mean / self.error), len(self.differences) - 1))


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979)."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted


# --- what is compared -------------------------------------------------------------------------------------------------


def pairs(preset: Preset) -> Iterator[tuple[float, str, str]]:
    """Every comparison that was announced: share of faults, arm, and the arm it is beside."""
    for share in preset.faults:
        for arm, (before, _) in LADDER.items():
            if before:
                yield share, arm, before
        for arm, (before, _) in LADDER.items():
            if before not in (None, "random"):
                yield share, arm, "random"
    share = preset.counted_at
    for count in preset.counts:
        yield share, f"choice {count}", f"random {count}"
    for count in sorted((*preset.counts, preset.count)):
        for arm in BOTH:
            yield share, arm if count == preset.count else f"{arm} {count}", ALL


def complete(runs: Runs, preset: Preset) -> Preset:
    """The preset with those shares of faults alone, in order, that every arm of every seed has been run at.

    Raises:
        ValueError: there is none, or the share that the second part is run at is not among them.
    """
    arms = {share: [*LADDER, AGAIN] for share in preset.faults}
    arms[preset.counted_at] += [f"{arm} {count}" for arm in BOTH for count in preset.counts] + [ALL]
    done = [
        share
        for share in sorted(preset.faults)
        if all((seed, share, arm) in runs for seed in preset.seeds for arm in arms[share])
    ]
    if preset.counted_at not in done:
        raise ValueError(f"the runs at {preset.counted_at:.0%} faults are not complete; the command `run` goes on.")
    return replace(preset, faults=tuple(done))


def compare(runs: Runs, preset: Preset, share: float, arm: str, other: str) -> Comparison:
    """An arm beside another, by the primary loss."""
    differences = (runs[seed, share, arm]["primary"] - runs[seed, share, other]["primary"] for seed in preset.seeds)
    return Comparison(share, arm, other, tuple(differences))


def noise(runs: Runs, preset: Preset) -> tuple[list[Comparison], float]:
    """`random` beside another draw of itself at each share of faults, and the size of a difference that chance makes.

    Returns:
        the comparisons, and the root of the mean square of all their differences.
    """
    found = [compare(runs, preset, share, AGAIN, "random") for share in preset.faults]
    every = [difference for comparison in found for difference in comparison.differences]
    return found, math.sqrt(statistics.fmean(difference**2 for difference in every))


def verdict(comparison: Comparison, adjusted: float, least: float) -> str:
    """What may be said of a difference."""
    low, high = comparison.interval
    if low <= 0 <= high:
        return "no difference shown"
    word = "better" if comparison.mean < 0 else "worse"
    if adjusted > LEVEL:
        return f"{word} by itself, not among all"
    if abs(comparison.mean) < least:
        return f"{word}, but too little to count"
    return f"**{word}**"


def verdicts(runs: Runs, preset: Preset) -> dict[tuple[float, str, str], str]:
    """What may be said of every comparison: share of faults, arm and the arm it is beside -> verdict."""
    _, least = noise(runs, preset)
    made = [compare(runs, preset, *pair) for pair in pairs(preset)]
    adjusted = holm([c.p for c in made])
    return {(c.faults, c.arm, c.other): verdict(c, p, least) for c, p in zip(made, adjusted, strict=True)}


# --- the page ---------------------------------------------------------------------------------------------------------


def read_runs(folder: Path) -> Runs:
    """By seed, share of faults and arm."""
    return {(run["seed"], run["faults"], run["arm"]): run for run in read_lines(folder / "runs.jsonl")}


def write_page(results: Path, docs: Path) -> None:
    """Put the results into the page, between its marks, and draw the picture beside it."""
    text = docs.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    docs.write_text(head + BEGIN + results_text(results) + END + tail, encoding="utf-8")
    draw(results, docs.with_suffix(".svg"))


def results_text(folder: Path) -> str:
    """All that the runs say, in Markdown."""
    runs, base = read_runs(folder), json.loads((folder / "base.json").read_text(encoding="utf-8"))
    preset = complete(runs, PRESETS[base["preset"]])
    null, least = noise(runs, preset)
    made = [compare(runs, preset, *pair) for pair in pairs(preset)]
    adjusted = dict(zip(made, holm([c.p for c in made]), strict=True))
    said = verdicts(runs, preset)

    def table(chosen: Sequence[Comparison]) -> list[str]:
        rows = [
            [
                c.arm,
                c.other,
                f"{c.mean:+.4f}",
                f"{c.interval[0]:+.4f} to {c.interval[1]:+.4f}",
                _probability(adjusted[c]),
                said[c.faults, c.arm, c.other],
            ]
            for c in chosen
        ]
        return _table(("arm", "beside", "mean difference", "95 % interval", "p (Holm)", "verdict"), rows)

    lines = ["", "### The base", "", *_describe_base(base), "", "### The pools", "", *_describe_pools(folder, preset)]
    lines += ["", "### The noise", ""]
    lines += [
        f"`random` beside another draw of itself. The root of the mean square of all {len(null) * len(preset.seeds)} "
        f"differences, {least:.4f}, is the smallest effect that counts.",
        "",
    ]
    lines += _table(
        ("faults", "mean difference", "95 % interval", "standard deviation"),
        [
            [
                f"{c.faults:.0%}",
                f"{c.mean:+.4f}",
                f"{c.interval[0]:+.4f} to {c.interval[1]:+.4f}",
                f"{statistics.stdev(c.differences):.4f}",
            ]
            for c in null
        ],
    )
    lines += [
        "",
        f"### Differences, of {len(made)} comparisons",
        "",
        "Nats a token of the answers, in the pool's proportions; below 0 the arm is better than the one beside it. "
        f"{len(preset.seeds)} seeds. Of {len(made)} intervals of 95 %, about {len(made) * LEVEL:.0f} miss by chance.",
    ]
    ladder = [c for c in made if c.arm in LADDER and c.other in LADDER]
    for share in preset.faults:
        own = [c for c in ladder if c.faults == share]
        lines += ["", f"#### {share:.0%} faults, {preset.count} rows: each step beside the one before", ""]
        lines += table([c for c in own if LADDER[c.arm][0] == c.other])
        lines += ["", f"#### {share:.0%} faults, {preset.count} rows: beside `random`", ""]
        lines += table([c for c in own if c.other == "random"])
    lines += ["", f"#### More and fewer rows, {preset.counted_at:.0%} faults, equal steps", ""]
    lines += table([c for c in made if c not in ladder])
    lines += ["", "### The arms", "", *_describe_arms(runs, preset, least)]
    return "\n".join(lines) + "\n\n"


def _describe_base(base: dict[str, Any]) -> list[str]:
    bits = base["bits_per_byte"]
    again = "" if base["tokens"] == base["distinct_tokens"] else f", {base['distinct_tokens']:,} of them distinct"
    packages = ", ".join(f"{name} {version}" for name, version in base["packages"].items())
    return [
        f"{base['parameters']:,} parameters, pretrained on {base['tokens']:,} tokens{again}: {base['characters']:,} "
        f"characters of {packages}, and of Python's own documentation.",
        "",
        *_table(
            ("on held-out texts", "bits a byte"),
            [
                ["untrained", f"{bits['untrained']:.3f}"],
                ["unigrams of tokens", f"{bits['unigram']:.3f}"],
                ["the base", f"{bits['base']:.3f}"],
            ],
        ),
    ]


def _describe_pools(folder: Path, preset: Preset) -> list[str]:
    pools = [pool for pool in read_lines(folder / "pools.jsonl") if pool["seed"] in preset.seeds]
    rows = []
    for share in preset.faults:
        own = [pool for pool in pools if pool["faults"] == share]
        dropped: dict[str, list[int]] = {}
        for number, pool in enumerate(own):
            for reasons in pool["stages"].values():
                for reason, count in reasons.items():
                    dropped.setdefault(reason, [0] * len(own))[number] += count
        dropped.pop("not_selected", None)
        dropped.pop("no_score", None)
        rows.append(
            [
                f"{share:.0%}",
                _spread([sum(pool["rows"].values()) for pool in own]),
                ", ".join(f"{name} {_spread(counts)}" for name, counts in sorted(dropped.items())) or "nothing",
                _spread([pool["stages"].get("scores", {}).get("no_score", 0) for pool in own]),
            ]
        )
    first = pools[0]
    sources = {name: [pool["rows"].get(name, 0) for pool in pools if not pool["faults"]] for name in first["held_out"]}
    held_out = ", ".join(f"{count} of {name}" for name, count in first["held_out"].items())
    near = {
        name: _spread([pool["near_held_out"][name] for pool in pools if not pool["faults"]])
        for name in first["near_held_out"]
    }
    sizes = ", ".join(f"{_spread(counts)} of {name}" for name, counts in sources.items())
    left_out = ", ".join(f"{text} of {name}" for name, text in near.items())
    lines = [
        f"Held out: {held_out}. A pool: {sizes}. Left out as near duplicates of what is held out: {left_out}.",
    ]
    left: dict[str, list[int]] = {}
    for pool in pools:
        for name, count in pool["sources_dropped"].items():
            left.setdefault(name, []).append(count)
    if left:
        few = ", ".join(f"{name} ({_spread(counts)} left)" for name, counts in left.items())
        lines.append(f"Not used, with fewer than {preset.least_rows} rows left: {few}.")
    lines += [
        "",
        "What the filters dropped, and then how many rows have an IFD from 1 on, least to most of all seeds:",
        "",
    ]
    return [*lines, *_table(("faults", "rows", "dropped by the filters", "IFD from 1 on"), rows)]


def _describe_arms(runs: Runs, preset: Preset, least: float) -> list[str]:
    """Means of every arm, and the share of faults among its rows."""
    sources = list(runs[preset.seeds[0], preset.faults[0], "random"]["losses"])
    lines = [
        "Means over the seeds. `learned` are tokens of answers, each time counted; `faults` is the share of the chosen "
        "rows that are planted ones; `epochs` is how often a row is read.",
        "",
    ]
    rows = []
    shown = [(preset.faults[0], UNTRAINED)]
    for share in preset.faults:
        shown += [(share, arm) for arm in ("random", AGAIN, *list(LADDER)[1:])]
        if share == preset.counted_at:
            shown += [(share, f"{arm} {count}") for count in preset.counts for arm in ("random", "choice")]
            shown.append((share, ALL))
    for share, arm in shown:
        own = [runs[seed, share, arm] for seed in preset.seeds]
        tokens = statistics.mean(run["row_tokens"] for run in own)
        every = preset.steps * preset.batch * preset.length
        rows.append(
            [
                f"{share:.0%}",
                arm,
                f"{statistics.mean(run['trained_rows'] for run in own):,.0f}",
                f"{every / tokens:.1f}" if tokens else "0",
                f"{statistics.mean(run['learned_tokens'] for run in own):,.0f}",
                f"{statistics.mean(sum(run['planted'].values()) / max(run['chosen'], 1) for run in own):.1%}",
                f"{statistics.mean(run['primary'] for run in own):.4f}",
                *(f"{statistics.mean(run['losses'][source] for run in own):.4f}" for source in sources),
            ]
        )
    columns = ("pool", "arm", "rows", "epochs", "learned", "faults", "in the pool's proportions", *sources)
    lines += _table(columns, rows)
    kinds = sorted({kind for run in runs.values() for kind in run["planted"]})
    share = max(preset.faults)
    lines += ["", f"Chosen rows of each kind of fault at {share:.0%}, mean over the seeds:", ""]
    arms = list(LADDER)

    def mean(arm: str, kind: str) -> str:
        return f"{statistics.mean(runs[seed, share, arm]['planted'].get(kind, 0) for seed in preset.seeds):.1f}"

    counted = [[kind, *(mean(arm, kind) for arm in arms)] for kind in kinds]
    return [*lines, *_table(("kind", *arms), counted)]


def _probability(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _spread(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows]]


# --- the picture ------------------------------------------------------------------------------------------------------


def draw(folder: Path, file: Path) -> None:
    """Every arm of the ladder beside `random`, with its interval, for each share of faults."""
    import matplotlib
    from matplotlib.figure import Figure

    runs, base = read_runs(folder), json.loads((folder / "base.json").read_text(encoding="utf-8"))
    preset = complete(runs, PRESETS[base["preset"]])
    _, least = noise(runs, preset)
    arms = [*list(LADDER)[1:], AGAIN]
    with matplotlib.rc_context({"svg.hashsalt": "selection-study", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        for axes, share in zip(figure.subplots(1, len(preset.faults), sharey=True), preset.faults, strict=True):
            made = [compare(runs, preset, share, arm, "random") for arm in arms]
            means = [c.mean for c in made]
            half = [c.mean - c.interval[0] for c in made]
            axes.axvspan(-least, least, color="0.92")
            axes.axvline(0, color="0.5", linewidth=0.8)
            axes.errorbar(means, range(len(arms)), xerr=half, fmt="o", markersize=4, capsize=3, color="C0")
            axes.set_yticks(range(len(arms)), arms)
            axes.set_title(f"{share:.0%} faults")
            axes.set_xlabel("loss less that of random, nats")
        axes.invert_yaxis()
        figure.savefig(file, metadata={"Date": None})
