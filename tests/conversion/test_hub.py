# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The files around the weights: what a fresh process needs to load the folder, and nothing that does not belong."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import modeling_teleflm.masked_teleflm as masked
import modeling_teleflm.modeling_teleflm as modeling
from conversion import WriteOptions, convert_checkpoint, inspect_checkpoint
from conversion.architecture import Architecture, load_preset, model_code_constant, preset_names
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import MANIFEST
from conversion.hub import card as hub
from growth import grow_checkpoint
from growth.fold import MaskState
from modeling_teleflm import TeleFLMConfig, TeleFLMForCausalLM
from tests.fixtures.tiny import tiny_model, tiny_sentencepiece, tiny_tokenizer

WIDER = {"hidden_size": 40, "num_attention_heads": 5}


@pytest.fixture
def published(tmp_path) -> Path:
    """A folder as it was published: `.bin`, a 2024 configuration, a tokenizer under another class, code of its own."""
    folder = tmp_path / "published"
    folder.mkdir()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    fields = tiny_model().config.to_dict()
    fields |= {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float32", "transformers_version": "4.40.0"}
    fields |= {"auto_map": {"AutoConfig": "configuration_old.OldConfig"}}
    del fields["rope_parameters"], fields["dtype"]
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "tokenizer.model").write_bytes(tiny_sentencepiece())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
    )
    (folder / "modeling_old.py").write_text("raise SystemExit('this must never run')")
    return folder


FRESH_PROCESS = """if True:
    import json, sys

    class Hidden:  # the package, even where it is installed
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "modeling_teleflm":
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Hidden())
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    chat = [{"role": "user", "content": "How?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer("The import statement.")["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1, :640].tolist()
    print(json.dumps([type(tokenizer).__name__, text, ids, logits]))
"""


@pytest.mark.parametrize(
    "write", [convert_checkpoint, lambda a, b: grow_checkpoint(a, b, WIDER)], ids=["convert", "grow"]
)
def test_a_process_without_the_package_loads_the_folder(write, published, tmp_path):
    out = tmp_path / "out"
    write(published, out)
    assert not list(out.glob("*old*"))
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", FRESH_PROCESS, str(out)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    name, text, ids, logits = json.loads(result.stdout.splitlines()[-1])
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    assert (name, text) == ("TeleFLMTokenizer", "<_user>How?<_bot>")
    assert ids == tokenizer("The import statement.")["input_ids"]
    with torch.no_grad():
        expected = tiny_model()(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-4, atol=1e-6)


def test_configuration_is_in_todays_spelling(published, tmp_path):
    convert_checkpoint(published, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_bytes())
    assert not {"torch_dtype", "rope_scaling", "rope_theta", "transformers_version"} & config.keys()
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert TeleFLMForCausalLM.from_pretrained(tmp_path / "out").config.rope_parameters["rope_theta"] == 10000.0
    assert load_file(tmp_path / "out/model.safetensors").keys() == tiny_model().state_dict().keys()


def test_what_is_read_from_the_text_of_the_model_code_is_what_it_says():
    assert model_code_constant("modeling_teleflm.py", "AUTO_MAP") == modeling.AUTO_MAP
    assert model_code_constant("masked_teleflm.py", "AUTO_MAP") == masked.AUTO_MAP
    assert {field.name for field in fields(MaskState)} == set(masked._GROWTH_STATE)
    with pytest.raises(LookupError):
        model_code_constant("masked_teleflm.py", "NOTHING")


@pytest.mark.parametrize("name", preset_names())
def test_architecture_agrees_with_the_configuration_class(name):
    """Two readers of one file: the torch-free one and transformers'."""
    config = TeleFLMConfig.from_preset(name)
    architecture = Architecture.from_config(load_preset(name))
    for field in Architecture.__dataclass_fields__:
        assert getattr(architecture, field) == getattr(config, field)
    assert architecture.logit_scale == config.logit_scale
    assert architecture.embedding_scale == config.embedding_scale
    with torch.device("meta"):
        assert architecture.num_parameters == TeleFLMForCausalLM(config).num_parameters()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'TeleFLM'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be finite and above 0"),
        ({"num_attention_heads": 5}, "hidden_size 8192 is not a multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "num_attention_heads 64 is not a multiple of num_key_value_heads 3"),
        ({"mup_scale_factor": float("nan")}, "mup_scale_factor is nan"),
        ({"output_mult": True}, "output_mult is True, expected a number"),
        ({"attention_bias": True}, "attention_bias is true; biases are not supported here"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(CheckpointError, match=rf"here: {message}"):
        Architecture.from_config({**load_preset("tele-flm-52b"), **change}, "here")


def test_tokenizer_that_is_none(published, tmp_path):
    (published / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a sentencepiece model"):
        grow_checkpoint(published, tmp_path / "out", WIDER)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"manifest\.json is not valid JSON"),
        (b"[" * 100_000, r"manifest\.json nests deeper than 100 levels"),
        (b"[]", r"manifest\.json is a JSON list, expected an object"),
        (b"{}", "manifest format is None, this version reads 2"),
        (b'{"format": 1}', "plan is a NoneType, expected a str"),
        (b'{"format": 1, "plan": "x", "lineage": [], "tensors": {}}', "lineage is a list, expected a dict"),
    ],
)
def test_a_manifest_of_somebody_elses(content, message, published, tmp_path):
    """Under our name it is damaged; under the old one it is another program's, and nothing to us."""
    (published / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(published, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert any(MANIFEST in problem for problem in inspect_checkpoint(published).problems)
    (published / MANIFEST).rename(published / "manifest.json")
    assert inspect_checkpoint(published).problems == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").write_bytes(content)
    for _ in range(2):
        convert_checkpoint(published, tmp_path / "out")
    convert_checkpoint(published, tmp_path / "out", dtype="bfloat16", options=WriteOptions(overwrite=True))
    assert (tmp_path / "out/manifest.json").read_bytes() == content
    assert (published / "manifest.json").read_bytes() == content


@pytest.mark.parametrize(
    "lineage",
    [{}, {"operation": "grow"}, {"operation": 3, "parent": "x"}, {"operation": "convert", "parent": {"lineage": 1}}],
)
def test_a_lineage_of_somebody_elses_is_told_as_far_as_it_goes(lineage):
    assert all(isinstance(step, str) for step in hub.lineage_steps(lineage))
