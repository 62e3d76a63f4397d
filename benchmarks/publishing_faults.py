# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Publishing and streaming, stopped at random places: does the repository always load, is anything sent twice?

The real client, in processes of its own, against the strict Hub of the tests on this machine. At a random request of a
publication, one of: a status (403, 429, 500, 503), a pause, a cut or garbled answer, a lost request or answer, or the
process is killed. At every request the repository has to hold the old version whole or the new one. Then the
command is run again, and has to complete with the same bytes. Streaming likewise, with killed processes and the most
that lay on the disk.
"""

import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from measure import ROOT, arguments, report, workplace
from results import Goal

sys.path.insert(0, str(ROOT))

from conversion import WriteOptions, convert_checkpoint
from tests.fixtures.hub import Fault, running_hub
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

GOALS = (
    Goal("a repository is whole wherever publishing stops", "repository not whole", 0),
    Goal("publishing again sends no byte twice", "bytes sent twice", 0),
    Goal("no published byte is wrong", "wrong bytes", 0),
)

REPO = "owner/model"
FAULTS = {
    "status 403": Fault.status(403, "Forbidden"),
    "status 429": Fault.status(429),
    "status 500": Fault.status(500),
    "status 503": Fault.status(503),
    "pause": Fault.stall(0.3),
    "answer cut": Fault.cut(20),
    "answer garbled": Fault.wrong_length(),
    "request lost": Fault.drop(),
    "answer lost": Fault.drop(after_effect=True),
    "killed": None,
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    with workplace(options.folder) as place:
        rows = [*publish_rows(place, options.points), stream_row(place, options.kills)]
        columns = ["fault", "runs", "failed, then completed", "repository not whole", "bytes sent twice", "wrong bytes"]
        report(
            "Publishing, stopped anywhere", options.folder, f"{options.points} points, seed 0.", columns, rows, GOALS
        )


def make(place: Path, layers: int) -> Path:
    folder = place / f"source{layers}"
    tiny_model(tiny_config(num_hidden_layers=layers)).save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return folder


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if ".safetensors" in name}


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


def publish_rows(place: Path, points: int) -> list[list[str]]:
    """A row for each kind of fault."""
    convert_checkpoint(make(place, 3), place / "v1")
    convert_checkpoint(make(place, 4), place / "v2", options=WriteOptions(max_shard_size="60KB"))
    old, new = read(place / "v1"), read(place / "v2")
    chance, counts = random.Random(0), {kind: Counter() for kind in FAULTS}
    for number in range(points):
        kind = list(FAULTS)[number % len(FAULTS)]
        counts[kind].update(try_once(place, old, new, kind, chance.randrange(1, 40)))
    return [
        [kind, *(str(count[name]) for name in ("runs", "failed", "not whole", "twice", "wrong"))]
        for kind, count in counts.items()
    ]


def try_once(place: Path, old: dict[str, bytes], new: dict[str, bytes], kind: str, at: int) -> Counter[str]:
    found: Counter[str] = Counter(runs=1)
    shutil.rmtree(place / "v2/.cache", ignore_errors=True)
    with running_hub() as hub:
        hub.lfs_threshold = 20_000
        hub.add_repository(REPO, {path.name: path for path in (place / "v1").iterdir()})
        running: list[subprocess.Popen[str]] = []
        count = [0]

        def strike(_: object) -> Fault | None:
            found["not whole"] += weights(hub.repositories[REPO].files()) not in (old, new)
            count[0] += 1
            if count[0] == at and FAULTS[kind] is None:
                running[-1].send_signal(signal.SIGKILL)
            return FAULTS[kind] if at <= count[0] < at + 8 else None

        def run() -> int:
            command = [sys.executable, "-m", "teleflm", "publish", str(place / "v2"), REPO, "--no-load", "--no-check"]
            environment = hub.environment(HF_HUB_DISABLE_XET="1")
            running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
            _, said = running[-1].communicate()
            found["token said"] += "hf_test" in said
            return running[-1].returncode

        hub.fault = strike
        found["failed"] += run() != 0
        sent = dict(hub.received)
        hub.fault = None
        found["wrong"] += run() != 0 or weights(hub.repositories[REPO].files()) != new
        whole = {digest: len(content) for (_, digest), content in hub.objects.items()}
        found["twice"] += sum(
            hub.received[digest] - nbytes for digest, nbytes in sent.items() if nbytes == whole.get(digest)
        )
    return found


def stream_row(place: Path, kills: int) -> list[str]:
    """One conversion of 64 files or more, killed again and again."""
    source = make(place, 24)
    convert_checkpoint(source, place / "expected", options=WriteOptions(max_shard_size="13KB"))
    expected = read(place / "expected")
    budget, work, most = 260_000, place / "work", [0]
    command = [sys.executable, "-m", "teleflm", "convert", source, f"hf://{REPO}", "--low-disk", str(budget)]
    command += ["--max-shard-size", "13KB", "--work", work, "--json"]
    chance, running, found = random.Random(1), [], Counter()
    with running_hub() as hub:
        hub.lfs_threshold = 20_000

        def run(kill_at: int) -> int:
            count = [0]

            def strike(_: object) -> None:
                most[0] = max(most[0], sum(path.stat().st_size for path in work.glob("*.partial") if path.exists()))
                count[0] += 1
                if count[0] == kill_at:
                    running[-1].send_signal(signal.SIGKILL)

            hub.fault = strike
            environment = hub.environment(HF_HUB_DISABLE_XET="1")
            started = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
            running.append(started)
            return started.wait()

        for _ in range(kills):
            found["failed"] += run(chance.randrange(5, 25)) != 0
        found["wrong"] += run(0) != 0 or weights(hub.repositories[REPO].files()) != expected
        whole = {digest: len(content) for (_, digest), content in hub.objects.items()}
        twice = sum(nbytes - whole[digest] for digest, nbytes in hub.received.items())
    files = sum(name.endswith(".safetensors") for name in expected)
    name = f"streaming {files} files, killed; at most {most[0]:,} of {budget:,} bytes on disk"
    return [name, str(kills + 1), str(found["failed"]), "0", str(twice), str(found["wrong"])]


if __name__ == "__main__":
    main()
