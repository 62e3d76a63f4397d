# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
import json
import sys
import time
from pathlib import Path

import pytest

from sft.rewards import sandbox_child
from sft.rewards.builtin import code_of, same_answer
from sft.rewards.reward import RewardError
from sft.rewards.sandbox import Limits, check_sandbox
from sft.rewards.spec import load_rewards, parse_rewards
from tests.sft.test_sandbox import needs_namespaces


def reward(spec):
    return load_rewards(parse_rewards(spec))[0]


def ask(function, *texts, **columns):
    """Call it as TRL does, with one row for all completions."""
    return function(
        prompts=[[{"role": "user", "content": "?"}]] * len(texts),
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        completion_ids=[[1]] * len(texts),
        source=[f"rows.jsonl:{index + 1}" for index in range(len(texts))],
        columns=[json.dumps(columns)] * len(texts),
        trainer_state=None,
        log_extra=None,
        log_metric=None,
    )


@pytest.mark.parametrize(
    ("completion", "answer", "is_right"),
    [
        ("42", "42", 1),
        ("42", 42, 1),
        ("42.0", 42, 1),
        ("1,234", "1234", 1),
        ("12,34", "1234", 0),
        ("$5.50.", "5.5", 1),
        ("-3", "3", 0),
        (".5", "5", 0),
        (".5", "0.50", 1),
        ("$5$", "5", 1),
        ("5%.", "5", 1),
        ("1e2", "100", 1),
        ("1E+2", 100, 1),
        ("0.00001", 0.00001, 1),
        ("1e-05", 0.00001, 1),
        ("1e-5", "0.00001", 1),
        ("0.00002", 0.00001, 0),
        ("10000000000000000", 1e16, 1),
        ("10000000000000000000000", 1e22, 1),
        ("1" + "0" * 300, 1e300, 1),
        ("0." + "0" * 323 + "5", 5e-324, 1),
        ("-0", 0.0, 1),
        ("12345678901234567", 12345678901234567.0, 1),
        ("12345678901234567", "12345678901234568", 0),
        ("12345678901234567", 12345678901234568, 0),
        ("1e999", 1e300, 0),
        ("0.10", 0.1, 1),
        ("0.1000000001", 0.1, 0),
        ("\u22125", "-5", 1),
        ("-5", "\u22125", 1),
        ("+7", 7, 1),
        ("1e", "1", 0),
        ("e5", "5", 0),
        ("1e9999", "1e9999", 1),
        ("-", "+", 0),
        ("Paris.", " paris", 1),
        ("Par is", "Paris", 0),
        ("４２", "42", 1),
        ("So it is 42", "42", 0),
        ("6 * 7 = 42\n#### 42", "Six sevens.\n#### 42", 1),
        ("#### 41\n#### 42", "42", 1),
        (r"First \boxed{41}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}", 1),
        (r"\boxed{42", "42", 0),
        (r"#### 41, that is \boxed{42}", "42", 1),
        ("", "42", 0),
        (".", "$", 0),
        ("10\u2075", "105", 0),
        ("10\u207b\u2075", "10^-5", 1),
        ("2\u00b2", 22, 0),
        ("x\u2082", "x2", 0),
        ("x\u2082", "x_2", 1),
        ("0,123", "123", 0),
        ("000,123", 123, 0),
        ("1,000,123", 1000123, 1),
    ],
)
def test_exact_match(completion, answer, is_right):
    assert ask(reward("exact_match"), completion, answer=answer) == [is_right]


def test_exact_match_by_a_pattern_and_another_column():
    function = reward({"exact_match": {"column": "solution", "pattern": r"answer is (\S+)"}})
    texts = ["the answer is 1, no, the answer is 42", "42", "the answer is 41"]
    assert ask(function, *texts, solution="the answer is 42") == [1, 0, 0]
    assert ask(function, *texts, answer="42") == [None] * 3
    assert ask(function, *texts, solution="42") == ask(function, *texts, solution=42) == [1, 0, 0], "a bare answer"
    assert function.fault({"solution": 42}) is None
    assert function.fault({"solution": r"\boxed{"}) == "solution holds no answer"
    assert function.fault({"solution": float("inf")}) == "solution is inf; expected a text or a finite number"
    assert function.fault({"solution": ["42"]}) == "solution is of type list; expected a text or a number"
    assert not same_answer(None, "1")


def test_patterns_match_or_not():
    assert ask(reward({"regex": {"pattern": "b+"}}), "abbc", "ac") == [1, 0]
    assert ask(reward({"regex": {"pattern": "b+", "match": "fullmatch"}}), "abbc", "bb") == [0, 1]
    by_row = reward({"regex": {"column": "wanted"}})
    assert ask(by_row, "abc", wanted="^a") == [1]
    assert ask(by_row, "abc") == [None]
    assert "no regular expression" in by_row.fault({"wanted": "("})
    assert "RecursionError" in by_row.fault({"wanted": "(" * 5000 + ")" * 5000})
    assert by_row.fault({"wanted": 3}).endswith("a pattern is of type int; expected a text.")
    assert ask(by_row, "a" * 40, wanted="(?R)") == [0], "a pattern that calls itself without end"


def test_a_pattern_that_tries_without_end_is_stopped():
    function = reward({"regex": {"pattern": r"^(a|a?)+$", "seconds": 0.2}})
    begun = time.monotonic()
    assert ask(function, "a" * 5000 + "!") == [0]
    assert time.monotonic() - begun < 3


def test_code_is_taken_from_the_last_block():
    assert code_of("a\n```python\nx = 1\n```\nb\n```python\ny = 2\n```") == "y = 2\n"
    assert code_of("x = 1") == "x = 1"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```bash\npip list\n```\nThen:\n```python\nx = 1\n```\n", "x = 1\n"),
        ("```python\nx = 1\n```\nOutput:\n```text\n3\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nOutput:\n```\n3\n```", "x = 1\n"),
        ("```python\nx = 0\n```\n```json\n{}\n```\nprose\n```python\nx = 1\n```", "x = 1\n"),
        ("```python3\nx = 1\n```", "x = 1\n"),
        ("``` Py\nx = 1\n```", "x = 1\n"),
        ("```python\r\nx = 1\r\n```", "x = 1\n"),
        ("```python title=a.py\nx = 1\n```", "x = 1\n"),
        ("~~~python\nx = '''\n```\n'''\n~~~", "x = '''\n```\n'''\n"),
        ("````python\n```\n````", "```\n"),
        ("1. So:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("```python\nx = 1", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = '\u2028'\n```", "x = '\u2028'\n"),
        ("```json\n{}\n```", "```json\n{}\n```"),
        ("an ```inline``` one", "an ```inline``` one"),
    ],
)
def test_blocks_are_those_of_markdown(text, code):
    assert code_of(text) == code


def test_tests_are_run():
    function = reward({"python_tests": {"partial": True, "namespaces": False, "seconds": 5}})
    tests = ["assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 0"]
    right, wrong = "Here:\n```python\ndef f(x): return x + 1\n```", "def f(x): return 0"
    assert ask(function, right, wrong, "no code at all", tests=tests) == pytest.approx([2 / 3, 1 / 3, 0])
    whole = reward({"python_tests": {"column": "check", "namespaces": False}})
    assert ask(whole, right, wrong, check="assert f(1) == 2\nassert f(5) == 6") == [1, 0]
    assert ask(whole, right) == [None]
    assert whole.fault({"check": "def"}).startswith("check is no Python")
    assert whole.fault({"check": [1]}) == "check is neither a text nor a list of texts"


@pytest.mark.parametrize(
    "tests",
    [
        *('["assert f(1) == 2", "assert f(2) == 3"]', '{"input": [1], "output": [2]}', "   \n", "# check f", "'f(1)'"),
        *(
            ["assert f(1) == 2", ""],
            ["pass"],
            "def check(f):\n    assert f(1) == 2\n",
            ["def a(): 1 / 0", "def b(): a()"],
        ),
    ],
    ids=str,
)
def test_tests_that_no_code_can_fail_are_refused(tests):
    assert "so that any code passes" in reward("python_tests").fault({"tests": tests})


@pytest.mark.parametrize(
    "tests",
    ["assert f(1) == 2", "def check(f):\n    assert f(1)\ncheck(f)", ["def check(f): f(1)", "check(f)"], "f(1)"],
)
def test_tests_that_can_be_failed_are_taken(tests):
    assert reward("python_tests").fault({"tests": tests}) is None


def test_a_machine_without_the_sandbox_is_told_before_the_run(monkeypatch, tmp_path):
    check_sandbox.cache_clear()
    child = tmp_path / "child.py"
    source = Path(sandbox_child.__file__).read_text()
    child.write_text(source.replace("def _cut_off(", "def _cut_off(*_): 1 / 0\n\n\ndef _unused(", 1))
    monkeypatch.setattr("sft.rewards.sandbox._CHILD", child)
    with pytest.raises(
        RewardError, match=r"python_tests: code cannot be run here .*division by zero.* namespaces: false"
    ):
        reward("python_tests").check()
    reward({"python_tests": {"namespaces": False}}).check()
    check_sandbox.cache_clear()
    monkeypatch.setattr("sft.rewards.sandbox._CHILD", __file__)
    with pytest.raises(RewardError, match="cannot be run here with any limits; drop python_tests") as error:
        reward("python_tests").check()
    assert "namespaces" not in str(error.value), "that would not help"
    check_sandbox.cache_clear()
    assert Limits().namespaces, "the strict one is what is had without asking"


@pytest.mark.parametrize("namespaces", [pytest.param(True, marks=needs_namespaces), False])
@pytest.mark.parametrize("setting", [{"memory_mb": 1}, {"memory_mb": 16}], ids=str)
def test_limits_that_are_too_small_are_what_is_said_to_be_wrong(setting, namespaces):
    name, value = next(iter(setting.items()))
    with pytest.raises(RewardError, match=rf"leave it no room \({name} is {value}, .* unless set\)") as error:
        reward({"python_tests": {**setting, "namespaces": namespaces}}).check()
    assert "namespaces" not in str(error.value)


FILE = """
COUNT = []
def brevity(completions, **kwargs):
    return [-len(completion[0]["content"]) for completion in completions]
def of_row(completions, answer, extra=None):
    COUNT.append(len(completions))
    return [float(completion[0]["content"] == value) for completion, value in zip(completions, answer)]
def fails(completions, answer):
    return [1 / (len(completion[0]["content"]) - 2) for completion in completions]
def fails_on_many(completions):
    return [1 / (2 - len(completions))] * len(completions)
async def later(completions, answer):
    return [None for _ in completions]
def leaves(completions):
    import sys; sys.exit(0)
async def cancelled(completions):
    import asyncio; raise asyncio.CancelledError
def deep(completions): return deep(completions)
def full(completions): raise MemoryError
def mute(completions):
    class Mute(Exception):
        def __str__(self): raise SystemExit
    raise Mute
def red(completions): raise ValueError("a\\x1b[31mred\\u202e\\nline")
def generates(completions):
    yield 1.0
    raise SystemExit
def odd(completions):
    class Odd:
        def __float__(self): raise SystemExit
        def __repr__(self): raise SystemExit
    return [Odd() for _ in completions]
def several(completions):
    import torch
    return torch.ones(len(completions), 2)
def spelled(completions): return ["1.0" for _ in completions]
def interrupted(completions): raise KeyboardInterrupt
import dataclasses, pickle
@dataclasses.dataclass
class Judged:
    text: "str"
def keeps(completions):
    return [float(pickle.loads(pickle.dumps(Judged(each[0]["content"]))).text == "a") for each in completions]
def short(completions): return [1.0]
def large(completions): return [1e39 for _ in completions]
def of_bytes(completions): return bytes(len(completions))
def of_keys(completions): return {1.0 * at: 0 for at, _ in enumerate(completions)}
def of_a_set(completions): return {1.0 * at for at, _ in enumerate(completions)}
def infinite(completions): return [float("inf") for _ in completions]
def words(completions): return ["good" for _ in completions]
def positional(completions, /): return []
value = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(FILE)
    return path


def test_functions_of_a_file_get_what_they_name(file):
    assert ask(reward(f"{file}:brevity"), "abc", "a", answer="a") == [-3, -1]
    of_row = reward(f"{file}:of_row")
    assert ask(of_row, "abc", "a", answer="a", other=[1, {"b": None}]) == [0, 1]
    assert of_row.fault({"other": 1}) == "it needs answer, which the row does not have"
    assert ask(reward(f"{file}:later"), "a", answer="a") == [None]
    assert of_row.describe()["name"] == "my.py:of_row"
    assert len(of_row.describe()["digest"]) == 32
    assert of_row._function.__globals__ is reward(f"{file}:fails")._function.__globals__, "loaded once"


@pytest.mark.parametrize(
    ("name", "texts", "message"),
    [
        ("fails", ["a", "ab", "c"], "my.py:fails failed on rows.jsonl:2: .*division by zero"),
        ("fails_on_many", ["a", "b"], "failed on rows.jsonl:1 to rows.jsonl:2 together, on none of them alone"),
        ("short", ["a", "b"], "returned 1 rewards for 2 completions"),
        ("large", ["a"], r"returned 1e\+39 for a completion of rows.jsonl:1, which with its weight 1.0 is more than"),
        ("of_bytes", ["a"], "returned a bytes; return a list"),
        ("of_keys", ["a"], "returned a dict; return a list"),
        ("of_a_set", ["a"], "returned a set; return a list"),
        ("infinite", ["a"], "returned inf for a completion of rows.jsonl:1"),
        ("leaves", ["a"], "my.py:leaves failed on rows.jsonl:1: SystemExit"),
        ("cancelled", ["a"], "failed on rows.jsonl:1: CancelledError"),
        ("deep", ["a"], "failed on rows.jsonl:1: RecursionError"),
        ("full", ["a"], "failed on rows.jsonl:1: MemoryError"),
        ("mute", ["a"], "failed on rows.jsonl:1: Mute$"),
        ("red", ["a"], r"failed on rows.jsonl:1: a\\x1b\[31mred\\u202e line$"),
        ("generates", ["a"], "failed on rows.jsonl:1: SystemExit"),
        ("odd", ["a"], "returned a Odd for a completion of rows.jsonl:1"),
        ("several", ["a"], r"returned tensor\(\[1., 1.\]\) for a completion of rows.jsonl:1"),
        ("spelled", ["a"], "returned '1.0' for a completion of rows.jsonl:1"),
        ("words", ["a"], "returned 'good' for a completion of rows.jsonl:1"),
    ],
)
def test_what_fails_is_told_with_the_function_and_the_row(name, texts, message, file):
    with pytest.raises(RewardError, match=message) as error:
        ask(reward(f"{file}:{name}"), *texts, answer="a")
    assert "\n" not in str(error.value)


def test_who_interrupts_is_the_user(file):
    with pytest.raises(KeyboardInterrupt):
        ask(reward(f"{file}:interrupted"), "a")


@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"])
def test_a_file_may_define_classes(future, tmp_path):
    (tmp_path / "my.py").write_text(future + FILE)
    assert ask(reward(f"{tmp_path / 'my.py'}:keeps"), "a", "b") == [1, 0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "reward_funcs is empty"),
        ("exact", "expected exact_match, regex, python_tests, or FILE.py:function"),
        ({"exact_match": 3}, "expected a name, or one name: {settings}"),
        ({"regex": {}, "exact_match": {}}, "expected a name, or one name"),
        ([["exact_match"]], "expected a name"),
        ({"exact_match": {"colum": "a"}}, "exact_match has no setting colum; it has column, pattern"),
        ({"exact_match": {"column": 3}}, "column is 3, of type int"),
        ({"exact_match": {"pattern": "("}}, "'\\(' is no regular expression"),
        ("regex", "needs either a pattern or a column"),
        ({"regex": {"pattern": "a", "match": "x"}}, "match is 'x'; expected search or fullmatch"),
        ({"regex": {"pattern": "a", "seconds": 0}}, "seconds is 0"),
        ({"python_tests": {"second": 3}}, "no setting second; it has column, partial, workers, file_mb"),
        ({"python_tests": {"seconds": -1}}, "seconds is -1; expected a number above 0"),
        ({"python_tests": {"seconds": 10**400}}, "seconds is 1000.*expected a number above 0, at most 86400"),
        ({"python_tests": {"memory_mb": 10**30}}, "memory_mb is 1000.*at most"),
        (
            {"regex": {"pattern": "a", "seconds": 1e300}},
            r"seconds is 1e\+300; expected a number above 0, at most 86400",
        ),
        ({"regex": {"pattern": "(" * 5000 + ")" * 5000}}, "is no regular expression: RecursionError"),
        ("a\0.py:f", "cannot be read: embedded null byte"),
        ({"python_tests": {"workers": 0}}, "workers is 0"),
        ({"python_tests": {"partial": 1}}, "partial is 1, of type int"),
        ("absent.py:f", "absent.py cannot be read: No such file"),
        ({"FILE:brevity": {"a": 1}}, "takes no settings"),
        ("FILE:absent", "has no function absent"),
        ("FILE:value", "has no function value"),
        ("FILE", "expected exact_match"),
    ],
    ids=str,
)
def test_what_a_recipe_gets_wrong_is_one_line(spec, message, file):
    spec = json.loads(json.dumps(spec).replace("FILE", str(file)))
    with pytest.raises(RewardError, match=message) as error:
        load_rewards(parse_rewards(spec))
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_loaded_is_one_line(tmp_path):
    (tmp_path / "broken.py").write_text("import absent_package\n")
    with pytest.raises(RewardError, match=r"broken.py cannot be loaded: .*absent_package"):
        reward(f"{tmp_path / 'broken.py'}:f")
    for code, said in (("raise SystemExit('bye')", "SystemExit: bye"), ("def f(): f()\nf()", "RecursionError")):
        (tmp_path / "broken.py").write_text(code)
        with pytest.raises(RewardError, match=f"broken.py cannot be loaded: {said}"):
            reward(f"{tmp_path / 'broken.py'}:f")
    assert not [
        name for name in sys.modules if name.startswith("teleflm_rewards") and "broken" in str(sys.modules[name])
    ]
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(RewardError, match=r"broken.py cannot be loaded: .*invalid syntax"):
        reward(f"{tmp_path / 'broken.py'}:f")


def test_two_of_a_kind_have_two_names():
    rewards = load_rewards(parse_rewards([{"regex": {"pattern": "a"}}, {"regex": {"pattern": "b"}}]))
    assert [function.__name__ for function in rewards] == ["regex", "regex_2"]


def test_no_two_have_one_name_in_the_metrics(tmp_path):
    """TRL logs `rewards/NAME/mean`, and would log the mean of two functions of one name."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(
            "def score(completions): return [1.0]\ndef regex(completions): return [1.0]\n"
        )
    specs = [
        "a.py:score",
        "b.py:score",
        "b.py:regex",
        {"regex": {"pattern": "a"}},
        "a.py:score",
        {"regex": {"pattern": "b"}},
    ]
    rewards = load_rewards(parse_rewards([f"{tmp_path}/{spec}" if isinstance(spec, str) else spec for spec in specs]))
    names = [function.__name__ for function in rewards]
    assert names == ["score", "score_2", "regex", "regex_2", "score_3", "regex_2_2"]
    described = [function.describe()["name"] for function in rewards]
    assert described == ["a.py:score", "b.py:score", "b.py:regex", "regex", "a.py:score", "regex_2"]
