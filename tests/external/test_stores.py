# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A checkpoint in S3, by its real client, of a server on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conversion import convert_checkpoint
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.external
ROOT = Path(__file__).parents[2]


@pytest.fixture
def s3(monkeypatch):
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    variables = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    variables |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield variables
    server.stop()


def test_a_bucket_is_read_by_ranges(s3, tmp_path):
    import s3fs

    source = tmp_path / "source"
    tiny_model().save_pretrained(source, max_shard_size="100KB")
    tiny_tokenizer(source).save_pretrained(source)
    store = s3fs.S3FileSystem(endpoint_url=s3["AWS_ENDPOINT_URL"])
    store.mkdir("bucket")
    for path in source.iterdir():
        store.put_file(str(path), f"bucket/models/m/{path.name}")
    convert_checkpoint(source, tmp_path / "local")
    command = [sys.executable, "-m", "teleflm", "convert", "s3://bucket/models/m", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **s3}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    local, remote = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("local", "out"))
    assert remote == local
    missing = [*command[:4], "s3://bucket/models/none", str(tmp_path / "other")]
    result = subprocess.run(missing, cwd=ROOT, env={**os.environ, **s3}, capture_output=True, text=True, check=False)
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert "s3://bucket/models/none: no such file or folder" in result.stderr
