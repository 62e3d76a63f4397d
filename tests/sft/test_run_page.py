# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The page of a run: what it shows is what was logged, and nothing in it acts on a browser."""

import html.parser
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from sft.training.loss_plot import MOST_OTHERS, loss_figure
from sft.training.run_log import RUN_LOG, SAMPLES, RunLogError, append_event, append_line, read_history
from teleflm.commands.sft import app
from teleflm.reports.run import RUN_PAGE, render_run, write_run_page
from tests.sft.test_run_log import write_log


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text without style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._style = [], "", False
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.text += " "
        self._style = tag == "style"

    def handle_endtag(self, tag):
        self._style = False

    def handle_data(self, data):
        self.text += "" if self._style else data


HOSTILE = (
    "</div></script><script>alert(1)</script><img src=x onerror=alert(1)>\u202egnol\x00\x1b[31m\u2066{{ 7*7 }}\ud800"
)


SOURCE_COUNTS = ("rows", "rejected", "held_out", "overlapping", "taken", "trained_tokens")


@pytest.fixture
def hostile(tmp_path):
    """Every text that comes from data, models or files is hostile."""
    facts = {
        "trainer": HOSTILE,
        "base": HOSTILE,
        "method": HOSTILE,
        "data": {
            "rows": 3,
            "kept": 1,
            "truncated": 0,
            "tokens": 9,
            "trained_tokens": 4,
            "left_out": {HOSTILE: {"rows": 2, "means": HOSTILE, "first": [{"row": HOSTILE, "detail": HOSTILE}]}},
            "sources": [{"name": HOSTILE, "weight": 1, **dict.fromkeys(SOURCE_COUNTS, 1)}],
        },
    }
    append_event(tmp_path, "begin", {"step": 0, "facts": facts})
    for step in (1, 2):
        append_event(tmp_path, "log", {"step": step, "loss": 3.0 - step, f"source_loss/{HOSTILE}": 1.0, HOSTILE: 2.0})
    results = {"texts": [{"name": HOSTILE, "bits_per_byte": 1.0}], "notes": [HOSTILE], "dtype": HOSTILE}
    append_event(tmp_path, "measured", {"when": "before", "step": 0, "results": results})
    sample = {"messages": [{"role": HOSTILE, "content": HOSTILE}], "text": HOSTILE, "new_tokens": HOSTILE}
    append_line(tmp_path / SAMPLES, {"step": 0, "prompt": 0, **sample, "session": 0})
    append_event(tmp_path, "end", {"step": 2, "status": "failed", "error": HOSTILE})
    return tmp_path


def test_hostile_texts_are_shown_and_do_nothing(hostile):
    text = write_run_page(hostile)[0].read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "iframe", "object", "link", "base", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:image/svg+xml;base64,").startswith("data:image/svg+xml;base64,"), tag
    assert not set("\u202e\u2066\x00\x1b") & set(text)
    assert page.text.count("<script>alert(1)</script>") > 8, "it is shown"
    assert "{{ 7*7 }}" in page.text
    policy = next(attributes for tag, attributes in page.tags if attributes.get("http-equiv"))
    assert policy["content"].startswith("default-src 'none'")


def test_the_page_says_what_was_logged(tmp_path):
    losses = {step: 5.0 - 0.1 * step for step in range(1, 31)}
    write_log(tmp_path, (0, False, losses), (25, True, {26: 2.0, 27: 1.25}))
    page = Page(write_run_page(tmp_path)[0].read_text())
    assert "Done after 27 steps." in page.text
    assert "steps 27" in page.text
    assert "last loss 1.25" in page.text
    assert (
        "5 logs of steps that do not count: a later session went on from a checkpoint that has not done them"
        in page.text
    )
    assert "2 neighbours to either side" in page.text
    assert "Sessions" in page.text


@pytest.mark.parametrize(
    "facts", [{"data": {}}, {"data": {"rows": "many"}}, {"processes": [2], "data": {"rows": 1, "kept": None}}], ids=str
)
def test_a_log_of_another_kind_is_refused_in_one_line(facts, tmp_path):
    append_event(tmp_path, "begin", {"step": 0, "facts": {**facts, "trainer": "sft"}})
    if not facts["data"]:  # which counts as none
        write_run_page(tmp_path)
        return
    with pytest.raises(RunLogError, match="holds what no run of this version writes"):
        write_run_page(tmp_path)
    assert not (tmp_path / RUN_PAGE).exists()


@pytest.mark.slow
def test_numbers_without_a_plot_are_named(tmp_path):
    for step in (1, 2):
        append_event(tmp_path, "log", {"step": step, **{f"number_{index}": 1.0 for index in range(MOST_OTHERS + 2)}})
    text = Page(render_run(read_history(tmp_path))).text
    assert f"2 more numbers have no plot here: number_{MOST_OTHERS}, number_{MOST_OTHERS + 1}." in text
    assert "No loss was logged yet." in text


STATES = {
    "going on": ([], "No end is recorded: it goes on, or was killed. The last log is of step 2."),
    "interrupted": ([("interrupted", "")], "Interrupted; the last log is of step 2."),
    "failed": ([("failed", "no memory")], "Failed; the last log is of step 2. no memory"),
}


@pytest.mark.parametrize(("ends", "sentence"), STATES.values(), ids=STATES)
def test_a_run_that_is_not_done_does_not_look_so(ends, sentence, tmp_path):
    write_log(tmp_path, (0, False, {1: 5.0, 2: 4.0}), end=False)
    for status, error in ends:
        append_event(tmp_path, "end", {"step": 2, "status": status, "error": error})
    page = Page(write_run_page(tmp_path)[0].read_text())
    assert sentence in page.text
    assert not any(attributes.get("class") == "state good" for _, attributes in page.tags)


def test_losses_that_are_no_numbers_are_told(tmp_path):
    append_event(tmp_path, "begin", {"step": 0, "facts": {"nan_filter": True}})
    for step, norm in ((1, 1.0), (2, float("nan")), (3, float("inf"))):
        append_event(tmp_path, "log", {"step": step, "loss": 2.0, "grad_norm": norm})
    text = Page(render_run(read_history(tmp_path))).text
    assert "grad_norm is not a finite number at 2 logged steps: 2, 3." in text
    assert "With logging_nan_inf_filter a loss that is none is logged as the mean before it, or 0." in text
    assert "loss is not a finite" not in text.replace("grad_norm is not a finite", "")


def test_before_and_after(tmp_path):
    write_log(tmp_path, (0, False, {1: 1.0}))
    for when, bits, acc in (("before", 1.5, 0.5), ("after", 1.25, 0.25)):
        results = {
            "texts": [{"name": "book", "bits_per_byte": bits}],
            "tasks": [{"name": "quiz", "acc": acc, "acc_norm": 0.5}],
            "dtype": "float32",
            "device": "cpu",
            "window": 256,
            "stride": 128,
        }
        append_event(tmp_path, "measured", {"when": when, "step": 0, "results": results})
    page = Page(write_run_page(tmp_path)[0].read_text())
    assert "1.5000 1.2500 -0.2500" in page.text
    assert "0.5000 0.2500 -0.2500" in page.text
    classes = [attributes.get("class", "") for tag, attributes in page.tags if tag == "td"]
    assert (classes.count("right better"), classes.count("right worse")) == (1, 1)


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_command_draws_a_run_again(tmp_path):
    write_log(tmp_path, (0, False, {1: 5.0, 2: 4.0}), end=False)
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "page": str(tmp_path / RUN_PAGE),
        "loss": str(tmp_path / "loss.png"),
        "status": None,
        "step": 2,
        "sessions": 1,
    }
    elsewhere = tmp_path / "elsewhere.html"
    (tmp_path / "loss.png").unlink()
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--output", str(elsewhere)])
    assert result.exit_code == 0
    assert elsewhere.read_text() == (tmp_path / RUN_PAGE).read_text()
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("arguments", [["missing"], ["."], [".", "--output", "."]], ids=str)
def test_what_is_no_run_is_refused_in_one_line(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report", *arguments])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_needs_no_torch(tmp_path):
    """A page of a run on another machine takes a second, not the time to import what trains."""
    write_log(tmp_path, (0, False, {1: 5.0, 2: 4.0}))
    script = (
        "import sys; from teleflm.reports.run import write_run_page; from pathlib import Path;"
        "write_run_page(Path(sys.argv[1])); print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_run_that_is_interrupted_leaves_its_page(model_dir, data_file, tmp_path):
    """As Ctrl-C does it."""
    out = tmp_path / "out"
    keys = {"model_name_or_path": model_dir, "data_files": data_file, "output_dir": out, "use_cpu": "true"}
    keys |= {"bf16": "false", "logging_steps": 1, "max_steps": 100_000, "save_strategy": "no", "max_length": 64}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 0.05\n")
    arguments = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "teleflm", "sft", "train", "--config", str(recipe), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(1200):
                if (out / RUN_LOG).is_file() and (out / RUN_LOG).read_text().count('"log"') > 2:
                    break
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            stderr = process.communicate(timeout=120)[1]
        finally:
            process.kill()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert read_history(out).status == "interrupted"
    assert "Interrupted; the last log is of step" in Page((out / RUN_PAGE).read_text()).text
    assert (out / "loss.png").is_file()


@pytest.mark.slow
def test_two_processes_make_one_page_one_log_and_each_sample_once(model_dir, data_file, tmp_path):
    """As torchrun starts them: half of the prompts and of the passages on each."""
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("One text, and another one. " * 20)
    keys = {
        "model_name_or_path": model_dir,
        "data_files": data_file,
        "output_dir": out,
        "max_steps": 2,
        "use_cpu": "true",
        "bf16": "false",
        "num_processes": 2,
        "logging_steps": 1,
        "sample_prompts": '["a", "b", "c"]',
        "sample_steps": 1,
        "sample_max_new_tokens": 3,
        "eval_texts": text,
        "max_length": 128,
        "save_strategy": "no",
        "seed": 0,
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 0.05\n")
    arguments = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "teleflm", "sft", "train", "--config", str(recipe), *arguments, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["distributed_type"], found["num_processes"]) == ("MULTI_CPU", 2)
    history = read_history(out)
    assert (history.status, len(history.sessions), history.unreadable) == ("done", 1, 0)
    assert [step for step, _ in history.points("loss")] == [1, 2]
    assert [(sample["step"], sample["prompt"]) for sample in history.samples] == [
        (step, prompt) for step in (0, 1, 2) for prompt in (0, 1, 2)
    ]
    assert history.measured == found["measured"]

    from evaluation.measure import evaluate

    for when, folder in (("before", model_dir), ("after", out)):
        expected = evaluate(folder, texts=[text], loaded=True).texts[0].nats
        assert found["measured"][when]["texts"][0]["nats"] == pytest.approx(expected, rel=1e-6)
    assert (out / RUN_PAGE).read_text().count("<h1>") == 1
    assert (out / "loss.png").is_file()
    shutil.rmtree(out)


def test_after_a_resume_what_was_measured_after_is_of_another_step(tmp_path):
    write_log(tmp_path, (0, False, {1: 1.0, 2: 0.9}))
    results = {"texts": [{"name": "book", "bits_per_byte": 1.0}], "tasks": []}
    for when in ("before", "after"):
        append_event(tmp_path, "measured", {"when": when, "step": 2, "results": results})
    write_log(tmp_path, (2, True, {3: 0.8}))
    assert list(read_history(tmp_path).measured) == ["before"]


def test_lines_have_names_where_the_first_session_logged_nothing(tmp_path):
    write_log(tmp_path, (0, False, {}), (2, True, {step: 1.0 / step for step in range(3, 60)}))
    figure = loss_figure(read_history(tmp_path))
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "loss" in names
    assert "moving average" in names


def test_only_a_page_of_a_run_is_replaced(tmp_path, model_dir, data_file):
    write_log(tmp_path, (0, False, {1: 1.0}))
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "thesis.html").write_text("<!doctype html>\n<title>Three years of work</title>")
    (tmp_path / "link.html").symlink_to("adapter_config.json")
    (tmp_path / "dangling.html").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.html")
    preview = tmp_path / "preview.html"
    shown = CliRunner().invoke(app, ["preview", str(data_file), "--model", str(model_dir), "--html", str(preview)])
    assert shown.exit_code == 0, shown.output
    taken = ("adapter_config.json", "thesis.html", "link.html", "dangling.html", "pipe.html", "preview.html")
    outputs = {tmp_path / name: "is there already, and no page of this command" for name in taken}
    outputs |= {tmp_path / "no/where.html": "there is no folder", tmp_path: "is a folder"}
    for output, message in outputs.items():
        before = output.read_bytes() if output.is_file() else None
        result = CliRunner().invoke(app, ["report", str(tmp_path), "--output", str(output)])
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
        assert before is None or output.read_bytes() == before
    for _ in range(2):
        result = CliRunner().invoke(app, ["report", str(tmp_path), "--output", str(tmp_path / "p.html")])
        assert result.exit_code == 0, result.output


def test_a_page_of_someone_else_in_the_folder_of_a_run_stays(tmp_path):
    write_log(tmp_path, (0, False, {1: 1.0}))
    (tmp_path / RUN_PAGE).write_text("<!doctype html> mine")
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "is there already" in " ".join(result.output.split())
    assert (tmp_path / RUN_PAGE).read_text() == "<!doctype html> mine"


def test_the_page_of_a_checkpoint_leaves_its_folder_as_it_is(tmp_path, monkeypatch):
    """When it was changed last is what another Trainer goes by."""
    write_log(tmp_path, (0, False, {1: 5.0, 2: 4.0, 3: 3.0}))
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    state = {"global_step": 2, "log_history": [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}]}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    os.utime(checkpoint, (1, 1))
    monkeypatch.chdir(checkpoint)
    for place in (str(checkpoint), "."):
        result = CliRunner().invoke(app, ["report", place])
        assert result.exit_code == 0, result.output
        assert (checkpoint.stat().st_mtime, len(list(checkpoint.iterdir()))) == (1, 1)
        for name in ("training_report-checkpoint-2.html", "loss-checkpoint-2.png"):
            (tmp_path / name).unlink()
