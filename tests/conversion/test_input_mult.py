# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""`convert --fold-input-mult`, and the warning of an `input_mult` that an engine would leave out.

The oracle is what such an engine computes: a stock Llama of the folder's weights with the factor on the logits alone.
"""

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from conversion import convert_checkpoint, export_checkpoint, inspect_checkpoint
from conversion.architecture import Architecture
from conversion.checkpoint.errors import CheckpointError, CorruptData
from conversion.hub.card import card_facts, exactness, render_card
from conversion.hub.lineage import lineage_steps
from growth import grow_checkpoint, verify_checkpoints
from growth.method import Mask
from modeling_teleflm import TeleFLMForCausalLM
from teleflm.app import app
from tests.fixtures.checkpoint_runs import contents
from tests.fixtures.exact_rounding import round_array
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

IDS = torch.arange(3, 67).view(2, 32)
EMBEDDING = "model.embed_tokens.weight"
WARNING = "leaves it out and computes another function"


def save(folder: Path, dtype: torch.dtype = torch.float32, **fields) -> Path:
    tiny_model(tiny_config(**fields), dtype=dtype).save_pretrained(folder)
    return folder


@torch.no_grad()
def own_logits(folder: Path, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return TeleFLMForCausalLM.from_pretrained(folder, dtype=dtype)(IDS).logits


@torch.no_grad()
def logits_without_the_factor(folder: Path) -> torch.Tensor:
    """What is computed of a folder by who knows `output_mult` and `mup_scale_factor`, and not `input_mult`."""
    config = json.loads((folder / "config.json").read_text())
    known = {key: value for key, value in config.items() if key not in ("model_type", "auto_map", "architectures")}
    model = LlamaForCausalLM(LlamaConfig(**known)).double()
    state = load_file(folder / "model.safetensors")
    model.load_state_dict(state, strict=not config["tie_word_embeddings"])
    model.tie_weights()
    return model(IDS).logits * config["output_mult"] / config["mup_scale_factor"]


@pytest.mark.parametrize("factor", [16, 2.5, 0.3], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_who_leaves_the_factor_out_computes_the_folded_model_right(factor, tied, dtype, tmp_path):
    source = save(tmp_path / "source", dtype, input_mult=factor, tie_word_embeddings=tied)
    result = convert_checkpoint(source, tmp_path / "out", fold_input_mult=True)
    expected, found = own_logits(source), logits_without_the_factor(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["input_mult"], config["tie_word_embeddings"]) == (1.0, tied)
    # A rounding of each embedding is all that there may be; nothing but a division of output_mult for a power of two.
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
    allowed = 1e-12 if factor == 16 else 8 * unit
    size = expected.abs().max()
    assert (found - expected).abs().max() <= allowed * size
    assert (own_logits(tmp_path / "out") - expected).abs().max() <= allowed * size
    assert (logits_without_the_factor(source) - expected).abs().max() > 0.1 * size  # the fault that this is against
    note = next(note for note in result.notes if "input_mult" in note)
    assert ("a power of two, so exact" in note) == (factor == 16)
    assert ("output_mult was divided by" in note) == tied
    assert not any(WARNING in note for note in result.notes)
    kept, written = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert kept.keys() == written.keys()
    assert [name for name in kept if not torch.equal(kept[name], written[name])] == [EMBEDDING]
    products = [Fraction(value) * Fraction(factor) for value in kept[EMBEDDING].flatten()[:200].tolist()]
    for product, value in zip(products, written[EMBEDDING].flatten()[:200].tolist(), strict=True):
        assert abs(Fraction(value) - product) <= abs(product) * Fraction(unit)


@pytest.mark.parametrize(("factor", "exact"), [(16, True), (2.5, False)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_certificate_knows_it_as_the_same_function(factor, exact, tied, tmp_path):
    source = save(tmp_path / "source", torch.bfloat16, input_mult=factor, tie_word_embeddings=tied)
    convert_checkpoint(source, tmp_path / "out", fold_input_mult=True)
    verification = verify_checkpoints(source, tmp_path / "out")
    assert verification.verdict == "certified"
    assert verification.certificate.is_exact is exact
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    for field, value in (("input_mult", factor), ("output_mult", 2 * config["output_mult"])):
        path.write_text(json.dumps({**config, field: value}))
        assert verify_checkpoints(source, tmp_path / "out").verdict == "not-certified"
    path.write_text(json.dumps(config))
    weights = load_file(tmp_path / "out/model.safetensors")
    weights[EMBEDDING][17, 5] *= 1.01
    save_file(weights, tmp_path / "out/model.safetensors")
    assert verify_checkpoints(source, tmp_path / "out").verdict == "not-certified"


def test_a_training_run(tmp_path):
    """Its multipliers in its arguments, its weights in parts."""
    source = save(tmp_path / "source", input_mult=16)
    export_checkpoint(source, tmp_path / "run", to="megatron", tp=2, pp=1, multipliers="keep")
    plain = convert_checkpoint(tmp_path / "run", tmp_path / "plain", vocab_size=640)
    folded = convert_checkpoint(tmp_path / "run", tmp_path / "folded", vocab_size=640, fold_input_mult=True)
    assert any(WARNING in note for note in plain.notes)
    assert not any(WARNING in note for note in folded.notes)
    expected = own_logits(source)
    assert torch.equal(own_logits(tmp_path / "plain"), expected)
    assert torch.equal(logits_without_the_factor(tmp_path / "folded"), expected)
    assert verify_checkpoints(tmp_path / "plain", tmp_path / "folded").certificate.is_exact
    assert "input_mult 16 folded into the embeddings" in inspect_checkpoint(tmp_path / "folded").lineage[-1]


def test_cast_and_folded_is_rounded_once(tmp_path):
    source = save(tmp_path / "source", input_mult=2.5)
    convert_checkpoint(source, tmp_path / "out", fold_input_mult=True, dtype="bfloat16")
    before = load_file(source / "model.safetensors")[EMBEDDING][:64].numpy()
    after = load_file(tmp_path / "out/model.safetensors")[EMBEDDING][:64].float().numpy()
    assert (after == round_array(lambda value: value * Fraction(2.5), before, "bfloat16")).all()


def test_folded_and_quantised(tmp_path):
    source = save(tmp_path / "source", torch.bfloat16, input_mult=16)
    convert_checkpoint(source, tmp_path / "out", fold_input_mult=True, quantize="fp8")
    before, after = (load_file(folder / "model.safetensors")[EMBEDDING] for folder in (source, tmp_path / "out"))
    assert torch.equal(after, before * 16)
    assert json.loads((tmp_path / "out/config.json").read_text())["input_mult"] == 1.0
    card = (tmp_path / "out/README.md").read_text()
    assert "Embeddings are multiplied by 16, exactly" in card
    assert "Every other weight keeps its value" not in card
    assert "Quantisation changes the function" in card
    assert "input_mult 16 folded into the embeddings" in inspect_checkpoint(tmp_path / "out").lineage[-1]


def test_a_product_too_large_is_no_output(tmp_path):
    source = save(tmp_path / "source", torch.float16, input_mult=1e6)
    with pytest.raises(CorruptData, match=r"embed_tokens.weight\[\d+, \d+\] is -?\d+.*, the largest float16 is 65504"):
        convert_checkpoint(source, tmp_path / "out", fold_input_mult=True)
    assert not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("fields", [{"input_mult": 1.0}, {"use_mup": False}], ids=str)
def test_where_there_is_nothing_to_fold_it_is_a_copy(fields, tmp_path):
    source = save(tmp_path / "source", **fields)
    result = convert_checkpoint(source, tmp_path / "out", fold_input_mult=True)
    assert result.notes == ["The factor on the embeddings is 1: --fold-input-mult had nothing to fold."]
    assert verify_checkpoints(source, tmp_path / "out").verdict == "same-bytes"
    assert inspect_checkpoint(source).warnings == ()
    assert "vLLM" not in (tmp_path / "out/README.md").read_text()


def test_the_warning_is_where_it_is_looked_for(tmp_path):
    source = save(tmp_path / "source", input_mult=16)
    tiny_tokenizer(source).save_pretrained(source)
    converted = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out")])
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    for printed in (converted.stdout, shown.stdout):
        assert f"input_mult is 16: vLLM's own class for TeleFLM (0.32.0) {WARNING}" in " ".join(printed.split())
    assert "input_mult is 16" in (tmp_path / "out/README.md").read_text()
    assert render_card(card_facts(tmp_path / "out")) == (tmp_path / "out/README.md").read_text()
    folding = ["convert", str(source), str(tmp_path / "folded"), "--fold-input-mult"]
    folded, again = (CliRunner().invoke(app, folding) for _ in range(2))
    assert folded.exit_code == again.exit_code == 0, folded.stderr
    assert "already done" in again.stdout
    card = (tmp_path / "folded/README.md").read_text()
    assert WARNING not in card
    assert "Embeddings are multiplied by 16, exactly, but for products that are too small to be normal numbers" in card
    assert "input_mult 16 folded into the embeddings" in card
    assert inspect_checkpoint(tmp_path / "folded", check=True).damages == []
    other = CliRunner().invoke(app, folding[:-1])
    assert other.exit_code == 2, other.stdout
    assert own_logits(tmp_path / "folded").equal(own_logits(source))


def test_of_a_quantised_model_it_is_the_original_that_is_to_be_folded(tmp_path):
    """There folding is refused, so the warning of it, which its copy has too, cannot advise it."""
    source = save(tmp_path / "source", torch.bfloat16, input_mult=16)
    convert_checkpoint(source, tmp_path / "fp8", quantize="fp8")
    copied = convert_checkpoint(tmp_path / "fp8", tmp_path / "copy")
    warnings = [*inspect_checkpoint(tmp_path / "fp8").warnings, next(note for note in copied.notes if WARNING in note)]
    warnings += [(tmp_path / "fp8/README.md").read_text(), render_card(card_facts(tmp_path / "copy"))]
    for warning in warnings:
        assert "`teleflm convert --fold-input-mult` of the model that was quantised makes it 1" in warning
    says = "; fold the original, or what `teleflm convert --dtype bfloat16` makes of it; or leave --fold-input-mult out"
    with pytest.raises(CheckpointError, match=says):
        convert_checkpoint(tmp_path / "fp8", tmp_path / "out", fold_input_mult=True, dtype="bfloat16")
    convert_checkpoint(tmp_path / "fp8", tmp_path / "back", dtype="bfloat16")
    convert_checkpoint(tmp_path / "back", tmp_path / "out", fold_input_mult=True)
    assert inspect_checkpoint(tmp_path / "out").warnings == ()


def test_moments_beside_the_weights_are_not_taken_along(tmp_path):
    source = save(tmp_path / "source", input_mult=16)
    (source / "optimizer.pt").write_bytes(b"moments of other embeddings")
    result = convert_checkpoint(source, tmp_path / "out", fold_input_mult=True)
    assert not (tmp_path / "out/optimizer.pt").exists()
    assert any("optimizer.pt of the source is of embeddings that were not multiplied" in note for note in result.notes)


def write_moments(folder: Path) -> None:
    """Of one step of AdamW, as transformers' Trainer saves them."""
    model = TeleFLMForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters())
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def refusals(tmp_path: Path) -> dict[str, tuple[Path, dict, str]]:
    source = save(tmp_path / "source", input_mult=16)
    write_moments(source)
    export_checkpoint(source, tmp_path / "dcp", to="dcp", optimizer=True)
    wider, kept = {"intermediate_size": 96}, {"input_mult": 2.5}
    grow_checkpoint(save(tmp_path / "small"), tmp_path / "masked", wider, overrides=kept, method=Mask(4))
    export_checkpoint(tmp_path / "masked", tmp_path / "masked-run", to="megatron", multipliers="keep")
    LlamaForCausalLM(LlamaConfig(**TINY_LLAMA)).save_pretrained(tmp_path / "llama")
    quantised = save(tmp_path / "quantised", input_mult=16)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (quantised / "config.json").write_text(json.dumps(config))
    masked = {"config": tmp_path / "masked/config.json", "vocab_size": 640}
    return {
        "one file": (source / "model.safetensors", {}, "one file of weights, whose configuration is not read"),
        "Llama": (tmp_path / "llama", {}, "model_type is 'llama', and --fold-input-mult is for TeleFLM"),
        "masked": (tmp_path / "masked", {}, "model_type is 'TeleFLMMasked', and --fold-input-mult is for TeleFLM"),
        "quantised": (quantised, {}, "is quantised .*; fold the original"),
        "moments": (tmp_path / "dcp", {"optimizer": True}, "embeddings that were multiplied would train at another"),
        "masked run": (tmp_path / "masked-run", masked, "its growth masks still rise"),
    }


TINY_LLAMA = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "vocab_size": 16
}


def test_what_is_refused(tmp_path):
    for source, how, message in refusals(tmp_path).values():
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(source, tmp_path / "out", fold_input_mult=True, **how)
        assert not (tmp_path / "out").exists()


def test_a_factor_that_no_factor_on_the_logits_makes_up_for(tmp_path):
    source = save(tmp_path / "source", tie_word_embeddings=True)
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "input_mult": 1e200, "output_mult": 1e-200}))
    before = contents(source)
    with pytest.raises(CheckpointError, match="output_mult 1e-200 would become 0; leave --fold-input-mult out"):
        convert_checkpoint(source, tmp_path / "out", fold_input_mult=True)
    assert contents(source) == before


@pytest.mark.parametrize("factor", [True, 0, -3, 10**400, 1e308, float("nan"), float("inf"), "16", None, [16], {}])
def test_a_record_may_say_anything(factor):
    lineage = {"operation": "convert", "from": "safetensors", "dtype": None, "folded_input_mult": factor}
    assert len(lineage_steps(lineage)) == 2
    assert all(len(sentence) < 700 for sentence in [*lineage_steps(lineage), *exactness(lineage)])


def test_the_architecture_of_a_folded_model():
    from conversion.input_mult import fold_input_mult

    published = Architecture.from_config(tiny_config().to_dict())
    assert fold_input_mult(published, "config.json").architecture == published.evolve(input_mult=1.0)
