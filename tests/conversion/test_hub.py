# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The files around the weights: what a fresh process needs to load the folder, and nothing that does not belong."""

import gc
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import modeling_teleflm.masked_teleflm as masked
import modeling_teleflm.modeling_teleflm as modeling
from conversion import WriteOptions, architecture, convert_checkpoint, inspect_checkpoint
from conversion.architecture import Architecture, load_preset, model_code_constant, preset_names
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import MANIFEST
from conversion.exports.export import export_checkpoint
from conversion.hub.lineage import lineage_steps
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


@pytest.mark.slow
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


def test_where_files_lay_on_somebodys_machine_stays_behind(published, tmp_path):
    for name, said in {
        "tokenizer_config.json": {"name_or_path": "/home/me/m", "special_tokens_map_file": "/home/me/x.json", "add": 1},
        "generation_config.json": {"_name_or_path": "/home/me/m", "max_length": 7},
    }.items():
        (published / name).write_text(json.dumps(said))
    convert_checkpoint(published, tmp_path / "out")
    tokenizer, generation = (
        json.loads((tmp_path / "out" / name).read_text())
        for name in ("tokenizer_config.json", "generation_config.json")
    )
    assert {"name_or_path", "special_tokens_map_file"} & tokenizer.keys() == set()
    assert tokenizer["add"] == 1
    assert generation == {"max_length": 7}


def test_what_is_read_from_the_text_of_the_model_code_is_what_it_says():
    assert model_code_constant("modeling_teleflm.py", "AUTO_MAP") == modeling.AUTO_MAP
    assert model_code_constant("masked_teleflm.py", "AUTO_MAP") == masked.AUTO_MAP
    assert {field.name for field in fields(MaskState)} == set(masked._GROWTH_STATE)
    with pytest.raises(LookupError):
        model_code_constant("masked_teleflm.py", "NOTHING")


@pytest.fixture
def switching_in_collections():
    """Lets other threads run whenever garbage is collected, also in the midst of what Python does in one go else."""
    thresholds = gc.get_threshold()

    def switch(*_: object) -> None:
        time.sleep(0)

    gc.callbacks.append(switch)
    gc.set_threshold(50)
    yield
    gc.set_threshold(*thresholds)
    gc.callbacks.remove(switch)


@pytest.mark.usefixtures("switching_in_collections")
def test_the_text_of_the_model_code_is_read_by_many_threads_at_once():
    def read(_: int) -> object:
        architecture._literal.cache_clear()
        return model_code_constant("modeling_teleflm.py", "AUTO_MAP")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, range(16)))
    assert all(one == modeling.AUTO_MAP for one in found)
    found[0].clear()
    assert found[1] == modeling.AUTO_MAP


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
        ({"model_type": "mistral"}, "model_type is 'mistral', expected 'TeleFLM' or 'llama'"),
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
    assert all(isinstance(step, str) for step in lineage_steps(lineage))


# What of a source goes along, and what is said of the rest.

FOLDERS = {
    "convert": convert_checkpoint,
    "grow": lambda source, out: grow_checkpoint(source, out, WIDER),
    "granite": lambda source, out: export_checkpoint(source, out, to="granite"),
    "linked": lambda source, out: export_checkpoint(source, out, to="granite", link=True),
    "llama": lambda source, out: export_checkpoint(source, out, to="llama"),
    "megatron": lambda source, out: export_checkpoint(source, out, to="megatron"),
}
GO_ALONG = {
    "LICENSE": "a licence",
    "NOTICE": "a notice",
    "preprocessor_config.json": '{"a": 1}',
    "additional_chat_templates/tools.jinja": "{{ 2 }}",
}


@pytest.fixture
def stored(tmp_path) -> Path:
    """A Tele-FLM as transformers stores it."""
    folder = tmp_path / "stored"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("write", FOLDERS.values(), ids=FOLDERS)
def test_settings_and_licence_go_along_and_the_rest_is_named(write, stored, tmp_path):
    (stored / "additional_chat_templates").mkdir()
    others = {"README.md": "a card", "log.txt": "a log", "modeling_old.py": "raise SystemExit"}
    for name, text in {**GO_ALONG, **others}.items():
        (stored / name).write_text(text)
    out = tmp_path / "out"
    notes = " ".join(write(stored, out).notes)
    assert {name: (out / name).read_text() for name in GO_ALONG} == GO_ALONG
    assert not [name for name in others if name not in notes]
    assert not [name for name in (*GO_ALONG, "tokenizer") if name in notes]
    assert not (out / "README.md").exists() or (out / "README.md").read_text() != "a card"
    assert not (out / "modeling_old.py").exists()


def test_of_what_we_wrote_nothing_is_said_until_it_is_edited(stored, tmp_path):
    def said(out: str) -> list[str]:
        notes = convert_checkpoint(tmp_path / "first", tmp_path / out).notes
        return [note for note in notes if not note.startswith("input_mult is 2.5")]

    convert_checkpoint(stored, tmp_path / "first")
    assert said("second") == []
    (tmp_path / "first/README.md").write_text("a card")
    assert said("third") == ["The output has a card and code of its own, in place of: README.md."]


@pytest.mark.parametrize("model_type", ["TeleFLM", "other"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_linked_folder_of_templates(inside, model_type, stored, tmp_path):
    config = json.loads((stored / "config.json").read_bytes())
    (stored / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    place = stored / "templates" if inside else tmp_path / "templates"
    place.mkdir()
    (place / "tools.jinja").write_text("{{ 2 }}")
    (stored / "additional_chat_templates").symlink_to(place)
    if inside:
        result = convert_checkpoint(stored, tmp_path / "out")
        assert not [note for note in result.notes if "templates" in note]
        assert (tmp_path / "out/additional_chat_templates/tools.jinja").read_text() == "{{ 2 }}"
        assert not (tmp_path / "out/additional_chat_templates").is_symlink()
    else:
        with pytest.raises(CheckpointError, match=f"additional_chat_templates: is a link to {place}, outside of"):
            convert_checkpoint(stored, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", FOLDERS.values(), ids=FOLDERS)
def test_weights_through_a_link_out_of_the_folder_are_named(write, stored, tmp_path):
    assert not [note for note in write(stored, tmp_path / "plain").notes if "through links" in note]
    secret = tmp_path / "secret"
    (stored / "model.safetensors").rename(secret)
    (stored / "model.safetensors").symlink_to(secret)
    assert [note for note in write(stored, tmp_path / "out").notes if "through links" in note] == [
        f"Weights were taken through links that lead out of their folder: model.safetensors ({secret})."
    ]


@pytest.mark.parametrize("write", FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", MANIFEST])
def test_what_the_output_is_made_from_lies_in_the_source(name, write, stored, tmp_path):
    source = tmp_path / "source"
    convert_checkpoint(stored, source, options=WriteOptions(max_shard_size="100KB"))
    (source / name).rename(tmp_path / "secret")
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{name}: is a link to .*/secret, outside of"):
        write(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
