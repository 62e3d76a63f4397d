# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A selection for people: one self-contained HTML page, its plots as PNG, and the numbers as JSON.

Histograms and the map compare two samples of at most [`SAMPLE`] rows, of all valid rows and of the selected ones: those
with the smallest ids, which are hashes.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sft.data.checks import REASONS as INVALID
from sft.data.formats import find_turns
from sft.selection import embed, heuristics
from sft.selection.domains import tag_domain
from sft.selection.operators import SCORES
from sft.selection.pipeline import STAGES
from sft.selection.rejects import read_rejects, sample_rejects
from sft.selection.rows import conversations, whole_text
from sft.selection.stages import StageFiles
from teleflm.reports.page import legend_above, new_figure, write_report_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sft.selection.declaration import Declaration
    from sft.selection.pipeline import Selection
    from sft.selection.settings import SelectionSettings

SAMPLE = 5000
EXAMPLES = 20  # a domain
SHOWN_CHARACTERS = 1200  # of a message
SHOWN_REJECT = 400  # of a row that was dropped
_TEMPLATE = Path(__file__).with_name("selection.html.jinja")
_BLUE, _GREY, _RED = "#2563eb", "#94a3b8", "#f97316"
_REASONS = {
    **INVALID,
    **heuristics.REASONS,
    "exact_duplicate": "an earlier row has the same roles and texts",
    "near_duplicate": "a longer row, which is kept, holds most of its word pairs",
    "contaminated": "it contains an item of an evaluation set",
    "contains_target": "it contains a target, an example of what should get better",
    "ifd_high": "the questions do not help the scorer predict the answers, or less than asked for",
    "ifd_low": "the questions give the answers away to the scorer, more than asked for",
    "perplexity_high": "the model of --perplexity finds the answers more surprising than asked for",
    "perplexity_low": "the model of --perplexity finds the answers less surprising than asked for",
    "no_score": "it has no number in the column of scores",
    "answer_not_in_window": "it is longer than the model's window, which has room for no token of an answer",
    "model_not_finite": "the model makes infinity of it, or no number: is the model damaged?",
    "template_refused": "the chat template of the scorer refuses it",
    "not_selected": "it is valid, but others of its domain were taken",
}


@dataclass(frozen=True)
class Sample:
    """Some rows, as the plots need them.

    Args:
        keys: which rows, as (part, position).
        texts: all that is said in each.
        domains: by column or rule.
    """

    keys: list[tuple[str, int]]
    texts: list[str]
    domains: list[str]


def write_report(selection: "Selection", settings: "SelectionSettings", folder: Path) -> None:
    """Write `index.html`, self-contained, and beside it the plots and `selection.json`.

    Args:
        selection, settings: what came of it, and what was asked for.
        folder: made if absent; files of an earlier report are replaced.
    """
    declared = settings.declaration
    stages = StageFiles.open(Path(selection.file).parent / STAGES)
    domain_column = declared.value("domains", "column")
    before = _read_sample(stages, domain_column, after=0)
    after = _read_sample(stages, domain_column)
    fates = _fates(stages, before.keys)
    shares = {
        domain: (Counter(before.domains)[domain] / len(before.keys), selection.domains.get(domain, 0) / selection.count)
        for domain in sorted({*before.domains, *selection.domains})
    }
    figures = {
        "funnel": _funnel_figure(selection),
        "domains": _domain_figure(shares),
        "lengths": _length_figure(before.texts, after.texts),
        "map": _map_figure(_project(before.texts, declared), fates),
    }
    reasons = [
        (stage.name, reason, _REASONS.get(reason, ""), count)
        for stage in selection.stages
        for reason, count in stage.dropped.items()
    ]
    write_report_files(
        folder,
        _TEMPLATE,
        figures,
        ("selection.json", {**asdict(selection), **_without_folders(selection), "shares": shares}),
        declared=_describe(declared),
        selection=selection,
        reasons=reasons,
        shares=shares,
        examples=_examples(stages),
        rejects=_rejects(stages, declared),
        samples=(len(before.keys), len(after.keys)),
    )


def _without_folders(selection: "Selection") -> dict[str, str | None]:
    """The files of a selection by their names."""
    rejects = Path(selection.rejects).name if selection.rejects else None
    return {"file": Path(selection.file).name, "rejects": rejects}


def _describe(declared: "Declaration") -> dict[str, Any]:
    """What the head of the page says of how it was done. No paths: the page may be published."""
    told = {entry["operator"]: entry for entry in declared.to_dict(without_folders=True)["operators"]}
    scored = [
        entry.name if not entry.operator.switch else f"{entry.name} {told[entry.name][entry.operator.switch]}"
        for entry in declared.active
        if entry.operator.does == SCORES
    ]
    return {
        "pipeline": Path(declared.name).name,
        "operators": [entry.name for entry in declared.active],
        "seed": declared.seed,
        "score": ", ".join(scored) or "none",
        "embedder": told.get("embeddings", {}).get("embedder"),
    }


# --- the numbers ------------------------------------------------------------------------------------------------------


def _read_sample(stages: StageFiles, domain_column: str | None, after: int | None = None) -> Sample:
    table = stages.read_sample(("row",), SAMPLE, after)
    chats = list(conversations(table))
    given = [json.loads(row.as_py()).get(domain_column) if domain_column else None for row in table["row"]]
    return Sample(
        list(zip(table["part"].to_pylist(), table["position"].to_pylist(), strict=True)),
        [whole_text(messages) for messages in chats],
        [tag_domain(chat) if own is None else str(own) for chat, own in zip(chats, given, strict=True)],
    )


def _fates(stages: StageFiles, keys: Sequence[tuple[str, int]]) -> list[str]:
    """For each row `selected`, `not selected`, or `filtered out` by a stage before the last."""
    last = len(stages.results) - 1
    left = {after: _keys(stages.read((), after)) for after in (last - 1, last)}
    return [
        "selected" if key in left[last] else "not selected" if key in left[last - 1] else "filtered out" for key in keys
    ]


def _keys(table: pa.Table) -> set[tuple[str, int]]:
    return set(zip(table["part"].to_pylist(), table["position"].to_pylist(), strict=True))


def _project(texts: Sequence[str], declared: "Declaration") -> np.ndarray:
    """The two principal components of the texts' embeddings, `[texts, 2]`."""
    vectors = embed.fit(texts, declared.value("embeddings", "embedder"), declared.seed)(texts).astype(np.float64)
    centered = vectors - vectors.mean(axis=0)
    _, directions = np.linalg.eigh(centered.T @ centered)
    return centered @ directions[:, : -min(2, directions.shape[1]) - 1 : -1]


def _examples(stages: StageFiles) -> dict[str, list[dict[str, Any]]]:
    """Selected rows of each domain, with messages cut to what fits a page."""
    table = stages.read_sample(("domain", "quality", "similarity", "source", "row"), SAMPLE)
    if "similarity" not in table.column_names:  # of a choice without targets
        table = table.append_column("similarity", pa.nulls(len(table), pa.float32()))
    shown: dict[str, list[dict[str, Any]]] = {}
    rows = zip(
        *(table[name].to_pylist() for name in ("domain", "quality", "similarity", "source")),
        conversations(table),
        strict=True,
    )
    for domain, quality, similarity, source, messages in rows:
        if len(shown.setdefault(domain, [])) < EXAMPLES:
            cut = [
                {
                    "role": m["role"],
                    "content": m["content"][:SHOWN_CHARACTERS],
                    "more": len(m["content"]) > SHOWN_CHARACTERS,
                }
                for m in messages
            ]
            # The name of the file will do: where it lay is nobody's business.
            numbers = {"quality": quality, "similarity": similarity}
            shown[domain].append({"messages": cut, **numbers, "source": Path(source).name})
    return dict(sorted(shown.items()))


def _rejects(stages: StageFiles, declared: "Declaration") -> list[dict[str, Any]]:
    """Of each operator and reason a few rows, cut to what fits a page."""
    return [
        {
            "operator": operator,
            "reason": reason,
            "rows": [{"source": Path(row.source).name, "detail": row.detail, **_cut(row.row)} for row in rejects],
        }
        for (operator, reason), rejects in sample_rejects(read_rejects(stages, declared.stage_operators)).items()
    ]


def _cut(row: bytes) -> dict[str, Any]:
    text = row.decode("utf-8", "backslashreplace")
    try:
        turns, _ = find_turns(json.loads(row))
        told = [f"{turn.role}: {turn.content}" for turn in turns if isinstance(turn.content, str)]
    except (ValueError, RecursionError):
        told = []
    text = "\n".join(told) or text
    return {"text": text[:SHOWN_REJECT], "more": len(text) > SHOWN_REJECT}


# --- the plots --------------------------------------------------------------------------------------------------------


def _funnel_figure(selection: "Selection") -> "Figure":
    """Rows that each stage left."""
    stages = [stage for stage in selection.stages if stage.dropped or stage.name == "rows"]
    figure, axes = new_figure(height=0.9 + 0.42 * len(stages))
    names, counts = [stage.name for stage in stages], [stage.rows_out for stage in stages]
    bars = axes.barh(names, [stage.rows_in for stage in stages], color="#e2e8f0")
    axes.barh(names, counts, color=_BLUE)
    axes.bar_label(bars, [f"{count:,}" for count in counts], padding=4, fontsize=9)
    axes.margins(x=0.08)
    axes.invert_yaxis()
    axes.set_xlabel("rows in (grey) and out")
    return figure


def _domain_figure(shares: Mapping[str, tuple[float, float]]) -> "Figure":
    figure, axes = new_figure()
    places = np.arange(len(shares))
    for offset, color, label, index in ((-0.2, _GREY, "valid rows", 0), (0.2, _BLUE, "selected", 1)):
        bars = axes.bar(places + offset, [pair[index] for pair in shares.values()], 0.38, color=color, label=label)
        axes.bar_label(bars, [f"{pair[index]:.0%}" for pair in shares.values()], fontsize=9)
    axes.set_xticks(places, list(shares))
    axes.set_ylabel("share of rows")
    legend_above(axes)
    return figure


def _length_figure(before: Sequence[str], after: Sequence[str]) -> "Figure":
    figure, axes = new_figure()
    lengths = [np.maximum([len(text) for text in texts], 1) for texts in (before, after)]
    low, high = min(part.min() for part in lengths), max(part.max() for part in lengths)
    bins = np.geomspace(low, high + 1, 50)
    for values, color, label in zip(lengths, (_GREY, _BLUE), ("valid rows", "selected"), strict=True):
        counts, _ = np.histogram(values, bins)
        text = f"{label}, median {np.median(values):,.0f}"
        axes.stairs(counts / len(values), bins, fill=True, color=color, alpha=0.55, label=text)
    axes.set_xscale("log")
    axes.set_xlabel("characters of a conversation")
    axes.set_ylabel("share of rows")
    legend_above(axes)
    return figure


def _map_figure(points: np.ndarray, fates: Sequence[str]) -> "Figure":
    """Where the selected rows lie among all valid ones."""
    figure, axes = new_figure(height=6.5)
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    drawn = (("filtered out", _RED, 5), ("not selected", _GREY, 5), ("selected", _BLUE, 7))
    for fate, color, size in drawn:
        some = points[[found == fate for found in fates]]
        axes.scatter(
            *some.T, s=size, color=color, alpha=0.6, linewidths=0, rasterized=True, label=f"{fate} ({len(some):,})"
        )
    axes.set_xlabel("first principal component of the embeddings")
    axes.set_ylabel("second")
    legend_above(axes, markerscale=3)
    return figure


__all__ = ["EXAMPLES", "SAMPLE", "write_report"]
