# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What every command shares on the terminal: exit codes, one-line errors, a progress bar, sizes for people."""

import errno
import io
import json
import os
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from conversion.checkpoint.dtypes import dtype_name
from conversion.checkpoint.errors import CorruptData
from conversion.checkpoint.limits import default_workers
from conversion.checkpoint.sizes import format_bytes
from conversion.extras import missing_package

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # embeddings, overrides, isolates
_WIDEST = 10_000  # columns of a table
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_NO, EXIT_INTERRUPTED, EXIT_UNREAD = 1, 2, 3, 130, 141

# The options that mean the same wherever they apply.
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the whole plan and write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Workers = Annotated[int, typer.Option(help="Threads.", min=1)]
Memory = Annotated[str, typer.Option(help="What all threads may hold together; fewer run where it is too little.")]
MaxShardSize = Annotated[str, typer.Option(help="Most bytes of weights in a file.")]
Dtype = Annotated[
    str | None,
    typer.Option(parser=dtype_name, metavar="DTYPE", help="bfloat16, float16, float32; else the source's."),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in OUT, or a file in the way.")]
NoDigest = Annotated[bool, typer.Option("--no-digest", help="Do not hash the tensors.")]
VerifySource = Annotated[
    bool,
    typer.Option("--verify-source", help="First check what SRC promises: sha256 of a download, digests, checksums."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
AllowNonfinite = Annotated[
    bool,
    typer.Option(
        "--allow-nonfinite",
        help="Write infinity for what is too large, and a run's NaN as they are; of weights alone, never of moments.",
    ),
]
Rank = Annotated[int | None, typer.Option(help="Which of the processes that share the work; else as launched.", min=0)]
WorldSize = Annotated[int | None, typer.Option(help="How many processes share the work; else as launched.", min=1)]
DEFAULT_WORKERS = default_workers()
# Of a command that hands what it does not know to the function it calls, which refuses what that does not know.
FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True}


@contextmanager
def exit_codes(*, debug: bool) -> Iterator[None]:
    """Turn errors into one line on stderr and the exit status that scripts rely on.

    2 is bad input, nothing written; 1 is a failure while working; 130 an interruption, after which the same command
    may be run again.
    """
    try:
        with failures_named(debug=debug):
            yield
    except KeyboardInterrupt:
        fail("interrupted; run the same command again.", EXIT_INTERRUPTED)
    except ValueError as error:
        if debug:
            raise
        fail(str(error), EXIT_FAILED if isinstance(error, CorruptData) else EXIT_BAD_INPUT)


@contextmanager
def failures_named(*, debug: bool) -> Iterator[None]:
    """Turn what the system refuses, such as space on a disk, into one line on stderr and exit status 1.

    A package that an extra would install is one line and exit status 2.

    Whoever reads the output may have enough of it, as `head` has: that is no failure and nothing is said, but the exit
    status is that of a program which SIGPIPE ends.
    """
    try:
        yield
        if sys.stdout is not None:  # as it is where it was closed by whoever started this
            sys.stdout.flush()  # what cannot be printed is a failure as well
    except ModuleNotFoundError as error:
        said = missing_package(error)
        if debug or said is None:
            raise
        fail(said, EXIT_BAD_INPUT)
    except OSError as error:
        if error.errno == errno.EPIPE and error.filename == "stdout":
            raise typer.Exit(EXIT_UNREAD) from None
        if debug:
            raise
        fail(f"{error.filename or 'disk'}: {error.strerror or error}", EXIT_FAILED)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, by which launchers end a process, end it as Ctrl-C does: with its work in order, and a last word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Stdout:
    """Stdout, which escapes what its encoding lacks, as stderr does, and whose errors say that they are its own."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        stream.reconfigure(errors="backslashreplace")
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._named_errors():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._named_errors():
            self._stream.flush()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # or Python fails again when it ends
            raise OSError(error.errno, error.strerror, "stdout") from None


def prepare_stdout() -> None:
    """Let any text be printed, and a failure to print be told from one of the disk."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _Stdout(sys.stdout)  # all that print and rich ask of it


def fail(message: str, status: int) -> NoReturn:
    """End with one line on stderr and an exit status; with --json as an object on stdout too, which scripts read."""
    from conversion.checkpoint.mirror import shown

    print(f"teleflm: {shown(message)}", file=sys.stderr)
    if "--json" in sys.argv[1:] and sys.stdout is not None:
        with suppress(OSError):
            print_json({"error": shown(message), "exit_status": status})
            sys.stdout.flush()
    raise typer.Exit(status)


def make_console(*, soft_wrap: bool = True, stderr: bool = False) -> "Console":
    """A console that shows texts as they are, in tables and titles too.

    Names of files, folders and tensors may come from anyone, and `[red]`, `[/]` or `:smile:` in one is part of it.

    Args:
        soft_wrap: leave the breaking of long lines to the terminal.
        stderr: write there.
    """
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, soft_wrap=soft_wrap, stderr=stderr)


def print_table(table: "Table", *, stderr: bool = False) -> None:
    """Print a table with every cell whole: a terminal that is narrower breaks the lines, and no number is cut."""
    from rich.measure import Measurement

    console = make_console(stderr=stderr)
    wide = console.options.update(max_width=_WIDEST)
    table.title, title = None, table.title
    console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    table.title = title
    console.print(table)


@contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr with bytes a second and the time left; one plain line when stderr is no terminal.

    Yields:
        A function to call, from any thread, with the number of bytes just done and the number in all.
    """
    with byte_progresses(what) as (advance,):
        yield advance


@contextmanager
def byte_progresses(*steps: str) -> Iterator[list[Callable[[int, int], None]]]:
    """The same for work of several steps, each with a bar that is there once it begins.

    Args:
        steps: what each does.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = make_console(soft_wrap=False, stderr=True)
    description = TextColumn("{task.description}")
    columns = (description, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def bar(what: str) -> Callable[[int, int], None]:
            task = progress.add_task(what, total=None, visible=False)
            announced = Event()

            def advance(nbytes: int, total: int) -> None:
                if not announced.is_set():
                    announced.set()
                    if not console.is_terminal:
                        print(f"{what}: {format_bytes(total)}", file=sys.stderr)
                    progress.update(task, total=total, visible=True)
                progress.advance(task, nbytes)

            return advance

        yield [bar(what) for what in steps]


@contextmanager
def token_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr with the share of tokens and the time left; nothing when stderr is no terminal.

    Yields:
        A function to call with the number of tokens just computed and the number in all.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = make_console(soft_wrap=False, stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def advance(tokens: int, total: int) -> None:
            progress.update(task, total=total)
            progress.advance(task, tokens)

        yield advance


def process_rank(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """Which of how many processes this is: as the options say, or as torchrun or srun tell it; (0, 1) without either.

    In a Slurm batch script only the steps started by srun share work, so the step's variables count.

    Args:
        rank, world_size: the options `--rank` and `--world-size`, where they were given.

    Raises:
        ValueError: the options or variables are no rank of a world.
    """
    if rank is not None or world_size is not None:
        if rank is None or world_size is None:
            raise ValueError("--rank and --world-size go together: give both, or neither.")
        if rank >= world_size:
            raise ValueError(f"--rank is {rank} and --world-size is {world_size}: that is no rank of a world.")
        return rank, world_size
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE")
    elif "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS")
    else:
        return 0, 1
    texts = [environment.get(name, "") for name in names]
    if not all(text.isascii() and text.isdigit() for text in texts) or int(texts[0]) >= int(texts[1]):
        raise ValueError(f"{names[0]} is {texts[0]!r} and {names[1]} is {texts[1]!r}: that is no rank of a world.")
    return int(texts[0]), int(texts[1])


def print_json(value: Any) -> None:
    """One JSON object on stdout, of plain ASCII where its encoding is no Unicode."""
    print(json_text(value, indent=2))


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON as stdout can have it: plain ASCII where its encoding is no Unicode, and nothing that steers a terminal."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # it may be closed
    text = json.dumps(value, indent=indent, ensure_ascii=not encoding.lower().startswith("utf"))
    # What is left to escape stands in texts, and JSON has one way to write it.
    return "".join(f"\\u{ord(c):04x}" if c != "\n" and steers_terminal(c) else c for c in text)


def steers_terminal(char: str) -> bool:
    """Whether a terminal obeys a character, and does not show it: control characters, and those that turn text around.

    Spaces of any width, joiners and the marks that Arabic and Hebrew are written with are text.
    """
    return unicodedata.category(char) in ("Cc", "Cs") or unicodedata.bidirectional(char) in _TURNS
