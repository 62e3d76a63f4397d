# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Layouts of judged answers: what TRL makes of those it takes, and a reason for each that is refused."""

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from trl.data_utils import extract_prompt, maybe_extract_prompt
from typer.testing import CliRunner

import sft.training.train
from sft.data.examples import MORE_REASONS, judge_rows, prepare_examples
from sft.data.formats import DataError, Row
from sft.data.kinds import detect_trainer
from sft.data.preferences import LabelledJudge, PairJudge, read_labelled, read_pair
from sft.training.guards import GuardError
from sft.training.train import build_trainer, load_tokenizer, train
from teleflm.commands.sft import app
from tests.sft.test_guards import untrained_model
from tests.sft.test_train import losses


def say(*turns):
    return [{"role": role, "content": content} for role, content in turns]


SYSTEM, ASK, MORE = ("system", "Be brief."), ("user", "Why is the sky blue?"), ("user", "And at night?")
GOOD, BAD = ("assistant", "Light is scattered."), ("assistant", "It is green.")
# The multi-turn answers share their first message, which is not what is preferred.
LATER = [ASK, GOOD, MORE]
IMPLICIT = {
    "one turn": {"chosen": say(ASK, GOOD), "rejected": say(ASK, BAD)},
    "system": {"chosen": say(SYSTEM, ASK, GOOD), "rejected": say(SYSTEM, ASK, BAD)},
    "several turns": {"chosen": say(*LATER, GOOD), "rejected": say(*LATER, BAD)},
    "answers of several turns": {
        "chosen": say(ASK, GOOD, MORE, GOOD),
        "rejected": say(ASK, BAD, MORE, BAD),
    },
}
EXPLICIT = {
    "messages": {"prompt": say(SYSTEM, ASK), "chosen": say(GOOD), "rejected": say(BAD)},
    "several turns": {"prompt": say(*LATER), "chosen": say(GOOD), "rejected": say(BAD)},
    "answers of several turns": {
        "prompt": say(ASK),
        "chosen": say(GOOD, MORE, GOOD),
        "rejected": say(BAD, MORE, BAD),
    },
}


def columns(row):
    pair, problems = read_pair(Row("pairs.jsonl", 1, row))
    assert problems == []
    return pair


@pytest.mark.parametrize("row", IMPLICIT.values(), ids=IMPLICIT)
def test_an_implicit_prompt_is_what_trl_extracts(row):
    assert columns(row) == extract_prompt(row)


@pytest.mark.parametrize("row", IMPLICIT.values(), ids=IMPLICIT)
def test_ultrafeedback_has_the_prompt_twice_and_scores(row):
    asked = next(message["content"] for message in row["chosen"] if message["role"] == "user")
    both = {"prompt": f"{asked}\n", **row, "score_chosen": 8.5, "score_rejected": 3.0, "prompt_id": "a"}
    assert columns(both) == {name: maybe_extract_prompt(both)[name] for name in ("prompt", "chosen", "rejected")}


@pytest.mark.parametrize("row", EXPLICIT.values(), ids=EXPLICIT)
def test_an_explicit_prompt_stays_also_where_the_answers_repeat_it(row):
    assert columns(row) == maybe_extract_prompt(row)
    repeated = {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
    assert columns({"prompt": row["prompt"], **repeated}) == row


def test_texts_are_messages():
    expected = {"prompt": say(ASK), "chosen": say(GOOD), "rejected": say(BAD)}
    assert columns({"prompt": ASK[1], "chosen": GOOD[1], "rejected": BAD[1]}) == expected
    assert columns({"prompt": say(ASK), "chosen": GOOD[1], "rejected": say(BAD)}) == expected
    transcripts = {
        name: f"\n\nHuman: {ASK[1]}\n\nAssistant: {GOOD[1]}\n\nHuman: {MORE[1]}\n\nAssistant: {answer}"
        for name, answer in (("chosen", "It is dark."), ("rejected", "Yes.\n\nOr no."))
    }
    assert columns(transcripts) == {
        "prompt": say(*LATER),
        "chosen": say(("assistant", "It is dark.")),
        "rejected": say(("assistant", "Yes.\n\nOr no.")),
    }


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "no_prompt"),
        ({"chosen": "Human: a", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "no_prompt"),
        ({"chosen": say(ASK, GOOD), "rejected": say(MORE, GOOD)}, "different_prompts"),
        ({"chosen": say(ASK, GOOD, MORE, GOOD), "rejected": say(ASK, GOOD, ASK, GOOD)}, "different_prompts"),
        ({"prompt": "Who?", "chosen": say(ASK, GOOD), "rejected": say(ASK, BAD)}, "different_prompts"),
        ({"prompt": say(MORE), "chosen": say(ASK, GOOD), "rejected": say(ASK, BAD)}, "different_prompts"),
        ({"chosen": say(ASK, GOOD), "rejected": say(ASK)}, "no_answer"),
        ({"chosen": say(ASK, GOOD), "rejected": say(ASK, GOOD)}, "same_answers"),
        ({"chosen": say(GOOD), "rejected": say(BAD)}, "different_prompts"),
        ({"prompt": ASK[1], "chosen": say(ASK, GOOD), "rejected": say(BAD)}, "repeated_role"),
        ({"prompt": say(ASK, GOOD), "chosen": say(GOOD), "rejected": say(BAD)}, "repeated_role"),
        ({"prompt": say(ASK), "chosen": say(GOOD), "rejected": [{**say(BAD)[0], "weight": 0.5}]}, "bad_weight"),
        ({"prompt": say(*LATER), "chosen": [{**say(GOOD)[0], "train": False}], "rejected": say(BAD)}, "bad_weight"),
        ({"chosen": [], "rejected": say(ASK, BAD)}, "no_messages"),
        ({"chosen": ["a"], "rejected": say(ASK, BAD)}, "bad_message"),
        ({"chosen": {"a": 1}, "rejected": say(ASK, BAD)}, "no_messages"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(row, code):
    _, problems = read_pair(Row("pairs.jsonl", 1, row))
    assert [problem.code for problem in problems][:1] == [code]
    assert "\n" not in problems[0].detail


def test_what_is_never_learned_may_say_so():
    told = {"chosen": say(ASK, GOOD), "rejected": [{**say(ASK)[0], "train": False}, *say(BAD)]}
    assert columns(told) == columns(IMPLICIT["one turn"])


words = st.text("abc .?", min_size=1, max_size=8).map(str.strip).filter(bool)


@given(st.lists(st.tuples(words, words), max_size=2), words, words, words, st.booleans())
def test_all_layouts_of_a_pair_are_the_same_pair(before, question, chosen, rejected, with_system):
    assume(chosen != rejected)
    history = [turn for ask, answer in before for turn in (("user", ask), ("assistant", answer))]
    prompt = say(*([SYSTEM] if with_system else []), *history, ("user", question))
    expected = {"prompt": prompt, "chosen": say(("assistant", chosen)), "rejected": say(("assistant", rejected))}
    whole = {name: prompt + expected[name] for name in ("chosen", "rejected")}
    layouts = [
        expected,
        {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        whole,
        {"prompt": prompt, **whole},
        *({"prompt": turn["content"], **whole} for turn in prompt if turn["role"] == "user"),
    ]
    if not with_system:
        names = {"user": "Human", "assistant": "Assistant"}
        said = {
            name: "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)
            for name, turns in whole.items()
        }
        layouts.append(said)
    for layout in layouts:
        assert columns(layout) == expected


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(make_recipe):
    def build(file, trainer="dpo", **keys):
        keys = {"per_device_train_batch_size": 2, "max_length": 256, "learning_rate": 1e-2, **keys}
        return make_recipe(trainer=trainer, data_files=str(file), **keys)

    return build


@pytest.mark.parametrize("max_length", [256, 30])
def test_tokens_are_those_that_trl_makes(max_length, recipe, tmp_path):
    """Ours are what is previewed, TRL's are what is trained on: of the rows as they are in the file."""
    file = write(tmp_path / "pairs.jsonl", [*IMPLICIT.values()])
    made = recipe(file, max_length=max_length, allow_rejects=True)
    tokenizer, _ = load_tokenizer(made)
    ours = [row for _, row in judge_rows(file, PairJudge(), tokenizer, max_length) if not hasattr(row, "problems")]

    trainer, report, _ = build_trainer(made)
    assert len(trainer.train_dataset) == len(ours) == report.kept > 0
    raw = recipe(file, output_dir=str(tmp_path / "raw"))
    oracle = build_trainer(raw)[0]
    by_trl = oracle._prepare_dataset(
        # TRL alone, from the file's own rows.
        type(oracle.train_dataset).from_list([*IMPLICIT.values()]),
        tokenizer,
        made.training,
        "train",
    )
    assert len(by_trl) == len(ours)
    for row, expected in zip(ours, by_trl, strict=True):
        for name in ("chosen", "rejected"):
            whole = (expected["prompt_ids"] + expected[f"{name}_ids"])[:max_length]
            part = row.parts[name]
            assert part.input_ids.tolist() == whole
            assert part.weights.tolist() == [float(index >= len(expected["prompt_ids"])) for index in range(len(whole))]


@pytest.mark.parametrize("layout", ["implicit", "ultrafeedback"])
def test_dpo_trains_on_what_had_no_prompt_of_its_own(layout, recipe, tmp_path):
    rows = [*IMPLICIT.values()]
    if layout == "ultrafeedback":
        rows = [{"prompt": ASK[1], **row, "score_chosen": 1.0} for row in rows]
    result = train(recipe(write(tmp_path / "pairs.jsonl", rows), max_steps=4), progress=False)
    assert losses(result)[-1] < losses(result)[0]


# --- labelled answers -------------------------------------------------------------------------------------------------

LABELLED = [
    {"prompt": say(ASK), "completion": say(GOOD), "label": True},
    {"prompt": ASK[1], "completion": BAD[1], "label": False},
    {"prompt": say(*LATER), "completion": say(BAD), "label": False},
    {"prompt": say(SYSTEM, ASK), "completion": say(GOOD), "label": True},
]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": "a", "completion": "b"}, "missing_columns"),
        ({"prompt": "a", "completion": "b", "label": 1}, "bad_label"),
        ({"prompt": "a", "completion": " ", "label": True}, "empty_turn"),
        ({"prompt": say(*LATER), "completion": [{**say(GOOD)[0], "train": False}], "label": True}, "bad_weight"),
        ({"prompt": say(ASK, GOOD), "completion": say(GOOD), "label": True}, "repeated_role"),
        (["a"], "not_an_object"),
    ],
)
def test_labelled_answers_are_judged_too(row, code):
    _, problems = read_labelled(Row("answers.jsonl", 1, row))
    assert [problem.code for problem in problems] == [code]


@pytest.mark.parametrize("rows", [LABELLED, [*IMPLICIT.values()]], ids=["labelled", "pairs"])
def test_kto_learns_what_is_liked(rows, recipe, tmp_path):
    made = recipe(write(tmp_path / "answers.jsonl", rows), trainer="kto", max_steps=8, per_device_train_batch_size=4)
    trainer, report, _ = build_trainer(made)
    tokens = sum(len(row["completion_ids"]) for row in trainer.train_dataset)
    assert tokens == report.trained_tokens
    result = train(made, progress=False)
    assert losses(result)[-1] < losses(result)[0]


@pytest.mark.parametrize("use_peft", [False, True])
def test_the_wrong_loss_is_stopped_for_kto_too(use_peft, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sft.training.train, "load_model", lambda arguments, **kwargs: untrained_model("wrong"))
    with pytest.raises(GuardError, match="TRL's fused loss is not the loss of HiddenFactorModel"):
        train(recipe(write(tmp_path / "answers.jsonl", LABELLED), trainer="kto", max_steps=1, use_peft=use_peft))


def test_a_label_that_is_null_is_absent():
    pair = {**IMPLICIT["one turn"], "label": None}
    assert LabelledJudge().read(Row("pairs.jsonl", 1, pair), ()) == (columns(IMPLICIT["one turn"]), [])


def test_kinds_are_not_mixed(recipe, tmp_path):
    file = write(tmp_path / "answers.jsonl", [LABELLED[0], IMPLICIT["system"]])
    tokenizer, _ = load_tokenizer(recipe(file))
    with pytest.raises(DataError, match=r"answers.jsonl:2: it is a pair, and the rows before are each a labelled"):
        prepare_examples(file, LabelledJudge(), tokenizer, max_length=None)


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "trainer"),
    [
        (IMPLICIT["system"], "dpo"),
        (LABELLED[0], "kto"),
        ({"prompt": "a", "answer": "b"}, "grpo"),
        ({"prompt": "a", "completion": "b"}, "sft"),
        ({"messages": say(ASK, GOOD)}, "sft"),
        ({"prompt": "a", "messages": say(ASK, GOOD)}, "sft"),
        ("a", "sft"),
    ],
)
def test_the_first_row_tells_what_a_file_is_for(row, trainer, tmp_path):
    file = write(tmp_path / "rows.jsonl", [row])
    file.write_text("{\n" + file.read_text())
    assert detect_trainer(file) == trainer


def test_answers_that_are_the_same_where_they_are_read_are_refused(recipe, tmp_path):
    """Cut at max_length, a pair would teach nothing, and as labelled answers it would teach both."""
    long = "Light is scattered. " * 30
    row = {"prompt": ASK[1], "chosen": long + "Yes.", "rejected": long + "No."}
    file = write(tmp_path / "pairs.jsonl", [row, EXPLICIT["messages"]])
    tokenizer, _ = load_tokenizer(recipe(file))
    for judge in (PairJudge, LabelledJudge):
        assert all(hasattr(one, "parts") for _, one in judge_rows(file, judge(), tokenizer, None))
        cut, kept = (one for _, one in judge_rows(file, judge(), tokenizer, 64))
        assert [problem.code for problem in cut.problems] == ["same_answers"]
        assert "are the same up to max_length 64" in str(cut)
        assert hasattr(kept, "parts")
    with pytest.raises(DataError, match="same up to max_length 64; there is nothing to prefer"):
        build_trainer(recipe(file, max_length=64))


@pytest.mark.parametrize("max_length", [256, 36])
def test_validate_and_preview_say_what_train_does(max_length, recipe, model_dir, tmp_path):
    bad = [{"chosen": "a", "rejected": "b"}, {"chosen": say(ASK, GOOD), "rejected": say(ASK)}]
    file = write(tmp_path / "pairs.jsonl", [*IMPLICIT.values(), *bad, EXPLICIT["messages"]])
    model = ["--model", str(model_dir), "--max-length", str(max_length)]
    rejects = tmp_path / "rejects.jsonl"
    result = CliRunner().invoke(app, ["validate", str(file), *model, "--json", "--rejects", str(rejects)])
    assert result.exit_code == 3
    said = json.loads(result.stdout)
    assert (said["trainer"], said["rows"]) == ("dpo", 7)

    _, report, _ = build_trainer(recipe(file, max_length=max_length, allow_rejects=True))
    lines = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [line["source"] for line in lines] == [reject.source for reject in report.rejects]
    assert said["trained_tokens"] == report.trained_tokens
    assert (said["tokens"], said["truncated"]) == (report.tokens, report.truncated)

    result = CliRunner().invoke(app, ["preview", str(file), *model, "--json", "-k", "9"])
    shown = json.loads(result.stdout)
    weights = [piece["weight"] for row in shown["rows"] for piece in row["pieces"] for _ in piece["ids"]]
    assert sum(weights) == report.trained_tokens
    assert shown["rows"][0]["source"] == f"{file}:1 chosen"
    assert len(shown["rejects"]) == len(report.rejects)

    text = CliRunner().invoke(app, ["validate", str(file)])
    assert "Judged as pairs of answers, for trainer dpo; --trainer judges otherwise." in text.stdout
    assert MORE_REASONS["no_answer"].split()[0] in text.stdout
    as_chats = CliRunner().invoke(app, ["validate", str(file), "--trainer", "sft", "--json"])
    assert json.loads(as_chats.stdout)["rejected"] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--last-turn-only", "--model", "MODEL"], "--last-turn-only does nothing for trainer dpo"),
        (["--trainer", "ppo"], "--trainer is ppo; expected sft, dpo, kto or grpo"),
        (["--reward-funcs", "exact_match"], "--reward-funcs does nothing for trainer dpo"),
        (["--max-completion-length", "8"], "--max-completion-length does nothing for trainer dpo"),
        (["--trainer", "grpo", "--max-length", "8", "--model", "MODEL"], "--max-length does nothing for trainer grpo"),
        (["--trainer", "grpo", "--max-completion-length", "8"], "give --model as well"),
        (["--trainer", "grpo", "--reward-funcs", "[a: {b"], "reward_funcs is not valid YAML: while parsing"),
        (["--trainer", "grpo", "--reward-funcs", "exact"], "reward_funcs holds 'exact'; expected exact_match"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, message, model_dir, tmp_path):
    file = write(tmp_path / "pairs.jsonl", [*IMPLICIT.values()])
    options = [str(model_dir) if option == "MODEL" else option for option in options]
    result = CliRunner().invoke(app, ["validate", str(file), *options])
    assert result.exit_code == 2
    assert message in result.stderr
