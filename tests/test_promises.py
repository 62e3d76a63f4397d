# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""README and the guides, sentence by sentence: what they promise stands there as it is tested here.

Each of these has tests of its own that go further; this file fails when a sentence changes and its test does not.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sft.training.recipe import Recipe, RecipeError
from teleflm.app import app
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SAID = " ".join(" ".join(page.read_text().split()) for page in GUIDES)
WIDER = ("--set", "hidden_size=40", "--set", "num_attention_heads=5")


def promise(sentence: str) -> Callable[[Callable], Callable]:
    """A test of a sentence, or a part of one, that README or a guide has word for word."""

    def marked(test: Callable) -> Callable:
        assert " ".join(sentence.split()) in SAID, f"README and the guides do not say: {sentence}"
        return test

    return marked


def teleflm(*arguments: str | Path | int, status: int = 0) -> str:
    """Run a command in this process; everything it says."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    return folder


@pytest.fixture
def bin_model(model, tmp_path) -> Path:
    """The same as `.bin`."""
    folder = shutil.copytree(model, tmp_path / "bin")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


class Harm:
    def __reduce__(self):
        return (print, ("executed",), None)


@promise("`convert` never loads the model, never executes what a pickle contains")
def test_convert_executes_nothing(bin_model, tmp_path):
    tensors = torch.load(bin_model / "pytorch_model.bin", weights_only=True)
    torch.save({**tensors, "harm": Harm()}, bin_model / "pytorch_model.bin")
    script = "import sys; from teleflm.app import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", script, "convert", str(bin_model), str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "executed" not in result.stdout + result.stderr
    assert result.stdout.strip() == "False"
    assert not (tmp_path / "out").exists()


@promise("names each tensor and each file that differs from the folder's record")
def test_inspect_check_names_what_differs(bin_model, tmp_path):
    out = tmp_path / "out"
    teleflm("convert", bin_model, out)
    teleflm("inspect", out, "--check")
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "generation_config.json").write_text('{"do_sample": true}')
    said = teleflm("inspect", out, "--check", status=3)
    assert "model.norm.weight" in said
    assert "generation_config.json" in said


@promise('or says "already done"; that is said only of a folder')
@pytest.mark.parametrize("change", ["weights", "tokenizer", "output"])
def test_already_done(change, bin_model, tmp_path):
    out = tmp_path / "out"
    teleflm("convert", bin_model, out)
    assert "already done" in teleflm("convert", bin_model, out)
    if change == "weights":
        tensors = torch.load(bin_model / "pytorch_model.bin", weights_only=True)
        torch.save({name: tensor + 1 for name, tensor in tensors.items()}, bin_model / "pytorch_model.bin")
    elif change == "tokenizer":
        config = json.loads((bin_model / "tokenizer_config.json").read_text())
        (bin_model / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 77}))
    else:
        (out / "config.json").write_text("{}")
    said = teleflm("convert", bin_model, out, status=2)
    assert "already done" not in said
    expected = {"weights": "pytorch_model.bin", "tokenizer": "tokenizer_config.json", "output": "config.json"}
    assert expected[change] in said


@promise("A file of yours in the way is never replaced without `--overwrite`.")
def test_a_file_in_the_way(bin_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("README.md", "notes.txt"):
        (out / name).write_text("mine")
    assert "README.md" in teleflm("convert", bin_model, out, status=2)
    assert {path.name: path.read_text() for path in out.iterdir()} == {"README.md": "mine", "notes.txt": "mine"}
    teleflm("convert", bin_model, out, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine"


@promise("any other file that is a link out of the folder is refused.")
def test_links_that_lead_out(bin_model, tmp_path):
    (tmp_path / "secret.json").write_text('{"eos_token_id": 2}')
    (bin_model / "generation_config.json").unlink(missing_ok=True)
    (bin_model / "generation_config.json").symlink_to(tmp_path / "secret.json")
    said = teleflm("convert", bin_model, tmp_path / "out", status=2)
    assert "generation_config.json" in said
    assert not (tmp_path / "out/generation_config.json").exists()


@promise(
    "A quantised checkpoint (FP8, GPTQ, AWQ, bitsandbytes, compressed-tensors) is copied as it is, and refused where"
)
def test_quantised_is_copied_or_refused(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    tensors["lm_head.weight_scale_inv"] = torch.tensor([[0.0123]])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    teleflm("convert", folder, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in tensors.items())
    for command in (("convert",), ("export", "--to", "llama"), ("grow", *WIDER)):
        line = (command[0], folder, tmp_path / "no", *command[1:], *(("--dtype", "bfloat16") * (len(command) == 1)))
        assert "is quantised (it holds lm_head.weight_scale_inv)" in teleflm(*line, status=2)


@promise("One that is too large for the type is an error that names the tensor and the place;")
@promise("Infinities and NaN that a Hub folder already has stay what they are.")
def test_too_large_for_the_type(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    teleflm("convert", folder, tmp_path / "inf", "--dtype", "float16")
    assert load_file(tmp_path / "inf/model.safetensors")["model.norm.weight"][3] == float("inf")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    line = ("convert", folder, tmp_path / "out", "--dtype", "float16")
    assert "model.norm.weight[3] is 100000, the largest float16 is 65504" in teleflm(*line, status=1)
    teleflm(*line, "--allow-nonfinite")  # goes on where the error was
    assert load_file(tmp_path / "out/model.safetensors")["model.norm.weight"][3] == float("inf")
    assert "no_overflow was False and is True" in teleflm(*line, status=2)


@promise(
    "hold 256 MB together, whatever the model; `--workers` and `--memory` say otherwise, and no byte depends on either."
)
@promise("`--dry-run` states the most memory that the run can take.")
def test_memory(bin_model, tmp_path):
    assert "in at most" in teleflm("convert", bin_model, tmp_path / "a", "--dry-run")
    teleflm("convert", bin_model, tmp_path / "a", "--dtype", "bfloat16")
    teleflm("convert", bin_model, tmp_path / "b", "--dtype", "bfloat16", "--workers", "64", "--memory", "24MB")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    said = teleflm("convert", bin_model, tmp_path / "c", "--memory", "1MB", status=2)
    assert re.search(r"--memory is 1 MB, less than one thread takes here; the least that works is \d+MB\.", said)


@promise("Multipliers that neither the arguments nor a configuration say are not assumed to be none")
def test_multipliers_are_stated(model, tmp_path):
    teleflm("export", model, tmp_path / "run", "--to", "megatron")
    (tmp_path / "run/config.json").unlink()
    line = ("convert", tmp_path / "run", tmp_path / "out", "--vocab-size", "640")
    assert "do not say the factors on embeddings and logits" in teleflm(*line, status=2)
    teleflm(*line, "--multipliers", "none")
    assert json.loads((tmp_path / "out/config.json").read_text())["use_mup"] is False


@promise("The vocabulary's size is never guessed")
@promise("a model goes to Megatron and comes back without a byte of its weights changed")
def test_to_megatron_and_back(model, tmp_path):
    teleflm("export", model, tmp_path / "run", "--to", "megatron", "--tp", 2, "--pp", 3, "--multipliers", "keep")
    back = ("convert", tmp_path / "run", tmp_path / "back", "--tokenizer", model)
    teleflm(*back, "--vocab-size", 640)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@promise("options of the other growth are refused beside `--experts`")
def test_experts_go_with_no_other_growth(model, tmp_path):
    said = teleflm("grow", model, tmp_path / "out", "--experts", 4, "--top-k", 2, *WIDER, status=2)
    assert "--experts does not go with --set: grow first, then make experts of the result." in said
    assert not (tmp_path / "out").exists()


@promise("An option that growth cannot honour is refused, never dropped.")
@pytest.mark.parametrize("option", ["hiden_size=96", "rms_norm_eps=1e-3", "use_cache=false", "hidden_act=gelu"])
def test_growth_refuses_what_it_cannot_honour(option, model, tmp_path):
    assert option.partition("=")[0] in teleflm("grow", model, tmp_path / "out", *WIDER, "--set", option, status=2)
    assert not (tmp_path / "out").exists()


@promise("The same seed gives the same bytes, whatever the number of workers, ranks, shards or interruptions.")
def test_the_same_seed_gives_the_same_bytes(model, tmp_path):
    teleflm("grow", model, tmp_path / "a", *WIDER, "--workers", 1)
    teleflm("grow", model, tmp_path / "b", *WIDER, "--workers", 5, "--max-shard-size", "40KB")
    whole = load_file(tmp_path / "a/model.safetensors")
    parts = {
        name: tensor for file in (tmp_path / "b").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@promise("`verify` never calls the code that grew.")
@promise("Its last line is the strongest statement that is true")
def test_verify(model, tmp_path):
    teleflm("grow", model, tmp_path / "out", *WIDER)
    script = """if True:
        import sys
        from teleflm.app import main
        try:
            main()
        finally:
            print([name for name in sys.modules if name.startswith("growth.")])
    """
    command = [sys.executable, "-c", script, "verify", str(model), str(tmp_path / "out"), "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    described, modules = result.stdout.rsplit("\n[", 1)
    assert json.loads(described)["verdict"] == "certified"
    assert set(re.findall(r"growth\.(\w+)", modules)) == {"verification"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps({**config, "rms_norm_eps": config["rms_norm_eps"] * 1.25}))
    said = teleflm("verify", model, tmp_path / "out", status=3)
    assert "Not A's function by B's bytes. config.json: rms_norm_eps" in said


@promise("teleflm eval MODEL --text heldout.txt --tasks quiz.jsonl")
@promise("teleflm eval MODEL --text heldout.txt --loaded --record")
@promise("Both ways give the same numbers, to 1e-6 in float32.")
@promise("Questions have `question` or `context`, `choices` and `answer` (number, letter or text)")
@promise("the command says beforehand what that is, and how much disk.")
@promise("name the digests of weights, numbers and tokenizer that they are of, of the texts, date and versions.")
def test_eval(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (tmp_path / "heldout.txt").write_text("The value of a subscription is the item that the key selects. 天地\n" * 20)
    rows = [("question", 1), ("context", "A"), ("question", "no")]
    questions = [{name: "Is it?", "choices": ["yes", "no"], "answer": answer} for name, answer in rows]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    what = ("--text", tmp_path / "heldout.txt", "--tasks", tmp_path / "quiz.jsonl", "--json")
    results = []
    for more in ((), ("--loaded", "--record")):
        run = CliRunner().invoke(app, ["eval", str(folder), *map(str, what), *more])
        assert run.exit_code == 0, run.output
        results.append(json.loads(run.stdout))
        if not more:
            assert re.search(r"[\d.]+ MB of memory, [\d.]+ kB of disk in ", run.stderr)
    streamed, loaded = (result["texts"][0]["bits_per_byte"] for result in results)
    assert streamed == pytest.approx(loaded, rel=1e-6)
    assert results[0]["tasks"][0]["acc"] == results[1]["tasks"][0]["acc"]
    said = json.loads((folder / "teleflm_eval.json").read_bytes())
    assert said["model"].keys() == {"weights", "config", "tokenizer"}
    assert said["configs"]["heldout"]["sha256"] == results[0]["texts"][0]["sha256"]
    assert said["date"]
    assert said["versions"]["teleflm"]


@promise('teleflm chat MODEL --system "Be brief."')
@promise("a model without a template is refused, or continues your text with `--completion`.")
@promise("From a pipe, each line is a turn, and only answers are printed; `--json` prints each on a line.")
def test_chat(model, tmp_path):
    line = ["chat", str(model), "--system", "Be brief.", "--max-new-tokens", "4", "--json"]
    run = CliRunner().invoke(app, line, input="What?\nWhy?\n")
    assert [json.loads(answer)["question"] for answer in run.stdout.splitlines()] == ["What?", "Why?"]
    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    refused = CliRunner().invoke(app, ["chat", str(bare)], input="What?\n")
    assert refused.exit_code == 2
    assert "--completion continues your text instead" in refused.stderr
    assert CliRunner().invoke(app, ["chat", str(bare), "--completion"], input="x\n/exit\n").exit_code == 0


@promise("an unknown one is an error, and so is one that would do nothing: Liger Kernel, for example")
@pytest.mark.parametrize("key", ["learning_rat", "use_liger_kernel"])
def test_recipes_refuse(key):
    recipe = {"model_name_or_path": "model", "data_files": "data.jsonl", "output_dir": "out"}
    with pytest.raises(RecipeError, match=key):
        Recipe.from_dict({**recipe, key: True})
