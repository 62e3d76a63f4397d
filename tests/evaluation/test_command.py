# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm eval`: what it refuses, in one line, before anything is computed."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from teleflm.app import app

ROOT = Path(__file__).parents[2]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{m}", "nothing to measure: give --text FILE, --tasks FILE or --harness TASK."),
        ("{m} --text {t} --shots 3", "--shots does nothing without --harness; it needs --harness."),
        ("{m} --text {t} --harness a", "--text does nothing beside --harness; leave it out, or --harness."),
        ("{m} --window 8 --harness a", "--window does nothing beside --harness; leave it out, or --harness."),
        ("{m} --text {t} --dtype int8", "dtype is 'int8', expected one of float64, float32, bfloat16."),
        ("{m} --text {t} --memory 1MB", "--memory is 1 MB, and one passage of 255 tokens takes"),
        ("{m} --text {t} --memory much", "much"),
        ("{m} --text {m}", "Is a directory"),
        ("{m} --text nowhere.txt", "nowhere.txt: no such file."),
        ("{m}/nowhere --text {t}", "nowhere"),
        ("owner/name --text {t} --record", "owner/name: is not on this machine, and nothing can be written there"),
        ("hf://owner/name --text {t} --loaded", "is elsewhere, and --loaded needs a folder or OWNER/NAME"),
    ],
)
def test_what_is_refused_in_one_line(arguments, message, folder, text):
    result = run(*arguments.format(m=folder, t=text).split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the harness is installed")
def test_without_the_harness(folder):
    result = run(folder, "--harness", "arc_easy")
    assert result.exit_code == 2
    assert "--harness needs lm-evaluation-harness" in result.stderr
    assert 'pip install "teleflm[eval]"' in result.stderr


def test_the_same_by_python(folder, text):
    """The command is a call of a function that the package has."""
    import evaluation

    result = evaluation.evaluate(folder, texts=[text])
    assert isinstance(result, evaluation.Evaluation)
    said = json.loads(run(folder, "--text", text, "--json").stdout)
    assert said["texts"][0]["nats"] == result.texts[0].nats
    assert {"evaluate", "open_conversation"} <= set(dir(evaluation))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = evaluation.nothing


def test_a_name_is_shown_as_text_and_written(folder, tmp_path):
    """Of a file whose name would command a terminal, or is no UTF-8."""
    for name in (b"a\x1b[31m.txt", b"b\xff.txt"):
        path = tmp_path / os.fsdecode(name)
        path.write_text("the value")
        result = run(folder, "--text", path, "--output", tmp_path / "results.json")
        assert result.exit_code == 0, result.output
        assert "\x1b[31m" not in result.stdout
    assert json.loads((tmp_path / "results.json").read_bytes())["results"].keys() == {"a\\x1b[31m", "b\\udcff"}


def test_no_number_is_cut(folder, text, tmp_path, monkeypatch):
    """However narrow the terminal."""
    (tmp_path / "quiz.jsonl").write_text('{"question": "What?", "choices": ["a", "b"], "answer": 0}\n' * 2)
    options = ("--text", text, "--tasks", tmp_path / "quiz.jsonl")
    said = json.loads(run(folder, *options, "--json").stdout)["texts"][0]
    monkeypatch.setenv("COLUMNS", "20")
    shown = run(folder, *options).stdout
    assert "…" not in shown
    assert f"{said['bits_per_byte']:.4f}" in shown
    assert f"{said['tokens']:,}" in shown
    assert "0.5000" in shown or "1.0000" in shown or "0.0000" in shown


def test_a_masked_model_is_to_be_folded(folder, text, tmp_path):
    masked = Path(shutil.copytree(folder, tmp_path / "masked"))
    config = json.loads((masked / "config.json").read_bytes())
    (masked / "config.json").write_text(json.dumps({**config, "model_type": "TeleFLMMasked"}))
    for options in ((), ("--loaded",)):
        result = run(masked, "--text", text, *options)
        said = f"teleflm: {masked}: grows by masks (model_type is TeleFLMMasked); `teleflm fold` it first.\n"
        assert (result.exit_code, result.stderr) == (2, said)


def test_closed_streams(folder, text, tmp_path):
    """Of eval, whose results are a file; numbers that nobody can read are no failure."""
    command = '"$0" -m teleflm eval "$1" --text "$2" --output "$3" --json <&- >&-'
    arguments = ["bash", "-c", command, sys.executable, folder, text, tmp_path / "results.json"]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)
    assert (tmp_path / "results.json").is_file()


def test_tables_say_what_json_says(folder, text, tmp_path):
    (tmp_path / "quiz.jsonl").write_text('{"question": "What?", "choices": ["a", "b"], "answer": 0}\n' * 2)
    options = ("--text", text, "--tasks", tmp_path / "quiz.jsonl", "--window", 64)
    said, shown = json.loads(run(folder, *options, "--json").stdout), run(folder, *options).stdout
    assert (said["window"], said["stride"]) == (64, 32)
    assert f"{said['texts'][0]['bits_per_byte']:.4f}" in shown
    assert f"{said['texts'][0]['tokens']:,}" in shown
    assert f"{said['tasks'][0]['acc_norm']:.4f} ± " in shown
    assert "streamed, float32 on cpu, window 64, stride 32" in " ".join(shown.split())
