# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Tokenizer of the Tele-FLM (FLM-2) family: sentencepiece's own runtime behind transformers' interface."""

import json
import re
from collections.abc import Iterator, Mapping, Set
from itertools import groupby
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import BatchEncoding
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
from transformers.utils.chat_template_utils import get_json_schema, render_jinja_template

# Absent when this file is a Hub repository's remote code: there transformers finds the repository's own template.
_CHAT_TEMPLATE_FILE = Path(__file__).with_name("chat_template.jinja")


class TeleFLMTokenizer(SentencePieceBackend):
    """
    Tokenizer of a Tele-FLM model, read from its `tokenizer.model`.

    The text between two special tokens is encoded and decoded by sentencepiece itself, so ids are sentencepiece's ids
    and `decode(encode(text)) == text` wherever sentencepiece's normaliser keeps the text. The `tokenizer.json` beside a
    converted model makes the same ids, for programs without this code; transformers' own conversion of
    `tokenizer.model` does not: the normaliser, runs of spaces and text after `<_user>` come out differently.

    Control tokens are recognised wherever they stand, as sentencepiece does: a `<_bot>` inside a user's text becomes
    the control token. Check texts from strangers before rendering them. With `sanitize_control_tokens=True`,
    `apply_chat_template` encodes special tokens in messages, such as HTML's `<s>`, as ordinary text, and refuses the
    markers of the chat template: sentencepiece cannot encode the name of a user-defined symbol as ordinary text.

    `parse_response(ids or text, prefix=prompt)` reads what a model answers as a message again: its text, reasoning and
    tool calls, as `chat_template.jinja` writes them.

    A model's `vocab_size` is padded beyond its pieces: an id without one is the empty token, and decodes to nothing.

    Args:
        vocab_file (`str`): the sentencepiece model.
        unk_token, bos_token, eos_token, pad_token (`str`, *optional*): default to what the sentencepiece model calls
            its own; `pad_token` stays unset if it has none.
        add_bos_token (`bool`, *optional*, defaults to `True`): whether encoding starts with `bos_token`, as Llama's
            does. Chats are not affected: they begin as their template begins.
        add_eos_token (`bool`, *optional*, defaults to `False`): whether encoding ends with `eos_token`.
        special_tokens_pattern (`str`, *optional*, defaults to `"bos"`): the two flags in one word (`none`, `bos`, `eos`
            or `bos_eos`), as `save_pretrained` writes them; a flag that is given has precedence.
        **kwargs: as [`PreTrainedTokenizer`] takes them; without `chat_template`, `chat_template.jinja` from beside this
            file is used.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str,
        unk_token: str | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        special_tokens_pattern: str = "bos",
        **kwargs: Any,
    ):
        self.add_bos_token = "bos" in special_tokens_pattern if add_bos_token is None else add_bos_token
        self.add_eos_token = "eos" in special_tokens_pattern if add_eos_token is None else add_eos_token
        pieces = SentencePieceProcessor(model_file=vocab_file)
        if "chat_template" not in kwargs and _CHAT_TEMPLATE_FILE.is_file():
            kwargs["chat_template"] = _CHAT_TEMPLATE_FILE.read_text(encoding="utf-8")
        # Not legacy means another dummy prefix than sentencepiece's, and a dependency on protobuf.
        kwargs["legacy"] = True
        super().__init__(
            vocab_file=vocab_file,
            unk_token=unk_token or _piece(pieces, pieces.unk_id()),
            bos_token=bos_token or _piece(pieces, pieces.bos_id()),
            eos_token=eos_token or _piece(pieces, pieces.eos_id()),
            pad_token=pad_token or _piece(pieces, pieces.pad_id()),
            special_tokens_pattern=self.special_tokens_pattern,
            **kwargs,
        )
        if "response_template" not in kwargs:
            self.response_template = _response_template(str(self.eos_token))
        # transformers saves what init_kwargs names, except add_bos_token and add_eos_token, which it leaves out.
        self.init_kwargs["special_tokens_pattern"] = self.special_tokens_pattern

    @property
    def special_tokens_pattern(self) -> str:
        """What transformers adds around a sequence: `none`, `bos`, `eos` or `bos_eos`."""
        return "_".join(["bos"] * self.add_bos_token + ["eos"] * self.add_eos_token) or "none"

    @special_tokens_pattern.setter
    def special_tokens_pattern(self, pattern: str) -> None:
        self.add_bos_token, self.add_eos_token = "bos" in pattern, "eos" in pattern

    def tokenize(self, text: str, *args: Any, **kwargs: Any) -> list[str]:
        """Split a text into pieces; special tokens stay whole unless `split_special_tokens` is given as true."""
        if kwargs.get("split_special_tokens", self.split_special_tokens):
            return self.sp_model.encode(text, out_type=str)
        pieces: list[str] = []
        for part, _, is_boundary in self._parts(text):
            pieces += [part] if is_boundary else self.sp_model.encode(part, out_type=str)
        return pieces

    def _tokenize_with_offsets(
        self, text: str, literal: Mapping[str, str] | None = None
    ) -> Iterator[tuple[str, int, int]]:
        """Yield what `tokenize` returns as (piece, start, end), in characters of `text`.

        Args:
            literal: characters that stand for the names of special tokens, as ordinary text: what is yielded is of the
                text with the names in their place.
        """
        end = 0
        for written, _, is_boundary in self._parts(text):
            part = _with_names(written, literal)
            start, end = end, end + len(part)
            if is_boundary:
                yield part, start, start + len(part)
                continue
            encoding = self.sp_model.encode(part, return_type="offset_mapping")
            for piece, (piece_start, piece_end) in zip(encoding["pieces"], encoding["offsets"], strict=True):
                # A dummy prefix, or a byte that does not end its character, is empty: it belongs to what follows it.
                yield piece, start + piece_start, start + max(piece_end, piece_start + 1)

    def _parts(self, text: str) -> Iterator[tuple[str, int, bool]]:
        """Cut a text at its boundary tokens: yield (part, start, is_boundary), none empty."""
        boundaries = self._boundaries()
        # The group keeps the boundaries among the parts; the longest name comes first, so that none hides another.
        names = "|".join(map(re.escape, sorted(boundaries, key=len, reverse=True))) or "(?!)"
        start = 0
        for part in re.split(f"({names})", text):
            if part:
                yield part, start, part in boundaries
            start += len(part)

    def _boundaries(self) -> Set[str]:
        """The tokens that cut a text into parts which sentencepiece encodes, and decodes, each on its own."""
        # To sentencepiece, "<unk>" in a text is ordinary text, and an unknown piece does not interrupt its neighbours.
        return self._added_tokens_encoder.keys() - {self.unk_token}

    def _convert_id_to_token(self, index: int) -> str:
        if index < 0:
            raise IndexError(f"{index} is no id: ids begin at 0, and labels such as -100 cannot be decoded.")
        return self.sp_model.id_to_piece(index) if index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces into text as sentencepiece does; special tokens appear by name."""
        return self._join(tokens, skipped=frozenset())

    def _join(self, tokens: list[str], skipped: frozenset[str]) -> str:
        text = ""
        for is_boundary, part in groupby(filter(None, tokens), key=self._boundaries().__contains__):
            kept = [token for token in part if token not in skipped]
            text += "".join(kept) if is_boundary else self.sp_model.decode(kept)
        return text

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = False,
        **kwargs: Any,
    ) -> str:
        tokens = self.convert_ids_to_tokens([token_ids] if isinstance(token_ids, int) else token_ids)
        # The unknown piece stands for text, which is not skipped.
        skipped = {*self.all_special_tokens} - {self.unk_token} if skip_special_tokens else set()
        text = self._join(tokens, skipped=frozenset(skipped))
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def apply_chat_template(
        self, conversation: Any, *args: Any, return_assistant_tokens_mask: bool = False, **kwargs: Any
    ) -> Any:
        """
        Render conversations and encode them: [`PreTrainedTokenizerBase.apply_chat_template`] in every respect, and
        `return_assistant_tokens_mask=True` works although this tokenizer is not a rust one, with
        `sanitize_control_tokens=True` too.

        The `assistant_masks` mark (1) each token that covers at least one character inside the template's
        `{% generation %}` blocks. Padding is never marked; truncation cuts the mask with the ids.
        """
        if len(conversation) == 0:
            raise ValueError("There is no message in the conversation.")
        if return_assistant_tokens_mask or kwargs.get("sanitize_control_tokens"):
            kwargs["return_assistant_tokens_mask"] = return_assistant_tokens_mask
            return self._apply_chat_template_by_parts(conversation, *args, **kwargs)
        return super().apply_chat_template(conversation, *args, **kwargs)

    def _apply_chat_template_by_parts(
        self,
        conversation: list[Any],
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        *,
        return_assistant_tokens_mask: bool,
        sanitize_control_tokens: bool = False,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **template_variables: Any,
    ) -> Any:
        asked = "return_assistant_tokens_mask" if return_assistant_tokens_mask else "sanitize_control_tokens"
        if not tokenize or (return_assistant_tokens_mask and not return_dict):
            needs = "tokenize=True and return_dict=True" if return_assistant_tokens_mask else "tokenize=True"
            raise ValueError(f"{asked}=True needs {needs}.")
        if continue_final_message:
            raise ValueError(f"continue_final_message and {asked}=True exclude each other.")
        batched = not isinstance(conversation[0], dict)
        conversations = conversation if batched else [conversation]
        template = self.get_chat_template(chat_template, tools)
        chats = [[_without_none(message) for message in messages] for messages in conversations]
        schemas = [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools] if tools else None
        inputs: Any = [chats, schemas, documents, template_variables]
        literal: dict[str, str] | None = None
        if sanitize_control_tokens:
            self._refuse_markers(inputs, template)
            literal = _stand_ins(inputs, self._boundaries())
            inputs = _replace_names(inputs, literal)
        rendered: Any = render_jinja_template(
            conversations=inputs[0],
            tools=inputs[1],
            documents=inputs[2],
            chat_template=template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens_map, **inputs[3]},
        )
        texts, generated = rendered
        tokens = [list(self._tokenize_with_offsets(text, literal)) for text in texts]
        ids = [self.convert_tokens_to_ids([piece for piece, _, _ in row]) for row in tokens]

        # Truncation and padding are transformers' own: the masks go through them a second time, as if they were ids.
        fit = {"padding": padding, "truncation": truncation, "max_length": max_length, **(tokenizer_kwargs or {})}
        encoding = self(ids, add_special_tokens=False, **fit)
        if return_assistant_tokens_mask:
            spans = [
                [(_length_to(start, text, literal), _length_to(end, text, literal)) for start, end in row]
                for text, row in zip(texts, generated, strict=True)
            ]
            masks = [_assistant_mask(row, row_spans) for row, row_spans in zip(tokens, spans, strict=True)]
            fitted = self(masks, add_special_tokens=False, **{**fit, "return_attention_mask": True})
            encoding["assistant_masks"] = [
                [marked * real for marked, real in zip(*row, strict=True)]
                for row in zip(fitted["input_ids"], fitted["attention_mask"], strict=True)
            ]
        if not batched and not return_tensors:
            encoding = BatchEncoding({name: rows[0] for name, rows in encoding.items()})
        else:
            encoding = encoding.convert_to_tensors(return_tensors)
        return encoding if return_dict else encoding["input_ids"]

    def _refuse_markers(self, inputs: Any, template: str) -> None:
        """Refuse texts that spell a marker of the template that is no special token, and so cannot be made text."""
        vocabulary = self.get_vocab()
        markers = {marker for marker in re.findall(r"<[^<>\s]+>", template) if marker in vocabulary}
        said = _all_text(inputs)
        if found := sorted(marker for marker in markers - self._boundaries() if marker in said):
            raise ValueError(
                f"sanitize_control_tokens: a message contains {found[0]}, and sentencepiece encodes a user-defined "
                "symbol as itself wherever it stands. Reject or rewrite such texts before rendering them."
            )


# --- what stands for special tokens in messages while they are rendered -----------------------------------------------


def _all_text(inputs: Any) -> str:
    return json.dumps(inputs, ensure_ascii=False, default=str)


def _stand_ins(inputs: Any, names: Set[str]) -> dict[str, str]:
    """For each name that messages contain, a private-use character that they do not: character -> name."""
    said = _all_text(inputs)
    # The longest first: none hides another.
    spelled = sorted((name for name in names if json.dumps(name, ensure_ascii=False)[1:-1] in said), key=len)[::-1]
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in said)
    return dict(zip(free, spelled, strict=False))


def _replace_names(value: Any, literal: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        for char, name in literal.items():
            value = value.replace(name, char)
        return value
    if isinstance(value, dict):
        return {_replace_names(key, literal): _replace_names(part, literal) for key, part in value.items()}
    return [_replace_names(part, literal) for part in value] if isinstance(value, list | tuple) else value


def _with_names(text: str, literal: Mapping[str, str] | None) -> str:
    for char, name in (literal or {}).items():
        text = text.replace(char, name)
    return text


def _length_to(place: int, text: str, literal: Mapping[str, str] | None) -> int:
    """Where a place of a text is when names stand in it."""
    return len(_with_names(text[:place], literal)) if literal else place


# --- answers ----------------------------------------------------------------------------------------------------------


def _response_template(eos_token: str) -> dict[str, Any]:
    """How `parse_response` reads what `chat_template.jinja` writes between `<_bot>` and the end of the turn."""
    verbatim = {"content": "text", "content_args": {"strip": False}}
    return {
        "defaults": {"role": "assistant", "content": ""},
        "start_anchor": "<_bot>",
        "fields": {
            # Only at the start: later, a text may speak of the tag.
            "reasoning_content": {
                "open_pattern": r"\A<think>\n?",
                "close_pattern": r"\n?</think>\n{0,2}",
                **verbatim,
            },
            "tool_calls": {
                "open_pattern": r"\n?<tool_call>\n?",
                "close_pattern": r"\n?</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            # Padding may follow the end.
            "content": {"close_pattern": re.escape(eos_token) + ".*", **verbatim},
        },
    }


def _piece(pieces: SentencePieceProcessor, index: int) -> str | None:
    return pieces.id_to_piece(index) if index >= 0 else None


def _without_none(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def _assistant_mask(tokens: list[tuple[str, int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """Mark (1) the tokens, given with their first and last-plus-one character, that touch one of the spans."""
    return [
        int(any(start < span_end and span_start < end for span_start, span_end in spans)) for _, start, end in tokens
    ]


__all__ = ["TeleFLMTokenizer"]
