# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""From Hub tensors to the `torch` format of Megatron-LM: the counterpart of `megatron.py`, through the same table.

    OUT/latest_checkpointed_iteration.txt                      `release`: start at step 0, without an optimizer
    OUT/release/mp_rank_{tensor:02d}[_{pipeline:03d}]/model_optim_rng.pt
    OUT/config.json                                            the same model in the Hub's terms

A stage's layers are numbered from 0, in `model`, or in `model0`, `model1`, ... where it has several chunks: of which
layers, `pipeline_split.py` says. The embedding is in the first of all chunks, the last norm and the head are in the
last, whether these have layers or not.
"""

import math
import re
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..architecture import Architecture, rope_parameters
from ..checkpoint.containers import Layout
from ..checkpoint.dtypes import DType
from ..checkpoint.errors import CheckpointError
from ..checkpoint.plan import CheckpointPlan, TensorPlan, View
from ..checkpoint.sharded import ShardedTensor
from ..checkpoint.torch_file import read_torch_file
from ..checkpoint.torch_zip import planned_tensors, torch_shard
from ..hub.contents import hub_config
from ..hub.small_files import check_read_files, left_behind, small_files
from ..mapping import EMBED_TOKENS, LM_HEAD
from ..masked import masked_config
from ..native.find import RELEASE, TRACKER
from ..native.table import MEGATRON, NativeWeight, RowOrder, join, native_tensors
from .model import ExportedModel
from .multipliers import fold_multipliers, folding_notes
from .pipeline_split import PipelineSplit

Spec: TypeAlias = Literal["te", "local"]
"""Whose layers the trainer builds: Transformer Engine's, which hold the norm before them, or megatron-core's own."""

CHECKPOINT_VERSION = 3.0
_VOCAB_DIVISOR = 128  # Megatron's default of --make-vocab-size-divisible-by
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
# Modules of Transformer Engine that expect an entry for their FP8 scales; None says there are none. Which others do
# depends on its version: where one is missing, Megatron-LM says so and loads the weights all the same.
WITH_EXTRA_STATE = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@dataclass(frozen=True)
class ParallelSizes:
    """Over how many ranks a model is spread: by tensors, by layers, and how many chunks of layers a stage has."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    layout: str | None = None
    """Which layers each stage has, where these are not as many as in any other: see `PipelineSplit`."""

    def check(self, architecture: Architecture) -> None:
        """Check that a model can be spread like that.

        Raises:
            CheckpointError: it cannot; names the two numbers.
        """
        for option, value in (("--tp", self.tensor), ("--pp", self.pipeline), ("--vpp", self.virtual)):
            if value < 1:
                raise CheckpointError(f"{option} is {value}; it must be at least 1.")
        for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            if getattr(architecture, field) % self.tensor:
                raise CheckpointError(
                    f"{field} {getattr(architecture, field)} is not a multiple of --tp {self.tensor}."
                )
        if self.virtual > 1 and self.pipeline == 1:
            raise CheckpointError(f"--vpp is {self.virtual}, --pp is 1; virtual stages need several stages.")
        self.split(architecture).ranges()

    def split(self, architecture: Architecture) -> PipelineSplit:
        """The layers of each stage's chunks."""
        return PipelineSplit(architecture.num_hidden_layers, self.pipeline, self.virtual, self.layout)

    def record(self) -> dict[str, Any]:
        """For the lineage."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def folder(self, rank: int, stage: int) -> str:
        """What Megatron calls the folder of a rank."""
        return f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if self.pipeline > 1 else "")


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows that Megatron gives the embedding, so that every rank has the same number and a round one."""
    unit = _VOCAB_DIVISOR * tensor_parallel
    return -(-vocab_size // unit) * unit


def plan_megatron(
    parts: Mapping[str, ShardedTensor],
    scales: Mapping[str, float],
    architecture: Architecture,
    config: Mapping[str, Any],
    sizes: ParallelSizes,
    spec: Spec,
    dtype: DType,
) -> tuple[tuple[TensorPlan, ...], Layout]:
    """The tensors of every rank's file, and the files.

    Args:
        parts: the Hub tensors by name.
        scales: factors on some of them.
        architecture: of the model that they make.
        config: its config.json, for what the architecture does not say.
        sizes: how it is spread.
        spec: whose names the layers have.
        dtype: of the output.

    Raises:
        CheckpointError: the model cannot be spread like that, or Megatron has no such model.
    """
    sizes.check(architecture)
    arguments = training_args(architecture, config, sizes, dtype)
    padded = pad_vocab(parts, arguments["padded_vocab_size"])
    weights = list(native_weights(padded, scales, architecture, sizes.tensor))
    shards = []
    for stage in range(sizes.pipeline):
        for rank in range(sizes.tensor):
            folder = sizes.folder(rank, stage)
            models = {
                key: _state_dict(chunk, rank, sizes.tensor, spec, f"{folder}/{key}", dtype)
                for key, chunk in _chunks(weights, architecture, sizes, stage)
            }
            content = {
                "args": Namespace(**arguments),
                "checkpoint_version": CHECKPOINT_VERSION,
                "iteration": 0,
                **models,
            }
            shards.append((f"{RELEASE}/{folder}/model_optim_rng.pt", content))
    tensors = tuple(tensor for _, content in shards for tensor in planned_tensors(content))
    files = tuple(torch_shard(filename, content) for filename, content in shards)
    return tensors, Layout(files, (TRACKER, RELEASE.encode()))


def exported_tensors(folder: Path) -> dict[str, View]:
    """The tensors of an exported folder by the names of its plan and its manifest.

    Raises:
        CheckpointError: a file is damaged.
    """
    tensors: dict[str, View] = {}
    for file in sorted(folder.glob(f"{RELEASE}/mp_rank_*/model_optim_rng.pt")):
        content = read_torch_file(file)
        for key, state in content.items() if isinstance(content, dict) else ():
            if isinstance(key, str) and key.startswith("model") and isinstance(state, dict):
                views = {name: value for name, value in state.items() if isinstance(value, View)}
                tensors |= {f"{file.parent.name}/{key}/{name}": view for name, view in views.items()}
    return tensors


def training_args(
    architecture: Architecture, config: Mapping[str, Any], sizes: ParallelSizes, dtype: DType
) -> dict[str, Any]:
    """The arguments of a run with such a model: what Megatron-LM compares or takes over, and `vocab_size`.

    Multipliers are there where they are used, as Tele-FLM's configuration calls them.

    Raises:
        CheckpointError: Megatron has no such model; names the field.
    """
    rope = rope_parameters(config)
    for field, value, accepted in (
        ("rope_type", rope.get("rope_type"), "default"),
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("attention_bias", architecture.attention_bias, False),
    ):
        if value != accepted:
            raise CheckpointError(f"{field} is {value!r}; --to megatron and torch_dist know {accepted!r} only.")
    a, theta = architecture, float(rope["rope_theta"])
    names = ("use_mup", "input_mult", "output_mult", "mup_scale_factor")
    length = config.get("max_position_embeddings")
    return {
        "num_layers": a.num_hidden_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.intermediate_size,
        "num_attention_heads": a.num_attention_heads,
        "group_query_attention": a.num_key_value_heads != a.num_attention_heads,
        "num_query_groups": a.num_key_value_heads,
        "kv_channels": a.head_dim,
        "max_position_embeddings": length,
        "seq_length": length,
        "init_method_std": config.get("initializer_range"),
        "normalization": "RMSNorm",
        "norm_epsilon": a.rms_norm_eps,
        "apply_layernorm_1p": False,
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "add_position_embedding": True,
        "rotary_base": int(theta) if theta.is_integer() else theta,  # Megatron's option takes whole numbers
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "untie_embeddings_and_output_weights": not a.tie_word_embeddings,
        "vocab_size": a.vocab_size,
        "padded_vocab_size": padded_vocab_size(a.vocab_size, sizes.tensor),
        "make_vocab_size_divisible_by": _VOCAB_DIVISOR,
        "params_dtype": dtype,
        "bf16": dtype.name == "bfloat16",
        "fp16": dtype.name == "float16",
        "tensor_model_parallel_size": sizes.tensor,
        "pipeline_model_parallel_size": sizes.pipeline,
        "virtual_pipeline_model_parallel_size": sizes.virtual if sizes.virtual > 1 else None,
        **sizes.split(a).arguments(),
        "ckpt_format": "torch",
        **({name: getattr(a, name) for name in names} if a.use_mup else {}),
    }


def pad_vocab(parts: Mapping[str, ShardedTensor], rows: int) -> dict[str, ShardedTensor]:
    """The parts, with rows of zeros after those of the vocabulary."""
    padded = dict(parts)
    for name in (EMBED_TOKENS.name, LM_HEAD.name):
        if name in parts:
            vocab, hidden = parts[name].shape
            zeros = ShardedTensor.zeros((rows - vocab, hidden), parts[name].dtype)
            padded[name] = ShardedTensor.concatenate([parts[name], zeros], 0)
    return padded


@dataclass(frozen=True)
class WholeNative:
    """One whole native tensor [blocks, members, unit, columns]."""

    line: NativeWeight
    layer: int | None
    tensor: ShardedTensor
    scale: float

    def of_rank(self, rank: int, tensor_parallel: int) -> ShardedTensor:
        """The part of one rank: columns; or whole blocks where there are several, rows where there is one."""
        if self.line.parallel == "replicated":
            return self.tensor
        axis = 3 if self.line.parallel == "row" else 2 if self.line.rows == "plain" else 0
        size = self.tensor.shape[axis] // tensor_parallel
        return self.tensor[(*(slice(None),) * axis, slice(rank * size, (rank + 1) * size))]


def native_weights(
    parts: Mapping[str, ShardedTensor], scales: Mapping[str, float], architecture: Architecture, tensor_parallel: int
) -> Iterator[WholeNative]:
    """Every native tensor of the whole model."""
    order = RowOrder(gated_blocks=tensor_parallel, tensor_parallel=tensor_parallel)
    for name, line, hub in native_tensors(MEGATRON, architecture):
        layer = _LAYER.search(name)
        joined = join([parts[part] for part, _ in hub], line, architecture, order)
        yield WholeNative(line, int(layer[0]) if layer else None, joined, scales.get(hub[0][0], 1.0))


def _chunks(
    weights: Sequence[WholeNative], architecture: Architecture, sizes: ParallelSizes, stage: int
) -> Iterator[tuple[str, dict[str, WholeNative]]]:
    """What each of a stage's chunks holds, by its key in the file: weights by name, layers numbered from 0."""
    outside = {weight.line.name: weight for weight in weights if weight.layer is None}
    embedding = {_EMBEDDING: outside.pop(_EMBEDDING)}
    if architecture.tie_word_embeddings and sizes.pipeline > 1:  # the last stage has a copy
        outside[_HEAD] = embedding[_EMBEDDING]
    first, last = (0, 0), (sizes.pipeline - 1, sizes.virtual - 1)
    for (owner, chunk), layers in sizes.split(architecture).ranges().items():
        if owner != stage:
            continue
        inside = [weight for weight in weights if weight.layer in layers]
        yield (
            "model" if sizes.virtual == 1 else f"model{chunk}",
            {
                **(embedding if (stage, chunk) == first else {}),
                **{w.line.name.format(w.layer - layers.start): w for w in inside if w.layer is not None},
                **(outside if (stage, chunk) == last else {}),
            },
        )


def _state_dict(
    weights: Mapping[str, WholeNative], rank: int, tensor_parallel: int, spec: Spec, where: str, dtype: DType
) -> OrderedDict[str, TensorPlan | None]:
    """One rank's part of a chunk. `where` makes the planned names unique: every rank's file has the same ones."""
    state: OrderedDict[str, TensorPlan | None] = OrderedDict()
    for te_name, weight in weights.items():
        name = _local_name(te_name) if spec == "local" else te_name
        part = weight.of_rank(rank, tensor_parallel)
        shape = (math.prod(part.shape[:3]), *part.shape[3:])
        state[name] = part.plan(f"{where}/{name}", shape, dtype=dtype, scale=weight.scale)
        module = name.removesuffix(".weight")
        if spec == "te" and module.endswith(WITH_EXTRA_STATE):
            state[f"{module}._extra_state"] = None
    return state


def _local_name(name: str) -> str:
    for te, local in _LOCAL_NAMES.items():
        name = name.replace(te, local)
    return name


# The whole export.


def plan_megatron_export(
    model: ExportedModel, sizes: ParallelSizes, fold: bool, spec: Any, cast: DType | None
) -> tuple[CheckpointPlan, Layout, list[str]]:
    """The plan of a folder that Megatron-LM trains on, its files, and notes.

    Args:
        model: what is exported.
        sizes: ranks, stages and chunks.
        fold: whether the multipliers are folded into the weights.
        spec: the layers that Megatron-LM builds.
        cast: of the output; the source's dtype unless given.
    """
    source, dtype = model.architecture, model.dtype(cast)
    target, scales = fold_multipliers(source) if fold else (source, {})
    config = {key: value for key, value in hub_config(model.config, target, dtype.name).items() if key != "auto_map"}
    tensors, layout = plan_megatron(model.parts(target), scales, target, config, sizes, spec, dtype)
    if model.growth_state:
        masked = masked_config(config, model.growth_state)
        config = {key: value for key, value in masked.items() if key != "auto_map"}
    details = {"parallel": sizes.record(), "multipliers": "fold" if fold else "keep", "spec": spec}
    lineage = model.lineage("megatron", cast, **details)
    check_read_files(model.folder)
    # The card says how transformers loads the model, which is not how this folder is loaded.
    sidecars = {name: path for name, path in small_files(model.folder, {}).items() if name != "README.md"}
    notes = left_behind(model.folder, sidecars) + model.one_dtype_notes(cast)
    notes += folding_notes(source, target, scales, dict.fromkeys(scales, dtype))
    if not fold and (source.embedding_scale, source.logit_scale) != (1.0, 1.0):
        notes.append(
            f"The multipliers {source.embedding_scale:g} on the embeddings and {source.logit_scale:g} on the logits "
            "are in the arguments only; a stock Megatron-LM ignores them and computes another function."
        )
    if model.growth_state:
        notes.append(
            "A masked checkpoint: Megatron-LM computes what it computes with "
            "growth.training.megatron_masks.install_masks(model, OUT), and without it another function."
        )
    padded = padded_vocab_size(target.vocab_size, sizes.tensor)
    if padded != target.vocab_size:
        notes.append(f"{padded - target.vocab_size} rows of zeros follow the {target.vocab_size} of the vocabulary.")
    split = sizes.split(target).options()
    notes.append(
        f"Megatron-LM: --load OUT --use-checkpoint-args --use-mp-args-from-checkpoint-args{split} --ckpt-format torch "
        f"--norm-epsilon {target.rms_norm_eps!r}."
    )
    if split:
        notes.append(f"Of these,{split} are not taken from the arguments in the files: a run needs them each time.")
    return CheckpointPlan(tensors, config, sidecars, lineage), layout, notes
