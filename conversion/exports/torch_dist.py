# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""From a Hub folder to megatron-core's `torch_dist`, which any number of ranks and stages loads, with Adam's moments.

    OUT/latest_checkpointed_iteration.txt       `release`; with moments the updates that Adam has done
    OUT/release or iter_{:07d}/.metadata, __0_0.distcp, ...
        decoder.layers.mlp.linear_fc2.weight                 the layers of one weight, stacked: [layers, rows, columns]
        optimizer.state.exp_avg.decoder.layers....           and so exp_avg_sq, and the weights in float32, fp32_param
    OUT/.../common.pt, metadata.json            arguments, the settings of the optimizer; which format it is
    OUT/.../run_config.yaml                     the model in Megatron-Bridge's terms, if its multipliers are 1
    OUT/config.json                             the same model in the Hub's terms

Megatron-LM does not load the optimizer of a `release`, so moments have an iteration. Names are those of Transformer
Engine's layers, whatever layers the run builds.
"""

import json
import math
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..adam_state import ADAMW_UNSAID, AdamState, decay_notes
from ..architecture import Architecture
from ..checkpoint.containers import Layout
from ..checkpoint.distributed_file import METADATA
from ..checkpoint.distributed_layout import (
    ChunkedTensor,
    Entry,
    KeyPath,
    SameAs,
    chunk_bytes,
    distributed_shards,
    entry_name,
)
from ..checkpoint.dtypes import FLOAT32, DType
from ..checkpoint.errors import CheckpointError, printable
from ..checkpoint.numbers import shown
from ..checkpoint.plan import CheckpointPlan, Shape, TensorPlan
from ..checkpoint.sharded import ShardedTensor
from ..checkpoint.sources import source_identity
from ..checkpoint.torch_zip import torch_shard
from ..hub.contents import hub_config
from ..hub.small_files import check_read_files, left_behind, small_files
from ..native.find import RELEASE, TRACKER
from ..optimizer_state import MOMENTS
from .dcp import OpenState
from .megatron import (
    CHECKPOINT_VERSION,
    ParallelSizes,
    WholeNative,
    native_weights,
    pad_vocab,
    padded_vocab_size,
    training_args,
)
from .model import ExportedModel
from .multipliers import fold_multipliers, folding_notes
from .run_config import RUN_CONFIG, run_config

# Modules that have an entry for FP8 scales in each layer, of Transformer Engine and of megatron-core alike; None says
# there are none. A loader asks for each by name.
_WITH_EXTRA_STATE = (
    "self_attention.core_attention",
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON_FORMAT = {"common_backend": "torch", "common_backend_version": 1}
_MASTERS = ("optimizer.state.fp32_param", "optimizer.state.param")
_SHARDING = "fully_reshardable"  # moments in the shape of their weights
_CONTENT = {"distrib_optim_sharding_type": _SHARDING, "singleton_local_shards": False}


def plan_torch_dist(
    model: ExportedModel, state: OpenState | None, fold: bool, cast: DType | None, shard_bytes: int
) -> tuple[CheckpointPlan, Layout, list[str]]:
    """The plan of a folder that megatron-core loads, its files, and notes.

    Args:
        model: what is exported.
        state: its optimizer, if that is too.
        fold: whether the multipliers are folded into the weights, and so out of their moments.
        cast: of the weights; the source's dtype unless given. The optimizer's are float32.
        shard_bytes: most bytes of tensors in a file.

    Raises:
        CheckpointError: Megatron has no such model, or no such optimizer.
    """
    source, dtype = model.architecture, model.dtype(cast)
    target, scales = fold_multipliers(source) if fold else (source, {})
    config = {key: value for key, value in hub_config(model.config, target, dtype.name).items() if key != "auto_map"}
    arguments = {**training_args(target, config, ParallelSizes(), dtype), "ckpt_format": "torch_dist"}
    numel = sum(view.numel for view in model.checkpoint.tensors.values())
    nbytes = numel * (dtype.itemsize + (3 * FLOAT32.itemsize if state else 0))
    weights = _Weights(target, scales, arguments["padded_vocab_size"], chunk_bytes(nbytes, shard_bytes))
    entries = {**weights.entries(model.parts(target), "", dtype, 1.0), **_extra_states(target)}
    states: dict[KeyPath, Entry] = {}
    common: dict[str, Any] = {
        "args": Namespace(**arguments),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0,
        "content_metadata": _CONTENT,
    }
    details: dict[str, Any] = {"multipliers": "fold" if fold else "keep"}
    folder = RELEASE
    if state:
        step = _common_step(state.adam)
        folder = _folder(step)
        states = _states(weights, model.parts(target), _moments(state.adam, source, target))
        common |= {"iteration": step, **_common_state(state.adam, step)}
        details["optimizer"] = source_identity(state.adam.file)
    shards, index = distributed_shards(folder, entries, shard_bytes, states=states, has_paths=False)
    check_read_files(model.folder)
    # The card says how transformers loads the model, which is not how this folder is loaded.
    sidecars = {name: path for name, path in small_files(model.folder, {}).items() if name != "README.md"}
    sidecars |= {
        f"{folder}/{METADATA}": index,
        f"{folder}/metadata.json": json.dumps({**_FORMAT, **_COMMON_FORMAT}).encode(),
        f"{folder}/common.pt": b"".join(part for _, part in sorted(torch_shard("common.pt", common).fixed)),
    }
    if _is_plain(target):  # a model with multipliers would be made without them
        sidecars[f"{folder}/{RUN_CONFIG}"] = run_config(arguments, optimizer=state is not None)
    tensors = tuple(tensor for shard in shards for tensor, _ in shard.tensors)
    layout = Layout(tuple(shards), (TRACKER, (RELEASE if state is None else str(common["iteration"])).encode()))
    notes = left_behind(model.folder, sidecars) + model.one_dtype_notes(cast)
    notes += folding_notes(source, target, scales, dict.fromkeys(scales, dtype))
    notes += _notes(target, state)
    return CheckpointPlan(tensors, config, sidecars, model.lineage("torch_dist", cast, **details)), layout, notes


class _Weights:
    """How the Hub tensors of a model become megatron-core's.

    Args:
        architecture: of the model that they make.
        scales: factors on some of the Hub tensors.
        rows: of the embedding and the head, padding included.
        most: bytes of a chunk, unless what may not be cut has more.
    """

    def __init__(self, architecture: Architecture, scales: Mapping[str, float], rows: int, most: int) -> None:
        self._architecture, self._scales, self._rows, self._most = architecture, scales, rows, most

    def entries(
        self, parts: Mapping[str, ShardedTensor], prefix: str, dtype: DType, power: float
    ) -> dict[KeyPath, Entry]:
        """Every tensor by its name, the layers of one stacked.

        Args:
            parts: the Hub tensors by name, or what has their shapes.
            prefix: of the names.
            dtype: of the output.
            power: of the factors that they are multiplied by.
        """
        whole: dict[str, list[WholeNative]] = {}
        for native in native_weights(pad_vocab(parts, self._rows), self._scales, self._architecture, 1):
            whole.setdefault(native.line.name, []).append(native)
        return {
            (prefix + name.replace("{}.", ""),): self._stack(layers, dtype, power)
            if "{}" in name
            else self._chunked(layers[0], dtype, power)
            for name, layers in whole.items()
        }

    def _stack(self, layers: list[WholeNative], dtype: DType, power: float) -> ChunkedTensor:
        chunks = []
        for number, native in enumerate(layers):
            one = self._chunked(native, dtype, power, leading=(1,))
            chunks += [((number, *start[1:]), plan) for start, plan in one.chunks]
        return ChunkedTensor((len(layers), *one.shape[1:]), dtype, tuple(chunks))

    def _chunked(self, native: WholeNative, dtype: DType, power: float, leading: Shape = ()) -> ChunkedTensor:
        """One native tensor [blocks, members, unit, columns] in chunks of whole rows, in dimensions behind others."""
        blocks, members, unit, *columns = native.tensor.shape
        scale = native.scale**power
        chunks: list[tuple[Shape, TensorPlan]] = []
        for row, part in _cut(native.tensor, self._most // dtype.itemsize):
            shape = (*leading, math.prod(part.shape[:3]), *columns)
            plan = part.plan("", shape, dtype=dtype, scale=scale)
            chunks.append(((*(0 for _ in leading), row, *(0 for _ in columns)), plan))
        return ChunkedTensor((*leading, blocks * members * unit, *columns), dtype, tuple(chunks))


def _cut(tensor: ShardedTensor, most: int) -> Iterator[tuple[int, ShardedTensor]]:
    """A tensor [blocks, members, unit, ...] in parts of so many elements, with the row that each begins at.

    Where there are several blocks, a part has whole ones; else it has rows of one member.
    """
    blocks, members, unit, *_ = tensor.shape
    if tensor.numel <= most:
        yield 0, tensor
    elif blocks > 1:
        size = max(1, most * blocks // tensor.numel)
        for first in range(0, blocks, size):
            yield first * members * unit, tensor[first : first + size]
    else:
        size = max(1, most * members * unit // tensor.numel)
        for member in range(members):
            for first in range(0, unit, size):
                yield (
                    member * unit + first,
                    tensor[:, member : member + 1, first : first + size],
                )


def _extra_states(architecture: Architecture) -> dict[KeyPath, Entry]:
    count = architecture.num_hidden_layers
    return {
        (f"decoder.layers.{module}._extra_state/shard_{layer}_{count}",): [None]
        for module in _WITH_EXTRA_STATE
        for layer in range(count)
    }


# The optimizer.


def _folder(step: int) -> str:
    return f"iter_{step:07d}"


def _common_step(adam: AdamState) -> int:
    steps = {*adam.steps.values()}
    if len(steps) > 1:
        raise CheckpointError(
            f"{adam.file}: parameters are at steps {min(steps):g} and {max(steps):g}, Megatron has one step for all; "
            "leave --optimizer out."
        )
    step = steps.pop()
    if step != int(step) or step < 1:
        raise CheckpointError(f"{adam.file}: Adam is at step {step:g}, Megatron counts from 1; leave --optimizer out.")
    return int(step)


def _moments(adam: AdamState, source: Architecture, target: Architecture) -> dict[str, dict[str, ShardedTensor]]:
    """Both moments of every Hub tensor."""
    if source.tie_word_embeddings and not target.tie_word_embeddings:
        raise CheckpointError(
            f"{adam.file}: has moments of one matrix as embedding and head, which folding the multipliers makes two "
            "of; --multipliers keep leaves it one."
        )
    return {
        key: {name: ShardedTensor.of(views[number]) for name, views in adam.moments.items()}
        for number, key in enumerate(MOMENTS)
    }


def _states(
    weights: _Weights, parts: Mapping[str, ShardedTensor], moments: Mapping[str, Mapping[str, ShardedTensor]]
) -> dict[KeyPath, Entry]:
    """The float32 weights, and the moments: of w' = c w they are m / c and v / c^2.

    The distributed optimizer of megatron-core 0.16 asks for the weights as `param`, the others as `fp32_param`.
    """
    states = weights.entries(parts, f"{_MASTERS[0]}.", FLOAT32, 1.0)
    states |= {(entry_name(path).replace(*_MASTERS, 1),): SameAs(path) for path in states}
    for key, power in zip(MOMENTS, (-1.0, -2.0), strict=True):
        states |= weights.entries(moments[key], f"optimizer.state.{key}.", FLOAT32, power)
    squares = f"optimizer.state.{MOMENTS[1]}."
    for path, entry in states.items():
        if isinstance(entry, ChunkedTensor) and entry_name(path).startswith(squares):
            states[path] = entry.nonnegative()
    return states


def _common_state(adam: AdamState, step: int) -> dict[str, Any]:
    """What megatron-core keeps of an optimizer beside its tensors: of the distributed one, and of the others.

    Its groups are those of weights with and without decay, and its own settings replace learning rate and decay with
    each step; of a schedule nothing is known, so that a run has to override it.
    """
    said = [{key: settings[key] for key in ("betas", "eps")} for settings, _ in adam.groups]
    if any(other != said[0] for other in said):
        raise CheckpointError(f"{adam.file}: its groups have other betas or eps, {said}, Megatron has one of each.")
    if any(settings.get("maximize") for settings, _ in adam.groups):
        raise CheckpointError(
            f"{adam.file}: maximize is True, and Megatron minimises: it would undo what was learnt; leave --optimizer "
            "out."
        )
    decay, rate = _decay(adam), _rate(adam)
    shared = {
        **said[0],
        "betas": tuple(said[0]["betas"]),
        "lr": rate,
        "step": step,
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        "default_config": True,
        **ADAMW_UNSAID,
        "bias_correction": True,  # of Apex and Transformer Engine
    }
    groups = [{**shared, "wd_mult": factor, "weight_decay": decay * factor} for factor in (1.0, 0.0)]
    inner = {"state": {"common_step": float(step)}, "param_groups": groups}
    schedule = {"max_lr": rate, "min_lr": rate, "lr_warmup_steps": 0, "lr_decay_steps": 1, "lr_decay_style": "constant"}
    schedule |= {"num_steps": 0, "start_wd": decay, "end_wd": decay, "wd_incr_steps": 1, "wd_incr_style": "constant"}
    return {
        "optimizer": {"optimizer": inner, "param_state_sharding_type": _SHARDING, **inner},
        "opt_param_scheduler": schedule,
    }


def _rate(adam: AdamState) -> float:
    """The learning rate of both of Megatron's groups."""
    return float(adam.groups[0][0]["lr"])


def _decay(adam: AdamState) -> float:
    """The weight decay of matrices: the largest, where groups of them have several."""
    return max((float(settings["weight_decay"]) for settings, names in adam.groups if _matrices(names)), default=0.0)


def _matrices(names: Sequence[str]) -> list[str]:
    """The weights that Megatron decays: those of more than one dimension."""
    return [name for name in names if "norm" not in name and not name.endswith(".bias")]


_CARRIED = frozenset(("lr", "initial_lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"))
_OF_THE_CODE = frozenset(("foreach", "capturable", "differentiable", "fused"))  # how a step is computed, not what


def _dropped(adam: AdamState) -> Iterator[str]:
    """What of the parameter groups has no place in Megatron's two, which a run finds by their multipliers alone."""
    rate, decay = _rate(adam), _decay(adam)
    said = []
    for number, (settings, names) in enumerate(adam.groups):
        own_rate, own_decay = float(settings["lr"]), float(settings["weight_decay"])
        if own_rate != rate:
            said.append(f"lr {own_rate:g} (not {rate:g}) of group {number}, {len(names)} weights")
        matrices = _matrices(names)
        if matrices and own_decay != decay:
            said.append(f"weight_decay {own_decay:g} (not {decay:g}) of the {len(matrices)} matrices in group {number}")
        if len(matrices) < len(names) and own_decay:
            vectors = len(names) - len(matrices)
            said.append(f"weight_decay {own_decay:g} (not 0) of the {vectors} norms and biases in group {number}")
        if settings.get("decoupled_weight_decay") is False:
            said.append(f"decoupled_weight_decay False of group {number}")
        unknown = sorted(key for key in settings if key not in _CARRIED | _OF_THE_CODE | {"decoupled_weight_decay"})
        said += [f"{key} {shown(settings[key])} of group {number}" for key in unknown]
    if said:
        yield (
            f"Megatron's groups have no place for these, and they are left out: {'; '.join(map(printable, said))}. "
            "Where the run is to have them, as muP's rates, its script has to make such groups."
        )


def _is_plain(architecture: Architecture) -> bool:
    return (architecture.embedding_scale, architecture.logit_scale) == (1.0, 1.0)


def _notes(target: Architecture, state: OpenState | None) -> Iterable[str]:
    if not _is_plain(target):
        yield (
            f"The multipliers {target.embedding_scale:g} on the embeddings and {target.logit_scale:g} on the logits "
            "are in the arguments only; a stock Megatron-LM ignores them and computes another function, and so would "
            f"Megatron-Bridge, for which there is no {RUN_CONFIG}."
        )
    padding = padded_vocab_size(target.vocab_size, 1) - target.vocab_size
    if padding:
        yield f"{padding} rows of zeros follow the {target.vocab_size} of the vocabulary."
    options = f"--load OUT --use-checkpoint-args --ckpt-format torch_dist --norm-epsilon {target.rms_norm_eps!r}"
    step = _common_step(state.adam) if state else None
    if _is_plain(target):
        folder = RELEASE if step is None else _folder(step)
        yield f"Megatron-Bridge: AutoBridge.load_megatron_model of OUT/{folder} (from its source; not tried)."
    if state is None:
        yield f"Megatron-LM: {options}."
        return
    yield (
        f"Adam's moments after {step} steps, and the weights in float32, are in the optimizer's state: of iteration "
        f"{step}, without a schedule and random states, in Megatron's two groups (norms have no weight decay)."
    )
    yield from decay_notes(state.adam)
    yield from _dropped(state.adam)
    yield f"Megatron-LM: {options} --override-opt-param-scheduler --no-load-rng."


__all__ = ["plan_torch_dist"]
