# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Checkpoints that are whole or can be told from whole ones, and which of them are kept.

transformers removes the checkpoints that were changed longest ago: where a clock was set back, and where anything was
put into an old one, it removes the one that it has just saved. Here the steps decide. What says that a checkpoint is
whole, trainer_state.json, is removed before one of the same name is written again, and what it is of (`run.json`), with
sizes and samples of what was saved, is written before it. What a library says where a disk is full, or a file damaged,
is told in one line.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from conversion.checkpoint.errors import CheckpointError, one_line
from conversion.saved_files import FILES, describe_files

from .errors import RunError
from .grown_adam import check_loaded_moments
from .resume import STATE, checkpoints, find_fault
from .same_run import write_run
from .schedule import check_schedule, follow_schedule
from .sharded import ShardedSaveMixin

logger = logging.getLogger(__name__)


class CheckpointMixin(ShardedSaveMixin):
    """Gives a Trainer, or a trainer derived from it, checkpoints as above, and models that are saved whole.

    `run_description` is what `run.json` says, see [`growth.training.same_run.hold_to_run`].
    """

    state: Any
    callback_handler: Any
    control: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    run_description: Mapping[str, Any] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(OwnIntervals())  # type: ignore[attr-defined]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As Trainer._save_checkpoint.

        Raises:
            RunError: it cannot be saved.
        """
        place = Path(self._get_output_dir(trial))  # type: ignore[attr-defined]
        folder = place / f"checkpoint-{self.state.global_step}"
        limit = self.args.save_total_limit
        self._make_room_for_callbacks()
        try:
            with saving(folder):
                if self.args.should_save:
                    (folder / STATE).unlink(missing_ok=True)
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            for path in superseded(place, self.state.global_step, limit, best):
                shutil.rmtree(path, ignore_errors=True)

    def _make_room_for_callbacks(self) -> None:
        """Let callbacks be saved that the checkpoint from which the run goes on knew nothing of.

        A Trainer replaces what `trainer_state.json` had of each, and fails where it had nothing.
        """
        ours = [callback for callback in self.callback_handler.callbacks if isinstance(callback, ExportableState)]
        fresh: Any = TrainerState(stateful_callbacks=ours).stateful_callbacks  # type: ignore[arg-type]
        known = self.state.stateful_callbacks
        for name, state in fresh.items():
            known.setdefault(name, state)
        known.setdefault(type(self.control).__name__, self.control.state())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer.save_model; into a checkpoint comes what it is of."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            return
        if output_dir is not None and self.run_description is not None and self.args.should_save:
            write_run(Path(output_dir), self.run_description)
        # The arguments are saved as they are; from here on the Trainer is to remove nothing.
        self.args.save_total_limit = None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As Trainer._save_optimizer_and_scheduler; then what was saved is noted, before the checkpoint counts."""
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # of which each process saves a part
            self.accelerator.wait_for_everyone()
        if self.run_description is not None and self.args.should_save:
            folder = Path(output_dir)
            write_run(folder, {**self.run_description, FILES: describe_files(folder)})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer._load_optimizer_and_scheduler; the next step then has the rate that the schedule has for it.

        Raises:
            RunError, CheckpointError: a file cannot be loaded, the schedule in it is none of this run's kind, or the
                moments are none.
        """
        with _loading(checkpoint):
            if checkpoint is not None:
                check_schedule(Path(checkpoint), self.lr_scheduler)
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            if checkpoint is not None:
                check_loaded_moments(self.optimizer)
                follow_schedule(self.lr_scheduler)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer._run_epoch, which asks after each step whether it was the last one; where none is left, none is
        done."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]
            return
        if self.state.is_world_process_zero:
            logger.warning(
                "step %d is done, of %d: there is no step left to do", *(self.state.global_step, self.state.max_steps)
            )
        self.control.should_training_stop = True

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _loading(checkpoint):
            super()._load_scaler(checkpoint)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _loading(checkpoint):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]


class OwnIntervals(TrainerCallback):
    """Has a resumed run log, evaluate and save as often as its keys say.

    A Trainer takes that from `trainer_state.json`, as the run before had it.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the steps anew; shares are of the length that the run has now."""
        state.compute_steps(args, state.max_steps)


def superseded(output_dir: Path, step: int, limit: int | None, best: str | Path | None = None) -> list[Path]:
    """The checkpoints that are to be removed, once that of a step is saved; first to go first.

    Later ones than this step were left by a session that went further, before the run went back: they go first.

    Args:
        output_dir: holds them.
        step: of the one that was just saved, which stays.
        limit: how many are to stay; None or less than 1: all.
        best: the one of the best metric, which stays too.
    """
    if limit is None or limit < 1:
        return []
    there = checkpoints(output_dir)  # the last first
    ours = {path: int(path.name.partition("-")[2]) for path in there}
    oldest_first = sorted(there, key=lambda path: (ours[path] <= step, ours[path]))
    kept = {path for path in there if ours[path] == step or (best is not None and _same(path, Path(best)))}
    many = len(there) - max(limit, len(kept))
    return [path for path in oldest_first if path not in kept][: max(many, 0)]


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Say in one line that something cannot be saved, and from where a run can go on.

    Raises:
        RunError: what is done inside fails.
    """
    try:
        yield
    except (RunError, CheckpointError):
        raise
    except Exception as error:  # of the system, or in the words of whichever library writes the file
        raise RunError(f"{folder} cannot be saved: {one_line(error)}{_free(folder)}. {_way_out(folder)}") from error


def _free(folder: Path) -> str:
    for place in (folder, *folder.parents):
        with suppress(OSError):
            return f" ({shutil.disk_usage(place).free / 1e6:,.1f} MB are free there)"
    return ""


def _way_out(folder: Path) -> str:
    output_dir = folder.parent if folder.name.startswith("checkpoint-") else folder
    for path in checkpoints(output_dir):
        if find_fault(path) is None:
            return f"Mend that, and resume_from_checkpoint: true goes on from {path.name}."
    return "There is no checkpoint to go on from."


@contextmanager
def _loading(checkpoint: str | None) -> Iterator[None]:
    """Name the checkpoint in what a library says about a file of it."""
    try:
        yield
    except (RunError, CheckpointError):
        raise
    except Exception as error:
        raise RunError(
            f"{checkpoint} cannot be loaded: {one_line(error)}; name another checkpoint with resume_from_checkpoint."
        ) from error


__all__ = ["CheckpointMixin", "OwnIntervals", "saving", "superseded"]
