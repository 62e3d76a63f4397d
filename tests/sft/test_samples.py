# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Texts generated while a run goes on: they are the model's, and the run is the run without them."""

import json
import random

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import sft.training.train
from sft.training.recipe import RecipeError
from sft.training.run_log import SAMPLES, read_history
from sft.training.samples import MOST_PROMPTS, SampleError, as_it_was, generate_texts
from sft.training.train import build_trainer, train
from tests.sft.test_dpo import dpo, pairs, pairs_file  # noqa: F401
from tests.sft.test_train import losses, weights

pytestmark = pytest.mark.slow

PROMPTS = ["What is assert?", [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "Who?"}]]
RUN = {"max_steps": 4, "learning_rate": 0.05, "max_length": 128, "per_device_train_batch_size": 4}


def samples(folder):
    return [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]


def spelled(tokenizer, ids):
    """Their text; the tiny model, as the 52B, has more ids than its tokenizer has tokens."""
    text, known = "", []
    for token in [*ids, None]:
        if token is not None and token < 600:
            known.append(token)
            continue
        text += tokenizer.decode(known) if known else ""
        text += "" if token is None else f"<id {token}>"
        known = []
    return text


@pytest.mark.parametrize(
    "keys",
    [
        {"packing": True, "activation_checkpointing": True, "shuffle_dataset": True},
        {"use_peft": True, "lora_dropout": 0.5, "activation_checkpointing": True},
        {"neftune_noise_alpha": 5.0, "gradient_accumulation_steps": 2},
        {"bf16": True},
        {"trainer": "dpo"},
    ],
    ids=["packed", "lora with dropout", "noise", "bf16", "dpo"],
)
def test_a_run_with_samples_is_the_run_without_to_the_bit(keys, make_recipe, pairs_file, tmp_path):  # noqa: F811
    if keys.get("trainer") == "dpo":
        keys = {**keys, "data_files": str(pairs_file)}
    sampled = {"sample_prompts": PROMPTS, "sample_steps": 1, "sample_max_new_tokens": 5}
    results = [
        train(make_recipe(**{**RUN, **keys, **more}, output_dir=str(tmp_path / name)), progress=False)
        for name, more in (("without", {}), ("with", sampled))
    ]
    assert losses(results[0]) == losses(results[1])
    assert len(losses(results[0])) == 4
    name = "adapter_model.safetensors" if "use_peft" in keys else "model.safetensors"
    first, second = (weights(result.output_dir, name) for result in results)
    assert first.keys() == second.keys()
    assert all(torch.equal(weight, second[key]) for key, weight in first.items())
    assert sorted({line["step"] for line in samples(tmp_path / "with")}) == [0, 1, 2, 3, 4]


def test_modes_and_random_states_are_put_back_even_after_a_failure():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model[0].eval()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def draw_and_fail():
        assert not any(module.training for module in model.modules())
        torch.rand(3), random.random(), np.random.random()
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"), as_it_was(model):
        draw_and_fail()
    assert [module.training for module in model.modules()] == [True, False, True, True]
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1], before[2]) == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize("keys", [{}, {"use_peft": True}], ids=["full", "lora"])
def test_the_texts_are_those_of_stock_generate_from_the_saved_checkpoints(keys, make_recipe, tmp_path, model_dir):
    """A new model each time, loaded from the checkpoint of the same step."""
    recipe = make_recipe(
        **RUN, **keys, save_strategy="steps", save_steps=2, sample_prompts=PROMPTS, sample_steps=2,
        sample_max_new_tokens=8,
    )  # fmt: skip
    train(recipe, progress=False)
    found = {(line["step"], line["prompt"]): line for line in samples(tmp_path / "out")}
    assert len(found) == 6
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    differing = set()
    for step in (0, 2, 4):
        folder = tmp_path / "out" / f"checkpoint-{step}" if step else model_dir
        model = AutoModelForCausalLM.from_pretrained(folder)
        for number, prompt in enumerate(PROMPTS):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
            new = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
            line = found[step, number]
            ended = new[-1] == tokenizer.eos_token_id
            assert line["text"] == spelled(tokenizer, new[:-1] if ended else new)
            assert (line["new_tokens"], line["ended"], line["messages"]) == (len(new), ended, messages)
            differing.add(line["text"])
    assert len(differing) > 2, "else any text would do"


def test_what_is_generated_from_are_the_models_own_logits(make_recipe):
    """A factor on all logits changes no greedy text, so the logits themselves are compared with a stock model's."""
    trainer, _, _ = build_trainer(make_recipe(sample_prompts=PROMPTS))
    stock = AutoModelForCausalLM.from_pretrained(trainer.model.config._name_or_path)
    assert stock.config.logit_scale != 1
    config = GenerationConfig(
        max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    ids = torch.tensor([trainer.prompts[0].input_ids])
    with as_it_was(trainer.model), torch.no_grad():
        ours = trainer.model.generate(ids, generation_config=config, attention_mask=torch.ones_like(ids))
    expected = stock.generate(ids, generation_config=config, attention_mask=torch.ones_like(ids))
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, expected.logits, strict=True))
    assert torch.equal(ours.sequences, expected.sequences)


def test_a_stop_token_ends_a_text_and_is_not_in_it(make_recipe):
    """Whatever the model would say first is declared a stop token."""
    trainer, _, _ = build_trainer(make_recipe(sample_prompts=["Who?"]))
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=[2], pad_token_id=0)
    ids = torch.tensor([trainer.prompts[0].input_ids])
    first = int(trainer.model.eval()(ids).logits[0, -1].argmax())
    config.eos_token_id = [2, first]
    assert generate_texts(trainer.model, trainer.processing_class, trainer.prompts, config) == [
        {"text": "", "new_tokens": 1, "ended": True}
    ]


def test_a_failure_to_sample_is_a_warning_and_the_run_goes_on(make_recipe, tmp_path, monkeypatch, caplog):
    def fail(*args, **keys):
        raise torch.OutOfMemoryError("planted\nfault")

    monkeypatch.setattr("sft.training.samples.generate_texts", fail)
    train(make_recipe(**RUN, sample_prompts=PROMPTS, sample_steps=1), progress=False)
    assert weights(tmp_path / "out")
    assert not (tmp_path / "out" / SAMPLES).exists()
    assert [record.getMessage() for record in caplog.records if "samples" in record.getMessage()] == [
        f"{tmp_path / 'out'}: no samples: OutOfMemoryError: planted fault; the run goes on"
    ]


REFUSED = {
    "no prompt": ([], "sample_prompts has no prompt"),
    "blank": (["ok", " \n"], "prompt 2: it is blank"),
    "control token": (["Say <_bot> now"], "prompt 1: it contains <_bot>"),
    "number": ([3], "prompt 1: `messages` must be a list"),
    "no role": ([[{"content": "x"}]], "prompt 1: its last message has role None"),
    "ends with an answer": (
        [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]],
        "prompt 1: its last message has role 'assistant'",
    ),
    "no such file": ("What is assert?", "'What is assert?', which is no file of"),
    "missing": ("prompts.jsonl", "'prompts.jsonl', which is no file of"),
    "too long": (["word " * 300], "more than max_position_embeddings, 256"),
    "too many": (["x"] * (MOST_PROMPTS + 1), f"has {MOST_PROMPTS + 1} prompts"),
}


@pytest.mark.parametrize(("prompts", "message"), REFUSED.values(), ids=REFUSED)
def test_a_prompt_that_cannot_be_sampled_is_refused_before_a_model_is_loaded(
    prompts, message, make_recipe, monkeypatch
):
    monkeypatch.setattr(sft.training.train, "load_model", lambda *args, **keys: pytest.fail("a model was loaded"))
    with pytest.raises(SampleError) as error:
        train(make_recipe(sample_prompts=prompts, **RUN), progress=False)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prompt_that_the_template_refuses_is_refused(make_recipe, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sft.training.train, "load_model", lambda *args, **keys: pytest.fail("a model was loaded"))
    template = tmp_path / "template.jinja"
    own = AutoTokenizer.from_pretrained(model_dir).chat_template
    refusal = "{% if messages[0]['content'] == 'Who?' %}{{ raise_exception('not that') }}{% endif %}"
    template.write_text(refusal + own)
    with pytest.raises(SampleError, match=r"prompt 2: the chat template refuses it: .*not that"):
        train(make_recipe(chat_template_path=str(template), sample_prompts=["a", "Who?"]), progress=False)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
@pytest.mark.parametrize("key", ["sample_prompts", "eval_texts"])
def test_a_sharded_run_is_refused_before_a_model_is_loaded(kind, key, make_recipe, monkeypatch):
    monkeypatch.setattr(sft.training.train, "check_launch", lambda *args, **keys: kind)
    monkeypatch.setattr(sft.training.train, "load_model", lambda *args, **keys: pytest.fail("a model was loaded"))
    with pytest.raises(SampleError, match=f"{key}: the run is {kind.value}"):
        train(make_recipe(**{key: ["Who?"]}), progress=False)


@pytest.mark.parametrize("keys", [{"sample_steps": 5}, {"sample_max_new_tokens": 5}])
def test_keys_that_would_do_nothing_are_refused(keys, make_recipe):
    with pytest.raises(RecipeError, match="it needs sample_prompts"):
        make_recipe(**keys)
    with pytest.raises(RecipeError, match="expected at least 1"):
        make_recipe(sample_prompts=["x"], **dict.fromkeys(keys, 0))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_prompts_of_a_file(suffix, make_recipe, tmp_path):
    path = tmp_path / f"prompts{suffix}"
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "left out"}]},
        {"messages": [{"role": "user", "content": "b"}]},
    ]
    path.write_text("a\n\nb\r\n" if suffix == ".txt" else "".join(json.dumps(row) + "\n" for row in rows))
    trainer, _, _ = build_trainer(make_recipe(sample_prompts=str(path)))
    assert [prompt.messages for prompt in trainer.prompts] == [[{"role": "user", "content": text}] for text in "ab"]
    assert [prompt.input_ids for prompt in trainer.prompts] == [
        trainer.processing_class.apply_chat_template(prompt.messages, add_generation_prompt=True)["input_ids"]
        for prompt in trainer.prompts
    ]


def test_a_resumed_run_may_sample_otherwise_and_samples_no_step_twice(make_recipe, tmp_path):
    keys = {**RUN, "save_strategy": "steps", "save_steps": 2, "sample_prompts": PROMPTS}
    train(make_recipe(**keys, sample_steps=1, sample_max_new_tokens=2), progress=False)
    again = {**keys, "max_steps": 6, "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-2")}
    train(make_recipe(**again, sample_steps=2, sample_max_new_tokens=3), progress=False)
    found = [(line["session"], line["step"]) for line in samples(tmp_path / "out") if line["prompt"] == 0]
    assert found == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 4), (1, 6)]
    history = read_history(tmp_path / "out")
    assert [(line["session"], line["step"]) for line in history.samples if line["prompt"] == 0] == [
        (0, 0), (0, 1), (0, 2), (1, 4), (1, 6)
    ]  # fmt: skip


def test_the_last_sample_is_of_the_model_that_is_saved(make_recipe, tmp_path, data_file, model_dir):
    """The best one is of step 1 here: a rate this high makes all later ones worse."""
    keys = {
        **RUN,
        "learning_rate": 30.0,
        "eval_data_files": str(data_file),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "sample_prompts": ["Who?"],
        "sample_max_new_tokens": 6,
    }
    train(make_recipe(**keys), progress=False)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    best = state["best_global_step"]
    assert best < 4
    found = {line["step"]: line["text"] for line in samples(tmp_path / "out")}
    assert set(found) == {0, 4, best}
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "Who?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    assert found[best] == spelled(tokenizer, new)
