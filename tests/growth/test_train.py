# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Continued pretraining: packing, masks, grown moments, muP, and resuming as if nothing had happened."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import MANIFEST, seal
from growth import grow_checkpoint
from growth.fold import fold_masks
from growth.method import Mask
from growth.training.errors import RunError
from growth.training.train import GrowthArguments, build_trainer, load_blocks, main, parse_arguments, train
from modeling_teleflm import TeleFLMForCausalLM
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer
from tests.growth.test_growth import one_thread  # noqa: F401

ROOT = Path(__file__).parents[2]
TARGET = {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 110, "num_hidden_layers": 4}
TEXTS = [text for text in topics.topics.values() if len(text) > 200][:12]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": text[:2000]}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def masked(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("masked") / "out"
    grow_checkpoint(source, folder, TARGET, method=Mask(20))
    return folder


@pytest.fixture
def arguments(text, masked, tmp_path):
    """The keys of a run that takes a moment."""

    def build(**keys) -> dict:
        defaults = {
            "model_name_or_path": str(masked),
            "train_files": [str(text)],
            "output_dir": str(tmp_path / "run"),
            "block_size": 32,
            "max_steps": 10,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_steps": 5,
        }
        return {**defaults, **keys}

    return build


def split(keys: dict) -> tuple[GrowthArguments, TrainingArguments]:
    own = GrowthArguments.__dataclass_fields__
    ours, theirs = ({key: keys[key] for key in keys if (key in own) is mine} for mine in (True, False))
    return GrowthArguments(**ours), TrainingArguments(**theirs)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_resuming_changes_no_bit(arguments, masked, tmp_path):
    """Ten steps, and five that another process continues: masks, muP groups, moments, schedule and data go on."""
    keys = arguments(mup_base_width=32, weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=2)
    train(*split(keys))
    whole, half = tmp_path / "run", tmp_path / "run/checkpoint-5"
    assert json.loads((half / "config.json").read_bytes())["growth_state"]["step"] == 5
    train(*split({**keys, "output_dir": str(tmp_path / "again"), "resume_from_checkpoint": str(half)}))
    first, second = weights(whole), weights(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], weights(half)["lm_head.weight"])
    for folder in (whole, tmp_path / "again"):
        assert json.loads((folder / "config.json").read_bytes())["growth_state"]["step"] == 10
    optimizers = [
        torch.load(folder / "checkpoint-10/optimizer.pt", weights_only=True) for folder in (whole, tmp_path / "again")
    ]
    assert str(optimizers[0]["param_groups"]) == str(optimizers[1]["param_groups"])
    assert [group["initial_lr"] for group in optimizers[0]["param_groups"]] == pytest.approx([1e-3, 8e-4, 1e-3])
    for index, state in optimizers[0]["state"].items():
        assert all(torch.equal(value, optimizers[1]["state"][index][key]) for key, value in state.items())


def test_text_that_was_exchanged_is_read_anew_whatever_its_time_of_change(arguments, text, tmp_path):
    """As of a copy that keeps the time: `datasets` would take what it has in its cache."""
    file, time = tmp_path / "text.jsonl", text.stat().st_mtime_ns
    found = []
    for content in (text.read_text(), text.read_text().replace("the", "teh")):
        file.write_text(content)
        os.utime(file, ns=(time, time))
        growth, _ = split(arguments(train_files=[str(file)]))
        tokenizer = AutoTokenizer.from_pretrained(growth.model_name_or_path)
        found.append(load_blocks(growth.train_files, tokenizer, growth)["input_ids"][:])
    assert found[0] != found[1]


@pytest.mark.slow
def test_a_run_that_is_done_does_no_further_step(arguments, tmp_path, caplog):
    """The same command again, as a scheduler gives it; a Trainer would do one more step each time."""
    keys = arguments(max_steps=2, save_steps=2)
    train(*split(keys))
    for steps in (2, 1):
        caplog.clear()
        metrics = train(*split({**keys, "max_steps": steps, "resume_from_checkpoint": "true"}))
        assert "train_loss" not in metrics
        assert f"step 2 is done, of {steps}: there is no step left to do" in caplog.text
        lineage = json.loads((tmp_path / "run" / MANIFEST).read_bytes())["lineage"]
        assert (lineage["steps"], lineage["masks"]["end"]) == (2, 0.1)
        assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    kept, final = weights(tmp_path / "run/checkpoint-2"), weights(tmp_path / "run")
    assert all(torch.equal(kept[name], final[name]) for name in kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_mult": 0.25}, "output_mult is 0.25, was 0.5"),
        ({"growth_state": {"total_steps": 40}}, "growth_state.total_steps is 40, was 20"),
    ],
)
def test_a_checkpoint_is_resumed_in_its_own_model(changes, message, arguments, masked, tmp_path):
    """Its weights fit every model of their shapes, whatever that computes."""
    train(*split(arguments(max_steps=1, save_steps=1)))
    shutil.copytree(masked, tmp_path / "other")
    config = json.loads((masked / "config.json").read_bytes())
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    keys = arguments(model_name_or_path=str(tmp_path / "other"), max_steps=2, resume_from_checkpoint="true")
    with pytest.raises(RunError, match=rf"checkpoint-1 is of another model than model_name_or_path: {message}\. Name"):
        train(*split(keys))


@pytest.mark.slow
def test_two_processes_train_as_one(arguments, tmp_path):
    """Half the batch each; real processes, as `accelerate launch` and `torchrun` start them."""
    keys = arguments(max_steps=3, save_strategy="no", mup_base_width=32, per_device_train_batch_size=4)
    train(*split(keys))
    keys |= {"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 2}
    (tmp_path / "run.json").write_text(json.dumps(keys))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "growth.train"]
    result = subprocess.run(
        [*launch, str(tmp_path / "run.json")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / name / "trainer_state.json").read_bytes()) for name in ("run", "two"))
    losses = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert json.loads((tmp_path / "two/config.json").read_bytes())["growth_state"]["step"] == 3
    lineages = [json.loads((tmp_path / name / MANIFEST).read_bytes())["lineage"] for name in ("run", "two")]
    assert [(lineage.pop("world_size"), lineage.pop("distributed_type")) for lineage in lineages] == [
        *((1, "NO"), (2, "MULTI_CPU")),
    ]
    assert lineages[0] == lineages[1], "the same steps, tokens, data and batch"
    assert lineages[0]["tokens"] == 3 * 4 * 32
    for name, weight in weights(tmp_path / "run").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_what_was_trained_folds_and_has_learnt(arguments, source, tmp_path):
    keys = arguments(max_steps=60, save_strategy="no", learning_rate=0.02, per_device_train_batch_size=4)
    growth, args = split(keys)
    trainer = build_trainer(growth, args)
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    train(growth, args)
    fold_masks(tmp_path / "run", tmp_path / "plain")
    assert "alpha 1" in (tmp_path / "plain/README.md").read_text()  # after 60 steps, of 20
    plain = TeleFLMForCausalLM.from_pretrained(tmp_path / "plain")
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").encode("a b") == trainer.processing_class.encode("a b")
    ids = torch.tensor(trainer.train_dataset["input_ids"])
    with torch.no_grad():
        assert plain(ids, labels=ids).loss < before - 0.5


@pytest.fixture(scope="module")
def grown(source, text, tmp_path_factory) -> Path:
    """Grown with the moments of five steps."""
    root = tmp_path_factory.mktemp("grown")
    keys = {"max_steps": 5, "save_steps": 5, "block_size": 32, "use_cpu": True, "report_to": "none"}
    train(
        *split({"model_name_or_path": str(source), "train_files": [str(text)], "output_dir": str(root / "run"), **keys})
    )
    grow_checkpoint(root / "run", root / "grown", TARGET, optimizer=root / "run/checkpoint-5")
    return root / "grown"


@pytest.mark.slow
@pytest.mark.parametrize(("fresh", "first"), [(False, 5), (True, 0)])
def test_moments_that_grew_with_the_weights_are_used(fresh, first, grown, arguments, tmp_path):
    keys = arguments(model_name_or_path=str(grown), fresh_optimizer=fresh, mup_base_width=32, max_steps=3, save_steps=3)
    train(*split(keys))
    saved = torch.load(tmp_path / "run/checkpoint-3/optimizer.pt", weights_only=True)
    assert {state["step"].item() for state in saved["state"].values()} == {first + 3}
    state = json.loads((tmp_path / "run/checkpoint-3/trainer_state.json").read_bytes())
    assert state["stateful_callbacks"]["AdamStart"]["attributes"] == {"first_step": first}


@pytest.mark.slow
def test_a_resumed_run_has_the_moments_of_its_checkpoint(grown, arguments, tmp_path):
    """Also where its model is named by the checkpoint, whose optimizer.pt did not grow."""
    keys = arguments(model_name_or_path=str(grown), max_steps=4, save_steps=2)
    train(*split(keys))
    resume = {"resume_from_checkpoint": str(tmp_path / "run/checkpoint-2")}
    for name, model in (("again", str(grown)), ("named", str(tmp_path / "run/checkpoint-2"))):
        train(*split({**keys, **resume, "model_name_or_path": model, "output_dir": str(tmp_path / name)}))
        first, second = weights(tmp_path / "run"), weights(tmp_path / name)
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_without_its_optimizer_is_not_resumed(lost, grown, arguments, tmp_path):
    """transformers goes on with a fresh one, and a fresh schedule, without a word."""
    keys = arguments(model_name_or_path=str(grown), max_steps=4, save_steps=2)
    train(*split(keys))
    (tmp_path / "run/checkpoint-2" / lost).unlink()
    keys |= {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": str(tmp_path / "run/checkpoint-2")}
    with pytest.raises(RunError, match=r"checkpoint-2 has no .*save_only_model"):
        train(*split(keys))
    assert not (tmp_path / "again/model.safetensors").exists()


class Counter(TrainerCallback, ExportableState):
    """A user's, which goes into trainer_state.json."""

    def state(self):
        return {"args": {}, "attributes": {"seen": 3}}


@pytest.mark.parametrize(
    "unknown", [["LastRate"], ["AdamStart", "LastRate", "TrainerControl"]], ids=["an older run", "a stock Trainer"]
)
def test_what_a_checkpoint_knew_nothing_of_is_saved_once_it_goes_on(unknown, source, arguments, tmp_path):
    keys = arguments(model_name_or_path=str(source), max_steps=4, save_steps=2)
    train(*split(keys))
    file = tmp_path / "run/checkpoint-2/trainer_state.json"
    state = json.loads(file.read_text())
    for name in unknown:
        del state["stateful_callbacks"][name]
    file.write_text(json.dumps(state))
    keys |= {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": str(tmp_path / "run/checkpoint-2")}
    train(*split(keys), callbacks=[Counter()])
    saved = json.loads((tmp_path / "again/checkpoint-4/trainer_state.json").read_text())["stateful_callbacks"]
    assert {*saved} == {"AdamStart", "LastRate", "TrainerControl", "Counter"}
    assert saved["LastRate"]["attributes"]["rate"] == pytest.approx(1e-3 / 4)
    keys |= {"output_dir": str(tmp_path / "third"), "resume_from_checkpoint": str(tmp_path / "again/checkpoint-4")}
    train(*split({**keys, "max_steps": 6}), callbacks=[Counter()])
    assert (tmp_path / "third/checkpoint-6").is_dir()


def test_a_resumed_run_logs_and_saves_as_often_as_its_keys_say(source, arguments, tmp_path):
    """transformers takes both from the checkpoint."""
    keys = arguments(model_name_or_path=str(source), max_steps=4, save_steps=2, logging_steps=2)
    train(*split(keys))
    keys |= {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": str(tmp_path / "run/checkpoint-2")}
    train(*split({**keys, "max_steps": 6, "save_steps": 1, "logging_steps": 0.5}))
    assert sorted(path.name[-1] for path in (tmp_path / "again").glob("checkpoint-*")) == ["3", "4", "5", "6"]
    logged = json.loads((tmp_path / "again/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in logged if "loss" in entry] == [2, 3, 6]


def test_a_checkpoint_with_the_optimizer_of_another_step_is_not_resumed(grown, arguments, tmp_path):
    keys = arguments(model_name_or_path=str(grown), max_steps=4, save_steps=2)
    train(*split(keys))
    shutil.copy(tmp_path / "run/checkpoint-4/optimizer.pt", tmp_path / "run/checkpoint-2/optimizer.pt")
    keys |= {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": str(tmp_path / "run/checkpoint-2")}
    with pytest.raises(RunError, match=r"optimizer\.pt: has other content, so it is not what was saved with the rest"):
        train(*split(keys))
    note = tmp_path / "run/checkpoint-2/run.json"  # as of a run that noted nothing of its files
    found = {key: value for key, value in json.loads(note.read_text()).items() if key != "files"}
    note.write_text(json.dumps(seal(found)))
    with pytest.raises(CheckpointError, match="the optimizer is at step 9 after loading it, expected step 7"):
        train(*split(keys))


def _truncate(folder):
    path = folder / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-5000])


def _of_another_model(folder):
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    saved["param_groups"][0]["param_names"][0] = "model.embed.weight"
    torch.save(saved, folder / "optimizer.pt")


def _nameless(folder):
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    for group in saved["param_groups"]:
        del group["param_names"]
    torch.save(saved, folder / "optimizer.pt")


@pytest.mark.parametrize(
    ("damage", "keys", "message"),
    [
        (_truncate, {}, r"optimizer\.pt"),
        (_of_another_model, {}, r"param_names are not the 39 parameters of the model: model\.embed\.weight is in one"),
        (_nameless, {}, r"does not name its parameters.*fresh_optimizer: true"),
        (None, {"optim": "sgd"}, "the optimizer is SGD, but grown moments are for torch's Adam and AdamW"),
        (None, {"optim": "adafactor"}, "the optimizer is Adafactor, but grown moments"),
        (None, {"optim": "adafactor", "mup_base_width": 32, "optim_target_modules": "all-linear"}, "Adafactor, but"),
        (None, {"use_liger_kernel": True}, "use_liger_kernel has no effect here; Liger Kernel knows no Tele-FLM"),
        (None, {"use_kernels": True}, "use_kernels is true, but this run is on CPUs"),
        (None, {"num_processes": 2}, "num_processes is 2 in the settings, but 1 run"),
        (None, {"distributed_type": "FSDP"}, "distributed_type is FSDP in the settings, but this run is NO"),
        (None, {"fsdp": True, "fsdp_config": {"version": 2}}, "told to shard with FSDP, but this run is NO on cpu"),
    ],
)
def test_moments_and_launches_that_do_not_fit_are_refused(damage, keys, message, grown, arguments, tmp_path, capsys):
    folder = shutil.copytree(grown, tmp_path / "model")
    if damage:
        damage(folder)
    (tmp_path / "run.json").write_text(json.dumps(arguments(model_name_or_path=str(folder), **keys)))
    assert main([str(tmp_path / "run.json")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert not (tmp_path / "run/model.safetensors").exists()


def test_packing(text, source):
    tokenizer = AutoTokenizer.from_pretrained(source)
    blocks = load_blocks([str(text)], tokenizer, GrowthArguments(str(source), [str(text)], block_size=50))
    ids: list[int] = []
    for row in text.read_text().splitlines():
        ids += [1, *tokenizer(json.loads(row)["text"], add_special_tokens=False)["input_ids"], 2]
    assert [id_ for block in blocks["input_ids"] for id_ in block] == ids[: len(ids) // 50 * 50]
    assert blocks["labels"] == blocks["input_ids"]


def test_a_text_file_is_one_document(source, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one line\nanother\n\nand a third " * 20)
    tokenizer = AutoTokenizer.from_pretrained(source)
    blocks = load_blocks([str(path)], tokenizer, GrowthArguments(str(source), [str(path)], block_size=40))
    assert sum(block.count(1) for block in blocks["input_ids"]) == 1


# The command line.


def test_a_run_from_yaml(arguments, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(arguments(max_steps=2, save_strategy="no")))
    assert main([str(tmp_path / "run.yaml")]) == 0
    assert "mean loss" in capsys.readouterr().out
    assert (tmp_path / "run/model.safetensors").is_file()


def test_numbers_that_yaml_takes_for_texts(tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: m\ntrain_files: a.txt\noutput_dir: {tmp_path}\nlearning_rate: 1e-3\nmax_steps: '7'\n"
    )
    growth, args = parse_arguments([str(tmp_path / "run.yaml")])
    assert growth == GrowthArguments("m", ["a.txt"])
    assert (args.learning_rate, args.max_steps) == (1e-3, 7)


def test_keys_and_values_on_the_command_line(tmp_path):
    line = f"--model_name_or_path m --train_files a b --output_dir {tmp_path} --mup_base_width 64 --max_steps 7"
    growth, args = parse_arguments(line.split())
    assert growth == GrowthArguments("m", ["a", "b"], mup_base_width=64)
    assert args.max_steps == 7


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"block_sise": 1}, "block_sise"),
        ({"block_size": 1}, "block_size is 1, expected at least 2"),
        ({"distributed_type": "FSDP2"}, "distributed_type is 'FSDP2', expected one of NO, MULTI_CPU"),
        ({"mup_base_width": 0}, "mup_base_width is 0, expected at least 1"),
        ({"train_files": ["nowhere.jsonl"]}, r"nowhere\.jsonl: no such file"),
        ({"train_files": [__file__]}, "expected files of one kind"),
        ({"text_column": "body"}, "has no column body; it has text"),
        ({"block_size": 10**6}, "less text than one block of 1000000 tokens"),
        ({"model_name_or_path": "nowhere"}, "model_name_or_path is 'nowhere', which holds no config.json"),
        ({"resume_from_checkpoint": "true"}, "holds no checkpoint"),
        ({"train_files": "nowhere.txt"}, r"nowhere\.txt: no such file"),
        ({"train_files": [1]}, r"train_files is \[1\], expected a list of files"),
        ({"train_files": []}, "names no file"),
        ({"block_size": "many"}, "block_size is 'many', expected int"),
        ({"model_name_or_path": 5}, "model_name_or_path is 5, expected str"),
        ({"dtype": "foo"}, "dtype is 'foo', expected one of float32, bfloat16"),
        ({"attn_implementation": "foo"}, "attn_implementation is 'foo', expected one of eager, "),
        ({"learning_rate": "much"}, r"run\.yaml: learning_rate is 'much', expected a number"),
        ({"max_steps": [1]}, r"run\.yaml: max_steps is \[1\], expected an integer"),
        ({"report_to": "foo"}, "foo is not supported"),
    ],
)
def test_errors_are_one_line(keys, message, arguments, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(arguments(**keys)))
    assert main([str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "a', r"a\.jsonl: row 3 is not JSON \(Unterminated string"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', r"a\.jsonl: row 2 holds null as text, expected text"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl: row 1 holds null as text, expected text"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "a"}\n', r"a\.jsonl: row 2 has no text, it has body"),
        ("a.jsonl", b'{"text": [1]}\n', r"a\.jsonl: row 1 holds a list as text"),
        ("a.jsonl", b'"a"\n', r"a\.jsonl: row 1 is a str, expected an object with text"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl: is not UTF-8 at byte 10 of line 1"),
        ("a.jsonl", b'[{"a":' * 3000, r"a\.jsonl: row 1 is not JSON"),
        ("a.jsonl", b"", r"a\.jsonl: holds no rows"),
        ("a.json", b'[{"text": "a"}, {"text": 1}]', r"a\.json: row 2 holds a int as text"),
        ("a.json", b"[", r"a\.json: row 1 is not JSON"),
        ("a.jsonl.gz", b"junk", r"a\.jsonl\.gz: is damaged"),
        ("a.txt", b"\xff\xfe", r"a\.txt: is not UTF-8 at byte 0"),
        ("a.parquet", b"junk", r"a\.parquet: is damaged, or no \.parquet file"),
        ("a.parquet", b"", r"a\.parquet: is damaged"),
    ],
)
def test_a_bad_file_of_text_is_named_with_its_row(name, content, message, arguments, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    test_errors_are_one_line({"train_files": [str(tmp_path / name)]}, message, arguments, tmp_path, capsys)


def test_the_second_of_two_files_is_named(text, arguments, tmp_path, capsys):
    (tmp_path / "b.jsonl").write_text('{"text": null}')
    files = [str(text), str(tmp_path / "b.jsonl")]
    test_errors_are_one_line({"train_files": files}, r"b\.jsonl: row 1 holds null", arguments, tmp_path, capsys)


def lose(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def put(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose("tokenizer.model"), "has no tokenizer, neither tokenizer.model nor tokenizer.json"),
        (put("tokenizer.model", "junk"), "its tokenizer cannot be loaded"),
        (put("tokenizer_config.json", "[1]"), r"tokenizer_config\.json is a JSON list, expected an object"),
        (put("config.json", "{"), r"config\.json is not valid JSON"),
        (put("config.json", "[]"), r"config\.json is a JSON list"),
        (put("config.json", '{"model_type": "nothing"}'), "nothing"),
        (lose("model.safetensors"), r"has no weights: expected one of model\.safetensors"),
        (truncate, r"model\.safetensors"),
        (lose_a_weight, r"model\.layers\.1\.mlp\.up_proj\.weight is missing"),
    ],
)
def test_a_bad_model_is_named(damage, message, source, arguments, tmp_path, capsys):
    folder = shutil.copytree(source, tmp_path / "model")
    damage(folder)
    test_errors_are_one_line({"model_name_or_path": str(folder)}, message, arguments, tmp_path, capsys)


def test_a_tokenizer_of_another_model_is_refused(arguments, tmp_path, capsys):
    tiny_model(tiny_config(vocab_size=599)).save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model").save_pretrained(tmp_path / "model")
    message = "the tokenizer has 600 tokens, but vocab_size in config.json is 599"
    test_errors_are_one_line({"model_name_or_path": str(tmp_path / "model")}, message, arguments, tmp_path, capsys)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.yaml", b"a: [", r"run\.yaml: is not YAML"),
        ("run.yaml", b"- a", r"run\.yaml: holds a list, expected keys"),
        ("run.yaml", b"", r"run\.yaml: holds a NoneType"),
        ("run.yaml", b"1: 2", r"run\.yaml: holds a dict, expected keys"),
        ("run.yaml", b"\xff\xfe", r"run\.yaml: is not YAML"),
        ("run.yaml", b"[" * 3000, r"run\.yaml: is not YAML"),
        ("run.yaml", b"output_dir: r", r"run\.yaml: model_name_or_path is missing"),
        ("run.json", b"{", r"run\.json: is not JSON"),
        ("run.json", b"[]", r"run\.json: holds a list"),
    ],
)
def test_a_bad_file_of_keys_is_named(name, content, message, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    assert main([str(tmp_path / name)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^error: .*{message}", error)


def test_tracebacks_are_there_for_who_asks(arguments, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(arguments(train_files=["nowhere.txt"], log_level="debug")))
    with pytest.raises(CheckpointError, match="no such file"):
        main([str(tmp_path / "run.yaml")])


def test_a_second_run_does_not_mix_with_the_first(arguments):
    keys = arguments(max_steps=1, save_steps=1)
    train(*split(keys))
    with pytest.raises(CheckpointError, match=r"already holds .*checkpoint-1; choose another, or go on"):
        train(*split(keys))


def test_matrices_that_are_split_are_refused(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(arguments()))
    assert main([str(tmp_path / "run.yaml")]) == 2
    assert "that is for fine-tuning with trainer sft, not for pretraining" in capsys.readouterr().err
