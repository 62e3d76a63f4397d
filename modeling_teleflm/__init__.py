# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Tele-FLM for transformers. Importing this package registers TeleFLM with the Auto classes."""

from typing import Any

try:
    import torch  # noqa: F401  # without which transformers gives classes that fail later
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )
except ModuleNotFoundError as _error:
    if _error.name not in ("torch", "transformers"):
        raise
    raise ModuleNotFoundError(
        f'modeling_teleflm needs {_error.name}, which is not installed; pip install "teleflm[model]".', name=_error.name
    ) from None

from .configuration_teleflm import TeleFLMConfig
from .modeling_teleflm import (
    TeleFLMForCausalLM,
    TeleFLMForQuestionAnswering,
    TeleFLMForSequenceClassification,
    TeleFLMForTokenClassification,
    TeleFLMModel,
    TeleFLMPreTrainedModel,
)
from .tokenization_teleflm import TeleFLMTokenizer

_MODEL_CLASSES: dict[Any, type[TeleFLMPreTrainedModel]] = {
    AutoModel: TeleFLMModel,
    AutoModelForCausalLM: TeleFLMForCausalLM,
    AutoModelForQuestionAnswering: TeleFLMForQuestionAnswering,
    AutoModelForSequenceClassification: TeleFLMForSequenceClassification,
    AutoModelForTokenClassification: TeleFLMForTokenClassification,
}

# exist_ok: a notebook that reloads the package must not fail.
AutoConfig.register(TeleFLMConfig.model_type, TeleFLMConfig, exist_ok=True)
AutoTokenizer.register(TeleFLMConfig, tokenizer_class=TeleFLMTokenizer, exist_ok=True)
for _auto_class, _model_class in _MODEL_CLASSES.items():
    _auto_class.register(TeleFLMConfig, _model_class, exist_ok=True)

# save_pretrained then writes the auto_map and copies these files: the folder loads without this package.
TeleFLMConfig.register_for_auto_class()
TeleFLMTokenizer.register_for_auto_class("AutoTokenizer")
for _auto_class, _model_class in _MODEL_CLASSES.items():
    _model_class.register_for_auto_class(_auto_class.__name__)

__all__ = [
    "TeleFLMConfig",
    "TeleFLMForCausalLM",
    "TeleFLMForQuestionAnswering",
    "TeleFLMForSequenceClassification",
    "TeleFLMForTokenClassification",
    "TeleFLMModel",
    "TeleFLMPreTrainedModel",
    "TeleFLMTokenizer",
]
