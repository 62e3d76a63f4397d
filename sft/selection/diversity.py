# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Which rows to take: so many of each domain, spread out over what there is, the better ones first.

Each domain is divided by k-means (scikit-learn) into clusters of about [`CLUSTER_ROWS`] rows. A cluster gives rows in
proportion to its size, chosen greedily: first the row of highest quality, then again and again the one with the largest
product of its distance to the rows chosen so far (1 - cosine) and (1 + quality) / 2. That is the k-center heuristic of
Gonzalez (1985), weighted. A row's quality is the rank of its score within its domain, from 0 to 1.

The baselines take rows by one number: a hash of seed and id (`random`), the score (`longest`, `ifd-top`).
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import xxhash

from .domains import DOMAINS
from .stages import SelectionError, drop_where, fixed_bytes

CLUSTER_ROWS = 1000
_FIT_ROWS = 100  # a cluster
_FIT_ITERATIONS = 25
_BLOCK = 1 << 14


def select_diverse(table: pa.Table, count: int, quota: Mapping[str, float] | None, seed: int) -> pa.Table:
    """Take `count` rows; the others are dropped. Adds `quality` and `cluster`, a number within the domain.

    Args:
        table: with `domain`, `score` and `embedding`.
        count: rows to take, or all there are.
        quota: share of each domain; what a domain lacks goes to the others in proportion. None: as in the table.
        seed: of k-means.

    Raises:
        SelectionError: the quota names an unknown domain.
    """
    domains, score = np.array(table["domain"].to_pylist(), object), table["score"].to_numpy()
    chosen = np.zeros(len(table), bool)
    quality, cluster = np.zeros(len(table), np.float32), np.zeros(len(table), np.int32)
    embedding = table["embedding"].combine_chunks()
    for domain, picks in allot(domains, count, quota).items():
        rows = np.flatnonzero(domains == domain)
        vectors = embedding.take(pa.array(rows)).flatten().to_numpy().reshape(len(rows), -1)
        quality[rows] = ranks(score[rows])
        cluster[rows] = cluster_rows(vectors, seed)
        chosen[rows[pick_per_cluster(vectors, quality[rows], cluster[rows], picks)]] = True
    return pa.table(
        {"drop": drop_where(~chosen, "not_selected"), "quality": pa.array(quality), "cluster": pa.array(cluster)}
    )


def select_top(table: pa.Table, count: int, quota: Mapping[str, float] | None, seed: int, by: str) -> pa.Table:
    """Take the `count` rows of highest `score`, or at random; the others are dropped. Adds `quality`.

    Args:
        table: with `id` and `domain`, and with `score` unless rows are taken at random.
        count, quota: see [`select_diverse`]; without a quota, domains are not looked at.
        seed: of the random order.
        by: `score` or `random`.
    """
    ids = fixed_bytes(table["id"])
    values = _random_keys(ids, seed) if by == "random" else table["score"].to_numpy().astype(np.float64)
    domains = np.array(table["domain"].to_pylist(), object) if quota else np.full(len(table), "", object)
    chosen = np.zeros(len(table), bool)
    order = np.lexsort((ids.view("S16").ravel(), -values))
    for domain, picks in allot(domains, count, quota).items():
        chosen[order[domains[order] == domain][:picks]] = True
    return pa.table({"drop": drop_where(~chosen, "not_selected"), "quality": pa.array(ranks(values))})


def _random_keys(ids: np.ndarray, seed: int) -> np.ndarray:
    return np.array([xxhash.xxh3_64_intdigest(row.tobytes(), seed=seed) for row in ids], np.uint64) / 2.0**64


def ranks(values: np.ndarray) -> np.ndarray:
    """The share of the other values that are smaller, half of those that are equal: float32 from 0 to 1."""
    ordered = np.sort(values)
    below, upto = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return ((below + upto - 1) / 2 / max(len(values) - 1, 1)).astype(np.float32)


# --- how many of what -------------------------------------------------------------------------------------------------


def allot(domains: np.ndarray, count: int, quota: Mapping[str, float] | None) -> dict[str, int]:
    """How many rows of each domain there is to take: `count` in all, or as many as the domains of the quota have.

    Raises:
        SelectionError: the quota names a domain that neither the rules nor the data know.
    """
    names, sizes = np.unique(domains.astype(str), return_counts=True)
    if unknown := set(quota or ()) - {*names.tolist(), *DOMAINS}:
        found = ", ".join(names.tolist())
        raise SelectionError(f"--quota: no row has the domain {min(unknown)}; the data has {found}.")
    weights = sizes if quota is None else np.array([quota.get(name, 0.0) for name in names.tolist()])
    return dict(zip(names.tolist(), share_out(count, weights.astype(float), sizes).tolist(), strict=True))


def share_out(count: int, weights: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Divide a number in proportion to weights, none above its limit: what one cannot take goes to the others.

    Returns:
        int64; the sum is `count`, or that of the limits of positive weights if it is less.
    """
    limits = np.where(weights > 0, limits, 0)
    count = min(count, int(limits.sum()))
    exact, full = np.zeros(len(weights)), np.zeros(len(weights), bool)
    while not full.all() and (open_weight := weights[~full].sum()) > 0:
        exact[~full] = (count - limits[full].sum()) * weights[~full] / open_weight
        over = ~full & (exact >= limits)
        if not over.any():
            break
        exact[over], full = limits[over], full | over
    whole = np.floor(exact + 1e-9).astype(np.int64)
    remainder = np.where(whole < limits, exact - whole, -1.0)
    whole[np.argsort(-remainder, kind="stable")[: count - whole.sum()]] += 1
    return whole


# --- which of them ----------------------------------------------------------------------------------------------------


def cluster_rows(vectors: np.ndarray, seed: int) -> np.ndarray:
    """The cluster of each row, int32; one if there are few rows.

    Args:
        vectors: `[rows, d]`, of length 1.
        seed: of k-means.
    """
    from sklearn.cluster import KMeans

    clusters = max(1, round(len(vectors) / CLUSTER_ROWS))
    if clusters == 1:
        return np.zeros(len(vectors), np.int32)
    some = np.random.default_rng(seed).permutation(len(vectors))[: clusters * _FIT_ROWS]
    model = KMeans(clusters, n_init=1, max_iter=_FIT_ITERATIONS, random_state=seed)
    model.fit(vectors[np.sort(some)].astype(np.float32))
    labels = [
        model.predict(vectors[start : start + _BLOCK].astype(np.float32)) for start in range(0, len(vectors), _BLOCK)
    ]
    return np.concatenate(labels).astype(np.int32)


def pick_per_cluster(vectors: np.ndarray, quality: np.ndarray, cluster: np.ndarray, picks: int) -> np.ndarray:
    """Numbers of the rows to take: from every cluster in proportion to its size."""
    sizes = np.bincount(cluster)
    members = np.split(np.argsort(cluster, kind="stable"), np.cumsum(sizes)[:-1])
    chosen = [
        rows[k_center(vectors[rows].astype(np.float32), quality[rows], share)]
        for rows, share in zip(members, share_out(picks, sizes.astype(float), sizes).tolist(), strict=True)
    ]
    return np.concatenate([np.empty(0, np.int64), *chosen])


def k_center(vectors: np.ndarray, quality: np.ndarray, picks: int) -> np.ndarray:
    """Greedy k-center, weighted by quality.

    Args:
        vectors: float32 `[rows, d]`, of length 1.
        quality: from 0 to 1.
        picks: how many rows to take.

    Returns:
        numbers of rows, in the order of their choice.
    """
    if picks >= len(vectors):
        return np.arange(len(vectors))
    weight = (1 + quality) / 2
    distance = np.full(len(vectors), 2, np.float32)  # the largest there is
    chosen = np.empty(picks, np.int64)
    for number in range(picks):
        best = int((distance * weight).argmax())
        chosen[number] = best
        np.minimum(distance, np.maximum(1 - vectors @ vectors[best], 0), out=distance)
        distance[best] = -1  # not even among equals is a row taken twice
    return chosen


__all__ = ["CLUSTER_ROWS", "allot", "cluster_rows", "k_center", "ranks", "select_diverse", "select_top", "share_out"]
