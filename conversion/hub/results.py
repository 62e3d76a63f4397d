# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What evaluations have measured, from the file that the evaluator wrote to the `model-index` of a card.

A file of `teleflm eval` says of which weights it is, and is claimed of these alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.errors import CheckpointError
from ..checkpoint.strict_json import read_json_object
from ..model_identity import ModelIdentity

RESULTS = "teleflm_eval.json"  # in the folder of a model
RESULTS_FORMAT = "teleflm-eval-1"
_MAX_RESULTS = 2000  # all of lm-evaluation-harness's largest groups together have fewer
_MAX_NAME = 120
_STDERR = "_stderr"
_WEIGHTS = "teleflm_weights"  # argument of a metric in a card: what it was measured of


@dataclass(frozen=True)
class Result:
    """One number that was measured.

    Args:
        task: the evaluator's name of it.
        metric: for example `acc`.
        value: of the metric.
        stderr: its standard error, if there is one.
        filter: what was done to the answers first, for example `strict-match`; empty if nothing.
        shots: examples before the question, if the evaluator says how many.
        dataset: id on the Hub, where it is known.
        config: of that dataset.
        split: of that dataset.
        evaluator: what measured it.
        model: what it was measured of, if the file says so.
    """

    task: str
    metric: str
    value: float
    stderr: float | None = None
    filter: str = ""
    shots: int | None = None
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    evaluator: str = ""
    model: ModelIdentity | None = None


def read_results(path: str | Path) -> tuple[Result, ...]:
    """Read the results file of an evaluation.

    Args:
        path: the JSON that `teleflm eval` wrote, or lm-evaluation-harness (`results_*.json` of its `--output_path`).

    Raises:
        CheckpointError: the file cannot be read, or is none of these.
    """
    where, said = str(path), read_json_object(Path(path))
    tasks = said.get("results")
    if not isinstance(tasks, dict):
        raise CheckpointError(
            f"{where}: results is {_kind(tasks)}, expected tasks with their metrics, as teleflm eval (--record, "
            "--output) and lm-evaluation-harness (lm_eval --output_path) write them."
        )
    version = said.get("lm_eval_version")
    evaluator = "lm-evaluation-harness" + (f" {_name(version)}" if isinstance(version, str) and version else "")
    model = _model(said, where)
    results = [
        replace(result, model=model)
        for name, task in tasks.items()
        for result in _results_of(name, task, said, evaluator, where)
    ]
    if not results:
        raise CheckpointError(f"{where}: results holds no number; is it a results file?")
    if len(results) > _MAX_RESULTS:
        raise CheckpointError(f"{where}: results holds {len(results)} numbers, expected at most {_MAX_RESULTS}.")
    return tuple(results)


def _model(said: Mapping[str, Any], where: str) -> ModelIdentity | None:
    """What was measured, of a file of `teleflm eval`."""
    if said.get("format") != RESULTS_FORMAT or said.get("model") is None:
        return None
    match said["model"]:
        case {"weights": str() as weights, "config": str() as config, "tokenizer": str() | None as tokenizer}:
            return ModelIdentity(weights, config, tokenizer)
    raise CheckpointError(f"{where}: model is {_kind(said['model'])}, expected digests; run teleflm eval again.")


def claimed_results(
    given: Sequence[Result], folder: Path, identify: Callable[[], ModelIdentity]
) -> tuple[tuple[Result, ...], list[str]]:
    """The results that are of the model in a folder: those that were given, and those in a file of its own.

    Args:
        given: results that somebody names.
        folder: the model's.
        identify: finds out what the model in the folder is, which may take long; called where a result says what it
            was measured of.

    Returns:
        The results, and notes: of what nothing is claimed, and what cannot be checked.

    Raises:
        CheckpointError: given results are of another model.
    """
    own = read_results(folder / RESULTS) if (folder / RESULTS).is_file() else ()
    identity = identify() if any(result.model for result in (*given, *own)) else None
    for result in given:
        if identity and result.model and (what := identity.difference(result.model)):
            raise CheckpointError(
                f"{folder}: the results of {result.task} were measured with {what} than this folder has; "
                f"measure these: teleflm eval {folder} --record."
            )
    notes = []
    if any(result.model is None for result in given):
        notes.append("Results that name no weights are taken as they are: nothing says that they are this model's.")
    if not own:
        return tuple(given), notes
    measured = own[0].model  # of one file, all have the same
    what = identity.difference(measured) if identity and measured else None
    if measured is None or what:
        why = f"was measured with {what} than this folder has" if what else "names no weights (--no-digest)"
        return tuple(given), [*notes, f"{RESULTS} {why}: its results are not in the card."]
    named = {(result.task, result.metric) for result in given}
    return (*given, *(result for result in own if (result.task, result.metric) not in named)), notes


def _results_of(name: str, task: Any, said: Mapping[str, Any], evaluator: str, where: str) -> list[Result]:
    if not isinstance(task, dict):
        raise CheckpointError(f"{where}: results of {_name(name)} is {_kind(task)}, expected metrics.")
    # Since 0.4, `acc,none` is the metric and its filter, beside counts and names without a comma.
    has_filters = any("," in key for key in task)
    about = _of_task(said, "configs", name)
    about = about if isinstance(about, dict) else {}
    shots = _of_task(said, "n-shot", name)
    results = []
    for key, value in task.items():
        metric, _, filter = key.partition(",")
        if metric.endswith(_STDERR) or has_filters != ("," in key) or key == "alias":
            continue
        if isinstance(value, str) and has_filters and value.strip() in ("", "N/A"):
            continue
        number = _number(value)
        if number is None:
            raise CheckpointError(
                f"{where}: {_name(key)} of {_name(name)} is {_kind(value)}, expected a finite number."
            )
        results.append(
            Result(
                task=_name(name),
                metric=_name(metric),
                value=number,
                stderr=_number(task.get(f"{metric}{_STDERR},{filter}" if has_filters else metric + _STDERR)),
                filter="" if filter == "none" else _name(filter),
                shots=shots if isinstance(shots, int) and not isinstance(shots, bool) else None,
                dataset=_text(about.get("dataset_path")),
                config=_text(about.get("dataset_name")),
                split=_text(about.get("test_split")) or _text(about.get("validation_split")),
                evaluator=_text(about.get("evaluator")) or evaluator,
            )
        )
    return results


def _of_task(said: Mapping[str, Any], field: str, task: str) -> Any:
    table = said.get(field)
    return table.get(task) if isinstance(table, dict) else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _text(value: Any) -> str | None:
    return _name(value) if isinstance(value, str) and value.strip() else None


def _name(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_NAME else line[: _MAX_NAME - 3] + "..."


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a JSON {type(value).__name__}"


def model_index(name: str, results: Sequence[Result]) -> list[dict[str, Any]]:
    """The `model-index` of results, as huggingface_hub makes it.

    Args:
        name: of the model.
        results: what was measured.
    """
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    named = [
        EvalResult(
            task_type="text-generation",
            dataset_type=result.dataset or result.task,
            dataset_name=result.task,
            dataset_config=result.config,
            dataset_split=result.split,
            dataset_args=None if result.shots is None else {"num_few_shot": result.shots},
            metric_type=result.metric,
            metric_value=result.value,
            metric_name=f"{result.metric} ({result.filter})" if result.filter else result.metric,
            metric_args={_WEIGHTS: result.model.weights} if result.model else None,
        )
        for result in results
    ]
    # One call a task: the Hub's key of a group is the dataset, which several tasks may share, each with its own shots.
    groups: dict[str, list[Any]] = {}
    for result in named:
        groups.setdefault(f"{result.dataset_name} {result.dataset_args}", []).append(result)
    entries = [eval_results_to_model_index(name, group)[0]["results"] for group in groups.values()]
    return [{"name": name, "results": [entry for group in entries for entry in group]}] if entries else []


def merge_model_index(fresh: Any, owners: Any) -> Any:
    """Two values of `model-index` as one: of the same metric on the same dataset, the fresh one counts.

    What is not of the Hub's shape is the owner's to correct, and stays.
    """
    if not (_is_index(fresh) and _is_index(owners)):
        return owners or fresh
    new = {key for entry in fresh[0]["results"] for key in _keys(entry)}
    kept = []
    for entry in owners[0]["results"]:
        metrics = [metric for metric, key in zip(entry["metrics"], _keys(entry), strict=True) if key not in new]
        kept += [{**entry, "metrics": metrics}] if metrics else []
    first = {**owners[0], "name": fresh[0].get("name"), "results": [*kept, *fresh[0]["results"]]}
    return [first, *owners[1:]]


def without_measured(index: Any) -> Any:
    """A `model-index` without what `teleflm eval` measured, which is claimed anew of what is published, or not.

    What is not of the Hub's shape stays; None if nothing is left.
    """
    if not _is_index(index):
        return index
    kept = []
    for entry in index[0]["results"]:
        metrics = [metric for metric in entry["metrics"] if not _is_measured(metric)]
        kept += [{**entry, "metrics": metrics}] if metrics or not entry["metrics"] else []
    rest = [{**index[0], "results": kept}] if kept or not index[0]["results"] else []
    return [*rest, *index[1:]] or None


def _is_measured(metric: Mapping[str, Any]) -> bool:
    arguments = metric.get("args")
    return isinstance(arguments, Mapping) and _WEIGHTS in arguments


def _is_index(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and isinstance(value[0].get("results"), list)
        and all(
            isinstance(entry, dict)
            and isinstance(entry.get("metrics"), list)
            and all(isinstance(metric, dict) for metric in entry["metrics"])
            for entry in value[0]["results"]
        )
    )


def _keys(entry: Mapping[str, Any]) -> list[str]:
    """What tells each metric of an entry from others; a name is for people."""
    task, dataset = entry.get("task"), entry.get("dataset")
    kind = task.get("type") if isinstance(task, dict) else task
    place = (
        {key: value for key, value in dataset.items() if key != "revision"} if isinstance(dataset, dict) else dataset
    )
    return [repr((kind, place, metric.get("type"), metric.get("name"))) for metric in entry["metrics"]]


__all__ = [
    "RESULTS",
    "RESULTS_FORMAT",
    "Result",
    "claimed_results",
    "merge_model_index",
    "model_index",
    "read_results",
    "without_measured",
]
