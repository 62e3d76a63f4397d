# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Saving a model that FSDP or ZeRO-3 has sharded, without gathering it in one process.

With `fsdp_state_dict_type: FULL_STATE_DICT` process 0 gathers all weights and, for every checkpoint, the optimizer: 634
GB for the 52B. With SHARDED_STATE_DICT each process writes its part, but a Trainer then saves no model at its end, and
its checkpoints have no configuration. With `zero3_save_16bit_model: true` process 0 gathers all weights, without it a
Trainer saves DeepSpeed's parts in place of a model, twice in each checkpoint. Here a checkpoint has, once, all that
`teleflm convert` needs, and at the end process 0 has the engine make the Hub's files of the parts: streamed, in bounded
memory. All processes write to one disk.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_model
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import StateDictType

from conversion.checkpoint.errors import CheckpointError, one_line
from conversion.checkpoint.sources import WEIGHT_FILES
from conversion.convert import convert_checkpoint
from conversion.hub.saved_model import ADAPTER_WEIGHTS

from .grown_adam import on_every_process
from .schedule import ScheduleMixin

_CHECKPOINTED = "_checkpoint_wrapped_module."  # torch's name
_PARTS = "pytorch_model_fsdp_0"  # accelerate's name
_ZERO3_PARTS = "zero3_parts"
_DEEPSPEEDS_OWN = ("latest", "zero_to_fp32.py", "zero_to_torch.py")  # beside the parts


class ShardedSaveMixin(ScheduleMixin):
    """Gives a Trainer, or a trainer derived from it, models that are saved whole under SHARDED_STATE_DICT.

    Adapters, which are small, are gathered. And schedules that every way of sharding can have.
    """

    accelerator: Any
    args: Any
    model: Any
    model_wrapped: Any

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer.save_model; every process of a sharded run has to call it.

        Raises:
            CheckpointError: the model's files cannot be made of the parts, which stay where they are.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        if _is_zero3_in_parts(self.accelerator) and not isinstance(self.model, PeftModel):
            self._save_zero3(folder, _internal_call)
            return
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        if not _saves_parts(self.accelerator):
            return
        if isinstance(self.model, PeftModel):
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
            self._save(str(folder), get_model_state_dict(self.model, options=whole))
            return
        if self.args.should_save:
            self._save_without_weights(folder)
        if _internal_call:  # a checkpoint, whose parts the Trainer saves with the optimizer's
            return
        self.accelerator.wait_for_everyone()
        save_fsdp_model(self.accelerator.state.fsdp_plugin, self.accelerator, self.model, str(folder))
        self.accelerator.wait_for_everyone()
        on_every_process(lambda: _join(folder, folder / _PARTS) if self.args.should_save else None)

    def _save_zero3(self, folder: Path, is_checkpoint: bool) -> None:
        if self.args.should_save:
            self._save_without_weights(folder)
        if is_checkpoint:  # whose parts the Trainer has DeepSpeed save with the optimizer's
            return
        self.accelerator.wait_for_everyone()
        self.model_wrapped.save_checkpoint(str(folder), tag=_ZERO3_PARTS)
        self.accelerator.wait_for_everyone()
        on_every_process(lambda: _join(folder, folder / _ZERO3_PARTS) if self.args.should_save else None)
        for name in _DEEPSPEEDS_OWN if self.args.should_save else ():
            (folder / name).unlink(missing_ok=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As Trainer._save; an adapter of fewer tensors than are trained is refused."""
        if not (isinstance(self.model, PeftModel) and _is_fsdp(self.accelerator) and state_dict is not None):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        elif self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            self._save_without_weights(folder)
            save_file(find_adapter(self.model, state_dict), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    def _save_without_weights(self, folder: Path) -> None:
        """Everything of a model but its weights: configuration, code, tokenizer, template, arguments."""
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
            super()._save(place, {})  # type: ignore[misc]
            for path in Path(place).iterdir():
                if path.name not in (*WEIGHT_FILES, ADAPTER_WEIGHTS):
                    path.replace(folder / path.name)


def find_adapter(model: PeftModel, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, by the names that its file has.

    PEFT looks for them by the names of the modules. FSDP's checkpointing of activations adds to these (which is why
    [`growth.training.launch.settle_checkpointing`] leaves it out), and PEFT then finds none, and says nothing.

    Args:
        model: whose active adapter it is.
        state_dict: whole tensors that are trained, by the names of the parameters without that addition.

    Raises:
        CheckpointError: there are fewer of them than are trained.
    """
    trained = {_plain(name): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    by_module = {trained.get(name, name): tensor for name, tensor in state_dict.items()}
    found = get_peft_model_state_dict(model, by_module, adapter_name=model.active_adapter)
    if len(found) < len(trained):
        raise CheckpointError(f"of {len(trained)} trained tensors of the adapter {len(found)} can be saved.")
    return {_plain(name): tensor.contiguous() for name, tensor in found.items()}


def _plain(name: str) -> str:
    return name.replace(_CHECKPOINTED, "")


def _is_fsdp(accelerator: Any) -> bool:
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def _saves_parts(accelerator: Any) -> bool:
    wanted = StateDictType.SHARDED_STATE_DICT
    return _is_fsdp(accelerator) and accelerator.state.fsdp_plugin.state_dict_type == wanted


def _is_zero3_in_parts(accelerator: Any) -> bool:
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None or plugin.zero_stage != 3:
        return False
    settings = plugin.deepspeed_config.get("zero_optimization", {})
    return not settings.get("stage3_gather_16bit_weights_on_model_save", False)


def _join(folder: Path, parts: Path) -> None:
    """Make the model's files of its parts, and remove these."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
        whole = Path(place) / "whole"
        try:
            convert_checkpoint(parts, whole, config=folder / "config.json")
        except (CheckpointError, OSError) as error:
            raise CheckpointError(
                f"{parts} holds the trained weights in parts, of which no model could be made: "
                f"{one_line(error)} When that is mended, `teleflm sft export {folder} OUT` makes it."
            ) from error
        for name in WEIGHT_FILES:
            (folder / name).unlink(missing_ok=True)
        for path in sorted(whole.glob("model*.safetensors*")):
            path.replace(folder / path.name)
    shutil.rmtree(parts)


__all__ = ["ShardedSaveMixin", "find_adapter"]
