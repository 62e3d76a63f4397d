# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Proof from numbers: do two models compute the same logits, to the last bits of float64?"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm


@dataclass(frozen=True)
class LogitComparison:
    """How far the logits of two models are apart, over the vocabulary both have.

    Args:
        tokens: positions compared.
        max_difference: largest absolute difference.
        rms_difference: root mean square difference.
        max_logit: largest absolute logit of the first model, the scale of the two above.
        same_argmax: share of positions at which both prefer the same token.
    """

    tokens: int
    max_difference: float
    rms_difference: float
    max_logit: float
    same_argmax: float

    @property
    def relative(self) -> float:
        """Largest difference in units of the largest logit."""
        return self.max_difference / self.max_logit


def compare_logits(
    first: PreTrainedModel, second: PreTrainedModel, input_ids: torch.Tensor, dtype: torch.dtype = torch.float64
) -> LogitComparison:
    """Run two models on the same tokens and compare their logits.

    In float64 every step is float64, the norms included: what remains is the order of additions, about 1e-15 of the
    largest logit. Transformers' own float64 stops at about 1e-6, because its RMSNorm computes in float32; and bfloat16
    cannot see a mistake as large as a forgotten epsilon.

    Args:
        first: a causal language model; its vocabulary may be smaller than the other's.
        second: another; both keep their weights and dtype.
        input_ids: token ids [batch, length].
        dtype: what to compute in.
    """
    a = _logits(first, input_ids, dtype)
    b = _logits(second, input_ids, dtype)[..., : a.shape[-1]]
    a = a[..., : b.shape[-1]]
    difference = (a - b).abs()
    return LogitComparison(
        tokens=input_ids.numel(),
        max_difference=difference.max().item(),
        rms_difference=difference.square().mean().sqrt().item(),
        max_logit=a.abs().max().item(),
        same_argmax=(a.argmax(-1) == b.argmax(-1)).double().mean().item(),
    )


@torch.no_grad()
def _logits(model: PreTrainedModel, input_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    weights = {name: tensor.to(dtype) for name, tensor in model.named_parameters()}
    was_training = model.training
    model.eval()
    try:
        with _exact_norms():
            output = torch.func.functional_call(model, weights, (input_ids,), {"use_cache": False})
    finally:
        model.train(was_training)
    return output.logits.to(dtype)


@contextmanager
def _exact_norms() -> Iterator[None]:
    """Let RMSNorm compute in the dtype of its input where that is wider than the float32 it uses."""

    def forward(norm: LlamaRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        variance = wide.square().mean(-1, keepdim=True)
        return norm.weight * (wide * torch.rsqrt(variance + norm.variance_epsilon)).to(hidden_states.dtype)

    with mock.patch.object(LlamaRMSNorm, "forward", forward):
        yield
