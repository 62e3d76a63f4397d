# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""How well a model predicts texts, and answers questions with choices."""

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.limits import default_workers
from conversion.checkpoint.sources import Source, open_checkpoint
from conversion.compressed_tensors import is_float8
from conversion.family import FAMILIES, find_family
from conversion.hub.remote import is_remote, local_view
from conversion.model_identity import ModelIdentity, model_identity, tensor_digests

from .held_files import HeldFiles
from .loaded_scores import check_model_type
from .multiple_choice import Accuracy, accuracies, choice_passages, read_task
from .passages import Passage, check_window, document_passages
from .streamed_model import ACTIVATIONS_KEPT
from .streamed_scores import Progress, score_streamed
from .text import TextFile, read_documents
from .vocabulary import Vocabulary, open_vocabulary

COMPUTE_DTYPES = ("float64", "float32", "bfloat16")
DEFAULT_MEMORY = 4 * 10**9
_DEFAULT_WINDOW = 2048  # where a configuration says nothing
# Passages -> log-likelihoods [scored] of each, and the device that they were computed on.
Scorer = Callable[[Sequence[Passage]], tuple[list[np.ndarray], str]]


@dataclass(frozen=True)
class TextResult:
    """How well a text was predicted.

    Args:
        name: of the file, without folders and suffix.
        sha256: of its content.
        documents: in it.
        nbytes: of them, in UTF-8.
        tokens: that were predicted: all of them, each once.
        unknown: of these, tokens that stand for what the tokenizer does not know.
        nats: minus the log-likelihood of all of them.
    """

    name: str
    sha256: str
    documents: int
    nbytes: int
    tokens: int
    unknown: int
    nats: float

    @property
    def bits_per_byte(self) -> float:
        """Of the text in UTF-8; whatever the tokenizer, it is comparable."""
        return self.nats / math.log(2) / self.nbytes

    @property
    def perplexity(self) -> float:
        """Per token of this tokenizer; infinite where it is beyond any float."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


@dataclass(frozen=True)
class TaskResult:
    """How many questions were answered.

    Args:
        name: of the task.
        sha256: of its files.
        questions: in it.
        shortened: of these, those that lost their beginning to the window, before one of their choices at least.
        metrics: `acc`, `acc_norm` and `acc_bytes`, see `multiple_choice`.
    """

    name: str
    sha256: str
    questions: int
    shortened: int
    metrics: dict[str, Accuracy]


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and how.

    Args:
        texts: in the order of the files.
        tasks: in the order of the files.
        forward: `streamed` (from the files, layer by layer) or `loaded`.
        device: `cpu` or `cuda`.
        dtype: what was computed in.
        window: tokens that the model read at a time, at most.
        stride: tokens from the begin of a window to that of the next.
        seconds: that it took.
        identity: of the model; None if it was not asked for.
        notes: what a reader should know, a sentence each.
    """

    texts: tuple[TextResult, ...]
    tasks: tuple[TaskResult, ...]
    forward: str
    device: str
    dtype: str
    window: int
    stride: int
    seconds: float
    identity: ModelIdentity | None = None
    notes: tuple[str, ...] = ()


def no_progress(what: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """A progress display that shows nothing."""
    return nullcontext(lambda done, total: None)


def evaluate(
    model: str | os.PathLike[str],
    *,
    texts: Sequence[str | os.PathLike[str]] = (),
    tasks: Sequence[str | os.PathLike[str]] = (),
    loaded: bool = False,
    dtype: str = "float32",
    window: int | None = None,
    stride: int | None = None,
    memory: int = DEFAULT_MEMORY,
    work: str | os.PathLike[str] | None = None,
    identify: bool = False,
    workers: int = default_workers(),
    keep: Callable[[Evaluation], None] = lambda evaluation: None,
    progress: Progress = no_progress,
    notify: Callable[[str], None] = lambda note: None,
    score: Scorer | None = None,
) -> Evaluation:
    """Measure a model on texts and on questions with choices.

    Of a text, the bits per byte of the Tele-FLM technical report: minus the log-likelihood of all its tokens in bits,
    over its bytes in UTF-8. Each document begins with the tokenizer's beginning-of-sequence token, which is not
    predicted; its end is not predicted either. A document of more than `window` tokens is cut into windows, in which no
    token is predicted twice: see `passages.document_passages`.

    Args:
        model: folder or URL of a Tele-FLM or a Llama; with `loaded` any causal language model that transformers has.
            Its tokenizer is a `tokenizer.model`, or else a `tokenizer.json`.
        texts: files of text, see `text.read_documents`.
        tasks: files of questions, see `multiple_choice.read_task`.
        loaded: load the model, onto the GPUs if there are some. Without, it is computed from the files layer by layer,
            in bounded memory, and a killed run goes on by the same call.
        dtype: what to compute in: `float64`, `float32` or `bfloat16`.
        window: tokens that the model reads at a time, at most; `max_position_embeddings` unless given.
        stride: tokens from the begin of a window to that of the next; half a window unless given.
        memory, work: of a model that is not loaded, see `streamed_scores.score_streamed`.
        identify: take the digests by which results are known to be this model's: of a model that is not loaded, of the
            bytes as they are computed with; for a loaded one, all weights are read once more.
        workers: threads.
        keep: called with the result, before what a killed run would go on from is removed: where it fails to keep the
            result, the same call has only that to do again.
        progress: makes a progress display, see `teleflm.terminal.byte_progress`.
        notify: told, before it starts, what will be computed.
        score: computes with a model that the caller has loaded, in `dtype`, as `loaded_scores.score_loaded` does; the
            folder `model` then gives its tokenizer and its numbers.

    Raises:
        CheckpointError: the model, a file, or an option cannot be used, or the model gives no finite number.
        CorruptData: the model was changed while it was measured, or since a killed run that this one goes on with.
    """
    if dtype not in COMPUTE_DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}, expected one of {', '.join(COMPUTE_DTYPES)}.")
    if not (texts or tasks):
        raise CheckpointError("nothing to measure: give texts or tasks.")
    text_files = [read_documents(Path(text)) for text in texts]
    task_files = [read_task(Path(task)) for task in tasks]
    _refuse_same_names([*(file.name for file in text_files), *(task.name for task in task_files)])
    checkpoint = _open(model, loaded)
    held = HeldFiles.of(checkpoint)
    window = window or _configured_window(checkpoint)
    stride = stride or window // 2
    check_window(window, stride)
    pieces = open_vocabulary(Path(checkpoint.folder))
    start = pieces.bos_id() if pieces.bos_id() >= 0 else None
    of_texts = [_text_passages(file, pieces, start, window, stride) for file in text_files]
    cut = [choice_passages(task, pieces.encode, start, window) for task in task_files]
    of_tasks = [group for group, _ in cut]
    passages = [passage for group in (*of_texts, *of_tasks) for passage in group]
    _check_ids(passages, checkpoint)

    digests: dict[str, str] = {}
    if identify and (loaded or score is not None):
        with progress("hashing") as advance:
            digests = tensor_digests(checkpoint.tensors, workers=workers, progress=advance)
    begin = time.perf_counter()
    made: list[Evaluation] = []

    def conclude(scores: Sequence[np.ndarray], device: str) -> None:
        identity = model_identity(checkpoint, known=digests, workers=workers) if identify else None
        held.require_small_same()
        seconds = time.perf_counter() - begin
        ends = np.cumsum([len(group) for group in (*of_texts, *of_tasks)])
        parts = [scores[end - len(group) : end] for end, group in zip(ends, (*of_texts, *of_tasks), strict=True)]
        text_results = tuple(
            _text_result(file, group, part, pieces)
            for file, group, part in zip(text_files, of_texts, parts[: len(of_texts)], strict=True)
        )
        task_results = tuple(
            TaskResult(task.name, task.sha256, len(task.questions), count, accuracies(task, [x.sum() for x in part]))
            for task, (_, count), part in zip(task_files, cut, parts[len(of_texts) :], strict=True)
        )
        forward = "loaded" if loaded or score is not None else "streamed"
        notes = (*_window_notes(window, checkpoint), *_result_notes(text_results, task_results))
        if forward == "streamed" and is_float8(checkpoint.config):
            notes = (*notes, ACTIVATIONS_KEPT)
        how = (forward, device, dtype, window, stride)
        made.append(Evaluation(text_results, task_results, *how, seconds, identity, notes))
        keep(made[0])

    if score is not None:
        conclude(*score(passages))
    elif loaded:
        scores, device = _score_loaded(model, checkpoint, passages, dtype, progress, notify)
        with progress("comparing the weights") as advance:
            held.require_same(digests, advance)
        conclude(scores, device)
    else:
        score_streamed(
            checkpoint,
            passages,
            dtype=dtype,
            memory=memory,
            work=Path(work) if work else None,
            workers=workers,
            digests=digests,
            keep=lambda scores: conclude(scores, "cpu"),
            progress=progress,
            notify=notify,
        )
    return made[0]


# The model and its tokenizer.


def _open(model: str | os.PathLike[str], loaded: bool) -> Source:
    if loaded and is_remote(model) and "://" in os.fspath(model):
        raise CheckpointError(f"{model}: is elsewhere, and --loaded needs a folder or OWNER/NAME; leave --loaded out.")
    folder = local_view(model)
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        raise CheckpointError(
            f"{adapter}: is of an adapter, which the streamed forward pass does not apply and transformers would; "
            "merge it with `teleflm sft export --merge` first."
        )
    checkpoint = open_checkpoint(folder)
    check_model_type(checkpoint.config or {}, checkpoint.folder)
    kind = (checkpoint.config or {}).get("model_type")
    if find_family(checkpoint.config) is None and not loaded:
        expected = " or ".join(map(repr, FAMILIES))
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: model_type is {kind!r}, expected {expected}; --loaded takes what "
            "transformers can load."
        )
    return checkpoint


def _configured_window(checkpoint: Source) -> int:
    configured = (checkpoint.config or {}).get("max_position_embeddings")
    is_size = isinstance(configured, int) and not isinstance(configured, bool) and configured >= 2
    return int(configured) if is_size else _DEFAULT_WINDOW  # type: ignore[arg-type]


def _check_ids(passages: Sequence[Passage], checkpoint: Source) -> None:
    rows = (checkpoint.config or {}).get("vocab_size")
    largest = max(int(passage.ids.max()) for passage in passages)
    if not isinstance(rows, int) or largest >= rows:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: vocab_size is {rows}, and the texts have token {largest}; the tokenizer "
            "is another model's."
        )


def _refuse_same_names(names: Sequence[str]) -> None:
    repeated = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if repeated is not None:
        raise CheckpointError(f"two files are called {repeated}, which the results could not tell apart; rename one.")


# Passages, and what they say.


def _text_passages(file: TextFile, pieces: Vocabulary, start: int | None, window: int, stride: int) -> list[Passage]:
    passages: list[Passage] = []
    for number, document in enumerate(file.documents, 1):
        ids = np.array([*([] if start is None else [start]), *pieces.encode(document)], np.int64)
        if len(ids) < 2:
            raise CheckpointError(f"{file.name}: document {number} has no token to predict; leave it out.")
        passages += document_passages(ids, window, stride)
    return passages


def _score_loaded(
    model: str | os.PathLike[str],
    checkpoint: Source,
    passages: Sequence[Passage],
    dtype: str,
    progress: Progress,
    notify: Callable[[str], None],
) -> tuple[list[np.ndarray], str]:
    from .loaded_scores import load_model, name_and_revision, score_loaded

    network = load_model(*name_and_revision(os.fspath(model), checkpoint.folder), dtype=dtype)
    device = network.device.type
    tokens = sum(len(passage.inputs) for passage in passages)
    notify(f"{tokens:,} tokens in {dtype}, by the loaded model on {device}.")
    with progress("computing") as advance:
        return score_loaded(network, passages, advance=advance), device


def _text_result(
    file: TextFile, passages: Sequence[Passage], scores: Sequence[np.ndarray], pieces: Vocabulary
) -> TextResult:
    nats = -math.fsum(float(value) for part in scores for value in part)
    unknown = sum(int((passage.targets == pieces.unk_id()).sum()) for passage in passages)
    tokens = sum(passage.scored for passage in passages)
    return TextResult(file.name, file.sha256, len(file.documents), file.nbytes, tokens, unknown, nats)


def _window_notes(window: int, checkpoint: Source) -> list[str]:
    configured = (checkpoint.config or {}).get("max_position_embeddings")
    if isinstance(configured, int) and window > configured:
        return [f"The window of {window} tokens is longer than max_position_embeddings, {configured}."]
    return []


def _result_notes(texts: Sequence[TextResult], tasks: Sequence[TaskResult]) -> list[str]:
    unknown = [
        f"{text.name}: {text.unknown:,} tokens are unknown to the tokenizer; what they stand for is in no bit."
        for text in texts
        if text.unknown
    ]
    shortened = [
        f"{task.name}: {task.shortened:,} of {task.questions:,} questions lost their beginning, as they exceed the "
        "window with a choice."
        for task in tasks
        if task.shortened
    ]
    return [*unknown, *shortened]


def describe(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as JSON."""
    return {
        "texts": [
            {
                "name": text.name,
                "bits_per_byte": text.bits_per_byte,
                "perplexity": text.perplexity if math.isfinite(text.perplexity) else None,
                "nats": text.nats,
                "tokens": text.tokens,
                "unknown_tokens": text.unknown,
                "bytes": text.nbytes,
                "documents": text.documents,
                "sha256": text.sha256,
            }
            for text in evaluation.texts
        ],
        "tasks": [
            {
                "name": task.name,
                **{name: metric.value for name, metric in task.metrics.items()},
                **{f"{name}_stderr": metric.stderr for name, metric in task.metrics.items()},
                "questions": task.questions,
                "shortened": task.shortened,
                "sha256": task.sha256,
            }
            for task in evaluation.tasks
        ],
        "forward": evaluation.forward,
        "device": evaluation.device,
        "dtype": evaluation.dtype,
        "window": evaluation.window,
        "stride": evaluation.stride,
        "seconds": evaluation.seconds,
        "notes": list(evaluation.notes),
    }


__all__ = ["DEFAULT_MEMORY", "Evaluation", "Scorer", "TaskResult", "TextResult", "describe", "evaluate"]
