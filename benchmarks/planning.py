# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Planning without writing: a dry run of 52B to 1T, and of the 1T's 75 `.bin` files to safetensors.

The sources have real headers, and holes where the weights would be. Bound: 2 s for the 75 files.
"""

from measure import TELEFLM, arguments, mib, report, run_processes, seconds, workplace
from results import Goal
from synthetic import write_bin, write_safetensors

from conversion.architecture import load_preset

GOALS = (Goal("75 files are planned in 2 s", "seconds", 2, rows=r"^convert"),)

BIN_FILES = 75  # as published


def main() -> None:
    options = arguments(__doc__).parse_args()
    with workplace(options.folder) as place:
        small, large = load_preset("tele-flm-52b"), load_preset("tele-flm-1t")
        write_safetensors(place / "52b", small, sparse=True)
        files = write_bin(place / "1t", large, BIN_FILES, sparse=True)
        size = sum(file.stat().st_size for file in files)
        commands = {
            "grow 52B --to tele-flm-1t --dry-run": [
                "grow",
                str(place / "52b"),
                str(place / "o"),
                "--to",
                "tele-flm-1t",
            ],
            f"convert 1T ({BIN_FILES} .bin files) --dry-run": ["convert", str(place / "1t"), str(place / "o")],
        }
        rows = []
        for name, command in commands.items():
            runs = [run_processes([*TELEFLM, *command, "--dry-run"]) for _ in range(options.pairs)]
            rows.append([name, seconds(runs), mib(runs)])
    about = f"Sparse sources; the 1T's files are {size:,} bytes long. {options.pairs} runs."
    report("Planning", options.folder, about, ["command", "seconds", "peak RSS, MiB"], rows, GOALS)


if __name__ == "__main__":
    main()
