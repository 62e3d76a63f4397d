# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Folders: the published layout in, a self-contained Hub repository out."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import modeling_teleflm
from modeling_teleflm.modeling_teleflm import AUTO_MAP
from tests.fixtures.tiny import tiny_model
from tests.modeling.test_configuration import PUBLISHED

MODEL_CLASSES = {
    AutoModel: modeling_teleflm.TeleFLMModel,
    AutoModelForCausalLM: modeling_teleflm.TeleFLMForCausalLM,
    AutoModelForQuestionAnswering: modeling_teleflm.TeleFLMForQuestionAnswering,
    AutoModelForSequenceClassification: modeling_teleflm.TeleFLMForSequenceClassification,
    AutoModelForTokenClassification: modeling_teleflm.TeleFLMForTokenClassification,
}
IDS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def published_folder(tmp_path_factory):
    """A tiny checkpoint laid out as the published ones are, and code that must never run."""
    folder = tmp_path_factory.mktemp("published") / "checkpoints" / "tiny"
    folder.mkdir(parents=True)
    model = tiny_model(dtype=torch.bfloat16)
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    fields += ("vocab_size", "max_position_embeddings", "input_mult", "output_mult", "mup_scale_factor")
    config = {**PUBLISHED, **{field: getattr(model.config, field) for field in fields}}
    (folder / "config.json").write_text(json.dumps(config))
    weights, weight_map = model.state_dict(), {}
    for shard in range(9):
        name = f"pytorch_model-{shard + 1:05d}-of-00009.bin"
        part = dict(list(weights.items())[shard::9])
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    size = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for module in ("configuration_teleflm", "modeling_teleflm"):
        (folder / f"{module}.py").write_text("raise RuntimeError('the published code was executed')\n")
    return folder


@pytest.mark.parametrize("options", [{}, {"device_map": {"": "cpu"}}, {"device_map": "auto"}], ids=str)
@pytest.mark.parametrize("as_subfolder", [False, True], ids=["folder", "subfolder"])
def test_a_published_checkpoint_loads(published_folder, as_subfolder, options):
    if as_subfolder:
        options = {**options, "subfolder": published_folder.name}
        published_folder = published_folder.parent
    model, report = AutoModelForCausalLM.from_pretrained(published_folder, output_loading_info=True, **options)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = tiny_model(dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_a_published_checkpoint_saves_as_a_hub_folder_of_ours(published_folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(published_folder).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert "published code" not in (tmp_path / "modeling_teleflm.py").read_text()
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}], ids=str)
def test_where_the_package_is_imported_its_classes_win(hub_folder, trust):
    assert type(AutoConfig.from_pretrained(hub_folder, **trust)) is modeling_teleflm.TeleFLMConfig
    for auto_class, model_class in MODEL_CLASSES.items():
        assert type(auto_class.from_pretrained(hub_folder, **trust)) is model_class
    if not trust.get("trust_remote_code"):  # told to trust it, AutoTokenizer prefers the folder's code, here the same
        assert type(AutoTokenizer.from_pretrained(hub_folder, **trust)) is modeling_teleflm.TeleFLMTokenizer


def test_a_hub_folder_is_complete(hub_folder):
    assert {path.name for path in hub_folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.model", "tokenizer_config.json", "chat_template.jinja"),
        *("configuration_teleflm.py", "modeling_teleflm.py", "tokenization_teleflm.py"),
    }
    config = json.loads((hub_folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert {auto_class.__name__ for auto_class in MODEL_CLASSES} | {"AutoConfig"} == AUTO_MAP.keys()
    tokenizer_config = json.loads((hub_folder / "tokenizer_config.json").read_text())
    assert tokenizer_config["auto_map"] == {"AutoTokenizer": ["tokenization_teleflm.TeleFLMTokenizer", None]}


# What a user without this package does. The package is hidden even where it is installed.
ISOLATED = """
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("modeling_teleflm", "google"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification,
    AutoModelForTokenClassification, AutoTokenizer
)

folder, resaved, logits_file = sys.argv[1:]
ids = torch.arange(3, 23)[None]
expected = torch.load(logits_file)
for path in (folder, resaved):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    assert torch.equal(model(ids).logits, expected)
    assert type(model).__module__.startswith("transformers_modules.")
    model.save_pretrained(resaved)
    tokenizer.save_pretrained(resaved)
# AutoModel comes last: loading with it would register the decoder that the heads have to find without that.
for auto_class in (AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoModelForTokenClassification,
                   AutoModel):
    head = auto_class.from_pretrained(folder, trust_remote_code=True)
    assert type(head).__module__.startswith("transformers_modules.")
    assert torch.equal(head.get_input_embeddings().weight, model.get_input_embeddings().weight)
chat = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
print(json.dumps({
    "config": type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__,
    "chat": dict(tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True)),
}))
"""


def load_in_isolation(folder, tmp_path):
    """Run ISOLATED on the folder and return what it prints; AssertionError with its last line if it fails."""
    logits_file = tmp_path / "logits.pt"
    torch.save(tiny_model()(IDS).logits.detach(), logits_file)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", ISOLATED, str(folder), str(tmp_path / "resaved"), str(logits_file)]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr.strip().splitlines()[-1]
    return json.loads(run.stdout.splitlines()[-1])  # some packages greet on stdout


def test_a_hub_folder_loads_where_the_package_is_not_installed(hub_folder, tokenizer, tmp_path):
    result = load_in_isolation(hub_folder, tmp_path)
    assert result["config"] == "TeleFLMConfig"
    chat = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    assert result["chat"] == dict(tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "correct", "bug", "message"),
    [
        ("modeling_teleflm.py", "from .configuration_teleflm", "from modeling_teleflm", "modeling_teleflm"),
        ("configuration_teleflm.py", "float | int", "float", "'mup_scale_factor' expected float, got int"),
        ("modeling_teleflm.py", "decoders.register(type(config), TeleFLMModel)", "pass", "custom code"),
    ],
    ids=["absolute import of the package", "multipliers annotated float only", "AutoModel not registered"],
)
def test_a_broken_hub_folder_is_caught(hub_folder, tmp_path, file, correct, bug, message):
    broken = shutil.copytree(hub_folder, tmp_path / "broken")
    source = (broken / file).read_text()
    assert correct in source
    (broken / file).write_text(source.replace(correct, bug))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "mup_scale_factor": 4}))
    with pytest.raises(AssertionError, match=message):
        load_in_isolation(broken, tmp_path)
