# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Log-likelihoods by a loaded model, on a GPU where there is one."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conversion.architecture import MODEL_TYPE
from conversion.checkpoint.errors import CheckpointError, one_line
from conversion.checkpoint.mirror import origin
from conversion.checkpoint.sources import check_utf8
from conversion.extras import install_line

from .passages import Passage
from .streamed_scores import require_finite

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_BATCH_TOKENS = 4096  # padding included
_ROWS = 256  # of logits in float64 at a time


def load_model(name: str, revision: str | None = None, *, dtype: str = "float32") -> "PreTrainedModel":
    """Load a model to compute with: on the GPUs that there are, or else in memory. No code of its folder is executed.

    Args:
        name: a Hub folder, or the name of a model on the Hub.
        revision: of the Hub, if it is there.
        dtype: of its weights, or `auto`: as they are.

    Raises:
        CheckpointError: torch is not installed, there is no such model, it cannot be loaded, or some of its weights are
            not there, which transformers would make up.
    """
    torch = require_torch()
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import modeling_teleflm  # noqa: F401  (registers the architecture with the Auto classes)

    check_utf8(name)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    placement: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # stderr is for what the caller shows
    logging.set_verbosity_error()  # and what is missing is refused below
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision or "main",
            dtype=kind,
            trust_remote_code=False,
            output_loading_info=True,
            **placement,
        )
    except Exception as error:  # transformers, safetensors and torch have no family of errors between them
        raise CheckpointError(f"{name}: cannot be loaded: {one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
    model: PreTrainedModel = loaded[0]
    _require_whole(name, model, loaded[1])
    return model.eval()


def _require_whole(name: str, model: "PreTrainedModel", loading: Mapping[str, Any]) -> None:
    """Refuse a model that is not the weights of its files, and these alone."""
    missing = sorted(loading["missing_keys"])
    others = sorted(loading["unexpected_keys"]) if model.config.model_type == MODEL_TYPE else []
    mismatched = sorted(str(entry[0]) for entry in loading["mismatched_keys"])
    for names, what in ((missing, "is missing"), (mismatched, "has another shape"), (others, "has no place in it")):
        if names:
            more = f" (and so for {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(f"{name}: of the model that config.json describes, {names[0]} {what}{more}.")


def check_model_type(config: Mapping[str, Any], folder: str | Path) -> None:
    """Refuse what transformers loads with code of its folder alone.

    Raises:
        CheckpointError: the model grows by masks.
    """
    kind = config.get("model_type")
    if kind == f"{MODEL_TYPE}Masked":
        raise CheckpointError(f"{folder}: grows by masks (model_type is {kind}); `teleflm fold` it first.")


def name_and_revision(model: str, folder: str) -> tuple[str, str | None]:
    """By which transformers loads the very commit of a model of the Hub that was opened; a folder by its path.

    Args:
        model: as the user named it.
        folder: that stands for it here.
    """
    place = origin(folder) or {}
    return (place["hub"], place["commit"]) if "hub" in place else (model, None)


def require_torch() -> Any:
    """The module torch.

    Raises:
        CheckpointError: it, or transformers, is not installed.
    """
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"a loaded model needs torch and transformers ({one_line(error)}); {install_line('model')}."
        ) from None
    return torch


def score_loaded(
    model: "PreTrainedModel",
    passages: Sequence[Passage],
    *,
    batch_tokens: int = _BATCH_TOKENS,
    advance: Callable[[int, int], None] = lambda tokens, total: None,
) -> list[np.ndarray]:
    """Log-likelihoods of the predicted tokens of passages, by a loaded model.

    Passages of about one length are computed together, padded at their ends, which no token before them sees.

    Args:
        model: a causal language model.
        passages: with ids of its vocabulary.
        batch_tokens: computed at a time, padding included; one passage at least.
        advance: called with the tokens just computed and those in all.

    Returns:
        Natural logarithms, float64 [scored] for each passage.

    Raises:
        CheckpointError: one is not finite.
    """
    import torch

    result: list[np.ndarray] = [np.empty(0)] * len(passages)
    order = sorted(range(len(passages)), key=lambda index: len(passages[index].inputs))
    total = sum(len(passage.inputs) for passage in passages)
    while order:
        longest = len(passages[order[-1]].inputs)
        batch = [order.pop() for _ in range(min(len(order), max(1, batch_tokens // longest)))]
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, index in enumerate(batch):
            ids[row, : len(passages[index].inputs)] = torch.from_numpy(passages[index].inputs)
        with torch.inference_mode():
            logits = model(ids.to(model.device), use_cache=False).logits
            for row, index in enumerate(batch):
                passage = passages[index]
                length = len(passage.inputs)
                rows = logits[row, length - passage.scored : length]
                result[index] = require_finite(_picked(rows, torch.from_numpy(passage.targets).to(rows.device)))
        advance(sum(len(passages[index].inputs) for index in batch), total)
    return result


def _picked(logits: "torch.Tensor", targets: "torch.Tensor") -> np.ndarray:
    """Log-likelihoods [n] of targets [n] by logits [n, vocabulary]."""
    import torch

    parts = [
        rows.double().log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        for rows, chosen in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
    ]
    return torch.cat(parts).cpu().numpy()


__all__ = ["check_model_type", "load_model", "name_and_revision", "require_torch", "score_loaded"]
