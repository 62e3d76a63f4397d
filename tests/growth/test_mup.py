# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""muP: who is in which group, that rates keep their ratio, and that activations move alike at every width."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from growth.training.mup import MupMixin, init_weights, parameter_groups, parameter_kind
from modeling_teleflm import TeleFLMConfig, TeleFLMForCausalLM
from tests.fixtures.tiny import tiny_config, tiny_model
from tests.growth.test_growth import one_thread  # noqa: F401

LAYER = {
    "self_attn.q_proj": "matrix",
    "self_attn.k_proj": "matrix",
    "self_attn.v_proj": "matrix",
    "self_attn.o_proj": "matrix",
    "mlp.gate_proj": "matrix",
    "mlp.up_proj": "matrix",
    "mlp.down_proj": "matrix",
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
}
EXPECTED = {
    "model.embed_tokens.weight": "vector",
    **{f"model.layers.{i}.{name}.weight": kind for i in range(3) for name, kind in LAYER.items()},
    "model.norm.weight": "norm",
    "lm_head.weight": "vector",
}


class MupTrainer(MupMixin, Trainer): ...


def test_every_parameter_has_its_group():
    model = tiny_model()
    assert {name: parameter_kind(name) for name, _ in model.named_parameters()} == EXPECTED
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.1, width_ratio=4.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: i for i, group in enumerate(groups) for parameter in group["params"]}
    assert found == {name: ["vector", "matrix", "norm"].index(kind) for name, kind in EXPECTED.items()}
    # AdamW decays by lr x weight_decay: the same in the first two groups, nothing in the third.
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (2.5e-4, 0.4), (1e-3, 0.0)]


def test_tied_and_frozen_parameters_are_in_one_group_or_none():
    model = tiny_model(tiny_config(tie_word_embeddings=True, input_mult=1.0))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "proj" not in name
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.0, width_ratio=4.0)
    assert [len(group["params"]) for group in groups] == [1, 7]


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.q_proj.lora_A.weight", "w"])
def test_other_parameters_are_refused(name):
    with pytest.raises(ValueError, match="is no weight of a Tele-FLM"):
        parameter_kind(name)


class Rates(TrainerCallback):
    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def train(trainer_class, folder, resume=None, **arguments) -> list[list[float]]:
    args = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=2,
    )
    rows = Dataset.from_list([{"input_ids": list(range(16)), "labels": list(range(16))}] * 8)
    rates = Rates()
    trainer_class(tiny_model(), args, train_dataset=rows, callbacks=[rates], **arguments).train(
        resume_from_checkpoint=resume
    )
    return rates.rates


@pytest.mark.slow
def test_the_ratio_survives_schedule_and_resume(tmp_path):
    plain = train(MupTrainer, tmp_path / "plain")
    rates = train(MupTrainer, tmp_path / "mup", base_width=8)
    assert [len(step) for step in plain] == [2] * 4  # no base width: the trainer's own groups
    assert [step[0] for step in rates] == pytest.approx([step[0] for step in plain])
    for vector, matrix, norm in rates:
        assert (matrix, norm) == (pytest.approx(vector / 4), vector)
    resumed = train(MupTrainer, tmp_path / "again", base_width=8, resume=str(tmp_path / "mup/checkpoint-2"))
    assert resumed == rates[2:]


def test_trl_trains_with_the_same_groups(tmp_path):
    from trl import SFTConfig, SFTTrainer

    from tests.fixtures.tiny import tiny_tokenizer

    class MupSFTTrainer(MupMixin, SFTTrainer): ...

    args = SFTConfig(str(tmp_path), max_steps=1, learning_rate=1e-3, use_cpu=True, bf16=False, report_to="none")
    rows = Dataset.from_dict({"input_ids": [list(range(300, 330))] * 4})
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    trainer = MupSFTTrainer(tiny_model(), args, train_dataset=rows, processing_class=tokenizer, base_width=16)
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert [len(group["params"]) for group in groups] == [2, 21, 7]
    assert [group["initial_lr"] for group in groups] == [1e-3, 5e-4, 1e-3]


@pytest.mark.parametrize("key", ["params", "model", "optimizer_dict"])
def test_optimizers_with_groups_of_their_own_are_refused(key, tmp_path, monkeypatch):
    """So do GaLore, LOMO and the layer-wise optimizers hand their groups over."""
    own = (torch.optim.AdamW, {key: []})
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args, model: own))
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="makes parameter groups of its own; muP needs"):
        MupTrainer(tiny_model(), args, base_width=16).create_optimizer()


# The coordinate check: after some steps of Adam, activations have moved as far at every width, and not without muP.

BASE = 64
IDS = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(0))


def movement(width: int, mup: bool, steps: int = 4) -> dict[str, float]:
    """Root mean square change of some activations of a model of that width over the steps."""
    torch.manual_seed(0)
    ratio = width / BASE
    config = TeleFLMConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        max_position_embeddings=64,
        use_mup=True,
        mup_scale_factor=ratio if mup else 1.0,
    )
    model = TeleFLMForCausalLM(config)
    init_weights(model, width_ratio=ratio, vector_std=0.5, matrix_std=0.12)
    rule = ratio if mup else 1.0
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=0.02, weight_decay=0.0, width_ratio=rule))
    seen: dict[str, torch.Tensor] = {}
    for name, module in (("attention", model.model.layers[0].self_attn.o_proj), ("ffn", model.model.layers[1].mlp)):
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output.detach()}))

    def activations() -> dict[str, torch.Tensor]:
        output = model(IDS, labels=IDS, output_hidden_states=True)
        output.loss.backward()
        return {**seen, "stream": output.hidden_states[1].detach(), "logits": output.logits.detach()}

    first = activations()
    for _ in range(steps):
        optimizer.step()
        optimizer.zero_grad()
        last = activations()
    return {name: (last[name] - first[name]).square().mean().sqrt().item() for name in last}


@pytest.mark.slow
def test_coordinate_check():
    widths = (64, 128, 256, 512)
    with_mup, without = ([movement(width, mup) for width in widths] for mup in (True, False))
    for name in ("attention", "ffn", "stream", "logits"):
        flat = [moved[name] / with_mup[0][name] for moved in with_mup]
        assert min(flat) > 0.5, name
        assert max(flat) < 1.25, name
        growing = [moved[name] / without[0][name] for moved in without]
        assert growing == sorted(growing), name
        assert growing[-1] > 4, name


def test_width_aware_init():
    for ratio in (1.0, 16.0):
        model = tiny_model(tiny_config(hidden_size=128, num_attention_heads=4, intermediate_size=512))
        init_weights(model, width_ratio=ratio)
        weights = dict(model.named_parameters())
        assert weights["model.embed_tokens.weight"].std().item() == pytest.approx(4e-3, rel=0.02)
        assert weights["lm_head.weight"].std().item() == pytest.approx(4e-3, rel=0.02)
        # At 16 x the proxy's width, the standard deviation that the 52B was made with.
        expected = 1.697e-2 if ratio == 1.0 else 4.242e-3
        assert weights["model.layers.1.mlp.up_proj.weight"].std().item() == pytest.approx(expected, rel=0.02)
        assert (weights["model.norm.weight"] == 1).all()
