# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The lineage of a model as sentences and as a chain of records.

Whatever it says was in a file that may come from anyone. So nothing here relies on a type, a size or a depth, and what
is said of a step is one line of a few hundred characters that commands no terminal.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..checkpoint.errors import printable
from ..checkpoint.parent import MAX_STEPS

_MOST_STEPS = MAX_STEPS + 24
_MOST_FIELDS = 24  # that one growth is told to have changed
_MOST_TEXT, _MOST_SENTENCE = 80, 700  # characters
_LARGEST = 10**18
_NO_RECORD = "A checkpoint without a record of its own."
_OMITTED = "Earlier steps, which this record leaves out."
_CHANGED = "Its weights were then changed outside of any record."
_VERDICTS = {
    "certified": "Certified{of}: every condition on its bytes holds",
    "same-bytes": "Verified{of}: the same bytes, and a configuration that means the same",
    "indistinguishable": "Indistinguishable{of} by logits, which is no proof",
    "not-certified": "Not certified{of}: its bytes break a condition",
    "different": "Different{of}: the logits differ by more than rounding explains",
}
# Formats of a training checkpoint, by their names in a record, with whose they are.
_FORMATS = {
    "megatron": "Megatron-LM, torch",
    "torch_dist": "megatron-core, torch_dist",
    "fsdp_dtensor": "Megatron-FSDP, fsdp_dtensor",
    "dcp": "torch.distributed.checkpoint",
    "deepspeed": "DeepSpeed",
}
_REFUTED = ("not-certified", "different")


@dataclass(frozen=True)
class Link:
    """A step of the chain that led to a folder.

    Args:
        step: what was done, a sentence.
        operation: in a word; None where nothing is known of it.
        record: sha256 of the record that the step left; None if there is none, or it is not named.
        problems: where the chain is broken at this link, a sentence each.
        details: all that the step's lineage says, without what was before it.
        verification: the verdict in that record, if it holds one.
    """

    step: str
    operation: str | None
    record: str | None
    problems: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] | None = None


class _Step(NamedTuple):
    lineage: Mapping[str, Any]
    link: Mapping[str, Any]  # what the step after it says of its result


def lineage_steps(lineage: Mapping[str, Any] | None, verification: Mapping[str, Any] | None = None) -> list[str]:
    """A lineage as sentences, oldest first; the last is the step that made the folder.

    It raises nothing, whatever a file says.

    Args:
        lineage: of a record.
        verification: the verdict in the same record.
    """
    steps, before = _walk(lineage, {"verification": verification})
    sentences = [before] if before else []
    for number, step in enumerate(steps):
        sentences.append(_sentence(step))
        if number < len(steps) - 1 and step.link.get("matches") is False:
            sentences.append(_CHANGED)
    return sentences


def lineage_chain(record: Mapping[str, Any], digest: str | None, problems: Sequence[str] = ()) -> tuple[Link, ...]:
    """The chain of records that led to a folder, oldest first.

    Args:
        record: of the folder.
        digest: sha256 of its file.
        problems: how the folder is not as its record says.
    """
    steps, before = _walk(record.get("lineage"), {"verification": record.get("verification"), "record": digest})
    links = []
    if before:
        why = "earlier steps were left out of the record" if before == _OMITTED else "no record"
        first = steps[0].lineage.get("parent") if steps else None
        named = _digest(first.get("record")) if isinstance(first, Mapping) else None
        links.append(Link(before, None, named, (why,)))
    for number, step in enumerate(steps):
        found = list(problems) if number == len(steps) - 1 else list(_problems(step.link))
        verdict = step.link.get("verification")
        operation, details = step.lineage.get("operation"), {k: v for k, v in step.lineage.items() if k != "parent"}
        links.append(
            Link(
                _sentence(step),
                _show(operation) if isinstance(operation, str) else None,
                _digest(step.link.get("record")),
                tuple(found),
                details,
                dict(verdict) if isinstance(verdict, Mapping) else None,
            )
        )
    return tuple(links) or (Link(_NO_RECORD, None, None, ("no record",)),)


def _problems(link: Mapping[str, Any]) -> Iterator[str]:
    """What the step after a link found to be wrong with it."""
    if _digest(link.get("record")) is None:
        yield "the next step does not name its record"
    if link.get("matches") is False:
        reason = f": {_show(link['mismatch'])}" if isinstance(link.get("mismatch"), str) else ""
        yield f"its weights were not those of its record any more when the next step read them{reason}"
    elif link.get("matches") is not True:
        yield "it is not known whether its weights were still those of its record: it has no samples of them"
    if link.get("edited") is True:
        yield "its record had been edited when the next step read it"


def _walk(lineage: Any, link: Mapping[str, Any]) -> tuple[list[_Step], str | None]:
    """The steps of a lineage, oldest first, and what was before them; None where nothing was."""
    steps: list[_Step] = []
    while isinstance(lineage, Mapping) and lineage:
        if len(steps) == _MOST_STEPS:
            return steps[::-1], _OMITTED
        steps.append(_Step(lineage, link))
        parent = lineage.get("parent")
        link = parent if isinstance(parent, Mapping) else {}
        lineage = link.get("lineage")
    if not steps:
        return [], None
    match steps[-1].lineage:
        case {"parent": {"omitted": True}}:
            before: str | None = _OMITTED
        # Training from nothing has no parent; other programs leave no record of theirs.
        case {"operation": "train", "initial_weights": "random"} | {"operation": "convert", "parallel": _}:
            before = None
        case {"parent": {"origin": origin}} if place := _place(origin):
            before = f"{place}, which has no record of its own."
        case _:
            before = _NO_RECORD
    return steps[::-1], before


# Sentences.


def _sentence(step: _Step) -> str:
    verdict = step.link.get("verification")
    parent = step.lineage.get("parent")
    source = parent.get("record") if isinstance(parent, Mapping) else None
    judged = _verdict(verdict, source) if isinstance(verdict, Mapping) else ""
    refuted = isinstance(verdict, Mapping) and verdict.get("verdict") in _REFUTED
    place = _place(parent.get("origin")) if isinstance(parent, Mapping) and source else ""
    text = f"{_describe(step.lineage, refuted=refuted)}{place and f' Read from {place}.'}{judged}"
    return text if len(text) <= _MOST_SENTENCE else f"{text[: _MOST_SENTENCE - 3]}..."


def _place(origin: Any) -> str:
    """Where a checkpoint was read that is not on this machine; an empty text where that is not said."""
    match origin:
        case {"hub": str() as name, "commit": str() as commit}:
            return f"{_show(name)} on the Hub at {_show(commit)[:12]}"
        case {"url": str() as url}:
            return _show(url)
    return ""


def _describe(lineage: Mapping[str, Any], *, refuted: bool) -> str:
    match lineage:
        case {"operation": "grow", "source": dict() as old, "target": dict() as new}:
            grown = _differences(old, new)
            if lineage.get("preserves_function") is False:
                exactly = f", not preserving the function it computes{_departures(lineage)}"
            else:
                exactly = "" if refuted else " without changing the function it computes, rounding aside"
            return f"Grown{exactly}: {grown or 'nothing changed'}."
        case {"operation": "convert", "from": trainer, "parallel": parallel}:
            at = f" at iteration {_show(lineage['iteration'])}" if lineage.get("iteration") is not None else ""
            written = _FORMATS.get(trainer) if isinstance(trainer, str) else None
            made = f"{written or _show(trainer)}, {_show(parallel)}"
            return f"Converted from a training checkpoint{at} ({made}){_changes(lineage)}."
        case {"operation": "convert", "from": container}:
            return f"Rewritten as safetensors from {_show(container)} files{_changes(lineage)}."
        case {"operation": "fold", "alpha": float() | int() as alpha}:
            other = "" if alpha == 0 else ", where what was added is heard: another function than before the growth"
            return f"Growth masks folded into the weights at alpha {_show(alpha)}{other}."
        case {"operation": "upcycle", "num_local_experts": int() as count, "num_experts_per_tok": int() as top}:
            if lineage.get("preserves_function") is False:
                exactly = f", not preserving the function it computes{_departures(lineage)}"
            else:
                exactly = "" if refuted else " without changing the function it computes, rounding aside"
            made = f"{_count(count)} experts in each layer, copies of its feed-forward layer"
            chosen = f"{_count(top)} of which {'computes' if top == 1 else 'compute'} a token"
            return f"Grown{exactly}: {made}, {chosen}{_cast(lineage)}."
        case {"operation": "train"}:
            return _training(lineage)
        case {
            "operation": "fine-tune",
            "trainer": str() as trainer,
            "method": str() as method,
            "data": {"rows": int() as rows, "trained_tokens": int() as tokens},
            "steps": int() as steps,
        }:
            merged = ", the adapter merged" if lineage.get("merged") else ""
            if trainer == "grpo":  # its tokens are the model's own
                learned = f"its own answers to {_count(rows)} prompts, rewarded"
            else:
                what = "rows of judged answers" if trainer in ("dpo", "kto") else "conversations"
                learned = f"{_count(rows)} {what}, {_count(tokens)} tokens of which are trained on"
            return f"Fine-tuned ({_show(trainer)}, {_show(method)}) in {_count(steps)} steps on {learned}{merged}."
        case {"operation": "merge"}:
            unknown = ", of which there is no record," if lineage.get("adapter") == "unknown" else ""
            return f"With the adapter{unknown} merged into the weights it was trained on{_cast(lineage)}."
        case {"operation": "export", "to": str() as target}:
            return f"Exported to {_show(target)}{_export_details(lineage)}."
        case _:
            return f"{_show(lineage.get('operation'))}."


def _departures(lineage: Mapping[str, Any]) -> str:
    """Why a growth did not preserve the function, in brackets."""
    found = lineage.get("departures")
    told = [_show(reason) for reason in found[:_MOST_FIELDS]] if isinstance(found, list) else []
    return f" ({'; '.join(told)})" if told else ""


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The fields of a configuration that a growth changed."""
    before, after = ({name: _show(value) for name, value in side.items()} for side in (old, new))
    changed = [name for name in before if before[name] != after.get(name, "None")]
    told = [f"{_show(name)} {before[name]} to {after.get(name)}" for name in changed[:_MOST_FIELDS]]
    return ", ".join([*told, *(["and more"] if len(changed) > _MOST_FIELDS else [])])


def _training(lineage: Mapping[str, Any]) -> str:
    is_new = lineage.get("initial_weights") == "random"
    parts = []
    match lineage:
        case {"masks": {"start": float() | int() as start, "end": float() | int() as end}}:
            parts.append(f"growth masks from alpha {_show(start)} to {_show(end)}")
    if isinstance(lineage.get("sequence_length"), int):
        parts.append(f"sequences of {_count(lineage['sequence_length'])}")
    if isinstance(lineage.get("learning_rate"), int | float):
        parts.append(f"learning rate {_show(lineage['learning_rate'])}")
    if not is_new and lineage.get("moments") in ("grown", "fresh"):
        parts.append(f"{lineage['moments']} moments of Adam")
    match lineage.get("resumed"):
        case {"matches": False} | {"edited": True}:
            parts.append("resumed from a checkpoint that had been changed since it was saved")
    details = f": {', '.join(parts)}" if parts else ""
    return (
        f"{'Pretrained from random weights' if is_new else 'Trained'} in {_count(lineage.get('steps'))} steps on "
        f"{_count(lineage.get('tokens'))} tokens{details}."
    )


def _verdict(verification: Mapping[str, Any], source: Any) -> str:
    """What was found of the model that a step made, a sentence with a blank before it; empty if that is not known."""
    name = verification.get("verdict")
    if not isinstance(name, str) or name not in _VERDICTS:
        return ""
    against = verification.get("against")
    judged = against if isinstance(against, Mapping) else {}
    digest = _digest(judged.get("record"))
    if digest is None:
        of = " against a checkpoint without a record"
    elif digest == source:
        of = " against its source"
    else:
        of = f" against the checkpoint of record {digest[:12]}"
    if digest and judged.get("matches") is False:
        of += ", whose weights had changed since"
    match verification:
        case {
            "numbers": {"dtype": str() as dtype, "tokens": int() as tokens, "max_difference": int() | float() as gap}
        }:
            measured = f"; in {_show(dtype)} logits of {_count(tokens)} tokens differ by {_show(gap)} at most"
        case _:
            measured = ""
    match verification:
        case {"moments": {"holds": bool() as holds}}:
            measured += f"; its optimizer.pt is {'' if holds else 'not '}the state given with the source, grown"
    return f" {_VERDICTS[name].format(of=of)}{measured}."


def _export_details(lineage: Mapping[str, Any]) -> str:
    details = []
    match lineage:
        case {"parallel": {"tensor": int() as tensor, "pipeline": int() as pipeline, "virtual": int() as virtual}}:
            chunks = f" of {_count(virtual)} chunks" if virtual > 1 else ""
            stages = f"{_count(pipeline)} stage{'s' if pipeline > 1 else ''}{chunks}"
            details.append(f"tensor parallel {_count(tensor)}, {stages}")
    match lineage:
        case {"parallel": {"layout": str() as layout}}:
            details.append(f"layers split by {_show(layout)}")
    if lineage.get("multipliers") == "fold":
        details.append("the multipliers folded into embeddings and head")
    if isinstance(lineage.get("outtype"), str):
        details.append(f"as {_show(lineage['outtype'])}")
    if lineage.get("optimizer"):
        details.append("with the moments of Adam")
    return "".join(f", {detail}" for detail in details) + _cast(lineage)


def _changes(lineage: Mapping[str, Any]) -> str:
    """What a conversion changed of the values, beside their container."""
    return f"{_folded(lineage)}{_cast(lineage)}{_quantised(lineage)}"


def _folded(lineage: Mapping[str, Any]) -> str:
    factor = lineage.get("folded_input_mult")
    return "" if factor is None else f", input_mult {_show(factor)} folded into the embeddings"


def _cast(lineage: Mapping[str, Any]) -> str:
    return f", cast to {_show(lineage['dtype'])}" if lineage.get("dtype") else ""


def _quantised(lineage: Mapping[str, Any]) -> str:
    if lineage.get("dequantized") is True:
        return ", 8-bit floats multiplied by their scales"
    scheme = lineage.get("quantized")
    return f", linear layers quantised to {_show(scheme)}" if isinstance(scheme, str) else ""


# Values, which may be anything.


def _show(value: Any) -> str:
    match value:
        case bool() | None:
            return str(value)
        case int():
            return str(value) if abs(value) < _LARGEST else "a very large number"
        case float():
            return f"{value:.10g}"
        case str():
            text = printable(value[:_MOST_TEXT])[:_MOST_TEXT]
            return text if len(value) <= _MOST_TEXT else f"{text[: _MOST_TEXT - 3]}..."
        case _:
            return f"a {type(value).__name__}"


def _count(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        return "an unknown number of"
    return f"{value:,}" if abs(value) < _LARGEST else "a very large number of"


def _digest(value: Any) -> str | None:
    """A sha256, or None for what is none."""
    is_digest = isinstance(value, str) and len(value) == 64 and all(letter in "0123456789abcdef" for letter in value)
    return value if is_digest else None


__all__ = ["Link", "lineage_chain", "lineage_steps"]
