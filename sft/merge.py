# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Merging a LoRA or DoRA adapter into its base one weight at a time, and proof that nothing else changed.

PEFT computes each merged weight, in float32. The proof is a forward pass with the adapter beside its base and another
with the merged weights. In both a module is given its parameters when it is called and loses them when it returns, so
that a model merges on a machine that could not load it: a few times its largest weight is in memory.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import modeling_teleflm  # noqa: F401  (registers the architecture with the Auto classes)
from conversion.checkpoint.plan import View
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.sources import Source, check_utf8

Keep = Callable[[str, torch.Tensor], None]

_PREFIX = "base_model.model."
_ADAPTER = "default"
_PROBE_TOKENS = 64


def merge_weights(adapter: Path, tensors: Mapping[str, View], base: Source, keep: Keep) -> float:
    """Merge an adapter into the weights of its base.

    Args:
        adapter: its folder.
        tensors: its tensors.
        base: a Tele-FLM that they fit.
        keep: called with the name and the float32 value of every weight of the base that the adapter changes.

    Returns:
        the root mean square of what merging changed in the logits of 64 tokens, over their standard deviation.
    """
    model = _skeleton(adapter, base)
    # A prime stride, to reach all of the vocabulary.
    input_ids = (torch.arange(_PROBE_TOKENS) * 7919 % model.config.vocab_size)[None]
    values = {**base.tensors, **tensors}
    with torch.no_grad():
        with _parameters_on_call(model, values):
            expected = model(input_ids=input_ids, use_cache=False).logits
        with _parameters_on_call(model, values, partial(_merge, keep=keep)):
            logits = model(input_ids=input_ids, use_cache=False).logits
    return ((logits - expected).square().mean().sqrt() / expected.std()).item()


def _skeleton(adapter: Path, base: Source) -> PeftModel:
    """The model with the adapter in it, all parameters on the meta device; float32."""
    check_utf8(base.folder)
    check_utf8(adapter)
    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    settings = LoraConfig.from_pretrained(str(adapter))
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return get_peft_model(model, settings, adapter_name=_ADAPTER).eval()


@contextmanager
def _parameters_on_call(
    model: PeftModel, values: Mapping[str, View], then: Callable[[str, nn.Module], None] = lambda path, module: None
) -> Iterator[None]:
    """Within, a module has its parameters from the call of its forward to the end of it.

    Args:
        model: from [`_skeleton`].
        values: tensors of base and adapter, by the names of their files.
        then: called with the path of a module and the module when its parameters are there.
    """
    with FileReader() as reader:

        def fill(module: nn.Module, args: Any, *, path: str) -> None:
            for name, _ in module.named_parameters():
                if tensor := values.get(_stored_name(f"{path}.{name}", values)):
                    value = torch.from_numpy(reader.read(tensor).astype("float32"))
                    set_module_tensor_to_device(module, name, "cpu", value=value)
            then(path, module)

        def empty(module: nn.Module, args: Any, output: Any) -> None:
            for name, _ in list(module.named_parameters()):
                set_module_tensor_to_device(module, name, "meta")

        hooks = []
        for path, module in _owners(model):
            hooks += [
                module.register_forward_pre_hook(partial(fill, path=path)),
                module.register_forward_hook(empty),
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _merge(path: str, module: Any, keep: Keep) -> None:
    """Merge a module that the adapter changes, and keep its weight; others are left as they are."""
    weight: Any
    if isinstance(module, LoraLayer):
        module.merge(safe_merge=True)
        weight = module.get_base_layer().weight
    elif isinstance(module, ModulesToSaveWrapper):
        weight = module.modules_to_save[_ADAPTER].weight
    else:
        return
    keep(f"{path.removeprefix(_PREFIX)}.weight", weight)


def _owners(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that use parameters themselves: layers with an adapter, and leaves."""
    for name, module in model.named_children():
        where = f"{path}.{name}" if path else name
        if isinstance(module, LoraLayer | ModulesToSaveWrapper) or module._parameters:
            yield where, module
        else:
            yield from _owners(module, where)


def _stored_name(path: str, values: Mapping[str, View]) -> str:
    """The name in its file of the parameter at a path: `...q_proj.base_layer.weight` is the base's `...q_proj.weight`.

    A module that is trained as a whole has its adapter's values; its original is never used.
    """
    if ".original_module." in path:
        return ""
    if f".{_ADAPTER}" in path:
        stored = path.replace(".modules_to_save", "").replace(f".{_ADAPTER}", "")
        return stored if stored in values else stored.removesuffix(".weight")  # DoRA's vector is saved without it
    name = path.removeprefix(_PREFIX).replace(".base_layer.", ".")
    return "model.embed_tokens.weight" if name == "lm_head.weight" and name not in values else name


__all__ = ["merge_weights"]
