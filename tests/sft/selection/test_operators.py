# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A selection is what a file declares: what --explain prints selects the same, and what cannot run is refused."""

import configparser
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.selection import METHODS, SelectionError, SelectionSettings, declaration, operators, select_conversations
from sft.selection.common import Reading
from sft.selection.declaration import FOLDER, parse, read_file, read_method
from sft.selection.operators import DOES, FIRST, OPERATORS, Operator
from sft.selection.options import Number
from sft.selection.stages import drop_where
from sft.yaml_text import load_yaml

from .conftest import chat, table
from .test_pipeline import run, selected

ROOT = Path(__file__).parents[3]
SHORT = ["exact-duplicates", {"operator": "domains", "own": False}, {"operator": "random", "count": 40}]


def declare(path: Path, entries, **more) -> Path:
    told = [{"operator": entry} if isinstance(entry, str) else entry for entry in entries]
    path.write_text(yaml.safe_dump({"operators": told, **more}))
    return path


def digests(out: Path) -> list[str]:
    return [json.loads((stage / "_stage.json").read_text())["digest"] for stage in sorted((out / "stages").iterdir())]


# --- what is shipped, and what is printed -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_shipped_files_say_all_there_is_to_say(method):
    text = (FOLDER / f"{method}.yaml").read_text()
    declared = read_method(method)
    assert text.partition("\n")[2] == declared.to_yaml()
    assert declared.to_dict() == yaml.safe_load(text), "plain YAML, whoever reads it"


def test_all_methods_are_shipped():
    assert {path.stem for path in FOLDER.iterdir()} == set(METHODS)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.package_data"]["sft.selection"] == "pipelines/*.yaml"


def test_the_example_of_the_documentation_runs(corpus_file, tmp_path):
    text = (ROOT / "docs/selection.md").read_text()
    (tmp_path / "mine.yaml").write_text(text[text.index("```yaml") + 7 :].partition("```")[0])
    told = SelectionSettings(pipeline=tmp_path / "mine.yaml", allow_fewer=True)
    assert told.declaration.value("heuristics", "max_looping") == 0.9
    assert 0 < select_conversations(corpus_file, tmp_path / "out", told).count < 1000


def test_the_registry_is_consistent():
    made = set(FIRST)
    for name, operator in OPERATORS.items():
        assert operator.does in DOES, name
        assert sum(bool(way) for way in (operator.kernel, operator.fit, operator.build)) == 1, name
        assert not operator.switch or operator.switch in operator.options, name
        assert operator.reading is None or operator.reading.text in operator.texts, name
        made.update(operator.makes)
    assert {column for operator in OPERATORS.values() for column in operator.needs} <= made


@pytest.mark.parametrize(
    "options",
    [
        ["--within", "medoid", "--domain-column", "planted"],
        ["--method", "longest", "--allow-fewer", "--unique-ids"],
        ["--quota", "math=0.5,code=0.5", "--allow-fewer", "--decontaminate", "{evaluation}", "--embedder", "{model}"],
        ["--method", "k-center", "--seed", 3, "--set", "near-duplicates.overlap=0.7", "--score-column", "group"],
        ["--target", "{target}", "--embedder", "{model}", "--set", "target-copies.ngram=20"],
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_what_explain_prints_selects_the_same(options, corpus, lines, model_dir, tmp_path):
    data = lines(*corpus[:120])
    evaluation = lines({"text": corpus[7]["messages"][0]["content"] * 3}, name="it's: #1 \u2028\U0001f600 no.jsonl")
    target = lines(*({"messages": row["messages"]} for row in corpus[200:205]), name="dev.jsonl")
    options = [
        str(option).format(evaluation=evaluation, model=model_dir, target=target) for option in ("-n", 40, *options)
    ]
    status, printed = run(*options, "--explain")
    assert status == 0, printed
    (tmp_path / "mine.yaml").write_text(printed)
    assert run("--pipeline", tmp_path / "mine.yaml", "--explain") == (0, printed)
    for out, asked in (("one", options), ("two", ["--pipeline", tmp_path / "mine.yaml"])):
        status, output = run(data, tmp_path / out, *asked, "--workers", 1)
        assert status == 0, output
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert (tmp_path / "one/selected.jsonl").read_bytes() == (tmp_path / "two/selected.jsonl").read_bytes()
    assert run(data, tmp_path / "one", "--pipeline", tmp_path / "mine.yaml", "--json")[1].count('"already_done": true')


@settings(max_examples=50)
@given(st.text(st.characters(codec="utf-8"), min_size=1), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_any_value_comes_back_from_yaml(text, share, seed):
    entries = [
        {"operator": "common-text", "max_share": share},
        {"operator": "decontamination", "files": [text]},
        {"operator": "domains", "column": text},
        {"operator": "random", "quota": {text: share, text + "x": 1 - share}},
    ]
    declared = parse({"operators": entries, "seed": seed}, "mine")
    assert parse(load_yaml(declared.to_yaml()), "mine") == declared


# --- what is declared is what is done ---------------------------------------------------------------------------------


def test_operators_can_be_left_out_and_reordered(corpus_file, tmp_path):
    first = declare(tmp_path / "first.yaml", SHORT)
    selection = select_conversations(corpus_file, tmp_path / "one", SelectionSettings(pipeline=first))
    assert [stage.name for stage in selection.stages] == ["rows", "exact-duplicates", "domains", "selection"]
    second = declare(tmp_path / "second.yaml", [SHORT[1], "heuristics", SHORT[0], SHORT[2]])
    selection = select_conversations(corpus_file, tmp_path / "two", SelectionSettings(pipeline=second))
    assert [stage.name for stage in selection.stages] == [
        "rows",
        "domains",
        "heuristics",
        "exact-duplicates",
        "selection",
    ]
    assert len(selected(tmp_path / "two")) == 40
    with pytest.raises(SelectionError, match=r"02-\S+: of another configuration"):
        select_conversations(corpus_file, tmp_path / "one", SelectionSettings(pipeline=second))


def test_the_text_that_is_read_is_the_one_declared(lines, tmp_path):
    """Code stands in the question of one row, in the answer of another, in the system prompt of a third."""
    code = "def f(x):\n    return x"
    rows = [
        {"messages": chat(f"What is this?\n{code}", "A function.")},
        {"messages": chat("Write one.", f"Here:\n{code}")},
        {"messages": [{"role": "system", "content": code}, *chat("Who is it?", "It is me.")]},
        {"messages": chat("Who was it?", "It was you.")},
    ]
    data, found = lines(*rows), {}
    for text in ("whole", "turns", "question", "answer"):
        entry = {"operator": "domains", "text": text, "own": False}
        file = declare(tmp_path / f"{text}.yaml", [entry, {"operator": "random", "count": 4}])
        select_conversations(data, tmp_path / text, SelectionSettings(pipeline=file))
        domains = pq.read_table(tmp_path / text / "stages/02-domains")["domain"].to_pylist()
        found[text] = [place for place, domain in enumerate(domains) if domain == "code"]
    assert found == {"whole": [0, 1, 2], "turns": [0, 1], "question": [0], "answer": [1]}


def test_a_reading_is_of_its_roles():
    rows = table([[{"role": "system", "content": "s"}, *chat("q", "a", "r", "b")]])
    told = {
        text: list(Reading(text, own=False).texts(rows)) for text in ("whole", "turns", "question", "answer", "system")
    }
    assert told == {
        "whole": ["s\nq\na\nr\nb"],
        "turns": ["q\na\nr\nb"],
        "question": ["q\nr"],
        "answer": ["a\nb"],
        "system": ["s"],
    }


def test_evaluation_sets_add_up(lines, tmp_path):
    questions = [f"Number {n} of the questions that somebody asked me, {n * 7} words long" for n in range(20)]
    data = lines(*({"messages": chat(question, f"It is {n}, I believe.")} for n, question in enumerate(questions)))
    one, two = (lines({"text": questions[n]}, name=f"{n}.jsonl") for n in (3, 4))
    entries = [{"operator": "decontamination", "files": [str(one)]}, *SHORT[1:]]
    told = SelectionSettings(
        pipeline=declare(tmp_path / "p.yaml", entries), count=20, allow_fewer=True, decontaminate=(str(one), str(two))
    )
    selection = select_conversations(data, tmp_path / "out", told)
    assert selection.stages[1].dropped == {"contaminated": 2}
    summary = json.loads((tmp_path / "out/selection.json").read_text())
    assert summary["pipeline"]["operators"][0]["files"] == ["3.jsonl", "4.jsonl"]
    assert str(tmp_path) not in json.dumps(summary)


# --- what cannot run --------------------------------------------------------------------------------------------------

DOMAINS = "operators: [{operator: domains, own: false},"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine.yaml: expected a mapping with a list of `operators`; --explain prints one"),
        ("- operator: random", "mine.yaml: expected a mapping with a list"),
        ("operators: {operator: random}", "mine.yaml: expected a mapping with a list"),
        ("operators: [random]", "mine.yaml: entry 1: expected a mapping with `operator`"),
        ("operators: []", "mine.yaml: no operator chooses; end with one of clusters, k-center, nearest, top, random"),
        ("sed: 1\noperators: []", "mine.yaml: unknown key 'sed'; did you mean seed?"),
        ("seed: yes\noperators: []", "mine.yaml: seed is 'yes'; expected a number"),
        ("seed: -1\noperators: []", "mine.yaml: seed is -1; it is from 0"),
        ("allow_fewer: 1\noperators: []", "mine.yaml: allow_fewer is 1; expected true or false"),
        (
            "operators: [{operator: near-duplicate}]",
            "entry 1: unknown operator 'near-duplicate'; did you mean near-dup",
        ),
        ("operators: [{operator: xyzzy}]", "entry 1: unknown operator 'xyzzy'; known are exact-duplicates, "),
        (
            f"{DOMAINS} {{operator: heuristics, min_word: 3}}]",
            "entry 2 (heuristics): unknown key 'min_word'; did you mean",
        ),
        (
            f"{DOMAINS} {{operator: exact-duplicates, x: 3}}]",
            "(exact-duplicates): unknown key 'x'; it can be told nothing",
        ),
        (
            f"{DOMAINS} {{operator: heuristics, min_words: 3.5}}]",
            "(heuristics): min_words is 3.5; it is a whole number",
        ),
        (f"{DOMAINS} {{operator: heuristics, max_garbled: 3}}]", "(heuristics): max_garbled is 3; it is from 0 to 1"),
        (f"{DOMAINS} {{operator: heuristics, max_garbled: true}}]", "max_garbled is True; expected a number"),
        (f"{DOMAINS} {{operator: heuristics, max_garbled: .nan}}]", "max_garbled is nan; it is from 0 to 1"),
        (
            f"{DOMAINS} {{operator: heuristics, text: whole}}]",
            "(heuristics): what it reads cannot be told; leave 'text'",
        ),
        (f"{DOMAINS} {{operator: domains}}]", "entry 2 (domains): stands as entry 1 already"),
        ("operators: [{operator: domains, text: anser}]", "unknown text 'anser'; did you mean answer?"),
        ("operators: [{operator: domains, text: system}]", "cannot read 'system'; known are whole, turns"),
        ("operators: [{operator: domains, text: whole, own: true}]", "own is true and text is 'whole'; text: turns"),
        ("operators: [{operator: domains, own: 1}]", "(domains): own is 1; expected true or false"),
        ("operators: [{operator: domains, column: 3}]", "(domains): column is 3; expected a name, or null"),
        (
            "operators: [{operator: domains}, {operator: random}]",
            "needs `common`, which common-text makes; put it before",
        ),
        ("operators: [{operator: decontamination, files: a.txt}]", "files is 'a.txt'; expected a list of names"),
        ("operators: [{operator: decontamination, files: [a, a]}]", "files: a is given twice"),
        (
            "operators: [{operator: random}, {operator: domains, own: false}]",
            "entry 1 (random): chooses, so it is the last",
        ),
        (
            "operators: [{operator: domains, own: false}, {operator: embeddings, own: false}, {operator: nearest}]",
            "nearest needs examples to go by: give --target.",
        ),
        ("operators: [{operator: random}]", "entry 1 (random): needs `domain`, which domains makes; put it before"),
        (
            f"{DOMAINS} {{operator: near-duplicates}}, {{operator: random}}]",
            "entry 2 (near-duplicates): needs `sketch`, whi",
        ),
        (
            f"{DOMAINS} {{operator: top}}]",
            "needs `score`, which one of score-column, scorer, ifd, length makes; put",
        ),
        (
            f"{DOMAINS} {{operator: ifd}}, {{operator: top}}]",
            "needs `score`; ifd, which makes it, is off: give --scorer",
        ),
        (
            f"{DOMAINS} {{operator: length, own: false}}, {{operator: score-column, column: x}}, {{operator: top}}]",
            "both give a score",
        ),
        (f"{DOMAINS} {{operator: random, quota: {{maths: 1}}}}]", "unknown domain 'maths'; known are"),
        (f"{DOMAINS} {{operator: random, quota: {{math: x}}}}]", "(random): quota: math is 'x'; expected a number"),
        (f"{DOMAINS} {{operator: random, quota: [math]}}]", "(random): quota is ['math']; expected names with shares"),
        (f"{DOMAINS} {{operator: random, count: 1, count: 2}}]", "not valid YAML: count is given twice"),
        (
            f"{DOMAINS} {{operator: random, count: 2001-13-45}}]",
            "entry 2 (random): count is '2001-13-45'; expected a number.",
        ),
        (
            "operators: !!python/object/apply:os.mkdir [ran]",
            "not valid YAML: could not determine a constructor for the tag",
        ),
        ("operators: [", "not valid YAML"),
        ("{" * 1000, "not valid YAML: it is nested too deep"),
    ],
)
def test_a_file_that_cannot_run_is_refused_in_one_line(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(SelectionError) as error:
        SelectionSettings(pipeline="mine.yaml")
    assert message in str(error.value)
    assert "mine.yaml" in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"], "nothing was run"


def test_files_that_are_none(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("operators: [é]".encode("latin-1"))
    for name, message in (("nowhere.yaml", "No such file"), ("latin.yaml", "not UTF-8 at byte 12"), ("", "directory")):
        with pytest.raises(SelectionError, match=message):
            read_file(tmp_path / name)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "random"}, "--method random and --pipeline {file} both say what to do; give one of them"),
        ({"within": "medoid"}, "--within is for the operator clusters, which {file} does not have"),
        ({"embedder": "x"}, "--embedder is for the operator embeddings, which {file} does not have"),
        ({"score_column": "x"}, "--score-column is for the operator score-column, which {file} does not have"),
        ({"decontaminate": ("x",)}, "--decontaminate is for the operator decontamination, which {file} does not have"),
        ({"thresholds": {"heuristics.min_words": 3}}, "--set heuristics.min_words: {file} has no heuristics"),
        (
            {"pipeline": None, "method": "random", "scorer": "x"},
            "--scorer is for --method teleflm, k-center or ifd-top, not r",
        ),
        (
            {"pipeline": None, "thresholds": {"decontamination.ngram": 3}},
            "decontamination is off; give --decontaminate",
        ),
        ({"pipeline": None, "seed": -1}, "--seed is -1; it is from 0"),
    ],
)
def test_what_the_command_line_contradicts(asked, message, tmp_path):
    file = declare(tmp_path / "mine.yaml", SHORT)
    with pytest.raises(SelectionError) as error:
        SelectionSettings(**{"pipeline": file, **asked})
    assert message.format(file=file) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_line_lies_over_the_file(tmp_path):
    file = declare(tmp_path / "mine.yaml", [*SHORT[:2], "heuristics", SHORT[2]], seed=5, allow_fewer=True)
    declared = SelectionSettings(
        pipeline=file, count=7, domain_column="kind", quota={"a": 1.0}, thresholds={"heuristics.min_words": 2}
    ).declaration
    assert (declared.seed, declared.allow_fewer, declared.unique_ids) == (5, True, False)
    assert dict(declared.choice.values) == {"count": 7, "quota": {"a": 1.0}}
    assert declared.value("domains", "column") == "kind"
    assert declared.value("heuristics", "min_words") == 2
    assert SelectionSettings(pipeline=file, seed=0, unique_ids=True).declaration.seed == 0


def test_the_command_without_data():
    assert run()[1].splitlines()[-1].endswith("DATA... OUT are missing.")


# --- one more ---------------------------------------------------------------------------------------------------------


def _drop_shouting(rows: pa.Table, reading: Reading, most: float) -> pa.Table:
    shares = [sum(map(str.isupper, text)) / max(len(text), 1) for text in reading.texts(rows)]
    return pa.table({"drop": drop_where(np.array(shares) > most, "shouting")})


def test_an_operator_is_a_function_and_an_entry(lines, tmp_path, monkeypatch):
    shouting = Operator(
        "drops",
        "rows in capital letters",
        kernel=_drop_shouting,
        reading=Reading("answer", own=False),
        texts=("answer", "question"),
        options={"most": Number(0.5, 0, 1, "of the characters")},
    )
    for module in (operators, declaration):
        monkeypatch.setattr(module, "OPERATORS", {**OPERATORS, "shouting": shouting})
    data = lines(*({"messages": chat("WHO WAS IT?", answer)} for answer in ("IT WAS NOBODY", "It was Nobody", "ME")))
    for asked, left in (({}, ["It was Nobody"]), ({"most": 1}, 3), ({"text": "question"}, 0)):
        file = declare(tmp_path / "p.yaml", [{"operator": "shouting", **asked}, *SHORT[1:]], allow_fewer=True)
        out, told = tmp_path / str(asked), SelectionSettings(pipeline=file)
        if left == 0:
            with pytest.raises(SelectionError, match=r"no row is left after shouting\. .* 3 shouting"):
                select_conversations(data, out, told)
            continue
        select_conversations(data, out, told, rejects=True)
        found = [row["messages"][1]["content"] for row in selected(out)]
        assert found == left or len(found) == left
        dropped = [json.loads(line)["teleflm_operator"] for line in (out / "rejects.jsonl").read_text().splitlines()]
        assert dropped == ["shouting"] * (3 - len(found))
    assert (
        "most: 0.5  # of the characters"
        in SelectionSettings(pipeline=declare(tmp_path / "p.yaml", ["shouting", *SHORT[1:]])).declaration.to_yaml()
    )


def test_explain_loads_and_reads_nothing():
    status, printed = run("--explain", "--scorer", "/nowhere/model", "--decontaminate", "/nowhere/set.jsonl")
    assert status == 0
    assert "/nowhere/model" in printed
