# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Every guard passes what is right, and stops the fault planted here."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers.modeling_outputs import CausalLMOutputWithPast
from trl.trainer.utils import add_fused_lm_head

import sft.training.train
import sft.training.trainers
from modeling_teleflm import TeleFLMConfig, TeleFLMForCausalLM
from sft.data.labels import DataReport
from sft.training import guards
from sft.training.guards import GuardError, check_trained_tokens, fused_loss_gap
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
    monkeypatch.setattr(sft.training.train, "load_model", lambda arguments, **kwargs: untrained_model("wrong"))
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


def test_tokens_lost_on_the_way_to_the_trainer_are_noticed(make_recipe, monkeypatch, tmp_path):
    arrange = sft.training.trainers.arrange
    monkeypatch.setattr(
        sft.training.trainers, "arrange", lambda *args, **kwargs: arrange(*args, **kwargs).select(range(40))
    )
    with pytest.raises(GuardError, match=r"\d+ tokens .* are to be trained on, but \d+ reached the trainer"):
        train(make_recipe(shuffle_dataset=True, dataset_cache_dir=str(tmp_path)))
    with pytest.raises(GuardError, match=r"1 tokens .* 0 reached the trainer"):
        check_trained_tokens(Dataset.from_dict({"labels": [[-100, -100]]}), 1)


def report_of(rows, digest):
    return DataReport(rows, (), 0, 0, 0, digest)


@pytest.mark.parametrize(
    ("third", "message"),
    [
        (
            ["a", (7, "e")],
            r"process 2 has other evaluation data \(7 rows, digest e\) than process 0 \(48 rows, digest e\)",
        ),
        (["a", (48, "f")], r"process 2 has other evaluation data \(48 rows, digest f\) than process 0 \(48 rows, d"),
        (["a", None], r"process 2 has other evaluation data \(none\) than process 0 \(48 rows, digest e\)"),
        (["b", (48, "e")], r"process 2 has other data \(40 rows, digest b\) than process 0 \(40 rows, digest a\)"),
    ],
)
def test_processes_with_other_data_are_told_apart(third, message, monkeypatch):
    """What they gather is planted; that a run of one and of two gathers is in the tests of these."""
    data, tested = report_of(40, "a"), report_of(48, "e")
    guards.check_same_data(data, tested)
    guards.check_same_data(data, None)
    monkeypatch.setattr(guards, "gather_object", lambda mine: [*mine, *mine, [(40, third[0]), third[1]]])
    with pytest.raises(GuardError, match=message):
        guards.check_same_data(data, tested)


def test_what_processes_compare_is_what_a_run_has_read(make_recipe, data_file, tmp_path, monkeypatch):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(data_file.open().readlines()[:7]))
    compared = []
    monkeypatch.setattr(guards, "gather_object", lambda mine: compared.extend(mine) or mine)
    build_trainer(make_recipe(eval_data_files=str(few), eval_strategy="steps", eval_steps=2))
    build_trainer(make_recipe(data_files=str(few)))
    (first, tested), (second, none) = compared
    assert (first[0], tested[0], none) == (48, 7, None)
    assert tested == second != first
