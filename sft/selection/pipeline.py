# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The selection from end to end: its settings, its stages in order, and what it writes.

OUT/selected.jsonl     the rows as they came, byte for byte, in the order of the input; `teleflm_id`, `teleflm_domain`
                       and, if there is one, `teleflm_score` are added
OUT/selection.json     settings, seed, versions, what every stage did, and the digests of the rows and of itself;
                       written last
OUT/stages             see [`sft.selection.stages`]
"""

import dataclasses
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from conversion.checkpoint.manifest import package_version
from sft.data.formats import DataError

from . import common, decontaminate, dedup, diversity, domains, embed, heuristics, rows, score
from .executors import open_executor
from .stages import SelectionError, Stage, StageFiles, StageResult, Workspace, make_digest
from .thresholds import check_thresholds, stage_thresholds

FILTERED = ("teleflm", diversity.K_CENTER)  # methods that choose among what passed all filters
METHODS = (*FILTERED, "random", "longest", "ifd-top")
_OTHERS = "--allow-fewer takes rows of the other domains in their place"
SELECTED, SUMMARY, STAGES = "selected.jsonl", "selection.json", "stages"


@dataclass(frozen=True)
class SelectionSettings:
    """What to select.

    Args:
        count: rows to select.
        method: `teleflm`, all stages; `k-center`, the same with a choice that seeks outliers, and with them what is
            damaged (see [`sft.selection.diversity`]); or a baseline of as many rows, from valid and decontaminated rows
            without exact duplicates: `random`, `longest` (answers) or `ifd-top`.
        within: how `teleflm` takes rows from a cluster: by `quality`, `medoid` or `random`. By quality if there is a
            score, else at random, unless given.
        quota: share of each domain. Without it, `teleflm` and `k-center` take the shares there are; the baselines do
            not look at domains.
        domain_column: a column of the data that names a row's domain; rules decide where it is absent.
        decontaminate: files of evaluation sets; see [`sft.selection.decontaminate`].
        scorer: a causal language model for the IFD score; see [`sft.selection.score`].
        score_column: a column of the data with a number for each row, the higher the better, in place of a scorer.
        embedder: see [`sft.selection.embed`].
        thresholds: by name, other than those of [`sft.selection.thresholds.THRESHOLDS`].
        unique_ids: give each row the `id` that is otherwise only its `teleflm_id`.
        seed: of everything random.
        allow_fewer: select what there is if that is less than `count`, and rows of other domains where one has too few
            for its quota.

    Raises:
        SelectionError: a value is none of those possible, or two of them contradict each other.
    """

    count: int = 30_000
    method: str = "teleflm"
    within: str | None = None
    quota: Mapping[str, float] | None = None
    domain_column: str | None = None
    decontaminate: tuple[str, ...] = ()
    scorer: str | None = None
    score_column: str | None = None
    embedder: str | None = None
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    unique_ids: bool = False
    seed: int = 0
    allow_fewer: bool = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise SelectionError(f"-n is {self.count}; it has to be at least 1.")
        if self.method not in METHODS:
            raise SelectionError(f"--method is {self.method!r}; expected one of {', '.join(METHODS)}.")
        if self.method == "ifd-top" and self.scorer is None:
            raise SelectionError("--method ifd-top needs a model that scores: give --scorer.")
        self._check_scores()
        if self.quota is not None:
            self._check_quota(self.quota)
        check_thresholds(self.thresholds)

    @property
    def scored(self) -> bool:
        """Whether rows have a score that a model or a person gave."""
        return self.scorer is not None or self.score_column is not None

    def _check_scores(self) -> None:
        if self.scorer is not None and self.score_column is not None:
            raise SelectionError(
                f"--scorer {self.scorer} and --score-column {self.score_column} both give a score; give one of them."
            )
        if self.score_column is not None and self.method not in FILTERED:
            raise SelectionError(f"--score-column is for --method {' or '.join(FILTERED)}, not {self.method}.")
        if self.within is None:
            return
        if self.method != "teleflm":
            raise SelectionError(f"--within is for --method teleflm, not {self.method}.")
        if self.within not in diversity.WITHIN:
            raise SelectionError(f"--within is {self.within!r}; expected one of {', '.join(diversity.WITHIN)}.")
        if self.within == "quality" and not self.scored:
            raise SelectionError("--within quality needs a score: give --score-column or --scorer.")

    def _check_quota(self, quota: Mapping[str, float]) -> None:
        unknown = [name for name in quota if name not in domains.DOMAINS]
        if unknown and self.domain_column is None:
            known = ", ".join(domains.DOMAINS)
            raise SelectionError(f"--quota: unknown domain {unknown[0]!r}; known are {known}, or give --domain-column.")
        if wrong := [name for name, share in quota.items() if not 0 <= share <= 1]:
            raise SelectionError(f"--quota: {wrong[0]} is {quota[wrong[0]]}; a share is from 0 to 1.")
        total = math.fsum(quota.values())
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise SelectionError(f"--quota: the shares sum to {total:g}, not to 1.")


@dataclass(frozen=True)
class Selection:
    """What was selected.

    Args:
        file: the selected rows, JSON Lines.
        count: how many.
        domains: rows selected of each domain.
        stages: what each stage did.
        already_done: whether an earlier run had done it all.
    """

    file: str
    count: int
    domains: dict[str, int]
    stages: list[StageResult]
    already_done: bool


def select_conversations(
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    settings: SelectionSettings | None = None,
    *,
    workers: int = 1,
    use_ray: bool = False,
    overwrite: bool = False,
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
        notify: told a line for each stage.

    Raises:
        SelectionError: the data has too few rows, the settings do not fit it, a model cannot be loaded, or `out` holds
            another selection, or a file in the place of one of ours.
        DataError: a file cannot be read.
    """
    settings, out = settings or SelectionSettings(), Path(out)
    files = tuple(map(str, [data] if isinstance(data, str | Path) else data))
    stages = make_stages(files, settings, notify)
    _refuse_folders(out)
    workspace = Workspace(out / STAGES, stages, settings.seed, overwrite=overwrite)
    obstacle = _obstacle(out, workspace.digests[-1])
    if obstacle and not overwrite:
        raise SelectionError(obstacle)
    with open_executor(workers, use_ray=use_ray) as executor:
        already_done = not obstacle and _has_finished(out, workspace.digests[-1])
        if not already_done:
            for name in (SELECTED, SUMMARY):  # rows without a record would be somebody's
                (out / name).unlink(missing_ok=True)
        try:
            workspace.run(executor, notify, _checks(workspace, settings, notify))
        except _TooFew as few:
            raise SelectionError(f"{few} {_describe_losses(workspace.results)}") from None
    if not workspace.results[-1].rows_out:
        emptied = workspace.results[-1].name
        raise SelectionError(f"no row is left after {emptied}. {_describe_losses(workspace.results)}")
    selection = _describe(workspace, out, already_done)
    if not already_done:
        written = _write_selected(workspace, out, settings.unique_ids)
        _write_summary(selection, settings, workspace, out, written)
        for name in (SELECTED, SUMMARY):
            (out / f"{name}{_PARTIAL}").replace(out / name)
    return selection


# --- the stages -------------------------------------------------------------------------------------------------------


def make_stages(
    files: Sequence[str], settings: SelectionSettings, notify: Callable[[str], None] = lambda line: None
) -> list[Stage]:
    """The stages of a selection, in order.

    Args:
        files: the data.
        settings: what to select.
        notify: told of items of evaluation sets that are too short to look for.

    Raises:
        SelectionError: an evaluation set or a model cannot be used.
        DataError: a file cannot be read.
    """
    read = partial(rows.read_tables, piece_rows=rows.PIECE_ROWS)
    stages = [
        Stage("rows", {"files": [_identify(file) for file in files]}, files=tuple(files), tables=read),
        Stage("exact-duplicates", {}, ("id",), dedup.drop_exact_duplicates, whole=True),
    ]
    limits = partial(stage_thresholds, given=settings.thresholds)
    own_text: tuple[str, ...] = ("row",)
    if settings.method in FILTERED:
        own_text = ("row", "common")
        shared = limits("common-text")
        marking = {**shared, "run": common.RUN, "min_rows": common.MIN_ROWS, "sample": common.SAMPLE}
        sketched = {"slots": dedup.SLOTS, "answer_slots": dedup.ANSWER_SLOTS}
        near = limits("near-duplicates")
        compared = ("id", "sketch", "pairs", "answer_sketch", "answer_pairs")
        remove = partial(dedup.drop_near_duplicates, **near)
        stages += [
            Stage("common-text", marking, ("row",), fit=partial(common.fit_marks, **shared), sample=common.SAMPLE),
            Stage("sketches", sketched, (*own_text, "unread"), dedup.sketch),
            Stage("near-duplicates", {**near, "bands": dedup.BANDS}, compared, remove, whole=True),
        ]
    if settings.decontaminate:
        stages.append(_decontamination(settings, notify))
    by_column = {"column": settings.domain_column}
    stages.append(Stage("domains", by_column, own_text, partial(domains.tag_domains, **by_column)))
    if settings.method in FILTERED:
        broken = limits("heuristics")
        drop = partial(heuristics.drop_broken, limits=heuristics.Limits(**broken))
        stages.append(Stage("heuristics", broken, ("row", "domain"), drop))
    if settings.scored or settings.method == "longest":
        stages.append(_scoring(settings))
    if settings.method in FILTERED:
        fitted = {"embedder": settings.embedder, "sample": embed.SAMPLE, "dimensions": embed.DIMENSIONS}
        fit = partial(embed.fit_kernel, embedder=settings.embedder, seed=settings.seed)
        stages.append(Stage("embeddings", fitted, own_text, fit=fit, sample=embed.SAMPLE))
    return [*stages, _choice(settings)]


def _identify(file: str) -> dict[str, Any]:
    """What changes when a file does. Where it lies does not matter; datasets by name are taken to stay as they are."""
    path = Path(file)
    if not path.is_file():
        return {"name": file}
    status = path.stat()
    return {"name": path.name, "bytes": status.st_size, "changed": status.st_mtime_ns}


def _decontamination(settings: SelectionSettings, notify: Callable[[str], None]) -> Stage:
    limits = stage_thresholds("decontamination", settings.thresholds)
    evaluations = decontaminate.read_evaluations(settings.decontaminate, **limits)
    index = decontaminate.make_index(evaluations)
    texts = index.items + index.too_short + index.shared
    if index.too_short:
        notify(f"decontamination: {index.too_short} of {texts} texts are too short to look for")
    if index.shared:
        notify(f"decontamination: {index.shared} of {texts} texts say what many do, and are not looked for")
    content = make_digest([sorted(map(str, hashes.tolist())) for hashes in index.hashes.values()])
    shared = stage_thresholds("common-text", settings.thresholds)
    named = {"evaluations": content, **limits, "common_share": shared["max_share"], "sample": common.SAMPLE}
    fit = partial(decontaminate.fit_kernel, evaluations=evaluations, **shared)
    return Stage("decontamination", named, ("row",), fit=fit, sample=common.SAMPLE)


def _scoring(settings: SelectionSettings) -> Stage:
    if settings.method == "longest":
        return Stage("scores", {"score": "characters of the answers"}, ("row",), score.score_length)
    if settings.score_column is not None:
        by = {"column": settings.score_column}
        return Stage("scores", by, ("row",), partial(score.score_column, **by))
    assert settings.scorer is not None
    named = {"score": "ifd", "scorer": settings.scorer, "max_tokens": score.CAUSAL_TOKENS}
    # One process: a model a worker would not fit, and torch has threads of its own.
    return Stage("scores", named, ("row",), score.make_ifd_kernel(settings.scorer), in_process=True)


def _choice(settings: SelectionSettings) -> Stage:
    quota = dict(settings.quota) if settings.quota is not None else None
    asked: dict[str, Any] = {"count": settings.count, "quota": quota, "seed": settings.seed}
    named = {"method": settings.method, **asked, "unique_ids": settings.unique_ids}
    reads: tuple[str, ...] = ("id", "domain")
    choose: Callable[[Any], Any]
    if settings.method in FILTERED:
        given = settings.within or ("quality" if settings.scored else "random")
        within = diversity.K_CENTER if settings.method == diversity.K_CENTER else given
        named |= {"within": within, "cluster_rows": diversity.CLUSTER_ROWS}
        named |= {"neighbours": diversity.NEIGHBOURS, "outliers": diversity.OUTLIERS}
        reads = (*reads, *(("score",) if settings.scored else ()), "embedding")
        choose = partial(diversity.select_from_clusters, **asked, within=within)
    elif settings.method == "random":
        choose = partial(diversity.select_top, **asked, by="random")
    else:
        reads, choose = (*reads, "score"), partial(diversity.select_top, **asked, by="score")
    kernel = partial(_enough, choose=choose, count=settings.count, quota=quota, allow_fewer=settings.allow_fewer)
    return Stage("selection", named, reads, kernel, whole=True)


class _TooFew(SelectionError):
    """Fewer rows than asked for, before it is said where the others went."""


def _enough(
    table: Any, choose: Callable[[Any], Any], count: int, quota: Mapping[str, float] | None, allow_fewer: bool
) -> Any:
    chosen = choose(table)
    found = chosen["drop"].null_count
    if found < count and not allow_fewer:
        left = "" if len(table) == found else f" in the domains of --quota ({len(table):,} in all)"
        raise _TooFew(f"only {found:,} rows are left{left}, fewer than -n {count:,}; --allow-fewer takes them.")
    if quota and not allow_fewer and (short := _shortfall(table["domain"].to_pylist(), count, quota)):
        raise _TooFew(f"{short}; {_OTHERS}.")
    return chosen


def _shortfall(tags: Sequence[str], count: int, quota: Mapping[str, float]) -> str:
    """What a quota asks for and is not there, in words; empty if all of it is."""
    if quota.keys().isdisjoint(tags):  # all that is chosen then says which domains there are
        return ""
    there = Counter(tags)
    wanted = {domain: math.floor(share * count + 1e-9) for domain, share in quota.items()}
    short = [f"{there[domain]:,} of {rows:,} {domain}" for domain, rows in wanted.items() if there[domain] < rows]
    return f"--quota cannot be met: {', '.join(short)} rows are left" if short else ""


def _checks(
    workspace: Workspace, settings: SelectionSettings, notify: Callable[[str], None]
) -> dict[str, Callable[[StageFiles], None]]:
    """What is looked at between stages: what is not read, and, before anything costs much, whether the quota is met."""
    names = [stage.name for stage in workspace.stages]
    quota = settings.quota

    def tell_unread(stages: StageFiles) -> None:
        for field, (rows_with, example) in count_unread(stages).items():
            notify(f"rows: {rows_with:,} have {field}: kept as it is, but neither read nor trained on ({example})")

    def check_quota(stages: StageFiles) -> None:
        tags = stages.read(("domain",))["domain"].to_pylist()
        if quota is None or not (short := _shortfall(tags, settings.count, quota)):
            return
        if settings.quota is None or settings.allow_fewer:
            notify(f"selection: {short}; others take their place")
        else:
            raise _TooFew(f"{short}; {_OTHERS}.")

    return {"rows": tell_unread, "heuristics" if "heuristics" in names else "domains": check_quota}


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


def _refuse_folders(out: Path) -> None:
    for name in (SELECTED, SUMMARY, SELECTED + _PARTIAL, SUMMARY + _PARTIAL):
        if (out / name).is_dir() and not (out / name).is_symlink():
            raise SelectionError(
                f"{out / name}: is a folder, where a file has to be; move it away, or give another OUT."
            )


def _obstacle(out: Path, digest: str) -> str | None:
    """What in OUT is somebody else's, was edited, or is of another selection; None if nothing is.

    Args:
        out: the folder.
        digest: of the selection that is to be there.
    """
    not_ours = "is not what a selection wrote there; move it away, give another OUT, or --overwrite, which replaces it."
    if os.path.lexists(out / SUMMARY) and _read_summary(out / SUMMARY) is None:
        return f"{out / SUMMARY}: {not_ours}"
    if not os.path.lexists(out / SELECTED):
        return None
    found = _file_digest(out / SELECTED)
    # One that was killed between its two files has left its summary under the other name.
    summaries = filter(None, (_read_summary(out / name) for name in (SUMMARY, SUMMARY + _PARTIAL)))
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


_SELECTED_COLUMNS = ("row", "id", "domain", "quality")


def _write_selected(workspace: Workspace, out: Path, unique_ids: bool) -> dict[str, Any]:
    """Write the rows under a name of their own; returns what the summary says of the file."""
    digest = hashlib.sha256()
    taken: set[Any] = set()
    with _open_partial(out / SELECTED) as file:
        for piece in workspace.pieces(_SELECTED_COLUMNS):
            table = piece.read()
            for row, own_id, domain, quality in zip(
                *(table[name].to_pylist() for name in _SELECTED_COLUMNS), strict=True
            ):
                added: dict[str, Any] = {"id": own_id.hex(), "domain": domain}
                if quality is not None:
                    added["score"] = round(quality, 4)
                if unique_ids:
                    row = _with_unique_id(row, own_id.hex(), taken)
                line = rows.add_columns(row, {f"{rows.OWN}{name}": value for name, value in added.items()}) + b"\n"
                digest.update(line)
                file.write(line)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _with_unique_id(row: bytes, own_id: str, taken: set[Any]) -> bytes:
    """A row; if it has no id, or one that is taken, with ours in its place."""
    value = json.loads(row)
    found = value.get("id")
    if isinstance(found, str | int) and found not in taken:
        taken.add(found)
        return row
    return rows.to_json({**value, "id": own_id})


def _describe(workspace: Workspace, out: Path, already_done: bool) -> Selection:
    chosen = workspace.read(("domain",))
    counts = Counter(chosen["domain"].to_pylist())
    return Selection(
        str(out / SELECTED), len(chosen), dict(counts.most_common()), list(workspace.results), already_done
    )


def _without_folder(model: str | None) -> str | None:
    """A model by the name of its folder; one of the Hub by its own."""
    return Path(model).name if model is not None and Path(model).exists() else model


def _write_summary(
    selection: Selection, settings: SelectionSettings, workspace: Workspace, out: Path, written: Mapping[str, Any]
) -> None:
    """Write the summary under a name of its own. No local paths: it may be published with the data."""
    given = {
        "decontaminate": [Path(file).name for file in settings.decontaminate],
        "scorer": _without_folder(settings.scorer),
        "embedder": _without_folder(settings.embedder),
    }
    described: dict[str, Any] = {
        "count": selection.count,
        "domains": selection.domains,
        "unread": {name: {"rows": count, "example": at} for name, (count, at) in count_unread(workspace).items()},
        "settings": {**dataclasses.asdict(settings), **given},
        "teleflm_version": package_version(),
        "digest": workspace.digests[-1],
        **written,
        "stages": [dataclasses.asdict(stage) for stage in selection.stages],
    }
    described = {**described, "seal": _seal(described)}
    with _open_partial(out / SUMMARY) as file:
        file.write(json.dumps(described, indent=1, ensure_ascii=False).encode("utf-8"))


__all__ = [
    "METHODS",
    "DataError",
    "Selection",
    "SelectionSettings",
    "make_stages",
    "select_conversations",
]
