# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm doctor`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from conversion.checkpoint.sizes import format_bytes
from teleflm.terminal import EXIT_FAILED, Debug, Json, exit_codes, make_console, print_json, print_table

if TYPE_CHECKING:
    from teleflm.environment import Environment


def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Say what is installed, what each command would need, and what this machine has.

    Exit status 1 if the package's own requirements are not met, or checkpoints cannot be read on this system.
    """
    from teleflm.environment import examine_environment

    with exit_codes(debug=debug):
        environment = examine_environment()
        if as_json:
            print_json(_describe(environment))
        else:
            _print_environment(environment)
    if environment.problems:
        raise typer.Exit(EXIT_FAILED)


def _describe(environment: "Environment") -> dict[str, Any]:
    return {**asdict(environment), "notes": environment.notes, "problems": environment.problems}


def _print_environment(environment: "Environment") -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    from teleflm.environment import shown

    machine = Table(show_header=False, title="This machine", title_justify="left", box=SIMPLE)
    machine.add_row("system", environment.system)
    machine.add_row("Python", environment.python)
    for name, version in environment.versions.items():
        machine.add_row(name, version or "not installed")
    for name, memory in environment.accelerators:
        machine.add_row("accelerator", f"{name}, {format_bytes(memory)}" if memory else name)
    if environment.accelerator_note:
        machine.add_row("accelerator" if not environment.accelerators else "", environment.accelerator_note)
    machine.add_row("processors", f"{environment.processors} for this process")
    machine.add_row("memory", f"{format_bytes(environment.memory)} for this process")
    machine.add_row("disk", f"{format_bytes(environment.disk)} free here")
    machine.add_row("Hub cache", f"{environment.cache[0]}, {format_bytes(environment.cache[1])} free")
    print_table(machine)

    commands = Table("what", "packages", "missing", title="Commands", title_justify="left", box=SIMPLE)
    for need in environment.needs:
        lacks = [*map(shown, need.missing), need.way_out] if need.missing else []
        what = "\n".join(need.commands) if need.extra else "everything else"
        commands.add_row(what, "missing" if need.missing else "present", "\n".join(lacks))
    print_table(commands)
    console = make_console()
    for note in environment.notes:
        console.print(note)
    for problem in environment.problems:
        console.print(problem, style="bold red")
