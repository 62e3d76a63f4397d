# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm sft recipes`."""

from typing import Annotated

import typer

from teleflm.terminal import Debug, Json, exit_codes, make_console, print_json

Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one. Without it: list them.")]
AsPath = Annotated[bool, typer.Option("--path", help="Print where NAME is instead of what it says.")]


def recipes(name: Name = None, path: AsPath = False, as_json: Json = False, debug: Debug = False) -> None:
    """The recipes that come with the package, the files for accelerate launch, and chat templates.

    sft train --config takes a recipe's name, --chat-template-path a template's. accelerate launch takes a path:
    --config_file "$(teleflm sft recipes fsdp2 --path)".
    """
    from sft.shipped import find_shipped, shipped_files

    with exit_codes(debug=debug):
        if name is None:
            if path:
                raise ValueError("--path is of one file; give its NAME.")
            _list(shipped_files(), as_json=as_json)
            return
        try:
            found = find_shipped(name)
        except LookupError as error:
            raise ValueError(str(error.args[0])) from None
        if as_json:
            print_json({"name": name, "path": str(found), "text": found.read_text(encoding="utf-8")})
        else:
            print(found if path else found.read_text(encoding="utf-8"), end="\n" if path else "")


_USE = {"recipe": "sft train", "accelerate": "accelerate launch", "template": "--chat-template-path"}


def _list(files: list, *, as_json: bool) -> None:  # type: ignore[type-arg]
    from rich.table import Table

    if as_json:
        print_json([{"name": file.name, "kind": file.kind, "path": str(file.path), "is": file.title} for file in files])
        return
    table = Table("name", "for", "what it is", box=None)
    for file in files:
        table.add_row(file.name, _USE[file.kind], file.title)
    make_console().print(table)


__all__ = ["recipes"]
