# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
import json

import pytest
import torch

import sft.training.train
from sft.data.examples import prepare_examples
from sft.data.formats import Row
from sft.data.labels import DataError
from sft.data.preferences import PairJudge, read_pair
from sft.tokenizer import TokenizerError
from sft.training.guards import GuardError
from sft.training.train import build_trainer, load_tokenizer, train
from tests.fixtures.tiny import tiny_model
from tests.sft.test_guards import untrained_model
from tests.sft.test_train import losses, weights


@pytest.fixture(scope="session")
def pairs(conversations):
    """The right answer, and the answer to another question."""
    chats = [row["messages"][-2:] for row in conversations[:12]]
    return [
        {"prompt": [ask], "chosen": [answer], "rejected": [other]}
        for (ask, answer), (_, other) in zip(chats, [*chats[1:], chats[0]], strict=True)
    ]


@pytest.fixture(scope="session")
def pairs_file(pairs, tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.fixture
def dpo(make_recipe, pairs_file):
    def build(**keys):
        keys = {"per_device_train_batch_size": 4, "max_length": 256, "learning_rate": 1e-2, **keys}
        return make_recipe(trainer="dpo", **{"data_files": str(pairs_file), **keys})

    return build


@pytest.mark.parametrize("keys", [{}, {"use_peft": True}, {"precompute_ref_log_probs": True}], ids=str)
def test_the_chosen_answers_come_to_be_preferred(keys, dpo):
    result = train(dpo(max_steps=6, **keys), progress=False)
    first, last = losses(result)[0], losses(result)[-1]
    assert first == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-4), "nothing is preferred yet"
    assert last < first
    assert [entry for entry in result.log_history if "rewards/margins" in entry][-1]["rewards/margins"] > 0
    name = "adapter_model.safetensors" if "use_peft" in keys else "model.safetensors"
    assert weights(result.output_dir, name)


def test_the_loss_is_that_of_the_paper(dpo):
    """-log sigmoid(beta * (margin of the policy - margin of the reference)), from the models' own logits."""
    recipe = dpo(max_steps=1, beta=0.3, optim="sgd", learning_rate=0.0)
    trainer, _, _ = build_trainer(recipe)
    policy, reference = tiny_model(trainer.model.config), tiny_model(trainer.ref_model.config)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    policy.load_state_dict(trainer.model.state_dict())
    reference.load_state_dict(trainer.ref_model.state_dict())

    def log_prob(model, ids, mask):
        scores = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
        return scores[mask[1:].bool()].sum()

    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        scores = torch.stack(
            [
                log_prob(policy, ids[:length], mask[:length]) - log_prob(reference, ids[:length], mask[:length])
                for ids, mask, length in zip(
                    batch["input_ids"], batch["completion_mask"], batch["attention_mask"].sum(-1), strict=True
                )
            ]
        )
    chosen, rejected = scores.chunk(2)  # TRL's batch holds the chosen answers first
    expected = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)).mean()
    trainer.train()
    assert losses(trainer.state) == pytest.approx([expected.item()], rel=1e-4)


def test_the_wrong_loss_is_stopped_here_too(dpo, monkeypatch):
    monkeypatch.setattr(sft.training.train, "load_model", lambda arguments, **kwargs: untrained_model("wrong"))
    with pytest.raises(GuardError, match="TRL's fused loss is not the loss of HiddenFactorModel"):
        train(dpo(max_steps=1))


@pytest.mark.parametrize("end", ["</s>", ""], ids=["with", "without"])
def test_a_template_needs_no_marks_but_an_end_token(end, dpo, tmp_path):
    path = tmp_path / "template.jinja"
    turn = "<_user>{{ m.content }}{% if m.role == 'assistant' %}" + end + "{% endif %}"
    path.write_text("{% for m in messages %}" + turn + "{% endfor %}")
    if end:
        assert train(dpo(max_steps=1, chat_template_path=str(path)), progress=False).global_step == 1
    else:
        with pytest.raises(TokenizerError, match="not a stop token"):
            train(dpo(max_steps=1, chat_template_path=str(path)))


def ask(content="Why?", role="user"):
    return [{"role": role, "content": content}]


GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (GOOD, None),
        ({"prompt": ask(), "chosen": ask("Because.", "assistant"), "rejected": ask("No.", "assistant")}, None),
        ({**GOOD, "rejected": None}, "missing_columns"),
        ({"prompt": "Why?"}, "missing_columns"),
        (["Why?"], "not_an_object"),
        ({**GOOD, "rejected": "Because."}, "same_answers"),
        ({**GOOD, "chosen": []}, "no_messages"),
        ({**GOOD, "chosen": " "}, "empty_turn"),
        ({**GOOD, "chosen": ask("Because.")}, "repeated_role"),
        ({**GOOD, "prompt": ask(role="robot")}, "unknown_role"),
        ({**GOOD, "prompt": "a <_bot> b"}, "control_token"),
        ({**GOOD, "rejected": 3}, "no_messages"),
        ({**GOOD, "prompt": [{"role": "user", "content": 3}]}, "bad_content"),
    ],
)
def test_pairs_are_judged_as_conversations_are(row, code):
    _, problems = read_pair(Row("pairs.jsonl", 1, row), ["<_bot>"])
    assert [problem.code for problem in problems][:1] == ([code] if code else [])


def test_rows_are_named_and_counted(dpo, pairs, tmp_path):
    tokenizer, _ = load_tokenizer(dpo())
    file = tmp_path / "pairs.jsonl"
    long = {"prompt": "why " * 300, "chosen": "Because.", "rejected": "No."}
    file.write_text("\n".join(map(json.dumps, [pairs[0], {**GOOD, "rejected": "Because."}, long, GOOD])))
    with pytest.raises(DataError, match=r"1 invalid rows \(1 same_answers\): .*pairs.jsonl:2: .* Correct them, or set"):
        prepare_examples(file, PairJudge(), tokenizer, max_length=256)

    dataset, report = prepare_examples(file, PairJudge(), tokenizer, max_length=256, allow_rejects=True)
    assert (report.rows, report.kept, report.dropped) == (4, 2, (f"{file}:3",))
    assert dataset[1] == {
        "prompt": ask(),
        "chosen": ask("Because.", "assistant"),
        "rejected": ask("No.", "assistant"),
    }
    trainer, _, _ = build_trainer(dpo(data_files=str(file), allow_rejects=True))
    ids = [len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in trainer.train_dataset]
    assert sum(ids) == report.trained_tokens
