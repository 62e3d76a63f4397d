# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""GRPO learns what it is rewarded for, by log-probabilities that are the model's own."""

import copy
import inspect
import json
import math
import re
import shutil
import sys

import pytest
import torch
from trl import DPOTrainer, GRPOTrainer
from typer.testing import CliRunner

import sft.training.train
from conversion import inspect_checkpoint
from conversion.hub.lineage import lineage_steps
from sft.data.examples import Example
from sft.data.formats import Problem, Row
from sft.data.labels import DataError
from sft.data.prompts import PromptJudge
from sft.rewards.reward import RewardError
from sft.training.guards import GuardError, fused_loss_gap
from sft.training.ranges import CHOICES, RANGES
from sft.training.recipe import _KEYS, Recipe, RecipeError
from sft.training.train import build_trainer, load_tokenizer, main, train
from teleflm.commands.sft import app
from tests.fixtures.tiny import tiny_config, tiny_model
from tests.sft.test_distributed import TORCHRUN, run
from tests.sft.test_guards import on_step, untrained_model
from tests.sft.test_train import weights

ROWS = [
    {"prompt": "What is def?", "answer": "a function", "tests": ["assert True"]},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And class?"}], "answer": 2},
    {"prompt": "What is if?", "answer": "a question", "nested": [{"a": 1}, {"b": None}]},
    {"prompt": "What is for?", "answer": "a loop"},
]


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def grpo(make_recipe, prompts_file):
    def build(**keys):
        defaults = {
            "data_files": str(prompts_file),
            "reward_funcs": {"regex": {"pattern": "e"}},
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
        }
        return make_recipe(trainer="grpo", **{**defaults, **keys})

    return build


def logged(result, name="reward"):
    return [entry[name] for entry in result.log_history if name in entry]


@pytest.mark.slow
def test_what_is_rewarded_becomes_frequent(grpo):
    """A letter that the untrained model says now and then; each reward is a mean of 32 completions."""
    keys = {"per_device_train_batch_size": 32, "num_generations": 8, "max_steps": 30, "learning_rate": 0.2}
    rewards = logged(train(grpo(reward_funcs={"regex": {"pattern": "[xz]"}}, **keys), progress=False))
    assert sum(rewards[:5]) / 5 < 0.5
    assert sum(rewards[-5:]) / 5 > 0.9


def own_log_probs(model, ids, mask, temperature):
    """From the model's own logits, without anything of TRL's: [batch, length - 1], float32."""
    logits = model(input_ids=ids, attention_mask=mask).logits.float() / temperature
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("output_mult", "mup_scale_factor"), [(0.5, 16.0), (2.0, 80.0), (7.0, 4.0)])
def test_log_probabilities_are_those_of_the_models_own_logits(
    output_mult, mup_scale_factor, temperature, grpo, monkeypatch
):
    config = tiny_config(num_hidden_layers=2, output_mult=output_mult, mup_scale_factor=mup_scale_factor)
    monkeypatch.setattr(sft.training.train, "load_model", lambda arguments, **kwargs: tiny_model(config))
    trainer, _, _ = build_trainer(grpo(temperature=temperature))
    ids = torch.randint(3, 600, (4, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # as prompts are padded
    with torch.no_grad():
        found, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, logits_to_keep=9)
        expected = own_log_probs(tiny_model(config), ids, mask, temperature)[:, -9:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    without_factor = own_log_probs(tiny_model(config), ids, mask, temperature * config.logit_scale)[:, -9:]
    assert (found - without_factor).abs().max() > 0.1, "the factor makes a difference that is seen here"


def test_a_step_is_the_gradient_of_the_paper(grpo):
    """One step of plain gradient descent, against -mean(advantage * log-probability) from the model's own logits."""
    recipe = grpo(max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, temperature=0.8, scale_rewards="none")
    trainer, _, _ = build_trainer(recipe)
    before = tiny_model(trainer.model.config)
    before.load_state_dict(trainer.model.state_dict())
    trainer.train()
    (batch,) = trainer._buffered_inputs
    prompt, completion, mask = batch["prompt_ids"], batch["completion_ids"], batch["completion_mask"]
    ids = torch.cat([prompt, completion], dim=1)
    attention = torch.cat([batch["prompt_mask"], mask], dim=1)
    log_probs = own_log_probs(before, ids, attention, 0.8)[:, -completion.shape[1] :]
    assert batch["advantages"].abs().sum() > 0
    loss = -(log_probs * mask * batch["advantages"][:, None]).sum() / mask.sum()
    loss.backward()
    for (name, parameter), after in zip(before.named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(parameter - parameter.grad, after, rtol=1e-4, atol=1e-6, msg=name)


def test_advantages_compare_with_the_other_completions_of_a_prompt(grpo):
    trainer, _, _ = build_trainer(grpo(max_steps=1, scale_rewards="none"))
    trainer.train()
    (batch,) = trainer._buffered_inputs
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    rewards = torch.tensor([float("e" in text) for text in texts])
    groups = {}
    for index, ids in enumerate(batch["prompt_ids"].tolist()):
        groups.setdefault(tuple(ids), []).append(index)
    assert [len(group) for group in groups.values()] == [4, 4]
    expected = rewards.clone()
    for group in groups.values():
        expected[group] -= rewards[group].mean()
    torch.testing.assert_close(batch["advantages"], expected)


# --- guards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"bf16": True}, {"use_peft": True}, {"temperature": 0.5}], ids=str)
def test_the_wrong_log_probabilities_are_stopped_before_the_first_step(keys, grpo, monkeypatch, tmp_path):
    """At Tele-FLM's own initialization, where plain losses hardly differ."""
    monkeypatch.setattr(sft.training.train, "load_model", lambda arguments, **kwargs: untrained_model("wrong"))
    steps = []
    with pytest.raises(GuardError, match=r"TRL's fused loss is not the loss of HiddenFactorModel: .* gives as None"):
        train(grpo(max_steps=1, **keys), callbacks=[on_step(steps.append)])
    assert not steps
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


@pytest.mark.parametrize("keys", [{"bf16": True}, {"use_peft": True}, {"activation_checkpointing": True}], ids=str)
def test_a_right_run_is_let_through_at_any_temperature(keys, grpo):
    assert train(grpo(max_steps=1, temperature=0.5, **keys), progress=False).global_step == 1


def test_the_guard_knows_the_temperature(grpo):
    model = build_trainer(grpo(temperature=0.5))[0].model
    assert fused_loss_gap(model, model, temperature=0.5) < 0.005 < 0.1 < fused_loss_gap(model, model)


# --- completions ------------------------------------------------------------------------------------------------------


def certain(*tokens):
    """A model that says one of some tokens, whatever it is asked."""
    model = tiny_model(tiny_config(num_hidden_layers=2, output_mult=1.0, mup_scale_factor=1.0))
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = 1.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[list(tokens), 0] = 1e3
        model.model.embed_tokens.weight.abs_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def test_a_stop_token_ends_a_completion(grpo, monkeypatch):
    monkeypatch.setattr(sft.training.train, "load_model", lambda arguments, **kwargs: certain(2))
    result = train(grpo(max_steps=1), progress=False)
    assert logged(result, "completions/mean_terminated_length") == [1.0]
    assert logged(result, "completions/clipped_ratio") == [0.0]


@pytest.mark.parametrize("masked", [True, False])
def test_completions_that_were_cut_are_masked_if_so_asked(masked, grpo, monkeypatch):
    monkeypatch.setattr(sft.training.train, "load_model", lambda arguments, **kwargs: certain(300))
    trainer, _, _ = build_trainer(grpo(max_steps=1, mask_truncated_completions=masked))
    trainer.train()
    assert trainer._buffered_inputs[0]["completion_mask"].sum() == (0 if masked else 8 * 6)


def test_what_the_tokenizer_has_no_piece_for_is_never_sampled(grpo, monkeypatch):
    """The published models have some hundred rows of the vocabulary more than pieces."""
    monkeypatch.setattr(sft.training.train, "load_model", lambda arguments, **kwargs: certain(620, 300))
    trainer, _, _ = build_trainer(grpo(max_steps=1, generation_kwargs={"suppress_tokens": [5]}))
    trainer.train()
    assert set(trainer._buffered_inputs[0]["completion_ids"].flatten().tolist()) == {300}
    assert trainer.generation_config.suppress_tokens == [5, *range(600, 640)]
    trainer.generation_config.suppress_tokens = None
    trainer.generation_kwargs["suppress_tokens"] = None
    trainer._buffered_inputs = None
    trainer._prepare_inputs([trainer.train_dataset[0]] * 8)
    assert 620 in trainer._buffered_inputs[0]["completion_ids"]  # where nothing keeps the model from it


def test_generation_is_by_the_models_own_forward(grpo):
    """The head that TRL puts into the model leaves what is generated as it was."""
    trainer, _, _ = build_trainer(grpo())
    untouched = tiny_model(trainer.model.config)
    untouched.load_state_dict(trainer.model.state_dict())
    ids = torch.randint(3, 600, (2, 9), generator=torch.Generator().manual_seed(1))
    generated = [
        model.eval().generate(ids, do_sample=False, max_new_tokens=12, attention_mask=torch.ones_like(ids))
        for model in (trainer.model, untouched)
    ]
    assert generated[0].tolist() == generated[1].tolist()


@pytest.mark.parametrize("use_peft", [False, True])
def test_beta_pulls_towards_the_model_as_it_was(use_peft, grpo, monkeypatch):
    loaded = []
    load = sft.training.train.load_model
    monkeypatch.setattr(
        sft.training.train, "load_model", lambda *args, **kwargs: loaded.append(1) or load(*args, **kwargs)
    )
    result = train(grpo(beta=0.1, max_steps=3, use_peft=use_peft), progress=False)
    first, *_, last = logged(result, "kl")
    assert first == pytest.approx(0, abs=1e-6)
    assert last > 1e-5
    assert len(loaded) == (1 if use_peft else 2)
    assert weights(result.output_dir, "adapter_model.safetensors" if use_peft else "model.safetensors")


# --- reward functions -------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(
        "SEEN = []\n"
        "def keep(completions, answer, **kwargs):\n"
        "    SEEN.append((answer, kwargs))\n"
        "    return [0.5] * len(completions)\n"
        "def fail(completions, answer):\n"
        "    return [1.0 if isinstance(value, str) else 1 / 0 for value in answer]\n"
        "def infinite(completions):\n"
        "    return [float('nan')] * len(completions)\n"
    )
    return path


def test_columns_reach_a_function_as_they_are_in_the_file(file, grpo):
    trainer, _, _ = build_trainer(grpo(reward_funcs=[f"{file}:keep"], max_steps=2))
    trainer.train()
    (reward,) = trainer.reward_funcs
    seen = reward._function.__globals__["SEEN"]
    found = {}
    for answers, given in seen:
        assert {"prompts", "completion_ids", "trainer_state", "log_extra", "log_metric"} <= given.keys()
        for index, prompt in enumerate(given["prompts"]):
            columns = {name: given[name][index] for name in ("tests", "nested") if name in given}
            found[prompt[-1]["content"]] = {"answer": answers[index], **columns}
    assert len(found) == 4
    for row in ROWS:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        for name, value in found[prompt].items():
            assert value == row.get(name)
            assert type(value) is type(row.get(name))
    assert trainer.state.log_history[0]["rewards/keep/mean"] == 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [("fail", r"rewards.py:fail failed on .*prompts.jsonl:2: .*division by zero"), ("infinite", "returned nan for")],
)
def test_a_function_that_fails_stops_the_run_with_one_line(name, message, file, grpo, tmp_path):
    with pytest.raises(RewardError, match=message) as error:
        train(grpo(reward_funcs=f"{file}:{name}", max_steps=4), progress=False)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


def test_the_command_says_what_failed(file, model_dir, prompts_file, tmp_path, capsys):
    arguments = ["--config", "tiny-cpu-grpo", "--model_name_or_path", str(model_dir), "--max_steps", "1"]
    arguments += ["--data_files", str(prompts_file), "--output_dir", str(tmp_path / "out"), "--bf16", "false"]
    assert main([*arguments, "--reward_funcs", f"{file}:infinite"]) == 2
    assert "error: reward function" in capsys.readouterr().err.splitlines()[-1]
    leaving = tmp_path / "leaving.py"
    leaving.write_text("import sys\ndef leave(completions):\n    sys.exit(0)\n")
    assert main([*arguments, "--reward_funcs", f"{leaving}:leave"]) == 2, "not as if it were done"
    assert re.search(r"error: .*leaving.py:leave failed on .*: SystemExit: 0$", capsys.readouterr().err.strip())
    leaving.write_text("raise SystemExit\n")
    assert main([*arguments, "--reward_funcs", f"{leaving}:leave"]) == 2
    assert "leaving.py cannot be loaded: SystemExit" in capsys.readouterr().err.splitlines()[-1]
    assert main([*arguments, "--reward_funcs", "{regex: {pattern: ''}}"]) == 0
    assert "1 steps in" in (said := capsys.readouterr().out)
    assert "reward 1.000 at first, 1.000 at last\ntrained on 4 of 4 rows, " in said


def test_weights_of_rewards_are_those_of_the_recipe(file, grpo):
    result = train(
        grpo(reward_funcs=[f"{file}:keep", {"regex": {"pattern": ""}}], reward_weights=[2.0, 0.25], max_steps=1),
        progress=False,
    )
    assert logged(result) == [pytest.approx(2.0 * 0.5 + 0.25)]


def test_a_reward_that_float32_cannot_weigh_stops_the_run(file, grpo):
    """Its square has to be a number too: the advantages are divided by a standard deviation."""
    file.write_text("def large(completions): return [1e14 * at for at, _ in enumerate(completions)]\n")
    result = train(grpo(reward_funcs=f"{file}:large", max_steps=1), progress=False)
    assert math.isfinite(logged(result, "reward_std")[0])
    assert logged(result, "grad_norm")[0] > 0
    with pytest.raises(
        RewardError, match=r"rewards.py:large returned 100000000000000.0 for .* its weight 20\.0 .* 1e\+15"
    ):
        train(grpo(reward_funcs=f"{file}:large", reward_weights=[20.0], max_steps=1, output_dir=str(file) + "2"))


def test_code_is_run_while_training(grpo, monkeypatch):
    spec = {"python_tests": {"namespaces": False, "seconds": 2}}
    rows = grpo(reward_funcs=[spec, "exact_match"], max_steps=1)
    result = train(rows, progress=False)
    assert logged(result, "rewards/python_tests/mean")
    assert logged(result, "rewards/exact_match/mean") == [0.0]


# --- data -------------------------------------------------------------------------------------------------------------

ASK, SAID = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
BAD = [
    ({"answer": "a"}, "missing_columns"),
    ({"prompt": "What?"}, "no_reward"),
    ({"prompt": "What?", "answer": ["a"]}, "bad_column"),
    ({"prompt": "What?", "answer": "a", "images": ["a.png"]}, "bad_column"),
    ({"prompt": "What?", "answer": "a", "completions": "b"}, "bad_column"),
    ({"prompt": [{"role": "assistant", "content": "a"}], "answer": "a"}, "bad_prompt"),
    ({"prompt": [{"role": "system", "content": "a"}], "answer": "a"}, "starts_with_assistant"),
    ({"prompt": " ", "answer": "a"}, "empty_turn"),
    ({"prompt": "a <_bot> b", "answer": "a"}, "control_token"),
    (["What?"], "not_an_object"),
    ({"prompt": [], "answer": "a"}, "no_messages"),
    ({"prompt": "What?", "answer": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}, "bad_column"),
    ({"prompt": [ASK, {**SAID, "weight": 3}, ASK], "answer": "a"}, "bad_weight"),
    ({"prompt": [ASK, {**SAID, "train": False}, ASK], "answer": "a"}, "bad_weight"),
]


def test_columns_keep_the_order_of_their_names():
    row = {"prompt": "What?", "b": {"b": 1, "a": [{"d": 2, "c": 3}]}, "a": 4}
    columns, problems = PromptJudge().read(Row("prompts.jsonl", 1, row), ())
    assert problems == []
    del row["prompt"]
    assert columns["columns"] == json.dumps(row)


def test_validate_says_what_train_does(grpo, model_dir, tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [*ROWS, *[row for row, _ in BAD]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rejects = tmp_path / "rejects.jsonl"
    options = ["--model", str(model_dir), "--reward-funcs", "exact_match", "--rejects", str(rejects), "--json"]
    result = CliRunner().invoke(app, ["validate", str(file), *options])
    assert result.exit_code == 3, result.output
    found = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [line["reasons"][0]["code"] for line in found] == [code for _, code in BAD]

    with pytest.raises(DataError, match=rf"{len(BAD)} invalid rows .* set allow_rejects"):
        build_trainer(grpo(data_files=str(file), reward_funcs="exact_match"))
    _, report, _ = build_trainer(grpo(data_files=str(file), reward_funcs="exact_match", allow_rejects=True))
    assert [reject.source for reject in report.rejects] == [line["source"] for line in found]
    said = json.loads(result.stdout)
    assert (said["trainer"], said["tokens"], said["trained_tokens"]) == ("grpo", report.tokens, 0)

    file.write_text(json.dumps(ROWS[0]) + "\n")
    words = ("what reward functions need", "room for a completion")
    for given, left in (
        ([], words),
        (["--reward-funcs", "exact_match"], words[1:]),
        (["--model", str(model_dir), "--max-completion-length", "8", "--reward-funcs", "exact_match"], ()),
    ):
        said = " ".join(CliRunner().invoke(app, ["validate", str(file), *given]).stdout.split())
        assert [word for word in words if word in said] == list(left), said
        assert ("Not judged" in said) == bool(left)

    shown = CliRunner().invoke(app, ["preview", str(file), "--model", str(model_dir), "--json", "-k", "1"])
    (row,) = json.loads(shown.stdout)["rows"]
    assert "".join(piece["text"] for piece in row["pieces"]).endswith("What is def?<_bot>")
    assert row["source"] == f"{file}:1 prompt"


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("messages", "lost"),
    [
        ([{**SAID, "reasoning_content": "deep"}], "reasoning_content"),
        ([{**SAID, "tool_calls": [CALL]}, {"role": "tool", "content": "b"}, SAID], "tool_calls"),
    ],
    ids=["reasoning", "calls"],
)
def test_what_the_template_leaves_out_of_a_prompt_is_told(messages, lost, make_recipe, tmp_path):
    template = tmp_path / "old.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<_' ~ m.role ~ '>' ~ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<_bot>' }}{% endif %}"
    )
    row = Row("prompts.jsonl", 1, {"prompt": [ASK, *messages, ASK]})
    for keys, left_out in (({}, None), ({"chat_template_path": str(template)}, lost)):
        tokenizer, _ = load_tokenizer(make_recipe(**keys))
        columns, problems = PromptJudge().read(row, ())
        assert problems == []
        found = PromptJudge().tokenize(Example(columns, row.source, {}), tokenizer, None)
        assert isinstance(found, Problem) == (left_out is not None)
        assert left_out is None or f"the chat template leaves out {lost}" in found.detail


def test_prompts_leave_room_for_completions_and_fill_a_batch(grpo, model_dir, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "why " * 60}) + "\n" + json.dumps({"prompt": "Why?"}) + "\n")
    with pytest.raises(DataError, match=r"max_completion_length 200 are more than the 256 that the model reads"):
        build_trainer(grpo(data_files=str(file), max_completion_length=200))
    options = ["--trainer", "grpo", "--max-completion-length", "200", "--model", str(model_dir), "--json"]
    said = json.loads(CliRunner().invoke(app, ["validate", str(file), *options]).stdout)
    assert (said["rows"], list(said["findings"])) == (2, ["no_room"])
    with pytest.raises(DataError, match="1 prompts, but 2 are sampled from at once"):
        build_trainer(grpo(data_files=str(file), max_completion_length=200, allow_rejects=True))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"reward_funcs": None}, "does not set reward_funcs"),
        ({"reward_funcs": "absent"}, "reward_funcs holds 'absent'; expected exact_match"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 numbers, reward_funcs 1 functions"),
        ({"reward_weights": [float("inf")]}, "is or holds inf; expected finite numbers"),
        ({"use_vllm": True}, "use_vllm has no effect here; completions are sampled by the model's own forward pass"),
        ({"vllm_mode": "server"}, "vllm_mode has no effect here"),
        ({"use_transformers_continuous_batching": True}, "casts the trained weights"),
        ({"assistant_only_loss": True}, "it is for `trainer: sft`"),
        ({"max_length": 3}, "unknown key max_length"),
        ({"num_generations": 1}, "num_generations is 1; expected a number from 2"),
        ({"num_generations": 5}, "divisible by num_generations"),
        ({"sync_ref_model": True}, "needs beta above 0"),
        ({"eval_strategy": "steps"}, "eval_strategy has nothing to evaluate on; it needs eval_data_files\\.$"),
        ({"eval_on_start": True}, "eval_on_start has nothing to evaluate on; it needs eval_data_files\\.$"),
        ({"trainer": "sft"}, "reward_funcs has no effect here; it is for `trainer: grpo`"),
        ({"trainer": "dpo"}, "reward_funcs has no effect here"),
    ],
    ids=str,
)
def test_keys_that_would_do_nothing_are_refused(keys, message, model_dir, prompts_file, tmp_path):
    values = {
        "trainer": "grpo",
        "model_name_or_path": str(model_dir),
        "data_files": str(prompts_file),
        "output_dir": str(tmp_path),
        "reward_funcs": "exact_match",
    }
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict({**values, **keys})


@pytest.mark.parametrize(
    ("trainer", "keys", "message"),
    [
        ("grpo", {"loss_type": "foo"}, "loss_type is 'foo'; expected one of grpo, dr_grpo"),
        ("grpo", {"num_generations": 0}, "num_generations is 0; expected a number from 2"),
        ("grpo", {"temperature": 0}, "temperature is 0; expected a number from 1e-06"),
        ("grpo", {"temperature": 10**400}, "temperature is or holds a number of more than 64 bits"),
        ("grpo", {"temperature": float("nan")}, "temperature is or holds nan; expected finite"),
        ("grpo", {"top_k": -1}, "top_k is -1; expected a number from 0"),
        ("grpo", {"top_p": 0.0}, "top_p is 0.0; expected a number above 0, at most 1"),
        ("grpo", {"min_p": 2}, "min_p is 2; expected a number from 0, at most 1"),
        ("grpo", {"repetition_penalty": 0}, "repetition_penalty is 0; expected a number above 0"),
        ("grpo", {"num_iterations": 0}, "num_iterations is 0; expected a number from 1"),
        ("grpo", {"steps_per_generation": 0}, "steps_per_generation is 0; expected a number from 1"),
        ("grpo", {"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; expected a number from 1"),
        ("grpo", {"scale_rewards": "foo"}, "scale_rewards is 'foo'; expected one of group, batch, none"),
        ("grpo", {"importance_sampling_level": "x"}, "expected one of token, sequence"),
        ("grpo", {"multi_objective_aggregation": "x"}, "expected one of sum_then_normalize"),
        ("grpo", {"chat_template_kwargs": {"tokenize": False}}, "tokenize is an argument of TRL's own"),
        ("grpo", {"chat_template_kwargs": '{"tools": [1]}'}, "tools is an argument of TRL's own"),
        ("grpo", {"generation_kwargs": {"suppress_tokens": "x"}}, r"suppress_tokens is 'x'; expected list\[int\]"),
        ("grpo", {"generation_kwargs": {"num_return_sequences": 2}}, "key of its own: write num_generations"),
        ("grpo", {"generation_kwargs": {"temperature": 0.05}}, "temperature has a key of its own: write temperature"),
        ("grpo", {"generation_kwargs": {"max_new_tokens": 300}}, "key of its own: write max_completion_length"),
        ("grpo", {"generation_kwargs": '{"foo": 1}'}, "foo is no field of GenerationConfig; expected some of min_new"),
        ("grpo", {"generation_kwargs": {"num_beams": 2}}, "num_beams would change more than which tokens are sampled"),
        ("grpo", {"generation_kwargs": {"do_sample": False}}, "do_sample would change more"),
        ("grpo", {"generation_kwargs": {"min_length": -1}}, "min_length is -1; expected a number from 0"),
        ("grpo", {"reward_weights": [1e39]}, "expected numbers up to 1e\\+15 in size"),
        ("dpo", {"loss_type": ["sigmoid", "foo"]}, "expected one of sigmoid, hinge"),
        ("dpo", {"loss_type": []}, r"loss_type is \[\]; expected one of sigmoid"),
        ("dpo", {"f_divergence_type": "foo"}, "expected one of reverse_kl"),
        ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 0}, "ref_model_sync_steps is 0; expected a number"),
        ("dpo", {"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0; expected a number from 1"),
        ("kto", {"pad_to_multiple_of": "x"}, "pad_to_multiple_of is 'x'; expected auto, or a number from 1"),
        ("kto", {"max_length": -5}, "max_length is -5; expected a number from 1"),
        # TRL divides before it asks.
        ("grpo", {"num_generations": None}, "TypeError"),
    ],
    ids=str,
)
def test_values_that_trl_would_stumble_on_are_told_by_key(trainer, keys, message, tmp_path):
    values = {"trainer": trainer, "model_name_or_path": "m", "data_files": "d", "output_dir": str(tmp_path)}
    rewards = {"reward_funcs": "exact_match"} if trainer == "grpo" else {}
    with pytest.raises(RecipeError, match=message) as error:
        Recipe.from_dict({**values, **rewards, **keys})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("trainer", "key"), [("grpo", "reward_weights"), ("dpo", "loss_weights")])
def test_whole_numbers_are_numbers_in_lists_too(trainer, key, tmp_path):
    values = {"trainer": trainer, "model_name_or_path": "m", "data_files": "d", "output_dir": str(tmp_path)}
    values |= {"reward_funcs": "exact_match"} if trainer == "grpo" else {}
    assert getattr(Recipe.from_dict({**values, key: [1]}).training, key) == [1.0]
    for wrong in ([True], ["1"]):
        with pytest.raises(RecipeError, match=r"of type list; expected list\[float\] or null"):
            Recipe.from_dict({**values, key: wrong})


def test_choices_are_those_of_trl():
    """Of its code, which lists or compares with each of them."""
    for trainer, kind in (("grpo", GRPOTrainer), ("dpo", DPOTrainer)):
        code = inspect.getsource(sys.modules[kind.__module__]) + inspect.getsource(_KEYS[trainer].config)
        for choices in CHOICES[trainer].values():
            assert [choice for choice in choices if not re.search(rf"""["'`]{choice}["'`]""", code)] == []
    assert not [key for key in RANGES if not any(key in keys.training for keys in _KEYS.values())]


def test_what_nobody_foresaw_is_told_of_the_first_step(grpo, monkeypatch, tmp_path):
    monkeypatch.delitem(RANGES, "temperature")
    with pytest.raises(RecipeError, match=r"the first step failed: ZeroDivisionError: .*division by zero"):
        train(grpo(max_steps=1, temperature=0.0), progress=False)
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


# --- record and resume ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("use_peft", [False, True])
def test_a_resumed_run_is_the_run_that_went_on(use_peft, grpo, file, tmp_path):
    keys = {"max_steps": 6, "use_peft": use_peft, "save_strategy": "steps", "save_steps": 3}
    rewards = [{"regex": {"pattern": "e"}}, f"{file}:keep"]
    straight = train(grpo(output_dir=str(tmp_path / "a"), reward_funcs=rewards, **keys), progress=False)
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    moved = shutil.copy(file, tmp_path / "b" / "rewards.py")  # the same content elsewhere
    again = [rewards[0], f"{moved}:keep"]
    resumed = grpo(output_dir=str(tmp_path / "b"), reward_funcs=again, resume_from_checkpoint=True, **keys)
    result = train(resumed, progress=False)
    name = "adapter_model.safetensors" if use_peft else "model.safetensors"
    for key, weight in weights(straight.output_dir, name).items():
        assert torch.equal(weights(result.output_dir, name)[key], weight)
    assert logged(result) == logged(straight)


@pytest.mark.parametrize("change", ["file", "settings"])
def test_a_run_with_other_rewards_is_another_run(change, grpo, file, tmp_path):
    keys = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    rewards = [{"regex": {"pattern": "e"}}, f"{file}:keep"]
    train(grpo(reward_funcs=rewards, **keys), progress=False)
    if change == "file":
        file.write_text(file.read_text() + "\n")
    else:
        rewards[0] = {"regex": {"pattern": "f"}}
    with pytest.raises(GuardError, match="is of another run: reward_funcs was"):
        train(grpo(reward_funcs=rewards, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"), **keys))


def test_the_record_says_what_was_rewarded(grpo, file):
    recipe = grpo(reward_funcs=[{"regex": {"pattern": "e"}}, f"{file}:keep"], max_steps=2, beta=0.01)
    lineage = inspect_checkpoint(train(recipe, progress=False).output_dir).chain[-1].details
    assert (lineage["operation"], lineage["trainer"], lineage["method"], lineage["steps"]) == (
        "fine-tune",
        "grpo",
        "full",
        2,
    )
    assert (lineage["num_generations"], lineage["beta"], lineage["max_completion_length"]) == (4, 0.01, 6)
    regex, own = lineage["reward_funcs"]
    assert (regex["name"], regex["pattern"]) == ("regex", "e")
    assert own["name"] == "rewards.py:keep"
    assert len(own["digest"]) == 32


@pytest.mark.slow
def test_completions_that_share_a_round_are_told_of_on_resume(grpo, tmp_path, caplog):
    keys = {"max_steps": 3, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1}
    train(grpo(**keys), progress=False)
    for step, warned in ((2, False), (1, True)):
        caplog.clear()
        there = str(tmp_path / "out" / f"checkpoint-{step}")
        train(grpo(resume_from_checkpoint=there, **keys), progress=False)
        assert ("is amid a round of 2 steps" in caplog.text) == warned


def test_a_seed_decides_a_run(grpo, tmp_path):
    runs = [
        train(grpo(seed=seed, max_steps=2, output_dir=str(tmp_path / name)), progress=False)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    first, second, other = (weights(run.output_dir)["lm_head.weight"] for run in copy.copy(runs))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_evaluation_samples_too(grpo, prompts_file):
    keys = {"eval_data_files": str(prompts_file), "eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2}
    result = train(grpo(max_steps=1, per_device_eval_batch_size=8, **keys), progress=False)
    assert logged(result, "eval_reward")


@pytest.mark.slow
def test_two_processes_share_groups_and_end_together(model_dir, prompts_file, file, tmp_path):
    """Each group of four is spread over both; then a reward function fails on one of them alone."""
    recipe = tmp_path / "recipe.yaml"
    values = {
        "trainer": "grpo",
        "model_name_or_path": str(model_dir),
        "data_files": str(prompts_file),
        "output_dir": str(tmp_path / "out"),
        "reward_funcs": [f"{file}:of_rank"],
        "use_cpu": True,
        "num_processes": 2,
        "activation_checkpointing": False,
        "per_device_train_batch_size": 2,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "temperature": 1.0,
    }
    file.write_text(
        "import os\n"
        "def of_rank(completions):\n"
        "    return [float(os.environ['RANK'])] * len(completions)\n"
        "def fails(completions):\n"
        "    return [1 / (1 - int(os.environ['RANK']))] * len(completions)\n"
    )
    recipe.write_text(json.dumps(values))
    result = run(*TORCHRUN, "-m", "sft.train", "--config", recipe, "--json")
    assert result.returncode == 0, result.stderr
    log = json.loads(result.stdout)["log_history"]
    assert [entry["reward"] for entry in log if "reward" in entry] == [0.5, 0.5]
    assert [entry["frac_reward_zero_std"] for entry in log if "reward" in entry] == [0.0, 0.0]

    result = run(
        *TORCHRUN,
        "-m",
        "sft.train",
        "--config",
        recipe,
        "--reward_funcs",
        f"{file}:fails",
        "--output_dir",
        tmp_path / "b",
    )
    assert result.returncode != 0
    assert "error: reward function" in result.stderr
    assert not (tmp_path / "b" / "model.safetensors").exists()


def test_a_card_says_what_was_learned_from(grpo):
    details = inspect_checkpoint(train(grpo(max_steps=1), progress=False).output_dir).chain[-1].details
    (sentence,) = lineage_steps({**details, "parent": None})[-1:]
    assert "Fine-tuned (grpo, full) in 1 steps on its own answers to 4 prompts, rewarded." in sentence
