# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Conversations against what transformers' generate makes of the rendered turns; and the command in real processes."""

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import set_seed
from typer.testing import CliRunner

from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.sources import open_checkpoint
from conversion.hub.saved_model import record_saved_model
from conversion.model_identity import base_digest
from evaluation.conversation import Conversation, Sampling, TooLong, _Streamer, has_chat_template, open_conversation
from evaluation.measure import evaluate
from modeling_teleflm import TeleFLMForCausalLM, TeleFLMTokenizer
from teleflm.app import app
from teleflm.commands.chat import _lines, _shown
from teleflm.terminal import json_text
from tests.fixtures.tiny import tiny_config, tiny_model

ROOT = Path(__file__).parents[2]
PIECES = 600
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
GREEDY = Sampling(temperature=0, max_new_tokens=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory, folder) -> Path:
    """A tiny model whose window is small."""
    path = tmp_path_factory.mktemp("chat")
    tiny_model(tiny_config(max_position_embeddings=64), seed=3).save_pretrained(path)
    for name in ("tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / name, path)
    return path


def generated(folder: Path, prompt: str, **options) -> str:
    """Stock generate on a rendered text; the answer as sentencepiece decodes it after the prompt."""
    tokenizer = TeleFLMTokenizer(str(folder / "tokenizer.model"))
    model = TeleFLMForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    known = {"suppress_tokens": list(range(PIECES, 640)), "pad_token_id": 2, **options}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **known)[0].tolist()
    pieces, start = tokenizer.sp_model, ids.shape[1]
    whole = pieces.decode([made[start - 1], *(token for token in made[start:] if token != 2)])
    return whole[len(pieces.decode([made[start - 1]])) :]


def said(conversation: Conversation, text: str) -> str:
    pieces: list[str] = []
    answer = conversation.answer(text, pieces.append)
    assert "".join(pieces) == answer.text
    return answer.text


def test_turns_are_rendered_by_the_folders_template(model):
    conversation = open_conversation(str(model), system="Be brief.", sampling=GREEDY)
    first = said(conversation, "What?")
    prompt = "<_system>Be brief.<_user>What?<_bot>"
    assert first == generated(model, prompt, max_new_tokens=8, do_sample=False)
    assert first
    second = said(conversation, "Why?")
    prompt += f"{first}</s><_user>Why?<_bot>"
    assert second == generated(model, prompt, max_new_tokens=8, do_sample=False)
    conversation.reset()
    assert said(conversation, "What?") == first


def test_sampling_is_that_of_transformers_and_repeats(model):
    sampling = Sampling(temperature=0.7, top_p=0.8, max_new_tokens=12)
    answers = [said(open_conversation(str(model), sampling=sampling, seed=seed), "What?") for seed in (5, 5, 6)]
    assert answers[0] == answers[1] != answers[2]
    set_seed(5)
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.7, "top_p": 0.8}
    assert answers[0] == generated(model, "<_user>What?<_bot>", **options)


def test_a_completion_goes_on_with_the_text(model):
    conversation = open_conversation(str(model), completion=True, sampling=GREEDY)
    for _ in range(2):  # each text on its own
        found = said(conversation, "the value of")
        assert found == generated(model, "<s>the value of", max_new_tokens=8, do_sample=False)


def test_the_oldest_turns_are_forgotten(model):
    """What the system says stays; and what the model then sees is what it would see without those turns."""
    conversation = open_conversation(str(model), system="Brief.", sampling=GREEDY)
    questions = ["One one one?", "Two two two?", "Three three?", "Four four four?"]
    forgotten = [conversation.answer(question).forgotten for question in questions]
    assert sum(forgotten) > 0
    kept = conversation.messages[:-2]
    assert len(conversation.messages) == 2 * (len(questions) - sum(forgotten))
    fresh = Conversation(conversation.model, conversation.tokenizer, 64, GREEDY, "Brief.", messages=kept)
    assert fresh.answer(questions[-1]).text == conversation.messages[-1]["content"]
    seen = [{"role": "system", "content": "Brief."}, *kept, {"role": "user", "content": questions[-1]}]
    rendered = conversation.tokenizer.apply_chat_template(seen, add_generation_prompt=True)
    assert len(rendered["input_ids"]) + 8 <= 64


def test_what_never_fits_is_refused_and_changes_nothing(model):
    conversation = open_conversation(str(model), sampling=Sampling(temperature=0, max_new_tokens=500))
    answer = conversation.answer("What?")
    assert answer.stop == "length"
    assert answer.tokens < 64  # to the end of the window
    before = list(conversation.messages)
    with pytest.raises(TooLong, match=r"this takes \d+ tokens, and the window has 64; shorten it"):
        conversation.answer("much too long " * 50)
    assert conversation.messages == before


def test_an_answer_can_be_ended(model):
    conversation = open_conversation(str(model), sampling=Sampling(temperature=0, max_new_tokens=30))
    pieces: list[str] = []
    answer = conversation.answer("What?", pieces.append, lambda: len(pieces) > 2)
    assert (answer.stop, answer.text) == ("interrupted", "".join(pieces))
    assert answer.tokens < 30
    assert conversation.messages[-1]["content"] == answer.text


def test_characters_of_several_tokens_come_whole(model):
    """Bytes of a character are shown once it is one; what never becomes one is shown at the end."""
    tokenizer = TeleFLMTokenizer(str(model / "tokenizer.model"))
    pieces, prompt = tokenizer.sp_model, tokenizer.sp_model.encode("<_bot>")
    ids, shown = pieces.encode("天 the 地"), []
    streamer = _Streamer(tokenizer, prompt, shown.append)
    streamer.put(torch.tensor([prompt]))
    for token in [*ids, pieces.piece_to_id("<0xE5>")]:
        streamer.put(torch.tensor([token]))
    assert UNKNOWN not in "".join(shown)
    streamer.end()
    assert "".join(shown) == streamer.text == pieces.decode([*prompt, *ids]).removeprefix("<_bot>") + UNKNOWN
    assert len(shown) > 3


def test_an_adapter_of_peft(model, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(TeleFLMForCausalLM.from_pretrained(model), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    shutil.copy(model / "tokenizer.model", tmp_path / "merged")
    answer = open_conversation(str(model), adapter=tmp_path / "adapter", sampling=GREEDY).answer("What?").text
    assert answer == generated(tmp_path / "merged", "<_user>What?<_bot>", max_new_tokens=8, do_sample=False)
    assert answer != generated(model, "<_user>What?<_bot>", max_new_tokens=8, do_sample=False)
    with pytest.raises(CheckpointError, match="is an adapter; "):
        open_conversation(str(tmp_path / "adapter"))


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    """A LoRA adapter of every projection, that has learned something, with the record of its base."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapter")
    adapted = peft.get_peft_model(
        TeleFLMForCausalLM.from_pretrained(model), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    record_saved_model(folder, {"operation": "fine-tune", "base": base_digest(open_checkpoint(model))}, 0)
    return folder


def with_tensors(adapter: Path, out: Path, change, *, recorded: bool = False) -> Path:
    """The adapter with other tensors."""
    shutil.copytree(adapter, out)
    if not recorded:
        (out / "teleflm_manifest.json").unlink()
    tensors = change(load_file(adapter / "adapter_model.safetensors"))
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


def test_an_adapter_says_what_it_was_trained_on(model, adapter, tmp_path):
    """By its record, whatever the folder is called; without one, what is known is said."""
    moved = shutil.copytree(model, tmp_path / "moved")
    assert open_conversation(str(moved), adapter=adapter, sampling=GREEDY).notes == ()
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tiny_model(tiny_config(max_position_embeddings=64), seed=4).save_pretrained(other)
    with pytest.raises(
        CheckpointError, match=r"adapter for another base: .*other has other weights \(digest spread:\w+, not"
    ):
        open_conversation(str(other), adapter=adapter)
    unnamed = with_tensors(adapter, tmp_path / "unnamed", lambda tensors: tensors)
    (note,) = open_conversation(str(other), adapter=unnamed).notes
    assert (
        note
        == f"What {unnamed} was trained on is known by its name alone, {model}: nothing tells whether {other} is that."
    )
    result = run(other, b"What?\n", "--adapter", str(unnamed))
    assert (result.exit_code, " ".join(result.stderr.split())) == (0, note)
    halved = {"change": lambda tensors: {name: value / 2 for name, value in tensors.items()}, "recorded": True}
    (note,) = open_conversation(str(model), adapter=with_tensors(adapter, tmp_path / "halved", **halved)).notes
    assert "halved is not what its record says: adapter_model.safetensors has other content; changed since." in note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: dict(list(tensors.items())[:2]),
            r"of \d+ tensors of the adapter, base_model\S+ is missing in it",
        ),
        (
            lambda tensors: dict(list(tensors.items())[1:]),
            r"of 42 tensors of the adapter, base_model\S+ is missing in its",
        ),
        (
            lambda tensors: {name.replace("layers", "blocks"): t for name, t in tensors.items()},
            r"is missing .* 41 more",
        ),
        (
            lambda tensors: {**tensors, "base_model.model.x.weight": torch.zeros(2)},
            "x.weight has no place in this model",
        ),
        (lambda tensors: {name: t[:1] for name, t in tensors.items()}, "does not fit this model: RuntimeError"),
    ],
    ids=["most-missing", "one-missing", "none-fits", "one-more", "shapes"],
)
def test_an_adapter_that_is_not_applied_whole(change, message, model, adapter, tmp_path, recwarn):
    planted = with_tensors(adapter, tmp_path / "planted", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_conversation(str(model), adapter=planted)
    assert "\n" not in str(caught.value)
    assert not [warning for warning in recwarn if "adapter" in str(warning.message)]


def test_an_adapter_for_fewer_layers(model, adapter, tmp_path):
    """Without a record, and of the same widths."""
    deeper = Path(shutil.copytree(model, tmp_path / "deeper"))
    tiny_model(tiny_config(max_position_embeddings=64, num_hidden_layers=4)).save_pretrained(deeper)
    planted = with_tensors(adapter, tmp_path / "planted", lambda tensors: tensors)
    settings = json.loads((planted / "adapter_config.json").read_bytes())
    settings["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
    (planted / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"of 56 tensors of the adapter, \S+layers.3\S+ is missing in its file"):
        open_conversation(str(deeper), adapter=planted)
    (planted / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"planted: holds no adapter_model.safetensors; was it saved whole"):
        open_conversation(str(model), adapter=planted)


def test_weights_that_are_missing_are_not_made_up(model, text, tmp_path):
    """transformers would draw them at random, and name them on stderr."""
    planted = Path(shutil.copytree(model, tmp_path / "planted"))
    tensors = load_file(model / "model.safetensors")
    lost = {name: value for name, value in tensors.items() if name != "model.layers.1.mlp.up_proj.weight"}
    more = {**tensors, "model.layers.3.mlp.up_proj.weight": torch.zeros(2)}
    for kept, message in ((lost, r"layers.1.mlp.up_proj.weight is missing"), (more, r"layers.3\S+ has no place in it")):
        save_file(kept, planted / "model.safetensors", metadata={"format": "pt"})
        for refused in (
            lambda: open_conversation(str(planted)),
            lambda: evaluate(planted, texts=[text], loaded=True),
        ):
            with pytest.raises(CheckpointError, match=f"planted: of the model that config.json describes, .*{message}"):
                refused()


def test_what_a_model_cannot_answer_is_one_line(model, tmp_path):
    """Weights of no numbers, settings of the folder that cannot be, and a tokenizer of another model."""
    planted = Path(shutil.copytree(model, tmp_path / "planted"))
    (planted / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "num_beams": 3}))
    with pytest.raises(CheckpointError, match=r"the model cannot answer: .*beam"):
        open_conversation(str(planted)).answer("x")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, planted / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(model / "generation_config.json", planted)
    with pytest.raises(CheckpointError, match=r"the model cannot answer: .*Its weights may hold NaN"):
        open_conversation(str(planted), sampling=Sampling(temperature=1.0)).answer("x")
    tiny_model(tiny_config(max_position_embeddings=64, vocab_size=320)).save_pretrained(planted)
    with pytest.raises(CheckpointError, match="planted: has 320 rows of embeddings, and the tokenizer makes id 599"):
        open_conversation(str(planted))
    (planted / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"planted: has no tokenizer, neither tokenizer.model nor"):
        open_conversation(str(planted))
    with pytest.raises(BrokenPipeError):  # which is of whoever reads the answer
        open_conversation(str(model)).answer("x", lambda piece: (_ for _ in ()).throw(BrokenPipeError()))


def test_what_cannot_be_talked_to(model, tmp_path):
    def refused(message: str, *arguments, **options) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            open_conversation(*arguments, **options)
        assert "\n" not in str(caught.value)

    refused("nowhere: no such folder, and no OWNER/NAME", str(tmp_path / "nowhere"))
    refused("config.json: no such file; there is no model", str(tmp_path))
    refused("adapter_config.json: no such file; --adapter is a folder", str(model), adapter=tmp_path)
    refused("--dtype is int3", str(model), dtype="int3")
    refused("--system does nothing with --completion", str(model), completion=True, system="x")
    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    refused(r"has no chat template \(chat_template.jinja\).*; --completion continues", str(bare))
    assert open_conversation(str(bare), completion=True).completion
    settings = json.loads((bare / "tokenizer_config.json").read_bytes())
    (bare / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages[0].content }}"}))
    assert has_chat_template(str(bare))
    (bare / "tokenizer.model").write_bytes(b"no model")
    refused("its tokenizer cannot be loaded", str(bare))
    config = json.loads((model / "config.json").read_bytes())
    (bare / "config.json").write_text(json.dumps({**config, "model_type": "TeleFLMMasked"}))
    refused("grows by masks", str(bare))
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"x" * 100)
    refused("cannot be loaded", str(broken))
    template = Path(shutil.copytree(model, tmp_path / "template"))
    (template / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(CheckpointError, match="the chat template cannot be rendered"):
        open_conversation(str(template)).answer("x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "--temperature is -1.0"),
        ({"temperature": 1e-45}, "--temperature is 1e-45; it is 0 for the most likely token, or 0.0001 to 10000."),
        ({"temperature": float("inf")}, "--temperature is inf"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"top_p": float("nan")}, "--top-p is nan"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0; it is at least 1."),
        ({"top_p": 0.0}, "--top-p is 0.0"),
        ({"top_p": 1.5}, "--top-p is 1.5"),
        ({"top_p": 0.5, "temperature": 0.0}, "--top-p does nothing at --temperature 0"),
    ],
)
def test_sampling_that_cannot_be(options, message):
    with pytest.raises(CheckpointError, match=message):
        Sampling(**options)


# The command.


def run(folder: Path, stdin: bytes, *options: str) -> Result:
    """In this process: stdin is no terminal there either."""
    command = ["chat", str(folder), "--temperature", "0", "--max-new-tokens", "8", *options]
    return CliRunner().invoke(app, command, input=stdin)


def test_from_a_pipe_there_are_answers_alone(model):
    """One for each line that says something; `--json` puts each on one line."""
    expected, conversation = [], open_conversation(str(model), sampling=GREEDY)
    expected += [conversation.answer(question).text for question in ("What?", "Why?")]
    conversation.reset()
    expected += [conversation.answer("What?").text]
    stdin = b"What?\n\n \nWhy?\r\n/reset\nWhat?\n/exit\nNever?\n"
    plain = run(model, stdin)
    assert (plain.exit_code, plain.stderr) == (0, "")
    assert plain.stdout == "".join(f"{answer}\n" for answer in expected)
    lines = run(model, stdin, "--json").stdout.removesuffix("\n").split("\n")
    assert [json.loads(line)["answer"] for line in lines] == expected
    assert [json.loads(line)["question"] for line in lines] == ["What?", "Why?", "What?"]


def test_a_pipe_that_is_too_long_or_no_text(model, monkeypatch):
    too_long = b"x" * 10**6 + b"\n"
    for stdin, message in ((too_long, "the window has 64; shorten it"), (b"\xff\n", "stdin: is not UTF-8")):
        result = run(model, stdin)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
    lenient = io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8", errors="surrogateescape")  # as of a C locale
    monkeypatch.setattr(sys, "stdin", lenient)
    with pytest.raises(ValueError, match="stdin: is not UTF-8"):
        next(_lines(False))


def test_the_turns_that_are_forgotten_are_said(model):
    """And why: what one turn more would have left of the window, whatever the room that an answer may take."""
    result = run(model, b"One one one?\nTwo two two?\nThree three?\nFour four four?\n", "--json")
    counts = [json.loads(line)["forgotten_turns"] for line in result.stdout.splitlines()]
    assert counts == [0, 0, 1, 1]
    said = (
        "The oldest turn is forgotten, and the model has not seen what was said there: with more, less than 8 tokens "
        "of the window of 64 were left for the answer."
    )
    assert " ".join(result.stderr.split()) == f"{said} {said}"


def test_turns_are_not_forgotten_for_an_answer_longer_than_the_window(model):
    """Of which half is kept free at most: with the room of 512 tokens in a window of 64, no turn would ever be kept."""
    conversation = open_conversation(str(model), sampling=Sampling(temperature=0, max_new_tokens=512))
    conversation.messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert conversation.room == 32
    assert conversation.answer("c").forgotten == 0
    assert [message["content"] for message in conversation.messages[:3]] == ["a", "b", "c"]
    with pytest.raises(TooLong, match=r"this takes all 64 tokens of the window, and leaves none to answer; shorten it"):
        conversation._fitting([1] * 64)


@pytest.mark.slow
def test_a_reader_that_leaves_hears_nothing(model):
    command = '"$0" -m teleflm chat "$1" --max-new-tokens 8 | true; exit ${PIPESTATUS[0]}'
    arguments = ["bash", "-c", command, sys.executable, model]
    result = subprocess.run(arguments, cwd=ROOT, input=b"What?\n" * 20, capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.slow
def test_in_a_terminal_ctrl_c_ends_an_answer_and_then_the_program(model, tmp_path):
    """Of a model that would go on for long."""
    endless = Path(shutil.copytree(model, tmp_path / "endless"))
    config = json.loads((endless / "config.json").read_bytes())
    (endless / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100_000}))
    (endless / "generation_config.json").write_text(json.dumps({"eos_token_id": 639, "do_sample": True}))
    child, terminal = pty.fork()
    if not child:
        os.chdir(ROOT)
        command = [sys.executable, "-m", "teleflm", "chat", str(endless), "--max-new-tokens", "90000"]
        os.execv(sys.executable, command)

    unread, ended, status = b"", 0, 0

    def read(until: bytes, seconds: float = 120) -> bytes:
        nonlocal unread
        deadline = time.monotonic() + seconds
        while until not in unread and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    unread += os.read(terminal, 4096)
                except OSError:  # it has ended
                    break
        seen, found, unread = unread.partition(until)
        return seen + found

    try:
        assert b"float32 on cpu, window 100000. /reset forgets, /exit leaves." in read(b"> ")
        os.write(terminal, b"/what\n")
        assert b"/what is no command; there are /reset, /exit." in read(b"> ")
        os.write(terminal, b"What?\n")
        read(b"What?\r\n")
        assert read(b"e")  # it has begun
        os.write(terminal, b"\x03")
        seen = read(b"interrupted")
        assert b"tokens/s, interrupted" in seen
        assert b"Traceback" not in seen
        read(b"> ")
        # CPython's readline does not see a signal that comes just before it waits; a person presses the keys again.
        for _ in range(60):
            with suppress(OSError):  # it has ended
                os.write(terminal, b"\x03")
            assert b"Traceback" not in read(b"never", 2)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
    finally:
        if not ended:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        os.close(terminal)
    # The keys may also be pressed once more while the interpreter ends, when nobody handles the signal any longer.
    assert os.waitstatus_to_exitcode(status) in (130, -signal.SIGINT)


@pytest.mark.parametrize("temperature", ["1e-4", "1e4"])
def test_temperatures_at_their_bounds(temperature, model):
    result = run(model, b"What?\n", "--temperature", temperature)
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "1e-45"), "--temperature is 1e-45; it is 0"),
        (("--temperature", "nan"), "--temperature is nan; it is 0"),
        (("--max-new-tokens", "0"), "--max-new-tokens is 0; it is at least 1."),
        (("--seed", "4294967296"), "--seed is 4294967296; it is 0 to 4294967295."),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_one_line(options, message, model):
    result = run(model, b"What?\n", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"teleflm: {message}")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "message"),
    [
        ("<&-", "stdin: is closed; a conversation needs both stdin and stdout."),
        (">&-", "stdout: is closed; a conversation needs both stdin and stdout."),
        ("0>/dev/null", "stdin: Bad file descriptor"),
        (">/dev/full", "stdout: No space left on device"),
    ],
)
def test_streams_that_are_closed(redirection, message, model):
    """In the words of whoever started it, before a model is loaded where that is known."""
    command = f'echo What? | "$0" -m teleflm chat "$1" --max-new-tokens 2 {redirection}'
    arguments = ["bash", "-c", command, sys.executable, model]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode in (1, 2), result.stdout, result.stderr) == (True, "", f"teleflm: {message}\n")


def test_input_of_another_encoding_than_is_said(model, monkeypatch):
    """UTF-8 that is read as ASCII is no fault of the text."""
    stdin = io.TextIOWrapper(io.BytesIO("天地\n".encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(ValueError, match=r"stdin: is not ascii, which the locale .* set PYTHONIOENCODING=utf-8"):
        next(_lines(False))


TEXT = "\u3000\u3000今天天气很好。\u00a0👨\u200d👩\u200d👧 نمی\u200cخواهم \u200fשלום a\u00adb\ufeff\tx\n"


def test_what_is_text_is_shown_as_it_is():
    """Spaces of any width, joiners, marks of writing; what a terminal obeys is written out, also in JSON."""
    assert _shown(TEXT) == TEXT
    assert json.loads(json_text(TEXT)) == TEXT
    assert "\u3000\u3000今天" in json_text(TEXT)
    steering = "\x1b[31m \x9b31m \r \x07 \x7f \u202eevil\u202c \u2066x\u2069"
    assert _shown(steering) == (r"\x1b[31m \x9b31m \r \x07 \x7f \u202eevil\u202c \u2066x\u2069")
    assert json_text(steering).isascii()
    assert json.loads(json_text([steering], indent=2)) == [steering]


def test_errors_of_the_command_are_one_line(tmp_path):
    result = run(tmp_path / "nowhere", b"")
    assert result.exit_code == 2
    assert result.stderr == f"teleflm: {tmp_path}/nowhere: no such folder, and no OWNER/NAME of the Hub.\n"


def test_without_torch_it_says_so(model):
    script = f"""if True:
        import sys
        sys.modules["torch"] = None
        from teleflm.app import main
        sys.argv = ["teleflm", "chat", {str(model)!r}]
        main()
    """
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("teleflm: a loaded model needs torch and transformers (")
    assert len(result.stderr.splitlines()) == 1
