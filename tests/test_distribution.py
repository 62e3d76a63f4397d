# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What is uploaded to a package index and what pip makes of it: one version, every file, nothing else."""

import configparser
import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TOPS = {"conversion", "evaluation", "growth", "modeling_teleflm", "sft", "teleflm"}
# Files that the program opens by name, a few of each kind; all of them are held by the tests below.
OPENED = (
    "modeling_teleflm/chat_template.jinja",
    "modeling_teleflm/presets/tele-flm-1t.json",
    "modeling_teleflm/modeling_teleflm.py",
    "modeling_teleflm/tokenization_teleflm.py",
    "growth/schedules/tele-flm-1t.yaml",
    "sft/recipes/tiny-cpu.yaml",
    "sft/accelerate_configs/fsdp2.yaml",
    "sft/chat_templates/published.jinja",
    "sft/selection/pipelines/teleflm.yaml",
    "sft/rewards/sandbox_child.py",
    "teleflm/reports/style.css",
    "teleflm/reports/verification.html.jinja",
)
JUNK = ("*.pyc", "*/__pycache__/*", "*/.*", "*/out/*", "*/build/*", "*/dist/*", "*.safetensors", "*.log", "*/site/*")
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)|<(?:img|a)\s")


def settings() -> configparser.ConfigParser:
    parsed = configparser.ConfigParser()
    parsed.read(ROOT / "setup.cfg")
    return parsed


def data_files(package_data: dict[str, list[str]], packages: list[str]) -> set[str]:
    """What of the checkout those patterns put into the wheel."""
    return {
        str(path.relative_to(ROOT))
        for key, globs in package_data.items()
        for name in (packages if key == "*" else [key])
        for glob in globs
        for path in (ROOT / name.replace(".", "/")).glob(glob)
    }


def declared() -> tuple[dict[str, list[str]], list[str]]:
    parsed = settings()
    data = {name: value.replace(",", " ").split() for name, value in parsed["options.package_data"].items()}
    return data, parsed["options"]["packages"].split()


def needed() -> set[str]:
    """Every file of ours that is no Python, as the checkout has it."""
    paths = (path for top in TOPS for path in (ROOT / top).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in paths if path.suffix not in (".py", ".pyc")}


def test_every_data_file_is_declared():
    assert data_files(*declared()) == needed()
    assert {name for name in OPENED if not name.endswith(".py")} <= needed()


@pytest.mark.parametrize("key", ["modeling_teleflm", "growth", "sft", "sft.selection", "teleflm.reports"])
def test_a_key_that_is_forgotten_is_noticed(key):
    data, packages = declared()
    del data[key]
    assert data_files(data, packages) < needed()


def test_there_is_one_version():
    version = settings()["metadata"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    heading = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading
    assert heading[1] == version == citation["version"]
    assert heading[2] == str(citation["date-released"])
    modules = [path for top in TOPS for path in (ROOT / top).rglob("*.py")]
    assert not [path for path in modules if f'"{version}"' in path.read_text(encoding="utf-8")]


def test_the_citation_is_whole():
    """What the schema of CFF 1.2.0 requires, of the software and of each reference."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert citation["authors"] == [{"name": settings()["metadata"]["author"]}]
    assert citation["license"] == settings()["metadata"]["license"]
    papers = [identifier["value"] for entry in citation["references"] for identifier in entry["identifiers"]]
    assert papers == ["10.48550/arXiv.2407.02783", "10.48550/arXiv.2305.02869"]
    for entry in citation["references"]:
        assert entry.keys() >= {"type", "title", "authors"}


def relative_links(text: str) -> list[str]:
    """Links that lead nowhere from a page of a package index."""
    return [match[0] for match in LINK.finditer(text) if not (match[1] or "").startswith(("https://", "http://"))]


def test_the_page_on_an_index_has_no_link_into_the_repository():
    name = settings()["metadata"]["long_description"].removeprefix("file:").strip()
    text = (ROOT / name).read_text()
    assert relative_links(text) == []
    assert "```mermaid" not in text
    assert relative_links((ROOT / "README.md").read_text())  # which is why it is another file


def test_the_base_has_no_torch_and_each_extra_all_of_what_it_is_built_on():
    parsed = settings()
    base = requirements(parsed["options"]["install_requires"])
    extras = {name: requirements(value) for name, value in parsed["options.extras_require"].items()}
    assert not base & {"torch", "transformers", "safetensors", "accelerate", "matplotlib", "datasets", "trl"}
    assert extras["convert"] == set()
    assert extras["model"] < extras["train"] < extras["sft"] < extras["dev"] < extras["external"]
    assert extras["report"] <= extras["sft"]


def requirements(text: str) -> set[str]:
    return {re.split(r"[<>=;\[ ]", line)[0] for line in text.split("\n") if line}


# What is built.


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """Wheel and source distribution of a clone, and the wheel that the source distribution makes."""
    folder = tmp_path_factory.mktemp("built")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder / "clone")], check=True)
    for name in subprocess.run(
        ["git", "ls-files", "-mo", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines():  # what is not committed yet
        (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            (folder / "clone" / name).write_bytes((ROOT / name).read_bytes())
    made = {"sdist": build("build_sdist", folder / "clone", folder / "sdist")}
    made["wheel"] = build("build_wheel", folder / "clone", folder / "wheel")
    with tarfile.open(made["sdist"]) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    made["rebuilt"] = build("build_wheel", source, folder / "rebuilt")
    return made


def build(hook: str, source: Path, out: Path) -> Path:
    """What a frontend does: call a hook of the backend in the folder of the sources."""
    out.mkdir()
    script = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-c", script, str(out)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True, env=environment)
    return out / result.stdout.splitlines()[-1]


def wheel_files(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_the_wheel_has_every_file_and_no_other(built):
    files = wheel_files(built["wheel"])
    modules = {str(path.relative_to(ROOT)) for top in TOPS for path in (ROOT / top).rglob("*.py")}
    info = {name for name in files if name.partition("/")[0].endswith(".dist-info")}
    assert {*files} - info == modules | needed()
    assert {*OPENED} <= {*files}
    assert {name.partition("/")[2] for name in info} >= {"METADATA", "licenses/LICENSE", "entry_points.txt"}
    for name in modules | needed():
        assert files[name] == (ROOT / name).read_bytes(), name


@pytest.mark.slow
def test_nothing_else_is_installed_on_top(built):
    """No `tests`, `benchmarks` or `demo` beside what others have installed under these names."""
    assert {name.partition("/")[0] for name in wheel_files(built["wheel"]) if ".dist-info/" not in name} == TOPS


@pytest.mark.slow
def test_the_metadata_is_what_setup_says(built):
    files = wheel_files(built["wheel"])
    (metadata,) = (files[name].decode() for name in files if name.endswith(".dist-info/METADATA"))
    assert f"Version: {settings()['metadata']['version']}\n" in metadata
    assert "Description-Content-Type: text/markdown\n" in metadata
    assert "Provides-Extra: convert\n" in metadata
    plain = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert plain
    assert not any("torch" in line or "transformers" in line for line in plain)
    assert "License-File: LICENSE\n" in metadata


@pytest.mark.slow
def test_the_source_distribution_makes_the_same_wheel(built):
    assert wheel_files(built["rebuilt"]) == wheel_files(built["wheel"])
    assert built["rebuilt"].name == built["wheel"].name


@pytest.mark.slow
def test_the_source_distribution_is_the_repository(built):
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2]: name for name in archive.getnames() if archive.getmember(name).isfile()}
    listed = ["git", "ls-files", "-co", "--exclude-standard"]
    result = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    repository = {name for name in result.stdout.splitlines() if (ROOT / name).is_file()}
    made = {name for name in names if name.startswith("teleflm.egg-info/")} | {"PKG-INFO"}
    left_out = {name for name in repository if name.startswith(".")}
    assert {*names} - made == repository - left_out
    assert {"LICENSE", "CITATION.cff", "CHANGELOG.md", "tests/test_distribution.py"} <= {*names}
    assert not [name for name in names for pattern in JUNK if fnmatch(f"/{name}", pattern)]


def test_the_site_shows_no_source_of_a_diagram():
    """Its theme would fetch from elsewhere what draws one."""
    stage = runpy.run_path(str(ROOT / "docs/stage.py"))
    page = ROOT / "README.md"
    text, shown = page.read_text(), stage["staged"](page.read_text(), page, set())
    assert "```mermaid" in text
    assert "mermaid" not in shown
    assert shown.count("```") == text.count("```") - 2
    assert "docs/stage.py" in (ROOT / "mkdocs.yml").read_text()
