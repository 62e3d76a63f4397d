# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the commands that tokenize share: the options that say what is trained on, and what these make."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
OneData = Annotated[str, typer.Argument(metavar="DATA", help="A file (.jsonl, .json, .parquet, .gz) or OWNER/NAME.")]


def load_checked_tokenizer(
    model: str, chat_template_path: str | None, all_tokens: bool, last_turn_only: bool
) -> "PreTrainedTokenizerBase":
    """The tokenizer, with a template that ends what it lets the model learn."""
    from sft.tokenizer import check_stop_token, load_tokenizer

    tokenizer, stop_ids = load_tokenizer(model, chat_template_path)
    check_stop_token(tokenizer, stop_ids, assistant_only_loss=not all_tokens, last_turn_only=last_turn_only)
    return tokenizer


def make_labelling(max_length: int, last_turn_only: bool, all_tokens: bool, sanitize: bool) -> "Labelling":
    """What is trained on of each row, as the options say; a max_length of 0 keeps all tokens."""
    from sft.data.labels import Labelling

    return Labelling(
        max_length or None,
        assistant_only_loss=not all_tokens,
        last_turn_only=last_turn_only,
        sanitize_control_tokens=sanitize,
    )
