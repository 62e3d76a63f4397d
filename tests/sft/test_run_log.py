# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a run's log says when it is read again: of resumed runs, interrupted ones, damaged files."""

import json
import math
import random
import sys

import pytest

from sft.training.loss_plot import loss_figure, other_figures, png_of, smoothed, write_loss_plot
from sft.training.run_log import (
    RUN_LOG,
    SAMPLES,
    RunLogError,
    append_event,
    append_line,
    find_maker,
    read_history,
)


def write_log(folder, *sessions, end=True):
    """Sessions of (start, resumed, {step: loss})."""
    for start, resumed, losses in sessions:
        append_event(folder, "begin", {"step": start, "resumed": resumed, "facts": {"trainer": "sft", "from": start}})
        for step, loss in losses.items():
            append_event(folder, "log", {"step": step, "loss": loss})
    if end:
        append_event(folder, "end", {"step": 0, "status": "done"})


def test_steps_done_again_after_a_resume_count_once(tmp_path):
    write_log(
        tmp_path,
        (0, False, {1: 5.0, 2: 4.0, 3: 3.9, 4: 3.8}),
        (2, True, {3: 3.0, 4: 2.0, 5: 1.9}),
        (4, True, {5: 1.0, 6: 0.5}),
    )
    history = read_history(tmp_path)
    assert history.points("loss") == [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0), (5, 1.0), (6, 0.5)]
    assert [[entry["loss"] for entry in session.lost] for session in history.sessions] == [[3.9, 3.8], [1.9], []]
    assert (history.step, history.status, history.earlier) == (6, "done", 0)


def test_going_back_behind_an_earlier_resume_drops_what_that_one_did(tmp_path):
    write_log(tmp_path, (0, False, {1: 5.0, 2: 4.0}), (2, True, {3: 9.0}), (1, True, {2: 3.0}))
    history = read_history(tmp_path)
    assert history.points("loss") == [(1, 5.0), (2, 3.0)]
    assert [[entry["loss"] for entry in session.lost] for session in history.sessions] == [[4.0], [9.0], []]


def test_going_back_and_then_on_from_a_later_checkpoint_is_the_curve_of_the_model(tmp_path):
    """Session 1 went back to step 5 and saved nothing; session 2 goes on from the checkpoint that session 0 left."""
    losses = {step: 10.0 - step for step in range(1, 11)}
    write_log(tmp_path, (0, False, losses), (5, True, {6: 60.0, 7: 70.0, 8: 80.0}))
    of_checkpoint = [{"step": step, "loss": loss} for step, loss in losses.items()]
    append_event(tmp_path, "log", {"step": 8, "train_runtime": 1.0})
    maker = find_maker(tmp_path, of_checkpoint, 10)
    append_event(tmp_path, "begin", {"step": 10, "resumed": True, "after": maker, "facts": {}})
    append_event(tmp_path, "log", {"step": 11, "loss": -1.0})
    history = read_history(tmp_path)
    assert history.points("loss") == [(step, 10.0 - step) for step in range(1, 12)]
    assert [[entry["step"] for entry in session.lost] for session in history.sessions] == [[], [6, 7, 8, 8], []]


def of_steps(history):
    return [entry for entry in history.entries() if "train_runtime" not in entry]


def random_run(rng, folder):
    """Sessions that go on from any checkpoint there is, each step saved; the oracle is what each checkpoint holds."""
    held, number = {(0, 0): []}, 0  # (session, step) -> log_history
    saved = {0: (0, 0)}  # the checkpoint in checkpoint-STEP, which is written over
    for session in range(rng.randint(2, 7)):
        start = rng.choice(sorted(saved)) if session else 0
        logs = list(held[saved[start]])
        values = {"step": start, "resumed": start > 0, "facts": {}}
        if start:
            values["after"] = find_maker(folder, logs, start)
        append_event(folder, "begin", values)
        if not start:
            logs = []
        every, saves = rng.choice([1, 1, 2, 3]), rng.random() < 0.7
        step = start
        for step in range(start + 1, start + rng.randint(1, 6)):
            if step % every == 0:
                number += 1
                logs.append({"step": step, "loss": float(number)})
                append_event(folder, "log", logs[-1])
            if saves:
                held[session, step], saved[step] = list(logs), (session, step)
        if rng.random() < 0.7:  # it came to its end
            append_event(folder, "log", {"step": step, "train_runtime": 1.0})
    return logs, {step: held[key] for step, key in saved.items() if step}


@pytest.mark.parametrize("seed", range(40))
def test_whatever_the_order_the_curve_is_what_the_last_model_has_logged(seed, tmp_path):
    logs, saved = random_run(random.Random(seed), tmp_path)
    history = read_history(tmp_path)
    assert of_steps(history) == logs
    for step, held in saved.items():
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": held}))
        shown = read_history(checkpoint)
        assert (of_steps(shown), shown.status, shown.step) == (held, "checkpoint", step)


def test_a_checkpoint_whose_steps_the_log_does_not_have_is_shown_by_itself(tmp_path):
    write_log(tmp_path, (0, False, {1: 5.0, 2: 4.0, 3: 3.0}))
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    state = {"global_step": 2, "log_history": [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}]}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    history = read_history(checkpoint)
    assert (history.points("loss"), history.from_state) == ([(1, 9.0), (2, 8.0)], True)
    assert find_maker(tmp_path, state["log_history"], 2) is None
    assert find_maker(tmp_path, [{"step": 1, "loss": 5.0}], 2) is None
    assert find_maker(tmp_path / "none", [], 3) is None


@pytest.mark.parametrize("after", [7, -1, True, "0", 1, None])
def test_a_log_that_does_not_say_which_session_it_was_after_has_the_last_that_could(after, tmp_path):
    write_log(tmp_path, (0, False, {1: 5.0, 2: 4.0}), (2, True, {3: 9.0}))
    append_event(tmp_path, "begin", {"step": 1, "resumed": True, "after": after})
    append_event(tmp_path, "log", {"step": 2, "loss": 3.0})
    assert read_history(tmp_path).points("loss") == [(1, 5.0), (2, 3.0)]


def test_no_line_is_drawn_across_a_resume(tmp_path):
    write_log(tmp_path, (0, False, {1: 5.0, 2: 4.0, 3: 7.0}), (2, True, {3: 3.0, 4: 2.0}))
    lines = [tuple(line.get_xdata()) for line in loss_figure(read_history(tmp_path)).axes[0].lines]
    assert (1, 2) in lines
    assert (3, 4) in lines
    assert (3,) in lines, "the lost step, apart"
    assert [2, 2] in [list(line) for line in lines], "where it was resumed"
    assert not any({2, 3} <= set(line) for line in lines)


def test_a_run_begun_anew_in_the_same_folder_is_another_run(tmp_path):
    write_log(tmp_path, (0, False, {1: 5.0}), (0, False, {1: 4.0, 2: 3.0}))
    append_line(tmp_path / SAMPLES, {"step": 0, "prompt": 0, "messages": [], "text": "old", "session": 0})
    append_line(tmp_path / SAMPLES, {"step": 0, "prompt": 0, "messages": [], "text": "new", "session": 1})
    history = read_history(tmp_path)
    assert history.earlier == 1
    assert history.points("loss") == [(1, 4.0), (2, 3.0)]
    assert [sample["text"] for sample in history.samples] == ["new"]


def test_samples_of_lost_steps_do_not_count(tmp_path):
    write_log(tmp_path, (0, False, {1: 5.0, 2: 4.0, 3: 3.0}), (1, True, {2: 3.5}))
    for session, step in ((0, 0), (0, 3), (1, 2)):
        line = {"step": step, "prompt": 0, "messages": [], "text": f"{session} {step}", "session": session}
        append_line(tmp_path / SAMPLES, line)
    assert [sample["text"] for sample in read_history(tmp_path).samples] == ["0 0", "1 2"]


def test_numbers_that_json_does_not_have_come_back(tmp_path):
    write_log(tmp_path, (0, False, {1: math.nan, 2: math.inf, 3: -math.inf, 4: 1.0}))
    for line in (tmp_path / RUN_LOG).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    values = [value for _, value in read_history(tmp_path).points("loss")]
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, -math.inf, 1.0]
    figure = loss_figure(read_history(tmp_path))
    assert [math.isnan(value) for value in figure.axes[0].lines[0].get_ydata()] == [True, True, True, False]
    assert png_of(figure).startswith(b"\x89PNG")


def test_a_line_cut_short_by_a_kill_is_left_out_and_the_next_one_is_whole(tmp_path):
    write_log(tmp_path, (0, False, {1: 5.0}), end=False)
    with (tmp_path / RUN_LOG).open("a") as file:
        file.write('{"event": "log", "step": 2, "lo')
    history = read_history(tmp_path)
    assert (history.unreadable, history.status, history.step) == (0, None, 1), "perhaps it is being written"
    append_event(tmp_path, "log", {"step": 3, "loss": 3.0})
    history = read_history(tmp_path)
    assert history.unreadable == 1
    assert history.points("loss") == [(1, 5.0), (3, 3.0)]


@pytest.mark.parametrize(
    "line", ["null", "3", '{"step": "x"}', '{"event": "log", "step": true}', "[" * 10000, "\x00", '{"event":"log"}']
)
def test_a_line_that_is_no_log_of_ours_is_counted(line, tmp_path):
    write_log(tmp_path, (0, False, {1: 5.0}))
    with (tmp_path / RUN_LOG).open("a") as file:
        file.write(line + "\n")
    history = read_history(tmp_path)
    assert (history.unreadable, history.points("loss")) == (1, [(1, 5.0)])


@pytest.mark.parametrize("make", ["missing", "empty", "no state", "a log of nothing"])
def test_a_folder_without_a_run_is_refused_in_one_line(make, tmp_path):
    folder = tmp_path / "out"
    if make != "missing":
        folder.mkdir()
    if make == "no state":
        (folder / "trainer_state.json").write_text('{"log_history": 3}')
    if make == "a log of nothing":
        (folder / RUN_LOG).write_text("garbage\n")
    with pytest.raises(RunLogError, match=str(folder)) as error:
        read_history(folder)
    assert "\n" not in str(error.value)


def test_a_checkpoint_is_shown_as_it_was(tmp_path):
    write_log(tmp_path, (0, False, {1: 5.0, 2: 4.0, 3: 3.9}))
    append_event(tmp_path, "measured", {"when": "before", "step": 0, "results": {"texts": []}})
    write_log(tmp_path, (2, True, {3: 3.0, 4: 2.0}))
    append_event(tmp_path, "measured", {"when": "after", "step": 4, "results": {"texts": []}})
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    state = {"global_step": 2, "log_history": [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}]}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    history = read_history(checkpoint)
    assert (history.points("loss"), history.status, history.facts["from"]) == ([(1, 5.0), (2, 4.0)], "checkpoint", 0)
    assert list(history.measured) == ["before"]


def test_the_state_of_any_trainer_will_do(tmp_path):
    """`teleflm train`, and any other Trainer, leave no log of ours."""
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        logs = [{"step": step, "loss": 1.0 + step, "epoch": 1.0}, {"loss": 3}]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": logs}))
    history = read_history(tmp_path)
    assert (history.points("loss"), history.from_state) == ([(10, 11.0)], True)


def test_the_average_is_that_of_neighbours_and_shifts_no_trend():
    line = [(step, 3.0 - 0.01 * step) for step in range(1, 201)]
    assert [step for step, _ in smoothed(line)] == list(range(1, 201))
    assert [value for _, value in smoothed(line)] == pytest.approx([value for _, value in line])
    spike = [(step, 10.0 if step == 50 else 1.0) for step in range(1, 101)]
    assert dict(smoothed(spike))[50] == pytest.approx((10 + 6 * 1.0) / 7), "three to either side of a hundred"
    assert dict(smoothed(spike))[54] == 1.0
    assert smoothed(line[:19]) == []
    assert len(smoothed([*line, (201, math.nan)])) == 200


def test_each_number_has_one_place_and_none_is_missing(tmp_path):
    append_event(tmp_path, "begin", {"step": 0, "facts": {}})
    logs = {
        "loss": 1.0,
        "grad_norm": 0.5,
        "learning_rate": 1e-3,
        "learning_rate_matrix": 5e-4,
        "tokens_per_second": 100.0,
        "source_loss/$a_b": 1.0,
        "source_loss/_c": 2.0,
        "rewards/chosen": 0.1,
        "rewards/rejected": 0.0,
        "rewards/margins": 0.1,
        "rewards/accuracies": 0.75,
        "kl": 0.01,
        "completions/mean_length": 12.0,
        "epoch": 1.0,
        "a text": "x",
    }
    for step in (1, 2):
        append_event(tmp_path, "log", {"step": step, **logs})
    figures = other_figures(read_history(tmp_path))
    assert set(figures) == {
        *("learning_rate", "grad_norm", "tokens_per_second", "sources", "rewards", "margins", "accuracies", "other")
    }
    assert [axes.get_title(loc="left") for axes in figures["other"].axes] == ["kl", "completions/mean_length"]
    labels = [line.get_label() for line in figures["sources"].axes[0].lines]
    assert labels == [r"\$a_b", " _c"], "no formula, and none left out of the legend"
    for figure in figures.values():
        assert png_of(figure).startswith(b"\x89PNG")


def test_loss_png_needs_no_display_and_is_the_same_from_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # which would look for one
    write_log(tmp_path, (0, False, {1: 5.0, 2: 4.0}))
    history = read_history(tmp_path)
    assert write_loss_plot(history, tmp_path / "a.png")
    assert write_loss_plot(history, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    (tmp_path / "empty").mkdir()
    append_event(tmp_path / "empty", "begin", {"step": 0})
    assert not write_loss_plot(read_history(tmp_path / "empty"), tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()
