# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""That a resumed run is the run that its checkpoint is of.

A Trainer resumes any checkpoint with any settings: with other data it skips as many batches of these as the checkpoint
has seen of the others, and the record would credit all steps to the new ones. So every checkpoint holds `run.json`, all
that decides what the steps compute, and a run that is resumed is compared with it, before its first step. (Beside that
it has what was saved with it, see `conversion.saved_files`.) Three kinds:

- what may change, as no step computes anything else for it ([`MAY_CHANGE`]): how often is saved, logged and evaluated,
  how long the run is (the schedule is then laid out for the new length, which is said), how it is spread and how its
  memory is saved, as long as a step has as many examples;
- where things lie: files, folders and models are told by digests of what they hold;
- all else, which has to be the same.

A key that only one of the two versions of transformers knows is not compared.

A checkpoint's weights are loaded into the model of `model_name_or_path`, so that has to compute what the checkpoint's
does: its configuration is compared with the one that was saved.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, Trainer, TrainingArguments

from conversion.checkpoint.atomic_file import write_atomically
from conversion.checkpoint.errors import one_line
from conversion.checkpoint.manifest import is_edited, seal
from conversion.saved_files import RUN

from .errors import RunError
from .grown_adam import on_every_process
from .parallel import data_parallel_size

logger = logging.getLogger(__name__)

# Regular expressions of keys; each matches a whole name.
LENGTH = "max_steps|num_train_epochs"
MAY_CHANGE = "|".join(
    (
        LENGTH,
        "output_dir|resume_from_checkpoint|overwrite_output_dir|restore_callback_states_from_checkpoint",
        "(logging|log|save|eval|sample|hub|trackio|ddp|dataloader_(num|pin|persistent|prefetch|multiprocessing))_.*",
        "report_to|run_name|project|disable_tqdm|debug|skip_memory_metrics|include_.*|enable_jit_checkpoint|push_to_hub",
        "load_best_model_at_end|metric_for_best_model|greater_is_better|(bf16|fp16)_full_eval|per_device_eval_batch_size",
        "prediction_loss_only|batch_eval_metrics",
        # how it is spread; the examples of a step are compared in their place
        "per_device_train_batch_size|gradient_accumulation_steps|num_processes|distributed_type|fsdp|fsdp_config|deepspeed",
        "parallelism_config|local_rank|use_cpu|auto_find_batch_size",
        # how memory and time are saved
        "(activation|gradient)_checkpointing(_kwargs)?|activation_offloading|torch_empty_cache_steps|torch_compile.*",
        "attn_implementation|use_kernels|dataset_num_proc|use_cache|allow_rejects",
        "ignore_memory_plan",
        # where things lie
        "model_name_or_path|model_revision|dataset_cache_dir|data_files|eval_data_files|train_files|eval_files|chat_template_path",
        "fresh_optimizer",  # a checkpoint has its own
    )
)


# Of a config.json, what no step depends on: names, what is chosen anew when a model is loaded, and token ids, which a
# Trainer sets to the tokenizer's.
_NOT_OF_THE_MODEL = (
    "_name_or_path|transformers_version|architectures|auto_map|(torch_)?dtype|use_cache|_?attn_implementation.*"
    "|.*_token_ids?|quantization_config"
)


def describe_run(args: TrainingArguments, others: Mapping[str, Any], made_from: Mapping[str, Any]) -> dict[str, Any]:
    """What decides what the steps of a run compute, as JSON.

    Args:
        args: of the Trainer. Tokens of the Hub are not in what comes out.
        others: keys of the run that are ours.
        made_from: digests of what it is made from, such as `data` and `base`.
    """
    keys = {**json.loads(args.to_json_string()), **json.loads(json.dumps(dict(others), default=str))}
    secret = re.compile(r"<\w+_TOKEN>")
    return {
        "made_from": json.loads(json.dumps(dict(made_from))),
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * data_parallel_size(args),
        "order": _order(args),
        "keys": {
            key: value
            for key, value in sorted(keys.items())
            if not (isinstance(value, str) and secret.fullmatch(value)) and not _is_free(key, without=LENGTH)
        },
    }


def _order(args: TrainingArguments) -> dict[str, Any] | None:
    """What else decides the order of the examples: where they are grouped by length, how a step is spread.

    Each process groups what it computes between two updates, so that another spreading is another order. None where
    examples are drawn without looking at them.
    """
    if getattr(args, "train_sampling_strategy", "random") in ("random", "sequential"):
        return None
    return {
        "per_device_train_batch_size": args.train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "num_processes": args.world_size,
    }


def _is_free(key: str, without: str = "(?!)") -> bool:
    return re.fullmatch(MAY_CHANGE, key) is not None and re.fullmatch(without, key) is None


def check_same_run(checkpoint: str | Path, run: Mapping[str, Any]) -> bool | None:
    """Compare a run with the one that a checkpoint is of. Says, as a warning, what may change and did.

    Args:
        checkpoint: folder that is resumed.
        run: from [`describe_run`].

    Returns:
        whether they are the same but for what may change; None if the checkpoint does not say what it is of.

    Raises:
        RunError: they differ, with all keys and both values; or the file cannot be read.
    """
    if not (Path(checkpoint) / RUN).is_file():
        logger.warning("%s has no %s: nothing tells whether this is the run that it is of", checkpoint, RUN)
        return None
    was, now = _flat(read_run(Path(checkpoint))), _flat(run)
    differing = {key: (was[key], now[key]) for key in now if key in was and was[key] != now[key]}
    free = {key: differing.pop(key) for key in list(differing) if _is_free(key)}
    if differing:
        what = "; ".join(f"{key} was {_short(old)}, is {_short(new)}" for key, (old, new) in differing.items())
        raise RunError(
            f"{checkpoint} is of another run: {what}. Resume it as it was, or begin a new run: delete "
            "resume_from_checkpoint and give another output_dir."
        )
    for key, (old, new) in free.items():
        logger.warning(
            "%s: %s was %s, is %s: from the next step on the learning rates are those of the new length",
            checkpoint,
            key,
            old,
            new,
        )
    return True


def check_same_model(checkpoint: str | Path, config: PreTrainedConfig) -> None:
    """Compare the configuration of a model with the one that a checkpoint was saved with.

    Args:
        checkpoint: folder that is resumed; of an adapter it has none.
        config: of the model into which its weights are loaded.

    Raises:
        RunError: they differ, with all fields and both values; or the file cannot be read.
    """
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        return
    try:
        saved = type(config).from_pretrained(checkpoint)
    except Exception as error:  # of transformers, or of what reads or checks the file
        raise RunError(f"{path} cannot be read ({one_line(error)}), so what model it is of is not known.") from error
    was, now = (_deciding(one.to_dict()) for one in (saved, config))
    differing = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    if differing:
        what = "; ".join(f"{name} is {_short(now.get(name))}, was {_short(was.get(name))}" for name in differing)
        raise RunError(
            f"{checkpoint} is of another model than model_name_or_path: {what}. Name the model with which the run "
            "began, or the checkpoint itself."
        )


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration decides what the model computes; how far masks have risen the checkpoint says itself."""
    kept = {name: value for name, value in config.items() if not re.fullmatch(_NOT_OF_THE_MODEL, name)}
    masks = kept.pop("growth_state", None) or {}
    kept |= {f"growth_state.{name}": value for name, value in masks.items() if name != "step"}
    return json.loads(json.dumps(kept, default=str))


def read_run(checkpoint: Path) -> dict[str, Any]:
    """What `run.json` in a checkpoint says; see [`describe_run`].

    Raises:
        RunError: it cannot be read, or was changed since it was written.
    """
    path = checkpoint / RUN
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if "checksum" not in found or is_edited(found):
            raise ValueError("its checksum is not that of the rest")
        _flat(found)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({error!r}), and nothing else tells what run it is of.") from None
    return dict(found)


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    return {"batch_size": run["batch_size"], **_ordered(run), **run["made_from"], **run["keys"]}


def _ordered(run: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run whose examples are grouped by length, how they are; older checkpoints do not say."""
    order = run.get("order")
    return {"examples grouped by length over": order} if order else {}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:197] + "..."


def write_run(checkpoint: Path, run: Mapping[str, Any]) -> None:
    """Write `run.json` into the folder of a checkpoint.

    Args:
        checkpoint: its folder.
        run: from [`describe_run`], and what was saved beside it, see `conversion.saved_files`.

    Raises:
        OSError: it cannot be written.
    """
    write_atomically(checkpoint / RUN, json.dumps(seal(run), indent=1, ensure_ascii=False).encode())


def hold_to_run(trainer: Trainer, describe: Callable[[], Mapping[str, Any]], checkpoint: str | None) -> bool | None:
    """Compare a run with the checkpoint that it resumes, and have it say in its own what it is.

    Every process of a run has to call it; process 0 alone looks.

    Args:
        trainer: of the run, with a [`growth.training.saving.CheckpointMixin`], which writes it.
        describe: calls [`describe_run`].
        checkpoint: that is resumed, if one is.

    Returns:
        on process 0: see [`check_same_run`], and whether it goes on where that ended in its data; None also where
        nothing is resumed.

    Raises:
        RunError: they differ. On the other processes a CheckpointError says so.
    """

    def look() -> bool | None:
        if not trainer.is_world_process_zero():
            return None
        model: Any = trainer.model
        if checkpoint:
            check_same_model(checkpoint, model.config)
        run = describe()
        trainer.run_description = run  # type: ignore[attr-defined]
        same = check_same_run(checkpoint, run) if checkpoint else None
        if same and trainer.args.ignore_data_skip:
            logger.warning("%s: ignore_data_skip is true, so the data begin anew: it is not the same run", checkpoint)
            return False
        return same

    return on_every_process(look)


__all__ = [
    "MAY_CHANGE",
    "RUN",
    "check_same_model",
    "check_same_run",
    "describe_run",
    "hold_to_run",
    "read_run",
    "write_run",
]
