# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Training a masked checkpoint. Importing this module registers TeleFLMMasked with the Auto classes."""

import logging
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from modeling_teleflm import TeleFLMTokenizer
from modeling_teleflm.masked_teleflm import TeleFLMMaskedConfig, TeleFLMMaskedForCausalLM

logger = logging.getLogger(__name__)

# Here and not in modeling_teleflm: who loads a checkpoint to use it must not get one that is half grown.
AutoConfig.register(TeleFLMMaskedConfig.model_type, TeleFLMMaskedConfig, exist_ok=True)
AutoModelForCausalLM.register(TeleFLMMaskedConfig, TeleFLMMaskedForCausalLM, exist_ok=True)
AutoTokenizer.register(TeleFLMMaskedConfig, tokenizer_class=TeleFLMTokenizer, exist_ok=True)
TeleFLMMaskedConfig.register_for_auto_class()
TeleFLMMaskedForCausalLM.register_for_auto_class("AutoModelForCausalLM")


class MaskCallback(TrainerCallback, ExportableState):
    """Raises the masks of a TeleFLMMaskedForCausalLM by one step of their schedule before every optimizer step.

    The first step runs at alpha = 1 / total_steps, because at 0 no new weight has a gradient. A model that comes with
    some steps done, from an earlier run, goes on from there; so does a run that is resumed, whichever checkpoint its
    model was loaded from.
    """

    def __init__(self) -> None:
        self.first_step: int | None = None

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps: the step of the masks at which this run began."""
        return {"args": {}, "attributes": {"first_step": self.first_step}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Find out where the masks are; `global_step` counts the steps of this run alone."""
        masked = find_masked_model(model)
        callbacks: Any = state.stateful_callbacks  # by name, although declared a list
        recorded = callbacks.get(type(self).__name__) if state.global_step else None
        self.first_step = recorded["attributes"]["first_step"] if recorded else masked.mask_step - state.global_step
        masked.set_mask_step(self.first_step + state.global_step)  # where it stays if no step is left to do
        last, total = (
            self.first_step + max(state.max_steps, state.global_step),
            masked.config.growth_state["total_steps"],
        )
        logger.info("masks go from step %d to %d of %d", self.first_step + state.global_step, last, total)
        if last < total:
            logger.warning("training ends at mask step %d of %d: go on from its checkpoint, or fold it", last, total)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Raise the masks."""
        find_masked_model(model).set_mask_step((self.first_step or 0) + state.global_step + 1)


def find_masked_model(model: nn.Module | None) -> TeleFLMMaskedForCausalLM:
    """The masked model inside whatever wraps it (DDP, FSDP, torch.compile).

    Raises:
        TypeError: there is none.
    """
    for module in model.modules() if model is not None else ():
        # By name: loaded as code of its folder the class is another copy, and what FSDP2 makes of it derives from it.
        if any(base.__name__ == TeleFLMMaskedForCausalLM.__name__ for base in type(module).__mro__):
            return module  # type: ignore[return-value]
    raise TypeError(f"the model is a {type(model).__name__}; MaskCallback needs a TeleFLMMaskedForCausalLM.")


__all__ = ["MaskCallback", "TeleFLMMaskedConfig", "TeleFLMMaskedForCausalLM", "find_masked_model"]
