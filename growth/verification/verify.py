# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Do two checkpoints compute the same function? Bytes where bytes prove it, logits on a text otherwise."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from conversion.architecture import Architecture
from conversion.checkpoint.errors import CheckpointError, CorruptData
from conversion.checkpoint.limits import default_workers
from conversion.checkpoint.manifest import read_manifest
from conversion.checkpoint.sources import Source, open_checkpoint
from conversion.compressed_tensors import is_float8
from conversion.experts import decoder_architecture, has_experts
from conversion.hub.remote import is_remote, local_view
from conversion.masked import is_masked
from conversion.optimizer_state import OPTIMIZER_FILE
from evaluation.streamed_model import ACTIVATIONS_KEPT
from evaluation.text import tokenize
from evaluation.vocabulary import SENTENCEPIECE, TOKENIZER

from .certificate import Certificate, certify
from .comparison import COMPUTE_DTYPES, Forward, Numbers, Progress, compare_numbers, no_progress
from .conditions import MeasuredLayer, expert_departure, growth_steps, measured_layers
from .moment_certificate import MomentCertificate, certify_moments, why_not_certified

FORWARDS = ("auto", "loaded", "streamed")
Verdict: TypeAlias = Literal["same-bytes", "certified", "indistinguishable", "not-certified", "different", "unjudged"]


@dataclass(frozen=True)
class Verification:
    """The verdict, and what it rests on; None for what was not looked at.

    Args:
        certificate: what the bytes prove.
        numbers: what the logits say.
        notes: what a reader should know beside the verdict.
        layers: how far each layer of the model that grew moves its input, if the copied ones were chosen by that.
        no_certificate: why none could be stated, if it was tried.
        departure: by which choice B's growth did not preserve the function, by its record; empty if none.
        moments: what the bytes of B's optimizer.pt prove, beside the state of A.
    """

    certificate: Certificate | None
    numbers: Numbers | None
    notes: tuple[str, ...] = ()
    layers: tuple[MeasuredLayer, ...] = ()
    no_certificate: str = ""
    departure: str = ""
    moments: MomentCertificate | None = None

    @property
    def verdict(self) -> Verdict:
        """The strongest statement on B's function that everything looked at allows; of moments, see `moments`.

        `same-bytes`: B has A's weights byte for byte, and a configuration that means the same, but for the dtype it
        may ask loaders for. `certified`: every condition on B's bytes holds. `indistinguishable`: no certificate could
        be stated, and on these tokens rounding explains what differs. `not-certified`: B's bytes break a condition,
        which the logits, if they were compared, do not show. `different`: the logits differ by more than rounding.
        `unjudged`: moments alone were looked at.
        """
        if self.numbers and not self.numbers.within_rounding:
            return "different"
        if self.certificate is None:
            return "indistinguishable" if self.numbers else "unjudged"
        if not self.certificate.holds:
            return "not-certified"
        return "same-bytes" if self.certificate.is_identity else "certified"

    @property
    def _not_meant(self) -> str:
        if not (self.departure and self.numbers):
            return ""
        return f", nor was it grown to: {self.departure} does not preserve it. {self.numbers.distance.rstrip('.')}"

    @property
    def same(self) -> bool | None:
        """Whether B computes A's function: True if that is proven, False if it is not so, None if it is unknown.

        Proven is what `sentence` says: of the weights as they are stored, and up to their rounding where it says so.
        """
        known = {"same-bytes": True, "certified": True, "indistinguishable": None, "unjudged": None}
        return known.get(self.verdict, False)

    @property
    def is_refuted(self) -> bool:
        """Whether something looked at is not so: B's function is not A's, or its moments are not A's, grown."""
        return self.same is False or (self.moments is not None and not self.moments.holds)

    @property
    def sentence(self) -> str:
        """The verdict in words, no stronger than it is, and what was found of moments if they were looked at."""
        return f"{self._function} {self.moments.sentence}" if self.moments else self._function

    @property
    def _function(self) -> str:
        certificate, numbers = self.certificate, self.numbers
        match self.verdict:
            case "same-bytes":
                same = "B has A's weights, byte for byte, and a configuration that means the same"
                loading = certificate.loading if certificate else ""
                return f"{same}. {loading}" if loading else f"{same}: the same function."
            case "certified" if certificate:
                return " ".join(filter(None, (_certified(certificate), certificate.loading)))
            case "indistinguishable" if numbers:
                return (
                    f"Indistinguishable at {numbers.rounding} rounding on {numbers.difference.tokens} tokens. "
                    f"{_blind_spot(numbers)} That B computes A's function is not proven{self._not_meant}."
                )
            case "not-certified" if certificate:
                faults = [*certificate.broken_fields, *certificate.violations]
                more = f" {len(faults) - 1} more are broken." if len(faults) > 1 else ""
                unseen = f" The logits do not show it: {_blind_spot(numbers)}" if numbers else ""
                return f"Not A's function by B's bytes. {faults[0]}{more}{unseen}"
            case "unjudged":
                return " ".join(filter(None, ("Whether B computes A's function was not judged.", self.no_certificate)))
            case _:
                tokens = numbers.difference.tokens if numbers else 0
                if self.departure and numbers:
                    return (
                        f"Not A's function, nor meant to be: B was grown by {self.departure}, which does not preserve "
                        f"it. {numbers.distance}"
                    )
                broken = certificate is not None and not certificate.holds
                agree = " B's bytes break conditions too." if broken else ""
                return f"Different: on {tokens} tokens the logits differ by more than rounding explains.{agree}"


def _certified(certificate: Certificate) -> str:
    """What a certificate that holds proves: the function itself, or the function but for the rounding of weights.

    Where the vocabulary grew, of the function the logits that A has.
    """
    proof = f"every condition on its configuration and its weights holds ({certificate.precision})"
    grows = certificate.has_new_rows
    what = "A's old logits" if grows else "A's function"
    more = " Probabilities are not A's: new vocabulary rows take part in the softmax." if grows else ""
    if certificate.is_exact:
        return (
            f"B computes {what}: {proof}. That is {'said of them' if grows else 'the function'} in exact arithmetic; "
            f"computed in floating point, sums may round otherwise than in A.{more}"
        )
    dtypes = " and ".join(certificate.stored[1])
    times = certificate.conditions.roundings
    often = f", {times} times over," if times > 1 else ""
    return (
        f"B computes {what} up to rounding: {proof}. In exact arithmetic the two differ by no more than the "
        f"rounding of weights to {dtypes}{often} and of the numbers in its configuration; computed in floating point, "
        f"sums may round otherwise too.{more}"
    )


def _blind_spot(numbers: Numbers) -> str:
    largest = numbers.difference.max_logit
    share = numbers.blind_to / largest if largest else 0.0
    return (
        f"Errors of the logits up to {numbers.blind_to:.2g} in root mean square ({share:.2g} of the largest logit) "
        "cannot be seen by them."
    )


def verify_checkpoints(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    growth: bool | None = None,
    text: str | os.PathLike[str] | None = None,
    optimizer: str | os.PathLike[str] | None = None,
    dtype: str = "float64",
    forward: Forward = "auto",
    max_tokens: int = 512,
    workers: int = default_workers(),
    progress: Progress = no_progress,
    notify: Callable[[str], None] = lambda note: None,
) -> Verification:
    """Find out whether B, grown or converted from A, computes A's function.

    From bytes (the certificate), whenever the conditions can be stated: they follow from both config.json and the map
    of layers in B's record; every byte is held against them, in bounded memory and without torch. From numbers: both
    models' logits on a text, against A's own rounding; they can show a difference, never that there is none. What is
    loaded takes transformers' Llama; what does not fit in memory is computed layer by layer from the files, a few
    blocks at a time. B may be a GraniteMoE whose experts were made of A, which is always computed so.

    Args:
        a: folder of the source.
        b: folder of what was made from it.
        growth: True: a certificate has to be stated, whatever the text says; False: none is. By default it is made
            where it can be stated, and has to be where there is no text.
        text: a file of text, UTF-8, to compare logits on.
        optimizer: a checkpoint of transformers' Trainer, or its optimizer.pt, that grew with A: B's optimizer.pt is
            held against it too. Masked checkpoints, whose function bytes alone do not say, are judged by that alone.
        dtype: what to compute logits in: `float64`, `float32` or `bfloat16`.
        forward: `loaded`, `streamed`, or `auto`: loaded if the larger model fits in free memory and torch is installed.
        max_tokens: of the text, at most.
        workers: threads.
        progress: makes a progress display, see `teleflm.terminal.byte_progress`.
        notify: told, before it starts, what will be computed and how long that may take.

    Raises:
        CheckpointError: a checkpoint or the text cannot be used, or B's record does not lead to A.
    """
    _check_arguments(dtype, forward, max_tokens)
    if is_remote(a) or is_remote(b):
        if forward == "loaded":
            raise CheckpointError("--forward loaded needs both models on this machine; streamed reads ranges.")
        forward = "streamed"
    if optimizer is not None and is_remote(b):
        raise CheckpointError(f"{b}: is not on this machine, and its {OPTIMIZER_FILE} is read here: download it first.")
    is_here = not is_remote(b)
    a, b = local_view(a), local_view(b)
    if optimizer is not None and has_experts(open_checkpoint(b).config):
        raise CheckpointError("--optimizer is for a growth with moments, and B's experts began without; leave it out.")
    manifest = read_manifest(Path(b))
    layers = measured_layers(manifest["lineage"] if manifest else None)
    notes: list[str] = []
    input_ids = None
    if text is not None:
        first, second = open_checkpoint(a), open_checkpoint(b)
        input_ids = tokenize(first, Path(text), max_tokens)
        _check_ids(input_ids, first, second)
        notes += _compare_tokenizers(first, second)
    for folder in (a, b):
        _refuse_adapter(Path(folder))
    certificate, no_certificate = None, ""
    if growth is not False:
        try:
            with progress("reading") as advance:
                certificate = certify(a, b, workers=workers, progress=advance)
            if not certificate.tensors and text is not None and not growth:  # not even comparable, as when B is smaller
                no_certificate, certificate = str(certificate.broken_fields[0]), None
        except CorruptData:
            raise
        except CheckpointError as error:
            if growth or (text is None and (optimizer is None or not is_masked(open_checkpoint(b).config))):
                raise
            no_certificate = str(error)
        notes += certificate.notes if certificate else [f"No certificate from the bytes: {no_certificate}"]
    moments = None
    if optimizer is None:
        if is_here and (Path(b) / OPTIMIZER_FILE).is_file():
            reason = why_not_certified(a, b)
            notes.append(
                f"{OPTIMIZER_FILE} of B was not looked at"
                + (f": {reason}." if reason else "; --optimizer DIR, the state that grew, certifies it.")
            )
    elif certificate and not certificate.tensors:
        notes.append(f"{OPTIMIZER_FILE} of B was not looked at: {certificate.broken_fields[0]}")
    else:
        with progress("moments") as advance:
            moments = certify_moments(a, b, optimizer, workers=workers, progress=advance)
    numbers = None
    if input_ids is not None:
        numbers = compare_numbers(
            first, second, input_ids, dtype=dtype, forward=forward, workers=workers, progress=progress, notify=notify
        )
        if any(is_float8(source.config) for source in (first, second)):
            notes += [ACTIVATIONS_KEPT, numbers.distance]
    if certificate is None and numbers is None and moments is None:
        raise CheckpointError("nothing to verify by: growth is False and there is no text.")
    departure = _departure(a, b) if certificate is None else ""
    return Verification(certificate, numbers, tuple(notes), layers, no_certificate, departure, moments)


def _departure(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> str:
    """By which choice a growth between A and B did not preserve the function, as B's record has it; empty if none."""
    first, second = open_checkpoint(a), open_checkpoint(b)
    manifest = read_manifest(Path(b))
    try:
        if has_experts(second.config):
            return expert_departure(manifest["lineage"] if manifest else None)
        source, target = (Architecture.from_config(end.config or {}) for end in (first, second))
        steps = growth_steps(source, target, manifest["lineage"] if manifest else None)
    except CheckpointError:
        return ""
    return next((step.departure for step in steps if step.departure), "")


# The text.


def _check_ids(input_ids: np.ndarray, *checkpoints: Source) -> None:
    for checkpoint in checkpoints:
        where = f"{checkpoint.folder}/config.json"
        rows = decoder_architecture(checkpoint.config or {}, where).vocab_size
        if int(input_ids.max()) >= rows:
            raise CheckpointError(f"{where}: vocab_size is {rows}, the text has token {int(input_ids.max())}.")


def _compare_tokenizers(a: Source, b: Source) -> list[str]:
    notes = []
    for name in (SENTENCEPIECE, TOKENIZER):
        first, second = (Path(source.folder) / name for source in (a, b))
        if first.is_file() and second.is_file() and first.read_bytes() != second.read_bytes():
            notes.append(f"{name} of B is not A's: the same text may give it other tokens than were compared.")
    return notes


def _refuse_adapter(folder: Path) -> None:
    """Transformers would apply it to the weights, unasked, and nothing here would know."""
    path = folder / "adapter_config.json"
    if path.exists():
        raise CheckpointError(
            f"{path}: transformers applies this adapter when it loads the folder; compare without it, or merge it with "
            "`teleflm sft export --merge`."
        )


def _check_arguments(dtype: str, forward: str, max_tokens: int) -> None:
    for name, value, known in (("dtype", dtype, COMPUTE_DTYPES), ("forward", forward, FORWARDS)):
        if value not in known:
            raise CheckpointError(f"{name} is {value!r}, expected one of {', '.join(known)}.")
    if max_tokens < 2:
        raise CheckpointError(f"max_tokens is {max_tokens}; it must be at least 2.")
