# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The certificate of moments accepts what follows from the weights, and names the first element of every fault planted.

The oracle knows neither growth's operators nor the judge's conditions: it looks up where the copies of an entry are,
adds them up in the weights that were written, and divides by that, which is the chain rule.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import conversion.checkpoint.assemble as assemble
import growth.moments as growing
import growth.verification.moment_certificate as moment_certificate
from conversion.architecture import Architecture
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import MANIFEST
from conversion.hub.lineage import lineage_steps
from conversion.mapping import weights
from growth import grow_checkpoint
from growth.fold import fold_masks
from growth.method import Mask, Random, Tile, Zero
from growth.training.mup import parameter_groups
from growth.verification.moment_certificate import certify_moments, model_order, why_not_certified
from growth.verification.verify import verify_checkpoints
from modeling_teleflm import TeleFLMForCausalLM
from teleflm.app import app
from teleflm.reports.verification import describe, write_report
from tests.fixtures.tiny import tiny_config, tiny_model

ROOT = Path(__file__).parents[2]
Q, DOWN = "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.down_proj.weight"


def heads(query: int, key_value: int) -> dict[str, int]:
    return {"num_attention_heads": query, "num_key_value_heads": key_value, "hidden_size": 8 * query}


WIDE = {"intermediate_size": 110, "num_hidden_layers": 5, "vocab_size": 704, "output_mult": 0.3}
GROWTHS = [
    pytest.param({}, {**heads(5, 5), **WIDE}, Zero(), id="zero"),
    pytest.param({"tie_word_embeddings": True}, {**heads(5, 5), "num_hidden_layers": 4}, Zero(), id="zero, tied"),
    pytest.param(heads(8, 2), {**heads(12, 3), **WIDE}, Zero(), id="zero, GQA 8/2 to 12/3"),
    pytest.param(heads(8, 2), {**heads(16, 8), "num_hidden_layers": 4}, Zero(), id="zero, keys repeated"),
    pytest.param(heads(6, 2), {**heads(10, 5), "vocab_size": 700}, Zero(), id="zero, groups cut unevenly"),
    pytest.param({}, {**heads(8, 8), **WIDE}, Tile(0.0), id="tile"),
    pytest.param(heads(8, 2), {**heads(24, 6), "intermediate_size": 176}, Tile(0.3), id="tile with noise, GQA x 3"),
    pytest.param(heads(8, 2), {**heads(12, 3), **WIDE}, Mask(), id="mask, GQA"),
    pytest.param(heads(8, 2), {**heads(16, 8), **WIDE}, Mask(), id="mask, keys repeated"),
]


def state_of(names: list[str], shapes: dict[str, tuple[int, ...]]) -> dict:
    """Trainer's groups and random moments; the second ones are no square of the first."""
    generator = torch.Generator().manual_seed(0)
    groups = [[name for name in names if ("norm" in name) == norm] for norm in (False, True)]
    state, saved = {}, []
    for members, decay in zip(groups, (0.1, 0.0), strict=True):
        indices = list(range(len(state), len(state) + len(members)))
        for index, name in zip(indices, members, strict=True):
            first = torch.randn(shapes[name], generator=generator) * 1e-3
            second = torch.rand(shapes[name], generator=generator) * 1e-6
            state[index] = {"step": torch.tensor(7.0), "exp_avg": first, "exp_avg_sq": second}
        saved.append({"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": decay, "params": indices})
    return {"state": state, "param_groups": saved}


@pytest.fixture(scope="module")
def make_source(tmp_path_factory) -> Callable[..., Path]:
    """A float64 model and the state of an optimizer that does not name its parameters, as Trainer's."""

    def make(**fields) -> Path:
        folder = tmp_path_factory.mktemp("source")
        model = tiny_model(tiny_config(**fields), dtype=torch.float64)
        model.save_pretrained(folder)
        parameters = dict(model.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        torch.save(state_of(list(parameters), shapes), folder / "optimizer.pt")
        return folder

    return make


@pytest.fixture(scope="module")
def grown(make_source, tmp_path_factory) -> tuple[Path, Path]:
    """A grouped source and its growth along every axis, with its moments; layers 1 and 4 are new."""
    source, out = make_source(**heads(8, 2)), tmp_path_factory.mktemp("grown") / "out"
    grow_checkpoint(source, out, {**heads(12, 3), **WIDE}, optimizer=source, layers="0,2", multipliers="target")
    return source, out


# The oracle.


def places(axis: str, a: Architecture, b: Architecture, method: str) -> np.ndarray:
    """Of every index of an axis of B the index in A that it comes from, -1 for none."""
    sizes = {
        "vocab": (a.vocab_size, b.vocab_size),
        "hidden": (a.hidden_size, b.hidden_size),
        "ffn": (a.intermediate_size, b.intermediate_size),
    }
    groups = [model.num_attention_heads // model.num_key_value_heads for model in (a, b)]
    if axis not in sizes:
        name = {"query": "num_attention_heads", "key_value": "num_key_value_heads"}[axis]
        old, new = getattr(a, name), getattr(b, name)
        repeats = method == "tile" and new % old == 0 and groups[0] == groups[1]
        copies = -(-groups[0] // groups[1])
        head = np.full(new, -1)
        for number in range(new):
            key, slot = divmod(number, groups[1]) if axis == "query" else (number, 0)
            query = key % copies * groups[1] + slot  # within the group of A that this key serves
            if repeats:
                head[number] = number % old
            elif key // copies < a.num_key_value_heads and query < groups[0]:
                head[number] = key // copies * groups[0] + query if axis == "query" else key // copies
            if axis == "key_value" and not repeats and key // copies < old:
                head[number] = key // copies
        return np.where(head[:, None] < 0, -1, head[:, None] * 8 + np.arange(8)).reshape(-1)
    old, new = sizes[axis]
    index = np.arange(new)
    if method == "tile" and axis != "vocab" and new % old == 0:
        return index % old
    return np.where(index < old, index, -1)


def expected_moments(source: Path, out: Path, layers, method: str) -> dict[str, tuple[np.ndarray, np.ndarray, str]]:
    """name -> first and second moment in float64, and the parameter of A."""
    a, b = (_architecture(folder) for folder in (source, out))
    old, new = (load_file(folder / "model.safetensors") for folder in (source, out))
    state = named_state(source)
    found = {}
    for name, weight, layer in weights(b):
        origin = layers[layer].source if layer is not None else None
        original = next((i for i, x in enumerate(layers) if x.source == origin and not x.is_copy), None)
        source_name = weight.name.format(origin)
        index = np.ix_(*(places(axis, a, b, method) for axis in weight.axes))
        mask = np.logical_and.reduce(np.broadcast_arrays(*(part >= 0 for part in index)))
        total = np.zeros(old[source_name].shape)
        where = tuple(part[mask] for part in np.broadcast_arrays(*index))
        np.add.at(total, where, new[weight.name.format(original)].numpy()[mask])
        base = old[source_name].numpy()
        factor = (base * total).sum() / (total * total).sum()  # g' / g = w / (sum of its copies)
        np.testing.assert_allclose(total * factor, base, rtol=1e-9, atol=1e-12)
        m, v = (moment.numpy().astype(np.float64) for moment in state[source_name])
        first, second = np.zeros(mask.shape), np.full(mask.shape, v.mean() * factor**2)
        if not (layer is not None and layers[layer].is_copy):
            first[mask], second[mask] = m[where] * factor, v[where] * factor**2
        found[name] = first, second, source_name
    return found


def _architecture(folder: Path) -> Architecture:
    config = json.loads((folder / "config.json").read_text())
    return Architecture.from_config({**config, "model_type": "TeleFLM", "rms_norm_eps": 1e-5})


def named_state(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    saved = torch.load(folder / "optimizer.pt")
    names = [name for name, _ in TeleFLMForCausalLM.from_pretrained(folder).named_parameters()]
    members = [[name for name in names if ("norm" in name) == norm] for norm in (False, True)]
    return {
        name: tuple(saved["state"][index][key] for key in ("exp_avg", "exp_avg_sq"))
        for group, known in zip(saved["param_groups"], members, strict=True)
        for name, index in zip(group.get("param_names", known), group["params"], strict=True)
    }


@pytest.mark.parametrize(("fields", "target", "method"), GROWTHS)
def test_growth_and_judge_agree_with_the_chain_rule(fields, target, method, make_source, tmp_path):
    source, out = make_source(**fields), tmp_path / "out"
    multipliers = "preserve" if "tie_word_embeddings" in fields else "target"
    result = grow_checkpoint(source, out, target, method=method, optimizer=source, multipliers=multipliers)
    certificate = certify_moments(source, out, source, workers=2)
    assert certificate.holds, certificate.faults[:3]
    assert certificate.worst_ulp <= 0.5
    expected = expected_moments(source, out, result.growth.layers, method.name)
    written = torch.load(out / "optimizer.pt")
    for group in written["param_groups"]:
        for name, index in zip(group["param_names"], group["params"], strict=True):
            for number, key in enumerate(("exp_avg", "exp_avg_sq")):
                np.testing.assert_allclose(written["state"][index][key], expected[name][number], rtol=3e-7, atol=0)
                written["state"][index][key] = torch.from_numpy(expected[name][number]).float()
    # And a state that growth had no hand in.
    torch.save(written, out / "optimizer.pt")
    certificate = certify_moments(source, out, source)
    assert certificate.holds, certificate.faults[:3]
    sizes = {name: weight.shape(_architecture(out)) for name, weight, _ in weights(_architecture(out))}
    assert sum(certificate.elements.values()) == 2 * sum(int(np.prod(shape)) for shape in sizes.values())


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}])
def test_the_order_is_that_of_the_model(fields):
    config = tiny_config(**fields)
    names = [name for name, _ in tiny_model(config).named_parameters()]
    assert model_order(Architecture.from_config({**config.to_dict(), "model_type": "TeleFLM"})) == names


@pytest.mark.parametrize("kind", ["one", "muP"])
def test_other_groups_are_carried_too(kind, grown, tmp_path):
    """Groups of a run that are not Trainer's: of muP there is one for embeddings, one for norms, and so on."""
    model = TeleFLMForCausalLM.from_pretrained(grown[0])
    groups = [{"params": list(model.parameters())}]
    if kind == "muP":
        groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.1, width_ratio=2.0)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.01 * (number + 1))
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    grow_checkpoint(grown[0], tmp_path / "out", heads(12, 3), optimizer=tmp_path)
    certificate = certify_moments(grown[0], tmp_path / "out", tmp_path)
    assert certificate.holds, certificate.faults[:3]
    assert not certify_moments(grown[0], tmp_path / "out", grown[0]).holds  # another state of A


def test_a_model_that_did_not_grow(grown):
    """The same state, of parameters that stay what they are; a source's state has no names, and B's must have."""
    assert certify_moments(grown[1], grown[1], grown[1]).holds
    with pytest.raises(CheckpointError, match="does not name its parameters: it did not grow with the model"):
        certify_moments(grown[0], grown[0], grown[0])


# Faults.


def _change(name: str, key: str, change: Callable[[torch.Tensor], object]) -> Callable[[dict, dict], None]:
    def fault(saved: dict, index: dict) -> None:
        change(saved["state"][index[name]][key])

    return fault


def _set(name: str, key: str, place: tuple[int, ...], value: float | None = None):
    """One element, changed by one unit in the last place or to a value."""

    def change(tensor: torch.Tensor) -> None:
        tensor[place] = torch.nextafter(tensor[place], torch.tensor(0.0)) if value is None else value

    return _change(name, key, change)


def _swap(keys_of: Callable[[str], tuple[str, str] | None]) -> Callable[[dict, dict], None]:
    def fault(saved: dict, index: dict) -> None:
        for name in index:
            if pair := keys_of(name):
                one, other = (index[part] for part in pair)
                saved["state"][one], saved["state"][other] = saved["state"][other], saved["state"][one]

    return fault


def _layers_2_and_3(name: str) -> tuple[str, str] | None:
    return (name, name.replace(".2.", ".3.")) if ".layers.2." in name else None


def _swap_moments(saved: dict, index: dict) -> None:
    state = saved["state"][index[Q.format(0)]]
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"]


def _share(saved: dict, index: dict) -> None:
    one, other = (saved["state"][index[DOWN.format(layer)]] for layer in (1, 4))
    other["exp_avg"] = one["exp_avg"]


def _mean_of_another(saved: dict, index: dict) -> None:
    tensor = saved["state"][index[Q.format(0)]]["exp_avg_sq"]
    tensor[tensor == tensor[-1, -1]] = saved["state"][index[Q.format(2)]]["exp_avg_sq"][-1, -1].item()


def _other_step(saved: dict, index: dict) -> None:
    saved["state"][index[DOWN.format(4)]]["step"] += 1


def _other_order(saved: dict, index: dict) -> None:
    names = saved["param_groups"][0]["param_names"]
    params = saved["param_groups"][0]["params"]
    for items in (names, params):
        items[3], items[4] = items[4], items[3]


def _other_group(saved: dict, index: dict) -> None:
    groups = saved["param_groups"]
    for key in ("params", "param_names"):
        groups[1][key].append(groups[0][key].pop())


def _one_group(saved: dict, index: dict) -> None:
    first, second = saved["param_groups"]
    for key in ("params", "param_names"):
        first[key] += second[key]
    del saved["param_groups"][1]


def _other_setting(saved: dict, index: dict) -> None:
    saved["param_groups"][1]["betas"] = (0.9, 0.999)


def _double(saved: dict, index: dict) -> None:
    state = saved["state"][index["model.norm.weight"]]
    state["exp_avg"] = state["exp_avg"].double()


@pytest.mark.parametrize(
    ("fault", "line", "count"),
    [
        pytest.param(
            _change("lm_head.weight", "exp_avg", lambda m: m.mul_(1.01)),
            r"exp_avg of lm_head\.weight\[0, 0\] is .* from exp_avg of lm_head\.weight\[0, 0\] of A: its gradient",
            1,
            id="a wrong factor",
        ),
        pytest.param(
            _change("model.norm.weight", "exp_avg_sq", lambda v: v.mul_((64 / 96) ** 0.5)),
            r"exp_avg_sq of model\.norm\.weight\[0\] is .*of A: its gradient .*and 95 more of its elements",
            1,
            id="a factor that was not squared, on old and new",
        ),
        pytest.param(
            _set(Q.format(2), "exp_avg", (17, 9)),
            r"exp_avg of model\.layers\.2\.self_attn\.q_proj\.weight\[17, 9\] .*model\.layers\.1\.self_attn\.q_proj"
            r"\.weight\[17, 9\] of A: an old entry keeps its gradient\.$",
            1,
            id="one unit in the last place",
        ),
        pytest.param(
            _set("model.norm.weight", "exp_avg_sq", (63,)),
            r"exp_avg_sq of model\.norm\.weight\[63\] is .* from exp_avg_sq of model\.norm\.weight\[63\] of A",
            1,
            id="one unit in the last place of a product",
        ),
        pytest.param(
            _set(DOWN.format(0), "exp_avg", (95, 109), 1e-45),
            r"exp_avg of model\.layers\.0\.mlp\.down_proj\.weight\[95, 109\] is 1\.4\S* expected 0: a new entry",
            1,
            id="a new entry's m is not zero",
        ),
        pytest.param(
            _set(DOWN.format(1), "exp_avg", (0, 3), -1e-3),
            r"down_proj\.weight\[0, 3\] is -0\.001\d*, expected 0: this layer is an additional copy of layer 0",
            1,
            id="an additional layer's m",
        ),
        pytest.param(
            _set("lm_head.weight", "exp_avg_sq", (703, 5), 0.0),
            r"exp_avg_sq of lm_head\.weight\[703, 5\] is 0\.0, expected .*the mean of exp_avg_sq of lm_head\.weight of",
            1,
            id="a new entry's v is zero",
        ),
        pytest.param(
            _change("lm_head.weight", "exp_avg_sq", lambda v: v[650].mul_(1 + 2**-21)),
            r"exp_avg_sq of lm_head\.weight\[650, 0\] is .*and 95 more of its elements",
            1,
            id="a mean that is four units in the last place off",
        ),
        pytest.param(
            _mean_of_another,
            r"exp_avg_sq of model\.layers\.0\.self_attn\.q_proj\.weight\[0, 64\] is .* the mean of exp_avg_sq of",
            1,
            id="the mean of another tensor",
        ),
        pytest.param(
            _set(Q.format(0), "exp_avg_sq", (0, 0), float("nan")),
            r"exp_avg_sq of model\.layers\.0\.self_attn\.q_proj\.weight\[0, 0\] is nan, expected",
            1,
            id="no number",
        ),
        pytest.param(
            _swap(_layers_2_and_3),
            r"exp_avg of model\.layers\.2\.input_layernorm\.weight\[0\] is .* from exp_avg of model\.layers\.1\.",
            36,
            id="swapped layers",
        ),
        pytest.param(
            _swap_moments, r"exp_avg of model\.layers\.0\.self_attn\.q_proj\.weight\[0, 0\] is", 2, id="m and v swapped"
        ),
        pytest.param(_share, "exp_avg of model.layers.1.*share storage", 1, id="shared bytes"),
        pytest.param(
            _other_step, r"step of model\.layers\.4\.mlp\.down_proj\.weight is 8, expected 7", 1, id="other step"
        ),
        pytest.param(
            _other_order,
            r"parameter group 0 lists model\.layers\.0\.self_attn\.o_proj\.weight where the order of the model's param",
            1,
            id="another order",
        ),
        pytest.param(
            _other_group,
            r"parameter group 0 lacks lm_head\.weight, and lm_head\.weight is in that group",
            2,
            id="another group",
        ),
        pytest.param(_one_group, "has 1 parameter groups, expected the 2 of A's state", 1, id="one group"),
        pytest.param(
            _other_setting, r"parameter group 1 has betas \[0\.9, 0\.999\], expected \[0\.9, 0\.95\]", 1, id="setting"
        ),
        pytest.param(
            _double, "exp_avg of model.norm.weight is of dtype float64, expected float32", 1, id="another dtype"
        ),
    ],
)
def test_every_fault_is_named(fault, line, count, grown, tmp_path):
    out = damaged(grown[1], tmp_path / "out", fault)
    certificate = certify_moments(grown[0], out, grown[0])
    assert not certificate.holds
    assert len(certificate.faults) == count
    assert re.search(line, certificate.faults[0]), certificate.faults[0]
    assert certificate.faults[0].startswith("optimizer.pt: ")
    assert certificate.faults[0] in certificate.sentence


def damaged(folder: Path, copy: Path, fault: Callable[[dict, dict], None]) -> Path:
    shutil.copytree(folder, copy)
    saved = torch.load(copy / "optimizer.pt")
    index = {
        name: number
        for group in saved["param_groups"]
        for name, number in zip(group["param_names"], group["params"], strict=True)
    }
    fault(saved, index)
    torch.save(saved, copy / "optimizer.pt")
    return copy


def _missing_name(saved: dict, index: dict) -> None:
    for key in ("params", "param_names"):
        del saved["param_groups"][0][key][5]


def _missing_state(saved: dict, index: dict) -> None:
    del saved["state"][index[Q.format(3)]]


def _other_shape(saved: dict, index: dict) -> None:
    state = saved["state"][index["model.norm.weight"]]
    state["exp_avg"] = state["exp_avg"][:-1].clone()


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (_missing_name, r"optimizer\.pt: param_names are not the \d+ parameters .*model\.layers\.0\.mlp\.gate_proj\.w"),
        (_missing_state, r"optimizer\.pt: the state of model\.layers\.3\.self_attn\.q_proj\.weight is None"),
        (_other_shape, r"optimizer\.pt: exp_avg of model\.norm\.weight has shape \(95,\), the model has \(96,\)"),
    ],
)
def test_a_state_of_other_parameters_is_refused(fault, line, grown, tmp_path):
    out = damaged(grown[1], tmp_path / "out", fault)
    with pytest.raises(CheckpointError, match=line):
        certify_moments(grown[0], out, grown[0])


def _no_factor(monkeypatch):
    monkeypatch.setattr(growing, "gradient_factor", lambda *args: 1.0)


def _inverse_factor(monkeypatch):
    factor = growing.gradient_factor
    monkeypatch.setattr(growing, "gradient_factor", lambda *args: 1.0 / factor(*args))


def _copies_do_not_share(monkeypatch):
    def factor(weight, plan, growth):
        return 1.0 / next(piece.scale for piece in plan.pieces if hasattr(piece, "scale"))

    monkeypatch.setattr(growing, "gradient_factor", factor)


def _additional_layers_as_copies(monkeypatch):
    moment = growing._moment
    monkeypatch.setattr(growing, "_moment", lambda *args, is_new: moment(*args, is_new=False))


def _mean_is_a_spread(monkeypatch):
    statistic = growing.Statistic
    monkeypatch.setattr(growing, "Statistic", lambda kind, *rest: statistic("std", *rest))


@pytest.mark.parametrize(
    ("mutant", "method"),
    [
        *(
            (mutant, method)
            for mutant in (_no_factor, _inverse_factor, _additional_layers_as_copies, _mean_is_a_spread)
            for method in (Zero(), Tile(0.0), Mask())
        ),
        (_copies_do_not_share, Tile(0.0)),  # elsewhere there is one
    ],
)
def test_mutants_of_growth_are_caught(mutant, method, make_source, tmp_path, monkeypatch):
    source, target = make_source(), {**heads(8, 8), **WIDE}
    mutant(monkeypatch)
    grow_checkpoint(source, tmp_path / "out", target, optimizer=source, method=method, multipliers="target")
    assert not certify_moments(source, tmp_path / "out", source).holds


# What cannot be judged.


def test_moments_that_hold_a_decay_neither_grow_nor_are_certified(grown, tmp_path):
    """Adam, not AdamW, with weight_decay: g + decay x w, which grow by unlike factors."""
    source, out = grown
    saved = torch.load(source / "optimizer.pt")
    folder = tmp_path / "state"
    folder.mkdir()
    for decays, decoupled in ((True, False), (True, True), (False, False)):
        for group in saved["param_groups"]:
            group |= {"decoupled_weight_decay": decoupled, "weight_decay": 0.1 if decays else 0.0}
        torch.save(saved, folder / "optimizer.pt")
        if decoupled or not decays:
            grow_checkpoint(source, tmp_path / "out", heads(12, 3), optimizer=folder, dry_run=True)
            continue
        refused = r"group 0 has decoupled_weight_decay False and weight_decay 0\.1.*leave --optimizer out"
        with pytest.raises(CheckpointError, match=refused):
            grow_checkpoint(source, tmp_path / "out", heads(12, 3), optimizer=folder)
        with pytest.raises(CheckpointError, match=refused):
            verify_checkpoints(source, out, optimizer=folder)
        assert not (tmp_path / "out").exists()


def test_what_cannot_be_judged_is_refused(grown, make_source, tmp_path):
    source, out = grown
    grow_checkpoint(out, tmp_path / "twice", {**heads(16, 4)}, optimizer=out)
    assert certify_moments(out, tmp_path / "twice", out).holds
    with pytest.raises(CheckpointError, match=r"B is 2 growths away from A: .* certify each growth's optimizer\.pt"):
        certify_moments(source, tmp_path / "twice", source)
    grow_checkpoint(source, tmp_path / "random", heads(12, 3), optimizer=source, method=Random())
    with pytest.raises(CheckpointError, match=r"growth by method random, which does not preserve the function"):
        certify_moments(source, tmp_path / "random", source)
    assert why_not_certified(source, out) is None
    for folder, reason in (("random", "growth by method random"), ("twice", "B is 2 growths away from A")):
        assert reason in (why_not_certified(source, tmp_path / folder) or "")
    assert [note for note in verify_checkpoints(source, tmp_path / "twice").notes if "at: B is 2 growths away" in note]
    grow_checkpoint(source, tmp_path / "active", {"num_hidden_layers": 4}, optimizer=source, new_layers="active")
    with pytest.raises(CheckpointError, match=r"growth by new_layers active, which does not preserve the function"):
        certify_moments(source, tmp_path / "active", source)
    grow_checkpoint(source, tmp_path / "bare", heads(12, 3))
    with pytest.raises(CheckpointError, match=r"holds no optimizer\.pt to certify; grow with --optimizer"):
        certify_moments(source, tmp_path / "bare", source)
    with pytest.raises(CheckpointError, match=r"has shape .*config\.json says"):
        certify_moments(source, out, make_source())
    with pytest.raises(CheckpointError, match="growth only adds"):
        certify_moments(out, source, out)


@pytest.mark.parametrize("value", [1e308, 1e200, 1e-320])
def test_multipliers_beyond_all_numbers_are_named(value, grown, tmp_path):
    out = shutil.copytree(grown[1], tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "output_mult": value}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has to be multiplied by|output_mult"):
        certify_moments(grown[0], out, grown[0])


def test_masks_that_were_raised_or_folded_are_refused(make_source, tmp_path):
    source, out = make_source(), tmp_path / "out"
    grow_checkpoint(source, out, heads(8, 8), optimizer=source, method=Mask())
    fold_masks(out, tmp_path / "fold", alpha=0.0)
    shutil.copy(out / "optimizer.pt", tmp_path / "fold")
    with pytest.raises(CheckpointError, match=r"masks of B are folded into its weights \(alpha 0\)"):
        certify_moments(source, tmp_path / "fold", source)
    config = json.loads((out / "config.json").read_text())
    config["growth_state"]["step"] = 3
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"growth_state\.step is 3: it was trained on since it was grown"):
        certify_moments(source, out, source)


# Large tensors, independence and memory.


def test_a_large_tensor_has_the_mean_of_evenly_spread_windows(grown, tmp_path, monkeypatch):
    """Growth looks at as much and no more of it; a judge that looked at all would refuse what is right."""
    for module, whole in ((assemble, "_SAMPLE"), (moment_certificate, "_WHOLE_MEAN")):
        monkeypatch.setattr(module, whole, 512)
        monkeypatch.setattr(module, "_WINDOW", 64)
    out = tmp_path / "out"
    grow_checkpoint(grown[0], out, heads(12, 3), optimizer=grown[0])
    certificate = certify_moments(grown[0], out, grown[0])
    assert certificate.holds, certificate.faults[:2]
    assert "(of 512 elements of it, where it has more)" in certificate.sentence
    flat = named_state(grown[0])[Q.format(0)][1].numpy().reshape(-1).astype(np.float64)
    sample = np.concatenate([flat[(flat.size - 64) * i // 7 :][:64] for i in range(8)])
    assert named_state(out)[Q.format(0)][1][-1, -1].item() == pytest.approx(sample.mean(), rel=2e-7)
    monkeypatch.setattr(moment_certificate, "_WHOLE_MEAN", 1 << 22)
    assert not certify_moments(grown[0], out, grown[0]).holds


def test_real_sizes_of_the_sample():
    assert (moment_certificate._WHOLE_MEAN, moment_certificate._WINDOW) == (assemble._SAMPLE, assemble._WINDOW)


def test_nothing_that_grows_is_loaded_and_memory_is_a_few_blocks(tmp_path):
    """64 MiB of moments."""
    config = tiny_config(vocab_size=8192, hidden_size=256, intermediate_size=2048, num_attention_heads=32)
    model = tiny_model(config)
    model.save_pretrained(tmp_path / "a")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    torch.save(state_of(list(shapes), shapes), tmp_path / "a/optimizer.pt")
    grow_checkpoint(tmp_path / "a", tmp_path / "b", {"vocab_size": 9000}, optimizer=tmp_path / "a")
    assert (tmp_path / "b/optimizer.pt").stat().st_size > 64 << 20
    script = f"""if True:
        import resource, sys
        from growth.verification.moment_certificate import certify_moments
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        a, b = {str(tmp_path / "a")!r}, {str(tmp_path / "b")!r}
        assert certify_moments(a, b, a, workers=2).holds
        growers = ["growth." + name for name in ("operators", "spec", "grow", "layer_selection", "fold", "moments")]
        assert not [name for name in [*growers, "torch", "transformers"] if name in sys.modules]
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 40 << 10  # KiB


# What is said.


def test_the_verdict_is_no_stronger_than_what_was_looked_at(grown, tmp_path):
    source, out = grown
    alone, both = verify_checkpoints(source, out), verify_checkpoints(source, out, optimizer=source)
    assert any("optimizer.pt of B was not looked at" in note for note in alone.notes)
    assert not any("not looked at" in note for note in both.notes)
    assert "optimizer" not in alone.sentence
    assert "moments" not in describe(alone)
    assert both.sentence.startswith(alone.sentence)
    assert "B's optimizer.pt is the state that was given as A's, grown: steps, groups" in both.sentence
    assert (both.verdict, both.same, both.is_refuted) == ("certified", True, False)

    broken = damaged(out, tmp_path / "moments", _swap_moments)
    found = verify_checkpoints(source, broken, optimizer=source)
    assert (found.verdict, found.same, found.is_refuted) == ("certified", True, True)  # its function is A's
    assert "B's optimizer.pt is not the state that was given as A's, grown. optimizer.pt: exp_avg of" in found.sentence
    shutil.copytree(out, tmp_path / "weights")
    tensors = load_file(tmp_path / "weights/model.safetensors")
    tensors["model.norm.weight"][0] = 5.0
    save_file(tensors, tmp_path / "weights/model.safetensors", metadata={"format": "pt"})
    found = verify_checkpoints(source, tmp_path / "weights", optimizer=source)
    assert (found.verdict, found.moments.holds, found.is_refuted) == ("not-certified", True, True)


def test_of_a_masked_checkpoint_moments_alone_are_judged(make_source, tmp_path):
    source, out = make_source(), tmp_path / "out"
    grow_checkpoint(source, out, heads(8, 8), optimizer=source, method=Mask())
    with pytest.raises(CheckpointError, match="model_type is 'TeleFLMMasked'"):
        verify_checkpoints(source, out)
    with pytest.raises(CheckpointError, match="model_type is 'TeleFLMMasked'"):
        verify_checkpoints(source, out, optimizer=source, growth=True)
    found = verify_checkpoints(source, out, optimizer=source)
    assert (found.verdict, found.same, found.is_refuted) == ("unjudged", None, False)
    assert found.sentence.startswith("Whether B computes A's function was not judged. ")
    assert "grown: steps, groups" in found.sentence
    write_report(found, tmp_path / "report")
    assert "was not judged" in (tmp_path / "report/index.html").read_text()


def run(*arguments: object) -> object:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_command_report_and_record(grown, tmp_path):
    source, out = grown[0], shutil.copytree(grown[1], tmp_path / "out")
    good = run("verify", source, out, "--optimizer", source, "--report", tmp_path / "report", "--record")
    assert good.exit_code == 0, good.output
    assert re.search(r"Moments: 96 of 96 tensors hold, [\d,]+ old and [\d,]+ new elements", good.output)
    page = (tmp_path / "report/index.html").read_text()
    assert "Adam's moments" in page
    assert "All of it holds." in page
    record = json.loads((out / MANIFEST).read_text())
    assert record["verification"]["moments"] == {"holds": True, "state": record["lineage"]["optimizer"]}
    *_, told = lineage_steps(record["lineage"], verification=record["verification"])
    assert "holds; its optimizer.pt is the state given with the source, grown." in told

    damaged(out, tmp_path / "bad", _other_step)
    bad = run("verify", source, tmp_path / "bad", "--optimizer", source, "--json", "--report", tmp_path / "report")
    assert bad.exit_code == 3
    described = json.loads(bad.stdout)
    assert (described["verdict"], described["moments"]["holds"]) == ("certified", False)
    assert described["moments"]["faults"][0].startswith("optimizer.pt: step of model.layers.4.mlp.down_proj.weight")
    assert "Something is broken." in (tmp_path / "report/index.html").read_text()
    assert run("verify", source, tmp_path / "bad").exit_code == 0  # the weights alone
    assert "not looked at" in run("verify", source, tmp_path / "bad").output
    none = run("verify", source, out, "--optimizer", tmp_path)
    assert none.exit_code == 2
    assert "holds no optimizer.pt" in none.output


@pytest.mark.parametrize(("key", "value"), [("exp_avg", math.nan), ("exp_avg_sq", math.inf), ("exp_avg_sq", math.nan)])
def test_what_is_no_number_in_both_is_the_same_and_is_said(key, value, grown, tmp_path):
    """Growth refuses to write such a state; of one that another program wrote, the judge says what is so."""
    source, out = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in grown)
    name = "model.norm.weight"  # whose old entries keep their gradient or not, and whose new ones have A's mean

    def plant(folder: Path, factor: float) -> None:
        saved = torch.load(folder / "optimizer.pt", weights_only=True)
        names = list(dict(TeleFLMForCausalLM.from_pretrained(folder).named_parameters()))
        ordered = [n for n in names if "norm" not in n] + [n for n in names if "norm" in n]
        groups = saved["param_groups"]
        numbered = [n for g in groups for n in g.get("param_names", ())] or ordered
        state = saved["state"][numbered.index(name)]
        state[key][3] = value
        if factor and key == "exp_avg_sq":
            state[key][len(TeleFLMForCausalLM.from_pretrained(source).model.norm.weight) :] = value
        torch.save(saved, folder / "optimizer.pt")

    plant(source, 0.0)
    found = certify_moments(source, out, source)
    assert not found.holds
    assert "is not the state that was given as A's, grown" in found.sentence
    plant(out, 1.0)
    found = certify_moments(source, out, source)
    assert found.holds, found.faults
    assert found.nonfinite >= 1
    assert (
        f" {found.nonfinite:,} of the elements are NaN or infinite as A's are: no optimizer goes on" in found.sentence
    )
    assert math.isfinite(found.worst_ulp)
    result = CliRunner().invoke(app, ["verify", str(source), str(out), "--optimizer", str(source)])
    assert result.exit_code == 0, result.output
    assert "expected nan" not in result.output
