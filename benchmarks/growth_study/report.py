# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""From the runs to the numbers: paired differences, their intervals, and the results of the page."""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from .arms import ARMS, BY_NAME, EQUAL_FLOPS, EQUAL_TOKENS, SMALL_ARMS, Arm
from .presets import PRESETS, Preset
from .runs import read_lines

LEVEL = 0.05
BEGIN, END = "<!-- results: made by `python -m benchmarks.growth_study page` -->\n", "<!-- end of results -->\n"

Runs = dict[tuple[int, str], dict[str, Any]]  # by seed and arm


@dataclass(frozen=True)
class Comparison:
    """An arm beside another, seed by seed.

    Args:
        arm, other: what is compared.
        differences: of the losses after the last step, arm less other, one for each seed.
    """

    arm: str
    other: str
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Below 0 the arm is better."""
        return statistics.mean(self.differences)

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by Student's t over the seeds."""
        count = len(self.differences)
        error = statistics.stdev(self.differences) / math.sqrt(count)
        half = float(student.ppf(1 - LEVEL / 2, count - 1)) * error
        return self.mean - half, self.mean + half

    @property
    def word(self) -> str:
        """What the interval says by itself."""
        low, high = self.interval
        return "better" if high < 0 else "worse" if low > 0 else "no difference shown"


def pairs() -> Iterator[tuple[str, str]]:
    """Every comparison that was announced: an arm, and the arm it is beside."""
    for arm in ARMS:
        if not arm.method:
            continue
        for length in (EQUAL_FLOPS, EQUAL_TOKENS):
            yield arm.name, f"{arm.shape} from scratch, {length}"
        yield arm.name, f"small, equal FLOPs to {arm.shape}"
        yield arm.name, SMALL_ARMS[0].name
        if arm.moments:
            yield arm.name, arm.name.removesuffix(", moments")


def read_runs(folder: Path) -> Runs:
    """By seed and arm."""
    return {(run["seed"], run["arm"]): run for run in read_lines(folder / "runs.jsonl")}


def seeds_of(runs: Runs, preset: Preset) -> tuple[int, ...]:
    """The seeds that every arm has been run with.

    Raises:
        ValueError: fewer than two.
    """
    found = tuple(seed for seed in preset.seeds if all((seed, arm.name) in runs for arm in ARMS))
    if len(found) < 2:
        raise ValueError(f"{len(found)} seeds are complete; the command `run` goes on.")
    return found


def compare(runs: Runs, seeds: Sequence[int], arm: str, other: str) -> Comparison:
    """An arm beside another."""
    return Comparison(arm, other, tuple(_last(runs[seed, arm]) - _last(runs[seed, other]) for seed in seeds))


def _last(run: dict[str, Any]) -> float:
    return float(run["losses"][-1][1])


# --- the page ---------------------------------------------------------------------------------------------------------


def write_page(results: Path, docs: Path) -> None:
    """Put the results into the page, between its marks, and draw the picture beside it."""
    text = docs.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    docs.write_text(head + BEGIN + results_text(results) + END + tail, encoding="utf-8")
    draw(results, docs.with_suffix(".svg"))


def results_text(folder: Path, preset: Preset = PRESETS["small"]) -> str:
    """All that the runs say, in Markdown."""
    runs = read_runs(folder)
    seeds = seeds_of(runs, preset)
    lines = ["", *_describe_corpus(json.loads((folder / "corpus.json").read_text(encoding="utf-8")))]
    missing = [str(seed) for seed in preset.seeds if seed not in seeds]
    if missing:
        lines += ["", f"**Not complete: seeds {', '.join(missing)} have not been run.**"]
    lines += ["", "### What was chosen", "", *_describe_tuning(folder, runs, seeds)]
    for shape, title in (("wide", "Twice the width"), ("deep", "Twice the layers")):
        lines += ["", f"### {title}", "", *_describe_losses(runs, seeds, shape)]
        lines += ["", f"Loss of a grown model less that of another, {len(seeds)} seeds; below 0 growing is better:", ""]
        lines += _describe_pairs(runs, seeds, shape)
    made = [compare(runs, seeds, *pair) for pair in pairs()]
    lines += ["", f"Of {len(made)} intervals of 95 %, about {len(made) * LEVEL:.0f} miss by chance."]
    return "\n".join(lines) + "\n\n"


def _describe_corpus(corpus: dict[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {version}" for name, version in corpus["packages"].items())
    sizes = ", ".join(f"{count:,} characters of {name}" for name, count in corpus["characters"].items())
    return [
        f"Text: {packages}; {sizes.replace('held_out', 'held-out text')}. {corpus['left_out']} files were left out "
        f"because they share {8} lines in a row with what is trained on."
    ]


def _describe_tuning(folder: Path, runs: Runs, seeds: Sequence[int]) -> list[str]:
    tuned = read_lines(folder / "tuning.jsonl")
    rates = [run["learning_rate"] for run in tuned]
    rows = []
    for arm in ARMS:
        name = SMALL_ARMS[0].name if arm in SMALL_ARMS else arm.name
        own = sorted(run["losses"][-1][1] for run in tuned if run["arm"] == name)
        run = runs[seeds[0], arm.name]
        rows.append(
            [
                arm.name,
                arm.shape,
                f"{run['learning_rate']:g}{', an edge' if run['learning_rate'] in (min(rates), max(rates)) else ''}",
                f"{run['warmup']:.0%}",
                f"{own[0]:.4f}",
                f"{own[-1]:.4f}",
            ]
        )
    columns = ("arm", "shape", "learning rate", "warm-up", "its loss when tuned", "that of the worst choice")
    return _table(columns, rows)


def _shown(shape: str) -> list[Arm]:
    return [arm for arm in ARMS if arm.shape == shape or (arm in SMALL_ARMS and arm.of == shape)] + (
        [SMALL_ARMS[0]] if shape == "deep" else []
    )


def _describe_losses(runs: Runs, seeds: Sequence[int], shape: str) -> list[str]:
    rows = []
    for arm in _shown(shape):
        own = [runs[seed, arm.name] for seed in seeds]
        last = [_last(run) for run in own]
        first = [run["losses"][0][1] for run in own]
        rows.append(
            [
                arm.name,
                f"{own[0]['steps']:,}",
                f"{own[0]['tokens']:,}",
                f"{own[0]['flops'] / 1e12:.2f}",
                f"{statistics.mean(first):.3f}",
                f"{statistics.mean(last):.4f}",
                f"{statistics.stdev(last):.4f}",
            ]
        )
    columns = ("arm", "steps", "tokens in all", "TFLOPs in all", "loss at its first step", "at its last", "deviation")
    return _table(columns, rows)


def _describe_pairs(runs: Runs, seeds: Sequence[int], shape: str) -> list[str]:
    rows = []
    for arm, other in pairs():
        if BY_NAME[arm].shape != shape:
            continue
        found = compare(runs, seeds, arm, other)
        low, high = found.interval
        rows.append([arm, other, f"{found.mean:+.4f}", f"{low:+.4f} to {high:+.4f}", found.word])
    return _table(("grown", "beside", "mean difference", "95 % interval", "by itself"), rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows]]


# --- the picture ------------------------------------------------------------------------------------------------------


def draw(folder: Path, file: Path, preset: Preset = PRESETS["small"]) -> None:
    """Loss over FLOPs, the small model's steps included, mean over the seeds; a panel for each shape."""
    import matplotlib
    from matplotlib.figure import Figure

    runs = read_runs(folder)
    seeds = seeds_of(runs, preset)
    with matplotlib.rc_context({"svg.hashsalt": "growth-study", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        for axes, shape in zip(figure.subplots(1, 2), ("wide", "deep"), strict=True):
            for number, arm in enumerate(_shown(shape)):
                own = [runs[seed, arm.name] for seed in seeds]
                spent = [own[0]["flops_before"] + step * own[0]["step_flops"] for step, _ in own[0]["losses"]]
                losses = [statistics.mean(run["losses"][place][1] for run in own) for place in range(len(spent))]
                style = "-" if arm.method else "--"
                axes.plot([flops / 1e12 for flops in spent], losses, style, color=f"C{number % 10}", label=arm.name)
            axes.set(xlabel="TFLOPs in all", ylabel="loss on held-out text, nats a token", title=shape)
            axes.set_ylim(*_limits(runs, seeds, shape))
            axes.legend(fontsize=6)
        figure.savefig(file, metadata={"Date": None})


def _limits(runs: Runs, seeds: Sequence[int], shape: str) -> tuple[float, float]:
    last = [_last(runs[seed, arm.name]) for seed in seeds for arm in _shown(shape)]
    spread = max(last) - min(last)
    return min(last) - 0.1 * spread, max(last) + 1.5 * spread + 0.3
