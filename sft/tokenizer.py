# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The tokenizer of the model that is trained, with its chat template: loading it, and what data must know of it."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.checkpoint.errors import CheckpointError, one_line
from conversion.checkpoint.sources import check_utf8
from conversion.checkpoint.strict_json import read_json_object
from conversion.hub.small_files import check_json_settings
from conversion.masked import MASKED_MODEL_TYPE
from sft import SFTError
from sft.shipped import find_shipped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenizerError(SFTError):
    """There is no usable tokenizer. The message names the model or the file."""


def load_tokenizer(
    model: str | Path, chat_template_path: str | Path | None = None, revision: str | None = None
) -> tuple["PreTrainedTokenizerBase", set[int]]:
    """Load a model's tokenizer, with a chat template, and the ids that end generation. No code of it is executed.

    Args:
        model: a Hub folder or the name of a model on the Hub.
        chat_template_path: a Jinja file instead of the tokenizer's own template, or the name of a shipped one.
        revision: of the model on the Hub.

    Raises:
        TokenizerError: there is no such model or file, a file of it is damaged, it grows by masks, or it has no chat
            template, or nothing that ends generation.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    import modeling_teleflm  # noqa: F401  (registers the architecture with the Auto classes)

    _check_folder(Path(model))
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(model, **source)
        tokenizer = AutoTokenizer.from_pretrained(model, **source)
        try:
            generation = GenerationConfig.from_pretrained(model, **source)
        except OSError:
            generation = GenerationConfig.from_model_config(config)
        if chat_template_path:
            tokenizer.chat_template = find_template(chat_template_path).read_text(encoding="utf-8")
    except TokenizerError:
        raise
    except Exception as error:  # sentencepiece, tokenizers and transformers have no family of errors between them
        raise TokenizerError(f"{model}: {one_line(error)}") from error

    if not tokenizer.chat_template:
        raise TokenizerError(f"{model} has no chat template; give one as a Jinja file (chat_template_path).")
    stop_ids = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    if stop_ids is None:
        raise TokenizerError(f"{model} has no eos_token_id in generation_config.json or config.json, nor an eos_token.")
    return tokenizer, set(stop_ids) if isinstance(stop_ids, list) else {stop_ids}


def max_positions(model: str | Path, revision: str | None = None) -> int:
    """How many tokens a model can read, as its configuration says.

    Args:
        model: a Hub folder or the name of a model on the Hub, whose tokenizer was loaded.
        revision: of the model on the Hub.
    """
    from transformers import AutoConfig

    import modeling_teleflm  # noqa: F401  (registers the architecture with the Auto classes)

    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    return int(config.max_position_embeddings)


def find_template(path: str | Path) -> Path:
    """The Jinja file of this path; a bare name without one is that of a shipped template (see [`sft.shipped`]).

    Raises:
        TokenizerError: there is neither.
    """
    if Path(path).is_file() or Path(path).name != str(path) or Path(path).suffix:
        return Path(path)
    try:
        return find_shipped(str(path), "template")
    except LookupError as error:
        raise TokenizerError(f"there is no file {path}, and {error.args[0]}") from None


def _check_folder(folder: Path) -> None:
    """Refuse, before a library does in words of its own, a folder whose settings are damaged or that is half-grown."""
    if not (folder / "config.json").is_file():
        return
    try:
        check_utf8(folder)
        check_json_settings(folder)
        model_type = read_json_object(folder / "config.json", infinite=True).get("model_type")
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error
    if model_type == MASKED_MODEL_TYPE:
        raise TokenizerError(
            f"{folder}: grows by masks (model_type is {MASKED_MODEL_TYPE}) and cannot be fine-tuned yet: `teleflm "
            "fold` it first, or go on growing it with `teleflm train`."
        )


def check_stop_token(
    tokenizer: "PreTrainedTokenizerBase",
    stop_ids: Collection[int],
    assistant_only_loss: bool = True,
    last_turn_only: bool = False,
) -> None:
    """Check that the chat template ends an assistant's turn with a stop token, and that the token is trained on.

    Without it a model learns what to say and never to stop; no loss shows that.

    Args:
        tokenizer: with the chat template in question.
        stop_ids: the ids that end generation.
        assistant_only_loss: whether only the template's `{% generation %}` blocks are trained on.
        last_turn_only: whether of those the last of each row alone is; then what ends an earlier one does not matter.

    Raises:
        TokenizerError: the template cannot be rendered, nothing is trained on, or the last trained token of a turn is
            no stop token.
    """
    turns = [{"role": role, "content": "text"} for role in ("user", "assistant", "user")]
    # A template may close a turn only when another follows, or only when none does.
    for messages in (turns[:2], turns) if assistant_only_loss and not last_turn_only else (turns[:2],):
        try:
            encoding: Any = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=assistant_only_loss
            )
        except Exception as error:  # a template may fail as any program
            where = f"the chat template of {tokenizer.name_or_path}" if tokenizer.name_or_path else "the chat template"
            raise TokenizerError(f"{where} cannot be rendered: {one_line(error)}") from error
        mask = encoding["assistant_masks"] if assistant_only_loss else [1] * len(encoding["input_ids"])
        trained = [token for token, marked in zip(encoding["input_ids"], mask, strict=True) if marked]
        while trained and not str(tokenizer.decode(trained[-1:])).strip():
            trained.pop()
        if not trained:
            raise TokenizerError(
                "the chat template marks no token of an assistant's turn as trained; put what the assistant says "
                "between {% generation %} and {% endgeneration %}, or set assistant_only_loss: false."
            )
        if trained[-1] not in stop_ids:
            stops = ", ".join(f"{tokenizer.decode([stop])!r}" for stop in sorted(stop_ids))
            end = f"is {tokenizer.decode(trained[-1:])!r}, not a stop token ({stops})"
            if messages is turns:
                raise TokenizerError(
                    f"the last trained token of an assistant's turn that another turn follows {end}: the model would "
                    "learn to stop only from the last message of a row. Set last_turn_only: true to train on that "
                    "alone, or end each {% generation %} block of the chat template with the eos_token."
                )
            raise TokenizerError(
                f"the last trained token of an assistant's turn {end}: the model would not learn to stop after "
                "it. End the {% generation %} block of the chat template with the eos_token."
            )


def require_fixed_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a chat template whose text is another one each time: what is tokenized once could not stand for it.

    Args:
        tokenizer: with the chat template in question.

    Raises:
        TokenizerError: it asks for the time, or for chance; the message names by what.
    """
    if name := _find_change(str(tokenizer.chat_template)):
        raise TokenizerError(
            f"the chat template uses {name}, so that a conversation is another text each time, and what was tokenized "
            "before would be trained on with the time or chance of then; write a fixed text in its place, in a copy of "
            "the template (chat_template_path)."
        )


@lru_cache(maxsize=16)
def _find_change(template: str) -> str | None:
    """The first name in a template that stands for the time or for chance: of transformers, or of jinja."""
    from jinja2 import Environment, TemplateError

    try:
        words = [text for _, kind, text in Environment().lex(template) if kind in ("name", "operator", "string")]
    except TemplateError:  # rendering it says what is wrong with it
        return None
    for one, other, word in zip(["", "", *words], ["", *words], words, strict=False):
        is_filter = other == "|" or (one, other) == ("map", "(")
        if (word in ("strftime_now", "lipsum") and other != ".") or (is_filter and word.strip("'\"") == "random"):
            return word.strip("'\"")
    return None


def find_left_out(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> str | None:
    """What of a conversation the chat template would leave out without a word: a field or role it does not know.

    Args:
        messages, tools: of a [`sft.data.checks.Conversation`].

    Returns:
        the first of `tools`, `tool_calls`, `tool` and `reasoning_content` that is so, or None.
    """
    said = {"tools"} if tools else set()
    for message in messages:
        said |= {"tool_calls", "reasoning_content"} & message.keys() | {"tool"} & {message["role"]}
    if not said:
        return None
    return next((name for name in _left_out(tokenizer, str(tokenizer.chat_template)) if name in said), None)


@lru_cache(maxsize=16)
def _left_out(tokenizer: "PreTrainedTokenizerBase", template: str) -> tuple[str, ...]:
    """Those names of [`find_left_out`] that a template renders as if they were not there."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    ask, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    calls, result = {**answer, "tool_calls": [call]}, {"role": "tool", "content": "result"}
    schema = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}

    def render(*messages: Any, tools: Any = None) -> str | None:
        try:
            return str(tokenizer.apply_chat_template([*messages], tools=tools, chat_template=template, tokenize=False))
        except Exception:  # it has its own word for it, which the row will get
            return None

    pairs = {
        "tools": (render(ask, answer, tools=[schema]), render(ask, answer)),
        "tool_calls": (render(ask, calls), render(ask, answer)),
        "tool": (render(ask, calls, result), render(ask, calls, {**result, "content": "other"})),
        "reasoning_content": (render(ask, {**answer, "reasoning_content": "thought"}), render(ask, answer)),
    }
    return tuple(name for name, (one, other) in pairs.items() if one is not None and one == other)


def control_tokens(tokenizer: "PreTrainedTokenizerBase", sanitized: bool = False) -> list[str]:
    """The texts that become one token wherever they stand: special tokens, and the markers of the chat template.

    A marker such as `<_user>` is not a special token to transformers: sentencepiece calls it a user-defined symbol.

    Args:
        sanitized: without those that `sanitize_control_tokens` encodes as ordinary text.

    Raises:
        TokenizerError: texts are to be sanitized, which with masks only Tele-FLM's own tokenizer can.
    """
    markers = _markers(str(tokenizer.chat_template)) & tokenizer.get_vocab().keys()
    added = tokenizer.get_added_vocab().keys() - {tokenizer.unk_token}
    if not sanitized:
        return sorted(markers | added)
    from modeling_teleflm import TeleFLMTokenizer

    if not isinstance(tokenizer, TeleFLMTokenizer):
        raise TokenizerError(
            f"sanitize_control_tokens is true, and only a TeleFLMTokenizer can, not a {type(tokenizer).__name__}; set "
            "it to false, and rewrite texts that contain a control token."
        )
    return sorted(markers - added)


def family_control_tokens(sanitized: bool = False) -> list[str]:
    """The control tokens of Tele-FLM's own tokenizer and template, known without loading either.

    Args:
        sanitized: see [`control_tokens`].
    """
    from conversion.architecture import package_folder

    template = (package_folder() / "chat_template.jinja").read_text(encoding="utf-8")
    # What encloses tools and reasoning there is no token of the family's.
    special = set() if sanitized else {"<s>", "</s>"}
    return sorted(special | {marker for marker in _markers(template) if marker.startswith("<_")})


def _markers(template: str) -> set[str]:
    return set(re.findall(r"<[^<>\s]+>", template))


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A digest of all that decides which ids a text becomes, the chat template apart; equal for equal tokenizers."""
    import xxhash

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    vocab_file: str | None = getattr(tokenizer, "vocab_file", None)
    if backend is not None:
        # How long the last batch was padded and cut is kept there too, and decides nothing.
        state = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
        rules = json.dumps(state, sort_keys=True).encode()
    elif vocab_file:
        rules = Path(vocab_file).read_bytes()
    else:
        rules = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
    around = {
        "added": sorted((name, index) for name, index in tokenizer.get_added_vocab().items()),
        "special": {role: str(token) for role, token in tokenizer.special_tokens_map.items()},
    }
    return xxhash.xxh3_128_hexdigest(rules + json.dumps(around, sort_keys=True).encode())


__all__ = [
    "TokenizerError",
    "check_stop_token",
    "control_tokens",
    "family_control_tokens",
    "find_left_out",
    "find_template",
    "load_tokenizer",
    "tokenizer_digest",
]
