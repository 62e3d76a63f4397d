# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Imports run one way, and what has to be light stays light."""

import ast
import configparser
import json
import subprocess
import sys
from pathlib import Path

import grimp
import networkx
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("teleflm", "sft", "growth", "evaluation", "conversion", "modeling_teleflm")
# Each of ours, and which of ours it may import.
ALLOWED = {
    "conversion.checkpoint": {"conversion.checkpoint"},
    "conversion": {"conversion"},
    "evaluation": {"conversion", "evaluation", "modeling_teleflm"},
    "growth.verification": {"conversion", "evaluation", "growth.verification"},
    "growth": {"conversion", "evaluation", "growth", "modeling_teleflm"},
    "sft": {"conversion", "evaluation", "growth", "modeling_teleflm", "sft"},
    "modeling_teleflm": {"modeling_teleflm"},
}
HEAVY = ("torch", "transformers", "trl", "datasets", "matplotlib")


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """Every import of ours, wherever in a module."""
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(graph, package):
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module) if _is_in(module, package) else ():
            assert any(_is_in(imported, allowed) for allowed in ALLOWED[package]), f"{module} imports {imported}"


def circles(graph: grimp.ImportGraph) -> list[list[str]]:
    """Modules that import each other, wherever in a module the import stands."""
    arrows = ((module, other) for module in graph.modules for other in graph.find_modules_directly_imported_by(module))
    return [
        sorted(group) for group in networkx.strongly_connected_components(networkx.DiGraph(arrows)) if len(group) > 1
    ]


def test_no_modules_import_each_other(graph):
    assert circles(graph) == []


def test_a_circle_is_found(tmp_path, monkeypatch):
    package = tmp_path / "planted"
    package.mkdir()
    for name, text in {"__init__": "", "a": "from .b import x", "b": "def f():\n    import planted.a"}.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert circles(grimp.build_graph("planted", cache_dir=None)) == [["planted.a", "planted.b"]]


def test_model_files_stand_alone():
    """The three files a Hub repository carries import third parties and each other, nothing else."""
    for file in (ROOT / "modeling_teleflm").glob("*_teleflm.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert node.module.endswith("_teleflm")


@pytest.mark.parametrize(
    ("statement", "light"),
    [
        ("import teleflm.app", HEAVY),
        ("import conversion, conversion.hub.contents, conversion.mapping, conversion.checkpoint.execute", HEAVY),
        ("import growth", HEAVY),
        ("import sft, sft.data.labels", HEAVY),
    ],
)
def test_light_imports(statement, light):
    script = f"{statement}; import json, sys; print(json.dumps([m for m in {light!r} if m in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []


def test_an_installed_package_has_every_module_and_file():
    """What setup.cfg does not name is there in a checkout and missing for whoever installs."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    packages = config["options"]["packages"].split()
    tops = {name.split(".")[0] for name in packages}
    found = {".".join(path.parent.relative_to(ROOT).parts) for top in tops for path in (ROOT / top).rglob("*.py")}
    assert found == set(packages)
    assert tops == set(PACKAGES)
    data = {name: value.replace(",", " ").split() for name, value in config["options.package_data"].items()}
    packaged = {
        path
        for key, globs in data.items()
        for name in (packages if key == "*" else [key])
        for glob in globs
        for path in (ROOT / name.replace(".", "/")).glob(glob)
    }
    files = {
        path for top in tops for path in (ROOT / top).rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert {path for path in files if path.suffix != ".py"} == packaged
