# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from typer.testing import CliRunner

import sft
from sft.cli import app
from sft.recipe import RecipeError
from sft.train import build_trainer, main, train
from tests.fixtures.tiny import tiny_model

TINY = Path(sft.__file__).parent / "recipes" / "tiny-cpu.yaml"


def weights(folder, name="model.safetensors"):
    return load_file(Path(folder) / name)


def losses(result):
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


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_packing_changes_no_log_probability(attn_implementation, make_recipe):
    """The oracle: every conversation alone in a batch, through the model's own logits."""
    trainer, _, _ = build_trainer(make_recipe(packing=True, max_length=128, attn_implementation=attn_implementation))
    alone, _, _ = build_trainer(make_recipe(max_length=128, attn_implementation=attn_implementation))
    assert len(trainer.train_dataset) < len(alone.train_dataset)
    model, reference = trainer.model.eval(), tiny_model(trainer.model.config)
    reference.load_state_dict(model.state_dict())

    packed, expected = {}, {}
    with torch.no_grad():
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


def test_an_output_folder_holds_one_run(make_recipe):
    recipe = make_recipe(max_steps=2, save_strategy="steps", save_steps=1)
    train(recipe, progress=False)
    with pytest.raises(RecipeError, match=r"out already holds config.json; choose another, or continue that run"):
        train(recipe)
    result = train(make_recipe(max_steps=3, resume_from_checkpoint=True), progress=False)
    assert [entry["step"] for entry in result.log_history if "loss" in entry] == [1, 2, 3]


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
    ],
)
def test_bad_input_is_one_line(keys, message, make_recipe):
    with pytest.raises(sft.SFTError, match=message) as error:
        train(make_recipe(**keys))
    assert "\n" not in str(error.value)


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


def test_accelerate_launches_it(arguments):
    """One process; that it really ran is read from the saved state."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "sft.train"]
    root = Path(sft.__file__).parents[1]
    result = subprocess.run([*launch, *arguments, "--max_steps", "3"], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "3 steps" in result.stdout
    state = json.loads((Path(arguments[-1]) / "trainer_state.json").read_text())
    assert state["global_step"] == 3


def test_two_processes_train_as_one_with_twice_the_batch(arguments, make_recipe, tmp_path):
    keys = {"packing": False, "max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value).lower())]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sft.train"]
    root = Path(sft.__file__).parents[1]
    result = subprocess.run([*launch, *arguments, *words, "--json"], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    keys |= {"per_device_train_batch_size": 8, "max_length": 256, "output_dir": str(tmp_path / "one")}
    one = train(
        make_recipe(**keys, lr_scheduler_type="polynomial", lr_scheduler_kwargs={"lr_end": 1e-9}), progress=False
    )
    two = json.loads(result.stdout)["log_history"]
    assert [entry["loss"] for entry in two if "loss" in entry] == pytest.approx(losses(one), rel=1e-5)
    assert all(
        torch.allclose(weights(tmp_path / "out")[name], weight, atol=1e-5)
        for name, weight in weights(tmp_path / "one").items()
    )
