# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Megatron's checkpoints become the Hub folder of the model that was trained, however they were split and spelled.

The oracles are the weights that each checkpoint was made of, byte by byte, and the logits of megatron-core itself.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conversion import convert_checkpoint
from conversion.checkpoint.errors import CheckpointError, CorruptData
from modeling_teleflm import TeleFLMConfig
from tests.fixtures.checkpoint_runs import run_teleflm
from tests.fixtures.hostile_pickles import Reduced, harm_done
from tests.fixtures.megatron_files import ITERATION
from tests.fixtures.megatron_reference import VOCAB_SIZE, reference_config, reference_weights
from tests.fixtures.megatron_variants import VARIANTS, Variant, write_variant
from tests.fixtures.megatron_worlds import LAYOUTS, TOKENS, Layout, library_logits, make_checkpoints

ROOT = Path(__file__).parents[2]
real = pytest.mark.skipif(sys.platform != "linux", reason="megatron-core has wheels for Linux only")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """Folder of the checkpoints of `LAYOUTS`, which the first worker of the session to ask writes."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "megatron"
    make_checkpoints(folder)
    return folder


def assert_is_reference(out: Path, made_of: Layout | Variant) -> None:
    """The folder holds the model that a checkpoint was made of: weights and configuration."""
    expected = reference_weights(made_of.model, made_of.dtype)
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    config, expected_config = TeleFLMConfig.from_pretrained(out), reference_config(made_of.model)
    for field in expected_config.to_diff_dict().keys() - {"transformers_version"}:
        assert getattr(config, field) == getattr(expected_config, field), field


@real
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_megatron_core_saves(name, checkpoints, tmp_path):
    convert_checkpoint(
        checkpoints / name, tmp_path / "out", vocab_size=reference_config(LAYOUTS[name].model).vocab_size
    )
    assert_is_reference(tmp_path / "out", LAYOUTS[name])


@real
@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.has_logits])
def test_logits_are_those_of_megatron_core(name, checkpoints, tmp_path):
    convert_checkpoint(
        checkpoints / name, tmp_path / "out", vocab_size=reference_config(LAYOUTS[name].model).vocab_size
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(TOKENS).logits
    torch.testing.assert_close(logits, library_logits(checkpoints, name), rtol=0, atol=1e-5)


@real
def test_the_same_files_however_it_was_split(checkpoints, tmp_path):
    names = [name for name, layout in LAYOUTS.items() if (layout.model, layout.dtype) == ("grouped", torch.bfloat16)]
    assert {"one-rank", "tp2-pp2-vpp2", "dist", "dist-tp2-pp2-vpp2"} <= {*names}
    files = []
    for name in names:
        convert_checkpoint(checkpoints / name, tmp_path / name, vocab_size=VOCAB_SIZE)
        files.append([(tmp_path / name / file).read_bytes() for file in ("model.safetensors", "config.json")])
    for name, written in zip(names, files, strict=True):
        assert written == files[0], name


@pytest.mark.parametrize("name", VARIANTS)
def test_what_older_and_rarer_runs_left(name, tmp_path):
    variant = write_variant(name, tmp_path / "run")
    config = reference_config(variant.model).to_dict() if variant.args is None else None
    convert_checkpoint(tmp_path / "run", tmp_path / "out", config=config, vocab_size=VOCAB_SIZE)
    assert_is_reference(tmp_path / "out", variant)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    write_variant("plain", folder)
    return folder


@pytest.fixture
def run(plain_run, tmp_path) -> Path:
    """A copy of a run with two tensor-parallel ranks and two stages, to damage."""
    return shutil.copytree(plain_run, tmp_path / "run")


@pytest.mark.parametrize(
    ("folder", "options"),
    [(".", {}), (".", {"iteration": ITERATION}), (f"iter_{ITERATION:07d}", {}), (".", {"format": "megatron"})],
    ids=str,
)
def test_ways_to_name_it(folder, options, run, tmp_path):
    (run / "iter_0000200").mkdir()  # interrupted before it was complete, so the tracker does not name it
    convert_checkpoint(run / folder, tmp_path / "out", vocab_size=VOCAB_SIZE, **options)
    assert_is_reference(tmp_path / "out", VARIANTS["plain"])


def test_padding_is_reported(tmp_path):
    write_variant("much-padding", tmp_path / "run")
    result = convert_checkpoint(tmp_path / "run", tmp_path / "out", vocab_size=VOCAB_SIZE)
    assert any("156 rows of padding" in note for note in result.notes)


def test_neither_torch_nor_megatron_is_imported(run, tmp_path):
    script = (
        "import sys; from conversion import convert_checkpoint; "
        f"convert_checkpoint({str(run)!r}, {str(tmp_path / 'out')!r}, vocab_size={VOCAB_SIZE}); "
        "print([name for name in ('torch', 'megatron') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Bad input. Each function damages a run of two tensor-parallel ranks and two stages.


def rank_file(run: Path, tensor: int = 0, stage: int = 0) -> Path:
    return run / f"iter_{ITERATION:07d}" / f"mp_rank_{tensor:02d}_{stage:03d}" / "model_optim_rng.pt"


def edit(run: Path, change: Callable[[dict[str, Any]], object], *places: tuple[int, int]) -> None:
    """Change the content of some ranks' files, or of all."""
    for place in places or [(t, p) for t in range(2) for p in range(2)]:
        content = torch.load(rank_file(run, *place), weights_only=False)
        change(content)
        torch.save(content, rank_file(run, *place))


def lose_a_rank(run: Path) -> None:
    shutil.rmtree(rank_file(run, 1, 1).parent)


def lose_a_file(run: Path) -> None:
    rank_file(run, 1, 0).unlink()


def keep_a_rank_of_another_run(run: Path) -> None:
    shutil.copytree(rank_file(run).parent, rank_file(run, 2, 0).parent)


def keep_a_rank_without_stages(run: Path) -> None:
    folder = rank_file(run).parent
    shutil.copytree(folder, folder.with_name("mp_rank_00"))


def truncate(run: Path) -> None:
    os.truncate(rank_file(run, 0, 1), rank_file(run, 0, 1).stat().st_size * 3 // 4)


def change_a_replica(run: Path) -> None:
    edit(run, lambda content: content["model"]["decoder.layers.1.input_layernorm.weight"].add_(0.25), (1, 0))


def mix_iterations(run: Path) -> None:
    edit(run, lambda content: content.update(iteration=200), (1, 1))


def mix_shapes(run: Path) -> None:
    def widen(content):
        weight = content["model"]["decoder.layers.0.mlp.linear_fc2.weight"]
        content["model"]["decoder.layers.0.mlp.linear_fc2.weight"] = torch.cat([weight, weight], 1)

    edit(run, widen, (1, 0))


def mix_dtypes(run: Path) -> None:
    def to_float(content):
        content["model"]["decoder.final_layernorm.weight"] = content["model"]["decoder.final_layernorm.weight"].float()

    edit(run, to_float, (1, 1))


def lose_a_weight(run: Path) -> None:
    edit(run, lambda content: content["model"].pop("decoder.layers.0.mlp.linear_fc1.weight"), (0, 0), (1, 0))


def lose_a_weight_of_one_rank(run: Path) -> None:
    edit(run, lambda content: content["model"].pop("decoder.layers.0.mlp.linear_fc1.weight"), (1, 0))


def lose_a_replica(run: Path) -> None:
    edit(run, lambda content: content["model"].pop("decoder.final_layernorm.weight"), (1, 1))


def lose_a_layer(run: Path) -> None:
    def drop(content):
        content["model"] = {name: w for name, w in content["model"].items() if ".layers.1." not in name}

    edit(run, drop, (0, 1), (1, 1))


def add_a_weight(run: Path) -> None:
    name = "decoder.layers.0.self_attention.q_layernorm.weight"
    edit(run, lambda content: content["model"].update({name: torch.ones(8, dtype=torch.bfloat16)}), (0, 0), (1, 0))


def name_no_model(run: Path) -> None:
    edit(run, lambda content: content.update(weights=content.pop("model")), (0, 0))


def plant_nan(run: Path) -> None:
    edit(run, lambda content: content["model"]["decoder.layers.1.mlp.linear_fc2.weight"][3, 5].fill_(torch.nan), (1, 1))


def quantize(run: Path) -> None:
    def to_fp8(content):
        weight = content["model"]["decoder.layers.0.mlp.linear_fc2.weight"]
        content["model"]["decoder.layers.0.mlp.linear_fc2.weight"] = weight.to(torch.float8_e4m3fn)

    edit(run, to_fp8)


def copy_of_the_embedding(*shape: int) -> Callable[[Path], None]:
    """The last stage has an embedding too, as multi-token prediction needs it: of zeros, in that shape."""
    copy = {"embedding.word_embeddings.weight": torch.zeros(shape, dtype=torch.bfloat16)}
    return lambda run: edit(run, lambda content: content["model"].update(copy), (0, 1), (1, 1))


def add_experts(run: Path) -> None:
    for tensor in range(2):
        folder = rank_file(run, tensor, 0).parent
        shutil.copytree(folder, folder.with_name(folder.name + "_001"))


def lose_the_iteration(run: Path) -> None:
    (run / "latest_checkpointed_iteration.txt").write_text("300")


def garble_the_tracker(run: Path) -> None:
    (run / "latest_checkpointed_iteration.txt").write_text("soon")


def args(**values: Any) -> Callable[[Path], None]:
    return lambda run: edit(run, lambda content: vars(content["args"]).update(values))


TENSOR = "decoder.layers.0.mlp.linear_fc1.weight"
BAD_RUNS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "a rank is missing": (lose_a_rank, ["2 x pipeline parallel 2 makes 4", "mp_rank_01_001 is missing"]),
    "a file is missing": (lose_a_file, ["mp_rank_01_000", "model_optim_rng.pt"]),
    "a rank is left over": (keep_a_rank_of_another_run, ["makes 4", "mp_rank_02_000 is there too"]),
    "a rank of one stage is left over": (keep_a_rank_without_stages, ["mp_rank_00 and mp_rank_00_000"]),
    "a file is truncated": (truncate, ["mp_rank_00_001/model_optim_rng.pt", "truncated", "copy"]),
    "copies differ": (
        change_a_replica,
        [
            "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight differs by up to 0.25",
            "tensor rank 1, stage 0",
            "--allow-unequal-replicas",
        ],
    ),
    "a copy is missing": (lose_a_replica, ["decoder.final_layernorm.weight", "tensor rank 1 of 2 has none"]),
    "a stage's copy differs": (copy_of_the_embedding(64, 32), ["word_embeddings.weight differs by up to", "stage 1"]),
    "a stage's copy has another shape": (copy_of_the_embedding(32, 32), ["mp_rank_00_001", "(32, 32)", "(64, 32)"]),
    "iterations are mixed": (mix_iterations, ["mp_rank_01_001", "iteration is 200", "is 100"]),
    "shapes are mixed": (mix_shapes, ["mp_rank_01_000", "linear_fc2.weight", "(32, 48)", "(32, 24)"]),
    "dtypes are mixed": (mix_dtypes, ["mp_rank_01_001", "final_layernorm", "float32", "bfloat16"]),
    "a weight is missing": (lose_a_weight, [f"{TENSOR} is missing"]),
    "a weight is missing in a rank": (lose_a_weight_of_one_rank, [TENSOR, "tensor rank 1 of 2 has none"]),
    "a layer is missing": (lose_a_layer, ["holds 3 layers", "num_hidden_layers is 4"]),
    "a weight is left over": (add_a_weight, ["mp_rank_00_000", "decoder.layers.0.self_attention.q_layernorm.weight"]),
    "the model is missing": (name_no_model, ["mp_rank_00_000", "holds args", "`model`"]),
    "weights are in FP8": (quantize, ["decoder.layers.0.mlp.linear_fc2.weight", "float8_e4m3fn", "bfloat16"]),
    "there are experts": (add_experts, ["mp_rank_00_000_001", "expert"]),
    "the iteration is missing": (lose_the_iteration, ["says 300", "iter_0000300", "--iteration"]),
    "the tracker says nothing": (garble_the_tracker, ["latest_checkpointed_iteration.txt", "'soon'"]),
    "args: hidden_size": (args(hidden_size=64), ["(128, 32)", "(100, 64)", "hidden_size 64"]),
    "args: ffn_hidden_size": (args(ffn_hidden_size=96), [TENSOR, "(96, 32)", "(192, 32)"]),
    "args: num_layers": (args(num_layers=5), ["holds 4 layers", "num_hidden_layers is 5"]),
    "args: num_query_groups": (args(num_query_groups=4), ["linear_qkv.weight", "(64, 32)", "(96, 32)"]),
    "args: tensor_model_parallel_size": (args(tensor_model_parallel_size=4), ["makes 8", "mp_rank_03_001"]),
    "args: pipeline_model_parallel_size": (args(pipeline_model_parallel_size=1), ["makes 2", "mp_rank_01_001"]),
    "args: tied": (args(untie_embeddings_and_output_weights=False), ["tied embedding differs by up to"]),
    "args: normalization": (args(normalization="LayerNorm"), ["normalization is 'LayerNorm'", "'RMSNorm'"]),
    "args: rotary_percent": (args(rotary_percent=0.5), ["rotary_percent is 0.5"]),
    "args: num_experts": (args(num_experts=8), ["num_experts is 8"]),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_runs(case, run, tmp_path):
    damage, says = BAD_RUNS[case]
    damage(run)
    assert_refused(run, tmp_path / "out", {"vocab_size": VOCAB_SIZE}, says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, ["128 rows, padding included", "--vocab-size, --tokenizer or --config"]),
        ({"vocab_size": 129}, ["128 rows", "vocab_size is 129"]),
        ({"vocab_size": 100, "iteration": 7}, ["iter_0000007", "iter_0000100"]),
        ({"vocab_size": 100, "format": "torch_dist"}, ["torch_dist", "megatron"]),
        ({"config": {"vocab_size": 100, "hidden_size": 64}}, ["hidden_size is 32", "64 by --config"]),
        ({"config": {"vocab_size": 100, "rms_norm_eps": 1e-5}}, ["rms_norm_eps is 0.0003", "1e-05 by --config"]),
        ({"config": {"vocab_size": 99}, "vocab_size": 100}, ["--vocab-size is 100", "is 99"]),
    ],
    ids=str,
)
def test_bad_options(options, says, plain_run, tmp_path):
    assert_refused(plain_run, tmp_path / "out", options, says)


def assert_refused(run: Path, out: Path, options: Mapping[str, Any], says: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(run, out, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert [text for text in says if text not in message] == [], message
    assert not out.exists()


def test_unequal_copies_can_be_taken(run, tmp_path):
    change_a_replica(run)
    result = convert_checkpoint(run, tmp_path / "out", vocab_size=VOCAB_SIZE, allow_unequal_replicas=True)
    assert any("layer_norm_weight differs" in note for note in result.notes)
    assert_is_reference(tmp_path / "out", VARIANTS["plain"])


def test_values_that_are_not_finite(run, tmp_path):
    plant_nan(run)
    complaint = r"model.layers.3.mlp.down_proj.weight\[3, 29\] is NaN or infinite .* --allow-nonfinite"
    with pytest.raises(CorruptData, match=complaint):
        convert_checkpoint(run, tmp_path / "out", vocab_size=VOCAB_SIZE)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    convert_checkpoint(run, tmp_path / "out", vocab_size=VOCAB_SIZE, allow_nonfinite=True)
    weight = load_file(tmp_path / "out" / "model.safetensors")["model.layers.3.mlp.down_proj.weight"]
    assert weight.isnan().nonzero().tolist() == [[3, 29]]


def test_the_command(run, tmp_path):
    out = tmp_path / "out"
    missing = run_teleflm("convert", run, out, folder=tmp_path)
    assert (missing.returncode, out.exists()) == (2, False)
    assert "--vocab-size" in missing.stderr
    done = run_teleflm("convert", run, out, "--vocab-size", VOCAB_SIZE, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_is_reference(out, VARIANTS["plain"])


def test_nothing_is_executed(run, tmp_path):
    canary = tmp_path / "canary"
    harm = Reduced(os.system, f"touch {canary}")
    edit(run, lambda content: (vars(content["args"]).update(data_path=harm), content.update(rng_state=harm)))
    convert_checkpoint(run, tmp_path / "out", vocab_size=VOCAB_SIZE)
    assert_is_reference(tmp_path / "out", VARIANTS["plain"])
    assert not harm_done(canary)
