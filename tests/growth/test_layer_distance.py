# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Layer distances against transformers' own hidden states."""

import json

import numpy as np
import pytest
import torch

from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.sources import open_checkpoint
from growth import grow_checkpoint
from growth.layer_distance import LayerDistance, measure_layer_distances, nearest_layers, read_calibration
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

IDS = np.random.default_rng(0).integers(3, 600, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    model = tiny_model(tiny_config(num_hidden_layers=5))
    with torch.no_grad():
        for layer, factor in enumerate([1.0, 0.2, 0.7, 0.0, 0.4]):  # a known order, and a layer that adds nothing
            for projection in (model.model.layers[layer].self_attn.o_proj, model.model.layers[layer].mlp.down_proj):
                projection.weight *= factor
    model.save_pretrained(path)
    tiny_tokenizer(path).save_pretrained(path)
    return path


def test_distances_are_those_of_transformers_hidden_states(folder):
    from modeling_teleflm import TeleFLMForCausalLM

    model = TeleFLMForCausalLM.from_pretrained(folder, attn_implementation="eager")
    layers = [model.model.embed_tokens, *model.model.layers]  # hooks: the last of output_hidden_states is normed
    outputs = []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output[0].double()))
    with torch.no_grad():
        model(torch.tensor(IDS)[None])
    outputs[0] = outputs[0] * model.config.embedding_scale
    for distance, before, after in zip(
        measure_layer_distances(open_checkpoint(folder), IDS), outputs[:-1], outputs[1:], strict=True
    ):
        cosine = 1 - torch.cosine_similarity(before, after, dim=-1).mean().item()
        relative = ((after - before).norm(dim=-1) / before.norm(dim=-1)).mean().item()
        assert distance.cosine == pytest.approx(cosine, rel=1e-4, abs=1e-9)
        assert distance.relative == pytest.approx(relative, rel=1e-4, abs=1e-9)


def test_the_layers_that_move_least_are_copied(folder):
    distances = measure_layer_distances(open_checkpoint(folder), IDS)
    assert distances[3].relative == 0.0
    assert nearest_layers(distances, 1) == [3]
    assert nearest_layers(distances, 2) == [1, 3]
    assert nearest_layers(distances, 5) == [0, 1, 2, 3, 4]
    assert nearest_layers(distances, 6) == [0, 1, 2, 3, 3, 4]


def test_grow_copies_by_distance(folder, tmp_path):
    (tmp_path / "text.txt").write_text("The import statement finds a module and binds it to a name. " * 20)
    arguments = {"layers": "distance", "calibration": tmp_path / "text.txt"}
    result = grow_checkpoint(folder, tmp_path / "out", {"num_hidden_layers": 7}, **arguments)
    copied = [origin.source for origin in result.growth.layers if origin.is_copy]
    assert copied == nearest_layers(result.distances, 2) == [1, 3]
    assert [origin.source for origin in result.growth.layers] == [0, 1, 1, 2, 3, 3, 4]
    lineage = json.loads((tmp_path / "out/teleflm_manifest.json").read_bytes())["lineage"]
    assert [distance["layer"] for distance in lineage["layer_distances"]] == [0, 1, 2, 3, 4]
    planned = grow_checkpoint(folder, tmp_path / "plan", {"num_hidden_layers": 7}, **arguments, dry_run=True)
    assert any("measured when this is run" in note for note in planned.notes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "distance"}, "give a calibration file"),
        ({"calibration": "text.txt"}, "it serves 'distance' alone"),
        ({"layers": "distance", "calibration": "nowhere.txt"}, "no such file"),
    ],
)
def test_distance_needs_text(arguments, message, folder, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        grow_checkpoint(folder, tmp_path / "out", {"num_hidden_layers": 7}, **arguments)


def test_ties_go_to_the_lower_layer():
    assert nearest_layers([LayerDistance(i, 0.5, 0.5) for i in range(4)], 2) == [0, 1]


def test_calibration_text(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The import statement finds a module and binds it to a name. " * 200)
    ids = read_calibration(text, folder, max_tokens=100)
    assert ids.shape == (100,)
    assert ids.tolist() == tiny_tokenizer(tmp_path)(text.read_text(), add_special_tokens=False)["input_ids"][:100]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"short", "has 4 tokens|has . tokens, at least 16"), (b"\xff\xfe", "is not UTF-8")],
)
def test_bad_calibration(content, message, folder, tmp_path):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_calibration(tmp_path / "text.txt", folder)


def test_activations_that_overflow(folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="layer 1: its input or output"):
        measure_layer_distances(open_checkpoint(broken), IDS)
