# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Results as a file that `teleflm publish` reads: of which model, of which texts, when, by what.

    format, date, versions     of this file; of its latest results; of what computed them
    model                      the identity of the model: see `conversion.model_identity`
    results                    task -> `metric,filter` -> value, as lm-evaluation-harness writes them
    configs                    task -> who measured it and how, and the digest of what was read
    n-shot                     task -> examples before a question

It holds no path of this machine: it is there to be published.
"""

import importlib.metadata
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from conversion.checkpoint.atomic_file import write_atomically
from conversion.checkpoint.errors import CheckpointError, printable
from conversion.checkpoint.manifest import package_version
from conversion.checkpoint.strict_json import read_json_object
from conversion.checkpoint.workspace import naming_errors
from conversion.hub.results import RESULTS_FORMAT
from conversion.model_identity import ModelIdentity

from .measure import Evaluation

_PARTS = ("results", "configs", "n-shot")


def results_of(evaluation: Evaluation) -> dict[str, Any]:
    """The content of a results file.

    Args:
        evaluation: with the model's identity.
    """
    results: dict[str, dict[str, float | str]] = {}
    configs: dict[str, dict[str, Any]] = {}
    how = {
        "evaluator": f"teleflm {package_version()}",
        "forward": evaluation.forward,
        "dtype": evaluation.dtype,
        "window": evaluation.window,
    }
    for text in evaluation.texts:
        values = {"bits_per_byte": text.bits_per_byte, "perplexity": text.perplexity}
        results[text.name] = {f"{name},none": value for name, value in values.items() if math.isfinite(value)}
        configs[text.name] = {
            **how,
            "dataset_name": f"window {evaluation.window}, stride {evaluation.stride}",
            "stride": evaluation.stride,
            "documents": text.documents,
            "bytes": text.nbytes,
            "tokens": text.tokens,
            "sha256": text.sha256,
        }
    for task in evaluation.tasks:
        results[task.name] = {
            **{f"{name},none": metric.value for name, metric in task.metrics.items()},
            **{f"{name}_stderr,none": m.stderr for name, m in task.metrics.items() if m.stderr is not None},
        }
        configs[task.name] = {**how, "questions": task.questions, "sha256": task.sha256}
    shots = {task.name: 0 for task in evaluation.tasks}
    return _file(evaluation.identity, results, configs, shots, _versions("torch", "transformers", "numpy"))


def harness_results_of(said: Mapping[str, Any], identity: ModelIdentity | None) -> dict[str, Any]:
    """What lm-evaluation-harness returned, as the content of a results file.

    Args:
        said: its dictionary.
        identity: of the model.
    """
    evaluator = f"lm-evaluation-harness {importlib.metadata.version('lm_eval')}"
    results = {
        task: {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and "," in name
        }
        for task, metrics in said["results"].items()
    }
    configs = {task: {"evaluator": evaluator, **_texts_of(said.get("configs", {}).get(task, {}))} for task in results}
    shots = {task: count for task, count in (said.get("n-shot") or {}).items() if isinstance(count, int)}
    return _file(identity, results, configs, shots, _versions("torch", "transformers", "lm_eval"))


def _texts_of(config: Mapping[str, Any]) -> dict[str, str]:
    """What names the data on the Hub; paths of this machine are nobody's business."""
    names = ("dataset_path", "dataset_name", "test_split", "validation_split")
    found = {name: config[name] for name in names if isinstance(config.get(name), str)}
    if found.get("dataset_path") in ("json", "csv", "text", "parquet") or Path(found.get("dataset_path", "")).exists():
        found.pop("dataset_path", None)
    return found


def _file(
    identity: ModelIdentity | None,
    results: Mapping[str, Any],
    configs: Mapping[str, Any],
    shots: Mapping[str, int],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    return {
        "format": RESULTS_FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"teleflm": package_version(), **versions},
        "model": asdict(identity) if identity else None,
        "results": {name: value for name, value in results.items() if value},
        "configs": dict(configs),
        "n-shot": dict(shots),
    }


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_results(path: Path, content: Mapping[str, Any]) -> list[str]:
    """Write a results file; what one that is there says of other tasks of the same model stays.

    That it is the same is known by digests alone: a file without them is never added to, nor are results without.

    Args:
        path: the file.
        content: of it.

    Returns:
        Notes: what was replaced.

    Raises:
        CheckpointError: what is there is no results file of ours, or the results name no weights and others are there.
        OSError: it cannot be written.
    """
    before, notes = check_results_file(path, has_digests=content["model"] is not None), []
    merged = dict(content)
    if before and (what := _difference(before.get("model"), content["model"])):
        notes = [f"{path}: had results of {_named(before['results'])} {what}; they are gone."]
    elif before:
        measured = {name for part in _PARTS for name in content[part]}
        notes = [
            f"{path}: had results of another {name}, of other content; they are gone."
            for name in sorted(measured & before["configs"].keys())
            if _text_digest(before, name) != _text_digest(content, name)
        ]
        for part in _PARTS:  # of a task that is measured anew, nothing of before stays in any of them
            kept = {name: value for name, value in before[part].items() if name not in measured}
            merged[part] = {**kept, **content[part]}
    with naming_errors(path):
        write_atomically(path, (json.dumps(merged, indent=2, ensure_ascii=False) + "\n").encode())
    return notes


def _difference(before: Any, now: Mapping[str, Any]) -> str | None:
    """How earlier results are not of the model that was measured now, in words; None if they are of it."""
    if before is None:
        return "that name no weights (--no-digest)"
    if before == now:
        return None
    try:
        what = ModelIdentity(**before).difference(ModelIdentity(**now))
    except TypeError:  # of no shape of ours
        what = "another model"
    return f"that were measured with {what or 'another model'}"


def _named(results: Mapping[str, Any]) -> str:
    names = [printable(name) for name in results]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _text_digest(content: Mapping[str, Any], name: str) -> Any:
    config = content["configs"].get(name)
    return config.get("sha256") if isinstance(config, dict) else None


def check_results_file(path: Path, *, has_digests: bool) -> dict[str, Any] | None:
    """Check, before anything is computed, that results can be written to a file.

    Args:
        path: the file.
        has_digests: whether the results will name the weights that they are of.

    Returns:
        its content, if it is there.

    Raises:
        CheckpointError: its folder is not there, what is there is no results file of ours, or there are results and
            these would name no weights.
    """
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: there is no such folder; make it first.")
    if not os.access(path.parent, os.W_OK):
        raise CheckpointError(f"{path}: its folder cannot be written to; give --output FILE elsewhere.")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; give the name of a file.")
    if not path.exists():
        return None
    try:
        found = read_json_object(path)
    except CheckpointError:
        found = {}
    if found.get("format") != RESULTS_FORMAT or not all(isinstance(found.get(part), dict) for part in _PARTS):
        raise CheckpointError(f"{path}: is there already, and no results file of teleflm eval; give another --output.")
    if not has_digests:
        raise CheckpointError(
            f"{path}: has results already, and without digests nothing tells whether others are of the same model; "
            "leave --no-digest out, or give another --output."
        )
    return found


__all__ = ["check_results_file", "harness_results_of", "results_of", "write_results"]
