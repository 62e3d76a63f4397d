# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The record of a model's whole life: made by the real commands, read back from its last folder, broken in each way."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conversion.checkpoint.manifest import MANIFEST, seal
from teleflm.app import app
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

WIDER = ("--set", "hidden_size=40", "--set", "num_attention_heads=5", "--set", "num_hidden_layers=4")
RUN = {"use_cpu": "true", "report_to": "none", "disable_tqdm": "true", "save_strategy": "no", "learning_rate": "1e-3"}


def teleflm(*arguments: object, status: int = 0) -> str:
    """Run a command in this process; everything it says, in one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return " ".join(result.output.split())


def options(**keys: object) -> list[str]:
    return [text for key, value in keys.items() for text in (f"--{key}", str(value))]


def chain(folder: Path) -> list[dict]:
    result = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["chain"]


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def train(model: Path, out: Path, text: Path, **keys: object) -> str:
    more = {"max_steps": 3, "block_size": 32, "per_device_train_batch_size": 2, **RUN, **keys}
    return teleflm("train", *options(model_name_or_path=model, train_files=text, output_dir=out, **more))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("life")


@pytest.fixture(scope="module")
def text(place) -> Path:
    texts = [text[:1500] for text in topics.topics.values() if len(text) > 200][:6]
    (place / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return place / "text.jsonl"


@pytest.fixture(scope="module")
def life(place, text) -> dict[str, Path]:
    """A folder of each step, by what made it."""
    folders = {name: place / name for name in ("saved", "converted", "grown", "trained", "tuned", "merged", "exported")}
    tiny_model().save_pretrained(folders["saved"])
    tiny_tokenizer(folders["saved"]).save_pretrained(folders["saved"])
    teleflm("convert", folders["saved"], folders["converted"], "--dtype", "bfloat16")
    teleflm("grow", folders["converted"], folders["grown"], *WIDER, "--dtype", "float32")
    teleflm("verify", folders["converted"], folders["grown"], "--record")
    train(folders["grown"], folders["trained"], text, save_strategy="steps", save_steps=2)
    answers = [("user", "What is assert?"), ("assistant", "A statement that raises where its condition is false.")]
    row = {"messages": [{"role": role, "content": content} for role, content in answers]}
    (place / "chats.jsonl").write_text((json.dumps(row) + "\n") * 8)
    recipe = {"use_cpu": True, "activation_checkpointing": False, "save_strategy": "no", "use_peft": True, "lora_r": 2}
    (place / "recipe.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in recipe.items()))
    keys = {"data_files": place / "chats.jsonl", "output_dir": folders["tuned"], "max_steps": 2}
    teleflm(
        *("sft", "train", "--config", place / "recipe.yaml"), *options(model_name_or_path=folders["trained"], **keys)
    )
    teleflm("sft", "export", folders["tuned"], folders["merged"], "--merge")
    teleflm("export", folders["merged"], folders["exported"], "--to", "granite")
    return folders


def test_the_chain_leads_from_the_last_folder_to_the_first(life):
    links = chain(life["exported"])
    assert links[0] | {"details": {}} == {
        "step": "A checkpoint without a record of its own.",
        "operation": None,
        "record": None,
        "problems": ["no record"],
        "details": {},
        "verification": None,
    }
    made = ["converted", "grown", "trained", "tuned", "merged", "exported"]
    assert [link["record"] for link in links[1:]] == [digest(life[name]) for name in made]
    assert [link["operation"] for link in links[1:]] == ["convert", "grow", "train", "fine-tune", "merge", "export"]
    assert [link["problems"] for link in links[1:]] == [[]] * 6
    assert "Certified against its source: every condition on its bytes holds." in links[2]["step"]
    verdict = json.loads((life["grown"] / MANIFEST).read_text())["verification"]
    assert [link["verification"] for link in links] == [None, None, verdict, None, None, None, None]
    printed = teleflm("inspect", life["exported"])
    for number, link in enumerate(links[1:], 2):
        assert f"{number}. {link['step']} [record {link['record'][:12]}]" in printed
    card = (life["exported"] / "README.md").read_text()
    assert all(link["step"] in card for link in links)


def test_training_says_what_it_did(life, text):
    """Of numbers that were counted here, from the text."""
    details = chain(life["trained"])[-1]["details"]
    tokenizer = tiny_tokenizer(life["trained"])
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    ids = [token for row in rows for token in [*tokenizer(row)["input_ids"], tokenizer.eos_token_id]]
    blocks = len(ids) // 32
    assert {name: details["data"][name] for name in ("examples", "tokens")} == {
        "examples": blocks,
        "tokens": 32 * blocks,
    }
    assert (details["steps"], details["tokens"], details["batch_size"]) == (3, 3 * 2 * 32, 2)
    assert (details["sequence_length"], details["learning_rate"], details["world_size"]) == (32, 1e-3, 1)
    assert details["lr_scheduler"] == {"type": "linear", "settings": {}, "warmup_steps": 0, "steps": 3}
    assert (details["moments"], details["masks"], details["dtype"], details["mixed_precision"]) == (
        *("fresh", None, "float32", "no"),
    )
    between = chain(life["trained"] / "checkpoint-2")[-1]
    assert (between["details"]["steps"], between["details"]["tokens"]) == (2, 2 * 2 * 32)
    assert between["problems"] == []
    assert str(life["trained"].parent) not in (life["trained"] / MANIFEST).read_text()


def test_a_resumed_run_is_one_step(life, text, tmp_path):
    """Also where the checkpoint is named as the model: it went on, and was not trained again on top of itself."""
    checkpoint = life["trained"] / "checkpoint-2"
    for name, model in (("by model", life["grown"]), ("by checkpoint", checkpoint)):
        train(model, tmp_path / name, text, resume_from_checkpoint=checkpoint)
        links = chain(tmp_path / name)
        assert [link["operation"] for link in links] == [None, "convert", "grow", "train"]
        assert (links[-1]["details"]["steps"], links[-1]["details"]["tokens"]) == (3, 3 * 2 * 32)
        assert links[-1]["details"]["resumed"] == {"record": digest(checkpoint), "matches": True}
        assert links[-1]["details"]["data"] == chain(life["trained"])[-1]["details"]["data"]


@pytest.mark.parametrize("name", ["trained", "tuned", "merged", "exported"])
def test_every_file_of_a_trained_folder_is_checked(name, life, tmp_path):
    folder = Path(shutil.copytree(life[name], tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-*")))
    if name != "tuned":  # an adapter alone is no checkpoint to inspect
        assert "no other file would be loaded" in teleflm("inspect", folder, "--check")
        (folder / "tokenizer.model").write_bytes(b"another")
        said = teleflm("inspect", folder, "--check", status=3)
        assert "damaged tokenizer.model has 7 bytes" in said
    files = json.loads((folder / MANIFEST).read_text())["files"]
    for file in {path.name for path in life[name].glob("*.json")} - {MANIFEST, "trainer_state.json"}:
        assert files[file]["sha256"] == hashlib.sha256((life[name] / file).read_bytes()).hexdigest()


def test_masks_and_what_is_folded_of_them(life, text, tmp_path):
    teleflm("grow", life["converted"], tmp_path / "masked", *WIDER, "--method", "mask", "--mask-steps", "10")
    train(tmp_path / "masked", tmp_path / "trained", text, dtype="float32")
    teleflm("fold", tmp_path / "trained", tmp_path / "folded")
    links = chain(tmp_path / "folded")
    assert [link["operation"] for link in links[1:]] == ["convert", "grow", "train", "fold"]
    assert [link["problems"] for link in links[1:]] == [[]] * 4
    assert links[3]["details"]["masks"] == {"start": 0.0, "end": 0.3, "steps": 10}
    assert "growth masks from alpha 0 to 0.3" in (tmp_path / "trained/README.md").read_text()
    assert links[4]["step"].startswith(
        "Growth masks folded into the weights at alpha 0.3, where what was added is heard"
    )


# Breaks.


def retrain(folder: Path) -> None:
    """As a trainer of somebody else does: every weight moves, the size stays."""
    path = folder / "model.safetensors"
    save_file({name: weight * 1.01 for name, weight in load_file(path).items()}, path, {"format": "pt"})


def replace_weights(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"note": "mine"})


def edit_config(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "output_mult": config["output_mult"] * 2}))


def add_bin(folder: Path) -> None:
    """Weights of another format in the place of ours."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


BREAKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "retrained in place": (retrain, "model.safetensors has other content"),
    "other weights": (replace_weights, "model.safetensors has "),
    "another format": (add_bin, "model.safetensors is missing"),
    "the configuration": (edit_config, "config.json has "),
}


@pytest.fixture
def broken(life, tmp_path) -> Callable[[str], Path]:
    """A copy of a step's folder, to break."""
    return lambda name: Path(
        shutil.copytree(life[name], tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-*"))
    )


@pytest.mark.parametrize("way", BREAKS)
@pytest.mark.parametrize("name", ["grown", "trained"])
def test_weights_that_are_not_those_of_the_record_are_said_to_be(name, way, broken, text, tmp_path):
    breaks, reason = BREAKS[way]
    folder = broken(name)
    breaks(folder)
    *before, last = chain(folder)
    assert [link["problems"] for link in before[1:]] == [[]] * (len(before) - 1)
    assert len(last["problems"]) == 1
    assert last["problems"][0].startswith(f"its weights are not those of its record: {reason}")
    assert f"broken here: its weights are not those of its record: {reason}" in teleflm("inspect", folder)
    for step in ("convert", "grow"):
        more = ("--set", "num_hidden_layers=6") if step == "grow" else ()
        said = teleflm(step, folder, tmp_path / step, *more)
        assert f"The source's weights are not those of its record: {reason}" in said
        links = chain(tmp_path / step)
        assert (links[-1]["problems"], links[-2]["record"]) == ([], digest(folder))
        expected = f"its weights were not those of its record any more when the next step read them: {reason}"
        assert links[-2]["problems"][0].startswith(expected)
        assert "Its weights were then changed outside of any record." in (tmp_path / step / "README.md").read_text()
    if way == "retrained in place" and name == "trained":
        train(folder, tmp_path / "again", text)
        assert chain(tmp_path / "again")[-2]["problems"][0].startswith("its weights were not those of its record")


def test_a_verdict_does_not_pass_to_other_weights(broken, life):
    folder = broken("grown")
    retrain(folder)
    before = (folder / MANIFEST).read_bytes()
    said = teleflm("verify", life["converted"], folder, "--record", status=2)
    assert "its weights are not those of its record (model.safetensors has other content); a verdict on them" in said
    assert (folder / MANIFEST).read_bytes() == before


def test_a_record_that_is_gone_ends_the_chain(broken, tmp_path):
    folder = broken("grown")
    (folder / MANIFEST).unlink()
    assert [link["problems"] for link in chain(folder)] == [["no record"]]
    assert "1. A checkpoint without a record of its own. broken here: no record." in teleflm("inspect", folder)
    teleflm("convert", folder, tmp_path / "out")
    assert [(link["operation"], link["problems"]) for link in chain(tmp_path / "out")] == [
        *((None, ["no record"]), ("convert", [])),
    ]
    said = teleflm("verify", folder, folder, "--record", status=2)
    assert "there is no record that a verdict could be added to" in said


@pytest.mark.parametrize("name", ["grown", "trained"])
def test_a_record_that_was_edited_is_said_to_be(name, broken, life, tmp_path):
    folder = broken(name)
    record = json.loads((folder / MANIFEST).read_text())
    record["lineage"]["steps"] = 1_000_000
    (folder / MANIFEST).write_text(json.dumps(record))
    assert chain(folder)[-1]["problems"] == ["its record was edited: its checksum is not that of the rest"]
    assert "The source's record was edited" in teleflm("convert", folder, tmp_path / "out")
    assert chain(tmp_path / "out")[-2]["problems"] == ["its record had been edited when the next step read it"]
    assert "was edited" in teleflm("verify", life["converted"], folder, "--record", status=2)


def test_an_edit_in_the_middle_is_found_by_who_reads_everything(life, tmp_path):
    """What the cheap check says it cannot see: two values inside one tensor, no sample of 4 kB near."""
    wider = ("--set", "hidden_size=256", "--set", "num_attention_heads=32")
    teleflm("grow", life["converted"], tmp_path / "large", *wider)
    path = tmp_path / "large" / "model.safetensors"
    content = bytearray(path.read_bytes())
    place = (len(content) - 4096) // 15 * 7 + 4096 + 2048
    content[place : place + 2] = bytes(byte ^ 1 for byte in content[place : place + 2])
    path.write_bytes(content)
    assert chain(tmp_path / "large")[-1]["problems"] == []
    assert "does not have its digest" in teleflm("inspect", tmp_path / "large", "--check", status=3)
    assert "digest" in teleflm("convert", tmp_path / "large", tmp_path / "out", "--verify-source", status=1)


def test_a_record_of_fine_tuning_as_it_was_before_is_checked_by_its_tensors(broken, tmp_path):
    """Without files and checksum: names, types and shapes are all there is."""
    folder = broken("trained")
    record = json.loads((folder / MANIFEST).read_text())
    old = {name: value for name, value in record.items() if name not in ("files", "checksum")}
    (folder / MANIFEST).write_text(json.dumps(old))
    assert chain(folder)[-1]["problems"] == []
    teleflm("convert", folder, tmp_path / "unseen")
    unknown = "it is not known whether its weights were still those of its record: it has no samples of them"
    assert chain(tmp_path / "unseen")[-2]["problems"] == [unknown]
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, folder / "model.safetensors")
    said = teleflm("convert", folder, tmp_path / "out")
    assert re.search(r"not those of its record: [\w.]+ is bfloat16 \[[\d, ]+\], expected 'float32' \[", said)


def test_a_record_that_cannot_be_written_costs_no_run(life, text, tmp_path, caplog):
    """The model is saved by then; what stands in the place of the record is left as it is."""
    (tmp_path / "out" / MANIFEST).mkdir(parents=True)
    train(life["grown"], tmp_path / "out", text)
    assert (tmp_path / "out/model.safetensors").is_file()
    assert "is saved, but there is no record of it" in caplog.text
    assert [path for path in (tmp_path / "out").iterdir() if path.name.startswith(f".{MANIFEST}")] == []


# The verdict.


def test_a_verdict_leaves_a_finished_folder_finished(life, tmp_path):
    grow = ("grow", life["converted"], tmp_path / "grown", *WIDER)
    teleflm(*grow)
    before, named = json.loads((tmp_path / "grown" / MANIFEST).read_text()), digest(tmp_path / "grown")
    teleflm("verify", life["converted"], tmp_path / "grown", "--record")
    after = json.loads((tmp_path / "grown" / MANIFEST).read_text())
    verdict = after.pop("verification")
    assert (verdict["verdict"], verdict["against"]) == (
        "certified",
        {"record": digest(life["converted"]), "matches": True},
    )
    assert after.pop("earlier") == [named]
    assert {**after, "checksum": before["checksum"]} == before
    assert "already done" in teleflm(*grow)
    teleflm("verify", life["converted"], tmp_path / "grown", "--record")
    assert json.loads((tmp_path / "grown" / MANIFEST).read_text())["verification"] == verdict
    assert sorted(path.name for path in (tmp_path / "grown").glob(".*json*")) == []
    assert "Certified against its source" in chain(tmp_path / "grown")[-1]["step"]
    assert "Every tensor has its digest" in teleflm("inspect", tmp_path / "grown", "--check")
    edited = {**after, "verification": {**verdict, "verdict": "same-bytes"}, "checksum": seal(after)["checksum"]}
    (tmp_path / "grown" / MANIFEST).write_text(json.dumps(edited))
    assert "its checksum is not that of the rest" in teleflm(*grow, status=2)


def test_a_verdict_of_logits_and_one_against_it(life, text, tmp_path):
    teleflm("grow", life["converted"], tmp_path / "grown", *WIDER, "--dtype", "float32")
    teleflm("verify", life["converted"], tmp_path / "grown", "--text", text, "--record", "--max-tokens", "16")
    shutil.copytree(life["trained"], tmp_path / "trained")
    said = teleflm(
        *("verify", tmp_path / "grown", tmp_path / "trained", "--text", text, "--record", "--max-tokens", "16"),
        status=3,
    )
    assert "Different" in said
    assert "in float64 logits of 16 tokens differ by" in chain(tmp_path / "grown")[-1]["step"]
    last = chain(tmp_path / "trained")[-1]["step"]
    assert f"Different against the checkpoint of record {digest(tmp_path / 'grown')[:12]}: the logits differ" in last
