# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The model that is trained and its tokenizer, loaded; of a folder that cannot be, one line says which file is wrong.

What headers tell is checked before transformers sees the folder: it names no file of a damaged one, and makes up the
weights that are missing.
"""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from conversion.architecture import MODEL_TYPE, Architecture
from conversion.checkpoint.errors import CheckpointError, one_line
from conversion.checkpoint.sources import check_utf8, open_checkpoint
from conversion.family import is_llama
from conversion.hub.small_files import check_json_settings
from conversion.llama import check_complete, why_only_copied
from conversion.mapping import check_tensors

_VOCABULARIES = ("tokenizer.model", "tokenizer.json")


def check_model(folder: Path) -> None:
    """Check what the headers and the configuration of a model tell.

    Raises:
        CheckpointError: its path is not UTF-8, it has no configuration or weights, a file is damaged, or of a Tele-FLM
            or a Llama a weight is missing.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"model_name_or_path is {str(folder)!r}, which holds no config.json.")
    check_utf8(folder)
    check_json_settings(folder)
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config or {}
    if config.get("model_type") == MODEL_TYPE:
        architecture = Architecture.from_config(config, f"{folder}/config.json", with_biases=True)
        check_tensors(checkpoint.tensors, architecture, str(folder))
    elif is_llama(config) and why_only_copied(checkpoint) is None:
        check_complete(checkpoint)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model's folder. No code in it is executed.

    Raises:
        CheckpointError: there is none, it cannot be loaded, or it has no token that ends a document.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # sentencepiece, tokenizers and transformers have no family of errors between them
        if not any((folder / name).is_file() for name in _VOCABULARIES):
            names = " nor ".join(_VOCABULARIES)
            raise CheckpointError(f"{folder}: has no tokenizer, neither {names}; copy the model's there.") from error
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {one_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"{folder}: its tokenizer has no eos_token to end documents with; name it there.")
    return tokenizer


def load_model(folder: Path, **how: Any) -> PreTrainedModel:
    """Load a model that `check_model` found nothing wrong with. No code in its folder is executed.

    Args:
        folder: the model's.
        how: of `from_pretrained`.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **how)
    except Exception as error:  # as above, and what a configuration's values lead to
        raise CheckpointError(f"{folder}: the model cannot be loaded: {one_line(error)}") from error
    return model


__all__ = ["check_model", "load_model", "load_tokenizer"]
