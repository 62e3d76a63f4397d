# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the commands that tokenize share: the options that say what is trained on, and what these make."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.data.examples import Judge
    from sft.data.labels import Labelling

Model = Annotated[str, typer.Option(metavar="PATH", help="The model to train, for its tokenizer and chat template.")]
Template = Annotated[
    str | None,
    typer.Option(
        "--chat-template-path", metavar="FILE", help="Jinja file, or shipped name, instead of the tokenizer's."
    ),
]
MaxLength = Annotated[int, typer.Option(help="Tokens kept of a row; 0 keeps all. As in the recipe.", min=0)]
LastTurn = Annotated[bool, typer.Option("--last-turn-only", help="Train on each row's last answer alone.")]
AllTokens = Annotated[bool, typer.Option("--all-tokens", help="Train on every token (assistant_only_loss: false).")]
Sanitize = Annotated[
    bool, typer.Option("--sanitize-control-tokens", help="Encode special tokens that a text spells out, <s>, as text.")
]
NumProc = Annotated[int, typer.Option(help="Processes that tokenize.", min=1)]
TrainerName = Annotated[
    str | None,
    typer.Option("--trainer", metavar="sft|dpo|kto|grpo", help="Judge for this trainer; else as the first row looks."),
]
MaxCompletion = Annotated[
    int,
    typer.Option("--max-completion-length", help="For grpo, as in the recipe: prompts must leave so much room.", min=0),
]
RewardFuncs = Annotated[
    str | None,
    typer.Option("--reward-funcs", metavar="YAML", help="For grpo, as in the recipe: rows must suit one of them."),
]
OneData = Annotated[str, typer.Argument(metavar="DATA", help="A file (.jsonl, .json, .parquet, .gz) or OWNER/NAME.")]


def load_checked_tokenizer(
    model: str, chat_template_path: str | None, all_tokens: bool, last_turn_only: bool
) -> "PreTrainedTokenizerBase":
    """The tokenizer, with a template that ends what it lets the model learn."""
    from sft.tokenizer import check_stop_token, load_tokenizer

    tokenizer, stop_ids = load_tokenizer(model, chat_template_path)
    check_stop_token(tokenizer, stop_ids, assistant_only_loss=not all_tokens, last_turn_only=last_turn_only)
    return tokenizer


def choose_trainer(trainer: str | None, data: str | Sequence[str], conversations_only: Sequence[str]) -> str:
    """The trainer that data are judged for: the one that is named, else the one that the first row looks made for.

    Args:
        trainer: as it is named.
        data: files.
        conversations_only: options that were given and mean something for `sft` alone.

    Raises:
        ValueError: there is no such trainer, or an option would do nothing.
    """
    from sft.data.kinds import detect_trainer

    if trainer not in (None, "sft", "dpo", "kto", "grpo"):
        raise ValueError(f"--trainer is {trainer}; expected sft, dpo, kto or grpo.")
    chosen = trainer or detect_trainer(data)
    if chosen != "sft" and conversations_only:
        raise ValueError(
            f"{conversations_only[0]} does nothing for trainer {chosen}; remove it, or pass --trainer sft."
        )
    return chosen


def make_judge(trainer: str, reward_funcs: str | None, max_completion_length: int, model: str | None) -> "Judge | None":
    """What judges the rows of a trainer; None for `sft`.

    Args:
        trainer: see [`choose_trainer`].
        reward_funcs: as YAML.
        max_completion_length: 0 is not judged.
        model: whose longest row decides how much room there is.

    Raises:
        ValueError: an option would do nothing.
    """
    from sft.data.preferences import LabelledJudge, PairJudge
    from sft.data.prompts import PromptJudge

    for option, value in (("--reward-funcs", reward_funcs), ("--max-completion-length", max_completion_length)):
        if value and trainer != "grpo":
            raise ValueError(f"{option} does nothing for trainer {trainer}; remove it.")
    if trainer == "sft":
        return None
    if trainer == "grpo":
        from sft.rewards.spec import load_rewards, read_rewards
        from sft.tokenizer import max_positions

        if max_completion_length and model is None:
            raise ValueError("only a model tells how much room there is: give --model as well.")
        return PromptJudge(
            load_rewards(read_rewards(reward_funcs)) if reward_funcs else (),
            max_completion_length=max_completion_length,
            max_positions=max_positions(model) if max_completion_length and model else None,
        )
    return PairJudge() if trainer == "dpo" else LabelledJudge()


def make_labelling(max_length: int, last_turn_only: bool, all_tokens: bool, sanitize: bool) -> "Labelling":
    """What is trained on of each row, as the options say; a max_length of 0 keeps all tokens."""
    from sft.data.labels import Labelling

    return Labelling(
        max_length or None,
        assistant_only_loss=not all_tokens,
        last_turn_only=last_turn_only,
        sanitize_control_tokens=sanitize,
    )
