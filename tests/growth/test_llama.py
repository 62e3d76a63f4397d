# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A Llama grows into a larger Llama that stock transformers loads, with the logits of its source in float64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM, Trainer, TrainingArguments

from conversion import inspect_checkpoint
from conversion.checkpoint.errors import CheckpointError
from growth import grow_checkpoint, verify_checkpoints
from growth.method import Mask, Tile
from tests.fixtures.llama import VOCABULARY, edit_config, save_llama, stock_logits, tiny_llama

IDS = torch.randint(0, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(0))
ALL_AXES = {
    "hidden_size": 56,
    "num_attention_heads": 7,
    "num_key_value_heads": 7,
    "intermediate_size": 100,
    "num_hidden_layers": 5,
    "vocab_size": 384,
}
WIDER = {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 7}
# As Llama's config.json have them, old spellings among them; sized so that 48 tokens and 4 pairs tell them apart.
ROPES = {
    "theta": {"rope_theta": 500.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 50.0},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 32},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 4.0,
            "rope_theta": 100.0,
        }
    },
    "llama3": {
        "rope_theta": 200.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "factor": 4.0,
            "short_factor": [1.0, 1.0, 1.0, 1.0],
            "long_factor": [1.0, 2.0, 3.0, 5.0],
            "original_max_position_embeddings": 32,
        }
    },
}


def source_with(folder: Path, **fields) -> Path:
    """A source whose config.json has these fields as they are, in whatever spelling."""
    ropes = {name: fields[name] for name in ("rope_theta", "rope_scaling", "rope_parameters") if name in fields}
    save_llama(folder, **{name: value for name, value in fields.items() if name not in ropes})
    if ropes:
        edit_config(folder, lambda config: [config.pop("rope_parameters"), config.update(ropes)])
    return folder


def difference(source: Path, out: Path, ids: torch.Tensor = IDS) -> float:
    """The largest between logits of the source's vocabulary, relative to the largest of these."""
    before, after = stock_logits(source, ids), stock_logits(out, ids)
    return ((after[..., : before.shape[-1]] - before).abs().max() / before.abs().max()).item()


@pytest.mark.parametrize(
    ("fields", "target"),
    [
        pytest.param({}, ALL_AXES, id="everything"),
        pytest.param({"num_key_value_heads": 4}, {"hidden_size": 40, "num_attention_heads": 5}, id="MHA"),
        pytest.param({}, {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}, id="larger groups"),
        pytest.param({}, {"intermediate_size": 73}, id="ffn"),
        pytest.param({}, {"num_hidden_layers": 7}, id="layers"),
        pytest.param({}, {"vocab_size": 353}, id="vocab"),
        pytest.param({"tie_word_embeddings": True}, ALL_AXES, id="tied, everything"),
        pytest.param({"head_dim": 16}, {**ALL_AXES, "hidden_size": 42}, id="wide heads"),
        pytest.param({"head_dim": 16}, {"hidden_size": 36}, id="hidden without heads"),
        pytest.param({"hidden_act": "gelu"}, ALL_AXES, id="gelu"),
        *(pytest.param(rope, ALL_AXES, id=kind) for kind, rope in ROPES.items()),
    ],
)
def test_the_function_is_preserved_within_llama(fields, target, tmp_path):
    source = source_with(tmp_path / "source", **fields)
    result = grow_checkpoint(source, tmp_path / "out", target)
    assert difference(source, tmp_path / "out") < 1e-12
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert result.growth.target.logit_scale == 1.0
    certificate = verify_checkpoints(source, tmp_path / "out").certificate
    assert certificate is not None
    assert certificate.holds


@pytest.mark.parametrize("kind", [kind for kind in ROPES if kind != "theta"])
def test_these_rotary_embeddings_are_not_the_plain_one(kind, tmp_path):
    """Else the test above would not see that one was lost."""
    source = source_with(tmp_path / "source", **ROPES[kind])
    before = stock_logits(source, IDS)
    edit_config(source, lambda config: [config.pop(name, None) for name in ("rope_parameters", "rope_scaling")])
    edit_config(source, lambda config: config.setdefault("rope_theta", ROPES[kind].get("rope_theta", 100.0)))
    if kind == "dynamic":
        edit_config(source, lambda config: config.update(rope_theta=1e4))
    assert (stock_logits(source, IDS) - before).abs().max() > 1e-3


def test_repeated_features(tmp_path):
    source = save_llama(tmp_path / "source", num_key_value_heads=4)
    target = {"hidden_size": 96, "num_attention_heads": 12, "intermediate_size": 144}
    grow_checkpoint(source, tmp_path / "out", target, method=Tile(0.3))
    assert difference(source, tmp_path / "out") < 1e-12


def test_bfloat16_and_several_files(tmp_path):
    source = save_llama(tmp_path / "source", torch.bfloat16)
    grow_checkpoint(source, tmp_path / "out", {"num_hidden_layers": 5, "intermediate_size": 80})
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(after[name][:72], before[name])
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


# What lies beside the weights.


def test_the_folder_is_a_llamas(tmp_path):
    """Its own keys in their own spelling, its tokenizer byte for byte, and nothing of a Tele-FLM."""
    source = source_with(tmp_path / "source", **ROPES["llama3"])
    edit_config(source, lambda config: config.update(torch_dtype=config.pop("dtype"), unsloth_version="2026.1"))
    edit_config(source, lambda config: config.update(_name_or_path="/home/someone/llama", pretraining_tp=1))
    said = json.loads((source / "config.json").read_text())
    grow_checkpoint(source, tmp_path / "out", ALL_AXES)
    config = json.loads((tmp_path / "out/config.json").read_text())
    grown = {"head_dim", "rms_norm_eps", *ALL_AXES}
    for key in said.keys() - grown - {"_name_or_path"}:
        assert config[key] == said[key], key
    assert config.keys() - said.keys() <= {"head_dim", "attention_bias"}
    assert "_name_or_path" not in config
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "USE_POLICY.md"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not list((tmp_path / "out").glob("*.py"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert tokenizer("To grow").input_ids[0] == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "FLM" not in card.replace("teleflm", "")
    for line in (
        "license: llama3.1",
        "language:\n- en",
        "AutoModelForCausalLM.from_pretrained(",
        "hidden_size 32 to 56",
    ):
        assert line in card
    assert "30 thousand" not in card
    assert "trust_remote_code" not in card


def test_without_a_template_none_is_made_up(tmp_path):
    source = save_llama(tmp_path / "source")
    (source / "chat_template.jinja").unlink()
    grow_checkpoint(source, tmp_path / "out", {"num_hidden_layers": 4})
    assert not (tmp_path / "out/chat_template.jinja").exists()


def test_fields_that_are_not_said_are_transformers_defaults(tmp_path):
    fields = {"rms_norm_eps": 1e-6, "num_key_value_heads": 4}
    source = save_llama(tmp_path / "source", **fields)
    missing = ("rms_norm_eps", "num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias")
    edit_config(source, lambda config: [config.pop(key, None) for key in (*missing, "rope_parameters", "hidden_act")])
    grow_checkpoint(source, tmp_path / "out", {"hidden_size": 40, "num_attention_heads": 5})
    assert difference(source, tmp_path / "out") < 1e-12
    grown = AutoConfig.from_pretrained(tmp_path / "out")
    assert (grown.num_key_value_heads, grown.rms_norm_eps) == (5, pytest.approx(1e-6 * 32 / 40, rel=1e-12))


def test_new_rows_repeat_those_that_no_token_has(tmp_path):
    """The token that was added behind the vocabulary has a row, which counts as used."""
    source = save_llama(tmp_path / "source")
    result = grow_checkpoint(source, tmp_path / "out", {"vocab_size": 384})
    assert result.growth.unused_rows == VOCABULARY
    assert any(f"the mean of the {352 - VOCABULARY} rows without a piece" in note for note in result.notes)
    head = load_file(tmp_path / "out/model.safetensors")["lm_head.weight"]
    expected = head[VOCABULARY:352].mean(0)
    assert (head[352:] - expected).abs().max() < 1e-12


# What is refused, by name.


@pytest.mark.parametrize(
    ("change", "how", "message"),
    [
        ({}, {"target": "tele-flm-1t"}, "model_type would change from llama to TeleFLM"),
        ({}, {"overrides": {"input_mult": 2.0}}, "input_mult is asked to be 2.0: a Llama has no multipliers"),
        ({}, {"overrides": {"use_mup": True}}, "use_mup is asked to be True: a Llama has no multipliers"),
        ({}, {"method": Mask()}, "method is mask, and the source a Llama"),
        ({}, {"multipliers": "target"}, "multipliers is 'target', and the source a Llama, which has none"),
        ({}, {"overrides": {"head_dim": 16}}, "head_dim is asked to be 16, the source has 8"),
        ({}, {"overrides": {"hidden_size": 40}}, "head_dim would change from 8 to 10"),
        ({}, {"overrides": {"rope_theta": 5e5}}, "rope_parameters would change from"),
        (
            {},
            {"overrides": {"hiden_size": 64}},
            "hiden_size is no field of a Llama's configuration; did you mean hidden",
        ),
        ({"attention_bias": True}, {}, "attention_bias is true; biases are not supported here"),
        ({"mlp_bias": True}, {}, "mlp_bias is true; biases are not supported here"),
        ({"model_type": "mistral"}, {}, "model_type is 'mistral', expected 'TeleFLM' or 'llama'"),
        ({"model_type": "qwen2"}, {}, "model_type is 'qwen2', expected 'TeleFLM' or 'llama'"),
    ],
)
def test_what_a_llama_cannot_become(change, how, message, tmp_path):
    source = save_llama(tmp_path / "source")
    edit_config(source, lambda config: config.update(change))
    target = how.pop("target", None) or {"vocab_size": 384}
    with pytest.raises(CheckpointError, match=message):
        grow_checkpoint(source, tmp_path / "out", target, **how)
    assert not (tmp_path / "out").exists()


def _more_of(tensors, name="model.norm.weight"):
    tensors[name] = tensors[name] * 1.01


@pytest.mark.parametrize(
    "break_it",
    [
        pytest.param(lambda out: _edit_weights(out, _more_of), id="a weight"),
        pytest.param(lambda out: edit_config(out, lambda config: config.update(rms_norm_eps=1e-3)), id="epsilon"),
        pytest.param(lambda out: edit_config(out, lambda config: config["rope_scaling"].update(factor=4)), id="factor"),
        pytest.param(lambda out: edit_config(out, lambda config: config.update(rope_theta=201)), id="theta"),
        pytest.param(lambda out: edit_config(out, lambda config: config.update(hidden_act="gelu")), id="activation"),
        pytest.param(
            lambda out: edit_config(
                out, lambda config: config.update(max_position_embeddings=128, original_max_position_embeddings=16)
            ),
            id="positions",
        ),
    ],
)
def test_the_judge_sees_what_is_wrong(break_it, tmp_path):
    source = source_with(tmp_path / "source", **ROPES["llama3"])
    grow_checkpoint(source, tmp_path / "out", WIDER)
    break_it(tmp_path / "out")
    certificate = verify_checkpoints(source, tmp_path / "out").certificate
    assert certificate is not None
    assert not certificate.holds


def _edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("kind", "forward"), [("llama3", "streamed"), ("llama3", "loaded"), ("yarn", "streamed")])
def test_the_judge_measures_on_text(kind, forward, tmp_path):
    """By the tokenizer.json of A, and by the streamed forward pass too."""
    source = source_with(tmp_path / "source", **ROPES[kind])
    grow_checkpoint(source, tmp_path / "out", WIDER)
    (tmp_path / "text.txt").write_text("To grow is to keep what one has been. " * 4)
    verification = verify_checkpoints(
        source, tmp_path / "out", text=tmp_path / "text.txt", dtype="float64", forward=forward
    )
    assert verification.numbers is not None
    assert verification.numbers.exact
    assert verification.numbers.within_rounding


# Training goes on.


def test_moments_grow_and_training_goes_on(tmp_path):
    """A Trainer's AdamW state of a stock Llama grows with it; `teleflm train` starts from it and leaves a Llama."""
    from growth.training.train import GrowthArguments, train
    from growth.verification.verify import verify_checkpoints as judge

    save_llama(tmp_path / "start", torch.float32)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    how = {"max_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_steps": 2}
    Trainer(
        tiny_llama(torch.float32),
        TrainingArguments(str(tmp_path / "run"), **how),
        train_dataset=rows,
    ).train()
    checkpoint = tmp_path / "run/checkpoint-2"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).write_bytes((tmp_path / "start" / name).read_bytes())
    grow_checkpoint(checkpoint, tmp_path / "grown", WIDER, optimizer=checkpoint)
    judged = judge(checkpoint, tmp_path / "grown", optimizer=checkpoint)
    assert judged.moments is not None
    assert judged.moments.holds
    (tmp_path / "text.txt").write_text("To grow is to keep what one has been. " * 40)
    growth = GrowthArguments(str(tmp_path / "grown"), [str(tmp_path / "text.txt")], block_size=16, mup_base_width=32)
    train(growth, TrainingArguments(str(tmp_path / "on"), learning_rate=1e-4, per_device_train_batch_size=2, **how))
    assert isinstance(LlamaForCausalLM.from_pretrained(tmp_path / "on"), LlamaForCausalLM)
    inspection = inspect_checkpoint(tmp_path / "on", check=True)
    assert (inspection.model_type, inspection.problems, inspection.damages) == ("llama", [], [])
    assert "grown moments" in inspection.lineage[-1]
    assert "FLM" not in (tmp_path / "on/README.md").read_text().replace("teleflm", "")


def test_a_model_that_lacks_a_weight_is_not_trained(tmp_path):
    from growth.training.loading import check_model

    source = save_llama(tmp_path / "source")
    _edit_weights(source, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        check_model(source)
