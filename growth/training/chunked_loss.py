# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The language-model loss without all logits at once.

With a vocabulary of 80,000 the logits of 4,096 tokens take 1.3 GB in float32, and transformers' loss holds several such
arrays. Here the head and the loss go over some tokens at a time. Their gradients are computed then and there: with
z = s W h, s the factor on the logits, and p = softmax(z),

    d loss / d h = s W^T (p - onehot)        d loss / d W = s (p - onehot) h^T

so that nothing is computed twice, and what stays are gradients of the sizes of h and W.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

_IGNORED = -100
_CHUNK_ELEMENTS = 1 << 25  # logits at a time: 128 MiB of float32


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of -log softmax(scale * W h)[label] over the tokens whose label is not -100, in float32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float
    ) -> torch.Tensor:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        total = hidden.new_zeros((), dtype=_wide(hidden.dtype))
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=_wide(weight.dtype)) if needs_weight else None
        step = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            logits = F.linear(hidden[part], weight)
            logits = logits.to(_wide(logits.dtype)) * scale
            counted = labels[part] != _IGNORED
            index = labels[part].where(counted, 0)[:, None]
            norm = logits.logsumexp(-1, keepdim=True)
            total += (norm - logits.gather(1, index))[counted].sum()
            if not needs_hidden and not needs_weight:
                continue
            gradient = (logits - norm).exp_()  # now the probabilities
            gradient.scatter_add_(1, index, torch.full_like(norm, -1.0))
            gradient = gradient.mul_(scale).masked_fill_(~counted[:, None], 0.0).to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad[part] = gradient @ weight.to(hidden.dtype)
            if weight_grad is not None:
                weight_grad += gradient.T @ hidden[part]
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * outer[0].to(hidden_grad.dtype),
            None if weight_grad is None else (weight_grad * outer[0]).to(ctx.dtype),  # rounded once
            None,
            None,
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums and softmax are computed in."""
    return torch.promote_types(dtype, torch.float32)


def causal_lm_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    scale: float,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """The mean cross entropy of predicting each next token, as transformers' `ForCausalLMLoss` defines it.

    Args:
        hidden: last hidden states [batch, length, hidden_size], of any floating dtype.
        weight: of the head [vocab_size, hidden_size].
        labels: token ids [batch, length], -100 where nothing is learned; that of a position is predicted by the one
            before.
        scale: factor on the logits.
        num_items_in_batch: by which the sum is divided; the number of labels that count unless given.

    Returns:
        a scalar, in nats a token: float32, or float64 of such hidden states.
    """
    flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    wanted = labels[:, 1:].reshape(-1).to(hidden.device)
    total: torch.Tensor = _ChunkedCrossEntropy.apply(flat, weight, wanted, scale)
    count = (wanted != _IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)


def chunk_loss(model: nn.Module) -> None:
    """Have a model compute its loss in chunks, where it is given labels: its output then has no logits.

    Inside of the forward pass, so that what shards a model has the head's weight there. A head that is a DTensor, under
    tensor parallelism, stays with transformers' own loss.

    Args:
        model: a causal language model of this package, masked or not, or a Llama; its `forward` is replaced.
    """
    own: Callable[..., Any] = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        weight = self.lm_head.weight
        if labels is None or isinstance(weight, DTensor):
            return own(*args, labels=labels, **kwargs)
        count = kwargs.pop("num_items_in_batch", None)
        hidden = self.model(*args, **kwargs).last_hidden_state
        scale = getattr(self.config, "logit_scale", 1.0)  # of a Tele-FLM
        loss = causal_lm_loss(hidden, weight, labels, scale, count)
        return CausalLMOutputWithPast(loss=loss)

    model.forward = types.MethodType(forward, model)


__all__ = ["causal_lm_loss", "chunk_loss"]
