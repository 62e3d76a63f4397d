# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What of a run may change when it is resumed, key by key; the runs themselves are resumed in tests/sft/test_train.py
and in test_train.py."""

import dataclasses
import json
import logging
import re

import pytest
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig

from conversion.checkpoint.manifest import seal
from growth.training.errors import RunError
from growth.training.same_run import MAY_CHANGE, RUN, check_same_run, describe_run

DECIDES = """
    accelerator_config
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1
    adam_beta2 adam_epsilon optim_target_modules max_grad_norm label_smoothing_factor bf16 fp16
    neftune_noise_alpha ignore_data_skip seed data_seed dataloader_drop_last train_sampling_strategy
    average_tokens_across_devices packing packing_strategy padding_free max_length loss_type assistant_only_loss
    completion_only_loss shuffle_dataset beta label_smoothing loss_weights f_divergence_type disable_dropout
    precompute_ref_log_probs sync_ref_model
""".split()  # noqa: SIM905


def arguments(**keys):
    return TrainingArguments(output_dir="out", use_cpu=True, report_to="none", **keys)


def described(made_from=None, others=None, **keys):
    return describe_run(arguments(**keys), others or {}, made_from or {"data": "abc"})


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / RUN).write_text(json.dumps(seal(described(others={"mup_base_width": 32}))))
    return tmp_path


def test_every_key_that_decides_the_steps_is_compared():
    known = {field.name for cls in (SFTConfig, DPOConfig) for field in dataclasses.fields(cls)}
    assert set(DECIDES) <= known
    assert [key for key in DECIDES if re.fullmatch(MAY_CHANGE, key)] == []


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (described(learning_rate=1e-2), "learning_rate was 5e-05, is 0.01"),
        (described({"data": "xyz"}), 'data was "abc", is "xyz"'),
        (described(others={"mup_base_width": 64}), "mup_base_width was 32, is 64"),
        (described(accelerator_config={"use_seedable_sampler": False}), "accelerator_config was .*, is "),
        (described(per_device_train_batch_size=4), "batch_size was 8, is 4"),
        (described(seed=1, weight_decay=0.5), "seed was 42, is 1; weight_decay was 0.0, is 0.5|weight_decay.*seed"),
        (described(lr_scheduler_type="cosine"), 'lr_scheduler_type was "linear", is "cosine"'),
    ],
)
def test_what_differs_is_named_and_refused(run, message, checkpoint):
    with pytest.raises(RunError, match=message) as error:
        check_same_run(checkpoint, run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"logging_steps": 3, "save_steps": 7, "run_name": "b", "eval_delay": 1},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True, "dataloader_num_workers": 1},
    ],
)
def test_what_no_step_depends_on_may_change(keys, checkpoint, caplog):
    with caplog.at_level(logging.WARNING):
        assert check_same_run(checkpoint, described(others={"mup_base_width": 32}, **keys)) is True
    assert not caplog.records


def test_another_length_is_told(checkpoint, caplog):
    assert check_same_run(checkpoint, described(others={"mup_base_width": 32}, max_steps=9)) is True
    assert "max_steps was -1, is 9: from the next step on the learning rates are those of the new length" in caplog.text


def test_a_checkpoint_that_does_not_say_is_told_of_and_a_damaged_one_refused(tmp_path, caplog):
    assert check_same_run(tmp_path, described()) is None
    assert f"{tmp_path} has no run.json" in caplog.text
    hollow = json.dumps({"batch_size": 8, "made_from": {}, "keys": {}})
    edited = json.dumps({**seal(described()), "keys": {}})
    for text in (
        hollow,
        edited,
        "{",
        "[]",
        '{"batch_size": 8}',
        "\udc80".encode("utf-8", "surrogateescape").decode("latin-1"),
    ):
        (tmp_path / RUN).write_text(text)
        with pytest.raises(RunError, match="cannot be read"):
            check_same_run(tmp_path, described())


def test_no_secret_is_written(monkeypatch):
    run = describe_run(arguments(push_to_hub=False, hub_token="hf_secret"), {}, {})
    assert "secret" not in json.dumps(run)
    assert "TOKEN" not in json.dumps(run)
