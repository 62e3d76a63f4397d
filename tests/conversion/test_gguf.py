# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""GGUF, against the reader and the quantisation of llama.cpp's Python package; tests/external has llama.cpp itself."""

import json
import os
import random
import re
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, quants
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor

from conversion import WriteOptions, inspect_checkpoint
from conversion.checkpoint import assemble
from conversion.checkpoint.block_quant import quantise_q8_0
from conversion.checkpoint.dtypes import Q8_0
from conversion.checkpoint.errors import CheckpointError, CorruptData
from conversion.checkpoint.gguf_file import TYPES, open_gguf, read_gguf
from conversion.exports.export import export_checkpoint
from conversion.exports.gguf_tokenizer import spaced_template
from conversion.hub.sentencepiece_file import read_sentencepiece, without_normalizer
from modeling_teleflm import TeleFLMTokenizer
from tests.fixtures.checkpoint_runs import contents, run_teleflm
from tests.fixtures.tiny import CHAT_SYMBOLS, PIECE_COUNT, tiny_config, tiny_model, tiny_sentencepiece, tiny_tokenizer

SIZES = {"hidden_size": 64, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96}
MODELS = {
    "grouped queries": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "narrow rows": {"intermediate_size": 88},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
    "no multipliers": {"use_mup": False},
}
FLOATS = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


def save(folder: Path, dtype: torch.dtype = torch.bfloat16, **fields) -> dict[str, np.ndarray]:
    """Write a model with its tokenizer; returns its weights in float64."""
    model = tiny_model(tiny_config(**{**SIZES, **fields}), dtype=dtype)
    model.save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    return {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tele"
    save(folder)
    return folder


def export(source: Path, out: Path, outtype: str | None = None, **more) -> list[Path]:
    """The files of an export, in their order."""
    export_checkpoint(source, out, to="gguf", outtype=outtype, **more)
    return sorted(out.glob("*.gguf"))


def settings(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


# Blocks.


def hard_blocks() -> np.ndarray:
    """Halves and their neighbours, zeros, and values so small that a scale or its reciprocal is lost."""
    rng = np.random.default_rng(0)
    blocks = rng.standard_normal((3000, 32)) * 10.0 ** rng.integers(-6, 6, (3000, 1))
    near = np.arange(32) / 2 - 8
    for row, offset in enumerate((0.0, 1e-7, -1e-7, 2**-20, -(2**-20))):
        blocks[row], blocks[row, 0] = near * (1 + offset), 127.0
    blocks[10] = 0
    blocks[11], blocks[11, 3] = 0, -2.0
    blocks[12] *= 0
    blocks[12, 5] = 1e-40
    blocks[13] = np.linspace(-1e-7, 1e-7, 32)
    blocks[14, 7] = -8e6
    return blocks


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_blocks_have_the_bytes_of_the_reference(dtype):
    with np.errstate(all="ignore"):
        blocks = np.clip(hard_blocks(), -6e4, 6e4) if dtype == "float16" else hard_blocks()
        blocks = blocks.astype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)
    out = np.empty(len(blocks), Q8_0.numpy)
    assert quantise_q8_0(blocks, out) is None
    expected = quants.Q8_0.quantize_blocks(blocks.astype(np.float32))
    found = out.view(np.uint8).reshape(len(blocks), 34)
    odd = np.nonzero((found != expected).any(axis=1))[0]
    # The reference divides by 0 where the reciprocal of a scale is infinite, and casts what that makes.
    assert set(odd) <= {12}
    assert (found[12] == 0).all()
    restored = quants.Q8_0.dequantize_blocks(found)
    scale = np.abs(blocks.astype(np.float64)).max(axis=1, keepdims=True) / 127
    assert (np.abs(restored - blocks.astype(np.float64)) <= scale * (0.5 + 127 * 2**-11) + 127 * 2**-25).all()


def test_every_rounding_of_a_quotient():
    """What lies next to each half, both ways, in a block whose scale is 1."""
    halves = (np.arange(-126, 127) + 0.5).astype(np.float32)
    values = np.concatenate([np.nextafter(halves, np.float32(towards)) for towards in (-np.inf, np.inf)] + [halves])
    blocks = np.zeros((len(values), 32), np.float32)
    blocks[:, 0], blocks[:, 1] = 127, values
    out = np.empty(len(blocks), Q8_0.numpy)
    assert quantise_q8_0(blocks, out) is None
    exact = values.astype(np.float64)
    expected = np.sign(exact) * np.floor(np.abs(exact) + 0.5)
    assert (out.view(np.int8).reshape(-1, 34)[:, 3] == expected).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"attn_q\.weight\[33, 5\] is NaN or infinite, for which q8_0 has no number"),
        (np.inf, r"attn_q\.weight\[33, 5\] is NaN or infinite, for which q8_0 has no number"),
        (1e7, r"attn_q\.weight\[33, 5\] is 10027008, more than 127 times the largest scale of q8_0"),
    ],
)
def test_what_no_block_can_hold_is_no_output(value, message, source, tmp_path):
    """Row 48 of 128 is the half-th of the first of ... in the file: the name is that of the output."""
    save(tmp_path / "source")
    tensors = load_file(tmp_path / "source/model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][48, 5] = value  # head 1, row 16 of its second half
    save_file(tensors, tmp_path / "source/model.safetensors", {"format": "pt"})
    for allowed in (False, True):
        options = WriteOptions(workers=1, allow_nonfinite=allowed)
        with pytest.raises(CorruptData, match=r"blk\.1\." + message):
            export(tmp_path / "source", tmp_path / f"out-{allowed}", "q8_0", options=options)
        assert not [*(tmp_path / f"out-{allowed}").glob("*.gguf")]


def test_a_product_too_large_for_float16(tmp_path):
    save(tmp_path / "source")
    tensors = load_file(tmp_path / "source/model.safetensors")
    tensors["lm_head.weight"][3, 4] = 1e5
    save_file(tensors, tmp_path / "source/model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptData, match=r"output\.weight\[3, 4\] is 99840, the largest float16 is 65504"):
        export(tmp_path / "source", tmp_path / "out", "f16", options=WriteOptions(workers=1))
    assert not [*(tmp_path / "out").glob("*.gguf")]


# Files.


def expected_tensors(weights: dict[str, np.ndarray], config: dict) -> dict[str, np.ndarray]:
    """By llama.cpp's names. A rotated pair of transformers is (i, i + half), one of llama.cpp (2 i, 2 i + 1)."""
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    found = {}
    for name, value in weights.items():
        if not name.startswith("model.layers."):
            found[whole.get(name, "output.weight")] = value
            continue
        _, _, layer, rest = name.split(".", 3)
        module, end = rest.rsplit(".", 1)
        if module in ("self_attn.q_proj", "self_attn.k_proj"):
            size = config["head_dim"]
            rows = [head + pair + half for head in range(0, len(value), size) for pair in range(size // 2)
                    for half in (0, size // 2)]  # fmt: skip
            value = value[rows]
        found[f"blk.{layer}.{names[module]}.{end}"] = value
    return found


@pytest.mark.parametrize("outtype", [*FLOATS, "q8_0"])
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_every_number_is_where_the_reference_reader_looks(fields, outtype, tmp_path):
    weights = save(tmp_path / "a model", torch.float32, **fields)
    config = json.loads((tmp_path / "a model/config.json").read_text())
    (path,) = export(tmp_path / "a model", tmp_path / "out", outtype)
    assert path.name == f"a-model-{outtype.upper()}.gguf"
    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    expected = expected_tensors(weights, config)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tensor = found[name]
        assert tensor.shape.tolist() == [*reversed(value.shape)]
        assert tensor.data_offset % 32 == 0
        data = np.asarray(tensor.data)
        if value.ndim == 1:
            assert tensor.tensor_type == GGMLQuantizationType.F32
            assert (data == value.astype(np.float32)).all()
        elif outtype == "q8_0" and value.shape[-1] % 32 == 0:
            assert tensor.tensor_type == GGMLQuantizationType.Q8_0
            assert (data == quants.quantize(value.astype(np.float32), GGMLQuantizationType.Q8_0)).all()
        else:
            kind = "f16" if outtype == "q8_0" else outtype
            assert tensor.tensor_type == GGMLQuantizationType[kind.upper()]
            assert (data.view(FLOATS[kind]).reshape(value.shape) == value.astype(np.float32).astype(FLOATS[kind])).all()
    inspection = inspect_checkpoint(tmp_path / "out", check=True)
    assert (inspection.damages, inspection.problems, inspection.format) == ([], [], "gguf")
    assert (inspection.pieces, inspection.padding_rows) == (PIECE_COUNT, 40)


def test_settings(source, tmp_path):
    (source / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    (path,) = export(source, tmp_path / "out")
    found = settings(path)
    assert {name.removeprefix("granite."): value for name, value in found.items() if name.startswith("granite.")} == {
        "block_count": 3, "context_length": 256, "embedding_length": 64, "feed_forward_length": 96, "vocab_size": 640,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "rope.dimension_count": 32, "rope.freq_base": 1e4, "embedding_scale": 2.5, "residual_scale": 1.0,
        "attention.scale": np.float32(32**-0.5), "logit_scale": 8.0,
    }  # fmt: skip
    general = {name.removeprefix("general."): value for name, value in found.items() if name.startswith("general.")}
    assert general == {
        "architecture": "granite", "type": "model", "name": "tele", "license": "apache-2.0", "file_type": 32,
        "quantization_version": 2,
    }  # fmt: skip
    assert path.name == "tele-BF16.gguf"
    assert (tmp_path / "out/LICENSE").read_bytes() == (source / "LICENSE").read_bytes()
    assert inspect_checkpoint(path).lineage[-1] == "Exported to gguf, as bf16."


def test_several_files(source, tmp_path):
    """The first has the settings, all say which they are, and together they are the one file's tensors."""
    (whole,) = export(source, tmp_path / "whole", "q8_0")
    files = export(source, tmp_path / "out", "q8_0", options=WriteOptions(max_shard_size="60KB"))
    count = len(files)
    assert count > 2
    assert [file.name for file in files] == [f"tele-Q8_0-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    for number, file in enumerate(files):
        found = settings(file)
        split = (found["split.no"], found["split.count"], found["split.tensors.count"])
        assert split == (number, count, len(GGUFReader(whole).tensors))
        assert ("general.architecture" in found) == (number == 0)
    tensors = {tensor.name: np.asarray(tensor.data) for file in files for tensor in GGUFReader(file).tensors}
    assert all((tensors[tensor.name] == tensor.data).all() for tensor in GGUFReader(whole).tensors)
    for path in (tmp_path / "out", files[0], files[1]):
        assert inspect_checkpoint(path, check=True).damages == []
    files[1].unlink()
    with pytest.raises(CheckpointError, match=f"is the first of {count} files, {files[1].name} is missing"):
        inspect_checkpoint(tmp_path / "out")


class Interruption(Exception):
    """Stands for a kill; test_resume.py kills at every instant of writing such files."""


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_a_resumed_export_has_the_bytes_of_one_that_was_not_interrupted(
    shard_size, share, source, tmp_path, monkeypatch
):
    monkeypatch.setattr(assemble, "BLOCK", 100)
    done = 0

    def progress(nbytes: int, total: int) -> None:
        nonlocal done
        done += nbytes
        if done > share * total:
            raise Interruption

    options = {"max_shard_size": shard_size}
    export(source, tmp_path / "whole", "q8_0", options=WriteOptions(workers=1, **options))
    with pytest.raises(Interruption):
        export(source, tmp_path / "out", "q8_0", options=WriteOptions(workers=2, progress=progress, **options))
    assert not [*(tmp_path / "out").glob("*.gguf")]
    with pytest.raises(CheckpointError, match=r"interrupted run, but lineage\.outtype was 'q8_0' and is 'f16'"):
        export(source, tmp_path / "out", "f16")
    export(source, tmp_path / "out", "q8_0", options=WriteOptions(workers=3, memory="64MB", **options))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    again = export_checkpoint(source, tmp_path / "out", to="gguf", outtype="q8_0", options=WriteOptions(**options))
    assert again.written.already_done


def test_another_export_in_the_same_folder(source, tmp_path):
    (first,) = export(source, tmp_path / "out", "f16")
    (tmp_path / "out/theirs-Q4_K_M.gguf").write_bytes(b"GGUF of somebody")
    with pytest.raises(
        CheckpointError, match=r"already holds tele-F16\.gguf, but lineage\.outtype was 'f16' and is 'f32'"
    ):
        export(source, tmp_path / "out", "f32")
    assert first.exists()
    found = export(source, tmp_path / "out", "f32", options=WriteOptions(overwrite=True))
    assert [path.name for path in found] == ["tele-F32.gguf", "theirs-Q4_K_M.gguf"]
    with pytest.raises(CheckpointError, match=r"GGUF models there: tele-F32\.gguf, theirs-Q4_K_M\.gguf; give the path"):
        inspect_checkpoint(tmp_path / "out")
    assert inspect_checkpoint(tmp_path / "out/tele-F32.gguf", check=True).damages == []


# The tokenizer.


def llama_ids(said: dict[str, object], text: str) -> list[int]:
    """What llama.cpp's rules for `llama` vocabularies make of a prompt, with sentencepiece for the merges.

    Texts are cut at tokens of the types control, unknown and user-defined, the longest first, and spaces become U+2581.
    """
    names, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    ids = {name: number for number, name in enumerate(names)}
    cuts = sorted((name for name, kind in zip(names, kinds, strict=True) if kind in (2, 3, 4)), key=len, reverse=True)
    merges = SentencePieceProcessor(model_proto=without_normalizer(tiny_sentencepiece()))
    parts: list[str | int] = [text]
    for cut in cuts:
        parts = [new for part in parts for new in ([part] if isinstance(part, int) else _cut(part, cut, ids[cut]))]
    found = [ids["<s>"]] if said["tokenizer.ggml.add_bos_token"] else []
    behind_cut = True
    for part in parts:
        if isinstance(part, str):
            part = " " * (said["tokenizer.ggml.add_space_prefix"] and behind_cut) + part
            found += merges.encode(part.replace(" ", "\u2581"))
        else:
            found.append(part)
        behind_cut = isinstance(part, int)
    return found


def _cut(text: str, name: str, number: int) -> list[str | int]:
    parts: list[str | int] = []
    for at, part in enumerate(text.split(name)):
        parts += ([number] if at else []) + ([part] if part else [])
    return parts


SPELLED = [
    *CHAT_SYMBOLS,
    "</s>",
    "<s>",
    "<unk>",
    " ",
    "  ",
    "\n",
    "<0x0A>",
    "[PAD601]",
    "<_use",
    "\u2581",
    "é",
    "中文",
    "🙂",
]


def some_text(rng: random.Random) -> str:
    words = ("the", "stream", "class", "0", "(x)", "Iterators,", *SPELLED)
    return "".join(rng.choice(words) + rng.choice((" ", "")) for _ in range(rng.randrange(1, 9)))


def some_chat(rng: random.Random) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": some_text(rng)}] * rng.randrange(2)
    for _ in range(rng.randrange(3)):
        messages += [{"role": "user", "content": some_text(rng)}, {"role": "assistant", "content": some_text(rng)}]
    return [*messages, {"role": "user", "content": some_text(rng)}]


def test_chats_have_the_ids_of_the_tokenizer(source, tmp_path):
    said, tokenizer = settings(*export(source, tmp_path / "out")), TeleFLMTokenizer.from_pretrained(source)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(said["tokenizer.chat_template"])
    rng = random.Random(0)
    for _ in range(40):
        chat = some_chat(rng)
        prompt = template.render(messages=chat, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
        expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert llama_ids(said, prompt) == expected, chat
    for text in ("The class", "  indented", "é中文🙂", "\n", "a <_user> b<_bot>", "<unk> and <0x0A>"):
        assert llama_ids(said, f"<s> {text}") == tokenizer(text).input_ids


def test_plain_texts_have_the_ids_of_the_tokenizer_if_asked_for(source, tmp_path):
    said = settings(*export(source, tmp_path / "out", prompts="text"))
    tokenizer = TeleFLMTokenizer.from_pretrained(source)
    assert "tokenizer.chat_template" not in said
    for text in ("The class", "  indented", "é中文🙂", "\n", "one</s>two", "<unk> and <0x0A>"):
        assert llama_ids(said, text) == tokenizer(text).input_ids
    without = tmp_path / "without"
    save(without)
    TeleFLMTokenizer.from_pretrained(without, add_bos_token=False, add_eos_token=True).save_pretrained(without)
    said = settings(*export(without, tmp_path / "other", prompts="text"))
    assert [said[f"tokenizer.ggml.add_{end}_token"] for end in ("bos", "eos")] == [False, True]


def test_types_of_tokens(source, tmp_path):
    said = settings(*export(source, tmp_path / "out"))
    names, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert len(set(names)) == len(names) == 640
    assert dict(zip(names[:7], kinds[:7], strict=True)) == {
        "<unk>": 5, "<s>": 3, "</s>": 3, "<_system>": 4, "<_user>": 4, "<_bot>": 4, "<0x00>": 6,
    }  # fmt: skip
    assert (names[PIECE_COUNT], {*kinds[PIECE_COUNT:]}) == ("[PAD600]", {5})
    pieces = SentencePieceProcessor(model_proto=tiny_sentencepiece())
    assert names[:PIECE_COUNT] == [pieces.id_to_piece(number) for number in range(PIECE_COUNT)]
    scores = np.array(said["tokenizer.ggml.scores"][:PIECE_COUNT], np.float32)
    assert (scores == np.array([pieces.get_score(number) for number in range(PIECE_COUNT)], np.float32)).all()
    ids = [said[f"tokenizer.ggml.{role}_token_id"] for role in ("unknown", "bos", "eos")]
    assert ids == [0, 1, 2]
    assert "tokenizer.ggml.padding_token_id" not in said


def test_a_template_of_the_users_own(tmp_path):
    save(tmp_path / "source")
    config = json.loads((tmp_path / "source/tokenizer_config.json").read_text())
    marked = "  {% generation %}\n[{{ m.content }}]{{ eos_token }}{%- endgeneration -%}\n"
    template = "{% for m in messages %}\n" + marked + " {% endfor %}"
    for place in ("chat_template.jinja", "tokenizer_config.json"):
        text = template if place.endswith("jinja") else json.dumps({**config, "chat_template": template})
        (tmp_path / "source" / place).write_text(text)
        said = settings(*export(tmp_path / "source", tmp_path / place))
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        found = environment.from_string(said["tokenizer.chat_template"])
        messages = [{"content": "a"}, {"content": "</s>"}]
        assert found.render(messages=messages, eos_token="</s>") == " [a]</s> [</s> ]</s>"
        (tmp_path / "source/chat_template.jinja").unlink(missing_ok=True)
    assert spaced_template("{{ x }}", ["</s>"], add_space=False) == "{{ x }}"


def change_config(folder: Path, file: str, **changes) -> None:
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **changes}))


def write_settings(folder: Path, file: str, **settings) -> None:
    """An older file of settings, beside a tokenizer_config.json that leaves it its word."""
    said = json.loads((folder / "tokenizer_config.json").read_text())
    said.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / file).write_text(json.dumps(settings))


SPECIALS = {
    "a map": ("special_tokens_map.json", {"additional_special_tokens": ["<_user>"]}),
    "an older file": ("added_tokens.json", {"<_user>": 4}),
    "a name": ("special_tokens_map.json", {"cls_token": "<_user>"}),
    "a kind": ("tokenizer_config.json", {"tool_token": "<_user>"}),
    "one of two lists": (
        "tokenizer_config.json",
        {"extra_special_tokens": ["<_bot>"], "additional_special_tokens": ["<_user>"]},
    ),
}


@pytest.mark.parametrize("case", SPECIALS, ids=SPECIALS)
def test_special_tokens_are_those_of_the_tokenizer_wherever_they_are_said(case, tmp_path):
    """A template writes a space behind these, and none behind symbols."""
    save(tmp_path / "source")
    file, said = SPECIALS[case]
    if file == "tokenizer_config.json":
        change_config(tmp_path / "source", file, **said)
    else:
        write_settings(tmp_path / "source", file, **said)
    tokenizer = TeleFLMTokenizer.from_pretrained(tmp_path / "source")
    said = settings(*export(tmp_path / "source", tmp_path / "out"))
    template = ImmutableSandboxedEnvironment(trim_blocks=True).from_string(said["tokenizer.chat_template"])
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two</s>"},
        {"role": "user", "content": ""},
    ]
    prompt = template.render(messages=chat, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
    assert llama_ids(said, prompt) == tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def test_a_template_is_told_the_names_that_llama_cpp_does_not_tell():
    template = "{{ unk_token }}{% macro f() %}{{ pad_token }}{% endmacro %}{{ f() }}{# {% generation %} #}"
    names = {"unk_token": '<"\\n\n>', "pad_token": "<pad>", "eos_token": "</s>", "sep_token": "<sep>"}
    made = spaced_template(template + "{{ '{% generation %}' }}", ["</s>"], add_space=False, names=names)
    assert ImmutableSandboxedEnvironment().from_string(made).render() == names["unk_token"] + "<pad>{% generation %}"
    assert "sep_token" not in made
    assert "set eos_token" not in made


def with_piece(text: str, kind: int) -> bytes:
    """The tiny tokenizer with one piece more: a message of a text, a score of -1 and a type."""
    name = text.encode()
    piece = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", -1.0) + b"\x18" + bytes([kind])
    return tiny_sentencepiece() + b"\x0a" + bytes([len(piece)]) + piece


def denormaliser() -> bytes:
    """A message with the rules of another model's normaliser, as the one of what is decoded."""
    rules = read_sentencepiece(tiny_sentencepiece("bpe", "nmt_nfkc")).charsmap
    message = b"\x12" + varint(len(rules)) + rules
    return b"\x2a" + varint(len(message)) + message


def varint(number: int) -> bytes:
    return bytes([number & 0x7F | 0x80]) + varint(number >> 7) if number > 0x7F else bytes([number])


TOKENIZERS = {
    "is a unigram model, and llama.cpp merges such pieces as BPE does": lambda: tiny_sentencepiece("unigram"),
    "normalises characters, which llama.cpp does not": lambda: tiny_sentencepiece("bpe", "nmt_nfkc"),
    # A field of the normaliser that comes later counts: remove_extra_whitespaces, escape_whitespaces.
    "removes extra spaces": lambda: tiny_sentencepiece() + b"\x1a\x02\x20\x01",
    "has spaces as they are": lambda: tiny_sentencepiece() + b"\x1a\x02\x28\x00",
    "has spaces at the end of words": lambda: tiny_sentencepiece() + b"\x12\x03\xc0\x01\x01",
    "changes decoded text": lambda: tiny_sentencepiece() + denormaliser(),
    "has unused pieces, which llama.cpp would use": lambda: with_piece("spare", 5),
    "has no pieces for 256 of the 256 bytes": lambda: (
        re.sub(
            rb"(<0x[0-9A-F]{2}>\x15....)\x18\x06",
            lambda found: found[1] + b"\x18\x01",
            tiny_sentencepiece(),
            flags=re.DOTALL,
        )
        + b"\x12\x03\x98\x02\x00"
    ),
    r"the pieces '<0x0' and 'A>', of which llama.cpp would make '<0x0A>'": lambda: (
        with_piece("<0x0", 1) + with_piece("A>", 1)[len(tiny_sentencepiece()) :]
    ),
    "has the symbol 'a\u2581b', for which llama.cpp looks before": lambda: with_piece("a\u2581b", 4),
    "the text '<_user>xyzabc' is cut into '<_user>', 'xyzabc' at symbols": lambda: with_piece("er>xyzabc", 4),
    "the text 'x</s>' is cut into 'x', '</s>' at symbols": lambda: with_piece("x</s>", 4),
    "not a sentencepiece model": lambda: b"\x0a\xff\xff",
}


@pytest.mark.parametrize(("message", "content"), TOKENIZERS.items(), ids=range(len(TOKENIZERS)))
def test_a_tokenizer_that_llama_cpp_does_not_have(message, content, source, tmp_path):
    save(tmp_path / "source")
    (tmp_path / "source/tokenizer.model").write_bytes(content())
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: .*" + message):
        export(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def become_a_llama(folder: Path) -> None:
    save(folder.with_name("tele"), use_mup=False)
    export_checkpoint(folder.with_name("tele"), folder, to="llama", options=WriteOptions(overwrite=True))


def lose_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()


REFUSED = {
    "holds no tokenizer.model, which a GGUF file has inside": (lose_the_tokenizer, {}),
    "eos_token is '<end>', which is no piece of tokenizer.model": (
        lambda folder: change_config(folder, "tokenizer_config.json", eos_token="<end>"), {}
    ),
    "has no piece <tool>, a special token of the tokenizer": (
        lambda folder: change_config(folder, "tokenizer_config.json", extra_special_tokens=["<tool>"]), {}
    ),
    "has no piece <tool>, a special token of the": (
        lambda folder: write_settings(folder, "special_tokens_map.json", cls_token="<tool>"), {}
    ),
    "has no piece <tool>, a special token": (
        lambda folder: change_config(folder, "tokenizer_config.json", tool_token="<tool>"), {}
    ),
    "the id of '<_user>' is 7, and 4 in tokenizer.model": (
        lambda folder: write_settings(folder, "added_tokens.json", **{"<_user>": 7}), {}
    ),
    "unk_token is '</s>', and the unknown piece of tokenizer.model is '<unk>'": (
        lambda folder: change_config(folder, "tokenizer_config.json", unk_token="</s>"), {}
    ),
    "split_special_tokens is true, and llama.cpp does not split them": (
        lambda folder: change_config(folder, "tokenizer_config.json", split_special_tokens=True), {}
    ),
    "the chat template has '{% raw %}', which llama.cpp does not read": (
        lambda folder: (folder / "chat_template.jinja").write_text("{# {% with %} #}{{ '{% do %}' }}{% raw %}x"),
        {},
    ),
    "the chat template has '{%[+] if x %}', which llama.cpp does not read": (
        lambda folder: (folder / "chat_template.jinja").write_text("{%+ if x %}{% endif %}"), {}
    ),
    "extra_special_tokens has '7', expected names of tokens": (
        lambda folder: change_config(folder, "tokenizer_config.json", extra_special_tokens=[7]), {}
    ),
    "has 600 pieces, config.json a vocab_size of 599": ({"vocab_size": 599}, {}),
    "rope_type is 'yarn'; --to gguf knows 'default' and 'linear'": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, {}
    ),
    "hidden_act is 'gelu'; llama.cpp's Granite knows 'silu' only": ({"hidden_act": "gelu"}, {}),
    "max_position_embeddings is None, expected the length of a context": (
        lambda folder: change_config(folder, "config.json", max_position_embeddings=None), {}
    ),
    "embedding_scale would be 1e[+]39, which float32, as GGUF has it, does not hold": ({"input_mult": 1e39}, {}),
    "head_dim 15 is odd": (
        lambda folder: (
            save(folder, head_dim=30),
            change_config(folder, "config.json", head_dim=15, num_attention_heads=8, num_key_value_heads=4),
        ),
        {},
    ),
    "called 'my-Phi3', and llama.cpp takes what has 'phi3' in its name for another model": ({}, {"name": "my-Phi3"}),
    "--name is '../x', expected letters and digits": ({}, {"name": "../x"}),
    "--name is '', expected letters and digits": ({}, {"name": ""}),
    "--outtype is 'q4_k', expected one of bf16, f16, f32, q8_0": ({}, {"outtype": "q4_k"}),
    "--prompts is 'both', expected one of chat, text": ({}, {"prompts": "both"}),
    "--dtype: --to gguf has --outtype instead": ({}, {"dtype": "float16"}),
    "--outtype, --prompts and --name are for --to gguf, not llama": ({}, {"to": "llama", "outtype": "f16"}),
    "--link is for --to granite": ({}, {"link": True}),
    "is a Llama, whose tokenizer is another; convert it with llama.cpp's own": (become_a_llama, {}),
}  # fmt: skip


@pytest.mark.parametrize(("message", "case"), REFUSED.items(), ids=REFUSED)
def test_refused(message, case, tmp_path):
    fault, arguments = case
    save(tmp_path / "source", **(fault if isinstance(fault, dict) else {}))
    if callable(fault):
        fault(tmp_path / "source")
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(tmp_path / "source", tmp_path / "out", **{"to": "gguf", **arguments})
    assert not (tmp_path / "out").exists()


# Reading.


def test_the_types_are_those_of_the_reference():
    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    assert {number: (dtype.packed, dtype.itemsize) for number, dtype in TYPES.items()} == {n: sizes[n] for n in TYPES}
    assert all(
        GGMLQuantizationType(n).name.lower() == dtype.name.lower() for n, dtype in TYPES.items() if dtype.packed > 1
    )


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(path: Path, *settings: bytes, tensors: tuple[bytes, ...] = (), rest: int = 64, version: int = 3) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(settings)) + b"".join((*settings, *tensors))
    path.write_bytes(head + bytes(-len(head) % 32 + rest))
    return path


def tensor(name: str = "t", sizes: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


DAMAGED = {
    "is no GGUF file": lambda path: path.write_bytes(b"GGML" + bytes(60)),
    "is GGUF of version 2, expected 3": lambda path: gguf(path, version=2),
    "announces 18446744073709551615 tensors, more than": lambda path: path.write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 0) + bytes(64)
    ),
    "'a' is set twice": lambda path: gguf(path, *[text("a") + struct.pack("<I?", 7, True)] * 2),
    "a setting has type 99": lambda path: gguf(path, text("a") + struct.pack("<I", 99)),
    "an array has values of type 9": lambda path: gguf(path, text("a") + struct.pack("<IIQ", 9, 9, 1)),
    "past the end of the file": lambda path: gguf(path, text("a") + struct.pack("<IQ", 8, 2**40)),
    "more than 1048576": lambda path: gguf(path, text("a") + struct.pack("<IIQ", 9, 8, 2**20 + 1)),
    "a text is not UTF-8": lambda path: gguf(path, struct.pack("<Q", 1) + b"\xff"),
    "general.alignment is 3, expected a power of two": lambda path: gguf(
        path, text("general.alignment") + struct.pack("<II", 4, 3)
    ),
    "has 9 dimensions, more than 4": lambda path: gguf(path, tensors=(tensor(sizes=(1,) * 9),)),
    "'t' is of ggml's type 77": lambda path: gguf(path, tensors=(tensor(kind=77),)),
    "'t' has rows of 33, which no blocks of 32 make": lambda path: gguf(path, tensors=(tensor(sizes=(33,), kind=8),)),
    "rows of 9223372036854775808": lambda path: gguf(path, tensors=(tensor(sizes=(2**63, 2**63)),)),
    "the file 128 in all": lambda path: gguf(path, tensors=(tensor(sizes=(17,)),)),
    "in steps of 32": lambda path: gguf(path, tensors=(tensor(offset=4),)),
    "'t' is there twice": lambda path: gguf(path, tensors=(tensor(), tensor(offset=32))),
    "'u' lies in the one before it": lambda path: gguf(path, tensors=(tensor(sizes=(16,)), tensor("u", offset=32))),
    "announces 7 tensors|says that it is one of": lambda path: gguf(
        path, text("split.count") + struct.pack("<IH", 2, 2)
    ),
}


@pytest.mark.parametrize(("message", "make"), DAMAGED.items(), ids=DAMAGED)
def test_damaged(message, make, tmp_path):
    make(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=message):
        open_gguf(tmp_path / "x.gguf")


def test_a_header_that_ends_anywhere(source, tmp_path):
    (path,) = export(source, tmp_path / "out", "q8_0")
    whole = path.read_bytes()
    first = min(tensor.data_offset for tensor in GGUFReader(path).tensors)
    for size in (*range(0, 200, 7), *range(200, first, 997), first - 1, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: "):
            read_gguf(tmp_path / "cut.gguf")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_damage_is_found(source, tmp_path):
    (path,) = export(source, tmp_path / "out", "q8_0")
    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    whole, size = path.read_bytes(), found["output.weight"].data_offset
    places = {
        "output.weight of tele-Q8_0.gguf does not have its digest": size + 34 * 100 + 5,
        "tele-Q8_0.gguf differs outside of its tensors": whole.index(b"<_user>"),
    }
    del found
    for message, at in places.items():
        flip(path, at)
        assert message in next(map(str, inspect_checkpoint(path, check=True).damages))
        path.write_bytes(whole)
    os.truncate(path, len(whole) - 34)
    with pytest.raises(CheckpointError, match="in all, in steps of 32"):
        inspect_checkpoint(path)


def test_files_of_another_model_than_the_configuration_says(source, tmp_path):
    (path,) = export(source, tmp_path / "out", "q8_0")
    for field, value, message in (
        ("num_hidden_layers", 4, "granite.block_count is 3, config.json says 4"),
        ("input_mult", 2.0, "granite.embedding_scale is 2.5, config.json says 2.0"),
        ("tie_word_embeddings", True, "output.weight is not a weight of a Tele-FLM"),
        ("attention_bias", True, "blk.0.attn_q.bias is missing"),
    ):
        before = (tmp_path / "out/config.json").read_bytes()
        change_config(tmp_path / "out", "config.json", **{field: value})
        assert f"{path.name}: {message}." in inspect_checkpoint(path).problems
        (tmp_path / "out/config.json").write_bytes(before)
    (tmp_path / "out/config.json").unlink()
    inspection = inspect_checkpoint(path)
    assert (inspection.model_type, inspection.architecture, inspection.parameters) == ("granite", None, 211_392)


def test_the_command(source, tmp_path):
    command = ("export", source, tmp_path / "out", "--to", "gguf", "--outtype", "q8_0", "--name", "Tele FLM", "--json")
    foreseen = json.loads(run_teleflm(*command, "--dry-run", folder=tmp_path).stdout)
    assert not (tmp_path / "out").exists()
    done = json.loads(run_teleflm(*command, folder=tmp_path).stdout)
    assert done["files"] == foreseen["files"] == [{**done["files"][0], "name": "Tele-FLM-Q8_0.gguf"}]
    assert (tmp_path / "out/Tele-FLM-Q8_0.gguf").stat().st_size == done["files"][0]["bytes"]
    shown = run_teleflm("inspect", tmp_path / "out", "--check", folder=tmp_path)
    assert shown.returncode == 0
    for line in ("q8_0 (23 tensors), float32 (7 tensors)", "in 1 gguf file", "Every tensor has its digest."):
        assert line in shown.stdout
