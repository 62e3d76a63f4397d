# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command line as users and scripts meet it: real processes, exit codes, one-line errors, JSON."""

import configparser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conversion import convert_checkpoint
from conversion.architecture import Architecture, load_preset
from conversion.checkpoint.containers import safetensors_index, safetensors_shards
from conversion.checkpoint.dtypes import BFLOAT16
from conversion.checkpoint.plan import TensorPlan
from conversion.mapping import weights
from teleflm import app
from teleflm.environment import NEEDED_BY
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
WIDER = ["--set", "hidden_size=40", "--set", "num_attention_heads=5"]


def teleflm(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "teleflm", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source_52b(tmp_path_factory) -> Path:
    """The 52B's headers over files of holes: everything that planning reads."""
    folder = tmp_path_factory.mktemp("52b")
    config = load_preset("tele-flm-52b")
    architecture = Architecture.from_config(config)
    tensors = [TensorPlan(name, weight.shape(architecture), BFLOAT16, ()) for name, weight, _ in weights(architecture)]
    shards = safetensors_shards(tensors, 5 * 10**9)
    for shard in shards:
        with (folder / shard.filename).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    (folder / "model.safetensors.index.json").write_bytes(safetensors_index(shards))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_help_lists_the_commands():
    result = teleflm("--help")
    assert result.returncode == 0
    assert {"grow", "sft", "eval", "chat"} <= set(re.findall(r"^│ (\w+)", result.stdout, re.MULTILINE))


def run_here(monkeypatch, *arguments: str | Path) -> int | None:
    """The status with which the command line ends, in this process."""
    monkeypatch.setattr(sys, "argv", ["teleflm", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        app.main()
    return end.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspekt"], "No such command 'inspekt'. Did you mean 'inspect'?; see teleflm --help."),
        (["sft", "selct"], "No such command 'selct'. Did you mean 'select'?; see teleflm sft --help."),
        (["inspect"], "Missing argument 'PATH'; see teleflm inspect --help."),
        (["inspect", "--jsn", "x"], "No such option: --jsn (Possible options: --json); see teleflm inspect --help."),
        (["grow", "a", "b", "--seed", "x"], "see teleflm grow --help."),
        (["inspect", "nowhere"], "nowhere: no such file or folder."),
    ],
)
@pytest.mark.parametrize("more", [[], ["--json"]], ids=" ".join)
def test_every_error_is_one_line_with_one_prefix_and_an_object_for_scripts(
    arguments, message, more, monkeypatch, capfd
):
    assert run_here(monkeypatch, *arguments, *more) == 2
    out, err = capfd.readouterr()
    assert re.fullmatch(r"teleflm: .*" + re.escape(message) + r"\n", err)
    if more:
        assert json.loads(out) == {"error": err.removeprefix("teleflm: ").strip(), "exit_status": 2}
    else:
        assert not out


@pytest.mark.parametrize("arguments", [["-h"], ["grow", "-h"], ["sft", "-h"], ["sft", "train", "-h"]], ids=" ".join)
def test_short_help(arguments, monkeypatch, capsys):
    assert not run_here(monkeypatch, *arguments)
    assert "Usage: teleflm" in capsys.readouterr().out


def test_completion_completes(monkeypatch, capsys):
    monkeypatch.setenv("_TELEFLM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "teleflm gro")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert not run_here(monkeypatch)
    assert capsys.readouterr().out.split() == ["grow", "grow-plan"]


@pytest.mark.parametrize("module", ["ml_dtypes", "rich", "teleflm.commands.verify"])
def test_ctrl_c_at_any_moment_is_one_line(module, tmp_path):
    """Modules take seconds on a slow disk: here one of them is interrupted as it is imported."""
    program = f"""
import importlib.abc, signal, sys
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Slow())
sys.argv = ["teleflm", "inspect", {str(tmp_path)!r}]
from teleflm.app import main
main()
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode in (-signal.SIGINT, 130)
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("teleflm: ")


def test_whoever_reads_may_have_enough(source):
    """As `head` has; only what nobody reads is lost, and nothing is said of a disk."""
    command = [sys.executable, "-m", "teleflm", "inspect", source, "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize("spelling", ["bf16", "BF16", "torch.bfloat16", "bfloat16"])
def test_dtypes_are_spelled_as_the_field_spells_them(spelling, source, tmp_path, monkeypatch, capsys):
    assert not run_here(monkeypatch, "convert", source, tmp_path / "out", "--dtype", spelling, "--dry-run", "--json")
    plan = json.loads(capsys.readouterr().out)
    assert {tensor["dtype"] for tensor in plan["tensors"]} == {"bfloat16"}


def test_doctor_names_what_is_missing_and_what_for(monkeypatch, capsys):
    real = metadata.version

    def version(name: str) -> str:
        if name == "lm_eval":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "trl" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert not run_here(monkeypatch, "doctor", "--json")
    found = json.loads(capsys.readouterr().out)
    missing = {need["extra"]: [p["requirement"] for p in need["packages"] if not p["fits"]] for need in found["needs"]}
    assert missing[None] == []
    assert missing["eval"] == ["lm_eval>=0.4.9"]
    assert missing["sft"] == ["trl<2,>=1.16"]
    assert not run_here(monkeypatch, "doctor")
    shown = " ".join(capsys.readouterr().out.split())
    assert "trl<2,>=1.16 is needed, and 0.1 is installed" in shown
    assert 'pip install "teleflm[eval]"' in shown


@pytest.mark.parametrize(
    ("variable", "cache"),
    [("HF_HUB_CACHE", "."), ("HUGGINGFACE_HUB_CACHE", "."), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")],
)
def test_doctor_knows_what_moves_the_cache_of_the_hub(variable, cache, monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    program = "from teleflm import environment; print(environment._hub_cache())"
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert Path(said.strip()) == tmp_path / cache


def test_doctor_fails_where_the_package_itself_cannot_work(monkeypatch, capsys):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.20" if name == "numpy" else real(name))
    assert run_here(monkeypatch, "doctor") == 1
    assert "numpy>=1.26 is needed, and 1.20 is installed; pip install teleflm." in capsys.readouterr().out


def test_every_extra_that_users_choose_is_told_by_doctor():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert {*settings["options.extras_require"]} - {"convert", "docs", "bench", "dev", "external"} == {*NEEDED_BY}


def test_links_are_not_said_to_be_written(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "linked"
    beginnings = ((["--dry-run"], f"Would make {out}, of "), ([], f"Made {out}, of "), ([], f"{out} is already done: "))
    for more, said in beginnings:
        assert not run_here(monkeypatch, "export", source, out, "--to", "granite", "--link", *more)
        assert capsys.readouterr().out.splitlines()[-1].startswith(said)


def test_grow_and_again(source, tmp_path):
    result = teleflm("grow", source, tmp_path / "out", *WIDER, "--workers", 1, "--max-shard-size", "100KB")
    assert (result.returncode, result.stderr.splitlines()) == (0, [result.stderr.strip()])
    assert "hidden_size" in result.stdout
    assert "Wrote" in result.stdout
    assert (tmp_path / "out/model.safetensors.index.json").is_file()
    again = teleflm("grow", source, tmp_path / "out", *WIDER, "--max-shard-size", "100KB")
    assert again.returncode == 0
    assert "already done" in again.stdout
    other = teleflm("grow", source, tmp_path / "out", *WIDER, "--seed", 1)
    assert other.returncode == 2
    assert "--overwrite" in other.stderr
    assert teleflm("grow", source, tmp_path / "out", *WIDER, "--seed", 1, "--overwrite").returncode == 0


def test_json_is_one_object_on_stdout(source, tmp_path):
    result = teleflm("grow", source, tmp_path / "out", *WIDER, "--json")
    summary = json.loads(result.stdout)
    assert summary["target"]["hidden_size"] == 40
    assert summary["already_done"] is False
    assert json.loads(teleflm("grow", source, tmp_path / "out", *WIDER, "--json").stdout)["already_done"] is True


def test_dry_run_of_the_whole_family_writes_nothing(source_52b, tmp_path):
    for preset, parameters in (("tele-flm-102b", 102_206_351_360), ("tele-flm-1t", 1_083_813_908_480)):
        result = teleflm("grow", source_52b, tmp_path / "out", "--to", preset, "--dry-run", "--json")
        plan = json.loads(result.stdout)
        assert plan["parameters"] == parameters
        assert sum(tensor["bytes"] for tensor in plan["tensors"]) == 2 * parameters
        assert plan["disk"]["need"] > 2 * parameters
        q_proj = next(
            tensor for tensor in plan["tensors"] if tensor["name"].endswith("layers.0.self_attn.q_proj.weight")
        )
        assert q_proj["pieces"] == ["copy", "normal, std(model.layers.0.self_attn.q_proj.weight)"]
        assert not (tmp_path / "out").exists()
    human = teleflm("grow", source_52b, tmp_path / "out", "--to", "tele-flm-1t", "--dry-run").stdout
    assert "1,083,813,908,480" in human
    assert "layers.*.mlp.down_proj" in human


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("nowhere", "{out}", *WIDER), 2, "nowhere: no such file or folder"),
        (("{source}", "{out}"), 2, "nothing to grow into: give --to"),
        (("{source}", "{out}", "--set", "hidden_size"), 2, "--set 'hidden_size' is not KEY=VALUE"),
        (("{source}", "{out}", "--set", "hidden_size=16"), 2, "hidden_size would shrink from 32 to 16"),
        (("{source}", "{source}", *WIDER), 2, "is the source too"),
        (("{source}", "{out}", *WIDER, "--workers", "0"), 2, "--workers"),
        (("{source}", "{file}/out", *WIDER), 2, "is no folder, and"),
    ],
)
def test_errors_are_one_line(arguments, status, message, source, tmp_path):
    (tmp_path / "file").touch()
    places = {"source": source, "out": tmp_path / "out", "file": tmp_path / "file"}
    result = teleflm("grow", *(argument.format(**places) for argument in arguments))
    assert result.returncode == status
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_no_torch_in_a_dry_run_nor_in_a_run(source, source_52b, tmp_path):
    """In the process that did the work, after it: threads share its modules, so this covers the workers."""
    runs = [
        ["grow", source_52b, tmp_path / "a", "--to", "tele-flm-1t", "--dry-run"],
        ["grow", source, tmp_path / "b", *WIDER],
    ]
    for arguments in runs:
        script = f"""if True:
            import sys, teleflm.app
            sys.argv = {["teleflm", *map(str, arguments)]!r}
            try:
                teleflm.app.main()
            except SystemExit as stop:
                assert stop.code == 0, stop.code
            heavy = [name for name in ("torch", "transformers") if name in sys.modules]
            assert not heavy, heavy
        """
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)


# What is printed, and where.


def test_names_are_printed_as_they_are(tmp_path):
    """Square brackets are markup to the library that prints, and `:smile:` is a face."""
    name = "[/b] [red]x :smile:"
    source, out = tmp_path / f"in{name}", tmp_path / f"out{name}"
    source.mkdir(parents=True)
    (source / "notes[red] :smile:.txt").touch()
    save_file({name: torch.ones(3)}, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps({"model_type": name}))
    for command in (("--dry-run",), (), ()):
        result = teleflm("convert", source, out, *command)
        assert (result.returncode, "Traceback" in result.stderr) == (0, False), result.stderr
        shown = (f"A {name} model", "notes[red] :smile:.txt", str(out))
        assert [text for text in shown if text not in result.stdout] == []
    save_file({name: torch.zeros(3)}, out / "model.safetensors", {"format": "pt"})
    result = teleflm("inspect", out, "--check")
    assert result.returncode == 3, result.stderr
    assert f"damaged {name}" in result.stdout
    assert re.sub(r"\s", "", str(out)) in re.sub(r"\s", "", result.stdout)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("more", [[], ["--json"]], ids=" ".join)
def test_a_name_that_the_terminal_cannot_show(more, encoding, source, tmp_path):
    out = tmp_path / os.fsdecode("é\N{SNOWMAN}".encode() + b"\xff")
    result = subprocess.run(
        [sys.executable, "-m", "teleflm", "convert", source, out, *more],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert (out / "model.safetensors").exists()
    if more:
        assert json.loads(result.stdout.decode(encoding))["out"] == str(out)


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "locale"), [(b"s\xfc", {}), ("s\N{SNOWMAN}".encode(), C_LOCALE)], ids=["bytes", "C"])
@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("inspect {m}", 0),
        ("grow {m} {out} --set num_hidden_layers=4", 0),
        ("verify {m} {m} --text {text} --forward streamed --report {out}", 0),
        ("verify {m} {m} --text {text} --forward loaded", 2),
        ("train --model_name_or_path {m} --train_files {text} --output_dir {out} --use_cpu true", 2),
        ("sft preview {chats} --model {m}", 2),
        ("publish {published} owner/name --dry-run", 2),
    ],
    ids=lambda value: value.split(" ")[0] if isinstance(value, str) else "",
)
def test_a_folder_whose_name_is_no_text_works_or_is_refused_in_one_line(
    command, status, name, locale, source, tmp_path
):
    """Of bytes that are not UTF-8; or of UTF-8 where the locale has none."""
    m, published = tmp_path / os.fsdecode(name), tmp_path / os.fsdecode(name + b"2")
    shutil.copytree(source, m)
    if "{published}" in command:
        convert_checkpoint(source, published)
        (published / "LICENSE").write_text("Apache License, Version 2.0")
        card = (published / "README.md").read_text()
        (published / "README.md").write_text(card.replace("---\n", "---\nlicense: apache-2.0\n", 1))
    (tmp_path / "text.txt").write_text("The value of a subscription is the item that the key selects. " * 20)
    chats = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chats}))
    places = {"m": m, "published": published, "out": tmp_path / "out"}
    places |= {"text": tmp_path / "text.txt", "chats": tmp_path / "chats.jsonl"}
    arguments = [os.fsencode(word.format(**places)) for word in command.split()]
    result = subprocess.run(
        [sys.executable, "-m", "teleflm", *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **locale},
        capture_output=True,
        timeout=120,
    )
    assert (result.returncode, b"Traceback" in result.stderr) == (status, False), result.stderr
    if status:
        assert b"and the libraries that load it need that; rename it" in result.stderr.splitlines()[-1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
@pytest.mark.parametrize("more", [[], ["--json"]], ids=" ".join)
def test_a_report_that_cannot_be_written_is_no_fault_of_the_disk(more, source, tmp_path):
    command = [sys.executable, "-m", "teleflm", "convert", source, tmp_path / "out", *more]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "teleflm: stdout: No space left on device"
    assert "Exception ignored" not in result.stderr
    assert (tmp_path / "out/model.safetensors").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("sft", "--help"), ("grow", "--help")], ids=" ".join
)
def test_help_that_cannot_be_written_is_said_in_one_line(arguments):
    """Where no command is called."""
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "teleflm", *arguments]
        result = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (1, "teleflm: stdout: No space left on device\n")


def test_without_any_stdout(source, tmp_path):
    command = '"$0" -m teleflm convert "$1" "$2" >&-'
    run = ["sh", "-c", command, sys.executable, source, tmp_path / "out"]
    result = subprocess.run(run, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (result.returncode, "Traceback" in result.stderr) == (0, False), result.stderr


# A user's own files, and launchers.

INSTALLED = Path(sysconfig.get_path("scripts")) / "teleflm"
STARTS = [pytest.param([sys.executable, "-m", "teleflm"], id="module"), pytest.param([str(INSTALLED)], id="script")]


@pytest.mark.parametrize("start", STARTS)
def test_files_of_the_user_with_our_names_are_not_ours(start, source, tmp_path):
    for name in ("growth", "sft", "conversion", "evaluation", "teleflm"):
        if name != "teleflm" or start[0] != sys.executable:  # what -m names, it finds in the working folder first
            (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user was run')")
    (tmp_path / "modeling_teleflm").mkdir()
    (tmp_path / "modeling_teleflm/__init__.py").write_text("raise SystemExit('a file of the user was run')")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for command in (["inspect", source], ["grow", source, "out", *WIDER], ["verify", source, "out", "--growth"]):
        result = subprocess.run(
            [*start, *map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "launch",
    [
        pytest.param(["torch.distributed.run", "--nproc-per-node", "2", "--no-python"], id="torchrun"),
        pytest.param(["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--no_python"], id="accelerate"),
    ],
)
def test_training_has_a_command_that_launchers_start(launch, source, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"row {i} of some text"}) + "\n" for i in range(64)))
    keys = {
        "model_name_or_path": source,
        "train_files": text,
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "block_size": 16,
        "per_device_train_batch_size": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
    }
    command = [INSTALLED, "train", *(part for key, value in keys.items() for part in (f"--{key}", value))]
    result = subprocess.run(
        [sys.executable, "-m", *launch, *map(str, command)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run/trainer_state.json").read_bytes())["global_step"] == 2
    assert result.stdout.count("mean loss") == 1
