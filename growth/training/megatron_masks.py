# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The masks of a masked Tele-FLM on a GPTModel of megatron-core, which trains it from the same tensors.

    teleflm export MASKED OUT --to megatron --tp 8 --pp 4
    masks = install_masks(model, "OUT")           # once the model is built, before it is wrapped or after
    masks.set_step(masks.first_step + iteration)  # before each step; iteration counts from 1
    teleflm convert RUN MASKED_AGAIN --config OUT/config.json

What they compute is what `modeling_teleflm.masked_teleflm` computes, by hooks on modules, so that no parameter and no
name of one changes, and checkpoints of the run are those of an unmasked model:

| module | hook |
|---|---|
| the embedding | its new features times alpha |
| linear_proj, linear_fc2, what they read | new heads, new neurons times alpha |
| linear_proj, linear_fc2, what they write | new features times alpha, and all of a new layer times alpha |
| norms | epsilon times c, and the output times sqrt(c), c = (d + alpha (D - d)) / D |

The last is RMSNorm over d + alpha (D - d) features: w x / sqrt(sum x^2 / (c D) + eps) = sqrt(c) w x / sqrt(mean x^2 +
c eps). Where Transformer Engine has the norm inside the linear layer after it, which has no bias, the output of that is
multiplied in its place. Hooks run again where activations are computed again.

Heads and neurons are cut over the ranks of tensor parallelism as Megatron cuts them, features of the residual stream
not at all; a layer knows its number in the whole model. Nothing here imports Megatron before it is used.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from conversion.architecture import Architecture, load_config

from ..fold import MaskState, masked_architecture
from .errors import RunError

_EPSILON = 1e-9  # as near, relatively, as Megatron's epsilon has to be
# Settings of a TransformerConfig with which the masks would compute something else, and what each has to be.
_NEEDED: Mapping[str, Any] = {
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "layernorm_zero_centered_gamma": False,
    "gated_linear_unit": True,
    "qk_layernorm": False,
    "num_moe_experts": None,
    "mtp_num_layers": None,
    "apply_residual_connection_post_layernorm": False,
    # They keep the epsilon of the first step.
    "use_transformer_engine_op_fuser": False,
    "enable_cuda_graph": False,
    "external_cuda_graph": False,
}
_NO_GRAPHS = (None, "none")  # of cuda_graph_impl
_MARK = "has_teleflm_masks"  # of a model that has some


def install_masks(
    model: nn.Module | Sequence[nn.Module],
    config: str | Path | Mapping[str, Any],
    *,
    tensor_rank: int | None = None,
    tensor_size: int | None = None,
) -> "MegatronMasks":
    """Put the masks of a masked checkpoint on a model of megatron-core, at the step at which the checkpoint is.

    Args:
        model: a GPTModel, or the chunks of one that this rank has, in whatever wraps them.
        config: folder of the masked checkpoint or of its export, its config.json, or the content of that.
        tensor_rank, tensor_size: of tensor parallelism; those of megatron's parallel_state unless given.

    Raises:
        CheckpointError: the configuration is not that of a masked checkpoint.
        RunError: the model is not one of those sizes, or has what masks are not known for.
    """
    where = "config" if isinstance(config, Mapping) else str(config)
    if isinstance(config, Mapping):
        content: Mapping[str, Any] = config
    else:
        path = Path(config)
        content = load_config(path / "config.json" if path.is_dir() else path)
    architecture, state = masked_architecture(content, where)
    if tensor_rank is None or tensor_size is None:
        from megatron.core import parallel_state

        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        tensor_size = parallel_state.get_tensor_model_parallel_world_size()
    return MegatronMasks(_find_models(model), architecture, state, tensor_rank, tensor_size)


class MegatronMasks:
    """The masks on a model; see [`install_masks`].

    Args:
        models: the GPTModels of this rank.
        architecture, state: of the masked checkpoint.
        tensor_rank, tensor_size: of tensor parallelism.

    Attributes:
        first_step: the step of the masks at which the checkpoint was.
        total_steps: at which alpha is 1.
    """

    def __init__(
        self,
        models: Sequence[Any],
        architecture: Architecture,
        state: MaskState,
        tensor_rank: int,
        tensor_size: int,
    ) -> None:
        self.first_step, self.total_steps = state.step, state.total_steps
        self._architecture, self._state = architecture, state
        self._rank, self._size = tensor_rank, tensor_size
        self._alpha = 0.0
        self._hooks: list[RemovableHandle] = []
        self._norms: list[Any] = []
        self._factors: dict[tuple[Any, ...], torch.Tensor] = {}
        self._models = list(models)
        for model in models:
            if getattr(model, _MARK, False):
                raise RunError(
                    "the model has masks already; with two of them new features would be alpha^2 times as loud."
                )
            _check_config(model, architecture)
        try:
            for model in models:
                self._install(model)
                setattr(model, _MARK, True)
        except RunError:
            self.remove()
            raise
        self.set_step(state.step)

    @property
    def alpha(self) -> float:
        """The volume of what is new, 0 to 1."""
        return self._alpha

    def set_step(self, step: int) -> None:
        """Set the masks to a step of their schedule: alpha = step / total_steps, at most 1.

        Raises:
            ValueError: step is below 0.
        """
        if step < 0:
            raise ValueError(f"step is {step}, expected at least 0.")
        alpha = min(step / self.total_steps, 1.0)
        if alpha != self._alpha:
            self._factors.clear()
        self._alpha = alpha
        for norm in self._norms:
            norm.eps = self._state.rms_norm_eps * self._share

    def remove(self) -> None:
        """Take the masks off: the model computes with all that is new at full volume."""
        for hook in self._hooks:
            hook.remove()
        for norm in self._norms:
            norm.eps = self._state.rms_norm_eps
        for model in self._models:
            setattr(model, _MARK, False)
        self._hooks, self._norms, self._models = [], [], []

    @property
    def _share(self) -> float:
        """c = (d + alpha (D - d)) / D."""
        old, size = self._state.hidden_size, self._architecture.hidden_size
        return (old + self._alpha * (size - old)) / size

    def _install(self, model: Any) -> None:
        stream = _powers(self._state.hidden_size, self._architecture.hidden_size)
        neurons = self._of_rank(_powers(self._state.intermediate_size, self._architecture.intermediate_size))
        heads = self._of_rank(_head_powers(self._architecture, self._state))
        if getattr(model, "embedding", None) is not None:
            self._mask_output(model.embedding.word_embeddings, stream)
        for layer in model.decoder.layers:
            number = layer.layer_number - 1
            if not 0 <= number < self._architecture.num_hidden_layers:
                last = self._architecture.num_hidden_layers - 1
                raise RunError(f"the model has a layer {number}, the masked checkpoint 0 to {last}.")
            written = [power + (number in self._state.new_layers) for power in stream]
            for module, read in ((layer.self_attention.linear_proj, heads), (layer.mlp.linear_fc2, neurons)):
                _check_columns(module, len(read), number)
                self._mask_input(module, read)
                self._mask_output(module, written)
            self._scale_norm(layer.input_layernorm, layer.self_attention.linear_qkv, number)
            self._scale_norm(layer.pre_mlp_layernorm, layer.mlp.linear_fc1, number)
        if getattr(model.decoder, "final_layernorm", None) is not None:
            self._scale_norm(model.decoder.final_layernorm, None, None)

    def _of_rank(self, powers: Sequence[int]) -> list[int]:
        size = len(powers) // self._size
        return list(powers[self._rank * size : (self._rank + 1) * size])

    def _mask_input(self, module: nn.Module, powers: Sequence[int]) -> None:
        if any(powers):
            key = tuple(powers)
            self._hooks.append(
                module.register_forward_pre_hook(lambda _, inputs: (self._masked(inputs[0], key), *inputs[1:]))
            )

    def _mask_output(self, module: nn.Module, powers: Sequence[int]) -> None:
        if any(powers):
            key = tuple(powers)
            self._hooks.append(module.register_forward_hook(_on_first(lambda features: self._masked(features, key))))

    def _scale_norm(self, norm: nn.Module, after: nn.Module | None, number: int | None) -> None:
        """Give a norm its epsilon and its factor, wherever it is: alone, or inside the linear layer after it."""
        place = "the final norm" if number is None else f"a norm of layer {number}"
        inside = after is not None and getattr(after, "layer_norm_weight", None) is not None
        holder = after if inside else norm
        if not isinstance(holder, nn.Module) or not isinstance(getattr(holder, "eps", None), float):
            raise RunError(
                f"{place} is a {type(norm).__name__}, of which no epsilon is known; masks are for torch's RMSNorm and "
                "for those of Transformer Engine."
            )
        self._norms.append(holder)
        self._hooks.append(holder.register_forward_hook(_on_first(lambda features: features * math.sqrt(self._share))))

    def _masked(self, features: torch.Tensor, powers: tuple[int, ...]) -> torch.Tensor:
        if features.shape[-1] != len(powers):
            raise RunError(f"a mask of {len(powers)} features meets {features.shape[-1]}.")
        key = (powers, features.dtype, features.device)
        if key not in self._factors:
            wide = torch.promote_types(features.dtype, torch.float32)
            exponents = torch.tensor(powers, device=features.device)
            alpha = torch.tensor(self._alpha, dtype=wide, device=features.device)
            self._factors[key] = alpha.pow(exponents).to(features.dtype)
        return features * self._factors[key]


def _on_first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """A forward hook that changes the output of a module; of several, as Megatron's linear layers have, the first."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return hook


def _powers(old: int, size: int) -> list[int]:
    """The power of alpha of each of some features: 0 of the old ones, which come first, 1 of the new."""
    return [0] * old + [1] * (size - old)


def _head_powers(architecture: Architecture, state: MaskState) -> list[int]:
    heads = range(architecture.num_attention_heads)
    return [int(head in state.new_heads) for head in heads for _ in range(architecture.head_dim)]


def _find_models(model: nn.Module | Sequence[nn.Module]) -> list[Any]:
    """The GPTModels inside whatever wraps them."""
    chunks: Iterable[nn.Module] = [model] if isinstance(model, nn.Module) else model
    found = [next(_with_decoder(chunk), None) for chunk in chunks]
    if not found or any(one is None for one in found):
        raise RunError("there is no GPTModel of megatron-core in the model: nothing in it has a decoder with layers.")
    return found


def _with_decoder(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if hasattr(getattr(module, "decoder", None), "layers") and hasattr(module, "config"):
            yield module


def _check_config(model: Any, architecture: Architecture) -> None:
    """Check that a model is built as the masked checkpoint is."""
    config = model.config
    sizes = {
        "num_layers": architecture.num_hidden_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.intermediate_size,
        "num_attention_heads": architecture.num_attention_heads,
        "kv_channels": architecture.head_dim,
    }
    for name, expected in {**sizes, **_NEEDED}.items():
        found = getattr(config, name, expected if name in _NEEDED else None)  # other versions lack some of the latter
        if found != expected and (found or expected):
            raise RunError(f"the model of megatron-core has {name} {found!r}, but its masks are for {expected!r}.")
    groups = config.num_query_groups or config.num_attention_heads
    if groups != architecture.num_key_value_heads:
        raise RunError(
            f"the model of megatron-core has {groups} query groups, but its masks are for "
            f"{architecture.num_key_value_heads} key/value heads."
        )
    if getattr(getattr(model, "embedding", None), "add_position_embedding", False):
        raise RunError("the model of megatron-core adds learned positions to its embedding, which no mask is for.")
    if getattr(config, "cuda_graph_impl", None) not in _NO_GRAPHS:
        raise RunError(
            f"the model of megatron-core has cuda_graph_impl {config.cuda_graph_impl!r}: a graph would keep the alpha "
            "of its capture; masks need 'none'."
        )
    if not math.isclose(config.layernorm_epsilon, architecture.rms_norm_eps, rel_tol=_EPSILON):
        raise RunError(
            f"the model of megatron-core has layernorm_epsilon {config.layernorm_epsilon!r}, the masked checkpoint "
            f"{architecture.rms_norm_eps!r}: give --norm-epsilon {architecture.rms_norm_eps!r}."
        )


def _check_columns(module: Any, columns: int, layer: int) -> None:
    found = module.weight.shape[1]
    if found != columns:
        raise RunError(
            f"layer {layer}: {type(module).__name__} reads {found} features on this rank, but the masks are for "
            f"{columns}: tensor_rank and tensor_size are not those of the model."
        )


__all__ = ["MegatronMasks", "install_masks"]
