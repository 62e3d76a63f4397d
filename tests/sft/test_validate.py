# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Every rejected row comes back whole, and no file is too large."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sft.data.checks import REASONS
from sft.data.dataset import prepare_dataset
from sft.data.labels import DataError, Labelling
from sft.data.validate import validate_conversations
from teleflm.commands.sft import app
from tests.fixtures.tiny import tiny_tokenizer
from tests.sft.test_data import ANSWER, ASK, INVALID, chat, write

ROOT = Path(__file__).parents[2]


def sft(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_rejects_hold_each_row_as_it_came(tmp_path):
    lines = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
             for row, codes, _ in INVALID if codes != ["nothing_left"]]  # fmt: skip
    path, rejects = tmp_path / "data.jsonl", tmp_path / "rejects.jsonl"
    path.write_bytes(b"\n".join([json.dumps({"id": "first", **chat(ASK, ANSWER)}).encode(), *lines]))
    report = validate_conversations(path, rejects=rejects)
    written = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert (report.rows, report.rejected, len(written)) == (len(lines) + 1, len(lines), len(lines))
    for number, (line, reject) in enumerate(zip(lines, written, strict=True), start=2):
        assert reject["source"] == f"{path}:{number}"
        assert {reason["code"] for reason in reject["reasons"]} <= REASONS.keys()
        if "row" in reject:
            assert json.dumps(reject["row"]) == json.dumps(json.loads(line))
        else:
            kept = reject["text"].encode() if "text" in reject else base64.b64decode(reject["base64"])
            assert kept.rstrip(b"\n") == line


def test_rows_are_cut_and_counted_as_training_will(tmp_path):
    rows = [chat(ASK, ANSWER), chat(ASK, ("assistant", "Because. " * 20)), chat(("user", "Why? " * 40), ANSWER)]
    path = write(tmp_path / "data.jsonl", rows)
    tokenizer = tiny_tokenizer(tmp_path)
    report = validate_conversations(path, tokenizer, Labelling(max_length=20))
    assert (report.rejected, report.dropped.rows, report.truncated, report.valid) == (0, 1, 1, True)
    assert report.dropped.examples == [f"{path}:3: its first trained token is number 204, max_length is 20"]
    assert report.trained_tokens < report.tokens <= 40
    assert validate_conversations(path).tokens is None


def test_rows_that_are_too_long_are_dropped_and_not_rejected(tmp_path, model_dir):
    long = chat(("user", "Why? " * 40), ANSWER)
    path, rejects = write(tmp_path / "data.jsonl", [chat(ASK, ANSWER), long]), tmp_path / "rejects.jsonl"
    options = ("--model", model_dir, "--max-length", 20)
    status, out, _ = sft("validate", path, *options, "--rejects", rejects)
    said = " ".join(out.split())
    assert (status, "1 valid rows are dropped, max_length leaves no trained token of them" in said) == (0, True)
    assert f"{path}:2: its first trained token is number 204, max_length is 20" in said
    assert "1 of 2 rows can be trained on" in said
    assert [reason["code"] for reason in json.loads(rejects.read_text())["reasons"]] == ["nothing_left"]
    report = json.loads(sft("validate", path, *options, "--json")[1])
    assert (report["valid"], report["rejected"], report["dropped"]["rows"]) == (True, 0, 1)
    # Training refuses data of which nothing is left, and so does this.
    nothing = write(tmp_path / "nothing.jsonl", [long])
    assert sft("validate", nothing, *options)[0] == 3
    with pytest.raises(DataError, match="no row has a trained token within max_length 20"):
        prepare_dataset(nothing, tiny_tokenizer(tmp_path), max_length=20)


def test_the_rejects_never_replace_the_data(tmp_path):
    path = write(tmp_path / "data.jsonl", [chat(ASK, ANSWER)])
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"data.jsonl is read and written"):
        validate_conversations(path, rejects=path)
    assert path.read_bytes() == before


def test_the_command(tmp_path, model_dir):
    good = write(tmp_path / "good.jsonl", [chat(ASK, ANSWER)] * 2)
    bad = write(tmp_path / "bad.jsonl", [chat(ASK, ANSWER), {"id": "a", **chat(("user", "[red]\x1b[31m"))}, "{"])
    empty = write(tmp_path / "empty.jsonl", [])

    status, out, _ = sft("validate", good)
    assert (status, out.splitlines()[0]) == (0, "2 of 2 rows can be trained on.")
    status, out, _ = sft("validate", good, bad, "--rejects", tmp_path / "rejects.jsonl")
    assert status == 3
    assert "3 of 5 rows can be trained on." in out
    assert {"no_assistant", "invalid_json"} <= set(out.split())
    assert "\x1b" not in out
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 2
    status, out, _ = sft("validate", bad, "--json", "--model", model_dir, "--max-length", 64)
    report = json.loads(out)
    assert (status, report["valid"], report["rows"], report["rejected"]) == (3, False, 3, 2)
    assert report["findings"]["no_assistant"]["examples"][0].startswith(f"{bad}:2 (id 'a'): ")
    assert sft("validate", empty)[0] == 3
    assert sft("validate", tmp_path / "no.jsonl")[0::2] == (
        2,
        f"teleflm: {tmp_path}/no.jsonl: No such file or directory.\n",
    )
    assert sft("validate", good, "--max-length", 5)[0] == 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }}", "marks no token of an assistant's turn as trained"),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "not a stop token ('</s>'): the model would not learn to stop after it",
        ),
    ],
)
@pytest.mark.parametrize("command", ["validate", "prepare", "preview"])
def test_a_template_without_end_token_is_refused(command, template, message, tmp_path, model_dir, data_file):
    (tmp_path / "template.jinja").write_text(template)
    out = [tmp_path / "out"] if command == "prepare" else []
    options = ["--model", model_dir, "--chat-template-path", tmp_path / "template.jinja"]
    status, _, err = sft(command, data_file, *out, *options)
    assert (status, message in err.replace("\n", " "), len(err.splitlines())) == (2, True, 1)
    assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Resident memory of a process that validates 40 times as much, in a subprocess of its own."""
    row = json.dumps({"id": "ID", **chat(("user", "Why? " * 400), ANSWER)})
    peaks = []
    for copies in (200, 8000):
        path = tmp_path / f"{copies}.jsonl"
        path.write_text("".join(row.replace('"ID"', str(number)) + "\n" for number in range(copies)))
        script = f"""if True:
            import re
            from sft.data.validate import validate_conversations
            report = validate_conversations({str(path)!r})
            assert (report.rows, report.rejected) == ({copies}, 0)
            # Not getrusage: a child's begins with its parent's.
            print(re.search("VmHWM: *([0-9]+)", open("/proc/self/status").read().replace(chr(9), ""))[1])
        """
        run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(run.stdout) * 1024)
    assert path.stat().st_size > 16_000_000
    assert peaks[1] - peaks[0] < 4_000_000
