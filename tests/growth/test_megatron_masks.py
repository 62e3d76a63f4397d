# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Masks on megatron-core's GPTModel: it computes what the masked model of transformers computes, and comes back.

megatron-core itself runs, in processes of its own; the slices of ranks are those of `megatron_reference`, which knows
nothing of masks.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import growth.training.masks  # noqa: F401  (registers the masked model)
from conversion import convert_checkpoint, inspect_checkpoint
from conversion.checkpoint.errors import CheckpointError
from conversion.exports.export import export_checkpoint
from growth import grow_checkpoint
from growth.fold import fold_masks
from growth.method import Mask
from growth.training.errors import RunError
from growth.training.megatron_masks import install_masks
from modeling_teleflm import TeleFLMForCausalLM
from tests.fixtures.megatron_reference import Chunk, chunk_weights
from tests.fixtures.megatron_worlds import ROOT, TOKENS
from tests.fixtures.tiny import tiny_config, tiny_model
from tests.growth.megatron_mask_worker import RATE, STEPS, TRAINED, probe
from tests.growth.test_growth import one_thread  # noqa: F401

pytestmark = pytest.mark.slow

real = pytest.mark.skipif(sys.platform != "linux", reason="megatron-core has wheels for Linux only")
VOCAB = 100
# Groups of four of what were two: new heads lie between old ones, on either rank.
TARGET = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 112, "num_hidden_layers": 4}
RUNS = {
    "float64": ("float64", 1, 1),
    "float32": ("float32", 1, 1),
    "float64 tp2": ("float64", 2, 1),
    "float32 tp2": ("float32", 2, 1),
    "float64 pp2": ("float64", 1, 2),
}
# Both compute cosines and sines of positions in float32, each in its own way.
TOLERANCE = {"float64": {"rtol": 1e-6, "atol": 1e-7}, "float32": {"rtol": 1e-4, "atol": 2e-5}}


def grow(folder: Path) -> None:
    no_multipliers = {"use_mup": False, "input_mult": 1.0, "output_mult": 1.0, "mup_scale_factor": 1.0}
    config = tiny_config(vocab_size=VOCAB, num_key_value_heads=2, rms_norm_eps=3e-3, **no_multipliers)
    tiny_model(config, dtype=torch.float64).save_pretrained(folder / "source")
    grow_checkpoint(
        folder / "source", folder / "masked", {**TARGET, "num_key_value_heads": 2}, method=Mask(100), dtype="float64"
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """`masked`, its exports, and what megatron-core computed with them."""
    folder = tmp_path_factory.mktemp("masks")
    grow(folder)
    for name, (dtype, tensor, pipeline) in RUNS.items():
        sizes = {"tp": tensor, "pp": pipeline, "dtype": dtype}
        export_checkpoint(folder / "masked", folder / name, to="megatron", spec="local", **sizes)
    command = [sys.executable, "-W", "ignore", "-m", "tests.growth.megatron_mask_worker", str(folder), *RUNS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def masked_model(root: Path, name: str):
    return AutoModelForCausalLM.from_pretrained(root / "masked", dtype=getattr(torch, RUNS[name][0]))


def ranks_of(root: Path, name: str) -> list[dict]:
    _, tensor, pipeline = RUNS[name]
    return [torch.load(root / f"{name}.{rank}.pt") for rank in range(tensor * pipeline)]


@real
@pytest.mark.parametrize("name", RUNS)
def test_logits_are_those_of_the_masked_model(name, root):
    model, dtype = masked_model(root, name), RUNS[name][0]
    outputs = {}
    for step in STEPS:
        model.set_mask_step(step)
        with torch.no_grad():
            outputs[step] = model(TOKENS).logits
        found = ranks_of(root, name)[-1][f"logits {step}"][..., :VOCAB].to(outputs[step].dtype)
        torch.testing.assert_close(found, outputs[step], **TOLERANCE["float32" if "pp" in name else dtype])
    assert (outputs[0] - outputs[37]).abs().max() > 0.1, "alpha is heard"
    assert (outputs[37] - outputs[100]).abs().max() > 0.1


@real
def test_at_alpha_0_it_is_the_model_that_grew(root):
    with torch.no_grad():
        expected = TeleFLMForCausalLM.from_pretrained(root / "source", dtype=torch.float64)(TOKENS).logits
    for rank in ranks_of(root, "float64 tp2"):
        # Norms of the plain model compute in float32.
        torch.testing.assert_close(rank["logits 0"], expected, rtol=1e-4, atol=1e-5)
        assert (rank["first step"], rank["alpha"]) == (0, 0.0)


@real
@pytest.mark.parametrize("name", [name for name in RUNS if "pp" not in name])
def test_gradients_are_those_of_the_masked_model(name, root):
    """Of every parameter, on every rank."""
    model, (dtype, tensor, _) = masked_model(root, name), RUNS[name]
    weights = probe(VOCAB).to(getattr(torch, dtype))
    for step in STEPS:
        model.set_mask_step(step)
        model.zero_grad()
        (model(TOKENS).logits * weights).sum().backward()
        gradients = {key: value.grad for key, value in model.named_parameters()}
        for rank, found in enumerate(ranks_of(root, name)):
            chunk = Chunk(range(4), rank=rank, ranks=tensor)
            expected = chunk_weights(gradients, model.config, chunk, divisor=128)
            assert expected.keys() == found[f"gradients {step}"].keys()
            for key, gradient in found[f"gradients {step}"].items():
                rows = min(len(gradient), max(0, VOCAB - rank * len(gradient))) if gradient.shape[0] == 128 else None
                scale = expected[key][:rows].abs().max() if rows is None or rows else 1.0
                tolerance = {**TOLERANCE[dtype], "atol": TOLERANCE[dtype]["atol"] * max(1.0, float(scale))}
                torch.testing.assert_close(gradient[:rows], expected[key][:rows], **tolerance)
                assert rows is None or not gradient[rows:].any(), "padding has no gradient"
        if step == 0:  # what is new has none at alpha 0, where Megatron without masks has some
            assert not gradients["model.embed_tokens.weight"][:, 32:].any()


@real
@pytest.mark.parametrize("name", ["float64", "float64 tp2"])
def test_after_some_steps_it_comes_back(name, root, tmp_path):
    """As the masked checkpoint at the step of its masks, with the weights that transformers' model trains to."""
    model = masked_model(root, name)
    optimizer, weights = torch.optim.SGD(model.parameters(), lr=RATE), probe(VOCAB)
    for step in range(1, TRAINED + 1):
        model.set_mask_step(step)
        optimizer.zero_grad()
        (model(TOKENS).logits * weights).mean().backward()
        optimizer.step()
    convert_checkpoint(root / f"{name}-run", tmp_path / "back", config=root / name / "config.json")
    config = json.loads((tmp_path / "back/config.json").read_bytes())
    expected = json.loads((root / "masked/config.json").read_bytes())
    assert config["growth_state"] == {**expected["growth_state"], "step": TRAINED}
    assert config == {**expected, "growth_state": config["growth_state"]}
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float64)
    assert back.mask_step == TRAINED
    for key, parameter in back.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(key), rtol=1e-6, atol=1e-7)
    trained = ranks_of(root, name)[0]
    fold_masks(tmp_path / "back", tmp_path / "plain")
    plain = TeleFLMForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(back(TOKENS).logits, trained["logits after"], rtol=1e-6, atol=1e-7)
        # Norms of the plain model compute in float32.
        torch.testing.assert_close(plain(TOKENS).logits, trained["logits after"], rtol=1e-4, atol=1e-5)
    last = inspect_checkpoint(tmp_path / "back").chain[-1]
    assert last.details["masks"] == {"step": TRAINED, "steps": 100}
    assert (trained["logits after"] - trained["logits without"]).abs().max() > 0.1, "without masks it is another model"
    begun, ended = (load_file(place / "model.safetensors") for place in (root / "masked", tmp_path / "back"))
    assert all((ended[key] - weight).abs().max() > 0 for key, weight in begun.items())


# What masks are not known for. A module tree of the same names stands for the library, which is not needed to refuse.


class Linear(nn.Linear):
    layer_norm_weight = None


def tree(root: Path, **settings) -> nn.Module:
    """As megatron-core's GPTModel of the masked checkpoint, for one rank."""
    config = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 112,
        "num_attention_heads": 8,
        "kv_channels": 8,
        "num_query_groups": 2,
        "layernorm_epsilon": 3e-3,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "cuda_graph_impl": "none",
        **settings,
    }

    def module(**parts) -> nn.Module:
        made = nn.Module()
        for name, part in parts.items():
            setattr(made, name, part)
        return made

    layers = [
        module(
            layer_number=number + 1,
            input_layernorm=nn.RMSNorm(64, 3e-3),
            pre_mlp_layernorm=nn.RMSNorm(64, 3e-3),
            self_attention=module(linear_qkv=Linear(64, 96), linear_proj=Linear(64, 64)),
            mlp=module(linear_fc1=Linear(64, 224), linear_fc2=Linear(112, 64)),
        )
        for number in range(4)
    ]
    return module(
        config=SimpleNamespace(**config),
        embedding=module(word_embeddings=nn.Embedding(128, 64)),
        decoder=module(layers=nn.ModuleList(layers), final_layernorm=nn.RMSNorm(64, 3e-3)),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    grow(folder)
    return folder


def test_an_export_is_masked_still(folder, tmp_path):
    """Untrained, it comes back as it was; and only a trainer takes one."""
    result = export_checkpoint(folder / "masked", tmp_path / "out", to="megatron", tp=2, pp=2)
    assert any("install_masks(model, OUT), and without it another function" in note for note in result.notes)
    convert_checkpoint(tmp_path / "out", tmp_path / "back")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / "masked" / name).read_bytes()
    assert (tmp_path / "back/masked_teleflm.py").is_file()
    for to in ("llama", "granite"):
        with pytest.raises(CheckpointError, match="grows by masks, which only a trainer can raise"):
            export_checkpoint(folder / "masked", tmp_path / to, to=to)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "growth_state.step is -1, expected an integer from 0 on"),
        ({"total_steps": 0}, "growth_state.total_steps is 0, expected an integer from 1 on"),
        ({"rms_norm_eps": "small"}, "growth_state.rms_norm_eps is small, expected a number above 0"),
        (None, "growth_state is None, expected an object"),
    ],
)
def test_an_export_of_masks_that_say_nothing_is_refused(change, message, folder, tmp_path):
    config = json.loads((folder / "masked/config.json").read_bytes())
    copy = shutil.copytree(folder / "masked", tmp_path / "copy")
    config["growth_state"] = None if change is None else {**config["growth_state"], **change}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(copy, tmp_path / "out", to="megatron")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 3}, "has num_layers 3, but its masks are for 4"),
        ({"hidden_size": 32}, "has hidden_size 32, but its masks are for 64"),
        ({"num_query_groups": 8}, "has 8 query groups, but its masks are for 2 key/value heads"),
        ({"normalization": "LayerNorm"}, "has normalization 'LayerNorm', but its masks are for 'RMSNorm'"),
        ({"add_bias_linear": True}, "has add_bias_linear True"),
        ({"layernorm_zero_centered_gamma": True}, "has layernorm_zero_centered_gamma True"),
        ({"num_moe_experts": 8}, "has num_moe_experts 8"),
        ({"cuda_graph_impl": "local"}, "has cuda_graph_impl 'local': a graph would keep the alpha"),
        (
            {"layernorm_epsilon": 1e-5},
            "has layernorm_epsilon 1e-05, the masked checkpoint 0.003: give --norm-epsilon 0.003",
        ),
    ],
)
def test_other_models_are_refused(settings, message, folder):
    with pytest.raises(RunError, match=message) as error:
        install_masks(tree(folder, **settings), folder / "masked", tensor_rank=0, tensor_size=1)
    assert "\n" not in str(error.value)


def test_other_modules_are_refused(folder):
    model = tree(folder)
    with pytest.raises(RunError, match="reads 64 features on this rank, but the masks are for 32"):
        install_masks(model, folder / "masked", tensor_rank=0, tensor_size=2)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()), "nothing is left"
    model.decoder.layers[2].input_layernorm = nn.Identity()
    with pytest.raises(RunError, match="a norm of layer 2 is a Identity, of which no epsilon is known"):
        install_masks(model, folder / "masked", tensor_rank=0, tensor_size=1)
    with pytest.raises(RunError, match="there is no GPTModel of megatron-core in the model"):
        install_masks(nn.Linear(2, 2), folder / "masked", tensor_rank=0, tensor_size=1)
    with pytest.raises(CheckpointError, match="model_type is 'TeleFLM', expected 'TeleFLMMasked'"):
        install_masks(tree(folder), folder / "source", tensor_rank=0, tensor_size=1)


def test_a_norm_inside_the_layer_after_it(folder):
    """As Transformer Engine has it: the linear layer holds epsilon and norm weight, and its output takes the factor."""

    class NormLinear(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes, bias=False)
            self.layer_norm_weight = nn.Parameter(1 + 0.3 * torch.randn(64))
            self.eps = 3e-3

        def forward(self, features):
            return super().forward(nn.functional.rms_norm(features, (64,), self.layer_norm_weight, self.eps)), None

    model = tree(folder)
    layer = model.decoder.layers[1]
    layer.input_layernorm, layer.self_attention.linear_qkv = nn.Identity(), NormLinear(64, 96)
    masks = install_masks(model, folder / "masked", tensor_rank=0, tensor_size=1)
    masks.set_step(37)
    linear, features = layer.self_attention.linear_qkv, torch.randn(3, 64)
    counted = 32 + 0.37 * 32  # features that the mean is over
    normed = features / (features.square().sum(-1, keepdim=True) / counted + 3e-3).sqrt() * linear.layer_norm_weight
    torch.testing.assert_close(linear(features)[0], normed @ linear.weight.T)
    with pytest.raises(RunError, match="the model has masks already"):
        install_masks(model, folder / "masked", tensor_rank=0, tensor_size=1)
    torch.testing.assert_close(linear(features)[0], normed @ linear.weight.T)
    masks.remove()
    assert linear.eps == 3e-3
    install_masks(model, folder / "masked", tensor_rank=0, tensor_size=1).remove()
    with pytest.raises(ValueError, match="step is -1"):
        masks.set_step(-1)
