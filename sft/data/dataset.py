# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The data sets of a run: conversations tokenized once, by one of its processes, or by `sft prepare` before."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.cache import Cache
from sft.data.formats import DataError
from sft.data.holdout import find_overlap, hold_out, is_held
from sft.data.labels import (
    DataReport,
    Labelling,
    SourceReport,
    Tally,
    record_batches,
    require_rows,
    tokenize_rows,
)
from sft.data.mixture import order_rows, take
from sft.data.prepare import (
    Rows,
    build_prepared,
    describe_job,
    is_prepared,
    open_prepared,
    open_rows,
    open_sealed,
    seal,
)
from sft.data.sources import Source, pin, read_content

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SOURCES = "sources"
_ARRANGED = "arranged.json"
_BATCH = 1000


def prepare_dataset(
    files: str | Path | Sequence[str | Path],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    assistant_only_loss: bool = True,
    last_turn_only: bool = False,
    sanitize_control_tokens: bool = False,
    allow_rejects: bool = False,
    num_proc: int | None = None,
) -> tuple["Dataset", DataReport]:
    """Read conversations and tokenize them, or open what [`sft.data.prepare.prepare`] has tokenized.

    Conversations are held in memory, 12 bytes a token; a prepared folder is mapped from the disk. A run does it by
    [`load_run_data`].

    Args:
        files: see [`sft.data.formats.read_rows`]; or one folder written by [`sft.data.prepare.prepare`].
        tokenizer: see [`tokenize_rows`].
        max_length, assistant_only_loss, last_turn_only, sanitize_control_tokens: see [`Labelling`].
        allow_rejects: leave invalid rows out (they are in the report) instead of raising.
        num_proc: processes that tokenize.

    Returns:
        a dataset with columns `input_ids` and `labels` (lists of int32), of at least one row, each row with at least
        one label that is trained on; and what became of all rows. If a message has a weight that is neither 0 nor 1,
        there is a third column, `weights` (lists of float32): the factor on each token's loss, 0 where the label is
        -100.

    Raises:
        DataError: a file cannot be read; there are invalid rows and they are not allowed; no row is left; a prepared
            folder was made with another tokenizer, chat template or labelling.
    """
    import pyarrow as pa
    from datasets import Dataset

    labelling = Labelling(max_length, assistant_only_loss, last_turn_only, sanitize_control_tokens)
    places = [files] if isinstance(files, str | Path) else list(files)
    if any(is_prepared(place) for place in places):
        return open_prepared(places, tokenizer, labelling)

    tally = Tally()
    batches = list(record_batches(tokenize_rows(places, tokenizer, labelling, num_proc=num_proc), tally))
    report = tally.report()
    require_rows(report, places, labelling, allow_rejects)
    table = pa.Table.from_batches(batches)
    return Dataset(table if tally.weighted else table.drop_columns("weights")), report


# --- the data of a run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrangement:
    """What is done with the rows of a data set before they are trained on.

    Args:
        labelling: how they are tokenized.
        arrange: shuffles and packs a dataset, as `sft.training.trainer.arrange` does; None if there is nothing to do.
        settings: all that decides what `arrange` does.
    """

    labelling: Labelling
    arrange: "Callable[[Dataset], Dataset] | None"
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What a run is evaluated on.

    Args:
        arrangement: of these rows.
        files: see [`sft.data.formats.read_rows`]; empty if rows of the sources are held out.
        test_split_size: how many of these are, see [`sft.data.holdout.hold_out`].
        drop_overlap: leave training rows out that overlap with `files`.
    """

    arrangement: Arrangement
    files: tuple[str, ...] = ()
    test_split_size: float | None = None
    drop_overlap: bool = False


@dataclass(frozen=True)
class Loader:
    """Opens what is tokenized, and tokenizes what is not.

    Args:
        cache: where it is kept.
        tokenizer: with the chat template.
        allow_rejects: leave invalid rows out instead of raising.
        num_proc: processes that tokenize.
    """

    cache: Cache
    tokenizer: "PreTrainedTokenizerBase"
    allow_rejects: bool = False
    num_proc: int | None = None

    def open(self, places: Sequence[str], labelling: Labelling) -> Rows:
        """The rows of some files and datasets, tokenized.

        Raises:
            DataError: see [`prepare_dataset`].
        """
        if any(is_prepared(place) for place in places):  # whoever prepared it has judged its rejects
            return open_rows(places, self.tokenizer, labelling)
        pinned = tuple(pin(place) for place in places)
        content = read_content(pinned)
        job = describe_job(content, self.tokenizer, labelling)
        rows = self.cache.get(
            f"tokens-{job}",
            lambda folder: build_prepared(folder, content, self.tokenizer, labelling, job, self.num_proc),
            lambda folder: open_rows([folder], self.tokenizer, labelling).renamed(pinned),
        )
        require_rows(rows.report, places, labelling, self.allow_rejects)
        return rows


@dataclass(frozen=True)
class _Opened:
    """A source whose rows are open."""

    source: Source
    rows: Rows

    @property
    def conversations(self) -> "NDArray[np.uint64]":
        """[rows], half of the digest of each."""
        import numpy as np

        return np.frombuffer(self.digests, "<u8")[::2].astype(np.uint64)

    @property
    def digests(self) -> bytes:
        """16 bytes of each row."""
        chunks = self.rows.about["digest"].chunks
        return b"".join(memoryview(chunk.buffers()[1])[16 * chunk.offset :][: 16 * len(chunk)] for chunk in chunks)

    def column(self, name: str) -> Any:
        """[rows], what is known of each."""
        return self.rows.about[name].to_numpy()


def load_run_data(
    sources: Sequence[Source],
    arrangement: Arrangement,
    evaluation: Evaluation | None,
    loader: Loader,
    *,
    seed: int,
) -> tuple["Dataset", DataReport, "Dataset | None", DataReport | None]:
    """The data sets of a run, mapped from files that one process makes and all of its machine, or of all, open.

    Every process of the run calls it; there is no collective operation in it.

    Args:
        sources: that rows of training are taken from.
        arrangement: of the training rows.
        evaluation: what is evaluated on.
        loader: opens them.
        seed: of the mixture.

    Returns:
        the training rows and what became of all; the evaluation rows likewise, if there are any. Columns are as of
        [`prepare_dataset`]; with several sources there is `sources` besides (lists of int8, as long as `labels`): of
        each token, the place of its source in the report's `sources`.

    Raises:
        DataError: see [`prepare_dataset`]; a source gives no rows; see [`sft.data.holdout.hold_out`].
    """
    import numpy as np

    opened = [_Opened(source, loader.open(source.places, arrangement.labelling)) for source in sources]
    usable = [np.ones(len(one.rows.about), bool) for one in opened]
    held, overlapping = [np.zeros(len(mask), bool) for mask in usable], [np.zeros(len(mask), bool) for mask in usable]
    tested: list[_Opened] = []
    if evaluation and evaluation.test_split_size:
        used = [int((_take(one, mask, seed) > 0).sum()) for one, mask in zip(opened, usable, strict=True)]
        questions = hold_out([one.column("question") for one in opened], evaluation.test_split_size, used)
        held = [is_held(one.column("question"), questions) for one in opened]
        usable = [~mask for mask in held]
        if bare := [one.source.name for one, mask in zip(opened, usable, strict=True) if not mask.any()]:
            raise DataError(
                f"{bare[0]}: test_split_size {evaluation.test_split_size} would hold out all of its rows, since rows "
                "with one question come on one side; make it less, or give eval_data_files."
            )
        labelling = evaluation.arrangement.labelling
        tested = [_Opened(one.source, loader.open(one.source.places, labelling)) for one in opened]
        chosen = [is_held(one.column("question"), questions) for one in tested]
    elif evaluation:
        name = ", ".join(evaluation.files)
        tested = [
            _Opened(Source(name, evaluation.files), loader.open(evaluation.files, evaluation.arrangement.labelling))
        ]
        chosen = [np.ones(len(one.rows.about), bool) for one in tested]
        if evaluation.drop_overlap:
            overlapping = [_overlaps(one, tested[0]) for one in opened]
            usable = [~mask for mask in overlapping]
            if bare := [one.source.name for one, mask in zip(opened, usable, strict=True) if not mask.any()]:
                raise DataError(
                    f"{bare[0]}: drop_eval_overlap leaves no training row of it, all overlap with eval_data_files; "
                    "leave the source out, or give other eval_data_files."
                )

    counts = [_take(one, mask, seed) for one, mask in zip(opened, usable, strict=True)]
    reports = [
        _report(one, count, int(out.sum()), int(over.sum()))
        for one, count, out, over in zip(opened, counts, held, overlapping, strict=True)
    ]
    dataset, report = _arrange(opened, counts, reports, arrangement, loader, seed)
    if not evaluation:
        return dataset, report, None, None

    training = _pairs(opened, [count > 0 for count in counts])
    overlap = find_overlap(training, _pairs(tested, chosen))
    if overlap.question and not evaluation.files:
        raise DataError(f"{overlap}: the split of this version of teleflm is wrong; please report it.")
    if overlap.question:
        logger.warning("%s would be left out with drop_eval_overlap: true", overlap)
    whole = [Source(one.source.name, one.source.places) for one in tested]
    tested = [_Opened(source, one.rows) for source, one in zip(whole, tested, strict=True)]
    picked = [mask.astype(np.int64) for mask in chosen]
    eval_reports = [_report(one, count, 0, 0) for one, count in zip(tested, picked, strict=True)]
    return (
        dataset,
        report,
        *_arrange(tested, picked, eval_reports, evaluation.arrangement, loader, seed, mixed=False),
    )


def _take(one: _Opened, usable: "NDArray[np.bool_]", seed: int) -> "NDArray[np.int64]":
    """How often an epoch has each row of a source, none of those that are not usable."""
    import numpy as np

    counts = np.zeros(len(usable), np.int64)
    counts[usable] = take(one.source, one.conversations[usable], one.column("tokens")[usable], seed)
    return counts


def _pairs(opened: Sequence[_Opened], masks: "Sequence[NDArray[np.bool_]]") -> Any:
    """Hashes of conversations and of questions, of some rows of all sources."""
    import numpy as np

    pairs = [(one.conversations[mask], one.column("question")[mask]) for one, mask in zip(opened, masks, strict=True)]
    return tuple(np.concatenate(column) for column in zip(*pairs, strict=True))


def _overlaps(training: _Opened, tested: _Opened) -> "NDArray[np.bool_]":
    import numpy as np

    same = np.isin(training.conversations, tested.conversations)
    found: NDArray[np.bool_] = same | np.isin(training.column("question"), tested.column("question"))
    return found


def _report(one: _Opened, counts: "NDArray[np.int64]", held_out: int, overlapping: int) -> SourceReport:
    read = one.rows.report
    tokens, trained = (int((one.column(name).astype("int64") * counts).sum()) for name in ("tokens", "trained_tokens"))
    return SourceReport(
        name=one.source.name,
        places=read.pinned or one.source.places,
        weight=one.source.weight,
        rows=read.rows,
        rejected=len(read.rejects),
        held_out=held_out,
        overlapping=overlapping,
        taken=int(counts.sum()),
        tokens=tokens,
        trained_tokens=trained,
    )


def _arrange(
    opened: Sequence[_Opened],
    counts: "list[NDArray[np.int64]]",
    reports: Sequence[SourceReport],
    arrangement: Arrangement,
    loader: Loader,
    seed: int,
    *,
    mixed: bool = True,
) -> tuple["Dataset", DataReport]:
    """The rows of an epoch, mixed, shuffled and packed, and what became of all; made by one process where there is
    something to do."""
    import numpy as np
    import xxhash

    plain = len(opened) == 1 and bool((counts[0] == 1).all())
    first = opened[0].rows
    if plain and arrangement.arrange is None:
        return first.dataset, first.report
    rows = order_rows(counts, seed) if mixed else np.concatenate(_places(counts))
    key = {
        "of": [one.rows.content for one in opened],
        "rows": xxhash.xxh3_128_hexdigest(np.ascontiguousarray(rows, "<i8").tobytes()),
        "settings": dict(arrangement.settings),
        "versions": _versions(),
    }
    name = f"arranged-{xxhash.xxh3_128_hexdigest(json.dumps(key, sort_keys=True, default=str).encode())}"
    dataset = loader.cache.get(
        name,
        lambda folder: _build_arranged(folder, opened, rows, arrangement.arrange),
        lambda folder: open_sealed(folder, _ARRANGED, "it is made of what was tokenized")[0],
    )
    report = first.report if plain else _sum_reports(opened, reports, rows)
    return dataset, report


def _places(counts: "list[NDArray[np.int64]]") -> "list[NDArray[np.int64]]":
    import numpy as np

    starts = np.cumsum([0, *map(len, counts)])
    return [start + np.flatnonzero(count) for start, count in zip(starts, counts, strict=False)]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("datasets", "trl", "pyarrow", "numpy")}


def _build_arranged(
    folder: Path,
    opened: Sequence[_Opened],
    rows: "NDArray[np.int64]",
    arrange: "Callable[[Dataset], Dataset] | None",
) -> None:
    """Write the rows, in this order, and arrange them; of each token its source, if there are several."""
    from datasets import Dataset

    work = folder / "work"
    work.mkdir()
    _write_rows(work / "rows.arrow", opened, rows)
    # What `datasets` writes of every step lies beside the file, in a folder that goes.
    dataset = Dataset.from_file(str(work / "rows.arrow"))
    (arrange(dataset) if arrange else dataset).save_to_disk(str(folder / "whole"))
    del dataset
    for path in (folder / "whole").iterdir():
        path.rename(folder / path.name)
    (folder / "whole").rmdir()
    shutil.rmtree(work)
    seal(folder, _ARRANGED, {})


def _write_rows(path: Path, opened: Sequence[_Opened], rows: "NDArray[np.int64]") -> None:
    import numpy as np
    import pyarrow as pa

    names = ["input_ids", "labels"]
    weighted = any("weights" in one.rows.dataset.column_names for one in opened)
    kinds = {"input_ids": pa.int32(), "labels": pa.int32()}
    kinds |= {"weights": pa.float32()} if weighted else {}
    kinds |= {SOURCES: pa.int8()} if len(opened) > 1 else {}
    schema = pa.schema([(name, pa.list_(kind)) for name, kind in kinds.items()])
    starts = np.cumsum([0, *(len(one.rows.about) for one in opened)])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for begin in range(0, len(rows), _BATCH):
            chosen = rows[begin : begin + _BATCH]
            owner = np.searchsorted(starts, chosen, side="right") - 1
            tables = []
            for index, one in enumerate(opened):
                own = chosen[owner == index] - starts[index]
                found = one.rows.dataset.with_format("arrow")[own.tolist()] if len(own) else None
                if found is not None:
                    tables.append(_with_columns(found.select([*names, *_weights(found)]), index, schema))
            # Each source's rows came together; put them where they belong.
            together = pa.concat_tables(tables).combine_chunks()
            place = np.empty(len(chosen), np.int64)
            place[np.argsort(owner, kind="stable")] = np.arange(len(chosen))
            writer.write_table(together.take(pa.array(place)))


def _weights(table: Any) -> list[str]:
    return ["weights"] if "weights" in table.column_names else []


def _with_columns(table: Any, source: int, schema: Any) -> Any:
    """A table with all columns of a schema: weights of 1 where something is trained on, the number of the source."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    table = table.combine_chunks()
    labels = table["labels"].combine_chunks() if table["labels"].num_chunks != 1 else table["labels"].chunk(0)
    values = labels.flatten()
    offsets = pa.array(np.concatenate([[0], np.cumsum(pc.list_value_length(labels).to_numpy())]), pa.int32())
    made = {
        "weights": lambda: pc.cast(pc.not_equal(values, -100), pa.float32()),
        SOURCES: lambda: pa.array(np.full(len(values), source, np.int8)),
    }
    for name in schema.names:
        if name not in table.column_names:
            table = table.append_column(name, pa.ListArray.from_arrays(offsets, made[name]()))
    return table.select(schema.names).cast(schema)


def _split(opened: Sequence[_Opened], rows: "NDArray[np.int64]") -> "Iterator[tuple[_Opened, NDArray[np.int64]]]":
    """Of rows numbered through all sources, those of each, numbered in it."""
    start = 0
    for one in opened:
        end = start + len(one.rows.about)
        yield one, rows[(rows >= start) & (rows < end)] - start
        start = end


def _sum_reports(
    opened: Sequence[_Opened],
    reports: Sequence[SourceReport],
    rows: "NDArray[np.int64]",
) -> DataReport:
    import numpy as np
    import xxhash

    digests = np.frombuffer(b"".join(one.digests for one in opened), "V16")
    read = [one.rows.report for one in opened]
    return DataReport(
        rows=sum(report.rows for report in read),
        rejects=tuple(reject for report in read for reject in report.rejects),
        truncated=sum(int(one.column("truncated")[own].sum()) for one, own in _split(opened, rows)),
        tokens=sum(report.tokens for report in reports),
        trained_tokens=sum(report.trained_tokens for report in reports),
        digest=xxhash.xxh3_128_hexdigest(digests[rows].tobytes()),
        sources=tuple(reports),
        pinned=tuple(dict.fromkeys(place for report in read for place in report.pinned)),
    )


__all__ = ["SOURCES", "Arrangement", "Evaluation", "Loader", "load_run_data", "prepare_dataset"]
