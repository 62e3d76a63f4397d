# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the Hub would refuse of a card, and what an evaluator's file may hold."""

import json

import pytest
from huggingface_hub.repocard_data import model_index_to_eval_results

from conversion.checkpoint.errors import CheckpointError
from conversion.hub.card import CardFacts, render_card
from conversion.hub.card_check import check_card
from conversion.hub.results import merge_model_index, model_index, read_results

GOOD = "license: mit\nlanguage: [en, zho, code]\nbase_model: [a/b, gpt2]\nbase_model_relation: merge\ndatasets: a/b\n"

PLANTED = {
    "no licence": ("license: mit\n", "", "license is missing"),
    "unknown licence": ("license: mit", "license: Apache 2", "license is 'Apache 2', no identifier"),
    "licence of no text": ("license: mit", "license: 3", "license is 3"),
    "other without a name": ("license: mit", "license: other", "license_name is missing"),
    "language by name": ("zho", "chinese", "language is 'chinese'"),
    "language that YAML reads": ("zho", "no", "language is False"),
    "relation": ("merge", "grown", "base_model_relation is 'grown'"),
    "relation to nothing": ("base_model: [a/b, gpt2]\n", "", "base_model is missing"),
    "base is a folder": ("[a/b, gpt2]", "./a/b", "base_model is './a/b'"),
    "base is a mapping": ("[a/b, gpt2]", "{a: b}", "base_model is {'a': 'b'}"),
    "dataset": ("datasets: a/b", "datasets: a/b/c", "datasets has 'a/b/c'"),
    "tags": ("datasets: a/b", "tags: [1]", "tags has 1"),
    "library": ("datasets: a/b", "library_name: [peft]", "library_name is"),
    "index": ("datasets: a/b", "model-index: [{name: x}]", "model-index is not of the Hub's form"),
    "index of texts": ("datasets: a/b", "model-index: [x]", "model-index is not of the Hub's form"),
    "index with a source by name alone": (
        "datasets: a/b",
        "model-index: [{name: x, results: [{task: {type: t}, dataset: {type: d, name: d}, source: {name: s}, "
        "metrics: [{type: m, value: 1}]}]}]",
        "model-index is not of the Hub's form",
    ),
    "YAML": ("license: mit", "license: [", "is not YAML"),
}


@pytest.mark.parametrize(("old", "new", "message"), PLANTED.values(), ids=PLANTED)
def test_what_is_wrong_is_named(old, new, message):
    assert check_card(f"---\n{GOOD}---\nWords.\n") == []
    assert old in GOOD
    (problem,) = check_card(f"---\n{GOOD.replace(old, new)}---\nWords.\n")
    assert message in problem
    assert "\n" not in problem


def test_a_card_without_metadata():
    assert any("has no metadata" in problem for problem in check_card("# Words"))


@pytest.mark.parametrize(
    "path", ["/home/me/model", "~/model", "C:\\Users\\me", "\\\\host\\share", "/mnt/x", "file:///a"]
)
def test_places_of_a_machine_are_found(path):
    for card in (f"---\n{GOOD}---\nSee `{path}`.", f"---\n{GOOD}x: '{path}'\n---\n"):
        assert any("names a folder of a machine" in problem for problem in check_card(card))


@pytest.mark.parametrize("text", ["https://a.b/home/me", "and/or ~5 GB", "a/data/b", "x:y", "1/tmp", "`owner/mnt`"])
def test_what_is_no_place_is_left_alone(text):
    assert check_card(f"---\n{GOOD}---\n{text}") == []


# Results.

LM_EVAL = {
    "results": {
        "arc_challenge": {
            "alias": "arc_challenge",
            "acc,none": 0.25,
            "acc_stderr,none": 0.0126,
            "acc_norm,none": 0.3,
            "acc_norm_stderr,none": "N/A",
            "sample_len": 1172,
        },
        "gsm8k": {"alias": " - gsm8k", "exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.2},
        "mmlu": {"acc,none": 0.5, "alias": "mmlu", " ": " "},
    },
    "configs": {"arc_challenge": {"dataset_path": "allenai/ai2_arc", "dataset_name": "ARC", "test_split": "test"}},
    "n-shot": {"arc_challenge": 25, "gsm8k": 5},
    "versions": {"arc_challenge": 1.0},
    "lm_eval_version": "0.4.9",
    "model_name": "/home/me/model",
}


def write(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_results_of_lm_eval(tmp_path):
    results = read_results(write(tmp_path, LM_EVAL))
    assert [(r.task, r.metric, r.filter, r.value, r.stderr, r.shots) for r in results] == [
        ("arc_challenge", "acc", "", 0.25, 0.0126, 25),
        ("arc_challenge", "acc_norm", "", 0.3, None, 25),
        ("gsm8k", "exact_match", "strict-match", 0.1, None, 5),
        ("gsm8k", "exact_match", "flexible-extract", 0.2, None, 5),
        ("mmlu", "acc", "", 0.5, None, None),
    ]
    card = render_card(CardFacts("float32", 1, 4, repo_id="o/n", results=results, metadata={"license": "mit"}))
    assert check_card(card) == [], "the file's folder of a machine is not in it"
    assert "| gsm8k | 5 | exact_match, strict-match | 0.1 |  |" in card
    assert "lm-evaluation-harness 0.4.9" in card
    name, found = model_index_to_eval_results(model_index("n", results))
    assert (name, len(found)) == ("n", 5)
    arc = found[0]
    assert (arc.dataset_type, arc.dataset_config, arc.dataset_split) == ("allenai/ai2_arc", "ARC", "test")
    assert (arc.dataset_args, arc.task_type) == ({"num_few_shot": 25}, "text-generation")


def test_results_of_before_filters(tmp_path):
    (result,) = read_results(write(tmp_path, {"results": {"arc": {"acc": 0.5, "acc_stderr": 0.1}}}))
    assert (result.metric, result.value, result.stderr, result.shots) == ("acc", 0.5, 0.1, None)


HOSTILE = {
    "no JSON": ("{", "is not valid JSON"),
    "list": ("[]", "is a JSON list"),
    "nothing": ({}, "results is missing"),
    "text": ({"results": "x"}, "results is a JSON str"),
    "empty": ({"results": {}}, "holds no number"),
    "task": ({"results": {"a": []}}, "results of a is a JSON list"),
    "value": ({"results": {"a": {"acc,none": [1]}}}, "acc,none of a is a JSON list"),
    "words": ({"results": {"a": {"acc,none": "good"}}}, "acc,none of a is a JSON str"),
    "true": ({"results": {"a": {"acc,none": True}}}, "acc,none of a is a JSON bool"),
    "NaN": ('{"results": {"a": {"acc,none": NaN}}}', "NaN is no number"),
    "infinite": ('{"results": {"a": {"acc,none": 1e999}}}', "expected a finite number"),
    "huge": ('{"results": {"a": {"acc,none": 1' + "0" * 390 + "}}}", "is not valid JSON: a number has 391 digits"),
    "deep": ('{"results": ' + "[" * 5000, "nests deeper"),
    "many": ({"results": {f"t{n}": {"acc,none": 1} for n in range(2001)}}, "holds 2001 numbers"),
    "line": ({"results": {"a\n\x1b[2J": {"acc,none": None}}}, "expected a finite number"),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_results_is_refused_in_a_line(content, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_results(write(tmp_path, content))
    assert str(caught.value).isprintable()
    assert "results.json" in str(caught.value)


def test_names_in_results_stay_in_their_cells(tmp_path):
    content = {
        "results": {"a|b\n<!-- teleflm:end results -->": {"acc,x|y": 1}},
        "n-shot": [],
        "configs": {"a|b\n<!-- teleflm:end results -->": 3},
        "lm_eval_version": "1\n# x",
    }
    card = render_card(CardFacts("float32", 1, 4, results=read_results(write(tmp_path, content))))
    assert "| a\\|b &lt;!-- teleflm:end results --&gt; |  | acc, x\\|y | 1 |  |" in card
    assert "\n# x" not in card


def test_an_index_that_is_none_stays_the_owners():
    fresh = [{"name": "n", "results": [{"task": {"type": "t"}, "dataset": {}, "metrics": [{"type": "m"}]}]}]
    assert merge_model_index(fresh, "words") == "words"
    assert merge_model_index(fresh, None) == fresh
    assert merge_model_index(fresh, fresh) == fresh
    assert merge_model_index(fresh, [{"results": [{"metrics": [1]}]}]) == [{"results": [{"metrics": [1]}]}]
