# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A verification for people and for scripts: one self-contained HTML page, its plots, and all of it as JSON."""

import hashlib
import math
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from conversion.checkpoint.manifest import MANIFEST, package_version
from evaluation.logit_comparison import BINS
from growth.verification.certificate import Certificate, TensorResult
from growth.verification.comparison import Numbers
from growth.verification.conditions import MeasuredLayer, Rule
from growth.verification.moment_certificate import MomentCertificate
from growth.verification.verify import Verification
from teleflm.reports.page import legend_above, new_figure, write_report_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = Path(__file__).with_name("verification.html.jinja")
_RULES = get_args(Rule)
_BLUE, _GREY = "#2563eb", "#94a3b8"


@dataclass(frozen=True)
class SummaryLine:
    """The weights of one kind, all layers together, under one condition.

    Args:
        weight: the name, `*` for the layer.
        count: tensors.
        condition: what holds: A's block with its factor, zero, or free.
        elements: how many were checked.
        worst: largest distance of a copy from its exact value, in units in the last place, as text.
        holds: whether all of them meet it.
    """

    weight: str
    count: int
    condition: str
    elements: int
    worst: str
    holds: bool


def summarise(certificate: Certificate) -> list[SummaryLine]:
    """The certificate in a few dozen lines, in data-flow order."""
    groups: dict[tuple[str, str], list[tuple[TensorResult, str]]] = {}
    for tensor in certificate.tensors:
        weight = re.sub(r"^model\.|\.weight$", "", re.sub(r"layers\.\d+", "layers.*", tensor.conditions.name))
        factor = "" if tensor.conditions.factor == 1.0 else f" x {tensor.conditions.factor:.6g}"
        for rule in dict.fromkeys(block.block.rule for block in tensor.blocks):
            condition = {
                "copy": f"A's{factor}",
                "sum": f"A's{factor}, as a sum of copies",
                "zero": "zero",
                "free": "free, finite",
            }[rule]
            groups.setdefault((weight, condition), []).append((tensor, rule))
    lines = []
    for (weight, condition), members in groups.items():
        blocks = [block for tensor, rule in members for block in tensor.blocks if block.block.rule == rule]
        worst = max(block.worst_ulp for block in blocks)
        shown = "exact" if condition == "A's" and worst == 0 else f"{worst:.3g}"
        lines.append(
            SummaryLine(
                weight,
                len(members),
                condition,
                sum(block.block.numel for block in blocks),
                shown if condition.startswith("A's") else "",
                not any(block.violations for block in blocks),
            )
        )
    return lines


def describe(verification: Verification) -> dict[str, Any]:
    """A verification as one JSON object."""
    result: dict[str, Any] = {
        "verdict": verification.verdict,
        "same": verification.same,
        "sentence": verification.sentence,
        "notes": list(verification.notes),
    }
    if verification.certificate:
        certificate = verification.certificate
        result["certificate"] = {
            "holds": certificate.holds,
            "growths": certificate.conditions.growths,
            "config": [{**asdict(field), "found": str(field.found)} for field in certificate.conditions.fields],
            "violations": [{**asdict(violation), "message": str(violation)} for violation in certificate.violations],
            "tensors": [_describe_tensor(tensor) for tensor in certificate.tensors],
        }
    if verification.numbers:
        numbers = verification.numbers
        result["numbers"] = {
            **asdict(numbers),
            "within_rounding": numbers.within_rounding,
            "blind_to_rms": numbers.blind_to,
            "reason": numbers.reason,
            "histogram_bins": list(BINS),
        }
    if verification.moments:
        result["moments"] = _describe_moments(verification.moments)
    if verification.layers:
        result["layer_distances"] = [asdict(layer) for layer in verification.layers]
    return _as_json(result)


def _as_json(value: Any) -> Any:
    """Numbers that JSON does not have, NaN and infinities, as their names."""
    match value:
        case dict():
            return {key: _as_json(item) for key, item in value.items()}
        case list() | tuple():
            return [_as_json(item) for item in value]
        case float() if not math.isfinite(value):
            return repr(value)
    return value


def _describe_tensor(tensor: TensorResult) -> dict[str, Any]:
    return {
        "name": tensor.conditions.name,
        "source": tensor.conditions.source,
        "dtype": tensor.dtype.name,
        "shape": tensor.shape,
        "factor": tensor.conditions.factor,
        "worst_ulp": tensor.worst_ulp,
        "violations": sum(block.violations for block in tensor.blocks),
        "elements": {
            rule: sum(block.block.numel for block in tensor.blocks if block.block.rule == rule) for rule in _RULES
        },
    }


def _describe_moments(moments: MomentCertificate) -> dict[str, Any]:
    return {
        "holds": moments.holds,
        "source": moments.source,
        "file": moments.file,
        "elements": moments.elements,
        "worst_ulp": moments.worst_ulp,
        "nonfinite": moments.nonfinite,
        "faults": moments.faults,
        "tensors": [
            {
                "name": result.conditions.name,
                "source": result.conditions.source,
                "moment": result.moment,
                "factor": result.factor,
                "worst_ulp": result.worst_ulp,
                "violations": result.violations,
                "fault": result.fault and asdict(result.fault),
            }
            for result in moments.moments
        ],
    }


# The page.


@dataclass(frozen=True)
class Origin:
    """What an auditor needs to do a verification again, and to know that it was of these folders.

    Args:
        date: when it began, ISO 8601, UTC.
        command: that was given.
        records: of A and of B, before anything was read: the sha256 of its record, which lists digests of its tensors;
            None of a folder without one.
        versions: what it was done with, by name.
    """

    date: str
    command: str
    records: tuple[str | None, str | None]
    versions: Mapping[str, str]

    @classmethod
    def of(cls, command: Sequence[str], *places: str | Path) -> "Origin":
        """That of a verification which begins now, of the folders (or URLs, whose records are not looked at)."""
        first, second = (_record_digest(Path(place)) for place in places)
        versions = {"teleflm": package_version(), "python": platform.python_version(), "numpy": np.__version__}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(now, shlex.join(command), (first, second), {**versions, "system": platform.platform()})


def _record_digest(folder: Path) -> str | None:
    with suppress(OSError):
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    return None


def write_report(
    verification: Verification, folder: Path, names: tuple[str, str] = ("A", "B"), origin: Origin | None = None
) -> None:
    """Write `index.html`, self-contained, and beside it the plots and `verification.json`.

    Args:
        verification: the verdict and what it rests on.
        folder: where; made if absent, files of an earlier report are replaced.
        names: what to call A and B.
        origin: when, how and of what it was made.
    """
    certificate, numbers = verification.certificate, verification.numbers
    elements = dict.fromkeys(_RULES, 0)
    for tensor in certificate.tensors if certificate else ():
        for block in tensor.blocks:
            elements[block.block.rule] += block.block.numel
    write_report_files(
        folder,
        _TEMPLATE,
        _figures(verification),
        ("verification.json", {**describe(verification), **({"origin": asdict(origin)} if origin else {})}),
        origin=origin,
        verification=verification,
        certificate=certificate,
        numbers=numbers,
        moments=verification.moments,
        lines=summarise(certificate) if certificate else [],
        faults=[str(x) for x in (*certificate.broken_fields, *certificate.violations)] if certificate else [],
        elements=elements,
        total=sum(elements.values()),
        names=names,
    )


# The plots.


def _figures(verification: Verification) -> dict[str, "Figure"]:
    numbers, figures = verification.numbers, {}
    if numbers:
        figures["differences"] = _difference_figure(numbers)
        if numbers.layers:
            figures["layers"] = _layer_figure(numbers)
    if verification.layers:
        figures["distances"] = _distance_figure(verification.layers)
    return figures


def _difference_figure(numbers: Numbers) -> "Figure":
    """Histograms of |difference|: B beside A, and A's own rounding."""
    coarse, fine = numbers.floor_dtypes
    figure, axes = new_figure()
    shown = np.zeros(len(BINS) - 1, bool)
    for comparison, color, label in (
        (numbers.floor, _GREY, f"A's rounding floor: {coarse} beside {fine}"),
        (numbers.difference, _BLUE, f"B beside A, in {numbers.dtype}"),
    ):
        counts = np.array(comparison.histogram, np.float64)
        zeros = f", {counts[0] / counts.sum():.1%} exactly zero" if counts[0] else ""
        axes.stairs(counts[1:] / counts.sum(), BINS, fill=True, color=color, alpha=0.55, label=label + zeros)
        shown |= counts[1:] > 0
    axes.axvline(numbers.difference.max_logit, color="black", linewidth=0.8, linestyle=":", label="the largest logit")
    axes.set_xscale("log")
    used = BINS[:-1][shown]
    axes.set_xlim(used.min(initial=numbers.difference.max_logit) / 2, numbers.difference.max_logit * 3)
    axes.set_xlabel("absolute difference of a logit")
    axes.set_ylabel("share of all logits")
    legend_above(axes)
    return figure


def _layer_figure(numbers: Numbers) -> "Figure":
    """How far each layer moves the stream, and how far B's stream is from A's after it."""
    coarse, fine = numbers.floor_dtypes
    figure, axes = new_figure()
    index = [layer.layer for layer in numbers.layers]
    originals = [layer for layer in numbers.layers if layer.distance is not None]
    axes.bar(
        [layer.layer for layer in originals],
        [layer.distance or 0.0 for layer in originals],
        color="#dbeafe",
        label="how far the layer moves its input: 1 - cos",
    )
    for color, label, values in (
        (_GREY, f"A: {coarse} beside {fine}", [layer.floor for layer in numbers.layers]),
        (_BLUE, "B beside A", [layer.difference for layer in numbers.layers]),
    ):
        axes.plot(index, values, "o-", color=color, markersize=3, label=label)
    copies = [layer.layer for layer in numbers.layers if layer.is_copy]
    for number, copy in enumerate(copies):
        label = "" if number else "an additional layer"
        axes.axvspan(copy - 0.5, copy + 0.5, color="#f1f5f9", zorder=0, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("layer of B")
    axes.set_ylabel("relative to the stream")
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend_above(axes)
    return figure


def _distance_figure(layers: Sequence[MeasuredLayer]) -> "Figure":
    """How far each layer turns its input; those that were copied stand out."""
    figure, axes = new_figure()
    for color, label, chosen in (
        (_GREY, "once in B", [layer for layer in layers if not layer.copies]),
        (_BLUE, "copied", [layer for layer in layers if layer.copies]),
    ):
        if chosen:
            axes.bar([layer.layer for layer in chosen], [layer.cosine for layer in chosen], color=color, label=label)
    axes.set_xlabel("layer of the model that grew")
    axes.set_ylabel("1 - cos(input, output)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend_above(axes)
    return figure
