# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm verify`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conversion.checkpoint.manifest import MANIFEST
from teleflm.terminal import (
    DEFAULT_WORKERS,
    EXIT_NO,
    Debug,
    Json,
    Workers,
    byte_progress,
    exit_codes,
    make_console,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from rich.console import Console

    from growth.verification.certificate import Certificate
    from growth.verification.comparison import Numbers
    from growth.verification.moment_certificate import MomentCertificate
    from growth.verification.verify import Verification

A = Annotated[str, typer.Argument(metavar="A", help="Folder or URL of the source.")]
B = Annotated[str, typer.Argument(metavar="B", help="Folder or URL of what was made from it.")]
GrowthFlag = Annotated[
    bool, typer.Option("--growth", help="Insist on a certificate; with --text it is made only if possible.")
]
Text = Annotated[Path | None, typer.Option(metavar="FILE", help="Text to compare logits on.")]
Optimizer = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Trainer checkpoint of A whose optimizer.pt grew: certify B's too.")
]
ComputeDtype = Annotated[str, typer.Option(help="What logits are computed in: float64, float32 or bfloat16.")]
ForwardPass = Annotated[
    str, typer.Option(help="loaded, streamed from the files, or auto: loaded if it fits, and torch is here.")
]
MaxTokens = Annotated[int, typer.Option(help="Tokens of the text, at most.", min=2)]
ReportFolder = Annotated[Path | None, typer.Option("--report", metavar="DIR", help="Write an HTML page, PNG and JSON.")]
Record = Annotated[bool, typer.Option("--record", help="Add the verdict to B's record, teleflm_manifest.json.")]


def verify(
    a: A,
    b: B,
    growth: GrowthFlag = False,
    text: Text = None,
    optimizer: Optimizer = None,
    dtype: ComputeDtype = "float64",
    forward: ForwardPass = "auto",
    max_tokens: MaxTokens = 512,
    report: ReportFolder = None,
    record: Record = False,
    workers: Workers = DEFAULT_WORKERS,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Does B compute A's function? By its bytes, and with --text by its logits too.

    The last line says what was found, no stronger than it is; --json has it as "verdict": same-bytes, certified,
    indistinguishable (by the logits alone: exit status 0, but no proof), not-certified or different (exit status 3).
    With --optimizer the line says of B's optimizer.pt too whether it is A's, grown (exit status 3 if not); of a masked
    checkpoint that alone is looked at, and the verdict is unjudged.
    """
    from conversion.checkpoint.errors import printable
    from growth.verification.recorded import check_recordable, record_verification
    from growth.verification.verify import verify_checkpoints
    from teleflm.reports.page import check_report_folder

    from ..reports.verification import Origin, describe, write_report

    with exit_codes(debug=debug):
        if report:
            check_report_folder(report, "verification")
            if text:
                import matplotlib  # noqa: F401  # before the hours of work that its plots show
        origin = Origin.of(["teleflm", *sys.argv[1:]], a, b) if report else None
        recorded = check_recordable(b) if record else None
        verification = verify_checkpoints(
            a,
            b,
            growth=growth or None,
            text=text,
            optimizer=optimizer,
            dtype=dtype,
            forward=forward,  # type: ignore[arg-type]  # checked there, with a line of its own
            max_tokens=max_tokens,
            workers=workers,
            progress=byte_progress,
            notify=lambda note: print(note, file=sys.stderr),
        )
        if report:
            names = printable(Path(a).resolve().name), printable(Path(b).resolve().name)
            write_report(verification, report, names, origin)
        if recorded:
            record_verification(a, b, verification, recorded)
        if as_json:
            print_json(describe(verification))
        else:
            _print(verification, report, Path(b) / MANIFEST if recorded else None)
    if verification.is_refuted:
        raise typer.Exit(EXIT_NO)


def _print(verification: "Verification", report: Path | None, record: Path | None) -> None:
    """The verdict for people, and what it rests on."""
    console = make_console()
    if verification.certificate:
        _print_certificate(console, verification.certificate)
    if verification.numbers:
        _print_numbers(console, verification.numbers)
    if verification.moments:
        _print_moments(console, verification.moments)
    for note in verification.notes:
        console.print(f"- {note}")
    if report:
        console.print(f"Report: {report}/index.html")
    if record:
        console.print(f"Recorded in {record}", soft_wrap=True)
    known = False if verification.is_refuted else verification.same
    style = {True: "bold green", False: "bold red", None: "bold"}[known]
    console.print(verification.sentence, style=style)


def _print_certificate(console: "Console", certificate: "Certificate") -> None:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    from ..reports.verification import summarise

    table = Table(
        "weight", "has to be", "elements", "worst ulp", "holds", title="Bytes", title_justify="left", box=SIMPLE
    )
    for column in table.columns:
        column.no_wrap = True
    for line in summarise(certificate):
        holds = "yes" if line.holds else Text("no", "bold red")
        table.add_row(line.weight.replace("layers.", ""), line.condition, f"{line.elements:,}", line.worst, holds)
    print_table(table)
    for broken in [*certificate.broken_fields, *certificate.violations]:
        console.print(str(broken), style="red")


def _print_moments(console: "Console", moments: "MomentCertificate") -> None:
    from conversion.checkpoint.errors import printable

    counts, held = moments.elements, sum(not result.fault for result in moments.moments)
    console.print(
        f"Moments: {held} of {len(moments.moments)} tensors hold, {counts['old']:,} old and {counts['new']:,} new "
        f"elements; held against {printable(moments.source)}"
    )
    for fault in moments.faults:
        console.print(fault, style="red")


def _print_numbers(console: "Console", numbers: "Numbers") -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    coarse, fine = numbers.floor_dtypes
    table = Table("logits", "largest difference", "rms", "same argmax", title_justify="left", box=SIMPLE)
    table.title = f"Numbers: {numbers.difference.tokens} tokens, {numbers.forward}, {numbers.seconds:.1f} s"
    for name, result in (("B beside A", numbers.difference), (f"A, {coarse} beside {fine}", numbers.floor)):
        share = f"{result.same_argmax:.2%}"
        table.add_row(f"{name}", f"{result.max_difference:.3g}", f"{result.rms_difference:.3g}", share)
    print_table(table)
    console.print(numbers.reason)
