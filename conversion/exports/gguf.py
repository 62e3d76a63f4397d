# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""GGUF, which llama.cpp and what is built on it load: a Granite, whose settings hold both multipliers as they are.

    OUT/NAME-BF16.gguf, or NAME-BF16-00001-of-00003.gguf ...     weights, architecture, tokenizer, chat template
    OUT/config.json                                              the same model in the Hub's terms

llama.cpp rotates neighbours of a head where transformers rotates its halves, so rows of query and key are interleaved
here. Vectors are float32, as its kernels want them.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from ..architecture import Architecture, rope_parameters
from ..checkpoint.containers import Layout
from ..checkpoint.dtypes import BFLOAT16, FLOAT16, FLOAT32, Q8_0, DType
from ..checkpoint.errors import CheckpointError
from ..checkpoint.gguf_file import GGUFModel, Value
from ..checkpoint.gguf_layout import gguf_layout
from ..checkpoint.plan import BlockQuantised, Box, CheckpointPlan, TensorPlan
from ..checkpoint.preflight import listed
from ..checkpoint.sharded import ShardedTensor
from ..family import TELEFLM
from ..hub.card import inherited_metadata
from ..hub.contents import hub_config
from ..hub.small_files import check_read_files, is_text, left_behind, small_files
from ..mapping import Weight, weights
from .gguf_tokenizer import Prompts, tokenizer_settings
from .model import ExportedModel

OutType: TypeAlias = Literal["bf16", "f16", "f32", "q8_0"]

_ARCHITECTURE = "granite"
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_DTYPES: dict[str, DType] = {"bf16": BFLOAT16, "f16": FLOAT16, "f32": FLOAT32, "q8_0": Q8_0}
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
_QUANTIZATION_VERSION = 2
_K_BLOCK = 256  # of the types of llama-quantize that are called K
_ROTATED = ("model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj")
# Parts of general.name by which llama.cpp takes a model for another, and strips spaces around its special tokens.
_OTHERS = ("phi-3", "phi3", "modern-bert")
_MAX_NAME = 100


def plan_gguf(
    model: ExportedModel, outtype: str | None, prompts: Prompts, name: str | None, shard_bytes: int
) -> tuple[CheckpointPlan, Layout, list[str]]:
    """The plan of GGUF files, their layout, and notes.

    Args:
        model: what is exported.
        outtype: of the matrices, see `OutType`; that of the source unless given.
        prompts: which of chats and plain texts llama.cpp is to tokenize as the model's tokenizer does.
        name: of the model; its folder's unless given.
        shard_bytes: most bytes of tensors in a file.

    Raises:
        CheckpointError: llama.cpp has no such model, or would tokenize otherwise.
    """
    if model.family != TELEFLM:
        raise CheckpointError(
            f"{model.folder}: is a {model.family.name}, whose tokenizer is another; convert it with llama.cpp's own "
            "convert_hf_to_gguf.py."
        )
    a, kind = model.architecture, outtype or _of_source(model)
    title = _title(model, name)
    tokenizer, begin = tokenizer_settings(model.folder, a.vocab_size, prompts)
    settings = {**_general(model, title, kind), **_hyperparameters(model), **tokenizer}
    tensors = tuple(
        _tensor(line, layer, ShardedTensor.of(model.checkpoint.tensors[key]), a, _DTYPES[kind])
        for key, line, layer in weights(a)
    )
    stem = re.sub(r"[^\w.-]+", "-", title).strip("-.")
    layout = gguf_layout(f"{stem}-{kind.upper()}", settings, tensors, shard_bytes)
    config = hub_config(model.config, a, model.dtype(None).name)
    config = {key: value for key, value in config.items() if key != "auto_map"}
    check_read_files(model.folder)
    copied = small_files(model.folder, {})
    # The card says how transformers loads the model, which is not how this folder is loaded.
    sidecars = {file: path for file, path in copied.items() if is_text(file) and file != "README.md"}
    plan = CheckpointPlan(tensors, config, sidecars, model.lineage("gguf", None, outtype=kind, prompts=prompts))
    notes = [*left_behind(model.folder, copied), *_notes(tensors, kind, begin, layout.loadable_file)]
    return plan, layout, notes


def _of_source(model: ExportedModel) -> str:
    dtype = model.dtype(None)
    found = next((name for name, known in _DTYPES.items() if known == dtype), None)
    if found is None:
        raise CheckpointError(f"{model.folder}: is {dtype}; give --outtype, one of {', '.join(get_args(OutType))}.")
    return found


def _title(model: ExportedModel, name: str | None) -> str:
    """What the model is called: by the user, else as its folder is, or its repository on the Hub."""
    folder = model.folder
    is_snapshot = folder.parent.name == "snapshots"
    title = name if name is not None else folder.parents[1].name.split("--")[-1] if is_snapshot else folder.name
    if not title.isprintable() or not re.search(r"\w", title) or len(title.encode()) > _MAX_NAME or "/" in title:
        whose = "--name" if name is not None else f"the name of the folder {folder}, without --name,"
        raise CheckpointError(f"{whose} is {title[:80]!r}, expected letters and digits, at most {_MAX_NAME} bytes.")
    if found := next((other for other in _OTHERS if other in title.lower()), None):
        raise CheckpointError(
            f"the model is called {title!r}, and llama.cpp takes what has {found!r} in its name for another model, "
            "with other rules for spaces; give another --name."
        )
    return title


# Settings.


def _general(model: ExportedModel, title: str, kind: str) -> dict[str, Value]:
    said = inherited_metadata(model.folder, ("license",)).get("license")
    return {
        "general.architecture": _ARCHITECTURE,
        "general.type": "model",
        "general.name": title,
        **({"general.license": said} if isinstance(said, str) else {}),
        "general.file_type": np.uint32(_FILE_TYPES[kind]),
        "general.quantization_version": np.uint32(_QUANTIZATION_VERSION),
    }


def _hyperparameters(model: ExportedModel) -> dict[str, Value]:
    config, where = model.config, f"{model.folder}/config.json"
    rope = rope_parameters(config, where)
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"{where}: hidden_act is {config['hidden_act']!r}; llama.cpp's Granite knows 'silu' only."
        )
    if model.architecture.head_dim % 2:
        raise CheckpointError(f"{where}: head_dim {model.architecture.head_dim} is odd; rotary embeddings need halves.")
    positions = config.get("max_position_embeddings")
    if isinstance(positions, bool) or not isinstance(positions, int) or not 0 < positions < 2**31:
        raise CheckpointError(f"{where}: max_position_embeddings is {positions!r}, expected the length of a context.")
    scaling = _rope_scaling(rope, where)
    sizes = {"context_length": positions, **_sizes(model.architecture)}
    numbers = {"rope.freq_base": rope["rope_theta"], **scaling, **_numbers(model.architecture)}
    settings: dict[str, Value] = {name: np.uint32(size) for name, size in sizes.items()}
    for name, number in numbers.items():
        settings[name] = _float32(number)
        if not np.isfinite(settings[name]) or settings[name] == 0:
            raise CheckpointError(f"{where}: {name} would be {number:g}, which float32, as GGUF has it, does not hold.")
    if scaling:
        settings["rope.scaling.type"] = "linear"
    return {f"{_ARCHITECTURE}.{name}": value for name, value in settings.items()}


def _sizes(a: Architecture) -> dict[str, int]:
    return {
        "block_count": a.num_hidden_layers,
        "embedding_length": a.hidden_size,
        "feed_forward_length": a.intermediate_size,
        "vocab_size": a.vocab_size,
        "attention.head_count": a.num_attention_heads,
        "attention.head_count_kv": a.num_key_value_heads,
        "attention.key_length": a.head_dim,
        "attention.value_length": a.head_dim,
        "rope.dimension_count": a.head_dim,
    }


def _numbers(a: Architecture) -> dict[str, float]:
    return {
        "attention.layer_norm_rms_epsilon": a.rms_norm_eps,
        "embedding_scale": a.embedding_scale,
        "residual_scale": 1.0,
        "attention.scale": a.head_dim**-0.5,
        "logit_scale": 1.0 / a.logit_scale,  # llama.cpp divides by it
    }


def _float32(number: float) -> np.float32:
    with np.errstate(over="ignore", under="ignore"):
        return np.float32(number)


def _rope_scaling(rope: dict[str, Any], where: str) -> dict[str, float]:
    if rope["rope_type"] == "default":
        return {}
    factor = rope.get("factor")
    if rope["rope_type"] == "linear" and isinstance(factor, int | float) and not isinstance(factor, bool):
        return {"rope.scaling.factor": float(factor)}
    raise CheckpointError(
        f"{where}: rope_type is {rope['rope_type']!r}; --to gguf knows 'default' and 'linear' with a factor."
    )


# Tensors.


def _name(line: Weight, layer: int | None) -> str:
    stem, end = line.name.rsplit(".", 1)
    return f"{_NAMES[stem].format(layer)}.{end}"


def _tensor(line: Weight, layer: int | None, source: ShardedTensor, a: Architecture, matrix: DType) -> TensorPlan:
    name, shape, parts = _name(line, layer), source.shape, source
    if line.name.rsplit(".", 1)[0] in _ROTATED:
        heads = shape[0] // a.head_dim
        parts = source.unflatten(0, (heads, 2, a.head_dim // 2)).permute(0, 2, 1, *range(3, len(shape) + 2))
    if len(shape) == 1:
        return parts.plan(name, shape, dtype=FLOAT32)
    if matrix != Q8_0:
        return parts.plan(name, shape, dtype=matrix)
    if shape[-1] % Q8_0.packed:
        return parts.plan(name, shape, dtype=FLOAT16)
    *rows, columns = parts.shape
    blocks = parts.unflatten(len(rows), (columns // Q8_0.packed, Q8_0.packed))
    pieces = tuple(
        BlockQuantised(Box(box.start[:-1], box.size[:-1]), view) for box, view in blocks.chunks if view is not None
    )
    return TensorPlan(name, (shape[0], columns // Q8_0.packed), Q8_0, pieces, blocks.shape[:-1])


def gguf_mismatch(model: GGUFModel, a: Architecture) -> str | None:
    """Where GGUF files are not those of a model of some architecture; None if nowhere.

    Args:
        model: the files.
        a: what the config.json beside them says.
    """
    if (kind := model.settings.get("general.architecture")) != _ARCHITECTURE:
        return f"general.architecture is {kind!r}, that of a Tele-FLM is {_ARCHITECTURE!r}"
    expected = {**_sizes(a), **{name: float(_float32(number)) for name, number in _numbers(a).items()}}
    for name, value in expected.items():
        found = model.settings.get(f"{_ARCHITECTURE}.{name}")
        if found != value:
            return f"{_ARCHITECTURE}.{name} is {found}, config.json says {value}"
    shapes = {_name(line, layer): line.shape(a) for _, line, layer in weights(a)}
    for name, shape in shapes.items():
        view = model.tensors.get(name)
        found = view and (*view.shape[:-1], view.shape[-1] * view.dtype.packed)
        if found != shape:
            return f"{name} {'is missing' if found is None else f'has shape {found}, config.json says {shape}'}"
    unknown = min(model.tensors.keys() - shapes.keys(), default=None)
    return unknown and f"{unknown} is not a weight of a Tele-FLM"


# What a user should know.


def _notes(tensors: Iterable[TensorPlan], kind: str, begin: str | None, file: str) -> Iterable[str]:
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    if kind == "q8_0" and (whole := [tensor.name for tensor in matrices if tensor.dtype == FLOAT16]):
        yield f"Rows of these are no multiple of {Q8_0.packed}, so they are f16: {listed(whole)}."
    odd = [t for t in matrices if t.shape[-1] * t.dtype.packed % _K_BLOCK]
    if odd:
        yield (
            f"Rows of {len(odd)} of {len(matrices)} matrices are no multiple of {_K_BLOCK}, which the K types of "
            "llama-quantize need; it makes those another type."
        )
    if begin is None:
        yield (
            "Plain texts without names of symbols have the tokenizer's ids in llama.cpp; chats have others, so that no "
            "chat template is inside, and a server asked for a chat takes one of its own."
        )
    else:
        plain = "a plain text without special tokens has them"
        text = f"{plain} if the prompt begins with {begin!r}" if begin else f"{plain} too"
        yield (
            f"Chats have the tokenizer's ids in llama.cpp, which puts nothing before a prompt; {text} (--prompts text "
            "is for models that only continue texts)."
        )
    yield f"llama.cpp: llama-server -m OUT/{file}."


__all__ = ["OutType", "gguf_mismatch", "plan_gguf"]
