# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm sft select`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teleflm.terminal import DEFAULT_WORKERS, Debug, Json, exit_codes, make_console, print_json

from .labelling import Sanitize

if TYPE_CHECKING:
    from sft.selection import Selection, SelectionSettings

DataAndOut = Annotated[
    list[str] | None, typer.Argument(metavar="DATA... OUT", help="Files of conversations; folder to write.")
]
Count = Annotated[int | None, typer.Option("-n", "--count", help="Rows to select; 30000 unless declared.")]
Method = Annotated[
    str | None,
    typer.Option(
        help="teleflm: clusters in proportion, outliers last. k-center: seeks outliers, and with them what is damaged. "
        "target: nearest to examples. Or a baseline: random, longest or ifd-top. teleflm, or with --target target."
    ),
]
Pipeline = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Operators in YAML, in place of --method; --explain prints one to start from."),
]
Within = Annotated[
    str | None,
    typer.Option(
        help="Rows of a cluster by quality, medoid (nearest to the centre, where mixtures lie) or random; quality if "
        "there is a score, else random."
    ),
]
Quota = Annotated[
    str | None,
    typer.Option(help="Shares of domains: math=0.3,code=0.3,multi_turn=0.2,general=0.2; those of the data otherwise."),
]
DomainColumn = Annotated[str | None, typer.Option(help="A column of the data that names a row's domain.")]
Decontaminate = Annotated[
    list[str] | None, typer.Option(metavar="FILE", help="Evaluation set to keep out of the selection. Repeatable.")
]
Target = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Examples of what should get better; what is nearest to them is selected."),
]
KeepTargetCopies = Annotated[
    bool, typer.Option("--keep-target-copies", help="Keep rows that contain an example of --target.")
]
Scorer = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="Causal language model, for the IFD score, or a reward model; its config.json says which."
    ),
]
ScorerLabel = Annotated[
    str | None, typer.Option(help="Of a --scorer with several labels: the one whose probability is the score.")
]
ScorerFormat = Annotated[
    str | None,
    typer.Option(help="plain: the --scorer reads plain text. template, its chat template, unless given."),
]
Perplexity = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="Causal language model; rows whose answers surprise it least or most are dropped."
    ),
]
ScoreColumn = Annotated[
    str | None, typer.Option(help="A column of the data with a number for each row, the higher the better.")
]
Embedder = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Sentence encoder, a folder or sentence-transformers:NAME; rds:NAME; or a model whose input embeddings "
        "are taken; words of the data unless given.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="OPERATOR.NAME=VALUE", help="A threshold; --explain prints them. Repeatable."),
]
Explain = Annotated[
    bool,
    typer.Option("--explain", help="Print the operators as YAML for --pipeline, and do nothing."),
]
UniqueIds = Annotated[bool, typer.Option("--unique-ids", help="Replace ids that are missing or repeated.")]
AllowFewer = Annotated[
    bool, typer.Option("--allow-fewer", help="Select what there is, if that is less than -n or --quota ask for.")
]
Rejects = Annotated[
    bool, typer.Option("--rejects", help="Write OUT/rejects.jsonl: every other row, what dropped it and why.")
]
ReportFolder = Annotated[Path | None, typer.Option("--report", metavar="DIR", help="Write an HTML page, PNG and JSON.")]
SelectionSeed = Annotated[int | None, typer.Option("--seed", help="Of everything random; 0 unless declared.", min=0)]
Workers = Annotated[int, typer.Option(help="Processes; memory grows with it, the selection stays.", min=1)]
Ray = Annotated[bool, typer.Option("--ray", help="Run on the Ray cluster that ray.init finds; OUT on a shared disk.")]


def select(
    data_and_out: DataAndOut = None,
    count: Count = None,
    method: Method = None,
    pipeline: Pipeline = None,
    within: Within = None,
    quota: Quota = None,
    domain_column: DomainColumn = None,
    decontaminate: Decontaminate = None,
    target: Target = None,
    keep_target_copies: KeepTargetCopies = False,
    scorer: Scorer = None,
    scorer_label: ScorerLabel = None,
    scorer_format: ScorerFormat = None,
    perplexity: Perplexity = None,
    score_column: ScoreColumn = None,
    embedder: Embedder = None,
    set_: Set = None,
    unique_ids: UniqueIds = False,
    allow_fewer: AllowFewer = False,
    sanitize_control_tokens: Sanitize = False,
    explain: Explain = False,
    rejects: Rejects = False,
    report: ReportFolder = None,
    seed: SelectionSeed = None,
    workers: Workers = DEFAULT_WORKERS,
    ray: Ray = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make anew what OUT holds of another selection, or was edited.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Select conversations to fine-tune on: deduplicated, decontaminated, undamaged, diverse.

    OUT gets selected.jsonl, selection.json and the files of the stages. An interrupted command goes on when it is run
    again.
    """
    from sft.selection import SelectionSettings, select_conversations
    from sft.selection.options import parse_thresholds
    from teleflm.reports.page import check_report_folder

    with exit_codes(debug=debug):
        settings = SelectionSettings(
            count=count,
            method=method,
            pipeline=pipeline,
            within=within,
            quota=_parse_quota(quota),
            domain_column=domain_column,
            decontaminate=tuple(decontaminate or ()),
            target=target,
            keep_target_copies=keep_target_copies,
            scorer=scorer,
            scorer_label=scorer_label,
            scorer_format=scorer_format,
            perplexity=perplexity,
            score_column=score_column,
            embedder=embedder,
            thresholds=parse_thresholds(set_ or ()),
            unique_ids=unique_ids,
            seed=seed,
            allow_fewer=allow_fewer,
            sanitize_control_tokens=sanitize_control_tokens,
        )
        if explain:
            _explain(settings, as_json)
            return
        *data, out = data_and_out or [""]
        if not data:
            raise ValueError(
                f"DATA is missing: {out} is OUT, the folder to write." if out else "DATA... OUT are missing."
            )
        if report is not None:
            check_report_folder(report, "selection")
            if report.resolve() == Path(out).resolve():
                raise ValueError(
                    f"{report}: is OUT, which has a selection.json of its own; give --report another folder."
                )
        selection = select_conversations(
            data,
            out,
            settings,
            workers=workers,
            use_ray=ray,
            overwrite=overwrite,
            rejects=rejects,
            notify=lambda line: print(line, file=sys.stderr),
        )
        if report is not None:
            from teleflm.reports.selection import write_report

            write_report(selection, settings, report)
        if as_json:
            print_json(asdict(selection))
        else:
            _print(selection, report)


def _parse_quota(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    quota: dict[str, float] = {}
    for pair in text.split(","):
        name, equals, share = pair.partition("=")
        name = name.strip()
        try:
            value = float(share)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise ValueError(f"--quota: {pair!r} is not DOMAIN=SHARE, as in math=0.5,code=0.5.")
        if name in quota:
            raise ValueError(f"--quota: {name} is given twice.")
        quota[name] = value
    return quota


def _explain(settings: "SelectionSettings", as_json: bool) -> None:
    """All that is asked for, as a file that asks for it; as JSON besides what it comes to."""
    declared = settings.declaration
    if not as_json:
        print(declared.to_yaml(), end="")
        return
    from sft.selection.operators import THRESHOLDS

    thresholds = {
        f"{entry.name}.{name}": value
        for entry in declared.active
        for name, value in entry.values.items()
        if f"{entry.name}.{name}" in THRESHOLDS
    }
    stages = ["rows", *(entry.stage for entry in declared.active)]
    print_json({"stages": stages, "thresholds": thresholds, "pipeline": declared.to_dict()})


def _print(selection: "Selection", report: Path | None) -> None:
    """The funnel, and what came out of it."""
    from rich.box import SIMPLE
    from rich.table import Table

    console = make_console()
    table = Table("stage", "rows in", "rows out", "seconds", "dropped", box=SIMPLE)
    for stage in selection.stages:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in stage.dropped.items())
        table.add_row(stage.name, f"{stage.rows_in:,}", f"{stage.rows_out:,}", f"{stage.seconds:.1f}", dropped)
    console.print(table)
    domains = ", ".join(f"{count:,} {name}" for name, count in selection.domains.items())
    done = "already done: " if selection.already_done else ""
    console.print(f"{selection.file}: {done}{selection.count:,} rows ({domains})")
    if selection.rejects:
        console.print(f"Rejects: {selection.rejects}")
    if report:
        console.print(f"Report: {report}/index.html")


__all__ = ["select"]
