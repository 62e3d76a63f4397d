# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What to select: a declaration, and what the command line lays over it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .declaration import METHODS, SEED, Declaration, check, read_file, read_method, replace_value
from .operators import OPERATORS, THRESHOLDS
from .options import name_nearest
from .stages import SelectionError

_DEFAULT = METHODS[0]


@dataclass(frozen=True)
class SelectionSettings:
    """What to select. What is None, or empty, is as the declaration says.

    Args:
        count: rows to select; 30,000 in the methods.
        method: the declaration of this package to go by: `teleflm`, unless given; `k-center`, the same with a choice
            that seeks outliers, and with them what is damaged (see [`sft.selection.diversity`]); `target`, what is
            nearest to examples; or a baseline of as
            many rows, from valid and decontaminated rows without exact duplicates: `random`, `longest` (answers) or
            `ifd-top`.
        pipeline: a file with a declaration in its place; see [`sft.selection.declaration`].
        within: how `teleflm` takes rows from a cluster: by `quality`, `medoid` or `random`. By quality if there is a
            score, else at random, unless given.
        quota: share of each domain. Without it, `teleflm` and `k-center` take the shares there are; the baselines do
            not look at domains.
        domain_column: a column of the data that names a row's domain; rules decide where it is absent.
        decontaminate: files of evaluation sets, beside those declared; see [`sft.selection.decontaminate`].
        target: a file of examples of what should get better; rows are chosen by their nearness to them, as `method` is
            `target` then. See [`sft.selection.target`].
        keep_target_copies: keep rows that contain one of them.
        scorer: a model that scores; see [`sft.selection.score`]: a causal language model by the IFD, a reward model or
            another classifier by its output.
        scorer_label: of a classifier with several, whose probability is the score.
        scorer_format: `plain` for a classifier that reads plain text, and has no chat template.
        perplexity: a causal language model; rows whose answers it finds hardly or very surprising are dropped.
        score_column: a column of the data with a number for each row, the higher the better, in place of a scorer.
        embedder: see [`sft.selection.embed`].
        thresholds: by name, other than as declared; see [`sft.selection.operators.THRESHOLDS`].
        unique_ids: give each row the `id` that is otherwise only its `teleflm_id`.
        seed: of everything random; 0 in the methods.
        allow_fewer: select what there is if that is less than `count`, and rows of other domains where one has too few
            for its quota.
        sanitize_control_tokens: take rows that spell out a special token, such as HTML's `<s>`, as training does that
            has this set.

    Raises:
        SelectionError: a value is none of those possible, two of them contradict each other, or the declaration has
            nothing that one of them is for.
    """

    count: int | None = None
    method: str | None = None
    pipeline: str | Path | None = None
    within: str | None = None
    quota: Mapping[str, float] | None = None
    domain_column: str | None = None
    decontaminate: tuple[str, ...] = ()
    target: str | None = None
    keep_target_copies: bool = False
    scorer: str | None = None
    scorer_label: str | None = None
    scorer_format: str | None = None
    perplexity: str | None = None
    score_column: str | None = None
    embedder: str | None = None
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    unique_ids: bool = False
    seed: int | None = None
    allow_fewer: bool = False
    sanitize_control_tokens: bool = False

    def __post_init__(self) -> None:
        _ = self.declaration

    @property
    def declaration(self) -> Declaration:
        """All that is asked for, in one. A file is read each time."""
        if self.method is not None and self.pipeline is not None:
            raise SelectionError(
                f"--method {self.method} and --pipeline {self.pipeline} both say what to do; give one of them."
            )
        if self.method is not None and self.method not in METHODS:
            raise SelectionError(f"--method is {self.method!r}; expected one of {', '.join(METHODS)}.")
        declared = read_method(self._method) if self.pipeline is None else read_file(self.pipeline)
        where = next((f"{said}: " for said in (self.pipeline, self.method and f"--method {self.method}") if said), "")
        for setting in FLAGS:
            if (value := getattr(self, setting)) not in (None, ()):
                declared = self._lay_over(declared, setting, value)
        if self.keep_target_copies:
            declared = self._keep_copies(declared)
        self._check_switches(declared)
        declared = dataclasses.replace(
            declared,
            seed=declared.seed if self.seed is None else SEED.read(self.seed, "--seed"),
            unique_ids=declared.unique_ids or self.unique_ids,
            allow_fewer=declared.allow_fewer or self.allow_fewer,
            sanitize_control_tokens=declared.sanitize_control_tokens or self.sanitize_control_tokens,
        )
        check(declared, where, FLAGS)
        return self._set_thresholds(declared)

    def _lay_over(self, declared: Declaration, setting: str, value: Any) -> Declaration:
        """A declaration with one setting in its place."""
        flag = FLAGS[setting]
        found = _find(declared, setting)
        if not found:
            raise SelectionError(f"{flag} is for {self._say_what_for(setting)}.")
        for name, option in found:
            read = OPERATORS[name].options[option].read(value, flag)
            if isinstance(read, tuple):
                read = tuple(dict.fromkeys((*declared.value(name, option), *read)))
            declared = replace_value(declared, name, option, read)
        return declared

    def _keep_copies(self, declared: Declaration) -> Declaration:
        if declared.value("target-copies", "targets") is None:
            raise SelectionError("--keep-target-copies: nothing drops rows that contain a target; leave it out.")
        return replace_value(declared, "target-copies", "targets", None)

    @property
    def _method(self) -> str:
        return self.method or (_DEFAULT if self.target is None else "target")

    def _check_switches(self, declared: Declaration) -> None:
        """Refuse what is said of an operator that is off."""
        for setting, flag in FLAGS.items():
            if getattr(self, setting) in (None, ()) or not (found := [name for name, _ in _find(declared, setting)]):
                continue
            entries = [entry for entry in declared.entries if entry.name in found]
            if not any(entry.is_on for entry in entries):
                entry = entries[0]
                switch = FLAGS.get(entry.operator.options[entry.operator.switch].setting, entry.operator.switch)
                raise SelectionError(f"{flag}: {entry.name} is off; give {switch}.")

    def _say_what_for(self, setting: str) -> str:
        if self.pipeline is None:
            methods = [method for method in METHODS if _find(read_method(method), setting)]
            said = " or ".join(filter(None, (", ".join(methods[:-1]), methods[-1])))
            return f"--method {said}, not {self._method}"
        operators = [
            name
            for name, operator in OPERATORS.items()
            if any(option.setting == setting for option in operator.options.values())
        ]
        return f"the operator {' or '.join(operators)}, which {self.pipeline} does not have"

    def _set_thresholds(self, declared: Declaration) -> Declaration:
        """A declaration with what `--set` says in its place."""
        for full, value in self.thresholds.items():
            if full not in THRESHOLDS:
                raise SelectionError(f"--set: unknown threshold {full!r}; {name_nearest(full, THRESHOLDS)}")
            name, _, option = full.partition(".")
            entry = next((entry for entry in declared.entries if entry.name == name), None)
            if entry is None:
                raise SelectionError(f"--set {full}: {declared.name} has no {name}.")
            if not entry.is_on:
                flag = FLAGS.get(entry.operator.options[entry.operator.switch].setting, entry.operator.switch)
                raise SelectionError(f"--set {full}: {name} is off; give {flag}.")
            declared = replace_value(declared, name, option, THRESHOLDS[full].read(value, f"--set: {full}"))
        return declared


def _find(declared: Declaration, setting: str) -> list[tuple[str, str]]:
    """The operators and the options that a setting is for."""
    return [
        (entry.name, name)
        for entry in declared.entries
        for name, option in entry.operator.options.items()
        if option.setting == setting
    ]


# Setting -> option of the command line, of all that an operator can be told so.
FLAGS: Mapping[str, str] = {
    option.setting: "-n" if option.setting == "count" else f"--{option.setting.replace('_', '-')}"
    for operator in OPERATORS.values()
    for option in operator.options.values()
    if option.setting
}

__all__ = ["FLAGS", "SelectionSettings"]
