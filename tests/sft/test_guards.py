# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Every guard passes what is right, and stops the fault planted here."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers.modeling_outputs import CausalLMOutputWithPast
from trl.trainer.utils import add_fused_lm_head

import sft.training.train
from modeling_teleflm import TeleFLMConfig, TeleFLMForCausalLM
from sft.training.guards import (
    GuardError,
    check_launch,
    check_trained_tokens,
    check_wrapped,
    count_wrapped,
    fused_loss_gap,
)
from sft.training.recipe import RunArguments
from sft.training.train import build_trainer, train
from tests.fixtures.tiny import tiny_config


class HiddenFactorConfig(TeleFLMConfig):
    """The fault: a configuration that does not tell TRL the factor on the logits."""

    logit_scale = None


class HiddenFactorModel(TeleFLMForCausalLM):
    """The model as it is, its factor on the logits known to itself alone."""

    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        hidden_states = self.model(input_ids, **kwargs).last_hidden_state
        logits = self.lm_head(hidden_states) * (self.config.output_mult / self.config.mup_scale_factor)
        return CausalLMOutputWithPast(logits=logits)


def untrained_model(kind="right", dtype=torch.float32, **overrides):
    """Tele-FLM's own initialization and the 52B's multipliers: logits so small that a loss hardly depends on them."""
    fields = {"num_hidden_layers": 2, "initializer_range": 0.004, "output_mult": 0.5, "mup_scale_factor": 16.0}
    torch.manual_seed(0)
    model = {"right": TeleFLMForCausalLM, "wrong": HiddenFactorModel}[kind](tiny_config(**{**fields, **overrides}))
    if kind == "wrong":
        model.config.__class__ = HiddenFactorConfig
    return model.to(dtype)


def gap(model):
    add_fused_lm_head(model)
    return fused_loss_gap(model, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("output_mult", "mup_scale_factor"), [(0.5, 16.0), (2.0, 80.0), (0.37, 11.0)])
def test_gap_is_rounding_for_the_right_loss(dtype, output_mult, mup_scale_factor):
    assert gap(untrained_model("right", dtype, output_mult=output_mult, mup_scale_factor=mup_scale_factor)) < 0.005


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("output_mult", "at_least"), [(0.5, 50), (14.0, 0.1), (17.0, 0.05)])
def test_gap_shows_any_factor_that_trl_does_not_know(dtype, output_mult, at_least):
    assert gap(untrained_model("wrong", dtype, output_mult=output_mult)) > at_least


def test_a_comparison_of_losses_would_not_have_shown_it():
    model = untrained_model("wrong")
    add_fused_lm_head(model)
    input_ids = torch.arange(128)[None]
    logits = model(input_ids).logits[:, :-1]
    native = torch.nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[0, 1:]).item()
    fused = model(input_ids, labels=input_ids, fused_lm_head=True).loss.item()
    assert fused == pytest.approx(native, rel=1e-3)


@pytest.mark.parametrize("keys", [{}, {"bf16": True}, {"use_peft": True}], ids=str)
def test_a_run_with_the_wrong_loss_stops_before_its_first_step(keys, make_recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(sft.training.train, "load_model", lambda arguments: untrained_model("wrong"))
    steps = []
    with pytest.raises(GuardError, match=r"the loss of HiddenFactorModel: .* config.logit_scale, .* gives as None"):
        train(make_recipe(max_steps=2, **keys), callbacks=[on_step(steps.append)])
    assert not steps
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


def on_step(call):
    class OnStep(sft.training.train.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            call(state.global_step)

    return OnStep()


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"bf16": True},
        {"dtype": "bfloat16"},
        {"use_peft": True},
        {"use_peft": True, "bf16": True, "activation_checkpointing": True},
        {"activation_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=str,
)
def test_a_right_run_is_let_through(keys, make_recipe):
    result = train(make_recipe(max_steps=1, **keys), progress=False)
    assert result.global_step == 1
    assert result.log_history[0]["loss"] == pytest.approx(6.4, abs=0.2), "close to log(640), the untrained model's loss"


def test_the_model_is_left_as_it_was(make_recipe):
    trainer, _, _ = build_trainer(make_recipe(use_peft=True, lora_dropout=0.5))
    model = trainer.model.train()
    model.get_base_model().model.layers[0].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    def state():
        return (
            [module.training for module in model.modules()],
            [(name, p.requires_grad, p.grad.tolist()) for name, p in model.named_parameters()],
            [len(module._forward_hooks) for module in model.modules()],
            torch.get_rng_state().tolist(),
            {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        )

    before = copy.deepcopy(state())
    assert fused_loss_gap(model, model.get_base_model()) < 0.005
    assert state() == before


@pytest.mark.parametrize(("packing_strategy", "cuts"), [("bfd", True), ("bfd_split", False), ("wrapped", False)])
def test_every_counted_token_reaches_the_trainer_whatever_the_packing(packing_strategy, cuts, make_recipe):
    keys = {"packing": True, "packing_strategy": packing_strategy, "max_length": 64}
    trainer, report, _ = build_trainer(make_recipe(**keys))
    trained = sum(label != -100 for labels in trainer.train_dataset["labels"] for label in labels)
    assert trained == report.trained_tokens
    assert bool(report.truncated) == cuts


def test_tokens_lost_on_the_way_to_the_trainer_are_noticed(make_recipe, monkeypatch):
    arrange = sft.training.train.arrange
    monkeypatch.setattr(
        sft.training.train, "arrange", lambda *args, **kwargs: arrange(*args, **kwargs).select(range(40))
    )
    with pytest.raises(GuardError, match=r"\d+ tokens .* are to be trained on, but \d+ reached the trainer"):
        train(make_recipe())
    with pytest.raises(GuardError, match=r"1 tokens .* 0 reached the trainer"):
        check_trained_tokens(Dataset.from_dict({"labels": [[-100, -100]]}), 1)


FSDP, DEEPSPEED = {"ACCELERATE_USE_FSDP": "true"}, {"ACCELERATE_USE_DEEPSPEED": "true"}
GPUS = ("MULTI_GPU", 8, "cuda")


def launch(recipe, found, environment):
    """What accelerate finds cannot be had without GPUs, so it is written down here; tests/sft/test_distributed.py has
    the launches that a CPU can do."""
    distributed_type, num_processes, device = found
    state = SimpleNamespace(
        distributed_type=DistributedType(distributed_type), num_processes=num_processes, device=torch.device(device)
    )
    check_launch(RunArguments(**recipe), state, environment)


@pytest.mark.parametrize(
    ("recipe", "found", "environment", "message"),
    [
        ({}, ("MULTI_CPU", 2, "cpu"), FSDP, "told to shard with FSDP, but this run is MULTI_CPU on cpu"),
        ({}, ("NO", 1, "cpu"), FSDP, "told to shard with FSDP, but this run is NO on cpu"),
        ({}, ("MULTI_CPU", 2, "cpu"), {**DEEPSPEED, "ACCELERATE_USE_CPU": "True"}, "use_cpu, so this run is MULTI_CPU"),
        ({}, ("NO", 1, "cpu"), {"WORLD_SIZE": "2"}, "started 2 processes, but each believes it is one of 1"),
        ({"num_processes": 2}, ("NO", 1, "cpu"), {}, "num_processes is 2 in the recipe, but 1 run"),
        ({"num_processes": 16}, GPUS, FSDP, "num_processes is 16 in the recipe, but 8 run"),
        ({"distributed_type": "FSDP"}, GPUS, {}, "distributed_type is FSDP in the recipe, but this run is MULTI_GPU"),
        ({"distributed_type": "MULTI_GPU"}, GPUS, FSDP, "distributed_type is MULTI_GPU .* but this run is FSDP"),
    ],
)
def test_a_launch_that_is_not_what_was_asked_for_is_refused(recipe, found, environment, message):
    with pytest.raises(GuardError, match=message):
        launch(recipe, found, environment)


@pytest.mark.parametrize(
    ("recipe", "found", "environment"),
    [
        ({}, ("NO", 1, "cpu"), {}),
        ({"num_processes": 2, "distributed_type": "MULTI_CPU"}, ("MULTI_CPU", 2, "cpu"), {"WORLD_SIZE": "2"}),
        ({"num_processes": 8, "distributed_type": "FSDP"}, GPUS, {**FSDP, "WORLD_SIZE": "8"}),
        ({"distributed_type": "DEEPSPEED"}, ("DEEPSPEED", 8, "cuda"), DEEPSPEED),
        ({"distributed_type": "DEEPSPEED"}, ("MULTI_CPU", 2, "cpu"), {**DEEPSPEED, "ACCELERATE_USE_CPU": "False"}),
        ({}, GPUS, {"ACCELERATE_USE_FSDP": "false", "WORLD_SIZE": ""}),
    ],
)
def test_a_launch_that_was_asked_for_is_let_through(recipe, found, environment):
    launch(recipe, found, environment)


WRAPPED = {"replicated": 0, "sharded_modules": 0, "sharded_parameters": 0, "parameters": 21}


@pytest.mark.parametrize(
    ("wrapped", "distributed_type", "zero_stage", "message"),
    [
        ({"sharded_modules": 1}, "FSDP", 0, "FSDP shards 1 modules on their own, expected the 2 layers and the root"),
        ({"sharded_parameters": 20}, "DEEPSPEED", 3, "ZeRO-3 shards 20 of 21 parameters"),
        ({}, "MULTI_CPU", 0, "the run is MULTI_CPU, but nothing exchanges the gradients"),
        ({"sharded_modules": 3}, "FSDP", 0, None),
        ({"sharded_parameters": 21}, "DEEPSPEED", 3, None),
        ({}, "DEEPSPEED", 2, None),
        ({"replicated": 1}, "MULTI_CPU", 0, None),
        ({}, "NO", 0, None),
    ],
)
def test_a_model_that_is_not_spread_is_noticed(wrapped, distributed_type, zero_stage, message):
    context = pytest.raises(GuardError, match=message) if message else nullcontext()
    with context:
        check_wrapped({**WRAPPED, **wrapped}, DistributedType(distributed_type), layers=2, zero_stage=zero_stage)


def test_a_model_that_is_alone_has_nothing_wrapped():
    assert count_wrapped(untrained_model()) == WRAPPED
