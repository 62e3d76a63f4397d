# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The picture of a schedule of growth: how large the model is while the FLOPs are spent."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from growth.stages import StagePlan


def plot_stages(plan: "StagePlan", file: Path) -> None:
    """Draw parameters over the FLOPs spent so far, of the stages and of the last model from nothing.

    Args:
        plan: from `growth.stages.plan_stages`.
        file: to write, in the format that its name says.

    Raises:
        ValueError: its name says none that can be written.
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    spent, edges, sizes = 0.0, [0.0], []
    for cost in plan.stages:
        spent += cost.flops
        edges.append(spent)
        sizes.append(cost.parameters / 1e9)
        axes.annotate(
            f"{cost.stage.name}, {cost.stage.tokens / 1e9:,.0f} B tokens",
            (spent, sizes[-1]),
            xytext=(8, 5),  # right of the step to the next, above the line of the last
            textcoords="offset points",
            fontsize=8,
        )
    axes.stairs(sizes, edges, baseline=None, linewidth=2.5, label="grown")
    last = plan.stages[-1]
    axes.plot(
        [0, plan.scratch_flops],
        [last.parameters / 1e9] * 2,
        linestyle="--",
        label=f"{last.stage.name} from nothing, as many tokens",
    )
    axes.set(xlabel="FLOPs spent", ylabel="parameters (billions)", yscale="log")
    axes.margins(y=0.25)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(file)


__all__ = ["plot_stages"]
