# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""`teleflm convert hf://OWNER/NAME` against the same from a folder, and against downloading it first.

The Hub is that of the tests, on this machine and in Python: what it serves bounds the rate, and no network is between.
What counts is that nothing is downloaded before it is written, and the memory that this takes.
"""

import sys
from functools import partial
from pathlib import Path

from measure import ROOT, TELEFLM, Run, arguments, cpu_seconds, mib, report, run_processes, seconds, workplace
from synthetic import tele_flm_config, write_bin

sys.path.insert(0, str(ROOT))

from tests.fixtures.hub import running_hub

REPO = "owner/model"
DOWNLOAD = f"from huggingface_hub import snapshot_download; snapshot_download({REPO!r}, local_dir='DOWNLOADED')"


def main() -> None:
    parser = arguments(__doc__, size=0.5, pairs=5)
    options = parser.parse_args()
    with workplace(options.folder) as place, running_hub() as hub:
        files = write_bin(place / "source", tele_flm_config(options.size))
        hub.add_repository(REPO, {path.name: path for path in (place / "source").iterdir()})
        environment = hub.environment(HF_HUB_DISABLE_XET="1")
        contestants = {
            "convert a folder": partial(convert, str(place / "source"), {}),
            "convert hf://": partial(convert, f"hf://{REPO}", environment),
            "convert hf://, 8 threads": partial(convert, f"hf://{REPO}", environment, "--workers", "8"),
            "download alone": partial(download, place / "downloaded", environment),
        }
        runs: dict[str, list[Run]] = {name: [] for name in contestants}
        for number in range(options.pairs):
            for name, contestant in contestants.items():
                runs[name].append(contestant(place / f"out{number}{name.replace(' ', '')}"))
        rows = [[name, seconds(found), cpu_seconds(found), mib(found)] for name, found in runs.items()]
        about = f"One file of {files[0].stat().st_size:,} bytes; {options.pairs} rounds."
        report("Sources on the Hub", options.folder, about, ["", "seconds", "of processors", "RSS, MiB"], rows)


def convert(source: str, environment: dict[str, str], *more: object) -> Run:
    *arguments_, out = map(str, more)
    return run_processes([*TELEFLM, "convert", source, out, *arguments_], environments=[environment])


def download(folder: Path, environment: dict[str, str], _: Path) -> Run:
    code = DOWNLOAD.replace("DOWNLOADED", str(folder))
    return run_processes(
        [sys.executable, "-c", f"import shutil; shutil.rmtree({str(folder)!r}, True); {code}"],
        environments=[environment],
    )


if __name__ == "__main__":
    main()
