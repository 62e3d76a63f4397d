# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
import json
import math
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from trl import DPOConfig
from typer.testing import CliRunner

import sft
from sft.shipped import find_shipped
from sft.training.recipe import DataArguments, Recipe, RecipeError, parse_overrides, read_recipe
from teleflm.commands.sft import app
from tests.fixtures.tiny import tiny_model

FOLDER = Path(sft.__file__).parent
MINIMAL = {"model_name_or_path": "model", "data_files": "data.jsonl", "output_dir": "out", "use_cpu": True}


def test_keys_reach_the_dataclass_that_declares_them():
    recipe = Recipe.from_dict(
        {**MINIMAL, "use_peft": True, "lora_r": 4, "learning_rate": 1, "last_turn_only": True, "num_processes": 1}
    )
    assert (recipe.model.lora_r, recipe.training.learning_rate) == (4, 1)
    assert (recipe.data.last_turn_only, recipe.run.num_processes) == (True, 1)
    assert recipe.model.lora_target_modules == "all-linear"
    assert recipe.training.bf16 is False, "TRL's default of bfloat16 is for accelerators"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learnin_rate", 1e-5, "unknown key learnin_rate; did you mean learning_rate?"),
        ("zzz", 1, "unknown key zzz; keys are those of RunArguments, DataArguments, ModelConfig, SFTConfig"),
        ("beta", 0.1, "unknown key beta"),
        ("load_in_4bit", True, "load_in_4bit is True and use_peft is not; quantized weights cannot be trained."),
        ("bnb_4bit_quant_type", "nf4", "bnb_4bit_quant_type has no effect here; it needs load_in_4bit: true."),
        ("lora_r", 4, "lora_r has no effect here; it needs use_peft: true."),
        ("gradient_checkpointing", True, "gradient_checkpointing has no effect here; write activation_checkpointing."),
        ("trainer", "ppo", "trainer is 'ppo'; expected one of sft, dpo, kto, grpo."),
        ("trainer", ["dpo"], "trainer is ['dpo']; expected one of sft, dpo, kto, grpo."),
        ("distributed_type", "FSDP2", "expected one of NO, MULTI_CPU, MULTI_GPU, FSDP, DEEPSPEED."),
        ("num_processes", 0, "num_processes is 0; expected at least 1."),
        ("learning_rate", "fast", "learning_rate is 'fast', of type str; expected float."),
        ("learning_rate", True, "learning_rate is True, of type bool; expected float."),
        ("max_length", 20.5, "max_length is 20.5, of type float; expected int or null."),
        ("logging_steps", None, "logging_steps is None, of type NoneType; expected float."),
        ("packing", "yes", "packing is 'yes', of type str; expected bool."),
        ("save_strategy", False, "save_strategy is False, of type bool; expected str."),
        ("data_files", [1], "data_files is [1], of type list; expected str or list[str] or null."),
        ("lr_scheduler_kwargs", [], "lr_scheduler_kwargs is [], of type list; expected dict or str or null."),
        ("packing_strategy", "best", "packing_strategy is 'best'; expected one of bfd, bfd_split, wrapped."),
        ("dtype", "int4", "dtype is 'int4'; expected one of auto, bfloat16, float16, float32."),
        ("save_strategy", "sometimes", "sometimes is not a valid SaveStrategy"),
        ("trust_remote_code", True, "trust_remote_code has no effect here; no code of a checkpoint is ever executed"),
        ("completion_only_loss", True, "completion_only_loss has no effect here; use assistant_only_loss"),
        ("use_liger_kernel", True, "Liger Kernel knows no Tele-FLM, and its fused cross-entropy would leave out"),
        ("liger_kernel_config", {"rms_norm": True}, "liger_kernel_config has no effect here; Liger Kernel knows no"),
        ("prediction_loss_only", True, "prediction_loss_only has no effect here; evaluation is of the loss alone"),
        ("packing_strategy", "bfd", "packing_strategy has no effect here; it needs packing: true."),
        (
            "eval_data_files",
            "eval.jsonl",
            "eval_data_files has no effect here; it needs eval_strategy: steps or epoch.",
        ),
        (
            "eval_strategy",
            "epoch",
            "eval_strategy has nothing to evaluate on; it needs eval_data_files or test_split_size",
        ),
        ("data_seed", -1, "data_seed is -1; expected 0 to 9223372036854775807."),
        ("seed", 2**32, "seed is 4294967296; expected 0 to 4294967295."),
        ("test_split_size", math.inf, "test_split_size is or holds inf; expected finite numbers."),
        ("learning_rate", 10**400, "learning_rate is or holds a number of more than 64 bits."),
        ("max_steps", 2**63, "max_steps is or holds a number of more than 64 bits."),
        ("learning_rate", math.nan, "learning_rate is or holds nan; expected finite numbers."),
        ("max_grad_norm", math.nan, "max_grad_norm is or holds nan; expected finite numbers."),
        ("lr_scheduler_kwargs", {"lr_end": -math.inf}, "lr_scheduler_kwargs is or holds -inf; expected finite"),
        ("loss_weights", [0.5, 10**400], "unknown key loss_weights"),
        ("sample_prompts", [10**400], "sample_prompts is or holds a number of more than 64 bits."),
        ("sample_steps", 3, "sample_steps has no effect here; it needs sample_prompts."),
        ("hub_model_id", "me/model", "hub_model_id has no effect here; it needs push_to_hub: true."),
        ("fsdp_config", {"version": 2}, "fsdp_config has no effect here; it needs fsdp."),
        ("activation_offloading", True, "activation_offloading and use_cpu are both set; there is nowhere to offload"),
    ],
)
def test_a_wrong_key_is_one_line_that_names_it(key, value, message):
    with pytest.raises(RecipeError) as error:
        Recipe.from_dict({**MINIMAL, key: value}, origin="my.yaml")
    assert str(error.value).startswith("my.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_of_a_command_line_are_told_as_those_of_a_file():
    for given, message in (
        ("9" * 400, "of more than 64 bits"),
        (".inf", "is or holds inf"),
        ("9" * 5000, "learning_rate|YAML"),
    ):
        with pytest.raises(RecipeError, match=message) as error:
            Recipe.from_dict({**MINIMAL, **parse_overrides(["--learning_rate", given])})
        assert "\n" not in str(error.value)
    assert Recipe.from_dict({**MINIMAL, "max_grad_norm": math.inf, "data_seed": 2**40}).training.data_seed == 2**40


def test_a_share_that_is_no_number_is_refused_by_the_class_itself():
    with pytest.raises(ValueError, match="test_split_size is inf; expected a share between 0 and 1"):
        DataArguments(data_files="x", test_split_size=math.inf)


def test_preferences_have_keys_of_their_own():
    dpo = {**MINIMAL, "trainer": "dpo"}
    recipe = Recipe.from_dict({**dpo, "beta": 0.5})
    assert isinstance(recipe.training, DPOConfig)
    assert recipe.training.beta == 0.5
    for key, message in {
        "packing": "unknown key packing; ",
        "last_turn_only": "last_turn_only has no effect here; answers are compared",
        "mup_base_width": "mup_base_width has no effect here; it is for `trainer: sft`",
        "label_smoothing_factor": "label_smoothing_factor has no effect here; .* write label_smoothing",
    }.items():
        with pytest.raises(RecipeError, match=message):
            Recipe.from_dict({**dpo, key: True})


@pytest.mark.parametrize(
    ("keys", "switch", "needs"),
    [
        ({"label_smoothing": 0.1}, {"loss_type": ["sigmoid", "robust"]}, "loss_type: robust or exo_pair or aot"),
        ({"discopop_tau": 0.1}, {"loss_type": ["discopop"]}, "loss_type: discopop"),
        ({"f_alpha_divergence_coef": 0.5}, {"f_divergence_type": "alpha_divergence"}, "f_divergence_type: alpha"),
        ({"ref_model_sync_steps": 8}, {"sync_ref_model": True}, "sync_ref_model: true"),
        ({"precompute_ref_batch_size": 8}, {"precompute_ref_log_probs": True}, "precompute_ref_log_probs: true"),
        ({"trainer": "sft", "label_smoothing_factor": 0.1, "loss_type": "dft"}, {"loss_type": "nll"}, "loss_type: nll"),
        ({"trainer": "sft", "packing_strategy": "bfd"}, {"packing": True}, "packing: true"),
        ({"trainer": "sft", "eval_data_files": "x"}, {"eval_on_start": True}, "eval_strategy: steps or epoch"),
        (
            {"activation_checkpointing": False, "activation_checkpointing_kwargs": {}},
            {"activation_checkpointing": True},
            "activation_checkpointing: true",
        ),
    ],
)
def test_a_key_without_the_key_that_gives_it_an_effect(keys, switch, needs):
    recipe = {**MINIMAL, "trainer": "dpo", **keys}
    with pytest.raises(RecipeError, match=f"has no effect here; it needs {re.escape(needs)}"):
        Recipe.from_dict(recipe)
    Recipe.from_dict({**recipe, **switch})


def test_activations_are_recomputed_unless_a_recipe_says_otherwise(recwarn):
    assert Recipe.from_dict(MINIMAL).training.activation_checkpointing is True
    assert Recipe.from_dict({**MINIMAL, "activation_checkpointing": False}).training.activation_checkpointing is False
    assert not [warning for warning in recwarn if "gradient_checkpointing" in str(warning.message)]


def test_required_keys():
    with pytest.raises(RecipeError, match="does not set data_files, output_dir; add it, or pass --data_files VALUE"):
        Recipe.from_dict({"model_name_or_path": "model"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "is not valid YAML: .*seed is given twice"),
        ("seed: [1\n", "is not valid YAML"),
        ("- seed\n", "holds a list; a recipe is one flat mapping"),
        ("seed: !!python/object/apply:os.system ['true']\n", "is not valid YAML"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(path)


def test_a_missing_file():
    with pytest.raises(RecipeError, match=r"cannot read the recipe nowhere.yaml: No such file or directory"):
        read_recipe("nowhere.yaml")


def test_scalars_follow_yaml_1_2_and_overrides_win(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("save_strategy: no\nlr_scheduler_kwargs: {lr_end: 1e-9}\nseed: 1\nrun_name: on\n")
    recipe = read_recipe(path, {**MINIMAL, "seed": 2})
    assert recipe.training.save_strategy == "no"
    assert recipe.training.lr_scheduler_kwargs == {"lr_end": 1e-9}
    assert (recipe.training.seed, recipe.training.run_name) == (2, "on")
    with pytest.raises(RecipeError, match=r"the command line: unknown key sed; did you mean seed\?"):
        read_recipe(path, {**MINIMAL, "sed": 2})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--learning-rate", "2.7e-5", "--seed=3"], {"learning_rate": 2.7e-5, "seed": 3}),
        (["--packing", "--max_length", "null"], {"packing": True, "max_length": None}),
        (["--data_files", "a.jsonl", "b.jsonl"], {"data_files": ["a.jsonl", "b.jsonl"]}),
        (["--max_steps", "-1"], {"max_steps": -1}),
        (["--lr_scheduler_kwargs", "{lr_end: 1e-9}"], {"lr_scheduler_kwargs": {"lr_end": 1e-9}}),
        (["--run_name", "a=b"], {"run_name": "a=b"}),
        ([], {}),
    ],
)
def test_overrides(arguments, expected):
    assert parse_overrides(arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe.yaml"], "'recipe.yaml' belongs to no key"),
        (["--seed", "1", "--seed", "2"], "--seed is given twice"),
        (["--data_files", "[a"], "--data_files is not valid YAML"),
    ],
)
def test_wrong_overrides(arguments, message):
    with pytest.raises(RecipeError, match=message):
        parse_overrides(arguments)


RECIPES = sorted(FOLDER.glob("recipes/*.yaml"))
ACCELERATE_CONFIGS = sorted(FOLDER.glob("accelerate_configs/*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_decay_linearly_to_the_published_floor(path):
    # bfloat16 and sharding need accelerators; the keys are checked all the same.
    recipe = read_recipe(path, {**MINIMAL, "bf16": False})
    assert recipe.training.lr_scheduler_type == "polynomial"
    assert recipe.training.lr_scheduler_kwargs == {"lr_end": 1e-9, "power": 1.0}
    if path.stem == "flm-2-52b-full":
        assert (recipe.training.learning_rate, recipe.training.max_length) == (2.7e-5, 2048)


def header_commands(path) -> list[list[str]]:
    """The commands in the comment that a file begins with, as a shell splits them."""
    lines = [line.removeprefix("#   ") for line in path.read_text().splitlines() if line.startswith("#   ")]
    return [shlex.split(command) for command in " ".join(lines).replace("\\ ", "").split("teleflm sft export")[:1]]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_command_of_a_recipe_is_complete_and_starts_as_many_processes_as_it_wants(path):
    (command,) = header_commands(path)
    recipe = read_recipe(path, {**MINIMAL, "bf16": False})
    options = dict(pairwise(command))
    assert options["--config"] == path.stem
    assert {"--model_name_or_path", "--data_files", "--output_dir"} <= options.keys()
    if command[0] == "teleflm":
        assert recipe.run.num_processes in (None, 1)
        return
    (name,) = re.findall(r"teleflm sft recipes (\S+) --path", options["--config_file"])
    shipped = load_config_from_file(str(find_shipped(name, "accelerate")))
    assert int(options.get("--num_processes", shipped.num_processes)) == (recipe.run.num_processes or 1)
    raw = yaml.safe_load(path.read_text())
    assert raw.get("bf16", False) == (shipped.mixed_precision == "bf16")
    assert recipe.training.activation_checkpointing or name in ("multi-gpu", "cpu")


def test_a_recipe_is_found_by_its_name_and_a_file_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_recipe("flm-2-52b-lora", {**MINIMAL, "bf16": False}).model.use_peft
    Path("tiny-cpu").write_text("seed: 3\n")
    assert read_recipe("tiny-cpu", MINIMAL).training.seed == 3, "a file here comes first"
    with pytest.raises(
        RecipeError, match=r"no file flm-2-52b-ful, and no recipe is called .*did you mean flm-2-52b-full"
    ):
        read_recipe("flm-2-52b-ful", MINIMAL)
    with pytest.raises(RecipeError, match=r"no recipe is called fsdp2"):
        read_recipe("fsdp2", MINIMAL)
    with pytest.raises(RecipeError, match=r"cannot read the recipe nowhere/tiny-cpu"):
        read_recipe("nowhere/tiny-cpu", MINIMAL)


def test_recipes_are_listed_and_printed():
    runner = CliRunner()
    listed = json.loads(runner.invoke(app, ["recipes", "--json"]).stdout)
    assert {file["name"] for file in listed} == {path.stem for path in (*RECIPES, *ACCELERATE_CONFIGS)} | {
        "teleflm",
        "published",
        "vllm-example",
    }
    assert all(file["is"] and Path(file["path"]).is_file() for file in listed)
    for file in listed:
        assert runner.invoke(app, ["recipes", file["name"]]).stdout == Path(file["path"]).read_text()
        assert runner.invoke(app, ["recipes", file["name"], "--path"]).stdout == file["path"] + "\n"
    refused = runner.invoke(app, ["recipes", "fdsp2"])
    assert refused.exit_code == 2
    assert "did you mean fsdp2?" in refused.stderr


def test_the_shipped_recipes_are_for_every_way_to_train():
    recipes = {path.stem: read_recipe(path, {**MINIMAL, "bf16": False}) for path in RECIPES}
    ways = {(recipe.run.trainer, recipe.model.use_peft, recipe.model.load_in_4bit) for recipe in recipes.values()}
    sft = {("sft", False, False), ("sft", True, False), ("sft", True, True)}
    assert ways == sft | {("dpo", False, False), ("grpo", False, False)}


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_shipped_accelerate_configs_are_accepted(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == (1 if path.stem == "cpu" else 8)
    kinds = {"multi-gpu": "MULTI_GPU", "tp": "MULTI_GPU", "cpu": "NO", "fsdp2": "FSDP", "fsdp2-cp": "FSDP"}
    kinds |= dict.fromkeys(("zero2", "zero3", "zero3-ulysses"), "DEEPSPEED")
    assert str(config.distributed_type.value) == kinds[path.stem]
    if config.fsdp_config:
        layers = {type(module).__name__ for module in tiny_model().modules()}
        assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] in layers, (
            "nothing but the root would be wrapped"
        )


def test_the_command_and_the_reading_of_data_start_without_torch():
    heavy = {"torch", "transformers", "trl", "datasets"}
    code = f"import sys, teleflm.commands.sft, sft.data.labels; assert not {heavy!r} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
