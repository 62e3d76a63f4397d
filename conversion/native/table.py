# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The name and layout table between training checkpoints and the Hub: one line a weight, read in both directions.

A native tensor holds the rows of one or several Hub tensors. However they are interleaved, its rows are

    [blocks, members, unit]

and each Hub tensor is a range of the members: q, k and v of every key/value group (blocks: groups, unit: head_dim),
gate and up of every tensor-parallel rank (blocks: ranks), or a tensor alone (one block, one member). `RowOrder` says
what the blocks are in one checkpoint. A fork of the trainer with other names is another table: `read_table` reads one.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from ..architecture import Architecture
from ..checkpoint.errors import CheckpointError
from ..checkpoint.plan import Shape
from ..checkpoint.sharded import ShardedTensor
from ..mapping import Weight, weight_table, weights

Parallel: TypeAlias = Literal["column", "row", "replicated"]
"""How tensor parallelism cuts a weight: by its output rows, by its input columns, or not at all."""
Rows: TypeAlias = Literal["plain", "gated", "qkv"]
"""Whether a native tensor's rows are those of one Hub tensor, of gate and up, or of q, k and v."""


@dataclass(frozen=True)
class NativeWeight:
    """One native tensor: its name, with `{}` for the layer's number, and the Hub tensors it holds, in order."""

    name: str
    hub: tuple[str, ...]
    parallel: Parallel
    rows: Rows = "plain"


@dataclass(frozen=True)
class RowOrder:
    """What a checkpoint's own settings decide about the order and meaning of its rows.

    Args:
        gated_blocks: how often gate and up alternate: once, or once a tensor-parallel rank where ranks are
            concatenated as they are.
        qkv_version: Megatron's checkpoint_version: from 2 on q, k and v follow each other in every key/value group;
            in 1 in every feature of every head; in 0 (its first) in every rank.
        tensor_parallel: number of ranks; version 0 needs it.
        rotary_interleaved: whether rotary embeddings turn neighbouring features (2j, 2j + 1) of q and k, where the
            Hub's turn (j, j + head_dim / 2).
        zero_centered_gamma: whether norm weights are stored less one.
    """

    gated_blocks: int = 1
    qkv_version: int = 3
    tensor_parallel: int = 1
    rotary_interleaved: bool = False
    zero_centered_gamma: bool = False


def _layer(name: str, hub: Sequence[str], parallel: Parallel, rows: Rows = "plain") -> NativeWeight:
    return NativeWeight(f"decoder.layers.{{}}.{name}", tuple(f"model.layers.{{}}.{n}" for n in hub), parallel, rows)


# megatron-core with Transformer Engine, which is also what every torch_dist folder says.
MEGATRON: tuple[NativeWeight, ...] = (
    NativeWeight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "column"),
    _layer("self_attention.linear_qkv.layer_norm_weight", ["input_layernorm.weight"], "replicated"),
    _layer("self_attention.linear_qkv.weight", [f"self_attn.{x}_proj.weight" for x in "qkv"], "column", "qkv"),
    _layer("self_attention.linear_qkv.bias", [f"self_attn.{x}_proj.bias" for x in "qkv"], "column", "qkv"),
    _layer("self_attention.linear_proj.weight", ["self_attn.o_proj.weight"], "row"),
    _layer("mlp.linear_fc1.layer_norm_weight", ["post_attention_layernorm.weight"], "replicated"),
    _layer("mlp.linear_fc1.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], "column", "gated"),
    _layer("mlp.linear_fc2.weight", ["mlp.down_proj.weight"], "row"),
    NativeWeight("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),
    NativeWeight("output_layer.weight", ("lm_head.weight",), "column"),
)

# How else Megatron-LM and its forks have called the same, oldest last; each is applied in turn.
_SPELLINGS: tuple[tuple[str, str], ...] = (
    (r"^(?:module\.|model\.)+", ""),
    (r"^language_model\.", ""),
    (r"^(?:encoder|transformer)\.", "decoder."),
    (r"\.attention\.", ".self_attention."),
    (r"\.query_key_value\.", ".linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.dense_h_to_4h\.", ".linear_fc1."),
    (r"\.dense_4h_to_h\.", ".linear_fc2."),
    (r"\.(?:input_layernorm|input_norm)\.weight$", ".self_attention.linear_qkv.layer_norm_weight"),
    (r"\.(?:pre_mlp|post_attention)_(?:layernorm|norm)\.weight$", ".mlp.linear_fc1.layer_norm_weight"),
    (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
)
_HUB_PREFIXES = re.compile(r"^(?:_orig_mod\.|module\.)*(?:model\.(?=(?:model|lm_head)\.))?")


def megatron_name(name: str) -> str:
    """The name that today's megatron-core gives a tensor, whichever Megatron wrote it."""
    for pattern, replacement in _SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def hub_name(name: str) -> str:
    """The Hub name of a tensor of a model that was wrapped for training (FSDP, torch.compile, Accelerate)."""
    return _HUB_PREFIXES.sub("", name)


def read_table(path: Path) -> tuple[NativeWeight, ...]:
    """A table from a YAML file, for a fork of the trainer that calls its tensors otherwise: a list of

        - native: decoder.layers.{}.attn.qkv.weight
          hub:
          - model.layers.{}.self_attn.q_proj.weight
          - model.layers.{}.self_attn.k_proj.weight
          - model.layers.{}.self_attn.v_proj.weight
          parallel: column
          rows: qkv

    Raises:
        CheckpointError: it is not that; the message names the entry.
    """
    import yaml

    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]}).") from None
    if not isinstance(entries, list) or not entries:
        raise CheckpointError(f"{path}: holds a {type(entries).__name__}, expected a list of weights.")
    return tuple(_read_line(entry, f"{path}: entry {number}") for number, entry in enumerate(entries, 1))


_HUB_NAMES = {name for line in MEGATRON for name in line.hub}
_MEMBERS: dict[Rows, int] = {"plain": 1, "gated": 2, "qkv": 3}


def _read_line(entry: Any, where: str) -> NativeWeight:
    match entry:
        case {"native": str(native), "hub": str() | list() as said, "parallel": parallel, **rest}:
            hub = tuple(map(str, [said] if isinstance(said, str) else said))
            rows: Any = rest.pop("rows", "plain")
        case _:
            raise CheckpointError(f"{where}: lacks native, hub or parallel.")
    if rest:
        raise CheckpointError(f"{where}: {', '.join(map(str, rest))} is unknown; expected native, hub, parallel, rows.")
    if parallel not in get_args(Parallel) or rows not in _MEMBERS:
        kinds = f"{', '.join(get_args(Parallel))}, and {', '.join(_MEMBERS)}"
        raise CheckpointError(f"{where}: parallel is {parallel!r} and rows is {rows!r}, expected one of {kinds}.")
    if any(name not in _HUB_NAMES for name in hub) or len(hub) != _MEMBERS[rows]:
        raise CheckpointError(f"{where}: hub is {list(hub)}, expected {_MEMBERS[rows]} of {sorted(_HUB_NAMES)}.")
    if any(name.count("{}") != native.count("{}") for name in hub):
        raise CheckpointError(f"{where}: {native} and {hub[0]} do not both have one {{}} for the layer's number.")
    return NativeWeight(native, hub, parallel, rows)


def hub_table(architecture: Architecture) -> tuple[NativeWeight, ...]:
    """The table of a checkpoint that already has the Hub's names."""
    return tuple(NativeWeight(weight.name, (weight.name,), "replicated") for weight in weight_table(architecture))


def native_tensors(
    table: Sequence[NativeWeight], architecture: Architecture
) -> Iterator[tuple[str, NativeWeight, tuple[tuple[str, Weight], ...]]]:
    """Every native tensor of a model in the table's order, layer by layer: name, line, and the Hub tensors it holds."""
    known = {name: weight for name, weight, _ in weights(architecture)}
    for line, layer in _expanded(table, architecture.num_hidden_layers):
        names = tuple(name.format(layer) for name in line.hub)
        if all(name in known for name in names):  # a tied model has no head, and most have no biases
            yield line.name.format(layer), line, tuple((name, known[name]) for name in names)


def _expanded(table: Sequence[NativeWeight], layers: int) -> Iterator[tuple[NativeWeight, int | None]]:
    """The lines of a table with layer numbers, the layers where the first line of a layer stands."""
    in_layers = [line for line in table if "{}" in line.name]
    for line in table:
        if line not in in_layers:
            yield line, None
        elif line is in_layers[0]:
            yield from ((inner, layer) for layer in range(layers) for inner in in_layers)


# From a native tensor to the Hub's, and back.


def split(
    tensor: ShardedTensor,
    line: NativeWeight,
    hub: Sequence[tuple[str, Weight]],
    architecture: Architecture,
    order: RowOrder,
) -> dict[str, ShardedTensor]:
    """The Hub tensors that a native tensor holds, laid out as [blocks, members, unit, columns].

    Args:
        tensor: the whole native tensor, of the Hub tensors' dtype and together of their size.
        line: its line of the table.
        hub: the Hub tensors' names and lines, in the table's order.
        architecture: of the model.
        order: of the rows.
    """
    blocks, members, unit = _layout(line, architecture, order, tensor.shape[0])
    laid_out = tensor.unflatten(0, (blocks, sum(members), unit))
    parts = {}
    at = 0
    for (name, weight), count in zip(hub, members, strict=True):
        part = laid_out[:, at : at + count]
        if order.rotary_interleaved and _is_rotated(weight):  # (j, half) -> (half, j)
            part = _swap(part.unflatten(2, (architecture.head_dim // 2, 2)), 2)
        parts[name] = part
        at += count
    return parts


def join(
    parts: Sequence[ShardedTensor],
    line: NativeWeight,
    architecture: Architecture,
    order: RowOrder,
) -> ShardedTensor:
    """A native tensor from the Hub tensors it holds: [blocks, members, unit, columns]. The inverse of `split`."""
    rows = sum(part.shape[0] for part in parts)
    blocks, members, unit = _layout(line, architecture, order, rows)
    laid_out = [part.unflatten(0, (blocks, count, unit)) for part, count in zip(parts, members, strict=True)]
    return ShardedTensor.concatenate(laid_out, 1)


def _layout(line: NativeWeight, architecture: Architecture, order: RowOrder, rows: int) -> tuple[int, Shape, int]:
    """Blocks, members of each Hub tensor in a block, and rows of a member."""
    if line.rows == "plain":
        return 1, (1,), rows
    if line.rows == "gated":
        return order.gated_blocks, (1, 1), rows // (2 * order.gated_blocks)
    if order.qkv_version >= 2:
        return architecture.num_key_value_heads, (architecture.group_size, 1, 1), architecture.head_dim
    blocks = order.tensor_parallel if order.qkv_version == 0 else rows // 3
    return blocks, (1, 1, 1), rows // (3 * blocks)


def _is_rotated(weight: Weight) -> bool:
    return ".q_proj." in weight.name or ".k_proj." in weight.name


def _swap(tensor: ShardedTensor, axis: int) -> ShardedTensor:
    """A tensor with two neighbouring dimensions in the other order."""
    axes = list(range(len(tensor.shape)))
    axes[axis], axes[axis + 1] = axis + 1, axis
    return tensor.permute(*axes)
