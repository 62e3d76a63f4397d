# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Which rows are taken: scores, embeddings, quotas and diversity, each against a plain computation."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import rankdata
from sklearn.neighbors import NearestNeighbors
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.selection import SelectionError
from sft.selection.diversity import (
    CLUSTER_ROWS,
    K_CENTER,
    NEIGHBOURS,
    OUTLIERS,
    WITHIN,
    allot,
    cluster_rows,
    find_outliers,
    k_center,
    neighbour_distances,
    pick_per_cluster,
    ranks,
    select_from_clusters,
    select_top,
    share_out,
)
from sft.selection.embed import MODEL_WIDTH, fit_corpus, fit_model, hashed_ids, read_input_embeddings
from sft.selection.rows import whole_text
from sft.selection.score import score_length

from .conftest import chat, table

# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_without_a_model():
    chats = [chat("Question " * 50, "ab"), chat("Q", "abc " * 100), chat("Q", "x", "Q", "yz")]
    assert score_length(table(chats))["score"].to_pylist() == [2, 400, 3]


# --- embeddings -------------------------------------------------------------------------------------------------------


def test_sif_mean_by_its_definition(model_dir, corpus):
    """Vectors from the model's own input embeddings; everything else counted by hand."""
    texts = [whole_text(row["messages"])[:1000] for row in corpus[:40]] + ["", "café naïve"]
    found = fit_model(texts, str(model_dir), seed=0).embed(texts)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    table = AutoModelForCausalLM.from_pretrained(model_dir).get_input_embeddings().weight.detach().double().numpy()
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    counts = np.bincount(np.concatenate(rows).astype(int), minlength=len(table))
    weights = 1e-3 / (1e-3 + counts / counts.sum())
    means = np.stack(
        [sum((weights[i] * table[i] for i in row), np.zeros(table.shape[1])) / max(len(row), 1) for row in rows]
    )
    common = np.linalg.svd(means)[2][0]
    expected = means - np.outer(means @ common, common)
    expected /= np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-12)
    assert not found[-2].any()
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_models_ids_travel_without_the_tokenizer(model_dir):
    model = fit_model(["one two"], str(model_dir), seed=0)
    sent = pickle.dumps(model.embed)
    assert len(sent) < 2 * model.vectors.nbytes
    np.testing.assert_array_equal(pickle.loads(sent)(["two three"]), model.embed(["two three"]))


def test_corpus_embeddings_are_near_for_like_texts(corpus):
    texts = [whole_text(row["messages"]) for row in corpus]
    vectors = fit_corpus(texts, seed=0).embed(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    places = {(row["group"], row["planted"]): index for index, row in enumerate(corpus)}
    pairs = [
        (places[group, "original"], index) for (group, kind), index in places.items() if (group, "original") in places
    ]
    copies = np.array([vectors[a] @ vectors[b] for a, b in pairs if a != b])
    strangers = vectors[:-1] @ vectors[-1]
    assert np.median(copies) > 0.95
    assert np.quantile(copies, 0.05) > np.quantile(strangers, 0.95)
    np.testing.assert_array_equal(fit_corpus(texts, seed=0).embed(texts[:5]), vectors[:5])


def test_a_sample_without_words_has_no_vectors():
    assert not fit_corpus(["", "!", "only once"], seed=0).embed(["", "only once"]).any()


def test_wide_embeddings_are_projected(model_dir, tmp_path):
    """Of bfloat16, through a shard among others; angles stay as far as a random projection keeps them."""
    width = 4 * MODEL_WIDTH
    torch.manual_seed(0)
    wide = torch.randn(64, width) + 2 * torch.randn(width)
    save_file({"model.embed_tokens.weight": wide.bfloat16(), "lm_head.weight": wide}, tmp_path / "model.safetensors")
    found = read_input_embeddings(str(tmp_path), seed=0)
    assert found.shape == (64, MODEL_WIDTH)

    def cosines(vectors):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit @ unit.T

    np.testing.assert_allclose(cosines(found), cosines(wide.numpy()), atol=0.15)
    narrow = load_file(model_dir / "model.safetensors")["model.embed_tokens.weight"].float().numpy()
    np.testing.assert_array_equal(read_input_embeddings(str(model_dir), seed=0), narrow)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lm_head.weight": (4, 2)}, "found none"),
        ({"a.wte.weight": (4, 2), "b.wte.weight": (4, 2)}, "found a.wte.weight, b.wte.weight"),
        ({"model.embed_tokens.weight": (4, 2)}, "its tokenizer has 600 ids, its weights 4 rows"),
        (None, "no weights"),
    ],
)
def test_an_embedder_that_cannot_be_loaded(tensors, message, model_dir, tmp_path):
    for file in model_dir.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    if tensors:
        save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(SelectionError, match=message):
        fit_model(["text"], str(tmp_path), seed=0)


def test_hashed_ids_are_of_words():
    ids, offsets = hashed_ids(["One two", "", "2 one"])
    assert offsets.tolist() == [0, 2, 2, 4]
    assert ids.tolist() == [ids[0], ids[1], ids[1], ids[0]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("学习惯", ["学习", "习惯"]),
        ("我 use 机器学习 daily", ["我", "use", "机器", "器学", "学习", "daily"]),
        ("好。吗", ["好吗"]),  # punctuation does not count
        ("one two", ["one", "two"]),
        ("二", ["2"]),  # a digit, of whatever script
        ("かな 한글", ["かな", "な한", "한글"]),
        ("", []),
    ],
)
def test_characters_without_spaces_between_words_count_in_pairs(text, expected):
    """A pair is told by its two characters alone, wherever it stands; those of neighbouring texts make none."""
    around = ["学", text, "习 end", text]
    ids, offsets = hashed_ids(around)
    alone, ends = hashed_ids(expected)
    assert ends.tolist() == list(range(len(expected) + 1)), "each of the expected ones is one id"
    for place in (1, 3):
        assert ids[offsets[place] : offsets[place + 1]].tolist() == alone.tolist()
    assert offsets[1] == 1
    assert len(set(alone.tolist())) == len(expected)


def test_embeddings_find_the_other_half_of_chinese_text():
    """Of each text made of clauses with words of their own; of single characters, one in nine is found."""
    draw = np.random.default_rng(0)
    characters = [chr(0x4E00 + 7 * place) for place in range(60)]  # words share theirs, as those of Chinese do
    words = ["".join(draw.choice(characters, 2)) for _ in range(1000)]
    halves: tuple[list[str], list[str]] = ([], [])
    for _ in range(400):
        own = draw.choice(words, 6, replace=False)
        for half in halves:
            half.append("，".join(draw.permutation([*own, *draw.choice(words[:200], 20)])))
    model = fit_corpus(["。".join(pair) for pair in zip(*halves, strict=True)], seed=0)
    first, second = map(model.embed, halves)
    found = (first @ second.T).argmax(axis=1) == np.arange(400)
    assert found.mean() > 0.9


# --- how many of what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "weights", "limits", "expected"),
    [
        (10, [0.5, 0.5], [100, 100], [5, 5]),
        (10, [0.3, 0.3, 0.2, 0.2], [100, 100, 100, 100], [3, 3, 2, 2]),
        (7, [1, 1, 1], [100, 100, 100], [3, 2, 2]),
        (10, [0.5, 0.3, 0.2], [2, 100, 100], [2, 5, 3]),  # 8 left in the proportion 3 : 2
        (10, [0.5, 0.5, 0.0], [2, 3, 100], [2, 3, 0]),
        (10, [1, 1], [0, 4], [0, 4]),
        (0, [1, 1], [5, 5], [0, 0]),
        (1, [0, 1], [5, 5], [0, 1]),
    ],
)
def test_share_out(count, weights, limits, expected):
    assert share_out(count, np.array(weights, float), np.array(limits)).tolist() == expected


def test_share_out_never_exceeds_and_never_loses():
    draw = np.random.default_rng(0)
    for _ in range(300):
        size = draw.integers(1, 8)
        weights, limits = draw.random(size) * draw.integers(0, 2, size), draw.integers(0, 50, size)
        count = int(draw.integers(0, 200))
        shares = share_out(count, weights, limits)
        assert (shares >= 0).all()
        assert (shares <= limits).all()
        assert shares.sum() == min(count, limits[weights > 0].sum())
        open_ones = (shares < limits) & (weights > 0)
        per_weight = shares[open_ones] / weights[open_ones]
        assert np.ptp(per_weight * weights[open_ones].min()) <= 2 if open_ones.any() else True


def test_allot_names_a_domain_the_data_lacks():
    domains = np.array(["math"] * 5 + ["poetry"] * 5, object)
    assert allot(domains, 4, {"math": 0.5, "poetry": 0.5}) == {"math": 2, "poetry": 2}
    assert allot(domains, 4, None) == {"math": 2, "poetry": 2}
    assert allot(domains, 9, {"math": 0.5, "code": 0.5}) == {"math": 5, "poetry": 0}
    with pytest.raises(SelectionError, match="no row has the domain prose; the data has math, poetry"):
        allot(domains, 4, {"math": 0.5, "prose": 0.5})


def test_ranks():
    values = np.array([3.0, 1, 2, 2, 5, 2])
    np.testing.assert_allclose(ranks(values), (rankdata(values) - 1) / 5, atol=1e-7)
    assert ranks(np.array([7.0])).tolist() == [0]


# --- which of them ----------------------------------------------------------------------------------------------------


def unit_vectors(rows: int, dimensions: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, dimensions)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_k_center_by_its_definition():
    vectors, quality = unit_vectors(60, 8, 0), np.random.default_rng(1).random(60).astype(np.float32)
    chosen = [int(quality.argmax())]
    for _ in range(14):
        gains = [
            -1
            if i in chosen
            else min(1 - float(v.astype(float) @ vectors[c].astype(float)) for c in chosen) * (1 + q) / 2
            for i, (v, q) in enumerate(zip(vectors, quality, strict=True))
        ]
        chosen.append(int(np.argmax(gains)))
    assert k_center(vectors, quality, 15).tolist() == chosen
    assert sorted(k_center(vectors, quality, 60)) == list(range(60))


def test_k_center_takes_no_row_twice_among_equals():
    same = np.repeat(unit_vectors(1, 4, 0), 10, axis=0)
    assert len(set(k_center(same, np.linspace(0, 1, 10, dtype=np.float32), 7).tolist())) == 7


def test_k_center_covers_better_than_chance():
    vectors = unit_vectors(1000, 6, 0)

    def radius(chosen):
        return (1 - vectors @ vectors[chosen].T).min(axis=1).max()

    draw = np.random.default_rng(0)
    by_chance = [radius(draw.permutation(1000)[:100]) for _ in range(20)]
    assert radius(k_center(vectors, np.ones(1000, np.float32), 100)) < min(by_chance)


def test_clusters_give_in_proportion():
    centers = unit_vectors(3, 16, 0)
    draw = np.random.default_rng(0)
    vectors = np.repeat(centers, [3000, 600, 400], axis=0) + 0.05 * draw.standard_normal((4000, 16)).astype(np.float32)
    cluster = cluster_rows(vectors, seed=0)
    assert cluster.max() == 3
    quality, outlier, sizes = draw.random(4000).astype(np.float32), draw.random(4000) < 0.2, np.bincount(cluster)
    for within in (*WITHIN, K_CENTER):
        picked = pick_per_cluster(vectors, quality, outlier, cluster, 400, within)
        assert len(set(picked.tolist())) == 400
        np.testing.assert_allclose(np.bincount(cluster[picked]), sizes / 10, atol=1)


def test_rows_of_a_cluster_by_their_definition():
    draw = np.random.default_rng(0)
    vectors, quality, outlier = unit_vectors(100, 8, 0), draw.random(100).astype(np.float32), draw.random(100) < 0.2

    def picked(within, picks):
        return pick_per_cluster(vectors, quality, outlier, np.zeros(100, np.int32), picks, within).tolist()

    inliers = np.flatnonzero(~outlier)
    assert picked("quality", 15) == sorted(inliers, key=lambda row: -quality[row])[:15]
    centre = vectors.astype(float).mean(axis=0)
    assert picked("medoid", 15) == sorted(inliers, key=lambda row: -(vectors[row].astype(float) @ centre))[:15]
    assert picked("random", 15) == inliers[:15].tolist(), "the order is random already"
    assert set(picked("random", len(inliers) + 3)) > set(inliers), "outliers when nothing else is left"


@pytest.mark.parametrize("rows", [2, 5, NEIGHBOURS + 1, 2 * CLUSTER_ROWS + 1])
def test_neighbour_distances_are_those_of_scikit_learn(rows):
    vectors = unit_vectors(rows, 8, 0)
    place = min(NEIGHBOURS, rows - 1)
    model = NearestNeighbors(n_neighbors=place, metric="cosine").fit(vectors)
    expected, _ = model.kneighbors()  # without the row itself
    np.testing.assert_allclose(neighbour_distances(vectors), expected[:, -1], atol=1e-5)


def test_neighbours_of_one_row_and_of_rows_without_a_known_word():
    assert neighbour_distances(unit_vectors(1, 8, 0)).tolist() == [0]
    assert neighbour_distances(np.zeros((3, 8), np.float32)).tolist() == [1, 1, 1]


def test_outliers_are_the_planted_ones():
    close = unit_vectors(1, 16, 0) + 0.1 * unit_vectors(900, 16, 1)
    vectors = np.concatenate([close / np.linalg.norm(close, axis=1, keepdims=True), unit_vectors(100, 16, 2)])
    outlier = find_outliers(vectors)
    assert outlier.sum() == OUTLIERS * 1000
    assert outlier[900:].mean() > 0.95


@pytest.fixture
def rows() -> pa.Table:
    """60 rows of three domains, 30, 20 and 10 of each."""
    vectors = unit_vectors(60, 4, 0).astype(np.float16)
    return pa.table(
        {
            "id": pa.array([b"%016d" % (number * 7919 % 61) for number in range(60)], pa.binary(16)),
            "domain": ["math"] * 30 + ["code"] * 20 + ["general"] * 10,
            "score": pa.array(np.arange(60) % 13, pa.float32()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 4),
        }
    )


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        (None, {"math": 9, "code": 6, "general": 3}),
        ({"math": 0.5, "code": 0.5}, {"math": 9, "code": 9}),
        ({"general": 0.9, "code": 0.1, "math": 0.0}, {"general": 10, "code": 8}),
    ],
)
def test_quotas_are_met(rows, quota, expected):
    made = select_from_clusters(rows, 18, quota, 0, "random")
    chosen = rows.filter(made["drop"].is_null())
    counts = {
        entry["values"]: entry["counts"] for entry in chosen["domain"].combine_chunks().value_counts().to_pylist()
    }
    assert counts == expected


@pytest.mark.parametrize("within", [*WITHIN, K_CENTER])
def test_the_choice_depends_on_the_seed_and_not_on_the_order(within):
    many = 3000
    vectors = unit_vectors(many, 16, 0).astype(np.float16)
    rows = pa.table(
        {
            "id": pa.array([b"%016d" % (number * 7919 % 3001) for number in range(many)], pa.binary(16)),
            "domain": ["general"] * many,
            "score": pa.array(np.arange(many) % 13, pa.float32()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 16),
        }
    )

    def chosen(table, seed):
        made = select_from_clusters(table, 300, None, seed, within)
        return set(table.filter(made["drop"].is_null())["id"].to_pylist())

    shuffled = rows.take(np.random.default_rng(0).permutation(many))
    assert chosen(rows, 0) == chosen(shuffled, 0) != chosen(rows, 1)


def test_without_a_score_there_is_no_quality(rows):
    assert select_from_clusters(rows.drop_columns("score"), 18, None, 0, "random")["quality"].null_count == 60
    assert select_from_clusters(rows, 18, None, 0, "quality")["quality"].null_count == 0
    assert select_top(rows, 18, None, 0, by="random")["quality"].null_count == 60


def test_baselines_take_the_top(rows):
    chosen = rows.filter(select_top(rows, 11, None, seed=0, by="score")["drop"].is_null())
    assert sorted(chosen["score"].to_pylist()) == sorted(rows["score"].to_pylist())[-11:]
    halves = rows.filter(select_top(rows, 10, {"code": 0.5, "math": 0.5}, seed=0, by="score")["drop"].is_null())
    assert halves["domain"].to_pylist() == ["math"] * 5 + ["code"] * 5


def test_random_depends_on_the_seed_and_not_on_the_order(rows):
    def chosen(table, seed):
        return set(table.filter(select_top(table, 20, None, seed, by="random")["drop"].is_null())["id"].to_pylist())

    shuffled = rows.take(np.random.default_rng(0).permutation(60))
    assert chosen(rows, 0) == chosen(shuffled, 0) != chosen(rows, 1)
    often = [sum(id_ in chosen(rows, seed) for seed in range(100)) for id_ in rows["id"].to_pylist()]
    assert 15 < min(often) < max(often) < 55, "every row has the same chance, a third"
