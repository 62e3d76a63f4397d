# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The package without extras, as storage nodes install it: a command works, or says in one line what installs it."""

import configparser
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import typer.main
from packaging.requirements import Requirement

from conversion.extras import EXTRA_OF, missing_package
from teleflm.app import app
from tests.fixtures.lacking import ROOT, Said, run_lacking
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

WIDER = ("--set", "hidden_size=64", "--set", "num_attention_heads=8", "--set", "num_hidden_layers=4")
# Each command, and the extra without which it does nothing; None where it works. In this order: later ones read what
# earlier ones wrote.
COMMANDS: dict[str, str | None] = {
    "inspect tele-flm-1t": None,
    "inspect model": None,
    "convert model converted --dtype bfloat16": None,
    "inspect converted --check": None,
    "grow tele-flm-102b elsewhere --to tele-flm-1t --dry-run --json": None,
    f"grow model grown {' '.join(WIDER)}": None,
    f"grow model masked --method mask {' '.join(WIDER)}": None,
    "fold masked folded": None,
    "grow-plan plan.yaml": None,
    "grow-plan plan.yaml --plot plan.png": "report",
    "verify model grown": None,
    "verify model grown --report report": None,
    "verify model grown --text text.txt": None,
    "verify model grown --text text.txt --report plotted": "report",
    "verify model grown --text text.txt --forward loaded": "model",
    "export grown granite --to granite": None,
    "export grown llama --to llama": None,
    "export grown gguf --to gguf": None,
    "export grown megatron --to megatron": None,
    "export grown torch_dist --to torch_dist": None,
    "export grown dcp --to dcp": None,
    "publish converted owner/name --dry-run --license apache-2.0": None,
    "eval model --text text.txt": None,
    "eval model --text text.txt --loaded": "model",
    "eval model --harness arc_easy": "model",
    "chat model": "model",
    "doctor": None,
    "train --model_name_or_path model --train_files text.txt --output_dir run": "train",
    "sft recipes": None,
    "sft recipes tiny-cpu": None,
    "sft validate chat.jsonl": None,
    "sft validate chat.jsonl --model model": "sft",
    "sft select chat.jsonl selected -n 2": "sft",
    "sft prepare chat.jsonl prepared --model model": "sft",
    "sft preview chat.jsonl --model model": "sft",
    "sft plan --model model --method lora": None,
    "sft train --config tiny-cpu --model_name_or_path model --data_files chat.jsonl --output_dir run": "sft",
    "sft report run": None,  # which is not there: what it needs is checked after that
    "sft export model exported": None,
}
FAILS = {"sft report run": 2}
PLAN = (ROOT / "growth/schedules/tele-flm-1t.yaml").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("without")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer(folder / "model").save_pretrained(folder / "model")
    rows = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}] for i in range(4)]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (folder / "text.txt").write_text("The value of a subscription is the item that the key selects.\n" * 20)
    (folder / "plan.yaml").write_text(PLAN)
    return folder


def base_packages() -> set[str]:
    """What `pip install teleflm` brings: its requirements and all of theirs, as far as they are installed here."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    asked = [Requirement(line) for line in settings["options"]["install_requires"].split("\n") if line]
    found: set[str] = set()
    while asked:
        requirement = asked.pop()
        name = canonical(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        try:
            asked += map(Requirement, metadata.requires(name) or ())
        except metadata.PackageNotFoundError:
            continue
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def other_modules() -> Iterator[str]:
    """Every module here that a plain `pip install teleflm` would not have brought."""
    base = base_packages() | {"pip", "setuptools", "teleflm"}
    for module, owners in metadata.packages_distributions().items():
        if module.isidentifier() and not base.intersection(map(canonical, owners)):
            yield module


def is_one_line(said: Said) -> bool:
    """Whether an error is a line, after what the command had to note."""
    lines = [line for line in said.stderr.splitlines() if line.startswith("teleflm: ")]
    return len(lines) == 1 and said.stderr.splitlines()[-1] == lines[0] and "Traceback" not in said.stderr


@pytest.fixture(scope="module")
def results(folder) -> dict[str, Said]:
    """All of them in a process that has what the package itself requires, and nothing else."""
    gone = sorted(other_modules())
    assert {"torch", "transformers", "matplotlib", "pyarrow"} <= {*gone}
    return dict(zip(COMMANDS, run_lacking(folder, [line.split() for line in COMMANDS], packages=gone), strict=True))


def test_every_command_is_tried():
    def leaves(command, *path):
        for name, part in getattr(command, "commands", {}).items():
            yield from leaves(part, *path, name)
        if not hasattr(command, "commands"):
            yield " ".join(path)

    assert {*leaves(typer.main.get_command(app))} == {
        " ".join(line.split()[: 1 + line.startswith("sft ")]) for line in COMMANDS
    }


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_works_or_says_what_installs_it(line, results):
    said, extra = results[line], COMMANDS[line]
    if extra:
        assert said.status == 2, said
        assert is_one_line(said), said
        assert f'pip install "teleflm[{extra}]"' in said.stderr
    else:
        assert said.status == FAILS.get(line, 0), said
        assert "Traceback" not in said.stderr


def test_verify_takes_the_files_where_torch_is_not_there(results):
    assert "streamed" in results["verify model grown --text text.txt"].stdout


def test_publish_says_that_it_tried_nothing(results):
    said = results["publish converted owner/name --dry-run --license apache-2.0"]
    assert "Not loaded: that needs transformers and torch" in said.stdout + said.stderr


def test_the_bytes_are_those_of_a_machine_with_torch(folder, results, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    run_lacking(tmp_path, [line.split() for line in COMMANDS if line.startswith(("convert", "grow model grown"))])
    for name in ("converted", "grown"):
        for file in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (tmp_path / name / file).read_bytes() == (folder / name / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("package", ["torch", "datasets", "trl"])
def test_with_one_package_less(package, folder):
    """As an installation that was broken off: still a line, and the extra of what was asked for."""
    lines = {
        "torch": [
            "chat model",
            "sft train --config tiny-cpu",
            "train --output_dir run",
            "sft select chat.jsonl s -n 2 --help",
        ],
        "datasets": ["sft train --config tiny-cpu", "sft prepare chat.jsonl p --model model", "train --output_dir run"],
        "trl": ["sft train --config tiny-cpu"],
    }[package]
    results = run_lacking(folder, [line.split() for line in lines], packages=[package])
    for line, said in zip(lines, results, strict=True):
        if said.status:
            assert said.status == 2, said
            assert is_one_line(said), said
            extra = "sft" if line.startswith("sft") else line.split()[0].replace("chat", "model")
            assert f'pip install "teleflm[{extra}]"' in said.stderr, said
        assert "Traceback" not in said.stderr, said


def test_the_model_says_what_it_needs():
    script = "import sys; sys.modules['torch'] = None\ntry: import modeling_teleflm\nexcept ImportError as e: print(e)"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == 'modeling_teleflm needs torch, which is not installed; pip install "teleflm[model]".\n'


def test_a_module_of_ours_that_is_missing_is_no_users_error(folder):
    """A bug has its traceback, and is not told as a package that could be installed."""
    assert missing_package(ModuleNotFoundError("No module named 'growth.gro'", name="growth.gro")) is None
    (said,) = run_lacking(folder, [["inspect", "model"]], packages=["conversion.inspect"])
    assert said.status is None
    assert "Traceback" in said.stderr


def test_every_extra_brings_what_is_said_of_it():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    distributions = metadata.packages_distributions()
    for module, extra in EXTRA_OF.items():
        asked = {
            canonical(Requirement(line).name) for line in settings["options.extras_require"][extra].split("\n") if line
        }
        owners = {canonical(name) for name in distributions.get(module, [module])}
        via = {"scipy": "scikit-learn", "lm_eval": "lm-eval"}
        assert asked & (owners | {via.get(module, "")}), (module, extra)
