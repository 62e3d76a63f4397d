# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Recipes: one flat YAML file that says everything about a fine-tuning run.

A key of a recipe is a field of one of four dataclasses:

- [`RunArguments`], ours: which trainer, on how many processes, from which checkpoint;
- [`DataArguments`], ours: which files, what is trained on;
- [`trl.ModelConfig`]: which model, and LoRA (`use_peft`, `lora_r`, ...);
- TRL's configuration of the trainer, such as [`trl.SFTConfig`] or [`trl.GRPOConfig`], transformers'
  `TrainingArguments` plus TRL's own fields: everything else.

So whoever knows TRL knows the keys. Unlike TRL, an unknown key, a value of the wrong type and a key given twice are
errors, and so is a key that would be ignored here.
"""

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub.dataclasses import type_validator
from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig, GRPOConfig, KTOConfig, ModelConfig, SFTConfig

from conversion.checkpoint.errors import one_line
from growth.training.kernels import WHY_NOT_LIGER
from growth.training.launch import DistributedName
from sft import SFTError
from sft.data.sources import Source, as_places, parse_sources
from sft.rewards.reward import LARGEST, RewardError
from sft.rewards.spec import parse_rewards
from sft.shipped import find_shipped
from sft.training.ranges import find_fault
from sft.yaml_text import load_yaml


class RecipeError(SFTError):
    """A recipe, or an override of one, is wrong. The message names the key."""


# What the libraries raise where a value is none that they can work with.
WRONG_VALUE = (ValueError, TypeError, ArithmeticError, LookupError, NotImplementedError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunArguments:
    """How a run is made.

    Args:
        trainer: `sft` learns what the assistant says; `dpo` learns to prefer one answer to another, `kto` answers that
            were liked to answers that were not; `grpo` learns what reward functions say of its own answers.
        reward_funcs: for `grpo`, its reward functions; see [`sft.rewards.spec`].
        resume_from_checkpoint: a `checkpoint-N` folder, or `True` for the last one in `output_dir`.
        mup_base_width: hidden_size at which `learning_rate` was tuned: matrices then learn at learning_rate x
            mup_base_width / hidden_size (see [`growth.training.mup`]). Unset: one rate for all, as the 52B was
            pretrained.
        num_processes: how many processes this run is meant for; another number is an error. Launchers have been seen
            to start one in place of many without a word.
        distributed_type: what the run is meant to be spread by, in accelerate's words: `NO`, `MULTI_CPU`, `MULTI_GPU`
            (both replicate the model), `FSDP`, `DEEPSPEED`; anything else is an error.
        use_kernels: let layers take fused kernels of the Hub, as transformers' `from_pretrained` does; on accelerators,
            with the package kernels.
        sample_prompts: texts or conversations that the model is to continue, before, while and after it is trained, or
            a file of them (see [`sft.training.samples`]).
        sample_steps: how often; unset: before the first step and after the last.
        sample_max_new_tokens: of a text that is sampled.
        eval_texts, eval_tasks: files that are measured before and after, as `teleflm eval --text` and `--tasks` do.
        ignore_memory_plan: begin also where [`sft.training.memory`] finds that the run needs more memory than there is.
    """

    trainer: Literal["sft", "dpo", "kto", "grpo"] = "sft"
    reward_funcs: str | dict[str, Any] | list[Any] | None = None
    resume_from_checkpoint: str | bool | None = None
    mup_base_width: int | None = None
    num_processes: int | None = None
    distributed_type: DistributedName | None = None
    use_kernels: bool = False
    sample_prompts: str | list[Any] | None = None
    sample_steps: int | None = None
    sample_max_new_tokens: int = 128
    eval_texts: str | list[str] | None = None
    eval_tasks: str | list[str] | None = None
    ignore_memory_plan: bool = False

    def __post_init__(self) -> None:
        for name in ("mup_base_width", "num_processes", "sample_steps", "sample_max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataArguments:
    """What is trained on.

    `assistant_only_loss` and `chat_template_path` mean what they mean in TRL; they are here because the conversations
    are tokenized before TRL sees them (see [`sft.data.labels`]).

    Args:
        data_files: files of conversations, in any layout of [`sft.data.formats`], or a folder of `sft prepare`; for
            `dpo` and `kto`, files of judged answers (see [`sft.data.preferences`]); for `grpo`, of prompts (see
            [`sft.data.prompts`]).
        data: in its place: a list of sources, each with `path`, and perhaps `name`, `weight`, `max_rows`, `max_tokens`
            and, on the Hub, `revision`, `config`, `split` (see [`sft.data.sources`] and [`sft.data.mixture`]).
        eval_data_files: like `data_files`, evaluated on when `eval_strategy` says so.
        test_split_size: in its place: hold out this share of the rows that an epoch would use of each source (below 1),
            or so many rows of all (see [`sft.data.holdout`]).
        drop_eval_overlap: leave training rows out that `eval_data_files` has too, or whose question it asks.
        dataset_cache_dir: where tokenized rows are kept, for all processes that see it and for later runs; in the cache
            of `datasets` unless given.
        assistant_only_loss: train on what the assistant says, end-of-turn token included; `False`: on every token.
        last_turn_only: of what the assistant says, train on its last turn alone.
        sanitize_control_tokens: encode special tokens that a text spells out, such as HTML's `<s>`, as ordinary text;
            without it a row that spells one is invalid.
        chat_template_path: a Jinja file that replaces the tokenizer's chat template, or the name of a shipped one.
        allow_rejects: train on the valid rows of a file that has invalid ones. Without it one invalid row is an error.
    """

    data_files: str | list[str] | None = None
    data: list[dict[str, Any]] | None = None
    eval_data_files: str | list[str] | None = None
    test_split_size: float | None = None
    drop_eval_overlap: bool = False
    dataset_cache_dir: str | None = None
    assistant_only_loss: bool = True
    last_turn_only: bool = False
    sanitize_control_tokens: bool = False
    chat_template_path: str | None = None
    allow_rejects: bool = False

    def __post_init__(self) -> None:
        size = self.test_split_size
        if size is not None and not (0 < size < 1 or (1 <= size < math.inf and size == int(size))):
            raise ValueError(f"test_split_size is {size}; expected a share between 0 and 1, or a number of rows.")
        _ = self.sources

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where the training rows come from."""
        if self.data is not None:
            return parse_sources(self.data)
        places = as_places(self.data_files or [])
        return (Source(", ".join(places), places),)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe. Build one with [`read_recipe`] or [`Recipe.from_dict`]."""

    run: RunArguments
    data: DataArguments
    model: ModelConfig
    training: SFTConfig | DPOConfig | KTOConfig | GRPOConfig

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str = "the recipe") -> "Recipe":
        """Check a flat mapping of keys and build the recipe.

        Args:
            values: keys and values as in a recipe file.
            origin: where they come from, for error messages.

        Raises:
            RecipeError: a key is unknown, missing or refused; a value is of the wrong type or none of the choices.
        """
        trainer = values.get("trainer", "sft")
        _check("trainer", trainer, _KEYS["sft"], origin)
        keys = _KEYS[trainer]
        for key, value in values.items():
            _check(key, value, keys, origin)
        required = [key for key in _REQUIRED if key != "data_files" or values.get("data") is None]
        missing = [key for key in required if values.get(key) is None]
        if missing:
            raise RecipeError(f"{origin} does not set {', '.join(missing)}; add it, or pass --{missing[0]} VALUE.")
        _check_combinations(values, keys, origin)

        run, data, model, training = (
            {key: value for key, value in values.items() if key in fields}
            for fields in (keys.run, keys.data, keys.model, keys.training)
        )
        try:
            return cls(
                RunArguments(**run),
                DataArguments(**data),
                ModelConfig(**{**_MODEL_DEFAULTS, **model}),
                keys.config(**{**_training_defaults(training), **keys.fixed, **training}),
            )
        except (*WRONG_VALUE, ImportError) as error:
            raise RecipeError(f"{origin}: {one_line(error)}") from error


def read_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file.

    Args:
        path: a YAML file, one mapping, or the name of a shipped recipe (see [`sft.shipped`]). Scalars are read by the
            rules of YAML 1.2: `1e-9` is a number and `no` a string.
        overrides: keys that win over the file's; see [`parse_overrides`].

    Raises:
        RecipeError: the file is missing or no mapping, or as [`Recipe.from_dict`] says.
    """
    try:
        text = _find_recipe(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.reason} at byte {error.start}.") from error
    values = _load_yaml(text, origin=str(path))
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path} holds a {type(values).__name__}; a recipe is one flat mapping of `key: value` lines."
        )
    overrides = overrides or {}
    trainer = {**values, **overrides}.get("trainer")
    for key, value in overrides.items():
        _check(key, value, _KEYS[trainer if trainer in list(_KEYS) else "sft"], origin="the command line")
    return Recipe.from_dict({**values, **overrides}, origin=str(path))


def _find_recipe(path: str | Path) -> Path:
    """A file as it is named; a bare name without one is that of a shipped recipe."""
    if Path(path).exists() or Path(path).name != str(path) or Path(path).suffix:
        return Path(path)
    try:
        return find_shipped(str(path), "recipe")
    except LookupError as error:
        raise RecipeError(f"there is no file {path}, and {error.args[0]}") from None


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Turn `--key value`, `--key=value`, `--key a b` (a list) and `--flag` (true) into keys and values.

    Values are YAML, as in the file: `--lr_scheduler_kwargs '{lr_end: 1e-9}'`. Dashes in a key may be underscores.

    Raises:
        RecipeError: an argument belongs to no key, a key is given twice, or a value is no YAML.
    """
    words: dict[str, list[str]] = {}
    key = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            key = name.replace("-", "_")
            if key in words:
                raise RecipeError(f"--{name} is given twice.")
            words[key] = [value] if equals else []
        elif key is None:
            raise RecipeError(f"{argument!r} belongs to no key; overrides are written --key value.")
        else:
            words[key].append(argument)

    values = {key: [_load_yaml(word, origin=f"--{key}") for word in group] for key, group in words.items()}
    return {key: True if not group else group[0] if len(group) == 1 else group for key, group in values.items()}


# --- the keys ---------------------------------------------------------------------------------------------------------

_HONOURED = [
    "model_name_or_path",
    "model_revision",
    "dtype",
    "attn_implementation",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
    "load_in_8bit",
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
]

# Fields of TRL's configurations that would have no effect, because the model, the tokenizer and the token ids are built
# here, or that the libraries will drop.
_REFUSED = {
    "model_init_kwargs": "use dtype, attn_implementation, model_revision and use_kernels",
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), WHY_NOT_LIGER),
    "trust_remote_code": "no code of a checkpoint is ever executed; delete the key",
    "eos_token": "set it in the tokenizer's own files",
    "pad_token": "set it in the tokenizer's own files",
    "truncation_mode": "long conversations keep their start; delete the key",
    "router_aux_loss_coef": "Tele-FLM is dense; delete the key",
    "parallelism_config": "set it in the file of `accelerate launch --config_file`",
    "gradient_checkpointing": "write activation_checkpointing",
    "gradient_checkpointing_kwargs": "write activation_checkpointing_kwargs",
    "do_train": "delete the key",
    "do_eval": "use eval_strategy",
    "do_predict": "delete the key",
    "local_rank": "the launcher sets it; delete the key",
    "length_column_name": "rows are measured; delete the key",
    "streaming": "rows are tokenized in bounded memory and mapped from the disk, whatever their size; delete the key",
    **dict.fromkeys(
        (
            "batch_eval_metrics",
            "include_for_metrics",
            "eval_do_concat_batches",
            "eval_accumulation_steps",
            "prediction_loss_only",
        ),
        "evaluation is of the loss alone; delete the key",
    ),
}
# The trainers that read no marks of what the assistant says.
_REFUSED_BY_OTHERS = {
    **dict.fromkeys(("assistant_only_loss", "last_turn_only"), "it is for `trainer: sft`; delete the key"),
    "sanitize_control_tokens": "TRL tokenizes these rows; delete the key, and rewrite texts that spell a control token",
    "label_smoothing_factor": "it is for `trainer: sft`; delete the key",
    "mup_base_width": "it is for `trainer: sft`; delete the key",
    **dict.fromkeys(
        ("data", "test_split_size", "drop_eval_overlap", "dataset_cache_dir"),
        "it is for `trainer: sft`; name rows by data_files and eval_data_files",
    ),
}
_REFUSED_BY_SFT = {
    "reward_funcs": "it is for `trainer: grpo`; delete the key",
    "dataset_text_field": "training is on conversations; give rows a `messages` column",
    "dataset_kwargs": "conversations are always prepared; delete the key",
    "completion_only_loss": "use assistant_only_loss",
}
_REFUSED_BY_DPO = {
    "assistant_only_loss": "answers are compared, nothing else; delete the key",
    "last_turn_only": "answers are compared, nothing else; delete the key",
    "padding_free": "TRL has switched it off for DPO; delete the key",
    "label_smoothing_factor": "it is for `trainer: sft`; write label_smoothing",
    "reward_funcs": "it is for `trainer: grpo`; delete the key",
}
_REFUSED_BY_GRPO = {
    "remove_unused_columns": "reward functions get every column; delete the key",
    "train_sampling_strategy": "every prompt comes num_generations times, in TRL's own order; delete the key",
    "group_by_length": "every prompt comes num_generations times, in TRL's own order; delete the key",
    "auto_find_batch_size": "a group of completions cannot be split; delete the key",
    "max_tool_calling_iterations": "completions call no tools; delete the key",
    "log_multimodal": "completions are text; delete the key",
    "use_transformers_paged": "it has another name in TRL, and is refused under that too; delete the key",
    # It casts the weights that are trained, in place, to what generation runs in.
    **dict.fromkeys(
        ("use_transformers_continuous_batching", "transformers_continuous_batching_config"),
        "TRL's continuous batching casts the trained weights to 16 bits; delete the key",
    ),
}
_WHY_NOT_VLLM = (
    "completions are sampled by the model's own forward pass, which vLLM's is not checked against; delete it"
)
_REQUIRED = ("model_name_or_path", "data_files", "output_dir")
# PEFT knows no default targets for this architecture; all-linear leaves lm_head out, as TRL's fused head requires.
_MODEL_DEFAULTS = {"lora_target_modules": "all-linear"}


def _hints(cls: type, names: Sequence[str] | None = None, without: Collection[str] = ()) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(cls)
        if (names is None or field.name in names) and field.name not in without
    }


def _names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _choices(hint: Any) -> list[str]:
    """The values of a `Literal`, alone or in a union."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return [value for member in members if typing.get_origin(member) is Literal for value in typing.get_args(member)]


@dataclasses.dataclass(frozen=True)
class _Keys:
    """The keys of the recipes of one trainer.

    Args:
        config: TRL's class of its settings.
        fixed: settings of it that are ours to make.
        refused: key -> why it is an error, and the way out.
    """

    config: type[SFTConfig] | type[DPOConfig] | type[KTOConfig] | type[GRPOConfig]
    fixed: Mapping[str, Any]
    refused: Mapping[str, str]

    @functools.cached_property
    def run(self) -> dict[str, Any]:
        return _hints(RunArguments, without=self.refused)

    @functools.cached_property
    def data(self) -> dict[str, Any]:
        return _hints(DataArguments, without=self.refused)

    @functools.cached_property
    def model(self) -> dict[str, Any]:
        # "all-linear" and a regular expression are strings; TRL's own parser reaches them through a list of one.
        return _hints(ModelConfig, names=_HONOURED) | {"lora_target_modules": str | list[str] | None}

    @functools.cached_property
    def training(self) -> dict[str, Any]:
        return _hints(self.config, without=self.refused.keys() | self.run.keys() | self.data.keys())

    @functools.cached_property
    def hints(self) -> dict[str, Any]:
        return {**self.run, **self.data, **self.model, **self.training}

    @functools.cached_property
    def choices(self) -> dict[str, list[str]]:
        declared = {key: _choices(hint) for key, hint in self.hints.items()}
        told = {
            field.name: list(field.metadata["choices"])
            for cls in (ModelConfig, self.config)
            for field in dataclasses.fields(cls)
            if field.metadata.get("choices")
        }
        return told | {key: values for key, values in declared.items() if values}


_KEYS = {
    # The rows come tokenized, cut and labelled: TRL would go through them twice more, and lose their weights.
    "kto": _Keys(KTOConfig, {}, _REFUSED | _REFUSED_BY_OTHERS | {"reward_funcs": _REFUSED_BY_DPO["reward_funcs"]}),
    "grpo": _Keys(
        GRPOConfig,
        {},
        _REFUSED
        | _REFUSED_BY_OTHERS
        | _REFUSED_BY_GRPO
        | {name: _WHY_NOT_VLLM for name in _names(GRPOConfig) if name.startswith(("vllm_", "use_vllm"))},
    ),
    "sft": _Keys(SFTConfig, {"dataset_kwargs": {"skip_prepare_dataset": True}}, _REFUSED | _REFUSED_BY_SFT),
    "dpo": _Keys(DPOConfig, {}, _REFUSED | _REFUSED_BY_OTHERS | _REFUSED_BY_DPO),
}


def _training_defaults(training: Mapping[str, Any]) -> dict[str, Any]:
    """TRL's defaults, where the machine would refuse them, and under the names that will stay."""
    bf16 = is_torch_bf16_gpu_available() and not training.get("use_cpu") and not training.get("fp16")
    # A loss that is no number is to be seen; transformers' filter would log the mean of those before it.
    return {"bf16": bf16, "activation_checkpointing": True, "logging_nan_inf_filter": False}


def _check(key: str, value: Any, keys: _Keys, origin: str) -> None:
    if key in keys.refused:
        raise RecipeError(f"{origin}: {key} has no effect here; {keys.refused[key]}.")
    if key not in keys.hints:
        nearest = difflib.get_close_matches(str(key), keys.hints, n=1)
        known = f"RunArguments, DataArguments, ModelConfig, {keys.config.__name__}"
        way_out = f"did you mean {nearest[0]}?" if nearest else f"keys are those of {known}."
        raise RecipeError(f"{origin}: unknown key {key}; {way_out}")
    _check_numbers(key, value, origin)
    is_a = _is_a(value, keys.hints[key])
    if key in keys.choices and not (is_a and (value is None or value in keys.choices[key])):
        raise RecipeError(f"{origin}: {key} is {value!r}; expected one of {', '.join(keys.choices[key])}.")
    if not is_a:
        expected = _spell(keys.hints[key])
        raise RecipeError(f"{origin}: {key} is {value!r}, of type {type(value).__name__}; expected {expected}.")
    if fault := find_fault(next(name for name, one in _KEYS.items() if one is keys), key, value):
        raise RecipeError(f"{origin}: {key} is {_shown(value)}; {fault}.")


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.200}"
    except ValueError:  # a number of more digits than Python prints
        return "a number of thousands of digits"


# The numbers that make random generators: the first has numpy's and Python's too.
_SEEDS = {"seed": 2**32, "data_seed": 2**63}
# The first then clips nothing; the second says which source has such a weight.
_MAY_BE_INFINITE = ("max_grad_norm", "data")


def _check_numbers(key: str, value: Any, origin: str) -> None:
    """Numbers that Python has and what computes with them has not, also in lists and mappings."""
    match value:
        case bool():
            pass
        case int() if abs(value) >= 2**63:
            raise RecipeError(f"{origin}: {key} is or holds a number of more than 64 bits.")
        case int() if key in _SEEDS and not 0 <= value < _SEEDS[key]:
            raise RecipeError(f"{origin}: {key} is {value}; expected 0 to {_SEEDS[key] - 1}.")
        case float() if not math.isfinite(value) and not (key in _MAY_BE_INFINITE and value == math.inf):
            raise RecipeError(f"{origin}: {key} is or holds {value}; expected finite numbers.")
        case list() | tuple():
            for item in value:
                _check_numbers(key, item, origin)
        case dict():
            for item in value.values():
                _check_numbers(key, item, origin)


@dataclasses.dataclass(frozen=True)
class _Need:
    """Keys that have no effect unless another says so.

    Args:
        keys: regular expression of them.
        switch: the other key.
        values: which of its values give the keys an effect; of a list, one of them is enough. Empty: all that are true.
    """

    keys: str
    switch: str
    values: tuple[str, ...] = ()

    def is_met(self, found: Any) -> bool:
        """Whether a value of the other key gives these keys an effect."""
        if not self.values:
            return bool(found)
        return any(value in self.values for value in (found if isinstance(found, list) else [found]))


_NEEDS = (
    _Need("bnb_4bit_.*|use_bnb_.*", "load_in_4bit"),
    _Need("lora_.*|use_rslora|use_dora", "use_peft"),
    _Need("hub_.*", "push_to_hub"),
    _Need("fsdp_config", "fsdp"),
    _Need("sample_(steps|max_new_tokens)", "sample_prompts"),
    _Need("activation_checkpointing_kwargs", "activation_checkpointing"),
    _Need("label_smoothing_factor", "loss_type", ("nll",)),
    _Need("precompute_ref_batch_size", "precompute_ref_log_probs"),
    _Need("ref_model_mixup_alpha|ref_model_sync_steps", "sync_ref_model"),
    _Need("f_alpha_divergence_coef", "f_divergence_type", ("alpha_divergence",)),
    _Need("discopop_tau", "loss_type", ("discopop",)),
    _Need("label_smoothing", "loss_type", ("robust", "exo_pair", "aot", "aot_unpaired")),
    _Need("sync_ref_model", "beta"),
    _Need("sapo_.*", "loss_type", ("sapo",)),
    _Need("vespo_.*", "loss_type", ("vespo",)),
    _Need("entropy_coef_.*|entropy_target", "use_adaptive_entropy"),
    _Need("num_completions_to_print|log_unique_prompts|log_completions_hub_repo", "log_completions"),
)


def _check_combinations(values: Mapping[str, Any], keys: _Keys, origin: str) -> None:
    """Keys that contradict each other, or that another would have to switch on."""
    for key in ("load_in_4bit", "load_in_8bit"):
        if values.get(key) and not values.get("use_peft"):
            raise RecipeError(f"{origin}: {key} is True and use_peft is not; quantized weights cannot be trained.")
    if values.get("mup_base_width") and values.get("use_peft"):
        raise RecipeError(f"{origin}: mup_base_width and use_peft are both set; muP has no rule for adapters.")
    if values.get("activation_offloading") and values.get("use_cpu"):
        raise RecipeError(f"{origin}: activation_offloading and use_cpu are both set; there is nowhere to offload to.")
    if values.get("packing_strategy") and not (values.get("packing") or values.get("eval_packing")):
        raise RecipeError(f"{origin}: packing_strategy has no effect here; it needs packing: true.")
    if values.get("eval_data_files") and values.get("eval_strategy", "no") == "no" and not values.get("eval_on_start"):
        raise RecipeError(f"{origin}: eval_data_files has no effect here; it needs eval_strategy: steps or epoch.")
    evaluates = values.get("eval_strategy", "no") != "no" or values.get("eval_on_start")
    if evaluates and not values.get("eval_data_files") and values.get("test_split_size") is None:
        key = "eval_on_start" if values.get("eval_strategy", "no") == "no" else "eval_strategy"
        rows = "eval_data_files" + (" or test_split_size" if "test_split_size" not in keys.refused else "")
        raise RecipeError(f"{origin}: {key} has nothing to evaluate on; it needs {rows}.")
    if keys.config is GRPOConfig:
        _check_rewards(values, origin)
    if values.get("data") is not None and values.get("data_files") is not None:
        raise RecipeError(f"{origin}: data and data_files are both set; keep one (null unsets the other).")
    if values.get("test_split_size") is not None:
        if values.get("eval_data_files") is not None:
            raise RecipeError(f"{origin}: test_split_size and eval_data_files are both set; keep one.")
        if values.get("eval_strategy", "no") == "no" and not values.get("eval_on_start"):
            raise RecipeError(f"{origin}: test_split_size has no effect here; it needs eval_strategy: steps or epoch.")
    if values.get("drop_eval_overlap") and not values.get("eval_data_files"):
        raise RecipeError(f"{origin}: drop_eval_overlap has no effect here; it needs eval_data_files.")
    defaults = {field.name: field.default for field in dataclasses.fields(keys.config)}
    settings = {**defaults, **_training_defaults(values), **values}
    for need in _NEEDS:
        for key, value in values.items():
            if re.fullmatch(need.keys, key) and value is not None and not need.is_met(settings.get(need.switch)):
                wanted = f"{need.switch}: {' or '.join(need.values) or 'true'}"
                if not need.values and not _is_a(True, keys.hints.get(need.switch, bool)):
                    wanted = f"{need.switch} above 0" if _is_a(0.5, keys.hints.get(need.switch, bool)) else need.switch
                raise RecipeError(f"{origin}: {key} has no effect here; it needs {wanted}.")


def _check_rewards(values: Mapping[str, Any], origin: str) -> None:
    """What GRPO is rewarded by: at least one function, and a weight for each that float32 can work with."""
    if values.get("reward_funcs") is None:
        raise RecipeError(f"{origin} does not set reward_funcs; grpo learns from what reward functions say.")
    try:
        specs = parse_rewards(values["reward_funcs"])
    except RewardError as error:
        raise RecipeError(f"{origin}: {error}") from error
    weights = values.get("reward_weights")
    if weights is not None and len(weights) != len(specs):
        raise RecipeError(f"{origin}: reward_weights has {len(weights)} numbers, reward_funcs {len(specs)} functions.")
    if weights is not None and not all(abs(weight) <= LARGEST for weight in weights):
        raise RecipeError(f"{origin}: reward_weights is {_shown(weights)}; expected numbers up to {LARGEST:g} in size.")


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; an `int` is also a `float`, as in type hints, and a `bool` is neither."""
    for candidate in (value, _with_floats(value)):
        try:
            type_validator("value", candidate, hint)
            return True
        except TypeError:
            continue
    return False


def _with_floats(value: Any) -> Any:
    """A value in which whole numbers are floats, in lists too; one that is too large for a float is as good as any."""
    if type(value) is int:
        return 0.0
    return [_with_floats(one) for one in value] if isinstance(value, list) else value


def _spell(hint: Any) -> str:
    """A type as a user of YAML would say it: `float or null`."""
    members = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    # Enum types are dropped: their values are written as strings, and `str` is in the same union.
    names = [
        "null" if member is type(None) else str(member) if typing.get_args(member) else member.__name__
        for member in members
        if not (isinstance(member, type) and issubclass(member, str) and member is not str)
    ]
    return " or ".join(names)


# --- YAML -------------------------------------------------------------------------------------------------------------


def _load_yaml(text: str, origin: str) -> Any:
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error


__all__ = ["DataArguments", "Recipe", "RecipeError", "RunArguments", "parse_overrides", "read_recipe"]
