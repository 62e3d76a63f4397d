# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The data of a run: tokenized once, mixed as the recipe says, and never what it is evaluated on."""

import json
import os
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from sft import SFTError
from sft.data import labels
from sft.data.cache import CacheError
from sft.data.dataset import prepare_dataset
from sft.data.formats import DataError
from sft.data.labels import Labelling
from sft.data.prepare import prepare
from sft.training.recipe import RecipeError
from sft.training.train import build_trainer, load_tokenizer, train
from tests.fixtures.tiny import tiny_tokenizer
from tests.sft.test_data import chat, write
from tests.sft.test_train import losses

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def build(make_recipe, cache):
    """The trainer of a recipe, and what became of its rows."""

    def make(**keys):
        keys = {"max_length": 64, "dataset_cache_dir": str(cache), **keys}
        if "data" in keys:
            keys["data_files"] = None
        return build_trainer(make_recipe(**keys))

    return make


@pytest.fixture(scope="module")
def two_files(tmp_path_factory):
    """30 rows about fruits and 20 about stones; no question is asked twice."""
    folder = tmp_path_factory.mktemp("two")
    for name, count in (("fruits", 30), ("stones", 20)):
        rows = [
            chat(("user", f"What is {name} {index}?"), ("assistant", f"One of {name}, " + "x" * index))
            for index in range(count)
        ]
        write(folder / f"{name}.jsonl", rows)
    return folder / "fruits.jsonl", folder / "stones.jsonl"


def rows_of(dataset):
    return Counter(tuple(row) for row in dataset["input_ids"])


def tokens_of(path, **settings):
    tokenizer = tiny_tokenizer(Path(path).parent / "tokenizer")
    return rows_of(prepare_dataset(path, tokenizer, **{"max_length": 64, **settings})[0])


@pytest.fixture
def counted(monkeypatch):
    """How many conversations are tokenized."""
    calls = []
    tokenize = labels.tokenize
    monkeypatch.setattr(labels, "tokenize", lambda *args: calls.append(1) or tokenize(*args))
    return calls


# --- tokenized once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_a_second_run_tokenizes_nothing_and_has_the_same_rows(packing, build, data_file, cache, counted):
    first = build(packing=packing)[0].train_dataset
    tokenized = len(counted)
    entries = sorted(path.name for path in cache.iterdir())
    again, report, _ = build(packing=packing)
    assert (tokenized, len(counted)) == (48, 48)
    assert sorted(path.name for path in cache.iterdir()) == entries
    assert first[:] == again.train_dataset[:]
    fresh, fresh_report = prepare_dataset(data_file, tiny_tokenizer(cache / "t"), max_length=64)
    assert report == fresh_report
    assert packing or fresh[:] == first[:]


def test_other_content_of_one_size_and_time_is_other_rows(build, tmp_path):
    path = write(tmp_path / "data.jsonl", [chat(("user", "Why?"), ("assistant", "Yes."))])
    before = path.stat()
    first = build(data_files=str(path))[0].train_dataset[:]
    path.write_text(path.read_text().replace("Yes.", "Nay."))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert build(data_files=str(path))[0].train_dataset[:] != first


def test_other_labelling_or_template_is_other_rows(build, model_dir, tmp_path, counted):
    first = build()[0].train_dataset[:]
    assert build(last_turn_only=True)[0].train_dataset[:] != first
    assert len(build(max_length=32, allow_rejects=True)[0].train_dataset[0]["input_ids"]) <= 32
    template = tmp_path / "template.jinja"
    text = tiny_tokenizer(tmp_path / "t").chat_template
    template.write_text("{{ 'x' }}" + text)
    assert build(chat_template_path=str(template))[0].train_dataset[:] != first
    assert len(counted) == 4 * 48


def test_a_file_under_another_name_is_not_tokenized_again_and_named_as_it_is_now(build, tmp_path, counted):
    path = write(tmp_path / "old.jsonl", [chat(("user", "Why?"), ("assistant", "Yes.")), {}])
    build(data_files=str(path), allow_rejects=True)
    path.rename(tmp_path / "new.jsonl")
    report = build(data_files=str(tmp_path / "new.jsonl"), allow_rejects=True)[1]
    assert len(counted) == 1
    assert [reject.source for reject in report.rejects] == [f"{tmp_path}/new.jsonl:2"]
    with pytest.raises(DataError, match=r"new\.jsonl:2: it needs the columns"):
        build(data_files=str(tmp_path / "new.jsonl"))


@pytest.mark.parametrize("place", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("entry", ["tokens", "arranged"])
def test_an_entry_that_was_changed_is_made_again(entry, place, build, cache, caplog):
    first = build(packing=True)[0].train_dataset[:]
    (path,) = cache.glob(f"{entry}-*/data-*.arrow")
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)
    assert build(packing=True)[0].train_dataset[:] == first
    assert f"{path}: is not what was prepared there" in caplog.text
    assert "It is made again." in caplog.text
    caplog.clear()
    build(packing=True)
    assert "again" not in caplog.text


def test_a_cache_that_cannot_be_written_is_one_line(build, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"^dataset_cache_dir .*file/c cannot be written .*HF_DATASETS_CACHE"):
        build(dataset_cache_dir=str(tmp_path / "file" / "c"))


def test_a_full_disk_says_how_much_is_needed(build, monkeypatch, cache):
    import shutil

    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda place: real(place)._replace(free=1000))
    with pytest.raises(DataError, match=r"the tokens need [\d,]+ bytes, and 1,000 are free; give a larger disk"):
        build()
    assert not [path for path in cache.iterdir() if path.suffix != ".failed"]


def test_packs_do_not_depend_on_how_many_processes_make_them(build):
    packs = [build(packing=True, dataset_num_proc=number)[0].train_dataset[:] for number in (None, 2)]
    assert packs[0] == packs[1]


# --- mixtures ---------------------------------------------------------------------------------------------------------


def test_a_mixture_has_each_row_as_often_as_its_weight_says(build, two_files, capsys):
    fruits, stones = two_files
    mixture = [{"path": str(fruits), "name": "fruits", "weight": 2.5}, {"path": str(stones), "max_rows": 7}]
    trainer, report, _ = build(data=mixture)
    found, all_fruits, all_stones = rows_of(trainer.train_dataset), tokens_of(fruits), tokens_of(stones)
    assert set(found) <= set(all_fruits) | set(all_stones)
    assert sorted(found[row] for row in all_fruits) == [2] * 15 + [3] * 15
    assert sorted(found[row] for row in all_stones) == [0] * 13 + [1] * 7
    assert [(source.name, source.rows, source.taken) for source in report.sources] == [
        ("fruits", 30, 75),
        (str(stones), 20, 7),
    ]
    assert report.tokens == sum(len(row) * count for row, count in found.items())
    trained = sum(sum(label != -100 for label in row["labels"]) for row in trainer.train_dataset)
    assert report.trained_tokens == trained == sum(source.trained_tokens for source in report.sources)
    said = capsys.readouterr().err
    assert "data: fruits: 30 rows read, 0 rejected, 30 kept, 75 taken (weight 2.5): " in said
    assert f"data: {stones}: 20 rows read, 0 rejected, 20 kept, 7 taken: " in said


@pytest.mark.parametrize("keys", [{}, {"packing": True}, {"packing": True, "packing_strategy": "wrapped"}], ids=str)
def test_each_token_has_its_source(keys, build, two_files):
    fruits, stones = two_files
    dataset = build(data=[{"path": str(fruits)}, {"path": str(stones), "weight": 2}], **keys)[0].train_dataset
    whole = {"max_length": None} if "packing_strategy" in keys else {}
    owner = {row: index for index, path in enumerate(two_files) for row in tokens_of(path, **whole)}
    stream = [
        (token, source) for row in dataset for token, source in zip(row["input_ids"], row["sources"], strict=True)
    ]
    assert all(len(row["sources"]) == len(row["labels"]) for row in dataset)
    ((*first,),) = {row[:2] for row in owner}  # a space and <_user>, which is nowhere else in a row
    starts = [index for index in range(len(stream)) if [token for token, _ in stream[index : index + 2]] == first]
    found = Counter()
    for start, end in zip(starts, [*starts[1:], len(stream)], strict=True):
        row = tuple(token for token, _ in stream[start:end])
        assert {source for _, source in stream[start:end]} == {owner[row]}
        found[owner[row]] += 1
    assert found == {0: 30, 1: 40}


def test_one_source_has_no_column_of_sources(build, two_files):
    assert "sources" not in build(data=[{"path": [*map(str, two_files)]}])[0].train_dataset.column_names


def test_a_weighted_source_beside_one_without(build, two_files, tmp_path):
    rows = [chat(("user", "Why?"), ("assistant", "So."), ("user", "And?"), ("assistant", "No."), weights={1: 0.5})]
    weighted = write(tmp_path / "weighted.jsonl", rows)
    dataset = build(data=[{"path": str(weighted)}, {"path": str(two_files[0])}])[0].train_dataset
    for row in dataset:
        expected = {0.5, 1.0} if row["sources"][0] == 0 else {1.0}
        assert {
            weight for weight, label in zip(row["weights"], row["labels"], strict=True) if label != -100
        } == expected
        assert all(
            (weight == 0) == (label == -100) for weight, label in zip(row["weights"], row["labels"], strict=True)
        )


def test_the_seed_alone_decides_which_rows(build, two_files, tmp_path):
    lines = two_files[0].read_text().splitlines()
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(f"{line}\n" for line in reversed(lines)))

    def chosen(path, **keys):
        return rows_of(build(data=[{"path": str(path), "weight": 0.5}], **keys)[0].train_dataset)

    assert chosen(two_files[0]) == chosen(turned) != chosen(two_files[0], seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_a_mixture_trains_and_another_one_does_not_resume_it(packing, make_recipe, two_files, cache, tmp_path):
    def recipe(weight, steps, folder, **keys):
        data = [{"path": str(two_files[0]), "weight": weight}, {"path": str(two_files[1])}]
        keys = {"data": data, "data_files": None, "max_length": 64, "max_steps": steps, "packing": packing, **keys}
        keys |= {
            "dataset_cache_dir": str(cache),
            "save_strategy": "steps",
            "save_steps": 2,
            "lr_scheduler_type": "constant",
        }
        return make_recipe(**keys, per_device_train_batch_size=2, output_dir=str(tmp_path / folder))

    whole = losses(train(recipe(2, 4, "whole"), progress=False))
    train(recipe(2, 4, "run", max_steps=2), progress=False)
    with pytest.raises(SFTError, match=r"mixture was \[\[2.0, null, null\], .*, is \[\[3.0, null, null\]"):
        train(recipe(3, 4, "run", resume_from_checkpoint=True), progress=False)
    resumed = train(recipe(2, 4, "run", resume_from_checkpoint=True), progress=False)
    assert losses(resumed)[-2:] == whole[-2:]
    lineage = json.loads((tmp_path / "run" / "teleflm_manifest.json").read_text())["lineage"]
    assert [(source["weight"], source["taken"]) for source in lineage["data"]["sources"]] == [(2.0, 60), (1.0, 20)]
    assert lineage["data"]["rows"] == 80


# --- evaluation -------------------------------------------------------------------------------------------------------


def normalized(text):
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def test_no_question_is_on_both_sides(build, tmp_path):
    """Each question three times: with another answer, and in another case. The oracle reads the tokens back."""
    tokenizer = tiny_tokenizer(tmp_path / "t")
    rows = [
        chat(("user", ask), ("assistant", answer))
        for index in range(40)
        for ask, answer in ((f"why {index}?", "So."), (f"why {index}?", "No."), (f"WHY  {index}?", "So."))
    ]
    path = write(tmp_path / "data.jsonl", rows)
    trainer, report, eval_report = build(data_files=str(path), test_split_size=0.1, **EVALUATED)
    sides = [trainer.train_dataset, trainer.eval_dataset]
    asked = [{normalized(tokenizer.decode(row).partition("<_bot>")[0]) for row in side["input_ids"]} for side in sides]
    assert not asked[0] & asked[1]
    assert len(asked[1]) == 4
    assert (report.taken, eval_report.taken) == (108, 12)
    assert (report.sources[0].held_out, report.sources[0].kept) == (12, 120)
    assert rows_of(sides[0]) + rows_of(sides[1]) == tokens_of(path)


def test_the_split_depends_on_nothing_but_the_rows(build, two_files, tmp_path):
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(f"{line}\n" for line in reversed(two_files[0].read_text().splitlines())))
    prepare(two_files[0], tmp_path / "prepared", tiny_tokenizer(tmp_path / "t"), Labelling(64))
    keys = {"test_split_size": 0.2, **EVALUATED}
    held = rows_of(build(data_files=str(two_files[0]), **keys)[0].eval_dataset)
    assert sum(held.values()) == 6
    assert rows_of(build(data_files=str(turned), seed=7, **keys)[0].eval_dataset) == held
    assert rows_of(build(data_files=str(tmp_path / "prepared"), **keys)[0].eval_dataset) == held
    weighted = build(data=[{"path": str(two_files[0]), "weight": 3}], **keys)[0]
    assert rows_of(weighted.eval_dataset) == held, "evaluated once each, however often they would be trained on"
    assert set(rows_of(weighted.train_dataset).values()) == {3}


def test_each_source_is_split(build, two_files):
    mixture = [{"path": str(path)} for path in two_files]
    _, report, eval_report = build(data=mixture, test_split_size=10, **EVALUATED)
    assert [source.held_out for source in report.sources] == [6, 4]
    assert [source.taken for source in eval_report.sources] == [6, 4]
    assert [source.taken for source in report.sources] == [24, 16]


def test_rows_held_out_of_packed_training_can_be_evaluated_unpacked(build, two_files):
    keys = {"packing": True, "packing_strategy": "wrapped", "eval_packing": False, "test_split_size": 0.2, **EVALUATED}
    trainer, report, eval_report = build(data_files=str(two_files[0]), **keys)
    assert (report.taken, eval_report.taken, len(trainer.eval_dataset)) == (24, 6, 6)


def test_evaluation_rows_in_the_training_data_are_told_of_and_dropped_if_asked(build, two_files, tmp_path, caplog):
    lines = two_files[0].read_text().splitlines()
    answered = json.loads(lines[1])
    answered["messages"][0]["content"] = "WHAT  is fruits 1?"
    answered["messages"][1]["content"] = "Something else."
    path = write(
        tmp_path / "eval.jsonl", [json.loads(lines[0]), answered, chat(("user", "New?"), ("assistant", "Yes."))]
    )
    keys = {"data_files": str(two_files[0]), "eval_data_files": str(path), **EVALUATED}
    kept = build(**keys)[0].train_dataset
    message = "2 of 3 evaluation rows ask what a training row asks, and 1 are a training row; 2 training rows would be"
    assert message in caplog.text
    caplog.clear()
    trainer, report, eval_report = build(**keys, drop_eval_overlap=True)
    assert "evaluation rows" not in caplog.text
    assert (report.sources[0].overlapping, report.taken, eval_report.taken) == (2, 28, 3)
    left = rows_of(kept) - rows_of(trainer.train_dataset)
    assert left == Counter(tuple(row) for row in kept["input_ids"][:2])


@pytest.mark.parametrize("others", [0, 1])
def test_a_source_that_overlap_empties_is_named(others, build, two_files):
    """Of one source as of several: a larger weight of none of its rows is no way out."""
    data = [{"path": str(path), "name": path.stem} for path in two_files[: 1 + others][::-1]]
    keys = {"data": data, "eval_data_files": str(two_files[0]), "drop_eval_overlap": True, **EVALUATED}
    with pytest.raises(
        DataError, match=r"^fruits: drop_eval_overlap leaves no training row of it, all overlap with eval"
    ):
        build(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data": [{"path": "a.jsonl"}], "data_files": "b.jsonl"}, "data and data_files are both set; keep one"),
        ({"data": [{"path": "a.jsonl", "weight": -1}]}, r"data\[0\].weight is -1; expected a number above 0"),
        ({"test_split_size": 0.1}, "test_split_size has no effect here; it needs eval_strategy"),
        (
            {"test_split_size": 1.5, **EVALUATED},
            "test_split_size is 1.5; expected a share between 0 and 1, or a number",
        ),
        ({"test_split_size": 0, **EVALUATED}, "test_split_size is 0; expected"),
        ({"test_split_size": 0.1, "eval_data_files": "c", **EVALUATED}, "test_split_size and eval_data_files are both"),
        ({"drop_eval_overlap": True}, "drop_eval_overlap has no effect here; it needs eval_data_files"),
        ({"streaming": True}, "streaming has no effect here; rows are tokenized in bounded memory"),
        ({"trainer": "dpo", "test_split_size": 0.1}, "test_split_size has no effect here; it is for `trainer: sft`"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys, message, make_recipe):
    if "data" in keys:
        keys = {"data_files": None, **keys}
    with pytest.raises(RecipeError, match=message):
        make_recipe(**keys)


def test_a_mixture_is_given_on_the_command_line(model_dir, tmp_path):
    from sft.training.recipe import parse_overrides, read_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(f"model_name_or_path: {model_dir}\ndata_files: a.jsonl\noutput_dir: out\n")
    words = ["--data", "[{path: a.jsonl, weight: 2}, {path: b.jsonl}]", "--data_files", "null"]
    sources = read_recipe(path, parse_overrides(words)).data.sources
    assert [(source.places, source.weight) for source in sources] == [(("a.jsonl",), 2.0), (("b.jsonl",), 1.0)]


def test_the_tokenizer_that_counts_is_the_one_before_padding_is_set(make_recipe):
    """The data's digest is that of `sft prepare`, which sets no pad_token."""
    tokenizer, _ = load_tokenizer(make_recipe())
    assert tokenizer.pad_token is None
