# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The numbers that `verify` judges by, against transformers; its verdicts, its report, and the command."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import evaluation.streamed_model as forward
import growth.verification.comparison as comparison
import tests.growth.test_growth as growth_tests
from conversion import convert_checkpoint
from conversion.architecture import Architecture
from conversion.checkpoint.dtypes import parse_dtype
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import MANIFEST
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.sources import open_checkpoint
from conversion.mapping import weights
from evaluation.logit_comparison import LogitComparer
from evaluation.logits import _logits, checkpoint_logits, compare_logits
from evaluation.streamed_model import StreamedModel
from growth import Verification, grow_checkpoint, verify_checkpoints
from growth.method import Tile, Zero
from growth.verification.comparison import compare_numbers
from modeling_teleflm import TeleFLMForCausalLM
from teleflm.reports.verification import Origin, describe, write_report
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_sentencepiece

ROOT = Path(__file__).parents[2]
MUTANTS = growth_tests.test_mutants_are_caught.pytestmark[0].args[1]
ALL_AXES, GROUPED, heads = growth_tests.ALL_AXES, growth_tests.GROUPED, growth_tests.heads
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
IDS = np.random.default_rng(0).integers(0, 600, 48)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def make_source(tmp_path_factory) -> Callable[..., Path]:
    def make(dtype: str = "float64", **fields) -> Path:
        folder = tmp_path_factory.mktemp("source")
        tiny_model(tiny_config(**fields), dtype=DTYPES[dtype]).save_pretrained(folder)
        (folder / "tokenizer.model").write_bytes(tiny_sentencepiece())
        return folder

    return make


@pytest.fixture(scope="module")
def grown(make_source, tmp_path_factory) -> tuple[Path, Path]:
    """A float64 source and its growth along every axis."""
    source, out = make_source(), tmp_path_factory.mktemp("grown") / "out"
    grow_checkpoint(source, out, ALL_AXES)
    return source, out


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("The value of a subscription is the item that the key selects. " * 20)
    return file


# The streamed forward pass, against transformers.


def streamed_logits(folder: Path, dtype: str, ids: np.ndarray = IDS, rows: int = 100) -> np.ndarray:
    with FileReader() as reader, ThreadPoolExecutor(2) as pool:
        model = StreamedModel(open_checkpoint(folder), parse_dtype(dtype), reader, pool)
        *_, last = model.hidden_states(ids)
        return np.concatenate(list(model.logits(last, rows)), axis=1)


@contextmanager
def exact_rotary():
    """Transformers computes the angles in float32 whatever the model's dtype."""

    def angles(rotary, x, position_ids):
        inverse = rotary.config.rope_parameters["rope_theta"] ** -(torch.arange(0, 8, 2, dtype=x.dtype) / 8)
        turned = torch.cat([position_ids[..., None].to(x.dtype) * inverse] * 2, -1)
        return turned.cos(), turned.sin()

    with mock.patch.object(LlamaRotaryEmbedding, "forward", angles):
        yield


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_mup": False},
        GROUPED,
        growth_tests.TIED,
        {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}},
    ],
    ids=["plain", "without muP", "grouped", "tied", "fast rotation"],
)
def test_streamed_forward_is_transformers(fields, make_source):
    folder = make_source(**fields)
    stock = tiny_model(tiny_config(**fields), dtype=torch.float64)
    with exact_rotary(), torch.no_grad():
        expected = _logits(stock, torch.from_numpy(IDS)[None], torch.float64)
    scale = expected.abs().max().item()
    np.testing.assert_allclose(streamed_logits(folder, "float64"), expected[0], rtol=0, atol=1e-14 * scale)
    with torch.no_grad():
        single = tiny_model(tiny_config(**fields))(torch.from_numpy(IDS)[None]).logits[0]
    np.testing.assert_allclose(streamed_logits(folder, "float32"), single, rtol=0, atol=2e-6 * scale)


def test_streamed_bfloat16_rounds_as_transformers_does(make_source):
    """Not the same roundings, as matrix products differ, but as many and as large."""
    folder = make_source("bfloat16")
    exact, ours = (streamed_logits(folder, dtype) for dtype in ("float64", "bfloat16"))
    theirs = checkpoint_logits(open_checkpoint(folder), IDS, "bfloat16")
    noise, expected = (np.sqrt(np.square(logits - exact).mean()) for logits in (ours, theirs))
    assert 0.8 < noise / expected < 1.25


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_loaded_forward_is_this_projects_model(dtype, make_source):
    folder = make_source(dtype, **GROUPED)
    with torch.no_grad():
        expected = growth_tests.load(folder)(torch.from_numpy(IDS)[None]).logits[0]
    logits = checkpoint_logits(open_checkpoint(folder), IDS, dtype)
    np.testing.assert_allclose(logits, expected.double(), rtol=0, atol=1e-6 if dtype == "float64" else 0)


def test_row_blocks_change_nothing(make_source, monkeypatch):
    folder = make_source(**GROUPED)
    whole = streamed_logits(folder, "float64", rows=10_000)
    monkeypatch.setattr(forward, "BLOCK", 500)  # less than one row of some weights
    np.testing.assert_allclose(streamed_logits(folder, "float64", rows=7), whole, rtol=0, atol=1e-15)


def test_comparer_sums_up_what_numpy_computes_at_once():
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 9, 100))
    second[:, :30] = first[:, :30]
    comparer = LogitComparer(9)
    for start, stop in ((60, 100), (0, 30), (30, 60)):  # in any order
        comparer.add(start, first[:, start:stop], second[:, start:stop])
    result, difference = comparer.result(), np.abs(first - second)
    assert result.max_difference == difference.max()
    assert result.rms_difference == pytest.approx(np.sqrt(np.square(difference).mean()), rel=1e-14)
    assert result.max_logit == np.abs(first).max()
    assert result.same_argmax == (first.argmax(1) == second.argmax(1)).mean()
    assert result.histogram[0] == 9 * 30
    assert sum(result.histogram) == 900


# Verdicts.


@pytest.mark.parametrize("way", ["loaded", "streamed"])
@pytest.mark.parametrize("compute", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float64", "bfloat16"])
def test_growth_is_accepted_by_its_numbers(stored, compute, way, make_source, text, tmp_path):
    source = make_source(stored)
    grow_checkpoint(source, tmp_path / "out", ALL_AXES)
    settings = {"text": text, "dtype": compute, "forward": way, "max_tokens": 64}
    verification = verify_checkpoints(source, tmp_path / "out", growth=False, **settings)
    numbers = verification.numbers
    assert (verification.verdict, verification.same) == ("indistinguishable", None)
    assert "is not proven" in verification.sentence
    assert numbers.difference.tokens == 64
    if (stored, compute) == ("float64", "float64"):
        assert numbers.difference.relative < 1e-14
    else:
        assert numbers.difference.rms_difference > 0.1 * numbers.floor.rms_difference


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_fail_by_their_numbers(mutant, make_source, tmp_path, monkeypatch):
    source = make_source(**GROUPED)
    target = {**heads(12, 3), "num_hidden_layers": 4, "intermediate_size": 96, "output_mult": 0.3}
    mutant(monkeypatch)
    grow_checkpoint(source, tmp_path / "bad", target, multipliers="target")
    a, b = open_checkpoint(source), open_checkpoint(tmp_path / "bad")
    for way in ("loaded", "streamed"):
        for dtype in ("float64", "float32"):
            assert not compare_numbers(a, b, IDS, dtype=dtype, forward=way).within_rounding, (way, dtype)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_a_number_is_not_the_same(grown, tmp_path):
    out = shutil.copytree(grown[1], tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    tensors["lm_head.weight"][100, 0] = torch.nan
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for way in ("loaded", "streamed"):
        numbers = compare_numbers(open_checkpoint(grown[0]), open_checkpoint(out), IDS, forward=way)
        assert not numbers.within_rounding
        described = json.dumps(describe(Verification(verify_checkpoints(grown[0], out).certificate, numbers)))
        assert json.loads(described, parse_constant=pytest.fail)["numbers"]["difference"]["max_difference"] == "nan"


def test_both_ways_agree(grown, text):
    loaded, streamed = (verify_checkpoints(*grown, text=text, forward=way).numbers for way in ("loaded", "streamed"))
    assert streamed.floor.rms_difference == pytest.approx(loaded.floor.rms_difference, rel=0.2)
    assert streamed.difference.max_logit == pytest.approx(loaded.difference.max_logit, rel=1e-6)
    models = [growth_tests.load(folder) for folder in grown]
    known = compare_logits(*models, torch.from_numpy(IDS)[None])
    numbers = compare_numbers(*map(open_checkpoint, grown), IDS, forward="streamed")
    assert numbers.difference.max_logit == pytest.approx(known.max_logit, rel=1e-6)
    assert numbers.difference.relative < 1e-12 > known.relative


def test_layer_by_layer_shows_where_it_went_wrong(grown, tmp_path):
    a, out = open_checkpoint(grown[0]), shutil.copytree(grown[1], tmp_path / "out")
    good = compare_numbers(a, open_checkpoint(out), IDS, forward="streamed").layers
    assert [(layer.source, layer.is_copy) for layer in good] == [
        (0, False),
        (1, False),
        (1, True),
        (2, False),
        (2, True),
    ]
    assert all(layer.difference < 1e-14 for layer in good)
    assert [layer.distance is None for layer in good] == [layer.is_copy for layer in good]
    model = tiny_model(dtype=torch.float64)
    with torch.no_grad():
        states = model(torch.from_numpy(IDS)[None], output_hidden_states=True).hidden_states
    cosine = torch.nn.functional.cosine_similarity(states[0], states[1], dim=-1).mean()
    assert good[0].distance == pytest.approx(1 - cosine.item(), rel=1e-5)

    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3, 4] = 1e-6
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    bad = compare_numbers(a, open_checkpoint(out), IDS, forward="streamed")
    assert not bad.within_rounding
    assert [layer.difference > 1e-12 for layer in bad.layers] == [False, False, True, True, True]


def test_models_of_other_sizes_are_compared_all_the_same(make_source):
    """Without a record, layers cannot be paired; logits can."""
    deep, narrow = make_source(num_hidden_layers=5), make_source(**heads(2, 2))
    for other in (deep, narrow):
        numbers = compare_numbers(open_checkpoint(make_source()), open_checkpoint(other), IDS, forward="streamed")
        assert not numbers.within_rounding
        assert numbers.layers == ()


# Faults that rounding hides from the numbers: what is said must not be that nothing is wrong.


@pytest.fixture(scope="module")
def rounded(make_source, tmp_path_factory) -> tuple[Path, Path]:
    """A bfloat16 source and its growth in width, whose norms are no longer the source's bytes."""
    source, out = make_source("bfloat16"), tmp_path_factory.mktemp("grown") / "out"
    grow_checkpoint(source, out, ALL_AXES)
    return source, out


def _edit_config(**changes):
    def fault(out: Path) -> None:
        config = json.loads((out / "config.json").read_text())
        changed = {key: change(config[key]) for key, change in changes.items()}
        (out / "config.json").write_text(json.dumps({**config, **changed}))

    return fault


def _edit_weights(change):
    def fault(out: Path) -> None:
        tensors = load_file(out / "model.safetensors")
        change(tensors)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    return fault


def _noise(tensors) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in list(tensors)[::2]:
        noise = 1 + 0.004 * torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64)
        tensors[name] = (tensors[name].double() * noise).to(tensors[name].dtype)


def _flip_a_bit(tensors) -> None:
    weight = tensors["model.layers.0.self_attn.q_proj.weight"]
    weight.view(torch.int16 if weight.itemsize == 2 else torch.int32)[0, 0] ^= 1


FAULTS = {
    "eps x 1.25": _edit_config(rms_norm_eps=lambda eps: eps * 1.25),
    "eps x 6": _edit_config(rms_norm_eps=lambda eps: eps * 6),
    "rope theta": _edit_config(rope_parameters=lambda rope: {**rope, "rope_theta": rope["rope_theta"] * 1.01}),
    "output_mult": _edit_config(output_mult=lambda mult: mult * 1.001),
    "noise of 0.4 %": _edit_weights(_noise),
    "one bit": _edit_weights(_flip_a_bit),
}


@pytest.mark.parametrize("with_text", [False, True], ids=["bytes", "bytes and text"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["growth", "copy"])
def test_a_fault_below_the_rounding_changes_the_verdict(kind, fault, with_text, rounded, text, tmp_path):
    source = rounded[0]
    out = shutil.copytree(rounded[1] if kind == "growth" else source, tmp_path / "out")
    settings = {"text": text, "max_tokens": 64} if with_text else {}
    before = verify_checkpoints(source, out, **settings)
    assert before.verdict == ("certified" if kind == "growth" else "same-bytes")
    FAULTS[fault](out)
    after = verify_checkpoints(source, out, **settings)
    assert after.same is False
    assert after.verdict in ("not-certified", "different")
    assert after.sentence != before.sentence
    assert not after.certificate.holds


def _config_of(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
CONFIGURATIONS = {
    "an older spelling beside the new one": (
        {},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        "rope_parameters",
    ),
    "positions that the rotary embedding depends on": (
        {"rope_parameters": YARN, "max_position_embeddings": 256},
        {"rope_parameters": YARN, "max_position_embeddings": 64},
        "max_position_embeddings",
    ),
    "quantised": ({}, {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
    "a field that nobody knows": ({}, {"attention_temperature": 2.0}, "attention_temperature"),
    "no activation": ({}, {"hidden_act": None}, "hidden_act"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_that_means_something_else(name, make_source, tmp_path):
    """Over the same bytes; what transformers makes of each is not asked, only that it is not called the same."""
    ours, theirs, field = CONFIGURATIONS[name]
    a, b = (shutil.copytree(make_source(), tmp_path / letter) for letter in "ab")
    _config_of(a, **ours)
    _config_of(b, **theirs)
    result = verify_checkpoints(a, b)
    assert result.verdict == "not-certified"
    assert field in [condition.field for condition in result.certificate.broken_fields]


def test_an_adapter_in_the_folder_is_not_overlooked(make_source, tmp_path):
    source, out = make_source(), shutil.copytree(make_source(), tmp_path / "b")
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: transformers applies this adapter"):
        verify_checkpoints(source, out)


def test_a_record_buys_no_tolerance(rounded, tmp_path):
    """Growths that grow nothing would each allow for another rounding."""
    source, out = rounded[0], shutil.copytree(rounded[1], tmp_path / "out")
    record = json.loads((out / MANIFEST).read_text())
    for _ in range(6):
        step = {**record["lineage"], "source": record["lineage"]["target"]}
        step["layers"] = [{"source": i, "copy": False} for i in range(len(record["lineage"]["layers"]))]
        record["lineage"] = {**step, "parent": {"plan": "", "lineage": record["lineage"]}}
    (out / MANIFEST).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"grows nothing|certify each beside the model"):
        verify_checkpoints(source, out)


def test_large_copies_that_cancel_are_no_rounding(make_source, tmp_path):
    source, out = make_source("bfloat16"), tmp_path / "out"
    grow_checkpoint(source, out, {"hidden_size": 64, "num_attention_heads": 8}, method=Tile(0.3))
    assert verify_checkpoints(source, out).verdict == "certified"
    tensors = load_file(out / "model.safetensors")
    for name in list(tensors):
        if name.endswith(("q_proj.weight", "k_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensors[name][:, :32], tensors[name][:, 32:] = 1000.0, -1000.0
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert verify_checkpoints(source, out).verdict == "not-certified"


def test_what_underflows_is_no_rounding(make_source, tmp_path):
    """Each product is correctly rounded, to zero."""
    source = make_source("float32", output_mult=1e8)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] *= 1e-8
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    grow_checkpoint(source, tmp_path / "out", {"num_hidden_layers": 4}, dtype="float16")
    result = verify_checkpoints(source, tmp_path / "out")
    assert result.verdict == "not-certified"
    assert result.certificate.violations[0].tensor == "lm_head.weight"


def test_a_factor_that_rounding_undid_in_a_wider_source(make_source, tmp_path):
    """A in float32 with values of bfloat16, B in bfloat16 with the same values and another multiplier."""
    source, out = make_source("bfloat16"), tmp_path / "out"
    wide = shutil.copytree(source, tmp_path / "wide")
    tensors = load_file(wide / "model.safetensors")
    save_file({k: v.float() for k, v in tensors.items()}, wide / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(source, out)
    assert verify_checkpoints(wide, out).verdict == "certified"
    _config_of(out, output_mult=0.5 * 1.0019)
    assert verify_checkpoints(wide, out).verdict == "not-certified"


def test_tied_beside_untied(make_source):
    tied, untied = make_source(**growth_tests.TIED), make_source()
    for a, b in ((tied, untied), (untied, tied)):
        assert verify_checkpoints(a, b).verdict == "not-certified"


def test_a_head_of_zeros(make_source, text, tmp_path):
    a = shutil.copytree(make_source(), tmp_path / "a")
    tensors = load_file(a / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] * 0}, a / "model.safetensors")
    b = shutil.copytree(a, tmp_path / "b")
    result = verify_checkpoints(a, b, text=text, growth=False, max_tokens=16)
    assert (result.verdict, result.numbers.blind_to) == ("indistinguishable", 0.0)


@pytest.mark.parametrize("fault", ["eps x 1.25", "noise of 0.4 %"])
def test_numbers_alone_prove_nothing(fault, rounded, text, tmp_path):
    """Without the record, a deeper model has no certificate; the numbers miss these faults, and say what they miss."""
    source, out = rounded[0], shutil.copytree(rounded[1], tmp_path / "out")
    (out / "teleflm_manifest.json").unlink()
    FAULTS[fault](out)
    result = verify_checkpoints(source, out, text=text, max_tokens=64)
    assert (result.verdict, result.same) == ("indistinguishable", None)
    assert re.search(
        r"Indistinguishable at bfloat16 rounding on 64 tokens\. Errors of the logits up to", result.sentence
    )
    assert "is not proven" in result.sentence
    assert any("No certificate from the bytes: B has no record" in note for note in result.notes)
    missed = result.numbers.difference.rms_difference
    assert missed <= result.numbers.blind_to
    with pytest.raises(CheckpointError, match="which are copies is unknown"):
        verify_checkpoints(source, out, growth=True, text=text)


def test_the_blind_spot_is_what_the_numbers_miss(rounded, text, tmp_path):
    """An error just above it is seen: it is not an understatement."""
    source, out = rounded[0], shutil.copytree(rounded[0], tmp_path / "out")
    settings = {"text": text, "max_tokens": 64, "growth": False}
    limit = verify_checkpoints(source, out, **settings).numbers
    share = limit.blind_to / (checkpoint_logits(open_checkpoint(source), IDS, "float64").std())
    for times, verdict in ((0.5, "indistinguishable"), (2.0, "different")):
        out = shutil.copytree(rounded[0], tmp_path / str(times))
        _edit_config(output_mult=lambda mult, times=times: mult * (1 + times * share))(out)
        assert verify_checkpoints(source, out, **settings).verdict == verdict


def test_a_smaller_model_beside_a_larger_one(grown, text):
    """The other way round no certificate can be stated; the numbers say what numbers can."""
    result = verify_checkpoints(*reversed(grown), text=text, max_tokens=64)
    assert result.verdict == "indistinguishable"
    assert result.certificate is None
    assert any("No certificate" in note for note in result.notes)


# How it goes about it.


def test_what_fits_is_loaded_and_what_does_not_is_streamed(grown, text, monkeypatch):
    for free, way, stated in (
        (10**9, "loaded", "memory"),
        (10**6, "streamed", r"layer by layer: .* to read, about \d"),
    ):
        monkeypatch.setattr(comparison, "available_memory", lambda free=free: free)
        notes = []
        assert verify_checkpoints(*grown, text=text, max_tokens=16, notify=notes.append).numbers.forward == way
        assert re.search(rf"^16 tokens in float64, .*{stated}", notes[0])
    assert forward.available_memory() > 10**7


def test_both_proofs_at_once(grown, text):
    verification = verify_checkpoints(*grown, growth=True, text=text, max_tokens=16)
    assert verification.certificate.holds
    assert verification.numbers.within_rounding
    other = Verification(verification.certificate, None)
    assert other.same


def test_streaming_takes_a_few_blocks_and_no_torch(tmp_path):
    """A model of 140 MB; a block of 2^22 elements is 16 MiB in float32."""
    config = tiny_config(vocab_size=16384, hidden_size=512, intermediate_size=4096, num_attention_heads=8).to_dict()
    config |= {"num_key_value_heads": 8, "head_dim": 64, "num_hidden_layers": 8, "model_type": "TeleFLM"}
    rng = np.random.default_rng(0)
    tensors = {
        name: (0.02 * rng.standard_normal(weight.shape(Architecture.from_config(config)), np.float32)).astype(
            ml_dtypes.bfloat16
        )
        for name, weight, _ in weights(Architecture.from_config(config))
    }
    save_numpy(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.model").write_bytes(tiny_sentencepiece())
    (tmp_path / "text").write_text("the quick brown fox")
    script = f"""if True:
        import resource, sys
        from growth import verify_checkpoints
        import growth.verification.comparison, growth.verification.verify, sentencepiece
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        path = {str(tmp_path)!r}
        result = verify_checkpoints(path, path, text=path + "/text", dtype="float32", forward="streamed", workers=2)
        assert result.same and result.numbers.difference.max_difference == 0
        assert "torch" not in sys.modules
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (tmp_path / "model.safetensors").stat().st_size > 130 << 20
    assert int(result.stdout) < 120 << 10  # KiB; in float32 the model has 270 MiB


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "missing"}, "missing: no such file"),
        ({"text": "empty"}, "empty: is empty"),
        ({"text": "latin"}, "latin: is not UTF-8 at byte 2"),
        ({"growth": False}, "nothing to verify by"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of float64, float32, bfloat16"),
        ({"forward": "guess"}, "forward is 'guess', expected one of auto, loaded, streamed"),
        ({"max_tokens": 1}, "max_tokens is 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, grown, tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes(b"na\xefve")
    if "text" in arguments:
        arguments = {"text": tmp_path / arguments["text"]}
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoints(*grown, **arguments)


def test_tokenizers_that_do_not_fit_are_noticed(grown, text, tmp_path):
    source, out = (shutil.copytree(folder, tmp_path / name) for folder, name in zip(grown, "ab", strict=True))
    (out / "tokenizer.model").write_bytes(tiny_sentencepiece("unigram"))
    assert any("tokenizer.model of B is not A's" in n for n in verify_checkpoints(source, out, text=text).notes)
    (source / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither tokenizer\.model nor tokenizer\.json"):
        verify_checkpoints(source, out, text=text)


def test_other_rotary_types_are_refused_when_streamed(make_source):
    folder = make_source(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    source = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"rope_type is dynamic.*Use a machine with the memory"):
        compare_numbers(source, source, IDS, forward="streamed")
    assert compare_numbers(source, source, IDS, forward="loaded").difference.max_difference == 0


# The report and the command.


def test_report_is_one_page_that_needs_nothing_else(grown, text, tmp_path):
    verification = verify_checkpoints(*grown, growth=True, text=text, max_tokens=32, forward="streamed")
    write_report(verification, tmp_path / "report", names=("small", "<large>"))
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "index.html",
        "verification.json",
        "differences.png",
        "layers.png",
    }
    page = (tmp_path / "report/index.html").read_text()
    assert "A is small, B is &lt;large&gt;: certified." in page
    assert "every condition on its configuration and its weights holds" in page
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(?!data:)[\w/.:]""", page)
    assert page.count("data:image/svg+xml;base64,") == 2
    assert "layers.*.mlp.down_proj" in page
    assert json.loads((tmp_path / "report/verification.json").read_text()) == json.loads(
        json.dumps(describe(verification))
    )


def test_a_report_says_when_how_and_of_what_it_was_made(grown, tmp_path):
    origin = Origin.of(["teleflm", "verify", "a b", "<c>"], *grown)
    before = datetime.now(UTC)
    write_report(verify_checkpoints(*grown, growth=True), tmp_path / "report", origin=origin)
    said = json.loads((tmp_path / "report/verification.json").read_text())["origin"]
    records = [folder / MANIFEST for folder in grown]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None for path in records]
    assert said["records"] == digests
    assert digests[1]
    assert said["command"] == "teleflm verify 'a b' '<c>'"
    assert abs(datetime.fromisoformat(said["date"]) - before) < timedelta(minutes=1)
    page = (tmp_path / "report/index.html").read_text()
    assert "teleflm verify &#39;a b&#39; &#39;&lt;c&gt;&#39;" in page
    assert f"sha256 {digests[1]}" in page


def test_report_shows_how_the_copied_layers_were_chosen(make_source, text, tmp_path):
    source, out = make_source(num_hidden_layers=5), tmp_path / "out"
    result = grow_checkpoint(source, out, {"num_hidden_layers": 7}, layers="distance", calibration=text)
    verification = verify_checkpoints(source, out)
    assert [(layer.layer, layer.cosine, layer.relative) for layer in verification.layers] == [
        (distance.layer, distance.cosine, distance.relative) for distance in result.distances
    ]
    least = sorted(range(5), key=lambda layer: result.distances[layer].cosine)[:2]
    assert [layer.copies for layer in verification.layers] == [int(layer in least) for layer in range(5)]
    write_report(verification, tmp_path / "report")
    assert (tmp_path / "report/distances.png").is_file()
    page = (tmp_path / "report/index.html").read_text()
    assert "Layers that were copied" in page
    cells = re.findall(r'<tr><td class="right">(\d)</td>.*?>([\d.]+)</td>.*?\n.*?>(1?)</td></tr>', page)
    assert cells == [(str(x.layer), f"{x.cosine:.4f}", "1" if x.copies else "") for x in verification.layers]
    assert json.loads((tmp_path / "report/verification.json").read_text())["layer_distances"] == [
        {"layer": x.layer, "cosine": x.cosine, "relative": x.relative, "copies": x.copies} for x in verification.layers
    ]


@pytest.mark.parametrize("entry", [{"layer": 0, "cosine": "far", "relative": 1.0}, {"layer": 0}, "0"])
def test_unreadable_layer_distances_are_refused(entry, grown, tmp_path):
    out = shutil.copytree(grown[1], tmp_path / "out")
    manifest = json.loads((out / "teleflm_manifest.json").read_bytes())
    manifest["lineage"]["layer_distances"] = [entry]
    (out / "teleflm_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"manifest\.json: an entry of layer_distances is .*; restore the file"):
        verify_checkpoints(grown[0], out)


# What is exact, and what is rounded: from the fractions that the numbers are, not from the code.

EXACT, UP_TO = "B computes A's function: ", "B computes A's function up to rounding: "
FOUR_TIMES = {"hidden_size": 128, **heads(16, 16)}


@pytest.mark.parametrize(
    ("fields", "dtypes", "target", "method", "beginning"),
    [
        ({}, "float32 float32", {}, None, "B has A's weights, byte for byte"),
        ({}, "float32 bfloat16", {}, None, UP_TO),
        ({}, "float32 float16", {}, None, UP_TO),
        ({}, "bfloat16 float16", {}, None, UP_TO),
        ({}, "bfloat16 float32", {}, None, EXACT),
        ({"use_mup": False}, "float32 float32", {"num_hidden_layers": 5}, Zero(), EXACT),
        ({"use_mup": False}, "float32 float16", {"num_hidden_layers": 5}, Zero(), UP_TO),
        ({}, "float32 float32", {"num_hidden_layers": 5}, Zero(), UP_TO),  # input_mult 2.5 is folded
        ({"input_mult": 2.0}, "float32 float32", {"num_hidden_layers": 5}, Zero(), EXACT),
        ({"input_mult": 2.0}, "float32 float32", {"vocab_size": 700}, Zero(), "B computes A's old logits: "),
        ({"input_mult": 2.0}, "bfloat16 bfloat16", FOUR_TIMES, Zero(), EXACT),  # norms x 1/2
        ({"input_mult": 2.0}, "bfloat16 bfloat16", {"hidden_size": 64, **heads(8, 8)}, Zero(), UP_TO),
        ({"input_mult": 2.0}, "float64 float64", {"hidden_size": 64, **heads(8, 8)}, Zero(), UP_TO),
        ({"input_mult": 2.0}, "float32 float32", {"hidden_size": 64, **heads(8, 8)}, Tile(0.0), EXACT),
        ({"input_mult": 2.0}, "float32 float32", {"hidden_size": 64, **heads(8, 8)}, Tile(0.3), UP_TO),
    ],
)
def test_exact_is_said_of_what_is_exact(fields, dtypes, target, method, beginning, make_source, tmp_path):
    stored, written = dtypes.split()
    source, out = make_source(stored, **fields), tmp_path / "out"
    if method:
        notes = grow_checkpoint(source, out, target, method=method, dtype=written).notes
    else:
        convert_checkpoint(source, out, dtype=written)
    verification = verify_checkpoints(source, out)
    assert verification.sentence.startswith(beginning)
    assert verification.same
    assert ("In exact arithmetic the two differ by no more than" in verification.sentence) == (beginning == UP_TO)
    if beginning == UP_TO:
        assert f"rounding of weights to {written}" in verification.sentence
    if method and stored != "float64":
        promised = any("in exact arithmetic." in note for note in notes)
        assert not (promised and beginning == UP_TO)


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ({}, {}, ": the same function."),
        ({}, {"dtype": "bfloat16"}, "B's config.json asks loaders for bfloat16, and its weights are float32"),
        ({}, {"dtype": None, "torch_dtype": "torch.float16"}, "B's config.json asks loaders for float16, and its"),
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}, "asks loaders for bfloat16, and its weights are float32; B's"),
        ({}, {"dtype": None}, ": the same function."),
        ({"dtype": "auto"}, {}, ": the same function."),
        ({}, {"dtype": "float64"}, "compute A in float32 and B in float64, which round otherwise"),
        ({}, {"dtype": ["no", "dtype"]}, "asks loaders for ['no', 'dtype'], and"),
    ],
)
def test_another_dtype_for_loaders_is_said(a, b, said, make_source, tmp_path):
    """Transformers rounds the weights to what config.json says, unless it is told otherwise."""
    source, out = make_source("float32"), tmp_path / "out"
    shutil.copytree(source, out)
    edit(source, **a)
    edit(out, **b)
    verification = verify_checkpoints(source, out)
    assert verification.verdict == "same-bytes"
    assert said in verification.sentence
    assert ("the same function" in verification.sentence) == (said == ": the same function.")


def test_that_transformers_follows_the_dtype(make_source, tmp_path):
    """Which is why it has to be said."""
    source, out = make_source("float32"), tmp_path / "out"
    shutil.copytree(source, out)
    edit(out, dtype="bfloat16")
    first, second = (
        TeleFLMForCausalLM.from_pretrained(path)(torch.tensor(IDS[None])).logits.double() for path in (source, out)
    )
    assert (first - second).abs().max() > 1e-3


def test_a_grown_model_that_asks_for_another_dtype(grown, tmp_path):
    out = shutil.copytree(grown[1], tmp_path / "out")
    edit(out, dtype="bfloat16")
    verification = verify_checkpoints(grown[0], out)
    assert verification.verdict == "certified"
    assert verification.sentence.endswith("asks loaders for bfloat16, and its weights are float64, which that rounds.")


@pytest.mark.parametrize(
    ("side", "field", "value"),
    [(0, "input_mult", 1e308), (1, "input_mult", 1e308), (0, "output_mult", 1.7e308), (0, "mup_scale_factor", 5e-324)],
)
def test_absurd_multipliers_are_named_and_nothing_else(side, field, value, grown, tmp_path):
    folders = [shutil.copytree(path, tmp_path / f"{number}") for number, path in enumerate(grown)]
    edit(folders[side], **{field: value})
    found = teleflm_verify(*folders)
    assert found.returncode in (2, 3)
    if found.returncode == 2:
        assert re.fullmatch(r"teleflm: .*config\.json: output_mult .* finite and above 0\.\n", found.stderr)
    grown = teleflm("grow", folders[side], tmp_path / "grown", "--set", "vocab_size=700")
    assert grown.returncode in (0, 1, 2)
    for result in (found, grown):
        assert "Traceback" not in result.stderr
        assert "Warning" not in result.stderr


def test_report_of_a_failure_names_it(grown, tmp_path):
    out = shutil.copytree(grown[1], tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][39, 5] = 1e-9
    save_file(tensors, out / "model.safetensors")
    write_report(verify_checkpoints(grown[0], out), tmp_path / "report")
    page = (tmp_path / "report/index.html").read_text()
    assert "Not A&#39;s function by B&#39;s bytes." in page
    assert "model.layers.3.mlp.down_proj.weight[39, 5] is 1e-09, expected 0" in page
    (violation,) = json.loads((tmp_path / "report/verification.json").read_text())["certificate"]["violations"]
    assert (violation["row"], violation["column"], violation["found"]) == (39, 5, 1e-9)


def teleflm_verify(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return teleflm("verify", *arguments)


def teleflm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "teleflm", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_command(grown, text, tmp_path):
    good = teleflm_verify(*grown, "--growth", "--text", text, "--forward", "streamed", "--report", tmp_path / "report")
    assert good.returncode == 0, good.stderr
    said = "B computes A's old logits up to rounding: every condition on its configuration and its weights holds"
    assert said in good.stdout
    assert "Probabilities are not A's: new vocabulary rows take part in the softmax." in good.stdout
    assert re.search(r"tokens in float64, layer by layer: .* to read, about", good.stderr)
    assert (tmp_path / "report/index.html").is_file()

    out = shutil.copytree(grown[1], tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    bad = teleflm_verify(grown[0], out, "--json")
    assert bad.returncode == 3
    described = json.loads(bad.stdout)
    failed = teleflm_verify(grown[0], out, "--text", text, "--dtype", "float32")
    assert failed.returncode == 3
    assert "Different: on" in failed.stdout
    assert re.search(r"root mean square is [\d.]+ times that of rounding", failed.stdout)
    assert described["same"] is False
    assert [field["field"] for field in described["certificate"]["config"] if not field["holds"]] == ["rms_norm_eps"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "{b}"), "nowhere: no such file or folder"),
        (("{b}", "{a}"), "growth only adds; give the smaller model first"),
        (("{a}", "{b}", "--text", "nowhere.txt"), "nowhere.txt: no such file"),
        (("{a}", "{b}", "--report", "{a}/config.json"), "config.json: is a file"),
        (("{a}", "{b}", "--report", "{b}"), "holds a checkpoint (config.json); give --report a folder of its own"),
    ],
)
def test_command_refuses_in_one_line(arguments, message, grown):
    result = teleflm_verify(*(argument.format(a=grown[0], b=grown[1]) for argument in arguments))
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert message in result.stderr
    assert not (grown[1] / "index.html").exists()
