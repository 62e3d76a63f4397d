# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The demo, run as a user runs it, shows what it says it shows; and it touches nothing that is not its own."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conversion import inspect_checkpoint
from demo.corpus import collect
from sft.data.labels import read_conversations
from teleflm.app import app

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def run_demo(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    # Not the one thread that tests are given: what a user runs.
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-m", "demo", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished run, in a folder where an earlier one was interrupted, beside a file of the user's."""
    out = tmp_path_factory.mktemp("demo")
    (out / ".teleflm-demo").touch()
    (out / "notes.txt").write_text("mine")
    (out / "grown").mkdir()
    (out / "grown" / "model.safetensors").write_text("half a file")
    run = run_demo("--quick", "--out", str(out))
    assert run.returncode == 0, run.stderr
    return out, run


@pytest.fixture(scope="module")
def summary(finished) -> dict:
    return json.loads((finished[0] / "summary.json").read_text())


def test_growth_is_exact(summary):
    growth = summary["growth"]
    assert growth["relative_difference_float64"] < 1e-12
    assert growth["relative_difference_float32"] < 1e-6
    assert growth["same_generated_tokens"]
    assert growth["parameters"][1] > 1.5 * growth["parameters"][0]


def test_training_goes_on_from_the_loss_of_the_source(summary):
    training = summary["training"]
    assert training["grown_first_loss"] == pytest.approx(training["source_loss"], abs=1e-4)
    assert training["grown_last_loss"] < training["grown_first_loss"]
    assert training["moments"] == "grown"
    assert [group["lr"] for group in training["mup_groups"]] == pytest.approx([4e-4, 4e-4 * 48 / 60, 4e-4])


def test_masks_start_there_too_and_fold_into_a_plain_model(finished, summary):
    out, _ = finished
    masks = summary["masks"]
    assert masks["first_loss"] == pytest.approx(summary["training"]["source_loss"], abs=1e-4)
    assert masks["alpha"] == 0.5
    assert masks["relative_difference_folded"] < 1e-5
    assert json.loads((out / "folded/config.json").read_text())["model_type"] == "TeleFLM"


def test_the_verification_is_there_to_read(finished, summary):
    out, run = finished
    assert f"{out}/verification/index.html" in run.stdout.replace("\n", "")
    found = json.loads((out / "verification/verification.json").read_text())
    assert found["verdict"] == summary["growth"]["verdict"] == "certified"
    assert found["numbers"]["difference"]["tokens"] == 256


def test_fine_tuning_learns_to_answer(summary):
    first, *_, last = summary["sft"]["heldout_loss"]
    assert last < first - 0.2


def test_a_process_without_the_package_answers(summary):
    assert len(summary["chat"]) == 5
    assert all(answer["answer"] and answer["code"].startswith("transformers_modules.") for answer in summary["chat"])


def test_a_stranger_loads_it_by_name_from_a_hub_and_reads_how_it_was_made(finished, summary):
    """And nobody is led to think that it was huggingface.co."""
    out, run = finished
    published = summary["published"]
    assert published["name"] == "owner/small-tele-flm"
    assert published["hub"].startswith("http://127.0.0.1:")
    assert published["code"].startswith("transformers_modules.")
    assert published["weight_bytes"] == (out / "hub" / "model.safetensors").stat().st_size
    assert (published["question"], published["answer"]) == tuple(
        summary["chat"][0][key] for key in ("question", "answer")
    )
    assert published["lineage"] == [link.step for link in inspect_checkpoint(out / "hub").chain]
    printed = " ".join(run.stdout.split())
    assert "from a Hub on this machine, the one of the tests: nothing was sent to huggingface.co" in printed
    assert all(f"{number}. {step}" in printed for number, step in enumerate(published["lineage"], 1))


def test_its_model_can_be_talked_to(finished):
    out, run = finished
    assert f"teleflm chat {out / 'hub'}" in run.stdout
    said = CliRunner().invoke(app, ["chat", str(out / "hub"), "--max-new-tokens", "20"], input="What is json?\n")
    assert said.exit_code == 0, said.output
    assert said.stdout.strip()


def test_every_step_is_reported(finished, summary):
    out, run = finished
    assert len(summary["steps"]) == 11
    assert all(step["number"] and step["number"] in run.stdout for step in summary["steps"])
    assert "Warning" not in run.stdout + run.stderr
    assert (out / "loss.png").read_bytes().startswith(PNG)


def test_the_output_is_the_published_layout_and_a_hub_folder(finished):
    out, _ = finished
    assert {path.name for path in (out / "published").glob("pytorch_model*")} == {
        *(f"pytorch_model-{shard:05d}-of-00003.bin" for shard in (1, 2, 3)),
        "pytorch_model.bin.index.json",
    }
    config = json.loads((out / "published" / "config.json").read_text())
    assert (config["rope_scaling"], config["torch_dtype"], config["transformers_version"]) == (
        None,
        "bfloat16",
        "4.40.0",
    )
    assert {path.name for path in (out / "hub").iterdir()} >= {
        *(
            "config.json",
            "model.safetensors",
            "tokenizer.model",
            "tokenizer.json",
            "chat_template.jinja",
            "README.md",
            "teleflm_manifest.json",
        ),
        *("configuration_teleflm.py", "modeling_teleflm.py", "tokenization_teleflm.py"),
    }


def test_the_card_tells_the_whole_life(finished, summary):
    """Each sentence by the numbers that the demo was made with, in order, and the links by the records themselves."""
    out, _ = finished
    card = (out / "hub" / "README.md").read_text()
    steps = re.findall(r"^\d+\. (.*)$", card, re.MULTILINE)
    tokens = {steps: f"{steps * 4 * 256:,}" for steps in (60, 24)}  # batches of 4 blocks of 256
    expected = [
        f"Pretrained from random weights in 60 steps on {tokens[60]} tokens: ",
        "Rewritten as safetensors from torch files.",
        "Grown without changing the function it computes, rounding aside: hidden_size 48 to 60, intermediate_size 128 "
        "to 160, num_hidden_layers 4 to 5, num_attention_heads 4 to 5, ",
        f"Trained in 24 steps on {tokens[24]} tokens: sequences of 256, learning rate 0.0004, grown moments of Adam.",
        "Fine-tuned (sft, full) in 40 steps on ",
        "Rewritten as safetensors from safetensors files, cast to bfloat16.",
    ]
    assert len(steps) == len(expected), steps
    assert [step[: len(start)] for step, start in zip(steps, expected, strict=True)] == expected
    assert "vocab_size 632 to 640" in steps[2]
    assert (
        "Certified against its source: every condition on its bytes holds; in float64 logits of 256 tokens" in steps[2]
    )
    assert summary["growth"]["verdict"] == "certified"
    chain = inspect_checkpoint(out / "hub").chain
    folders = ("published", "converted", "grown", "continued", "sft", "hub")
    records = [hashlib.sha256((out / name / "teleflm_manifest.json").read_bytes()).hexdigest() for name in folders]
    assert [(link.record, link.problems) for link in chain] == [(record, ()) for record in records]


def test_a_run_starts_clean_and_leaves_what_is_not_its_own(finished):
    out, _ = finished
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "grown" / "model.safetensors").stat().st_size > 100_000


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "summary.json").write_text("mine")
    run = run_demo("--quick", "--out", str(tmp_path))
    assert run.returncode != 0
    assert run.stderr == f"{tmp_path}: not empty, and not written by this demo; choose another folder with --out.\n"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_the_corpus_is_what_it_is_said_to_be(tmp_path):
    corpus = collect()
    assert corpus == collect()
    assert len(corpus.conversations) > 2500
    assert sum(len(messages) > 2 for messages in corpus.conversations) > 1000
    (tmp_path / "all.jsonl").write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in corpus.conversations)
    )
    _, rejects = read_conversations([tmp_path / "all.jsonl"], ["<_system>", "<_user>", "<_bot>", "<s>", "</s>"])
    assert not rejects


def test_nothing_held_out_is_trained_on():
    corpus = collect()
    trained = {messages[0]["content"] for messages in corpus.conversations}
    assert "What does re.compile do?" not in trained  # the demo asks this as a held-out question
    assert not trained & {messages[0]["content"] for messages in corpus.heldout_conversations}
    assert not set(corpus.texts) & set(corpus.heldout_texts)
