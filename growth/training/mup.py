# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""muP for training on at another width: what was tuned at the base width holds at this one.

Under muP a weight is matrix-like if both its dimensions grow with the width, and vector-like if one does (Tensor
Programs V, arXiv 2203.03466). With Adam and r = width / base width, matrix-like weights learn at 1/r of the rate and
start at 1/sqrt(r) of the standard deviation; vector-like ones stay as they are, and the logits carry
output_mult / mup_scale_factor with a mup_scale_factor that grows by r.

Groups go by name and not by number of dimensions, which a sharded or flattened parameter does not keep.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from conversion.parameter_kinds import KINDS, group_names, parameter_kind

from .errors import RunError


def parameter_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float, width_ratio: float
) -> list[dict[str, Any]]:
    """The parameter groups of Adam under muP: vector-like, matrix-like, norms; for any optimizer with `lr` a group.

    Args:
        model: a Tele-FLM; parameters that are not trained are left out.
        learning_rate: as tuned at the base width; matrix-like weights take learning_rate / width_ratio.
        weight_decay: as tuned at the base width. AdamW multiplies it by the rate of the group, so matrix-like weights
            take width_ratio times it to decay as fast as there; norms do not decay.
        width_ratio: hidden_size / base width.

    Raises:
        ValueError: a parameter is no weight of a Tele-FLM.
    """
    settings = {
        "vector": (learning_rate, weight_decay),
        "matrix": (learning_rate / width_ratio, weight_decay * width_ratio),
        "norm": (learning_rate, 0.0),
    }
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return [
        {"params": [trained[name] for name in names], "lr": settings[kind][0], "weight_decay": settings[kind][1]}
        for kind, names in group_names(trained).items()
    ]


class MupMixin:
    """Gives a Trainer, or a trainer derived from it, the parameter groups of muP.

    ```python
    class MupSFTTrainer(MupMixin, SFTTrainer): ...


    trainer = MupSFTTrainer(model, args, base_width=8192, ...)
    ```

    Schedules multiply the rate of each group, so the ratio of the rates survives every schedule and every resume.

    Args:
        base_width: hidden_size at which `args.learning_rate` was tuned; None: no muP, the trainer's own groups.
        *args, **kwargs: of the trainer.
    """

    args: Any
    model: Any
    optimizer: Any

    def __init__(self, *args: Any, base_width: int | None = None, **kwargs: Any) -> None:
        self.base_width = base_width
        self._has_made_it = False
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that `args.optim` names, with the groups of muP.

        Raises:
            RunError: `args.optim` makes groups of its own, or the optimizer was made by something else.
            ValueError: a parameter is no weight of a Tele-FLM.
        """
        if self.base_width is None:
            return super().create_optimizer(model)  # type: ignore[misc]
        if self.optimizer is not None:
            if not self._has_made_it:
                raise RunError(
                    f"the optimizer, a {type(self.optimizer).__name__}, was not made with the groups of muP: delete "
                    "optimizer from DeepSpeed's configuration, or train with one learning rate."
                )
            return super().create_optimizer(model)  # type: ignore[misc]
        model = self.model if model is None else model
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(self.args, model)
        if settings.keys() & {"params", "model", "optimizer_dict"} or not isinstance(optimizer_class, type):
            raise RunError(f"optim {self.args.optim} makes parameter groups of its own; muP needs e.g. adamw_torch.")
        groups = parameter_groups(
            model,
            learning_rate=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
            width_ratio=self.model.config.hidden_size / self.base_width,
        )
        self.optimizer = optimizer_class(groups, **settings)
        self._has_made_it = True
        return self.optimizer


@torch.no_grad()
def init_weights(
    model: nn.Module, *, width_ratio: float, vector_std: float = 4e-3, matrix_std: float = 1.697e-2
) -> None:
    """Initialise a Tele-FLM that starts from nothing, as a proxy for tuning does: normal draws, norms 1.

    Args:
        model: the model.
        width_ratio: hidden_size / base width.
        vector_std: standard deviation of embed_tokens and lm_head, at every width.
        matrix_std: of the matrices at the base width, matrix_std / sqrt(width_ratio) here. The defaults are those of
            Tele-FLM's proxy of width 512 (arXiv 2404.16645, table 4: 4.242e-3 at width 8192).

    Raises:
        ValueError: a parameter is no weight of a Tele-FLM.
    """
    stds = {"vector": vector_std, "matrix": matrix_std / math.sqrt(width_ratio)}
    for name, parameter in model.named_parameters():
        kind = parameter_kind(name)
        if kind == "norm":
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=stds[kind])


__all__ = ["KINDS", "MupMixin", "group_names", "init_weights", "parameter_groups", "parameter_kind"]
