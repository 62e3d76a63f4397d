# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A schedule of the learning rate that goes on over the stages of a growth: warm-up, stable, decay at the very end.

The shapes are transformers' own. A stage that another one grows from stays stable: `constant_with_warmup`, or
`warmup_stable_decay` stopped before its decay. The next stage begins at the learning rate at which it stopped, or a
stated share of it (`continue_schedule`), after a warm-up of `warmup_steps` or none; the last one ends with
`warmup_stable_decay` and `num_decay_steps`. Warm-up, stable phase and decay: arXiv 2404.06395 (MiniCPM); warming up
again after a growth: arXiv 2602.02472.

Where the run before stopped is in the record of the model: its peak and the schedule that it was laid out for, of which
transformers' own function says the factor at its last step. The optimizer.pt beside the model, if there is one, has the
rate of the step that would have been the next, and Adam's step; where the two are not of one checkpoint, the run is
refused.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from conversion.checkpoint.numbers import plain_value, read_count, shown
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.torch_file import read_torch_file
from conversion.optimizer_state import OPTIMIZER_FILE

from .beginning import check_step, steps_before
from .errors import RunError

logger = logging.getLogger(__name__)

STABLE = ("constant", "constant_with_warmup", "warmup_stable_decay")
_WAY_OUT = "Set learning_rate yourself, and leave continue_schedule out."
_GIVEN = 1e-6  # as near as a learning rate that was written by hand has to be


@dataclass(frozen=True)
class EarlierRun:
    """Where the run stopped that the model of a stage is from.

    Args:
        learning_rate: of its last step; with muP, of a model of its base width.
        step: the number of steps that it did.
        mup_base_width: of it; None: one rate for all.
        hidden_size: of the model that it trained, where the record of the growth says it.
        next_factor: of the step that would have been the next: 0 at the end of transformers' `warmup_stable_decay`.
        adam_step: of Adam's counter after it; None: the record does not say.
        may_skip: whether steps may have left the weights and that counter as they were, as overflows in float16 do.
    """

    learning_rate: float
    step: int
    mup_base_width: int | None
    hidden_size: int | None
    next_factor: float
    adam_step: float | None
    may_skip: bool


@dataclass(frozen=True)
class ContinuedSchedule:
    """What the record of a run says of the learning rate that it took over.

    Args:
        learning_rate: of the last step of the run before.
        step: the number of steps of that run.
        factor: times which this run's learning rate is.
    """

    learning_rate: float
    step: int
    factor: float

    def to_record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def continue_schedule(
    args: TrainingArguments,
    folder: Path,
    factor: float,
    *,
    base_width: int | None,
    checkpoint: str | None = None,
    gives_rate: bool | None = None,
) -> ContinuedSchedule:
    """Set `args.learning_rate` to a share of the rate at which the run stopped that a model is from, and say so.

    Args:
        args: of the run that begins; a learning_rate that is given has to be the one that follows.
        folder: of the model.
        factor: the share, above 0.
        base_width: `mup_base_width` of the run that begins.
        checkpoint: the one that it resumes.
        gives_rate: whether a learning_rate was given; None: if it is not transformers' default.

    Raises:
        RunError: no record says where the run before stopped, that was not in its stable phase, or the keys of this one
            are not such that it goes on from there.
        CheckpointError: a record, or optimizer.pt, cannot be read.
    """
    _check_keys(args)
    run = _find_run(folder, checkpoint)
    _check_width(run, base_width)
    rate = factor * run.learning_rate
    if gives_rate is None:
        gives_rate = args.learning_rate != TrainingArguments.__dataclass_fields__["learning_rate"].default
    if gives_rate and not math.isclose(args.learning_rate, rate, rel_tol=_GIVEN):
        raise RunError(
            f"learning_rate is {args.learning_rate:g}, but continue_schedule {factor:g} of the {run.learning_rate:g} "
            f"at which the run before stopped is {rate:g}: leave one of the two keys out."
        )
    agrees = None if checkpoint else _compare_optimizer(folder / OPTIMIZER_FILE, run)
    args.learning_rate = rate
    if args.process_index == 0:
        logger.warning(
            "learning_rate is %g: %g of the %g of step %d, the last of the run that %s is from, which stopped in its "
            "stable phase (%s)",
            *(rate, factor, run.learning_rate, run.step, folder),
            "its record and optimizer.pt agree" if agrees else "by its record alone",
        )
    return ContinuedSchedule(run.learning_rate, run.step, factor)


def _check_keys(args: TrainingArguments) -> None:
    kind = SchedulerType(args.lr_scheduler_type).value
    if kind not in STABLE:
        raise RunError(
            f"lr_scheduler_type is {kind}, which has no stable phase, but continue_schedule goes on in one: set one of "
            f"{', '.join(STABLE)}."
        )
    if kind == "constant" and args.warmup_steps:
        raise RunError(
            f"warmup_steps is {args.warmup_steps:g}, and lr_scheduler_type constant, which never warms up: set "
            "constant_with_warmup, or warmup_steps: 0."
        )


def _check_width(run: EarlierRun, base_width: int | None) -> None:
    """A learning rate is that of a model of the base width; without muP, of the model that was trained."""
    known = (run.mup_base_width,) if run.mup_base_width is not None else (None, run.hidden_size)
    if base_width not in known:
        was = "no mup_base_width" if run.mup_base_width is None else f"mup_base_width {run.mup_base_width}"
        expected = " or ".join("none" if width is None else str(width) for width in dict.fromkeys(known))
        raise RunError(
            f"mup_base_width is {base_width}, but the run before had {was}, so its learning rate is not that of a "
            f"model of such a width: expected {expected}."
        )


def _find_run(folder: Path, checkpoint: str | None) -> EarlierRun:
    """The run that trained a model before it grew."""
    hidden_size = None
    for step in steps_before(folder, checkpoint):
        check_step(step, folder, "continue_schedule")
        if step.operation == "train":
            return _end_of(step.lineage, hidden_size, folder)
        if step.operation == "grow":
            source = step.lineage.get("source")
            hidden_size = source.get("hidden_size") if isinstance(source, Mapping) else None
        elif not step.keeps_entries:
            raise RunError(
                f"{folder}: its record has the step {step.operation!r} after the last run of teleflm "
                f"train, and does not say at which learning rate that stopped, as continue_schedule needs. {_WAY_OUT}"
            )
    raise RunError(
        f"{folder}: no record tells of the run that trained it, so where its learning rate stopped is not known, as "
        f"continue_schedule needs. {_WAY_OUT}"
    )


def _end_of(run: Mapping[str, Any], hidden_size: Any, folder: Path) -> EarlierRun:
    """Where a run stopped, of its part of a lineage."""
    where = f"{folder}: the run that it is from"
    schedule = run.get("lr_scheduler")
    schedule = schedule if isinstance(schedule, Mapping) else {}
    kind, settings = schedule.get("type"), schedule.get("settings")
    numbers = {
        "steps": run.get("steps"),
        "learning_rate": run.get("learning_rate"),
        "lr_scheduler.warmup_steps": schedule.get("warmup_steps"),
        "lr_scheduler.steps": schedule.get("steps"),
    }
    for name, value in numbers.items():
        if value is None or not _is_number(value) or not 0 <= value < 1e15:
            raise RunError(f"{where} is recorded with {name} {str(value)[:40]}, expected a number. {_WAY_OUT}")
    steps, rate, warmup, total = (float(value or 0) for value in numbers.values())
    if kind not in STABLE:
        raise RunError(
            f"{where} had lr_scheduler_type {str(kind)[:40]}, which has no stable phase that could go on. {_WAY_OUT}"
        )
    if not steps:
        raise RunError(f"{where} did no step. {_WAY_OUT}")
    base_width = run.get("mup_base_width")
    try:
        factor, next_factor = (
            schedule_factor(kind, int(warmup), int(total), settings, int(at)) for at in (steps - 1, steps)
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        raise RunError(f"{where} is recorded with a schedule that transformers refuses: {error}. {_WAY_OUT}") from None
    if factor != 1.0:
        phase = "warm-up" if steps <= warmup else "decay"
        raise RunError(
            f"{where} stopped in its {phase}, at {factor:.3g} of its peak {rate:g} in step {steps:.0f} of {total:.0f}: "
            "grow from a checkpoint of its stable phase, or set learning_rate yourself and leave continue_schedule out."
        )
    last = run.get("last_learning_rate")  # records of earlier versions have none
    if last is not None and not (_is_number(last) and math.isclose(last, rate * factor, rel_tol=_GIVEN)):
        raise RunError(
            f"{where} made its last step at the learning rate {shown(last)}, and not at the {rate * factor:g} that its "
            f"schedule over {total:.0f} steps has there: it was laid out anew after that step. {_WAY_OUT}"
        )
    moments = run.get("moments_step", 0 if run.get("moments") == "fresh" else None)
    adam_step = None if type(moments) not in (int, float) else moments + steps
    return EarlierRun(
        rate, int(steps), base_width, hidden_size, next_factor, adam_step, may_skip=run.get("mixed_precision") == "fp16"
    )


def schedule_factor(kind: str, warmup_steps: int, steps: int, settings: Any, at: int) -> float:
    """The factor on the peak, of the step after `at` others, by transformers' own schedule.

    Args:
        kind: one of `STABLE`.
        warmup_steps: of it.
        steps: that it is laid out for.
        settings: `lr_scheduler_kwargs`.
        at: steps before.

    Raises:
        TypeError, ValueError: transformers refuses the settings.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = get_scheduler(kind, optimizer, warmup_steps, steps, dict(settings or {}))
    return float(schedule.lr_lambdas[0](at))


def _compare_optimizer(path: Path, run: EarlierRun) -> bool | None:
    """Whether optimizer.pt has the learning rate and the step that the record says; None where one of them does not.

    Raises:
        RunError: they differ.
    """
    if not path.is_file():
        return None
    content = read_torch_file(str(path))
    groups = content.get("param_groups") if isinstance(content, dict) else None
    first = groups[0] if isinstance(groups, list) and groups and isinstance(groups[0], dict) else {}
    # The first group is that of the vector-like weights, which learn at the rate itself, or one of several alike.
    peak, rate = first.get("initial_lr"), first.get("lr")
    if not isinstance(peak, float) or not isinstance(rate, float):
        return None
    expected = run.learning_rate * run.next_factor
    if not (math.isclose(peak, run.learning_rate, rel_tol=_GIVEN) and math.isclose(rate, expected, rel_tol=_GIVEN)):
        raise RunError(
            f"{path} is of a run at learning rate {rate:g} of a peak {peak:g}, but the record of the run that trained "
            f"the model says {expected:g} of {run.learning_rate:g}: weights and optimizer are not of one checkpoint. "
            f"{_WAY_OUT}"
        )
    step = _adam_step(content, path)
    if step is None or run.adam_step is None:
        return None
    if step != run.adam_step and not (run.may_skip and step < run.adam_step):
        raise RunError(
            f"{path} is of Adam's step {step:g}, but by the record of the run that trained the model it was at "
            f"{run.adam_step:g} after its {run.step} steps: weights and optimizer are not of one checkpoint. {_WAY_OUT}"
        )
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _adam_step(content: Mapping[str, Any], path: Path) -> int | None:
    """Adam's counter, of the first parameter; None where there is none."""
    state = content.get("state")
    first = next(iter(state.values()), None) if isinstance(state, Mapping) else None
    step = first.get("step") if isinstance(first, Mapping) else None
    if step is None:
        return None
    with FileReader() as reader:
        return read_count(plain_value(step, reader), f"{path}: step of the first parameter")


def say_where_it_decays(args: TrainingArguments, steps: int) -> None:
    """Of a run that decays, say up to which step another stage can grow from it."""
    if SchedulerType(args.lr_scheduler_type) != SchedulerType.WARMUP_STABLE_DECAY or args.process_index != 0:
        return
    settings = args.lr_scheduler_kwargs if isinstance(args.lr_scheduler_kwargs, dict) else {}
    if decay := settings.get("num_decay_steps"):
        logger.warning(
            "the learning rate decays after step %d of %d: a stage that goes on with its schedule (continue_schedule) "
            "has to grow from a checkpoint up to there",
            *(steps - decay, steps),
        )


__all__ = ["STABLE", "ContinuedSchedule", "continue_schedule", "say_where_it_decays", "schedule_factor"]
