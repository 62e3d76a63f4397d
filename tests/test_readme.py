# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""README and the guides word for word: the first minute runs, each command is one, each link leads somewhere."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from teleflm.app import app, main

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "PACKAGE.md", "CONTRIBUTING.md", "model_card.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


def blocks(text: str) -> list[tuple[str, str]]:
    return [(match[1], match[2]) for match in BLOCK.finditer(text)]


def commands(block: str) -> Iterator[list[str]]:
    """The calls of teleflm in a block of shell, without what comes before it on its line."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "teleflm" in words and words[0] not in ("pip", "srun", "."):
            yield words[words.index("teleflm") + 1 :]


def run(monkeypatch, arguments: list[str]) -> int:
    monkeypatch.setattr("sys.argv", ["teleflm", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_the_first_minute(monkeypatch, tmp_path, capsys):
    """In order, as it is written; each command ends well, but for the plan of the 1T where the disk is too small."""
    monkeypatch.chdir(tmp_path)
    section = re.search(r"^## A first minute\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    kinds = [kind for kind, _ in blocks(section)]
    assert kinds == ["sh", "python", "sh"]
    said = {}
    for kind, block in blocks(section):
        if kind == "python":
            exec(compile(block, "README.md", "exec"), {})
            continue
        for arguments in commands(block):
            status = run(monkeypatch, arguments)
            said[" ".join(arguments[:2])] = out = capsys.readouterr()
            assert status == 0 or "free" in out.out, (arguments, out)
    assert "1,083,813,908,480" in said["inspect tele-flm-1t"].out
    assert "layers.*.mlp.down_proj" in said["grow tele-flm-102b"].out
    assert "B computes A's function" in said["verify small"].out
    assert (tmp_path / "large-granite/config.json").exists()


def find(arguments: list[str]) -> tuple[Any, list[str]]:
    """The command that is called, and what it is called with."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
        assert arguments[0] in command.commands, arguments[0]
        command, arguments = command.commands[arguments[0]], arguments[1:]
    return command, arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one(page):
    """Commands and options exist; of `train`, whose keys are a recipe's, the name."""
    for kind, block in blocks(page.read_text()):
        for arguments in commands(block) if kind == "sh" else ():
            command, rest = find(arguments)
            if command.name == "train" or (command.context_settings or {}).get("ignore_unknown_options"):
                continue
            known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
            known |= {"--help", "--install-completion", "--show-completion"}
            for word in rest:
                if re.match(r"-[a-z-]", word):
                    assert word.partition("=")[0] in known, (page.name, arguments, word)


def anchors(page: Path) -> set[str]:
    """The headings of a page as the Hub and GitHub name them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    names = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in names}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = page if not path else (page.parent / path).resolve()
        assert there.exists(), (page.name, target)
        assert not anchor or anchor in anchors(there), (page.name, target)
