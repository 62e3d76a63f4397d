# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a person watches while a run goes on: numbers that the Trainer does not log, a log on disk, pictures of it.

Nothing here may end a run: what cannot be written is said once, as a warning.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from conversion.checkpoint.errors import one_line
from growth.training.mup import KINDS
from sft.data.examples import ALL_REASONS
from sft.data.labels import DataReport
from sft.training.loss_plot import LOSS_PLOT, SOURCE_PREFIX, write_loss_plot
from sft.training.run_log import NONFINITE, append_event, count_sessions, find_maker, read_history

logger = logging.getLogger(__name__)

TOKENS_PER_SECOND = "tokens_per_second"
_REFRESH = 300.0  # seconds between pictures of a run that goes on: one takes about a second
_SHOWN_REJECTS, _SHOWN_DETAIL = 5, 300
_SOURCE_COUNTS = ("weight", "rows", "rejected", "held_out", "overlapping", "taken", "tokens", "trained_tokens")
# Called with the output folder on process 0; makes a picture or a page of what is in it.
Picture = Callable[[Path], object]


class Stopwatch:
    """Seconds of training: the time since `start`, without what was excluded."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin at 0."""
        self._begin = self._mark = time.perf_counter()
        self._excluded = 0.0

    def mark(self) -> None:
        """Training has gone on up to now."""
        self._mark = time.perf_counter()

    def exclude_since_mark(self) -> None:
        """What was done since the last mark was no training."""
        now = time.perf_counter()
        self._excluded += now - self._mark
        self._mark = now

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """What is done inside is no training."""
        self.mark()
        try:
            yield
        finally:
            self.exclude_since_mark()

    def seconds(self) -> float:
        """Of training so far."""
        return time.perf_counter() - self._begin - self._excluded


class WatchMixin(Trainer):
    """A Trainer that also logs tokens per second, the learning rate of each group of muP, and the loss per source.

    - `tokens_per_second`: tokens of the rows that all processes read since the last log, as `num_tokens` counts them:
      prompts among them, and what pads short rows not; over the seconds since then that were not spent on evaluating,
      saving, sampling or drawing.
    - `learning_rate_matrix`: under muP, of the step that was just done, as `learning_rate`, that of vectors, is.
    - `nonfinite_losses`: how many batches since the last log had a loss that is no finite number, if any had; also
      where `logging_nan_inf_filter` keeps it out of `loss`.
    - `source_loss/NAME`: where the data have sources, the negative log-likelihood of the tokens of each since the last
      log: the sum of the weighted ones over the number of all trained ones, as in the loss. A source of which nothing
      was trained on is left out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stopwatch = Stopwatch()
        self.session = 0
        # What [`sft.training.train.build_trainer`] has read of what is to be measured and sampled.
        self.measured: Any = None
        self.prompts: Sequence[Any] = ()
        self.stop_ids: Sequence[int] = ()
        self.source_names: Sequence[str] = ()
        self._read_tokens: Any = 0
        self._lost_losses: Any = 0
        self._read_until = 0.0
        self._rates: list[float] = []
        self._source_sums: torch.Tensor | None = None

    def start_watch(self) -> None:
        """Begin to count."""
        self.stopwatch.start()
        self._read_tokens, self._lost_losses, self._read_until, self._source_sums = 0, 0, 0.0, None

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Count what is read, and do the step; nothing waits for the device."""
        self._read_tokens = self._read_tokens + count_tokens(inputs)
        if self.optimizer is not None:
            self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._lost_losses = self._lost_losses + ~torch.isfinite(loss.detach())
        return loss

    def add_source_losses(self, losses: torch.Tensor, sources: torch.Tensor, trained: torch.Tensor) -> None:
        """Count the losses of some tokens to their sources; nothing waits for the device.

        Args:
            losses: of each token, weighted; 0 where nothing is trained.
            sources: index of each token's source in `source_names`.
            trained: whether each token is trained on; of one shape, all three.
        """
        sums = sums_by_source(losses, sources, trained, len(self.source_names))
        self._source_sums = sums if self._source_sums is None else self._source_sums + sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with these numbers where it is a log of training. Every process has to call it."""
        if "loss" in logs:
            logs.update(self._watched())
        super().log(logs, start_time)

    def _watched(self) -> dict[str, float]:
        found: dict[str, float] = {}
        if getattr(self, "base_width", None) is not None and len(self._rates) == len(KINDS):
            found["learning_rate_matrix"] = self._rates[KINDS.index("matrix")]
        counts = (self._read_tokens, self._lost_losses)
        mine = torch.stack([torch.as_tensor(one, dtype=torch.float64, device=self.args.device) for one in counts])
        total, lost = self.accelerator.reduce(mine, reduction="sum").tolist()
        seconds = self.stopwatch.seconds()
        if total and seconds > self._read_until:
            found[TOKENS_PER_SECOND] = total / (seconds - self._read_until)
        if lost:
            found[NONFINITE] = lost
        self._read_tokens, self._lost_losses, self._read_until = 0, 0, seconds
        if self.source_names:
            found |= self._source_losses()
        return found

    def _source_losses(self) -> dict[str, float]:
        zeros = torch.zeros(2, len(self.source_names), dtype=torch.float64, device=self.args.device)
        mine = zeros if self._source_sums is None else self._source_sums
        self._source_sums = None
        losses, counts = self.accelerator.reduce(mine, reduction="sum").tolist()
        return {
            f"{SOURCE_PREFIX}{name}": loss / count
            for name, loss, count in zip(self.source_names, losses, counts, strict=True)
            if count
        }


def count_tokens(inputs: Any) -> torch.Tensor | int:
    """The tokens of a batch, without the padding of short rows; 0 of one that is not tokenized yet."""
    if not isinstance(inputs, Mapping):
        return 0
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum()
    return inputs["position_ids"].numel() if "position_ids" in inputs else 0  # rows in a row, none of them padded


def sums_by_source(losses: torch.Tensor, sources: torch.Tensor, trained: torch.Tensor, count: int) -> torch.Tensor:
    """Sums of losses and numbers of trained tokens, float64 [2, count], for each source.

    A product with a matrix of zeros and ones: `bincount` adds in any order on a GPU.
    """
    weights = trained.flatten().double()
    of_source = sources.flatten() == torch.arange(count, device=sources.device)[:, None]
    columns = torch.stack([losses.detach().flatten().double() * weights, weights], dim=1)
    return (of_source.double() @ columns).T


class WatchCallback(TrainerCallback):
    """Writes the log of a run, see [`sft.training.run_log`], and pictures of it; process 0 does.

    Args:
        trainer: of the run; its stopwatch is started and stopped.
        facts: what is trained on what, as JSON; `data` from [`describe_data`].
        pictures: drawn after a save, now and then, and in the end.
    """

    def __init__(self, trainer: WatchMixin, facts: Mapping[str, Any], pictures: Sequence[Picture] = ()) -> None:
        self.trainer, self.facts, self.pictures = trainer, facts, pictures
        self.folder = Path(str(trainer.args.output_dir))
        trainer.session = count_sessions(self.folder) if self._writes() else 0
        self.began = False
        self._broken: set[str] = set()
        self._drawn = time.monotonic()

    def _writes(self) -> bool:
        return self.trainer.is_world_process_zero()

    # --- events of the Trainer ---

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what begins, and start the stopwatch."""
        if self.began:  # again, with a smaller batch (auto_find_batch_size)
            self.trainer.session += self._writes()
        resumed = state.global_step > 0
        after = self._find_maker(state) if resumed and self._writes() else None
        values = {"resumed": resumed, "after": after, "max_steps": state.max_steps, "facts": dict(self.facts)}
        self._note("begin", {"step": state.global_step, **values})
        self.began = True
        self.trainer.start_watch()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Training went on."""
        self.trainer.stopwatch.mark()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note what was logged."""
        watch = self.trainer.stopwatch
        if "loss" in (kwargs.get("logs") or {}):
            watch.mark()  # the loss was waited for, and with it the step
        else:
            watch.exclude_since_mark()
        with watch.excluded():
            if state.log_history:
                self._note("log", state.log_history[-1])
            if time.monotonic() - self._drawn > _REFRESH:
                self.draw()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """It was evaluated."""
        self.trainer.stopwatch.exclude_since_mark()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """It was saved."""
        self.trainer.stopwatch.exclude_since_mark()
        with self.trainer.stopwatch.excluded():
            self.draw()

    # --- the run as a whole ---

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Note how what is done inside ends, and draw what there is then; errors pass through."""
        try:
            yield
        except KeyboardInterrupt:
            self._end("interrupted")
            raise
        except BaseException as error:
            self._end("failed", one_line(error) or type(error).__name__)
            raise
        self._end("done")

    def measured(self, when: str, results: Mapping[str, Any]) -> None:
        """Note results of texts and tasks."""
        self._note("measured", {"when": when, "step": self.trainer.state.global_step, "results": dict(results)})

    def draw(self) -> None:
        """Draw all pictures; one that cannot be is said once."""
        self._drawn = time.monotonic()
        if not self._writes():
            return
        for picture in (draw_loss, *self.pictures):
            name = getattr(picture, "__name__", type(picture).__name__)
            with self.harmless(name):
                picture(self.folder)

    def _end(self, status: str, error: str = "") -> None:
        if not self.began:  # a refusal before the first step is no run
            return
        self._note("end", {"step": self.trainer.state.global_step, "status": status, "error": error})
        self.draw()

    def _find_maker(self, state: TrainerState) -> int:
        """The session that made the checkpoint that is resumed.

        Where the log of this folder tells of none, as with a checkpoint of another one, what the checkpoint says was
        logged becomes a session of this log.
        """
        maker = None
        with self.harmless("log"):
            maker = find_maker(self.folder, state.log_history, state.global_step)
        if maker is None:
            self._note("begin", {"step": 0, "resumed": False, "facts": {}})
            for entry in state.log_history:
                self._note("log", entry)
            maker = self.trainer.session
            self.trainer.session += 1
        return maker

    def _note(self, event: str, values: Mapping[str, Any]) -> None:
        if not self._writes():
            return
        with self.harmless("log"):
            self.folder.mkdir(parents=True, exist_ok=True)
            append_event(self.folder, event, values)

    @contextmanager
    def harmless(self, what: str) -> Iterator[None]:
        """A failure is a warning, once."""
        try:
            yield
        except Exception as error:  # whatever a library for plots or a disk may fail with
            if what not in self._broken:
                self._broken.add(what)
                logger.warning("%s: %s cannot be written, the run goes on: %s", self.folder, what, one_line(error))


def draw_loss(folder: Path) -> None:
    """Write `loss.png` of the run in a folder."""
    write_loss_plot(read_history(folder), folder / LOSS_PLOT)


# --- what is said of a run --------------------------------------------------------------------------------------------


def describe_data(report: DataReport) -> dict[str, Any]:
    """What became of the rows, as JSON: counts, and of each reason to leave rows out the first few. No paths."""
    reasons: dict[str, dict[str, Any]] = {}
    for reject in report.rejects:
        found = reasons.setdefault(reject.reason, {"rows": 0, "means": ALL_REASONS.get(reject.reason, ""), "first": []})
        found["rows"] += 1
        if len(found["first"]) < _SHOWN_REJECTS:
            detail = reject.detail
            cut = detail if len(detail) <= _SHOWN_DETAIL else detail[: _SHOWN_DETAIL - 1] + "…"
            found["first"].append({"row": os.path.basename(reject.source), "detail": cut})
    return {
        "rows": report.rows,
        "kept": report.kept,
        "truncated": report.truncated,
        "tokens": report.tokens,
        "trained_tokens": report.trained_tokens,
        "left_out": reasons,
        "sources": [
            {"name": name, **{key: getattr(source, key) for key in _SOURCE_COUNTS}}
            for name, source in zip(source_names(report), getattr(report, "sources", ()), strict=True)
        ],
    }


def source_names(report: DataReport) -> list[str]:
    """What to call the sources of the data, if there are several: without folders and slashes, which trackers take for
    folders of their own; as they are if two would be called alike."""
    names = [source.name for source in getattr(report, "sources", ())]
    short = [", ".join(public_name(part).replace("/", "_") for part in name.split(", ")) for name in names]
    return short if len(set(short)) == len(short) else names


def public_name(name: str) -> str:
    """What to call a model on a page that may be published: a name of the Hub as it is, of a path its last part."""
    is_path = os.path.isabs(name) or name.startswith((".", "~")) or Path(name).exists() or name.count("/") > 1
    return Path(name).name if is_path else name


__all__ = [
    "TOKENS_PER_SECOND",
    "Picture",
    "Stopwatch",
    "WatchCallback",
    "WatchMixin",
    "count_tokens",
    "describe_data",
    "draw_loss",
    "public_name",
    "source_names",
    "sums_by_source",
]
