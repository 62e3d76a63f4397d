# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Growth that does not preserve the function is what it says it is, and says everywhere that it does not.

The oracle for whole copies is stock transformers with layers of the source in another order; that for scales of
activations is measured on a model wide enough for averages.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import PreTrainedModel

from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.sources import open_checkpoint
from conversion.hub.lineage import lineage_steps
from conversion.mapping import weights
from conversion.parameter_kinds import parameter_kind
from evaluation.logits import checkpoint_logits
from evaluation.text import tokenize
from growth import grow_checkpoint, verify_checkpoints
from growth.layer_selection import select_layers
from growth.method import Mask, Random, Rms, Zero
from growth.moments import gradient_factor
from modeling_teleflm import TeleFLMForCausalLM
from tests.fixtures.checkpoint_runs import contents, run_teleflm
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

WIDER = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 160}
IDS = torch.randint(0, 600, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny_model(tiny_config(num_hidden_layers=3), dtype=torch.float64).save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("To grow is to keep what one knows. " * 20)
    return file


def record(folder: Path) -> dict:
    return json.loads((folder / "teleflm_manifest.json").read_bytes())


# Where additional layers go.


@pytest.mark.parametrize(
    ("choice", "old", "new", "expected"),
    [
        ("middle", 4, 6, "0 1 2 1+ 2+ 3"),
        ("middle", 5, 8, "0 1 2 3 1+ 2+ 3+ 4"),
        ("middle", 4, 8, "0 1 2 3 0+ 1+ 2+ 3+"),
        ("middle", 3, 8, "0 1 2 0+ 1+ 2+ 0+ 1+"),
        ("middle", 4, 4, "0 1 2 3"),
        ("upper", 4, 6, "0 1 2 2+ 3 3+"),
        ("upper", 5, 7, "0 1 2 3 3+ 4 4+"),
        ("upper", 4, 7, "0 1 2 2+ 3 3+ 3+"),
        ("upper", 1, 3, "0 0+ 0+"),
        ("stack", 3, 6, "0 1 2 0+ 1+ 2+"),
    ],
)
def test_where_they_go(choice, old, new, expected):
    found = select_layers(choice, old, new)
    assert " ".join(f"{origin.source}{'+' * origin.is_copy}" for origin in found) == expected


@pytest.mark.parametrize("layers", ["middle", "upper"])
def test_silent_ones_preserve_the_function_there_too(layers, source, tmp_path):
    result = grow_checkpoint(source, tmp_path / "out", {"num_hidden_layers": 5}, layers=layers)
    assert not result.growth.departures
    assert verify_checkpoints(source, tmp_path / "out").verdict == "certified"


# What they start as.


@pytest.mark.parametrize("layers", ["stack", "middle", "upper", "interleave", "1,1"])
def test_active_copies_are_the_layers_in_another_order(layers, source, tmp_path):
    result = grow_checkpoint(
        source, tmp_path / "out", {"num_hidden_layers": 5}, layers=layers, new_layers="active", method=Zero()
    )
    model = TeleFLMForCausalLM.from_pretrained(source, dtype="auto", attn_implementation="eager")
    order = [origin.source for origin in result.growth.layers]
    model.model.layers = torch.nn.ModuleList([model.model.layers[index] for index in order])
    model.config.num_hidden_layers = len(order)
    grown = TeleFLMForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(grown(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


def test_one_layer_becomes_many(tmp_path):
    """A start from one layer, arXiv 2511.04981."""
    source = tmp_path / "one"
    tiny_model(tiny_config(num_hidden_layers=1), dtype=torch.float64).save_pretrained(source)
    tiny_tokenizer(source).save_pretrained(source)
    grow_checkpoint(source, tmp_path / "out", {"num_hidden_layers": 6}, new_layers="active")
    tensors = load_file(tmp_path / "out/model.safetensors")
    for name in [name for name in tensors if ".layers.0." in name]:
        for layer in range(1, 6):
            assert torch.equal(tensors[name], tensors[name.replace(".0.", f".{layer}.")])


def test_random_ones_have_the_spread_of_the_layer_they_follow(source, tmp_path):
    target = {"num_hidden_layers": 4}
    for name in ("out", "again"):
        grow_checkpoint(source, tmp_path / name, target, layers="1", new_layers="random", seed=3)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for name in [name for name in old if ".layers.1." in name]:
        assert torch.equal(new[name], old[name])
        drawn = new[name.replace(".1.", ".2.")]
        if drawn.ndim == 1:
            assert torch.allclose(drawn, old[name].mean())
            continue
        assert drawn.std().item() == pytest.approx(old[name].std().item(), rel=0.1)
        correlation = np.corrcoef(drawn.flatten(), old[name].flatten())[0, 1]
        assert abs(correlation) < 6 / np.sqrt(drawn.numel())


# Width.


def test_rms_keeps_old_entries_times_a_factor_and_draws_the_rest(source, tmp_path):
    grow_checkpoint(source, tmp_path / "out", WIDER, method=Rms())
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    inputs = {"o_proj": (32, 64), "down_proj": (88, 160)}
    for name, tensor in old.items():
        if tensor.ndim == 1:
            assert torch.equal(new[name][: len(tensor)], tensor)
            continue
        kind = name.split(".")[-2]
        before, after = inputs.get(kind, (32, 64))
        assert tensor.shape[1] == before
        factor = 1.0 if kind == "embed_tokens" else np.sqrt(before / after)
        rows, columns = tensor.shape
        scale = 2.5 if kind == "embed_tokens" else 1.0  # input_mult is folded
        torch.testing.assert_close(new[name][:rows, :columns], tensor * factor * scale, rtol=1e-14, atol=0)
        drawn = new[name][:, columns:]
        assert drawn.std().item() == pytest.approx(tensor.std().item() * factor * scale, rel=0.05)
    config = json.loads((tmp_path / "out/config.json").read_bytes())
    assert config["rms_norm_eps"] == json.loads((source / "config.json").read_bytes())["rms_norm_eps"]


def activations(model: PreTrainedModel) -> dict[str, float]:
    """Root mean square of what every linear layer and norm of a model gives."""
    found: dict[str, float] = {}
    hooks = [
        module.register_forward_hook(
            lambda module, args, output, name=name: found.__setitem__(
                name, output.double().square().mean().sqrt().item()
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or "norm" in name
    ]
    with torch.no_grad():
        model(torch.arange(256)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A source of weights that are independent, wide enough that averages say something."""
    folder = tmp_path_factory.mktemp("wide")
    config = tiny_config(
        hidden_size=128, num_attention_heads=8, num_key_value_heads=8, intermediate_size=256, num_hidden_layers=2
    )
    torch.manual_seed(0)
    model = tiny_model(config, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter_kind(name) != "norm":
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    return folder


FOURFOLD = {"hidden_size": 512, "num_attention_heads": 32, "intermediate_size": 1024}


def ratios(source: Path, out: Path) -> np.ndarray:
    before, after = (
        activations(TeleFLMForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager"))
        for folder in (source, out)
    )
    return np.array([after[name] / before[name] for name in before])


def test_rms_keeps_the_scale_of_every_activation(wide, tmp_path):
    """And `random`, which is to be told apart, does not."""
    grow_checkpoint(wide, tmp_path / "rms", FOURFOLD, method=Rms())
    grow_checkpoint(wide, tmp_path / "random", FOURFOLD, method=Random())
    kept = ratios(wide, tmp_path / "rms")
    assert kept.min() > 0.85
    assert kept.max() < 1.15
    assert ratios(wide, tmp_path / "random").max() > 1.7


def test_the_gradient_of_old_entries_keeps_its_scale_where_their_moments_do(wide, tmp_path):
    """What `gradient_factor` says of `rms` is what backward finds."""
    result = grow_checkpoint(wide, tmp_path / "rms", FOURFOLD, method=Rms())
    models = [
        TeleFLMForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager")
        for folder in (wide, tmp_path / "rms")
    ]
    ids = torch.arange(256)[None]
    for model in models:
        model(ids, labels=ids).loss.backward()
    old, new = (dict(model.named_parameters()) for model in models)
    plans = {tensor.name: tensor for tensor in result.plan.tensors}
    for name, weight, _ in weights(result.growth.target):
        if weight.name.split(".")[-2] in ("q_proj", "k_proj"):  # attention is nearly even, and their gradients chance
            continue
        block = tuple(slice(size) for size in old[name].shape)
        found = (new[name].grad[block].square().mean() / old[name].grad.square().mean()).sqrt().item()
        assert found == pytest.approx(gradient_factor(weight, plans[name], result.growth), rel=0.35), name


# What is said of it.


ACTIVE = {"target": {"num_hidden_layers": 5}, "new_layers": "active"}
GROWTHS = [
    pytest.param({"target": WIDER, "method": Random()}, "method random", id="random"),
    pytest.param({"target": WIDER, "method": Rms()}, "method rms", id="rms"),
    pytest.param(ACTIVE, "new_layers active", id="active"),
    pytest.param({**ACTIVE, "new_layers": "random"}, "new_layers random", id="random layers"),
]


@pytest.mark.parametrize(("how", "name"), GROWTHS)
def test_everything_says_that_it_does_not_preserve(how, name, source, text, tmp_path):
    out = tmp_path / "out"
    result = grow_checkpoint(source, out, **how)
    assert result.notes[0].startswith("Not preserving: ")
    assert not any("The function is the source's" in note for note in result.notes)
    lineage = record(out)["lineage"]
    assert lineage["preserves_function"] is False
    assert lineage["departures"] == list(result.growth.departures)
    assert "not preserving the function it computes" in lineage_steps(lineage)[-1]
    assert "without changing the function" not in lineage_steps(lineage)[-1]
    card = (out / "README.md").read_text()
    assert "did not preserve the function" in card
    assert "Growing does not change the function" not in card
    with pytest.raises(CheckpointError, match=f"growth by {name}, which does not .*--text FILE, without --optimizer"):
        verify_checkpoints(source, out)
    verification = verify_checkpoints(source, out, text=text)
    assert verification.verdict == "different"
    assert verification.same is False
    assert f"nor meant to be: B was grown by {name}" in verification.sentence


def test_a_growth_that_preserves_does_not_say_so_of_itself(source, tmp_path):
    result = grow_checkpoint(source, tmp_path / "out", {**WIDER, "num_hidden_layers": 5})
    assert not result.growth.departures
    lineage = record(tmp_path / "out")["lineage"]
    assert not {"preserves_function", "departures", "new_layers"} & lineage.keys()
    assert "without changing the function" in lineage_steps(lineage)[-1]


def test_a_later_growth_does_not_take_it_back(source, text, tmp_path):
    """Certified beside what it started from, and known to have lost the first model's function."""
    grow_checkpoint(source, tmp_path / "one", **ACTIVE)
    grow_checkpoint(tmp_path / "one", tmp_path / "two", WIDER)
    assert verify_checkpoints(tmp_path / "one", tmp_path / "two").verdict == "certified"
    with pytest.raises(CheckpointError, match="growth by new_layers active"):
        verify_checkpoints(source, tmp_path / "two")
    assert "did not preserve the function" in (tmp_path / "two/README.md").read_text()


def test_a_record_that_claims_silent_layers_does_not_make_them_so(source, tmp_path):
    """Bytes decide."""
    out = tmp_path / "out"
    grow_checkpoint(source, out, **ACTIVE)
    manifest = record(out)
    for key in ("preserves_function", "departures", "new_layers"):
        del manifest["lineage"][key]
    (out / "teleflm_manifest.json").write_text(json.dumps(manifest))
    assert verify_checkpoints(source, out).verdict == "not-certified"


@pytest.mark.parametrize("forward", ["loaded", "streamed"])
def test_the_distance_is_that_of_torch(forward, source, text, tmp_path):
    out = tmp_path / "out"
    grow_checkpoint(source, out, WIDER, method=Random())
    found = verify_checkpoints(source, out, text=text, forward=forward).numbers.difference
    ids = tokenize(open_checkpoint(source), text, 512)
    first, second = (
        torch.log_softmax(torch.from_numpy(checkpoint_logits(open_checkpoint(folder), ids, "float64")), -1)
        for folder in (source, out)
    )
    divergence = functional.kl_div(second, first, reduction="batchmean", log_target=True)
    assert found.divergence == pytest.approx(divergence.item(), abs=1e-9)
    targets = torch.from_numpy(ids[1:]).long()
    losses = [functional.nll_loss(scores[:-1], targets).item() for scores in (first, second)]
    assert found.losses == pytest.approx(losses, rel=1e-9)


@pytest.mark.slow
def test_the_command(source, text, tmp_path):
    out = tmp_path / "out"
    options = ("--set", "num_hidden_layers=5", "--layers", "middle", "--new-layers", "active", "--json")
    grown = run_teleflm("grow", source, out, *options, folder=tmp_path)
    assert grown.returncode == 0, grown.stderr
    assert json.loads(grown.stdout)["preserves_function"] is False
    verified = run_teleflm("verify", source, out, "--text", text, folder=tmp_path)
    assert verified.returncode == 3
    assert "nats a token from A's (KL divergence)" in verified.stdout


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({**ACTIVE, "method": Mask()}, "silences additional layers whatever they hold"),
        ({"target": WIDER, "new_layers": "active"}, "num_hidden_layers stays 3: there are none"),
        ({**ACTIVE, "new_layers": "loud"}, "new_layers is 'loud', expected one of silent, active, random"),
        ({"target": {"num_hidden_layers": 5}, "method": Rms()}, "method is rms, but none of hidden_size"),
        ({"target": {"vocab_size": 704}, "method": Random()}, "method is random, but none of hidden_size"),
    ],
)
def test_what_is_refused(how, message, source, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        grow_checkpoint(source, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_one_may_be_trained(source, tmp_path):
    """No weight is dead: each has a gradient at the first step."""
    grow_checkpoint(source, tmp_path / "out", {**WIDER, "num_hidden_layers": 4}, method=Rms(), new_layers="random")
    model = TeleFLMForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("method", [Random(), Rms()])
def test_additional_layers_stay_silent_unless_they_are_asked_not_to(method, source, tmp_path):
    """Whatever the width does."""
    result = grow_checkpoint(source, tmp_path / "out", {**WIDER, "num_hidden_layers": 4}, layers="1", method=method)
    assert not any("additional layer" in reason for reason in result.growth.departures)
    tensors = load_file(tmp_path / "out/model.safetensors")
    for kind in ("self_attn.o_proj", "mlp.down_proj"):
        assert not tensors[f"model.layers.2.{kind}.weight"].any()
        assert tensors[f"model.layers.1.{kind}.weight"].any()


def test_notes_do_not_contradict_each_other(source, tmp_path):
    how = {"target": {**WIDER, "vocab_size": 704, "num_hidden_layers": 9}, "method": Random(), "new_layers": "random"}
    notes = " ".join(grow_checkpoint(source, tmp_path / "out", **how).notes)
    assert notes.startswith("Not preserving")
    for claim in ("kept exactly", "start alike", "what the model computes"):
        assert claim not in notes


def test_a_departure_that_rounding_hides_is_named_still(tmp_path, text):
    """New neurons whose outputs are far below what bfloat16 shows."""
    folder = tmp_path / "source"
    model = tiny_model(tiny_config(num_hidden_layers=1))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-9)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    grow_checkpoint(folder, tmp_path / "out", {"intermediate_size": 96}, method=Random())
    verification = verify_checkpoints(folder, tmp_path / "out", text=text)
    assert verification.verdict == "indistinguishable"
    assert "nor was it grown to: method random does not preserve it" in verification.sentence
    assert "nats a token from A's (KL divergence)" in verification.sentence
