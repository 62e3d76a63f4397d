# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Rows nearest to targets: the choice against one that compares all with all, noise, and what is no target."""

import json
import math
import os
import re
import tracemalloc
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binom

from sft.selection import (
    SelectionError,
    SelectionSettings,
    common,
    decontaminate,
    embed,
    rds,
    select_conversations,
    target,
)
from sft.selection.domains import tag_domains
from sft.selection.rows import content_id
from sft.selection.target import (
    cosines_to,
    fit_choice,
    fit_copies,
    read_targets,
    select_nearest,
    take_in_turns,
    target_items,
)

from .conftest import chat, table, write_rows
from .pools import NOISE, chinese_pool, plant, real_pool
from .test_operators import declare
from .test_pipeline import run, selected

# --- the choice -------------------------------------------------------------------------------------------------------


def column(vectors: np.ndarray, rows: int = 37) -> pa.ChunkedArray:
    """Embeddings as the stages hand them on, in chunks of so many rows."""
    parts = [vectors[start : start + rows] for start in range(0, len(vectors), rows)]
    width = vectors.shape[1]
    chunks = [pa.FixedSizeListArray.from_arrays(pa.array(part.ravel(), pa.float16()), width) for part in parts]
    return pa.chunked_array(chunks, pa.list_(pa.float16(), width))


def directions(draw: np.random.Generator, rows: int, width: int) -> np.ndarray:
    vectors = draw.standard_normal((rows, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def brute_force(vectors, targets, ids, domains, limits) -> list[tuple[int, int, float]]:
    """Row, target and cosine of each turn, from all cosines, summed exactly by `math.fsum`."""

    def cosine(one, other):
        dot, *squares = (math.fsum(a * b) for a, b in ((one, other), (one, one), (other, other)))
        return dot / math.sqrt(squares[0]) / math.sqrt(squares[1]) if squares[0] else -2.0

    vectors, targets = vectors.astype(float), targets.astype(float)
    cosines = [[cosine(row, one) for row in vectors] for one in targets]
    left, free, taken = list(limits), set(range(len(vectors))), []
    while sum(left):
        turn = len(taken) % len(targets)
        open_rows = [row for row in free if left[domains[row]]]
        best = min(open_rows, key=lambda row: (-cosines[turn][row], ids[row].tobytes()))
        free.remove(best)
        left[domains[best]] -= 1
        taken.append((best, turn, cosines[turn][best]))
    return taken


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_that_of_comparing_all_with_all(seed, monkeypatch):
    """With copies among rows and targets, rows without a direction, quotas, and so few candidates that they run out."""
    draw = np.random.default_rng(seed)
    rows, width, count = (int(draw.integers(*ends)) for ends in ((5, 200), (2, 9), (1, 12)))
    vectors = directions(draw, rows, width)[draw.integers(0, rows, rows)]
    vectors[draw.random(rows) < 0.05] = 0
    targets = directions(draw, count, width)[draw.integers(0, count, count)]
    ids = draw.integers(0, 256, (rows, 16), np.uint8)
    domains = draw.integers(0, 3, rows)
    limits = np.array([draw.integers(0, size + 1) for size in np.bincount(domains, minlength=3)])
    monkeypatch.setattr(target, "MARGIN", 1)
    monkeypatch.setattr(target, "CANDIDATES", int(draw.integers(1, 200)))
    monkeypatch.setattr(target, "_BLOCK", int(draw.integers(1, 400)))
    taken = take_in_turns(column(vectors), targets, ids, domains, limits)
    expected = brute_force(vectors, targets, ids, domains, limits)
    assert list(zip(taken.rows.tolist(), taken.targets.tolist(), strict=True)) == [turn[:2] for turn in expected]
    np.testing.assert_allclose(taken.cosines, [turn[2] for turn in expected], rtol=1e-14)


def test_equal_rows_are_settled_by_id_whatever_their_order():
    draw = np.random.default_rng(0)
    vectors = np.repeat(directions(draw, 40, 64), 50, axis=0)
    ids = draw.integers(0, 256, (len(vectors), 16), np.uint8)
    ids[:, :15] = 0  # trailing bytes decide, zero bytes among them
    ids[:, 14] = np.arange(len(ids)) // 256
    ids[:, 15] = np.arange(len(ids)) % 256
    targets = directions(draw, 7, 64)

    def choose(order):
        made = {"id": pa.array([row.tobytes() for row in ids[order]], pa.binary(16))}
        made |= {"domain": ["text"] * len(order), "embedding": column(vectors[order])}
        chosen = select_nearest(pa.table(made), 333, None, targets)
        found = dict(zip(map(bytes, ids[order]), chosen["target"].to_pylist(), strict=True))
        return {key: value for key, value in found.items() if value is not None}

    first = choose(np.arange(len(vectors)))
    assert len(first) == 333
    assert choose(draw.permutation(len(vectors))) == first
    of_a_copy = [sorted(i for i in range(50 * n, 50 * n + 50) if bytes(ids[i]) in first) for n in range(40)]
    assert all(places == list(range(50 * n, 50 * n + len(places))) for n, places in enumerate(of_a_copy))


def test_what_is_recorded():
    vectors = np.array([[1, 0], [0.6, 0.8], [0, 1], [0, 0]], np.float16)
    ids = pa.array([bytes([n]) * 16 for n in range(4)], pa.binary(16))
    rows = pa.table({"id": ids, "domain": ["text"] * 4, "embedding": column(vectors)})
    targets = np.array([[0, 1], [1, 0]], np.float16)
    chosen = select_nearest(rows, 3, None, targets)
    assert chosen["drop"].to_pylist() == [None, None, None, "not_selected"]
    assert chosen["target"].to_pylist() == [2, 1, 1, None]
    assert chosen["similarity"].to_pylist() == pytest.approx([1, 0.8, 1, None], abs=1e-3)
    last = select_nearest(rows, 9, None, targets)
    assert last["target"].to_pylist() == [2, 1, 1, 2], "all there are; what has no direction comes last"
    assert last["similarity"].to_pylist()[3] is None


def test_a_quota_holds():
    draw = np.random.default_rng(0)
    rows = 300
    made = {
        "id": pa.array([draw.bytes(16) for _ in range(rows)], pa.binary(16)),
        "domain": draw.choice(["code", "math", "text"], rows).tolist(),
        "embedding": column(directions(draw, rows, 8)),
    }
    chosen = select_nearest(pa.table(made), 60, {"code": 0.75, "math": 0.25}, directions(draw, 5, 8))
    taken = Counter(d for d, drop in zip(made["domain"], chosen["drop"].to_pylist(), strict=True) if drop is None)
    assert taken == {"code": 45, "math": 15}
    with pytest.raises(SelectionError, match="no row has the domain poetry; the data has code, math, text"):
        select_nearest(pa.table(made), 60, {"poetry": 1.0}, directions(draw, 5, 8))


def test_a_matrix_of_all_cosines_is_never_held(monkeypatch):
    draw = np.random.default_rng(0)
    rows, targets = 40_000, directions(draw, 200, 16)
    vectors, ids = column(directions(draw, rows, 16), 2048), draw.integers(0, 256, (rows, 16), np.uint8)
    monkeypatch.setattr(target, "_BLOCK", 1 << 17)
    tracemalloc.start()
    try:
        take_in_turns(vectors, targets, ids, np.zeros(rows, int), np.array([4000]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < rows * len(targets) * 4 / 2, "half of what they take as float32"


def test_cosines_by_their_definition():
    draw = np.random.default_rng(0)
    vectors, targets = directions(draw, 50, 32), directions(draw, 9, 32)
    exact = [v.astype(float) for v in (vectors, targets)]
    expected = exact[1] @ exact[0].T
    expected /= np.outer(*(np.linalg.norm(v, axis=1) for v in reversed(exact)))
    np.testing.assert_allclose(cosines_to(vectors, targets), expected, rtol=1e-12)


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [real_pool, chinese_pool])
def test_noise_is_taken_at_most_as_often_as_by_chance(make):
    """Of healthy targets; no filter has run. With what is damaged for targets, the bound does not hold."""
    pool = make(2600)
    if pool is None:
        pytest.skip("the real conversations are absent")
    held, pool = pool[:100], pool[100:]
    present, taken, sought = Counter[str](), Counter[str](), Counter[str]()
    for seed in range(2):
        rows, kinds = plant(pool, seed)
        places = sorted({content_id(messages): place for place, messages in enumerate(rows)}.values())
        chats, kinds = [rows[place] for place in places], [kinds[place] for place in places]
        text = table(chats, id=pa.array(map(content_id, chats), pa.binary(16)))
        encode = embed.fit_kernel(text.slice(0, embed.SAMPLE), None, seed)
        embedding = encode(text)["embedding"]
        made = pa.table({"id": text["id"], "domain": tag_domains(text)["domain"], "embedding": embedding})
        present.update(kinds)
        damaged = [messages for messages, kind in zip(chats, kinds, strict=True) if kind == "word salad"]
        for targets, found in ((held, taken), (damaged, sought)):
            encoded = encode(table(targets))["embedding"].combine_chunks()
            vectors = encoded.flatten().to_numpy().reshape(len(targets), -1)
            drop = select_nearest(made, len(rows) // 10, None, vectors)["drop"].to_pylist()
            found.update(kind for kind, reason in zip(kinds, drop, strict=True) if reason is None)
    print({kind: f"{taken[kind]} of {present[kind]}" for kind in present})
    bounds = {kind: binom.ppf(0.999, present[kind], 0.1) for kind in NOISE}
    assert {kind: taken[kind] for kind in NOISE if taken[kind] > bounds[kind]} == {}
    assert sum(taken[kind] for kind in NOISE) < 0.1 * sum(present[kind] for kind in NOISE)
    assert sought["word salad"] > bounds["word salad"]


# --- targets ----------------------------------------------------------------------------------------------------------


def test_targets_are_read_with_their_places(lines):
    rows = [{"messages": chat("Q", "A")}, {"prompt": "P", "completion": "C"}]
    found = read_targets(str(lines(*rows, name="dev.jsonl")))
    assert [source.rpartition("/")[2] for source in found.table["source"].to_pylist()] == ["dev.jsonl:1", "dev.jsonl:2"]
    assert b'"content": "C"' in found.table["row"][1].as_py()


def test_the_digest_is_of_what_the_targets_say(lines, tmp_path):
    one = {"messages": chat("Q", "A")}
    digest = read_targets(str(lines(one, name="a.jsonl"))).digest
    assert read_targets(str(lines({**one, "id": 7}, name="b.jsonl"))).digest == digest
    assert read_targets(str(lines({"messages": chat("Q", "B")}, name="a.jsonl"))).digest != digest


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "dev.jsonl: has no rows; "),
        ([{"messages": chat("Q", "A")}, {"messages": chat("Q")}], "dev.jsonl:2: none of its 1 messages is an assis"),
        ([{"text": "no conversation"}], "dev.jsonl:1: "),
    ],
)
def test_what_is_no_target(rows, words, lines):
    with pytest.raises(SelectionError) as error:
        read_targets(str(lines(*rows, name="dev.jsonl")))
    assert str(error.value).startswith("--target ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_data_is_no_target(lines, tmp_path):
    data = lines({"messages": chat("Q", "A")})
    (tmp_path / "link.jsonl").symlink_to(data)
    (tmp_path / "copy.jsonl").write_bytes(data.read_bytes())
    (tmp_path / "other.jsonl").write_bytes(data.read_bytes().replace(b"A", b"B"))
    for name in ("data.jsonl", "link.jsonl", "copy.jsonl"):
        with pytest.raises(SelectionError, match=r"is the data .*data\.jsonl; targets are rows held out"):
            read_targets(str(tmp_path / name), [str(data)])
    assert len(read_targets(str(tmp_path / "other.jsonl"), [str(data)]).table) == 1


# --- their copies -----------------------------------------------------------------------------------------------------

QUESTION = "How many of the forty apples does Nora keep if she gives a quarter of them away?"
ANSWER = "A quarter of forty is ten, so she gives ten apples away, and keeps thirty of them for herself in the end."


def copies(targets: list, rows: list) -> list[bool]:
    """Which rows contain a target."""
    read = target.Targets(table(targets, source=[f"dev.jsonl:{n + 1}" for n in range(len(targets))]), "")
    find = partial(decontaminate.fit_kernel, evaluations=target_items(read, 13, 6))
    text = table(rows)
    return fit_copies(text, find)(text)["drop"].is_valid().to_pylist()


def test_rows_that_contain_a_target():
    one = chat(QUESTION, ANSWER)
    rows = {
        "itself": one,
        "in a longer one": chat("Hello there, my friend.", "Good day.", QUESTION.upper(), ANSWER),
        "its question, answered otherwise": chat(QUESTION, "Thirty."),
        "its answer to another question": chat("And now?", ANSWER),
        "on the same subject": chat("How many apples are left of forty?", "That depends on how many are given away."),
    }
    assert dict(zip(rows, copies([one], list(rows.values())), strict=True)) == {
        name: name != "on the same subject" for name in rows
    }


def test_turns_of_a_target_that_many_say_are_no_copies():
    one = chat(
        "Please book a table for six at Luigi's tonight.",
        "Is there anything else I can help you with?",
        QUESTION,
        ANSWER,
    )
    row = chat("Find me a bus to Fresno.", "Is there anything else I can help you with?", "No.", "Goodbye.")
    assert copies([one], [row]) == [False]


# --- their embeddings -------------------------------------------------------------------------------------------------


def embedded(chats: list) -> tuple[pa.Table, partial]:
    """Rows with the embeddings that the stages give them, and what fits the embedder."""
    text = table(chats, id=pa.array(map(content_id, chats), pa.binary(16)))
    text = text.append_column("common", common.fit_marks(text)(text)["common"])
    fit = partial(embed.fit_kernel, embedder=None, seed=0)
    columns = text.append_column("domain", pa.array(["text"] * len(text)))
    return columns.append_column("embedding", fit(text)(text)["embedding"]), fit


def test_a_target_is_nearest_to_itself(corpus):
    """As in the rows, system prompts and what rows have in common are left out of targets."""
    template = "You are given one passage and have to answer in one short sentence what it says of its subject: "
    chats = [
        [{**m, "content": template + m["content"]} if not i else m for i, m in enumerate(row["messages"])]
        for row in corpus
    ]
    chats = list({content_id(messages): messages for messages in chats}.values())
    rows, fit = embedded(chats)
    own = [
        [{"role": "system", "content": "Be brief, and do not say what you do not know."}, *chats[n]] for n in (3, 5, 8)
    ]
    read = target.Targets(table(own, source=["a", "b", "c"]), "")
    choose = partial(select_nearest, count=3, quota=None)
    chosen = fit_choice(rows, read, fit, common.fit_marks, choose)(rows)
    assert [chosen["target"][n].as_py() for n in (3, 5, 8)] == [1, 2, 3]
    assert [chosen["similarity"][n].as_py() for n in (3, 5, 8)] == pytest.approx([1, 1, 1], abs=1e-3)


def test_the_embedder_is_not_fitted_to_targets(corpus):
    rows, fit = embedded([row["messages"] for row in corpus[:200]])
    samples = []

    def noting(sample):
        samples.append(sample)
        return fit(sample)

    read = target.Targets(table([corpus[300]["messages"]], source=["a"]), "")
    fit_choice(rows, read, noting, common.fit_marks, partial(select_nearest, count=3, quota=None))
    assert samples == [rows]


def test_a_target_of_unknown_words(corpus):
    rows, fit = embedded([row["messages"] for row in corpus[:200]])
    read = target.Targets(
        table([corpus[0]["messages"], chat("Ghrxzzq", "Wvkkpt")], source=["d.jsonl:1", "d.jsonl:2"]), ""
    )
    with pytest.raises(SelectionError, match=r"^--target d\.jsonl:2: none of its words is known to the embedder"):
        fit_choice(rows, read, fit, common.fit_marks, partial(select_nearest, count=3, quota=None))


@pytest.mark.parametrize("other", ["seed", "width"])
def test_another_embedder_than_that_of_the_rows(other, corpus, model_dir):
    rows, _ = embedded([row["messages"] for row in corpus[:200]])
    model = {"seed": None, "width": str(model_dir)}[other]
    fit = partial(embed.fit_kernel, embedder=model, seed=1)
    if other == "seed":  # as a model that was trained on
        fit = partial(embed.fit_kernel, embedder=None, seed=0)
        rows = rows.set_column(
            rows.column_names.index("embedding"), "embedding", rows["embedding"].take(list(range(199, -1, -1)))
        )
    read = target.Targets(table([corpus[0]["messages"]], source=["a"]), "")
    with pytest.raises(SelectionError, match="embedded by another model than --embedder is now"):
        fit_choice(rows, read, fit, None, partial(select_nearest, count=3, quota=None))


# --- from end to end --------------------------------------------------------------------------------------------------


def runs_of_words(messages: list[dict[str, str]]) -> set[tuple[str, ...]]:
    """Every thirteen words that stand beside each other."""
    words = re.findall(r"\w+", " ".join(message["content"] for message in messages).lower())
    return {tuple(words[at : at + 13]) for at in range(len(words) - 12)}


@pytest.fixture(scope="module")
def held(corpus, tmp_path_factory) -> tuple[Path, Path]:
    """Rows to select from, ten of which contain a target each; and the targets."""
    folder = tmp_path_factory.mktemp("held")
    data, seen = corpus[:300], {row["group"] for row in corpus[:300]}
    others = {row["group"]: row["messages"] for row in corpus[300:] if row["group"] not in seen}
    said = set().union(*(runs_of_words(row["messages"]) for row in data))  # by chance, where all are of one manual
    dev = [others[group] for group in sorted(others) if not said & runs_of_words(others[group])][:10]
    assert len(dev) == 10
    copied = [chat("Hello! Are you there?", "Good day.", *(message["content"] for message in own)) for own in dev]
    return tuple(
        write_rows(folder / name, [{"messages": messages} for messages in chats])
        for name, chats in (("data.jsonl", [*(row["messages"] for row in data), *copied]), ("dev.jsonl", dev))
    )


def stages(out: Path) -> dict[str, dict]:
    return {stage["name"]: stage for stage in json.loads((out / "selection.json").read_text())["stages"]}


def test_rows_are_selected_by_targets(held, tmp_path):
    data, dev = held
    told: list[str] = []
    settings = SelectionSettings(count=30, target=str(dev))
    select_conversations(data, tmp_path / "out", settings, notify=told.append)
    assert told[0] == "target-copies: drops what contains one of the 10 targets; --keep-target-copies keeps it"
    assert stages(tmp_path / "out")["target-copies"]["dropped"] == {"contains_target": 10}
    rows = selected(tmp_path / "out")
    assert not any("Are you there?" in row["messages"][0]["content"] for row in rows)
    assert sorted(row["teleflm_target"] for row in rows) == sorted([*range(1, 11)] * 3), "each takes as many"
    assert all(-1 <= row["teleflm_similarity"] < 0.99 for row in rows)
    assert not any("teleflm_score" in row for row in rows)
    assert str(dev.parent) not in (tmp_path / "out/selection.json").read_text()


def test_copies_are_kept_where_asked_for(held, tmp_path):
    data, dev = held
    kept = SelectionSettings(count=30, target=str(dev), keep_target_copies=True)
    select_conversations(data, tmp_path / "out", kept)
    assert "target-copies" not in stages(tmp_path / "out")
    copied = [row for row in selected(tmp_path / "out") if row["messages"][0]["content"] == "Hello! Are you there?"]
    assert {row["teleflm_target"] for row in copied} == set(range(1, 11))
    assert min(row["teleflm_similarity"] for row in copied) > 0.9


def test_other_targets_are_another_selection(held, tmp_path):
    data, dev = held
    mine = tmp_path / "dev.jsonl"
    mine.write_text(dev.read_text())
    asked = (data, tmp_path / "out", "-n", 30, "--workers", 1, "--target")
    assert run(*asked, dev)[0] == 0
    assert "already done" in run(*asked, mine)[1], "the same targets, elsewhere"
    before = mine.stat()
    mine.write_text(
        dev.read_text().replace('"assistant", "content": "', '"assistant", "content": "x', 1).replace(" ", "", 1)
    )
    os.utime(mine, ns=(before.st_atime_ns, before.st_mtime_ns))
    status, output = run(*asked, mine)
    assert (status, mine.stat().st_size) == (2, before.st_size)
    assert "06-target-copies: of another configuration: targets was " in output
    kept = (*asked, mine, "--keep-target-copies")
    assert "of another configuration" in run(*kept)[1]


def test_what_is_dropped_between_the_embeddings_and_the_choice(held, tmp_path):
    """The embedder is fitted anew for the targets, to the rows that it was fitted to before."""
    data, dev = held
    operators = [
        {"operator": "domains", "own": False},
        {"operator": "embeddings", "own": False},
        {"operator": "heuristics", "max_words": 250},
        {"operator": "nearest", "count": 30, "targets": str(dev)},
    ]
    settings = SelectionSettings(pipeline=declare(tmp_path / "mine.yaml", operators))
    select_conversations(data, tmp_path / "out", settings)
    assert stages(tmp_path / "out")["heuristics"]["dropped"]["too_long"] > 20
    assert len(selected(tmp_path / "out")) == 30


def test_a_causal_model_embeds_rows_and_targets(held, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(rds, "MAX_TOKENS", 50)
    data, dev = held
    settings = SelectionSettings(count=30, target=str(dev), embedder=f"rds:{model_dir}")
    select_conversations(data, tmp_path / "out", settings)
    encode = rds.HiddenStateEncoder(str(model_dir))
    targets = encode("\n".join(m["content"] for m in json.loads(line)["messages"]) for line in dev.open())
    for row in selected(tmp_path / "out")[:8]:
        vector = encode(["\n".join(m["content"] for m in row["messages"] if m["role"] != "system")])[0]
        assert row["teleflm_similarity"] == pytest.approx(vector @ targets[row["teleflm_target"] - 1], abs=0.02)
    assert str(model_dir) not in (tmp_path / "out/selection.json").read_text()


def test_report(held, tmp_path):
    data, dev = held
    status, output = run(
        data, tmp_path / "out", "-n", 30, "--target", dev, "--report", tmp_path / "report", "--workers", 1
    )
    assert status == 0, output
    page = (tmp_path / "report/index.html").read_text()
    assert "<code>contains_target</code>" in page
    assert page.count(", cosine to its target 0.") > 20
    assert str(dev.parent) not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "target"], "--method target: nearest needs examples to go by: give --target."),
        (["--method", "random", "--target", "{dev}"], "--target is for --method target, not random."),
        (["--target", "{dev}", "--within", "medoid"], "--within is for --method teleflm, not target."),
        (
            ["--target", "{dev}", "--score-column", "x"],
            "--score-column is for --method teleflm or k-center, not target.",
        ),
        (["--keep-target-copies"], "--keep-target-copies: nothing drops rows that contain a target; leave it out."),
        (["--target", "{data}"], "is the data"),
        (["--target", "{data}x"], "data.jsonlx"),
        (
            ["--target", "{dev}", "-n", 500],
            "rows are left, fewer than -n 500; --allow-fewer takes them. Of 310 rows we",
        ),
        (["--target", "{dev}", "--quota", "code=1", "-n", 200], "--quota cannot be met: "),
        (["--target", "{dev}", "--embedder", "rds:/nowhere"], "--embedder rds:/nowhere: no such folder."),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_does_not_go_together_is_refused_in_one_line(arguments, message, held, tmp_path):
    data, dev = held
    given = [str(argument).format(data=data, dev=dev) for argument in arguments]
    status, output = run(data, tmp_path / "out", "--workers", 1, *([] if "-n" in given else ["-n", 30]), *given)
    assert status != 0
    last = output.strip().splitlines()[-1]
    assert message in last
    assert "Traceback" not in output
