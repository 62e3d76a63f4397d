# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Growth preserves the function on every axis, and every way of getting it wrong is seen.

The oracle is stock transformers running source and result; in float64 with norms that stay in float64, because bfloat16
cannot see a forgotten epsilon.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import growth.operators as operators
from conversion import convert_checkpoint
from conversion.architecture import Architecture
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.execute import WriteOptions
from conversion.checkpoint.sources import WEIGHT_FILES
from evaluation.logit_comparison import LogitComparison
from evaluation.logits import compare_logits
from growth import grow_checkpoint, verify_checkpoints
from growth.method import Mask, Tile, make_method
from growth.spec import Growth
from modeling_teleflm import TeleFLMForCausalLM
from tests.fixtures.checkpoint_runs import contents
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

IDS = torch.randint(0, 600, (2, 48), generator=torch.Generator().manual_seed(0))
ALL_AXES = {
    "hidden_size": 40,
    "num_attention_heads": 5,
    "intermediate_size": 110,
    "num_hidden_layers": 5,
    "vocab_size": 704,
    "mup_scale_factor": 5.0,
}


def heads(query: int, key_value: int) -> dict[str, int]:
    """Grouped attention with head_dim 8."""
    return {"num_attention_heads": query, "num_key_value_heads": key_value, "hidden_size": 8 * query}


GROUPED = heads(8, 2)
TIED = {"tie_word_embeddings": True}  # and input_mult 2.5, which one matrix for embedding and head cannot take


@pytest.fixture(autouse=True)
def one_thread():
    """Threads split a product by its size, and each part's kernel may add in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def make_source(tmp_path_factory) -> Callable[..., Path]:
    """Write a tiny source checkpoint with its tokenizer; float64 unless asked otherwise."""

    def make(dtype: torch.dtype = torch.float64, **fields) -> Path:
        folder = tmp_path_factory.mktemp("source")
        tiny_model(tiny_config(**fields), dtype=dtype).save_pretrained(folder)
        tiny_tokenizer(folder).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def source(make_source) -> Path:
    return make_source()


def load(folder: Path, dtype: torch.dtype | str = "auto") -> TeleFLMForCausalLM:
    return TeleFLMForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def compare(source: Path, out: Path, dtype: torch.dtype = torch.float64) -> LogitComparison:
    return compare_logits(load(source), load(out), IDS, dtype)


# Item 1 and 2: exact in float64, within the float32 floor in float32.


@pytest.mark.parametrize(
    ("fields", "target"),
    [
        pytest.param({}, {"hidden_size": 40, "num_attention_heads": 5}, id="hidden and heads"),
        pytest.param({}, {"hidden_size": 128, "num_attention_heads": 16}, id="hidden x 4"),
        pytest.param({}, {"intermediate_size": 110}, id="ffn"),
        pytest.param({}, {"num_hidden_layers": 7}, id="layers"),
        pytest.param({}, {"vocab_size": 704}, id="vocab"),
        pytest.param({}, {"mup_scale_factor": 20.0}, id="multipliers"),
        pytest.param({}, ALL_AXES, id="everything"),
        pytest.param({"use_mup": False}, ALL_AXES, id="everything, from a model without muP"),
        pytest.param(GROUPED, heads(10, 2), id="GQA 8/2 to 10/2"),
        pytest.param(GROUPED, heads(12, 3), id="GQA 8/2 to 12/3"),
        pytest.param(GROUPED, heads(16, 8), id="GQA 8/2 to 16/8"),
        pytest.param(GROUPED, heads(8, 4), id="GQA 8/2 to 8/4"),
        pytest.param(GROUPED, heads(8, 8), id="GQA 8/2 to 8/8"),
        pytest.param(heads(6, 2), heads(10, 5), id="GQA 6/2 to 10/5: groups of 3 over groups of 2"),
        pytest.param(TIED, {"vocab_size": 704, "num_hidden_layers": 5, "intermediate_size": 96}, id="tied"),
        pytest.param(TIED, {**ALL_AXES, "mup_scale_factor": 4.0}, id="tied, everything"),
        pytest.param({**TIED, "input_mult": 1.0}, ALL_AXES, id="tied, everything, input_mult 1"),
        pytest.param({**TIED, "use_mup": False}, ALL_AXES, id="tied, everything, from a model without muP"),
        pytest.param({**TIED, **GROUPED}, {**heads(12, 3), "mup_scale_factor": 20.0}, id="tied, GQA 8/2 to 12/3"),
        pytest.param({}, {"hidden_size": 40, "head_dim": 8}, id="hidden without heads"),
        pytest.param({"head_dim": 16}, {"hidden_size": 40, "num_attention_heads": 5}, id="heads wider than hidden"),
    ],
)
def test_preserves_the_function(fields, target, make_source, tmp_path):
    source = make_source(**fields)
    grow_checkpoint(source, tmp_path / "out", target)
    exact = compare(source, tmp_path / "out")
    assert exact.relative < 1e-12
    assert exact.same_argmax == 1.0
    assert compare(source, tmp_path / "out", torch.float32).relative < 1e-5


@pytest.mark.parametrize("multipliers", ["preserve", "target"])
def test_multipliers(multipliers, source, tmp_path):
    target = {**ALL_AXES, "mup_scale_factor": 5.0, "output_mult": 0.3, "input_mult": 7.0}
    result = grow_checkpoint(source, tmp_path / "out", target, multipliers=multipliers)
    assert compare(source, tmp_path / "out").relative < 1e-12
    config = json.loads((tmp_path / "out/config.json").read_bytes())
    assert config["mup_scale_factor"] == 5.0
    assert config["output_mult"] == (0.3 if multipliers == "target" else 0.5 / 4.0 * 5.0)
    assert config["input_mult"] == 1.0
    assert any("input_mult is folded" in note for note in result.notes)


@pytest.mark.parametrize("axis", [axis for axis in ALL_AXES if axis != "mup_scale_factor"])
def test_a_tied_model_grows_along_every_axis(axis, make_source, tmp_path):
    """And its multipliers stay: nothing of them can be folded into a matrix that is embedding and head."""
    source, out = make_source(**TIED), tmp_path / "out"
    more = {"head_dim": 8} if axis == "hidden_size" else {}
    more |= heads(5, 5) if axis in ("num_attention_heads", "num_key_value_heads") else {}
    target = {axis: ALL_AXES[axis], **more}
    grow_checkpoint(source, out, target, overrides={"input_mult": 2.5})
    assert compare(source, out).relative < 1e-12
    config = json.loads((out / "config.json").read_bytes())
    assert (config["input_mult"], config["output_mult"], config["mup_scale_factor"]) == (2.5, 0.5, 4.0)
    old, new = (load_file(folder / "model.safetensors")["model.embed_tokens.weight"] for folder in (source, out))
    assert torch.equal(new[: len(old), : old.shape[1]], old)
    assert verify_checkpoints(source, out).verdict == "certified"
    for field in ("input_mult", "output_mult", "mup_scale_factor"):  # each alone is another function
        edited = {**config, field: config[field] * 1.5}
        (out / "config.json").write_text(json.dumps(edited))
        assert compare(source, out).relative > 1e-3
        assert verify_checkpoints(source, out).verdict == "not-certified"


@pytest.mark.parametrize("grows", [{"num_hidden_layers": 5}, ALL_AXES], ids=["depth", "everything"])
def test_a_tied_model_takes_multipliers_that_one_matrix_makes_up_for(grows, make_source, tmp_path):
    """Embeddings x 2.5 and logits x 1/8 become x 5 and x 1/4: half the matrix makes up for both."""
    source, out = make_source(**TIED), tmp_path / "out"
    asked = {"input_mult": 5.0, "output_mult": 1.0, "mup_scale_factor": 4.0}
    result = grow_checkpoint(source, out, grows, overrides=asked, multipliers="target")
    assert compare(source, out).relative < 1e-12
    assert json.loads((out / "config.json").read_bytes()).items() >= asked.items()
    assert verify_checkpoints(source, out).verdict == "certified"
    assert any("embed_tokens, which is the head too, is multiplied by 0.5" in note for note in result.notes)


@pytest.mark.parametrize("multipliers", ["preserve", "target"])
def test_the_sources_input_mult_stays_where_it_is_asked_for(multipliers, source, tmp_path):
    asked = {**ALL_AXES, "input_mult": 2.5}
    grow_checkpoint(source, tmp_path / "out", overrides=asked, multipliers=multipliers)
    assert json.loads((tmp_path / "out/config.json").read_bytes())["input_mult"] == 2.5
    assert compare(source, tmp_path / "out").relative < 1e-12
    assert verify_checkpoints(source, tmp_path / "out").verdict == "certified"


@pytest.mark.parametrize("layers", ["interleave", "stack", "top", "0,0,2,2"])
def test_layers_may_be_copied_anywhere(layers, source, tmp_path):
    grow_checkpoint(source, tmp_path / "out", {"num_hidden_layers": 7}, layers=layers)
    assert compare(source, tmp_path / "out").relative < 1e-12


# Item 3: in bfloat16, growth is invisible next to the noise of bfloat16 itself.


def test_bfloat16_noise(make_source, tmp_path):
    source = make_source(torch.bfloat16)
    grow_checkpoint(source, tmp_path / "out", ALL_AXES)
    exact = compare_logits(load(source, torch.bfloat16), load(source, torch.bfloat16), IDS)
    assert exact.max_difference == 0.0
    small, large = load(source, torch.bfloat16), load(tmp_path / "out", torch.bfloat16)
    with torch.no_grad():
        reference = small.double()(IDS).logits
        noise = load(source, torch.bfloat16)(IDS).logits.double() - reference
        growth_noise = large(IDS).logits.double()[..., : reference.shape[-1]] - load(source, torch.bfloat16)(IDS).logits
    assert growth_noise.square().mean().sqrt() <= 2 * noise.square().mean().sqrt()
    assert growth_noise.abs().max() <= 3 * noise.abs().max()

    def cross_entropy(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), IDS[:, 1:].reshape(-1))

    assert abs(cross_entropy(reference + growth_noise) - cross_entropy(reference)) < 1e-3


# Item 4: where no factor but a power of two appears, nothing is rounded: torch.equal, in every dtype.


def old_vocabulary_logits(model: TeleFLMForCausalLM, vocab_size: int) -> torch.Tensor:
    """Logits from a product of the old shape: one with more columns may use a kernel that adds in another order."""
    with torch.no_grad():
        hidden = model.model(IDS).last_hidden_state
        return torch.nn.functional.linear(hidden, model.lm_head.weight[:vocab_size]) * model.config.logit_scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("fields", "target"),
    [
        pytest.param({}, {"num_hidden_layers": 5}, id="layers"),
        pytest.param({}, {"vocab_size": 704}, id="vocab"),
        pytest.param({}, {"intermediate_size": 96}, id="ffn"),
        pytest.param({}, {"num_attention_heads": 8, "head_dim": 8}, id="heads, at the same width"),
        pytest.param(GROUPED, heads(8, 4), id="key/value heads"),
        pytest.param({}, {"hidden_size": 128, "num_attention_heads": 16}, id="hidden x 4"),
        pytest.param({}, {"mup_scale_factor": 16.0, "output_mult": 0.5}, id="multipliers x 1/4"),
    ],
)
def test_bit_exact(fields, target, dtype, make_source, tmp_path):
    source = make_source(dtype, **{"input_mult": 1.0, **fields})
    grow_checkpoint(source, tmp_path / "out", target, multipliers="target")
    old, new = (old_vocabulary_logits(load(folder, dtype), 640) for folder in (source, tmp_path / "out"))
    assert torch.equal(old, new)


# Item 5: mutants of the operators must fail items 1 and 2.


def _skip_eps(monkeypatch):
    build = Growth.__init__

    def init(self, source, target, *args, **kwargs):
        build(self, source, target.evolve(rms_norm_eps=source.rms_norm_eps), *args, **kwargs)

    monkeypatch.setattr(Growth, "__init__", init)


def _skip_one_norm(monkeypatch):
    scale = operators._scale
    monkeypatch.setattr(
        operators, "_scale", lambda weight, *rest: 1.0 if "post_attention" in weight.name else scale(weight, *rest)
    )


def _one_writer_entry(monkeypatch):
    fill = operators._fill_rest

    def planted(box, source_name, kind, view, scale):
        piece = fill(box, source_name, kind, view, scale)
        return dataclasses.replace(piece, value=1e-4) if "layers.0.mlp.down" in source_name else piece

    monkeypatch.setattr(operators, "_fill_rest", planted)


def _swap_groups(monkeypatch):
    heads = operators._grow_heads

    def swapped(axis, growth):
        result = heads(axis, growth)
        if axis != "query":
            return result
        first, *rest = result.parts
        moved = dataclasses.replace(first, start=(first.start[0] + 1, *first.start[1:]))
        return dataclasses.replace(result, parts=(moved, *rest))

    monkeypatch.setattr(operators, "_grow_heads", swapped)


def _invert_head_ratio(monkeypatch):
    monkeypatch.setattr(Growth, "head_scale", property(lambda g: g.target.logit_scale / g.source.logit_scale))


def _copies_speak(monkeypatch):
    monkeypatch.setattr(operators, "_OUTPUTS", ("down_proj",))


@pytest.mark.parametrize(
    "mutant",
    [_skip_eps, _skip_one_norm, _one_writer_entry, _swap_groups, _invert_head_ratio, _copies_speak],
)
def test_mutants_are_caught(mutant, make_source, tmp_path, monkeypatch):
    source = make_source(**GROUPED)
    target = {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 96, "num_hidden_layers": 4}
    target |= {"intermediate_size": 96, "output_mult": 0.3}
    grow_checkpoint(source, tmp_path / "good", target, multipliers="target")
    assert compare(source, tmp_path / "good").relative < 1e-12
    mutant(monkeypatch)
    grow_checkpoint(source, tmp_path / "bad", target, multipliers="target")
    assert compare(source, tmp_path / "bad").relative > 1e-9
    assert compare(source, tmp_path / "bad", torch.float32).relative > 1e-5


# Item 6: the new weights learn.


def gradients_after_two_steps(model: TeleFLMForCausalLM) -> dict[str, torch.Tensor]:
    """Plain SGD: the gradient each parameter gets at the third step."""
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def new_entries(old: Architecture, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients of what the old model does not have, one flat tensor a weight."""
    h, f, q = old.hidden_size, old.intermediate_size, old.num_attention_heads * old.head_dim
    sizes = {"q_proj": (q, h), "k_proj": (q, h), "v_proj": (q, h), "o_proj": (h, q), "gate_proj": (f, h)}
    sizes |= {
        "up_proj": (f, h),
        "down_proj": (h, f),
        "embed_tokens": (old.vocab_size, h),
        "lm_head": (old.vocab_size, h),
    }
    new = {}
    for name, gradient in gradients.items():
        size = sizes.get(name.split(".")[-2], (h,))
        mask = torch.ones_like(gradient, dtype=torch.bool)
        mask[tuple(slice(n) for n in size)] = False
        new[name] = gradient[mask]
    return new


def test_new_weights_get_gradients_and_zeros_everywhere_are_dead(source, tmp_path):
    target = {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 110, "num_hidden_layers": 4}
    grow_checkpoint(source, tmp_path / "out", target, layers="1")
    old = Architecture.from_config(json.loads((source / "config.json").read_bytes()))
    gradients = gradients_after_two_steps(load(tmp_path / "out"))
    learning = new_entries(old, gradients)
    learning |= {name: gradient for name, gradient in gradients.items() if "layers.2." in name}  # the copy of layer 1
    used = torch.zeros(640, dtype=torch.bool)
    used[IDS[:, :-1].unique()] = True  # the last token of a row predicts nothing
    for name, gradient in learning.items():
        entries = gradient.reshape(640, -1)[used] if "embed_tokens" in name else gradient
        assert (entries != 0).all(), name

    model = load(tmp_path / "out")
    with torch.no_grad():  # the control: all new entries zero
        for name, parameter in model.named_parameters():
            kept = torch.zeros_like(parameter, dtype=torch.bool)
            h, f, q = old.hidden_size, old.intermediate_size, old.hidden_size
            rows = {"gate_proj": f, "up_proj": f, "embed_tokens": 640, "lm_head": 640}.get(name.split(".")[-2], q)
            kept[(slice(rows), slice({"down_proj": f}.get(name.split(".")[-2], h)))[: parameter.dim()]] = True
            parameter[~kept] = 0
    dead = new_entries(old, gradients_after_two_steps(model))
    assert all(not dead[name].any() for name in dead if "gate" in name or "up_proj" in name or "q_proj" in name)


# What is written.


def test_the_folder_is_a_hub_repository(source, tmp_path):
    grow_checkpoint(source, tmp_path / "out", ALL_AXES, options=WriteOptions(max_shard_size="100KB"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "teleflm_manifest.json",
        "README.md",
        "model.safetensors.index.json",
        "tokenizer.model",
        "tokenizer.json",
    } <= names
    assert {
        "configuration_teleflm.py",
        "modeling_teleflm.py",
        "tokenization_teleflm.py",
        "chat_template.jinja",
    } <= names
    config = json.loads((tmp_path / "out/config.json").read_bytes())
    assert {key: config[key] for key in ALL_AXES} == ALL_AXES
    assert config["rms_norm_eps"] == 8e-06
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_teleflm.TeleFLMForCausalLM"
    assert load(tmp_path / "out").config.head_dim == 8
    manifest = (tmp_path / "out/teleflm_manifest.json").read_text()
    lineage = json.loads(manifest)["lineage"]
    assert lineage["source"]["hidden_size"] == 32
    assert lineage["target"]["hidden_size"] == 40
    assert [layer["source"] for layer in lineage["layers"]] == [0, 1, 1, 2, 2]
    assert [layer["copy"] for layer in lineage["layers"]] == [False, False, True, False, True]
    assert str(source) not in manifest
    assert str(tmp_path) not in manifest


@pytest.mark.parametrize(
    ("dtype", "units"),
    [(torch.float64, 2), (torch.float32, 2), (torch.bfloat16, 2)],
    ids=str,
)
def test_two_hops_equal_one_on_what_they_keep(dtype, units, make_source, tmp_path):
    source = make_source(dtype)
    middle = {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 96, "num_hidden_layers": 4}
    end = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 128, "num_hidden_layers": 6}
    grow_checkpoint(source, tmp_path / "middle", middle, layers="0")
    grow_checkpoint(tmp_path / "middle", tmp_path / "two", end, layers="0,2")
    grow_checkpoint(source, tmp_path / "one", end, layers="0,0,1")  # the same layer map, composed
    if dtype == torch.float64:
        assert compare(source, tmp_path / "two").relative < 1e-12
    one, two = load_file(tmp_path / "one/model.safetensors"), load_file(tmp_path / "two/model.safetensors")
    old = load_file(source / "model.safetensors")
    moved = {0: 0, 1: 3, 2: 5}  # where the layers of the source are after both
    for name, tensor in old.items():
        new = re.sub(r"layers\.(\d+)", lambda match: f"layers.{moved[int(match[1])]}", name)
        kept = tuple(slice(n) for n in tensor.shape)
        a, b = one[new][kept].double(), two[new][kept].double()
        assert ((a - b).abs() <= units * torch.finfo(dtype).eps * a.abs()).all(), name
    configs = [json.loads((tmp_path / name / "config.json").read_bytes()) for name in ("one", "two")]
    assert configs[0]["rms_norm_eps"] == pytest.approx(configs[1]["rms_norm_eps"], rel=1e-15)
    card = (tmp_path / "two/README.md").read_text()
    assert "hidden_size 32 to 40" in card
    assert "hidden_size 40 to 64" in card


def test_new_vocabulary_rows_hardly_touch_the_probabilities(make_source, tmp_path):
    """Rows that were never a target are very negative in a trained model; new rows must look like them."""
    source = make_source()
    tensors = load_file(source / "model.safetensors")
    hidden = load(source).model(IDS).last_hidden_state.mean((0, 1))
    tensors["lm_head.weight"][600:] = -1000 * hidden / hidden.norm()  # ids without a piece
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    grow_checkpoint(source, tmp_path / "out", {"vocab_size": 704})
    with torch.no_grad():
        old, new = load(source)(IDS).logits.log_softmax(-1), load(tmp_path / "out")(IDS).logits.log_softmax(-1)
    assert (old - new[..., :640]).abs().max() < 1e-3
    head = load_file(tmp_path / "out/model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(head[640:], head[600:640].mean(0).expand(64, -1), rtol=1e-12, atol=0)


def test_cached_generation_is_the_same(make_source, tmp_path):
    source = make_source(torch.float32, max_position_embeddings=512)
    grow_checkpoint(source, tmp_path / "out", ALL_AXES)
    length = {"max_new_tokens": 256, "min_new_tokens": 256, "do_sample": False}
    old = load(source).generate(IDS[:1, :8], **length)
    new = load(tmp_path / "out").generate(IDS[:1, :8], **length, suppress_tokens=list(range(640, 704)))
    assert old.shape == (1, 264)
    assert torch.equal(old, new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [40, 128])
def test_the_source_can_be_cut_out_again(width, dtype, make_source, tmp_path):
    """The old block, divided by the norms' factor, is the source: exactly if the factor is a power of two."""
    source = make_source(dtype, input_mult=1.0)
    grow_checkpoint(source, tmp_path / "out", {"hidden_size": width, "num_attention_heads": width // 8})
    factor = (32 / width) ** 0.5
    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    for name, tensor in old.items():
        block = new[name][tuple(slice(n) for n in tensor.shape)]
        if "norm" in name and width == 40:
            back = (block.double() / factor).to(dtype)
            assert ((back - tensor).abs() <= torch.finfo(dtype).eps * tensor.abs()).all(), name  # one unit at most
        else:
            assert torch.equal((block.double() / (factor if "norm" in name else 1)).to(dtype), tensor), name


def grown_densely(old: dict[str, torch.Tensor], layers: list[tuple[int, bool]]) -> dict[str, torch.Tensor]:
    """Hidden 32 to 40, one head more, 88 to 96 neurons, layers copied: the definition, with new entries of any value.

    Written from the requirement alone: a stream [h; 0], norms times sqrt(32/40), outputs of new things zero.
    """
    generator = torch.Generator().manual_seed(7)

    def widen(weight: torch.Tensor, rows: int, columns: int, writes: bool) -> torch.Tensor:
        new = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * (0 if writes else 1)
        new[: weight.shape[0], : weight.shape[1]] = weight
        return new

    def norm(weight: torch.Tensor) -> torch.Tensor:
        return torch.cat([weight * (32 / 40) ** 0.5, torch.randn(8, generator=generator, dtype=torch.float64)])

    new = {"model.embed_tokens.weight": widen(old["model.embed_tokens.weight"], 640, 40, True)}
    new |= {
        "lm_head.weight": widen(old["lm_head.weight"], 640, 40, False),
        "model.norm.weight": norm(old["model.norm.weight"]),
    }
    shapes = {"self_attn.q_proj": (40, 40), "self_attn.k_proj": (40, 40), "self_attn.v_proj": (40, 40)}
    shapes |= {
        "self_attn.o_proj": (40, 40),
        "mlp.gate_proj": (96, 40),
        "mlp.up_proj": (96, 40),
        "mlp.down_proj": (40, 96),
    }
    for layer, (origin, is_copy) in enumerate(layers):
        for name, shape in shapes.items():
            writes = name.endswith(("o_proj", "down_proj"))
            weight = widen(old[f"model.layers.{origin}.{name}.weight"], *shape, writes)
            new[f"model.layers.{layer}.{name}.weight"] = weight * 0 if is_copy and writes else weight
        for name in ("input_layernorm", "post_attention_layernorm"):
            new[f"model.layers.{layer}.{name}.weight"] = norm(old[f"model.layers.{origin}.{name}.weight"])
    return new


def test_agrees_with_the_dense_definition(make_source, tmp_path):
    """Where the definition says a value, growth has it; where it lets any be, the function does not depend on it."""
    source = make_source(input_mult=1.0)
    target = {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 96, "num_hidden_layers": 4}
    result = grow_checkpoint(source, tmp_path / "out", target)
    layers = [(origin.source, origin.is_copy) for origin in result.growth.layers]
    expected = grown_densely(load_file(source / "model.safetensors"), layers)
    model, grown = load(tmp_path / "out"), load_file(tmp_path / "out/model.safetensors")
    assert expected.keys() == grown.keys()
    for name, tensor in expected.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight")):
            assert torch.equal(grown[name], tensor), name
    model.load_state_dict(expected)
    assert compare_logits(load(source), model, IDS).relative < 1e-12
    assert compare_logits(load(tmp_path / "out"), model, IDS).relative < 1e-12


def test_seed_and_nothing_else_decides_the_bytes(source, tmp_path):
    options = {
        "a": (0, WriteOptions(workers=1)),
        "b": (0, WriteOptions(workers=4, max_shard_size="50KB")),
        "c": (1, WriteOptions()),
    }
    tensors = {}
    for name, (seed, option) in options.items():
        grow_checkpoint(source, tmp_path / name, ALL_AXES, seed=seed, options=option)
        files = sorted((tmp_path / name).glob("*.safetensors"))
        tensors[name] = {key: value.numpy() for file in files for key, value in load_file(file).items()}
    assert len(tensors["a"]) == len(tensors["b"])
    assert all(np.array_equal(value, tensors["b"][key]) for key, value in tensors["a"].items())
    assert any(not np.array_equal(value, tensors["c"][key]) for key, value in tensors["a"].items())


def test_neither_ranks_nor_interruptions_change_a_byte(source, tmp_path):
    def grow(out: str, **options) -> None:
        grow_checkpoint(source, tmp_path / out, ALL_AXES, options=WriteOptions(max_shard_size="50KB", **options))

    grow("alone")
    expected = contents(tmp_path / "alone")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda rank: grow("shared", rank=rank, world_size=3), range(3)))
    assert contents(tmp_path / "shared") == expected

    left = [0]

    def give_up(nbytes: int, total: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    for blocks in (3, 10, 10):  # each goes on where the one before it stopped
        left[0] = blocks
        with pytest.raises(KeyboardInterrupt):
            grow("interrupted", workers=1, progress=give_up)
        assert not [name for name in contents(tmp_path / "interrupted") if name in WEIGHT_FILES]
    grow("interrupted")
    assert contents(tmp_path / "interrupted") == expected


# Bad input: one line that names the field and both values, before anything is written.


WIDER = {"hidden_size": 40, "num_attention_heads": 5}
DEEPER = {"num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("fields", "target", "message"),
    [
        ({}, {"hidden_size": 16, "num_attention_heads": 2}, "hidden_size would shrink from 32 to 16"),
        ({}, {"num_hidden_layers": 2}, "num_hidden_layers would shrink from 3 to 2"),
        ({}, {"vocab_size": 639}, "vocab_size would shrink from 640 to 639"),
        ({}, {"hidden_size": 40}, "head_dim would change from 8 to 10.*num_attention_heads 5"),
        ({}, {"head_dim": 16}, "head_dim is asked to be 16, the source has 8.*ask for head_dim 8"),
        ({}, {"hidden_size": 33}, "hidden_size 33 is not a multiple of num_attention_heads 4"),
        ({}, heads(8, 6), "num_attention_heads 8 is not a multiple of num_key_value_heads 6"),
        (heads(6, 2), heads(6, 3), "num_key_value_heads 3 is too few.*needs 2 copies; use at least 4"),
        ({}, {"mup_scale_factor": 0}, "mup_scale_factor is 0; it must be finite and above 0"),
        ({}, {"output_mult": -1.0}, r"output_mult is -1\.0"),
        ({}, {"hidden_size": "64"}, "hidden_size is '64', expected an integer"),
        ({}, {"use_mup": "yes"}, "use_mup is 'yes', expected true or false"),
        ({}, {"rope_theta": 500000}, "rope_parameters would change"),
        ({}, {"hidden_act": "gelu"}, "hidden_act would change from silu to gelu"),
        ({}, {"tie_word_embeddings": True}, "tie_word_embeddings would change from False to True"),
        ({}, {"rope_theta": "x"}, "the target: rope_theta is 'x', expected a number"),
        ({}, {"rope_parameters": 3}, "the target: rope_parameters is 3, expected an object or null"),
        ({}, {"rope_parameters": {"rope_theta": [1]}}, r"the target: rope_theta is \[1\], expected a number"),
        ({}, {"rope_parameters": {"rope_type": []}}, r"the target: rope_type is \[\], expected a name"),
        ({}, {"rope_theta": 10**400}, r"rope_theta is 1000\d+\.\.\.; it must be finite and above 0"),
        ({}, {**WIDER, "rms_norm_eps": "x"}, "rms_norm_eps is 'x', expected a number above 0"),
        ({}, {**WIDER, "output_mult": 10**400}, r"output_mult is 1000\d+\.\.\.; it must be finite and above 0"),
        ({}, "tele-flm-53b", "no preset 'tele-flm-53b'; known presets: .*tele-flm-1t"),
        ({}, "tele-flm-52b", "head_dim would change from 8 to 128"),
        ({}, "missing.json", r"missing\.json: no such file"),
    ],
)
def test_targets_that_are_refused(fields, target, message, make_source, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        grow_checkpoint(make_source(**fields), tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hiden_size": 96}, r"hiden_size is no field .*did you mean hidden_size\?"),
        ({"num_layers": 96}, r"num_layers is no field .*did you mean num_hidden_layers\?"),
        ({"colour": "red"}, r"colour is no field .*growth sets hidden_size, .*mup_scale_factor"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps is no field that growth sets: it follows from the widths"),
        ({"use_cache": False}, r"use_cache is no field that growth sets: change it in the config\.json of OUT"),
        ({"hidden_size": None}, "hidden_size is null, expected a value"),
        ({"hidden_size": 40.5, "num_attention_heads": 5}, r"hidden_size is 40\.5, expected an integer"),
        ({"hidden_size": True}, "hidden_size is True, expected an integer"),
        ({"num_hidden_layers": "abc"}, "num_hidden_layers is 'abc', expected an integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected at most 10000"),
        ({"hidden_size": -40}, "hidden_size is -40; it must be finite and above 0"),
        ({"output_mult": 0.3}, r"output_mult is asked to be 0\.3, but has to be .*use --multipliers target"),
        ({"use_mup": False}, "use_mup is asked to be False, but has to be"),
        ({"attention_bias": True}, "attention_bias would change from False to True"),
        ({"input_mult": 3}, "input_mult is asked to be 3: growth keeps the source's, 1, where that is asked for"),
        ({"rope_scaling": []}, r"(--set|the target): rope_scaling is \[\], expected an object or null"),
        ({"rope_theta": 0}, "(--set|the target): rope_theta is 0; it must be finite and above 0"),
        ({"hidden_size": 32}, "nothing would grow: .*`teleflm convert` copies"),
    ],
)
def test_what_is_asked_for_is_done_or_refused(overrides, message, make_source, tmp_path):
    source = make_source(input_mult=1.0)
    with pytest.raises(CheckpointError, match=message):
        grow_checkpoint(source, tmp_path / "out", overrides=overrides)
    if (
        None not in overrides.values()
        and not {"rms_norm_eps", "use_cache", "input_mult", "output_mult", "use_mup"} & overrides.keys()
    ):
        with pytest.raises(CheckpointError, match=message):
            grow_checkpoint(source, tmp_path / "out", overrides)
    assert not (tmp_path / "out").exists()


def test_what_a_target_has_and_growth_keeps_is_noted(source, tmp_path):
    target = {**WIDER, "rms_norm_eps": 1e-5, "use_cache": False, "max_position_embeddings": 4096, "output_mult": 9.0}
    notes = "\n".join(grow_checkpoint(source, tmp_path / "out", target, dry_run=True).notes)
    assert "Not taken from the target, which differs in them: max_position_embeddings, use_cache." in notes
    assert re.search(r"output_mult is [\d.]+, not the target's 9: it follows from the source's", notes)


def test_nothing_of_a_target_is_dropped_without_a_word(make_source, tmp_path):
    """Neither what follows from the widths, nor what the source does not say."""
    source = make_source()
    config = json.loads((source / "config.json").read_bytes())
    for name in ("max_position_embeddings", "attention_dropout", "initializer_range"):
        config.pop(name, None)
    own = {"colour": None, "shades": {"of": 2}}
    (source / "config.json").write_text(json.dumps({**config, **own}))
    target = {
        **WIDER,
        "rms_norm_eps": 0.001,
        "attention_dropout": 0.1,
        "max_position_embeddings": 99,
        "dtype": "float16",
    }
    notes = "\n".join(grow_checkpoint(source, tmp_path / "out", target, dry_run=True).notes)
    assert "differs in them: attention_dropout, dtype, max_position_embeddings." in notes
    assert "rms_norm_eps is 8e-06, not the target's 0.001: it follows from the source's." in notes
    same = {**WIDER, "rms_norm_eps": 8e-06, "torch_dtype": "torch.float64", "shades": {"of": 2}}
    notes = "\n".join(grow_checkpoint(source, tmp_path / "out", same, dry_run=True).notes)
    assert "target" not in notes.replace("the target's", "")
    for other in ({"colour": "red"}, {"shades": {"of": 3}}):
        with pytest.raises(CheckpointError, match=f"{next(iter(other))} would change from .*; growth keeps it"):
            grow_checkpoint(source, tmp_path / "out", {**WIDER, **other}, dry_run=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_parameters": 3}, "config.json: rope_parameters is 3, expected an object or null"),
        ({"rope_parameters": None, "rope_theta": [1]}, r"config.json: rope_theta is \[1\], expected a number"),
        ({"rope_scaling": "x"}, "config.json: rope_scaling is 'x', expected an object or null"),
        ({"rope_parameters": {"rope_type": 5}}, "config.json: rope_type is 5, expected a name"),
        ({"rope_theta": False}, "config.json: rope_theta is False, expected a number"),
        ({"hidden_size": 10**400}, "config.json is not valid JSON: a number has 401 digits"),
    ],
)
def test_a_source_whose_numbers_are_none(fields, message, make_source, tmp_path):
    source = make_source()
    config = json.loads((source / "config.json").read_bytes())
    (source / "config.json").write_text(json.dumps({**config, **fields}))
    writers = [lambda out: grow_checkpoint(source, out, WIDER), lambda out: convert_checkpoint(source, out)]
    for number, write in enumerate(writers):
        with pytest.raises(CheckpointError, match=message):
            write(tmp_path / f"{number}")
        assert not (tmp_path / f"{number}").exists()


@pytest.mark.parametrize(
    ("asked", "multipliers", "message"),
    [
        ({"output_mult": 0.3}, "preserve", r"output_mult is asked to be 0\.3, but has to be 0\.5: embeddings are tied"),
        ({"input_mult": 1.0}, "preserve", r"input_mult is asked to be 1\.0, but has to be 2\.5: embeddings are tied"),
        ({"input_mult": 1.0}, "target", r"multiplied by 1 instead of 2\.5, .*cannot be 2\.5 and 1 times what it was"),
        ({"use_mup": False}, "target", r"instead of 2\.5, logits by 1 instead of 0\.125: .*leave --multipliers target"),
    ],
)
def test_multipliers_that_one_matrix_cannot_make_up_for(asked, multipliers, message, make_source, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        grow_checkpoint(make_source(**TIED), tmp_path / "out", DEEPER, overrides=asked, multipliers=multipliers)


@pytest.mark.parametrize("missing", ["rope_parameters", "hidden_act"])
def test_a_source_that_leaves_defaults_out(missing, make_source, tmp_path):
    """As transformers reads it: rope_theta 10000, silu."""
    source = make_source()
    config = json.loads((source / "config.json").read_bytes())
    del config[missing]
    (source / "config.json").write_text(json.dumps(config))
    same = {"rope_theta": 10000.0} if missing == "rope_parameters" else {"hidden_act": "silu"}
    grow_checkpoint(source, tmp_path / "out", {**WIDER, **same})
    assert compare(source, tmp_path / "out").relative < 1e-12
    other = {"rope_theta": 5e5} if missing == "rope_parameters" else {"hidden_act": "gelu"}
    with pytest.raises(CheckpointError, match="would change from"):
        grow_checkpoint(source, tmp_path / "other", {**WIDER, **other})


def test_new_columns_of_a_tied_head_learn(make_source, tmp_path):
    """They are zeros, as an embedding's must be; the gradient comes through the readers of the stream."""
    grow_checkpoint(make_source(**TIED), tmp_path / "out", WIDER)
    model = load(tmp_path / "out", torch.float64)
    model(IDS, labels=IDS).loss.backward()
    new = model.model.embed_tokens.weight.grad[:, 32:]
    assert torch.count_nonzero(model.model.embed_tokens.weight[:, 32:]) == 0
    assert (new[IDS[:, :-1].unique()].abs().amax(1) > 0).all()


@pytest.mark.parametrize("method", [Tile(), Mask()], ids=lambda method: method.name)
def test_tied_width_grows_by_zeros_alone(method, make_source, tmp_path):
    with pytest.raises(CheckpointError, match=f"tie_word_embeddings is true .* by {method.name}: .*method zero"):
        grow_checkpoint(make_source(**TIED), tmp_path / "out", heads(8, 8), method=method)


def test_a_factor_that_the_dtype_cannot_express_is_refused(make_source, tmp_path):
    """sqrt(512 / 513) in bfloat16: the products would all be what they were."""
    source = make_source(torch.bfloat16, hidden_size=512, num_attention_heads=1, num_key_value_heads=1, head_dim=8)
    target = {"hidden_size": 513, "head_dim": 8}
    with pytest.raises(CheckpointError, match=r"multiplied by 0\.99902\d+, which bfloat16 rounds away.*float32"):
        grow_checkpoint(source, tmp_path / "out", target)
    grow_checkpoint(source, tmp_path / "out", target, dtype="float32")


@pytest.mark.parametrize(
    ("target", "arguments", "expected", "unexpected"),
    [
        (
            WIDER,
            {"dtype": "bfloat16"},
            "exact arithmetic, but for the rounding of weights. In bfloat16, all weights are rounded to bfloat16",
            None,
        ),
        (WIDER, {}, "`teleflm train --mup_base_width 32`", "exact arithmetic"),
        (DEEPER, {"dtype": "float16"}, "but for the rounding of weights. In float16, all weights are rounded", None),
        (DEEPER, {"dtype": "float64"}, "No optimizer state", "exact arithmetic"),
        ({"num_hidden_layers": 6}, {"layers": "0,0,2"}, "Layers 0 are copied more than once", None),
        (DEEPER, {}, "No optimizer state", "more than once"),
    ],
)
def test_notes(target, arguments, expected, unexpected, source, tmp_path):
    notes = "\n".join(grow_checkpoint(source, tmp_path / "out", target, dry_run=True, **arguments).notes)
    assert expected in notes
    assert unexpected is None or unexpected not in notes


@pytest.mark.parametrize(
    ("fields", "target", "expected", "unexpected"),
    [
        (
            {"input_mult": 2.0},
            WIDER,
            "In bfloat16, norm weights x 0.8944 are rounded to bfloat16",
            "embed_tokens x 2.5 ",
        ),
        ({"input_mult": 2.0}, heads(16, 16), "in exact arithmetic. In bfloat16, sums are longer", "are rounded"),
        ({}, DEEPER, "In bfloat16, embed_tokens x 2.5 are rounded to bfloat16", None),
        ({}, {"vocab_size": 700}, "Old logits are the source's in exact arithmetic, but for", "The function is"),
        ({}, {"vocab_size": 700}, "take part in the softmax: old logits are kept, and probabilities change.", None),
        ({"input_mult": 2.0}, DEEPER, "No optimizer state", "exact arithmetic"),
    ],
)
def test_notes_on_bfloat16(fields, target, expected, unexpected, make_source, tmp_path):
    source = make_source(torch.bfloat16, **fields)
    notes = "\n".join(grow_checkpoint(source, tmp_path / "out", target, dry_run=True).notes)
    assert expected in notes
    assert unexpected is None or unexpected not in notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "5"}, "layers lists 5, the source has layers 0 to 2"),
        ({"layers": "1,2"}, "layers lists 2 copies, the target has 1 layers more"),
        ({"layers": "spread"}, "layers 'spread' is neither one of interleave, stack, top, middle, upper nor a list"),
        ({"multipliers": "both"}, "multipliers is 'both', expected one of preserve, target"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of bfloat16"),
        ({"options": WriteOptions(max_shard_size="5 apples")}, "size '5 apples' is not a positive number of bytes"),
    ],
)
def test_arguments_that_are_refused(arguments, message, source, tmp_path):
    with pytest.raises(ValueError, match=message):
        grow_checkpoint(source, tmp_path / "out", DEEPER, **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "magic"}, "method is 'magic', expected one of zero, tile, mask"),
        ({"name": "zero", "noise": 0.1}, "--noise is for --method tile, not zero"),
        ({"name": "tile", "steps": 9}, "--mask-steps is for --method mask, not tile"),
        ({"name": "tile", "noise": 1.0}, r"noise is 1\.0, expected a number from 0 to below 1"),
        ({"name": "mask", "steps": 0}, "mask_steps is 0, expected at least 1"),
    ],
)
def test_methods_that_are_refused(arguments, message):
    with pytest.raises(CheckpointError, match=message):
        make_method(**arguments)


def _drop(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _add_bias(tensors):
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(32)


def _reshape(tensors):
    tensors["model.norm.weight"] = torch.ones(31)


def _quantise(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, r"model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        (_add_bias, r"q_proj\.bias is not a weight that config\.json describes"),
        (_reshape, r"model\.norm\.weight has shape \(31,\), config.json says \(32,\)"),
        (_quantise, r"is quantised \(lm_head\.weight is int8\); growth would change its weights without their scales"),
    ],
)
def test_unknown_sources_are_refused(damage, message, make_source, tmp_path):
    source = make_source()
    tensors = load_file(source / "model.safetensors")
    damage(tensors)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        grow_checkpoint(source, tmp_path / "out", {"num_hidden_layers": 4})
    assert not (tmp_path / "out").exists()
