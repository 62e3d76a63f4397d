# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Fine-tune a Tele-FLM on conversations, from a recipe.

    accelerate launch --no_python teleflm sft train --config RECIPE.yaml [--key value ...]
    teleflm sft train --config RECIPE.yaml [--key value ...]

A trainer of TRL's does the training ([`sft.training.trainers`]). What is done here: the model, the tokenizer and the
token ids are built from the recipe, and what a loss does not show is checked before the first step
([`sft.training.guards`]).
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import logging as transformers_logging
from trl import ModelConfig, get_peft_config, get_quantization_config

import modeling_teleflm  # noqa: F401  (registers the architecture with the Auto classes)
from conversion.checkpoint.errors import CheckpointError, one_line, printable
from conversion.checkpoint.parent import parent_notes
from conversion.checkpoint.sources import open_checkpoint
from growth.training.errors import RunError
from growth.training.kernels import check_kernels, check_kernels_are_used
from growth.training.launch import (
    WrappingGuard,
    check_launch,
    check_spread,
    leave_processes,
    settle_checkpointing,
)
from growth.training.output_lock import hold_output
from growth.training.parallel import check_parallelism, data_parallel_size, loading_of, read_parallelism
from growth.training.record import RecordCallback
from growth.training.resume import find_checkpoint, step_of
from growth.training.same_run import describe_run, hold_to_run
from sft import SFTError
from sft import tokenizer as tokenizers
from sft.data.labels import DataReport
from sft.export import find_model
from sft.training.before_after import MeasureCallback, Measured, MeasureError, check_dtype, compute_dtype
from sft.training.comparison import comparison, comparison_text
from sft.training.guards import FusedLossGuard, GuardError, check_same_data
from sft.training.lineage import describe_base
from sft.training.memory import check_memory
from sft.training.recipe import WRONG_VALUE, Recipe, RecipeError, parse_overrides, read_recipe
from sft.training.run_log import lost_from, lost_steps
from sft.training.samples import Prompt, SampleCallback, check_whole, read_prompts
from sft.training.trackers import check_trackers
from sft.training.trainers import TRAINERS, AnyTrainer
from sft.training.watch import Picture, WatchCallback, describe_data, public_name, source_names

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run did.

    Args:
        output_dir: holds the model (or adapter), the tokenizer with its chat template, and `trainer_state.json`.
        global_step: optimizer steps done, those of the resumed checkpoint included.
        resumed_step: step of the checkpoint that the run went on from; 0 if it began anew.
        metrics: of the steps after that, as transformers' `TrainOutput.metrics`: `train_loss`, `train_runtime`, ...
        log_history: what was logged, one dictionary a time: `step`, `loss`, `learning_rate`, `grad_norm`, ...
        data, eval_data: what became of the rows.
        distributed_type: what the run was spread by, in accelerate's words, over `num_processes`.
        wrapped: how the model was, see [`growth.training.launch.count_wrapped`].
        measured: `before` and `after` -> results of `eval_texts` and `eval_tasks`, as [`evaluation.measure.describe`]
            gives them; empty without these.
    """

    output_dir: str
    global_step: int
    metrics: dict[str, float]
    log_history: list[dict[str, float]]
    data: DataReport
    eval_data: DataReport | None
    distributed_type: str
    num_processes: int
    wrapped: dict[str, int]
    resumed_step: int = 0
    measured: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def train(
    recipe: Recipe,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
    pictures: Sequence[Picture] = (),
) -> TrainResult:
    """Fine-tune a model and save it, with a record that says what it was made from.

    Args:
        recipe: from [`sft.training.recipe.read_recipe`] or [`sft.training.recipe.Recipe.from_dict`].
        callbacks: transformers' callbacks, for example a progress bar of one's own.
        progress: show the bars of transformers and datasets, and print the logs.
        pictures: drawn of the output folder beside `loss.png`, see [`sft.training.watch.WatchCallback`].

    Raises:
        SFTError: the recipe, the data or the model is refused, and no step was done and nothing was saved; or a
            checkpoint or the model cannot be saved.
    """
    with _held_output(recipe), _progress_bars(progress):
        checkpoint = _checkpoint(recipe)
        trainer, data, eval_data = build_trainer(recipe, callbacks)
        base = _describe_base(recipe) if trainer.is_world_process_zero() else {}
        with _run_errors():
            same = hold_to_run(trainer, lambda: _identify_run(recipe, trainer, data, base), checkpoint)
        guard = WrappingGuard(trainer)
        trainer.add_callback(guard)
        name = str(recipe.model.model_name_or_path)
        origin = find_model(name, recipe.model.model_revision)
        record = RecordCallback(
            trainer,
            partial(_describe_run, recipe, data, {**base, **_resumed(checkpoint, same)}),
            origin=origin,
            base=name,
        )
        trainer.add_callback(record)
        watch, measure = _watch(recipe, trainer, data, eval_data, pictures)
        if not progress:
            trainer.remove_callback(ProgressCallback)
            trainer.remove_callback(PrinterCallback)
        with _run_errors(), watch.recorded():
            with _first_step(trainer, step_of(checkpoint) if checkpoint else 0):
                output = trainer.train(resume_from_checkpoint=checkpoint)
            record.save_model()
            if measure:
                measure.after()
    return TrainResult(
        output_dir=str(recipe.training.output_dir),
        global_step=output.global_step,
        metrics=output.metrics,
        log_history=trainer.state.log_history,
        data=data,
        eval_data=eval_data,
        distributed_type=trainer.accelerator.distributed_type.value,
        num_processes=trainer.accelerator.num_processes,
        wrapped=guard.wrapped,
        resumed_step=step_of(checkpoint) if checkpoint else 0,
        measured=measure.found if measure else {},
    )


def build_trainer(
    recipe: Recipe, callbacks: Sequence[TrainerCallback] = ()
) -> tuple[AnyTrainer, DataReport, DataReport | None]:
    """Build the trainer of a recipe, checked and ready for `trainer.train()`; what [`train`] does before training.

    Returns:
        the trainer, with a [`FusedLossGuard`]; what became of the training rows; of the evaluation rows.

    Raises:
        SFTError: the recipe, the data or the model is refused.
    """
    args = recipe.training
    with _run_errors():
        launched = check_launch(
            args,
            os.environ,
            num_processes=recipe.run.num_processes,
            distributed_type=recipe.run.distributed_type,
        )
        parallelism, trainer_name = read_parallelism(os.environ), recipe.run.trainer
        check_parallelism(parallelism, args, launched, adapters=recipe.model.use_peft, trainer=trainer_name)
        check_kernels(args, recipe.run.use_kernels)
        if who := settle_checkpointing(args, os.environ, adapters=recipe.model.use_peft):
            logger.info("%s checkpoints the activations, of FSDP and the model, which were both told to", who)
    _refuse_used_output(recipe)
    _check_packages(args)
    run = recipe.run
    check_whole(launched, [key for key in ("sample_prompts", "eval_texts", "eval_tasks") if getattr(run, key)])
    measured = _measured(recipe)
    tokenizer, stop_ids = load_tokenizer(recipe)
    prompts = _prompts(recipe, tokenizer)
    kind = TRAINERS[recipe.run.trainer]
    masked = recipe.data.assistant_only_loss and kind.marks_answers
    tokenizers.check_stop_token(tokenizer, stop_ids, masked, recipe.data.last_turn_only)

    train_dataset, report, eval_dataset, eval_report = _load_data(recipe, tokenizer)
    check_same_data(report, eval_report)
    check_memory(recipe, launched, os.environ, train_dataset, ignore=recipe.run.ignore_memory_plan)
    tokenizer.pad_token = padding_token(tokenizer)  # not before: it would count in the data's digest

    common: dict[str, Any] = {
        "args": args,
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "processing_class": tokenizer,
        "peft_config": get_peft_config(recipe.model),
        "callbacks": list(callbacks),
    }
    load = partial(load_model, recipe.model, use_kernels=recipe.run.use_kernels)
    try:
        trainer = kind.build(recipe, load, common, report)
    except SFTError:
        raise
    except WRONG_VALUE as error:
        raise RecipeError(one_line(error)) from error
    with _run_errors():
        check_spread(trainer, launched)
    if measured:
        check_dtype(compute_dtype(trainer))
    trainer.source_names = source_names(report)
    trainer.measured, trainer.prompts, trainer.stop_ids = measured, prompts, sorted(stop_ids)
    trainer.add_callback(FusedLossGuard(trainer))
    return trainer, report, eval_report


def load_model(arguments: ModelConfig, *, use_kernels: bool = False) -> PreTrainedModel:
    """Load the model to train, in `arguments.dtype`, quantized if so asked. Code in the checkpoint is not executed.

    Args:
        arguments: which model, and how.
        use_kernels: let its layers take fused kernels of the Hub.

    Raises:
        SFTError: there is no such model, it cannot be loaded, or no layer has a kernel.
    """
    path = str(arguments.model_name_or_path)
    quantization = get_quantization_config(arguments)
    # A quantized model is made where it will be used.
    placement = {"quantization_config": quantization, "device_map": {"": PartialState().device}} if quantization else {}
    with _naming("model_name_or_path", path):
        if (Path(path) / "config.json").is_file():
            open_checkpoint(path)  # names what is damaged
        model = AutoModelForCausalLM.from_pretrained(
            path,
            revision=arguments.model_revision,
            dtype=arguments.dtype,
            attn_implementation=arguments.attn_implementation,
            use_kernels=use_kernels,
            trust_remote_code=False,
            **placement,
            **loading_of(read_parallelism(os.environ)),
        )
    if use_kernels:
        with _run_errors():
            check_kernels_are_used(model)
    return model


def padding_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What rows are padded with: the tokenizer's own, or <s>, or <unk>, where it has none.

    The one that ends a turn would do no harm here, where padding is known by its place; but whoever trains on with
    labels that leave out whatever is the padding's id would then train no end of a turn. <unk> comes last, as it is no
    special token to sentencepiece and is to transformers: the one reads the text "<unk>" as letters, the other as
    padding, and no tokenizer.json says the former.
    """
    return tokenizer.pad_token or tokenizer.bos_token or tokenizer.unk_token


def load_tokenizer(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, set[int]]:
    """Load the tokenizer of the model to train, with the recipe's chat template, and the ids that end generation.

    Raises:
        SFTError: there is no such model or template file, the tokenizer has no template, nothing to pad with, or more
            tokens than the model.
    """
    path, revision = str(recipe.model.model_name_or_path), recipe.model.model_revision
    if template := recipe.data.chat_template_path:
        with _naming("chat_template_path", template):
            tokenizers.find_template(template).read_text(encoding="utf-8")
    with _naming("model_name_or_path", path):
        loaded, stop_ids = tokenizers.load_tokenizer(path, template, revision)
    if padding_token(loaded) is None:
        raise RecipeError(
            f"{path}: the tokenizer has no pad_token, bos_token or unk_token to pad with; set pad_token in its "
            "tokenizer_config.json. Any token will do but the one that ends a turn: padding is never trained on."
        )
    vocab_size = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False).vocab_size
    if len(loaded) > vocab_size:
        raise RecipeError(
            f"{path}: the tokenizer has {len(loaded)} tokens, but vocab_size in config.json is {vocab_size}; one of "
            "the two belongs to another model."
        )
    return loaded, stop_ids


def _load_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[datasets.Dataset, DataReport, datasets.Dataset | None, DataReport | None]:
    loaded = TRAINERS[recipe.run.trainer].load(recipe, tokenizer)
    _, report, _, eval_report = loaded
    for what, one in (("data", report), ("evaluation", eval_report)) if recipe.training.process_index == 0 else ():
        if one is not None:
            logger.log(logging.WARNING if one.rejects else logging.INFO, "%s: %s", what, one)
            for source in one.sources:
                print(f"{what}: {printable(str(source))}", file=sys.stderr)
    return loaded


def _prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """What is sampled, read before a weight is loaded."""
    run, model = recipe.run, recipe.model
    if run.sample_prompts is None:
        return []
    config = AutoConfig.from_pretrained(
        str(model.model_name_or_path), revision=model.model_revision, trust_remote_code=False
    )
    positions = getattr(config, "max_position_embeddings", None)
    return read_prompts(
        run.sample_prompts, tokenizer, max_new_tokens=run.sample_max_new_tokens, max_positions=positions
    )


def _measured(recipe: Recipe) -> Measured | None:
    """What is measured before and after; its files are read before a weight is loaded."""
    texts, tasks = (
        tuple([given] if isinstance(given, str) else given or ())
        for given in (recipe.run.eval_texts, recipe.run.eval_tasks)
    )
    if not (texts or tasks):
        return None
    name = str(recipe.model.model_name_or_path)
    base = find_model(name, recipe.model.model_revision)
    if base is None:
        raise MeasureError(f"eval_texts, eval_tasks: {name} is not on this machine; download it, and name its folder.")
    quantized = recipe.model.load_in_4bit or recipe.model.load_in_8bit
    measured = Measured(texts, tasks, base, quantized)
    measured.check()
    return measured


def _watch(
    recipe: Recipe,
    trainer: AnyTrainer,
    data: DataReport,
    eval_data: DataReport | None,
    pictures: Sequence[Picture],
) -> tuple[WatchCallback, MeasureCallback | None]:
    """Give a trainer what logs the run, measures and samples; in this order, so that the log begins first."""
    args, run = recipe.training, recipe.run
    facts = {
        **_describe_run(recipe, data, {}, trainer.state),
        "base": public_name(str(recipe.model.model_name_or_path)),
        "data": describe_data(data),
        "eval_data": describe_data(eval_data) if eval_data else None,
        "logging_steps": args.logging_steps,
        "max_grad_norm": args.max_grad_norm,
        "nan_filter": args.logging_nan_inf_filter,
        "processes": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
    }
    watch = WatchCallback(trainer, facts, pictures)
    trainer.add_callback(watch)
    measure = MeasureCallback(trainer, watch, trainer.measured) if trainer.measured else None
    if measure:
        trainer.add_callback(measure)
    if trainer.prompts:
        every, length = run.sample_steps or 0, run.sample_max_new_tokens
        sampler = SampleCallback(
            trainer, trainer.prompts, every=every, max_new_tokens=length, stop_ids=trainer.stop_ids
        )
        trainer.add_callback(sampler)
    return watch, measure


def _describe_base(recipe: Recipe) -> dict[str, Any]:
    """What the lineage says of the model before training; found out before, so that nothing can fail afterwards."""
    path = str(recipe.model.model_name_or_path)
    folder = find_model(path, recipe.model.model_revision)
    with _naming("model_name_or_path", path):
        base = describe_base(open_checkpoint(folder)) if folder else {"base": None, "parent": None}
    for note in parent_notes(base):
        logger.warning("%s: %s", path, note)
    return base


def _describe_run(recipe: Recipe, data: DataReport, base: Mapping[str, Any], state: TrainerState) -> dict[str, Any]:
    """The lineage of the model as it is after some steps."""
    args, model = recipe.training, recipe.model
    adapter = "dora" if model.use_dora else "lora"
    return {
        "operation": "fine-tune",
        "trainer": recipe.run.trainer,
        "method": "full" if not model.use_peft else f"q{adapter}" if model.load_in_4bit else adapter,
        "data": {
            "rows": data.taken,
            "trained_tokens": data.trained_tokens,
            "digest": data.digest,
            **_describe_data(data),
        },
        "steps": state.global_step,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * data_parallel_size(args),
        **TRAINERS[recipe.run.trainer].describe(recipe),
        "learning_rate": args.learning_rate,
        "lr_scheduler": {"type": SchedulerType(args.lr_scheduler_type).value, "settings": args.lr_scheduler_kwargs},
        **base,
    }


def _describe_data(data: DataReport) -> dict[str, Any]:
    """Of which sources the rows are, and which commits of the Hub; nothing of local files but their content counts."""
    counts = ("name", "weight", "rows", "rejected", "held_out", "overlapping", "taken", "trained_tokens")
    sources = [{name: getattr(source, name) for name in counts} for source in data.sources]
    return {**({"sources": sources} if sources else {}), **({"hub": list(data.pinned)} if data.pinned else {})}


def _identify_run(recipe: Recipe, trainer: AnyTrainer, data: DataReport, base: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same when a checkpoint of this run is resumed."""
    ours = {
        key: value
        for part in (recipe.run, recipe.data, recipe.model)
        for key, value in dataclasses.asdict(part).items()
        # The digests of rewards are in made_from; of sources the places do not count.
        if key not in ("model_init_kwargs", "reward_funcs", "data")
    }
    mixture = [(source.weight, source.max_rows, source.max_tokens) for source in recipe.data.sources]
    ours["mixture"] = [] if mixture == [(1.0, None, None)] else mixture
    made_from = {"base": base.get("base"), "conversations": data.digest}
    made_from |= TRAINERS[recipe.run.trainer].made_from(recipe, trainer)
    return describe_run(recipe.training, ours, made_from)


def _resumed(checkpoint: str | None, same: bool | None) -> dict[str, Any]:
    """What the lineage says of a run that went on from a checkpoint: the step, and whether it was compared with it."""
    if checkpoint is None:
        return {"resumed": None}
    return {"resumed": {"step": step_of(checkpoint), "same_run": same}}


def _checkpoint(recipe: Recipe) -> str | None:
    """The checkpoint to resume from, or None."""
    with _run_errors():
        return find_checkpoint(recipe.run.resume_from_checkpoint, str(recipe.training.output_dir))


@contextmanager
def _held_output(recipe: Recipe) -> Iterator[None]:
    """No other run writes into the output folder meanwhile."""
    args = recipe.training
    with ExitStack() as stack:
        with _run_errors():
            stack.enter_context(hold_output(str(args.output_dir), writes=args.process_index == 0))
        yield


def _refuse_used_output(recipe: Recipe) -> None:
    """Two runs in one folder would mix their checkpoints; what a resumed run finds there is its own."""
    output_dir = Path(str(recipe.training.output_dir))
    used = sorted(
        path.name for name in ("config.json", "adapter_config.json", "checkpoint-*") for path in output_dir.glob(name)
    )
    if used and not recipe.run.resume_from_checkpoint:
        raise RecipeError(
            f"output_dir {output_dir} already holds {used[-1]}; choose another, or continue that run with "
            "resume_from_checkpoint: true."
        )


def _check_packages(args: TrainingArguments) -> None:
    """That what the recipe names is installed; a Trainer finds out when the model is loaded, or at the first step."""
    check_trackers(args.report_to)
    checks: list[tuple[str, str, Callable[[], Any]]] = [
        ("optim", OptimizerNames(args.optim).value, lambda: Trainer.get_optimizer_cls_and_kwargs(args)),
    ]
    for key, value, make in checks:
        try:
            make()
        except (ImportError, RuntimeError) as error:
            raise RecipeError(f"{key} is {value}: {one_line(error)}") from error
        except ValueError:  # of settings that only the model can tell whether they are right
            continue


@contextmanager
def _run_errors() -> Iterator[None]:
    """What the checks shared with growth find is an error of this package."""
    try:
        yield
    except (RunError, CheckpointError) as error:
        raise GuardError(str(error)) from error


@contextmanager
def _first_step(trainer: AnyTrainer, begun: int) -> Iterator[None]:
    """What a library cannot work with and says amid the first step of this run; later it would be a fault of ours."""
    try:
        yield
    except (SFTError, RunError, CheckpointError):
        raise
    except WRONG_VALUE as error:
        if trainer.state.global_step > begun:
            raise
        raise RecipeError(
            f"the first step failed: {one_line(error)}. TRL or transformers cannot work with a value of the recipe "
            "that they took; --debug shows where."
        ) from error


@contextmanager
def _naming(key: str, value: Any) -> Iterator[None]:
    """Name the key of the recipe in what a library says about its value, or in what a file that it names leads to."""
    try:
        yield
    except Exception as error:
        raise RecipeError(f"{key} is {value!r}: {one_line(error)}") from error


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


def run(
    config: str,
    overrides: Sequence[str],
    *,
    as_json: bool = False,
    debug: bool = False,
    pictures: Sequence[Picture] = (),
) -> int:
    """Train as a command line says, and print what was done, as text or as one JSON object.

    Args:
        config: the recipe file.
        overrides: see [`sft.training.recipe.parse_overrides`].
        as_json: print [`TrainResult`] as JSON. In either case only the result goes to stdout.
        debug: let errors through with their traceback.
        pictures: see [`train`].

    Returns:
        the exit status: 0 done, 2 refused before the first step with nothing saved, or stopped by a reward function
        that failed or by what could not be saved, 130 interrupted.
    """
    status = 0
    try:
        with redirect_stdout(sys.stderr):
            result = train(read_recipe(config, parse_overrides(overrides)), pictures=pictures)
    except SFTError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted; --resume_from_checkpoint true continues from the last checkpoint.", file=sys.stderr)
        status = 130
    leave_processes(together=status == 0)
    if status == 0 and os.environ.get("RANK", "0") == "0":
        print(json.dumps(dataclasses.asdict(result)) if as_json else _summary(result))
    return status


def _summary(result: TrainResult) -> str:
    loss, seconds = result.metrics["train_loss"], result.metrics["train_runtime"]
    many = f" on {result.num_processes} processes ({result.distributed_type})" if result.num_processes > 1 else ""
    steps = f"{result.global_step} steps"
    if result.resumed_step:
        steps = f"{result.global_step - result.resumed_step} steps after the {result.resumed_step} of its checkpoint"
    new = [entry for entry in result.log_history if entry.get("step", 0) > result.resumed_step]
    rewards = [entry["reward"] for entry in new if "reward" in entry]
    # GRPO's loss is about 0 whatever is learned.
    learned = f"reward {rewards[0]:.3f} at first, {rewards[-1]:.3f} at last" if rewards else f"mean loss {loss:.4f}"
    if result.resumed_step and result.global_step == result.resumed_step:
        learned = "which was the last"
    elif (step := lost_from(new, "loss")) is not None:
        learned += f": from step {step} on the loss is no finite number, and the model is of no use"
    elif (step := lost_from(new, "grad_norm")) is not None:
        learned += f": from step {step} on the gradient norm is no finite number, and the model may be of no use"
    elif lost := lost_steps(new, "loss"):
        learned += f": at {len(lost)} logged steps, {lost[0]} the first, the loss is no finite number"
    text = f"{result.output_dir}: {steps} in {seconds:.0f} s{many}, {learned}\ntrained on {result.data}"
    if result.measured:
        text += "\n" + comparison_text(comparison(result.measured.get("before"), result.measured.get("after")))
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line of this module; see [`run`] for the exit status."""
    parser = argparse.ArgumentParser(prog="teleflm sft train", description="Fine-tune a Tele-FLM.", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="RECIPE", help="a recipe, by path or by name")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options, overrides = parser.parse_known_args(arguments)
    return run(options.config, overrides, as_json=options.json, debug=options.debug)


__all__ = ["TrainResult", "build_trainer", "load_model", "load_tokenizer", "main", "run", "train"]


if __name__ == "__main__":
    sys.exit(main())
