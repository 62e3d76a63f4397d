# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Tokenize conversations once, to disk, and train from there as often as wanted.

The folder is a dataset of the `datasets` library (`load_from_disk` opens it) beside which `prepared.json` says of what
it was made: the digest of the conversations, of the tokenizer and of the chat template, and the labelling. Training
opens it only if the tokenizer, the template and the labelling of the run are those.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.checkpoint.manifest import package_version, sample_digest
from sft.data.checks import Reject
from sft.data.formats import DataError, Problem, Progress
from sft.data.labels import DataReport, Labelling, Tally, record_batches, require_rows, tokenize_rows
from sft.tokenizer import tokenizer_digest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PREPARED = "prepared.json"
# What `datasets` writes, and caches of later steps beside it.
_OURS = re.compile(r"prepared\.json|dataset_info\.json|state\.json|(data-\d+-of-\d+|cache-\w+)\.arrow|tmp\w+")


@dataclass(frozen=True)
class Prepared:
    """What [`prepare`] wrote.

    Args:
        folder: where.
        fingerprint: of the conversations, tokenizer, chat template and labelling; equal if and only if all are.
        report: what became of the rows.
    """

    folder: str
    fingerprint: str
    report: DataReport


def prepare(
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    labelling: Labelling,
    *,
    allow_rejects: bool = False,
    overwrite: bool = False,
    num_proc: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenize conversations and write them as a dataset, with bounded memory.

    Args:
        data: see [`sft.data.formats.read_rows`].
        out: the folder to write; it appears when all is in it.
        tokenizer, labelling, num_proc, progress: see [`sft.data.labels.tokenize_rows`].
        allow_rejects: leave invalid rows out instead of raising.
        overwrite: replace a prepared folder; no other folder is ever replaced, nor a file of anybody else in it.

    Raises:
        DataError: the folder exists; a file cannot be read; there are invalid rows and they are not allowed; no row is
            left.
    """
    out = Path(out)
    _refuse_obstacle(out, overwrite=overwrite)
    places = [data] if isinstance(data, str | Path) else list(data)
    tally = Tally()
    with _partial_folder(out) as partial:
        rows = record_batches(tokenize_rows(places, tokenizer, labelling, num_proc=num_proc, progress=progress), tally)
        _write_stream(rows, partial / "stream.arrow")
        report = tally.report()
        require_rows(report, places, labelling, allow_rejects)
        made_of = _made_of(tokenizer, labelling)
        fingerprint = _fingerprint({"data": report.digest, **made_of})
        _save(partial / "stream.arrow", partial / "dataset", weighted=tally.weighted)
        record = {"teleflm": package_version(), "fingerprint": fingerprint, **made_of, "report": asdict(report)}
        record |= {"files": {path.name: _identity(path) for path in sorted((partial / "dataset").iterdir())}}
        (partial / "dataset" / PREPARED).write_text(json.dumps(record, indent=1), encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        (partial / "dataset").rename(out)
    return Prepared(str(out), fingerprint, report)


def _refuse_obstacle(out: Path, *, overwrite: bool) -> None:
    """Refuse a place that holds what is not ours, or what is and may not be replaced."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not is_prepared(out):
        raise DataError(f"{out} already exists; choose another folder.")
    if foreign := [path.name for path in sorted(out.iterdir()) if path.is_dir() or not _OURS.fullmatch(path.name)]:
        raise DataError(f"{out} already exists and holds {foreign[0]}, which is not of it; choose another folder.")
    try:
        record = json.loads((out / PREPARED).read_text(encoding="utf-8"))
        is_ours = isinstance(record, dict) and {"fingerprint", "labelling", "report"} <= record.keys()
    except (OSError, ValueError, RecursionError):
        is_ours = False
    if not is_ours:
        raise DataError(f"{out} already exists, and its {PREPARED} is none of ours; choose another folder.")
    if not overwrite:
        raise DataError(f"{out} already exists; pass --overwrite to replace it.")


def _identity(path: Path) -> dict[str, Any]:
    """What tells cheaply whether a file is still what was written: its size, and a digest of places spread over it."""
    return {"bytes": path.stat().st_size, "samples": sample_digest(path)}


def is_prepared(place: str | Path) -> bool:
    """Whether this is a folder that [`prepare`] wrote."""
    return (Path(place) / PREPARED).is_file()


def open_prepared(
    places: Sequence[str | Path], tokenizer: "PreTrainedTokenizerBase", labelling: Labelling
) -> tuple["Dataset", DataReport]:
    """Open a prepared folder for a run with this tokenizer and labelling; returns what `prepare_dataset` does.

    Raises:
        DataError: there are other places beside it; it is damaged; it was made with another tokenizer, chat template
            or labelling.
    """
    from datasets import Dataset, load_from_disk

    if len(places) > 1:
        raise DataError(
            f"{places[0]} and {len(places) - 1} more: a prepared folder stands alone; prepare all together."
        )
    folder = Path(places[0])
    try:
        record = json.loads((folder / PREPARED).read_text(encoding="utf-8"))
        report = _report_from(record["report"])
        files = record.get("files", {})
        edited = [name for name, identity in files.items() if _identity(folder / name) != identity]
        made_of = {name: record[name] for name in ("fingerprint", "tokenizer", "chat_template", "labelling")}
        dataset = load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: a damaged prepared folder ({error!r}); prepare it again.") from error
    if edited:
        raise DataError(f"{folder}/{edited[0]}: is not what was prepared there; prepare it again.")
    if len(dataset) != report.kept:
        raise DataError(f"{folder}: has {len(dataset)} rows, {PREPARED} says {report.kept}; prepare it again.")
    _refuse_difference(folder, made_of, _made_of(tokenizer, labelling))
    # What `datasets` caches of later steps is found again by this name, whoever prepared the folder.
    return Dataset(dataset.data, dataset.info, fingerprint=made_of["fingerprint"]), report


def _made_of(tokenizer: "PreTrainedTokenizerBase", labelling: Labelling) -> dict[str, Any]:
    import xxhash

    return {
        "tokenizer": tokenizer_digest(tokenizer),
        "chat_template": xxhash.xxh3_128_hexdigest(str(tokenizer.chat_template).encode()),
        "labelling": asdict(labelling),
    }


def _refuse_difference(folder: Path, made_of: dict[str, Any], wanted: dict[str, Any]) -> None:
    pairs = [(name, made_of[name], wanted[name]) for name in ("tokenizer", "chat_template")]
    labelling = {**asdict(Labelling(None)), **made_of["labelling"]}  # an older record lacks what had one value then
    pairs += [(name, labelling[name], value) for name, value in wanted["labelling"].items()]
    for name, found, asked in pairs:
        if found != asked:
            what = f"of digest {found}, this run's has {asked}" if name in made_of else f"{found}, this run has {asked}"
            raise DataError(
                f"{folder} was prepared with {name.replace('_', ' ') if name in made_of else name} {what}; "
                "prepare it again for this run."
            )


def _fingerprint(value: dict[str, Any]) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _report_from(values: dict[str, Any]) -> DataReport:
    rejects = tuple(
        Reject(reject["source"], reject["id"], tuple(Problem(*problem) for problem in reject["problems"]))
        for reject in values["rejects"]
    )
    return DataReport(**{**values, "rejects": rejects})


def _write_stream(batches: Iterator[Any], path: Path) -> None:
    import pyarrow as pa

    lists = {"input_ids": pa.int32(), "labels": pa.int32(), "weights": pa.float32()}
    schema = pa.schema([(name, pa.list_(kind)) for name, kind in lists.items()])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _save(stream: Path, folder: Path, *, weighted: bool) -> None:
    from datasets import Dataset

    dataset = Dataset.from_file(str(stream))
    if not weighted:
        dataset = dataset.remove_columns("weights")
    dataset.save_to_disk(str(folder))


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, on the same disk, that is gone afterwards."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


__all__ = ["Prepared", "is_prepared", "open_prepared", "prepare"]
