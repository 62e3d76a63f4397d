# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Exports to Megatron-LM: megatron-core loads them and computes the same; and back they are what they were."""

import argparse
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conversion import convert_checkpoint, inspect_checkpoint
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import read_manifest
from conversion.exports.export import export_checkpoint
from conversion.exports.megatron import ParallelSizes, exported_tensors
from conversion.exports.pipeline_split import PipelineSplit
from conversion.hub.lineage import lineage_steps
from modeling_teleflm import TeleFLMForCausalLM
from tests.fixtures.checkpoint_runs import contents
from tests.fixtures.megatron_loader import first_args, load_rank_file
from tests.fixtures.megatron_worlds import ROOT, TOKENS
from tests.fixtures.tiny import tiny_config, tiny_model

SOURCES: dict[str, dict[str, Any]] = {
    "grouped": {"num_key_value_heads": 2, "rms_norm_eps": 3e-4},
    "tied": {"tie_word_embeddings": True, "input_mult": 0.5, "output_mult": 0.5, "mup_scale_factor": 1.0},
    "untied by folding": {"tie_word_embeddings": True, "head_dim": 12},
}
GRIDS = {
    "1": ParallelSizes(),
    "tp2": ParallelSizes(tensor=2),
    "tp4": ParallelSizes(tensor=4),
    "pp2": ParallelSizes(pipeline=2),
    "tp2-pp2": ParallelSizes(tensor=2, pipeline=2),
    "pp2-vpp2": ParallelSizes(pipeline=2, virtual=2),
    "tp2-pp2-vpp2": ParallelSizes(tensor=2, pipeline=2, virtual=2),
}
UNEVEN = {
    "tp2-pp2-first-1": ParallelSizes(tensor=2, pipeline=2, layout="first=1"),
    "pp3-embedding-loss": ParallelSizes(pipeline=3, layout="embedding,loss"),
    "pp2-vpp2-listed": ParallelSizes(pipeline=2, virtual=2, layout="E|(t,t|)*1t*2|L"),
    "pp2-head-alone": ParallelSizes(pipeline=2, layout="Et*4|L"),
}
ALL_GRIDS = {**GRIDS, **UNEVEN}
# What megatron-core loads. The rest is compared with these, byte by byte.
LOADED = {
    "grouped": ["1", "tp2", "pp2", "tp2-pp2-vpp2", "tp2-pp2-first-1", "pp3-embedding-loss", "pp2-vpp2-listed"],
    "tied": ["1", "tp2-pp2", "pp2-head-alone"],
    "untied by folding": ["tp2"],
}


def save(folder: Path, dtype: torch.dtype = torch.float32, **fields) -> TeleFLMForCausalLM:
    model = tiny_model(tiny_config(vocab_size=100, num_hidden_layers=4, **fields), dtype=dtype)
    model.save_pretrained(folder)
    return model


def export(source: Path, out: Path, grid: str, **options) -> None:
    sizes = ALL_GRIDS[grid]
    split = {"tp": sizes.tensor, "pp": sizes.pipeline, "vpp": sizes.virtual, "pipeline_layout": sizes.layout}
    export_checkpoint(source, out, to="megatron", **split, **options)


def rank_files(folder: Path, grid: str) -> dict[tuple[int, int], dict[str, Any]]:
    sizes = ALL_GRIDS[grid]
    grid_ranks = itertools.product(range(sizes.tensor), range(sizes.pipeline))
    return {(t, p): load_rank_file(folder, t, p if sizes.pipeline > 1 else None) for t, p in grid_ranks}


# The library.


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Path:
    """Sources, exports of them, and the logits that megatron-core computed with those."""
    folder = tmp_path_factory.mktemp("exports")
    names = []
    for source, grids in LOADED.items():
        save(folder / source, **SOURCES[source])
        for grid in grids:
            names.append(f"{source} {grid}")
            export(folder / source, folder / names[-1], grid, spec="local")
    (folder / "splits.json").write_text(json.dumps([(*case[:3], PipelineSplit(*case).arguments()) for case in SPLITS]))
    command = [sys.executable, "-W", "ignore", "-m", "tests.fixtures.megatron_loader", str(folder), *names]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize(("source", "grid"), [(source, grid) for source in LOADED for grid in LOADED[source]])
def test_the_library_computes_the_same(source, grid, loaded):
    with torch.no_grad():
        expected = TeleFLMForCausalLM.from_pretrained(loaded / source)(TOKENS).logits
    found = torch.load(loaded / f"{source} {grid}.logits.pt")
    assert expected.std() > 0.05
    assert found.shape == (*TOKENS.shape, 128 * ALL_GRIDS[grid].tensor)
    assert (found[..., :100] - expected).abs().max() < 1e-5
    assert not found[..., 100:].any()


# Which layers each stage has.


def sound_or_not(seed: int = 0) -> Iterator[tuple[int, int, int, str | None]]:
    """(layers, stages, chunks, layout) of every kind that Megatron-LM knows, those that cannot be among them."""
    ends = [f"{end}={count}" for end in ("first", "last") for count in (1, 2, 4)]
    known = [None, "embedding", "loss", "embedding,loss", *ends, "first=2,last=1", "last=4,first=2", "first=4,last=4"]
    for layers, stages, chunks in itertools.product((1, 2, 4, 6, 7, 10, 12), (2, 3, 4), (1, 2)):
        yield from ((layers, stages, chunks, layout) for layout in known)
    runs = {"": 0, "t": 1, "tt": 2, "t*3": 3, "(t)*3": 3, "(t*2)*2": 4, "t,t": 2, "t*0": 0, "t*1,2": 12, "(tt)*0t": 1}
    dice = Random(seed)
    for _ in range(400):
        stages, chunks = dice.choice((2, 3)), dice.choice((1, 2))
        pieces = [dice.choice([*runs]) for _ in range(stages * chunks)]
        layers, text = sum(runs[piece] for piece in pieces), f"E{'|'.join(pieces)}L"
        for plain, shorter in (("tt|tt|", "(tt|)*2"), ("||", "|*2"), ("|t*3|", "|(t*3|)*1")):
            text = text.replace(plain, shorter) if dice.random() < 0.5 else text
        cut, fault = dice.randrange(len(text) + 1), dice.choice([""] * 6 + [*"EL|t()*3xm "])
        yield max(1, layers + (dice.random() < 0.1)), stages, chunks, text[:cut] + fault + text[cut:]


SPLITS = [*sound_or_not()]


def own_split(layers: int, stages: int, chunks: int, layout: str | None) -> list[list[Any]] | str:
    try:
        ranges = PipelineSplit(layers, stages, chunks, layout).ranges()
    except CheckpointError as error:
        return str(error)
    return [[*place, [*ranges[place]]] for place in sorted(ranges)]


def test_the_library_splits_layers_the_same(loaded):
    """But for strings of which it multiplies nonsense by zero."""
    found = json.loads((loaded / "splits.found.json").read_text())
    assert len(found) == len(SPLITS)
    kinds = Counter()
    for case, theirs in zip(SPLITS, found, strict=True):
        ours = own_split(*case)
        kinds[isinstance(ours, list), isinstance(theirs, list)] += 1
        if isinstance(ours, list):
            assert ours == theirs, case
        elif isinstance(theirs, list):
            assert "*0" in case[3], (case, theirs, ours)
    assert min(kinds[True, True], kinds[False, False]) > 100
    assert kinds[False, True] < 20
    assert "ZeroDivisionError" in found[SPLITS.index((6, 2, 2, "last=4,first=2"))]


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 64, 95, 140])
@pytest.mark.parametrize(("stages", "chunks"), [(2, 1), (3, 2), (8, 1), (8, 3), (96, 1)])
def test_an_uneven_number_of_layers_is_told_the_way_out(layers, stages, chunks):
    """What the message says is a split, and no other is more even."""
    answer = own_split(layers, stages, chunks, None)
    if layers % (stages * chunks) == 0:
        assert {len(part) for *_, part in answer} == {layers // (stages * chunks)}
        return
    (text,) = re.findall(r"--pipeline-layout '?(\S+?)'? is as even", answer)
    sizes = [len(part) for *_, part in own_split(layers, stages, chunks, text)]
    assert max(sizes) - min(sizes) == 1
    assert sum(sizes) == layers


@pytest.mark.parametrize(
    ("layers", "stages", "chunks", "layout", "message"),
    [
        (140, 8, 1, "first=15", "leaves 125 of 140 layers for the other 7 of --pp 8 stages"),
        (4, 2, 1, "first=4", "leaves 0 of 4 layers"),
        (4, 2, 1, "first=3,last=3", "leaves -2 of 4 layers"),
        (4, 2, 1, "first=0,last=4", "every stage has to have some"),
        (5, 2, 2, "first=1", "gives stage 0 1 layers, which is not a multiple of --vpp 2"),
        (6, 2, 2, "last=4,first=2", "first=2 alone is the same split"),
        (4, 1, 1, "first=4", "--pipeline-layout is first=4, --pp is 1"),
        (4, 2, 1, "embedding", "num_hidden_layers 4 + 1 for embedding is not a multiple of --pp 2 x --vpp 1"),
        (4, 2, 1, "Ett|tt|L", "has 3 chunks, --pp 2 x --vpp 1 makes 2"),
        (4, 2, 1, "Ett|tL", "has 3 layers, num_hidden_layers is 4"),
        (4, 2, 1, "Ett|ttm", "has no layers m"),
        (4, 2, 1, "Ett|tt", "expected one E and one L"),
        (4, 2, 1, "ttE|ttL", "expected E at the begin of the first chunk"),
        (4, 2, 1, "Ettt|*2tL", "has 3 chunks"),
        (4, 2, 1, "E(t*99999)*99999|L", "has 9999800001 layers"),
        (4, 2, 1, "E(t*9999999999)*9|L", "expected first=N,last=N"),
        (4, 2, 1, "first=1,first=3", "expected first=N,last=N"),
        (4, 2, 1, "", "expected first=N,last=N"),
    ],
)
def test_a_split_that_cannot_be(layers, stages, chunks, layout, message):
    assert message in own_split(layers, stages, chunks, layout)


@pytest.mark.parametrize(
    ("layers", "stages", "chunks", "layout"),
    [
        (140, 8, 1, "first=16,last=16"),
        (8, 2, 2, "last=2"),
        (6, 2, 2, "embedding,loss"),
        (6, 2, 2, "Et|(t*2|)*2tL"),
        (8, 2, 2, None),
    ],
)
def test_megatron_lm_reads_the_options_as_the_arguments(layers, stages, chunks, layout):
    """By a parser of its own, and the rules by which it finds the number of chunks (core_v0.16.1, `validate_args`)."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--num-virtual-stages-per-pipeline-rank", type=int)
    for name in ("account-for-embedding-in-pipeline-split", "account-for-loss-in-pipeline-split"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--pipeline-model-parallel-layout")
    split = PipelineSplit(layers, stages, chunks, layout)
    said = vars(parser.parse_args(shlex.split(split.options())))
    arguments = split.arguments()
    per_chunk = arguments.pop("num_layers_per_virtual_pipeline_stage")  # taken from the checkpoint
    assert {name: value for name, value in said.items() if value} == {k: v for k, v in arguments.items() if v}
    ways = [said["num_virtual_stages_per_pipeline_rank"], per_chunk, said["pipeline_model_parallel_layout"]]
    assert sum(way is not None for way in ways) == (1 if chunks > 1 else layout is not None and "E" in layout)
    if per_chunk:
        counted = layers + said["account_for_embedding_in_pipeline_split"] + said["account_for_loss_in_pipeline_split"]
        assert counted // stages // per_chunk == chunks


# Every rank's part, by its definition.


def expected_part(weights: dict[str, Tensor], grid: ParallelSizes, rank: int, layer: int) -> dict[str, Tensor]:
    """One rank's part of a layer, by the names of Transformer Engine."""
    w = {name.removeprefix(f"model.layers.{layer}."): tensor for name, tensor in weights.items()}
    q, k, v = (w[f"self_attn.{x}_proj.weight"].unflatten(0, (-1, 8)) for x in "qkv")
    groups = range(rank * len(k) // grid.tensor, (rank + 1) * len(k) // grid.tensor)
    size = len(q) // len(k)
    heads = [head for g in groups for head in (*q[g * size : (g + 1) * size], k[g], v[g])]
    gate, up = (w[f"mlp.{x}_proj.weight"].chunk(grid.tensor)[rank] for x in ("gate", "up"))
    return {
        "self_attention.linear_qkv.layer_norm_weight": w["input_layernorm.weight"],
        "self_attention.linear_qkv.weight": torch.cat(heads),
        "self_attention.linear_proj.weight": w["self_attn.o_proj.weight"].chunk(grid.tensor, 1)[rank],
        "mlp.linear_fc1.layer_norm_weight": w["post_attention_layernorm.weight"],
        "mlp.linear_fc1.weight": torch.cat([gate, up]),
        "mlp.linear_fc2.weight": w["mlp.down_proj.weight"].chunk(grid.tensor, 1)[rank],
    }


def padded(tensor: Tensor, grid: ParallelSizes, rank: int) -> Tensor:
    rows = torch.zeros(128 * grid.tensor, tensor.shape[1], dtype=tensor.dtype)
    rows[: len(tensor)] = tensor
    return rows.chunk(grid.tensor)[rank]


# Layers of (stage, chunk) for four layers, as Megatron's interleaved schedule places them.
PLACES = {
    (1, 1, None): {(0, 0): [0, 1, 2, 3]},
    (2, 1, None): {(0, 0): [0, 1], (1, 0): [2, 3]},
    (2, 2, None): {(0, 0): [0], (1, 0): [1], (0, 1): [2], (1, 1): [3]},
    (2, 1, "first=1"): {(0, 0): [0], (1, 0): [1, 2, 3]},
    (3, 1, "embedding,loss"): {(0, 0): [0], (1, 0): [1, 2], (2, 0): [3]},
    (2, 2, "E|(t,t|)*1t*2|L"): {(0, 0): [], (1, 0): [0, 1], (0, 1): [2, 3], (1, 1): []},
    (2, 1, "Et*4|L"): {(0, 0): [0, 1, 2, 3], (1, 0): []},
}


@pytest.mark.parametrize("source", [{"num_key_value_heads": 4}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("grid", ALL_GRIDS)
def test_every_rank_has_its_part(grid, source, tmp_path):
    save(tmp_path / "source", torch.bfloat16, **source)
    weights = load_file(tmp_path / "source/model.safetensors")
    export(tmp_path / "source", tmp_path / "out", grid, multipliers="keep")
    sizes, head = ALL_GRIDS[grid], weights.get("lm_head.weight")
    for (rank, stage), content in rank_files(tmp_path / "out", grid).items():
        for chunk in range(sizes.virtual):
            layers = PLACES[sizes.pipeline, sizes.virtual, sizes.layout][stage, chunk]
            first, last = (stage, chunk) == (0, 0), (stage, chunk) == (sizes.pipeline - 1, sizes.virtual - 1)
            expected = {}
            if first:
                expected["embedding.word_embeddings.weight"] = padded(weights["model.embed_tokens.weight"], sizes, rank)
            for number, layer in enumerate(layers):
                part = expected_part(weights, sizes, rank, layer)
                expected |= {f"decoder.layers.{number}.{name}": tensor for name, tensor in part.items()}
            if last:
                expected["decoder.final_layernorm.weight"] = weights["model.norm.weight"]
            if last and (head is not None or sizes.pipeline > 1):
                last = weights["model.embed_tokens.weight"] if head is None else head
                expected["output_layer.weight"] = padded(last, sizes, rank)
            state = content["model" if sizes.virtual == 1 else f"model{chunk}"]
            found = {name: tensor for name, tensor in state.items() if not name.endswith("_extra_state")}
            assert list(found) == list(expected)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            extra = {name for name in state if name.endswith("_extra_state")}
            assert len(extra) == 4 * len(layers)
            assert not any(state[name] is not None for name in extra)


def test_the_two_specs_differ_in_names_alone(tmp_path):
    save(tmp_path / "source")
    states = []
    for spec in ("te", "local"):
        export(tmp_path / "source", tmp_path / spec, "1", spec=spec)
        state = load_rank_file(tmp_path / spec, 0, None)["model"]
        states.append({name: tensor for name, tensor in state.items() if tensor is not None})
    te, local = states
    assert all(torch.equal(a, b) for a, b in zip(te.values(), local.values(), strict=True))
    assert {name for name in te if name not in local} == {
        f"decoder.layers.{layer}.{name}.layer_norm_weight"
        for layer in range(4)
        for name in ("self_attention.linear_qkv", "mlp.linear_fc1")
    }
    assert {name for name in local if name not in te} == {
        f"decoder.layers.{layer}.{name}.weight"
        for layer in range(4)
        for name in ("input_layernorm", "pre_mlp_layernorm")
    }


def test_arguments(tmp_path):
    save(tmp_path / "source", torch.bfloat16, num_key_value_heads=2)
    export(tmp_path / "source", tmp_path / "fold", "tp2-pp2-vpp2")
    export(tmp_path / "source", tmp_path / "keep", "tp2", multipliers="keep")
    fold, keep = first_args(tmp_path / "fold"), first_args(tmp_path / "keep")
    assert (
        vars(keep).items() >= {"use_mup": True, "input_mult": 2.5, "output_mult": 0.5, "mup_scale_factor": 4.0}.items()
    )
    assert not vars(fold).keys() & {"use_mup", "input_mult", "output_mult", "mup_scale_factor"}
    assert (
        vars(fold).items()
        >= {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "vocab_size": 100,
            "padded_vocab_size": 256,
            "make_vocab_size_divisible_by": 128,
            "params_dtype": torch.bfloat16,
            "rotary_base": 10000,
            "group_query_attention": True,
            "num_query_groups": 2,
        }.items()
    )
    assert keep.virtual_pipeline_model_parallel_size is None
    content = load_rank_file(tmp_path / "keep", 1, None)
    assert (content["checkpoint_version"], content["iteration"]) == (3.0, 0)


# There and back.


@pytest.mark.parametrize("config_beside", [True, False], ids=["config.json beside", "arguments alone"])
@pytest.mark.parametrize("spec", ["te", "local"])
@pytest.mark.parametrize("grid", GRIDS)
def test_hub_to_native_to_hub(grid, spec, config_beside, tmp_path):
    """Kept multipliers come back from the arguments; weights and configuration are the same bytes."""
    save(tmp_path / "source", torch.bfloat16)
    convert_checkpoint(tmp_path / "source", tmp_path / "hub")
    export(tmp_path / "hub", tmp_path / "run", grid, multipliers="keep", spec=spec)
    if not config_beside:
        (tmp_path / "run/config.json").unlink()
    convert_checkpoint(tmp_path / "run", tmp_path / "back", vocab_size=100)
    before, after = contents(tmp_path / "hub"), contents(tmp_path / "back")
    assert after["model.safetensors"] == before["model.safetensors"]
    there, here = json.loads(before["config.json"]), json.loads(after["config.json"])
    assert here.items() <= there.items()
    if config_beside:
        assert after["config.json"] == before["config.json"]


@pytest.mark.parametrize("multipliers", ["keep", "fold"])
def test_native_to_hub_to_native_to_hub(multipliers, tmp_path):
    """From any grid to any other, no byte changes; uneven ones too."""
    save(tmp_path / "source", torch.bfloat16)
    export(tmp_path / "source", tmp_path / "run", "tp2-pp2-vpp2", multipliers=multipliers)
    hubs = []
    for number, grid in enumerate(("tp4", *UNEVEN, "tp2-pp2-vpp2")):
        hubs.append(tmp_path / f"hub{number}")
        convert_checkpoint(tmp_path / "run", hubs[-1])
        export(hubs[-1], tmp_path / f"run{number}", grid, multipliers="keep")
        convert_checkpoint(tmp_path / f"run{number}", tmp_path / f"back{number}")
        for name in ("model.safetensors", "config.json"):
            assert (hubs[-1] / name).read_bytes() == (tmp_path / f"back{number}" / name).read_bytes()
    again = contents(tmp_path / f"run{len(hubs) - 1}")
    assert {name: data for name, data in contents(tmp_path / "run").items() if "manifest" not in name} == {
        name: again[name] for name in again if "manifest" not in name
    }


def test_folded_is_what_llama_gets(tmp_path):
    save(tmp_path / "source", torch.bfloat16)
    export_checkpoint(tmp_path / "source", tmp_path / "llama", to="llama")
    export(tmp_path / "source", tmp_path / "run", "tp2-pp2")
    convert_checkpoint(tmp_path / "run", tmp_path / "back")
    for folder in ("llama", "back"):
        assert inspect_checkpoint(tmp_path / folder, check=True).damages == []
    assert contents(tmp_path / "llama")["model.safetensors"] == contents(tmp_path / "back")["model.safetensors"]


def test_the_record_and_the_digests_of_every_rank(tmp_path):
    """Also of what is made from it; a run that was trained from it has none."""
    save(tmp_path / "source")
    export(tmp_path / "source", tmp_path / "run", "tp2-pp2-vpp2", multipliers="keep")
    found = inspect_checkpoint(tmp_path / "run", check=True)
    assert (found.damages, found.problems) == ([], [])
    exported = "Exported to megatron, tensor parallel 2, 2 stages of 2 chunks."
    assert found.lineage == ["A checkpoint without a record of its own.", exported]
    convert_checkpoint(tmp_path / "run", tmp_path / "back")
    assert inspect_checkpoint(tmp_path / "back").lineage[1] == exported
    (tmp_path / "run/release").rename(tmp_path / "run/iter_0000100")
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("100")
    trained = inspect_checkpoint(tmp_path / "run", check=True)
    assert (trained.lineage, trained.damages) == ([], None)
    (tmp_path / "run/iter_0000100").rename(tmp_path / "run/release")
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("release")
    file = tmp_path / "run/release/mp_rank_01_001/model_optim_rng.pt"
    weight = exported_tensors(tmp_path / "run")["mp_rank_01_001/model1/output_layer.weight"]
    data = bytearray(file.read_bytes())
    data[weight.offset] ^= 1
    file.write_bytes(data)
    (damage,) = inspect_checkpoint(tmp_path / "run", check=True).damages
    assert damage.tensor == "mp_rank_01_001/model1/output_layer.weight"
    assert (damage.file, damage.reason) == ("release/mp_rank_01_001/model_optim_rng.pt", "does not have its digest")


@pytest.mark.parametrize("to", ["megatron", "torch_dist"])
def test_the_epsilon_that_is_printed_is_the_models(to, tmp_path):
    """Growth leaves no round one, and a run with another is another model, which is refused where it is converted."""
    save(tmp_path / "source", rms_norm_eps=1e-5 / 1.5)
    result = export_checkpoint(tmp_path / "source", tmp_path / "out", to=to)
    [printed] = re.findall(r"--norm-epsilon (\S+)", " ".join(result.notes))
    assert float(printed.rstrip(".")) == 1e-5 / 1.5


@pytest.mark.parametrize("to", ["megatron", "torch_dist"])
@pytest.mark.parametrize(("most", "few"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_weights_of_another_dtype_are_not_rounded_without_a_word(most, few, to, tmp_path):
    """Norms in float32 beside matrices in bfloat16 are no rare sight; Megatron has one dtype for all."""
    save(tmp_path / "source", most)
    file = tmp_path / "source/model.safetensors"
    tensors = load_file(file)
    tensors = {name: weight.to(few) * (1.001 if "norm" in name else 1) for name, weight in tensors.items()}
    tensors = {name: weight if "norm" in name else weight.to(most) for name, weight in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
    notes = " ".join(export_checkpoint(tmp_path / "source", tmp_path / "run", to=to, multipliers="keep").notes)
    convert_checkpoint(tmp_path / "run", tmp_path / "back", vocab_size=100)
    back = load_file(tmp_path / "back/model.safetensors")
    equal = all(torch.equal(back[name].double(), weight.double()) for name, weight in tensors.items())
    assert equal == (most == torch.float32)
    assert ("9 weights that are float32 are rounded to bfloat16" in notes) == (not equal)
    assert ("9 weights that are bfloat16 are float32 as the embedding is, with the same values." in notes) == equal
    cast = export_checkpoint(tmp_path / "source", tmp_path / "cast", to=to, multipliers="keep", dtype="float32")
    assert "9 weights" not in " ".join(cast.notes)


def test_the_notes(tmp_path):
    save(tmp_path / "source")
    keep = export_checkpoint(tmp_path / "source", tmp_path / "keep", to="megatron", tp=2, multipliers="keep")
    assert keep.notes == [
        "The multipliers 2.5 on the embeddings and 0.125 on the logits are in the arguments only; a stock Megatron-LM "
        "ignores them and computes another function.",
        "156 rows of zeros follow the 100 of the vocabulary.",
        "Megatron-LM: --load OUT --use-checkpoint-args --use-mp-args-from-checkpoint-args --ckpt-format torch "
        "--norm-epsilon 1e-05.",
    ]
    fold = export_checkpoint(tmp_path / "source", tmp_path / "fold", to="megatron", pp=2, vpp=2, dtype="bfloat16")
    assert "lm_head.weight was multiplied by 0.125: a power of two" in " ".join(fold.notes)
    uneven = export_checkpoint(
        tmp_path / "source", tmp_path / "uneven", to="megatron", pp=2, vpp=2, pipeline_layout="Et|(t|)*2tL"
    )
    assert uneven.notes[-2:] == [
        "Megatron-LM: --load OUT --use-checkpoint-args --use-mp-args-from-checkpoint-args "
        "--pipeline-model-parallel-layout 'Et|(t|)*2tL' --ckpt-format torch --norm-epsilon 1e-05.",
        "Of these, --pipeline-model-parallel-layout 'Et|(t|)*2tL' are not taken from the arguments in the files: a run "
        "needs them each time.",
    ]
    folders = ("keep", "fold", "uneven")
    steps = [lineage_steps(read_manifest(tmp_path / folder)["lineage"])[-1] for folder in folders]
    assert steps == [
        "Exported to megatron, tensor parallel 2, 1 stage.",
        "Exported to megatron, tensor parallel 1, 2 stages of 2 chunks, the multipliers folded into embeddings and "
        "head, cast to bfloat16.",
        "Exported to megatron, tensor parallel 1, 2 stages of 2 chunks, layers split by Et|(t|)*2tL, the multipliers "
        "folded into embeddings and head.",
    ]
