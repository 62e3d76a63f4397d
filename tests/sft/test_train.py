# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, TrainerCallback
from typer.testing import CliRunner

import sft.training.train
from conversion import inspect_checkpoint
from growth import grow_checkpoint
from growth.method import Mask
from growth.training.output_lock import LOCK
from sft.data.labels import Labelling
from sft.data.prepare import prepare
from sft.training.recipe import RecipeError
from sft.training.run_log import read_history
from sft.training.train import _summary, build_trainer, load_tokenizer, main, train
from teleflm.commands.sft import app
from teleflm.reports.run import _headline, _state
from tests.fixtures.tiny import tiny_model

TINY = Path(sft.__file__).parent / "recipes" / "tiny-cpu.yaml"


def weights(folder, name="model.safetensors"):
    return load_file(Path(folder) / name)


def losses(result):
    """Of a TrainResult or a TrainerState."""
    return [entry["loss"] for entry in result.log_history if "loss" in entry]


def test_training_lowers_the_loss_and_saves_a_model_that_loads_with_its_template(make_recipe, model_dir):
    recipe = make_recipe(packing=True, max_length=128, max_steps=20, learning_rate=0.1, lr_scheduler_type="constant")
    result = train(recipe, progress=False)
    assert result.global_step == 20
    assert sum(losses(result)[-5:]) / 5 < 0.8 * losses(result)[0]
    assert result.data.rows == 48

    model = AutoModelForCausalLM.from_pretrained(result.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(result.output_dir)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(model_dir).chat_template
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is assert?"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_the_published_schedule_decays_linearly_to_its_floor(make_recipe):
    floor, rate, steps = 1e-9, 2.7e-5, 6
    recipe = make_recipe(
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="polynomial",
        lr_scheduler_kwargs={"lr_end": floor, "power": 1.0},
    )
    logged = [entry["learning_rate"] for entry in train(recipe, progress=False).log_history if "loss" in entry]
    assert logged == pytest.approx([floor + (rate - floor) * (1 - step / steps) for step in range(steps)], rel=1e-9)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager", "flex_attention"])
def test_packing_changes_no_log_probability(attn_implementation, make_recipe):
    """The oracle: every conversation alone in a batch, through the model's own logits."""
    trainer, _, _ = build_trainer(make_recipe(packing=True, max_length=128, attn_implementation=attn_implementation))
    alone, _, _ = build_trainer(make_recipe(max_length=128, attn_implementation=attn_implementation))
    assert len(trainer.train_dataset) < len(alone.train_dataset)
    model, reference = trainer.model.eval(), tiny_model(trainer.model.config)
    reference.load_state_dict(model.state_dict())

    packed, expected = {}, {}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling flex attention takes 20 s
        for batch in trainer.get_train_dataloader():
            output = model(**batch, fused_lm_head=True)
            starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
                document = tuple(batch["input_ids"][0, start:end].tolist())
                packed[document] = output.log_probs[0, start : end - 1].sum().item()
        for row in alone.train_dataset:
            ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            scores = reference(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
            expected[tuple(row["input_ids"])] = scores[labels[1:] != -100].sum().item()
    assert packed == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_one_large_batch(make_recipe, tmp_path):
    results = [
        train(
            make_recipe(
                output_dir=str(tmp_path / f"{batch}x{steps}"),
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=steps,
                max_steps=4,
                learning_rate=1e-3,
                optim="sgd",
                max_grad_norm=0.0,
            ),
            progress=False,
        )
        for batch, steps in ((8, 1), (2, 4))
    ]
    assert losses(results[0]) == pytest.approx(losses(results[1]), rel=1e-5)
    for name, weight in weights(results[0].output_dir).items():
        torch.testing.assert_close(weights(results[1].output_dir)[name], weight, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="session")
def weighted_file(conversations, tmp_path_factory):
    """Every answer has a weight: 0.25, 1, 2 or, where another answer is left, 0."""
    path = tmp_path_factory.mktemp("weighted") / "weighted.jsonl"
    with path.open("w") as file:
        for index, row in enumerate(conversations):
            messages = [dict(message) for message in row["messages"]]
            answers = [message for message in messages if message["role"] == "assistant"]
            for turn, answer in enumerate(answers):
                answer["weight"] = 0 if turn < len(answers) - 1 else (0.25, 1, 2)[index % 3]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "keys"),
    [(8, 1, {}), (2, 4, {}), (2, 2, {"packing": True}), (4, 1, {"use_peft": True})],
    ids=["batch", "accumulated", "packed", "lora"],
)
def test_the_loss_is_the_weighted_sum_over_the_number_of_trained_tokens(
    batch_size, accumulation, keys, make_recipe, weighted_file
):
    """The oracle: each conversation of the step alone, through the model's own logits."""
    recipe = make_recipe(
        data_files=str(weighted_file),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_length=128,
        max_steps=1,
        **keys,
    )
    trainer, _, _ = build_trainer(recipe)
    assert set(trainer.train_dataset[0]["weights"]) <= {0, 0.25, 1, 2}
    model = trainer.model.get_base_model() if "use_peft" in keys else trainer.model
    reference = tiny_model(model.config)
    weights = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    reference.load_state_dict({name: value for name, value in weights.items() if "lora" not in name})

    total, count, steps = 0.0, 0, iter(trainer.get_train_dataloader())
    for batch in (next(steps) for _ in range(accumulation)):
        for ids, labels, factors in documents(batch):
            scores = reference(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
            trained = labels[1:] != -100
            total -= (factors[1:] * scores)[trained].sum().item()
            count += trained.sum().item()
    trainer.train()
    assert losses(trainer.state) == pytest.approx([total / count], rel=1e-5)


def documents(batch):
    """Split a collated batch, padded or packed, into (ids, labels, weights) of documents."""
    columns = [batch[name] for name in ("input_ids", "labels", "weights")]
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(-1).tolist()
        return [tuple(column[row, :length] for column in columns) for row, length in enumerate(lengths)]
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    return list(zip(*(column[0].split(lengths) for column in columns), strict=True))


@pytest.mark.slow
def test_weights_reach_the_gradient_and_the_evaluation(make_recipe, weighted_file, tmp_path):
    """Half the weight everywhere is half the loss and half the gradient."""
    half = tmp_path / "half.jsonl"
    rows = [json.loads(line) for line in weighted_file.read_text().splitlines()]
    for row in rows:
        for message in row["messages"]:
            message |= {"weight": message["weight"] / 2} if message.get("weight") else {}
    half.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = [
        train(
            make_recipe(
                data_files=str(file),
                eval_data_files=str(file),
                eval_strategy="steps",
                eval_on_start=True,
                eval_steps=1,
                learning_rate=0.0,
                max_steps=1,
                output_dir=str(tmp_path / file.stem),
            ),
            progress=False,
        ).log_history
        for file in (weighted_file, half)
    ]
    for key in ("loss", "grad_norm", "eval_loss"):
        whole, halved = (next(entry[key] for entry in log if key in entry) for log in results)
        assert halved == pytest.approx(whole / 2, rel=1e-5), key


def test_only_the_last_turn_is_trained_on_if_so_asked(make_recipe):
    labels = [build_trainer(make_recipe(last_turn_only=only))[0].train_dataset[0]["labels"] for only in (False, True)]
    trained = [[position for position, label in enumerate(row) if label != -100] for row in labels]
    assert trained[1] == trained[0][-len(trained[1]) :]
    assert len(trained[1]) < len(trained[0])


def test_grouping_by_length_pads_less_and_trains_on_the_same_rows(make_recipe):
    def rows_of(batch):
        return zip(batch["input_ids"], batch["attention_mask"], strict=True)

    padded, rows = {}, {}
    for strategy in ("random", "group_by_length"):
        trainer, _, _ = build_trainer(make_recipe(train_sampling_strategy=strategy, per_device_train_batch_size=4))
        batches = list(trainer.get_train_dataloader())
        padded[strategy] = sum(batch["input_ids"].numel() for batch in batches)
        ids = [ids[mask.bool()].tolist() for b in batches for ids, mask in rows_of(b)]
        rows[strategy] = sorted(ids)
    assert padded["group_by_length"] < padded["random"]
    assert rows["group_by_length"] == rows["random"]


def test_under_mup_matrices_learn_slower_through_the_whole_schedule(make_recipe):
    rates = []

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups])

    schedule = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-9}}
    recipe = make_recipe(mup_base_width=8, learning_rate=4e-3, max_steps=3, **schedule)
    train(recipe, callbacks=[Rates()], progress=False)
    assert rates[0] == pytest.approx([4e-3, 1e-3, 4e-3]), "vectors, matrices (a quarter at four times the width), norms"
    assert all(matrix == pytest.approx(vector / 4) for vector, matrix, _ in rates)


def test_lora_trains_adapters_only_and_merges(make_recipe, model_dir):
    from peft import PeftModel

    recipe = make_recipe(use_peft=True, lora_r=4, max_steps=4, learning_rate=1e-2)
    trainer, _, _ = build_trainer(recipe)
    trained = {
        name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in trainer.model.named_parameters() if p.requires_grad
    }
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

    result = train(recipe, progress=False)
    assert not (Path(result.output_dir) / "model.safetensors").exists(), "the base model is not saved again"
    adapter = weights(result.output_dir, "adapter_model.safetensors")
    assert all(weight.abs().max() > 0 for name, weight in adapter.items() if "lora_B" in name)

    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), result.output_dir).eval()
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    input_ids = torch.arange(64)[None]
    with torch.no_grad():
        logits = tuned(input_ids).logits
        merged = tuned.merge_and_unload()
        assert (merged(input_ids).logits - logits).abs().max() < 2e-6
        assert (base(input_ids).logits - logits).abs().max() > 1e-4
    assert all(
        (merged.state_dict()[name] == weight).all() for name, weight in base.state_dict().items() if "norm" in name
    )


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"packing": True, "max_length": 64}, {"use_peft": True}], ids=["packed", "lora"])
def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(keys, make_recipe, tmp_path):
    common = {
        **keys,
        "save_strategy": "steps",
        "save_steps": 5,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
    }
    straight = train(make_recipe(**common, max_steps=10), progress=False)
    checkpoint = str(tmp_path / "out" / "checkpoint-5")
    resumed = train(
        make_recipe(**common, max_steps=10, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=checkpoint),
        progress=False,
    )
    assert losses(resumed) == losses(straight)
    name = "adapter_model.safetensors" if "use_peft" in keys else "model.safetensors"
    for key, weight in weights(straight.output_dir, name).items():
        assert torch.equal(weights(resumed.output_dir, name)[key], weight), key


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data_files": "other"}, "conversations was .*; token_ids was "),
        ({"max_length": 48}, "max_length was 1024, is 48"),
        ({"learning_rate": 0.1}, "learning_rate was 2e-05, is 0.1"),
        ({"model_name_or_path": "other"}, 'base was "'),
        ({"last_turn_only": True}, "last_turn_only was false, is true"),
        ({"per_device_train_batch_size": 2}, "batch_size was 8, is 2"),
    ],
)
def test_another_run_is_not_resumed(keys, message, make_recipe, model_dir, data_file, tmp_path):
    first = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(make_recipe(**first), progress=False)
    if "data_files" in keys:  # the same rows but for a word
        keys = {"data_files": str(tmp_path / "other.jsonl")}
        (tmp_path / "other.jsonl").write_text(data_file.read_text().replace("What is", "What was"))
        assert (tmp_path / "other.jsonl").read_text() != data_file.read_text()
    if "model_name_or_path" in keys:
        keys = {"model_name_or_path": str(tmp_path / "out/checkpoint-1")}
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(sft.SFTError, match=rf"checkpoint-2 is of another run: .*{message}") as error:
        train(make_recipe(**{**first, "max_steps": 3, "resume_from_checkpoint": True, **keys}), progress=False)
    assert "\n" not in str(error.value)
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


SAVED = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    ("lost", "what"),
    [
        ("optimizer.pt", "optimizer"),
        ("scheduler.pt", r"learning rate schedule \(scheduler\.pt\)"),
        ("rng_state.pth", r"random state \(rng_state\)"),
    ],
)
def test_a_checkpoint_that_lacks_what_a_step_needs_is_not_resumed(lost, what, make_recipe, tmp_path):
    """transformers goes on without it, and without a word."""
    train(make_recipe(**SAVED), progress=False)
    checkpoint = tmp_path / "out/checkpoint-2"
    (checkpoint / lost).unlink()
    with pytest.raises(sft.SFTError, match=rf"checkpoint-2 has no {what}, as .*save_only_model.*model_name_or_path:"):
        train(make_recipe(**{**SAVED, "max_steps": 3}, resume_from_checkpoint=str(checkpoint)), progress=False)


def test_a_checkpoint_of_the_weights_alone_is_not_resumed(make_recipe, tmp_path):
    train(make_recipe(**SAVED, save_only_model=True), progress=False)
    with pytest.raises(sft.SFTError, match=r"checkpoint-2 has no optimizer, learning rate schedule .*, random state"):
        train(make_recipe(**{**SAVED, "max_steps": 3}, resume_from_checkpoint=True), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("state", [None, "", '{"global_step": 2, "log_his'])
def test_what_a_kill_left_is_passed_over(state, make_recipe, tmp_path, caplog):
    keys = {**SAVED, "lr_scheduler_type": "constant"}
    straight = train(make_recipe(**{**keys, "max_steps": 3}, output_dir=str(tmp_path / "straight")), progress=False)
    train(make_recipe(**keys), progress=False)
    half = tmp_path / "out/checkpoint-2"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "run.json", "trainer_state.json"):
        (half / name).unlink()
    if state is not None:
        (half / "trainer_state.json").write_text(state)
    resumed = train(make_recipe(**{**keys, "max_steps": 3}, resume_from_checkpoint=True), progress=False)
    assert "checkpoint-2 was not saved to its end; the run goes on from checkpoint-1" in caplog.text
    assert resumed.resumed_step == 1
    assert losses(resumed) == losses(straight)
    for path in (tmp_path / "out").glob("checkpoint-*/trainer_state.json"):
        path.unlink()
    with pytest.raises(
        sft.SFTError,
        match=r"holds no checkpoint-N to resume \(checkpoint-3 was not saved to its end; checkpoint-2 was not .*\)",
    ):
        train(make_recipe(**{**SAVED, "max_steps": 4}, resume_from_checkpoint=True), progress=False)


def test_the_order_of_examples_that_are_grouped_by_length_is_compared(make_recipe):
    """A sampler groups what a process computes between two updates: 2 x 4 rows are other groups than 4 x 2."""
    keys = {**SAVED, "train_sampling_strategy": "group_by_length"}
    train(make_recipe(**keys, per_device_train_batch_size=4, gradient_accumulation_steps=2), progress=False)
    spread = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    with pytest.raises(sft.SFTError, match=r"examples grouped by length over was .*: 4, .*, is "):
        train(make_recipe(**{**keys, "max_steps": 3}, **spread, resume_from_checkpoint=True), progress=False)


def test_data_that_begin_anew_are_not_the_same_run(make_recipe, caplog):
    train(make_recipe(**SAVED, ignore_data_skip=True), progress=False)
    keys = {**SAVED, "max_steps": 3, "ignore_data_skip": True, "resume_from_checkpoint": True}
    result = train(make_recipe(**keys), progress=False)
    assert "the data begin anew: it is not the same run" in caplog.text
    details = inspect_checkpoint(result.output_dir).chain[-1].details
    assert details["resumed"] == {"step": 2, "same_run": False}


@pytest.mark.slow
def test_a_record_says_whether_a_resumed_run_was_compared(make_recipe, tmp_path):
    keys = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(make_recipe(**keys), progress=False)
    resume = {**keys, "max_steps": 3, "resume_from_checkpoint": str(tmp_path / "out/checkpoint-1")}
    for name, same in {"again": True, "unknown": None}.items():
        if same is None:
            for missing in ("run.json", "teleflm_manifest.json"):  # as of a Trainer's own
                (tmp_path / "out/checkpoint-1" / missing).unlink()
        result = train(make_recipe(**resume, output_dir=str(tmp_path / name)), progress=False)
        details = inspect_checkpoint(result.output_dir).chain[-1].details
        assert details["resumed"] == {"step": 1, "same_run": same}


def test_an_output_folder_holds_one_run(make_recipe):
    recipe = make_recipe(max_steps=2, save_strategy="steps", save_steps=1)
    train(recipe, progress=False)
    with pytest.raises(RecipeError, match=r"out already holds config.json; choose another, or continue that run"):
        train(recipe)
    result = train(make_recipe(max_steps=3, resume_from_checkpoint=True), progress=False)
    assert [entry["step"] for entry in result.log_history if "loss" in entry] == [1, 2, 3]


@pytest.mark.parametrize("resumed", [False, True])
def test_two_runs_at_once_in_an_output_folder_are_refused(resumed, make_recipe, tmp_path):
    """There is no checkpoint yet that would tell of the first; or there is one, which both resume."""
    keys = {**SAVED, "max_steps": 1}
    if resumed:
        train(make_recipe(**keys), progress=False)
        keys |= {"max_steps": 2, "resume_from_checkpoint": True}
    messages, second = [], make_recipe(**keys)

    class Second(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            with pytest.raises(sft.SFTError, match=r"out: process \d+ on .* trains into it") as error:
                train(second, progress=False)
            messages.append(str(error.value))

    result = train(make_recipe(**keys), callbacks=[Second()], progress=False)
    assert len(messages) == 1
    assert result.global_step == keys["max_steps"]
    assert not (tmp_path / "out" / LOCK).exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"resume_from_checkpoint": True}, "holds no checkpoint-N to resume"),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere holds no trainer_state.json"),
        ({"model_name_or_path": "/nowhere/at/all"}, "model_name_or_path is '/nowhere/at/all'"),
        ({"chat_template_path": "nowhere.jinja"}, "chat_template_path is 'nowhere.jinja'"),
        ({"data_files": "nowhere.jsonl"}, "nowhere.jsonl: No such file or directory"),
        ({"attn_implementation": "quick"}, "model_name_or_path is .*quick"),
        ({"padding_free": True, "max_length": 64}, "padding_free=True. without packing"),
        ({"packing": True, "max_length": None}, "packing is True and max_length is null"),
        ({"mup_base_width": 32, "use_peft": True}, "muP has no rule for adapters"),
        ({"report_to": "wandb"}, "report_to is wandb, .*pip install wandb"),
        ({"optim": "adamw_8bit"}, "optim is adamw_8bit: .*bitsandbytes"),
        ({"optim": "schedule_free_adamw"}, "optim is schedule_free_adamw: .*schedulefree"),
        ({"use_kernels": True}, "use_kernels is true, but this run is on CPUs"),
        ({"num_processes": 2}, "num_processes is 2 in the settings, but 1 run"),
        ({"distributed_type": "FSDP"}, "distributed_type is FSDP in the settings, but this run is NO"),
    ],
)
def test_bad_input_is_one_line(keys, message, make_recipe):
    with pytest.raises(sft.SFTError, match=message) as error:
        train(make_recipe(**keys))
    assert "\n" not in str(error.value)


def test_prepared_conversations_train_as_the_file_they_came_from(make_recipe, data_file, tmp_path):
    tokenizer, _ = load_tokenizer(make_recipe())
    prepare(data_file, tmp_path / "prepared", tokenizer, Labelling(max_length=128))
    results = [
        train(make_recipe(data_files=str(data), max_length=128, max_steps=2, output_dir=str(tmp_path / name)))
        for name, data in {"file": data_file, "folder": tmp_path / "prepared"}.items()
    ]
    assert losses(results[0]) == losses(results[1])
    assert results[0].data == results[1].data


def test_weights_and_a_loss_that_they_would_not_reach_are_refused(make_recipe, weighted_file):
    with pytest.raises(RecipeError, match=r"messages have weights, and loss_type is dft"):
        train(make_recipe(data_files=str(weighted_file), loss_type="dft"))


def test_a_tokenizer_that_cannot_serve_the_model_is_refused_before_the_model_is_loaded(
    make_recipe, model_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        sft.training.train, "load_model", lambda arguments, **kwargs: pytest.fail("the model was loaded")
    )
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 599}))
    with pytest.raises(RecipeError, match=r"the tokenizer has 600 tokens, but vocab_size in config.json is 599"):
        train(make_recipe(model_name_or_path=str(folder)))

    (folder / "tokenizer.model").unlink()
    backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}))
    template = (folder / "chat_template.jinja").read_text()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=template).save_pretrained(folder)
    with pytest.raises(RecipeError, match=r"the tokenizer has no pad_token, bos_token or unk_token"):
        train(make_recipe(model_name_or_path=str(folder)))


def test_a_model_whose_weights_are_cut_short_is_named(make_recipe, model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(RecipeError, match=r"model_name_or_path is .*model\.safetensors is truncated: 5000 bytes"):
        train(make_recipe(model_name_or_path=str(folder)))


def test_a_model_that_grows_by_masks_is_to_be_folded(make_recipe, model_dir, tmp_path):
    grow_checkpoint(model_dir, tmp_path / "masked", {"intermediate_size": 110}, method=Mask(20))
    with pytest.raises(RecipeError, match=r"grows by masks .*`teleflm fold` it first, or .*`teleflm train`") as error:
        train(make_recipe(model_name_or_path=str(tmp_path / "masked")))
    assert "trust_remote_code" not in str(error.value)


def test_no_code_of_a_checkpoint_is_executed(make_recipe, tmp_path):
    folder, marker = tmp_path / "foreign", tmp_path / "executed"
    folder.mkdir()
    auto_map = {"AutoConfig": "foreign.ForeignConfig", "AutoModelForCausalLM": "foreign.ForeignModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": auto_map}))
    (folder / "foreign.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(RecipeError, match="model_name_or_path is"):
        train(make_recipe(model_name_or_path=str(folder)))
    assert not marker.exists()


def test_evaluation_rows_are_prepared_likewise(make_recipe, data_file):
    recipe = make_recipe(max_steps=1, eval_data_files=str(data_file), eval_strategy="steps", eval_steps=1)
    result = train(recipe, progress=False)
    assert result.eval_data == result.data
    assert any("eval_loss" in entry for entry in result.log_history)


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_progress_is_the_callers_to_show(disable_tqdm, make_recipe, capfd):
    steps = []

    class Bar(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append((state.global_step, state.max_steps))

    capfd.readouterr()
    train(make_recipe(max_steps=2, disable_tqdm=disable_tqdm), callbacks=[Bar()], progress=False)
    assert steps == [(1, 2), (2, 2)]
    printed = "".join(capfd.readouterr())
    assert "it/s" not in printed
    assert "loss" not in printed
    assert datasets.is_progress_bar_enabled(), "hidden for this run, not for what the caller does next"


@pytest.fixture
def arguments(model_dir, data_file, tmp_path):
    named = {"config": TINY, "model_name_or_path": model_dir, "data_files": data_file, "output_dir": tmp_path / "out"}
    return [word for key, value in named.items() for word in (f"--{key}", str(value))]


def test_the_command_prints_its_result_and_nothing_else(arguments):
    result = CliRunner().invoke(app, ["train", *arguments, "--json", "--max_steps", "2"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["global_step"] == 2


@pytest.mark.parametrize("invoke", ["cli", "module"])
def test_a_refusal_is_one_line_and_status_2(invoke, arguments, capsys):
    wrong = [*arguments, "--learnin_rate", "1"]
    if invoke == "cli":
        result = CliRunner().invoke(app, ["train", *wrong])
        status, printed = result.exit_code, result.stderr
    else:
        status, printed = main(wrong), capsys.readouterr().err
    assert status == 2
    assert printed == "error: the command line: unknown key learnin_rate; did you mean learning_rate?\n"


@pytest.mark.slow
def test_accelerate_launches_it(arguments):
    """One process; that it really ran is read from the saved state."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "sft.train"]
    root = Path(sft.__file__).parents[1]
    result = subprocess.run([*launch, *arguments, "--max_steps", "3"], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "3 steps" in result.stdout
    state = json.loads((Path(arguments[-1]) / "trainer_state.json").read_text())
    assert state["global_step"] == 3


FILTER = {"logging_nan_inf_filter": True}


@pytest.mark.parametrize("keys", [{}, FILTER, {**FILTER, "max_grad_norm": 0.0}])
def test_a_run_whose_loss_becomes_no_number_says_so(keys, make_recipe):
    """With transformers' filter it would end with a mean loss like any other; without clipping no norm tells."""
    result = train(make_recipe(max_steps=4, learning_rate=1e30, **keys), progress=False)
    logged = [entry for entry in result.log_history if "loss" in entry]
    assert all(math.isfinite(entry["loss"]) for entry in logged) == bool(keys)
    lost = [entry["step"] for entry in logged if entry.get("nonfinite_losses")]
    assert lost == [entry["step"] for entry in logged][-len(lost) :]
    assert [entry["nonfinite_losses"] for entry in logged[-len(lost) :]] == [1] * len(lost)
    assert f"from step {lost[0]} on the loss is no finite number, and the model is of no use" in _summary(result)
    history = read_history(result.output_dir)
    state = _state(history)
    assert state[0] == "bad"
    assert f"from step {lost[0]} on the loss is no finite number" in state[1]
    assert dict(_headline(history))["last loss"] == "no finite number"


def test_what_the_summary_says_of_numbers_that_are_none(make_recipe):
    result = train(make_recipe(max_steps=1), progress=False)
    assert "finite" not in _summary(result)
    nan, norm = math.nan, "grad_norm"
    for entries, message in (
        ([{"loss": nan}, {"loss": 1.0}], ": at 1 logged steps, 1 the first, the loss is no finite number"),
        ([{"loss": 1.0, norm: nan}, {"loss": 1.0, norm: nan}], ": from step 1 on the gradient norm is no finite"),
        ([{"loss": 1.0, norm: math.inf}, {"loss": 1.0, norm: 2.0}], None),  # as fp16 begins: its step is left out
    ):
        logged = [{"step": step, **entry} for step, entry in enumerate(entries, 1)]
        text = _summary(dataclasses.replace(result, log_history=logged))
        assert message in text if message else "finite" not in text
