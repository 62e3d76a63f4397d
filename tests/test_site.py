# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The site of the documents: every page is in its menu, the page of recipe keys is what the code says."""

import importlib.util
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

from sft.training.recipe import DataArguments, RunArguments

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / f"docs/{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stage, recipe_keys = script("stage"), script("recipe_keys")


def test_every_page_is_in_the_menu_once():
    menu = re.findall(r": ([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {str(path.relative_to(ROOT)) for pattern in stage.PAGES for path in ROOT.glob(pattern)}
    assert sorted(menu) == sorted(page for page in pages if page.endswith(".md"))


def test_the_page_of_recipe_keys_is_what_the_code_says():
    written = recipe_keys.PAGE.read_text()
    assert written == recipe_keys.page(recipe_keys.SOURCE.read_text()), "run: python docs/recipe_keys.py"
    for cls in (RunArguments, DataArguments):
        for field in fields(cls):
            (row,) = re.findall(rf"^\| `{field.name}` \| `.*?` \| `(.*?)` \|", written, re.MULTILINE)
            assert row == repr(field.default)


def test_a_key_without_a_meaning_is_noticed():
    source = recipe_keys.SOURCE.read_text()
    with pytest.raises(KeyError, match="planted"):
        recipe_keys.page(source.replace("    use_kernels: bool = False\n", "    planted: bool = False\n"))
    changed = source.replace("    use_kernels: bool = False\n", "    use_kernels: bool = True\n")
    assert recipe_keys.page(changed) != recipe_keys.PAGE.read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](record.md) and [b](serving.md#input_mult)", "[a](record.md) and [b](serving.md#input_mult)"),
        ("[c](../setup.cfg), [d](https://example.org)", "c, [d](https://example.org)"),
        ("![e](growth-study.svg)", "![e](growth-study.svg)"),
        ("[f](#here)", "[f](#here)"),
    ],
)
def test_links_to_what_is_no_page_become_words(text, expected):
    docs = ROOT / "docs"
    assert stage.staged(text, docs / "growing.md", {docs / "record.md", docs / "serving.md"}) == expected


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    """Where the extra `docs` is installed, here or by `make docs`."""
    places = [Path(sys.executable), ROOT / ".venv-docs/bin/python"]
    asked = [str(place) for place in places if place.exists() and _has_mkdocs(place)]
    if not asked:
        pytest.skip("needs the extra docs: make docs")
    stage.stage()
    command = [asked[0], "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "convert_checkpoint" in (tmp_path / "site/docs/python.html").read_text()


def _has_mkdocs(python: Path) -> bool:
    return not subprocess.run(
        [python, "-c", "import material, mkdocstrings"], capture_output=True, check=False
    ).returncode
