# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Transformers' own common model tests, on TeleFLM and on stock Llama: no outcome may be worse on TeleFLM.

    TRANSFORMERS_TESTS=/path/to/transformers pytest -m external tests/external/test_transformers_suite.py

Use a checkout at the tag of the installed version. Without the variable, the tests that ship in the source distribution
of that version are downloaded and run; they are about half. Both need `pip install parameterized httpx`.
"""

import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import transformers

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).with_name("transformers_suite_cases.py")
WORST_FIRST = ["failed", "skipped", "passed"]


@pytest.fixture
def transformers_root(request):
    """A folder whose `tests` holds transformers' tests."""
    if given := os.environ.get("TRANSFORMERS_TESTS"):
        root = Path(given).resolve()
    else:
        root = unpacked_source_distribution(request.config.cache.mkdir("transformers"))
    common = root / "tests" / "test_modeling_common.py"
    assert common.is_file(), f"there is no {common}; set TRANSFORMERS_TESTS to the root of a transformers checkout"
    return root


def unpacked_source_distribution(cache):
    name = f"transformers-{transformers.__version__}"
    archive, root = cache / f"{name}.tar.gz", cache / name
    if not archive.is_file():
        requirement = f"transformers=={transformers.__version__}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", requirement]
        download = subprocess.run([*command, "-d", cache], capture_output=True, text=True, check=False)
        if download.returncode:
            pytest.skip(f"{name} has not been downloaded: {download.stderr.strip().splitlines()[-1]}")
    if not root.is_dir():
        with tarfile.open(archive) as tar:
            tar.extractall(cache, [member for member in tar if member.name.startswith(f"{name}/tests/")], filter="data")
        (root / "tests" / "__init__.py").touch()  # so that no other package is taken for it
    return root


def outcomes(report):
    """{test class: {test: worst outcome of it and its subtests}} of a JUnit report."""
    results = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        tests = results.setdefault(case.get("classname").rpartition(".")[2], {})
        tests[case.get("name")] = min(outcome, tests.get(case.get("name"), outcome), key=WORST_FIRST.index)
    return results


@pytest.mark.external
def test_no_outcome_is_worse_than_llamas(transformers_root, tmp_path):
    pytest.importorskip("parameterized", reason="transformers' tests need it: pip install parameterized")
    (tmp_path / "test_cases.py").write_text(CASES.read_text())
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(transformers_root), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        ".",
        "--junitxml",
        "report.xml",
    ]
    run = subprocess.run(
        [*command, "test_cases.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    results = outcomes(tmp_path / "report.xml")
    assert results.keys() == {"LlamaTest", "TeleFLMTest"}, run.stdout[-3000:]
    llama, ours = results["LlamaTest"], results["TeleFLMTest"]
    for name, tests in results.items():
        print(f"{name}: {len(tests)} tests, {dict(Counter(tests.values()))}")
    assert ours.keys() == llama.keys()
    worse = {
        test: (llama[test], ours[test])
        for test in llama
        if WORST_FIRST.index(ours[test]) < WORST_FIRST.index(llama[test])
    }
    assert not worse
    assert Counter(llama.values())["passed"] > 100
