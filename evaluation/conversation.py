# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A conversation with a model: its turns, what of them fits into the window, answers as they come."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from conversion.checkpoint.errors import CheckpointError, one_line
from conversion.checkpoint.sources import check_utf8
from conversion.checkpoint.strict_json import read_json_object
from conversion.hub.remote import is_remote

from .adapter import check_adapter, check_base, with_adapter
from .loaded_scores import check_model_type, load_model, require_torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Stop: TypeAlias = Literal["end", "length", "interrupted"]
Message: TypeAlias = dict[str, str]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # in the place of bytes that are no character yet
# Logits over a smaller temperature may exceed any float32, and over a larger one are all alike.
_TEMPERATURES = (1e-4, 1e4)
_MAX_SEED = 2**32 - 1
_VOCABULARIES = ("tokenizer.model", "tokenizer.json", "vocab.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


class TooLong(CheckpointError):
    """A message does not fit into the window, whatever is forgotten."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; what is None is as the model's generation_config.json says.

    Args:
        temperature: 0 takes the most likely token.
        top_p: share of the likelihood that is chosen from.
        max_new_tokens: of an answer, at most.
    """

    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        low, high = _TEMPERATURES
        if self.temperature is not None and not (self.temperature == 0 or low <= self.temperature <= high):
            raise CheckpointError(
                f"--temperature is {self.temperature}; it is 0 for the most likely token, or {low:g} to {high:g}."
            )
        if self.max_new_tokens < 1:
            raise CheckpointError(f"--max-new-tokens is {self.max_new_tokens}; it is at least 1.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise CheckpointError(f"--top-p is {self.top_p}; it is above 0 and at most 1.")
        if self.top_p is not None and self.temperature == 0:
            raise CheckpointError("--top-p does nothing at --temperature 0; leave one of them out.")

    def options(self) -> dict[str, Any]:
        """Of transformers' `generate`."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        said = {"temperature": self.temperature, "top_p": self.top_p}
        said = {name: value for name, value in said.items() if value is not None}
        return {"do_sample": True, **said} if said else {}


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Args:
        text: of it.
        tokens: that were made.
        seconds: that it took.
        stop: why it ended: the model ended it, its length or the window did, or it was interrupted.
        forgotten: turns (a question and its answer) that are gone, so that the answer had room in the window.
    """

    text: str
    tokens: int
    seconds: float
    stop: Stop
    forgotten: int = 0

    @property
    def tokens_per_second(self) -> float:
        """The reading of the conversation included."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Conversation:
    """Turns with a model. Where they leave an answer too little room, the oldest are forgotten; the system's stays.

    Args:
        model: that answers.
        tokenizer: of it.
        window: tokens that it reads and makes together, at most.
        sampling: how it chooses.
        system: what it is told first.
        completion: continue each text instead, on its own, without a chat template.
        messages: until now.
        notes: what somebody should know who talks to it, a sentence each.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    window: int
    sampling: Sampling
    system: str | None = None
    completion: bool = False
    messages: list[Message] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @property
    def room(self) -> int:
        """Tokens that are kept free for an answer while there are turns to forget: of the window, half at most."""
        return min(self.sampling.max_new_tokens, self.window // 2)

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = []

    def answer(
        self,
        text: str,
        show: Callable[[str], None] = lambda piece: None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Let the model answer, or continue a text.

        Args:
            text: what the user says.
            show: called with each piece of the answer as it comes; together they are its text.
            is_stopped: asked after each token whether the answer is to end here.

        Raises:
            TooLong: the text does not fit into the window; nothing has changed.
        """
        begin = time.perf_counter()
        kept, prompt = self._prompt(text)
        forgotten = (len(self.messages) - len(kept)) // 2
        ids, answer, stop = self._generate(prompt, show, is_stopped)
        if not self.completion:
            both = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            self.messages = [*kept, *(both if answer else [])]
        return Answer(answer, len(ids), time.perf_counter() - begin, stop, forgotten)

    def _prompt(self, text: str) -> tuple[list[Message], list[int]]:
        """The earlier messages that fit, and the ids of them and the text."""
        if self.completion:
            prompt = self.tokenizer(text)["input_ids"]
            return [], self._fitting(prompt)
        kept = list(self.messages)
        while True:
            prompt = self._render([*kept, {"role": "user", "content": text}])
            if not kept or len(prompt) + self.room <= self.window:
                return kept, self._fitting(prompt)
            kept = kept[2:]

    def _render(self, messages: Sequence[Message]) -> list[int]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        try:
            encoding: Any = self.tokenizer.apply_chat_template(
                [*first, *messages], add_generation_prompt=True, return_dict=True
            )
        except Exception as error:  # a template may fail as any program
            raise CheckpointError(f"the chat template cannot be rendered: {one_line(error)}") from error
        return list(encoding["input_ids"])

    def _fitting(self, prompt: list[int]) -> list[int]:
        if not prompt:
            raise TooLong("the text has no token to continue; say something.")
        if len(prompt) == self.window:
            raise TooLong(f"this takes all {self.window} tokens of the window, and leaves none to answer; shorten it.")
        if len(prompt) > self.window:
            raise TooLong(f"this takes {len(prompt)} tokens, and the window has {self.window}; shorten it.")
        return prompt

    def _generate(
        self, prompt: list[int], show: Callable[[str], None], is_stopped: Callable[[], bool]
    ) -> tuple[list[int], str, Stop]:
        import torch
        from transformers import StoppingCriteriaList

        streamer = _Streamer(self.tokenizer, prompt, show)
        room = min(self.sampling.max_new_tokens, self.window - len(prompt))
        rows = int(self.model.config.vocab_size)
        # Rows of the vocabulary without a piece: padding, that a trained model never chooses and nothing can decode.
        suppressed = list(range(len(self.tokenizer), rows))
        ids = torch.tensor([prompt], device=self.model.device)
        pad = self.tokenizer.pad_token_id
        with torch.inference_mode(), _failures_in_one_line():
            self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                pad_token_id=self._stop_ids[0] if pad is None else pad,
                eos_token_id=self._stop_ids,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([lambda *state, **more: is_stopped()]),
                **({"suppress_tokens": suppressed} if suppressed else {}),
                **self.sampling.options(),
            )
        made = streamer.ids
        stop: Stop = "end" if made and made[-1] in self._stop_ids else "interrupted" if is_stopped() else "length"
        return made, streamer.text, stop

    @property
    def _stop_ids(self) -> list[int]:
        config: Any = self.model.generation_config
        said = config.eos_token_id if config.eos_token_id is not None else self.tokenizer.eos_token_id
        if said is None:
            raise CheckpointError("the model has no eos_token_id in generation_config.json or config.json; add one.")
        return list(said) if isinstance(said, list) else [int(said)]


@contextmanager
def _failures_in_one_line() -> Iterator[None]:
    """What a model, its settings or its machine make of a question that they cannot answer."""
    try:
        yield
    except (CheckpointError, OSError):  # the latter are of whoever shows the answer
        raise
    except Exception as error:  # torch and transformers have no family of errors between them
        raise CheckpointError(
            f"the model cannot answer: {one_line(error)}. Its weights may hold NaN or infinity (teleflm inspect "
            "--check), its generation_config.json may ask for what is not possible, or memory was too little."
        ) from error


class _Streamer:
    """Shows text as its tokens come; a character of several tokens when it is whole."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int], show: Callable[[str], None]):
        self.ids: list[int] = []
        self.text = ""
        self._tokenizer, self._show, self._is_prompt = tokenizer, show, True
        # A first piece that begins a word loses its space if it is decoded on its own.
        self._before = [prompt[-1]]

    def put(self, value: Any) -> None:
        """Take the prompt, or the next token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.ids += value.reshape(-1).tolist()
        self._shown(self._decode(), is_last=False)

    def end(self) -> None:
        """Show what was held back."""
        self._shown(self._decode(), is_last=True)

    def _shown(self, text: str, *, is_last: bool) -> None:
        whole = text if is_last else text.rstrip(_REPLACEMENT)
        if len(whole) > len(self.text) and whole.startswith(self.text):
            piece, self.text = whole[len(self.text) :], whole
            self._show(piece)
        if is_last:
            self.text = text

    def _decode(self) -> str:
        options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before = str(self._tokenizer.decode(self._before, **options))
        text = str(self._tokenizer.decode([*self._before, *self.ids], **options))
        return text[len(before) :] if text.startswith(before) else str(self._tokenizer.decode(self.ids, **options))


# Loading.


def open_conversation(
    model: str,
    *,
    adapter: str | Path | None = None,
    system: str | None = None,
    completion: bool = False,
    sampling: Sampling = Sampling(),
    dtype: str = "auto",
    seed: int = 0,
) -> Conversation:
    """Load a model to talk to, on a GPU where there is one. No code of its folder is executed.

    Args:
        model: a Hub folder, or the name of a model on the Hub.
        adapter: folder of an adapter (peft) for it; its tokenizer and template count if it has some.
        system: what the model is told first.
        completion: continue texts; what a model without a chat template can do.
        sampling: how tokens are chosen.
        dtype: of the weights: `auto` (as they are), `float32`, `bfloat16` or `float16`.
        seed: of what is chosen by chance.

    Raises:
        CheckpointError: torch or peft is not installed, the model or adapter cannot be loaded, or it has no chat
            template.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise CheckpointError(f"--dtype is {dtype}, expected auto, float32, bfloat16 or float16.")
    if completion and system:
        raise CheckpointError("--system does nothing with --completion: there is no chat; leave one of them out.")
    if not 0 <= seed <= _MAX_SEED:
        raise CheckpointError(f"--seed is {seed}; it is 0 to {_MAX_SEED}.")
    _check_model(model)
    notes: list[str] = []
    if adapter is not None:
        check_adapter(Path(adapter))
        notes = check_base(Path(adapter), model)
    require_torch()
    has_own = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    tokenizer = _load_tokenizer(str(adapter) if has_own else model, completion)
    from transformers import set_seed

    network: Any = load_model(model, dtype=dtype)
    if adapter is not None:
        network = with_adapter(network, Path(adapter))
    _check_vocabulary(tokenizer, network, model)
    configured = getattr(network.config, "max_position_embeddings", None)
    set_seed(seed)
    window = configured if isinstance(configured, int) and configured > 1 else 2048
    return Conversation(network, tokenizer, window, sampling, system, completion, notes=tuple(notes))


def _check_model(model: str) -> None:
    folder = Path(model)
    check_utf8(model)
    if not folder.is_dir():
        if not is_remote(model) or "://" in model:
            raise CheckpointError(f"{model}: no such folder, and no OWNER/NAME of the Hub.")
        return
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder}: is an adapter; teleflm chat MODEL --adapter {folder} with the MODEL it is for."
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}/config.json: no such file; there is no model in this folder.")
    check_model_type(read_json_object(folder / "config.json", infinite=True), folder)


def _load_tokenizer(name: str, completion: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    import modeling_teleflm  # noqa: F401  (registers the architecture with the Auto classes)

    if not completion and not has_chat_template(name):
        raise CheckpointError(
            f"{name}: has no chat template (chat_template.jinja), which says how a question is put to it; --completion "
            "continues your text instead."
        )
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # sentencepiece, tokenizers and transformers have no family of errors between them
        if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in _VOCABULARIES):
            names = " nor ".join(_VOCABULARIES)
            raise CheckpointError(f"{name}: has no tokenizer, neither {names}; copy the model's there.") from error
        raise CheckpointError(f"{name}: its tokenizer cannot be loaded: {one_line(error)}") from error


def _check_vocabulary(tokenizer: "PreTrainedTokenizerBase", network: Any, model: str) -> None:
    """Refuse a tokenizer that makes ids of which the model has no embedding."""
    rows = network.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)  # not their number: they may have gaps
    if largest >= rows:
        raise CheckpointError(
            f"{model}: has {rows} rows of embeddings, and the tokenizer makes id {largest}; it is another model's."
        )


def has_chat_template(name: str) -> bool:
    """Whether a chat template lies beside a tokenizer: the class of a Tele-FLM has one for any folder.

    Args:
        name: a folder, or the name of a model on the Hub.
    """
    from transformers.utils.hub import cached_file

    def find(file: str) -> str | None:
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        return cached_file(name, file, **quiet, _raise_exceptions_for_gated_repo=False)

    if any(find(file) for file in _TEMPLATES):
        return True
    settings = find("tokenizer_config.json")
    try:
        return bool(settings and json.loads(Path(settings).read_bytes()).get("chat_template"))
    except (ValueError, AttributeError, OSError):
        return False


__all__ = ["Answer", "Conversation", "Sampling", "TooLong", "has_chat_template", "open_conversation"]
