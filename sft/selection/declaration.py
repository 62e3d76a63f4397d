# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A selection as a file says it: a list of operators, in order.

    seed: 0
    unique_ids: false
    allow_fewer: false
    operators:
      - operator: common-text
        max_share: 0.01
      - operator: domains
        text: question
        own: true
      ...

An entry names an operator of [`sft.selection.operators.OPERATORS`], what of a conversation it reads where that can be
told (`text`, `own`; see [`sft.selection.common.Reading`]), and what else it is told. What is left out has its default.
The files of this package in `pipelines/` are the methods of `--method`. Files are plain YAML: nothing in them is run.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sft.yaml_text import load_yaml

from . import domains
from .common import TEXTS, Reading
from .operators import CHOOSES, FIRST, OPERATORS, Operator, columns_of
from .options import Name, Names, Number, name_nearest, show
from .stages import SelectionError

FOLDER = Path(__file__).with_name("pipelines")
METHODS = ("teleflm", "k-center", "target", "random", "longest", "ifd-top")
_SWITCHES = ("unique_ids", "allow_fewer", "sanitize_control_tokens")
_KEYS = ("seed", *_SWITCHES, "operators")
SEED = Number(0, 0, 2**32 - 1, "of everything random")


@dataclass(frozen=True)
class Entry:
    """One operator of a selection.

    Args:
        name: of the operator.
        values: all its options.
        reading: what it reads, if that can be told.
        number: of the entry in its file, from 1.
    """

    name: str
    values: Mapping[str, Any]
    reading: Reading | None
    number: int

    @property
    def operator(self) -> Operator:
        """What it is an entry of."""
        return OPERATORS[self.name]

    @property
    def is_on(self) -> bool:
        """Whether it does anything."""
        return not self.operator.switch or bool(self.values[self.operator.switch])

    @property
    def stage(self) -> str:
        """The name of its stage."""
        return self.operator.stage or self.name


@dataclass(frozen=True)
class Declaration:
    """A selection, as it is declared.

    Args:
        name: of its file: a method, or a path.
        entries: the operators, in order.
        seed, unique_ids, allow_fewer, sanitize_control_tokens: see [`sft.selection.settings.SelectionSettings`].
    """

    name: str
    entries: tuple[Entry, ...]
    seed: int = 0
    unique_ids: bool = False
    allow_fewer: bool = False
    sanitize_control_tokens: bool = False

    @property
    def active(self) -> list[Entry]:
        """The entries that do anything."""
        return [entry for entry in self.entries if entry.is_on]

    @property
    def stage_operators(self) -> list[str]:
        """The name of each stage's operator; the first stage, which reads the files, has none and is `rows`."""
        return ["rows", *(entry.name for entry in self.active)]

    def value(self, name: str, option: str) -> Any:
        """What an operator was told; None if the selection has no such operator."""
        return next((entry.values[option] for entry in self.entries if entry.name == name), None)

    @property
    def choice(self) -> Entry:
        """The last operator."""
        return self.entries[-1]

    def to_dict(self, *, without_folders: bool = False) -> dict[str, Any]:
        """As a file says it, all defaults filled in.

        Args:
            without_folders: paths of this machine by their last part.
        """
        entries = [_entry_to_dict(entry, without_folders) for entry in self.entries]
        told = {name: getattr(self, name) for name in ("seed", *_SWITCHES)}
        return {**told, "operators": entries}

    def to_yaml(self) -> str:
        """A file that says the same, with what each line means."""
        lines = [f"{key}: {_to_yaml(value)}" for key, value in self.to_dict().items() if key != "operators"]
        lines.append("operators:")
        for entry in self.entries:
            off = "" if entry.is_on else f" (off, without {entry.operator.switch})"
            lines.append(f"  # {entry.operator.does}{off}: {entry.operator.meaning}")
            for place, (key, value) in enumerate(_entry_to_dict(entry).items()):
                option = entry.operator.options.get(key)
                comment = f"  # {option.meaning}" if option else ""
                lines.append(f"  {' ' if place else '-'} {key}: {_to_yaml(value)}{comment}")
        return "\n".join(lines) + "\n"


def _entry_to_dict(entry: Entry, without_folders: bool = False) -> dict[str, Any]:
    read = {"text": entry.reading.text, "own": entry.reading.own} if entry.reading else {}
    values: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in entry.values.items()
    }
    for name, option in entry.operator.options.items():
        if without_folders and isinstance(option, Names):
            values[name] = [Path(item).name for item in values[name]]
        elif without_folders and isinstance(option, Name) and option.is_path and values[name]:
            values[name] = _without_folder(values[name])
    return {"operator": entry.name, **read, **values}


def _without_folder(name: str) -> str:
    """A model or a file by its last part, if it is of this machine; a prefix such as `rds:` stays."""
    prefix, colon, path = name.partition(":")
    if colon and not Path(name).exists() and Path(path).exists():
        return prefix + colon + Path(path).name
    return Path(name).name if Path(name).exists() else name


def _to_yaml(value: Any) -> str:
    """A value on one line, as JSON, which is YAML too; plain words without quotes."""
    if isinstance(value, str) and re.fullmatch(r"[a-z]+(-[a-z]+)*", value) and value not in ("true", "false", "null"):
        return value
    text = json.dumps(value, ensure_ascii=False)
    return "".join(
        c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 1 << 16 else f"\\U{ord(c):08x}" for c in text
    )


# --- reading ----------------------------------------------------------------------------------------------------------


def read_method(method: str) -> Declaration:
    """The declaration of one of [`METHODS`]."""
    return parse(load_yaml((FOLDER / f"{method}.yaml").read_text(encoding="utf-8")), method)


def read_file(file: str | Path) -> Declaration:
    """The declaration in a file of the user's. Whether its operators fit together, [`check`] says.

    Raises:
        SelectionError: it cannot be read, or says what cannot be said; names the file and the entry.
    """
    try:
        values = load_yaml(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise SelectionError(f"--pipeline {file}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise SelectionError(f"--pipeline {file}: not UTF-8 at byte {error.start}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise SelectionError(f"--pipeline {file}: not valid YAML: {' '.join(str(error).split())}.") from error
    return parse(values, str(file))


def parse(values: Any, name: str) -> Declaration:
    """A declaration of plain values.

    Raises:
        SelectionError: see [`read_file`].
    """
    if not isinstance(values, dict) or not isinstance(values.get("operators"), list):
        raise SelectionError(f"{name}: expected a mapping with a list of `operators`; --explain prints one.")
    for key in values:
        if key not in _KEYS:
            raise SelectionError(f"{name}: unknown key {show(key)}; {name_nearest(key, _KEYS)}")
    told: dict[str, Any] = {"seed": SEED.read(values.get("seed", 0), f"{name}: seed")}
    for key in _SWITCHES:
        told[key] = _read_bool(values.get(key, False), f"{name}: {key}")
    entries: dict[str, Entry] = {}
    for number, value in enumerate(values["operators"], start=1):
        entry = _parse_entry(value, number, f"{name}: entry {number}")
        if entry.name in entries:
            first = entries[entry.name].number
            raise SelectionError(f"{name}: entry {number} ({entry.name}): stands as entry {first} already.")
        entries[entry.name] = entry
    return Declaration(name, tuple(entries.values()), **told)


def _parse_entry(value: Any, number: int, where: str) -> Entry:
    if not isinstance(value, dict) or not isinstance(value.get("operator"), str):
        raise SelectionError(f"{where}: expected a mapping with `operator`, the name of one.")
    told = dict(value)
    name = told.pop("operator")
    if name not in OPERATORS:
        raise SelectionError(f"{where}: unknown operator {show(name)}; {name_nearest(name, OPERATORS)}")
    operator, where = OPERATORS[name], f"{where} ({name})"
    reading = _parse_reading(operator, told, where)
    for key in told:
        if key not in operator.options:
            known = [*operator.options, *(("text", "own") if operator.reading else ())]
            if not known:
                raise SelectionError(f"{where}: unknown key {show(key)}; it can be told nothing.")
            raise SelectionError(f"{where}: unknown key {show(key)}; {name_nearest(key, known)}")
    values = {
        key: option.read(told[key], f"{where}: {key}") if key in told else option.default
        for key, option in operator.options.items()
    }
    return Entry(name, values, reading, number)


def _parse_reading(operator: Operator, told: dict[str, Any], where: str) -> Reading | None:
    """What is to be read; takes it out of what was told."""
    default = operator.reading
    if default is None:
        for key in ("text", "own"):
            if key in told:
                raise SelectionError(f"{where}: what it reads cannot be told; leave {key!r} out.")
        return None
    text, own = told.pop("text", default.text), told.pop("own", None)
    if text not in operator.texts:
        kind = "cannot read" if text in TEXTS else "unknown text"
        raise SelectionError(f"{where}: {kind} {show(text)}; {name_nearest(text, operator.texts)}")
    may_own = text not in ("whole", "system")
    own = default.own and may_own if own is None else _read_bool(own, f"{where}: own")
    if own and not may_own:
        raise SelectionError(f"{where}: own is true and text is {show(text)}; text: turns leaves system prompts out.")
    return Reading(text, own)


def _read_bool(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise SelectionError(f"{name} is {show(value)}; expected true or false.")
    return value


# --- whether operators fit together -----------------------------------------------------------------------------------


def check(declaration: Declaration, where: str, flags: Mapping[str, str]) -> None:
    """Refuse what cannot run: columns that nothing makes, two scores, a choice that is missing or not the last.

    Args:
        declaration: to check.
        where: begins the messages; empty for what the command line alone says.
        flags: setting -> option of the command line.

    Raises:
        SelectionError: naming the entry and the way out.
    """
    entries = declaration.entries
    choosing = [name for name, operator in OPERATORS.items() if operator.does == CHOOSES]
    if not any(entry.operator.does == CHOOSES for entry in entries):
        raise SelectionError(f"{where}no operator chooses; end with one of {', '.join(choosing)}.")
    columns, made_by = set(FIRST), dict[str, Entry]()
    for entry in declaration.active:
        at = f"{where}entry {entry.number} ({entry.name})"
        if entry.operator.does == CHOOSES and entry != entries[-1]:
            raise SelectionError(f"{at}: chooses, so it is the last; {entries[-1].name} stands after it.")
        for column in columns_of(entry.operator, entry.reading):
            if column not in columns:
                raise SelectionError(f"{at}: needs `{column}`{_say_who_makes(column, declaration, flags)}")
        for column in entry.operator.makes:
            if column in made_by:
                both = " and ".join(_say(each, flags) for each in (made_by[column], entry))
                raise SelectionError(f"{where}{both} both give a {column}; give one of them.")
            made_by[column] = entry
        columns.update(entry.operator.makes)
    _check_choice(declaration, where, columns)


def _say_who_makes(column: str, declaration: Declaration, flags: Mapping[str, str]) -> str:
    makers = [name for name, operator in OPERATORS.items() if column in operator.makes]
    for entry in declaration.entries:
        if entry.name in makers and not entry.is_on:
            flag = flags.get(entry.operator.options[entry.operator.switch].setting, entry.operator.switch)
            return f"; {entry.name}, which makes it, is off: give {flag}."
    said = makers[0] if len(makers) == 1 else f"one of {', '.join(makers)}"
    way_out = ", or say own: false" if column == "common" else ""
    return f", which {said} makes; put it before{way_out}."


def _say(entry: Entry, flags: Mapping[str, str]) -> str:
    switch = entry.operator.switch
    flag = flags.get(entry.operator.options[switch].setting) if switch else None
    return f"{flag} {entry.values[switch]}" if flag else entry.name


def _check_choice(declaration: Declaration, where: str, columns: set[str]) -> None:
    values = declaration.choice.values
    if "targets" in values and values["targets"] is None:
        raise SelectionError(f"{where}{declaration.choice.name} needs examples to go by: give --target.")
    if values.get("within") == "quality" and "score" not in columns:
        raise SelectionError(f"{where}--within quality needs a score: give --score-column or --scorer.")
    unknown = [name for name in values["quota"] or () if name not in domains.DOMAINS]
    if unknown and declaration.value("domains", "column") is None:
        known = ", ".join(domains.DOMAINS)
        raise SelectionError(
            f"{where}--quota: unknown domain {unknown[0]!r}; known are {known}, or give --domain-column."
        )


def replace_value(declaration: Declaration, name: str, option: str, value: Any) -> Declaration:
    """The same, with another value of an option of an operator."""
    entries = tuple(
        dataclasses.replace(entry, values={**entry.values, option: value}) if entry.name == name else entry
        for entry in declaration.entries
    )
    return dataclasses.replace(declaration, entries=entries)


__all__ = [
    "METHODS",
    "SEED",
    "Declaration",
    "Entry",
    "check",
    "parse",
    "read_file",
    "read_method",
    "replace_value",
]
