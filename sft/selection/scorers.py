# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Models that score: a causal language model by the losses of tokens, a classifier by one of its outputs.

Which of the two a model is, the architecture in its config.json says. Models are loaded once a process, onto a GPU if
there is one (in bfloat16), else in float32. No code of their folders runs; weights that are missing are not made up.

Logits are the largest tensors there are: a batch of 8,192 tokens over 80,000 words takes 2.4 GiB in float32, and a loss
makes copies of them. So the layers run on a batch, and the head and the loss on [`HEAD_BYTES`] of logits at a time, of
those tokens alone whose loss is asked for. The head is the model's own `forward` around a decoder that hands out what
it has computed before, so whatever that does to logits (a factor, a soft cap) is done.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conversion.checkpoint.errors import one_line

from .stages import SelectionError

if TYPE_CHECKING:
    import torch
    from torch import nn

CAUSAL, CLASSIFIER = "causal", "classifier"
CAUSAL_TOKENS = 1024
CLASSIFIER_TOKENS = 4096
BATCH_TOKENS = 8192
HEAD_BYTES = 1 << 26
_CAUSAL_NAMES = ("ForCausalLM", "LMHeadModel")
_CLASSIFIER_NAMES = ("ForSequenceClassification",)
FORMATS = TEMPLATE, PLAIN = ("template", "plain")
SCORER = "--scorer"
_IGNORED = -100
_PROBE_TOKENS = 8
_NO_WINDOW = 1 << 30


def model_kind(name: str, flag: str = SCORER) -> str:
    """[`CAUSAL`] or [`CLASSIFIER`], by the architecture in config.json.

    Args:
        name: a Hub folder or the name of a model on the Hub.
        flag: begins the messages.

    Raises:
        SelectionError: there is no such model, or it is neither.
    """
    from transformers import AutoConfig

    import modeling_teleflm  # noqa: F401  (registers the architecture with the Auto classes)

    with _refused(name, f"{flag} {name}"):
        architectures = AutoConfig.from_pretrained(name, trust_remote_code=False).architectures or []
    for kind, endings in ((CLASSIFIER, _CLASSIFIER_NAMES), (CAUSAL, _CAUSAL_NAMES)):
        if any(architecture.endswith(endings) for architecture in architectures):
            return kind
    found = ", ".join(architectures) or "no architecture"
    expected = "a causal language model (...ForCausalLM) or a reward model (...ForSequenceClassification)"
    raise SelectionError(f"{flag} {name}: its config.json names {found}, expected {expected}.")


# --- causal language models -------------------------------------------------------------------------------------------


class CausalScorer:
    """A causal language model and its tokenizer.

    Args:
        model: in evaluation mode.
        tokenizer: its own.

    Attributes:
        start: the token every sequence begins with: BOS, else EOS, else 0.
        window: tokens of a sequence, at most [`CAUSAL_TOKENS`].
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        starts = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
        self.start: int = next(start for start in starts if start is not None)
        self.window = min(CAUSAL_TOKENS, model_window(model))
        self._decoder = _find_decoder(model)

    @classmethod
    def load(cls, name: str, flag: str = SCORER) -> "CausalScorer":
        """Raises: SelectionError, if the model cannot be loaded; `flag` begins the message."""
        from transformers import AutoModelForCausalLM

        return cls(*load_model(name, AutoModelForCausalLM, f"{flag} {name}"))

    def losses(self, sequences: Sequence[tuple[list[int], list[int]]]) -> np.ndarray:
        """Sum of the losses, in nats, of the labelled tokens of each sequence, and their number.

        Args:
            sequences: ids, at most `window`, and labels of as many places, -100 where a token does not count.

        Returns:
            float64 `[sequences, 2]`. A loss is computed in float32, or the model's dtype if that is wider.
        """
        import torch

        result = np.zeros((len(sequences), 2))
        for batch in length_batches([len(ids) for ids, _ in sequences], BATCH_TOKENS):
            ids = _pad([sequences[index][0] for index in batch], 0)
            labels = _pad([sequences[index][1] for index in batch], _IGNORED)[:, 1:]
            found = [np.empty(0)]
            with torch.inference_mode():
                for logits, targets in self._logits(ids.to(self.model.device), labels.to(self.model.device)):
                    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                    losses = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
                    found.append(losses.double().cpu().numpy())
            owners = (labels != _IGNORED).nonzero()[:, 0].numpy()
            result[batch, 0] = np.bincount(owners, weights=np.concatenate(found), minlength=len(batch))
            result[batch, 1] = np.bincount(owners, minlength=len(batch))
        return result

    def _logits(self, ids: "torch.Tensor", labels: "torch.Tensor") -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        """Logits `[tokens, vocab_size]` of labelled tokens, row after row, and their labels, a chunk at a time.

        Rows end in padding, which no token before it sees: a causal model needs no mask for that.

        Args:
            ids: `[rows, length]`.
            labels: `[rows, length - 1]`, of the token after each.
        """
        wanted = labels != _IGNORED
        if self._decoder is None:
            for row, places, own in zip(ids, wanted, labels, strict=True):
                yield self.model(input_ids=row[None], use_cache=False).logits[0, :-1][places], own[places]
            return
        hidden = self._decoder(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][wanted]
        tokens = max(1, HEAD_BYTES // (4 * self.model.get_output_embeddings().weight.shape[0]))
        for chunk, own in zip(hidden.split(tokens), labels[wanted].split(tokens), strict=True):
            yield apply_head(self.model, self._decoder, chunk), own


def apply_head(model: Any, decoder: "nn.Module", hidden: "torch.Tensor") -> "torch.Tensor":
    """What the model makes of hidden states: its own `forward`, whose decoder hands out these.

    Args:
        model: a causal language model.
        decoder: the module that its `forward` calls for `last_hidden_state`.
        hidden: `[tokens, hidden_size]`.

    Returns:
        logits `[tokens, vocab_size]`.
    """
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    answer = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden[None])
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    with _answering(decoder, lambda *_, **__: answer):
        return model(input_ids=ids, use_cache=False).logits[0]


@contextmanager
def _answering(module: "nn.Module", answer: Callable[..., Any]) -> Iterator[None]:
    """A module that gives an answer instead of computing one."""
    module.forward = answer
    try:
        yield
    finally:
        del module.forward  # the class's own is behind it


def _find_decoder(model: Any) -> "nn.Module | None":
    """The module whose hidden states the head reads; None if the head cannot be told from the rest of the model."""
    import torch

    ids = torch.arange(1, 1 + min(_PROBE_TOKENS, model_window(model)), device=model.device)[None]
    ids = ids % model.get_input_embeddings().weight.shape[0]
    for decoder in (model.base_model, model.get_decoder()):
        if decoder is None or decoder is model or "forward" in vars(decoder):
            continue
        try:
            with torch.inference_mode():
                expected = model(input_ids=ids, use_cache=False).logits[0].float()
                hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
                # Backwards: a model that computes hidden states of its own instead gives them in another order.
                found = apply_head(model, decoder, hidden.flip(0)).float().flip(0)
        except Exception:  # whatever a model that is built otherwise raises
            continue
        limit = max(1e-4, 4 * torch.finfo(model.dtype).eps) * expected.abs().max()
        if found.shape == expected.shape and (found - expected).abs().max() <= limit:
            return decoder
    return None


# --- classifiers ------------------------------------------------------------------------------------------------------


class ClassifierScorer:
    """A classifier, such as a reward model, and its tokenizer.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        label: whose probability is the score, if the model has several; with a single one its output is the score.
        plain: read texts separated by blank lines, not by the tokenizer's chat template.
        name: of the model, in messages.

    Attributes:
        window: tokens of a sequence, at most [`CLASSIFIER_TOKENS`].

    Raises:
        SelectionError: there are several labels, and `label` is none of them; or there is no chat template, or one that
            cannot be filled in.
    """

    def __init__(
        self, model: Any, tokenizer: Any, label: str | None = None, *, plain: bool = False, name: str = "MODEL"
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.window = min(CLASSIFIER_TOKENS, model_window(model), tokenizer.model_max_length)
        self._output = _find_label(model.config, label, name)
        self._plain = plain
        if tokenizer.chat_template is None and not plain:
            raise SelectionError(
                f"--scorer {name}: its tokenizer has no chat template, so how it expects a conversation is not known; "
                f"if it reads plain text, give --scorer-format {PLAIN}."
            )
        if not plain:
            _probe_template(tokenizer, name)

    @classmethod
    def load(cls, name: str, label: str | None = None, *, plain: bool = False) -> "ClassifierScorer":
        """Raises: SelectionError, if the model cannot be loaded or used."""
        from transformers import AutoModelForSequenceClassification

        return cls(
            *load_model(name, AutoModelForSequenceClassification, f"{SCORER} {name}"), label, plain=plain, name=name
        )

    def scores(self, chats: Iterable[Sequence[dict[str, str]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One number a conversation, the higher the better, whether its beginning did not fit, and whether it was read.

        Returns:
            float32 `[chats]`: the output of a model with one label, else the probability of the label; NaN where the
            chat template refuses the conversation, or the model makes no number. bool `[chats]`, twice; of the second,
            False where the chat template refuses the conversation.
        """
        import torch

        rows = [self._encode(messages) for messages in chats]
        cut = np.array([len(row) > self.window for row in rows], bool)
        kept = [self._keep_end(row) for row in rows]
        found = np.full(len(rows), np.nan, np.float32)
        some = [index for index, row in enumerate(kept) if row]
        pad = self.model.config.get_text_config().pad_token_id
        # Where the last token of a row is, a decoder tells by the padding; without, it takes a row at a time.
        limit = BATCH_TOKENS if pad is not None else 0
        for batch in length_batches([len(kept[index]) for index in some], limit):
            batch = [some[index] for index in batch]
            ids = _pad([kept[index] for index in batch], pad or 0)
            mask = _pad([[1] * len(kept[index]) for index in batch], 0)
            with torch.inference_mode():
                inputs = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
                logits = self.model(**inputs).logits.float()
            found[batch] = self._choose(logits).cpu().numpy()
        return found, cut, np.array([bool(row) for row in rows], bool)

    def _encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        from jinja2.exceptions import TemplateError

        if self._plain:
            return self.tokenizer("\n\n".join(message["content"] for message in messages), verbose=False)["input_ids"]
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False)
        except TemplateError:  # such as of a template without system prompts
            return []

    def _keep_end(self, row: list[int]) -> list[int]:
        """What fits of a row: its end, where the answer is, after the token that every row begins with."""
        if len(row) <= self.window:
            return row
        first = row[: row[0] in self.tokenizer.all_special_ids]
        return first + row[len(row) - self.window + len(first) :]

    def _choose(self, logits: "torch.Tensor") -> "torch.Tensor":
        if self._output is None:
            return logits[:, 0]
        if self.model.config.problem_type == "multi_label_classification":
            return logits[:, self._output].sigmoid()
        return logits.softmax(-1)[:, self._output]


def _probe_template(tokenizer: Any, name: str) -> None:
    """Refuse a chat template that is damaged: it would refuse all rows, one by one, and not say why."""
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    way_out = f"mend it, or, if the model reads plain text, give --scorer-format {PLAIN}."
    probe = [{"role": "user", "content": "What is a cat?"}, {"role": "assistant", "content": "An animal."}]
    try:
        empty = not tokenizer.apply_chat_template(probe, tokenize=True, return_dict=False)
    except Exception as error:
        if type(error) is TemplateError:  # raised by the template's own choice, which may depend on the row
            return
        line = f" at line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise SelectionError(
            f"--scorer {name}: its chat template fails{line}: {one_line(error).rstrip('.')}; {way_out}"
        ) from error
    if empty:
        raise SelectionError(f"--scorer {name}: its chat template makes no token of a conversation; {way_out}")


def _find_label(config: Any, label: str | None, name: str) -> int | None:
    """The output that is the score; None if there is one alone."""
    labels = [config.id2label[index] for index in range(config.num_labels)]
    if label is None and len(labels) == 1:
        return None
    if label in labels:
        return labels.index(label)
    choice = f"it has {', '.join(labels)}"
    if label is None:
        raise SelectionError(f"--scorer {name}: which label is the score? {choice}; give --scorer-label.")
    raise SelectionError(f"--scorer-label {label}: is no label of --scorer {name}; {choice}.")


# --- both -------------------------------------------------------------------------------------------------------------


def model_window(model: Any) -> int:
    """Tokens that a model can read: `max_position_embeddings`, without those places that padding takes (RoBERTa)."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _NO_WINDOW
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            window = min(window, module.num_embeddings - module.padding_idx - 1)
    return window


def length_batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Numbers of rows, longest first, in batches of at most so many tokens with padding, or of one row."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    while order:
        longest = max(1, lengths[order[-1]])
        yield [order.pop() for _ in range(min(len(order), max(1, tokens // longest)))]


def _pad(rows: Sequence[Sequence[int]], value: int) -> "torch.Tensor":
    """int64 `[rows, longest]`, padded at the end."""
    import torch

    padded = torch.full((len(rows), max(map(len, rows))), value)
    for row, own in zip(padded, rows, strict=True):
        row[: len(own)] = torch.tensor(own)
    return padded


def load_model(name: str, model_class: Any, told: str, *, with_head: bool = True) -> tuple[Any, Any]:
    """A model, in evaluation mode, and its tokenizer.

    Args:
        name: a Hub folder or the name of a model on the Hub.
        model_class: one of transformers' Auto classes.
        told: as what the name was given, such as `--scorer NAME`; begins the messages.
        with_head: whether more is used of it than its `base_model`, whose weights alone have to be there if not.

    Raises:
        SelectionError: it cannot be loaded, some of its weights are missing, or the tokenizer is another model's.
    """
    import torch
    from transformers import AutoTokenizer

    import modeling_teleflm  # noqa: F401  (registers the architecture with the Auto classes)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with _refused(name, told):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, loading = model_class.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, weights_only=True, output_loading_info=True
        )
    base = "" if with_head or model.base_model is model else f"{model.base_model_prefix}."
    if missing := sorted(key for key in loading["missing_keys"] if key.startswith(base)):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        what = "scores" if with_head else "vectors"
        raise SelectionError(f"{told}: has no weights for {missing[0]}{more}, so its {what} would be random.")
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], told)
    return model.eval().to(device), tokenizer


def check_vocabulary(tokenizer: Any, rows: int, told: str) -> None:
    """Refuse a tokenizer that makes ids of which a model has no embedding.

    Args:
        tokenizer: of transformers.
        rows: of the model's input embeddings.
        told: begins the message.

    Raises:
        SelectionError: it makes such ids.
    """
    ids = tokenizer.get_vocab().values()
    largest = max(ids, default=-1)  # not their number: they may have gaps
    if largest >= rows:
        raise SelectionError(
            f"{told}: its tokenizer has {len(ids)} ids, its weights {rows} rows, none of them for id {largest}; "
            "give the model its own tokenizer."
        )


@contextmanager
def _refused(name: str, told: str) -> Iterator[None]:
    """Whatever the libraries that read its files raise, in one line."""
    if not Path(name).exists() and name.startswith((".", "/")):
        raise SelectionError(f"{told}: no such folder.")
    try:
        yield
    except Exception as error:
        raise SelectionError(f"{told} cannot be loaded: {one_line(error)}") from error


__all__ = [
    "BATCH_TOKENS",
    "CAUSAL",
    "CAUSAL_TOKENS",
    "CLASSIFIER",
    "CLASSIFIER_TOKENS",
    "FORMATS",
    "HEAD_BYTES",
    "PLAIN",
    "SCORER",
    "TEMPLATE",
    "CausalScorer",
    "ClassifierScorer",
    "apply_head",
    "check_vocabulary",
    "length_batches",
    "load_model",
    "model_kind",
    "model_window",
]
