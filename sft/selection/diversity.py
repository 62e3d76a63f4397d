# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Which rows to take: so many of each domain, spread out over what there is.

Each domain is divided by k-means (scikit-learn's MiniBatchKMeans) into clusters of about [`CLUSTER_ROWS`] rows. A
cluster gives rows in proportion to its size: those of highest quality, those nearest to its centre (`medoid`), or any
(`random`). Its outliers come last: the [`OUTLIERS`] of a cluster that have the largest distance to their
[`NEIGHBOURS`]-th nearest neighbour (Ramaswamy, Rastogi and Shim 2000). They are taken only when the rest is used up.

`k-center` is the greedy heuristic of Gonzalez (1985), weighted: first the row of highest quality, then again and again
the one with the largest product of its distance to the rows chosen so far (1 - cosine) and (1 + quality) / 2. It covers
a cluster with the smallest radius, so it begins at its edges: it seeks outliers, and with them what is damaged.

A row's quality is the rank of its score within its domain, from 0 to 1. Without a score there is none.

The baselines take rows by one number: a hash of seed and id (`random`), the score (`longest`, `ifd-top`).

Rows are put in the order of a hash of seed and id before anything is computed, so the order of the input has no effect.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import xxhash

from .domains import DOMAINS
from .stages import SelectionError, drop_where, fixed_bytes

WITHIN = ("quality", "medoid", "random")
K_CENTER = "k-center"
CLUSTER_ROWS = 1000
NEIGHBOURS = 10
OUTLIERS = 0.1  # of a cluster
_NEIGHBOUR_ROWS = 4096  # of a cluster, among which neighbours are looked for
_FIT_ROWS = 100  # a cluster
_FIT_BATCH = 4096
_BLOCK = 1 << 14


def select_from_clusters(
    table: pa.Table, count: int, quota: Mapping[str, float] | None, seed: int, within: str
) -> pa.Table:
    """Take `count` rows; the others are dropped. Adds `quality`, `cluster` and `outlier`.

    Args:
        table: with `id`, `domain` and `embedding`; with `score` if there is one.
        count: rows to take, or all there are.
        quota: share of each domain; what a domain lacks goes to the others in proportion. None: as in the table.
        seed: of k-means, and of what is taken at random.
        within: one of [`WITHIN`], or [`K_CENTER`], for which no row is marked as an outlier.

    Returns:
        `drop`; `quality`, null without a score; `cluster`, a number within the domain; `outlier`.

    Raises:
        SelectionError: the quota names an unknown domain.
    """
    domains, order = np.array(table["domain"].to_pylist(), object), _random_order(fixed_bytes(table["id"]), seed)
    score = table["score"].to_numpy() if "score" in table.column_names else None
    chosen, outlier = np.zeros(len(table), bool), np.zeros(len(table), bool)
    quality, cluster = np.zeros(len(table), np.float32), np.zeros(len(table), np.int32)
    embedding = table["embedding"].combine_chunks()
    for domain, picks in allot(domains, count, quota).items():
        rows = order[domains[order] == domain]
        vectors = embedding.take(pa.array(rows)).flatten().to_numpy().reshape(len(rows), -1)
        if score is not None:
            quality[rows] = ranks(score[rows])
        cluster[rows] = cluster_rows(vectors, seed)
        if within != K_CENTER:
            outlier[rows] = _mark_outliers(vectors, cluster[rows])
        chosen[rows[pick_per_cluster(vectors, quality[rows], outlier[rows], cluster[rows], picks, within)]] = True
    return pa.table(
        {
            "drop": drop_where(~chosen, "not_selected"),
            "quality": pa.nulls(len(table), pa.float32()) if score is None else pa.array(quality),
            "cluster": pa.array(cluster),
            "outlier": pa.array(outlier),
        }
    )


def select_top(table: pa.Table, count: int, quota: Mapping[str, float] | None, seed: int, by: str) -> pa.Table:
    """Take the `count` rows of highest `score`, or at random; the others are dropped.

    Adds `quality`, null for rows that are taken at random.

    Args:
        table: with `id` and `domain`, and with `score` unless rows are taken at random.
        count, quota: see [`select_from_clusters`]; without a quota, domains are not looked at.
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
    quality = pa.nulls(len(table), pa.float32()) if by == "random" else pa.array(ranks(values))
    return pa.table({"drop": drop_where(~chosen, "not_selected"), "quality": quality})


def _random_order(ids: np.ndarray, seed: int) -> np.ndarray:
    return np.lexsort((ids.view("S16").ravel(), _random_keys(ids, seed)))


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
        vectors: `[rows, d]`, of length 1, in an order that is random: k-means sees the first of them.
        seed: of k-means.
    """
    from sklearn.cluster import MiniBatchKMeans

    clusters = max(1, round(len(vectors) / CLUSTER_ROWS))
    if clusters == 1:
        return np.zeros(len(vectors), np.int32)
    model = MiniBatchKMeans(clusters, batch_size=_FIT_BATCH, n_init=1, random_state=seed)
    model.fit(vectors[: clusters * _FIT_ROWS].astype(np.float32))
    labels = [
        model.predict(vectors[start : start + _BLOCK].astype(np.float32)) for start in range(0, len(vectors), _BLOCK)
    ]
    return np.concatenate(labels).astype(np.int32)


def find_outliers(vectors: np.ndarray) -> np.ndarray:
    """Which rows of a cluster lie apart: the [`OUTLIERS`] of them with the largest [`neighbour_distances`].

    Args:
        vectors: float32 `[rows, d]`, of length 1.

    Returns:
        bool.
    """
    distance = neighbour_distances(vectors)
    outlier = np.zeros(len(vectors), bool)
    outlier[np.argsort(-distance, kind="stable")[: int(OUTLIERS * len(vectors))]] = True
    return outlier


def neighbour_distances(vectors: np.ndarray) -> np.ndarray:
    """The distance (1 - cosine) of each row to its [`NEIGHBOURS`]-th nearest neighbour, float32.

    Args:
        vectors: float32 `[rows, d]`, of length 1 or 0, in an order that is random: neighbours are looked for among the
            first [`_NEIGHBOUR_ROWS`]. With fewer rows than neighbours, the farthest one counts.
    """
    among = vectors[:_NEIGHBOUR_ROWS]
    place = min(NEIGHBOURS, len(among) - 1)
    if place < 1:
        return np.zeros(len(vectors), np.float32)
    distance = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), CLUSTER_ROWS):
        apart = 1 - vectors[start : start + CLUSTER_ROWS] @ among.T
        own = np.arange(start, min(start + len(apart), len(among)))
        apart[own - start, own] = np.inf
        distance[start : start + len(apart)] = np.partition(apart, place - 1, axis=1)[:, place - 1]
    return distance


def _members(cluster: np.ndarray) -> list[np.ndarray]:
    """Numbers of the rows of each cluster."""
    return np.split(np.argsort(cluster, kind="stable"), np.cumsum(np.bincount(cluster))[:-1])


def _mark_outliers(vectors: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    outlier = np.zeros(len(cluster), bool)
    for rows in _members(cluster):
        outlier[rows] = find_outliers(vectors[rows].astype(np.float32))
    return outlier


def pick_per_cluster(
    vectors: np.ndarray, quality: np.ndarray, outlier: np.ndarray, cluster: np.ndarray, picks: int, within: str
) -> np.ndarray:
    """Numbers of the rows to take: from every cluster in proportion to its size; `within` as above."""
    members = _members(cluster)
    sizes = np.array(list(map(len, members)))
    chosen = [np.empty(0, np.int64)]
    for rows, share in zip(members, share_out(picks, sizes.astype(float), sizes).tolist(), strict=True):
        if within == K_CENTER:
            chosen.append(rows[k_center(vectors[rows].astype(np.float32), quality[rows], share)])
        else:
            first = _better_first(vectors[rows], quality[rows], within)
            chosen.append(rows[np.lexsort((first, outlier[rows]))[:share]])
    return np.concatenate(chosen)


def _better_first(vectors: np.ndarray, quality: np.ndarray, within: str) -> np.ndarray:
    """What rows of one cluster are ordered by, smallest first; equal ones stay in their order, which is random."""
    if within == "quality":
        return -quality
    if within == "medoid":
        vectors = vectors.astype(np.float32)
        return -(vectors @ vectors.mean(axis=0))
    return np.zeros(len(vectors), np.float32)


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


__all__ = [
    "CLUSTER_ROWS",
    "K_CENTER",
    "NEIGHBOURS",
    "OUTLIERS",
    "WITHIN",
    "allot",
    "cluster_rows",
    "find_outliers",
    "k_center",
    "neighbour_distances",
    "pick_per_cluster",
    "ranks",
    "select_from_clusters",
    "select_top",
    "share_out",
]
