# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Continued pretraining of a grown Tele-FLM on packed text.

    accelerate launch --no_python teleflm train RUN.yaml
    teleflm train --model_name_or_path GROWN --train_files TEXT.jsonl --output_dir OUT [--key value ...]

transformers' [`Trainer`] does the training, and every key of its `TrainingArguments` is a key here. What growth adds:
masks rise with the steps, Adam goes on from moments that grew with the weights, and learning rates follow the width.
"""

import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import datasets
import torch
import yaml
from transformers import (
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from conversion.checkpoint.errors import CheckpointError, one_line

from ..moments import read_grown_state
from .chunked_loss import chunk_loss
from .errors import RunError
from .grown_adam import AdamStart, GrownAdamCallback, LastRate, find_grown_state, on_every_process
from .kernels import check_kernels, check_kernels_are_used
from .launch import DistributedName, WrappingGuard, check_launch, check_spread, leave_processes, settle_checkpointing
from .loading import check_model, load_model, load_tokenizer
from .masks import MaskCallback, TeleFLMMaskedForCausalLM
from .mup import MupMixin
from .optimizer_layout import parameter_shapes
from .output_lock import hold_output
from .parallel import check_parallelism, read_parallelism
from .record import count_tokens, digest_examples, start_record
from .resume import checkpoints, step_of
from .resume import find_checkpoint as find_resumed
from .rewarm import RewarmCallback, check_optimizer_choice, find_new_parts
from .same_run import describe_run, hold_to_run
from .saving import CheckpointMixin
from .stage_schedule import ContinuedSchedule, continue_schedule, say_where_it_decays
from .text import load_documents

logger = logging.getLogger(__name__)

_DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")


@dataclasses.dataclass
class GrowthArguments:
    """What is trained, and on what.

    Args:
        model_name_or_path: folder of the model, plain or masked, with its tokenizer. No code in it is executed.
        train_files: text: `.txt` (a document a file), `.jsonl`, `.json`, `.jsonl.gz` or `.parquet`.
        eval_files: likewise, evaluated on when `eval_strategy` says so.
        text_column: where the text of a row is, in files with rows.
        block_size: tokens of a training example; documents are joined and cut to it.
        dtype: of the weights while they are trained, `auto` for that of the files; `bf16: true` computes in bfloat16 on
            float32 weights.
        attn_implementation: as in `from_pretrained`.
        use_kernels: likewise: layers take fused kernels of the Hub, on accelerators, with the package kernels.
        mup_base_width: hidden_size at which learning_rate was tuned, 8192 for one of the 52B: matrices then learn at
            learning_rate x mup_base_width / hidden_size. Unset: one rate for all.
        fresh_optimizer: leave the grown optimizer.pt of the model's folder unused, if it has one.
        continue_schedule: begin at this share of the learning rate at which the run stopped, in its stable phase, that
            the model grew from: 1 goes on at that rate. It sets learning_rate; needs the record of that run.
        rewarm_new_steps: steps over which the updates of what the growth added rise from 1/N of what the optimizer
            makes them to all of it, while what was there goes on; needs the record of the growth, torch's AdamW.
        num_processes: how many processes this run is meant for; another number is an error. Launchers have been seen
            to start one in place of many without a word.
        distributed_type: what the run is meant to be spread by, in accelerate's words: `NO`, `MULTI_CPU`, `MULTI_GPU`
            (both replicate the model), `FSDP`, `DEEPSPEED`; anything else is an error.

    Attributes:
        gives_rate: whether learning_rate was among the keys of the run; None where nobody looked: then it counts as
            given unless it has transformers' default.
    """

    model_name_or_path: str
    train_files: list[str]
    eval_files: list[str] | None = None
    text_column: str = "text"
    block_size: int = 2048
    dtype: str = "float32"
    attn_implementation: str | None = None
    use_kernels: bool = False
    mup_base_width: int | None = None
    fresh_optimizer: bool = False
    continue_schedule: float | None = None
    rewarm_new_steps: int | None = None
    num_processes: int | None = None
    distributed_type: DistributedName | None = None
    gives_rate: bool | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if type(self.continue_schedule) is int:
            self.continue_schedule = float(self.continue_schedule)
        self._check_types()
        for name, least in (("block_size", 2), ("mup_base_width", 1), ("num_processes", 1), ("rewarm_new_steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}.")
        if self.continue_schedule is not None and not 0 < self.continue_schedule < math.inf:
            raise ValueError(f"continue_schedule is {self.continue_schedule}, expected a number above 0.")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(_DTYPES)}.")
        attentions = ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys())
        named = self.attn_implementation
        if named is not None and named not in attentions and "/" not in named:  # one of the Hub's has an owner
            raise ValueError(f"attn_implementation is {named!r}, expected one of {', '.join(attentions)}.")
        known = get_args(DistributedName)
        if self.distributed_type not in (None, *known):
            raise ValueError(f"distributed_type is {self.distributed_type!r}, expected one of {', '.join(known)}.")

    def _check_types(self) -> None:
        """What a file of keys may hold in place of what is expected; one file may stand for a list of one."""
        self.train_files = [self.train_files] if isinstance(self.train_files, str) else self.train_files
        self.eval_files = [self.eval_files] if isinstance(self.eval_files, str) else self.eval_files
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            wanted = [str if get_origin(kind) is Literal else get_origin(kind) or kind for kind in _parts(hint)]
            fits = type(value) in wanted and (type(value) is not list or all(type(item) is str for item in value))
            if not fits:
                expected = " or ".join("nothing" if kind is NoneType else kind.__name__ for kind in wanted)
                raise ValueError(f"{field.name} is {value!r}, expected {expected.replace('list', 'a list of files')}.")


def _parts(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


# The keys that hold a number and nothing else; of its own transformers checks none.
_NUMBERS = {
    name: _parts(hint)
    for name, hint in {**get_type_hints(TrainingArguments), "continue_schedule": float | None}.items()
    if {*_parts(hint)} <= {int, float, NoneType} and {*_parts(hint)} != {NoneType}
}


class GrowthTrainer(CheckpointMixin, MupMixin, Trainer):
    """A Trainer that starts from a grown state of Adam, and follows muP if it has a `base_width`.

    Args:
        adam_state: optimizer.pt of the grown model; None: fresh moments. A resumed run goes on with its own state.
        continued: the learning rate that was taken over, for the record.
        *args, **kwargs: of [`MupMixin`] and [`Trainer`].
    """

    def __init__(
        self,
        *args: Any,
        adam_state: Path | None = None,
        continued: ContinuedSchedule | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.continued = continued
        self.add_callback(AdamStart())
        self.add_callback(LastRate())
        self.add_callback(GrownAdamCallback(self, adam_state))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As Trainer.create_scheduler; of a decay it is said where it begins.

        Raises:
            RunError: see [`ScheduleMixin`].
        """
        is_new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if is_new:
            say_where_it_decays(self.args, num_training_steps)
        return scheduler


def train(
    growth: GrowthArguments, args: TrainingArguments, callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, float]:
    """Train a grown model and save it, with its tokenizer, to `args.output_dir`; a record says what was done.

    A masked model stays one until `teleflm fold` is run on it.

    Returns:
        the metrics of the run, as transformers' `TrainOutput.metrics`; of a run that had no step left to do without a
        loss.

    Raises:
        CheckpointError: the data, the model or its state is refused; no step was done.
        RunError: the run is not what it was asked to be; no step was done.
    """
    with hold_output(str(args.output_dir), writes=args.process_index == 0):
        checkpoint = find_checkpoint(args)
        trainer = build_trainer(growth, args, callbacks)
        hold_to_run(
            trainer,
            lambda: describe_run(args, _keys(growth), digest_examples(trainer.train_dataset)),
            checkpoint,
        )
        record = start_record(trainer, Path(growth.model_name_or_path), checkpoint)
        output = trainer.train(resume_from_checkpoint=checkpoint)
        record.save_model()
    if checkpoint and trainer.state.global_step == step_of(checkpoint):
        output.metrics.pop("train_loss", None)
    return output.metrics


def _keys(growth: GrowthArguments) -> dict[str, Any]:
    """The keys of a run that are ours, with their values."""
    return {field.name: getattr(growth, field.name) for field in dataclasses.fields(growth) if field.init}


def build_trainer(
    growth: GrowthArguments, args: TrainingArguments, callbacks: Sequence[TrainerCallback] = ()
) -> GrowthTrainer:
    """Build the trainer of a run, ready for `trainer.train()`.

    Raises:
        CheckpointError: the data, the model or its state is refused.
        RunError: the run is not what it was asked to be.
    """
    launched = check_launch(
        args,
        os.environ,
        num_processes=growth.num_processes,
        distributed_type=growth.distributed_type,
    )
    check_parallelism(read_parallelism(os.environ), args, launched, adapters=False, trainer="pretraining")
    check_kernels(args, growth.use_kernels)
    settle_checkpointing(args, os.environ)
    count_tokens(args)
    set_seed(args.seed)
    folder, resumed = Path(growth.model_name_or_path), _resumed(args)
    check_model(folder)
    continued = None
    if growth.continue_schedule is not None:
        continued = continue_schedule(
            args,
            folder,
            growth.continue_schedule,
            base_width=growth.mup_base_width,
            checkpoint=resumed,
            gives_rate=growth.gives_rate,
        )
    if growth.rewarm_new_steps is not None:
        check_optimizer_choice(args)
    tokenizer = load_tokenizer(folder)
    with args.main_process_first(desc="packing"):
        train_dataset = load_blocks(growth.train_files, tokenizer, growth)
        eval_dataset = load_blocks(growth.eval_files, tokenizer, growth) if growth.eval_files else None
    model = load_model(
        folder, dtype=growth.dtype, attn_implementation=growth.attn_implementation, use_kernels=growth.use_kernels
    )
    if len(tokenizer) > model.config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but vocab_size in config.json is "
            f"{model.config.vocab_size}; one of the two belongs to another model."
        )
    if growth.use_kernels:
        check_kernels_are_used(model)
    chunk_loss(model)  # before the Trainer looks at its forward
    masks = [MaskCallback()] if isinstance(model, TeleFLMMaskedForCausalLM) else []
    new_parts = None
    if growth.rewarm_new_steps is not None:
        new_parts = find_new_parts(folder, parameter_shapes(model), resumed)
    adam_state = None if growth.fresh_optimizer else find_grown_state(folder)
    if adam_state and not args.resume_from_checkpoint:
        # Refused now, not when everything is prepared.
        on_every_process(partial(read_grown_state, adam_state, parameter_shapes(model)))
    try:
        trainer = GrowthTrainer(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=default_data_collator,  # blocks need no padding
            processing_class=tokenizer,
            callbacks=[*masks, *callbacks],
            base_width=growth.mup_base_width,
            adam_state=adam_state,
            continued=continued,
        )
    except (ValueError, ImportError) as error:  # of a key whose value transformers refuses only now
        raise RunError(one_line(error)) from error
    check_spread(trainer, launched)
    trainer.add_callback(WrappingGuard(trainer))
    if new_parts is not None and growth.rewarm_new_steps is not None:
        trainer.add_callback(RewarmCallback(trainer, new_parts, growth.rewarm_new_steps))
    return trainer


def _resumed(args: TrainingArguments) -> str | None:
    """The checkpoint that the keys of a run name; see [`find_checkpoint`]."""
    wanted = args.resume_from_checkpoint
    return find_checkpoint(args) if wanted and str(wanted).lower() != "false" else None


def load_blocks(files: Sequence[str], tokenizer: PreTrainedTokenizerBase, growth: GrowthArguments) -> datasets.Dataset:
    """Tokenize text and pack it: documents, each between `<s>` and `</s>`, joined and cut into blocks.

    Packing is by thousands of documents; of each, what does not fill a block is left out.

    Returns:
        rows of `input_ids` and `labels`, block_size token ids each.

    Raises:
        CheckpointError: see [`load_documents`]; or there is not one block.
    """
    documents = load_documents(files, growth.text_column)

    def pack(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = tokenizer(batch[growth.text_column])["input_ids"]
        ids = list(chain.from_iterable([*text, tokenizer.eos_token_id] for text in texts))
        size = growth.block_size
        blocks = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
        return {"input_ids": blocks, "labels": blocks}

    blocks = documents.map(pack, batched=True, remove_columns=documents.column_names)
    if len(blocks) == 0:
        raise CheckpointError(f"{', '.join(files)}: less text than one block of {growth.block_size} tokens.")
    return blocks


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to resume: that of `resume_from_checkpoint`, which may be `true` for the last in output_dir.

    Raises:
        CheckpointError: output_dir holds checkpoints of a run that was not asked to go on.
        RunError: there is none, or it lacks what a step needs.
    """
    wanted, output_dir = args.resume_from_checkpoint, str(args.output_dir)
    if not wanted or str(wanted).lower() == "false":
        if there := checkpoints(output_dir):
            raise CheckpointError(
                f"output_dir already holds {there[0]}; choose another, or go on with resume_from_checkpoint: true."
            )
        return None
    return find_resumed(True if str(wanted).lower() == "true" else str(wanted), output_dir)


def parse_arguments(arguments: Sequence[str]) -> tuple[GrowthArguments, TrainingArguments]:
    """Read a command line: `--key value ...`, or one `.yaml` or `.json` file of the same keys.

    Raises:
        ValueError: a key is unknown or a value wrong.
    """
    parser = HfArgumentParser((GrowthArguments, TrainingArguments), prog="teleflm train")  # type: ignore[arg-type]
    if len(arguments) == 1 and arguments[0].endswith((".yaml", ".yml", ".json")):
        keys = _read_keys(Path(arguments[0]))
        growth, args = parser.parse_dict(keys)
        growth.gives_rate = "learning_rate" in keys
        return growth, args
    default = parser.get_default("learning_rate")
    parser.set_defaults(learning_rate=math.nan)  # which no command line means
    growth, args = parser.parse_args_into_dataclasses(list(arguments))
    growth.gives_rate = not math.isnan(args.learning_rate)
    if not growth.gives_rate:
        args.learning_rate = default
    return growth, args


def _read_keys(file: Path) -> dict[str, Any]:
    """The keys of a run that a file holds."""
    kind = "JSON" if file.suffix == ".json" else "YAML"
    try:
        text = file.read_text(encoding="utf-8")
        keys = json.loads(text) if kind == "JSON" else yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}.") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: is not {kind}: {one_line(error)}") from error
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"{file}: holds a {type(keys).__name__}, expected keys and their values.")
    for field in dataclasses.fields(GrowthArguments):
        if field.default is dataclasses.MISSING and field.name not in keys:
            raise ValueError(f"{file}: {field.name} is missing; it has no default.")
    return {name: _as_number(f"{file}: {name}", value, _NUMBERS.get(name)) for name, value in keys.items()}


def _as_number(name: str, value: Any, kinds: Sequence[type] | None) -> Any:
    """A value of a file of keys; of a number what it says, as YAML takes 1e-4 for a text."""
    if kinds is None or (value is None and NoneType in kinds):
        return value
    number = float if float in kinds else int
    try:
        if not isinstance(value, bool | list | dict):
            return number(value) if isinstance(value, str) else value
    except ValueError:
        pass
    raise ValueError(f"{name} is {value!r}, expected {'a number' if number is float else 'an integer'}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 is done, 2 refused before the first step, or not to be saved.

    `log_level: debug` shows tracebacks.
    """
    status = 0
    try:
        growth, args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    except Exception as error:  # a value of a wrong type meets whatever transformers does with it
        status = _refuse(error)
    else:
        try:
            metrics = train(growth, args)
        except (CheckpointError, RunError) as error:
            if args.get_process_log_level() <= logging.DEBUG:
                raise
            status = _refuse(error)
    leave_processes(together=status == 0)
    if status == 0 and os.environ.get("RANK", "0") == "0":
        done = f"mean loss {metrics['train_loss']:.4f}" if "train_loss" in metrics else "no step was left to do"
        print(f"{args.output_dir}: {done} in {metrics['train_runtime']:.0f} s")
    return status


def _refuse(error: Exception) -> int:
    print(f"error: {one_line(error)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
