# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Proof from numbers with loaded models: do two compute the same logits, to the last bits of float64?"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import logging

from conversion.architecture import Architecture
from conversion.checkpoint.sources import Source, check_utf8

from .logit_comparison import LogitComparison

# Of a config.json, what names the class or is none of LlamaConfig's business.
_NOT_LLAMA = ("model_type", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")


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
def checkpoint_logits(checkpoint: Source, input_ids: np.ndarray, dtype: str) -> np.ndarray:
    """Load a checkpoint into transformers' own Llama and run it.

    The two factors in which a Tele-FLM differs are applied around the embedding and the head, so that the logits depend
    on no modelling code of this project, nor on any that the folder brings.

    Args:
        checkpoint: the checkpoint, open.
        input_ids: token ids [T].
        dtype: what to compute in: `float64`, `float32` or `bfloat16`.

    Returns:
        Logits [T, vocab_size], float64.

    Raises:
        CheckpointError: its configuration is no Tele-FLM's, or its path is not UTF-8.
    """
    config: dict[str, Any] = checkpoint.config or {}
    architecture = Architecture.from_config(config, f"{checkpoint.folder}/config.json")
    check_utf8(checkpoint.folder)
    with _no_progress_bar():
        model = LlamaForCausalLM.from_pretrained(
            checkpoint.folder,
            config=LlamaConfig.from_dict({key: value for key, value in config.items() if key not in _NOT_LLAMA}),
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            local_files_only=True,
        ).eval()
    model.model.embed_tokens.register_forward_hook(lambda *call: call[-1] * architecture.embedding_scale)
    with _exact_norms():
        logits = model(torch.from_numpy(input_ids)[None], use_cache=False).logits[0] * architecture.logit_scale
    return logits.double().numpy()


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


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Let transformers load in silence: stderr is for what the caller shows."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
