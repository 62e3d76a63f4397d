# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Lays the pages of the repository out for the site, under out/docs: `python docs/stage.py`, before `mkdocs build`.

The pages lie in several folders, where those who read the repository look for them, and link to each other and to code.
The site has the pages alone, under the same paths; of a link to something else the words stay.
"""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out/docs"
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "model_card.md", "docs/*.md", "docs/*.svg")
PAGES += ("examples/README.md", "benchmarks/RESULTS.md")
_DIAGRAM = re.compile(r"^```mermaid\n.*?^```\n+", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def staged(text: str, page: Path, pages: set[Path]) -> str:
    """A page as the site has it: without links to what is no page, and without what a script from elsewhere would draw.

    Args:
        text: of the page.
        page: its path.
        pages: the paths of all that the site has.
    """

    def kept(match: re.Match[str]) -> str:
        elsewhere = "://" in match[2] or (page.parent / match[2]).resolve() in pages
        return match[0] if elsewhere else match[1]

    return _LINK.sub(kept, _DIAGRAM.sub("", text))


def stage(out: Path = OUT) -> set[Path]:
    """Write all pages; those that are there from before are gone.

    Returns:
        The paths in the repository.
    """
    pages = {path.resolve() for pattern in PAGES for path in ROOT.glob(pattern)}
    shutil.rmtree(out, ignore_errors=True)
    for path in pages:
        target = out / path.relative_to(ROOT.resolve())
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            target.write_text(staged(path.read_text(encoding="utf-8"), path, pages), encoding="utf-8")
        else:
            shutil.copyfile(path, target)
    return pages


if __name__ == "__main__":
    stage()
