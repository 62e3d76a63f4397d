# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The benchmarks' own accounts: what is run, what is kept, and the page that is made of it."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def results(monkeypatch):
    """The module, imported as the scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import results

    return results


@pytest.fixture
def runner(results):
    from benchmarks import __main__ as runner

    return runner


@pytest.fixture
def section(results):
    return results.Section(
        title="A table",
        date="2026-01-02 03:04",
        command="python benchmarks/table.py",
        about="Of something.",
        columns=["", "x", "GB"],
        rows=[["ours", "1.10 (0.95 - 1.20)", "1,024"], ["also ours", "0.90 (0.80 - 0.95)", ""], ["cp", "0.50", "1/4"]],
        goals=[],
    )


def test_every_script_is_run_or_named_with_the_reason(runner):
    there = {entry.name for entry in BENCHMARKS.iterdir() if entry.suffix == ".py" or (entry / "__main__.py").exists()}
    run = [small.script for small in runner.RUN]
    assert len(run) == len(set(run))
    assert not set(run) & set(runner.NOT_RUN)
    assert there == {*run, *runner.NOT_RUN}
    assert all(runner.NOT_RUN.values())


def test_options_of_the_runner_are_options_of_the_scripts(runner):
    for small in runner.RUN:
        script = (BENCHMARKS / small.script).read_text() + (BENCHMARKS / "measure.py").read_text()
        for option in (word for word in small.options if word.startswith("--")):
            named = f'"{option}"' in script or f'("{option[2:]}", ' in script
            assert named, f"{small.script} has no {option}"


def test_the_page_is_made_of_the_data(results):
    assert results.PAGE.read_text() == results.render(results.read()), "python benchmarks --render"


def test_no_claim_has_two_sections(results):
    titles = [section.title for section in results.read()]
    assert len(titles) == len(set(titles))


def test_a_section_takes_the_place_of_the_older_one(results, section, tmp_path):
    data, page = tmp_path / "results.json", tmp_path / "RESULTS.md"
    other = results.Section("Another", "2026-01-01 00:00", "c", "a", ["x"], [["1"]], [])
    results.write(results.put_on_top(section, [other, section]), data, page)
    assert results.read(data) == [section, other]
    assert page.read_text().count("## A table\n") == 1
    assert page.read_text() == results.render(results.read(data))


@pytest.mark.parametrize(
    ("cell", "value", "least", "most"),
    [
        ("1.13 (1.02 - 1.23)", 1.13, 1.02, 1.23),
        ("0.995 [0.950, 1.043]", 0.995, 0.95, 1.043),
        ("1,024", 1024, None, None),
        ("3.4e-07", 3.4e-07, None, None),
        ("1/79", 1 / 79, None, None),
        ("98.24%", 98.24, None, None),
        ("-53", -53, None, None),
        ("0 of 49,000", 0, None, None),
    ],
)
def test_the_figure_of_a_cell(results, cell, value, least, most):
    assert results.figure_of(cell) == results.Figure(pytest.approx(value), least, most)


@pytest.mark.parametrize("cell", ["", "none", "certified"])
def test_cells_without_a_figure(results, cell):
    assert results.figure_of(cell) is None


@pytest.mark.parametrize(
    ("options", "value", "held"),
    [
        ({"bound": 1.0, "at_least": True, "rows": "^ours"}, 1.1, "yes"),
        ({"bound": 1.15, "at_least": True, "rows": "^ours"}, 1.1, "within the spread"),
        ({"bound": 1.0, "at_least": True, "rows": "ours"}, 0.9, "no"),  # the worst of two rows
        ({"bound": 1.0, "rows": "ours"}, 1.1, "within the spread"),
        ({"bound": 0.9, "rows": "^ours"}, 1.1, "no"),
    ],
)
def test_whether_a_goal_is_held(results, section, options, value, held):
    goal = results.Goal("a claim", "x", **options)
    figure = results.worst(goal, section)
    assert figure.value == value
    assert results.held(goal, figure) == held


def test_a_goal_that_no_row_has_a_figure_for(results, section):
    goal = results.Goal("a claim", "GB", 1, rows="also")
    assert results.held(goal, results.worst(goal, section)) == "not measured"


def test_the_summary_has_a_row_a_goal(results, section):
    import dataclasses

    goals = [results.Goal("fast", "x", 1.0, at_least=True, rows="^ours"), results.Goal("small", "GB", 0.3, rows="cp")]
    found = results.summary([dataclasses.replace(section, goals=goals)])
    link = "[A table](#a-table)"
    assert found == [
        ("fast", link, "1.1", "0.95 - 1.2", ">= 1", "yes", "2026-01-02"),
        ("small", link, "0.25", "", "<= 0.3", "yes", "2026-01-02"),
    ]


def test_the_runner_lists_what_it_runs():
    said = subprocess.run(
        [sys.executable, str(BENCHMARKS), "--list"], capture_output=True, text=True, check=True
    ).stdout
    assert "python benchmarks/planning.py --pairs 3" in said
    assert "not run: measure.py (what the scripts share)" in said


def test_the_runner_refuses_a_name_it_does_not_run():
    done = subprocess.run([sys.executable, str(BENCHMARKS), "measure"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "measure; see --list" in done.stderr
