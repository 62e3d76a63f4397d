# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a fine-tuning run needs, before anyone rents a cluster: memory of each GPU, and time.

Bytes follow from sizes. Notation: P parameters, P_l of one layer, V x h of the embedding and of the head; a heads and k
key/value heads of d features, f feed-forward features, L layers; T tokens of a micro-batch; c bytes of an element as it
is computed with (2 in bfloat16); N GPUs.

| what | bytes on a GPU | why |
|---|---|---|
| weights | full, sharded: 4 P / N; else their own: 2 P or 4 P, and nf4 in QLoRA | FSDP2 keeps float32 masters |
| gradients | as the trained weights; replicated ones twice | DDP's buckets are a second copy |
| Adam's moments | twice the trained weights | so sharded full training is 16 P / N, as in ZeRO (1910.02054, 3) |
| nf4 | 1/2 + 1/64 + 4 / (64 x 256) a weight of the layers | 4 bits, a byte of scale for 64, a float for 256 scales |
| gathered | sharded: 2 V h c of the root's | the embedding and the head belong to no layer and stay |
| activations | T L A, or with checkpointing T L c h | what autograd keeps: see `_layer_activations` |
| working | the greater of one layer and the head | they take turns |
| one layer | T (A + 3 c f), or without checkpointing T 3 c f | computed again, and three feed-forward gradients |
| sharded, and | 2 c P_l; trained, 2 c P_l + V h c of gradients | this layer, the next; computed, being summed |
| the head | 32768 c min(T, 4096) + 4 T h, and 4 V h if it is trained | TRL's tile of logits, and its float32 sums |
| sharded, and | V h as it is stored, c P_l | TRL gathers the head's weight once more; the last layer comes early |
| overhead | 2 GiB + 4 % of the rest | assumed: context, communication buffers, fragmentation |

ZeRO-3 keeps 2 + 4 bytes of weights and 2 of gradients where FSDP2 keeps 4 and 4.

Without the overhead the sum is 0.99 to 1.05 of the peaks that torch's profiler sees in small models, full and LoRA, and
within 1 % of torch's tracker at the widths of the 52B; for a rank of sixteen under FSDP2 it is 1.05 of it. QLoRA,
ZeRO-3, NCCL's buffers and fragmentation have not been measured.

Time: (6 P_m + 12 L a d s) FLOPs a token for full training, P_m without the embedding, s tokens of context (PaLM,
2204.02311, appendix B); 4 P_m with frozen weights, whose own gradients are not computed. Divided by N GPUs x their peak
x a model FLOPs utilisation, which is an assumption. Neither the pauses of saving and evaluating, nor the time nf4 takes
to unpack, is in it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from conversion.architecture import Architecture, load_config, load_preset, preset_names
from sft import SFTError

Method = Literal["full", "lora", "qlora"]
Strategy = Literal["fsdp2", "zero3", "ddp"]

MFU = 0.35
# An estimate without its overhead, over the peak that torch saw: the tests allow no more.
GREATEST_EXCESS = 1.08
GPU_TFLOPS = 312.0
_GIB = 1 << 30
_OVERHEAD, _OVERHEAD_SHARE = 2 * _GIB, 0.04
_TILE_TOKENS, _TILE_VOCABULARY = 4096, 32768  # TRL 1.16's fused head
_TORCH_TILES = 7
_NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
_ZERO3_LIVE_PARAMETERS = 10**9  # DeepSpeed's default of stage3_max_live_parameters


class PlanError(SFTError):
    """A plan is asked for that nobody can run. The message names the option."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A fine-tuning run, as far as memory and time depend on it.

    Args:
        method: all weights; LoRA adapters of all linear layers; adapters of a 4-bit base.
        gpus: how many.
        strategy: `fsdp2` and `zero3` shard weights, gradients and moments; `ddp` replicates them.
        micro_batch_size: rows a GPU computes with at once.
        max_length: tokens of a row.
        activation_checkpointing: keep only each layer's input, and compute the layer again in the backward pass.
        weight_bytes: of a weight as it is loaded, in what is not sharded or not trained.
        compute_bytes: of an element of a matrix product.
        lora_rank: of the adapters, which have dropout.
        on_gpu: on a CPU TRL's fused head computes its tile in steps, and a dropout mask has four bytes instead of one.
    """

    method: Method = "full"
    gpus: int = 8
    strategy: Strategy = "fsdp2"
    micro_batch_size: int = 1
    max_length: int = 2048
    activation_checkpointing: bool = True
    weight_bytes: int = 2
    compute_bytes: int = 2
    lora_rank: int = 16
    on_gpu: bool = True

    def __post_init__(self) -> None:
        for name, choices in (("method", get_args(Method)), ("strategy", get_args(Strategy))):
            if getattr(self, name) not in choices:
                raise PlanError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}.")
        for name in ("gpus", "micro_batch_size", "max_length", "lora_rank"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    @property
    def shards(self) -> int:
        """Over how many GPUs a tensor of the training state is spread."""
        return 1 if self.strategy == "ddp" else self.gpus

    @property
    def stream_bytes(self) -> int:
        """Of an element of the residual stream: under autocast it is of the weights' type."""
        return self.compute_bytes if self.shards > 1 else max(self.weight_bytes, self.compute_bytes)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.max_length


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU, at the worst moment of a step."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    working: int
    overhead: int

    @property
    def total(self) -> int:
        """All of them; an upper estimate, since not every part is at its greatest at the same moment."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Time:
    """An estimate of time, with the assumptions it rests on.

    Args:
        flops_per_token: of forward and backward pass.
        tokens_per_second: of all GPUs.
        gpu_tflops, mfu: assumed.
    """

    flops_per_token: int
    tokens_per_second: float
    gpu_tflops: float
    mfu: float


@dataclass(frozen=True)
class Plan:
    """A run, what it needs, and what else could be done.

    Args:
        parameters, trained_parameters: of the model with its adapters.
        gpu_memory: bytes of each GPU.
        alternatives: changes after which it fits, with the setup they lead to; none if it fits as it is.
    """

    setup: Setup
    parameters: int
    trained_parameters: int
    gpu_memory: int
    memory: Memory
    time: Time
    alternatives: tuple[tuple[str, Setup, Memory], ...]

    @property
    def fits(self) -> bool:
        """Whether each GPU has the memory."""
        return self.memory.total <= self.gpu_memory


def load_architecture(model: str | Path) -> Architecture:
    """The sizes of a model: a preset's name, a folder with a config.json, or a config.json. No weights are read.

    Raises:
        PlanError: it is none of them.
        CheckpointError: the configuration is none of a Tele-FLM.
    """
    path = Path(model)
    if str(model) in preset_names():
        return Architecture.from_config(load_preset(str(model)), str(model))
    if not path.exists():
        raise PlanError(f"{model}: no such file, and no preset; known presets: {', '.join(preset_names())}.")
    config = path / "config.json" if path.is_dir() else path
    return Architecture.from_config(load_config(config), str(config))


def plan_training(
    model: Architecture, setup: Setup, gpu_memory: int, *, gpu_tflops: float = GPU_TFLOPS, mfu: float = MFU
) -> Plan:
    """Estimate what a run needs of each GPU, and how fast it is.

    Args:
        model: its sizes; see [`load_architecture`].
        setup: the run.
        gpu_memory: bytes of each GPU.
        gpu_tflops: peak of each GPU in the dtype of the matrix products, in 1e12 FLOPs a second.
        mfu: the share of it that a run reaches, 0 to 1.

    Raises:
        PlanError: a number is out of its range.
    """
    if not 0 < mfu <= 1:
        raise PlanError(f"mfu is {mfu}; it is a share, above 0 and at most 1.")
    if not gpu_tflops > 0:
        raise PlanError(f"gpu_tflops is {gpu_tflops}; it must be above 0.")
    memory = estimate_memory(model, setup)
    adapters = setup.lora_rank * _adapter_features(model) if setup.method != "full" else 0
    flops = flops_per_token(model, setup)
    return Plan(
        setup=setup,
        parameters=model.num_parameters + adapters,
        trained_parameters=adapters or model.num_parameters,
        gpu_memory=gpu_memory,
        memory=memory,
        time=Time(flops, setup.gpus * gpu_tflops * 1e12 * mfu / flops, gpu_tflops, mfu),
        alternatives=() if memory.total <= gpu_memory else tuple(_alternatives(model, setup, gpu_memory)),
    )


def estimate_memory(model: Architecture, setup: Setup, *, overhead: bool = True) -> Memory:
    """Bytes on each GPU; the table of this module says how.

    Args:
        model: its sizes.
        setup: the run.
        overhead: whether what is assumed, not derived, is counted.
    """
    weights, gradients, optimizer = _states(model, setup)
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "gathered": _gathered(model, setup),
        "activations": setup.tokens * _kept_activations(model, setup),
        "working": max(_layer_work(model, setup), _head_work(model, setup)),
    }
    assumed = _OVERHEAD + _OVERHEAD_SHARE * sum(parts.values()) if overhead else 0
    return Memory(**{name: round(size) for name, size in parts.items()}, overhead=round(assumed))


def flops_per_token(model: Architecture, setup: Setup) -> int:
    """FLOPs of a forward and a backward pass, per token; computing activations again is not counted, as MFU has it."""
    embedding = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    multiplied = model.num_parameters - embedding
    attention = 12 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * setup.max_length
    if setup.method == "full":
        return 6 * multiplied + attention
    return 4 * multiplied + 6 * setup.lora_rank * _adapter_features(model) + attention


# --- the parts --------------------------------------------------------------------------------------------------------


def _layer_parameters(model: Architecture) -> int:
    outside = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2) + model.hidden_size
    return (model.num_parameters - outside) // model.num_hidden_layers


def _linear_inputs(model: Architecture) -> int:
    """Features that the seven linear layers of a layer read: q, k, v, o, gate, up, down."""
    return 5 * model.hidden_size + model.num_attention_heads * model.head_dim + model.intermediate_size


def _adapter_features(model: Architecture) -> int:
    """Parameters of rank-1 adapters of all linear layers: what they read and what they write."""
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    outputs = queries + 2 * keys + model.hidden_size + 2 * model.intermediate_size + model.hidden_size
    return model.num_hidden_layers * (_linear_inputs(model) + outputs)


def _states(model: Architecture, setup: Setup) -> tuple[float, float, float]:
    """Weights, gradients and Adam's moments."""
    replicated = setup.strategy == "ddp" and setup.gpus > 1
    if setup.method == "full":
        each = 4 if setup.shards > 1 else setup.weight_bytes
        weights = each * model.num_parameters / setup.shards
        return weights, weights * (1 + replicated), 2 * weights
    frozen = float(model.num_parameters * setup.weight_bytes)
    if setup.method == "qlora":
        quantized = model.num_hidden_layers * (_layer_parameters(model) - 2 * model.hidden_size)
        frozen += quantized * (_NF4_BYTES - setup.weight_bytes)
    # PEFT keeps adapters in float32.
    adapters = 4 * setup.lora_rank * _adapter_features(model) / setup.shards
    return frozen / setup.shards + adapters, adapters * (1 + replicated), 2 * adapters


def _gathered(model: Architecture, setup: Setup) -> float:
    """Copies of weights that are there all the time: the root's; without shards, those that are multiplied with."""
    unpacked = setup.compute_bytes * model.hidden_size * model.intermediate_size if setup.method == "qlora" else 0
    if setup.shards > 1:
        matrices = 1 if model.tie_word_embeddings else 2
        return unpacked + setup.compute_bytes * matrices * model.vocab_size * model.hidden_size
    # Autocast multiplies with a narrow copy of a wide matrix, and the backward pass needs it again.
    layers = 1 if setup.activation_checkpointing else model.num_hidden_layers
    is_copied = setup.weight_bytes > setup.compute_bytes
    return unpacked + (setup.compute_bytes * layers * _layer_parameters(model) if is_copied else 0)


def _kept_activations(model: Architecture, setup: Setup) -> int:
    """Bytes a token that are kept from the forward to the backward pass."""
    layer = (
        setup.stream_bytes * model.hidden_size if setup.activation_checkpointing else _layer_activations(model, setup)
    )
    # And the final norm.
    return model.num_hidden_layers * layer + (4 + 2 * setup.stream_bytes) * model.hidden_size


def _layer_activations(model: Architecture, setup: Setup) -> int:
    """Bytes a token that autograd keeps of one layer.

    Flash attention keeps its inputs, its output and one float a head; the norms, which compute in float32, their input;
    the feed-forward block gate, silu(gate) and up. If the weights are trained, also what they are multiplied with is
    kept: of the norms the scaled input, of the linear layers the norms' output and the product, and where the stream is
    wider than the matrix products each layer's own copy. An adapter keeps its input, and the mask of its dropout.
    """
    c, width, stream = setup.compute_bytes, model.hidden_size, setup.stream_bytes
    heads = c * model.head_dim * (2 * model.num_attention_heads + 2 * model.num_key_value_heads)
    always = 2 * 4 * width + heads + 4 * model.num_attention_heads + 3 * c * model.intermediate_size
    if setup.method == "full":
        copies = 5 * c * width if stream > c else 0
        return always + 2 * 2 * stream * width + copies + c * model.intermediate_size
    mask = 1 if setup.on_gpu else 4
    return always + (c + mask) * _linear_inputs(model)


def _layer_work(model: Architecture, setup: Setup) -> float:
    again = _layer_activations(model, setup) if setup.activation_checkpointing else 0
    # PEFT drops out in the adapters' own float32, and so copies a narrower input twice.
    copies = 8 * model.intermediate_size if setup.method != "full" and setup.compute_bytes < 4 else 0
    computed = setup.tokens * (again + 3 * setup.compute_bytes * model.intermediate_size + copies)
    if setup.shards == 1:
        return computed
    layer = _layer_parameters(model)
    # This layer and the next one; ZeRO-3 keeps more as long as it may. And gradients, computed and being summed; in the
    # end those of the embedding meet the first layer's.
    live = 2 * layer if setup.strategy == "fsdp2" else max(_ZERO3_LIVE_PARAMETERS, 2 * layer)
    gradients = 2 * layer + model.vocab_size * model.hidden_size if setup.method == "full" else 0
    each = _NF4_BYTES if setup.method == "qlora" else setup.compute_bytes
    return computed + each * live + setup.compute_bytes * gradients


def _head_work(model: Architecture, setup: Setup) -> float:
    rows, columns = min(setup.tokens, _TILE_TOKENS), min(model.vocab_size, _TILE_VOCABULARY)
    tile = setup.compute_bytes * rows * _TILE_VOCABULARY + (0 if setup.on_gpu else _TORCH_TILES * 4 * rows * columns)
    vocabulary = model.vocab_size * model.hidden_size
    computed = tile + 4 * setup.tokens * model.hidden_size + (4 * vocabulary if setup.method == "full" else 0)
    if setup.shards == 1:
        return computed
    stored = 4 if setup.method == "full" else setup.weight_bytes
    return computed + stored * vocabulary + setup.compute_bytes * _layer_parameters(model)


# --- what else could be done ------------------------------------------------------------------------------------------


def _alternatives(model: Architecture, setup: Setup, gpu_memory: int) -> Iterator[tuple[str, Setup, Memory]]:
    """The least changes first."""
    smallest = replace(setup, activation_checkpointing=True, micro_batch_size=1)
    sharded = replace(smallest, strategy="fsdp2")
    candidates = [
        ("activation checkpointing", replace(setup, activation_checkpointing=True)),
        ("micro-batches of 1 and activation checkpointing", smallest),
        ("sharding with fsdp2, micro-batches of 1, activation checkpointing", sharded),
        *((f"{gpus} GPUs, sharded with fsdp2", replace(sharded, gpus=gpus)) for gpus in _more(setup.gpus)),
        ("LoRA", replace(sharded, method="lora")),
        ("QLoRA, replicated", replace(smallest, method="qlora", strategy="ddp")),
        *((f"LoRA on {gpus} GPUs", replace(sharded, method="lora", gpus=gpus)) for gpus in _more(setup.gpus)),
    ]
    tried, fitting = {setup}, set[Method]()
    for change, candidate in candidates:
        # The fewest GPUs are enough to know, and none more if those there are do.
        if candidate in tried or (candidate.gpus > setup.gpus and candidate.method in fitting):
            continue
        tried.add(candidate)
        memory = estimate_memory(model, candidate)
        if memory.total <= gpu_memory:
            fitting.add(candidate.method)
            yield change, candidate, memory


def _more(gpus: int) -> Iterator[int]:
    """Numbers of GPUs to try: the next whole machines of 8, up to 4096."""
    yield from range(gpus // 8 * 8 + 8, 4097, 8)


def describe(plan: Plan) -> dict[str, Any]:
    """A plan as one JSON object; bytes and FLOPs as numbers."""
    alternatives = [
        {"change": change, "setup": asdict(setup), "total_bytes": memory.total}
        for change, setup, memory in plan.alternatives
    ]
    return {
        **asdict(plan),
        "memory": {**asdict(plan.memory), "total": plan.memory.total},
        "fits": plan.fits,
        "alternatives": alternatives,
    }


__all__ = [
    "GREATEST_EXCESS",
    "Memory",
    "Plan",
    "PlanError",
    "Setup",
    "Time",
    "describe",
    "estimate_memory",
    "flops_per_token",
    "load_architecture",
    "plan_training",
]
