# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The selection from end to end: the stages that a declaration comes to, and what is written.

OUT/selected.jsonl     the rows as they came, byte for byte, in the order of the input; `teleflm_id`, `teleflm_domain`
                       and, if there is one, `teleflm_score`, or `teleflm_target` and `teleflm_similarity`, are
                       added
OUT/rejects.jsonl      if asked for, all other rows, and why; see [`sft.selection.rejects`]
OUT/selection.json     the declaration, versions, what every stage did, and the digests of the rows and of itself;
                       written last
OUT/stages             see [`sft.selection.stages`]
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import xxhash

from conversion.checkpoint.manifest import package_version
from sft.data.formats import DataError

from . import rows, score
from .choice import OTHERS, TooFewError, check_domains, find_shortfall, say_what_fills
from .declaration import Declaration
from .executors import open_executor
from .operators import FIRST, Run, build_stage
from .rejects import read_rejects
from .settings import SelectionSettings
from .stages import SelectionError, Stage, StageFiles, StageResult, Workspace

SELECTED, REJECTS, SUMMARY, STAGES = "selected.jsonl", "rejects.jsonl", "selection.json", "stages"


@dataclass(frozen=True)
class Selection:
    """What was selected.

    Args:
        file: the selected rows, JSON Lines.
        count: how many.
        domains: rows selected of each domain.
        stages: what each stage did.
        already_done: whether an earlier run had done it all.
        rejects: the other rows, JSON Lines; None if they were not asked for.
    """

    file: str
    count: int
    domains: dict[str, int]
    stages: list[StageResult]
    already_done: bool
    rejects: str | None = None


def select_conversations(
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    settings: SelectionSettings | None = None,
    *,
    workers: int = 1,
    use_ray: bool = False,
    overwrite: bool = False,
    rejects: bool = False,
    notify: Callable[[str], None] = lambda line: None,
) -> Selection:
    """Select the conversations to fine-tune on.

    An interrupted run, run again with the same arguments, goes on with the part it was at. The selected rows depend on
    the data, the settings and the version of this package, not on `workers`.

    Args:
        data: see [`sft.data.formats.read_rows`]; each file is read by one worker.
        out: folder to write.
        settings: what to select.
        workers: processes of this machine. A scorer runs in this process alone, with all its threads.
        use_ray: run the tasks with Ray Data instead, on the cluster `ray.init` finds; `out` has to be on a shared disk.
        overwrite: make anew what `out` holds of another configuration, and replace what was edited or is somebody
            else's; stages both have in common stay.
        rejects: write the rows that were not taken too, and why; of a finished selection as well.
        notify: told a line for each stage.

    Raises:
        SelectionError: the data has too few rows, the settings do not fit it, a model cannot be loaded, or `out` holds
            another selection, or a file in the place of one of ours.
        DataError: a file cannot be read.
    """
    settings, out = settings or SelectionSettings(), Path(out)
    declared = settings.declaration
    files = tuple(map(str, [data] if isinstance(data, str | Path) else data))
    _refuse_own_output(files, out)
    stages = make_stages(files, declared, notify)
    _refuse_folders(out, rejects)
    workspace = Workspace(out / STAGES, stages, declared.seed, overwrite=overwrite)
    digest = workspace.digests[-1]
    obstacle = _obstacle(out, digest, rejects)
    if obstacle and not overwrite:
        raise SelectionError(obstacle)
    before = _read_summary(out / SUMMARY)
    recorded = before is not None and "rejects" in before
    rejects = rejects or (recorded and before is not None and before["digest"] == digest)
    kept = before if not obstacle and _has_finished(out, digest) else None
    already_done = kept is not None and (not rejects or _has_rejects(out, kept))
    with (
        _no_empty_folders(out, out / STAGES, *workspace.folders),
        open_executor(workers, use_ray=use_ray) as executor,
    ):
        if kept is None:
            for name in (SELECTED, *((REJECTS,) if rejects or recorded else ()), SUMMARY):
                (out / name).unlink(missing_ok=True)  # rows without a record would be somebody's
        try:
            workspace.run(executor, notify, _checks(workspace, declared, notify))
        except TooFewError as few:
            raise SelectionError(f"{few} {_describe_losses(workspace.results)}") from None
    if not workspace.results[-1].rows_out:
        emptied = workspace.results[-1].name
        raise SelectionError(f"no row is left after {emptied}. {_describe_losses(workspace.results)}")
    selection = _describe(workspace, out, already_done, rejects)
    if not already_done:
        written = (
            {name: kept[name] for name in _WRITTEN} if kept else _write_selected(workspace, out, declared.unique_ids)
        )
        if rejects:
            written["rejects"] = _write_rejects(workspace, out, declared)
        _write_summary(selection, declared, workspace, out, written)
        for name in (*(() if kept else (SELECTED,)), *((REJECTS,) if rejects else ()), SUMMARY):
            (out / f"{name}{_PARTIAL}").replace(out / name)
    return selection


@contextmanager
def _no_empty_folders(*folders: Path) -> Iterator[None]:
    """Remove the folders that were made meanwhile and hold nothing, as when no file could be read."""
    made = [folder for folder in folders if not folder.exists()]
    try:
        yield
    finally:
        for folder in reversed(made):
            with suppress(OSError):  # it holds something
                folder.rmdir()


# --- the stages -------------------------------------------------------------------------------------------------------


def make_stages(
    files: Sequence[str], declared: Declaration, notify: Callable[[str], None] = lambda line: None
) -> list[Stage]:
    """The stages of a selection, in order: the files, and then what the operators do.

    Args:
        files: the data.
        declared: what to select.
        notify: told of items of evaluation sets that are too short to look for.

    Raises:
        SelectionError: an evaluation set or a model cannot be used.
        DataError: a file cannot be read.
    """
    judged: dict[str, Any] = {"repeated_ids": declared.unique_ids, "sanitized": declared.sanitize_control_tokens}
    read = partial(rows.read_tables, piece_rows=rows.PIECE_ROWS, **judged)
    of = {"files": [_identify(file) for file in files], **judged}
    stages = [Stage("rows", of, files=tuple(files), tables=read)]
    columns = frozenset(FIRST)
    before: dict[str, Any] = {}
    for entry in declared.active:
        run = Run(
            declared.seed,
            columns,
            dict(before),
            tuple(files),
            declared.allow_fewer,
            declared.unique_ids,
            declared.sanitize_control_tokens,
            notify,
        )
        stages.append(build_stage(entry.name, entry.values, entry.reading, run))
        before[entry.name] = entry.values, entry.reading
        columns |= set(entry.operator.makes)
    return stages


def _identify(file: str) -> dict[str, Any]:
    """What changes when a file does. Where it lies does not matter; datasets by name are taken to stay as they are.

    Its content is read: two files of one name can have one size and time, and an edit can keep both.
    """
    path = Path(file)
    if not path.is_file():
        return {"name": file}
    digest, size = xxhash.xxh3_128(), 0
    try:
        with path.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}.") from None
    return {"name": path.name, "bytes": size, "digest": digest.hexdigest()}


def _checks(
    workspace: Workspace, declared: Declaration, notify: Callable[[str], None]
) -> dict[str, Callable[[StageFiles], None]]:
    """What is looked at between stages: what is not read, and, before anything costs much, whether the quota is met."""
    count, quota = declared.choice.values["count"], declared.choice.values["quota"]

    def tell_unread(stages: StageFiles) -> None:
        for field, (rows_with, example) in count_unread(stages).items():
            name = field.rpartition(".")[2]
            then = "and trained on, but not read" if name in rows.TRAINED else "but neither read nor trained on"
            notify(f"rows: {rows_with:,} have {field}: kept as it is, {then} ({example})")

    def check_quota(stages: StageFiles) -> None:
        tags = stages.read(("domain",))["domain"].to_pylist()
        if not quota:
            return
        check_domains(tags, quota)
        if not (short := find_shortfall(tags, count, quota)):
            return
        if declared.allow_fewer:
            notify(f"selection: {short}; {say_what_fills(tags, count, quota)}")
        else:
            raise TooFewError(f"{short}; {OTHERS}.")

    entries = declared.active
    tagged = next(place for place, entry in enumerate(entries) if "domain" in entry.operator.makes)
    costly = next(place for place, entry in enumerate(entries) if place > tagged and entry.operator.costly)
    looks = [("rows", tell_unread), (workspace.stages[costly].name, check_quota)]  # stage 0 is that of the files
    for entry in entries:
        cut = {score.SCORE_CUT, score.PERPLEXITY_CUT} & {*entry.operator.makes}
        looks += [(entry.stage, partial(_tell_cut, column=column, notify=notify)) for column in cut]
    return {name: partial(_call_all, [look for at, look in looks if at == name]) for name, _ in looks}


def _call_all(functions: Sequence[Callable[[StageFiles], None]], stages: StageFiles) -> None:
    for function in functions:
        function(stages)


def _tell_cut(stages: StageFiles, column: str, notify: Callable[[str], None]) -> None:
    """Say of how many rows a model has not seen all."""
    cut = stages.read((column,))[column].to_pylist()
    if any(cut):
        name = stages.results[-1].name
        notify(f"{name}: {sum(cut):,} of {len(cut):,} rows are longer than the model's window; the rest is not read")


def count_unread(stages: StageFiles) -> dict[str, tuple[int, str]]:
    """Field that is not read -> valid rows that have it, and the place of the first."""
    found: dict[str, tuple[int, str]] = {}
    for piece in stages.pieces(("unread", "source"), after=0):
        table = piece.read()
        table = table.filter(table["unread"].is_valid())
        for names, source in zip(table["unread"].to_pylist(), table["source"].to_pylist(), strict=True):
            for name in names.split(","):
                count, example = found.get(name, (0, _without_folders(source)))
                found[name] = count + 1, example
    return dict(sorted(found.items()))


def _without_folders(source: str) -> str:
    return Path(source).name


def _describe_losses(results: Sequence[StageResult]) -> str:
    dropped = Counter[str]()
    for result in results:
        dropped.update(result.dropped)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common())
    return f"Of {results[0].rows_in:,} rows were dropped: {reasons or 'none'}."


# --- what is written --------------------------------------------------------------------------------------------------


_PARTIAL = ".partial"


def _refuse_own_output(files: Sequence[str], out: Path) -> None:
    """Data that lies where this selection writes would be replaced by what is made of it, or removed before."""
    place = out.resolve()
    for file in files:
        path = Path(file).resolve()
        if path.parent == place and path.name.removesuffix(_PARTIAL) in (SELECTED, REJECTS, SUMMARY):
            raise SelectionError(f"{file}: is data, and a file that a selection in {out} writes; give another OUT.")
        if place / STAGES in path.parents:
            raise SelectionError(f"{file}: is data, and lies in {out / STAGES}; give another OUT.")


def _refuse_folders(out: Path, rejects: bool) -> None:
    files = (SELECTED, SUMMARY, *((REJECTS,) if rejects else ()))
    for name in (*files, *(file + _PARTIAL for file in files)):
        if (out / name).is_dir() and not (out / name).is_symlink():
            raise SelectionError(
                f"{out / name}: is a folder, where a file has to be; move it away, or give another OUT."
            )


def _obstacle(out: Path, digest: str, rejects: bool) -> str | None:
    """What in OUT is somebody else's, was edited, or is of another selection; None if nothing is.

    Args:
        out: the folder.
        digest: of the selection that is to be there.
        rejects: whether rejects are to be there too. A file of that name that no selection wrote is else left alone.
    """
    not_ours = "is not what a selection wrote there; move it away, give another OUT, or --overwrite, which replaces it."
    recorded = _read_summary(out / SUMMARY)
    if os.path.lexists(out / SUMMARY) and recorded is None:
        return f"{out / SUMMARY}: {not_ours}"
    # One that was killed between its files has left its summary under the other name.
    summaries = [summary for summary in (recorded, _read_summary(out / (SUMMARY + _PARTIAL))) if summary]
    if os.path.lexists(out / REJECTS) and (rejects or (recorded and "rejects" in recorded)):
        found = _file_digest(out / REJECTS)
        if not any(found == summary.get("rejects", {}).get("sha256", "") for summary in summaries):
            return f"{out / REJECTS}: {not_ours}"
    if not os.path.lexists(out / SELECTED):
        return None
    found = _file_digest(out / SELECTED)
    summary = next((summary for summary in summaries if summary["sha256"] == found), None)
    if summary is None:
        return f"{out / SELECTED}: {not_ours}"
    if summary["digest"] != digest:
        return f"{out / SELECTED}: is of another configuration; --overwrite makes it anew, or give another OUT."
    return None


def _has_finished(out: Path, digest: str) -> bool:
    """Whether a folder in which nothing is in the way holds this selection."""
    summary = _read_summary(out / SUMMARY)
    return summary is not None and summary["digest"] == digest and (out / SELECTED).is_file()


def _has_rejects(out: Path, summary: Mapping[str, Any]) -> bool:
    """Whether the rejects that a summary speaks of are there."""
    return "rejects" in summary and (out / REJECTS).is_file()


def _read_summary(file: Path) -> dict[str, Any] | None:
    """What selection.json says, if a selection wrote it and nobody has changed it since."""
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        is_ours = (
            not file.is_symlink() and summary.pop("seal") == _seal(summary) and {"digest", "sha256"} <= set(summary)
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return summary if is_ours else None


def _seal(summary: Mapping[str, Any]) -> str:
    """A digest of all that a summary says, by which an edited one is told."""
    return hashlib.sha256(json.dumps(summary, sort_keys=True).encode()).hexdigest()


def _file_digest(file: Path) -> str | None:
    """SHA-256 of a file; None of a link, or of what is no file."""
    if file.is_symlink() or not file.is_file():
        return None
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _open_partial(file: Path) -> BinaryIO:
    """Open a file to be written under a name of its own, never through a link."""
    unfinished = file.with_name(file.name + _PARTIAL)
    unfinished.unlink(missing_ok=True)
    return unfinished.open("wb")


_WRITTEN = ("bytes", "sha256")  # what a summary says of the selected rows
_SELECTED_COLUMNS = ("row", "id", "domain", "quality", "target", "similarity")


def _write_selected(workspace: Workspace, out: Path, unique_ids: bool) -> dict[str, Any]:
    """Write the rows under a name of their own; returns what the summary says of the file."""
    digest = hashlib.sha256()
    taken, own = set[Any](), set[Any]()
    with _open_partial(out / SELECTED) as file:
        for piece in workspace.pieces(_SELECTED_COLUMNS):
            table = piece.read()
            for row, own_id, domain, quality, target, similarity in zip(
                *(_read_column(table, name) for name in _SELECTED_COLUMNS), strict=True
            ):
                name = _make_free(own_id.hex(), own)
                added: dict[str, Any] = {"id": name, "domain": domain}
                if quality is not None:
                    added["score"] = round(quality, 4)
                if target is not None:
                    added |= {"target": target, "similarity": None if similarity is None else round(similarity, 4)}
                if unique_ids:
                    row = _with_unique_id(row, name, taken)
                line = rows.add_columns(row, {f"{rows.OWN}{name}": value for name, value in added.items()}) + b"\n"
                digest.update(line)
                file.write(line)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _read_column(table: pa.Table, name: str) -> list[Any]:
    return table[name].to_pylist() if name in table.column_names else [None] * len(table)


def _write_rejects(workspace: Workspace, out: Path, declared: Declaration) -> dict[str, Any]:
    """As `_write_selected`, of the rows that were not taken."""
    digest, count = hashlib.sha256(), 0
    with _open_partial(out / REJECTS) as file:
        for reject in read_rejects(workspace, declared.stage_operators):
            line = reject.to_json() + b"\n"
            digest.update(line)
            file.write(line)
            count += 1
        return {"rows": count, "bytes": file.tell(), "sha256": digest.hexdigest()}


def _with_unique_id(row: bytes, own_id: str, taken: set[Any]) -> bytes:
    """A row; if it has no id, or one that is taken, with ours in its place."""
    value = json.loads(row)
    found = value.get("id")
    if isinstance(found, str | int) and not isinstance(found, bool) and found not in taken:
        taken.add(found)
        return row
    return rows.to_json({**value, "id": _make_free(own_id, taken)})


def _make_free(name: str, taken: set[Any]) -> str:
    """A name, numbered if it is taken. Rows that are equal have one id, and a pipeline may keep them all."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    free = name if name not in taken else next(other for other in numbered if other not in taken)
    taken.add(free)
    return free


def _describe(workspace: Workspace, out: Path, already_done: bool, rejects: bool) -> Selection:
    chosen = workspace.read(("domain",))
    counts = Counter(chosen["domain"].to_pylist())
    return Selection(
        str(out / SELECTED),
        len(chosen),
        dict(counts.most_common()),
        list(workspace.results),
        already_done,
        str(out / REJECTS) if rejects else None,
    )


def _write_summary(
    selection: Selection, declared: Declaration, workspace: Workspace, out: Path, written: Mapping[str, Any]
) -> None:
    """Write the summary under a name of its own. No local paths: it may be published with the data."""
    described: dict[str, Any] = {
        "count": selection.count,
        "domains": selection.domains,
        "unread": {name: {"rows": count, "example": at} for name, (count, at) in count_unread(workspace).items()},
        "pipeline": {"name": Path(declared.name).name, **declared.to_dict(without_folders=True)},
        "teleflm_version": package_version(),
        "digest": workspace.digests[-1],
        **written,
        "stages": [dataclasses.asdict(stage) for stage in selection.stages],
    }
    described = {**described, "seal": _seal(described)}
    with _open_partial(out / SUMMARY) as file:
        file.write(json.dumps(described, indent=1, ensure_ascii=False).encode("utf-8"))


__all__ = [
    "DataError",
    "Selection",
    "SelectionSettings",
    "make_stages",
    "select_conversations",
]
