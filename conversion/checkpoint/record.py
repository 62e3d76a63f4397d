# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The record that a job leaves of itself, and whether one that lies in a folder is that.

All of a record but what was measured while it was written (digests, samples and statistics) or found out since
(`verification`) follows from the job, so a record that says anything else was edited, and what it says of the rest is
worth nothing either.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .containers import Shard
from .job import Finished, Job, flatten, shortened
from .manifest import between_digest, is_edited, make_manifest, recorded_tensors, sample_digest

_MEASURED = re.compile(r"[0-9a-f]{32}")
# What of a record does not follow from the job and has no other value to be held against.
_OWN = ("teleflm_version", "verification", "earlier", "checksum")


def job_record(job: Job, finished: Sequence[Finished]) -> dict[str, Any]:
    """What a finished checkpoint says of itself, see `manifest.py`.

    Args:
        job: what was written.
        finished: the record of each shard that was written, in order.
    """
    digests = {name: digest for record in finished for name, digest in record.digests.items()}
    # A NaN, which --allow-nonfinite lets through, is no number of JSON.
    statistics = {
        symbol: value if math.isfinite(value) else repr(value)
        for record in finished
        for symbol, value in record.statistics.items()
    }
    written = iter(finished)
    samples = {
        shard.filename: sample_digest(Path(shard.twin)) if shard.twin else next(written).samples
        for shard in job.layout.shards
    }
    return _record(job, digests, samples, statistics, job.settings)


def first_edit(record: Mapping[str, Any], job: Job) -> str | None:
    """Where a record differs from the one that a job leaves, in what follows from the job; None if nowhere.

    Args:
        record: of a folder; it may come from anyone.
        job: the one with the record's fingerprint. Its settings may differ; whether the record's are as good is
            another question.
    """
    job_entry, files = (_object(record.get(name)) for name in ("job", "files"))
    tensors = recorded_tensors(record)
    settings = _object(job_entry.get("settings"))
    digests = {
        name: found
        for name in (tensor.name for tensor in job.plan.tensors)
        if settings.get("digest") is True and (found := _measured(tensors.get(name), "digest"))
    }
    samples = {name: _measured(files.get(name), "samples") for name in job.weights}
    statistics = _object(record.get("statistics"))
    expected = _record(job, digests, samples, statistics, settings)
    if settings.get("digest") is True and job.plan.tensors and len(digests) < len(job.plan.tensors):
        lost = next(tensor.name for tensor in job.plan.tensors if tensor.name not in digests)
        return f"it has no digest of {lost}"
    before, after = flatten(record), flatten(json.loads(json.dumps({**expected, "teleflm_version": None})))
    for path in sorted(before.keys() | after.keys()):
        if path[0] not in _OWN and repr(before.get(path)) != repr(after.get(path)):  # NaN is no other than NaN
            values = f"{shortened(before.get(path))}, expected {shortened(after.get(path))}"
            return f"its {'.'.join(path)} is {values}"
    return "its checksum is not that of the rest" if is_edited(record) else None


def _record(
    job: Job,
    digests: Mapping[str, str],
    samples: Mapping[str, str],
    statistics: Mapping[str, float | str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    identity = job.identity
    made_by = {"fingerprint": job.fingerprint, "engine": identity["engine"], "layout": identity["layout"]}
    return make_manifest(
        plan=identity["plan"],
        seed=job.plan.seed,
        lineage=job.plan.lineage,
        statistics=statistics,
        job={**made_by, "settings": dict(settings)},
        sources=identity["sources"],
        files=_files(job, samples, digests),
        tensors=_tensors((shard for shard in job.layout.shards if not shard.state), digests),
        digests=bool(digests),
    )


def _files(job: Job, samples: Mapping[str, str], digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    small = {
        name: {"bytes": len(content), "sha256": job.small_digests[name]} for name, content in job.small_contents.items()
    }
    weights = {
        shard.filename: {
            "bytes": shard.nbytes,
            "between": _between(shard),
            "samples": samples[shard.filename],
            **({"tensors": _tensors([shard], digests)} if shard.state else {}),
        }
        for shard in job.layout.shards
    }
    return dict(sorted({**small, **weights}.items()))


def _between(shard: Shard) -> str:
    return between_digest(content for _, content in sorted(shard.fixed))


def _tensors(shards: Iterable[Shard], digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    return {
        tensor.name: {
            "file": shard.filename,
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            **({"digest": digests[tensor.name]} if digests else {}),
        }
        for shard in shards
        for tensor, _ in shard.tensors
    }


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _measured(entry: Any, field: str) -> str:
    """A digest in an entry of a record; an empty text where there is none."""
    found = _object(entry).get(field)
    return found if isinstance(found, str) and _MEASURED.fullmatch(found) else ""
