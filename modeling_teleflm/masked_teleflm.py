# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A Tele-FLM in the middle of its growth: what is new speaks with the volume alpha, from 0 to 1 over the training.

Masked growth is MSG's (arXiv 2305.02869), here with every mask on a linear position, so that for each alpha there is a
plain Tele-FLM that computes the same: `teleflm fold` writes it.
"""

from collections.abc import Sequence
from dataclasses import field
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers import initialization as init

from .configuration_teleflm import TeleFLMConfig
from .modeling_teleflm import TeleFLMForCausalLM, TeleFLMModel, unwrapped_class

AUTO_MAP = {
    "AutoConfig": "masked_teleflm.TeleFLMMaskedConfig",
    "AutoModelForCausalLM": "masked_teleflm.TeleFLMMaskedForCausalLM",
}
_GROWTH_STATE = (
    "step",
    "total_steps",
    "schedule",
    "hidden_size",
    "intermediate_size",
    "rms_norm_eps",
    "new_heads",
    "new_layers",
)


@strict
class TeleFLMMaskedConfig(TeleFLMConfig):
    r"""
    Configuration of a masked Tele-FLM: a [`TeleFLMConfig`] and how far its growth is.

    `rms_norm_eps` is null in it, so that a class that knows no masks refuses the checkpoint even where it ignores
    `model_type`: the epsilon of an unmasked model changes with alpha.

    Args:
        growth_state (`dict`): `step` of `total_steps`, alpha being their quotient; `schedule`, which is `"linear"`; of
            the model that grew, its `hidden_size`, `intermediate_size` and `rms_norm_eps`; and what it did not have:
            `new_heads`, positions among the query heads, and `new_layers`.
        **kwargs: every field of [`TeleFLMConfig`].

    Raises:
        huggingface_hub.errors.StrictDataclassError: `growth_state` is missing, incomplete, or does not fit the sizes.
    """

    model_type = "TeleFLMMasked"
    has_no_defaults_at_init = True

    rms_norm_eps: float | None = None  # type: ignore[assignment]
    growth_state: dict[str, Any] = field(default_factory=dict)

    def validate_growth_state(self) -> None:
        """Checks of `growth_state`, run by `@strict` after `__init__`."""
        state = self.growth_state
        missing = [key for key in _GROWTH_STATE if key not in state]
        if missing:
            raise ValueError(f"growth_state has no {missing[0]}; it needs {', '.join(_GROWTH_STATE)}.")
        if state["schedule"] != "linear":
            raise ValueError(f"growth_state: schedule is {state['schedule']!r}; expected 'linear'.")
        if not (isinstance(state["total_steps"], int) and state["total_steps"] > 0 and state["step"] >= 0):
            raise ValueError(f"growth_state: step {state['step']} of {state['total_steps']} steps; expected 0 of 1 on.")
        limits = {"new_heads": self.num_attention_heads, "new_layers": self.num_hidden_layers}
        for name, limit in limits.items():
            if not all(0 <= index < limit for index in state[name]):
                raise ValueError(f"growth_state: {name} is {state[name]}, the model has {limit}.")
        for name in ("hidden_size", "intermediate_size"):
            if not 0 < state[name] <= getattr(self, name):
                raise ValueError(f"growth_state: {name} was {state[name]}, the model has {getattr(self, name)}.")


class TeleFLMGrowthMask(nn.Module):
    """Multiplies each feature by a power of alpha: 0 for what was there before, 1 for what is new.

    Alpha is `step / total_steps`, at most 1. The step is an integer tensor: as a tensor, a new value does not recompile
    a compiled model; as an integer, it survives a cast of the model to bfloat16, which cannot tell 4999/5000 from 1.

    Args:
        powers: feature counts and the power of alpha of each, in order; powers add up where several masks meet.
        step: the step to begin with.
        total_steps: at which alpha is 1.
    """

    step: torch.Tensor
    power: torch.Tensor

    def __init__(self, powers: Sequence[tuple[int, int]], step: int, total_steps: int):
        super().__init__()
        self.powers = powers
        self.first_step = step
        self.total_steps = total_steps
        size = sum(count for count, _ in powers)
        self.register_buffer("step", torch.empty((), dtype=torch.int64), persistent=False)
        self.register_buffer("power", torch.empty(size, dtype=torch.int8), persistent=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Fill the buffers, which no checkpoint holds; after a model was made on the meta device, once more."""
        self.step.fill_(self.first_step)
        position = 0
        for count, power in self.powers:
            self.power[position : position + count] = power
            position += count

    def alpha(self, dtype: torch.dtype) -> torch.Tensor:
        """The volume of what is new, a scalar."""
        return torch.clamp(self.step.to(dtype) / self.total_steps, max=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features [..., n], masked."""
        wide = torch.promote_types(features.dtype, torch.float32)
        factors = self.alpha(wide).pow(self.power).to(features.dtype)
        return features * _spread_as(features, factors)


def _spread_as(features: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Factors [n] laid out over processes as the last dimension of DTensors under tensor parallelism."""
    if features.shape[-1] != len(factors):
        raise ValueError(
            f"a mask of {len(factors)} features meets {features.shape[-1]}: some of them, without saying which. Masked "
            "models take the tensor parallelism of transformers 5.23, whose features are DTensors."
        )
    placements = getattr(features, "placements", None)
    if placements is None:
        return factors
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    last = [placement.is_shard() and placement.dim % features.ndim == features.ndim - 1 for placement in placements]
    spread = [Shard(0) if is_last else Replicate() for is_last in last]
    return distribute_tensor(factors, features.device_mesh, spread, src_data_rank=None)  # type: ignore[attr-defined]


class TeleFLMMaskedEmbedding(nn.Embedding):
    """Token embeddings whose new features are masked."""

    def __init__(self, plain: nn.Embedding, mask: TeleFLMGrowthMask):
        super().__init__(plain.num_embeddings, plain.embedding_dim, plain.padding_idx)
        self.mask = mask

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.mask(super().forward(input_ids))


class TeleFLMMaskedLinear(nn.Module):
    """A projection onto the residual stream that is masked in what it reads and in what it writes.

    No nn.Linear: to one of these, tensor parallelism would hand a part of the features without saying which.
    """

    def __init__(self, plain: nn.Linear, input_mask: TeleFLMGrowthMask, output_mask: TeleFLMGrowthMask):
        super().__init__()
        self.in_features = plain.in_features
        self.out_features = plain.out_features
        self.weight = nn.Parameter(torch.empty_like(plain.weight))
        self.input_mask = input_mask
        self.output_mask = output_mask

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.output_mask(nn.functional.linear(self.input_mask(features), self.weight))


class TeleFLMMaskedRMSNorm(nn.Module):
    """RMSNorm of a stream whose new features count as much as they speak: the mean is over d + alpha (D - d)."""

    def __init__(self, eps: float, mask: TeleFLMGrowthMask):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(len(mask.power)))
        self.variance_epsilon = eps
        self.old_features = sum(count for count, power in mask.powers if power == 0)
        self.mask = mask

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        features = self.old_features + self.mask.alpha(wide.dtype) * (wide.shape[-1] - self.old_features)
        variance = wide.square().sum(-1, keepdim=True) / features
        return self.weight * (wide * torch.rsqrt(variance + self.variance_epsilon)).to(hidden_states.dtype)


class TeleFLMMaskedModel(TeleFLMModel):
    """The decoder with its masks. Arguments and outputs are those of [`TeleFLMModel`]."""

    config: TeleFLMMaskedConfig
    config_class = TeleFLMMaskedConfig

    def __init__(self, config: TeleFLMMaskedConfig):
        LlamaModel.__init__(self, config)  # TeleFLMModel's would register the plain decoder for this configuration
        state, eps = config.growth_state, config.growth_state["rms_norm_eps"]
        heads = [(config.head_dim or 0, int(head in state["new_heads"])) for head in range(config.num_attention_heads)]
        neurons = _old_and_new(state["intermediate_size"], config.intermediate_size)

        def mask(powers: Sequence[tuple[int, int]]) -> TeleFLMGrowthMask:
            return TeleFLMGrowthMask(powers, state["step"], state["total_steps"])

        def stream(new_layer: int = 0) -> TeleFLMGrowthMask:
            features = _old_and_new(state["hidden_size"], config.hidden_size)
            return mask([(count, power + new_layer) for count, power in features])

        self.embed_tokens = TeleFLMMaskedEmbedding(self.embed_tokens, stream())
        layer: Any
        for index, layer in enumerate(self.layers):
            is_new = int(index in state["new_layers"])
            layer.self_attn.o_proj = TeleFLMMaskedLinear(layer.self_attn.o_proj, mask(heads), stream(is_new))
            layer.mlp.down_proj = TeleFLMMaskedLinear(layer.mlp.down_proj, mask(neurons), stream(is_new))
            layer.input_layernorm = TeleFLMMaskedRMSNorm(eps, stream())
            layer.post_attention_layernorm = TeleFLMMaskedRMSNorm(eps, stream())
        self.norm = TeleFLMMaskedRMSNorm(eps, stream())  # type: ignore[assignment]

    def _init_weights(self, module: nn.Module) -> None:
        _init_weights(self, module)


class TeleFLMMaskedForCausalLM(TeleFLMForCausalLM):
    """The decoder with its masks and its language-model head. Arguments and outputs are those of TeleFLMForCausalLM."""

    config: TeleFLMMaskedConfig
    config_class = TeleFLMMaskedConfig

    def __init__(self, config: TeleFLMMaskedConfig):
        LlamaPreTrainedModel.__init__(self, config)  # see TeleFLMMaskedModel
        self.model = TeleFLMMaskedModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        _init_weights(self, module)

    @property
    def mask_step(self) -> int:
        """How many steps the masks have gone."""
        return self.config.growth_state["step"]

    @property
    def mask_alpha(self) -> float:
        """The volume of what is new, 0 to 1."""
        return min(self.mask_step / self.config.growth_state["total_steps"], 1.0)

    @torch.no_grad()
    def set_mask_step(self, step: int) -> None:
        """Set the masks to a step of their schedule, in place; the configuration follows, so what is saved knows it."""
        self.config.growth_state = {**self.config.growth_state, "step": step}
        for module in self.modules():
            if isinstance(module, TeleFLMGrowthMask):
                module.step.fill_(step)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As [`PreTrainedModel.save_pretrained`]; the folder names this file's classes."""
        self.config.auto_map = dict(AUTO_MAP)
        with unwrapped_class(self):
            LlamaPreTrainedModel.save_pretrained(self, *args, **kwargs)


def _old_and_new(old: int, size: int) -> list[tuple[int, int]]:
    return [(old, 0), (size - old, 1)]


def _init_weights(model: LlamaPreTrainedModel, module: nn.Module) -> None:
    if isinstance(module, TeleFLMGrowthMask):
        module.reset()
    elif isinstance(module, TeleFLMMaskedLinear):
        # Unlike nn.init's, it leaves a weight alone that was loaded.
        init.normal_(module.weight, mean=0.0, std=model.config.initializer_range)
    else:
        LlamaPreTrainedModel._init_weights(model, module)


__all__ = ["TeleFLMMaskedConfig", "TeleFLMMaskedForCausalLM", "TeleFLMMaskedModel"]
