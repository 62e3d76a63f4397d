# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm eval`."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teleflm.terminal import (
    DEFAULT_WORKERS,
    Debug,
    Json,
    Workers,
    byte_progress,
    exit_codes,
    make_console,
    print_json,
    print_table,
    token_progress,
)

if TYPE_CHECKING:
    from conversion.model_identity import ModelIdentity
    from evaluation.measure import Evaluation

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or URL of the model.")]
Text = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Text, or .jsonl with a text in each row; may be repeated."),
]
Tasks = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Multiple choice: .jsonl of question, choices, answer; or .yaml about one."),
]
Harness = Annotated[
    list[str] | None, typer.Option(metavar="TASK,...", help="Tasks of lm-evaluation-harness; loads the model.")
]
Loaded = Annotated[bool, typer.Option("--loaded", help="Load the model, on a GPU if there is one; else streamed.")]
Dtype = Annotated[
    str | None, typer.Option(help="To compute in: float32 unless given (float64, bfloat16); --harness: the weights'.")
]
Window = Annotated[int | None, typer.Option(help="Tokens read at a time; max_position_embeddings unless given.", min=2)]
Stride = Annotated[int | None, typer.Option(help="Tokens between windows of a long text; half a window.", min=1)]
EvalMemory = Annotated[str, typer.Option(help="What the streamed computation may take.")]
Work = Annotated[Path | None, typer.Option(metavar="DIR", help="For what lies between layers; in your cache, else.")]
Record = Annotated[bool, typer.Option("--record", help="Write the results to MODEL/teleflm_eval.json, for publish.")]
Output = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results there.")]
NoDigest = Annotated[bool, typer.Option("--no-digest", help="Do not hash the weights; publish finds no claim then.")]
Shots = Annotated[int | None, typer.Option(help="Of --harness: examples before a question.", min=0)]
Limit = Annotated[int | None, typer.Option(help="Of --harness: questions of a task, at most; for a try.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Of --harness.", min=1)]
IncludePath = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Of --harness: YAML files of tasks; may run code.")
]
Seed = Annotated[int, typer.Option(help="Of --harness.", min=0)]


def evaluate(
    model: Model,
    text: Text = None,
    tasks: Tasks = None,
    harness: Harness = None,
    loaded: Loaded = False,
    dtype: Dtype = None,
    window: Window = None,
    stride: Stride = None,
    memory: EvalMemory = "4GB",
    work: Work = None,
    record: Record = False,
    output: Output = None,
    no_digest: NoDigest = False,
    shots: Shots = None,
    limit: Limit = None,
    batch_size: BatchSize = 1,
    include_path: IncludePath = None,
    seed: Seed = 0,
    workers: Workers = DEFAULT_WORKERS,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a model: bits per byte of texts, multiple choice, tasks of lm-evaluation-harness.

    Without --loaded it is computed layer by layer from the files, whatever its size; a killed run goes on by the same
    command. Every token of a text is predicted once; where a text is longer than the window, windows overlap by window
    - stride tokens. Results in a file name the weights that they are of, and publish claims them of no others.
    """
    with exit_codes(debug=debug):
        names = [name.strip() for names in harness or () for name in names.split(",") if name.strip()]
        mine: dict[str, object] = {
            "--text": text,
            "--tasks": tasks,
            "--loaded": loaded,
            "--window": window,
            "--stride": stride,
        }
        mine |= {"--work": work}
        theirs: dict[str, object] = {"--shots": shots, "--limit": limit, "--include-path": include_path}
        _refuse_idle(names, mine, theirs)
        where = _results_file(model, record, output, has_digests=not no_digest)
        identify = where is not None and not no_digest
        if names:
            if limit and where:
                raise ValueError("--limit is for a try: its numbers are not written; leave out --record and --output.")
            found, identity = _run_harness(
                model,
                names,
                {"dtype": dtype or "auto", "shots": shots, "limit": limit, "batch_size": batch_size}
                | {"include_path": include_path, "seed": seed},
                identify,
                workers,
            )
            _finish_harness(found, identity, where, as_json)
            return
        from conversion.checkpoint.numbers import parse_size
        from evaluation.measure import evaluate as measure

        measure(
            model,
            texts=text or (),
            tasks=tasks or (),
            loaded=loaded,
            dtype=dtype or "float32",
            window=window,
            stride=stride,
            memory=parse_size(memory),
            work=work,
            identify=identify,
            workers=workers,
            keep=lambda evaluation: _finish(evaluation, where, as_json),
            progress=byte_progress if not loaded else token_progress,
            notify=lambda note: print(note, file=sys.stderr),
        )


def _refuse_idle(names: Sequence[str], mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse an option that would do nothing."""
    for option, value in (mine if names else theirs).items():
        if value:
            way_out = "leave it out, or --harness" if names else "it needs --harness"
            raise ValueError(f"{option} does nothing {'beside' if names else 'without'} --harness; {way_out}.")
    if not names and not (mine["--text"] or mine["--tasks"]):
        raise ValueError("nothing to measure: give --text FILE, --tasks FILE or --harness TASK.")


def _results_file(model: str, record: bool, output: Path | None, *, has_digests: bool) -> Path | None:
    """Where results are written, checked before anything is computed; None if nowhere."""
    from conversion.hub.remote import is_remote
    from conversion.hub.results import RESULTS
    from evaluation.results_file import check_results_file

    if record and output:
        raise ValueError("--record and --output exclude each other: results go into MODEL, or into a file of yours.")
    if record and is_remote(model):
        raise ValueError(f"{model}: is not on this machine, and nothing can be written there; give --output FILE.")
    where = Path(model) / RESULTS if record else output
    if where:
        check_results_file(where, has_digests=has_digests)
    return where


# What is said.


def _finish(evaluation: "Evaluation", where: Path | None, as_json: bool) -> None:
    from evaluation.measure import describe
    from evaluation.results_file import results_of

    with _then_written(where, results_of(evaluation), as_json):
        if as_json:
            print_json({**describe(evaluation), "model": _digests(evaluation.identity), "results_file": _name(where)})
        else:
            _print(evaluation)


@contextmanager
def _then_written(where: Path | None, content: Mapping[str, Any], as_json: bool) -> Iterator[None]:
    """Write results after they were shown: whatever becomes of one, the other is there."""
    from evaluation.results_file import write_results

    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # of stdout; it is raised again when the file is there
        if where:
            write_results(where, content)
        raise
    for note in write_results(where, content) if where else []:
        print(note, file=sys.stderr if as_json else sys.stdout)
    if where and not as_json:
        print(f"Results: {where}")


def _digests(identity: "ModelIdentity | None") -> dict[str, str | None] | None:
    return asdict(identity) if identity else None


def _name(path: Path | None) -> str | None:
    return str(path) if path else None


def _print(evaluation: "Evaluation") -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    console = make_console()
    how = f"{evaluation.forward}, {evaluation.dtype} on {evaluation.device}, window {evaluation.window}"
    if evaluation.texts:
        title = f"Texts: {how}, stride {evaluation.stride}, {evaluation.seconds:.1f} s"
        table = Table(
            "text", "bits per byte", "perplexity", "tokens", "bytes", "documents", title=title, title_justify="left"
        )
        table.box = SIMPLE
        for text in evaluation.texts:
            counts = (f"{count:,}" for count in (text.tokens, text.nbytes, text.documents))
            table.add_row(text.name, f"{text.bits_per_byte:.4f}", f"{text.perplexity:,.4g}", *counts)
        print_table(table)
    if evaluation.tasks:
        title = f"Multiple choice: {how}, {evaluation.seconds:.1f} s"
        table = Table(
            "task", "questions", "acc", "acc_norm", "acc_bytes", title=title, title_justify="left", box=SIMPLE
        )
        for task in evaluation.tasks:
            values = (_with_error(task.metrics[name].value, task.metrics[name].stderr) for name in task.metrics)
            table.add_row(task.name, f"{task.questions:,}", *values)
        print_table(table)
    for note in evaluation.notes:
        console.print(f"- {note}")


def _with_error(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


# The harness.


def _run_harness(
    model: str, names: Sequence[str], options: Mapping[str, Any], identify: bool, workers: int
) -> "tuple[dict[str, Any], ModelIdentity | None]":
    """What the harness returns, and of which model; whatever it prints goes to stderr."""
    from evaluation.harness import measure_by_harness

    with redirect_stdout(sys.stderr):
        return measure_by_harness(model, names, identify=identify, workers=workers, progress=byte_progress, **options)


def _finish_harness(
    found: Mapping[str, Any], identity: "ModelIdentity | None", where: Path | None, as_json: bool
) -> None:
    from evaluation.results_file import harness_results_of

    content = harness_results_of(found, identity)
    with _then_written(where, content, as_json):
        if as_json:
            print_json({**content, "results_file": _name(where)})
        else:
            _print_harness(content)


def _print_harness(content: Mapping[str, Any]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table("task", "shots", "metric", "filter", "value", title="lm-evaluation-harness", title_justify="left")
    table.box = SIMPLE
    for task, metrics in content["results"].items():
        for name, value in metrics.items():
            metric, _, filter = name.partition(",")
            if metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{filter}")
            shots = content["n-shot"].get(task, "")
            table.add_row(task, str(shots), metric, "" if filter == "none" else filter, _with_error(value, error))
    print_table(table)


__all__ = ["evaluate"]
