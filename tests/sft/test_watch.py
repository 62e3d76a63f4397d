# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What is logged beside TRL's numbers, and what is left of a run that ends in whatever way."""

import json
import logging
import types

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

import sft.training.train
import sft.training.watch
from growth.training.errors import RunError
from sft.training.loss_plot import LOSS_PLOT
from sft.training.recipe import RecipeError
from sft.training.run_log import RUN_LOG, read_history
from sft.training.train import build_trainer, train
from sft.training.trainer import WeightedSFTTrainer
from sft.training.watch import Stopwatch, count_tokens, public_name, source_names, sums_by_source
from tests.sft.test_dpo import dpo, pairs, pairs_file  # noqa: F401
from tests.sft.test_train import losses, weighted_file, weights  # noqa: F401

pytestmark = pytest.mark.slow

RUN = {"max_steps": 4, "learning_rate": 0.05, "max_length": 128, "per_device_train_batch_size": 4}


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(sft.training.watch.time, "perf_counter", lambda: self.now)

    def pass_(self, seconds):
        self.now += seconds


class Delays(TrainerCallback):
    """Each step takes 2 s, what is between steps 1 s; everything else takes very long."""

    def __init__(self, clock):
        self.clock = clock

    def on_step_begin(self, args, state, control, **kwargs):
        self.clock.pass_(1 + 2)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.clock.pass_(0 if "loss" in logs else 1000)

    def on_save(self, args, state, control, **kwargs):
        self.clock.pass_(5000)


@pytest.mark.parametrize("trainer", ["sft", "packed", "dpo"])
@pytest.mark.parametrize("logging_steps", [1, 2])
def test_tokens_per_second_are_trls_tokens_over_the_seconds_of_training(
    trainer, logging_steps, make_recipe, dpo, data_file, monkeypatch  # noqa: F811
):  # fmt: skip
    """Evaluating, saving, sampling and drawing take a thousand times as long as the steps."""
    clock = Clock(monkeypatch)
    slow = sft.training.samples.generate_texts
    monkeypatch.setattr("sft.training.samples.generate_texts", lambda *args: [clock.pass_(7000), slow(*args)][1])
    monkeypatch.setattr(sft.training.watch, "write_loss_plot", lambda *args: clock.pass_(9000))
    keys = {
        **RUN,
        "logging_steps": logging_steps,
        "save_strategy": "steps",
        "save_steps": 1,
        "sample_prompts": ["Who?"],
        "sample_steps": 1,
        "sample_max_new_tokens": 1,
    }
    if trainer == "dpo":
        recipe = dpo(**keys)
    else:
        evaluate = {"eval_data_files": str(data_file), "eval_strategy": "steps", "eval_steps": 1}
        recipe = make_recipe(**keys, **evaluate, packing=trainer == "packed")
    result = train(recipe, callbacks=[Delays(clock)], progress=False)
    logged = [entry for entry in result.log_history if "loss" in entry]
    assert len(logged) == 4 // logging_steps
    before = 0
    for entry in logged:
        assert entry["tokens_per_second"] == pytest.approx((entry["num_tokens"] - before) / (3 * logging_steps))
        before = entry["num_tokens"]
    assert clock.now > 40_000


def fail_late(clock):
    clock.pass_(1000)
    raise ZeroDivisionError


def test_a_stopwatch_leaves_out_what_it_is_told_to(monkeypatch):
    clock = Clock(monkeypatch)
    watch = Stopwatch()
    clock.pass_(1)
    with watch.excluded():
        clock.pass_(10)
    clock.pass_(2)
    watch.mark()
    clock.pass_(100)
    watch.exclude_since_mark()
    with pytest.raises(ZeroDivisionError), watch.excluded():
        fail_late(clock)
    assert watch.seconds() == 3


def test_tokens_of_what_is_not_tokenized_yet_are_not_counted():
    assert count_tokens([{"prompt": "a"}]) == 0
    assert (
        int(count_tokens({"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])})) == 3
    )
    assert count_tokens({"input_ids": torch.ones(1, 7), "position_ids": torch.ones(1, 7)}) == 7


def test_the_rate_of_matrices_is_logged_under_mup(make_recipe):
    result = train(make_recipe(**RUN, mup_base_width=16, warmup_steps=2), progress=False)
    logged = [entry for entry in result.log_history if "loss" in entry]
    rates = [entry["learning_rate"] for entry in logged]
    assert [entry["learning_rate_matrix"] for entry in logged] == pytest.approx([rate / 2 for rate in rates])
    assert len(set(rates)) > 2
    plain = train(make_recipe(**RUN, output_dir=result.output_dir + "-plain"), progress=False)
    assert not any("learning_rate_matrix" in entry for entry in plain.log_history)


# --- loss per source --------------------------------------------------------------------------------------------------


@pytest.fixture
def with_sources(monkeypatch):
    """Every few tokens another of three sources; nothing is trained on of a fourth."""
    build = WeightedSFTTrainer.__init__

    def build_with_sources(self, **keys):
        rows = keys["train_dataset"].to_dict()
        numbers = [
            [(index + place // 7) % 3 for place in range(len(ids))] for index, ids in enumerate(rows["input_ids"])
        ]
        build(self, **{**keys, "train_dataset": Dataset.from_dict({**rows, "sources": numbers})})

    monkeypatch.setattr(WeightedSFTTrainer, "__init__", build_with_sources)
    monkeypatch.setattr(sft.training.train, "source_names", lambda report: ["a", "b", "c", "d"])


@pytest.mark.parametrize(
    "keys",
    [{}, {"packing": True}, {"gradient_accumulation_steps": 2}, {"use_peft": True}, {"activation_checkpointing": True}],
    ids=["batch", "packed", "accumulated", "lora", "checkpointed"],
)
def test_the_loss_of_a_source_is_that_of_its_tokens(keys, make_recipe, with_sources, weighted_file, model_dir):  # noqa: F811
    """The oracle: each row alone, through the logits of a stock model, with its weights."""
    recipe = make_recipe(**{**RUN, "max_length": 256, "max_steps": 1, **keys}, data_files=str(weighted_file))
    trainer, _, _ = build_trainer(recipe)
    batches = list(trainer.get_train_dataloader())[: recipe.training.gradient_accumulation_steps]
    stock = AutoModelForCausalLM.from_pretrained(model_dir)
    sums = {number: [0.0, 0] for number in range(4)}
    for batch in batches:
        starts = [0]
        if recipe.training.packing:
            starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        for row in range(len(batch["input_ids"])):
            for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
                ids, labels = batch["input_ids"][row, start:end], batch["labels"][row, start:end]
                scores = stock(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
                trained = labels[1:] != -100
                for place in trained.nonzero().flatten().tolist():
                    found = sums[int(batch["sources"][row, start + 1 + place])]
                    found[0] -= float(scores[place] * batch["weights"][row, start + 1 + place])
                    found[1] += 1
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    expected = {f"source_loss/{'abcd'[number]}": total / count for number, (total, count) in sums.items() if count}
    assert {name: value for name, value in logged.items() if name.startswith("source_loss/")} == pytest.approx(
        expected, 1e-5
    )
    assert len(expected) == 3
    whole = sum(total for total, _ in sums.values()) / sum(count for _, count in sums.values())
    assert logged["loss"] == pytest.approx(whole, rel=1e-5)


def test_sources_change_no_loss_and_no_weight_and_cost_no_forward_pass(
    make_recipe, with_sources, monkeypatch, tmp_path
):
    passes = []
    counted = sft.training.train.load_model

    def load(*args, **keys):
        model = counted(*args, **keys)
        model.model.register_forward_hook(lambda *_: passes.append(1))
        return model

    monkeypatch.setattr(sft.training.train, "load_model", load)
    with_them = train(make_recipe(**RUN), progress=False)
    first = len(passes)
    monkeypatch.undo()
    monkeypatch.setattr(sft.training.train, "load_model", load)
    without = train(make_recipe(**RUN, output_dir=str(tmp_path / "plain")), progress=False)
    assert len(passes) == 2 * first
    assert losses(with_them) == losses(without)
    assert not any(name.startswith("source_loss/") for entry in without.log_history for name in entry)
    plain = weights(without.output_dir)
    assert all(torch.equal(weight, plain[name]) for name, weight in weights(with_them.output_dir).items())


def test_each_log_has_the_tokens_since_the_last_one():
    """The same as `numpy.bincount`."""
    torch.manual_seed(0)
    values, sources, trained = torch.rand(3, 50), torch.randint(0, 5, (3, 50)), torch.rand(3, 50) > 0.5
    sums, counts = sums_by_source(values, sources, trained, 6)
    flat = sources.flatten()[trained.flatten()]
    expected = torch.bincount(flat, values.flatten()[trained.flatten()].double(), minlength=6)
    torch.testing.assert_close(sums, expected)
    torch.testing.assert_close(counts, torch.bincount(flat, minlength=6).double())
    assert counts[5] == 0


def test_sources_are_called_without_their_folders_unless_two_are_alike():
    def names(*given):
        return source_names(types.SimpleNamespace(sources=[types.SimpleNamespace(name=name) for name in given]))

    assert names("/data/me/a.jsonl", "maths", "owner/name", "./x/b.jsonl, ./x/c.jsonl") == [
        "a.jsonl", "maths", "owner_name", "b.jsonl, c.jsonl"
    ]  # fmt: skip
    assert names("/data/one/a.jsonl", "/data/two/a.jsonl") == ["/data/one/a.jsonl", "/data/two/a.jsonl"]
    assert names() == []
    assert public_name("owner/name") == "owner/name"


# --- how runs end -----------------------------------------------------------------------------------------------------


class Fault(TrainerCallback):
    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


def draw(folder):
    """A picture of ours."""
    (folder / "drawn").write_text(read_history(folder).status or "going on")


def test_a_run_that_is_done_says_so(make_recipe, model_dir, tmp_path):
    out = tmp_path / "out"
    train(make_recipe(**RUN), progress=False, pictures=[draw])
    history = read_history(out)
    assert (history.status, history.step, len(history.sessions)) == ("done", 4, 1)
    assert history.points("loss") == [(step, value) for step, value in enumerate(losses_of(out), 1)]
    assert history.facts["data"] | {"left_out": {}} == history.facts["data"]
    assert (history.facts["trainer"], history.facts["batch_size"], history.facts["base"]) == ("sft", 4, model_dir.name)
    assert (out / LOSS_PLOT).read_bytes().startswith(b"\x89PNG")
    assert (out / "drawn").read_text() == "done"


def losses_of(out):
    state = json.loads((out / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [(KeyboardInterrupt(), "interrupted", ""), (RuntimeError("planted\nfault"), "failed", "planted fault")],
    ids=["interrupted", "failed"],
)
def test_what_there_is_of_a_run_that_ends_early_is_drawn(error, status, told, make_recipe, tmp_path):
    with pytest.raises(type(error)):
        train(make_recipe(**RUN), callbacks=[Fault(3, error)], progress=False, pictures=[draw])
    history = read_history(tmp_path / "out")
    assert (history.status, history.step) == (status, 2)
    assert history.sessions[-1].error.endswith(told)
    assert (tmp_path / "out" / LOSS_PLOT).is_file()
    assert (tmp_path / "out" / "drawn").read_text() == status


def test_a_run_that_is_interrupted_and_resumed_has_each_step_once(make_recipe, tmp_path):
    keys = {**RUN, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        train(make_recipe(**keys), callbacks=[Fault(4, KeyboardInterrupt())], progress=False)
    result = train(make_recipe(**keys, resume_from_checkpoint=True), progress=False)
    history = read_history(tmp_path / "out")
    assert [(session.start, session.status) for session in history.sessions] == [(0, "interrupted"), (2, "done")]
    assert [entry["step"] for entry in history.sessions[0].lost if "loss" in entry] == [3]
    assert [value for _, value in history.points("loss")] == losses(result)
    assert [step for step, _ in history.points("loss")] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_another_folder_brings_what_it_has_logged(make_recipe, tmp_path):
    keys = {**RUN, "save_strategy": "steps", "save_steps": 2}
    train(make_recipe(**keys), progress=False)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    train(make_recipe(**keys, resume_from_checkpoint=checkpoint, output_dir=str(tmp_path / "new")), progress=False)
    history = read_history(tmp_path / "new")
    assert [step for step, _ in history.points("loss")] == [1, 2, 3, 4]
    assert [value for _, value in history.points("loss")] == losses_of(tmp_path / "out")
    assert [session.start for session in history.sessions] == [0, 2]


def test_a_run_that_went_back_and_goes_on_from_where_it_was_before_is_one_curve(make_recipe, tmp_path):
    """The session that went back has saved nothing; so `true` takes the last checkpoint of the first one."""
    keys = {**RUN, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    first = train(make_recipe(**keys), progress=False)
    back = str(tmp_path / "out" / "checkpoint-2")
    train(make_recipe(**{**keys, "max_steps": 3, "save_strategy": "no"}, resume_from_checkpoint=back), progress=False)
    last = train(make_recipe(**{**keys, "max_steps": 5}, resume_from_checkpoint=True), progress=False)
    history = read_history(tmp_path / "out")
    assert [session.start for session in history.sessions] == [0, 2, 4]
    assert [step for step, _ in history.points("loss")] == [1, 2, 3, 4, 5]
    assert [value for _, value in history.points("loss")] == losses(last)
    assert losses(last)[:4] == losses(first)
    assert history.points("tokens_per_second")[:4] == [
        (entry["step"], entry["tokens_per_second"]) for entry in first.log_history if "tokens_per_second" in entry
    ]
    assert [entry["step"] for entry in history.sessions[1].lost if "loss" in entry] == [3]


def test_a_run_begun_again_with_a_smaller_batch_is_one_run(make_recipe, tmp_path):
    """As `auto_find_batch_size` does it, when memory ran out."""

    class Full(TrainerCallback):
        failed = False

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2 and not self.failed:
                self.failed = True
                raise RuntimeError("CUDA out of memory. planted")

    keys = {**RUN, "auto_find_batch_size": True, "sample_prompts": ["Who?"], "sample_max_new_tokens": 2}
    train(make_recipe(**keys), callbacks=[Full()], progress=False)
    history = read_history(tmp_path / "out")
    assert (history.earlier, len(history.sessions), history.status) == (1, 1, "done")
    assert [step for step, _ in history.points("loss")] == [1, 2, 3, 4]
    assert len(history.points("tokens_per_second")) == 4
    assert [sample["step"] for sample in history.samples] == [0, 4]


def test_what_cannot_be_drawn_or_written_is_said_once_and_the_model_is_saved(
    make_recipe, tmp_path, monkeypatch, caplog
):  # fmt: skip
    def fail(*args, **keys):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sft.training.watch, "write_loss_plot", fail)
    monkeypatch.setattr(sft.training.watch, "append_event", fail)
    keys = {**RUN, "save_strategy": "steps", "save_steps": 1}
    with caplog.at_level(logging.WARNING):
        train(make_recipe(**keys), progress=False, pictures=[lambda folder: 1 / 0])
    assert weights(tmp_path / "out")
    said = [record.getMessage() for record in caplog.records if "the run goes on" in record.getMessage()]
    assert len(said) == 3, "the log, loss.png and the picture, each once"
    assert all("\n" not in line for line in said)
    assert any("No space left on device" in line for line in said)


def test_a_refusal_before_the_first_step_leaves_no_run(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sft.training.guards, "fused_loss_gap", lambda *args, **keys: 1.0)
    with pytest.raises(sft.SFTError, match="fused loss"):
        train(make_recipe(**RUN), progress=False)
    assert not (tmp_path / "out" / RUN_LOG).exists()
    assert not (tmp_path / "out" / LOSS_PLOT).exists()


def test_the_data_are_told_with_the_first_rejects_and_without_folders(make_recipe, tmp_path, data_file):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(data_file.read_text() + '{"messages": 3}\n' * 7 + '{"x": 1}\n')
    recipe = make_recipe(**{**RUN, "max_length": 40}, data_files=str(bad), allow_rejects=True)
    _, report, _ = build_trainer(recipe)
    told = sft.training.watch.describe_data(report)
    assert (told["rows"], told["kept"], told["truncated"]) == (56, report.kept, report.truncated)
    assert told["truncated"] > 0
    rejects = told["left_out"]["no_messages"]
    assert (rejects["rows"], len(rejects["first"])) == (7, 5)
    assert rejects["first"][0]["row"] == "bad.jsonl:49"
    assert sum(reason["rows"] for reason in told["left_out"].values()) == told["rows"] - told["kept"]
    assert str(tmp_path) not in json.dumps(told)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio", "swanlab"])
def test_a_tracker_that_is_not_installed_is_refused(name, make_recipe, monkeypatch):
    import configparser
    from pathlib import Path

    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: False)
    monkeypatch.setattr(sft.training.train, "load_model", lambda *args, **keys: pytest.fail("a model was loaded"))
    with pytest.raises(RecipeError) as error:
        train(make_recipe(report_to=name), progress=False)
    assert str(error.value) == f"report_to is {name}, whose package is not installed: pip install {name}."
    config = configparser.ConfigParser()
    config.read(Path(sft.__file__).parents[1] / "setup.cfg")
    assert config["options.extras_require"][name].split(">=")[0].strip() in (name, f"{name}-skinny")


def test_an_unknown_tracker_is_refused(make_recipe):
    with pytest.raises(RecipeError, match="report_to is wandbb, which transformers does not know"):
        train(make_recipe(report_to="wandbb"), progress=False)


def test_an_error_of_the_run_is_still_one_line(make_recipe):
    with pytest.raises(sft.SFTError, match="planted"):
        train(make_recipe(**RUN), callbacks=[Fault(1, RunError("planted"))], progress=False)
