# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Experts of a dense model: stock transformers' GraniteMoE computes what the model did, and `verify` proves it."""

import itertools
import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteMoeForCausalLM
from transformers.models.granitemoe import modeling_granitemoe
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from typer.testing import CliRunner

from conversion import WriteOptions, inspect_checkpoint
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.sources import open_checkpoint
from conversion.hub.lineage import lineage_steps
from evaluation.text import tokenize
from growth import grow_checkpoint, upcycle_checkpoint, verify_checkpoints
from growth.method import Mask
from growth.verification.certificate import certify
from growth.verification.conditions import expert_departure
from modeling_teleflm import TeleFLMForCausalLM
from teleflm.app import app
from tests.fixtures.checkpoint_runs import contents, kill_itself, run_teleflm, use_small_blocks
from tests.fixtures.llama import edit_config, save_llama
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer
from tests.fixtures.yardstick import TWO_SECONDS, counted

IDS = torch.arange(3, 67).view(2, 32)
ROUTER, INPUTS, OUTPUTS = (
    f"model.layers.1.block_sparse_moe.{name}.weight" for name in ("router.layer", "input_linear", "output_linear")
)


def save_teleflm(folder: Path, dtype: torch.dtype = torch.float64, **fields: Any) -> Path:
    """A Tele-FLM whose biases, if it has some, count; with its tokenizer."""
    model = tiny_model(tiny_config(**fields), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_teleflm(tmp_path_factory.mktemp("experts") / "source", num_key_value_heads=2)


@pytest.fixture(scope="module")
def made(source) -> Path:
    out = source.parent / "made"
    upcycle_checkpoint(source, out, 4, 2)
    return out


@pytest.fixture
def copy(made, tmp_path) -> Path:
    """To plant faults in."""
    return shutil.copytree(made, tmp_path / "copy")


@pytest.fixture(scope="module")
def text(source) -> Path:
    path = source.parent / "sample.txt"
    path.write_text("To grow is to keep what was there, and to have room for more. " * 20)
    return path


def load_experts(folder: Path, dtype: torch.dtype) -> GraniteMoeForCausalLM:
    """Stock transformers', which has to find every weight and no other; its fast kernels know no float64."""
    how = "eager" if dtype == torch.float64 else "grouped_mm"
    model, info = GraniteMoeForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation=how, output_loading_info=True, trust_remote_code=False
    )
    assert not any(info.values()), info
    return model.eval()


def load_dense(folder: Path, dtype: torch.dtype):
    config = json.loads((folder / "config.json").read_text())
    kind = TeleFLMForCausalLM if config["model_type"] == "TeleFLM" else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()


def exact_norm(norm, hidden: torch.Tensor) -> torch.Tensor:
    return norm.weight * hidden / (hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()


def exact_router(router, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = functional.linear(hidden, router.weight)
    largest, chosen = logits.topk(router.top_k, dim=-1)
    return logits, largest.softmax(-1), chosen


@torch.no_grad()
def difference(source: Path, out: Path, dtype: torch.dtype = torch.float64, *, exact: bool = False) -> float:
    """The largest between logits, relative to the largest of these.

    Args:
        source, out: the dense model, and its experts.
        dtype: what to compute in.
        exact: compute norms and gates in it too, in place of transformers' float32.
    """
    models = load_dense(source, dtype), load_experts(out, dtype)
    patches = [
        mock.patch.object(LlamaRMSNorm, "forward", exact_norm),
        mock.patch.object(modeling_granitemoe.GraniteMoeRMSNorm, "forward", exact_norm),
        mock.patch.object(modeling_granitemoe.GraniteMoeTopKRouter, "forward", exact_router),
    ]
    for patch in patches if exact else ():
        patch.start()
    try:
        before, after = (model(IDS, use_cache=False).logits for model in models)
    finally:
        mock.patch.stopall()
    assert before.std() > 0.01
    return ((after - before).abs().max() / before.abs().max()).item()


# Stock transformers computes the same.

LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}
TELEFLMS = {
    "multipliers": {},
    "powers of two": {"input_mult": 4.0, "output_mult": 0.5, "mup_scale_factor": 16.0},
    "no multipliers": {"use_mup": False},
    "tied": {"tie_word_embeddings": True},
    "grouped queries": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 16},
    "biases": {"attention_bias": True},
    "rope": LINEAR,
}


@pytest.mark.parametrize(
    ("fields", "experts", "top"),
    [
        *(pytest.param(fields, 4, 2, id=name) for name, fields in TELEFLMS.items()),
        *(
            pytest.param({}, experts, top, id=f"{top} of {experts}")
            for experts, top in ((2, 1), (2, 2), (5, 3), (8, 8))
        ),
    ],
)
def test_stock_transformers_computes_the_same(fields, experts, top, tmp_path):
    """To 1e-12 in float64; to 2e-6 where norms and gates are transformers' float32, and in float32."""
    source = save_teleflm(tmp_path / "source", **fields)
    result = upcycle_checkpoint(source, tmp_path / "out", experts, top)
    assert difference(source, tmp_path / "out", exact=True) < 1e-12
    assert difference(source, tmp_path / "out") < 2e-6
    assert difference(source, tmp_path / "out", torch.float32) < 2e-6
    loaded = load_experts(tmp_path / "out", torch.float32)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == result.experts.num_parameters
    unused = (experts - top) * sum(
        parameter[0].numel() for name, parameter in loaded.named_parameters() if ".experts." in name
    )
    assert result.experts.num_active_parameters == result.experts.num_parameters - unused
    certificate = certify(source, tmp_path / "out", workers=2)
    assert certificate.holds
    assert certificate.byte_copies


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="plain"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"hidden_act": "gelu"}, id="gelu"),
        pytest.param({"attention_bias": True}, id="biases"),
        pytest.param(
            {
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0},
                "max_position_embeddings": 16,
            },
            id="yarn",
        ),
    ],
)
def test_a_llama_too(fields, tmp_path):
    """Its tokenizer goes along byte for byte."""
    source = save_llama(tmp_path / "source", **fields)
    upcycle_checkpoint(source, tmp_path / "out", 3, 2)
    assert difference(source, tmp_path / "out", exact=True) < 1e-12
    assert certify(source, tmp_path / "out", workers=2).holds
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "USE_POLICY.md"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_greedy_answers_are_the_same(source, made):
    dense, experts = load_dense(source, torch.float32), load_experts(made, torch.float32)
    for row in IDS:
        answers = [
            model.generate(row[None], max_new_tokens=24, do_sample=False, pad_token_id=0) for model in (dense, experts)
        ]
        assert torch.equal(*answers)


def test_bfloat16_differs_as_roundings_do(source, tmp_path):
    """As far from float32 as the dense model in bfloat16 is, times two at most."""
    upcycle_checkpoint(source, tmp_path / "out", 4, 2, dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    with torch.no_grad():
        exact = load_dense(source, torch.float64)(IDS).logits
        dense, experts = (
            (model(IDS).logits.double() - exact).square().mean().sqrt().item()
            for model in (load_dense(source, torch.bfloat16), load_experts(tmp_path / "out", torch.bfloat16))
        )
    assert experts < 2 * dense
    verification = verify_checkpoints(source, tmp_path / "out")
    assert verification.verdict == "certified"
    assert "up to rounding" in verification.sentence


def test_the_tokenizer_is_read_by_stock_clients(source, made):
    expected = tiny_tokenizer(source)
    found = AutoTokenizer.from_pretrained(made, trust_remote_code=False)
    text = "Grüße, 世界: to grow is to keep."
    assert found(text).input_ids == expected(text).input_ids
    assert not list(made.glob("*.py"))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_what_the_card_says_to_run_runs(dtype, source, tmp_path, monkeypatch):
    result = upcycle_checkpoint(source, tmp_path / "out", 4, 2, dtype=dtype)
    assert any('experts_implementation="eager"' in note for note in result.notes) == (dtype == "float64")
    monkeypatch.chdir(tmp_path / "out")
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["model"].dtype == getattr(torch, dtype)


def test_saved_by_transformers_it_is_certified_still(source, made, tmp_path):
    """Its names and stacks are those of the class."""
    load_experts(made, torch.float64).save_pretrained(tmp_path / "again")
    assert verify_checkpoints(source, tmp_path / "again").verdict == "certified"


# Training.


def gradients(folder: Path, *, balance: bool) -> dict[str, torch.Tensor]:
    model = load_experts(folder, torch.float32).train()
    model(IDS, labels=IDS, output_router_logits=balance).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_experts_have_gradients_of_their_own(source, made):
    """Which add up to the dense model's."""
    dense = load_dense(source, torch.float32).train()
    dense(IDS, labels=IDS).loss.backward()
    found = gradients(made, balance=False)
    for layer, block in enumerate(dense.model.layers):
        inputs = found[f"model.layers.{layer}.block_sparse_moe.experts.gate_up_proj"]
        expected = torch.cat([block.mlp.gate_proj.weight.grad, block.mlp.up_proj.weight.grad])
        torch.testing.assert_close(inputs.sum(0), expected, rtol=1e-3, atol=1e-6)
        for first, second in itertools.pairwise(inputs):
            cosine = functional.cosine_similarity(first.flatten(), second.flatten(), dim=0)
            assert first.abs().max() > 0
            assert cosine < 0.99


def test_the_router_learns_from_the_balancing_loss_alone_until_experts_part(source, made, tmp_path):
    """As the notes say: equal experts make gates indifferent to the loss."""
    name = "model.layers.1.block_sparse_moe.router.weight"
    balanced, alone = (gradients(made, balance=balance)[name].norm().item() for balance in (True, False))
    assert balanced > 1e-5
    assert alone < balanced / 100
    upcycle_checkpoint(source, tmp_path / "noisy", 4, 2, noise=0.3)
    assert gradients(tmp_path / "noisy", balance=False)[name].norm().item() > 100 * alone


def test_after_a_step_the_loss_moves_the_router(made):
    model = load_experts(made, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    router = model.model.layers[1].block_sparse_moe.router.weight
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        norms.append(router.grad.norm().item())
        optimizer.step()
    assert norms[1] > 100 * norms[0]


def test_a_router_of_zeros_would_leave_experts_alike(made, tmp_path):
    """Why it is random: those that are chosen get the same gradient, the others none."""
    plant(made, tmp_path / "zeros", lambda tensors: [t.zero_() for name, t in tensors.items() if "router" in name])
    inputs = gradients(tmp_path / "zeros", balance=False)["model.layers.1.block_sparse_moe.experts.gate_up_proj"]
    heard = [gradient for gradient in inputs if gradient.abs().max() > 0]
    assert len(heard) == 2
    torch.testing.assert_close(*heard)


def test_the_router_has_the_spread_that_it_says(source, tmp_path):
    upcycle_checkpoint(source, tmp_path / "out", 512, 2)
    router = load_file(tmp_path / "out/model.safetensors")[ROUTER]
    assert router.std().item() == pytest.approx(32**-0.5, rel=0.03)
    assert len(router.unique(dim=0)) == 512


# The verifier, which shares nothing with the planner.


def plant(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy whose tensors are changed in place."""
    if out != folder:
        shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def swap_halves(tensors: dict[str, torch.Tensor]) -> None:
    stack = tensors[INPUTS]
    tensors[INPUTS] = torch.cat([stack[:, 88:], stack[:, :88]], 1).contiguous()


def mirror_an_expert(tensors: dict[str, torch.Tensor]) -> None:
    tensors[OUTPUTS][3] = tensors[OUTPUTS][3].flip(1)


TENSOR_FAULTS = [
    (
        lambda t: t[INPUTS][2, 5, 7].mul_(1 + 2**-52),
        r"input_linear.weight\[2, 5, 7\] is .* from .*gate_proj.weight\[5, 7\]",
    ),
    (
        lambda t: t[INPUTS][3, 90, 0].add_(1e-9),
        r"input_linear.weight\[3, 90, 0\] is .* from .*up_proj.weight\[2, 0\] of A",
    ),
    (
        lambda t: t[OUTPUTS][0, 31, 87].neg_(),
        r"output_linear.weight\[0, 31, 87\] is .* from .*down_proj.weight\[31, 87\]",
    ),
    (lambda t: t[OUTPUTS].mul_(2), r"output_linear.weight\[0, 0, 0\].*2,815 more of its elements.* 3 more are broken"),
    (swap_halves, r"input_linear.weight\[0, 0, 0\] is .* from .*gate_proj"),
    (mirror_an_expert, r"output_linear.weight\[3, 0, 0\]"),
    (
        lambda t: t[ROUTER][1, 4].fill_(math.nan),
        r"router.layer.weight\[1, 4\] is nan, expected a finite number of at most",
    ),
    (lambda t: t[ROUTER][0, 0].fill_(math.inf), r"router.layer.weight\[0, 0\] is inf"),
    (
        lambda t: t[ROUTER][3, 31].fill_(1e30),
        r"router.layer.weight\[3, 31\] is 1e\+30, expected a finite number of at most",
    ),
    (lambda t: t["model.norm.weight"][3].add_(1), r"model.norm.weight\[3\] is"),
    (lambda t: t["model.layers.0.self_attn.q_proj.weight"][0].zero_(), r"q_proj.weight\[0, 0\] is 0.0"),
    (lambda t: t["lm_head.weight"].mul_(1.5), r"lm_head.weight\[0, 0\]"),
]


@pytest.mark.parametrize(("change", "message"), TENSOR_FAULTS)
def test_a_fault_in_a_tensor_is_named(change, message, source, copy):
    plant(copy, copy, change)
    verification = verify_checkpoints(source, copy)
    assert verification.verdict == "not-certified"
    assert verification.is_refuted
    assert re.search(message, verification.sentence), verification.sentence


CONFIG_FAULTS = [
    ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0, expected 1 to 4"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, expected 1 to 4"),
    ({"residual_multiplier": 0.22}, "residual_multiplier is 0.22, expected 1.0"),
    ({"residual_multiplier": None}, "residual_multiplier is None, expected 1.0"),
    ({"embedding_multiplier": 1.0}, "embedding_multiplier is 1.0, expected 2.5"),
    ({"logits_scaling": 0.125}, "logits_scaling is 0.125, expected 8.0"),
    ({"attention_multiplier": 0.125}, "attention_multiplier is 0.125, expected 0.3535"),
    ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, expected 1e-05"),
    ({"rms_norm_eps": True}, "rms_norm_eps is True, expected 1e-05"),
    ({"norm_topk_prob": False}, "norm_topk_prob is False, expected None: nothing is known of it"),
    ({"scoring_func": "sigmoid"}, "scoring_func is sigmoid, expected None"),
    ({"shared_intermediate_size": 88}, "shared_intermediate_size is 88, expected None"),
    ({"hidden_act": "gelu"}, "hidden_act is gelu, expected silu"),
    ({"rope_theta": 500.0, "rope_parameters": None}, "rope_parameters is .*500.0.*, expected .*10000.0"),
    ({"num_attention_heads": 8, "head_dim": 4, "num_key_value_heads": 4}, "num_attention_heads is 8, expected 4"),
    ({"head_dim": None, "num_attention_heads": 4, "num_key_value_heads": None}, "num_key_value_heads is 4, expected 2"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"attention_bias": True}, "attention_bias is True, expected False"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings is True, expected False"),
    ({"architectures": ["GraniteMoeSharedForCausalLM"]}, "another class may compute otherwise"),
    ({"auto_map": {"AutoModelForCausalLM": "mine.Mine"}}, "code of the folder may compute otherwise"),
]


@pytest.mark.parametrize(("fields", "message"), CONFIG_FAULTS, ids=lambda value: str(value)[:60])
def test_a_fault_in_the_configuration_is_named(fields, message, source, copy):
    edit_config(copy, lambda config: config.update(fields))
    verification = verify_checkpoints(source, copy)
    assert verification.verdict == "not-certified"
    assert re.search(message, verification.sentence), verification.sentence


@pytest.mark.parametrize(
    "missing", ["embedding_multiplier", "logits_scaling", "attention_multiplier", "rms_norm_eps", "num_key_value_heads"]
)
def test_what_the_class_puts_in_place_of_a_field_counts(missing, source, copy):
    """All of which are something else than this model's."""
    edit_config(copy, lambda config: config.pop(missing))
    assert verify_checkpoints(source, copy).verdict == "not-certified"


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> tuple[Path, Path]:
    """A model of which every field is what GraniteMoE has where nothing is said; and its experts."""
    folder = tmp_path_factory.mktemp("usual")
    save_teleflm(folder / "source", rms_norm_eps=1e-6)
    upcycle_checkpoint(folder / "source", folder / "out", 8, 2)
    return folder / "source", folder / "out"


@pytest.mark.parametrize("field", ["rms_norm_eps", "hidden_act", "tie_word_embeddings", "attention_bias"])
def test_null_is_not_the_default_of_the_class(field, usual, tmp_path):
    """Transformers refuses it."""
    source, out = usual[0], shutil.copytree(usual[1], tmp_path / "out")
    edit_config(out, lambda config: config.pop(field))
    assert certify(source, out, workers=2).holds
    edit_config(out, lambda config: config.update({field: None}))
    assert [broken.field for broken in certify(source, out, workers=2).broken_fields] == [field]


@pytest.mark.parametrize("field", ["num_local_experts", "num_experts_per_tok"])
def test_null_is_no_number_of_experts(field, usual, tmp_path):
    """Transformers fails by it."""
    out = shutil.copytree(usual[1], tmp_path / "out")
    edit_config(out, lambda config: config.update({field: None}))
    with pytest.raises(CheckpointError, match=f"{field} is None, expected an integer"):
        certify(usual[0], out, workers=2)
    assert any(f"{field} is None" in problem for problem in inspect_checkpoint(out).problems)


def test_neither_is_zero_false(source, copy):
    edit_config(copy, lambda config: config.update(attention_bias=0))
    assert "attention_bias is 0, expected False" in verify_checkpoints(source, copy).sentence


@pytest.mark.parametrize(("stored", "asked"), [("float16", None), ("float32", "float16")])
def test_a_router_whose_logits_float16_does_not_hold(stored, asked, tmp_path):
    """They would be infinite, and the softmax over them NaN; of float32 it is a router like another."""
    dtype = getattr(torch, stored)
    source = save_teleflm(tmp_path / "source", dtype)
    upcycle_checkpoint(source, tmp_path / "out", 4, 2)
    assert certify(source, tmp_path / "out", workers=2).holds
    out = tmp_path / "out"
    plant(out, out, lambda tensors: [tensor.fill_(6e4) for name, tensor in tensors.items() if "router" in name])
    if asked:
        assert certify(source, tmp_path / "out", workers=2).holds
        edit_config(tmp_path / "out", lambda config: config.update(dtype=asked))
    with torch.no_grad():
        assert load_experts(tmp_path / "out", torch.float16)(IDS).logits.isnan().any()
    verification = verify_checkpoints(source, tmp_path / "out")
    assert verification.verdict == "not-certified"
    assert "router.layer.weight[0, 0] is 60000.0, expected a finite number of at most" in verification.sentence


@pytest.mark.parametrize("missing", ["residual_multiplier", "hidden_act", "tie_word_embeddings", "attention_bias"])
def test_and_the_same_value_is_no_fault(missing, source, copy):
    edit_config(copy, lambda config: config.pop(missing))
    assert verify_checkpoints(source, copy).verdict == "certified"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_local_experts": 3}, r"router.layer.weight has shape \(4, 32\), its config.json says \(3, 32\)"),
        ({"num_local_experts": "4"}, "num_local_experts is 4, expected an integer"),
        ({"num_experts_per_tok": 2.0}, "num_experts_per_tok is 2.0, expected an integer"),
        ({"num_hidden_layers": 2}, "B's experts are of a model with num_hidden_layers 2, A has 3: give the model that"),
    ],
)
def test_what_cannot_be_held_against_a(fields, message, source, copy):
    edit_config(copy, lambda config: config.update(fields))
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoints(source, copy)


@pytest.mark.parametrize("change", ["lost", "more"])
def test_a_tensor_that_is_lost_or_added(change, source, copy):
    extra = {"model.layers.0.mlp.gate_proj.weight": torch.zeros(2, 2, dtype=torch.float64)}
    plant(copy, copy, lambda tensors: tensors.pop(OUTPUTS) if change == "lost" else tensors.update(extra))
    with pytest.raises(
        CheckpointError, match=f"{OUTPUTS} is missing" if change == "lost" else "gate_proj.weight is not"
    ):
        verify_checkpoints(source, copy)


def test_another_models_experts_are_not_these(made, tmp_path):
    tiny_model(tiny_config(num_key_value_heads=2), seed=1, dtype=torch.float64).save_pretrained(tmp_path / "other")
    assert verify_checkpoints(tmp_path / "other", made).verdict == "not-certified"


def test_a_router_of_zeros_is_certified_and_told(source, copy):
    plant(copy, copy, lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if "router" in name])
    verification = verify_checkpoints(source, copy)
    assert verification.verdict == "certified"
    assert any(
        "3 tensors are all zero and may never learn: model.layers.0.block" in note for note in verification.notes
    )


def test_the_logits_say_the_same(source, made, text):
    verification = verify_checkpoints(source, made, text=text, max_tokens=64)
    assert verification.verdict == "certified"
    assert verification.numbers is not None
    assert verification.numbers.difference.relative < 1e-14
    with pytest.raises(CheckpointError, match="--forward loaded takes no experts"):
        verify_checkpoints(source, made, text=text, forward="loaded")
    with pytest.raises(CheckpointError, match="B's experts began without"):
        verify_checkpoints(source, made, optimizer=source)


@pytest.mark.parametrize("top", [1, 2, 4])
def test_the_streamed_forward_pass_is_that_of_transformers(top, source, text, tmp_path):
    """Of experts that differ, so that another choice or another gate is visible; but for its float32 rotary angles."""
    upcycle_checkpoint(source, tmp_path / "noisy", 4, top, noise=0.5)
    found = verify_checkpoints(source, tmp_path / "noisy", text=text, max_tokens=48).numbers.difference
    ids = torch.from_numpy(tokenize(open_checkpoint(source), text, 48))[None]
    with (
        torch.no_grad(),
        mock.patch.object(LlamaRMSNorm, "forward", exact_norm),
        mock.patch.object(modeling_granitemoe.GraniteMoeRMSNorm, "forward", exact_norm),
        mock.patch.object(modeling_granitemoe.GraniteMoeTopKRouter, "forward", exact_router),
    ):
        before, after = (
            load(folder, torch.float64)(ids).logits[0]
            for load, folder in ((load_dense, source), (load_experts, tmp_path / "noisy"))
        )
    assert found.max_difference == pytest.approx((after - before).abs().max().item(), rel=1e-6)
    losses = [functional.cross_entropy(logits[:-1], ids[0, 1:]).item() for logits in (before, after)]
    assert found.losses == pytest.approx(losses, rel=1e-8)


@pytest.mark.parametrize("fields", [{"residual_multiplier": 0.5}, {"attention_multiplier": 1.0}])
def test_the_streamed_forward_pass_computes_no_other_multipliers(fields, source, copy, text):
    edit_config(copy, lambda config: config.update(fields))
    with pytest.raises(CheckpointError, match=f"{next(iter(fields))} is .*; the streamed forward pass computes"):
        verify_checkpoints(source, copy, text=text, growth=False)


# Noise.


def test_everything_says_that_noise_does_not_preserve(source, text, tmp_path):
    out = tmp_path / "out"
    result = upcycle_checkpoint(source, out, 4, 2, noise=0.2)
    assert result.notes[0].startswith("Not preserving: experts differ by noise of 0.2 of a weight's spread")
    assert not any("the function is the source's" in note for note in result.notes)
    lineage = json.loads((out / "teleflm_manifest.json").read_text())["lineage"]
    assert lineage["preserves_function"] is False
    assert "not preserving the function it computes (experts differ by noise of 0.2" in lineage_steps(lineage)[-1]
    card = (out / "README.md").read_text()
    assert "did not preserve the function" in card
    assert "in exact arithmetic this model gives its source's logits" not in card
    with pytest.raises(CheckpointError, match=r"growth by experts with noise 0\.2, which does not .*--text FILE"):
        verify_checkpoints(source, out)
    verification = verify_checkpoints(source, out, text=text)
    assert verification.verdict == "different"
    assert "nor meant to be: B was grown by experts with noise 0.2" in verification.sentence
    assert "nats a token from A's" in verification.sentence


def test_a_record_that_claims_no_noise_does_not_make_it_so(source, tmp_path):
    upcycle_checkpoint(source, tmp_path / "out", 4, 2, noise=0.2)
    path = tmp_path / "out/teleflm_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["lineage"]["noise"] = 0.0
    path.write_text(json.dumps(manifest))
    assert verify_checkpoints(source, tmp_path / "out").verdict == "not-certified"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_noise_that_rounding_takes_is_refused(dtype, source, tmp_path):
    """Its experts would be equal, and notes, card and record say that they differ."""
    with pytest.raises(CheckpointError, match=f"noise is 1e-10, which is lost where weights are rounded to {dtype}"):
        upcycle_checkpoint(source, tmp_path / "out", 4, 2, noise=1e-10, dtype=dtype)
    assert upcycle_checkpoint(source, tmp_path / "out", 4, 2, noise=1e-10, dry_run=True).noise == 1e-10  # in float64


def test_noise_has_the_spread_that_was_asked_for_and_is_each_experts_own(source, tmp_path):
    upcycle_checkpoint(source, tmp_path / "out", 3, 2, noise=0.2)
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    mlp = [old[f"model.layers.1.mlp.{kind}_proj.weight"] for kind in ("gate", "up", "down")]
    stacks = [new[INPUTS][:, :88], new[INPUTS][:, 88:], new[OUTPUTS]]
    drawn = []
    for original, stack in zip(mlp, stacks, strict=True):
        drawn += [(expert - original).flatten() for expert in stack]
        for noise in drawn[-3:]:
            assert noise.std().item() == pytest.approx(0.2 * original.std().item(), rel=0.05)
    correlations = np.corrcoef(torch.stack(drawn).numpy()) - np.eye(9)
    assert np.abs(correlations).max() < 0.1


# Written as everything is: streamed, resumed, recorded.


def test_the_bytes_depend_on_the_seed_alone(source, made, tmp_path):
    upcycle_checkpoint(source, tmp_path / "a", 4, 2, options=WriteOptions(workers=1))
    upcycle_checkpoint(source, tmp_path / "b", 4, 2, options=WriteOptions(workers=3, max_shard_size="100KB"))
    upcycle_checkpoint(source, tmp_path / "c", 4, 2, seed=1)
    assert contents(tmp_path / "a") == contents(made)
    shards = [load_file(path) for path in (tmp_path / "b").glob("*.safetensors")]
    expected, other = load_file(made / "model.safetensors"), load_file(tmp_path / "c/model.safetensors")
    assert len(shards) > 3
    found = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert found.keys() == expected.keys() == other.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name])
        assert torch.equal(tensor, other[name]) == ("router" not in name)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [(), ("--noise", "0.1")], ids=["equal", "noise"])
def test_killed_and_resumed(noise, source, tmp_path):
    command = ("grow", source, "--experts", 3, "--top-k", 2, *noise, "--max-shard-size", "200KB", "--workers", 2)

    def run(out: str, patch: Callable[[], None]) -> int:
        arguments = (command[0], command[1], tmp_path / out, *command[2:])
        return run_teleflm(*arguments, folder=tmp_path, patch=patch).returncode

    assert run("whole", use_small_blocks) == 0
    whole = contents(tmp_path / "whole")
    for blocks in (2, 60):
        assert run(f"killed{blocks}", partial(kill_itself, blocks)) == -signal.SIGKILL
        assert not (tmp_path / f"killed{blocks}" / "model.safetensors.index.json").exists()
        assert run(f"killed{blocks}", partial(kill_itself, 9)) == -signal.SIGKILL
        assert run(f"killed{blocks}", use_small_blocks) == 0
        assert contents(tmp_path / f"killed{blocks}") == whole


def teleflm(*arguments: str | Path | int, status: int = 0) -> str:
    """Run a command in this process; everything it says."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return " ".join(result.output.split())


def test_what_the_commands_say(source, made, tmp_path):
    dry = json.loads(
        CliRunner()
        .invoke(app, ["grow", str(source), "x", "--experts", "4", "--top-k", "2", "--dry-run", "--json"])
        .stdout
    )
    assert (dry["num_local_experts"], dry["num_experts_per_tok"], dry["preserves_function"]) == (4, 2, True)
    inspected = json.loads(CliRunner().invoke(app, ["inspect", str(made), "--check", "--json"]).stdout)
    assert inspected["problems"] == inspected["damages"] == []
    for name in ("parameters", "active_parameters"):
        assert dry[name] == inspected[name]
    assert inspected["experts"]["num_local_experts"] == 4
    shown = teleflm("inspect", made)
    assert "4 in each layer, 2 of which compute a token" in shown
    assert "152,160, of which 101,472 compute a token" in shown
    assert "embeddings x 2.5, logits x 0.125" in shown
    planned = teleflm("grow", source, tmp_path / "out", "--experts", 4, "--top-k", 2, "--dry-run")
    assert "normal, std 0.176777" in planned
    assert "whatever the router" in planned
    assert not (tmp_path / "out").exists()
    assert "already done" in teleflm("grow", source, made, "--experts", 4, "--top-k", 2)
    assert "B computes A's function" in teleflm("verify", source, made, "--report", tmp_path / "report")
    assert "input_linear" in (tmp_path / "report/index.html").read_text()
    card = (made / "README.md").read_text()
    assert "mixture-of-experts, decoder-only language model of the Tele-FLM" in card
    assert "| Parameters that compute a token | 101,472 |" in card
    assert "4 experts in each layer, copies of its feed-forward layer, 2 of which compute a token" in card
    assert "in exact arithmetic this model gives its source's logits" in card


def test_a_card_says_what_was_rounded_and_of_whom_it_is(source, tmp_path):
    upcycle_checkpoint(source, tmp_path / "one", 8, 1, dtype="bfloat16")
    card = (tmp_path / "one/README.md").read_text()
    assert "1 of which computes a token, cast to bfloat16" in card
    assert "as far as its weights did not have to be rounded to their dtype" in card
    assert "gates are rounded" not in card
    assert "1 of which computes a token" in teleflm("inspect", tmp_path / "one")
    assert "the gate of the one that computes a token is 1" in teleflm("verify", source, tmp_path / "one")
    upcycle_checkpoint(save_llama(tmp_path / "llama"), tmp_path / "two", 2, 2)
    card = (tmp_path / "two/README.md").read_text()
    assert "A mixture-of-experts, decoder-only language model with" in card
    assert "license: llama3.1" in card
    assert "TeleFLM" not in card


@pytest.mark.parametrize(
    ("lineage", "expected"),
    [
        (None, ""),
        ({"operation": "upcycle", "noise": 0.0}, ""),
        ({"operation": "upcycle", "noise": 0.25}, "experts with noise 0.25"),
        ({"operation": "convert", "parent": {"lineage": {"operation": "upcycle", "noise": 1}}}, "experts with noise 1"),
        ({"operation": "convert", "parent": {"lineage": [1]}}, ""),
        ({"operation": "convert", "parent": 3}, ""),
    ],
)
def test_a_record_may_come_from_anyone(lineage, expected):
    assert expert_departure(lineage) == expected


@pytest.mark.parametrize("noise", ["x", None, True, [0.1]])
def test_a_record_of_no_number(noise):
    with pytest.raises(CheckpointError, match="noise of experts in the lineage is"):
        expert_departure({"operation": "upcycle", "noise": noise})


def test_inspect_names_what_is_wrong(copy):
    plant(copy, copy, lambda tensors: tensors.pop(ROUTER))
    assert any(f"{ROUTER} is missing" in problem for problem in inspect_checkpoint(copy).problems)
    edit_config(copy, lambda config: config.update(num_experts_per_tok=9))
    problems = inspect_checkpoint(copy).problems
    assert any("num_experts_per_tok is 9, above num_local_experts 4" in problem for problem in problems)


def test_the_plan_of_a_trillion_is_fast(tmp_path):
    with counted() as taken:
        plan = teleflm("grow", "tele-flm-1t", tmp_path / "out", "--experts", 8, "--top-k", 2, "--dry-run")
    assert taken.yardsticks < TWO_SECONDS
    assert "7,002,838,650,880" in plan
    assert "1,929,408,532,480" in plan


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--experts 4", "--experts 4 needs --top-k K: how many of them compute a token."),
        ("--top-k 2", "--top-k 2 is for --experts N, which is not given."),
        ("--experts 1 --top-k 1", "experts is 1, expected 2 to 1,024."),
        ("--experts 5000 --top-k 1", "experts is 5000, expected 2 to 1,024."),
        ("--experts 4 --top-k 0", "top_k is 0, expected 1 to 4, the number of experts."),
        ("--experts 4 --top-k 5", "top_k is 5, expected 1 to 4, the number of experts."),
        ("--experts 4 --top-k 2 --noise 1", "noise is 1.0, expected a number from 0 to below 1."),
        ("--experts 4 --top-k 2 --noise -0.1", "noise is -0.1, expected a number from 0 to below 1."),
        ("--experts 4 --top-k 2 --noise nan", "noise is nan, expected a number from 0 to below 1."),
        (
            "--experts 4 --top-k 2 --to tele-flm-1t",
            "does not go with --to: grow first, then make experts of the result.",
        ),
        ("--experts 4 --top-k 2 --set hidden_size=64 --method mask", "does not go with --set, --method: grow first"),
        ("--experts 4 --top-k 2 --method tile", "does not go with --method: grow first"),
        ("--experts 4 --top-k 2 --mask-steps 5", "does not go with --mask-steps: grow first"),
        ("--experts 4 --top-k 2 --layers top", "does not go with --layers: grow first"),
        ("--experts 4 --top-k 2 --new-layers active", "does not go with --new-layers: grow first"),
        ("--experts 4 --top-k 2 --calibration x", "does not go with --calibration: grow first"),
        ("--experts 4 --top-k 2 --multipliers target", "does not go with --multipliers: grow first"),
        ("--experts 4 --top-k 2 --optimizer x", "does not go with --optimizer: experts begin with fresh moments"),
        ("--experts 4 --top-k 2 --dtype int8", "int8"),
    ],
)
def test_what_is_refused_in_one_line(options, message, source, tmp_path):
    said = teleflm("grow", source, tmp_path / "out", *options.split(), status=2)
    assert message in said
    assert not (tmp_path / "out").exists()


def test_what_has_no_experts(source, made, tmp_path):
    with pytest.raises(CheckpointError, match="model_type is 'granitemoe', expected 'TeleFLM' or 'llama'"):
        upcycle_checkpoint(made, tmp_path / "out", 4, 2)
    grow_checkpoint(source, tmp_path / "masked", {"intermediate_size": 96}, method=Mask())
    with pytest.raises(CheckpointError, match="grows by masks, which only a trainer can raise; `teleflm fold` makes"):
        upcycle_checkpoint(tmp_path / "masked", tmp_path / "out", 4, 2)
    shutil.copytree(source, tmp_path / "mixed")
    name = "model.layers.2.mlp.up_proj.weight"
    plant(tmp_path / "mixed", tmp_path / "mixed", lambda tensors: tensors.update({name: tensors[name].float()}))
    with pytest.raises(CheckpointError, match=r"gate_proj.weight is float64 and .*up_proj.weight is float32.*--dtype"):
        upcycle_checkpoint(tmp_path / "mixed", tmp_path / "out", 4, 2)
    upcycle_checkpoint(tmp_path / "mixed", tmp_path / "cast", 4, 2, dtype="float64")
    assert certify(tmp_path / "mixed", tmp_path / "cast", workers=2).holds


def test_a_factor_that_granite_cannot_say(tmp_path):
    source = save_teleflm(tmp_path / "source")
    edit_config(source, lambda config: config.update(output_mult=1e-310, mup_scale_factor=1.0))
    with pytest.raises(CheckpointError, match="logits_scaling, which would be infinite"):
        upcycle_checkpoint(source, tmp_path / "out", 4, 2)


def test_grown_first(source, tmp_path):
    """Each step is certified beside the model it started from."""
    grow_checkpoint(source, tmp_path / "wide", {"intermediate_size": 96, "num_hidden_layers": 4})
    upcycle_checkpoint(tmp_path / "wide", tmp_path / "out", 2, 2)
    assert verify_checkpoints(tmp_path / "wide", tmp_path / "out").verdict == "certified"
    assert difference(source, tmp_path / "out", exact=True) < 1e-12
    with pytest.raises(CheckpointError, match="of a model with intermediate_size 96, A has 88"):
        verify_checkpoints(source, tmp_path / "out")
