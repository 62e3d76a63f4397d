# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Fine-tune a Tele-FLM on conversations, from a recipe.

    accelerate launch -m sft.train --config RECIPE.yaml [--key value ...]
    python -m sft.train --config RECIPE.yaml [--key value ...]

TRL's [`SFTTrainer`] does the training. What is done here: the model, the tokenizer and the token ids are built from the
recipe, and what a loss does not show is checked before the first step ([`sft.guards`]).
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import datasets
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging
from trl import ModelConfig, SFTTrainer, get_peft_config

import modeling_teleflm  # noqa: F401  (registers the architecture with the Auto classes)
from sft import SFTError
from sft.data import DataReport, prepare_dataset
from sft.guards import FusedLossGuard, check_stop_token, check_trained_tokens
from sft.recipe import Recipe, RecipeError, parse_overrides, read_recipe

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run did.

    Args:
        output_dir: holds the model (or adapter), the tokenizer with its chat template, and `trainer_state.json`.
        global_step: optimizer steps done, those of the resumed checkpoint included.
        metrics: of the whole run, as transformers' `TrainOutput.metrics`: `train_loss`, `train_runtime`, ...
        log_history: what was logged, one dictionary a time: `step`, `loss`, `learning_rate`, `grad_norm`, ...
        data, eval_data: what became of the rows.
    """

    output_dir: str
    global_step: int
    metrics: dict[str, float]
    log_history: list[dict[str, float]]
    data: DataReport
    eval_data: DataReport | None


def train(recipe: Recipe, *, callbacks: Sequence[TrainerCallback] = (), progress: bool = True) -> TrainResult:
    """Fine-tune a model and save it.

    Args:
        recipe: from [`sft.recipe.read_recipe`] or [`sft.recipe.Recipe.from_dict`].
        callbacks: transformers' callbacks, for example a progress bar of one's own.
        progress: show the bars of transformers and datasets, and print the logs.

    Raises:
        SFTError: the recipe, the data or the model is refused; no step was done and nothing was saved.
    """
    checkpoint = _checkpoint(recipe)
    with _progress_bars(progress):
        trainer, data, eval_data = build_trainer(recipe, callbacks)
        if not progress:
            trainer.remove_callback(ProgressCallback)
            trainer.remove_callback(PrinterCallback)
        output = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.save_state()
    return TrainResult(
        output_dir=str(recipe.training.output_dir),
        global_step=output.global_step,
        metrics=output.metrics,
        log_history=trainer.state.log_history,
        data=data,
        eval_data=eval_data,
    )


def build_trainer(
    recipe: Recipe, callbacks: Sequence[TrainerCallback] = ()
) -> tuple[SFTTrainer, DataReport, DataReport | None]:
    """Build the trainer of a recipe, checked and ready for `trainer.train()`; what [`train`] does before training.

    Returns:
        the trainer, with a [`FusedLossGuard`]; what became of the training rows; of the evaluation rows.

    Raises:
        SFTError: the recipe, the data or the model is refused.
    """
    args = recipe.training
    _refuse_used_output(recipe)
    tokenizer, stop_ids = load_tokenizer(recipe)
    check_stop_token(tokenizer, stop_ids, recipe.data.assistant_only_loss)

    train_dataset, report = _prepare(recipe, recipe.data.data_files, tokenizer, args.packing)
    eval_dataset, eval_report = None, None
    if recipe.data.eval_data_files:
        packing = args.packing if args.eval_packing is None else args.eval_packing
        eval_dataset, eval_report = _prepare(recipe, recipe.data.eval_data_files, tokenizer, packing)

    try:
        trainer = SFTTrainer(
            model=load_model(recipe.model),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=get_peft_config(recipe.model),
            callbacks=list(callbacks),
        )
    except ValueError as error:
        raise RecipeError(" ".join(str(error).split())) from error
    check_trained_tokens(trainer.train_dataset, expected=report.trained_tokens)
    trainer.add_callback(FusedLossGuard(trainer))
    return trainer, report, eval_report


def load_model(arguments: ModelConfig) -> PreTrainedModel:
    """Load the model to train, in `arguments.dtype`. Code in the checkpoint is not executed.

    Raises:
        RecipeError: there is no such model, or it cannot be loaded.
    """
    path = str(arguments.model_name_or_path)
    with _naming("model_name_or_path", path):
        return AutoModelForCausalLM.from_pretrained(
            path,
            revision=arguments.model_revision,
            dtype=arguments.dtype,
            attn_implementation=arguments.attn_implementation,
            trust_remote_code=False,
        )


def load_tokenizer(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, set[int]]:
    """Load the tokenizer of the model to train, with the recipe's chat template, and the ids that end generation.

    Raises:
        RecipeError: there is no such model or template file, or the tokenizer has no template.
    """
    source: dict[str, Any] = {"revision": recipe.model.model_revision, "trust_remote_code": False}
    path = str(recipe.model.model_name_or_path)
    with _naming("model_name_or_path", path):
        config = AutoConfig.from_pretrained(path, **source)
        tokenizer = AutoTokenizer.from_pretrained(path, **source)
        try:
            generation = GenerationConfig.from_pretrained(path, revision=recipe.model.model_revision)
        except OSError:
            generation = GenerationConfig.from_model_config(config)

    if template := recipe.data.chat_template_path:
        with _naming("chat_template_path", template):
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise RecipeError(f"{path} has no chat template; set chat_template_path to a Jinja file.")

    stop_ids = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    if stop_ids is None:
        raise RecipeError(f"{path} has no eos_token_id in generation_config.json or config.json, nor an eos_token.")
    return tokenizer, set(stop_ids) if isinstance(stop_ids, list) else {stop_ids}


def _prepare(
    recipe: Recipe, files: str | list[str], tokenizer: PreTrainedTokenizerBase, packing: bool
) -> tuple[datasets.Dataset, DataReport]:
    args = recipe.training
    # The other strategies put what overflows into the next row instead of cutting it.
    whole = packing and args.packing_strategy != "bfd"
    dataset, report = prepare_dataset(
        files,
        tokenizer,
        max_length=None if whole else args.max_length,
        assistant_only_loss=recipe.data.assistant_only_loss,
        allow_rejects=recipe.data.allow_rejects,
        num_proc=args.dataset_num_proc,
    )
    if args.process_index == 0:
        logger.log(logging.WARNING if report.rejects or report.dropped else logging.INFO, "data: %s", report)
    return dataset, report


def _checkpoint(recipe: Recipe) -> str | None:
    """The checkpoint to resume from, or None."""
    wanted = recipe.data.resume_from_checkpoint
    output_dir = str(recipe.training.output_dir)
    if not wanted:
        return None
    if wanted is True:
        last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if last is None:
            raise RecipeError(
                f"output_dir {output_dir} holds no checkpoint-N to resume; delete resume_from_checkpoint."
            )
        return last
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise RecipeError(f"resume_from_checkpoint {wanted} holds no trainer_state.json; name a checkpoint-N folder.")
    return wanted


def _refuse_used_output(recipe: Recipe) -> None:
    """Two runs in one folder would mix their checkpoints; what a resumed run finds there is its own."""
    output_dir = Path(str(recipe.training.output_dir))
    used = sorted(
        path.name for name in ("config.json", "adapter_config.json", "checkpoint-*") for path in output_dir.glob(name)
    )
    if used and not recipe.data.resume_from_checkpoint:
        raise RecipeError(
            f"output_dir {output_dir} already holds {used[-1]}; choose another, or continue that run with "
            "resume_from_checkpoint: true."
        )


@contextmanager
def _naming(key: str, value: Any) -> Iterator[None]:
    """Name the key of the recipe in what a library says about its value."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise RecipeError(f"{key} is {value!r}: {' '.join(str(error).split())}") from error


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Hide the bars of loading and tokenizing, which are switched for the whole process; and bring them back."""
    hidden = (
        [] if shown else [library for library in (datasets, transformers_logging) if library.is_progress_bar_enabled()]
    )
    for library in hidden:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in hidden:
            library.enable_progress_bar()


# --- the command line -------------------------------------------------------------------------------------------------


def run(config: str, overrides: Sequence[str], *, as_json: bool = False, debug: bool = False) -> int:
    """Train as a command line says, and print what was done, as text or as one JSON object.

    Args:
        config: the recipe file.
        overrides: see [`sft.recipe.parse_overrides`].
        as_json: print [`TrainResult`] as JSON. In either case only the result goes to stdout.
        debug: let errors through with their traceback.

    Returns:
        the exit status: 0 done, 2 refused before the first step with nothing saved, 130 interrupted.
    """
    try:
        with redirect_stdout(sys.stderr):
            result = train(read_recipe(config, parse_overrides(overrides)))
    except SFTError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume_from_checkpoint true continues from the last checkpoint.", file=sys.stderr)
        return 130
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(dataclasses.asdict(result)) if as_json else _summary(result))
    return 0


def _summary(result: TrainResult) -> str:
    loss, seconds = result.metrics["train_loss"], result.metrics["train_runtime"]
    return (
        f"{result.output_dir}: {result.global_step} steps in {seconds:.0f} s, mean loss {loss:.4f}\n"
        f"trained on {result.data}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line of this module; see [`run`] for the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sft.train", description="Fine-tune a Tele-FLM.", allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml", help="a recipe; see sft/recipes")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options, overrides = parser.parse_known_args(arguments)
    return run(options.config, overrides, as_json=options.json, debug=options.debug)


__all__ = ["TrainResult", "build_trainer", "load_model", "load_tokenizer", "main", "run", "train"]


if __name__ == "__main__":
    sys.exit(main())
