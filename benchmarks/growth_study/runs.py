# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The runs: a small model for each seed, and from it every arm; each a line of runs.jsonl when it is done.

Everything goes through what users have: `growth.grow_checkpoint` and `growth.training.train`.
"""

import fcntl
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from conversion.architecture import load_config
from growth import grow_checkpoint
from growth.training.mup import init_weights
from growth.training.resume import checkpoints
from growth.training.train import GrowthArguments, train
from modeling_teleflm import TeleFLMConfig, TeleFLMForCausalLM, TeleFLMTokenizer

from .arms import ARMS, BY_NAME, SMALL_ARMS, Arm, config, make_method, step_flops, steps, total_flops
from .corpus import make_corpus, measured_file, seed_files
from .presets import Preset

_VECTOR_STD, _MATRIX_STD = 0.05, 0.1  # of embeddings and head; of matrices at the base width
_ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.1, "max_grad_norm": 1.0}
_DECAY = 0.2  # of the steps of a run, or of a grown model, go down to 0; the small one that grows does not go down


@dataclass(frozen=True)
class Chosen:
    """What was tuned for an arm."""

    learning_rate: float
    warmup: float


class Interrupted(Exception):
    """The time of this call is over; the next one goes on with the run from its checkpoint."""


class _Until(TrainerCallback):
    """Saves and stops when the time is over; and has the last step measured, which no interval need end at."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
        elif time.monotonic() > self.deadline:
            control.should_save = control.should_training_stop = True


class Study:
    """The study at one size.

    Args:
        work: folder for texts and models.
        results: folder of `runs.jsonl`, `tuning.jsonl` and `corpus.json`.
        preset: the size.
        deadline: `time.monotonic()` at which a run is stopped and saved.
    """

    def __init__(self, work: Path, results: Path, preset: Preset, deadline: float = float("inf")) -> None:
        self.work, self.results, self.preset, self.deadline = work, results, preset, deadline
        self.corpus = work / "corpus"

    def prepare(self) -> None:
        """Make the corpus, and keep what it is."""
        described = make_corpus(self.corpus, self.preset)
        self.results.mkdir(parents=True, exist_ok=True)
        kept = self.results / "corpus.json"
        if kept.exists() and json.loads(kept.read_text()) != described:
            raise ValueError(f"{kept}: is of other text than {self.corpus}; other versions of the packages?")
        kept.write_text(json.dumps(described, indent=1) + "\n")

    # --- tuning ---

    def tune(self, arms: Sequence[Arm] = ARMS) -> None:
        """Run every choice of some arms once, at half the size; the small model first, as the others need it."""
        preset = self.preset.for_tuning()
        file = self.results / "tuning.jsonl"
        for arm in arms:
            if arm in SMALL_ARMS[1:]:
                continue  # as the first
            for rate in preset.learning_rates:
                for warmup in preset.warmups:
                    key = {"arm": arm.name, "learning_rate": rate, "warmup": warmup, "seed": preset.tuning_seed}
                    if _is_done(file, key):
                        continue
                    base = self.choice("small, equal tokens") if arm.method else None
                    run = self._run(preset, "tune", arm, Chosen(rate, warmup), base, preset.tuning_seed)
                    append(file, {**key, **run})

    def choice(self, name: str) -> Chosen:
        """The learning rate and the warm-up of an arm: those of its least loss at the end, of the tuning runs.

        Raises:
            ValueError: not all of them are there.
        """
        name = SMALL_ARMS[0].name if BY_NAME[name] in SMALL_ARMS else name
        runs = [run for run in read_lines(self.results / "tuning.jsonl") if run["arm"] == name]
        every = len(self.preset.learning_rates) * len(self.preset.warmups)
        if len(runs) < every:
            raise ValueError(f"{name} has {len(runs)} of {every} tuning runs; the command `tune` goes on.")
        best = min(runs, key=lambda run: (run["losses"][-1][1], run["learning_rate"], run["warmup"]))
        return Chosen(best["learning_rate"], best["warmup"])

    # --- results ---

    def run(self, seeds: Sequence[int], arms: Sequence[Arm] = ARMS) -> None:
        """Run the arms of some seeds that have no line yet."""
        file = self.results / "runs.jsonl"
        base = self.choice(SMALL_ARMS[0].name)
        for seed in seeds:
            for arm in arms:
                key = {"seed": seed, "arm": arm.name}
                if _is_done(file, key):
                    continue
                run = self._run(self.preset, "held_out", arm, self.choice(arm.name), base, seed)
                append(file, {**key, **run})
            shutil.rmtree(self.work / self.preset.name / f"seed-{seed}", ignore_errors=True)

    def _run(
        self, preset: Preset, measured: str, arm: Arm, chosen: Chosen, base: Chosen | None, seed: int
    ) -> dict[str, Any]:
        """One run; what it was and the losses it had, as JSON."""
        size = f"{preset.width}x{preset.layers}"
        folder = self.work / preset.name / f"seed-{seed}" / size
        texts = seed_files(self.corpus, folder, seed, _parts(preset), preset.block)
        held_out = measured_file(self.corpus, self.work / "measured", measured, preset.eval_blocks, preset.block)
        started = time.monotonic()
        if arm.method:
            assert base is not None
            small = self._small(preset, folder, base, seed, texts[0], held_out)
            model = folder / "grown"
            shutil.rmtree(model, ignore_errors=True)
            self._grow(preset, arm, small, model, seed)
            files = texts[1:2]
        else:
            model = folder / "new"
            shutil.rmtree(model, ignore_errors=True)
            make_model(model, config(arm.shape, preset), self.corpus / "tokenizer", preset, seed)
            files = texts
        count = steps(arm, preset)
        out = folder / "out"
        decay = round(_DECAY * (preset.grown_steps if arm.method else count))
        losses = self._train(preset, model, out, files, held_out, chosen, count, decay, seed, moments=arm.moments)
        shutil.rmtree(out)
        before = preset.small_steps if arm.method else 0
        return {
            "shape": arm.shape,
            "learning_rate": chosen.learning_rate,
            "warmup": chosen.warmup,
            "steps": count,
            "steps_before": before,
            "tokens": (count + before) * preset.block * preset.batch,
            "flops": total_flops(arm, preset),
            "flops_before": before * step_flops("small", preset),
            "step_flops": step_flops(arm.shape, preset),
            "losses": losses,
            "seconds": round(time.monotonic() - started, 1),
        }

    def _small(self, preset: Preset, folder: Path, base: Chosen, seed: int, text: Path, held_out: Path) -> Path:
        """The checkpoint that grows, with the moments of Adam; made once a seed."""
        out = folder / f"small-{base.learning_rate:g}-{base.warmup:g}"
        checkpoint = out / f"checkpoint-{preset.small_steps}"
        if not (out / "losses.json").exists():
            model = folder / "new"
            shutil.rmtree(model, ignore_errors=True)
            make_model(model, config("small", preset), self.corpus / "tokenizer", preset, seed)
            losses = self._train(preset, model, out, [text], held_out, base, preset.small_steps, 0, seed, saves=True)
            (out / "losses.json").write_text(json.dumps(losses))
        return checkpoint

    def _grow(self, preset: Preset, arm: Arm, small: Path, out: Path, seed: int) -> None:
        shapes = config(arm.shape, preset)
        fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        grow_checkpoint(
            small,
            out,
            {name: shapes[name] for name in fields},
            method=make_method(arm, preset),
            layers=arm.layers,
            new_layers=arm.new_layers,
            optimizer=small if arm.moments else None,
            seed=seed,
        )

    def _train(
        self,
        preset: Preset,
        model: Path,
        out: Path,
        files: list[Path],
        held_out: Path,
        chosen: Chosen,
        count: int,
        decay: int,
        seed: int,
        *,
        moments: bool = False,
        saves: bool = False,
    ) -> list[tuple[int, float]]:
        """Train; the losses on the held-out text, by the steps done.

        Raises:
            Interrupted: the time is over.
        """
        warmup = round(chosen.warmup * preset.grown_steps)
        schedule: dict[str, Any] = {"lr_scheduler_type": "constant_with_warmup"}
        if decay:
            kwargs = {"num_decay_steps": decay, "decay_type": "linear", "min_lr_ratio": 0.0}
            schedule = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": kwargs}
        last = checkpoints(str(out))
        arguments = TrainingArguments(
            output_dir=str(out),
            max_steps=count,
            per_device_train_batch_size=preset.batch,
            per_device_eval_batch_size=2 * preset.batch,
            learning_rate=chosen.learning_rate,
            warmup_steps=warmup,
            eval_strategy="steps",
            eval_steps=preset.eval_steps,
            eval_on_start=not last,
            logging_strategy="steps",
            logging_steps=preset.eval_steps,
            save_strategy="steps" if saves else "no",
            save_steps=count,
            resume_from_checkpoint="true" if last else None,
            seed=seed,
            data_seed=seed,
            bf16=preset.bfloat16,
            use_cpu=preset.device == "cpu",
            disable_tqdm=True,
            report_to="none",
            log_level="error",
            **schedule,
            **_ADAM,
        )
        growth = GrowthArguments(
            model_name_or_path=str(model),
            train_files=[str(file) for file in files],
            eval_files=[str(held_out)],
            block_size=preset.block,
            mup_base_width=preset.base_width,
            fresh_optimizer=not moments,
        )
        train(growth, arguments, [_Until(self.deadline)])
        state = json.loads((out / "trainer_state.json").read_text())
        if state["global_step"] < count:
            raise Interrupted
        found = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
        if count not in found:
            raise ValueError(f"{out}: the loss after the last step, {count}, was not measured.")
        return [(step, round(loss, 6)) for step, loss in sorted(found.items())]


def make_model(folder: Path, fields: Mapping[str, Any], tokenizer: Path, preset: Preset, seed: int) -> None:
    """A model of random weights, under muP, with the tokenizer beside it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TeleFLMForCausalLM(TeleFLMConfig(**{k: v for k, v in fields.items() if k != "model_type"}))
        ratio = fields["hidden_size"] / preset.base_width
        init_weights(model, width_ratio=ratio, vector_std=_VECTOR_STD, matrix_std=_MATRIX_STD)
    model.save_pretrained(folder)
    TeleFLMTokenizer(str(tokenizer / "tokenizer.model")).save_pretrained(folder)
    assert load_config(folder / "config.json")["mup_scale_factor"] == fields["mup_scale_factor"]


def _parts(preset: Preset) -> list[int]:
    """Tokens of the text before growth, after it, and of what only longer runs read."""
    longest = max(steps(arm, preset) for arm in ARMS)
    counts = [preset.small_steps, preset.grown_steps, max(0, longest - preset.small_steps - preset.grown_steps)]
    return [count * preset.block * preset.batch for count in counts]


# --- lines ------------------------------------------------------------------------------------------------------------


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The runs of a file; none if there is no file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def append(file: Path, run: Mapping[str, Any]) -> None:
    """Add a run; several processes may."""
    with file.open("a", encoding="utf-8") as lines:
        fcntl.flock(lines, fcntl.LOCK_EX)
        lines.write(json.dumps(run) + "\n")


def _is_done(file: Path, key: Mapping[str, Any]) -> bool:
    return any(all(run[name] == value for name, value in key.items()) for run in read_lines(file))


__all__ = ["Chosen", "Interrupted", "Study", "append", "make_model", "read_lines"]
