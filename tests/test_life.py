# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""From a checkpoint of megatron-core to a model that a stranger loads by name, every step by its command."""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from conversion.checkpoint.manifest import MANIFEST
from conversion.hub import clean_process
from teleflm.app import app
from tests.fixtures.hub import Hub, running_hub
from tests.fixtures.megatron_worlds import TOKENS, library_logits, make_checkpoints
from tests.fixtures.tiny import PIECE_COUNT, tiny_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="megatron-core has wheels for Linux only"),
]

ROOT = Path(__file__).parents[1]
NAME = "owner/grown-tele-flm"
LAYOUT = "dist-wordy"
AXES = {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 64, "num_hidden_layers": 5, "vocab_size": 640}
SEQUENCE, TRAINED_STEPS, TUNED_STEPS = 32, 3, 2
QUESTION = {"role": "user", "content": "What is assert?"}
# A process that cannot import this package, not even where it is installed: as that of the pre-flight.
STRANGER = f"""
import sys
sys.path.insert(0, {str(Path(clean_process.__file__).parent)!r})
from clean_process import WithoutUs
sys.meta_path.insert(0, WithoutUs())
"""
BY_NAME = """
import json, torch
from transformers import AutoModelForCausalLM, pipeline
name, logits, tokens, messages = json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype=torch.float32)
with torch.no_grad():
    torch.save(model(torch.tensor(tokens)).logits, logits)
generator = pipeline("text-generation", model=name, trust_remote_code=True)
said = generator(messages, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]["generated_text"]
code = [type(thing).__module__ for thing in (model, generator.model, generator.tokenizer)]
print("\\n" + json.dumps({"said": said, "code": code}))
"""


@dataclass(frozen=True)
class Life:
    """What became of the model.

    Args:
        place: folder of every step's folder, by what made it.
        hub: where it is published.
        published: what `publish --json` said.
    """

    place: Path
    hub: Hub
    published: dict[str, Any]

    @property
    def files(self) -> dict[str, bytes]:
        """Of the repository."""
        return self.hub.repositories[NAME].files()


def teleflm(*arguments: object) -> str:
    """Run a command in this process; what it printed, without its progress."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def options(**keys: object) -> list[str]:
    return [text for key, value in keys.items() for text in (f"--{key}", str(value))]


def run(command: list[str], environment: dict[str, str], cwd: Path = ROOT, given: Any = None) -> str:
    """Run a process to its end; what it printed."""
    result = subprocess.run(
        command, cwd=cwd, env=environment, input=json.dumps(given), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def as_stranger(code: str, life: Life, home: Path, given: Any = None) -> str:
    """Run code in a process with transformers, without this package and without a token, whose cache is empty."""
    home.mkdir()
    environment = life.hub.environment(token=None, HF_HOME=str(home))
    environment = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    return run([sys.executable, "-I", "-c", STRANGER + code], environment, home, given)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    place = tmp_path_factory.mktemp("life")
    make_checkpoints(place / "runs", LAYOUT)
    tiny_tokenizer(place / "tokenizer").save_pretrained(place / "tokenizer")
    texts = [{"text": text[:1500]} for text in topics.topics.values() if len(text) > 200][:6]
    text = write_lines(place / "text.jsonl", texts)
    answer = {"role": "assistant", "content": "A statement that raises where its condition is false."}
    chats = write_lines(place / "chats.jsonl", [{"messages": [QUESTION, answer]}] * 8)
    quiet = {"use_cpu": "true", "report_to": "none", "disable_tqdm": "true", "save_strategy": "no"}

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    native = (place / "runs" / LAYOUT, place / "converted")
    teleflm("convert", *native, "--tokenizer", place / "tokenizer", "--vocab-size", PIECE_COUNT)
    sizes = [text for axis, size in AXES.items() for text in ("--set", f"{axis}={size}")]
    teleflm("grow", place / "converted", place / "grown", *sizes)
    teleflm("verify", place / "converted", place / "grown", "--record")
    batches = {"block_size": SEQUENCE, "per_device_train_batch_size": 2, "max_steps": TRAINED_STEPS}
    folders = {"model_name_or_path": place / "grown", "train_files": text, "output_dir": place / "trained"}
    teleflm("train", *options(**folders, **batches, **quiet, learning_rate="1e-3"))
    recipe = {"use_cpu": True, "activation_checkpointing": False, "save_strategy": "no", "max_steps": TUNED_STEPS}
    (place / "recipe.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in recipe.items()))
    folders = {"model_name_or_path": place / "trained", "data_files": chats, "output_dir": place / "tuned"}
    teleflm("sft", "train", "--config", place / "recipe.yaml", *options(**folders))
    teleflm("sft", "export", place / "tuned", place / "final")
    torch.set_num_threads(threads)

    with running_hub() as hub:
        publish = ["-m", "teleflm", "publish", str(place / "final"), NAME, "--license", "apache-2.0", "--json"]
        said = run([sys.executable, *publish], hub.environment())
        yield Life(place, hub, json.loads(said))


def test_what_was_converted_is_the_model_of_megatron_core(life):
    model = AutoModelForCausalLM.from_pretrained(life.place / "converted", dtype=torch.float32)
    with torch.no_grad():
        logits = model(TOKENS).logits
    torch.testing.assert_close(logits, library_logits(life.place / "runs", LAYOUT), rtol=0, atol=1e-5)


def test_a_stranger_loads_it_by_name_and_it_is_the_model_of_the_last_folder(life, tmp_path):
    given = [NAME, str(tmp_path / "logits.pt"), TOKENS.tolist(), [QUESTION]]
    heard = json.loads(as_stranger(BY_NAME, life, tmp_path / "home", given).splitlines()[-1])
    assert [message["role"] for message in heard["said"]] == ["user", "assistant"]
    assert heard["said"][1]["content"]
    assert all(module.startswith("transformers_modules.") for module in heard["code"]), heard["code"]
    model = AutoModelForCausalLM.from_pretrained(life.place / "final", dtype=torch.float32)
    with torch.no_grad():
        expected = model(TOKENS).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def test_the_code_of_the_card_runs_as_written(life, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", life.files["README.md"].decode(), re.DOTALL)
    assert sum(f'"{NAME}"' in block for block in blocks) >= 2
    printed = as_stranger("\n".join([*blocks, "print(type(model).__module__)"]), life, tmp_path / "home")
    assert printed.splitlines()[-1].startswith("transformers_modules.")


def test_the_card_tells_the_life(life):
    """By the numbers that it was made with, and those of the data, which are counted here."""
    card = life.files["README.md"].decode()
    steps = re.findall(r"^\d+\. (.*)$", card, re.MULTILINE)
    converted, grown, trained, tuned, *rest = steps
    assert converted == (
        "Converted from a training checkpoint at iteration 100 (megatron-core, torch_dist, tensor parallel 2 x "
        "pipeline parallel 1, tensors stored whole)."
    )
    axes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    axes["vocab_size"] = PIECE_COUNT
    assert grown.startswith("Grown without changing the function it computes, rounding aside: ")
    assert all(f"{axis} {size} to {AXES[axis]}" in grown for axis, size in axes.items())
    assert grown.endswith("Certified against its source: every condition on its bytes holds.")
    assert trained.startswith(f"Trained in {TRAINED_STEPS} steps on {TRAINED_STEPS * 2 * SEQUENCE} tokens: ")
    assert tuned.startswith(f"Fine-tuned (sft, full) in {TUNED_STEPS} steps on 8 conversations, ")
    assert rest == ["Rewritten as safetensors from safetensors files."]
    assert "was cast to" not in card
    assert ModelCard(card).data.license == "apache-2.0"


def test_inspect_by_name_prints_the_chain_of_the_records(life, tmp_path):
    environment = life.hub.environment(token=None, HF_HOME=str(tmp_path))
    said = run([sys.executable, "-m", "teleflm", "inspect", NAME, "--json"], environment)
    links = json.loads(said)["chain"]
    steps = re.findall(r"^\d+\. (.*)$", life.files["README.md"].decode(), re.MULTILINE)
    assert [link["step"] for link in links] == steps
    assert [link["problems"] for link in links] == [[] for _ in links]
    local = [(life.place / name / MANIFEST).read_bytes() for name in ("converted", "grown", "trained", "tuned")]
    records = [hashlib.sha256(record).hexdigest() for record in [*local, life.files[MANIFEST]]]
    assert [link["record"] for link in links] == records


def test_what_is_downloaded_is_what_its_record_says(life, tmp_path):
    code = "import json\nfrom huggingface_hub import snapshot_download\nprint(snapshot_download(json.load(sys.stdin)))"
    folder = Path(as_stranger(code, life, tmp_path / "home", NAME).splitlines()[-1])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == life.files
    said = json.loads(teleflm("inspect", folder, "--check", "--json"))  # status 3 where anything differs
    card = (folder / "README.md").read_text()
    assert [link["step"] for link in said["chain"]] == re.findall(r"^\d+\. (.*)$", card, re.MULTILINE)


def test_the_repository_tells_nothing_of_this_machine(life):
    held = b"\n".join(content for name, content in life.files.items() if not name.endswith(".safetensors"))
    assert str(life.place).encode() not in held
    assert str(Path.home()).encode() not in held
    assert b"hf_test" not in held
