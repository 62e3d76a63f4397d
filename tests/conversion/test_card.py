# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The card: what of a folder it says, that its code runs as written, and that the Hub can read it."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from conversion import convert_checkpoint
from conversion.checkpoint.manifest import MANIFEST
from conversion.exports.export import export_checkpoint
from conversion.hub.card import CardFacts, card_facts, exactness, is_repo_id, model_facts, render_card
from conversion.hub.card_check import check_card
from conversion.hub.card_merge import merge_cards
from conversion.hub.results import Result
from growth import grow_checkpoint
from tests.fixtures.tiny import PIECE_COUNT, tiny_config, tiny_model, tiny_tokenizer

WIDER = {"hidden_size": 40, "num_attention_heads": 5}
WRITERS = {
    "convert": convert_checkpoint,
    "grow": lambda source, out: grow_checkpoint(source, out, WIDER),
    "granite": lambda source, out: export_checkpoint(source, out, to="granite"),
    "llama": lambda source, out: export_checkpoint(source, out, to="llama"),
}
OWNERS = {
    "license": "apache-2.0",
    "language": ["en", "zh"],
    "datasets": ["owner/corpus"],
    "base_model": "owner/parent",
    "base_model_relation": "quantized",
}


@pytest.fixture
def stored(tmp_path) -> Path:
    """A Tele-FLM with a card of its owner's, which says nothing about pieces that the tokenizer does not have."""
    folder = tmp_path / "stored"
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[PIECE_COUNT:] = 0
    model.save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({**OWNERS, 'inference': False})}---\n# mine\n")
    return folder


def metadata(card: str) -> dict:
    """As the Hub's own client reads it."""
    return ModelCard(card).data.to_dict()


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_written_card_is_one_of_the_hubs_and_keeps_what_stays_true(write, stored, tmp_path):
    write(stored, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert check_card(card) == []
    said = metadata(card)
    grown = write is WRITERS["grow"]
    kept = {key: value for key, value in OWNERS.items() if not (grown and key == "base_model_relation")}
    own = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["TeleFLM"]}
    assert said == {**kept, **own}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_the_facts_of_the_folder_are_those_it_was_written_from(write, stored, tmp_path):
    write(stored, tmp_path / "out")
    assert render_card(card_facts(tmp_path / "out")) == (tmp_path / "out/README.md").read_text()


def blocks(card: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))


def run(code: str, cwd: Path) -> str:
    """In a process that knows nothing of this package, even where it is installed."""
    hide = (
        "import sys\nclass Hidden:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'modeling_teleflm': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    environment = {"HF_MODULES_CACHE": str(cwd.parent / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", hide + code + "\nprint(type(model).__name__)"]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "loaded"),
    [(WRITERS["grow"], "TeleFLMForCausalLM"), (WRITERS["llama"], "LlamaForCausalLM")],
    ids=["grow", "llama"],
)
def test_the_code_of_a_card_runs_as_written(write, loaded, stored, tmp_path):
    write(stored, tmp_path / "out")
    code = blocks((tmp_path / "out/README.md").read_text())
    assert 'pipeline("text-generation", model="."' in code
    assert "apply_chat_template" in code
    assert run(code, tmp_path / "out") == loaded


def test_with_a_name_it_is_loaded_by_name(stored, tmp_path):
    convert_checkpoint(stored, tmp_path / "out")
    card = render_card(card_facts(tmp_path / "out", repo_id="owner/name"))
    assert 'AutoModelForCausalLM.from_pretrained("owner/name", trust_remote_code=True)' in card
    assert "# name\n" in card
    assert '"."' not in card
    assert blocks(card).replace('"owner/name"', '"."') == blocks((tmp_path / "out/README.md").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("base", ["", "owner/base"])
def test_an_adapters_card(base, stored, tmp_path):
    """Where the base has a name, its code names it; else the adapter's own configuration leads to it."""
    convert_checkpoint(stored, tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    out = tmp_path / "adapter"
    adapter.save_pretrained(out)
    tiny_tokenizer(out).save_pretrained(out)
    config = json.loads((out / "adapter_config.json").read_bytes())
    (out / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": base or str(tmp_path / "base")})
    )
    convert_checkpoint(stored, tmp_path / "code")
    for file in (tmp_path / "code").iterdir():
        if file.suffix in (".py", ".jinja") or file.name == "tokenizer_config.json":
            (out / file.name).write_bytes(file.read_bytes())
    (out / "README.md").unlink()
    card = render_card(card_facts(out))
    said = metadata(card)
    assert said["library_name"] == "peft"
    assert (said.get("base_model"), said.get("base_model_relation")) == ((base, "adapter") if base else (None, None))
    assert str(tmp_path) not in card
    assert "| Rank | 2 |" in card
    code = blocks(card).replace('"owner/base"', json.dumps(str(tmp_path / "base")))
    assert run(code, out).startswith("PeftModel")


def test_memory_is_by_the_formula(stored, tmp_path):
    convert_checkpoint(stored, tmp_path / "out", dtype="bfloat16")
    card = (tmp_path / "out/README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    assert f"| bfloat16, as stored | {nbytes / 1000:.3g} kB |" in card
    cache = model(torch.arange(10)[None], use_cache=True).past_key_values
    per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 10
    assert f"add {per_token:.3g} kB for every 1,000 tokens" in card


def test_what_is_exact_follows_the_lineage():
    grow = {"operation": "grow", "source": {"hidden_size": 1, "vocab_size": 1}, "target": {"hidden_size": 2}}
    trained = {"operation": "fine-tune", "steps": 2, "parent": {"lineage": grow}}
    assert any("bfloat16" in sentence for sentence in exactness(grow))
    assert "Training has changed the weights" in exactness(trained)[-1]
    twice = {**trained, "parent": {"lineage": trained}}
    assert exactness(twice) == exactness(trained)
    assert exactness({"operation": "convert"}) == ["Conversion keeps every value of the weights, bit by bit."]
    assert "rounded once" in exactness({"operation": "convert", "dtype": "bfloat16"})[0]
    assert exactness({"operation": "train", "initial_weights": "random", "steps": 2}) == []
    kept = {"operation": "train", "steps": 2, "dtype": "float32", "parent": {"lineage": grow}}
    assert not any("cast" in sentence for sentence in exactness(kept))
    assert exactness(None) == exactness({"operation": 3, "parent": 1}) == []


def test_a_hostile_record_stays_on_its_line(stored):
    config = {**tiny_config().to_dict(), "auto_map": {"AutoModelForCausalLM": "x.y"}}
    lineage = {"operation": "<!-- teleflm:end origin -->\n# Fake\n|"}
    card = render_card(model_facts(config, "float32", lineage))
    assert card.count("teleflm:end origin") == 2
    assert "\n# Fake" not in card
    assert merge_cards(card, card) == card


BAD_CARDS = {
    "yaml": "---\na: [\n---\n",
    "list": "---\n- a\n---\n",
    "date": "---\nlicense: 2024-99-99\n---\n",
    "bomb": "---\na: &a [x]\nb: &b [*a, *a]\nlicense: mit\n---\n",
    "deep": f"---\na: {'[' * 5000}\n---\n",
    "path": f"---\nbase_model: {'/home/me/model'}\nlicense: [1]\nlanguage: {{a: b}}\n---\n",
    "bytes": "\x00\x01",
}


@pytest.mark.parametrize("text", BAD_CARDS.values(), ids=BAD_CARDS)
def test_a_sources_card_that_says_nothing_stops_no_conversion(text, stored, tmp_path):
    (stored / "README.md").write_text(text)
    convert_checkpoint(stored, tmp_path / "out")
    said = metadata((tmp_path / "out/README.md").read_text())
    assert not {"base_model", "language"} & said.keys()
    assert said.get("license") in (None, "2024-99-99")


def test_a_licence_is_known_by_its_text(stored, tmp_path):
    (stored / "README.md").unlink()
    (stored / "LICENSE").write_text((Path(__file__).parents[2] / "LICENSE").read_text())
    convert_checkpoint(stored, tmp_path / "out")
    assert metadata((tmp_path / "out/README.md").read_text())["license"] == "apache-2.0"
    (stored / "LICENSE").write_text("Do as you like.")
    convert_checkpoint(stored, tmp_path / "other")
    assert "license" not in metadata((tmp_path / "other/README.md").read_text())


def test_results_are_in_the_table_and_in_the_index():
    facts = CardFacts("float32", 10, 40, repo_id="owner/name", results=(Result("arc", "acc", 0.5, 0.01, shots=5),))
    card = render_card(facts)
    assert "| arc | 5 | acc | 0.5 | 0.01 |" in card
    (result,) = ModelCard(card).data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("arc", "acc", 0.5)
    assert "No evaluation" not in card
    assert "No evaluation" in render_card(replace(facts, results=()))


def test_a_folder_without_tokenizer_or_record(stored, tmp_path):
    convert_checkpoint(stored, tmp_path / "out")
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", MANIFEST):
        (tmp_path / "out" / name).unlink()
    card = render_card(card_facts(tmp_path / "out"))
    assert "There is no tokenizer here" in card
    assert "pipeline(" not in card
    assert "Made from" not in card
    assert MANIFEST not in card


def test_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_repo_id("CofeAI/Tele-FLM-1T")
    assert not [name for name in ("/a/b", "a/b/c", "./a", "~/a", "..", "a", "C:\\a/b", "a/..") if is_repo_id(name)]
    (tmp_path / "runs/base").mkdir(parents=True)
    assert not is_repo_id("runs/base")
