# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the model says to fixed prompts, before the first step, every few steps, and in the end.

Texts are generated greedily by the model as it is, in evaluation mode, one prompt at a time and so without padding; on
several processes each takes its share of the prompts. Training goes on as it would have without: modes and random
states are put back, and greedy generation draws nothing.

`samples.jsonl` in the output folder has a line for each text: `step`, `prompt` (its number), `messages`, `text`,
`new_tokens`, `ended` (by a stop token; else cut at `sample_max_new_tokens`), `session` (see [`sft.training.run_log`]).
"""

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import DistributedType, gather_object
from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK

from conversion.checkpoint.errors import one_line
from sft import SFTError
from sft.data.checks import check_turns, message_of
from sft.data.formats import SUFFIXES, DataError, Turn, find_turns, read_rows, turns_of
from sft.tokenizer import control_tokens
from sft.training.run_log import SAMPLES, append_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.training.watch import WatchMixin

logger = logging.getLogger(__name__)

MOST_PROMPTS = 64
_PROMPT_FILES = (*SUFFIXES, ".txt")
# Trackers that take texts; MLflow's takes numbers alone.
_TEXT_TRACKERS = ("tensorboard", "wandb", "trackio")


class SampleError(SFTError):
    """What is to be sampled is refused. The message names the prompt."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that the model is to continue.

    Args:
        messages: the last one is the user's.
        input_ids: by the chat template, ending where the assistant begins.
    """

    messages: list[dict[str, str]]
    input_ids: list[int]


def read_prompts(
    given: str | Sequence[Any],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_new_tokens: int,
    max_positions: int | None,
) -> list[Prompt]:
    """Prompts of a recipe, checked and rendered.

    Args:
        given: a list of texts, or of conversations as lists of messages; or a file: `.txt` with a prompt a line, or one
            of [`sft.data.formats`] with a conversation a row, of which an answer at the end is left out.
        tokenizer: with the chat template.
        max_new_tokens: that are to be generated.
        max_positions: of the model.

    Raises:
        SampleError: there is none, or one is no conversation, spells out control tokens, is refused by the template, or
            is too long.
    """
    turns = _from_file(given) if isinstance(given, str) else _inline(given)
    if not turns:
        raise SampleError("sample_prompts has no prompt; give one, or delete the key.")
    if len(turns) > MOST_PROMPTS:
        raise SampleError(
            f"sample_prompts has {len(turns)} prompts, and at most {MOST_PROMPTS} are sampled; give a few of them."
        )
    spelled = control_tokens(tokenizer)
    return [_render(where, found, tokenizer, spelled, max_new_tokens, max_positions) for where, found in turns]


def _inline(given: Sequence[Any]) -> list[tuple[str, list[Turn]]]:
    found = []
    for number, prompt in enumerate(given, 1):
        where = f"sample_prompts: prompt {number}"
        if isinstance(prompt, str):
            found.append((where, [Turn("it", "user", prompt)]))
            continue
        messages = prompt.get("messages") if isinstance(prompt, Mapping) else prompt
        turns, problems = turns_of(messages, "messages")
        if problems:
            raise SampleError(f"{where}: {problems[0].detail}.")
        found.append((where, turns))
    return found


def _from_file(name: str) -> list[tuple[str, list[Turn]]]:
    path = Path(name)
    if not name.endswith(_PROMPT_FILES) or not path.is_file():
        raise SampleError(
            f"sample_prompts is {name!r}, which is no file of {', '.join(_PROMPT_FILES)}; prompts themselves are a "
            "list: [text, text]."
        )
    found: list[tuple[str, list[Turn]]] = []
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SampleError(f"sample_prompts: {name}: cannot be read: {one_line(error)}") from None
        return [
            (f"sample_prompts: {name}:{number}", [Turn("it", "user", line.rstrip("\r"))])
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    try:
        for row in read_rows(name):
            if row.problem:
                raise SampleError(f"sample_prompts: {row.source}: {row.problem.detail}.")
            turns, problems = find_turns(row.value)
            if problems:
                raise SampleError(f"sample_prompts: {row.source}: {problems[0].detail}.")
            if len(turns) > 1 and turns[-1].role == "assistant":
                turns = turns[:-1]
            found.append((f"sample_prompts: {row.source}", turns))
            if len(found) > MOST_PROMPTS:
                raise SampleError(f"sample_prompts: {name} has more than {MOST_PROMPTS} rows; give a few of them.")
    except DataError as error:
        raise SampleError(f"sample_prompts: {error}") from None
    return found


def _render(
    where: str,
    turns: list[Turn],
    tokenizer: "PreTrainedTokenizerBase",
    spelled: Sequence[str],
    max_new_tokens: int,
    max_positions: int | None,
) -> Prompt:
    if not turns or turns[-1].role != "user":
        role = turns[-1].role if turns else None
        raise SampleError(f"{where}: its last message has role {role!r}, expected user: the model answers it.")
    problems = [problem for problem in check_turns(turns, spelled) if problem.code != "no_assistant"]
    if problems:
        raise SampleError(f"{where}: {problems[0].detail}.")
    messages = [message_of(turn) for turn in turns]
    try:
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # a template may fail as any program
        raise SampleError(f"{where}: the chat template refuses it: {one_line(error)}") from None
    ids = [int(token) for token in encoded["input_ids"]]
    if not ids:
        raise SampleError(f"{where}: the chat template makes no token of it.")
    if max_positions is not None and len(ids) + max_new_tokens > max_positions:
        raise SampleError(
            f"{where}: it has {len(ids)} tokens, which with sample_max_new_tokens {max_new_tokens} are more than "
            f"max_position_embeddings, {max_positions}; shorten one of the two."
        )
    return Prompt(messages, ids)


def check_whole(distributed: DistributedType, keys: Sequence[str]) -> None:
    """Refuse to compute with a whole model where a process may have a part of one.

    Args:
        distributed: how the run is spread.
        keys: of the recipe that ask for it.

    Raises:
        SampleError: there are some, and the run is spread by FSDP or DeepSpeed.
    """
    if keys and distributed in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise SampleError(
            f"{', '.join(keys)}: the run is {distributed.value}, which may leave each process a part of the weights, "
            "and this needs all of them; delete the key, and use `teleflm chat` or `teleflm eval` on what is saved."
        )


class SampleCallback(TrainerCallback):
    """Generates texts before the first step, every `every` steps, and after the last one.

    Args:
        trainer: of the run, with its stopwatch, and the number of its session.
        prompts: from [`read_prompts`].
        every: steps; 0: at the beginning and in the end only.
        max_new_tokens: of a text.
        stop_ids: that end one.
    """

    def __init__(
        self,
        trainer: "WatchMixin",
        prompts: Sequence[Prompt],
        *,
        every: int,
        max_new_tokens: int,
        stop_ids: Sequence[int],
    ) -> None:
        self.trainer, self.prompts, self.every = trainer, prompts, every
        tokenizer: Any = trainer.processing_class
        self.tokenizer = tokenizer
        self.config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=sorted(stop_ids),
            pad_token_id=tokenizer.pad_token_id,
        )
        self._sampled: set[int] = set()
        self._broken = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Of the model before training."""
        if state.global_step == 0:
            self._sample(args, state, control, 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Every few steps, and after the last one."""
        if (self.every and state.global_step % self.every == 0) or state.global_step >= state.max_steps:
            self._sample(args, state, control, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Of the model that is saved: that of the last step, or the best one."""
        is_best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        step = state.best_global_step if is_best else state.global_step
        if step is not None and step not in self._sampled:
            self._sample(args, state, control, step)

    def _sample(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, step: int) -> None:
        self._sampled.add(step)
        rank, world = args.process_index, args.world_size
        with self.trainer.stopwatch.excluded():
            mine = list(range(rank, len(self.prompts), world))
            texts = self._generate([self.prompts[number] for number in mine])
            lines = [
                {
                    "step": step,
                    "prompt": number,
                    "messages": self.prompts[number].messages,
                    **text,
                }
                for number, text in zip(mine, texts, strict=False)
            ]
            everyones = gather_object(lines) if world > 1 else lines
            if state.is_world_process_zero:
                session = self.trainer.session  # which process 0 alone knows
                ordered = [{**line, "session": session} for line in sorted(everyones, key=lambda line: line["prompt"])]
                self._write(ordered)
                self._report(args, state, control, ordered)

    def _generate(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """The texts; none if that fails, as without memory for them, which is no reason to end a run."""
        try:
            return generate_texts(self.trainer.model, self.tokenizer, prompts, self.config)
        except Exception as error:  # of a model and a tokenizer that may be anything
            self._warn(f"no samples: {one_line(error)}")
            return []

    def _warn(self, what: str) -> None:
        if not self._broken:
            logger.warning("%s: %s; the run goes on", self.trainer.args.output_dir, what)
        self._broken = True

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        path = Path(str(self.trainer.args.output_dir)) / SAMPLES
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for line in lines:
                append_line(path, line)
        except OSError as error:
            self._warn(f"{SAMPLES} cannot be written: {one_line(error)}")

    def _report(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, lines: Sequence[Mapping[str, Any]]
    ) -> None:
        """Hand the texts to the trackers that take some."""
        logs = {f"sample_{line['prompt'] + 1}": str(line["text"]) for line in lines}
        kinds: Any = tuple(INTEGRATION_TO_CALLBACK[name] for name in _TEXT_TRACKERS)
        callbacks: Any = self.trainer.callback_handler.callbacks
        for callback in callbacks:
            if isinstance(callback, kinds):
                callback.on_log(args, state, control, logs=dict(logs), model=self.trainer.model)


def generate_texts(
    model: Any, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], config: GenerationConfig
) -> list[dict[str, Any]]:
    """Let a model continue prompts, and leave it, and all random states, as they were.

    Returns:
        for each `text`, `new_tokens` and `ended`: whether a stop token ended it, which is not in the text.
    """
    stops = config.eos_token_id
    texts = []
    with as_it_was(model), torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt.input_ids], device=model.device)
            whole = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, synced_gpus=False
            )
            new = whole[0, ids.shape[1] :].tolist()
            ended = bool(new) and new[-1] in stops
            text = decode(tokenizer, new[:-1] if ended else new)
            texts.append({"text": text, "new_tokens": len(new), "ended": ended})
    return texts


def decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of token ids; special tokens are shown, and so are ids that no token has, as `<id 80001>`.

    A model's vocabulary is larger than its tokenizer's where it was padded, and an untrained model says anything.
    """
    parts = []
    for known, run in groupby(ids, key=lambda token: token < len(tokenizer)):
        tokens = list(run)
        parts += [str(tokenizer.decode(tokens))] if known else [f"<id {token}>" for token in tokens]
    return "".join(parts)


@contextmanager
def as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module has its own mode, and every random generator its own state."""
    modes = {module: module.training for module in model.modules()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            random.setstate(python)
            np.random.set_state(numpy)


__all__ = [
    "MOST_PROMPTS",
    "Prompt",
    "SampleCallback",
    "SampleError",
    "as_it_was",
    "check_whole",
    "decode",
    "generate_texts",
    "read_prompts",
]
